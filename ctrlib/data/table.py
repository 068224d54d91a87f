"""A raw table: lazy, with what is needed to speak about its rows, and its columns cleaned.

A table comes in pieces, which follow each other: one on a single machine, many where machines share the work
(`ctrlib.data.spark`). Whatever is found out about a table is found out about every piece and then put together, such
that it cannot depend on where the pieces end. In every text column surrounding blanks are cut and the missing tokens
become null.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from ctrlib.data.quick import BLANKS
from ctrlib.data.scan import DataError
from ctrlib.errors import WrongTypeError
from ctrlib.schema import SchemaError

ROW = "__row__"  # a row's number in the raw data, counted from 0: for messages and for the random split
Ints = NDArray[np.int64]
Plan = Callable[[pl.LazyFrame], pl.LazyFrame]
Run = Callable[[Sequence[pl.LazyFrame], str], list[pl.DataFrame]]


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

    def count_rows(self) -> int:
        """How many rows there are, which are read for that.

        >>> RawTable((pl.LazyFrame({"x": [1, 2]}), pl.LazyFrame({"x": [3]})), "demo").count_rows()
        3
        """
        return int(self.gather(lambda piece: piece.select(pl.len()))["len"].sum())

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


def name_of(sources: Sequence[tuple[int, RawTable]]) -> str:
    """What to call `RawTable.sources` together."""
    return f"{sources[0][1].name} and {len(sources) - 1} more" if len(sources) > 1 else sources[0][1].name


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


def numbered(frame: pl.LazyFrame, first: int = 0) -> pl.LazyFrame:
    """The rows with their numbers, counted from `first`, in the column `__row__`."""
    # Polars' own row numbers end at 2^32.
    return frame.with_row_index(ROW).with_columns(pl.col(ROW).cast(pl.Int64) + first)


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


def check_height(table: RawTable, num_rows: int) -> None:
    """Refuse a table of which a reader gave other than its rows: `collect_batches` of polars ends without a word where
    a file panics it.

    Raises:
        DataError: as said.
    """
    expected = table.count_rows()
    if num_rows != expected:
        raise DataError(
            f"{table.name} cannot be read, it may be truncated or damaged ({num_rows:,} of {expected:,} rows can be "
            "read): write it again"
        )


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
            return of_arrow(rows)
        if type(rows).__module__.partition(".")[0] == "pandas" and hasattr(rows, "columns"):
            return pl.from_pandas(_copied_in_pandas(rows))
    raise WrongTypeError(
        f"{name} is a {type(rows).__name__}, expected a dictionary of cells, a list of such rows, a polars or pandas "
        "frame, an Arrow table, or the path of a file"
    )


def of_arrow(rows: pa.Table | pa.RecordBatch) -> pl.DataFrame:
    """An Arrow table as a polars frame.

    >>> table = pa.table({"pair": pa.array([[1, 2], None, [3, None]], pa.list_(pa.int64(), 2))})
    >>> of_arrow(table.slice(1))["pair"].to_list()
    [None, [3, None]]
    """
    for position, (name, kind) in enumerate(zip(rows.schema.names, rows.schema.types)):
        if _must_be_copied(kind):
            rows = rows.set_column(position, name, _copied(rows.column(position)))
    return pl.DataFrame(pl.from_arrow(rows))


def _must_be_copied(kind: pa.DataType) -> bool:
    """Whether polars may refuse a valid array: of lists of fixed size with nulls, when it is a part of a longer one."""
    # findings/polars-refuses-part-of-fixed-size-lists.sh. The storage of an extension type may be such lists, too.
    return any(one in str(kind) for one in ("fixed_size_list", "extension"))


def _copied(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The same values in buffers that hold nothing else; lists of no values, which have no length there, as lists."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    if pa.types.is_fixed_size_list(column.type) and not column.type.list_size:
        kind = pa.list_(column.type.value_type)
        chunks = [pa.array([None if cell is None else [] for cell in chunk.to_pylist()], kind) for chunk in chunks]
    else:
        kind, chunks = column.type, [pa.concat_arrays([chunk]) for chunk in chunks]
    return pa.chunked_array(chunks, kind) if isinstance(column, pa.ChunkedArray) else chunks[0]


def _copied_in_pandas(rows: Any) -> Any:
    """A pandas frame whose columns, where they are Arrow's, are copied likewise."""
    for position, dtype in enumerate(rows.dtypes):
        if _must_be_copied(getattr(dtype, "pyarrow_dtype", pa.null())):
            column = pa.Table.from_pandas(rows.iloc[:, [position]], preserve_index=False).column(0)
            rows = rows.copy(deep=False)
            rows.isetitem(position, type(rows.iloc[:, position].array)(_copied(column)))
    return rows


def clean(frame: pl.LazyFrame, missing_values: Sequence[str]) -> pl.LazyFrame:
    """Text columns with the blanks around them cut and missing tokens as null; enumerations become text.

    Lists of the fixed size 0 become lists.
    """
    cleaned = []
    for name, dtype in frame.collect_schema().items():
        if dtype == pl.String or dtype in (pl.Categorical, pl.Enum):
            cleaned.append(clean_text(pl.col(name).cast(pl.String), missing_values).alias(name))
        elif isinstance(dtype, pl.Array) and not dtype.size:
            cleaned.append(pl.col(name).arr.to_list())  # Arrow and polars lose count of such lists
    return frame.with_columns(cleaned)


def clean_text(text: pl.Expr, missing_values: Sequence[str], *, strip: bool = True) -> pl.Expr:
    """Cells with the blanks around them cut (unless there are none), and null for missing tokens."""
    text = text.str.strip_chars(BLANKS) if strip else text
    return pl.when(~text.is_in(missing_tokens(missing_values))).then(text)


def missing_tokens(missing_values: Sequence[str]) -> list[str]:
    """What cells without value hold; an empty cell is missing, whether it stands in quotes or not."""
    return list(dict.fromkeys(["", *missing_values]))
