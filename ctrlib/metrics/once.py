"""All metrics of anybody's scores by one sort, for as many rows as memory holds: about two hundred bytes each.

Rows of one score make a block, and every metric here is a sum over blocks: ten million rows are sorted once, where
each of the functions beside would do so for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError
from ctrlib.metrics.inputs import Floats, checked, refuse
from ctrlib.metrics.probability import Reliability, entropy_of_rate, reliability_of_blocks, sigmoid
from ctrlib.metrics.ranking import (
    GroupAUC,
    auc_from_blocks,
    clustered_error,
    gauc_of_blocks,
    mean_error,
    precision_from_blocks,
)

Scale = Literal["probability", "logit", "order"]


@dataclass(frozen=True)
class Blocks:
    """Rows by ascending score, B of them, in K blocks of one score each."""

    order: npt.NDArray[np.int64]
    """(B,) places of the rows."""
    positive: npt.NDArray[np.bool_]
    """(B,) labels, in that order."""
    weights: Floats | None
    """(B,) likewise; None if all are 1."""
    starts: npt.NDArray[np.int64]
    """(K,) where each block begins."""
    scores: Floats
    """(K,) its score, in float64."""
    positives: npt.NDArray[Any]
    """(K,) weight of its positives: whole numbers where all weights are 1, as the next."""
    negatives: npt.NDArray[Any]
    squares: npt.NDArray[Any]
    """(K,) sum of its squared weights."""

    @classmethod
    def of(cls, positive: npt.NDArray[np.bool_], scores: Floats, weights: Floats | None) -> Blocks:
        """One row or more, checked (`ctrlib.metrics.inputs.checked`)."""
        order = np.argsort(scores)
        ascending, positive = scores[order], positive[order]
        starts = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1]])
        values = ascending[starts].astype(np.float64)
        del ascending
        if weights is None:
            sizes = np.diff(np.r_[starts, len(order)])
            positives = np.add.reduceat(positive, starts, dtype=np.int64)
            return cls(order, positive, None, starts, values, positives, sizes - positives, sizes)
        weights = weights[order]
        positives = np.add.reduceat(np.where(positive, weights, 0.0), starts)
        negatives = np.add.reduceat(np.where(positive, 0.0, weights), starts)
        return cls(order, positive, weights, starts, values, positives, negatives, np.add.reduceat(weights**2, starts))

    def auc(self) -> float:
        """As `ctrlib.metrics.auc`."""
        if self.weights is not None:
            return auc_from_blocks(self.positives, self.negatives)
        m, n = int(self.positives.sum()), int(self.negatives.sum())
        twice_below = 2 * np.cumsum(self.negatives) - self.negatives
        return int(self.positives @ twice_below) / (2 * m * n) if m and n else math.nan

    def placements(self) -> tuple[Floats, Floats]:
        """(K,) of a positive of each block the share of negatives below it, of a negative that of positives above."""
        m, n = int(self.positives.sum()), int(self.negatives.sum())
        v10 = (np.cumsum(self.negatives) - self.negatives / 2) / n
        v01 = 1 - (np.cumsum(self.positives) - self.positives / 2) / m
        return v10, v01

    def auc_se(self, placements: tuple[Floats, Floats]) -> float:
        """As `ctrlib.metrics.auc_delong`, without weights."""
        found = 0.0
        for counts, places in zip((self.positives, self.negatives), placements):
            number = int(counts.sum())
            mean = float(counts @ places) / number
            found += float(counts @ (places - mean) ** 2) / (number - 1) / number
        return math.sqrt(found)


def _of_groups(
    order: npt.NDArray[np.int64],
    positive: npt.NDArray[np.bool_],
    weights: Floats | None,
    starts: npt.NDArray[np.int64],
    groups: npt.NDArray[Any],
    placements: tuple[Floats, Floats] | None,
    losses: tuple[Floats, Floats] | None,
) -> tuple[GroupAUC, float, float]:
    """GAUC, and standard errors of AUC and log-loss if groups alone are independent; groups are as the rows came.

    Group, block and label of a row make one whole number: those are sorted.
    """
    codes = _codes(groups)
    num_bits = len(starts).bit_length()
    if int(codes.max()).bit_length() + num_bits + 1 > 63:
        codes = np.unique(codes, return_inverse=True)[1]
    keys = codes[order].astype(np.uint64)
    del codes
    keys <<= np.uint64(num_bits + 1)
    sizes = np.diff(np.r_[starts, len(order)])
    keys |= np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(1), sizes)
    keys |= positive
    if weights is None:
        keys.sort()
    else:
        place = np.argsort(keys)
        keys, weights = keys[place], weights[place]
    label = (keys & np.uint64(1)).astype(np.bool_)
    keys >>= np.uint64(1)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    group = keys[starts] >> np.uint64(num_bits)
    block = (keys[starts] & np.uint64((1 << num_bits) - 1)).astype(np.int64)
    del keys
    if weights is None:
        p = np.add.reduceat(label, starts, dtype=np.int64).astype(np.float64)
        n = np.diff(np.r_[starts, len(label)]) - p
    else:
        p = np.add.reduceat(np.where(label, weights, 0.0), starts)
        n = np.add.reduceat(np.where(label, 0.0, weights), starts)
    firsts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    of_group = np.repeat(np.arange(len(firsts)), np.diff(np.r_[firsts, len(group)]))
    found = gauc_of_blocks(of_group, p, n, np.diff(np.r_[starts[firsts], len(label)]))

    def by_group(values: Floats) -> Floats:
        sums: Floats = np.add.reduceat(values, firsts)
        return sums

    auc_error = loss_error = math.nan
    if placements is not None:
        v10, v01 = placements
        auc_error = clustered_error(*map(by_group, (p, p * v10[block], n, n * v01[block])))
    if losses is not None:
        # A block may lose endlessly at the label that no row of it has.
        loss_error = mean_error(by_group(p + n), by_group(_times(p, losses[0][block]) + _times(n, losses[1][block])))
    return found, auc_error, loss_error


def _times(counts: npt.NDArray[Any], losses: Floats) -> Floats:
    """Their product, 0 where there is no row, however large the loss would be."""
    product: Floats = np.multiply(counts, losses, out=np.zeros(len(losses)), where=counts > 0)
    return product


def _codes(groups: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Groups as whole numbers from 0; integers within 2^31 of each other keep their differences."""
    if groups.dtype.kind == "f":
        refuse(np.isnan(groups), groups, "groups must not be nan", "drop these rows, or give them a group of their own")
    if groups.dtype.kind in "iu":
        low, high = int(groups.min()), int(groups.max())
        if high - low < 1 << 31:
            return (groups - groups.dtype.type(low)).astype(np.int64) if low >= 0 else groups.astype(np.int64) - low
    try:
        return np.unique(groups, return_inverse=True)[1]
    except TypeError as error:  # None among strings
        raise ArgumentError(
            f"groups must be of one type, all integers or all strings, and not None: {error}"
        ) from error


