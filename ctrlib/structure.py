"""What of a published model was replaced by smaller parts, as plain data, so that a model folder can say it.

A compressed model is a published model in which some modules have given way to others: tables to packed or narrow ones,
linear layers to pairs of thin ones. `restructure` does that to a freshly built model, before its weights are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from ctrlib.embeddings.blocks import BlockTables
from ctrlib.embeddings.crosses import CrossTables
from ctrlib.embeddings.narrow import NarrowTables
from ctrlib.embeddings.packed import PackedTables
from ctrlib.embeddings.small_events import NarrowEvents, PackedEvents
from ctrlib.errors import ArgumentError
from ctrlib.layers import LowRankLinear
from ctrlib.model import Model

# Kind -> what makes the module from its description, which its `describe` gives.
KINDS: dict[str, type[nn.Module]] = {
    "packed": PackedTables,
    "packed_events": PackedEvents,
    "narrow": NarrowTables,
    "narrow_events": NarrowEvents,
    "blocks": BlockTables,
    "crosses": CrossTables,
    "low_rank_linear": LowRankLinear,
}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The parts of a model that are not the published model's: path -> {"kind": ..., **arguments}, outer ones first."""
    kinds = {made: kind for kind, made in KINDS.items()}
    return {
        path: {"kind": kinds[type(part)], **part.describe()}
        for path, part in model.named_modules()
        if type(part) in kinds
    }


def restructure(model: Model, replaced: Mapping[str, Mapping[str, Any]]) -> Model:
    """Put new modules, without their weights, in the places of others: path -> {"kind": ..., **arguments}.

    Raises:
        ValueError: the model has no such place, or there is no such kind.
    """
    for path, description in replaced.items():
        arguments = dict(description)
        kind = arguments.pop("kind", None)
        if kind not in KINDS:
            raise ArgumentError(f"{path} is replaced by unknown kind {kind!r}, expected one of {sorted(KINDS)}")
        put(model, path, KINDS[kind](**arguments))
    return model


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at `path`. What stands in the place of stacked tables gets ids as they are in the batch.

    Raises:
        ValueError: the model has no such place.
    """
    parent_path, _, name = path.rpartition(".")
    try:
        parent = model.get_submodule(parent_path)
        getattr(parent, name)
    except AttributeError as error:
        raise ArgumentError(f"the model has no part {path!r} to replace") from error
    setattr(parent, name, module)
    if getattr(parent, "first_rows", None) is not None:
        parent.first_rows = None  # type: ignore[assignment]


def with_plain_tables(model: Model, what: str) -> tuple[Model, EmbeddingBagCollection]:
    """A copy of a model with a table per vocabulary, and these tables.

    Raises:
        ValueError: its embedding has no plain tables; `what` says who needs some.
    """
    model = copy.deepcopy(model)
    unstack(model.embedding)
    tables = getattr(model.embedding, "tables", None)
    if not isinstance(tables, EmbeddingBagCollection):
        raise ArgumentError(
            f"{what} the plain tables of a TableEmbedding, and {type(model.embedding).__name__} has "
            f"{type(tables).__name__} there: build the model with pooled sequences and without other tables"
        )
    return model, tables


def unstack(model: nn.Module) -> None:
    """Give every vocabulary in stacked tables a table of its own, with the same weights, in place."""
    for path, parent in list(model.named_modules()):
        first_rows = getattr(parent, "first_rows", None)
        stacked = getattr(parent, "tables", None)
        if first_rows is None or not isinstance(stacked, EmbeddingBagCollection):
            continue
        configs, weights = [], []
        for config in stacked.embedding_bag_configs():
            starts = sorted({first_rows[name] for name in config.feature_names})
            for start, stop in zip(starts, [*starts[1:], config.num_embeddings]):
                names = [name for name in config.feature_names if first_rows[name] == start]
                configs.append(
                    EmbeddingBagConfig(
                        name=f"{config.name}_{names[0]}".replace(".", "%2E"),
                        num_embeddings=stop - start,
                        embedding_dim=config.embedding_dim,
                        feature_names=names,
                        pooling=config.pooling,
                    )
                )
                weights.append(stacked.embedding_bags[config.name].weight[start:stop])
        tables = EmbeddingBagCollection(tables=configs)
        with torch.no_grad():
            for config, weight in zip(configs, weights):
                tables.embedding_bags[config.name].weight.copy_(weight)
        put(model, f"{path}.tables" if path else "tables", tables)


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Path of each module -> its class, and those of its public attributes that are plain data.

    >>> attributes(nn.Dropout(0.5))
    {'': {'class': 'torch.nn.modules.dropout.Dropout', 'p': 0.5, 'inplace': False}}
    """
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        kind = type(module)
        found[path] = {"class": f"{kind.__module__}.{kind.__qualname__}"}
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and _is_plain(value):
                found[path][name] = value
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(each) for name, each in value.items())
    return value is None or isinstance(value, bool | int | float | str)
