"""A raw table on disk in which every distinct cell of a block stands once, and rows are the numbers of their cells.

Text is slow, so it is touched once: a block of rows is parsed, each of its columns is split into distinct cells and the
place of each row's cell among them, and both go into an Arrow file. What a cell means (`ctrlib.data.cells`) is then
asked once for each distinct cell of a block, and rows are counted and encoded by looking up integers. Everything else
that a `RawTable` can do is done by putting the cells back in their places, of the columns that are asked for.

Memory holds a few blocks and, while a vocabulary is counted or looked up, the distinct cells of its columns.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from polars.io.plugins import register_io_source

from ctrlib.data.formats import format_of
from ctrlib.data.raw import RawData, TextFile, open_text, read_raw
from ctrlib.data.scan import OnBadRow
from ctrlib.data.table import BLANKS, ROW, Plan, RawTable, Total, check_height, missing_tokens, naming

NUM_THREADS = min(os.cpu_count() or 1, 8)  # each holds a block
BLOCK_ROWS = 1 << 17
BLOCK_BYTES, _FEWEST_BYTES = 32 << 20, 4 << 20
_WIDE = b"polars type"  # of integers that Arrow does not have, which are kept as text
_ARROW_BLOCK = 1 << 20  # of a block, so much is parsed by one thread
Codes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Block:
    """Some rows of a coded table: `num_rows` of them from `first_row` on, a file for each column in a folder."""

    folder: Path
    names: tuple[str, ...] = field(compare=False)
    first_row: int
    num_rows: int

    def path(self, name: str, what: str = "cells") -> Path:
        """Where the cells of a column are, or what else there is of it."""
        return self.folder / f"{self.names.index(name)}.{what}"

    def cells(self, name: str) -> Cells:
        """A column, as it lies in its file."""
        return Cells(read_column(self.path(name)))


def write_column(column: pa.Array, path: Path, metadata: dict[bytes, bytes] | None = None) -> None:
    """An array as a file, for `read_column`."""
    schema = pa.schema([pa.field("", column.type)], metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))


def read_column(path: Path) -> pa.RecordBatch:
    """A batch of the one column, mapped into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


class Cells:
    """A column of a block: its distinct `values` (all, where they hardly repeat) and the place of each row's."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._column = batch.column(0)
        self.is_coded = pa.types.is_dictionary(self._column.type)
        self._wide = (batch.schema.metadata or {}).get(_WIDE)

    @property
    def values(self) -> pl.Series:
        """The cells, each once if they are coded."""
        column = self._column
        if self.is_coded:
            # Copied: who keeps them does not keep the codes of all rows in memory with them.
            column = pa.concat_arrays([column.dictionary, column.dictionary[:0]])
        values = pl.from_arrow(column)
        assert isinstance(values, pl.Series)
        return values if self._wide is None else values.cast(getattr(pl, self._wide.decode()))

    @property
    def codes(self) -> Codes | None:
        """The place among `values` of every row's cell, or None where it is the row's own."""
        return self._column.indices.to_numpy() if self.is_coded else None

    def placed(self, of_values: pa.Array, kept: npt.NDArray[np.bool_] | None) -> pa.Array:
        """What the cells of `kept` rows (None for all) have become, of what each of `values` has."""
        if not self.is_coded:
            return of_values if kept is None else of_values.filter(pa.array(kept))
        codes = self._column.indices
        return pc.take(of_values, codes if kept is None else codes.filter(pa.array(kept)))

    def rows(self, end: int) -> pl.Series:
        """The cell of every row before `end`."""
        return self.values[:end] if self.codes is None else self.values.gather(pl.Series(self.codes[:end]))


@dataclass
class CodedTable(RawTable):
    """A `RawTable` in blocks of distinct cells; its pieces are the blocks, decoded as they are asked for.

    `whole` are the blocks with all their rows, of which `where` says which the table has.
    """

    whole: Mapping[Block, pl.LazyFrame] = field(default_factory=dict)
    where: tuple[pl.Expr, ...] = ()
    _kept: dict[Block, npt.NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those of which the table has rows, in order."""
        return tuple(self.whole)

    def map(self, plan: Plan) -> RawTable:
        """The table with every piece changed by `plan`, lazily, and no longer coded."""
        names = [one.name for one in dataclasses.fields(RawTable)]
        return RawTable(**{name: getattr(self, name) for name in names}).map(plan)

    def only(self, rows: pl.Expr) -> CodedTable:
        """The rows for which a condition is true."""
        pieces = tuple(piece.filter(rows) for piece in self.pieces)
        return dataclasses.replace(self, pieces=pieces, where=(*self.where, rows), _kept={})

    def kept(self, block: Block) -> npt.NDArray[np.bool_] | None:
        """Which rows of a block the table has; None for all."""
        if not self.where:
            return None
        if block not in self._kept:
            rows = self.whole[block].select(pl.all_horizontal(self.where).alias("kept"))
            self._kept[block] = np.packbits(rows.collect()["kept"].fill_null(False).to_numpy())
        return np.unpackbits(self._kept[block], count=block.num_rows).astype(bool)

    def counts(self, block: Block, cells: Cells) -> npt.NDArray[np.int64]:
        """How many rows of the table hold each of the `values` of a column of a block."""
        kept, codes, num_values = self.kept(block), cells.codes, len(cells.values)
        if codes is None:
            return np.ones(num_values, np.int64) if kept is None else kept.astype(np.int64)
        return np.bincount(codes if kept is None else codes[kept], minlength=num_values)

    def totals(self, wanted: Mapping[str, Total]) -> pl.DataFrame:
        """As `RawTable.totals`, from distinct cells and how often they come up."""
        columns: dict[str, list[pl.Expr]] = {}
        for name, one in wanted.items():
            many = pl.when(one.value.is_not_null()).then(pl.col(_COUNT)).otherwise(0)
            columns.setdefault(one.column, []).append(one.total(one.value, many).alias(name))

        found: list[pl.DataFrame] = []
        held: dict[str, list[pl.DataFrame]] = {column: [] for column in columns}
        for position, block in enumerate(self.blocks, start=1):
            for column in columns:
                cells = block.cells(column)
                rows = pl.DataFrame([cells.values.alias(column), pl.Series(_COUNT, self.counts(block, cells))])
                held[column].append(rows.filter(pl.col(_COUNT) > 0))
            if position == len(self.whole) or sum(len(one) for some in held.values() for one in some) >= _AT_ONCE:
                plans = [pl.concat(held[column]).lazy().select(totals) for column, totals in columns.items()]
                with naming(self.name):
                    found.append(pl.concat(pl.collect_all(plans), how="horizontal"))
                held = {column: [] for column in columns}
        return pl.concat(found).select(list(wanted))


