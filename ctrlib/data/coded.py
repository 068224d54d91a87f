"""A raw table on disk in which every distinct cell of a block stands once, and rows are the numbers of their cells.

Text is slow, so it is touched once: a block of rows is parsed, each of its columns is split into distinct cells and the
place of each row's cell among them, and both go into an Arrow file. What a cell means (`ctrlib.data.cells`) is then
asked once for each distinct cell of a block, and rows are counted and encoded by looking up integers. Everything else
that a `RawTable` can do is done by putting the cells back in their places, of the columns that are asked for.

A large text file is cut and its cells are numbered by compiled loops (`ctrlib.data.compiled`): blocks are then as large
as their distinct cells allow, often the whole file. Whether it is pyarrow or these that read a block is not to be seen
in what is made of it.

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

from ctrlib.data.compiled import Cut, Numbered, are_worth, cut
from ctrlib.data.formats import format_of
from ctrlib.data.quick import BLANKS
from ctrlib.data.raw import RawData, TextFile, open_text, read_raw
from ctrlib.data.scan import OnBadRow
from ctrlib.data.table import ROW, Plan, RawTable, Total, check_height, missing_tokens, naming

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
    apart: bool = field(default=False, compare=False)  # codes are in files of their own

    def slices(self, num_rows: int) -> Iterator[slice]:
        """Its rows, so many at a time."""
        for start in range(0, max(self.num_rows, 1), num_rows):
            yield slice(start, min(start + num_rows, self.num_rows))

    def path(self, name: str, what: str = "cells") -> Path:
        """Where the cells of a column are, or what else there is of it."""
        return self.folder / f"{self.names.index(name)}.{what}"

    def cells(self, name: str) -> Cells:
        """A column, as it lies in its file, or in two."""
        batch = read_column(self.path(name))
        wide = (batch.schema.metadata or {}).get(_WIDE)
        return Cells(batch.column(0), self.path(name, "codes") if self.apart else None, wide)

    def cut_out(self, rows: slice, folder: Path) -> Block:
        """Some of its rows as a block of its own, which holds no other cells, in a new folder."""
        folder.mkdir(parents=True)
        cut = Block(folder, self.names, self.first_row + rows.start, rows.stop - rows.start)
        for name in self.names:
            cells, metadata = self.cells(name), read_column(self.path(name)).schema.metadata
            write_column(cells.cut_out(rows), cut.path(name), metadata)
        return cut


def write_column(column: pa.Array, path: Path, metadata: dict[bytes, bytes] | None = None) -> None:
    """An array as a file, for `read_column`."""
    schema = pa.schema([pa.field("", column.type)], metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))


def read_column(path: Path) -> pa.RecordBatch:
    """A batch of the one column, mapped into memory."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


class Cells:
    """A column of a block: its distinct `values` (all, where they hardly repeat) and the place of each row's.

    Args:
        column: rows, coded or not; or the distinct cells only.
        path: of a file with the places, if they are not in `column`.
        wide: the type of the values, if it is one that Arrow does not have.
    """

    def __init__(self, column: pa.Array, path: Path | None, wide: bytes | None) -> None:
        self._column, self._path, self._wide = column, path, wide
        self._is_dictionary = pa.types.is_dictionary(column.type)

    @property
    def values(self) -> pl.Series:
        """The cells, each once if they are coded."""
        column = self._column
        if self._is_dictionary:
            # Copied: who keeps them does not keep the codes of all rows in memory with them.
            column = pa.concat_arrays([column.dictionary, column.dictionary[:0]])
        values = pl.from_arrow(column)
        assert isinstance(values, pl.Series)
        return values if self._wide is None else values.cast(getattr(pl, self._wide.decode()))

    def codes(self, rows: slice) -> Codes | None:
        """The place among `values` of the cells of some rows, or None where it is the row's own."""
        if self._path is not None:  # read, not mapped, so that memory holds no more of it than is used
            return np.fromfile(self._path, np.int32, rows.stop - rows.start, offset=4 * rows.start)
        return self._column.indices[rows].to_numpy() if self._is_dictionary else None

    def rows(self, rows: slice) -> pl.Series:
        """The cells of some rows."""
        codes = self.codes(rows)
        return self.values[rows] if codes is None else self.values.gather(pl.Series(codes))

    def cut_out(self, rows: slice) -> pa.Array:
        """Some rows as an array to be written, coded if these are."""
        codes = self.codes(rows)
        if codes is None:
            return pa.concat_arrays([self._column[rows.start : rows.stop]])
        used, places = np.unique(codes, return_inverse=True)
        values = self._column.dictionary if self._is_dictionary else self._column
        return pa.DictionaryArray.from_arrays(pa.array(places.astype(np.int32)), values.take(pa.array(used)))

    def placed(self, of_values: pa.Array, rows: slice, kept: npt.NDArray[np.bool_] | None) -> pa.Array:
        """What the cells of those `rows` that are `kept` (None for all) have become, of what each of `values` has."""
        codes = self.codes(rows)
        if codes is None:
            return of_values[rows] if kept is None else of_values[rows].filter(pa.array(kept[rows]))
        return pc.take(of_values, pa.array(codes if kept is None else codes[kept[rows]]))


