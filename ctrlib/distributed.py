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

from ctrlib._launcher import LauncherError, announced

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

    Raises:
        LauncherError: the environment does not say all that several processes need, or the others do not come.
    """
    for message in _REMARKS:
        warnings.filterwarnings("ignore", message)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    number, size = announced()
    if size == 1:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
        return
    try:
        store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # After a restart torchrun gives the same store again, with the addresses of the dead processes in it. (On
            # several machines their counts of restarts may differ: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.)
            store = PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    except (dist.DistError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LauncherError(
            f"the environment announces {size} processes (RANK={number}, WORLD_SIZE={size}), and they did not meet at "
            f"{place} in {TIMEOUT.total_seconds():g} seconds: start all of them, with torchrun for instance; or, for "
            f"one process, `unset RANK WORLD_SIZE`. What the connection said: {error}"
        ) from error


def rank() -> int:
    """This process's number, 0 where there is one process; before they have joined, what the environment says."""
    return dist.get_rank() if dist.is_initialized() else announced()[0]


def world_size() -> int:
    """How many processes train together; before they have joined, what the environment says.

    >>> world_size()
    1
    """
    return dist.get_world_size() if dist.is_initialized() else announced()[1]


def _is_alone() -> bool:
    """Whether there is nobody to talk to: a process that has joined none scores by itself, whatever was announced."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag holds in any process: the same answers in all of them, so that they turn the same way."""
    if _is_alone():
        return list(flags)
    totals = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(totals)
    return [bool(total) for total in totals]


def total(value: float) -> float:
    """The sum of what each rank says, in every process."""
    if _is_alone():
        return value
    sums = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(sums)
    return float(sums)


def broadcast(value: T) -> T:
    """What rank 0 calls `value`, in every process."""
    if _is_alone():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[no-any-return]


def gather(value: T) -> list[T]:
    """The values of all ranks in their order, in every process."""
    if _is_alone():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_to_first(value: T) -> list[T]:
    """The values of all ranks in their order, on rank 0; elsewhere nothing."""
    if _is_alone():
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def all_rows(rows: Tensor) -> Tensor:
    """The equally many rows of every rank, one rank below the other, in every process; no gradient.

    Shape: (B, C) -> (world_size * B, C).
    """
    if _is_alone():
        return rows
    rows = rows.detach().contiguous()
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
