"""What a raw cell means: polars expressions from raw columns of any type to canonical text, numbers, and verdicts.

Everything that reads a cell goes through here, so that an id has the same text whether it came as an integer, as text,
or as a float (which pandas makes of integers as soon as one is missing).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from ctrlib.data.quick import FLOAT32_MAX, json_events
from ctrlib.data.scan import DataError, OnBadRow
from ctrlib.data.table import ROW, RawTable, Total, is_cell
from ctrlib.schema import (
    Categorical,
    Feature,
    MultiValued,
    Numeric,
    NumericTransform,
    RawId,
    Schema,
    SchemaError,
    Sequence,
    kind_of,
)

TOO_LARGE = "too large after its transform"


def number(name: str, dtype: pl.DataType) -> pl.Expr:
    """The column as float64; null where the cell is missing, NaN, or (see `checks`) not a number."""
    value = pl.col(name).cast(pl.Float64, strict=False)
    return value if dtype.is_integer() or dtype == pl.Boolean else value.fill_nan(None)


def text(feature: Feature, dtype: pl.DataType) -> pl.Expr:
    """The canonical text of a categorical column, or list of texts of a multi-valued one; null where it is missing.

    A history's list has a null for each event that is missing, in its place.

    Integers are decimal; floats and decimals must be whole, and are as integers; booleans "true" and "false"; dates
    "2024-05-31"; times of any unit "2024-05-31 08:15:30.25", without zeros at the end of the fraction, a midnight as
    its date, with a zone in UTC. Text is as it is.
    """
    column = pl.col(feature.name)
    if isinstance(feature, Categorical):
        if feature.bucket == "log_squared":
            x = number(feature.name, dtype)
            # log of what is not above 2 is never used, but must not be NaN.
            bucket = pl.when(x > 2).then(x.clip(lower_bound=2).log().pow(2)).otherwise(x).floor()
            return bucket.cast(pl.Int64, strict=False).cast(pl.String)
        return _scalar_text(column, dtype)
    assert isinstance(feature, MultiValued | Sequence)
    event = pl.element()
    if isinstance(dtype, pl.List | pl.Array):
        values = column.arr.to_list() if isinstance(dtype, pl.Array) else column
        event = _scalar_text(event, _inner(dtype))
    elif dtype == pl.String:
        cell = pl.when(column.str.strip_chars() != "").then(column)
        values = pl.when(_is_json(column)).then(_json_lists(column)).otherwise(cell.str.split(feature.separator))
    else:
        values = _scalar_text(column, dtype).str.split(feature.separator)
    if not isinstance(dtype, pl.List | pl.Array) or _inner(dtype) in (pl.String, pl.Categorical, pl.Enum):
        event = event.str.strip_chars()
    event = event.fill_null("")
    present, kept = event != "", pl.lit(True) if feature.padding is None else event != feature.padding
    if isinstance(feature, MultiValued):
        values = values.list.eval(event.filter(present & kept)).list.head(feature.max_length)
    else:
        in_place = pl.when(present).then(event)
        values = values.list.eval(in_place if feature.padding is None else in_place.filter(kept))
        values = values.list.tail(feature.max_length)
    return pl.when(values.list.len() > 0).then(values)


def _is_json(column: pl.Expr) -> pl.Expr:
    return column.str.starts_with("[") & column.str.ends_with("]")


def _json_lists(column: pl.Expr) -> pl.Expr:
    """Lists of texts; null where the cell is no JSON list."""
    return (
        pl.when(_is_json(column))
        .then(column)
        .map_batches(_json_lists_of, return_dtype=pl.List(pl.String), is_elementwise=True)
    )


def _json_lists_of(cells: pl.Series) -> pl.Series:
    if cells.null_count() == len(cells):
        return pl.Series(cells.name, [], dtype=pl.List(pl.String)).clear(len(cells))
    lists = [None if cell is None else json_events(cell) for cell in cells.to_list()]
    return pl.Series(cells.name, lists, dtype=pl.List(pl.String))


def _scalar_text(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype.is_float():
        return column.fill_nan(None).cast(pl.Int64, strict=False).cast(pl.String)
    if dtype.is_decimal():
        return column.cast(pl.String).str.replace(r"\.0*$", "")
    if isinstance(dtype, pl.Datetime):
        utc = column if dtype.time_zone is None else column.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        written = utc.dt.cast_time_unit("ns").dt.to_string("%Y-%m-%d %H:%M:%S%.9f").str.strip_chars_end("0")
        # What is left of a whole second ends in "00:00:." or "08:15:3.": only zeros of the fraction are to go.
        return (
            pl.when(written.str.contains(r"\.$"))
            .then(utc.dt.to_string("%Y-%m-%d %H:%M:%S"))
            .otherwise(written)
            .str.replace(r" 00:00:00$", "")
        )
    return column if dtype == pl.String else column.cast(pl.String)


def raw_id(feature: RawId) -> pl.Expr:
    """The id as int64, by the feature's form; null where the cell is missing. `RawId` says which id it is."""
    if feature.form == "text":
        return pl.col(feature.name).cast(pl.String).map_batches(_hashed, return_dtype=pl.Int64, is_elementwise=True)
    return pl.coalesce(_parsed(pl.col(feature.name), pl.Int64), _parsed(pl.col(feature.name), pl.UInt64))