@dataclass
class CodedTable(RawTable):
    """A `RawTable` in blocks of distinct cells; its pieces are parts of the blocks, decoded as they are asked for.

    `whole` are the blocks with all their rows, in parts, of which `where` says which the table has.
    """

    whole: Mapping[Block, tuple[pl.LazyFrame, ...]] = field(default_factory=dict)
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
            kept = pl.all_horizontal(self.where).fill_null(False).alias("kept")
            parts = [part.select(kept).collect()["kept"].to_numpy() for part in self.whole[block]]
            self._kept[block] = np.packbits(np.concatenate(parts))
        return np.unpackbits(self._kept[block], count=block.num_rows).astype(bool)

    def counts(self, block: Block, cells: Cells) -> npt.NDArray[np.int64]:
        """How many rows of the table hold each of the `values` of a column of a block."""
        kept, num_values = self.kept(block), len(cells.values)
        counts = np.zeros(num_values, np.int64)
        for rows in block.slices(BLOCK_ROWS):
            codes = cells.codes(rows)
            if codes is None:
                counts[rows] = 1 if kept is None else kept[rows]
            else:
                counts += np.bincount(codes if kept is None else codes[kept[rows]], minlength=num_values)
        return counts

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


def _lazily(block: Block, rows: slice, schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """Some rows of a block with their numbers; only columns that are asked for are put together."""

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, num_rows: int | None, batch_size: int | None
    ) -> Iterator[pl.DataFrame]:
        names = [ROW, *block.names] if columns is None else columns
        end = rows.stop if num_rows is None else min(rows.start + num_rows, rows.stop)
        numbers = pl.int_range(block.first_row + rows.start, block.first_row + end, dtype=pl.Int64, eager=True)
        made = (numbers if name == ROW else block.cells(name).rows(slice(rows.start, end)) for name in names)
        frame = pl.DataFrame([column.alias(name) for name, column in zip(names, made)])
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
                return coded_table(text.table(()), blocks)
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
    return coded_table(table, blocks)


