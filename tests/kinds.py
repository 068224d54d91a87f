"""The table of kinds: raw types of cells, single and in lists, and the texts of their ids."""

from __future__ import annotations

import datetime
from decimal import Decimal

import polars as pl

from ctrlib.schema import Categorical, Feature, MultiValued, Sequence

MOMENT = datetime.datetime(2024, 3, 5, 8, 15, 30, 250_000)
TEXT = ["b", "a", "c"]
MIDNIGHT, MORNING = datetime.datetime(2024, 3, 10), datetime.datetime(2024, 1, 1, 10)
DECIMALS = [Decimal("5.00"), Decimal("100.00"), Decimal("-7.00")]
DATES = [datetime.date(2024, 3, 5), datetime.date(1969, 12, 31), datetime.date(2024, 10, 10)]
TIMES = ["2024-03-05 08:15:30.25", "2024-03-10", "2024-01-01 10:00:00"]
IN_PARIS = pl.Series([MOMENT, MIDNIGHT, MOMENT], dtype=pl.Datetime("us")).dt.replace_time_zone("Europe/Paris")
# Raw type -> three cells of it, and the texts of their ids.
KINDS: dict[str, tuple[pl.Series, list[str]]] = {
    "int8": (pl.Series([3, -1, 2], dtype=pl.Int8), ["3", "-1", "2"]),
    "int64": (pl.Series([2**62, 0, -(2**62)]), [str(2**62), "0", str(-(2**62))]),
    "uint64": (pl.Series([2**63 + 5, 1, 2], dtype=pl.UInt64), [str(2**63 + 5), "1", "2"]),
    "float32": (pl.Series([3.0, -1.0, 16_777_216.0], dtype=pl.Float32), ["3", "-1", "16777216"]),
    "float64": (pl.Series([3.0, -0.0, 2.0**53]), ["3", "0", str(2**53)]),
    "decimal": (pl.Series(DECIMALS, dtype=pl.Decimal(18, 2)), ["5", "100", "-7"]),
    "boolean": (pl.Series([True, False, True]), ["true", "false", "true"]),
    "text": (pl.Series(["x", "Y", "é"]), ["x", "Y", "é"]),
    "text with blanks": (pl.Series([" b", "c ", "\td"]), ["b", "c", "d"]),
    "text with zeros": (pl.Series(["02139", "2139", "0"]), ["02139", "2139", "0"]),
    "text like floats": (pl.Series(["1.0", "1", "1.5"]), ["1.0", "1", "1.5"]),
    "categorical": (pl.Series(TEXT, dtype=pl.Categorical), TEXT),
    "categorical with blanks": (pl.Series([" b", "a", "c"], dtype=pl.Categorical), TEXT),
    "enum": (pl.Series(TEXT, dtype=pl.Enum(["a", "b", "c"])), TEXT),
    "date": (pl.Series(DATES), [str(date) for date in DATES]),
    "datetime in ms": (pl.Series([MOMENT, MIDNIGHT, MORNING], dtype=pl.Datetime("ms")), TIMES),
    "datetime in us": (pl.Series([MOMENT, MIDNIGHT, MORNING], dtype=pl.Datetime("us")), TIMES),
    "datetime in ns": (pl.Series([MOMENT, MIDNIGHT, MORNING], dtype=pl.Datetime("ns")), TIMES),
    "datetime with zone": (IN_PARIS, ["2024-03-05 07:15:30.25", "2024-03-09 23:00:00", "2024-03-05 07:15:30.25"]),
    "null": (pl.Series([None, None, None]), []),
}
WAYS = ("one", "bag", "history", "fixed bag")


def column_of(way: str, values: pl.Series) -> pl.Series:
    """A cell for each value; in lists with an empty one and a missing event beside it, where there can be."""
    if way == "one":
        return values
    lists = values.reshape((-1, 1))
    return lists if way == "fixed bag" else lists.arr.to_list()


def feature_of(way: str, name: str) -> Feature:
    return {"one": Categorical, "history": Sequence}.get(way, MultiValued)(name)