def evaluate_scores(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    *,
    scale: Scale = "probability",
    groups: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
) -> tuple[dict[str, float], Reliability | None]:
    """Every metric of anybody's scores, exact, and the bins of their reliability (None where `scale` is "order").

    Keys are those of `ctrlib.metrics.evaluate_binary` and "log_loss_se", and with groups "gauc_se" and the errors where
    rows are independent between groups only, "auc_se_groups" and "log_loss_se_groups". Scores of scale "order" (any
    finite numbers, of which only the order counts) have auc, auc_se, pr_auc, rows, positives and what groups add to
    these. Scores of scale "probability" also have "refuted": rows with a probability of exactly 0 or 1 and the other
    label, which make the log-loss infinite; nothing is clipped.

    Shape: labels (B,), scores (B,), groups (B,) or None, weights (B,) or None.

    Raises:
        ValueError: labels are not 0 or 1, a score is not finite, or no probability where one is expected.

    >>> found, bins = evaluate_scores([1, 0, 1, 0], [0.9, 0.2, 0.6, 0.6], groups=[7, 7, 8, 8])
    >>> found["auc"], found["gauc"], round(found["log_loss"], 4), found["refuted"]
    (0.875, 0.75, 0.4389, 0.0)
    """
    if scale not in get_args(Scale):
        raise ArgumentError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    positive, score, weight, group = checked(labels, scores, weights, groups=groups)
    if scale == "probability":
        refuse((score < 0) | (score > 1), score, "probabilities must be within [0, 1]", 'say scale="logit" or "order"')
    if not len(score):
        raise ArgumentError("there is no row with weight: expected one or more")
    blocks = Blocks.of(positive, score, weight)
    mass = blocks.positives + blocks.negatives
    both = weight is None and min(blocks.positives.sum(), blocks.negatives.sum()) > 1
    placements = blocks.placements() if both else None
    found: dict[str, float] = {
        "auc": blocks.auc(),
        "auc_se": math.nan if placements is None else blocks.auc_se(placements),
    }
    bins = losses = None
    if scale != "order":
        losses = _losses(blocks.scores, scale)
        bins = _probabilities(blocks, mass, scale, losses, found)
    found["pr_auc"] = precision_from_blocks(blocks.positives, blocks.negatives) if positive.any() else math.nan
    found["rows"], found["positives"] = float(len(score)), float(np.count_nonzero(positive))
    if group is not None:
        rows = blocks.order, blocks.positive, blocks.weights, blocks.starts
        del blocks, mass, score  # which are as large
        of_groups, found["auc_se_groups"], loss_error = _of_groups(*rows, group, placements, losses)
        if losses is not None:
            found["log_loss_se_groups"] = loss_error
        found["gauc"], found["gauc_se"] = of_groups.value, of_groups.standard_error
        found["gauc_groups"] = float(of_groups.groups_used)
        found["gauc_groups_dropped"] = float(of_groups.groups_dropped)
        found["gauc_rows_dropped"] = float(of_groups.rows_dropped)
    return found, bins


