"""How good are binary predictions: ranking (AUC, GAUC, PR-AUC) and probabilities (log-loss, calibration). numpy only.

Conventions, the same in every function:

* `labels` (B,) are 0 or 1 (numbers or booleans); scores, logits, probabilities and `weights` are (B,) and finite.
  Anything else is a ValueError that says what came. Shape legend: B examples.
* A row of weight 0 is padding: it is dropped first and neither its label nor its score is looked at.
* Ties count one half, so the order of the rows never matters: constant scores have AUC 0.5.
* A metric that the data do not define (AUC of one class only) is nan, not an error: a training loop must survive a
  batch or a group without positives.

Sources: DeLong et al., "Comparing the areas under two or more correlated ROC curves", Biometrics 1988; Sun & Xu, "Fast
implementation of DeLong's algorithm", IEEE Signal Processing Letters 2014 (https://doi.org/10.1109/LSP.2014.2337313);
Zhou et al., "Deep Interest Network", KDD 2018 (GAUC; https://arxiv.org/abs/1706.06978); He et al., "Practical lessons
from predicting clicks on ads at Facebook", ADKDD 2014 (normalised entropy; https://doi.org/10.1145/2648584.2648589).

>>> labels, logits = [1, 0, 1, 0], [2.0, -1.0, 0.5, 0.5]
>>> auc(labels, logits)  # of four pairs three are in order, one is tied
0.875
>>> round(log_loss(labels, logits), 4)
0.4721
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError

__all__ = [
    "DeLong",
    "GroupAUC",
    "PairedTest",
    "Reliability",
    "StreamingAUC",
    "StreamingMetrics",
    "auc",
    "auc_delong",
    "auc_paired_test",
    "average_precision",
    "calibration",
    "calibration_se",
    "ece_by_chance",
    "evaluate_binary",
    "expected_calibration_error",
    "gauc",
    "log_loss",
    "normalized_entropy",
    "reliability",
]

Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

# 18 of a float32's 32 bits: sign, exponent and 9 bits of mantissa. A bin is 0.2% wide relative to the score, and only
# the order *within* a bin is lost (it counts one half), a second-order error: ~1e-6 of AUC. 2 x 2 MiB of counts.
BIN_BITS = 18
NUM_BINS = 1 << BIN_BITS


# --------------------------------------------------------------------------------------------------------------- input


def _vector(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ArgumentError(
            f"{name} must be one-dimensional (B,), got shape {array.shape}: "
            f"pass one task at a time, such as {name}[:, 0]"
        )
    return array


def _floats(array: npt.NDArray[Any], name: str) -> Floats:
    """float32 and float64 as they are, everything else as the one that holds it."""
    if array.dtype.kind not in "biuf":
        raise ArgumentError(f"{name} must be numbers, got dtype {array.dtype}: convert them to float")
    if array.dtype in (np.float32, np.float64):
        return array
    return array.astype(np.float32 if array.dtype == np.float16 else np.float64)


def _refuse(bad: Bools, array: npt.NDArray[Any], expected: str, mend: str) -> None:
    if bad.any():
        first = int(np.argmax(bad))
        raise ArgumentError(
            f"{expected}, got {int(np.count_nonzero(bad))} other values of {len(array)}, "
            f"the first {array[first].item()!r} at index {first}: {mend}"
        )


def _checked(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    name: str = "scores",
    groups: npt.ArrayLike | None = None,
) -> tuple[Bools, Floats, Floats | None, npt.NDArray[Any] | None]:
    """Labels as booleans, scores, weights (None if all are 1) and groups, without the rows of weight 0."""
    label, score = _vector(labels, "labels"), _floats(_vector(scores, name), name)
    group = None if groups is None else _vector(groups, "groups")
    weight = None if weights is None else _floats(_vector(weights, "weights"), "weights")
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
        _refuse(bad, weight, "weights must be finite and >= 0", "clip them, or give 0 to rows that must not count")
        keep = weight > 0
        if not keep.all():
            label, score, weight = label[keep], score[keep], weight[keep]
            group = None if group is None else group[keep]
        weight = None if (weight == 1).all() else weight.astype(np.float64)
    positive: Bools = label == 1
    if np.count_nonzero(positive) + np.count_nonzero(label == 0) != len(label):
        bad = ~(positive | (label == 0))
        _refuse(bad, label, "labels must be 0 or 1", "drop rows without a label, or give them weight 0")
    if not np.isfinite(score).all():
        mend = "the model has diverged or divided by zero; find the first such batch"
        _refuse(~np.isfinite(score), score, f"{name} must be finite", mend)
    return positive, score, weight, group


def _checked_probabilities(
    labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None
) -> tuple[Bools, Floats, Floats | None]:
    positive, p, weight, _ = _checked(labels, probabilities, weights, name="probabilities")
    _refuse((p < 0) | (p > 1), p, "probabilities must be within [0, 1]", "pass the sigmoid of the logits")
    return positive, p.astype(np.float64, copy=False), weight


# ----------------------------------------------------------------------------------------------------------------- AUC


def _ordered_bits(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """float32 -> uint32 with the same order: flip all bits of negative numbers, the sign bit of the others."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0: the two zeros are one score
    sign = (bits.view(np.int32) >> 31).view(np.uint32)  # all ones if negative
    bits ^= sign | np.uint32(0x80000000)
    return bits


