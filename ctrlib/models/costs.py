"""What a published model costs beside its tables: weights of the network, and multiply-adds per row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.batch import Batch
from ctrlib.models.build import build
from ctrlib.models.table import MODELS
from ctrlib.schema import NUM_RESERVED_IDS, Categorical, Feature, Schema, Sequence

NUM_FIELDS = 10
NUM_EVENTS = 20  # of each row's history
NUM_ROWS = 64  # in the batch that is counted; what is done once for all rows is shared by so many


@dataclass(frozen=True)
class Costs:
    """Weights of tower, head and encoders of histories, and multiply-adds per row of a forward pass.

    The multiply-adds are those of matrix products and attention. Products by elements (the whole of `fm`) are not
    counted, nor are look-ups.
    """

    network_parameters: int
    multiply_adds: int


def usual_schema(name: str) -> Schema:
    """Features to compare a model on: 10 categorical ones, and if the model reads histories one of 20 events.

    A model of several labels gets 2.

    >>> [len(usual_schema(name).features) for name in ("dcnv2", "din", "mmoe", "dtrn")]
    [10, 11, 10, 11]
    >>> usual_schema("mmoe").labels
    ('label_0', 'label_1')
    """
    features: tuple[Feature, ...] = tuple(Categorical(f"feature_{n}", num_embeddings=100) for n in range(NUM_FIELDS))
    labels = tuple(f"label_{n}" for n in range(2 if MODELS[name].kind == "multitask" else 1))
    history = Sequence("history", vocabulary="feature_0", max_length=NUM_EVENTS, num_embeddings=100)
    try:
        build({"model": name}, Schema(features, labels))
    except ValueError:  # a model that reads histories says so where there are none
        features += (history,)
    return Schema(features, labels)


def costs(name: str, *, schema: Schema | None = None, embedding_dim: int = 16) -> Costs:
    """The costs of a model with the arguments of its paper.

    Args:
        name: one of `MODELS`.
        schema: a fitted schema; by default that of `usual_schema`. Histories are as long as they may be.
        embedding_dim: width of the fields.

    >>> costs("mlp")  # (160 * 400 + 400 * 400 + 400 * 400 + 400) products, and a bias for each unit and the logit
    Costs(network_parameters=385601, multiply_adds=384400)
    """
    schema = schema or usual_schema(name)
    model = build({"model": name, "embedding_dim": embedding_dim}, schema).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(_batch(schema))
    # The counter says 2 for a multiplication and an addition.
    return Costs(model.num_parameters()["network"], round(counter.get_total_flops() / 2 / NUM_ROWS))


def _batch(schema: Schema) -> Batch:
    """Rows of the first value of every feature."""
    lengths = torch.tensor([getattr(feature, "max_length", 1) for feature in schema.sparse])
    lengths = lengths.repeat_interleave(NUM_ROWS)
    values = torch.full((int(lengths.sum()),), NUM_RESERVED_IDS)
    return Batch(
        KeyedJaggedTensor.from_lengths_sync([feature.name for feature in schema.sparse], values, lengths),
        torch.zeros(NUM_ROWS, len(schema.dense)),
        torch.zeros(NUM_ROWS, len(schema.labels)),
        torch.ones(NUM_ROWS),
    )
