"""The fused engine: TorchRec tables with row-wise Adagrad inside the backward pass, Adam on the rest."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from ctrlib.batch import Batch
from ctrlib.losses import binary_cross_entropy
from ctrlib.model import Model
from ctrlib.training.shard import load_weights, local, shard

Precision = Literal["fp32", "bf16"]


class FusedEngine:
    """Tables move by row-wise Adagrad as gradients arrive, touching only the rows of the batch; the rest by Adam.

    For production and scale: a step costs the same for a thousand rows or a hundred million. It is a different
    algorithm from `ExactEngine`, not a faster one: tune it anew and name it beside every number. `precision="bf16"`
    runs tower and head in bfloat16 autocast (twice as fast on CPUs that have it); tables and optimisers stay fp32. Only
    the network's gradients are clipped: the tables' never exist as a whole. The interface is that of `ExactEngine`.

    Raises:
        ValueError: a table's width is not a multiple of 4.
    """

    name = "fused"

    def __init__(
        self,
        model: Model,
        *,
        learning_rate: float = 1e-3,
        embedding_learning_rate: float = 0.02,
        max_grad_norm: float | None = 10.0,
        precision: Precision = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        tables = {id(p) for m in model.modules() if isinstance(m, EmbeddingBagCollection) for p in m.parameters()}
        dense = {name for name, parameter in model.named_parameters() if id(parameter) not in tables}
        self.model: Any = shard(model, learning_rate=embedding_learning_rate, device=self.device)
        # Which optimiser trains a table must not depend on the plan: those outside `dense` have theirs in the kernels.
        if len(self.model.fused_optimizer.params) != len(tables):
            raise RuntimeError(
                f"{len(tables)} tables, but {len(self.model.fused_optimizer.params)} have a fused optimiser: "
                "the sharding plan moved some to the dense one"
            )
        self._parameters = [parameter for name, parameter in self.model.named_parameters() if name in dense]
        self._optimiser = torch.optim.Adam(self._parameters, lr=learning_rate, fused=True)

    def step(self, batch: Batch) -> Tensor:
        """One optimisation step; returns the batch's loss. Nothing is updated if the loss is not finite."""
        self._optimiser.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model(batch)
        loss = binary_cross_entropy(logits, batch.labels, batch.weights)
        if not torch.isfinite(loss):
            return loss.detach()
        torch.autograd.backward(loss)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm, foreach=True)
        self._optimiser.step()
        return loss.detach()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def learning_rate(self) -> float:
        """The network's current learning rate."""
        return float(self._optimiser.param_groups[0]["lr"])

    def cut_learning_rate(self, factor: float, *, minimum: float = 1e-6) -> None:
        """Multiply every learning rate, the tables' included, by `factor`, not below `minimum`."""
        fused = self.model.fused_optimizer
        for group in (*self._optimiser.param_groups, *fused.param_groups):
            group["lr"] = max(group["lr"] * factor, minimum)
        fused.step()  # hands the new rates to the kernels; updates nothing, that happened in backward

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights and buffers, by the names of the plain `Model`."""
        return {name: local(tensor).detach().clone() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put back what `weights` returned; the key sets must agree."""
        load_weights(self.model, weights)
