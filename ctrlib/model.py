"""A model is an embedding, a tower and a head, and nothing else; an ensemble is several models."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.calibration import Calibration
from ctrlib.errors import ArgumentError
from ctrlib.heads.linear import LinearHead
from ctrlib.joined import ScaledFields, has_hooks, may_join, own
from ctrlib.layers import full_precision


class Model(nn.Module):
    """logits = head(tower(embedding(batch))) [+ wide(batch)].

    Any embedding goes with any tower and any head whose shapes meet. `wide` adds a first-order term to every logit.
    `calibration`, None in a new model, is what a run with `calibrate` sets: it then has the last word on the logits.

    Shape: Batch -> (B, T) logits.

    Raises:
        ValueError: the shapes of neighbouring parts do not meet.

    >>> from ctrlib.embeddings.table import TableEmbedding
    >>> from ctrlib.heads.linear import LinearHead
    >>> from ctrlib.schema import Categorical
    >>> from ctrlib.towers.mlp import MLP
    >>> embedding = TableEmbedding([Categorical("item", num_embeddings=9)], embedding_dim=4)
    >>> tower = MLP(embedding.out_shape, hidden=(8,))
    >>> model = Model(embedding, tower, LinearHead(tower.out_shape))
    >>> model.num_parameters()
    {'embedding': 36, 'network': 49}
    """

    def __init__(
        self, embedding: nn.Module, tower: nn.Module, head: nn.Module, *, wide: nn.Module | None = None
    ) -> None:
        super().__init__()
        for before, after in ((embedding, tower), (tower, head)):
            if before.out_shape != after.in_shape:
                raise ArgumentError(
                    f"{type(after).__name__} expects {after.in_shape}, but {type(before).__name__} gives "
                    f"{before.out_shape}: build {type(after).__name__} with in_shape={before.out_shape}"
                )
        if wide is not None and wide.out_shape != head.out_shape:
            raise ArgumentError(
                f"{type(wide).__name__} gives {wide.out_shape} logits, {type(head).__name__} {head.out_shape}: "
                "build both for the same number of tasks"
            )
        self.embedding, self.tower, self.head, self.wide = embedding, tower, head, wide
        self.calibration: Calibration | None = None

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, T) logits."""
        # `torch.fx` comes with a stand-in for a batch. Hooks of tables do not matter: those are called in any case.
        passed_by = itertools.chain(self.tower.modules(), self.head.modules())
        if self.training and may_join() and isinstance(batch, Batch) and not has_hooks(*passed_by):
            logits = self._joined(batch)
        else:
            with full_precision():
                fields = self.embedding(batch)
            logits = self.head(self.tower(fields))
        if self.wide is not None:
            with full_precision():
                first_order: Tensor = self.wide(batch)
            logits = logits + first_order
        return logits if self.calibration is None else self.calibration(logits)

    def _joined(self, batch: Batch) -> Tensor:
        """head(tower(embedding(batch))), up to the order of sums, with less that is written to memory and read."""
        fields: Tensor | ScaledFields | None = None
        with full_precision():
            if own(self.tower, "reads_scaled_fields") and own(self.embedding, "scaled_fields"):
                fields = cast("ScaledFields | None", self.embedding.scaled_fields(batch))  # type: ignore[operator]
            if fields is None:
                fields = self.embedding(batch)
        if type(self.head) is not LinearHead:
            return cast(Tensor, self.head(self.tower(fields)))
        if own(self.tower, "forward_parts"):
            return self.head.of_parts(self.tower.forward_parts(fields))  # type: ignore[operator]
        return self.head.of_parts([self.tower(fields)])

    def network(self) -> list[nn.Module]:
        """Tower, head, and the encoders that an embedding publishes as `encoders` (attention over a history, say).

        Everything else depends on single ids and numbers: it is what embedding bytes and embedding L2 mean.
        """
        return [self.tower, self.head, *getattr(self.embedding, "encoders", ())]

    def num_parameters(self) -> dict[str, int]:
        """Number of weights in the embedding (with the wide part), and in the network."""
        total = sum(parameter.numel() for parameter in self.parameters())
        network = sum({id(p): p.numel() for part in self.network() for p in part.parameters()}.values())
        return {"embedding": total - network, "network": network}

    def embedding_bytes(self) -> int:
        """Bytes of the weights that depend on ids and numbers: embedding and wide part."""
        network = {id(p) for part in self.network() for p in part.parameters()}
        return sum(p.numel() * p.element_size() for p in self.parameters() if id(p) not in network)


class Ensemble(nn.Module):
    """The mean of the logits of models that were trained apart (Lakshminarayanan et al., NeurIPS 2017).

    Models of different towers err differently, and their mean is often better than any of them, at the sum of their
    cost. Train each by itself: a common loss would make them alike.

    Shape: Batch -> (B, T) logits.

    Raises:
        ValueError: there is no model.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_batch, example_schema
    >>> schema = example_schema()
    >>> members = [models.mlp(Inputs(schema, embedding_dim=4), hidden=(8,)) for _ in range(2)]
    >>> batch = example_batch(schema, 3)
    >>> bool(torch.allclose(Ensemble(members)(batch), (members[0](batch) + members[1](batch)) / 2))
    True
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        if not self.models:
            raise ArgumentError("an ensemble needs one or more models, got none")

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, T) logits."""
        return torch.stack([model(batch) for model in self.models]).mean(0)
