"""A raw table on disk in which every distinct cell of a block stands once, and rows are the numbers of their cells.

Text is slow, so it is touched once: a block of rows is parsed, each of its columns is split into distinct cells and the
place of each row's cell among them, and both go into an Arrow file. What a cell means (`ctrlib.data.cells`) is then
asked once for each distinct cell of a block, and rows are counted and encoded by looking up integers. Everything else
that a `RawTable` can do is done by putting the cells back in their places, of the columns that are asked for.

Memory holds a few blocks and, while a vocabulary is counted or looked up, the distinct cells of its columns.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ctrlib.data.raw import (
    BLANKS,
    ROW,
    Plan,
    RawData,
    RawTable,
    TextFile,
    Total,
    missing_tokens,
    naming,
    open_text,
    read_raw,
)
from ctrlib.data.scan import OnBadRow
from ctrlib.data.stream import ahead

BLOCK_ROWS = 1 << 17
BLOCK_BYTES = 32 << 20
_WIDE = b"polars type"  # of integers that Arrow does not have, which are kept as text
_ARROW_BLOCK = 1 << 20  # of a block, so much is parsed by one thread
Codes = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Block:
    """Some rows of a coded table: `num_rows` of them from `first_row` on, in an Arrow file."""

    path: Path
    first_row: int
    num_rows: int

    def columns(self) -> dict[str, Cells]:
        """Name -> cells, mapped into memory."""
        table = pa.ipc.open_file(pa.memory_map(str(self.path))).read_all()
        return {field.name: Cells(column, field.metadata) for field, column in zip(table.schema, table.columns)}


class Cells:
    """A column of a block: its distinct `values` (all, where they hardly repeat) and the place of each row's."""

    def __init__(self, column: pa.ChunkedArray, metadata: Mapping[bytes, bytes] | None) -> None:
        (self._column,) = column.chunks
        self.is_coded = pa.types.is_dictionary(self._column.type)
        self._wide = (metadata or {}).get(_WIDE)

    @property
    def values(self) -> pl.Series:
        """The cells, each once if they are coded."""
        values = pl.from_arrow(self._column.dictionary if self.is_coded else self._column)
        assert isinstance(values, pl.Series)
        return values if self._wide is None else values.cast(getattr(pl, self._wide.decode()))

    @property
    def codes(self) -> Codes | None:
        """The place among `values` of every row's cell, or None where it is the row's own."""
        return self._column.indices.to_numpy() if self.is_coded else None

    def placed(self, of_values: pa.Array) -> pa.Array:
        """What each row's cell has become, of what each of `values` has."""
        return pc.take(of_values, self._column.indices) if self.is_coded else of_values

    def rows(self, end: int) -> pl.Series:
        """The cell of every row before `end`."""
        return self.values[:end] if self.codes is None else self.values.gather(pl.Series(self.codes[:end]))


@dataclass
class CodedTable(RawTable):
    """A `RawTable` in blocks of distinct cells; its pieces are the blocks, decoded as they are asked for.

    `whole` are the blocks with all their rows, of which `where` says which the table has.
    """

    blocks: tuple[Block, ...] = ()
    whole: tuple[pl.LazyFrame, ...] = ()
    where: tuple[pl.Expr, ...] = ()
    _kept: dict[Block, npt.NDArray[np.uint8]] = field(default_factory=dict, repr=False)

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
            rows = self.whole[self.blocks.index(block)].select(pl.all_horizontal(self.where).alias("kept"))
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

        def of_block(block: Block) -> pl.DataFrame:
            table, found = block.columns(), []
            for column, totals in columns.items():
                cells = table[column]
                counts = pl.Series(_COUNT, self.counts(block, cells))
                found.append(
                    pl.LazyFrame([cells.values.alias(column), counts]).filter(pl.col(_COUNT) > 0).select(totals)
                )
            with naming(self.name):
                return pl.concat(pl.collect_all(found), how="horizontal")

        return pl.concat([of_block(block) for block in self.blocks]).select(list(wanted))


_COUNT = "__count__"


