"""The exact engine: dense Adam over everything, as FuxiCTR, BARS and the papers mean their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctrlib.batch import Batch
from ctrlib.distributed import init_process_group, rank, world_size
from ctrlib.embeddings.managed import ManagedEmbedding
from ctrlib.errors import check_has
from ctrlib.losses import binary_cross_entropy
from ctrlib.model import Model
from ctrlib.sharding.shards import State
from ctrlib.training.average import WeightAverage
from ctrlib.training.batch_norm import synchronise_batch_norm
from ctrlib.training.config import Precision
from ctrlib.training.guard import Loss, add_l2, arithmetic, clip_gradients, guarded_loss, refuse_what_needs_one_process
from ctrlib.training.state import make_adam, optimiser_state


class ExactEngine:
    """Dense gradients and torch Adam on every parameter, L2 on whole tables, every step.

    L = BCE + (embedding_l2 / 2) sum ||W||^2 over every embedding table (wide weights included), so an untouched row
    decays too and its Adam moments move. Gradients are clipped to a global norm of `max_grad_norm` over *all*
    parameters, the regularisers' share included (the semantics of FuxiCTR 2 and BARS). `network_l2` is the same of all
    weights that are no tables, biases included.

    `step` takes a Batch and returns the mean loss (without regulariser and auxiliary losses) as a detached scalar;
    `train` does so for every batch of an epoch. `model` is the module to call for predictions; `loss` is any function
    of logits, labels and weights. "Tables" are all weights of embedding and wide part, vectors of numeric features
    included, but for the parameters of a module that a part publishes as `gates`: those say what of a table is used.

    With `average_weights` the model holds, whenever it is not in a step, the average of weights that `WeightAverage`
    documents: that is what is scored and kept. `precision="bf16"` runs the tower in bfloat16 autocast as in
    `FusedEngine`; weights, look-ups, fields and logits stay fp32.

    Started by `torchrun`, every process holds a copy of the whole model and takes its part of each batch; the sum is
    what one process computes on the whole batch.

    >>> from ctrlib.testing import example_batch, example_schema
    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> model = models.mlp(Inputs(example_schema(), embedding_dim=4), hidden=(8,))
    >>> engine = ExactEngine(model, learning_rate=0.01)
    >>> batch = example_batch(example_schema(), 32)
    >>> first = engine.step(batch)
    >>> bool(engine.step(batch) < first)
    True
    """

    name = "exact"

    def __init__(
        self,
        model: Model,
        *,
        learning_rate: float = 1e-3,
        embedding_l2: float = 0.0,
        network_l2: float = 0.0,
        max_grad_norm: float | None = 10.0,
        average_weights: bool = False,
        precision: Precision = "fp32",
        loss: Loss = binary_cross_entropy,
        device: str | torch.device = "cpu",
    ) -> None:
        check_has("a ctrlib.Model", ("network", "named_parameters"), model=model)
        refuse_what_needs_one_process(model)
        self.device = torch.device(device)
        self.model: nn.Module = model.to(self.device)
        self.embedding_l2, self.network_l2 = embedding_l2, network_l2
        self.max_grad_norm = max_grad_norm
        self._arithmetic = arithmetic(self.device, precision)
        self.loss = loss
        self._buffers = [buffer for part in model.network() for buffer in part.buffers()]
        self._named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = list(self._named.values())
        network = {id(p) for part in model.network() for p in part.parameters()}
        published = [getattr(part, "gates", None) for part in model.modules()]
        gates = {id(p) for part in published if isinstance(part, nn.Module) for p in part.parameters()}
        self._tables = [p for p in self._parameters if id(p) not in network | gates]
        self._others = [p for p in self._parameters if id(p) in network | gates]
        self._optimiser = make_adam(self._named, learning_rate)
        self._average = WeightAverage(self._named) if average_weights else None
        for module in model.modules():
            if isinstance(module, ManagedEmbedding):
                module.forget_evicted(self._optimiser, None if self._average is None else self._average.forget)
        self._forward: Callable[[Batch], Tensor] = self.model
        if world_size() > 1:
            init_process_group(self.device)
            synchronise_batch_norm(self.model)
            self._forward = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def step(self, batch: Batch) -> Tensor:
        """One optimisation step; returns the batch's loss. Nothing is updated if the loss is not finite."""
        if self._average is None:
            return self._step(batch)
        with self._average.trained():
            loss = self._step(batch)
        if torch.isfinite(loss):
            self._average.update()
        return loss

    def _step(self, batch: Batch) -> Tensor:
        self._optimiser.zero_grad(set_to_none=True)
        with self._arithmetic():
            loss, total = guarded_loss(self._forward, batch.to(self.device), self.loss, self._buffers)
        if not torch.isfinite(total):
            return total.detach()
        torch.autograd.backward(total)
        add_l2(self._tables, self.embedding_l2)
        add_l2(self._others, self.network_l2)
        if self.max_grad_norm is not None:
            clip_gradients(self._parameters, self.max_grad_norm)
        self._optimiser.step()
        return loss

    def train(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """A step for every batch: gives each batch back, when it has been trained on, with its loss."""
        for batch in batches:
            yield batch, self.step(batch)

    @property
    def averages(self) -> bool:
        """Whether the model holds an average of the weights that are trained."""
        return self._average is not None

    @property
    def learning_rates(self) -> list[float]:
        """The current learning rate, as a list of one. Can be set."""
        return [float(group["lr"]) for group in self._optimiser.param_groups]

    @learning_rates.setter
    def learning_rates(self, rates: list[float]) -> None:
        for group, rate in zip(self._optimiser.param_groups, rates, strict=True):
            group["lr"] = rate

    def state(self) -> State:
        """Every tensor that the next step depends on, itself and not a copy: model.NAME, optimiser.NAME.STATISTIC, and
        those of the `WeightAverage` if there is one."""
        weights = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        average = {} if self._average is None else self._average.state()
        return {**weights, **average, **optimiser_state(self._optimiser, self._named)}

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights and buffers on the CPU, by the names of the plain `Model`, on rank 0; elsewhere none.

        Every process must call it.
        """
        if rank():
            return {}
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put back what `weights` returned; the key sets must agree."""
        self.model.load_state_dict(weights)
        if self._average is not None:
            self._average.start_anew()