def _auc_from_blocks(positives: Floats, negatives: Floats) -> float:
    """AUC of (weighted) counts per distinct score or bin, ascending."""
    num_pairs = float(positives.sum()) * float(negatives.sum())
    if num_pairs == 0:
        return math.nan
    below = np.cumsum(negatives) - negatives / 2
    return min(1.0, float(positives @ below) / num_pairs)


def _tie_blocks(positive: Bools, scores: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    """Weight of positives and of negatives at each distinct score, ascending."""
    order = np.argsort(scores)
    scores, positive = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    weight = np.ones(len(scores)) if weights is None else weights[order]
    positives = np.add.reduceat(np.where(positive, weight, 0.0), starts)
    return positives, np.add.reduceat(np.where(positive, 0.0, weight), starts)


def _auc_float32(positive: Bools, scores: npt.NDArray[np.float32]) -> float:
    # One sort of integers (score, label) and no argsort: numpy sorts integers with vector instructions. The label is
    # the lowest bit, so within a tie negatives come first and every tied pair counts 1 at first.
    num_positives = int(np.count_nonzero(positive))
    num_negatives = len(scores) - num_positives
    if num_positives == 0 or num_negatives == 0:
        return math.nan
    keys = _ordered_bits(scores).astype(np.uint64)
    keys <<= np.uint64(1)
    keys |= positive
    keys.sort()
    label = (keys & np.uint64(1)).astype(np.bool_)
    # positions of the positives = negatives before them + positives before them
    in_order = int(np.flatnonzero(label).sum()) - num_positives * (num_positives - 1) // 2
    # Take half back where a tie holds both classes: there a key is followed by itself + 1, the same score with label 1.
    mixed = keys[1:][(keys[1:] ^ keys[:-1]) == 1]
    starts, ends = np.searchsorted(keys, mixed - np.uint64(1)), np.searchsorted(keys, mixed, side="right")
    middles = np.searchsorted(keys, mixed)
    tied = int(((middles - starts) * (ends - middles)).sum())
    return (2 * in_order - tied) / (2 * num_positives * num_negatives)


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    r"""Area under the ROC curve: P(score of a positive > score of a negative) + P(equal) / 2, exact, O(B log B).

    With weights, the pair (i, j) counts w_i w_j. float64 scores are compared as float64. nan if there is one class
    only.

    Shape: labels (B,), scores (B,), weights (B,) or None.

    >>> auc([0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8])
    0.875
    >>> auc([1, 1], [0.3, 0.4])
    nan
    """
    positive, score, weight, _ = _checked(labels, scores, weights)
    if len(score) == 0:
        return math.nan
    if weight is not None:
        return _auc_from_blocks(*_tie_blocks(positive, score, weight))
    if score.dtype == np.float32:
        return _auc_float32(positive, score)
    p, n = np.sort(score[positive]), np.sort(score[~positive])
    if len(p) == 0 or len(n) == 0:
        return math.nan
    few, many = (p, n) if len(p) < len(n) else (n, p)
    num_pairs = len(p) * len(n)
    below = int(_twice_below(few, many).sum())  # pairs with `many` below `few`: wrong ones if `few` is the negatives
    return (below if few is p else 2 * num_pairs - below) / (2 * num_pairs)


def _twice_below(queries: Floats, ascending: Floats) -> npt.NDArray[np.int64]:
    """Per query: twice the number of values below it, plus the number equal to it."""
    return np.searchsorted(ascending, queries, side="left") + np.searchsorted(ascending, queries, side="right")


class StreamingAUC:
    """AUC over batches and ranks in fixed memory: a histogram over the bits of the float32 score, 2 x 2^18 counts.

    The bits of a float, mapped so that unsigned order is the floats' order, make bins whose width is relative to the
    score: no range to choose, and as fine at logit -9 as at 0. Ties within a bin count one half. The difference to
    `auc` is about 1e-6 on smooth scores, at every base rate. Give it logits: probabilities close to 1 crowd into few
    bins.

    `merge` adds counts, so the result is bit-equal in any order of batches and ranks as long as weights are whole
    numbers (padding is 0 or 1); with fractional weights it is equal to rounding.

    Shape: update takes labels (B,), scores (B,), weights (B,) or None.

    >>> left, right = StreamingAUC(), StreamingAUC()
    >>> left.update([1, 0], [2.0, -1.0])
    >>> right.update([1, 0], [0.5, 0.5])
    >>> left.merge(right)
    >>> left.compute()
    0.875
    """

    def __init__(self) -> None:
        self.counts = np.zeros((2, NUM_BINS))  # [label, bin]; float64 is exact up to 2^53 rows

    def update(self, labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Add a batch."""
        self._add(*_checked(labels, scores, weights)[:3])

    def _add(self, positive: Bools, score: Floats, weight: Floats | None) -> None:
        counts = self.counts.reshape(-1)
        for start in range(0, len(score), 1 << 15):  # pieces whose intermediate arrays stay in the cache
            rows = slice(start, start + (1 << 15))
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf: the last bin, still in order
                bins = _ordered_bits(score[rows].astype(np.float32, copy=False))
            bins >>= np.uint32(32 - BIN_BITS)
            bins |= positive[rows].astype(np.uint32) << np.uint32(BIN_BITS)
            np.add.at(counts, bins, 1.0 if weight is None else weight[rows])

    def merge(self, other: StreamingAUC) -> None:
        """Add the rows that another has seen, such as another rank's."""
        self.counts += other.counts

    def compute(self) -> float:
        """The AUC so far; nan while there is one class only."""
        occupied = np.flatnonzero(self.counts[0] + self.counts[1])  # logits use a few percent of the bins
        return _auc_from_blocks(self.counts[1, occupied], self.counts[0, occupied])

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of the counts; sums of it over ranks are valid states."""
        return {"counts": self.counts.copy()}

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Replace the counts.

        Raises:
            ValueError: the state is not one of this class.
        """
        self.counts = _from_state(state, {"counts": self.counts.shape})["counts"]


def _from_state(
    state: dict[str, npt.NDArray[Any]], shapes: dict[str, tuple[int, ...] | None]
) -> dict[str, npt.NDArray[np.float64]]:
    if set(state) != set(shapes):
        raise ArgumentError(
            f"state must have keys {sorted(shapes)}, got {sorted(state)}: load what state_dict() returned"
        )
    arrays = {key: np.array(value, dtype=np.float64) for key, value in state.items()}
    for key, shape in shapes.items():
        if shape is not None and arrays[key].shape != shape:
            raise ArgumentError(
                f"state {key!r} must have shape {shape}, got {arrays[key].shape}: it is of another version of ctrlib"
            )
    return arrays


# -------------------------------------------------------------------------------------------------------------- DeLong


@dataclass(frozen=True)
class DeLong:
    """An AUC with its standard error and a normal confidence interval, cut to [0, 1]."""

    auc: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """AUC of a minus AUC of b on the same rows, its standard error, and the two-sided normal test of no difference."""

    difference: float
    standard_error: float
    z: float
    p_value: float


def _placements(positive: Bools, scores: Floats) -> tuple[Floats, Floats]:
    """V10 (per positive: share of negatives below) and V01 (per negative: share of positives above), ties one half.

    Sun & Xu get these as differences of midranks; counting along one sort gives the same numbers, without rounding.
    """
    order = np.argsort(scores)
    ascending, label = scores[order], positive[order]
    starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
    sizes = np.diff(np.r_[starts, len(order)])
    p = np.add.reduceat(label, starts, dtype=np.int64)
    n = sizes - p
    placement = np.empty(len(order))
    v10 = (np.cumsum(n) - n / 2) / n.sum()
    v01 = 1 - (np.cumsum(p) - p / 2) / p.sum()
    placement[order] = np.where(label, np.repeat(v10, sizes), np.repeat(v01, sizes))
    return placement[positive], placement[~positive]


def auc_delong(labels: npt.ArrayLike, scores: npt.ArrayLike, confidence: float = 0.95) -> DeLong:
    """AUC with DeLong's standard error, var = S10 / m + S01 / n, in O(B log B).

    S10 and S01 are the sample variances of the placements of the m positives and n negatives. Rows are taken as
    independent: with many rows per user the true error is larger. A class of fewer than two rows has error nan.

    Shape: labels (B,), scores (B,).

    >>> result = auc_delong([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    >>> result.auc, round(result.standard_error, 4)
    (0.75, 0.3536)
    """
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence must be between 0 and 1, got {confidence}: 0.95 is usual")
    positive, score, _, _ = _checked(labels, scores)
    m = int(np.count_nonzero(positive))
    n = len(score) - m
    if m < 2 or n < 2:
        return DeLong(auc(positive, score), math.nan, math.nan, math.nan)
    v10, v01 = _placements(positive, score)
    value = float(v10.mean())
    error = math.sqrt(float(v10.var(ddof=1)) / m + float(v01.var(ddof=1)) / n)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return DeLong(value, error, max(0.0, value - half), min(1.0, value + half))


def auc_paired_test(labels: npt.ArrayLike, scores_a: npt.ArrayLike, scores_b: npt.ArrayLike) -> PairedTest:
    """Is the AUC of `scores_a` different from that of `scores_b` on the same rows? DeLong's test.

    Two models err on the same hard rows, so the difference is known far better than either AUC: the variance is that of
    the placements' differences, which is S_aa + S_bb - 2 S_ab. Equal scores give z 0 and p 1; one class only gives nan.

    Shape: labels (B,), scores_a (B,), scores_b (B,).

    >>> result = auc_paired_test([0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.3, 0.2, 0.4, 0.5])
    >>> round(result.difference, 4), round(result.p_value, 3)
    (0.1667, 0.48)
    """
    positive, a, _, _ = _checked(labels, scores_a, name="scores_a")
    _, b, _, _ = _checked(labels, scores_b, name="scores_b")
    m = int(np.count_nonzero(positive))
    n = len(a) - m
    if m < 2 or n < 2:
        return PairedTest(auc(positive, a) - auc(positive, b), math.nan, math.nan, math.nan)
    (a10, a01), (b10, b01) = _placements(positive, a), _placements(positive, b)
    difference = float(a10.mean()) - float(b10.mean())
    error = math.sqrt(float((a10 - b10).var(ddof=1)) / m + float((a01 - b01).var(ddof=1)) / n)
    z = difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
    return PairedTest(difference, error, z, math.erfc(abs(z) / math.sqrt(2)))


# ---------------------------------------------------------------------------------------------------------------- GAUC


@dataclass(frozen=True)
class GroupAUC:
    """GAUC and what it rests on: groups with both classes are used, the others dropped with their rows."""

    value: float
    groups_used: int
    groups_dropped: int
    rows_dropped: int


def gauc(
    labels: npt.ArrayLike, scores: npt.ArrayLike, groups: npt.ArrayLike, weights: npt.ArrayLike | None = None
) -> GroupAUC:
    """Mean of the AUC within each group (user), weighted by the group's impressions (DIN, equation 7).

    GAUC = sum_g w_g AUC_g / sum_g w_g, with w_g the rows (the sum of weights) of group g. A group of one class has no
    AUC: it is left out of both sums and counted. Value nan if no group is left. No Python loop over groups: one sort.

    Shape: labels (B,), scores (B,), groups (B,) of integers or strings, weights (B,) or None.

    >>> gauc([1, 0, 0, 1, 1, 1, 0], [0.9, 0.8, 0.95, 0.1, 0.2, 0.7, 0.2], ["u1"] * 3 + ["u2"] * 2 + ["u3"] * 2)
    GroupAUC(value=0.7, groups_used=2, groups_dropped=1, rows_dropped=2)
    """
    positive, score, weight, group = _checked(labels, scores, weights, groups=groups)
    assert group is not None
    if len(score) == 0:
        return GroupAUC(math.nan, 0, 0, 0)
    if group.dtype.kind == "f":
        _refuse(np.isnan(group), group, "groups must not be nan", "drop these rows, or give them a group of their own")
    try:
        codes = np.unique(group, return_inverse=True)[1]
    except TypeError as error:  # None among strings
        raise ArgumentError(
            f"groups must be of one type, all integers or all strings, and not None: {error}"
        ) from error
    rows = np.bincount(codes)
    if score.dtype == np.float32:  # group and score in one integer: four times as fast as lexsort
        order = np.argsort((codes.astype(np.uint64) << np.uint64(32)) | _ordered_bits(score))
    else:
        order = np.lexsort((score, codes))
    codes, score, positive = codes[order], score[order], positive[order]
    weight = np.ones(len(score)) if weight is None else weight[order]
    # a block is one score of one group
    starts = np.flatnonzero(np.r_[True, (codes[1:] != codes[:-1]) | (score[1:] != score[:-1])])
    p = np.add.reduceat(np.where(positive, weight, 0.0), starts)
    n = np.add.reduceat(np.where(positive, 0.0, weight), starts)
    of_block = codes[starts]
    group_p, group_n = np.bincount(of_block, p), np.bincount(of_block, n)
    below = np.cumsum(n) - n / 2 - (np.cumsum(group_n) - group_n)[of_block]
    in_order = np.bincount(of_block, p * below)
    used = (group_p > 0) & (group_n > 0)
    num_used = int(np.count_nonzero(used))
    value = math.nan
    if num_used:
        share = group_p[used] + group_n[used]
        value = float(share @ (in_order[used] / (group_p[used] * group_n[used])) / share.sum())
    return GroupAUC(value, num_used, len(used) - num_used, int(rows[~used].sum()))


# ------------------------------------------------------------------------------------------------------- probabilities


def _mean(values: Floats, weights: Floats | None) -> float:
    if len(values) == 0:
        return math.nan
    return float(values.mean()) if weights is None else float(values @ weights / weights.sum())


def _losses(positive: Bools, logits: Floats) -> Floats:
    z = logits.astype(np.float64, copy=False)
    losses: Floats = np.logaddexp(0.0, np.where(positive, -z, z))  # never log(0), and exact for tiny losses
    return losses


def _sigmoid(logits: Floats) -> Floats:
    probabilities: Floats = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64, copy=False)))
    return probabilities


