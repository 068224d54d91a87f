"""How many bytes a model takes, by what they are for: counted on the tensors themselves, not computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ctrlib.embeddings.packed import PackedTables
from ctrlib.model import Model
from ctrlib.sharding.plan import TABLES


@dataclass(frozen=True)
class Bytes:
    """Bytes of a model's tensors.

    `weights`: rows of tables, or their codes. `decoder`: what turns a stored row into a vector. `remap`: which row an
    id reads. `numeric`: vectors of numbers. `wide`: the first-order part, all of it. `network`: tower, head and
    encoders.
    """

    weights: int = 0
    decoder: int = 0
    remap: int = 0
    numeric: int = 0
    wide: int = 0
    network: int = 0

    @property
    def embedding(self) -> int:
        """All that depends on ids and numbers: everything but the network."""
        return self.total - self.network

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def bytes_of(model: Model) -> Bytes:
    """What a model's parameters and buffers take.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> model = models.deepfm(Inputs(example_schema(), embedding_dim=4), hidden=(8,))
    >>> bytes_of(model)
    Bytes(weights=960, decoder=0, remap=0, numeric=32, wide=248, network=840)
    """
    found: dict[str, int] = {}
    seen: set[int] = set()

    def count(category: str, tensors: Iterable[Tensor]) -> None:
        """Those that were not counted before."""
        for tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[category] = found.get(category, 0) + tensor.numel() * tensor.element_size()

    for part in model.network():
        count("network", _tensors(part))
    if model.wide is not None:
        count("wide", _tensors(model.wide))
    for module in model.embedding.modules():
        if isinstance(module, TABLES):
            count("weights", _tensors(module))
        elif isinstance(module, PackedTables):
            count("weights", module.codes())
        if isinstance(numeric := getattr(module, "numeric", None), nn.Module):
            count("numeric", _tensors(numeric))
    count("decoder", model.embedding.parameters())
    count("remap", model.embedding.buffers())
    return Bytes(**found)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