def _lazily(block: Block, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """The rows of a block with their numbers; only columns that are asked for are put together."""

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, num_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        table = block.columns()
        names = [ROW, *table] if columns is None else columns
        end = block.num_rows if num_rows is None else min(num_rows, block.num_rows)
        rows = pl.int_range(block.first_row, block.first_row + end, dtype=pl.Int64, eager=True)
        frame = pl.DataFrame([(rows if name == ROW else table[name].rows(end)).alias(name) for name in names])
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
    if isinstance(data, str | Path) and format_of(Path(data)) == "text":
        with open_text(Path(data), separator, columns, missing_values, on_bad_row, ()) as text:
            blocks = _write(ahead(_parsed(text), 1), temporary, missing_values)
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
        rows = _batches(table.frame.drop(ROW))
        blocks = _write(((batch, False) for batch in rows), temporary, missing_values)
    shutil.rmtree(temporary / "raw", ignore_errors=True)
    return _table(table, blocks)


def _table(table: RawTable, blocks: tuple[Block, ...]) -> CodedTable:
    names = [one.name for one in dataclasses.fields(RawTable)]
    schema = {name: cells.values.dtype for name, cells in blocks[0].columns().items()}
    return CodedTable(
        **{name: getattr(table, name) for name in names if name != "pieces"},
        pieces=tuple(_lazily(block, schema) for block in blocks),
        blocks=blocks,
        whole=tuple(_lazily(block, schema) for block in blocks),
    )


def _batches(frame: pl.LazyFrame) -> Iterator[pa.Table]:
    dtypes = frame.collect_schema()
    wide = [name for name, dtype in dtypes.items() if dtype in (pl.Int128, pl.UInt128)]  # Arrow has none
    texts = [name for name, dtype in dtypes.items() if dtype in (pl.Categorical, pl.Enum)]
    frame = frame.with_columns(pl.col(texts + wide).cast(pl.String))
    for number, batch in enumerate(frame.collect_batches(chunk_size=BLOCK_ROWS, maintain_order=True)):
        if batch.height or not number:
            table = batch.to_arrow(compat_level=pl.CompatLevel.oldest())
            for name in wide:
                position = table.schema.get_field_index(name)
                field = table.schema.field(position).with_metadata({_WIDE: str(dtypes[name])})
                table = table.set_column(position, field, table.column(position))
            yield table


def _parsed(text: TextFile) -> Iterator[tuple[pa.Table, bool]]:
    """The rows of a text file, all columns text, and whether there may be blanks around cells."""
    for block in text.blocks(BLOCK_BYTES, functools.partial(_parse, text)):
        if isinstance(block, bytes):
            yield text.parse(block, cleaned=False).to_arrow(compat_level=pl.CompatLevel.oldest()), True
        else:
            yield block


def _parse(text: TextFile, block: bytes) -> tuple[int, tuple[pa.Table, bool]] | None:
    """The number of rows of a block and the rows, if all are well-formed beyond doubt."""
    if any(mark in block for mark in (b'"', b"\r", b"\0", b"\n\n")) or block.startswith(b"\n"):
        return None
    if not text.mark.isascii():
        return None
    options = (
        pyarrow.csv.ReadOptions(column_names=text.names, block_size=_ARROW_BLOCK),
        pyarrow.csv.ParseOptions(delimiter=text.mark.decode(), quote_char=False, ignore_empty_lines=False),
        pyarrow.csv.ConvertOptions(
            check_utf8=not block.isascii(),
            column_types=dict.fromkeys(text.names, pa.string()),
            strings_can_be_null=False,
        ),
    )
    try:
        table = pyarrow.csv.read_csv(pa.BufferReader(block), *options)
    except pa.ArrowInvalid:
        return None
    if table.num_rows != block.count(b"\n"):
        return None
    return table.num_rows, (table, any(blank in block for blank in (b" ", b"\t") if blank != text.mark))


def _write(tables: Iterator[tuple[pa.Table, bool]], folder: Path, missing_values: Sequence[str]) -> tuple[Block, ...]:
    """The rows, coded, as one file for each table."""
    blocks: list[Block] = []
    first = 0
    tokens = pa.array(missing_tokens(missing_values))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for table, blanks in tables:
            coded = threads.map(functools.partial(_coded, tokens=tokens, blanks=blanks), table.columns)
            columns = list(coded)
            fields = [field.with_type(column.type) for field, column in zip(table.schema, columns)]
            batch = pa.record_batch(columns, schema=pa.schema(fields))
            block = Block(folder / f"{len(blocks):06}.arrow", first, table.num_rows)
            with pa.OSFile(str(block.path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            blocks.append(block)
            first += table.num_rows
    return tuple(blocks)


def _coded(column: pa.ChunkedArray, tokens: pa.Array, blanks: bool) -> pa.Array:
    """The column as a dictionary array without nulls but in the dictionary; as it is, where cells hardly repeat."""
    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    repeats = is_text or any(
        of_kind(kind) for of_kind in (pa.types.is_integer, pa.types.is_boolean, pa.types.is_date, pa.types.is_timestamp)
    )
    if not repeats:
        return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    coded = column.dictionary_encode(null_encoding="encode").combine_chunks()
    if is_text:
        values = coded.dictionary
        if blanks:
            values = pc.utf8_trim(values, BLANKS)
        missing = pc.is_in(values, tokens.cast(kind))
        if pc.any(missing).as_py():
            values = pc.if_else(missing, None, values)
        coded = pa.DictionaryArray.from_arrays(coded.indices, values)
    return coded
