"""Several processes for a test: forked, so that nothing is imported again, and joined over a file."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world_size: int, function: Callable[[], Any], *, timeout: float = 120.0) -> list[Any]:
    """What `function` returns in each of `world_size` processes that form a gloo group.

    Raises:
        AssertionError: with the traceback of every process that failed, or did not end in time.
    """
    if dist.is_initialized():  # a group of this process alone; its threads would not exist in the children
        dist.destroy_process_group()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_main, args=(rank, world_size, folder, function)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        outcomes = []
        for rank in range(world_size):
            path = Path(folder) / f"{rank}.pickle"
            outcomes.append(pickle.loads(path.read_bytes()) if path.exists() else (False, "ended without a word"))
    failures = [f"rank {rank}: {what}" for rank, (good, what) in enumerate(outcomes) if not good]
    assert not failures and not hung, "\n".join([*failures, f"hung: {hung}"])
    return [what for _, what in outcomes]


def _main(rank: int, world_size: int, folder: str, function: Callable[[], Any]) -> None:
    # What the parent left is not for the child to collect: a destructor may wait for a thread that was not forked.
    gc.freeze()
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
        )
        outcome = (True, function())
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        outcome = (False, traceback.format_exc())
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
