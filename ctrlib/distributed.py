"""Processes that train together: joining them, agreeing, and putting together what each of them holds."""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")

# What torch remarks on in several processes, and users of ctrlib can do nothing about.
_REMARKS = (
    # TorchRec 1.8 calls torch 2.13 by names that will change.
    "`broadcast_buffers` is deprecated",
    "Please use DTensor instead",
    r"`torch\.distributed\.\w+` is deprecated",
    # Tables copied to every process; tests compare the gradients with those of one process.
    "fbgemm::dense_embedding_codegen_lookup_function: an autograd kernel was not registered",
    # A head's row of weights, whose gradient is part of a longer row: one small copy.
    "Grad strides do not match bucket view strides",
)

# A process that waits longer than this for another one gives up: it is dead or stopped.
TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("CTRLIB_TIMEOUT", "300")))


def init_process_group(device: torch.device) -> None:
    """Join the processes that `torchrun` describes, or make a group of this one alone.

    Messages go by gloo between CPU tensors, by nccl between CUDA tensors. The environment variable CTRLIB_TIMEOUT is
    the number of seconds (300) after which waiting for another process is an error.
    """
    for message in _REMARKS:
        warnings.filterwarnings("ignore", message)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart torchrun gives the same store again, with the addresses of the dead processes in it. (On
            # several machines their counts of restarts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.)
            store = PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together.

    >>> world_size()
    1
    """
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag holds in any process: the same answers in all of them, so that they turn the same way."""
    if world_size() == 1:
        return list(flags)
    totals = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(totals)
    return [bool(total) for total in totals]


def total(value: float) -> float:
    """The sum of what each rank says, in every process."""
    if world_size() == 1:
        return value
    sums = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums)


def broadcast(value: T) -> T:
    """What rank 0 calls `value`, in every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """The values of all ranks in their order, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: T) -> list[T]:
    """The values of all ranks in their order, on rank 0; elsewhere nothing."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def all_rows(rows: Tensor) -> Tensor:
    """The equally many rows of every rank, one rank below the other, in every process; no gradient.

    Shape: (B, C) -> (world_size * B, C).
    """
    if world_size() == 1:
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
