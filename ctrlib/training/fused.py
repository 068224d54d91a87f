"""The fused engine: TorchRec tables with row-wise Adagrad inside the backward pass, Adam on the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from ctrlib.batch import Batch
from ctrlib.distributed import gather, init_process_group, world_size
from ctrlib.embeddings.table import before_shift, shift_ids
from ctrlib.errors import check_has
from ctrlib.losses import binary_cross_entropy
from ctrlib.model import Model
from ctrlib.sharding.plan import Sharding, ShardingPlan, TableOptimiser, check_plan, make_plan, show_plan, tables_of
from ctrlib.sharding.sharded import load_weights, shard, sharded_state, whole_weights
from ctrlib.sharding.shards import State
from ctrlib.training.batch_norm import synchronise_batch_norm
from ctrlib.training.config import Precision
from ctrlib.training.guard import Loss, add_l2, arithmetic, clip_gradients, guarded_loss, refuse_what_needs_one_process
from ctrlib.training.rowwise_adagrad import RowwiseAdagrad
from ctrlib.training.state import make_adam, optimiser_state

_Tables = dict[nn.Module, dict[str, int] | None]  # sharded tables -> by how much their ids are shifted


class FusedEngine:
    """Tables move by row-wise Adagrad as gradients arrive, touching only the rows of the batch; the rest by Adam.

    For production and scale: a step costs the same for a thousand rows or a hundred million. It is a different
    algorithm from `ExactEngine`, not a faster one: tune it anew and name it beside every number. `precision="bf16"`
    runs the tower in bfloat16 autocast (twice as fast on CPUs that have it, several times slower on others, for which
    `make_engine` refuses it); all else stays fp32. Only the network's gradients are clipped: the tables' never exist as
    a whole. `check_ids` is as in `shard`. The interface is that of `ExactEngine`.

    Started by `torchrun`, tables are spread over the processes: `sharding`, `plan` and `table_optimiser` are as in
    `shard`. The rule that trains a table is the same under every plan. `train` runs TorchRec's pipeline, which sends
    the ids of the next batch around while this one is computed.

    Raises:
        ValueError: a table's width is not a multiple of 4, the precision is unknown, or the plan does not fit.
        MemoryError: this process's share of the tables does not fit in memory.
        NotImplementedError: several processes, and a part that works in one only (`refuse_what_needs_one_process`).
    """

    name = "fused"

    def __init__(
        self,
        model: Model,
        *,
        learning_rate: float = 1e-3,
        network_l2: float = 0.0,
        embedding_learning_rate: float = 0.02,
        table_optimiser: TableOptimiser = "rowwise_adagrad",
        sharding: Literal["auto"] | Sharding | Mapping[str, Sharding] = "auto",
        plan: ShardingPlan | None = None,
        max_grad_norm: float | None = 10.0,
        precision: Precision = "fp32",
        check_ids: bool = True,
        loss: Loss = binary_cross_entropy,
        device: str | torch.device = "cpu",
    ) -> None:
        check_has("a ctrlib.Model", ("network", "named_parameters"), model=model)
        refuse_what_needs_one_process(model)
        self.device = torch.device(device)
        self._arithmetic = arithmetic(self.device, precision)
        self.network_l2 = network_l2
        self.max_grad_norm = max_grad_norm
        self.loss = loss
        init_process_group(self.device)
        if world_size() > 1:
            synchronise_batch_norm(model)
        self._buffers = [buffer for part in model.network() for buffer in part.buffers()]
        if plan is None:
            plan = make_plan(
                model,
                world_size=world_size(),
                sharding=sharding,
                copy_small=table_optimiser == "rowwise_adagrad",
                device_type=self.device.type,
            )
        check_plan(plan, model, world_size=world_size(), optimiser=table_optimiser)
        self.plan = plan
        self.plan_table = show_plan(plan, model, world_size=world_size(), optimiser=table_optimiser)  # to print
        tables = tables_of(model)
        for name, part in (*model.named_parameters(), *model.named_buffers()):
            if name not in tables:  # sharding moves those, each to where its parts go
                part.data = part.data.to(self.device)
        self.model: Any = shard(
            model,
            plan=plan,
            learning_rate=embedding_learning_rate,
            table_optimiser=table_optimiser,
            check_ids=check_ids,
            device=self.device,
        )
        copied = {name for name, placement in plan.items() if placement.sharding == "data_parallel"}
        # Which optimiser trains a table must not depend on the plan: see which the kernels have taken, on any rank.
        fused = set().union(*gather(set(self.model.fused_optimizer.state_dict()["state"])))
        if fused != set(tables) - copied:
            raise RuntimeError(f"TorchRec moved tables {sorted(fused ^ (set(tables) - copied))} to another optimiser")
        named = dict(self.model.named_parameters())
        self._dense = {name: parameter for name, parameter in named.items() if name not in tables}
        self._copied = {name: named[name] for name in sorted(copied)}
        self._rates = [learning_rate, embedding_learning_rate]
        self._pipelined: _Tables | None = None  # found in the first step, where there is somewhere to send ids
        self._optimisers: list[torch.optim.Optimizer] = [make_adam(self._dense, learning_rate)]
        if self._copied:
            self._optimisers.append(RowwiseAdagrad(self._copied.values(), lr=embedding_learning_rate))

    def step(self, batch: Batch) -> Tensor:
        """One optimisation step; returns the batch's loss. Nothing is updated if the loss is not finite."""
        self._zero_grad()
        loss, total = self._forward(batch.to(self.device))
        if not torch.isfinite(total):
            return total.detach()
        torch.autograd.backward(total)
        self._update()
        return loss

    def train(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """A step for every batch: gives each batch back, when it has been trained on, with its loss."""
        iterator = iter(batches)
        for batch in iterator:
            batch = batch.to(self.device)
            if self._pipelined is None and (world_size() > 1 or self.device.type == "cuda"):
                with _find_pipelined(self.model, batch) as found:
                    loss = self.step(batch)
                self._pipelined = found
            else:
                loss = self.step(batch)
            yield batch, loss
            if self._pipelined:
                break
        if self._pipelined:
            yield from _Pipeline(self, self._pipelined, iterator)

    def _zero_grad(self) -> None:
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._arithmetic():
            return guarded_loss(self.model, batch, self.loss, self._buffers)

    def _update(self) -> None:
        weights = list(self._dense.values())
        add_l2(weights, self.network_l2)
        if self.max_grad_norm is not None:
            clip_gradients(weights, self.max_grad_norm)
        for optimiser in self._optimisers:
            optimiser.step()

    @property
    def learning_rates(self) -> list[float]:
        """The current learning rates of the network and of the tables. Can be set."""
        return list(self._rates)

    @learning_rates.setter
    def learning_rates(self, rates: list[float]) -> None:
        network, tables = rates
        self._rates = [network, tables]
        fused = self.model.fused_optimizer
        for groups, rate in (
            (self._optimisers[0].param_groups, network),
            *((optimiser.param_groups, tables) for optimiser in (*self._optimisers[1:], fused)),
        ):
            for group in groups:
                group["lr"] = rate
        fused.step()  # hands the rate to the kernels; updates nothing, that happened in backward

    def state(self) -> State:
        """Every tensor that the next step depends on, itself and not a copy: model.NAME, optimiser.NAME.STATISTIC.

        Names and shapes are the same under every plan; how a tensor is divided is not.
        """
        found = {**sharded_state(self.model), **optimiser_state(self._optimisers[0], self._dense)}
        if self._copied:
            found |= optimiser_state(self._optimisers[1], self._copied)
        return found

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights and buffers on the CPU, by the names of the plain `Model`, on rank 0; elsewhere none.

        Every process must call it.
        """
        return whole_weights(self.model)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Put back what `weights` returned; every process must have all of it, and the key sets must agree."""
        load_weights(self.model, weights)


@contextlib.contextmanager
def _find_pipelined(model: nn.Module, batch: Batch) -> Iterator[_Tables]:
    """The sharded tables that the forward pass inside the block calls once, with the ids of the batch as they are or
    shifted (as in stacked `TableEmbedding` and `Wide`), and by how much.

    TorchRec's pipeline sends these ids around ahead of time. It would look for such tables by tracing the model, which
    most embeddings here (and maybe yours) do not allow. Hooks are for tables only: those of what a step may pass by
    (`ctrlib.joined`) would change the step.
    """
    calls: list[tuple[ShardedModule, KeyedJaggedTensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: calls.append((module, args[0])))
        for module in model.modules()
        if isinstance(module, ShardedModule)
    ]
    found: _Tables = {}
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
    called = [tables for tables, _ in calls]
    for tables, ids in calls:
        before, shifts = before_shift(ids)
        if _same(before, batch.sparse) and called.count(tables) == 1:
            found[tables] = shifts


def _same(ids: Any, others: KeyedJaggedTensor) -> bool:
    """Whether both are the same ids in memory: moving a batch to where it is already makes a new object of them."""
    return bool(ids.keys() == others.keys() and ids.values().data_ptr() == others.values().data_ptr())


@dataclass
class _Ahead(Pipelineable):  # type: ignore[misc]  # TorchRec is not typed
    """What the pipeline takes in place of a batch: the batch, and the ids for each of `tables`, once it has been moved.

    The model makes the ids of stacked tables as it runs, which would be too late for sending them ahead.
    """

    batch: Batch
    tables: _Tables
    ids: list[KeyedJaggedTensor] = field(default_factory=list)

    def to(self, device: torch.device, non_blocking: bool = False) -> _Ahead:
        batch = self.batch.to(device, non_blocking)
        return _Ahead(batch, self.tables, [shift_ids(batch.sparse, shifts) for shifts in self.tables.values()])

    def record_stream(self, stream: torch.Stream) -> None:
        self.batch.record_stream(stream)
        for ids in self.ids:
            ids.record_stream(stream)

    def pin_memory(self) -> _Ahead:
        return _Ahead(self.batch.pin_memory(), self.tables)


class _Lookups(nn.Module):
    """What the pipeline traces in the model's place."""

    def __init__(self, tables: _Tables) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)

    def forward(self, ahead: _Ahead) -> list[Any]:
        return [table(ahead.ids[number]) for number, table in enumerate(self.tables)]


