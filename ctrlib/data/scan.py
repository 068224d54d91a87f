"""Cut the bytes of a delimited text file into blocks of whole, well-formed rows.

CSV readers differ in what they do with a broken row: fill it up, cut it, swallow the rest of the file after a stray
quote. So rows are checked here before any reader sees them, with a few vectorised passes over blocks of 16 MB: the
memory does not grow with the file, and every bad row is either an error that names it or counted and left out.

The grammar is RFC 4180 with any one-byte separator: a cell that holds a separator, newline or quote stands in quotes,
with quotes inside it doubled. LF and CRLF end a row; a byte-order mark, a missing last newline and blank lines at the
end are fine.

>>> import io
>>> scanner = RowScanner("demo.csv", b",", num_cells=2, on_bad_row="skip")
>>> list(scanner.blocks(io.BytesIO(b'1,2\\n3\\n"4,\\n",5\\n')))
[b'1,2\\n"4,\\n",5\\n']
>>> scanner.skipped
Counter({'too few cells': 1})
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from ctrlib.errors import ArgumentError, CtrlibError

BLOCK_BYTES = 16 << 20
MAX_ROW_BYTES = 16 << 20  # a quote that stays open for longer is a stray one
NEWLINE, QUOTE = ord("\n"), ord('"')

OnBadRow = Literal["raise", "skip"]
Array = NDArray[Any]
Rows = TypeVar("Rows")
# Whole lines without quotes -> what waits for their number and what they hold, or for None if a row may be bad.
Quick: TypeAlias = Callable[[bytes], Callable[[], tuple[int, Rows] | None]]

# Why a row is bad, from the most to the least telling: a row counts once, under the first that applies.
REASONS = {
    "NUL byte": "a NUL byte",
    "bad UTF-8": "bytes that are not UTF-8",
    "stray quote": "a quote that does not enclose a whole cell, or is never closed",
    "blank line": "nothing: a blank line before the end of the file",
    "too few cells": "too few cells",
    "too many cells": "too many cells",
}
_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}
_STRAY = -1  # in place of a row's number of cells


class DataError(CtrlibError, ValueError):
    """The data itself is damaged; the message names file, row or column, what was expected and how to mend it."""


class RowScanner:
    """Checks rows and yields blocks of good ones.

    Args:
        name: of the file, for messages.
        separator: one byte.
        num_cells: that every row must have.
        on_bad_row: "raise" a `DataError` at the first bad row, or "skip" it and count it in `skipped`.
        first_line: number of the line at which the stream starts, 2 after a header.

    `num_rows` is the number of good rows so far, `bad_rows` are the numbers (from 0) of those left out.
    `one_line_per_row` stays true while no cell holds a newline, so while line numbers can be told from row numbers.
    """

    def __init__(
        self, name: str, separator: bytes, *, num_cells: int, on_bad_row: OnBadRow = "raise", first_line: int = 1
    ) -> None:
        self.name, self.separator, self.num_cells, self.on_bad_row = name, separator, num_cells, on_bad_row
        self.skipped: Counter[str] = Counter()
        self.num_rows = 0
        self.bad_rows: array[int] = array("q")
        self.one_line_per_row = True
        self._line = first_line  # of the first row not yet taken
        self._rows_taken = 0  # bad ones and blank lines included
        self._blank_lines: list[int] = []  # [row, line, number] of blank lines that may turn out to be the file's end
        cell = rb'(?:"[^"]*(?:""[^"]*)*"|[^"\n%b]*)' % re.escape(separator)
        self._row = re.compile(rb"%b(?:%b%b)*\n" % (cell, re.escape(separator), cell))
        self._cut_row = re.compile(
            rb'(?:%b%b)*(?:"[^"]*(?:""[^"]*)*"?|[^"\n%b]*)\Z' % (cell, re.escape(separator), re.escape(separator))
        )
        self._quoted = re.compile(rb'"[^"]*"')

    def blocks(
        self, stream: BinaryIO, block_bytes: int = BLOCK_BYTES, quick: Quick[Rows] | None = None, depth: int = 0
    ) -> Iterator[bytes | Rows]:
        """Blocks of whole good rows, in order.

        Args:
            stream: the file, after its header.
            block_bytes: to read at once.
            quick: starts a parser that knows well-formed rows at sight; what it makes of a block takes its place, and
                only blocks that it declines are looked at here.
            depth: so many parsers may be at work while the next block is read.

        Raises:
            DataError: at the first bad row, unless they are skipped.
        """
        tail = cut_newline = b""
        pending: deque[tuple[bytes, Callable[[], tuple[int, Rows] | None]]] = deque()
        while block := stream.read(block_bytes):
            # A row may be cut by the end of a block: what is after the last whole row waits for the next block.
            if cut_newline or b"\r" in block:
                block = cut_newline + block
                cut_newline = b"\r" if block.endswith(b"\r") else b""
                block = block.removesuffix(cut_newline).replace(b"\r\n", b"\n")
            data = tail + block
            lines = data[: data.rfind(b"\n") + 1]
            if quick is not None and lines and b'"' not in lines:
                tail = data[len(lines) :]
                pending.append((lines, quick(lines)))
                yield from self._settled(pending, depth)
                continue
            yield from self._settled(pending, 0)
            waited_enough = len(tail) > MAX_ROW_BYTES
            ends, cells = self._rows(data, at_end=waited_enough)
            taken = int(ends[-1]) if len(ends) else 0
            tail = data[taken:]
            if waited_enough and len(tail) > MAX_ROW_BYTES:
                raise DataError(
                    f"{self.name}: no end of line in {MAX_ROW_BYTES >> 20} MB after row {self._rows_taken}: "
                    "expected a text file with one row a line"
                )
            if good := self._good(data[:taken], ends, cells):
                yield good
        if tail:
            data = tail if tail.endswith(b"\n") else tail + b"\n"
            if quick is not None and b'"' not in data:
                pending.append((data, quick(data)))
            else:
                yield from self._settled(pending, 0)
                ends, cells = self._rows(data, at_end=True)
                if good := self._good(data, ends, cells):
                    yield good
        yield from self._settled(pending, 0)

    def _settled(
        self, pending: deque[tuple[bytes, Callable[[], tuple[int, Rows] | None]]], depth: int
    ) -> Iterator[bytes | Rows]:
        """The oldest blocks, until no more than `depth` are pending; those that were declined are looked at now."""
        while len(pending) > depth:
            lines, result = pending.popleft()
            found = None if self._blank_lines else result()
            if found is None:
                if good := self._good(lines, *self._rows(lines, at_end=False)):
                    yield good
                continue
            num_rows, rows = found
            self._line += num_rows
            self._rows_taken += num_rows
            self.num_rows += num_rows
            yield rows

    def _rows(self, data: bytes, at_end: bool) -> tuple[Array, Array]:
        """Where each whole row ends (one past its newline) and how many cells it has (`_STRAY`: quotes are wrong)."""
        codes = np.frombuffer(data, np.uint8)
        marks = np.flatnonzero((codes == ord(self.separator)) | (codes == NEWLINE))
        if b'"' in data:
            quotes = np.flatnonzero(codes == QUOTE)
            # Outside quotes an even number of them has gone by; the doubled quote inside a cell closes and reopens.
            if not self._quotes_enclose_cells(codes, quotes) or (at_end and len(quotes) % 2):
                return self._rows_one_by_one(data, at_end)
            marks = marks[np.searchsorted(quotes, marks) % 2 == 0]
        newlines = np.flatnonzero(codes[marks] == NEWLINE)
        return marks[newlines] + 1, np.diff(newlines, prepend=-1)

    def _quotes_enclose_cells(self, codes: Array, quotes: Array) -> bool:
        edges = np.array([ord(self.separator), NEWLINE, QUOTE], np.uint8)
        before_opening = codes[quotes[0::2] - 1]
        if quotes[0] == 0:
            before_opening[0] = NEWLINE
        closing = quotes[1::2]
        after_closing = codes[closing[closing + 1 < len(codes)] + 1]
        return bool(np.isin(before_opening, edges).all() and np.isin(after_closing, edges).all())

    def _rows_one_by_one(self, data: bytes, at_end: bool) -> tuple[Array, Array]:
        """As `_rows`, slower: after a stray quote only the line that holds it is given up, not the rest of the file."""
        ends, cells, position = [], [], 0
        while position < len(data):
            if match := self._row.match(data, position):
                end = match.end()
                row = data[position:end]
                num_cells = (self._quoted.sub(b"", row) if b'"' in row else row).count(self.separator) + 1
            else:
                if not at_end and self._cut_row.match(data, position):
                    break
                end = data.find(b"\n", position) + 1
                if end == 0:
                    break
                num_cells = _STRAY
            ends.append(end)
            cells.append(num_cells)
            position = end
        return np.array(ends, np.int64), np.array(cells, np.int64)

    def _good(self, data: bytes, ends: Array, cells: Array) -> bytes:
        """The good rows of a block; bad ones raise or are counted."""
        num_rows = len(ends)
        if not num_rows:
            return b""
        starts = np.concatenate([[0], ends[:-1]])
        problems = np.zeros(num_rows, np.int8)
        problems[cells < self.num_cells] = _CODES["too few cells"]
        problems[cells > self.num_cells] = _CODES["too many cells"]
        blank = ends - starts == 1
        problems[blank] = _CODES["blank line"]
        problems[cells == _STRAY] = _CODES["stray quote"]
        problems[np.searchsorted(ends, _invalid_utf8(data), side="right")] = _CODES["bad UTF-8"]
        if b"\0" in data:
            nuls = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
            problems[np.searchsorted(ends, nuls, side="right")] = _CODES["NUL byte"]

        filled = np.flatnonzero(~blank)
        num_taken = int(filled[-1]) + 1 if len(filled) else 0  # blank lines after it may be the end of the file
        if num_taken and self._blank_lines:
            row, line, number = self._blank_lines
            self._report(row, line, "blank line", 0, number)
            self._blank_lines = []
        bad = np.flatnonzero(problems[:num_taken])
        if len(bad) and self.on_bad_row == "raise":
            first = int(bad[0])
            line = self._line + data.count(b"\n", 0, int(starts[first]))
            reason = list(REASONS)[problems[first] - 1]
            self._report(self._rows_taken + first + 1, line, reason, int(cells[first]), 1)
        self.bad_rows.extend((bad + self._rows_taken).tolist())
        for reason, code in _CODES.items():
            if number := int((problems[:num_taken] == code).sum()):
                self.skipped[reason] += number

        self.one_line_per_row &= data.count(b"\n") == num_rows
        self._line += data.count(b"\n")
        self._rows_taken += num_rows
        if num_blank := num_rows - num_taken:
            if not self._blank_lines:
                self._blank_lines = [self._rows_taken - num_blank + 1, self._line - num_blank, 0]
            self._blank_lines[2] += num_blank
        self.num_rows += num_taken - len(bad)
        if len(bad):
            good = np.repeat(problems == 0, ends - starts)
            return bytes(np.frombuffer(data, np.uint8)[good])
        return data[: int(ends[num_taken - 1])] if num_taken else b""

    def _report(self, row: int, line: int, reason: str, cells: int, number: int) -> None:
        if self.on_bad_row == "skip":
            self.skipped[reason] += number
            self.bad_rows.extend(range(row - 1, row - 1 + number))
            return
        what = REASONS[reason]
        if reason.endswith("cells"):
            what = f"{cells} cells (separated by {self.separator.decode()!r})"
        raise DataError(
            f"{self.name}: row {row} (line {line} of the file) has {what}, expected {self.num_cells} cells of UTF-8 "
            'text: mend the row, or leave such rows out with on_bad_row="skip" (--on-bad-row skip)'
        )


def check_on_bad_row(value: str) -> None:
    """Refuse what is not an `OnBadRow`.

    Raises:
        ValueError: as said.
    """
    if value not in get_args(OnBadRow):
        raise ArgumentError(f"on_bad_row is {value!r}, expected one of {get_args(OnBadRow)}")


def _invalid_utf8(data: bytes) -> list[int]:
    """A position in every line that is not UTF-8."""
    positions: list[int] = []
    if data.isascii():
        return positions
    view, start = memoryview(data), 0
    while start < len(data):
        try:
            str(view[start:], "utf-8")
            break
        except UnicodeDecodeError as error:
            positions.append(start + error.start)
            start = data.find(b"\n", positions[-1]) + 1 or len(data)
    return positions


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8.

    >>> is_utf8("é".encode()), is_utf8("é".encode("latin-1"))
    (True, False)
    """
    try:
        str(memoryview(data), "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def find_separator(path: Path, head: bytes) -> bytes:
    """The separator that the file's name or else its first lines suggest.

    >>> find_separator(Path("a.tsv.gz"), b""), find_separator(Path("a.txt"), b"x;y;z\\n1;2;3\\n")
    (b'\\t', b';')

    Raises:
        DataError: no usual separator splits the first lines alike.
    """
    by_name = {".csv": b",", ".tsv": b"\t", ".tab": b"\t"}
    for suffix in reversed(path.suffixes):
        if suffix.lower() in by_name:
            return by_name[suffix.lower()]
    lines = [line for line in head.splitlines()[:20] if line]
    if len(lines) > 1 and not head.endswith(b"\n"):
        lines = lines[:-1]  # may be cut
    counts = {mark: {line.count(mark) for line in lines} for mark in (b"\t", b",", b";", b"|")}
    alike = {mark: count.pop() for mark, count in counts.items() if len(count) == 1}
    best = max(alike, key=lambda mark: alike[mark], default=b"")
    if not best or alike[best] == 0:
        raise DataError(
            f'{path}: cannot tell what separates the cells: say separator="," (--separator; or whatever one byte it is)'
        )
    return best
