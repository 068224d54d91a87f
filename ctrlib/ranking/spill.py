"""Joint counts that grow block by block, in memory or, where that would be too much, in files by ranges of keys.

A column with few values is a table. Of others the distinct values of some blocks are merged again and again; when all
columns together take more than they may, the largest goes to disk: its keys are scattered over `NUM_RANGES` ranges, a
file each, which are looked at one after another. A key is in one range only, and the sums of whole numbers do not
depend on their order, so that all that comes of them is the same bits.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.ranking.counts import Cells, JointCounts, fits_table, table_of

Array = npt.NDArray[Any]
NUM_RANGES = 256
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: neighbouring keys are far apart when multiplied
TRANSIENT = 4  # times as much as what is held is taken while parts are merged


class SpilledCounts:
    """Joint counts of which some lie on disk, as `JointCounts` otherwise, but that they are never in memory as a whole.

    Args:
        sources: parts, of which each may have any keys.
        width: numbers that are counted for each key.
    """

    def __init__(self, sources: Iterable[JointCounts | Files], width: int) -> None:
        self.sources, self.width = list(sources), width

    def ranges(self) -> Iterator[JointCounts]:
        """The counts of each range of keys; the files of the range are read when it is its turn."""
        memory = [(one, range_of(one.keys)) for one in self.sources if isinstance(one, JointCounts)]
        files = [one for one in self.sources if isinstance(one, Files)]
        for number in range(NUM_RANGES):
            parts = [one.read(number, self.width) for one in files]
            for joint, ranges in memory:
                kept = ranges == number
                parts.append(JointCounts(joint.keys[kept], joint.counts[kept]))
            yield JointCounts.merge(parts)

    def cells(self) -> Cells:
        """How many values have how many rows and positives."""
        return Cells.merge([one.cells() for one in self.ranges()])

    def drawn(self) -> list[Cells]:
        """The same of each permutation that was counted beside."""
        return [Cells.merge(of_ranges) for of_ranges in zip(*(one.drawn() for one in self.ranges()))]

    def of_key(self, key: int) -> Array:
        """Counts of one key. Shape: (width,)."""
        number = int(range_of(np.array([key]))[0])
        parts = [one if isinstance(one, JointCounts) else one.read(number, self.width) for one in self.sources]
        found: Array = np.sum([one.of_key(key) for one in parts], axis=0)
        return found

    def total(self) -> Array:
        """Counts of all keys. Shape: (width,)."""
        found: Array = np.sum([one.total() for one in self.ranges()], axis=0)
        return found


AnyCounts = JointCounts | SpilledCounts


def range_of(keys: Array) -> Array:
    """Which of `NUM_RANGES` ranges each key is in."""
    ranges: Array = (keys.astype(np.int64, copy=False).view(np.uint64) * SPREAD) >> np.uint64(56)
    return ranges


def merge(parts: Iterable[AnyCounts]) -> AnyCounts:
    """Of the rows of all parts, whatever their order; on disk, if one of them is."""
    parts = list(parts)
    if all(isinstance(one, JointCounts) for one in parts):
        return JointCounts.merge(one for one in parts if isinstance(one, JointCounts))
    spilled = [one if isinstance(one, SpilledCounts) else SpilledCounts([one], one.counts.shape[1]) for one in parts]
    return SpilledCounts([source for one in spilled for source in one.sources], spilled[0].width)


def side_by_side(one: AnyCounts, other: AnyCounts) -> Iterator[tuple[JointCounts, JointCounts]]:
    """Both, in parts that have the same keys on both sides."""
    if isinstance(one, JointCounts) and isinstance(other, JointCounts):
        yield one, other
        return
    both = (each if isinstance(each, SpilledCounts) else SpilledCounts([each], 2) for each in (one, other))
    yield from zip(*(each.ranges() for each in both))


class Files:
    """Rows of a key and its counts, as 64-bit integers, in a temporary folder, a file for each range of keys.

    The folder is removed when nobody needs it any more.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ctrlib-ranking-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def write(self, joint: JointCounts) -> None:
        """Append."""
        ranges = range_of(joint.keys)
        order = np.argsort(ranges, kind="stable")
        table = np.concatenate([joint.keys[:, None], joint.counts], axis=1)[order]
        ends = np.searchsorted(ranges[order], np.arange(NUM_RANGES + 1).astype(np.uint64))
        for number in np.flatnonzero(np.diff(ends)):
            with (self._folder / str(number)).open("ab") as file:
                table[ends[number] : ends[number + 1]].tofile(file)

    def read(self, number: int, width: int) -> JointCounts:
        """What a range has."""
        path = self._folder / str(number)
        table = np.fromfile(path, np.int64) if path.exists() else np.empty(0, np.int64)
        table = table.reshape(-1, 1 + width)
        # A key may come several times, which is why the two are merged.
        return JointCounts.merge([JointCounts(half[:, 0], half[:, 1:]) for half in (table, table[:0])])


class Tally:
    """Joint counts of one column that grow block by block.

    Args:
        size: keys are in [0, size); None for any 64-bit ids.
    """

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._table: Array | None = None
        self._parts: list[JointCounts] = []
        self._files: Files | None = None
        self._width = 2

    def add(self, keys: Array, positive: Array) -> None:
        """Count a block of rows."""
        size = self._size
        if size is not None and (self._table is not None or fits_table(size, len(keys))):
            table = table_of(keys, positive, size)
            if self._table is None:
                self._table = table
            else:
                self._table += table
            return
        self.add_counts(JointCounts.of(keys, positive))

    def add_counts(self, joint: JointCounts) -> None:
        """Add what was counted elsewhere."""
        self._width = joint.counts.shape[1]
        self._parts.append(joint)
        if sum(len(part.keys) for part in self._parts[1:]) > len(self._parts[0].keys):
            self._parts = [JointCounts.merge(self._parts)]

    @property
    def num_bytes(self) -> int:
        """Of what could go to disk."""
        return sum(part.keys.nbytes + part.counts.nbytes for part in self._parts)

    def spill(self) -> None:
        """Bring it there."""
        self._files = self._files or Files()
        for part in self._parts:
            self._files.write(part)
        self._parts = []

    def counts(self) -> AnyCounts:
        """Of all blocks."""
        parts = list(self._parts)
        if self._table is not None:
            parts.append(JointCounts.of_table(self._table))
        if self._files is not None:
            return SpilledCounts([self._files, *parts], self._width)
        if not parts:
            return JointCounts(np.empty(0, np.int64), np.empty((0, 2), np.int64))
        return JointCounts.merge(parts)


def keep_within(tallies: Iterable[Tally], memory: int) -> None:
    """Bring the largest to disk until all fit into so many bytes, with what merging them takes."""
    sizes = {tally: size for tally in tallies if (size := tally.num_bytes)}
    total = sum(sizes.values())
    for tally in sorted(sizes, key=lambda tally: -sizes[tally]):
        if total * TRANSIENT <= memory:
            return
        tally.spill()
        total -= sizes[tally]