class _NonFinite(Exception):
    """Ends a pipeline before the backward pass."""


class _Pipeline:
    """Runs batches through TorchRec's TrainPipelineSparseDist, with the engine's own forward pass and update."""

    def __init__(self, engine: FusedEngine, tables: _Tables, batches: Iterator[Batch]) -> None:
        self._engine, self._tables, self._batches = engine, tables, batches
        self._failed: tuple[Batch, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        pipeline = TrainPipelineSparseDist(
            _Lookups(self._tables),
            self,  # the pipeline calls zero_grad and step only
            self._engine.device,
            execute_all_batches=True,
            custom_model_fwd=self._forward,
        )
        batches = (_Ahead(batch, self._tables) for batch in self._batches)
        try:
            while True:
                try:
                    yield pipeline.progress(batches)
                except StopIteration:
                    return
                except _NonFinite:
                    assert self._failed is not None
                    yield self._failed
                    return
        finally:
            pipeline.detach()  # evaluation needs the model's own forward

    def _forward(self, ahead: _Ahead | None) -> tuple[Tensor, tuple[Batch, Tensor]]:
        assert ahead is not None
        batch = ahead.batch
        loss, total = self._engine._forward(batch)
        if not torch.isfinite(total):
            self._failed = batch, total.detach()
            raise _NonFinite
        return total, (batch, loss)

    def zero_grad(self) -> None:
        self._engine._zero_grad()

    def step(self) -> None:
        self._engine._update()
