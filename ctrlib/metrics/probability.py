"""How good probabilities are: log-loss, normalised entropy, calibration, and reliability by bins."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError
from ctrlib.metrics.inputs import Bools, Floats, checked, checked_probabilities


def _mean(values: Floats, weights: Floats | None) -> float:
    if len(values) == 0:
        return math.nan
    return float(values.mean()) if weights is None else float(values @ weights / weights.sum())


def row_losses(positive: Bools, logits: Floats) -> Floats:
    """Of each row, in nats."""
    z = logits.astype(np.float64, copy=False)
    found: Floats = np.logaddexp(0.0, np.where(positive, -z, z))  # never log(0), and exact for tiny losses
    return found


def sigmoid(logits: Floats) -> Floats:
    """Logits as probabilities, in float64; none is too large.

    >>> sigmoid(np.array([-1000.0, 0.0])).tolist()
    [0.0, 0.5]
    """
    probabilities: Floats = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64, copy=False)))
    return probabilities


def entropy_of_rate(rate: float) -> float:
    """Of a draw with this chance, in nats."""
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate) if 0 < rate < 1 else 0.0


def log_loss(labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean negative log-likelihood in nats, from logits: log(1 + exp(-z)) for a click and log(1 + exp(z)) for none.

    From logits because a probability rounded to 1.0 has lost the loss; nothing is clipped. nan without rows.

    Shape: labels (B,), logits (B,), weights (B,) or None.

    >>> log_loss([1, 0], [100.0, -100.0]) < 1e-40
    True
    """
    positive, z, weight, _ = checked(labels, logits, weights, name="logits")
    return _mean(row_losses(positive, z), weight)


