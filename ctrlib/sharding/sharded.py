"""Hand a model's tables to TorchRec: fused kernels, optimiser inside the backward pass, no change to model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingType
from torchrec.modules.embedding_configs import PoolingType

from ctrlib.distributed import init_process_group, world_size
from ctrlib.errors import ArgumentError
from ctrlib.sharding.plan import (
    Sharding,
    ShardingPlan,
    TableOptimiser,
    available_memory,
    check_memory,
    check_plan,
    make_plan,
    plan_bytes,
    sharders,
    tables_of,
    to_torchrec,
)
from ctrlib.sharding.shards import Shards, State


def shard(
    model: nn.Module,
    *,
    sharding: Literal["auto"] | Sharding | Mapping[str, Sharding] = "auto",
    plan: ShardingPlan | None = None,
    learning_rate: float = 0.02,
    eps: float = 1e-8,
    table_optimiser: TableOptimiser = "rowwise_adagrad",
    check_ids: bool = True,
    device: str | torch.device = "cpu",
) -> DistributedModelParallel:
    """Spread every EmbeddingBagCollection and EmbeddingCollection over the processes, in fused form.

    Row-wise Adagrad keeps one number per row, the running sum over steps of the row's mean squared gradient:
    s += mean_d g_d^2,  w -= learning_rate * g / (sqrt(s) + eps); rows that a batch does not touch stay as they are.
    "adagrad" keeps one number per weight instead. Every id is looked at before it is used, and one beyond its table
    (stacked: beyond all of the stack) is a RuntimeError, unless `check_ids` is off: do that only where a `Loader` has
    looked already, since a wrong id then reads and writes foreign memory. Weights keep their values: every process must
    have built the same model. All other parameters stay ordinary, are averaged over processes by
    DistributedDataParallel, and want an ordinary optimiser; tables that the plan makes data_parallel want
    `RowwiseAdagrad`, which is the same rule.

    Batch normalisation takes each process's rows by themselves, unless `synchronise_batch_norm(model)` came before.

    `sharding` is as in `make_plan`; `plan` pins one. Joins the process group of `torchrun`, if that has not been done.

    Raises:
        ValueError: a table's width is not a multiple of 4, which the fused kernels need, or the plan does not fit.
        MemoryError: this process's share does not fit in memory.
    """
    device = torch.device(device)
    init_process_group(device)
    tables = tables_of(model)
    for _, _, config in tables.values():
        if config.embedding_dim % 4:
            raise ArgumentError(
                f"the fused engine needs table widths that are multiples of 4, table {config.name!r} has "
                f"{config.embedding_dim}: use embedding_dim={-(-config.embedding_dim // 4) * 4}, for a wide part "
                "columns=4 (wide_columns=4 of `Inputs`), or the exact engine"
            )
    if plan is None:
        plan = make_plan(model, world_size=world_size(), sharding=sharding, device_type=device.type)
    check_plan(plan, model, world_size=world_size(), optimiser=table_optimiser)
    sizes = plan_bytes(plan, model, world_size=world_size(), optimiser=table_optimiser)
    check_memory(sum(per_rank[dist.get_rank()] for per_rank in sizes.values()), available_memory(device))
    fused_params: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD
        if table_optimiser == "rowwise_adagrad"
        else EmbOptimType.EXACT_ADAGRAD,
        "learning_rate": learning_rate,
        "eps": eps,
        # fbgemm's default takes row 0 in place of a wrong id, and only logs it.
        "bounds_check_mode": BoundsCheckMode.FATAL if check_ids else BoundsCheckMode.NONE,
    }
    before = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    cut = [name for name in tables if plan[name].sharding != "data_parallel"]
    whole = [weight for name, weight in model.named_parameters() if name in cut]
    torchrec_plan = to_torchrec(plan, model, world_size=world_size(), device_type=device.type)
    for _, _, config in tables.values():
        config.init_fn = _leave  # the kernels would draw initial rows of their own; the model's are the ones that count
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=torchrec_plan,
        sharders=sharders(fused_params),
        init_data_parallel=world_size() > 1,
    )
    _divide_row_wise_means_only(sharded)
    load_weights(sharded, before)
    del before
    for weight in whole:  # TorchRec keeps the parameters that it has cut, and with them all of their rows
        weight.data = weight.data.new_empty(0)
    # Of Adagrad's running sums, one per row or one per weight, for `sharded_state`: a process knows no table of others.
    columns = 1 if table_optimiser == "rowwise_adagrad" else 2
    sharded.sum_sizes = {
        name: (config.num_embeddings, config.embedding_dim)[:columns]
        for name, (_, _, config) in tables.items()
        if plan[name].sharding != "data_parallel"
    }
    return sharded


def _divide_row_wise_means_only(model: nn.Module) -> None:
    """Keep TorchRec from dividing other tables' sums, and means once more, by the lengths of their bags.

    It sums the bags of a table cut by rows, and divides later if the table wants means: it then divides what comes from
    every table of the collection, but for those that it has noted as sums cut by rows.
    """
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingBagCollection) and module._has_mean_pooling_callback:
            for config in module._table_name_to_config.values():
                if module.module_sharding_plan[config.name].sharding_type != ShardingType.ROW_WISE.value:
                    module._pooling_type_to_rs_features[PoolingType.SUM.value].extend(config.feature_names)


def _leave(weight: Tensor) -> Tensor:
    return weight


def shards(tensor: Any) -> Tensor | Shards:
    """A tensor of a sharded model's state: itself if it is whole, else the parts of it that this process holds."""
    if not hasattr(tensor, "local_shards"):
        return tensor.detach()  # type: ignore[no-any-return]
    parts = tuple((tuple(s.metadata.shard_offsets), s.tensor.detach()) for s in tensor.local_shards())
    return Shards(tuple(tensor.metadata().size), parts)


