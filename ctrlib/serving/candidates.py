"""One context, many candidates: a request of a ranker, encoded once for what all its rows have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrlib._lazy import instead
from ctrlib.data.columns import Columns, Shared
from ctrlib.data.encoder import Encoder
from ctrlib.data.raw import in_files
from ctrlib.data.scan import DataError
from ctrlib.data.table import as_frame
from ctrlib.errors import ArgumentError, WrongTypeError, check_type, shown
from ctrlib.schema import Schema, SchemaError


def joined(encoder: Encoder, context: Mapping[str, Any], items: Any) -> Columns:
    """The rows of a context with each of its candidates, encoded.

    Args:
        encoder: of the model.
        context: the cells that all rows share, such as those of the user, the time and the page.
        items: the other cells of each candidate: a frame, or a list of dictionaries; or `Items`.

    Raises:
        SchemaError: a column is in both, or in neither.
        DataError: there is no candidate, or a cell is damaged.
    """
    check_type("a dictionary of cells", Mapping, context=context)
    # Dictionaries stay as they are: to make a frame of them takes longer than to encode some thousand cells.
    as_rows = isinstance(items, list | tuple)
    if as_rows and (wrong := [row for row in items if not isinstance(row, Mapping)]):
        raise WrongTypeError(f"items: a row is {shown(wrong[0])}, expected a dictionary of cells")
    known = items if isinstance(items, Items) else None
    rows = items if as_rows or known is not None else as_frame(items, "items")
    size = len(rows)
    there = set(known.names if known is not None else rows.columns if not as_rows else {n for row in rows for n in row})
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
    columns = encoder.empty(size)
    if of_items:
        part = encoder.only(of_items)
        given = rows if as_rows or known is not None else rows.select(of_items)
        found = known.columns if known is not None else part.transform(given, name="items")[0]
        _put(columns, encoder, found, part)
    if of_context:
        part = encoder.only(of_context)
        given = {name: context[name] for name in of_context}
        _put(columns, encoder, part.transform(given, name="context")[0], part)
    return _in_order(columns, encoder.schema)


def _put(columns: Columns, encoder: Encoder, found: Columns, part: Encoder) -> None:
    """Put the features of an encoding where they stand among all; those of a single row into each."""
    size = len(columns.ids)
    columns.ids[:, [encoder.single_names.index(name) for name in part.single_names]] = found.ids
    dense = [feature.name for feature in encoder.schema.dense]
    places = [dense.index(feature.name) for feature in part.schema.dense]
    columns.floats[:, places] = found.floats[:, : len(places)]
    for name, lists in found.ragged.items():
        columns.ragged[name] = lists if len(lists.offsets) == size + 1 else Shared.of(lists.values, size)


def _in_order(columns: Columns, schema: Schema) -> Columns:
    ragged = {feature.name: columns.ragged[feature.name] for feature in schema.sparse if feature.name in columns.ragged}
    return dataclasses.replace(columns, ragged=ragged)


@dataclass(frozen=True)
class Items:
    """Items that are encoded once, for rankings that name them by their keys (`Predictor.items`).

    `items[keys]` are some of them, in that order: what `Predictor.rank` takes as candidates.

    `columns`: the items as the model reads them; `names`: of their columns; `places`: key -> the item's row.
    """

    columns: Columns
    names: Sequence[str]
    places: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.columns.ids)

    def __getitem__(self, keys: Sequence[str | int]) -> Items:
        places = self.places
        try:
            rows = np.array([places[key if type(key) is str else str(key)] for key in keys], np.int64)
        except KeyError as error:
            raise DataError(f"items: there is no item of key {error.args[0]!r} among the {len(places):,}") from None
        return Items(self.columns.take(rows), self.names, places)


def read_items(encoder: Encoder, items: Any, key: str) -> Items:
    """Encode items once; arguments and errors as of `Predictor.items`."""
    if encoder.has_past:
        raise ArgumentError("histories and rates of this model depend on user and item together: rank with their rows")
    raws = list(encoder.read(items if in_files(items) else as_frame(items, "items"), name="items", keep=[key]))
    if not raws or key not in raws[0].dtypes:
        raise SchemaError(f"items: there is no column {key!r} to name them by; {instead([key], raws[0].dtypes)}")
    names = [name for name in encoder.inputs if name in raws[0].dtypes]
    if not names:
        raise SchemaError(f"items: none of the columns that the model reads is there, such as {encoder.inputs[:3]}")
    part = encoder.only(names)
    columns = Columns.concatenate([part.transform_table(raw)[0] for raw in raws])
    keys = [one for raw in raws for one in raw.frame.select(pl.col(key).cast(pl.String)).collect()[key].to_list()]
    places = {one: place for place, one in enumerate(keys)}
    if None in places:
        raise DataError(f"items: column {key!r} is empty in row {places[None] + 1}: each item needs a key")
    if len(places) < len(keys):
        twice = next(one for place, one in enumerate(keys) if places[one] != place)
        raise DataError(f"items: {twice!r} of column {key!r} is there more than once: give each item one row")
    return Items(columns, names, places)


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