def is_raw_integer(name: str, dtype: pl.DataType) -> pl.Expr:
    """Whether the cell holds an integer, or the text of one as integers are printed; true where it is missing."""
    column = pl.col(name)
    if dtype != pl.String:
        return pl.lit(True)
    printed = [column.cast(wide, strict=False).cast(pl.String) == column for wide in (pl.Int64, pl.UInt64)]
    return column.is_null() | pl.any_horizontal(text.fill_null(False) for text in printed)


def _parsed(column: pl.Expr, wide: type[pl.Int64 | pl.UInt64]) -> pl.Expr:
    return column.cast(wide, strict=False).reinterpret(signed=True)


def _hashed(texts: pl.Series) -> pl.Series:
    """The id of each text; each distinct one is hashed once. Polars' own hash may change from version to version."""
    distinct = texts.drop_nulls().unique()
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in distinct)
    ids = pl.Series([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=pl.Int64)
    return texts.replace_strict(distinct, ids, default=None, return_dtype=pl.Int64)


def transformed(x: pl.Expr, transform: NumericTransform) -> pl.Expr:
    """The part of a numeric transform that needs no parameters."""
    if transform in ("log", "log_standard"):
        return x.sign() * x.abs().log1p()
    if transform == "log_squared":
        return pl.when(x > 2).then(x.clip(lower_bound=2).log().pow(2)).otherwise(x)
    return x


def fitted_number(feature: Numeric, dtype: pl.DataType) -> pl.Expr:
    """The number as a model sees it, in float64."""
    parameters = feature.parameters
    assert parameters is not None
    x = transformed(number(feature.name, dtype), feature.transform)
    if feature.transform in ("standard", "log_standard"):
        x = (x - parameters["mean"]) / parameters["sd"]
    elif feature.transform == "minmax":
        x = (x - parameters["min"]) / ((parameters["max"] - parameters["min"]) or 1.0)
    return x.fill_null(parameters["fill"])


def _may_overflow(feature: Numeric) -> bool:
    """Whether a number that fits into 32 bits may not do so after the fitted transform."""
    parameters, largest = feature.parameters or {}, FLOAT32_MAX
    if feature.transform == "log_standard":
        largest = math.log1p(largest)
    center = abs(parameters.get("mean", 0.0)) + abs(parameters.get("min", 0.0))
    scale = parameters.get("sd", parameters.get("max", 0.0) - parameters.get("min", 0.0)) or 1.0
    return bool(parameters) and (largest + center) / scale > FLOAT32_MAX


def label(name: str, dtype: pl.DataType, positive: str | None) -> pl.Expr:
    """The label as float64, null where it is missing; with `positive`, 1 where the cell has that text."""
    if positive is None:
        return number(name, dtype)
    is_positive = _scalar_text(pl.col(name), dtype) == positive
    return pl.when(~_is_missing(name, dtype)).then(is_positive.cast(pl.Float64))


def check_columns(raw: RawTable, schema: Schema, *, with_labels: bool) -> None:
    """Refuse a table in which a column is missing or has a type that cannot be what the schema says.

    Raises:
        SchemaError: as said.
    """
    dtypes = raw.dtypes
    extra = [schema.weight, schema.group] if with_labels else []
    needed = [feature.name for feature in schema.features] + [*(schema.labels if with_labels else ())]
    needed += [name for name in extra if name is not None]
    missing = [name for name in dict.fromkeys(needed) if name not in dtypes]
    if missing:
        raise SchemaError(f"{raw.name}: columns {missing} are missing, it has {shortened(list(dtypes))}{_hint(raw)}")
    for name in needed[len(schema.features) :]:
        if name is not None and not is_cell(dtypes[name]):
            raise SchemaError(f"{raw.name}: column {name!r} has type {dtypes[name]}, expected text or numbers: cast it")
    for feature in schema.features:
        dtype = dtypes[feature.name]
        scalar = is_cell(dtype)
        if isinstance(feature, RawId):
            fits = dtype in (pl.String, pl.Null) or (dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128))
            wanted = "integers of up to 64 bits, or text,"
        elif isinstance(feature, Categorical | Numeric):
            fits = scalar and not (isinstance(feature, Numeric) and dtype.is_temporal())
            wanted = "a number" if isinstance(feature, Numeric) else "text or integer"
        else:
            fits = scalar or (isinstance(dtype, pl.List | pl.Array) and is_cell(_inner(dtype)))
            wanted = f"text with values separated by {feature.separator!r}, or a list"
        if not fits:
            raise SchemaError(
                f"{raw.name}: column {feature.name!r} has type {dtype}, expected {wanted} for a {kind_of(feature)} "
                "feature: cast the column, or change the feature's kind"
            )