def sharded_state(model: DistributedModelParallel) -> State:
    """Weights, buffers and the tables' optimiser in what `shard` returned, for a checkpoint: the tensors themselves.

    Names and shapes are the same under every plan; how a tensor is divided is not. Optimisers of the other parameters
    are for the caller to add (`optimiser_state`).
    """
    found: State = {f"model.{name}": shards(tensor) for name, tensor in model.state_dict().items()}
    found |= {f"optimiser.{name}.sum": Shards(size, ()) for name, size in model.sum_sizes.items()}
    for name, statistics in model.fused_optimizer.state_dict()["state"].items():
        (tensor,) = statistics.values()
        found[f"optimiser.{name}.sum"] = shards(tensor)
    return found


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into a sharded model, each process its parts.

    Raises:
        ValueError: the key sets differ, or the rows are those of other ids (another hash, or division into rows).
    """
    state = model.state_dict()
    if set(state) != set(weights):
        raise ArgumentError(f"weights do not fit the model: {sorted(set(state) ^ set(weights))} are on one side only")
    for name, tensor in state.items():
        # What tells how ids become rows; a plain module refuses another such in its `load_state_dict`.
        if name.endswith((".hashing", ".layout")) and not torch.equal(tensor.cpu(), weights[name].cpu()):
            raise ArgumentError(
                f"weights do not fit the model: {name} differs, so ids have other rows there: build the model with the "
                "arguments that the weights were trained with"
            )
    for name, tensor in state.items():
        held = shards(tensor)
        if isinstance(held, Tensor):
            held.copy_(weights[name])
            continue
        for offsets, part in held.parts:
            part.copy_(weights[name][tuple(slice(o, o + size) for o, size in zip(offsets, part.shape))])


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers as whole tensors on the CPU, in rank 0; nothing in the other processes.

    Every process must call it.
    """
    first = dist.get_rank() == 0
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not hasattr(tensor, "local_shards"):
            if first:
                found[name] = tensor.detach().cpu().clone()
            continue
        held = {tuple(part.metadata.shard_offsets): part.tensor.detach().cpu() for part in tensor.local_shards()}
        if first:
            found[name] = torch.empty(tuple(tensor.metadata().size), dtype=tensor.metadata().tensor_properties.dtype)
        for part in tensor.metadata().shards_metadata:
            offsets, source = tuple(part.shard_offsets), part.placement.rank()
            if first:
                place = found[name][tuple(slice(o, o + size) for o, size in zip(offsets, part.shard_sizes))]
                block = held[offsets] if source == 0 else torch.empty(place.shape, dtype=place.dtype)
                if source != 0:
                    dist.recv(block, src=source)
                place.copy_(block)
            elif source == dist.get_rank():
                dist.send(held[offsets].contiguous(), dst=0)
    return found
