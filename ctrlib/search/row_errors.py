"""How far the rows of a compressed model are from those of the model that it was made of."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.model import Model
from ctrlib.schema import PADDING_ID
from ctrlib.sharding.plan import tables_of
from ctrlib.structure import unstack

CHUNK = 1 << 16  # rows of a table that are decoded at a time


class RowErrors(NamedTuple):
    """Of all rows of all tables, |e' - e| / |e|: the `largest`, and `overall`, root of sum |e' - e|^2 over sum |e|^2.

    e is a row of the original and e' what the compressed model reads in its place, both as vectors. The row that pads,
    which nothing reads, and rows of zeros are left out of both.
    """

    largest: float
    overall: float


def row_errors(model: Model, smaller: Model) -> RowErrors:
    """Compare what all ids read, table by table; the first-order part's weights are rows of one number.

    Both models are on the CPU, and stay as they are.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.search.floors import rounded_rows
    >>> from ctrlib.search.plan import materialise
    >>> from ctrlib.testing import example_schema
    >>> model = models.mlp(Inputs(example_schema(), embedding_dim=4), hidden=(8,))
    >>> [row_errors(model, materialise(model, rounded_rows(model, bits))).largest < 0.2 for bits in (16, 2)]
    [True, False]
    """
    if smaller is model:
        return RowErrors(0.0, 0.0)
    model, smaller = _unstacked(model), _unstacked(smaller)
    largest = difference = total = 0.0
    for path in dict.fromkeys(path for path, _, _ in tables_of(model).values()):
        before, after = model.get_submodule(path), smaller.get_submodule(path)
        for full, small in zip(read_rows(before, before), read_rows(before, after)):
            norms, errors = full.norm(dim=1), (small - full).norm(dim=1)
            errors = errors[norms > 0]
            norms = norms[norms > 0]
            if len(norms):
                largest = max(largest, float((errors / norms).max()))
            difference += float(errors.square().sum())
            total += float(norms.square().sum())
    return RowErrors(largest, (difference / total) ** 0.5 if total else 0.0)


def _unstacked(model: Model) -> Model:
    """The same with a table for each vocabulary, sharing all other weights."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    unstack(model)
    return model


@torch.no_grad()
def read_rows(like: nn.Module, part: nn.Module) -> Iterator[Tensor]:
    """The rows of each table of a collection, without the one that pads, as `part` reads them: (rows, D), in chunks.

    `like` is the collection that says which tables there are; `part` is it, or what took its place.
    """
    configs = [config for _, _, config in tables_of(like).values()]
    owners = {name: config for config in configs for name in config.feature_names}
    was_training = part.training
    part.eval()
    for start in range(PADDING_ID + 1, max(config.num_embeddings for config in configs), CHUNK):
        stop = min(start + CHUNK, max(config.num_embeddings for config in configs))
        every = torch.arange(start, stop)
        ids = [every.clamp(max=config.num_embeddings - 1) for config in owners.values()]
        lengths = torch.ones(len(owners) * len(every), dtype=torch.int64)
        found = part(KeyedJaggedTensor(list(owners), torch.cat(ids), lengths=lengths, stride=len(every)))
        by_name = found if isinstance(found, dict) else found.to_dict()
        for config in configs:
            rows = by_name[config.feature_names[0]]
            rows = rows if isinstance(rows, Tensor) else rows.values()
            yield rows[: max(0, config.num_embeddings - start)].double()
    part.train(was_training)