def _numbered(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The blocks with the numbers of their first rows."""
    found, first = [], 0
    for block in blocks:
        found.append(dataclasses.replace(block, first_row=first))
        first += block.num_rows
    return tuple(found)


def coded_table(table: RawTable, blocks: tuple[Block, ...]) -> CodedTable:
    """The blocks as a table, of which `table` says all else."""
    names = [one.name for one in dataclasses.fields(RawTable)]
    schema = {name: blocks[0].cells(name).values.dtype for name in blocks[0].names}
    whole = {block: tuple(_lazily(block, rows, schema) for rows in block.slices(BLOCK_ROWS)) for block in blocks}
    return CodedTable(
        **{name: getattr(table, name) for name in names if name != "pieces"},
        pieces=tuple(itertools.chain.from_iterable(whole.values())),
        whole=whole,
    )


def _is_plain(text: TextFile, lines: bytes) -> bool:
    """Whether lines hold nothing that cells may not."""
    return text.mark.isascii() and not any(byte in lines for byte in (b"\r", b"\0"))


class _Coder:
    """Codes rows and writes them, several blocks at once, each by one thread; `first_row` is 0 in all of them."""

    def __init__(self, folder: Path, missing_values: Sequence[str], threads: ThreadPoolExecutor) -> None:
        self._folder, self._threads = folder, threads
        self._tokens = pa.array(missing_tokens(missing_values))
        self._numbers = itertools.count()

    def text(self, text: TextFile) -> Iterator[Block]:
        """The rows of a text file."""
        num_bytes = text.path.stat().st_size
        is_large = are_worth(num_bytes)
        quick = self._cut if is_large else self._parsed
        # So that a small file keeps all threads busy, too.
        size = max(_FEWEST_BYTES, 0 if is_large else min(num_bytes // (2 * NUM_THREADS), BLOCK_BYTES))

        def start(lines: bytes) -> Callable[[], tuple[int, Block | Cut] | None]:
            return self._threads.submit(quick, text, lines).result

        parts = text.blocks(size, start, NUM_THREADS)
        for kind, some in itertools.groupby(parts, type):
            if kind is Cut:
                yield from self._joined(text.names, (part for part in some if isinstance(part, Cut)))
                continue
            for part in some:
                if isinstance(part, bytes):
                    rows = text.parse(part, cleaned=False).to_arrow(compat_level=pl.CompatLevel.oldest())
                    yield self._written(rows, blanks=True)
                elif isinstance(part, Block):
                    yield part

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

    def _cut(self, text: TextFile, lines: bytes) -> tuple[int, Cut] | None:
        """The number of rows, and the rows, if all are well-formed beyond doubt; for `_joined`."""
        found = cut(lines, text.mark, len(text.names)) if _is_plain(text, lines) else None
        return None if found is None else ((len(found.ends) - 1) // len(text.names), found)

    def _joined(self, names: Sequence[str], parts: Iterator[Cut]) -> Iterator[Block]:
        """Blocks that are as large as memory allows."""
        for first in parts:
            block = Block(self._new_folder(), tuple(names), 0, 0, apart=True)
            numbered = Numbered([block.path(name, "codes") for name in names], NUM_THREADS)
            try:
                numbered.add(first)
                while not numbered.is_full and (part := next(parts, None)) is not None:
                    numbered.add(part)
                for name, values in zip(names, numbered.finish()):
                    write_column(self._cleaned(values, numbered.blanks), block.path(name))
            finally:
                numbered.close()
            yield dataclasses.replace(block, num_rows=numbered.num_rows)

    def _parsed(self, text: TextFile, lines: bytes) -> tuple[int, Block] | None:
        """As `_cut`, by pyarrow, and a block of its own."""
        if not _is_plain(text, lines):
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

    def _new_folder(self) -> Path:
        folder = self._folder / f"{next(self._numbers):06}"
        folder.mkdir()
        return folder

    def _written(self, rows: pa.Table, *, blanks: bool, wide: Mapping[str, str] | None = None) -> Block:
        """The rows as files; `blanks`: there may be some around cells; `wide`: name -> type that polars knows only."""
        block = Block(self._new_folder(), tuple(rows.column_names), 0, rows.num_rows)
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
            coded = pa.DictionaryArray.from_arrays(coded.indices, self._cleaned(coded.dictionary, blanks))
        return coded

    def _cleaned(self, values: pa.Array, blanks: bool) -> pa.Array:
        """Distinct cells of text without the blanks around them, null where they are missing."""
        if blanks:
            values = pc.utf8_trim(values, BLANKS)
        missing = pc.is_in(values, self._tokens.cast(values.type))
        return pc.if_else(missing, None, values) if pc.any(missing).as_py() else values
