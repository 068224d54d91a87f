"""Hand a model's tables to TorchRec: fused kernels, optimiser inside the backward pass, no change to model code."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

TABLES = (EmbeddingBagCollection, EmbeddingCollection)


def init_process_group(device: torch.device) -> None:
    """Join the process group that `torchrun` describes, or make one of this process alone."""
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)


def shard(
    model: nn.Module,
    *,
    learning_rate: float = 0.02,
    eps: float = 1e-8,
    check_ids: bool = True,
    device: str | torch.device = "cpu",
) -> DistributedModelParallel:
    """Replace every EmbeddingBagCollection and EmbeddingCollection by its sharded, fused form with row-wise Adagrad.

    Row-wise Adagrad keeps one number per row, the running sum over steps of the row's mean squared gradient:
    s += mean_d g_d^2,  w -= learning_rate * g / (sqrt(s) + eps); rows that a batch does not touch stay as they are.
    Every id is looked at before it is used, and one beyond its table (stacked: beyond all of the stack) is a
    RuntimeError, unless `check_ids` is off: do that only where a `Loader` has looked already, since a wrong id then
    reads and writes foreign memory. Weights keep their
    values. All other parameters stay ordinary and want an ordinary optimiser.

    Raises:
        ValueError: a table's width is not a multiple of 4, which the fused kernels need.
    """
    device = torch.device(device)
    init_process_group(device)
    plan = {}
    for path, module in model.named_modules():
        if not isinstance(module, TABLES):
            continue
        pooled = isinstance(module, EmbeddingBagCollection)
        configs = module.embedding_bag_configs() if pooled else module.embedding_configs()
        for config in configs:
            if config.embedding_dim % 4:
                raise ValueError(
                    f"the fused engine needs table widths that are multiples of 4, table {config.name!r} has "
                    f"{config.embedding_dim}: use embedding_dim={-(-config.embedding_dim // 4) * 4}, for a wide part "
                    "columns=4 (wide_columns=4 in presets), or the exact engine"
                )
        plan[path] = construct_module_sharding_plan(
            module,
            # The kernel is named, since under the planner's favourite for small tables (data_parallel) TorchRec would
            # silently drop the in-backward optimiser.
            {config.name: table_wise(rank=0, compute_kernel="fused") for config in configs},
            local_size=1,
            world_size=1,
            device_type=device.type,
        )
    fused_params: dict[str, Any] = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": learning_rate,
        "eps": eps,
        # fbgemm's default takes row 0 in place of a wrong id, and only logs it.
        "bounds_check_mode": BoundsCheckMode.FATAL if check_ids else BoundsCheckMode.NONE,
    }
    before = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    sharded = DistributedModelParallel(
        model,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan(plan),
        sharders=[EmbeddingBagCollectionSharder(fused_params), EmbeddingCollectionSharder(fused_params)],
        init_data_parallel=dist.get_world_size() > 1,
    )
    # The kernels draw their own initial rows; the model's are the ones that count.
    load_weights(sharded, before)
    return sharded


def local(tensor: Tensor) -> Tensor:
    """The part of a (sharded) tensor that this process holds: all of it, as there is one process."""
    return tensor.local_tensor() if hasattr(tensor, "local_tensor") else tensor


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy plain tensors into a sharded model.

    Raises:
        ValueError: the key sets differ.
    """
    state = model.state_dict()
    if set(state) != set(weights):
        raise ValueError(f"weights do not fit the model: {sorted(set(state) ^ set(weights))} are on one side only")
    for name, tensor in state.items():
        local(tensor).detach().copy_(weights[name])
