"""Pairs of features: what they tell together that neither tells alone, and what they tell about each other.

A pair is one feature, whose value is the pair of values: its own cardinality is corrected for, as that of any other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from ctrlib.ranking.chosen import LEVEL
from ctrlib.ranking.counts import Cells, JointCounts
from ctrlib.ranking.null import Null, conditional_null, moments, null_table
from ctrlib.ranking.overlap import chance_within, overlap
from ctrlib.ranking.relevance import Counts, benjamini_hochberg
from ctrlib.ranking.source import Source
from ctrlib.ranking.store import Column, Store, pair_counts

Array = npt.NDArray[Any]
FEW = 16  # rows of a cell up to which its chance is looked up by value
SMALL = 256  # rows of a value up to which that is exact
BATCH = 64  # pairs whose cells are held at once
KEPT = 200  # pairs that are counted on all rows after a sample
WORK = 2e9  # rows times pairs that are counted before pairs are screened on a sample
LEAST_ROWS = 50_000  # of a sample
NUM_TESTED = 50  # pairs of most synergy, which are tested
MOST_CELLS = 2_000_000  # of a pair that is tested


@dataclass(frozen=True)
class PairScore:
    """What two features tell about a label together, in nats, and what about each other.

    `values` are the distinct pairs of values, `once` how many of them one row has. `information` is the plug-in
    I(A, B; Y). `synergy` is what neither tells alone: what one tells when the other is known, beyond chance, less what
    it tells alone, beyond chance. It is above 0 where a cross is worth it. Chance is that among rows with equal values
    of the other, since the whole data's is too much where a feature tells a lot by itself. It still is where values of
    the other have few rows: of the two ways round, which are equal but for that, the larger counts. `relevance` is the
    sum of both features' and synergy. `overlap` is the adjusted mutual information of the two: 1 if one follows from
    the other, 0 if they are independent.

    For all pairs chance is taken from tables, within about 2 %, and `sd` is that of the whole data. The pairs with most
    synergy for their sd are then made exact: `gain` is the smaller of what either tells when the other is known, `p` is
    the largest of three, that either gain or synergy (for its sd) is chance, and `q` is the share of false discoveries
    among all pairs. Of other pairs, and of those with too many values, the three are None.
    """

    first: str
    second: str
    values: int
    once: int
    information: float
    relevance: float
    synergy: float
    sd: float
    overlap: float
    gain: float | None = None
    p: float | None = None
    q: float | None = None

    @property
    def strength(self) -> float:
        """Synergy for its sd."""
        return self.synergy / self.sd if self.sd > 0 else 0.0

    @property
    def found(self) -> bool:
        """Whether the cross tells more than its features: synergy above 0 that chance does not make."""
        return self.q is not None and self.q < LEVEL and self.synergy > 0


class Single:
    """What is needed of a feature for its pairs.

    Args:
        joint: its counts; the codes of a `Column` are places in them.
    """

    def __init__(self, joint: JointCounts) -> None:
        cells = joint.cells()
        self.information = cells.information
        self.relevance = _above(self.information, cells.null(null_table(cells.num_rows, cells.num_positives)))
        self.entropy, self.counts = cells.entropy(), cells.counts
        self.rows = joint.counts[:, 0] + joint.counts[:, 1]
        self.share = joint.counts[:, 1] / np.maximum(self.rows, 1)
        self._few, self._first = _chance_of_few(self.rows, joint.counts[:, 1])

    def chance_within(self, codes: Array, counts: Array) -> float:
        """The sum over cells of psi's mean, if labels are permuted among rows with equal values of the feature."""
        small = counts <= FEW
        places = self._first[codes[small]]
        places += counts[small] - 1
        found = float(self._few[places].sum(dtype=np.float64))
        if not small.all():
            large = codes[~small]
            found += float(chance_within(counts[~small], self.rows[large], self.share[large]).sum())
        return found


def _chance_of_few(rows: Array, positives: Array) -> tuple[Array, Array]:
    """Chance of cells of 1, ..., FEW rows, by the value that they are in, and where it begins; exact in small ones."""
    _, at, back = np.unique(rows * (rows.max() + 1) + positives, return_index=True, return_inverse=True)
    sizes = np.minimum(rows[at], FEW)
    around, of_stratum = np.repeat(rows[at], sizes), np.repeat(positives[at], sizes)
    first = np.cumsum(sizes) - sizes
    counts = np.arange(len(around)) - np.repeat(first, sizes) + 1
    found = chance_within(counts, around, of_stratum / around)
    small = (around <= SMALL) & (of_stratum > 0) & (of_stratum < around)
    if small.any():
        found[small] = moments(counts[small], around[small], of_stratum[small])[:, 0]
    return found, first[back]


@dataclass(frozen=True)
class _Counted:
    """A pair of columns after counting: its cells, and for either column psi's mean within its values."""

    cells: Cells
    within: tuple[float, float]


