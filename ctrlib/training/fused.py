"""The fused engine: TorchRec tables with row-wise Adagrad inside the backward pass, Adam on the rest."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ctrlib.batch import Batch
from ctrlib.losses import binary_cross_entropy
from ctrlib.model import Model
from ctrlib.training.guard import Loss, clip_gradients, guarded_loss, refuse_several_processes
from ctrlib.training.shard import TABLES, load_weights, local, shard

Precision = Literal["fp32", "bf16"]


class FusedEngine:
    """Tables move by row-wise Adagrad as gradients arrive, touching only the rows of the batch; the rest by Adam.

    For production and scale: a step costs the same for a thousand rows or a hundred million. It is a different
    algorithm from `ExactEngine`, not a faster one: tune it anew and name it beside every number. `precision="bf16"`
    runs the tower in bfloat16 autocast (twice as fast on CPUs that have it); all else stays fp32. Only
    the network's gradients are clipped: the tables' never exist as a whole. `check_ids` is as in `shard`. The interface
    is that of `ExactEngine`.

    Raises:
        ValueError: a table's width is not a multiple of 4, or the precision is unknown.
        RuntimeError: more than one process was started.
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
        check_ids: bool = True,
        loss: Loss = binary_cross_entropy,
        device: str | torch.device = "cpu",
    ) -> None:
        refuse_several_processes()
        if precision not in get_args(Precision):
            raise ValueError(f"unknown precision {precision!r}, expected one of {get_args(Precision)}")
        self.device = torch.device(device)
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.loss = loss
        model.to(self.device)  # sharding moves tables only
        self._buffers = [buffer for part in model.network() for buffer in part.buffers()]
        tables = {id(p) for m in model.modules() if isinstance(m, TABLES) for p in m.parameters()}
        dense = {name for name, parameter in model.named_parameters() if id(parameter) not in tables}
        self.model: Any = shard(model, learning_rate=embedding_learning_rate, check_ids=check_ids, device=self.device)
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
            loss, total = guarded_loss(self.model, batch.to(self.device), self.loss, self._buffers)
        if not torch.isfinite(total):
            return total.detach()
        torch.autograd.backward(total)
        if self.max_grad_norm is not None:
            clip_gradients(self._parameters, self.max_grad_norm)
        self._optimiser.step()
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @property
    def learning_rate(self) -> float:
        """The network's current learning rate."""
        return float(self._optimiser.param_groups[0]["lr"])

    def scale_learning_rate(self, factor: float, *, minimum: float = 0.0) -> None:
        """Multiply every learning rate, the tables' included; none is brought below `minimum`, or raised to it."""
        fused = self.model.fused_optimizer
        for group in (*self._optimiser.param_groups, *fused.param_groups):
            group["lr"] = max(group["lr"] * factor, min(group["lr"], minimum))
        fused.step()  # hands the new rates to the kernels; updates nothing, that happened in backward

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights and buffers, by the names of the plain `Model`."""
        return {name: local(tensor).detach().clone() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put back what `weights` returned; the key sets must agree."""
        load_weights(self.model, weights)