_COUNT = "__count__"
_AT_ONCE = 1 << 19  # distinct cells of several blocks that are added up together


def _lazily(block: Block, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """The rows of a block with their numbers; only columns that are asked for are put together."""

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, num_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        names = [ROW, *block.names] if columns is None else columns
        end = block.num_rows if num_rows is None else min(num_rows, block.num_rows)
        rows = pl.int_range(block.first_row, block.first_row + end, dtype=pl.Int64, eager=True)
        frame = pl.DataFrame([(rows if name == ROW else block.cells(name).rows(end)).alias(name) for name in names])
        yield frame if predicate is None else frame.filter(predicate)

    return register_io_source(read, schema={ROW: pl.Int64(), **schema}, is_pure=True)


# ------------------------------------------------------------------------------------------------------------- writing


def read_coded(
    data: RawData,
    temporary: Path,
    *,
    name: str = "data",
    separator: str | None = None,
    columns: Sequence[str] | None = None,
    missing_values: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "raise",
) -> CodedTable:
    """As `ctrlib.data.raw.read_raw`: every block is read, checked and coded once."""
    temporary.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        coder = _Coder(temporary, missing_values, threads)
        if isinstance(data, str | Path) and format_of(Path(data)) == "text":
            with open_text(Path(data), separator, columns, missing_values, on_bad_row, ()) as text:
                blocks = _numbered(coder.text(text))
                return _table(text.table(()), blocks)
        table = read_raw(
            data,
            temporary / "raw",
            name=name,
            separator=separator,
            columns=columns,
            missing_values=missing_values,
            on_bad_row=on_bad_row,
        )
        with naming(table.name):
            blocks = _numbered(coder.frame(table.frame.drop(ROW)))
            check_height(table, sum(block.num_rows for block in blocks))
    shutil.rmtree(temporary / "raw", ignore_errors=True)
    return _table(table, blocks)


def _numbered(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks with the numbers of their first rows."""
    found, first = [], 0
    for block in blocks:
        found.append(dataclasses.replace(block, first_row=first))
        first += block.num_rows
    return tuple(found)


def _table(table: RawTable, blocks: tuple[Block, ...]) -> CodedTable:
    names = [one.name for one in dataclasses.fields(RawTable)]
    schema = {name: blocks[0].cells(name).values.dtype for name in blocks[0].names}
    whole = {block: _lazily(block, schema) for block in blocks}
    return CodedTable(
        **{name: getattr(table, name) for name in names if name != "pieces"},
        pieces=tuple(whole.values()),
        whole=whole,
    )


class _Coder:
    """Codes rows and writes them, several blocks at once, each by one thread; `first_row` is 0 in all of them."""

    def __init__(self, folder: Path, missing_values: Sequence[str], threads: ThreadPoolExecutor) -> None:
        self._folder, self._threads = folder, threads
        self._tokens = pa.array(missing_tokens(missing_values))
        self._numbers = itertools.count()

    def text(self, text: TextFile) -> Iterator[Block]:
        """The rows of a text file."""

        def start(lines: bytes) -> Callable[[], tuple[int, Block] | None]:
            return self._threads.submit(self._quick, text, lines).result

        # So that a small file keeps all threads busy, too.
        size = text.path.stat().st_size // (2 * NUM_THREADS)
        for block in text.blocks(min(max(size, _FEWEST_BYTES), BLOCK_BYTES), start, NUM_THREADS):
            if isinstance(block, bytes):
                rows = text.parse(block, cleaned=False).to_arrow(compat_level=pl.CompatLevel.oldest())
                yield self._written(rows, blanks=True)
            else:
                yield block

    def frame(self, frame: pl.LazyFrame) -> Iterator[Block]:
        """The rows of a frame whose text is clean."""
        dtypes = frame.collect_schema()
        wide = {name: str(dtype) for name, dtype in dtypes.items() if dtype in (pl.Int128, pl.UInt128)}
        texts = [name for name, dtype in dtypes.items() if dtype in (pl.Categorical, pl.Enum)]
        frame = frame.with_columns(pl.col([*texts, *wide]).cast(pl.String))  # Arrow has no integers so wide
        pending: deque[Future[Block]] = deque()
        for number, batch in enumerate(frame.collect_batches(chunk_size=BLOCK_ROWS, maintain_order=True)):
            if batch.height or not number:
                rows = batch.to_arrow(compat_level=pl.CompatLevel.oldest())
                pending.append(self._threads.submit(self._written, rows, blanks=False, wide=wide))
            if len(pending) > NUM_THREADS:
                yield pending.popleft().result()
        yield from (one.result() for one in pending)

    def _quick(self, text: TextFile, lines: bytes) -> tuple[int, Block] | None:
        """The number of rows, and the rows, if all are well-formed beyond doubt."""
        if any(mark in lines for mark in (b"\r", b"\0")) or not text.mark.isascii():
            return None
        options = (
            pyarrow.csv.ReadOptions(column_names=text.names, block_size=_ARROW_BLOCK, use_threads=False),
            pyarrow.csv.ParseOptions(delimiter=text.mark.decode(), quote_char=False, ignore_empty_lines=True),
            pyarrow.csv.ConvertOptions(
                check_utf8=not lines.isascii(),
                column_types=dict.fromkeys(text.names, pa.string()),
                strings_can_be_null=False,
            ),
        )
        try:
            rows = pyarrow.csv.read_csv(pa.BufferReader(lines), *options)
        except pa.ArrowInvalid:
            return None
        if rows.num_rows != lines.count(b"\n"):  # there are blank lines
            return None
        blanks = any(blank in lines for blank in (b" ", b"\t") if blank != text.mark)
        return rows.num_rows, self._written(rows, blanks=blanks)

    def _written(self, rows: pa.Table, *, blanks: bool, wide: Mapping[str, str] | None = None) -> Block:
        """The rows as files; `blanks`: there may be some around cells; `wide`: name -> type that polars knows only."""
        folder = self._folder / f"{next(self._numbers):06}"
        folder.mkdir()
        block = Block(folder, tuple(rows.column_names), 0, rows.num_rows)
        for name, column in zip(block.names, rows.columns):
            kind = (wide or {}).get(name)
            metadata = None if kind is None else {_WIDE: kind.encode()}
            write_column(self._coded(column, blanks), block.path(name), metadata)
        return block

    def _coded(self, column: pa.ChunkedArray, blanks: bool) -> pa.Array:
        """As a dictionary array without nulls but in the dictionary; as it is, where cells hardly repeat."""
        kind = column.type
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        repeats = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_date, pa.types.is_timestamp)
        if not (is_text or any(of_kind(kind) for of_kind in repeats)):
            return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
        coded = column.dictionary_encode(null_encoding="encode").combine_chunks()
        if is_text:
            values = coded.dictionary
            if blanks:
                values = pc.utf8_trim(values, BLANKS)
            missing = pc.is_in(values, self._tokens.cast(kind))
            if pc.any(missing).as_py():
                values = pc.if_else(missing, None, values)
            coded = pa.DictionaryArray.from_arrays(coded.indices, values)
        return coded
