"""Go on from a trained model on newer data, whose vocabularies have grown: rows follow their values, not their ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import nn

from ctrlib.data.vocabulary import vocabulary_path
from ctrlib.embeddings.numeric import Bucketised, PiecewiseLinear
from ctrlib.embeddings.table import by_vocabulary, num_rows
from ctrlib.errors import check_path, check_type
from ctrlib.manifest import check_file, load_schema
from ctrlib.schema import (
    NUM_RESERVED_IDS,
    OOV_ID,
    Numeric,
    Schema,
    SchemaError,
    kind_of,
    vocabulary_of,
)
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

    An id may mean another value in every preparation, so each row of a table is taken from the row of the *same value*
    in the trained model; the three reserved ids are carried over too. A value that is new gets a copy of the row that
    it has read up to now, that of the out-of-vocabulary id. Everything else (towers, heads, numeric vectors) is copied.
    So every row scores as it did with the trained model, to the last bit, unless one of its values is gone: was known
    to the trained model and is not in the new vocabulary. In data that was prepared with `like=` no value is.

    Vocabularies that are new keep their initial rows. Optimisers start anew. Memory: both models at once.

    Returns, for each vocabulary of the new data, what was carried over.

    Raises:
        SchemaError: `trained` is not a model folder; features or labels are other ones, or have other arguments;
            numbers are scaled otherwise, or cut at other edges; ids are other ones, and the model's tables have no row
            for each value; or weights do not fit, as those of another architecture.
    """
    check_type("a torch module, as ctr.models.build makes it", nn.Module, model=model)
    check_path("a prepared folder", data=data)
    predictor = Predictor.load(trained)
    old_schema, new_schema = predictor.schema, load_schema(data)
    _check_features(old_schema, new_schema, Path(data), Path(trained))
    _check_edges(predictor.model, model, Path(data), Path(trained))
    by_value = _has_rows_by_value(old_schema, new_schema, Path(data), Path(trained))
    state, old_state = model.state_dict(), predictor.model.state_dict()
    tables, old_tables = (tables_of(model), tables_of(predictor.model)) if by_value else ({}, {})
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
        if not by_value:
            return {name: _matches(name, Path(data), Path(trained), True)[1] for name in new_schema.vocabularies}
        old_places = _places(predictor.model, old_schema)
        for place, (name, first) in _places(model, new_schema).items():
            known = place in old_places
            rows, report[place[1]] = _matches(place[1], Path(data), Path(trained), known)
            if known:
                old_name, old_first = old_places[place]
                state[name][first : first + len(rows)] = old_state[old_name][rows + old_first]
    return report


def _check_features(old: Schema, new: Schema, data: Path, trained: Path) -> None:
    """Refuse other features and labels, and those of which the same row is something else."""
    fields, old_fields = ([(feature.name, kind_of(feature)) for feature in s.features] for s in (new, old))
    for what, mine, theirs in (
        ("features", fields, old_fields),
        ("labels", list(new.labels), list(old.labels)),
    ):
        if mine != theirs:
            raise SchemaError(
                f"{data} has the {what} {mine}, the model in {trained} {theirs}: expected the same, in order"
            )
    for before, after in zip(old.features, new.features):
        for name in ("transform", "parameters", "bucket", "form", "pooling", "max_length", "padding"):
            was, now = getattr(before, name, None), getattr(after, name, None)
            if was != now:
                raise SchemaError(
                    f"{name} of {before.name!r} is {now!r} in {data}, and {was!r} for the model in {trained}, so that "
                    f"rows would score otherwise: prepare the data with like={str(trained)!r} (--like {trained})"
                )


def _check_edges(old: nn.Module, new: nn.Module, data: Path, trained: Path) -> None:
    """Refuse bins of numbers that are not what they were."""
    modules = dict(new.named_modules())
    for name, part in old.named_modules():
        other = modules.get(name)
        if not isinstance(part, Bucketised | PiecewiseLinear) or not isinstance(other, type(part)):
            continue
        edges = dict(other.named_buffers())
        if any(not torch.equal(edge, edges[key]) for key, edge in part.named_buffers()):
            raise SchemaError(
                f"the bins of numbers ({name}) have other edges than those of the model in {trained}, so that rows "
                f"would score otherwise: prepare {data} with like={str(trained)!r} (--like {trained}), and take as "
                "many bins"
            )


def _has_rows_by_value(old: Schema, new: Schema, data: Path, trained: Path) -> bool:
    """Whether each value has a row of its own in the tables of the model that is saved; else ids must be the same."""
    config = json.loads((trained / "model.json").read_text(encoding="utf-8"))
    other = [name for name in ("tables", "replaced") if config.get(name)]
    if other and new.vocabulary_hashes != old.vocabulary_hashes:
        raise SchemaError(
            f"the tables of the model in {trained} have no row for each value ({', '.join(other)} in model.json), so "
            f"ids must be the same, and those in {data} are not: prepare the data with like={str(trained)!r} (--like "
            f"{trained}), and do not extend it"
        )
    return not other


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


def _matches(vocabulary: str, data: Path, trained: Path, known: bool) -> tuple[torch.Tensor, Carried]:
    """For each id of the new vocabulary the old one whose row it takes: (rows,)."""
    name = vocabulary_path(Path("vocab"), vocabulary).as_posix()
    check_file(data, name)
    new = pl.scan_parquet(data / name, glob=False).select("value", "id")
    num_new = new.select(pl.len()).collect().item()
    rows = torch.full((num_new + NUM_RESERVED_IDS,), OOV_ID)
    if not known:
        return rows, Carried(0, num_new, 0)
    check_file(trained, name)
    old = pl.scan_parquet(trained / name, glob=False).select("value", "id")
    both = new.join(old, on="value", suffix="_old").select(pl.col("id", "id_old").cast(pl.Int64)).collect()
    rows[:NUM_RESERVED_IDS] = torch.arange(NUM_RESERVED_IDS)
    rows[both["id"].to_torch()] = both["id_old"].to_torch()
    return rows, Carried(len(both), num_new - len(both), old.select(pl.len()).collect().item() - len(both))
