"""Tables that a search looks through: rows weighted by gates, and columns masked; and what becomes of them after it.

A gate belongs to a value of a vocabulary, not to a row of one table: what is pruned is gone from every table that has
it, the first-order weights among them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.narrow import Kept, NarrowTable, NarrowTables
from ctrlib.errors import ArgumentError
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS, OOV_ID, Schema, vocabulary_of
from ctrlib.search.plan import Plan
from ctrlib.structure import put, unstack


class GatedTables(nn.Module):
    """e_f = sum_j m(x_fj) E_f[x_fj] over the bag x_f, or its mean over all its ids, with a gate m(v) for every value v.

    Takes the place of the tables for a search: `gates` is a module that gives the gates of a vocabulary, (rows,), when
    it is called with its name; the exact engine gives its parameters no L2. All rows are weighted at every step, which
    costs as much as the tables are large, as dense Adam does.

    Shape: KeyedJaggedTensor -> KeyedTensor, the keys and widths of `tables`.

    >>> class Half(nn.Module):
    ...     def forward(self, vocabulary):
    ...         return torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0])
    >>> config = EmbeddingBagConfig(name="item", num_embeddings=5, embedding_dim=2, feature_names=["item"])
    >>> tables = EmbeddingBagCollection(tables=[config])
    >>> gated = GatedTables(tables, Half(), vocabularies={"item": "item"})
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 4]), torch.tensor([1, 1]))
    >>> bool((gated(kjt).values()[0] == tables(kjt).values()[0] / 2).all()), gated(kjt).values()[1].tolist()
    (True, [0.0, 0.0])
    """

    def __init__(self, tables: EmbeddingBagCollection, gates: nn.Module, *, vocabularies: Mapping[str, str]) -> None:
        super().__init__()
        self.tables, self.gates = tables, gates
        self.vocabularies = vocabularies_of(tables, vocabularies)

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        gated = {
            f"embedding_bags.{name}.weight": self.tables.embedding_bags[name].weight * self.gates(vocabulary)[:, None]
            for name, vocabulary in self.vocabularies.items()
        }
        pooled: KeyedTensor = functional_call(self.tables, gated, (kjt,))
        return pooled


def vocabularies_of(tables: EmbeddingBagCollection, vocabularies: Mapping[str, str]) -> dict[str, str]:
    """Name of each table -> its vocabulary, from that of each feature."""
    return {config.name: vocabularies[config.feature_names[0]] for config in tables.embedding_bag_configs()}


def with_own_tables(model: Model, schema: Schema) -> tuple[Model, dict[str, EmbeddingBagCollection], dict[str, str]]:
    """A copy of the model with a table per vocabulary, its collections of tables by path, and feature -> vocabulary.

    Those of the embedding come first. Histories that attention reads one by one (EmbeddingCollection) stay as they are.

    Raises:
        ValueError: the model has no such tables, or some in which a value has no row of its own.
    """
    model = copy.deepcopy(model)
    unstack(model)
    collections = {path: part for path, part in model.named_modules() if isinstance(part, EmbeddingBagCollection)}
    if not collections:
        raise ArgumentError("the model has no tables to search in: they are compressed already, or for sequences only")
    vocabularies = {feature.name: vocabulary_of(feature) for feature in schema.sparse}
    rows = {feature.name: feature.num_embeddings for feature in schema.sparse}
    for path, part in collections.items():
        for config in part.embedding_bag_configs():
            if any(rows.get(name) != config.num_embeddings for name in config.feature_names):
                raise ArgumentError(
                    f"{path} has no table of its own for each vocabulary ({config.name} has {config.num_embeddings} "
                    f"rows for {config.feature_names}): search in a model with a row for each id, without tables=..."
                )
    first = sorted(collections, key=lambda path: path.startswith("wide"))
    return model, {path: collections[path] for path in first}, vocabularies


def put_gates(
    model: Model, collections: Mapping[str, EmbeddingBagCollection], gates: nn.Module, vocabularies: Mapping[str, str]
) -> None:
    """Look all tables up through the gates from now on, in place."""
    for path, tables in collections.items():
        put(model, path, GatedTables(tables, gates, vocabularies=vocabularies))


def start_rows(weights: Iterable[Tensor]) -> None:
    """Fill tables with U(-b, b), b^2 = 6 / (N + D), N rows in all, as the papers do, in place.

    From rows near 0, where ctrlib's towers otherwise begin, a search would begin with what it is told to prune: rows
    below a threshold that moves, or gates that only the penalty pulls at.
    """
    weights = list(weights)
    bound = (6 / (sum(map(len, weights)) + weights[0].shape[1])) ** 0.5
    for weight in weights:
        nn.init.uniform_(weight, -bound, bound)


def without_gates(model: Model) -> Model:
    """A copy of a gated model with its tables as they are."""
    model = copy.deepcopy(model)
    for path, part in list(model.named_modules()):
        if isinstance(part, GatedTables):
            put(model, path, part.tables)
    return model


def rows_by_vocabulary(
    collections: Iterable[EmbeddingBagCollection], vocabularies: Mapping[str, str]
) -> dict[str, int]:
    """Vocabulary -> its rows, in the order of the tables."""
    configs = [config for tables in collections for config in tables.embedding_bag_configs()]
    return {vocabularies[config.feature_names[0]]: config.num_embeddings for config in configs}


def prune(
    model: Model,
    schema: Schema,
    kept: Mapping[str, Tensor],
    *,
    method: str,
    dropped_to: int = OOV_ID,
    dims: Mapping[str, int] | None = None,
    factor: float = 1.0,
    summary: dict[str, Any] | None = None,
) -> Plan:
    """The plan of tables with the rows that are kept, taken from the model.

    Args:
        model: gives the rows.
        schema: of its features.
        kept: which values of each vocabulary stay, (rows,) of bool; the reserved ids always do.
        method: name of what decided.
        dropped_to: what all other values read: the row of OOV_ID, or PADDING_ID for the zero vector.
        dims: vocabulary -> the first so many columns, in the embedding's first tables; the others are zero.
        factor: of the rows, but for those of the reserved ids.
        summary: the plan's.
    """
    model, collections, vocabularies = with_own_tables(model, schema)
    replaced: dict[str, dict[str, Any]] = {}
    weights: dict[str, Tensor] = {}
    for place, (path, part) in enumerate(collections.items()):
        configs, names = part.embedding_bag_configs(), vocabularies_of(part, vocabularies)
        tables, ids = [], {}
        for config in configs:
            ids[config.name] = kept_ids(kept[names[config.name]])
            dim = dims[names[config.name]] if dims and place == 0 else config.embedding_dim
            tables.append(_narrow(config, ids[config.name], dim, dropped_to))
        narrow = NarrowTables(
            tables,
            embedding_dim=configs[0].embedding_dim,
            names=[name for config in configs for name in config.feature_names],
        )
        for config, table in zip(configs, tables):
            full = part.embedding_bags[config.name].weight.detach().clone()
            full[NUM_RESERVED_IDS:] *= factor
            narrow.fill(table.name, full, kept=ids[config.name] if table.kept == "some" else None)
        replaced[path] = {"kind": "narrow", **narrow.describe()}
        weights |= {f"{path}.{name}": tensor for name, tensor in narrow.state_dict().items()}
    return Plan(method, replaced, weights, {**explain(kept, schema), **(summary or {})})


def kept_ids(kept: Tensor) -> Tensor:
    """Ids that stay, ascending, the reserved ones among them.

    >>> kept_ids(torch.tensor([False, False, False, True, False, True])).tolist()
    [0, 1, 2, 3, 5]
    """
    return torch.cat([torch.arange(NUM_RESERVED_IDS), NUM_RESERVED_IDS + kept[NUM_RESERVED_IDS:].nonzero()[:, 0]])


def with_other_weights(plan: Plan, model: Model) -> Plan:
    """The plan that also sets all weights of the parts which it does not replace, as they are in the model."""
    others = {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{path}.") for path in plan.replaced)
    }
    return dataclasses.replace(plan, weights={**others, **plan.weights})


def explain(kept: Mapping[str, Tensor], schema: Schema) -> dict[str, Any]:
    """The part of a summary that says how many values each field keeps, and of how many: "kept" and "words".

    >>> from ctrlib.testing import example_schema
    >>> rows = {name: members[0].num_embeddings for name, members in example_schema().vocabularies.items()}
    >>> kept = {name: torch.arange(count) < 13 for name, count in rows.items()}
    >>> summary = explain(kept, example_schema())
    >>> summary["kept"]["item"], summary["words"][0]
    ([10, 27], '27 of 51 values are kept (53%).')
    """
    counts: dict[str, list[int]] = {}
    for vocabulary, features in schema.vocabularies.items():
        if vocabulary in kept:
            values = kept[vocabulary][NUM_RESERVED_IDS:]
            counts |= {feature.name: [int(values.sum()), len(values)] for feature in features}
    # Features that share a vocabulary have one entry.
    different = {name: counts[name] for name, *_ in _names(schema) if name in counts}
    stay, all_of_them = (sum(numbers) for numbers in zip(*different.values()))
    words = [f"{stay:,} of {all_of_them:,} values are kept ({stay / max(1, all_of_them):.0%})."]
    whole = [name for name, (some, every) in different.items() if some == every]
    gone = [name for name, (some, _) in different.items() if not some]
    if whole:
        words.append(f"Every value matters: {', '.join(whole)}.")
    if gone:
        words.append(f"No value does, so that the field is always zero: {', '.join(gone)}.")
    least = sorted((some / every, name) for name, (some, every) in different.items() if 0 < some < every)
    if least:
        words.append("In between: " + ", ".join(f"{name} {share:.0%}" for share, name in least) + ".")
    return {"kept": counts, "words": words}


def _names(schema: Schema) -> list[list[str]]:
    """The features of each vocabulary."""
    return [[feature.name for feature in features] for features in schema.vocabularies.values()]


def _narrow(config: EmbeddingBagConfig, ids: Tensor, dim: int, dropped_to: int) -> NarrowTable:
    """The cheapest way to store these rows."""
    form: Kept = "all" if len(ids) == config.num_embeddings else "first" if ids[-1] == len(ids) - 1 else "some"
    return NarrowTable(
        config.name,
        tuple(config.feature_names),
        rows=config.num_embeddings,
        rank=dim,
        pooling="mean" if config.pooling == PoolingType.MEAN else "sum",
        kept=form,
        num_kept=None if form == "all" else len(ids),
        dropped_to=dropped_to,
        centred=False,
        padded=dim < config.embedding_dim,
    )
