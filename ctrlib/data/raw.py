"""Open raw data of any supported kind as one lazy table (`ctrlib.data.table`), checked.

Text (CSV, TSV, packed or not) is checked row by row (`ctrlib.data.scan`) and written once, block by block, as a
temporary parquet table whose columns are all text: what follows reads single columns from it, as often as it likes.
JSON lines are written likewise, with the types that their cells have. Parquet and Arrow files and frames are used as
they are; where files follow each other, their types are made alike (`ctrlib.data.parts`).
"""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, TypeVar

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from ctrlib.data.formats import format_of, refuse_foreign, unpacked
from ctrlib.data.jsonlines import JsonLines
from ctrlib.data.parts import alike, frames_of, parts_of
from ctrlib.data.scan import BLOCK_BYTES, DataError, OnBadRow, Quick, RowScanner, find_separator
from ctrlib.data.table import ROW, Ints, RawTable, as_frame, check_names, clean, clean_text, name_of, naming, numbered
from ctrlib.errors import WrongTypeError
from ctrlib.schema import SchemaError

RawData: TypeAlias = Any  # str | Path | a list of those | polars frame, lazy or not | pandas frame | Arrow table
Rows = TypeVar("Rows")


def read_raw(
    data: RawData,
    temporary: Path,
    *,
    name: str = "data",
    separator: str | None = None,
    columns: Sequence[str] | None = None,
    missing_values: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "raise",
    may_lack: Sequence[Sequence[str]] = (),
    piece_rows: int | None = None,
) -> RawTable:
    """Open a file, a folder of parquet files, a list of files of one kind, or a frame, and check its form.

    Args:
        data: the path or frame: CSV, TSV, JSON lines, parquet or Arrow; polars, pandas or a pyarrow table.
        temporary: a folder for the table made from text; keep it until the frame has been used.
        name: what to call a frame in messages; a file is called by its path.
        separator: one byte; by default told from the file's name, else from its first lines.
        columns: names for a text file without header.
        missing_values: what a cell without value holds.
        on_bad_row: "raise" at the first bad row, or "skip" and count them.
        may_lack: sets of `columns`; the first that makes the others as many as the file's cells is left out.
        piece_rows: of files, make pieces of so many rows; by default there is one piece.

    Raises:
        DataError: the file is damaged or empty; the message names the row.
        SchemaError: columns have the same name, or names that ctrlib uses itself.
    """
    if isinstance(data, pl.LazyFrame):
        with naming(name):
            check_names(name, data.collect_schema().names())
            # Read once: what has no order of its own would otherwise give other rows at every look.
            temporary.mkdir(parents=True, exist_ok=True)
            data.sink_parquet(temporary / "0.parquet")
        return read_parquet(temporary, name, missing_values, on_bad_row, piece_rows)
    if isinstance(data, list | tuple):
        options: dict[str, Any] = {"separator": separator, "columns": columns, "missing_values": missing_values}
        options |= {"on_bad_row": on_bad_row, "may_lack": may_lack, "piece_rows": piece_rows}
        check_paths(data, name)
        tables = [read_raw(one, temporary / f"{i:06}", name=name, **options) for i, one in enumerate(data)]
        return tables[0] if len(tables) == 1 else joined(tables, one_piece=piece_rows is None)
    if isinstance(data, str | Path):
        path = Path(data)
        form = format_of(path)
        if form == "parquet":
            return read_parquet(path, str(path), missing_values, on_bad_row, piece_rows)
        if form == "arrow":
            return read_arrow(path, missing_values, piece_rows)
        if form == "json lines":
            return _read_json(path, temporary, missing_values, on_bad_row, piece_rows)
        return _read_text(path, temporary, separator, columns, missing_values, on_bad_row, may_lack, piece_rows)
    frame = as_frame(data, name)
    with naming(name):
        check_names(name, frame.columns)
        if not frame.height:
            raise DataError(f"{name} has no rows: expected at least one")
        return RawTable((numbered(clean(frame.lazy(), missing_values)),), name)


def in_files(data: RawData) -> bool:
    """Whether raw data lies in a file or in several, rather than in memory.

    >>> in_files("today.csv"), in_files([Path("monday.csv"), "tuesday.csv"]), in_files([{"item": "a"}]), in_files([])
    (True, True, False, False)
    """
    return isinstance(data, str | Path) or (
        isinstance(data, list | tuple) and any(isinstance(one, str | Path) for one in data)
    )


