"""How much each feature tells about a label: counted in a stream, corrected for chance, tested.

B. Skrlj and B. Mramor, "OutRank: Speeding up AutoML-based Model Search for Large Sparse Data sets with
Cardinality-aware Feature Ranking", RecSys 2023, https://arxiv.org/abs/2309.01552, subtract the mutual information of
one noise variable of the same cardinality, made by a shift of the rows. Here the mean over all permutations is
subtracted (`ctrlib.ranking.null`).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.data.columns import Ragged
from ctrlib.data.scan import DataError
from ctrlib.errors import ArgumentError
from ctrlib.ranking.chosen import LEVEL
from ctrlib.ranking.counts import Cells, JointCounts
from ctrlib.ranking.null import Null, NullTable, null_table
from ctrlib.ranking.source import Source, labelled, missing_key
from ctrlib.ranking.spill import AnyCounts, SpilledCounts, Tally, keep_within, merge
from ctrlib.schema import Categorical, Feature, kind_of

Array = npt.NDArray[Any]
NUM_DRAWS = 32  # permutations, where the null has no closed form: lists, and rows with weights
UNIT = 1 << 20  # weights are counted in whole 2^-20, so that sums do not depend on their order
LEAK = 0.8  # share of what can be told about the label, from which on a feature is taken for a copy of it


@dataclass(frozen=True)
class Counts:
    """Joint counts of every feature with every label, of a split or a shard of it.

    `rows`: label -> how many rows have it, negative and positive.
    """

    by_label: dict[str, dict[str, AnyCounts]]
    rows: dict[str, tuple[int, int]]

    def spilled(self, label: str) -> list[str]:
        """Features of which not all counts are in memory."""
        return [name for name, joint in self.by_label[label].items() if isinstance(joint, SpilledCounts)]

    @classmethod
    def merge(cls, parts: Iterable[Counts]) -> Counts:
        """Of all rows: the same bits as if they had been counted at once.

        Raises:
            ValueError: the parts have other labels or features.
        """
        parts = list(parts)
        named = [{label: list(features) for label, features in part.by_label.items()} for part in parts]
        if not parts or any(one != named[0] for one in named):
            raise ArgumentError(f"counts of other labels or features cannot be merged: {named}")
        return cls(
            {
                label: {name: merge(part.by_label[label][name] for part in parts) for name in features}
                for label, features in named[0].items()
            },
            {label: _add(part.rows[label] for part in parts) for label in named[0]},
        )


@dataclass(frozen=True)
class Score:
    """What a feature tells about a label, in nats.

    `rows` that have the label; `values`, distinct, and how many of them are `once`, in one row only; `missing`, the
    share of rows without a value. `information` is the plug-in I(F; Y), `expected` and `sd` are mean and standard
    deviation of it when labels are permuted, and `relevance` is what is above: 0 for chance, less if classes are more
    even than chance makes them. `low` and `high` are its 95 % interval. `z`, `p` (one-sided) and `q` (Benjamini and
    Hochberg) test whether there is more than chance. `share` is that of the entropy that can be told which is told
    (1 for a copy of the label), `ami` the adjusted mutual information. `drawn`: expected and sd are from draws.
    """

    feature: str
    kind: str
    rows: int
    values: int
    once: int
    missing: float
    entropy: float
    information: float
    expected: float
    relevance: float
    sd: float
    low: float
    high: float
    z: float
    p: float
    q: float
    share: float
    ami: float
    leak: bool
    drawn: bool


def count(source: Source, split: str = "train", *, shard: tuple[int, int] = (0, 1), memory: int = 1 << 30) -> Counts:
    """Count a split, a row group at a time, or a shard (i, n) of its row groups, to be merged with the others.

    Counts that would take more than `memory` bytes go to temporary files, those of the columns with most values first.

    Of lists, each distinct value of a row counts as one. Where a row may have several values, or rows have weights that
    differ, the counts of `NUM_DRAWS` permutations of labels and weights within each row group are kept, too.

    Raises:
        SchemaError: the folder is damaged, or has no such split.
    """
    features = source.schema.features
    tallies = {label: {f.name: Tally(source.size(f)) for f in features} for label in source.schema.labels}
    margins: dict[str, list[tuple[int, int]]] = {label: [] for label in source.schema.labels}
    for block in source.blocks(split, shard):
        for at, label in enumerate(source.schema.labels):
            rows, positive = labelled(block, at)
            margins[label].append((len(positive) - int(positive.sum()), int(positive.sum())))
            weights = None if block.weights is None else block.weights[rows]
            for feature in features:
                name, lists = feature.name, block.lists.get(feature.name)
                if lists is not None:
                    values, of_rows = _distinct(lists.take(np.arange(len(block.labels))[rows]))
                    part = _drawn(values, of_rows, positive, weights, block.name)
                elif weights is not None:
                    part = _drawn(block.codes[name][rows], np.arange(len(positive)), positive, weights, block.name)
                else:
                    tallies[label][name].add(block.codes[name][rows], positive)
                    continue
                tallies[label][name].add_counts(part)
        keep_within((tally for of_label in tallies.values() for tally in of_label.values()), memory)
    return Counts(
        {label: {name: tally.counts() for name, tally in of_label.items()} for label, of_label in tallies.items()},
        {label: _add(found) for label, found in margins.items()},
    )


def _add(margins: Iterable[tuple[int, int]]) -> tuple[int, int]:
    margins = list(margins)
    return sum(one[0] for one in margins), sum(one[1] for one in margins)


def _distinct(lists: Ragged) -> tuple[Array, Array]:
    """The distinct values of each row, and the rows that they are in."""
    rows = np.repeat(np.arange(len(lists.offsets) - 1), np.diff(lists.offsets))
    key = np.unique((rows << 32) | lists.values)
    return key & 0xFFFFFFFF, key >> 32


def _drawn(values: Array, rows: Array, positive: Array, weights: Array | None, name: str) -> JointCounts:
    """Counts of values that are in these rows, and under permutations that depend on the name of the rows alone."""
    keys, place = np.unique(values, return_inverse=True)
    weight = np.ones(len(positive)) if weights is None else np.rint(weights.astype(np.float64) * UNIT)
    counts = np.empty((len(keys), 4 + 2 * NUM_DRAWS), np.int64)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    sides = np.stack([1 - positive, positive]).astype(np.float64)
    for draw in range(-1, NUM_DRAWS + 1):
        order = slice(None) if draw < 1 else rng.permutation(len(positive))
        for side in (0, 1):
            drawn = (sides[side] if draw < 0 else sides[side] * weight)[order]
            counts[:, 2 + 2 * draw + side] = np.bincount(place, drawn[rows], minlength=len(keys))
    return JointCounts(keys.astype(np.int64), counts)


def scores(counts: Counts, features: Sequence[Feature], label: str) -> list[Score]:
    """Of every feature, in the order that `order_by_relevance` says.

    Raises:
        DataError: no row has the label, or all of them have the same.
    """
    check_label(label, *counts.rows[label])
    joints = [counts.by_label[label][feature.name] for feature in features]
    return _scores(features, joints, null_table(sum(counts.rows[label]), counts.rows[label][1]))


def _scores(features: Sequence[Feature], joints: Sequence[AnyCounts], table: NullTable) -> list[Score]:
    cells = [joint.cells() for joint in joints]
    if exact := [one.counts[0] for one, joint in zip(cells, joints) if joint.width == 2]:
        table.lookup(np.unique(np.concatenate(exact)))  # all at once, which takes less
    found = [_score(feature, joint, one) for feature, joint, one in zip(features, joints, cells)]
    q_values = benjamini_hochberg([one.p for one in found])
    return order_by_relevance([dataclasses.replace(one, q=q) for one, q in zip(found, q_values)])


def score_columns(columns: Mapping[str, Array], positive: Array) -> list[Score]:
    """Of columns in memory, in the order that `order_by_relevance` says.

    Shape: each column (rows,) whole numbers; positive (rows,), 0 or 1.

    Raises:
        DataError: all rows have the same label, or there is none.

    >>> label = np.array([0, 1, 1, 0] * 50)
    >>> columns = {"row": np.arange(200), "same": np.full(200, 7), "noisy": label ^ (np.arange(200) % 5 == 0)}
    >>> [(score.feature, round(score.relevance, 3)) for score in score_columns(columns, label)]
    [('noisy', 0.19), ('row', 0.0), ('same', 0.0)]
    """
    positive = positive.astype(np.int8)
    positives = int(positive.sum())
    check_label("label", len(positive) - positives, positives)
    joints = [JointCounts.of(codes, positive) for codes in columns.values()]
    return _scores([Categorical(name) for name in columns], joints, null_table(len(positive), positives))


def score_column(codes: Array, positive: Array, name: str = "column") -> Score:
    """Of one column in memory; q is p.

    Shape: codes (rows,) whole numbers; positive (rows,), 0 or 1.

    Raises:
        DataError: all rows have the same label, or there is none.

    >>> score = score_column(np.arange(4), np.array([0, 1, 1, 0]))
    >>> score.relevance, round(score.information, 4)  # each row its own value: that is no knowledge
    (0.0, 0.6931)
    """
    (score,) = score_columns({name: codes}, positive)
    return score


def check_label(label: str, negatives: int, positives: int) -> None:
    """Refuse a label with one class.

    Raises:
        DataError: as said.
    """
    if not negatives and not positives:
        raise DataError(f"label {label!r} is missing in all rows: name another, or take rows that have it")
    if not negatives or not positives:
        raise DataError(
            f"label {label!r} is {int(positives > 0)} in all {negatives + positives:,} rows that have it: expected "
            "both 0 and 1, since nothing can be told about what does not differ; take more rows, or another label"
        )


def _score(feature: Feature, joint: AnyCounts, cells: Cells) -> Score:
    drawn = joint.width > 2
    rows, weighed = cells.num_rows, cells
    if drawn:
        weighed, *others = joint.drawn()
        draws = np.array([one.information for one in others])
        mean, sd = float(draws.mean()), float(draws.std(ddof=1))
        null = Null(mean, sd, 2 * sd / mean) if sd > 1e-9 * mean else Null(mean, 0.0, 0.0)
    else:
        null = cells.null(null_table(rows, cells.num_positives))
    information, label_entropy = weighed.information, entropy_of(weighed.num_positives / weighed.num_rows)
    fixed = null.sd == 0.0  # permuting changes nothing: a constant, or no two rows have the same value
    relevance = 0.0 if fixed else information - null.mean
    entropy = weighed.entropy()
    tellable, mutual = label_entropy - null.mean, (entropy + label_entropy) / 2 - null.mean
    half = 1.96 * math.hypot(null.sd, weighed.sampling_sd() * math.sqrt(weighed.num_rows / rows))
    share = relevance / tellable if not fixed and tellable > 0 else 0.0
    missing = int(joint.of_key(missing_key(feature))[:2].sum())
    return Score(
        feature=feature.name,
        kind=kind_of(feature),
        rows=rows,
        values=cells.num_values,
        once=cells.num_once,
        missing=missing / rows,
        entropy=entropy,
        information=information,
        expected=null.mean,
        relevance=relevance,
        sd=null.sd,
        low=relevance - half,
        high=relevance + half,
        z=0.0 if fixed else null.z(information),
        p=null.p_value(information),
        q=1.0,
        share=share,
        ami=relevance / mutual if not fixed and mutual > 0 else 0.0,
        leak=share >= LEAK,
        drawn=drawn,
    )


def entropy_of(share: float) -> float:
    """Of a label that is 1 in this share of the rows, in nats."""
    return -sum(part * math.log(part) for part in (share, 1 - share) if part > 0)


def order_by_relevance(found: Sequence[Score]) -> list[Score]:
    """The features that tell more than chance (q below 0.05), most relevant first, then the others likewise; those that
    are copies of the label come last, since no model may use them.
    """
    return sorted(found, key=lambda one: (one.leak, one.q >= LEVEL, -one.relevance))


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """The least share of false discoveries at which each would be one.

    >>> benjamini_hochberg([0.01, 0.04, 0.03, 0.9])
    [0.04, 0.05333333333333334, 0.05333333333333334, 0.9]
    """
    p = np.array(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = p[order] * len(p) / np.arange(1, len(p) + 1)
    found = np.empty(len(p))
    found[order] = np.minimum(1.0, np.minimum.accumulate(adjusted[::-1])[::-1])
    values: list[float] = found.tolist()
    return values


def shift_null(codes: Array, positive: Array) -> float:
    """OutRank's score of a column, H(F' | Y) - H(F | Y) in nats.

    For the rows with label y, F' is F shifted by as many rows as have that label. So it depends on the order of rows;
    it is here to be compared with. One batch of theirs is 2^14 rows.

    Shape: codes (rows,), positive (rows,) 0 or 1, both in the order of the log.

    >>> shift_null(np.array([0, 1, 0, 1]), np.array([0, 1, 0, 1])) > 0
    False
    """
    score, rows = 0.0, len(codes)
    for value in (0, 1):
        has = np.flatnonzero(positive == value)
        if len(has) < 2:  # as theirs
            continue
        spoofed = codes[(has + len(has)) % rows]
        score += len(has) / rows * (_entropy(spoofed) - _entropy(codes[has]))
    return score


def _entropy(codes: Array) -> float:
    share = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(share @ np.log(share)))