def _inner(dtype: pl.DataType) -> pl.DataType:
    inner = dtype.inner if isinstance(dtype, pl.List | pl.Array) else dtype
    assert isinstance(inner, pl.DataType)
    return inner


def shortened(names: list[str], most: int = 20) -> str:
    """A list of names that fits into a message."""
    return str(names) if len(names) <= most else f"{names[:most]} and {len(names) - most} more"


def _hint(raw: RawTable) -> str:
    if len(raw.dtypes) > 1 or not raw.parsed:  # only text has a separator
        return ": name columns that it has, or mend the data"
    return ": there is only one, so the separator is probably another; say separator=... (--separator)"


@dataclass(frozen=True, eq=False)
class Check:
    """A verdict on every row: `bad` is true where `column` does not hold what is `expected`.

    `retyped`: a single bad row means that the whole column is of another type, so the row cannot just be skipped.
    `missing`: it is about cells without value, which say nothing about the column's type.
    """

    column: str
    bad: pl.Expr
    reason: str
    expected: str
    retyped: bool = False
    missing: bool = False


def checks(
    schema: Schema,
    dtypes: Mapping[str, pl.DataType],
    *,
    with_labels: bool,
    missing_labels: Literal["raise", "mask"] = "raise",
    label_positive: Mapping[str, str] | None = None,
) -> list[Check]:
    """What every row must satisfy, column by column."""
    found = []
    for feature in schema.features:
        name, dtype = feature.name, dtypes[feature.name]
        if isinstance(feature, Numeric) or (isinstance(feature, Categorical) and feature.bucket):
            if not (dtype.is_integer() or dtype == pl.Boolean):
                # NaN counts as missing; text that is no number has become null, other than the cell itself.
                value = pl.col(name).cast(pl.Float64, strict=False).fill_nan(0.0)
                bad = (value.abs() > FLOAT32_MAX).fill_null(pl.col(name).is_not_null())
                expected = "a finite number that fits into 32 bits, or nothing"
                found.append(Check(name, bad, "not a finite number", expected))
            if isinstance(feature, Numeric) and _may_overflow(feature):
                bad = (fitted_number(feature, dtype).abs() > FLOAT32_MAX).fill_null(False)
                expected = f"a number that fits into 32 bits after the transform {feature.transform!r}"
                found.append(Check(name, bad, TOO_LARGE, expected))
        elif dtype.is_float() or dtype.is_decimal():
            found.append(_integral(name, pl.col(name), dtype))
        elif isinstance(dtype, pl.List | pl.Array) and (_inner(dtype).is_float() or _inner(dtype).is_decimal()):
            values = pl.col(name).arr.to_list() if isinstance(dtype, pl.Array) else pl.col(name)
            bad = values.list.eval(_not_integral(pl.element(), _inner(dtype))).list.any()
            found.append(Check(name, bad.fill_null(False), "", "lists of integers or text", retyped=True))
        elif isinstance(feature, MultiValued | Sequence) and dtype == pl.String:
            bad = (_is_json(pl.col(name)) & _json_lists(pl.col(name)).is_null()).fill_null(False)
            expected = (
                'a JSON list of texts (in double quotes) and whole numbers, such as ["a", "b"] or [1, 2], as it begins '
                "with [ and ends with ]"
            )
            found.append(Check(name, bad, "not a JSON list", expected))
    if not with_labels:
        return found
    for name in schema.labels:
        positive = (label_positive or {}).get(name)
        value = label(name, dtypes[name], positive)
        missing = _is_missing(name, dtypes[name])
        if missing_labels == "raise":
            found.append(
                Check(
                    name,
                    missing,
                    "label is missing",
                    '0 or 1 (or keep such rows with missing_labels="mask", --missing-labels mask)',
                    missing=True,
                )
            )
        if positive is None:
            bad = ~missing & ~value.is_in([0.0, 1.0]).fill_null(False)
            hint = (
                f'0 or 1: map text with label_positive={{"{name}": "TEXT"}} (--positive "{name}=TEXT"), '
                "or make a column of 0 and 1 (such as rating > 3)"
            )
            found.append(Check(name, bad, "label is not 0 or 1", hint))
    if schema.weight is not None:
        weight = number(schema.weight, dtypes[schema.weight])
        bad = ~((weight >= 0) & (weight <= FLOAT32_MAX)).fill_null(False)
        found.append(Check(schema.weight, bad, "weight is not a number >= 0", "a finite weight, 0 or more"))
    if schema.group is not None:
        missing = _is_missing(schema.group, dtypes[schema.group])
        found.append(Check(schema.group, missing, "group is missing", "a group in every row", missing=True))
        if dtypes[schema.group].is_float() or dtypes[schema.group].is_decimal():
            found.append(_integral(schema.group, pl.col(schema.group), dtypes[schema.group]))
    return found


