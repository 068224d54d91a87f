"""Rows that come as Python objects: to a frame, every cell taken as it is, and from a frame to cells."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from ctrlib.data.quick import Careful
from ctrlib.data.scan import DataError
from ctrlib.errors import WrongTypeError, shown


def cells_of(column: pl.Series) -> list[Any]:
    """The cells of a column in Python; `Careful` is raised where they are not of usual types."""
    dtype = column.dtype
    inner = dtype.inner if isinstance(dtype, pl.List) else dtype
    usual = (pl.String, pl.Boolean, pl.Null)
    whole = (pl.Categorical, pl.Enum, pl.Float64)  # a float32's digits are not those of a float64
    if not (inner.is_integer() or inner in usual or dtype in whole):
        raise Careful
    return column.to_list()


def frame_of(rows: Sequence[Mapping[str, Any]], name: str) -> pl.DataFrame:
    """Rows as a frame, every cell taken as it is.

    Raises:
        DataError: there is no row, or a column holds cells of several types.
        WrongTypeError: a row is no dictionary.
    """
    if not rows:
        raise DataError(f"{name} has no rows: expected at least one")
    if wrong := [row for row in rows if not isinstance(row, Mapping)]:
        raise WrongTypeError(f"{name}: a row is a {type(wrong[0]).__name__}, expected a dictionary of cells")
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = {}
    for key in names:
        cells = [row.get(key) for row in rows]
        try:
            columns[key] = pl.Series(key, _of_one_kind(cells), strict=True)
        except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
            several = f"column {key!r} holds cells of several types"
            present = [(row, cell) for row, cell in enumerate(cells, 1) if cell is not None]
            others = [one for one in present if type(one[1]) is not type(present[0][1])]
            if not others:  # what is in lists differs, or one cell fits nowhere
                raise DataError(f"{name}: {several} ({str(error).splitlines()[0]}): give all one type") from error
            (row, cell), (first, before) = others[0], present[0]
            raise DataError(
                f"{name}: {several}, {shown(cell)} in row {row} and {shown(before)} in row {first}: give all one type"
            ) from error
    return pl.DataFrame(columns)


def _of_one_kind(cells: list[Any]) -> list[Any]:
    """The cells as polars may take them; in a list it would read 1.5 as 1 beside whole numbers, and true as 1.

    >>> _of_one_kind([1, None, 1.5]), _of_one_kind([[1, 2], [2.5]])
    ([1.0, None, 1.5], [[1.0, 2.0], [2.5]])
    """
    kinds = {type(cell) for cell in cells}
    if list in kinds:
        kinds |= {type(one) for cell in cells if type(cell) is list for one in cell}
    if bool in kinds and kinds & {int, float}:
        raise WrongTypeError("true or false beside numbers")
    if not {int, float} <= kinds:
        return cells

    def as_float(cell: Any) -> Any:
        if type(cell) is list:
            return [as_float(one) for one in cell]
        return float(cell) if type(cell) is int and abs(cell) <= 2**53 else cell  # others would be other ids

    return [as_float(cell) for cell in cells]


def columns_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Sequence[Any]]:
    """Column -> its cells in all rows, without a step of Python for each cell.

    Raises:
        KeyError: a row has no such column.

    >>> columns_of([{"a": 1, "b": "x"}, {"b": "y", "a": 2}], ["b", "a"])
    {'b': ('x', 'y'), 'a': (1, 2)}
    """
    if len(names) == 1:
        return {names[0]: [row[names[0]] for row in rows]}
    return dict(zip(names, zip(*map(operator.itemgetter(*names), rows))))
