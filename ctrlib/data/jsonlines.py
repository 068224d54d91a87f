"""Read JSON lines, an object a line, in blocks; cells keep their types, as those of a dictionary do.

JSON has one kind of number, so that 2 and 2.0 are the same: a column of whole numbers is one of integers. Within a
column all cells have one kind (text, numbers, booleans, lists of one of these), whatever the block: it is checked
against the first cell. A key that a line does not have is a missing cell. Objects, and lists of them, are no cells;
they are kept as their JSON such that their column can be shown, and left out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow as pa

from ctrlib.data.scan import MAX_ROW_BYTES, DataError, OnBadRow
from ctrlib.schema import SchemaError

BLOCK_BYTES = 4 << 20  # what Python makes of them is some ten times as large
REASONS = {
    "no JSON object": 'no JSON object (such as {"item": 7})',
    "bad UTF-8": "bytes that are not UTF-8",
    "blank line": "nothing: a blank line before the end of the file",
}
_KINDS = {str: "text", bool: "boolean", int: "number", float: "number", dict: "object", list: "object"}
_DTYPES: dict[str, pl.DataType] = {
    "": pl.Null(),
    "text": pl.String(),
    "boolean": pl.Boolean(),
    "list": pl.List(pl.Null()),
    "list of text": pl.List(pl.String()),
    "list of boolean": pl.List(pl.Boolean()),
    "object": pl.Struct({"json": pl.String()}),
}


class JsonLines:
    """The rows of a file of JSON lines, as frames.

    Args:
        path: for messages.
        stream: its bytes, unpacked.
        on_bad_row: "raise" a `DataError` at the first bad line, or "skip" it and count it in `skipped`.

    `num_rows` is the number of good rows so far, `bad_rows` are the numbers (from 0) of those left out.

    >>> import io
    >>> lines = JsonLines(Path("demo.jsonl"), io.BytesIO(b'{"a": 1, "b": "x"}\\n{"a": null, "c": [2, 3.0]}\\n'))
    >>> next(lines.frames()).rows()
    [(1, 'x', None), (None, None, [2, 3])]
    """

    def __init__(self, path: Path, stream: BinaryIO, on_bad_row: OnBadRow = "raise") -> None:
        self.path, self.on_bad_row = path, on_bad_row
        self.skipped: Counter[str] = Counter()
        self.bad_rows: array[int] = array("q")
        self.num_rows = 0
        self._stream = stream
        self._line = 0  # of the last one read
        self._blank: list[int] = []  # blank lines that may turn out to be the file's end
        self._kinds: dict[str, tuple[str, int]] = {}  # column -> kind of its cells, and the line that told

    def frames(self, wanted: Collection[str] = ()) -> Iterator[pl.DataFrame]:
        """The rows, a block at a time. A frame has the columns that came up so far, and those that are `wanted`.

        Raises:
            DataError: a line is bad, unless those are skipped; or there is none.
            SchemaError: cells of a column are of several kinds, or what is wanted came up in no line.
        """
        for lines in self._blocks():
            rows, numbers = [], []
            for line in lines:
                self._line += 1
                row = self._row(line)
                if row is not None:
                    rows.append(row)
                    numbers.append(self._line)
            if not rows:
                continue
            self.num_rows += len(rows)
            for name in dict.fromkeys(itertools.chain(*rows)):
                self._kinds.setdefault(name, ("", 0))
            names = dict.fromkeys((*self._kinds, *wanted))
            if not names:
                raise DataError(f"{self.path}: row {numbers[0]} has no keys: expected a key for each column")
            if "" in names:  # for which polars would make up a name
                raise SchemaError(f"{self.path}: columns [''] have names that are kept for other uses: rename them")
            yield pl.DataFrame([self._column(name, [row.get(name) for row in rows], numbers) for name in names])
        if not self.num_rows:
            skipped = f" but {dict(self.skipped)}, which were skipped" if self.skipped else ""
            raise DataError(f"{self.path} has no rows{skipped}: expected a JSON object a line")
        if missing := [name for name in wanted if name not in self._kinds]:
            raise SchemaError(
                f"{self.path}: columns {missing} are missing, its lines have the keys {list(self._kinds)[:20]}: name "
                "columns that it has, or mend the data"
            )

    def _blocks(self) -> Iterator[list[bytes]]:
        tail = b""
        first = True
        while block := self._stream.read(BLOCK_BYTES):
            block = block.removeprefix(b"\xef\xbb\xbf") if first else block
            first = False
            *lines, tail = (tail + block).split(b"\n")
            if len(tail) > MAX_ROW_BYTES:
                raise DataError(
                    f"{self.path}: no end of line in {MAX_ROW_BYTES >> 20} MB after line {self._line + len(lines)}: "
                    "expected a JSON object a line"
                )
            yield lines
        if tail:
            yield [tail]

    def _row(self, line: bytes) -> dict[str, Any] | None:
        """The row in a line; None where there is none."""
        if not line.strip():
            self._blank.append(self._line)
            return None
        for number in self._blank:
            self._report(number, "blank line")
        self._blank = []
        try:
            row = json.loads(line.decode())
            if b"\\ud" in line or b"\\uD" in line:
                json.dumps(row, ensure_ascii=False).encode()  # half of a pair is no text
        except UnicodeError:
            self._report(self._line, "bad UTF-8")
            return None
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return row
        self._report(self._line, "no JSON object")
        return None

    def _report(self, number: int, reason: str) -> None:
        if self.on_bad_row == "raise":
            raise DataError(
                f"{self.path}: row {number} (line {number} of the file) has {REASONS[reason]}, expected a JSON object: "
                'mend the line, or leave such lines out with on_bad_row="skip" (--on-bad-row skip)'
            )
        self.skipped[reason] += 1
        self.bad_rows.append(number - 1)

    def completed(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """An earlier frame with the columns that came up later, too; for when all have been read."""
        columns = []
        for name, dtype in frame.collect_schema().items():
            # Empty lists are the first that came of a column of objects.
            empty = self._kinds[name][0] == "object" and dtype == _DTYPES["list"]
            columns.append(pl.lit(None).alias(name) if empty else pl.col(name))
        return frame.select(*columns, *(pl.lit(None).alias(name) for name in list(self._kinds)[len(columns) :]))

    def _column(self, name: str, cells: list[Any], numbers: list[int]) -> pl.Series:
        kind = self._kind(name, cells, numbers)
        if kind == "object":
            cells = [None if cell is None else {"json": json.dumps(cell)} for cell in cells]
        if not kind.endswith("number"):
            return pl.Series(name, cells, dtype=_DTYPES[kind])
        if kind == "number":
            return self._numbers(name, cells, numbers)
        # One column of all values, which decide together what type they have.
        lengths = [0 if cell is None else len(cell) for cell in cells]
        every = [cell for cell in cells if cell is not None]
        lines = np.repeat(numbers, lengths).tolist()
        values = self._numbers(name, list(itertools.chain.from_iterable(every)), lines)
        starts: list[int | None] = [0, *itertools.accumulate(lengths)]
        for row, cell in enumerate(cells):
            starts[row] = None if cell is None else starts[row]
        lists = pa.LargeListArray.from_arrays(pa.array(starts, pa.int64()), values.to_arrow())
        return pl.Series(name, lists)

    def _numbers(self, name: str, cells: list[Any], numbers: list[int]) -> pl.Series:
        if float in map(type, cells):
            if not all(map(_is_whole, cells)):
                return pl.Series(name, [None if cell is None else float(cell) for cell in cells], dtype=pl.Float64)
            cells = [None if cell is None or cell != cell else int(cell) for cell in cells]
        for dtype in (pl.Int64, pl.UInt64):
            with contextlib.suppress(OverflowError, TypeError, pl.exceptions.PolarsError):
                return pl.Series(name, cells, dtype=dtype)
        number, cell = next(
            (number, cell)
            for number, cell in zip(numbers, cells)
            if cell is not None and not (-(2**63) <= cell < 2**63)
        )
        raise SchemaError(
            f"{self.path}: row {number} (line {number} of the file), column {name!r} holds {cell}: integers of up "
            "to 64 bits are read, all signed or all unsigned; write the column as text"
        )

    def _kind(self, name: str, cells: list[Any], numbers: list[int]) -> str:
        """The kind of a column's cells, "" if none has come so far.

        Raises:
            SchemaError: they are of several kinds.
        """
        kind: str | None = self._kinds.get(name, ("", 0))[0]
        types = set(map(type, cells)) - {type(None)}
        kinds = {_KINDS[one] for one in types - {list}}
        if list in types:
            inner = set(map(type, itertools.chain.from_iterable(cell for cell in cells if type(cell) is list)))
            kinds |= _kinds_of_list(inner)
        for other in sorted(kinds):
            kind = None if kind is None else _merged(kind, other)
        if kind is None:
            self._refuse(name, cells, numbers)
        if kind and not self._kinds[name][1]:
            self._kinds[name] = kind, next(number for cell, number in zip(cells, numbers) if cell is not None)
        elif kind:
            self._kinds[name] = kind, self._kinds[name][1]
        return kind or ""

    def _refuse(self, name: str, cells: list[Any], numbers: list[int]) -> None:
        """Name the first cell that is of another kind than those before it."""
        kind, first = self._kinds[name]
        for cell, number in zip(cells, numbers):
            if cell is None:
                continue
            of_cell = _kinds_of_list(set(map(type, cell))) if type(cell) is list else {_KINDS[type(cell)]}
            merged = _merged(kind, of_cell.pop()) if len(of_cell) == 1 else None
            if merged is None:
                before = f"but the kind of row {first} is {kind!r}" if first else "which mixes kinds"
                raise SchemaError(
                    f"{self.path}: row {number} (line {number} of the file), column {name!r} holds "
                    f"{json.dumps(cell)[:200]}, {before}: write the whole column as one of text, numbers, booleans and "
                    "lists of these"
                )
            kind, first = merged, first or number


def _kinds_of_list(inner: set[type]) -> set[str]:
    """The kinds of lists of values of these types: one, unless they are mixed."""
    found = {_KINDS[one] for one in inner - {type(None)}} or {""}
    return {{"": "list", "object": "object"}.get(kind, f"list of {kind}") for kind in found}


def _merged(a: str, b: str) -> str | None:
    """The kind of a column that holds cells of both kinds."""
    if a == b or not a:
        return b
    for empty, other in ((a, b), (b, a)):
        if empty == "list" and other.startswith(("list", "object")):
            return other
    return None


def _is_whole(cell: float | None) -> bool:
    if type(cell) is float:
        return cell != cell or (cell.is_integer() and abs(cell) < 2.0**63)
    return True