def score_pairs(
    store: Store,
    *,
    only: Collection[tuple[str, str]] | None = None,
    num_pairs: int | None = None,
    memory: int = 1 << 29,
    threads: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[PairScore]:
    """Of all pairs of the store's columns: those that are found first, then by synergy.

    Args:
        store: the columns.
        only: pairs to look at; otherwise all.
        num_pairs: how many there were before these were chosen, for q.
        memory: bytes that counting may take.
        threads: that count at the same time; the result is the same with any number.
        progress: is called with the number of pairs that are done.
    """
    singles = {column.name: Single(store.joint(column)) for column in store.columns}
    found: list[PairScore] = []
    pairs = list(itertools.combinations(store.columns, 2))
    if only is not None:
        pairs = [(one, other) for one, other in pairs if (one.name, other.name) in only]

    def count(pair: tuple[Column, Column]) -> _Counted:
        one, other = (singles[column.name] for column in pair)
        cells, within, of_other = [], 0.0, 0.0
        for codes, others, rows, positives in pair_counts(*pair, store.positive, memory // threads):
            cells.append(Cells.of(rows, positives))
            within += one.chance_within(codes, rows)
            of_other += other.chance_within(others, rows)
        return _Counted(Cells.merge(cells), (within, of_other))

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(pairs), BATCH):
            some = pairs[start : start + BATCH]
            for (first, second), counted in zip(some, pool.map(count, some)):
                found.append(_score(first.name, second.name, counted, singles))
                if progress is not None:
                    progress(len(found))
    found.sort(key=lambda one: (-one.strength, one.first, one.second))
    columns = {column.name: column for column in store.columns}
    tested = [
        _test(one, columns[one.first], columns[one.second], store.positive, singles)
        for one in found[:NUM_TESTED]
        if one.synergy > 0
    ]
    untested = [1.0] * ((num_pairs or len(found)) - len(tested))
    q_values = benjamini_hochberg([1.0 if one.p is None else one.p for one in tested] + untested)
    tested = [one if one.p is None else dataclasses.replace(one, q=q) for one, q in zip(tested, q_values)]
    everything = [*tested, *found[len(tested) :]]
    return sorted(everything, key=lambda one: (not one.found, -one.synergy, one.first, one.second))


@dataclass(frozen=True)
class Screening:
    """What pairs were looked through, and how many rows of them.

    If these are not all `rows`, they are a stratified sample, `sampled` of them: the `kept` pairs with most synergy for
    their sd were counted on all rows. `detectable`, in nats, is the synergy of which a pair (with an sd as half of the
    pairs have it) is kept in 95 % of samples. `too_large`: features that are in no pair, since the counts of their
    values do not fit into memory.
    """

    pairs: int
    rows: int
    sampled: int
    kept: int
    detectable: float | None
    too_large: Sequence[str] = ()


def find_pairs(
    source: Source,
    split: str,
    counts: Counts,
    label: str,
    names: Sequence[str],
    *,
    memory: int = 1 << 30,
    threads: int = 2,
    work: float = WORK,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[PairScore], Screening]:
    """Of all pairs of these features: on all rows, or screened on a sample if that were more than `work` rows in all.

    No pair is left out for what its features tell alone.
    """
    num_pairs, num_rows = math.comb(len(names), 2), sum(counts.rows[label])
    every = max(1, min(math.ceil(num_rows * num_pairs / work), num_rows // LEAST_ROWS))
    how: dict[str, Any] = {"memory": memory // 2, "threads": threads, "progress": progress}
    with Store(source, split, counts, label, names, memory=memory // 2, every=every) as store:
        sampled = store.num_rows
        found = score_pairs(store, **how)
    if every == 1:
        return found, Screening(num_pairs, num_rows, num_rows, num_pairs, None)
    found.sort(key=lambda one: (-one.strength, one.first, one.second))
    kept = found[:KEPT]
    # Kept if s / sd + noise is above the last one's, which 1.645 sd of noise spoil in 5 % of samples.
    last = max(kept[-1].strength, 0.0) if len(found) > KEPT else 0.0
    detectable = (last + 1.645) * float(np.median([one.sd for one in found]))
    involved = {name for one in kept for name in (one.first, one.second)}
    columns = [name for name in names if name in involved]
    only = {(one.first, one.second) for one in kept}
    with Store(source, split, counts, label, columns, memory=memory // 2) as store:
        exact = score_pairs(store, only=only, num_pairs=num_pairs, **{**how, "progress": None})
    others = [dataclasses.replace(one, gain=None, p=None, q=None) for one in found[KEPT:]]
    return [*exact, *others], Screening(num_pairs, num_rows, sampled, len(kept), detectable)


def _above(information: float, null: Null) -> float:
    return information - null.mean if null.sd > 0 else 0.0


def _score(first: str, second: str, counted: _Counted, singles: Mapping[str, Single]) -> PairScore:
    one, other, cells = singles[first], singles[second], counted.cells
    information, rows = cells.information, cells.num_rows
    null = cells.null(null_table(rows, cells.num_positives))
    gains = [information - single.information - sum_ / rows for single, sum_ in zip((one, other), counted.within)]
    synergy = max(gains[0] - other.relevance, gains[1] - one.relevance)
    shared = one.entropy + other.entropy - cells.entropy()
    return PairScore(
        first=first,
        second=second,
        values=cells.num_values,
        once=cells.num_once,
        information=information,
        relevance=one.relevance + other.relevance + synergy,
        synergy=synergy,
        sd=null.sd,
        overlap=overlap(one.counts, other.counts, shared, (one.entropy, other.entropy), rows),
    )


def _test(pair: PairScore, first: Column, second: Column, positive: Array, singles: Mapping[str, Single]) -> PairScore:
    if pair.values > MOST_CELLS:
        return pair
    ((codes, others, rows, positives),) = pair_counts(first, second, positive, 1 << 62)
    order = np.argsort(others, kind="stable")
    one, other = singles[pair.first], singles[pair.second]
    gains, p_values = [], []
    for strata, at in ((codes, slice(None)), (others[order], order)):
        information, null = conditional_null(strata.astype(np.int64), rows[at], positives[at])
        gains.append(_above(information, null))
        p_values.append(null.p_value(information))
    synergy = max(gains[0] - other.relevance, gains[1] - one.relevance)
    return dataclasses.replace(
        pair,
        gain=min(gains),
        p=max(*p_values, float(ndtr(-synergy / pair.sd)) if pair.sd > 0 else 1.0),
        synergy=synergy,
        relevance=one.relevance + other.relevance + synergy,
    )
