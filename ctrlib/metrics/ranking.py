"""How good an order is: AUC with its standard error and a paired test (DeLong), GAUC, average precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError
from ctrlib.metrics.inputs import Bools, Floats, checked, refuse


def ordered_bits(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """float32 -> uint32 with the same order: flip all bits of negative numbers, the sign bit of the others."""
    bits = (scores + np.float32(0)).view(np.uint32)  # -0.0 + 0.0 is 0.0: the two zeros are one score
    sign = (bits.view(np.int32) >> 31).view(np.uint32)  # all ones if negative
    bits ^= sign | np.uint32(0x80000000)
    return bits


def auc_from_blocks(positives: Floats, negatives: Floats) -> float:
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
    keys = ordered_bits(scores).astype(np.uint64)
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
    positive, score, weight, _ = checked(labels, scores, weights)
    if len(score) == 0:
        return math.nan
    if weight is not None:
        return auc_from_blocks(*_tie_blocks(positive, score, weight))
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


def clustered_error(m: Floats, of_m: Floats, n: Floats, of_n: Floats) -> float:
    """Standard error of an AUC, or of a difference of two, whose rows are independent between groups only.

    Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 1997: what a group adds to the AUC is
    the sum over its rows of how far their placements lie from the mean, and groups take the place of rows in DeLong's
    variances and covariance. It is what a bootstrap that draws groups comes to with ever more draws. nan if fewer than
    two groups have a class.

    Args:
        m: (G,) positives of each group.
        of_m: (G,) sum of their placements (or of the differences of placements).
        n: (G,) negatives of each group.
        of_n: (G,) sum of theirs.
    """
    with_m, with_n = int(np.count_nonzero(m)), int(np.count_nonzero(n))
    if with_m < 2 or with_n < 2:
        return math.nan
    a = (of_m - m * (of_m.sum() / m.sum())) / m.sum()
    b = (of_n - n * (of_n.sum() / n.sum())) / n.sum()
    variance = with_m / (with_m - 1) * (a @ a) + with_n / (with_n - 1) * (b @ b) + 2 * len(m) / (len(m) - 1) * (a @ b)
    return math.sqrt(max(0.0, float(variance)))


def _error(positive: Bools, v10: Floats, v01: Floats, groups: npt.NDArray[Any] | None) -> float:
    """Of the mean of `v10`, a number a positive row, as of that of `v01`; without groups DeLong's."""
    if groups is None:
        return math.sqrt(float(v10.var(ddof=1)) / len(v10) + float(v01.var(ddof=1)) / len(v01))
    codes = np.unique(groups, return_inverse=True)[1]
    of_m, of_n, number = codes[positive], codes[~positive], int(codes.max()) + 1
    sums = [np.bincount(of, each, number) for of, each in ((of_m, None), (of_m, v10), (of_n, None), (of_n, v01))]
    return clustered_error(*(each.astype(np.float64) for each in sums))


def auc_delong(
    labels: npt.ArrayLike, scores: npt.ArrayLike, confidence: float = 0.95, *, groups: npt.ArrayLike | None = None
) -> DeLong:
    """AUC with DeLong's standard error, var = S10 / m + S01 / n, in O(B log B).

    S10 and S01 are the sample variances of the placements of the m positives and n negatives. Rows are taken as
    independent: with many rows per user the true error is larger, and `groups` (users) gives it (`clustered_error`). A
    class of fewer than two rows, or groups, has error nan.

    Shape: labels (B,), scores (B,), groups (B,) or None.

    >>> result = auc_delong([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    >>> result.auc, round(result.standard_error, 4)
    (0.75, 0.3536)
    """
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence must be between 0 and 1, got {confidence}: 0.95 is usual")
    positive, score, _, group = checked(labels, scores, groups=groups)
    m = int(np.count_nonzero(positive))
    n = len(score) - m
    if m < 2 or n < 2:
        return DeLong(auc(positive, score), math.nan, math.nan, math.nan)
    v10, v01 = _placements(positive, score)
    value = float(v10.mean())
    error = _error(positive, v10, v01, group)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return DeLong(value, error, max(0.0, value - half), min(1.0, value + half))


def auc_paired_test(
    labels: npt.ArrayLike, scores_a: npt.ArrayLike, scores_b: npt.ArrayLike, *, groups: npt.ArrayLike | None = None
) -> PairedTest:
    """Is the AUC of `scores_a` different from that of `scores_b` on the same rows? DeLong's test.

    Two models err on the same hard rows, so the difference is known far better than either AUC: the variance is that of
    the placements' differences, which is S_aa + S_bb - 2 S_ab. Equal scores give z 0 and p 1; one class only gives nan.
    With `groups`, rows are independent between those only (`clustered_error`).

    Shape: labels (B,), scores_a (B,), scores_b (B,), groups (B,) or None.

    >>> result = auc_paired_test([0, 0, 1, 1, 1], [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.3, 0.2, 0.4, 0.5])
    >>> round(result.difference, 4), round(result.p_value, 3)
    (0.1667, 0.48)
    """
    return auc_paired_tests(labels, {"scores_a": scores_a, "scores_b": scores_b}, groups=groups)["scores_a", "scores_b"]