def normalized_entropy(labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Log-loss over the entropy of the base rate (He et al. 2014): 1 is a model that knows the base rate and no more.

    Comparable between data sets, where log-loss mostly says how rare clicks are. nan if there is one class only.

    Shape: labels (B,), logits (B,), weights (B,) or None.

    >>> round(normalized_entropy([1, 0, 0, 0], [-1.0986122887] * 4), 6)
    1.0
    """
    positive, z, weight, _ = checked(labels, logits, weights, name="logits")
    entropy = entropy_of_rate(_mean(positive.astype(np.float64), weight))
    return _mean(row_losses(positive, z), weight) / entropy if entropy else math.nan


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Sum predicted / sum observed: above 1 the model promises more clicks than there are. nan without positives.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> calibration([1, 0], [0.75, 0.75])
    1.5
    """
    positive, p, weight = checked_probabilities(labels, probabilities, weights)
    observed = _mean(positive.astype(np.float64), weight)
    return _mean(p, weight) / observed if observed > 0 else math.nan


def calibration_se(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Standard error of `calibration`, by which it would miss 1 if every probability were exactly right.

    sqrt(sum w^2 p (1 - p)) / sum w y: clicks are independent draws. nan without positives.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> calibration_se([1, 0, 1, 0], [0.5] * 4)
    0.5
    """
    positive, p, weight = checked_probabilities(labels, probabilities, weights)
    w = np.ones(len(p)) if weight is None else weight
    observed = float(w @ positive)
    return math.sqrt(float(w**2 @ (p * (1 - p)))) / observed if observed > 0 else math.nan


def expected_calibration_error(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None, *, num_bins: int = 20
) -> float:
    """Mean over bins, weighted by their rows, of |mean predicted - mean observed|.

    Bins hold equal mass, not equal width: at click rates of a few percent nearly every prediction is in the first of
    ten equal widths, and the error would say what `calibration` says already. Equal predictions share a bin, so the
    order of rows does not matter. Noise alone gives about sqrt(2 p (1 - p) num_bins / (pi B)), and `ece_by_chance` says
    how much. nan without rows.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> round(expected_calibration_error([1, 0, 1, 1], [0.4, 0.4, 0.9, 0.9], num_bins=2), 6)
    0.1
    """
    return reliability(labels, probabilities, weights, num_bins=num_bins).error


def ece_by_chance(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None, *, num_bins: int = 20
) -> float:
    """What `expected_calibration_error` would be, on average, if every probability were exactly right.

    In each bin the clicks would be a sum of independent draws. Of such a sum, the mean distance from its expectation is
    taken as that of the binomial with the same mean and variance (De Moivre); with weights that differ, as that of the
    normal. nan without rows. An error of this size says nothing against a model.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> round(ece_by_chance([1, 0], [0.5, 0.5]), 6)  # 0, 1 or 2 clicks where 1 is expected: a half, of two rows
    0.25
    """
    return reliability(labels, probabilities, weights, num_bins=num_bins).error_by_chance


@dataclass(frozen=True)
class Reliability:
    """Predicted and observed rates by bins of equal mass, ascending; arrays of one number a bin."""

    rows: Floats
    """Rows of the bin, by weight."""
    predicted: Floats
    observed: Floats
    by_chance: Floats
    """The mean of |predicted - observed| to be expected of probabilities that are exactly right."""

    def __bool__(self) -> bool:
        return len(self.rows) > 0

    @property
    def error(self) -> float:
        """`expected_calibration_error`."""
        return _mean(np.abs(self.predicted - self.observed), self.rows)

    @property
    def error_by_chance(self) -> float:
        """`ece_by_chance`."""
        return _mean(self.by_chance, self.rows)


def reliability(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None, *, num_bins: int = 20
) -> Reliability:
    """What was predicted and what came, in at most `num_bins` bins; no bin without rows. Bins: see the error below.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> bins = reliability([1, 0, 1, 1], [0.5, 0.5, 0.75, 0.75], num_bins=2)
    >>> bins.predicted.tolist(), bins.observed.tolist()
    ([0.5, 0.75], [0.5, 1.0])
    """
    if num_bins < 1:
        raise ArgumentError(f"num_bins must be at least 1, got {num_bins}: 20 is usual")
    positive, p, weight = checked_probabilities(labels, probabilities, weights)
    if len(p) == 0:
        nothing = np.zeros(0)
        return Reliability(nothing, nothing, nothing, nothing)
    order = np.argsort(p)
    p, positive = p[order], positive[order]
    uniform = weight is None
    weight = np.ones(len(p)) if weight is None else weight[order]
    starts = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
    mass = np.add.reduceat(weight, starts)
    sums = [np.add.reduceat(each, starts) for each in (weight * p, weight * positive, weight**2 * p * (1 - p))]
    return reliability_of_blocks(mass, *sums, uniform=uniform, num_bins=num_bins)


def reliability_of_blocks(
    mass: Floats, predicted: Floats, observed: Floats, variance: Floats, *, uniform: bool, num_bins: int = 20
) -> Reliability:
    """Bins of blocks of equal predictions, ascending.

    Args:
        mass: weight of each block.
        predicted: sum of its weights times probability.
        observed: weight of its positives.
        variance: sum of w^2 p (1 - p).
        uniform: all weights are 1.
        num_bins: at most.
    """
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    of_block = np.minimum((middle * num_bins).astype(np.int64), num_bins - 1)
    of_block = np.cumsum(np.r_[False, of_block[1:] != of_block[:-1]])  # a bin that a long tie leaves empty is none
    sums = [np.bincount(of_block, each) for each in (mass, predicted, observed, variance)]
    rows, predicted, observed, variance = (each.astype(np.float64) for each in sums)
    distance = _mean_distance(predicted, variance) if uniform else np.sqrt(2 * variance / math.pi)
    return Reliability(rows, predicted / rows, observed / rows, distance / rows)


def _mean_distance(mean: Floats, variance: Floats) -> Floats:
    """E |X - mean| of binomials with these means and variances: 2 q v C(n, v) p^v q^(n - v), v = floor(n p) + 1."""
    found = np.zeros(len(mean))
    for place, (m, v) in enumerate(zip(mean.tolist(), variance.tolist())):
        if v <= 0:
            continue
        p = min(max((m - v) / m, 1e-12), 1 - 1e-12)  # of a Poisson variable 0
        n = m / p
        k = math.floor(m) + 1
        if n < k:  # all draws are nearly sure: no binomial, n being no whole number
            found[place] = math.sqrt(2 * v / math.pi)
            continue
        # C(n, k) p^k as a product, since lgamma loses all digits where n is large.
        log_choose = sum(math.log((n - i) * p / (k - i)) for i in range(k)) if k < 1000 else None
        if log_choose is None:
            found[place] = math.sqrt(2 * v / math.pi)
        else:
            found[place] = 2 * k * math.exp(log_choose + (n - k + 1) * math.log1p(-p))
    return found
