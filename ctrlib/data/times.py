"""Columns of times: numbers, or dates in any usual form, as numbers that can be compared."""

from __future__ import annotations

from typing import NamedTuple

import polars as pl

from ctrlib.data.scan import DataError
from ctrlib.data.table import RawTable, is_cell
from ctrlib.schema import SchemaError

MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3}  # in each unit of polars' times
_A_DAY = 86_400e6  # microseconds


class Times(NamedTuple):
    """The times of a column: `value`, in float64, and whether they are dates, which are in microseconds since 1970."""

    value: pl.Expr
    are_dates: bool


def times_of(raw: RawTable, name: str, said: str, why: str) -> Times:
    """What the times of a column are; the form of text is that which most cells have.

    Args:
        raw: the rows.
        name: the column.
        said: the argument that names it, for messages.
        why: what times are needed for, likewise.

    Raises:
        SchemaError: there is no such column, or it has a type that is no time.
        DataError: a cell is no time, or empty; or there are times of two units.

    >>> table = RawTable((pl.LazyFrame({"at": ["1970-01-02 00:00:01", "1970/01/02T12:30:00"]}),), "demo")
    >>> times = times_of(table, "at", "time", "")
    >>> table.frame.collect().select(times.value)["at"].to_list(), times.are_dates
    ([86401000000.0, 131400000000.0], True)
    """
    dtypes = raw.dtypes
    if name not in dtypes:
        raise SchemaError(f"{raw.name}: {said} names column {name!r}, expected one of {list(dtypes)}")
    column, dtype = pl.col(name), dtypes[name]
    if not is_cell(dtype) and dtype != pl.Duration:
        raise SchemaError(f"{raw.name}: {said} names column {name!r} of type {dtype}, expected numbers or times")
    candidates = [column.cast(pl.Float64, strict=False)]
    if dtype.is_temporal():
        unit = _A_DAY if dtype == pl.Date else MICROSECONDS.get(getattr(dtype, "time_unit", None) or "ns", 1.0)
        candidates = [column.to_physical().cast(pl.Float64) * unit]
    bad = [(~candidate.is_finite()).fill_null(True) for candidate in candidates]
    num_bad = _totals(raw, bad)
    if dtype == pl.String and num_bad[0]:  # which forms of dates take long to find out
        candidates += _written(column)
        bad = [(~candidate.is_finite()).fill_null(True) for candidate in candidates]
        num_bad = _totals(raw, bad)
    best = min(range(len(candidates)), key=lambda i: num_bad[i])
    if num_bad[best]:
        row, value = raw.first(bad[best], name)
        raise DataError(
            f"{raw.place(row)}, column {name!r} holds {value!r}; expected a number or a date such as 2024-05-31 or "
            f"2024-05-31 12:00:00 (with or without a zone, in the whole column), {why}"
        )
    are_dates = best > 0 or dtype.is_temporal()
    if not are_dates:
        _refuse_two_units(raw, name, candidates[0])
    return Times(candidates[best], are_dates)


def _totals(raw: RawTable, bad: list[pl.Expr]) -> list[int]:
    totals = raw.gather(lambda piece: piece.select(is_bad.sum().alias(str(i)) for i, is_bad in enumerate(bad)))
    return list(totals.sum().row(0))


def _written(column: pl.Expr) -> list[pl.Expr]:
    """What text may mean."""
    candidates = []
    written = column.str.replace("/", "-", literal=True, n=2).str.replace(r"^(\d+-\d+-\d+)[tT]", "$1 ")
    for form, zone in _ZONES.items():
        written = written.str.replace(form, zone)
    for form in _FORMS:
        candidates.append(written.str.to_datetime(form, strict=False).dt.epoch("us").cast(pl.Float64))
        zoned = written.str.to_datetime(f"{form}%:z", strict=False, time_zone="UTC")
        candidates.append(zoned.dt.epoch("us").cast(pl.Float64))
    return candidates


def _refuse_two_units(raw: RawTable, name: str, time: pl.Expr) -> None:
    """Seconds and milliseconds since 1970 in one column: in its order, all rows in seconds would come first."""
    bounds = raw.gather(lambda piece: piece.select(low=time.min(), high=time.max()))
    if 1e8 <= bounds["low"].min() < 1e10 and bounds["high"].max() >= 1e11:  # type: ignore[operator]
        row, value = raw.first(time >= 1e11, name)
        small, other = raw.first(time < 1e10, name)
        raise DataError(
            f"{raw.place(row)}, column {name!r} holds {value!r}, {raw.place(small)} holds {other!r}: times of two "
            "units, such as milliseconds and seconds; write the whole column in one"
        )


_FORMS = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")  # with a blank for T, and - for /
# How zones are written -> as +00:00. A date may end like an offset of hours, so that needs a time before it.
_ZONES = {
    r"\s*(?:[zZ]|UTC|GMT)$": "+00:00",
    r"(:\d\d(?:\.\d+)?)\s*([+-]\d\d)$": "$1$2:00",
    r"\s+([+-]\d\d:?\d\d)$": "$1",
}
