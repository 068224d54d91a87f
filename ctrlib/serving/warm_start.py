"""Go on from a trained model on newer data, whose vocabularies have grown: rows follow their values, not their ids."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import nn

from ctrlib.data.vocabulary import vocabulary_path
from ctrlib.embeddings.table import by_vocabulary, num_rows
from ctrlib.schema import NUM_RESERVED_IDS, Numeric, Schema, SchemaError, vocabulary_of
from ctrlib.serving.predictor import Predictor
from ctrlib.sharding.plan import tables_of


@dataclass(frozen=True)
class Carried:
    """Of one vocabulary: values whose rows were carried over, values that are new, and values that are gone."""

    carried: int
    new: int
    gone: int


def warm_start(model: nn.Module, data: str | Path, trained: str | Path) -> dict[str, Carried]:
    """Fill `model`, just built for the prepared folder `data`, from the model folder `trained`.

    An id means another value in every preparation, so each row of a table is taken from the row of the *same value* in
    the trained model; the three reserved ids are carried over too. Values that are new keep their initial rows, and so
    do vocabularies that are new. Everything else (towers, heads, numeric vectors) is copied. Optimisers start anew.
    Memory: both models at once.

    Returns, for each vocabulary of the new data, what was carried over.

    Raises:
        SchemaError: `trained` is not a model folder, or its weights do not fit: another architecture, or other fields.
    """
    predictor = Predictor.load(trained)
    old_schema, new_schema = predictor.schema, Schema.load(Path(data))
    state, old_state = model.state_dict(), predictor.model.state_dict()
    tables, old_tables = tables_of(model), tables_of(predictor.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tables}
    old_shapes = {name: tuple(tensor.shape) for name, tensor in old_state.items() if name not in old_tables}
    # Of the tables, those of one collection are alike; which vocabulary is in which of them is another matter.
    shapes |= {path: (config.embedding_dim,) for path, _, config in tables.values()}
    old_shapes |= {path: (config.embedding_dim,) for path, _, config in old_tables.values()}
    odd = sorted(name for name in {**shapes, **old_shapes} if shapes.get(name) != old_shapes.get(name))
    if odd:
        raise SchemaError(
            f"the model in {trained} does not fit the new one: {odd} are on one side only, or of another shape. Build "
            "the same architecture with the same fields; only vocabularies may differ"
        )
    report: dict[str, Carried] = {}
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in tables:
                tensor.copy_(old_state[name])
        old_places = _places(predictor.model, old_schema)
        for place, (name, first) in _places(model, new_schema).items():
            vocabulary = place[1]
            known = place in old_places
            new_ids, old_ids, report[vocabulary] = _matches(vocabulary, Path(data), Path(trained), known)
            if known:
                old_name, old_first = old_places[place]
                state[name][new_ids + first] = old_state[old_name][old_ids + old_first]
    return report


def _places(model: nn.Module, schema: Schema) -> dict[tuple[str, str], tuple[str, int]]:
    """(Path of a collection of tables, vocabulary) -> the name of the weight that holds its rows, and their first.

    A vocabulary that grows may move to another stack, so the weight's name does not say which vocabularies it holds.
    """
    places: dict[tuple[str, str], tuple[str, int]] = {}
    for name, (path, _, config) in tables_of(model).items():
        features = [schema[feature] for feature in config.feature_names]
        first = 0
        for members in by_vocabulary([feature for feature in features if not isinstance(feature, Numeric)]):
            places[path, vocabulary_of(members[0])] = (name, first)
            first += num_rows(members)
    return places


def _matches(vocabulary: str, data: Path, trained: Path, known: bool) -> tuple[torch.Tensor, torch.Tensor, Carried]:
    """The ids of the values in both vocabularies, in the new one and in the old one."""
    new = pl.scan_parquet(vocabulary_path(data / "vocab", vocabulary), glob=False).select("value", "id")
    num_new = new.select(pl.len()).collect().item()
    if not known:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing, Carried(0, num_new, 0)
    old = pl.scan_parquet(vocabulary_path(trained / "vocab", vocabulary), glob=False).select("value", "id")
    both = new.join(old, on="value", suffix="_old").select("id", "id_old").collect()
    reserved = torch.arange(NUM_RESERVED_IDS)
    carried = Carried(len(both), num_new - len(both), old.select(pl.len()).collect().item() - len(both))
    new_ids, old_ids = (torch.cat([reserved, both[column].cast(pl.Int64).to_torch()]) for column in ("id", "id_old"))
    return new_ids, old_ids, carried