def paths_of(data: RawData) -> list[Path]:
    """The paths of what lies `in_files`."""
    return [Path(data)] if isinstance(data, str | Path) else list(map(Path, data))


def check_paths(data: Sequence[Any], name: str) -> None:
    """Refuse a list that is none of files.

    Raises:
        TypeError: as said.
    """
    if not data or not all(isinstance(one, str | Path) for one in data):
        raise WrongTypeError(f"{name} is a {type(data).__name__} of {data[:1]}, expected paths of files, or one frame")


def two_kinds(one: str, other: str) -> SchemaError:
    """That files which are to follow each other are text and not text, or lie in folders that name other columns."""
    return SchemaError(f"{one} and {other} are of two kinds of files: give files of one kind")


def joined(tables: Sequence[RawTable], *, one_piece: bool) -> RawTable:
    """Tables that follow each other as one.

    Raises:
        SchemaError: their columns are not the same.
    """
    first = tables[0]
    for table in tables:
        if table.parsed != first.parsed or table.keys != first.keys:
            raise two_kinds(table.name, first.name)
    columns = alike([(table.name, table.frame.drop(ROW)) for table in tables])
    sources: list[tuple[int, RawTable]] = []
    pieces: list[pl.LazyFrame] = []
    malformed: list[Ints] = []
    num_rows = 0
    for table, wanted in zip(tables, columns):
        before = num_rows + sum(len(rows) for rows in malformed)
        sources.append((num_rows, table))
        pieces += [piece.select(pl.col(ROW) + num_rows, *wanted) for piece in table.pieces]
        malformed.append(table.malformed + before)
        num_rows += table.count_rows()
    return RawTable(
        (pl.concat(pieces),) if one_piece else tuple(pieces),
        name_of(sources),
        skipped=sum((table.skipped for table in tables), Counter()),
        malformed=np.concatenate(malformed),
        parsed=first.parsed,
        keys=first.keys,
        sources=tuple(sources),
    )


def scan_pieces(
    files: Sequence[Path], piece_rows: int | None, frames: Sequence[pl.LazyFrame] | None = None
) -> list[pl.LazyFrame]:
    """The numbered rows of parquet files as one piece, or as pieces of `piece_rows` rows but for the last.

    `frames` are the rows of each file, where they are not simply what it holds.
    """

    def rows_of(first: int, last: int) -> pl.LazyFrame:
        if frames is not None:
            return pl.concat(frames[first : last + 1])
        # Paths and no pattern: brackets in a folder's name would be read as part of it.
        return pl.scan_parquet(list(files[first : last + 1]), glob=False, hive_partitioning=False)

    if piece_rows is None:
        return [numbered(rows_of(0, len(files) - 1))]
    num_rows = [pq.ParquetFile(file).metadata.num_rows for file in files]
    ends = np.cumsum(num_rows)
    pieces = []
    for start in range(0, int(ends[-1]), piece_rows):
        stop = min(start + piece_rows, int(ends[-1]))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        before = int(ends[first]) - num_rows[first]
        pieces.append(numbered(rows_of(first, last).slice(start - before, stop - start), start))
    return pieces


# ---------------------------------------------------------------------------------------------------------------- text


@dataclass
class TextFile:
    """A text file, opened and with its header read: blocks of whole good rows."""

    path: Path
    names: list[str]
    mark: bytes
    missing_values: Sequence[str]
    first_line: int
    scanner: RowScanner
    stream: io.BufferedReader

    def parse(self, block: bytes, *, cleaned: bool = True) -> pl.DataFrame:
        """The rows of a block, all columns text; `cleaned` as `clean` does."""
        return _parse(block, self.names, self.mark, self.missing_values if cleaned else None)

    def blocks(
        self, block_bytes: int = BLOCK_BYTES, quick: Quick[Rows] | None = None, depth: int = 0
    ) -> Iterator[bytes | Rows]:
        """The blocks, one after another, as `RowScanner.blocks`.

        Raises:
            DataError: there is no row.
        """
        yield from self.scanner.blocks(self.stream, block_bytes, quick, depth)
        if not self.scanner.num_rows:
            skipped = f" but {dict(self.scanner.skipped)}, which were skipped" if self.scanner.skipped else ""
            raise DataError(f"{self.path} has no rows{skipped}: expected at least one row of {len(self.names)} cells")

    def table(self, pieces: Sequence[pl.LazyFrame]) -> RawTable:
        """A table of the rows read so far."""
        line = self.first_line if self.scanner.one_line_per_row and not self.scanner.skipped else None
        malformed = np.array(self.scanner.bad_rows, np.int64)
        return RawTable(tuple(pieces), str(self.path), line, self.scanner.skipped, malformed, parsed=True)


