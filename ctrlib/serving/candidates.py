"""One context, many candidates: a request of a ranker, encoded once for what all its rows have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrlib.data.columns import Columns, Ragged
from ctrlib.data.encoder import Encoder
from ctrlib.data.scan import DataError
from ctrlib.data.table import as_frame
from ctrlib.errors import ArgumentError, WrongTypeError, check_type, shown
from ctrlib.schema import SchemaError


def joined(encoder: Encoder, context: Mapping[str, Any], items: Any) -> Columns:
    """The rows of a context with each of its candidates, encoded.

    Args:
        encoder: of the model.
        context: the cells that all rows share, such as those of the user, the time and the page.
        items: the other cells of each candidate: a frame, or a list of dictionaries.

    Raises:
        SchemaError: a column is in both, or in neither.
        DataError: there is no candidate, or a cell is damaged.
    """
    check_type("a dictionary of cells", Mapping, context=context)
    # Dictionaries stay as they are: to make a frame of them takes longer than to encode some thousand cells.
    as_rows = isinstance(items, list | tuple)
    if as_rows and (wrong := [row for row in items if not isinstance(row, Mapping)]):
        raise WrongTypeError(f"items: a row is {shown(wrong[0])}, expected a dictionary of cells")
    rows = items if as_rows else as_frame(items, "items")
    size, there = len(rows), {name for row in rows for name in row} if as_rows else set(rows.columns)
    if not size:
        raise DataError("items has no rows: expected at least one candidate")
    of_items = [name for name in encoder.inputs if name in there]
    if both := [name for name in of_items if name in context]:
        raise SchemaError(f"columns {both} are in the context and in the items: leave them out of one of the two")
    if lacking := [name for name in encoder.inputs if name not in context and name not in there]:
        raise SchemaError(f"columns {lacking} are neither in the context nor in the items: the model reads them")
    if encoder.has_past:  # which depends on context and candidate together
        past = {name: cell for name, cell in context.items() if name in encoder.inputs}
        if as_rows:
            return encoder.transform([{**row, **past} for row in items], name="items")[0]
        whole = rows.with_columns(pl.lit(pl.Series([cell])).first().alias(name) for name, cell in past.items())
        return encoder.transform(whole, name="items")[0]
    of_context = [name for name in encoder.inputs if name in context]
    parts: list[tuple[Columns, Encoder, npt.NDArray[np.int64]]] = []
    for names, given, place in (
        (of_items, rows if as_rows else rows.select(of_items), np.arange(size)),
        (of_context, {name: context[name] for name in of_context}, np.zeros(size, np.int64)),
    ):
        if names:
            part = encoder.only(names)
            parts.append((part.transform(given, name="items" if names is of_items else "context")[0], part, place))
    return _side_by_side(encoder, parts, size)


def _side_by_side(
    encoder: Encoder, parts: Sequence[tuple[Columns, Encoder, npt.NDArray[np.int64]]], size: int
) -> Columns:
    """The features of several encodings in the schema's order; `place`: which row of an encoding each row takes."""
    schema = encoder.schema
    singles: dict[str, npt.NDArray[Any]] = {}
    ragged: dict[str, Ragged] = {}
    numbers: dict[str, npt.NDArray[np.float32]] = {}
    for columns, part, place in parts:
        singles |= {name: columns.ids[place, at] for at, name in enumerate(part.single_names)}
        numbers |= {feature.name: columns.floats[place, at] for at, feature in enumerate(part.schema.dense)}
        ragged |= {name: lists.take(place) for name, lists in columns.ragged.items()}
    ids = [singles[name] for name in encoder.single_names]
    floats = encoder.empty_floats(size)
    for at, feature in enumerate(schema.dense):
        floats[:, at] = numbers[feature.name]
    return Columns(
        np.stack(ids, axis=1) if ids else np.empty((size, 0), np.int32),
        {feature.name: ragged[feature.name] for feature in schema.sparse if feature.name in ragged},
        floats,
        np.zeros(size, np.int64) if schema.group is not None else None,
    )


def best(scores: npt.NDArray[np.float64], k: int | None) -> npt.NDArray[np.int64]:
    """Places of the k largest scores, largest first; of equal ones the first.

    >>> best(np.array([0.2, 0.5, 0.5, 0.1]), 3).tolist()
    [1, 2, 0]
    """
    if k is not None and k < 1:
        raise ArgumentError(f"k={k}: expected 1 or more, or None for all")
    found: npt.NDArray[np.int64] = np.argsort(-scores, kind="stable")[:k]
    return found


def ranked(probabilities: pl.DataFrame, by: str, k: int | None) -> pl.DataFrame:
    """The rows with the largest probabilities of `by`, and before them `row`, their place.

    >>> ranked(pl.DataFrame({"click": [0.2, 0.5, 0.3]}), "click", 2).to_dict(as_series=False)
    {'row': [1, 2], 'click': [0.5, 0.3]}
    """
    chosen = best(probabilities[by].to_numpy(), k)
    return pl.DataFrame({"row": chosen}).hstack(probabilities[chosen])
