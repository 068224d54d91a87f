"""What metrics are given, checked: labels, scores and weights become arrays, or it is said what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]


def vector(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """One number a row."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ArgumentError(
            f"{name} must be one-dimensional (B,), got shape {array.shape}: "
            f"pass one task at a time, such as {name}[:, 0]"
        )
    return array


def floats(array: npt.NDArray[Any], name: str) -> Floats:
    """float32 and float64 as they are, everything else as the one that holds it."""
    if array.dtype.kind not in "biuf":
        raise ArgumentError(f"{name} must be numbers, got dtype {array.dtype}: convert them to float")
    if array.dtype in (np.float32, np.float64):
        return array
    return array.astype(np.float32 if array.dtype == np.float16 else np.float64)


def refuse(bad: Bools, array: npt.NDArray[Any], expected: str, mend: str) -> None:
    """Say what stands where `bad` is true, if it is anywhere."""
    if bad.any():
        first = int(np.argmax(bad))
        raise ArgumentError(
            f"{expected}, got {int(np.count_nonzero(bad))} other values of {len(array)}, "
            f"the first {array[first].item()!r} at index {first}: {mend}"
        )


def checked(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    name: str = "scores",
    groups: npt.ArrayLike | None = None,
) -> tuple[Bools, Floats, Floats | None, npt.NDArray[Any] | None]:
    """Labels as booleans, scores, weights (None if all are 1) and groups, without the rows of weight 0."""
    label, score = vector(labels, "labels"), floats(vector(scores, name), name)
    group = None if groups is None else vector(groups, "groups")
    weight = None if weights is None else floats(vector(weights, "weights"), "weights")
    for other, other_name in ((score, name), (group, "groups"), (weight, "weights")):
        if other is not None and len(other) != len(label):
            raise ArgumentError(
                f"{other_name} must have one value per label, got {len(other)} for {len(label)} labels: "
                "pass the same rows to both"
            )
    if label.dtype.kind not in "biuf":
        raise ArgumentError(f"labels must be 0 or 1, got dtype {label.dtype}: convert them to numbers")
    if weight is not None:
        bad = ~(np.isfinite(weight) & (weight >= 0))
        refuse(bad, weight, "weights must be finite and >= 0", "clip them, or give 0 to rows that must not count")
        keep = weight > 0
        if not keep.all():
            label, score, weight = label[keep], score[keep], weight[keep]
            group = None if group is None else group[keep]
        weight = None if (weight == 1).all() else weight.astype(np.float64)
    positive: Bools = label == 1
    if np.count_nonzero(positive) + np.count_nonzero(label == 0) != len(label):
        bad = ~(positive | (label == 0))
        refuse(bad, label, "labels must be 0 or 1", "drop rows without a label, or give them weight 0")
    if not np.isfinite(score).all():
        mend = "the model has diverged or divided by zero; find the first such batch"
        refuse(~np.isfinite(score), score, f"{name} must be finite", mend)
    return positive, score, weight, group


def checked_probabilities(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[Bools, Floats, Floats | None]:
    """As `checked`, of probabilities, in float64."""
    positive, p, weight, _ = checked(labels, probabilities, weights, name="probabilities")
    refuse((p < 0) | (p > 1), p, "probabilities must be within [0, 1]", "pass the sigmoid of the logits")
    return positive, p.astype(np.float64, copy=False), weight
