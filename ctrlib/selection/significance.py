"""Is one model better than another, where both the seeds of training and the rows of test could have been others?

Each of two models is trained with several seeds, and all runs are scored on the same rows. A test on one run of each
(DeLong's, say) takes the rows for the only thing that varies: two trainings of one and the same model then "differ
significantly" far more often than a test may say. A t-test over seeds takes the seeds for the only thing, and calls
significant what a few rows have decided. Radiology has the same question, with readers where we have seeds and cases
where we have rows, and its answer is what is computed here: the analysis of variance of Obuchowski and Rockette
(Communications in Statistics - Simulation and Computation 24, 1995, https://doi.org/10.1080/03610919508813243) with
the denominator and the degrees of freedom of Hillis (Statistics in Medicine 26, 2007,
https://doi.org/10.1002/sim.2532), in the form for readers that read with one method only (Hillis, Statistics in
Medicine 33, 2014, https://doi.org/10.1002/sim.5926), since a seed of one model has nothing to do with that of another.

With A_s and B_s the scores of S runs each on the same rows, D = mean A - mean B. By the law of total variance

    var D = E[var(D | rows)] + var(E[D | rows])
          = 2 s^2 / S        + 2 (Cov2 - Cov3)

s^2 is the variance of a score over seeds, on these rows, pooled over both models; Cov2 is the covariance, over draws of
rows, of the scores of two runs of one model, Cov3 that of a run of each. The second term is what remains of the rows'
noise when seeds are averaged out; where both models are the same it is 0, however much single runs differ. It is
estimated from influences (for AUC, DeLong's placements) and is set to 0 where its estimate is below. D divided by the
root of the sum has, where there is no difference, about a t distribution, with the degrees of freedom of s^2 stretched
by how much of the sum s^2 is not:

    df = (2 s^2 / S + 2 (Cov2 - Cov3))^2 / ((2 s^2 / S)^2 / (2 (S - 1)))

Scores of seeds are taken for normal, as in any t-test: where some runs fail to learn at all, a few seeds tell little.
The rows of train are as they are: the test speaks of these training rows, other seeds, and other rows of test.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from ctrlib.errors import ArgumentError
from ctrlib.metrics.inputs import checked
from ctrlib.metrics.probability import row_losses

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The mean score of a minus that of b, what it owes to chance, and the two-sided test of no difference."""

    difference: float
    standard_error: float
    of_seeds: float
    """The part of the squared error that other seeds would change."""
    of_rows: float
    """The part that other rows of test would change."""
    degrees: float
    p_value: float


