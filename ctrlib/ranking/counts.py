"""Joint counts of values and a label: whole numbers that add up, so shards counted apart merge bit for bit.

What mutual information and its null need is less: how many values have n rows of which k are positive (`Cells`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.ranking.null import Null, NullTable, psi

Array = npt.NDArray[Any]
DENSE = 8  # a table may have so many cells for each row that is counted at once, before sorting is faster
CHUNK = 1 << 15  # rows that are counted at once where values are few


@dataclass(frozen=True)
class Cells:
    """`times[i]` values have `rows[i]` rows each, of which `positives[i]` have a positive label.

    Shape: all three (cells,) int64, distinct and in ascending order of rows, then positives, so that every sum over
    them is the same whatever the order of the rows was.

    >>> cells = Cells.of(np.array([3, 1, 3]), np.array([1, 0, 1]))
    >>> cells.rows.tolist(), cells.positives.tolist(), cells.times.tolist()
    ([1, 3], [0, 1], [1, 2])
    """

    rows: Array
    positives: Array
    times: Array

    @classmethod
    def of(cls, rows: Array, positives: Array, times: Array | None = None) -> Cells:
        """Of the counts of values, in any order; those without rows are left out."""
        rows, positives = rows.astype(np.int64, copy=False), positives.astype(np.int64, copy=False)
        times = np.ones(len(rows), np.int64) if times is None else times
        # Most values of most columns have few rows, so their cells are few; sorting few values takes less than a table.
        bits = (len(rows).bit_length() + 3) // 2  # such a table has at most 16 cells for each value
        small = rows < (1 << bits if len(rows) > 1 << 12 else 0)
        parts = []
        if small.any():
            few = (rows, positives, times) if small.all() else (rows[small], positives[small], times[small])
            bits = int(few[0].max()).bit_length()  # which may be fewer
            table = np.bincount((few[0] << bits) + few[1], few[2]).astype(np.int64)
            code = np.flatnonzero(table)
            parts.append((code >> bits, code & (1 << bits) - 1, table[code]))
        if not small.all():
            n, k, t = rows[~small], positives[~small], times[~small]
            order = np.lexsort((k, n))
            n, k, t = n[order], k[order], t[order]
            first = np.flatnonzero(np.concatenate([[True], (n[1:] != n[:-1]) | (k[1:] != k[:-1])]))
            parts.append((n[first], k[first], np.add.reduceat(t, first)))
        if not parts:
            return cls(*(np.empty(0, np.int64) for _ in range(3)))
        n, k, t = (np.concatenate(column) for column in zip(*parts))
        kept = n > 0
        return cls(n[kept], k[kept], t[kept])

    @classmethod
    def merge(cls, parts: Sequence[Cells]) -> Cells:
        """Of values that are in one of the parts only."""
        return (
            parts[0]
            if len(parts) == 1
            else cls.of(
                *(np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "positives", "times"))
            )
        )

    @functools.cached_property
    def num_rows(self) -> int:
        """N."""
        return int(self.rows @ self.times)

    @functools.cached_property
    def num_positives(self) -> int:
        """K."""
        return int(self.positives @ self.times)

    @property
    def num_values(self) -> int:
        """Distinct values."""
        return int(self.times.sum())

    @property
    def num_once(self) -> int:
        """Values that one row has."""
        return int(self.times[self.rows == 1].sum())

    @functools.cached_property
    def counts(self) -> tuple[Array, Array]:
        """The distinct numbers of rows, ascending, and how many values have each."""
        first = np.flatnonzero(np.diff(self.rows, prepend=-1))
        return self.rows[first], np.add.reduceat(self.times, first)

    def entropy(self) -> float:
        """H(F) in nats."""
        counts, times = self.counts
        share = counts / self.num_rows
        return float(-(times * share) @ np.log(share)) + 0.0

    @functools.cached_property
    def information(self) -> float:
        """Plug-in I(F; Y) in nats.

        >>> round(Cells.of(np.array([2, 2]), np.array([0, 2])).information, 6)  # F is Y: ln 2
        0.693147
        """
        terms = psi(self.rows, self.positives, self.num_positives / self.num_rows)
        return float(self.times @ terms) / self.num_rows

    def sampling_sd(self) -> float:
        """Of `information` over other samples of as many rows, to first order: 0 if F and Y are independent."""
        n, k, rows, share = self.rows, self.positives, self.num_rows, self.num_positives / self.num_rows
        with np.errstate(divide="ignore", invalid="ignore"):
            positive = np.where(k > 0, np.log(k / (n * share)), 0.0)
            negative = np.where(k < n, np.log((n - k) / (n * (1 - share))), 0.0)
        square = float(self.times @ (k * positive**2 + (n - k) * negative**2)) / rows
        return float(np.sqrt(max(0.0, square - self.information**2) / rows))

    def null(self, table: NullTable) -> Null:
        """The distribution of `information` when the labels are permuted."""
        return table.of(*self.counts)


@dataclass(frozen=True)
class JointCounts:
    """How many rows have each value with a negative, and with a positive label.

    Shape: keys (V,) int64, ascending; counts (V, 2) int64; or (V, 2 + 2 (1 + R)): those of rows, then the sums of their
    weights, then these under R permutations.

    >>> one = JointCounts.of(np.array([7, 3, 7]), np.array([1, 0, 0]))
    >>> two = JointCounts.of(np.array([3, 9]), np.array([1, 1]))
    >>> merged = JointCounts.merge([one, two])
    >>> merged.keys.tolist(), merged.counts.tolist()
    ([3, 7, 9], [[1, 1], [1, 1], [0, 1]])
    """

    keys: Array
    counts: Array

    @classmethod
    def of(cls, keys: Array, positive: Array, size: int | None = None) -> JointCounts:
        """Count rows.

        Shape: keys (rows,), whole numbers; positive (rows,), 0 or 1. With `size` all keys are in [0, size).
        """
        if size is None and len(keys) and keys.min() >= 0:
            size = int(keys.max()) + 1
        if size is not None and fits_table(size, len(keys)):
            return cls.of_table(table_of(keys, positive, size))
        order = np.argsort(keys, kind="stable")
        keys = keys[order].astype(np.int64, copy=False)
        first = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))
        if not len(first):
            return cls(keys, np.empty((0, 2), np.int64))
        rows = np.diff(first, append=len(keys))
        positives = np.add.reduceat(positive[order].astype(np.int64), first)
        return cls(keys[first], np.stack([rows - positives, positives], axis=1))

    @classmethod
    def of_table(cls, table: Array) -> JointCounts:
        """From what `table_of` gives, or the sum of several."""
        kept = np.flatnonzero(table[0])
        rows, positives = table[0][kept], table[1][kept]
        return cls(kept, np.stack([rows - positives, positives], axis=1))

    @classmethod
    def merge(cls, parts: Iterable[JointCounts]) -> JointCounts:
        """Of the rows of all parts, whatever their order."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        keys, counts = np.concatenate([p.keys for p in parts]), np.concatenate([p.counts for p in parts])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))
        return cls(keys[first], np.add.reduceat(counts, first, axis=0) if len(first) else counts)

    @property
    def width(self) -> int:
        """Numbers that are counted for each key."""
        return int(self.counts.shape[1])

    def of_key(self, key: int) -> Array:
        """Counts of one key. Shape: (width,)."""
        found: Array = self.counts[self.keys == key].sum(axis=0)
        return found

    def total(self) -> Array:
        """Counts of all keys. Shape: (width,)."""
        found: Array = self.counts.sum(axis=0)
        return found

    def cells(self) -> Cells:
        """How many values have how many rows and positives."""
        return Cells.of(self.counts[:, 0] + self.counts[:, 1], self.counts[:, 1])

    def drawn(self) -> list[Cells]:
        """The same of each permutation that was counted beside."""
        both = self.counts.reshape(len(self.counts), self.width // 2, 2)[:, 1:]
        return [Cells.of(one.sum(axis=1), one[:, 1]) for one in both.transpose(1, 0, 2)]


def fits_table(size: int, num_rows: int) -> bool:
    """Whether a table of so many values is quicker than sorting so many rows."""
    return 2 * size <= DENSE * num_rows + 1024


def table_of(keys: Array, positive: Array, size: int) -> Array:
    """How many rows, and how many positive ones, each of the keys 0, ..., size - 1 has.

    Shape: keys (rows,), positive (rows,), 0 or 1 -> (2, size).
    """
    if size <= CHUNK // 2:  # whose codes and counts stay in cache
        both = np.zeros(2 * size, np.int64)
        for start in range(0, len(keys), CHUNK):
            codes = keys[start : start + CHUNK].astype(np.int64)
            codes += codes
            codes += positive[start : start + CHUNK]
            both += np.bincount(codes, minlength=2 * size)
        return np.stack([both[0::2] + both[1::2], both[1::2]])
    found = np.empty((2, size), np.int64)
    found[0] = np.bincount(keys, minlength=size)
    found[1] = np.bincount(keys[np.flatnonzero(positive.astype(bool, copy=False))], minlength=size)
    return found