def _is_missing(name: str, dtype: pl.DataType) -> pl.Expr:
    missing = pl.col(name).is_null()
    if dtype == pl.String:
        return missing | (pl.col(name).str.to_lowercase() == "nan").fill_null(False)
    return missing | pl.col(name).is_nan().fill_null(False) if dtype.is_float() else missing


def _not_integral(x: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    if dtype.is_decimal():
        return x.cast(pl.String).str.contains(r"\.\d*[1-9]").fill_null(False)
    return (x.is_infinite() | (x.is_not_nan() & ((x != x.floor()) | (x.abs() >= 2**63)))).fill_null(False)


def _integral(name: str, column: pl.Expr, dtype: pl.DataType) -> Check:
    came = "decimals" if dtype.is_decimal() else "floats"
    expected = f"text or integers (it came as {came}, which must be whole numbers): cast it, or declare it Numeric"
    return Check(name, _not_integral(column, dtype), "", expected, retyped=True)


def without_bad_rows(raw: RawTable, found: list[Check], on_bad_row: OnBadRow) -> RawTable:
    """The table without the rows that fail a check; they are counted in `raw.skipped`, once each.

    Raises:
        DataError: a row fails and `on_bad_row` is "raise"; the message says which, and what its cell holds.
        SchemaError: a column has come in another type.
    """
    if not found:
        return raw
    wanted = {str(i): Total(check.column, check.bad, _sum) for i, check in enumerate(found)}
    totals = raw.totals(wanted)
    failed = {check: total for check, total in zip(found, totals.sum().row(0)) if total}
    for check, total in failed.items():
        retyped = check.retyped
        if total > 1 and not retyped and not check.missing:
            # If no cell is as expected, it is the column that is wrong and not the row.
            retyped = not holds(raw, ~check.bad & pl.col(check.column).is_not_null())
        if retyped or on_bad_row == "raise":
            row, value = raw.first(check.bad, check.column)
            others = ", and no other row is better" if retyped and not check.retyped else ""
            message = f"{raw.place(row)}, column {check.column!r} holds {value!r}{others}; expected {check.expected}"
            raise SchemaError(message) if retyped else DataError(message)
    if not failed:
        return raw
    verdict = pl.coalesce(pl.when(check.bad).then(i) for i, check in enumerate(failed)).alias("verdict")
    unfit = raw.gather(lambda piece: piece.select(ROW, verdict).drop_nulls("verdict"))
    for i, count in unfit.group_by("verdict").len().sort("verdict").iter_rows():
        check = list(failed)[i]
        raw.skipped[f"{check.column}: {check.reason}"] += count
    raw.unfit = unfit[ROW].to_numpy().astype(np.int64)
    return raw.only(~pl.any_horizontal(check.bad for check in failed))


def _sum(bad: pl.Expr, rows: pl.Expr) -> pl.Expr:
    return (bad.cast(pl.Int64) * rows).sum()


def holds(raw: RawTable, condition: pl.Expr) -> bool:
    """Whether a condition is true of any row."""
    return bool(raw.gather(lambda piece: piece.select(holds=condition.any()))["holds"].any())