def _entropy(rate: float) -> float:
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate) if 0 < rate < 1 else 0.0


def log_loss(labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean negative log-likelihood in nats, from logits: log(1 + exp(-z)) for a click and log(1 + exp(z)) for none.

    From logits because a probability rounded to 1.0 has lost the loss; nothing is clipped. nan without rows.

    Shape: labels (B,), logits (B,), weights (B,) or None.

    >>> log_loss([1, 0], [100.0, -100.0]) < 1e-40
    True
    """
    positive, z, weight, _ = _checked(labels, logits, weights, name="logits")
    return _mean(_losses(positive, z), weight)


def normalized_entropy(labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Log-loss over the entropy of the base rate (He et al. 2014): 1 is a model that knows the base rate and no more.

    Comparable between data sets, where log-loss mostly says how rare clicks are. nan if there is one class only.

    Shape: labels (B,), logits (B,), weights (B,) or None.

    >>> round(normalized_entropy([1, 0, 0, 0], [-1.0986122887] * 4), 6)
    1.0
    """
    positive, z, weight, _ = _checked(labels, logits, weights, name="logits")
    entropy = _entropy(_mean(positive.astype(np.float64), weight))
    return _mean(_losses(positive, z), weight) / entropy if entropy else math.nan


def calibration(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Sum predicted / sum observed: above 1 the model promises more clicks than there are. nan without positives.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> calibration([1, 0], [0.75, 0.75])
    1.5
    """
    positive, p, weight = _checked_probabilities(labels, probabilities, weights)
    observed = _mean(positive.astype(np.float64), weight)
    return _mean(p, weight) / observed if observed > 0 else math.nan


def calibration_se(labels: npt.ArrayLike, probabilities: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Standard error of `calibration`, by which it would miss 1 if every probability were exactly right.

    sqrt(sum w^2 p (1 - p)) / sum w y: clicks are independent draws. nan without positives.

    Shape: labels (B,), probabilities (B,), weights (B,) or None.

    >>> calibration_se([1, 0, 1, 0], [0.5] * 4)
    0.5
    """
    positive, p, weight = _checked_probabilities(labels, probabilities, weights)
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
    bins = reliability(labels, probabilities, weights, num_bins=num_bins)
    return float(bins.rows @ np.abs(bins.predicted - bins.observed) / bins.rows.sum()) if bins else math.nan


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
    bins = reliability(labels, probabilities, weights, num_bins=num_bins)
    return float(bins.rows @ bins.by_chance / bins.rows.sum()) if bins else math.nan


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
    positive, p, weight = _checked_probabilities(labels, probabilities, weights)
    if len(p) == 0:
        nothing = np.zeros(0)
        return Reliability(nothing, nothing, nothing, nothing)
    order = np.argsort(p)
    p, positive = p[order], positive[order]
    uniform = weight is None
    weight = np.ones(len(p)) if weight is None else weight[order]
    starts = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
    mass = np.add.reduceat(weight, starts)
    middle = (np.cumsum(mass) - mass / 2) / mass.sum()
    of_block = np.minimum((middle * num_bins).astype(np.int64), num_bins - 1)
    of_block = np.unique(of_block, return_inverse=True)[1]  # a bin that a long tie leaves empty is none
    sums = [
        np.bincount(of_block, np.add.reduceat(each, starts))
        for each in (weight, weight * p, weight * positive, weight**2 * p * (1 - p))
    ]
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


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Area under the precision-recall curve: sum_k (R_k - R_{k-1}) P_k over distinct scores, highest first.

    No interpolation, as scikit-learn's `average_precision_score`. nan without positives (1.0 without negatives).

    Shape: labels (B,), scores (B,), weights (B,) or None.

    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    positive, score, weight, _ = _checked(labels, scores, weights)
    if not positive.any():
        return math.nan
    positives, negatives = _tie_blocks(positive, score, weight)
    p, n = np.cumsum(positives[::-1]), np.cumsum(negatives[::-1])
    return float(positives[::-1] @ (p / (p + n)) / p[-1])


# ------------------------------------------------------------------------------------------------------------ together


class StreamingMetrics:
    """AUC, log-loss, normalised entropy and calibration over batches and ranks, in fixed memory.

    Sums over batches are exact (Shewchuk's non-overlapping partial sums, as in `math.fsum`), so merging is bit-equal in
    any order of batches and ranks; for AUC with fractional weights see `StreamingAUC`.

    Shape: update takes labels (B,), logits (B,), weights (B,) or None.

    >>> metrics = StreamingMetrics()
    >>> metrics.update([1, 0], [2.0, -1.0])
    >>> metrics.update([1, 0], [0.5, 0.5], weights=[1, 0])  # the last row is padding
    >>> result = metrics.compute()
    >>> result["auc"], result["rows"], round(result["log_loss"], 4)
    (1.0, 3.0, 0.3048)
    """

    def __init__(self) -> None:
        self._auc = StreamingAUC()
        self._sums: dict[str, list[float]] = {name: [] for name in ("log_loss", "predicted", "positive", "total")}
        self._rows = 0
        self._positives = 0

    def update(self, labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Add a batch."""
        positive, z, weight, _ = _checked(labels, logits, weights, name="logits")
        self._auc._add(positive, z, weight)
        columns = {
            "log_loss": _losses(positive, z),
            "predicted": _sigmoid(z),
            "positive": positive.astype(np.float64),
            "total": np.ones(len(z)),
        }
        for name, column in columns.items():
            _add_exactly(self._sums[name], float(column.sum() if weight is None else column @ weight))
        self._rows += len(z)
        self._positives += int(np.count_nonzero(positive))

    def merge(self, other: StreamingMetrics) -> None:
        """Add the rows that another has seen, such as another rank's."""
        self._auc.merge(other._auc)
        for name, partials in other._sums.items():
            for value in tuple(partials):
                _add_exactly(self._sums[name], value)
        self._rows += other._rows
        self._positives += other._positives

    def compute(self) -> dict[str, float]:
        """auc, log_loss, normalized_entropy, calibration, rows and positives so far; nan where undefined."""
        sums = {name: math.fsum(partials) for name, partials in self._sums.items()}
        loss = sums["log_loss"] / sums["total"] if sums["total"] else math.nan
        entropy = _entropy(sums["positive"] / sums["total"]) if sums["total"] else 0.0
        return {
            "auc": self._auc.compute(),
            "log_loss": loss,
            "normalized_entropy": loss / entropy if entropy else math.nan,
            "calibration": sums["predicted"] / sums["positive"] if sums["positive"] else math.nan,
            "rows": float(self._rows),
            "positives": float(self._positives),
        }

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as numpy arrays, for a checkpoint or for another rank to load and merge (lengths of sums vary)."""
        state: dict[str, npt.NDArray[Any]] = {name: np.array(partials) for name, partials in self._sums.items()}
        return {**self._auc.state_dict(), **state, "rows": np.array([self._rows, self._positives], dtype=np.int64)}

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Replace everything.

        Raises:
            ValueError: the state is not one of this class.
        """
        arrays = _from_state(state, {"counts": self._auc.counts.shape, "rows": (2,), **dict.fromkeys(self._sums)})
        self._auc.counts = arrays["counts"]
        self._sums = {name: arrays[name].tolist() for name in self._sums}
        self._rows, self._positives = (int(count) for count in arrays["rows"])


def _add_exactly(partials: list[float], value: float) -> None:
    """Add to a sum held as floats of growing size that do not overlap, without any rounding (Shewchuk 1997)."""
    kept = 0
    for partial in partials:
        big, small = (value, partial) if abs(value) >= abs(partial) else (partial, value)
        value = big + small
        rest = small - (value - big)
        if rest:
            partials[kept] = rest
            kept += 1
    partials[kept:] = [value]


def evaluate_binary(
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
) -> dict[str, float]:
    """Every metric of this module for a final report, exact.

    Keys: auc, auc_se (DeLong; nan if weights are not all 0 or 1), log_loss, normalized_entropy, calibration,
    calibration_se, ece, ece_by_chance, pr_auc, rows, positives (rows of weight 0 not counted); with groups also gauc,
    gauc_groups, gauc_groups_dropped and gauc_rows_dropped.

    Shape: labels (B,), logits (B,), groups (B,) or None, weights (B,) or None.

    >>> report = evaluate_binary([1, 0, 1, 0], [2.0, -1.0, 0.5, 0.5], groups=[7, 7, 8, 8])
    >>> report["auc"], report["gauc"], report["rows"], report["positives"]
    (0.875, 0.75, 4.0, 2.0)
    """
    positive, z, weight, group = _checked(labels, logits, weights, name="logits", groups=groups)
    probabilities = _sigmoid(z)
    report = {
        "auc": auc(positive, z, weight),
        "auc_se": auc_delong(positive, z).standard_error if weight is None else math.nan,
        "log_loss": log_loss(positive, z, weight),
        "normalized_entropy": normalized_entropy(positive, z, weight),
        "calibration": calibration(positive, probabilities, weight),
        "calibration_se": calibration_se(positive, probabilities, weight),
        "ece": expected_calibration_error(positive, probabilities, weight),
        "ece_by_chance": ece_by_chance(positive, probabilities, weight),
        "pr_auc": average_precision(positive, z, weight),
        "rows": float(len(z)),
        "positives": float(np.count_nonzero(positive)),
    }
    if group is not None:
        result = gauc(positive, z, group, weight)
        report["gauc"] = result.value
        report["gauc_groups"] = float(result.groups_used)
        report["gauc_groups_dropped"] = float(result.groups_dropped)
        report["gauc_rows_dropped"] = float(result.rows_dropped)
    return report
