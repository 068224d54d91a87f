"""Count the values of coded tables and write their rows as ids and numbers, by looking up integers.

What is computed is what `ctrlib.data.encode` says of rows, with the same expressions, once for each distinct cell of a
block; rows are put together from that.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from polars.io.plugins import register_io_source

from ctrlib.data.cells import fitted_number, label, number, raw_id, text
from ctrlib.data.coded import NUM_THREADS, Block, Cells, CodedTable, read_column, write_column
from ctrlib.data.columns import GROUP_COLUMN, lists_of
from ctrlib.data.encode import ROWS_PER_GROUP, Totals, totals_of
from ctrlib.data.stream import ahead
from ctrlib.data.table import naming
from ctrlib.schema import (
    MISSING_ID,
    MISSING_RAW_ID,
    OOV_ID,
    Categorical,
    Feature,
    Numeric,
    RawId,
    Schema,
    VocabularyFeature,
)

_TEXT = pa.large_string()
_FEWEST = 1 << 19  # texts that are put together at once


class Texts(NamedTuple):
    """Canonical texts of the distinct cells of a column: one a cell, null where it is missing; or, of lists, those of
    all cells one after another and how many each cell has."""

    flat: pa.Array
    lengths: npt.NDArray[np.int64] | None


def texts_of(cells: Cells, feature: VocabularyFeature) -> Texts:
    """What the distinct cells of a column hold, as `ctrlib.data.cells.text` says."""
    values = cells.values.alias(feature.name)
    if not isinstance(feature, Categorical):
        lists = values.to_frame().select(text(feature, values.dtype)).to_series()
        lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
        return Texts(_text_array(lists.drop_nulls().explode()), lengths)
    if values.dtype != pl.String or feature.bucket is not None:
        values = values.to_frame().select(text(feature, values.dtype)).to_series()
    return Texts(_text_array(values), None)


def _text_array(values: pl.Series) -> pa.Array:
    return values.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_TEXT)


class _Part(NamedTuple):
    """A feature in a block of a table; its cells are not kept, since many parts are held at once."""

    table: CodedTable
    block: Block
    feature: VocabularyFeature
    texts: Texts


def _parts(blocks: Iterable[tuple[CodedTable, Block]], features: Sequence[VocabularyFeature]) -> Iterator[_Part]:
    for table, block in blocks:
        for feature in features:
            with naming(table.name):
                yield _Part(table, block, feature, texts_of(block.cells(feature.name), feature))


def _at_once(parts: Iterable[_Part], least: int) -> Iterator[list[_Part]]:
    """Parts that together have so many texts: memory does not grow with the blocks."""
    some: list[_Part] = []
    for part in parts:
        some.append(part)
        if sum(len(one.texts.flat) for one in some) >= least:
            yield some
            some = []
    if some:
        yield some


def count_values(tables: Sequence[CodedTable], features: Sequence[VocabularyFeature]) -> pl.LazyFrame:
    """The values of features that share a vocabulary in all rows of the tables: value, count."""
    values, totals = pa.array([], _TEXT), np.zeros(0, np.int64)
    blocks = ((table, block) for table in tables for block in table.blocks)
    for parts in _at_once(_parts(blocks, features), _FEWEST):
        (_, *places), values = _numbered([values, *(part.texts.flat for part in parts)])
        totals = np.concatenate([totals, np.zeros(len(values) - len(totals), np.int64)])
        for part, numbers in zip(parts, places):
            rows = part.table.counts(part.block, part.block.cells(part.feature.name))
            rows = rows if part.texts.lengths is None else np.repeat(rows, part.texts.lengths)
            present = numbers >= 0
            np.add.at(totals, numbers[present], rows[present])
    return pl.LazyFrame({"value": _strings(values), "count": totals}).filter(pl.col("count") > 0)


def _strings(values: pa.Array) -> pl.Series:
    series = pl.from_arrow(values)
    assert isinstance(series, pl.Series)
    return series


def _numbered(texts: Sequence[pa.Array]) -> tuple[list[npt.NDArray[np.int32]], pa.Array]:
    """Of each array the places of its texts (-1 for null) among all distinct texts, in the order of coming."""
    # Empty arrays are left out: Arrow drops their chunks.
    chunks = pa.chunked_array([array for array in texts if len(array)], _TEXT).dictionary_encode().chunks
    places = iter([chunk.indices.fill_null(-1).to_numpy() for chunk in chunks])
    nothing = np.empty(0, np.int32)
    of_arrays = [next(places) if len(array) else nothing for array in texts]
    return of_arrays, chunks[-1].dictionary if chunks else pa.array([], _TEXT)


def count_numbers(table: CodedTable, feature: Numeric) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Numbers as the model sees them, and how many rows of the table have each; equal ones may come several times."""
    values, counts = [], []
    for block in table.blocks:
        cells = block.cells(feature.name)
        rows = table.counts(block, cells)
        column = cells.values.alias(feature.name)
        with naming(table.name):
            found = column.to_frame().select(fitted_number(feature, column.dtype).cast(pl.Float32)).to_series()
        values.append(found.to_numpy()[rows > 0])
        counts.append(rows[rows > 0])
    return np.concatenate(values), np.concatenate(counts)


# ------------------------------------------------------------------------------------------------------------- writing


