"""Split one table into train, valid and test: at random by row, within each class of a label too, or by time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import polars as pl

from ctrlib.data.cells import label
from ctrlib.data.table import ROW, RawTable
from ctrlib.data.times import times_of
from ctrlib.errors import check_type
from ctrlib.schema import SchemaError

SPLITS = ("train", "valid", "test")


def row_hash(row: pl.Expr, seed: int) -> pl.Expr:
    """A uniform uint64 for every row number: SplitMix64, spelled out because polars' own hash changes over versions.

    >>> pl.select(row_hash(pl.int_range(2), seed=0)).to_series().to_list()
    [16294208416658607535, 7960286522194355700]
    """

    def u64(value: int) -> pl.Expr:
        return pl.lit(value % 2**64, pl.UInt64)

    # Integers wrap around at 2^64; // by a power of two is a shift to the right.
    z = (row.cast(pl.UInt64) + u64(seed * 0xD1342543DE82EF95 + 1)) * u64(0x9E3779B97F4A7C15)
    z = (z ^ (z // u64(2**30))) * u64(0xBF58476D1CE4E5B9)
    z = (z ^ (z // u64(2**27))) * u64(0x94D049BB133111EB)
    return z ^ (z // u64(2**31))


def split_table(
    raw: RawTable,
    ratio: Sequence[float],
    *,
    split_by: str | None,
    seed: int,
    stratify: str | None = None,
    positive: str | None = None,
) -> dict[str, pl.Expr]:
    """Split name -> which rows belong to it; a split with ratio 0 is left out.

    With `split_by` the oldest rows train and the newest test; rows of the same time stay together, so fractions are
    only as fine as the times are. With `stratify`, a label, each split gets its share of the rows of each class, and of
    those without one, to the row; `positive` is the text of the positive class.

    Raises:
        SchemaError: the ratio makes no sense, or `split_by` or `stratify` is no column.
        DataError: `split_by` holds what is neither number nor date.
    """
    check_ratio(ratio)
    total = float(sum(ratio))
    bounds = [0.0, ratio[0] / total, (ratio[0] + ratio[1]) / total, 1.0]
    if stratify is not None:
        if stratify not in (dtypes := raw.dtypes):
            raise SchemaError(f"{raw.name}: stratify names column {stratify!r}, expected one of {list(dtypes)}")
        return _stratified(raw, bounds, ratio, label(stratify, dtypes[stratify], positive), seed)
    if split_by is None:
        position = row_hash(pl.col(ROW), seed)
        edges: list[float] = [int(bound * 2**64) for bound in bounds]
    else:
        position = times_of(raw, split_by, "split_by", "by which to split").value
        times = raw.map(lambda piece: piece.select(position.alias("time")))
        edges = [float("-inf"), *(_quantile(times, bound) for bound in bounds[1:3]), float("inf")]
    parts: dict[str, pl.Expr] = {}
    for name, low, high, share in zip(SPLITS, edges, edges[1:], ratio):
        if share > 0:
            parts[name] = _between(position, low, high, by_hash=split_by is None)
    return parts


def check_ratio(ratio: Sequence[float]) -> None:
    """Refuse what are no sizes of train, valid and test.

    Raises:
        WrongTypeError, SchemaError: as said.
    """
    expected = "three numbers (train, valid, test) such as (8, 1, 1)"
    check_type(expected, Sequence, split=ratio)
    for size in ratio:
        check_type(f"{expected}: each of them a number", Real, split=size)
    if len(ratio) != 3 or min(ratio) < 0 or ratio[0] <= 0 or not sum(ratio) < float("inf"):
        raise SchemaError(f"split is {ratio}, expected {expected}")


def _stratified(
    raw: RawTable, bounds: Sequence[float], ratio: Sequence[float], value: pl.Expr, seed: int
) -> dict[str, pl.Expr]:
    """The random split, cut anew in each class: the rows of a class are ordered by their hash."""
    # As a float, which is what quantiles are found of; hashes that agree in their first 53 bits are rare enough.
    position = row_hash(pl.col(ROW), seed).cast(pl.Float64)
    class_of = pl.when(value == 0).then(0).when(value == 1).then(1).otherwise(2)  # 2: without label, or a bad row
    parts: dict[str, pl.Expr] = {}
    for number in range(3):
        member = class_of == number
        times = raw.map(lambda piece, member=member: piece.filter(member).select(position.alias("time")))  # type: ignore[misc]
        if not times.count_rows():
            continue
        edges = [float("-inf"), *(_quantile(times, bound) for bound in bounds[1:3]), float("inf")]
        for name, low, high, share in zip(SPLITS, edges, edges[1:], ratio):
            if share > 0:
                rows = member & _between(position, low, high, by_hash=False)
                parts[name] = parts[name] | rows if name in parts else rows
    return parts


def _between(position: pl.Expr, low: float, high: float, *, by_hash: bool) -> pl.Expr:
    if not by_hash:
        return (position > low) & (position <= high)  # a quantile itself belongs to the older side
    above = position >= pl.lit(low, pl.UInt64)
    return above if high >= 2**64 else above & (position < pl.lit(high, pl.UInt64))


_NUM_BINS = 1 << 16


def _quantile(times: RawTable, share: float) -> float:
    """The smallest time up to which there are at least `share` of the rows.

    Found by histograms that narrow down, so that memory does not grow with the rows.
    """
    low, high, num_rows = times.gather(lambda piece: piece.select(_RANGE)).select(_MERGED).row(0)
    # Rounded: 0.8 + 0.1 of 10 rows shall be 9, not 9.000000000000002.
    wanted, before = round(share * num_rows, 6), 0
    while low < high:
        bins = _histogram(times, low, high)
        counted = before + bins["rows"].cum_sum()
        chosen = int((counted >= wanted).arg_max() or 0)
        before = int(counted[chosen] - bins["rows"][chosen])
        low, high = bins["low"][chosen], bins["high"][chosen]
    return float(low)


_RANGE = [pl.col("time").min().alias("low"), pl.col("time").max().alias("high"), pl.len().cast(pl.Int64).alias("rows")]
_MERGED = [pl.col("low").min(), pl.col("high").max(), pl.col("rows").sum()]


def _histogram(times: RawTable, low: float, high: float) -> pl.DataFrame:
    """Rows, least and greatest time of each bin, in order; two bins or more, since low < high."""
    time, width = pl.col("time"), high - low
    per_bin = _NUM_BINS / width
    if math.isfinite(width) and math.isfinite(per_bin):
        number = ((time - low) * per_bin).floor().clip(0, _NUM_BINS - 1)
    else:  # too far apart to be subtracted, or too near to be divided by: two halves
        number = time > min(low / 2 + high / 2, math.nextafter(high, low))
    found = times.gather(lambda piece: piece.filter(time.is_between(low, high)).group_by(bin=number).agg(_RANGE))
    return found.group_by("bin").agg(_MERGED).sort("bin")
