"""Decoders of low-rank tables multiplied into the layer that reads them: narrower fields, the same function."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ctrlib.embeddings.narrow import NarrowTables
from ctrlib.embeddings.numeric import ValueTimesVector
from ctrlib.embeddings.table import TableEmbedding
from ctrlib.errors import ArgumentError
from ctrlib.layers import LowRankLinear
from ctrlib.model import Model
from ctrlib.schema import Categorical, Schema
from ctrlib.towers.mlp import MLP


def fold_decoders(model: Model, schema: Schema) -> Model:
    """The same function with the decoders inside the first layer: fields are R wide, not D, and decode to nothing.

    W_1 y + b_1 with y_f = s_f U_f + mu_f is sum_f (W_1f U_f^T) s_f + (b_1 + sum_f W_1f mu_f), and a number's term
    W_1f v_f x_f the first column of its field. Exact where an `MLP` alone reads the fields, all tables have one rank,
    and a mean is added once: for one id a row. The model stays as it is, and nothing is shared.

    Raises:
        ValueError: one of this does not hold; the message says which, and what would help.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.search.mimicking import apply_low_rank, low_rank
    >>> from ctrlib.search.ranks import Goal
    >>> from ctrlib.testing import example_batch
    >>> schema = Schema((Categorical("user", num_embeddings=50), Categorical("item", num_embeddings=90)), ("click",))
    >>> model = models.mlp(Inputs(schema, embedding_dim=16), hidden=(8,))
    >>> batch = example_batch(schema, 20)
    >>> small = apply_low_rank(model, low_rank(model, schema, [batch], tables=Goal(rank=4)))
    >>> folded = fold_decoders(small, schema)
    >>> folded.tower.in_shape, bool(torch.allclose(folded(batch), small(batch), atol=1e-5))
    ((2, 4), True)
    """
    embedding, tower = model.embedding, model.tower
    lookup = embedding.tables if isinstance(embedding, TableEmbedding) else None
    if not isinstance(embedding, TableEmbedding) or not isinstance(lookup, NarrowTables) or not isinstance(tower, MLP):
        raise ArgumentError(
            "fold_decoders needs an MLP that alone reads the fields of a TableEmbedding of NarrowTables, got "
            f"{type(tower).__name__}, {type(embedding).__name__} and {type(lookup).__name__}: others need the decoded "
            "fields"
        )
    ranks = sorted({table.rank for table in lookup.stored.values()})
    if len(ranks) > 1 or ranks[0] == lookup.embedding_dim:
        raise ArgumentError(
            f"fold_decoders needs tables of one rank below {lookup.embedding_dim}, got ranks {ranks}: plan with "
            "Goal(rank=...)"
        )
    numeric = embedding.numeric
    if numeric is not None and not isinstance(numeric, ValueTimesVector):
        raise ArgumentError(
            f"fold knows numeric fields of ValueTimesVector only, got {type(numeric).__name__}: keep the decoders"
        )
    single = {feature.name for feature in schema.features if isinstance(feature, Categorical)}
    uncertain = [
        table.feature_names
        for table in lookup.stored.values()
        if table.centred and (lookup.is_weighted or table.drops_to_zero or not single.issuperset(table.feature_names))
    ]
    if uncertain:
        raise ArgumentError(
            f"features {uncertain} may have no id, or several, and add their mean as often, which no bias does: plan "
            "with centred=False"
        )
    (rank,) = ranks
    small = copy.deepcopy(embedding, {id(lookup): lookup})
    small.out_shape = (embedding.out_shape[0], rank)
    small.tables = NarrowTables(
        list(lookup.stored.values()), embedding_dim=rank, names=lookup.names, is_weighted=lookup.is_weighted
    )
    is_decoder = ("decoders.", "means.")
    small.tables.load_state_dict(
        {name: tensor for name, tensor in lookup.state_dict().items() if not name.startswith(is_decoder)}
    )
    small_tower = copy.deepcopy(tower)
    small_tower.in_shape = small.out_shape
    layers: Any = small_tower.layers
    layers = layers[0] if isinstance(layers[0], LowRankLinear) else layers
    owners = {name: table.name for table in lookup.stored.values() for name in table.feature_names}
    order = [(is_numeric, n) for is_numeric, start, stop in embedding.runs for n in range(start, stop)]
    with torch.no_grad():
        weight_HFD = layers[0].weight.double().unflatten(1, embedding.out_shape)
        weight_HFR, bias = weight_HFD.new_zeros(len(weight_HFD), *small.out_shape), layers[0].bias.double()
        for field, (is_numeric, n) in enumerate(order):
            if is_numeric:
                assert numeric is not None
                weight_HFR[:, field, 0] = weight_HFD[:, field] @ numeric.vectors[n].double()
                continue
            decoder, mean = lookup.decoder(owners[embedding.names[n]])
            assert decoder is not None
            weight_HFR[:, field] = weight_HFD[:, field] @ decoder.double().T
            if mean is not None:
                bias = bias + weight_HFD[:, field] @ mean.double()
        layers[0] = nn.Linear(weight_HFR[0].numel(), len(weight_HFR))
        layers[0].weight.copy_(weight_HFR.flatten(1))
        layers[0].bias.copy_(bias)
        if numeric is not None:
            small.numeric = ValueTimesVector(len(numeric.vectors), embedding_dim=rank)
            small.numeric.vectors.copy_(torch.eye(rank)[:1].expand(len(numeric.vectors), rank))
    folded = Model(small, small_tower, copy.deepcopy(model.head), wide=copy.deepcopy(model.wide))
    return folded.to(next(model.parameters()).device).train(model.training)
