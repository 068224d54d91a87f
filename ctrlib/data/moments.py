"""Mean and standard deviation of columns, the same to the last bit whatever the order in which rows are added up.

A sum of floats depends, in its last digits, on which thread adds what first: prepared twice, the same data would have
two means, and so be two data sets. Here the numbers are rounded to a grid of more than 2^46 equal steps between the
smallest and the largest, and the sums are of integers. A step is a power of two, so whole numbers, and others with few
binary digits after the point, are on the grid unless their range is huge, and their mean is exact. Of others the mean
is off by less than 2^-46 of the range, the rounding of doubles by 2^-53 of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import polars as pl

from ctrlib.data.table import RawTable, Total

# Exponent of the smallest difference that counts: polars divides by multiplying, and what is smaller than 2^-1022 has
# no reciprocal. Numbers that differ by less are one to a model, which computes in 32 bits.
SMALLEST = -1000


class Moments(NamedTuple):
    """Of the numbers of a column; the standard deviation divides by their number."""

    mean: float
    sd: float
    low: float
    high: float


def moments(table: RawTable, columns: Mapping[str, pl.Expr]) -> dict[str, Moments]:
    """Column -> moments of what an expression makes of its cells, finite float64; all zero where that is nulls only.

    >>> table = RawTable((pl.LazyFrame({"x": [1.0, None, 2.0]}), pl.LazyFrame({"x": [6.0]})), "demo")
    >>> moments(table, {"x": pl.col("x")})["x"]
    Moments(mean=3.0, sd=2.160246899469287, low=1.0, high=6.0)
    """
    bounds = table.totals(
        {f"{name} low": Total(name, x, lambda x, _: x.min()) for name, x in columns.items()}
        | {f"{name} high": Total(name, x, lambda x, _: x.max()) for name, x in columns.items()}
    )
    low, high = bounds.min().row(0, named=True), bounds.max().row(0, named=True)
    ranges: dict[str, tuple[float, float]] = {
        name: (low[f"{name} low"], high[f"{name} high"]) for name in columns if low[f"{name} low"] is not None
    }
    sums = {}
    for name, (lowest_value, highest_value) in ranges.items():
        step = _step(lowest_value, highest_value)
        place = ((columns[name] - lowest_value) / step).round().cast(pl.Int128)
        sums[f"{name} sum"] = Total(name, place, lambda place, rows: (place * rows).sum())
        sums[f"{name} squares"] = Total(name, place, lambda place, rows: (place * place * rows).sum())
        sums[f"{name} count"] = Total(name, place, lambda _, rows: rows.sum().cast(pl.Int128))
    totals = table.totals(sums) if sums else pl.DataFrame()
    found = dict.fromkeys(columns, Moments(0.0, 0.0, 0.0, 0.0))
    for name, (lowest_value, highest_value) in ranges.items():
        step = _step(lowest_value, highest_value)
        total, squares, count = (_integer_sum(totals[f"{name} {what}"]) for what in ("sum", "squares", "count"))
        mean = float(Fraction(lowest_value) + Fraction(step) * total / count)
        sd = math.sqrt(Fraction(count * squares - total**2, count**2)) * step
        found[name] = Moments(mean, sd, lowest_value, highest_value)
    return found


def _integer_sum(values: pl.Series) -> int:
    items: list[Any] = values.to_list()  # Python's integers have no end
    return sum(items)


def _step(low: float, high: float) -> float:
    """The power of two that fits 2^46 times, and less than 2^47 times, between two numbers.

    So squares add up to less than 2^127 over 2^33 rows of a piece.

    >>> _step(0.0, 2.0**46), _step(0.0, 1.0) == 2.0**-46
    (1.0, True)
    """
    return 2.0 ** max(math.frexp(high - low)[1] - 47, SMALLEST) if high > low else 1.0
