"""Open raw data of any supported kind as one lazy table, checked.

A table comes in pieces, which follow each other: one on a single machine, many where machines share the work
(`ctrlib.data.spark`). Whatever is found out about a table is found out about every piece and then put together, such
that it cannot depend on where the pieces end.

Text (CSV, TSV, packed or not) is checked row by row (`ctrlib.data.scan`) and written once, block by block, as a
temporary parquet table whose columns are all text: what follows reads single columns from it, as often as it likes.
JSON lines are written likewise, with the types that their cells have. Parquet and Arrow files and frames are used as
they are; where files follow each other, their types are made alike (`ctrlib.data.parts`). In every text column
surrounding blanks are cut and the missing tokens become null.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ctrlib.data.formats import format_of, refuse_foreign, unpacked
from ctrlib.data.jsonlines import JsonLines
from ctrlib.data.parts import alike, frames_of, parts_of
from ctrlib.data.scan import BLOCK_BYTES, DataError, OnBadRow, Quick, RowScanner, find_separator
from ctrlib.errors import WrongTypeError
from ctrlib.schema import SchemaError

ROW = "__row__"  # a row's number in the raw data, counted from 0: for messages and for the random split
RawData: TypeAlias = Any  # str | Path | a list of those | polars frame, lazy or not | pandas frame | Arrow table
Ints = NDArray[np.int64]
Plan = Callable[[pl.LazyFrame], pl.LazyFrame]
Run = Callable[[Sequence[pl.LazyFrame], str], list[pl.DataFrame]]
Rows = TypeVar("Rows")
BLANKS = " \t\r\n"  # cut around a cell


def run_here(plans: Sequence[pl.LazyFrame], name: str) -> list[pl.DataFrame]:
    """What the plans make, one after another, on this machine; `name` is what damaged data is called in messages."""
    with naming(name):
        return [plan.collect(engine="streaming") for plan in plans]


class Total(NamedTuple):
    """Something to add up over a column: `total` of `value`, which is of a cell, and of how many rows have it.

    Rows without value count nothing.
    """

    column: str
    value: pl.Expr
    total: Callable[[pl.Expr, pl.Expr], pl.Expr]


@dataclass
class RawTable:
    """A lazy table with what is needed to speak about its rows.

    `pieces` follow each other and have a first column `__row__`. `name` is the file's, for messages. `first_line` is
    the line of the file that holds row 1, or None where rows and lines do not go together. `skipped` counts the rows
    left out, by reason; `malformed` holds the numbers (from 0) of those that are in no piece, `unfit` the `__row__` of
    those that failed a check later. `parsed`: all columns are text, from a text file; `keys` are those that are, from
    names of folders. `run` executes plans. `sources`: of several files that follow each other, the `__row__` with which
    each begins, and its own table.
    """

    pieces: tuple[pl.LazyFrame, ...]
    name: str
    first_line: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    malformed: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    unfit: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    parsed: bool = False
    run: Run = run_here
    keys: frozenset[str] = frozenset()
    sources: tuple[tuple[int, RawTable], ...] = ()

    def map(self, plan: Plan) -> RawTable:
        """The table with every piece changed by `plan`, lazily."""
        return dataclasses.replace(self, pieces=tuple(plan(piece) for piece in self.pieces))

    def gather(self, plan: Plan) -> pl.DataFrame:
        """What `plan` makes of each piece, one after another: a row for each piece where it makes totals.

        >>> table = RawTable((pl.LazyFrame({"x": [1, 2]}), pl.LazyFrame({"x": [3]})), "demo")
        >>> table.gather(lambda piece: piece.select(pl.col("x").sum()))["x"].to_list()
        [3, 3]
        """
        return pl.concat(self.run([plan(piece) for piece in self.pieces], self.name))

    def only(self, rows: pl.Expr) -> RawTable:
        """The rows for which a condition is true."""
        return self.map(lambda piece: piece.filter(rows))

    def totals(self, wanted: Mapping[str, Total]) -> pl.DataFrame:
        """Totals of columns, one row for each piece.

        >>> table = RawTable((pl.LazyFrame({"x": [1, 5]}), pl.LazyFrame({"x": [3]})), "demo")
        >>> table.totals({"sum": Total("x", pl.col("x") + 1, lambda x, rows: (x * rows).sum())})["sum"].to_list()
        [8, 4]
        """

        def plan(piece: pl.LazyFrame) -> pl.LazyFrame:
            return piece.select(
                one.total(one.value, one.value.is_not_null().cast(pl.Int64)).alias(name) for name, one in wanted.items()
            )

        return self.gather(plan)

    def first(self, where: pl.Expr, column: str) -> tuple[int, Any]:
        """The `__row__`, and what `column` holds, of the first row for which `where` is true; there must be one."""
        row, value = self.gather(lambda piece: piece.filter(where).select(ROW, column).head(1)).row(0)
        return row, value

    @property
    def frame(self) -> pl.LazyFrame:
        """All rows, for this machine."""
        return pl.concat(self.pieces) if len(self.pieces) > 1 else self.pieces[0]

    @property
    def dtypes(self) -> dict[str, pl.DataType]:
        """Column name -> type, without `__row__`."""
        with naming(self.name):
            return {name: dtype for name, dtype in self.pieces[0].collect_schema().items() if name != ROW}

    @property
    def types(self) -> dict[str, str]:
        """Column name -> kind of its values (see `family`), "parsed" for those of a text file."""
        return {
            name: "parsed" if self.parsed or name in self.keys else family(dtype) for name, dtype in self.dtypes.items()
        }

    @property
    def skipped_rows(self) -> list[int]:
        """The numbers in the raw data (from 1) of the rows left out."""
        numbers: list[int] = np.sort(np.concatenate([self.malformed + 1, self._numbers(self.unfit)])).tolist()
        return numbers

    def _numbers(self, rows: Ints) -> Ints:
        """The numbers in the raw data (from 1) of the rows with these `__row__`."""
        before = self.malformed - np.arange(len(self.malformed))  # how many good rows there are before each bad one
        return rows + 1 + np.searchsorted(before, rows, side="right")

    def place(self, row: int) -> str:
        """How to speak of the row whose `__row__` is `row`."""
        if self.sources:
            first, table = next((first, table) for first, table in reversed(self.sources) if first <= row)
            return table.place(row - first)
        line = "" if self.first_line is None else f" (line {row + self.first_line} of the file)"
        return f"{self.name}: row {self._numbers(np.array([row]))[0]}{line}"


def family(dtype: pl.DataType) -> str:
    """The kind of values that ids of a type are: within one kind the same id has the same text.

    >>> family(pl.Int8()), family(pl.Float64()), family(pl.List(pl.String())), family(pl.Boolean())
    ('integer', 'integer', 'text', 'boolean')
    """
    if isinstance(dtype, pl.List | pl.Array):
        assert isinstance(dtype.inner, pl.DataType)
        return family(dtype.inner)
    if dtype.is_numeric():  # ids that come as floats are integral, which `ctrlib.data.cells` checks
        return "integer"
    if dtype == pl.Boolean:
        return "boolean"
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        return "zoned time"
    if dtype.is_temporal():
        return "time"
    if dtype == pl.Null:
        return "null"
    return "text" if dtype in (pl.String, pl.Categorical, pl.Enum) else str(dtype)


def is_cell(dtype: pl.DataType) -> bool:
    """Whether values of a type are single ids, numbers or times.

    >>> [is_cell(dtype) for dtype in (pl.String(), pl.Date(), pl.Duration(), pl.Binary(), pl.List(pl.Int64))]
    [True, True, False, False, False]
    """
    odd = dtype in (pl.Binary, pl.Object, pl.Duration) or isinstance(dtype, pl.BaseExtension)
    return not odd and not dtype.is_nested()


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
            return _read_arrow(path, missing_values, piece_rows)
        if form == "json lines":
            return _read_json(path, temporary, missing_values, on_bad_row, piece_rows)
        return _read_text(path, temporary, separator, columns, missing_values, on_bad_row, may_lack, piece_rows)
    frame = as_frame(data, name)
    with naming(name):
        check_names(name, frame.columns)
        return RawTable((numbered(clean(frame.lazy(), missing_values)),), name)


def check_paths(data: Sequence[Any], name: str) -> None:
    """Refuse a list that is none of files.

    Raises:
        TypeError: as said.
    """
    if not data or not all(isinstance(one, str | Path) for one in data):
        raise WrongTypeError(f"{name} is a {type(data).__name__} of {data[:1]}, expected paths of files, or one frame")


def joined(tables: Sequence[RawTable], *, one_piece: bool) -> RawTable:
    """Tables that follow each other as one.

    Raises:
        SchemaError: their columns are not the same.
    """
    first, name = tables[0], f"{tables[0].name} and {len(tables) - 1} more"
    for table in tables:
        if table.parsed != first.parsed or table.keys != first.keys:
            raise SchemaError(f"{table.name} and {first.name} are of two kinds of files: give files of one kind")
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
        num_rows += int(table.gather(lambda piece: piece.select(pl.len()))["len"].sum())
    return RawTable(
        (pl.concat(pieces),) if one_piece else tuple(pieces),
        name,
        skipped=sum((table.skipped for table in tables), Counter()),
        malformed=np.concatenate(malformed),
        parsed=first.parsed,
        keys=first.keys,
        sources=tuple(sources),
    )


def numbered(frame: pl.LazyFrame, first: int = 0) -> pl.LazyFrame:
    """The rows with their numbers, counted from `first`, in the column `__row__`."""
    # Polars' own row numbers end at 2^32.
    return frame.with_row_index(ROW).with_columns(pl.col(ROW).cast(pl.Int64) + first)


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


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what polars or pyarrow say about damaged data into a `DataError` that names the file."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # it is the disk
        raise DataError(f"{name} cannot be read, it may be truncated or damaged ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


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


def check_names(source: str, names: list[str], *, has_header: bool = False) -> None:
    """Refuse names of columns that are given twice or mean something else."""
    repeated = sorted(name for name, number in Counter(names).items() if number > 1)
    if repeated:
        hint = " (or, if the file has no header, pass columns=[...] with their names)" if has_header else ""
        raise SchemaError(f"{source}: columns {repeated} appear more than once: give each its own name{hint}")
    # Polars reads "*" and "^...$" as patterns; Arrow and it make up names where there is none.
    reserved = [name for name in names if name in ("", "*") or re.match(r"(__.*__|\^.*\$)\Z", name)]
    if reserved:
        raise SchemaError(f"{source}: columns {reserved} have names that are kept for other uses: rename them")


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
    return frame.select(_clean_text(pl.col(name), missing_values, strip=blanks).alias(name) for name in names)


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


def _read_arrow(path: Path, missing_values: Sequence[str], piece_rows: int | None) -> RawTable:
    with naming(str(path)):
        frame = pl.scan_ipc([path], glob=False, hive_partitioning=False)
        check_names(str(path), frame.collect_schema().names())
        num_rows = int(frame.select(pl.len()).collect().item())
        if not num_rows:
            raise DataError(f"{path} has no rows: expected at least one")
        starts = range(0, num_rows, piece_rows or num_rows)
        pieces = [numbered(frame.slice(start, starts.step), start) for start in starts]
        return RawTable(tuple(clean(piece, missing_values) for piece in pieces), str(path))


def as_frame(rows: Any, name: str) -> pl.DataFrame:
    """A table of any usual kind as a polars frame.

    Raises:
        TypeError: it is of none.
        DataError: polars cannot take it over.
    """
    with naming(name):
        if isinstance(rows, pl.DataFrame):
            return rows
        if isinstance(rows, pl.LazyFrame):
            return rows.collect()
        if isinstance(rows, pa.Table | pa.RecordBatch):
            return pl.DataFrame(pl.from_arrow(rows))
        if type(rows).__module__.partition(".")[0] == "pandas" and hasattr(rows, "columns"):
            return pl.from_pandas(rows)
    raise WrongTypeError(
        f"{name} is a {type(rows).__name__}, expected a dictionary of cells, a list of such rows, a polars or pandas "
        "frame, an Arrow table, or the path of a file"
    )


def clean(frame: pl.LazyFrame, missing_values: Sequence[str]) -> pl.LazyFrame:
    """Text columns with the blanks around them cut and missing tokens as null; enumerations become text."""
    cleaned = []
    for name, dtype in frame.collect_schema().items():
        if dtype == pl.String or dtype in (pl.Categorical, pl.Enum):
            cleaned.append(_clean_text(pl.col(name).cast(pl.String), missing_values).alias(name))
    return frame.with_columns(cleaned)


def _clean_text(text: pl.Expr, missing_values: Sequence[str], *, strip: bool = True) -> pl.Expr:
    text = text.str.strip_chars(BLANKS) if strip else text
    return pl.when(~text.is_in(missing_tokens(missing_values))).then(text)


def missing_tokens(missing_values: Sequence[str]) -> list[str]:
    """What cells without value hold; an empty cell is missing, whether it stands in quotes or not."""
    return list(dict.fromkeys(["", *missing_values]))