def auc_paired_tests(
    labels: npt.ArrayLike, scores: Mapping[str, npt.ArrayLike], *, groups: npt.ArrayLike | None = None
) -> dict[tuple[str, str], PairedTest]:
    """`auc_paired_test` of each two of several scores, by their names, the earlier one first.

    Shape: labels (B,), each of the scores (B,), groups (B,) or None.

    >>> tests = auc_paired_tests([0, 1, 0, 1], {"a": [1, 2, 3, 4], "b": [1, 4, 2, 3], "c": [4, 3, 2, 1]})
    >>> [f"{a} - {b}: {test.difference}" for (a, b), test in tests.items()]
    ['a - b: -0.25', 'a - c: 0.5', 'b - c: 0.75']
    """
    placements: dict[str, tuple[Floats, Floats]] = {}
    for name, values in scores.items():
        positive, score, _, group = checked(labels, values, name=name, groups=groups)
        m = int(np.count_nonzero(positive))
        if m < 2 or len(score) - m < 2:
            value = np.full(1, auc(positive, score))
            placements[name] = value, value
        else:
            placements[name] = _placements(positive, score)
    tests = {}
    for (a, (a10, a01)), (b, (b10, b01)) in itertools.combinations(placements.items(), 2):
        difference = float(a10.mean()) - float(b10.mean())
        error = _error(positive, a10 - b10, a01 - b01, group) if len(a10) > 1 else math.nan
        z = difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0
        z = math.nan if math.isnan(error) else z
        tests[a, b] = PairedTest(difference, error, z, math.erfc(abs(z) / math.sqrt(2)))
    return tests


@dataclass(frozen=True)
class GroupAUC:
    """GAUC and what it rests on: groups with both classes are used, the others dropped with their rows."""

    value: float
    groups_used: int
    groups_dropped: int
    rows_dropped: int
    standard_error: float = field(default=math.nan, repr=False, compare=False)
    """Of the value, if groups are independent draws; nan if fewer than two are used."""


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
    positive, score, weight, group = checked(labels, scores, weights, groups=groups)
    assert group is not None
    if len(score) == 0:
        return GroupAUC(math.nan, 0, 0, 0)
    if group.dtype.kind == "f":
        refuse(np.isnan(group), group, "groups must not be nan", "drop these rows, or give them a group of their own")
    try:
        codes = np.unique(group, return_inverse=True)[1]
    except TypeError as error:  # None among strings
        raise ArgumentError(
            f"groups must be of one type, all integers or all strings, and not None: {error}"
        ) from error
    rows = np.bincount(codes)
    if score.dtype == np.float32:  # group and score in one integer: four times as fast as lexsort
        order = np.argsort((codes.astype(np.uint64) << np.uint64(32)) | ordered_bits(score))
    else:
        order = np.lexsort((score, codes))
    codes, score, positive = codes[order], score[order], positive[order]
    weight = np.ones(len(score)) if weight is None else weight[order]
    # a block is one score of one group
    starts = np.flatnonzero(np.r_[True, (codes[1:] != codes[:-1]) | (score[1:] != score[:-1])])
    p = np.add.reduceat(np.where(positive, weight, 0.0), starts)
    n = np.add.reduceat(np.where(positive, 0.0, weight), starts)
    return gauc_of_blocks(codes[starts], p, n, rows)


def gauc_of_blocks(of_group: npt.NDArray[np.int64], p: Floats, n: Floats, rows: npt.NDArray[np.int64]) -> GroupAUC:
    """GAUC of (weighted) counts per distinct score of a group.

    Args:
        of_group: the group of each block, ascending from 0; within a group, blocks ascend by score.
        p: weight of the positives of each block.
        n: weight of its negatives.
        rows: rows of each group.
    """
    group_p, group_n = np.bincount(of_group, p), np.bincount(of_group, n)
    below = np.cumsum(n) - n / 2 - (np.cumsum(group_n) - group_n)[of_group]
    in_order = np.bincount(of_group, p * below)
    used = (group_p > 0) & (group_n > 0)
    num_used = int(np.count_nonzero(used))
    value = error = math.nan
    if num_used:
        share: Floats = (group_p[used] + group_n[used]).astype(np.float64)
        of_groups: Floats = in_order[used] / (group_p[used] * group_n[used])
        value = float(share @ of_groups / share.sum())
        error = mean_error(share, share * of_groups)
    return GroupAUC(value, num_used, len(used) - num_used, int(rows[~used].sum()), error)


def mean_error(mass: Floats, sums: Floats) -> float:
    """Standard error of sum(sums) / sum(mass), whose terms are independent draws.

    nan of fewer than two, or if the ratio is not finite.

    >>> round(mean_error(np.ones(4), np.array([1.0, 2.0, 3.0, 4.0])), 4)  # of a mean: sd / sqrt(n)
    0.6455
    """
    if len(mass) < 2 or not np.isfinite(sums).all():
        return math.nan
    apart = sums - mass * (sums.sum() / mass.sum())
    return math.sqrt(len(mass) / (len(mass) - 1) * float(apart @ apart)) / float(mass.sum())


def average_precision(labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Area under the precision-recall curve: sum_k (R_k - R_{k-1}) P_k over distinct scores, highest first.

    No interpolation, as scikit-learn's `average_precision_score`. nan without positives (1.0 without negatives).

    Shape: labels (B,), scores (B,), weights (B,) or None.

    >>> round(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]), 4)
    0.8333
    """
    positive, score, weight, _ = checked(labels, scores, weights)
    if not positive.any():
        return math.nan
    return precision_from_blocks(*_tie_blocks(positive, score, weight))


def precision_from_blocks(positives: Floats, negatives: Floats) -> float:
    """Average precision of (weighted) counts per distinct score, ascending; there is a positive."""
    p, n = np.cumsum(positives[::-1]), np.cumsum(negatives[::-1])
    return float(positives[::-1] @ (p / (p + n)) / p[-1])