def difference_of_means(a: npt.ArrayLike, b: npt.ArrayLike, covariance: npt.ArrayLike) -> Difference:
    """Test whether models differ, by the scores of their runs and the covariance of these over draws of test rows.

    Shape: a (S,), b (R,), covariance (S + R, S + R), of the runs of a and then those of b; S and R of 2 or more.

    Raises:
        ArgumentError: there are fewer than two runs, or the shapes do not fit.

    >>> rows = np.array([[4.0, 3.0, 2.0, 2.0], [3.0, 4.0, 2.0, 2.0], [2.0, 2.0, 4.0, 3.0], [2.0, 2.0, 3.0, 4.0]]) / 1e4
    >>> found = difference_of_means([0.80, 0.82], [0.76, 0.78], rows)
    >>> round(found.difference, 6), round(found.of_seeds, 6), round(found.of_rows, 6)
    (0.04, 0.0002, 0.0002)
    >>> round(found.degrees, 6), round(found.p_value, 3)
    (8.0, 0.081)
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (a, b))
    joint = np.asarray(covariance, dtype=np.float64)
    if first.ndim != 1 or second.ndim != 1 or min(len(first), len(second)) < 2:
        raise ArgumentError(
            f"expected the scores of two runs or more of each model, got shapes {first.shape} and {second.shape}: of "
            "one run nobody knows what its seed did"
        )
    size = len(first) + len(second)
    if joint.shape != (size, size):
        raise ArgumentError(f"expected a covariance of shape {(size, size)}, got {joint.shape}")
    freedom = size - 2
    squares = ((first - first.mean()) ** 2).sum() + ((second - second.mean()) ** 2).sum()
    of_seeds = float(squares / freedom * (1 / len(first) + 1 / len(second)))
    within = [_off_diagonal(joint[: len(first), : len(first)]), _off_diagonal(joint[len(first) :, len(first) :])]
    between = float(joint[: len(first), len(first) :].mean())
    of_rows = max(0.0, sum(within) - 2 * between)
    difference, variance = float(first.mean() - second.mean()), of_seeds + of_rows
    error = math.sqrt(variance)
    degrees = variance**2 / (of_seeds**2 / freedom) if of_seeds > 0 else math.inf
    p_value = 2 * _below(-abs(difference) / error, degrees) if error > 0 else float(difference == 0)
    return Difference(difference, error, of_seeds, of_rows, degrees, p_value)


def _below(value: float, degrees: float) -> float:
    """The probability that a t distribution gives less; scipy.stats says the same, but takes a second to import."""
    return float(special.ndtr(value) if math.isinf(degrees) else special.stdtr(degrees, value))


def _off_diagonal(square: Floats) -> float:
    size = len(square)
    return float((square.sum() - np.trace(square)) / (size * (size - 1)))


def auc_influence(
    labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> tuple[float, Floats]:
    """AUC, and what each row adds to its error: the sum of the squares is DeLong's variance, where all weigh the same.

    Of two models on the same rows, the sum of the products is the covariance of their AUCs.

    Shape: labels (B,), scores (B,), weights (B,); returns a float and (B,).

    >>> value, influence = auc_influence([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    >>> value, round(float((influence**2).sum()) ** 0.5, 4)
    (0.75, 0.3536)
    """
    positive, score, given, _ = checked(labels, scores, weights=weights)
    weight = np.ones(len(score)) if given is None else np.asarray(given, dtype=np.float64)
    order = np.argsort(score, kind="stable")
    ascending, is_positive, ordered = score[order], positive[order], weight[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    sizes = np.diff(np.r_[starts, len(order)])
    of_positives = np.add.reduceat(np.where(is_positive, ordered, 0.0), starts)
    of_negatives = np.add.reduceat(np.where(is_positive, 0.0, ordered), starts)
    total_positive, total_negative = of_positives.sum(), of_negatives.sum()
    below = (np.cumsum(of_negatives) - of_negatives / 2) / total_negative  # of a positive: the share of negatives below
    above = 1 - (np.cumsum(of_positives) - of_positives / 2) / total_positive
    placement = np.empty(len(order))
    placement[order] = np.where(is_positive, np.repeat(below, sizes), np.repeat(above, sizes))
    value = float((of_positives * below).sum() / total_positive)
    influence = weight * (placement - value)
    for rows, total in ((positive, total_positive), (~positive, total_negative)):
        number = int(rows.sum())
        influence[rows] *= math.sqrt(number / max(number - 1, 1)) / total
    return value, influence


def log_loss_influence(
    labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> tuple[float, Floats]:
    """Log-loss in nats, and what each row adds to its error; as `auc_influence`.

    >>> value, influence = log_loss_influence([0, 1, 1], [0.0, 0.0, 2.0])
    >>> round(value, 3), influence.round(3).tolist()
    (0.504, [0.077, 0.077, -0.154])
    """
    positive, logit, given, _ = checked(labels, logits, weights=weights)
    losses = row_losses(positive, logit)
    weight = np.ones(len(losses)) if given is None else np.asarray(given, dtype=np.float64)
    value = float(np.average(losses, weights=weight))
    scale = math.sqrt(len(losses) / max(len(losses) - 1, 1)) / weight.sum()
    return value, weight * (losses - value) * scale