@contextlib.contextmanager
def open_text(
    path: Path,
    separator: str | None,
    columns: Sequence[str] | None,
    missing_values: Sequence[str],
    on_bad_row: OnBadRow,
    may_lack: Sequence[Sequence[str]],
) -> Iterator[TextFile]:
    """A text file ready to be read in blocks; arguments and errors as in `read_raw`."""
    with unpacked(path) as stream:
        head = stream.peek(1 << 16)[: 1 << 16].removeprefix(b"\xef\xbb\xbf")
        if not head.strip():
            raise DataError(f"{path} is empty: expected a header and rows")
        if b"\n" not in head and b"\r" in head.rstrip(b"\r"):
            raise DataError(f"{path}: lines end in CR only; convert them to LF or CRLF (such as: tr '\\r' '\\n')")
        refuse_foreign(path, head, separator)
        mark = separator.encode() if separator is not None else find_separator(path, head)
        if len(mark) != 1 or mark in b'"\r\n':
            raise DataError(
                f"separator {separator!r} cannot be used, expected one byte other than a quote or newline: "
                "replace it in the file first, as docs/data.md does under 'Other formats'"
            )
        if stream.peek(3).startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        if columns is None:
            names = _header(path, stream, mark)
        else:
            names = _fitting([str(column) for column in columns], may_lack, head, mark)
        check_names(str(path), names, has_header=columns is None)
        first_line = 1 if columns is not None else 2
        scanner = RowScanner(str(path), mark, num_cells=len(names), on_bad_row=on_bad_row, first_line=first_line)
        yield TextFile(path, names, mark, missing_values, first_line, scanner, stream)


def _read_text(
    path: Path,
    temporary: Path,
    separator: str | None,
    columns: Sequence[str] | None,
    missing_values: Sequence[str],
    on_bad_row: OnBadRow,
    may_lack: Sequence[Sequence[str]],
    piece_rows: int | None,
) -> RawTable:
    temporary.mkdir(parents=True, exist_ok=True)
    with open_text(path, separator, columns, missing_values, on_bad_row, may_lack) as text:

        def write(block: bytes, number: int) -> None:
            text.parse(block).write_parquet(
                temporary / f"{number:06}.parquet", compression="uncompressed", statistics=False
            )

        with ThreadPoolExecutor(1) as writer:  # the next block is read and checked meanwhile
            writing: Future[None] | None = None
            for number, block in enumerate(text.blocks()):
                if writing is not None:
                    writing.result()
                writing = writer.submit(write, block, number)
            if writing is not None:
                writing.result()
    return text.table(scan_pieces(sorted(temporary.glob("*.parquet")), piece_rows))


def _read_json(
    path: Path, temporary: Path, missing_values: Sequence[str], on_bad_row: OnBadRow, piece_rows: int | None
) -> RawTable:
    temporary.mkdir(parents=True, exist_ok=True)
    with open_json(path, on_bad_row) as lines:
        for number, frame in enumerate(lines.frames()):
            check_names(str(path), frame.columns)
            frame.write_parquet(temporary / f"{number:06}.parquet", compression="uncompressed", statistics=False)
    files = sorted(temporary.glob("*.parquet"))
    frames = [lines.completed(pl.scan_parquet([file], glob=False, hive_partitioning=False)) for file in files]
    frames = [frame.select(columns) for frame, columns in zip(frames, alike([(str(path), frame) for frame in frames]))]
    pieces = scan_pieces(files, piece_rows, frames)
    return json_table(lines, [clean(piece, missing_values) for piece in pieces])


@contextlib.contextmanager
def open_json(path: Path, on_bad_row: OnBadRow) -> Iterator[JsonLines]:
    """A file of JSON lines ready to be read in blocks; errors as in `read_raw`."""
    with unpacked(path) as stream:
        if not stream.peek(1 << 12).strip():
            raise DataError(f"{path} is empty: expected a JSON object a line")
        yield JsonLines(path, stream, on_bad_row)


def json_table(lines: JsonLines, pieces: Sequence[pl.LazyFrame]) -> RawTable:
    """A table of the rows read so far."""
    line = None if lines.skipped else 1
    return RawTable(tuple(pieces), str(lines.path), line, lines.skipped, np.array(lines.bad_rows, np.int64))


