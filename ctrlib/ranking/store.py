"""All columns of the rows that have a label, densely coded, to be combined in pairs: in memory, or in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError
from ctrlib.ranking.counts import DENSE, JointCounts
from ctrlib.ranking.relevance import Counts
from ctrlib.ranking.source import Source, labelled
from ctrlib.ranking.spill import AnyCounts

Array = npt.NDArray[Any]
BLOCK = 1 << 20  # rows that are combined at once
SORTING = 40  # bytes that sorting takes for each row


@dataclass(frozen=True)
class Column:
    """One feature: codes (rows,), in [0, size)."""

    name: str
    size: int
    codes: Array


class Store:
    """The columns of features with one value per row.

    Args:
        source: what to read.
        split: of it.
        counts: of the same split, which know the values that come up.
        label: rows that have it are kept.
        names: of the features, of which all counts are in memory.
        memory: bytes, above which columns lie in a temporary file instead of memory.
        every: of the rows of either class, each so many is taken: a stratified sample.
    """

    def __init__(
        self,
        source: Source,
        split: str,
        counts: Counts,
        label: str,
        names: Sequence[str],
        *,
        memory: int,
        every: int = 1,
    ) -> None:
        self.num_rows = sum(-(-rows // every) for rows in counts.rows[label])
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        keys = {name: keys_of(counts.by_label[label][name]) for name in names}
        kinds = {name: np.min_scalar_type(max(0, len(known) - 1)) for name, known in keys.items()}
        if self.num_rows * sum(kind.itemsize for kind in kinds.values()) > memory:
            self._folder = tempfile.TemporaryDirectory()
        self.columns = [
            Column(name, len(keys[name]), self._empty(f"{at}", kinds[name])) for at, name in enumerate(names)
        ]
        self.positive = np.empty(self.num_rows, np.int8)
        places = {name: _places(known) for name, known in keys.items()}
        at, start, seen = source.schema.labels.index(label), 0, [0, 0]
        for block in source.blocks(split):
            rows, positive = labelled(block, at)
            if every > 1:
                taken = np.zeros(len(positive), bool)
                for side in (0, 1):
                    of_side = np.flatnonzero(positive == side)
                    taken[of_side[-seen[side] % every :: every]] = True
                    seen[side] += len(of_side)
                rows, positive = np.arange(len(block.labels))[rows][taken], positive[taken]
            stop = start + len(positive)
            self.positive[start:stop] = positive
            for column in self.columns:
                codes = block.codes[column.name][rows]
                place = places[column.name]
                column.codes[start:stop] = np.searchsorted(keys[column.name], codes) if place is None else place[codes]
            start = stop

    def joint(self, column: Column) -> JointCounts:
        """Counts of a column's codes, of which some may have no row."""
        table = np.zeros(2 * column.size, np.int64)
        for start in range(0, self.num_rows, BLOCK):
            at = slice(start, start + BLOCK)
            codes = column.codes[at].astype(np.int64) * 2 + self.positive[at]
            table += np.bincount(codes, minlength=len(table))
        return JointCounts(np.arange(column.size), table.reshape(-1, 2))

    def _empty(self, name: str, kind: np.dtype[Any]) -> Array:
        if self._folder is None:
            return np.empty(self.num_rows, kind)
        return np.memmap(Path(self._folder.name) / name, kind, "w+", shape=(self.num_rows,))

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.columns = []
        if self._folder is not None:
            self._folder.cleanup()


def keys_of(joint: AnyCounts) -> Array:
    """The values that come up, ascending.

    Raises:
        ArgumentError: they are not in memory.
    """
    if not isinstance(joint, JointCounts):
        raise ArgumentError("columns whose counts are on disk are not combined in pairs: leave them out")
    return joint.keys


def _places(keys: Array) -> Array | None:
    """Id -> its place among the keys, unless ids are large."""
    if not len(keys) or keys[0] < 0 or keys[-1] > 4 * len(keys) + BLOCK:
        return None
    places = np.zeros(int(keys[-1]) + 1, np.uint32)
    places[keys] = np.arange(len(keys))
    return places


def pair_counts(first: Column, second: Column, positive: Array, memory: int) -> Iterator[tuple[Array, ...]]:
    """Of each pair of values that comes up: both codes, how many rows, how many of them positive. Shape: (C,) each.

    Pairs of few values are counted in a table. Of many, the rows are sorted, in as many passes as fit them into
    `memory` bytes, each of which gives a part of the pairs: a pass takes the values of the column with more values
    whose codes leave one remainder.
    """
    rows, table_size = len(positive), 2 * first.size * second.size
    if table_size <= max(DENSE * min(rows, memory // (8 * DENSE)), 1024):
        table = np.zeros(table_size, np.int64)
        for start in range(0, rows, BLOCK):
            at = slice(start, start + BLOCK)
            table += np.bincount(_codes(first, second, positive, at, np.dtype(np.int64)), minlength=table_size)
        positives, counts = table[1::2], table[0::2] + table[1::2]
        kept = np.flatnonzero(counts)
        yield (*np.divmod(kept, second.size), counts[kept], positives[kept])
        return
    more = first if first.size >= second.size else second
    passes = -(-rows * SORTING // max(memory, SORTING))
    kind = np.dtype(np.uint32) if table_size < 2**32 else np.dtype(np.int64)
    for remainder in range(passes):
        pieces = []
        for start in range(0, rows, BLOCK):
            codes = _codes(first, second, positive, slice(start, start + BLOCK), kind)
            pieces.append(codes if passes == 1 else codes[more.codes[start : start + BLOCK] % passes == remainder])
        codes = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if len(codes):
            codes.sort()
            value = codes >> 1
            start_of = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
            counts = np.diff(start_of, append=len(codes))
            positives = np.add.reduceat((codes & 1).astype(np.int32), start_of)
            yield (*np.divmod(value[start_of], kind.type(second.size)), counts, positives)


def _codes(first: Column, second: Column, positive: Array, at: slice, kind: np.dtype[Any]) -> Array:
    """2 (a |B| + b) + y."""
    codes = first.codes[at].astype(kind)
    codes *= kind.type(second.size)
    codes += second.codes[at]
    codes *= kind.type(2)
    codes += positive[at].astype(np.uint8)
    return codes