def _losses(scores: Floats, scale: Scale) -> tuple[Floats, Floats]:
    """In nats, of a positive and of a negative with each score."""
    if scale == "logit":
        return np.logaddexp(0.0, -scores), np.logaddexp(0.0, scores)
    with np.errstate(divide="ignore"):
        return -np.log(scores), -np.log1p(-scores)


def _probabilities(
    blocks: Blocks, mass: npt.NDArray[Any], scale: Scale, losses: tuple[Floats, Floats], found: dict[str, float]
) -> Reliability:
    """Adds what is to be said of probabilities; gives the bins."""
    total = float(mass.sum())
    positives = float(blocks.positives.sum())
    p = sigmoid(blocks.scores) if scale == "logit" else blocks.scores
    counts = blocks.positives, blocks.negatives
    loss = sum(float(_times(c, x).sum()) for c, x in zip(counts, losses))
    variance = blocks.squares * (p * (1 - p))
    predicted = float(mass @ p)
    entropy = entropy_of_rate(positives / total)
    sums = [mass.astype(np.float64), mass * p, blocks.positives, variance]
    starts = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])  # logits that are not equal may have equal probabilities
    if len(starts) < len(p):
        sums = [np.add.reduceat(each, starts) for each in sums]
    bins = reliability_of_blocks(*sums, uniform=blocks.weights is None)
    found["log_loss"] = loss / total
    found["log_loss_se"] = math.nan
    if blocks.weights is None and total > 1 and math.isfinite(loss):
        squares = sum(float(_times(c, (x - loss / total) ** 2).sum()) for c, x in zip(counts, losses))
        found["log_loss_se"] = math.sqrt(squares / (total - 1) / total)
    found["normalized_entropy"] = loss / total / entropy if entropy else math.nan
    found["calibration"] = predicted / positives if positives else math.nan
    found["calibration_se"] = math.sqrt(float(variance.sum())) / positives if positives else math.nan
    found["ece"], found["ece_by_chance"] = bins.error, bins.error_by_chance
    if scale == "probability":
        ends = ((p == 0) & (blocks.positives > 0)) | ((p == 1) & (blocks.negatives > 0))
        sizes = np.diff(np.r_[blocks.starts, len(blocks.order)])
        rows = [
            np.count_nonzero(blocks.positive[start : start + size] == (p[block] == 0))
            for block in np.flatnonzero(ends).tolist()
            for start, size in ((int(blocks.starts[block]), int(sizes[block])),)
        ]
        found["refuted"] = float(sum(rows))
    return bins
