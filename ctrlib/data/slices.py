"""Rows told apart by the values of a column."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

MOST = 20  # values that are told apart, those in most rows
NUM_PARTS = 10  # of numbers
MISSING, OTHERS = "(missing)", "(others)"


def slices_of(values: pl.Series) -> tuple[list[str], npt.NDArray[np.integer[Any]]]:
    """Names of slices, and the slice of each row.

    A slice is a value: the twenty in most rows, then "(others)" and "(missing)". Numbers of more values are cut into
    ten parts of about as many rows instead, ascending.

    >>> slices_of(pl.Series(["b", "a", None, "b"]))
    (['b', 'a', '(missing)'], array([0, 1, 2, 0], dtype=int8))
    """
    present = values.drop_nulls()
    if values.dtype.is_float():
        present = present.drop_nans()
    if values.dtype.is_numeric() and present.n_unique() > MOST:
        return _parts(values, present)
    texts = values.cast(pl.String)
    counts = present.cast(pl.String).rename("value").value_counts().sort(["count", "value"], descending=[True, False])
    chosen = counts["value"][:MOST].to_list()
    names = [*chosen, *([OTHERS] if len(counts) > MOST else []), *([MISSING] if len(present) < len(values) else [])]
    place = {name: number for number, name in enumerate(chosen)}
    if values.dtype.is_float():
        texts = texts.replace("NaN", None)
    # One by one in Python, ten million rows would take longer than all their metrics.
    codes = texts.replace_strict(place, default=MOST, return_dtype=pl.Int8) if chosen else texts.is_null().cast(pl.Int8)
    last = len(names) - 1
    found = pl.select(pl.when(texts.is_null()).then(pl.lit(last, pl.Int8)).otherwise(codes)).to_series()
    return names, found.to_numpy()


def _parts(values: pl.Series, present: pl.Series) -> tuple[list[str], npt.NDArray[np.integer[Any]]]:
    numbers = values.cast(pl.Float64).fill_null(math.nan).to_numpy()
    edges = np.unique(np.quantile(present.cast(pl.Float64).to_numpy(), np.linspace(0, 1, NUM_PARTS + 1)))
    codes = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    names = [f"{low:.6g} to {high:.6g}" for low, high in itertools.pairwise(edges)]
    gone = np.isnan(numbers)
    if gone.any():
        codes[gone] = len(names)
        names.append(MISSING)
    return names, codes
