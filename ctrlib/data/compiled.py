"""Number the cells of delimited text by compiled loops (`ctrlib.data.distinct`), several columns at once.

A column has one table of distinct cells for all lines that are added, and one thread, which takes the lines in their
order: no tables are merged, and the numbers do not depend on how fast which thread is. Where numba is not installed, or
has no folder to keep what it has compiled, text is read by pyarrow; the result is the same.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctrlib.data.scan import is_utf8

WORTH_BYTES = 64 << 20  # of a file: with less to do, loading the loops takes longer than they save
MOST_CELLS, _MOST_BYTES, _MOST_ROWS = 1 << 20, 1 << 28, 1 << 22  # that are numbered together, in memory
_DEPTH = 2  # parts of a file that wait for the threads
LOGGER = logging.getLogger(__name__)


@functools.cache
def loops() -> ModuleType | None:
    """What is compiled, ready for use; None where that cannot be, which is said in the log."""
    try:
        from ctrlib.data import distinct

        distinct.warm_up()
    except Exception as error:  # whatever it is: nothing but time depends on it
        LOGGER.warning("text is read by pyarrow, since numba, which is faster, cannot be used (%s)", error)
        return None
    return distinct


def are_worth(num_bytes: int) -> bool:
    """Whether the loops are to read a file of so many bytes: it is large, or they are there already."""
    return (num_bytes >= WORTH_BYTES or loops.cache_info().currsize > 0) and loops() is not None


class Cut(NamedTuple):
    """Lines, where their cells end (`ctrlib.data.distinct.cell_ends`), and whether there may be blanks in cells."""

    lines: bytes
    ends: npt.NDArray[np.int32]
    blanks: bool


def cut(lines: bytes, mark: bytes, num_columns: int) -> Cut | None:
    """Lines without quotes, carriage returns and NUL bytes as cells; None if a line may be bad."""
    distinct = loops()
    assert distinct is not None
    ends = distinct.cell_ends(lines, ord(mark), num_columns)
    if ends is None or not (lines.isascii() or is_utf8(lines)):
        return None
    return Cut(lines, ends, any(blank in lines for blank in (b" ", b"\t") if blank != mark))


class Numbered:
    """Lines as distinct cells and, in files, the number of each line's cell among them.

    Args:
        paths: a file for each column, in which the numbers of its cells are stored one after another, as int32.
        num_threads: that share the columns.
    """

    def __init__(self, paths: Sequence[Path], num_threads: int) -> None:
        distinct = loops()
        assert distinct is not None
        self._distinct, self._paths = distinct, paths
        self._columns = [distinct.Column(len(paths)) for _ in paths]
        self._threads = [ThreadPoolExecutor(1) for _ in range(min(num_threads, len(paths)))]
        self._pending: deque[list[Future[tuple[int, int]]]] = deque()
        self._found: tuple[int, int] = (0, 0)  # cells of all columns, and bytes of the column that has most
        self.num_rows, self.blanks = 0, False

    def add(self, cut: Cut) -> None:
        """More lines."""
        self.num_rows += (len(cut.ends) - 1) // len(self._paths)
        self.blanks |= cut.blanks
        self._pending.append([one.submit(self._number, i, cut) for i, one in enumerate(self._threads)])
        self._settle(_DEPTH)

    def _number(self, first: int, cut: Cut) -> tuple[int, int]:
        """Of a thread's columns, which are every so many: the number of cells so far, and the most bytes."""
        which = range(first, len(self._paths), len(self._threads))
        columns = [self._columns[i] for i in which]
        for position, codes in zip(
            which, self._distinct.number_cells(columns, which, cut.lines, cut.ends, len(self._paths))
        ):
            with self._paths[position].open("ab") as file:
                file.write(codes)
        return sum(map(len, columns)), max(column.num_bytes for column in columns)

    def _settle(self, depth: int) -> None:
        while len(self._pending) > depth:
            found = [one.result() for one in self._pending.popleft()]
            self._found = sum(cells for cells, _ in found), max(num_bytes for _, num_bytes in found)

    @property
    def is_full(self) -> bool:
        """Whether the lines that were settled fill the memory that they may."""
        num_cells, num_bytes = self._found
        return num_cells >= MOST_CELLS or num_bytes >= _MOST_BYTES or self.num_rows >= _MOST_ROWS

    def finish(self) -> list[pa.Array]:
        """The distinct cells of each column in the order of their numbers; nothing may be added after."""
        self._settle(0)
        self.close()
        return [column.values() for column in self._columns]

    def close(self) -> None:
        """End the threads."""
        for one in self._threads:
            one.shutdown(cancel_futures=True)
