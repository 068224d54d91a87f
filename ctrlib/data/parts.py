"""Files that follow each other as one table: which ones a folder holds, and types that differ and lose nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

import polars as pl

from ctrlib.data.formats import PARQUET
from ctrlib.data.scan import DataError
from ctrlib.schema import SchemaError

# A folder of this name (or a file of this pattern) makes a folder a table of another kind, which knows in its log which
# of its files are alive: the others must not be read.
_MANAGED = {"_delta_log": "Delta", ".hoodie": "Hudi", "metadata/*.metadata.json": "Iceberg"}
_READERS = {
    "Delta": "polars.read_delta",
    "Hudi": "Spark or the package hudi",
    "Iceberg": "polars.scan_iceberg",
}


@dataclass(frozen=True)
class Part:
    """A parquet file, and the cells that the names of its folders (`date=2024-01-01`) hold."""

    path: Path
    keys: dict[str, str | None] = field(default_factory=dict)

    def scan(self) -> pl.LazyFrame:
        """Its rows, the keys after the columns of the file."""
        # Paths and no pattern: brackets in a folder's name would be read as part of it.
        frame = pl.scan_parquet([self.path], glob=False, hive_partitioning=False)
        return self.with_keys(frame)

    def with_keys(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """Rows of the file, the keys after their columns."""
        return frame.with_columns(pl.lit(value, pl.String).alias(key) for key, value in self.keys.items())


def parts_of(path: Path) -> list[Part]:
    """A parquet file, or those of a folder in the order of their names, partitioned (`date=2024-01-01/...`) or not.

    Files and folders whose names begin with a dot or an underline are no data, by custom.

    Raises:
        DataError: there is none, or the folder is a table of another kind.
        SchemaError: folders are partitioned by one column here and by another there.
    """
    if not path.is_dir():
        return [Part(path)]
    for place in (path, *path.parents):
        for mark, what in _MANAGED.items():
            if any(place.glob(mark)):
                raise DataError(
                    f"{path} is part of a {what} table, whose log says which of its files are alive: read it with "
                    f"{_READERS[what]} and pass the frame to `ctr.prepare`, or write it as plain parquet"
                )
        if place is not path and "=" not in place.name and place != path.parent:
            break
    parts = _below(path, {})
    if not parts:
        raise DataError(f"{path} is a folder without parquet files: expected a file, or a folder of *.parquet")
    for part in parts:
        if list(part.keys) != list(parts[0].keys):
            raise SchemaError(
                f"{part.path} lies in folders that name {list(part.keys)}, {parts[0].path} in folders that name "
                f"{list(parts[0].keys)}: all files must lie in folders of the same columns"
            )
    return parts


def _below(folder: Path, keys: dict[str, str | None]) -> list[Part]:
    parts = []
    for place in sorted(folder.iterdir()):
        if place.name.startswith((".", "_")):
            continue
        name, equals, value = place.name.partition("=")
        if place.is_dir() and equals and name:
            if (name := unquote(name)) in keys:
                raise SchemaError(f"{place}: {name!r} partitions a folder above it, too: give each column its own name")
            cell = None if value in ("", "__HIVE_DEFAULT_PARTITION__") else unquote(value)
            parts += _below(place, {**keys, name: cell})
        elif place.suffix in PARQUET and place.is_file():
            parts.append(Part(place, keys))
    return parts


def frames_of(parts: Sequence[Part], wanted: Collection[str] | None = None) -> list[pl.LazyFrame] | None:
    """The rows of each part, with the same columns; None where they are simply what the files hold.

    Raises:
        SchemaError: columns differ.
    """
    frames = [part.scan() for part in parts]
    schemas = [frame.collect_schema() for frame in frames]
    if not parts[0].keys and wanted is None and all(schema == schemas[0] for schema in schemas):
        return None
    columns = alike([(str(part.path), frame) for part, frame in zip(parts, frames)], wanted)
    return [frame.select(wanted) for frame, wanted in zip(frames, columns)]


# --------------------------------------------------------------------------------------------------------------- types


def alike(tables: Sequence[tuple[str, pl.LazyFrame]], wanted: Collection[str] | None = None) -> list[list[pl.Expr]]:
    """What to select of each table, such that all have the same columns, of the same types.

    Args:
        tables: name for messages, and rows.
        wanted: the columns that matter; by default all. Those that no table has are left out.

    Raises:
        SchemaError: a column is missing in one, or its types cannot become one without a loss.

    >>> ids, with_nulls = pl.LazyFrame({"a": [1, 2]}), pl.LazyFrame({"a": [3.0, None]})
    >>> [frame.select(columns).collect()["a"].to_list() for frame, columns in
    ...  zip((ids, with_nulls), alike([("0.parquet", ids), ("1.parquet", with_nulls)]))]
    [[1, 2], [3, None]]
    """
    schemas = [frame.collect_schema() for _, frame in tables]
    names = [name for name in schemas[0] if wanted is None or name in wanted]
    for (table, _), schema in zip(tables, schemas):
        others = [name for name in schema if wanted is None or name in wanted]
        if lacking := [name for name in names if name not in schema]:
            raise SchemaError(f"{table} lacks columns {lacking}, which {tables[0][0]} has: give all the same columns")
        if more := [name for name in others if name not in names]:
            raise SchemaError(f"{table} has columns {more}, which {tables[0][0]} lacks: give all the same columns")
    columns: list[list[pl.Expr]] = [[] for _ in tables]
    for name in names:
        came = [schema[name] for schema in schemas]
        dtype = came[0]
        for (table, _), other in zip(tables, came):
            found = _common(dtype, other)
            if found is None:
                raise SchemaError(
                    f"{table}: column {name!r} has type {other}, in {tables[0][0]} it has type {came[0]}: one cannot "
                    "become the other without a loss, so cast it in one of them"
                )
            dtype = found
        values = [_inner(one) for one in came]
        if _inner(dtype).is_float() and any(one.is_integer() for one in values):
            # Integers that became floats, as pandas makes them where one is missing? Then they are integers.
            floats = [frame for (_, frame), one in zip(tables, came) if _inner(one).is_float()]
            if all(_holds(frame, name, _is_whole) for frame in floats):
                dtype = pl.List(pl.Int64()) if isinstance(dtype, pl.List) else pl.Int64()
        if _inner(dtype) == pl.Int128 and pl.UInt64 in values and pl.Int128 not in values:
            # Ids of 64 bits without a sign, which look smaller in other files.
            signed = [frame for (_, frame), one in zip(tables, came) if _inner(one) != pl.UInt64]
            if all(_holds(frame, name, lambda cells: cells >= 0) for frame in signed):
                dtype = pl.List(pl.UInt64()) if isinstance(dtype, pl.List) else pl.UInt64()
        for expressions, one in zip(columns, came):
            expressions.append(_cast(pl.col(name), one, dtype).alias(name))
    return columns


def _inner(dtype: pl.DataType) -> pl.DataType:
    inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
    assert isinstance(inner, pl.DataType)
    return inner


def _common(a: pl.DataType, b: pl.DataType) -> pl.DataType | None:
    """A type that holds all values of both, as the same ids and numbers; None if there is none."""
    if a == b or b == pl.Null:
        return a
    if a == pl.Null:
        return b
    if isinstance(a, pl.List | pl.Array) and isinstance(b, pl.List | pl.Array):
        inner = _common(_inner(a), _inner(b))
        return None if inner is None else pl.List(inner)
    if all(one in (pl.String, pl.Categorical, pl.Enum) for one in (a, b)):
        return pl.String()
    if a.is_integer() and b.is_integer():
        small = all(one not in (pl.UInt64, pl.Int128, pl.UInt128) for one in (a, b))
        return pl.Int64() if small else pl.Int128()
    if all(one.is_integer() or one.is_float() for one in (a, b)):
        return pl.Float64()
    if all(one.is_integer() or one.is_decimal() for one in (a, b)):
        return pl.Decimal(38, max(one.scale for one in (a, b) if isinstance(one, pl.Decimal)))
    if pl.Date in (a, b) and (other := b if a == pl.Date else a) == pl.Datetime:
        return other if getattr(other, "time_zone", None) is None else None
    if isinstance(a, pl.Datetime) and isinstance(b, pl.Datetime):
        if (a.time_zone is None) != (b.time_zone is None):
            return None
        unit = next(unit for unit in ("ns", "us", "ms") if unit in (a.time_unit, b.time_unit))
        return pl.Datetime(unit, a.time_zone if a.time_zone == b.time_zone else "UTC")
    return None


def _is_whole(values: pl.Expr) -> pl.Expr:
    return values.is_nan() | ((values == values.floor()) & (values.abs() < 2.0**63))


def _holds(frame: pl.LazyFrame, name: str, condition: Callable[[pl.Expr], pl.Expr]) -> bool:
    """Whether it is true of all values of a column, those in its lists included."""
    dtype = frame.collect_schema()[name]
    values = pl.col(name).arr.to_list() if isinstance(dtype, pl.Array) else pl.col(name)
    if isinstance(dtype, pl.List | pl.Array):
        values = values.list.explode(empty_as_null=False, keep_nulls=False)
    return bool(frame.select(condition(values).all()).collect(engine="streaming").item())


def _cast(column: pl.Expr, came: pl.DataType, wanted: pl.DataType) -> pl.Expr:
    if came == wanted:
        return column
    if isinstance(came, pl.Array):
        column = column.arr.to_list()
    if isinstance(came, pl.List | pl.Array):
        return column.list.eval(_cast(pl.element(), _inner(came), _inner(wanted)))
    if came.is_float() and wanted.is_integer():
        column = column.fill_nan(None)
    if isinstance(came, pl.Datetime) and isinstance(wanted, pl.Datetime) and came.time_zone != wanted.time_zone:
        column = column.dt.convert_time_zone(wanted.time_zone or "UTC")
    return column.cast(wanted)
