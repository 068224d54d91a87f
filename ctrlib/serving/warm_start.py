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
from ctrlib.training.plan import tables_of


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
    odd = sorted((set(state) ^ set(old_state)) - (set(tables) ^ set(old_tables)))
    odd += [
        name
        for name in state
        if name in old_state and name not in tables and state[name].shape != old_state[name].shape
    ]
    odd += [
        name
        for name in tables
        if name in old_tables and tables[name][2].embedding_dim != old_tables[name][2].embedding_dim
    ]
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
                continue
            old_rows = _first_rows(old_tables[name][2].feature_names, old_schema) if name in old_tables else {}
            for vocabulary, first in _first_rows(tables[name][2].feature_names, new_schema).items():
                new_ids, old_ids, carried = _matches(vocabulary, Path(data), Path(trained), vocabulary in old_rows)
                report[vocabulary] = carried
                if vocabulary in old_rows:
                    tensor[new_ids + first] = old_state[name][old_ids + old_rows[vocabulary]]
    return report


def _first_rows(feature_names: list[str], schema: Schema) -> dict[str, int]:
    """Vocabulary -> where its rows begin in the table that these features read: 0, unless tables are stacked."""
    features = [schema[name] for name in feature_names]
    rows, total = {}, 0
    for members in by_vocabulary([feature for feature in features if not isinstance(feature, Numeric)]):
        rows[vocabulary_of(members[0])] = total
        total += num_rows(members)
    return rows


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