def write_coded(
    tables: Mapping[str, CodedTable],
    folder: Path,
    schema: Schema,
    known: Mapping[str, Path],
    label_positive: Mapping[str, str] | None,
) -> dict[str, Totals]:
    """As `ctrlib.data.workers.Workers.write`, a file for each split."""
    # One block may have rows of several splits.
    blocks = {block: table for table in tables.values() for block in table.blocks}
    vocabularies: dict[Path, Sequence[VocabularyFeature]] = {
        known[name]: features for name, features in schema.vocabularies.items()
    }
    if GROUP_COLUMN in known:
        vocabularies[known[GROUP_COLUMN]] = (_Group(schema.group or ""),)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        list(threads.map(functools.partial(_look_up, blocks=blocks), *zip(*vocabularies.items())))
    encode = functools.partial(
        _encoded, schema=schema, positive=label_positive or {}, integer_groups=GROUP_COLUMN not in known
    )

    def write(split: str) -> Totals:
        return _write(tables[split], encode, folder / split / "part-00000.parquet", schema)

    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return dict(zip(tables, threads.map(write, tables)))


def _write(
    table: CodedTable, encode: Callable[[CodedTable, Block], Iterator[pl.DataFrame]], path: Path, schema: Schema
) -> Totals:
    found: list[Totals] = []
    frames = ahead(frame for block in table.blocks for frame in encode(table, block))
    first = next(frames)

    def rows(*_: object) -> Iterator[pl.DataFrame]:
        for frame in itertools.chain([first], frames):
            found.append(totals_of(frame.lazy(), schema))
            yield frame

    with naming(table.name):
        register_io_source(rows, schema=first.schema).sink_parquet(
            path, compression="snappy", row_group_size=ROWS_PER_GROUP
        )
    return functools.reduce(operator.add, found)


class _Group(Categorical):
    """The group, which is looked up as a feature is."""


def _look_up(known: Path, features: Sequence[VocabularyFeature], *, blocks: Mapping[Block, CodedTable]) -> None:
    """Write, for each block, the ids of the distinct cells of features that share a vocabulary."""
    vocabulary = pl.read_parquet(known, columns=["value", "id"], glob=False)
    values = _text_array(vocabulary["value"])
    is_group = isinstance(features[0], _Group)
    missing, unseen, kind = (-1, -1, np.int64) if is_group else (MISSING_ID, OOV_ID, np.int32)
    tables = ((table, block) for block, table in blocks.items())
    for parts in _at_once(_parts(tables, features), max(_FEWEST, len(values))):
        (first, *places), distinct = _numbered([values, *(part.texts.flat for part in parts)])
        ids = np.full(len(distinct) + 1, unseen, kind)
        ids[first] = vocabulary["id"].to_numpy()
        ids[-1] = missing  # the place of a null is -1
        for part, numbers in zip(parts, places):
            found = pa.array(ids[numbers])
            if part.texts.lengths is not None:
                lists = lists_of(ids[numbers], part.texts.lengths, part.feature)
                found = pa.ListArray.from_arrays(lists.offsets.astype(np.int32), lists.values)
            write_column(found, _ids_path(part.block, part.feature))


def _ids_path(block: Block, feature: Feature) -> Path:
    return block.path(feature.name, "groups" if isinstance(feature, _Group) else "ids")


def _encoded(
    table: CodedTable, block: Block, *, schema: Schema, positive: Mapping[str, str], integer_groups: bool
) -> Iterator[pl.DataFrame]:
    """The table's rows of a block as `ctrlib.data.encode.encode_checked` gives them, some at a time."""
    kept = table.kept(block)
    made: dict[str, tuple[Cells, pa.Array]] = {}  # the cells of a column, and what each distinct one becomes

    def computed(out: str, column: str, meaning: Callable[[pl.DataType], pl.Expr]) -> None:
        cells = block.cells(column)
        values = cells.values.alias(column)
        with naming(table.name):
            found = values.to_frame().select(meaning(values.dtype)).to_series()
        made[out] = cells, found.to_arrow()

    def looked_up(out: str, feature: VocabularyFeature) -> None:
        ids = read_column(_ids_path(block, feature)).column(0)
        made[out] = block.cells(feature.name), ids

    for feature in schema.features:
        if isinstance(feature, Numeric):
            computed(feature.name, feature.name, lambda dtype, f=feature: fitted_number(f, dtype).cast(pl.Float32))  # type: ignore[misc]
        elif isinstance(feature, RawId):
            computed(feature.name, feature.name, lambda _, f=feature: raw_id(f).fill_null(MISSING_RAW_ID))  # type: ignore[misc]
        else:
            looked_up(feature.name, feature)
    for one in schema.labels:
        computed(
            one,
            one,
            lambda dtype, n=one: label(n, dtype, positive.get(n)).fill_null(float("nan")).cast(pl.Float32),  # type: ignore[misc]
        )
    if schema.weight is not None:
        weight = schema.weight
        computed(weight, weight, lambda dtype: number(weight, dtype).cast(pl.Float32))
    if schema.group is not None and integer_groups:
        # Rows that are left out may hold what is none.
        computed(GROUP_COLUMN, schema.group, lambda _: pl.col(schema.group or "").cast(pl.Int64, strict=False))
    elif schema.group is not None:
        looked_up(GROUP_COLUMN, _Group(schema.group))
    for rows in block.slices(ROWS_PER_GROUP):
        frame = pl.from_arrow(
            pa.table({name: cells.placed(of_values, rows, kept) for name, (cells, of_values) in made.items()})
        )
        assert isinstance(frame, pl.DataFrame)
        yield frame
