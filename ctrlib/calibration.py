"""One calibrator of a trained model: each label's logit gets a slope and an intercept, fitted on validation.

J. Platt, "Probabilistic outputs for support vector machines", 1999, with logits in the place of margins. A network that
was trained long is too sure of itself, and one that was trained on other shares of clicks is off by a constant: the
slope mends the first, the intercept the second (which a temperature alone cannot). Both keep the order of the scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError

STEPS = 100  # of Newton's method at most; it takes about six
SMALLEST = 1e-12  # of a step's promise, in nats a row


class Calibration(nn.Module):
    """z' = slope z + intercept, for each label. Its numbers are no weights: model.json holds them.

    Shape: (B, T) logits -> (B, T) logits.

    Raises:
        ValueError: the numbers are not finite, or a slope is not above 0, which would turn the order round.

    >>> Calibration(slope=[0.5], intercept=[-1.0])(torch.tensor([[2.0]])).tolist()
    [[0.0]]
    """

    slope: Tensor
    intercept: Tensor

    def __init__(self, *, slope: Sequence[float], intercept: Sequence[float]) -> None:
        super().__init__()
        if len(slope) != len(intercept) or not all(map(math.isfinite, (*slope, *intercept))) or min(slope) <= 0:
            raise ArgumentError(
                f"a calibration has a slope above 0 and an intercept for each label, got {slope} and {intercept}: "
                "copy model.json again, or train with calibrate"
            )
        self.register_buffer("slope", torch.tensor(slope, dtype=torch.float32), persistent=False)
        self.register_buffer("intercept", torch.tensor(intercept, dtype=torch.float32), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, T) -> (B, T)."""
        return logits * self.slope + self.intercept

    def as_dict(self) -> dict[str, list[float]]:
        """What makes it again, as plain data."""
        return {"slope": self.slope.tolist(), "intercept": self.intercept.tolist()}

    @classmethod
    def of(cls, described: Mapping[str, Any], num_labels: int) -> Calibration:
        """What `as_dict` gave.

        Raises:
            ValueError: it is something else, or of another number of labels.
        """
        names = ("slope", "intercept")
        fits = isinstance(described, Mapping) and set(described) == set(names)
        fits = fits and all(isinstance(described[name], list | tuple) for name in names)
        if not fits or any(len(described[name]) != num_labels for name in names):
            raise ArgumentError(
                f"calibration is {described!r}, expected a slope and an intercept for each of {num_labels} labels"
            )
        return cls(slope=described["slope"], intercept=described["intercept"])


def fit_calibration(logits: npt.ArrayLike, labels: npt.ArrayLike, weights: npt.ArrayLike) -> Calibration:
    """The calibrator with the least log-loss on these rows, by Newton's method, in float64.

    Platt's targets stand in the place of 1 and 0, (P + 1) / (P + 2) and 1 / (N + 2) with P positives and N negatives:
    without them, scores that separate the classes would get an endless slope. Logits are centred and scaled first and
    weights brought to a mean of 1, so that the units of neither matter. Rows of weight 0 and missing labels (NaN) are
    left out. Where scores rank the wrong way round, so that the best slope would be 0 or below, the slope stays 1.

    Shape: logits (B, T), labels (B, T), weights (B,).

    Raises:
        ValueError: a label has one class only.

    >>> draw = np.random.default_rng(0)
    >>> true = draw.normal(-2, 1, (100_000, 1))
    >>> labels = draw.random((100_000, 1)) < 1 / (1 + np.exp(-true))
    >>> found = fit_calibration(2 * true + 3, labels, np.ones(100_000))
    >>> round(found.slope.item(), 1), round(found.intercept.item(), 1)
    (0.5, -1.5)
    """
    z, y, w = (np.asarray(values, dtype=np.float64) for values in (logits, labels, weights))
    found = [_fit(z[:, task], y[:, task], w, task) for task in range(z.shape[1])]
    return Calibration(slope=[slope for slope, _ in found], intercept=[intercept for _, intercept in found])


Array = npt.NDArray[np.float64]


def _fit(z: Array, y: Array, w: Array, task: int) -> tuple[float, float]:
    known = ~np.isnan(y) & (w > 0)
    z, y, w = z[known], y[known], w[known]
    if not 0 < y.sum() < len(y):
        raise ArgumentError(f"label {task} has one class only among {len(y)} rows: nothing can be calibrated by them")
    w = w / w.mean()
    positives = float(w @ y)
    target = np.where(y == 1, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))
    centre, scale = float(z.mean()), float(z.std())
    if scale > 0:
        slope, intercept = _newton(np.stack([(z - centre) / scale, np.ones(len(z))]), target, w)
        if slope > 0:
            return slope / scale, intercept - slope * centre / scale
    (intercept,) = _newton(np.ones((1, len(z))), target, w, z)
    return 1.0, intercept


def _newton(x: Array, target: Array, w: Array, offset: Array | float = 0.0) -> list[float]:
    """The weights of the rows of `x`, (P, B), whose sum with `offset` has the least log-loss; steps are halved."""

    def loss_of(weights: Array) -> float:
        u = weights @ x + offset
        return float(w @ (np.logaddexp(0, u) - target * u)) / len(w)

    weights = np.zeros(len(x))
    loss = loss_of(weights)
    for _ in range(STEPS):
        p = np.exp(-np.logaddexp(0, -(weights @ x + offset)))
        gradient = x @ (w * (p - target)) / len(w)
        curvature = (x * (w * p * (1 - p))) @ x.T / len(w)
        step = np.linalg.solve(curvature + 1e-12 * np.trace(curvature) * np.eye(len(x)), gradient)
        if gradient @ step < SMALLEST:
            break
        size = 1.0
        while (now := loss_of(weights - size * step)) > loss and size > 1e-6:
            size /= 2
        weights, loss = weights - size * step, now
    return [float(weight) for weight in weights]