def _fitting(columns: list[str], may_lack: Sequence[Sequence[str]], head: bytes, separator: bytes) -> list[str]:
    """The names of the columns of a file without header, as many as its first row has cells if that can be."""
    lines = head.decode(errors="replace").replace("\0", "").splitlines()[:1]
    num_cells = len(next(csv.reader(lines, delimiter=separator.decode()), []))
    choices = [columns, *([name for name in columns if name not in lacking] for lacking in may_lack)]
    return next((names for names in choices if len(names) == num_cells), columns)


def _header(path: Path, stream: BinaryIO, separator: bytes) -> list[str]:
    line = stream.readline(1 << 20)
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise DataError(f"{path}: line 1, the header, is not UTF-8: convert the file to UTF-8") from None
    if "\0" in text:
        raise DataError(f"{path}: line 1, the header, has a NUL byte: is this a text file?")
    if text.count('"') % 2:
        raise DataError(f"{path}: line 1, the header, opens a quote that it does not close: mend the header")
    try:
        names = next(csv.reader([text], delimiter=separator.decode()), [])
    except csv.Error as error:  # such as a carriage return in the middle
        raise DataError(f"{path}: line 1, the header, cannot be read ({error}): mend the header") from None
    # pandas leaves the name of its index column empty.
    return [name.strip() or f"column_{position}" for position, name in enumerate(names, start=1)]


def _parse(block: bytes, names: list[str], separator: bytes, missing_values: Sequence[str] | None) -> pl.DataFrame:
    frame = pl.read_csv(
        block,
        schema=dict.fromkeys(names, pl.String),
        has_header=False,
        separator=separator.decode(),
        quote_char='"' if b'"' in block else None,  # faster without
    )
    if missing_values is None:
        return frame
    blanks = any(blank in block for blank in (b'"', *(mark for mark in (b" ", b"\t", b"\r") if mark != separator)))
    return frame.select(clean_text(pl.col(name), missing_values, strip=blanks).alias(name) for name in names)


# -------------------------------------------------------------------------------------------------- parquet and frames


def read_parquet(
    path: Path,
    name: str,
    missing_values: Sequence[str],
    on_bad_row: OnBadRow,
    piece_rows: int | None,
    wanted: Collection[str] | None = None,
) -> RawTable:
    """A parquet file, or the files of a folder (`ctrlib.data.parts.parts_of`); arguments as in `read_raw`."""
    parts = parts_of(path)
    skipped: Counter[str] = Counter()
    num_rows = 0
    for part in parts:
        with naming(str(part.path)):
            metadata = pq.ParquetFile(part.path).metadata
        names = metadata.schema.to_arrow_schema().names
        check_names(str(part.path), [*names, *part.keys])
        if variants := re.findall(r" group field_id=\S+ (.*) \(Variant", str(metadata.schema)):
            raise SchemaError(
                f"{part.path}: columns {variants} have type VARIANT, which is not read: write the file without them, "
                "or with text in their place"
            )
        num_rows += metadata.num_rows
        for number in range(metadata.num_row_groups):
            if metadata.row_group(number).num_rows == 0:
                if on_bad_row == "raise":
                    raise DataError(
                        f"{part.path}: row group {number} has no rows, so its writer may have failed: write the file "
                        'again, or leave such row groups out with on_bad_row="skip" (--on-bad-row skip)'
                    )
                skipped["row group without rows"] += 1
    if not num_rows:
        raise DataError(f"{name} has no rows: expected at least one")
    with naming(name):
        pieces = scan_pieces([part.path for part in parts], piece_rows, frames_of(parts, wanted))
        cleaned = tuple(clean(piece, missing_values) for piece in pieces)
    return RawTable(cleaned, name, None, skipped, keys=frozenset(parts[0].keys))


def read_arrow(path: Path, missing_values: Sequence[str], piece_rows: int | None) -> RawTable:
    """An Arrow file; arguments as in `read_raw`."""
    with naming(str(path)):
        frame = pl.scan_ipc([path], glob=False, hive_partitioning=False)
        check_names(str(path), frame.collect_schema().names())
        num_rows = int(frame.select(pl.len()).collect().item())
        if not num_rows:
            raise DataError(f"{path} has no rows: expected at least one")
        starts = range(0, num_rows, piece_rows or num_rows)
        pieces = [numbered(frame.slice(start, starts.step), start) for start in starts]
        return RawTable(tuple(clean(piece, missing_values) for piece in pieces), str(path))
