"""Which engine trains a model, and on which device, by the names that an experiment has for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch

from ctrlib.errors import ArgumentError
from ctrlib.losses import binary_cross_entropy
from ctrlib.model import Model
from ctrlib.sharding.plan import Sharding, ShardingPlan
from ctrlib.training.config import (
    Device,
    EngineName,
    Precision,
)
from ctrlib.training.exact import ExactEngine
from ctrlib.training.fused import FusedEngine
from ctrlib.training.guard import Loss
from ctrlib.training.keeper import Engine


def choose_device(device: Device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Of several processes on a machine, each gets a card of its own.

    Raises:
        ValueError: CUDA is asked for and there is none.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device not in get_args(Device):
        raise ArgumentError(f"unknown device {device!r}, expected one of {get_args(Device)}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ArgumentError(
            "device 'cuda' was asked for, but torch sees none: use --device cpu, or run `ctrlib doctor`"
        )
    if device == "cpu" or not available:
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    return chosen


def native_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether this machine's processor multiplies bfloat16 itself; by the text of /proc/cpuinfo, or what is given.

    Where it does not, torch computes the same numbers several times slower than in fp32, without a word. A machine
    without that file (no Linux) counts as one that does, since nothing is known of it.

    >>> native_bfloat16("flags : fma avx2 avx512bw"), native_bfloat16("flags : avx2 avx512bw avx512_bf16")
    (False, True)
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        if not path.exists():
            return True
        cpuinfo = path.read_text(encoding="utf-8", errors="replace")
    listed = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    return any({"avx512_bf16", "amx_bf16", "bf16"} & set(words) for words in listed)  # the last one is ARM's


def make_engine(
    model: Model,
    engine: EngineName,
    *,
    learning_rate: float = 1e-3,
    embedding_l2: float = 0.0,
    network_l2: float = 0.0,
    average_weights: bool = False,
    embedding_learning_rate: float = 0.02,
    precision: Precision = "fp32",
    sharding: Literal["auto"] | Sharding | Mapping[str, Sharding] = "auto",
    plan: ShardingPlan | None = None,
    check_ids: bool = True,
    loss: Loss = binary_cross_entropy,
    device: str | torch.device = "cpu",
) -> Engine:
    """The engine of that name, given the arguments that concern it.

    Raises:
        ValueError: there is no such engine, a rate is negative, an argument is given that the engine would ignore, or
            bf16 is asked for on a CPU that would emulate it.
    """
    if engine not in get_args(EngineName):
        raise ArgumentError(f"unknown engine {engine!r}, expected one of {get_args(EngineName)}")
    rates = {
        "learning_rate": learning_rate,
        "embedding_l2": embedding_l2,
        "network_l2": network_l2,
        "embedding_learning_rate": embedding_learning_rate,
    }
    for name, rate in rates.items():
        if not rate >= 0:
            raise ArgumentError(f"{name} must be 0 or more, got {rate}")
    if precision == "bf16" and torch.device(device).type == "cpu" and not native_bfloat16():
        raise ArgumentError(
            "precision bf16 was asked for, but this processor has no instructions for it (/proc/cpuinfo names none of "
            "avx512_bf16, amx_bf16 and bf16), and emulating it is several times slower than fp32: drop --precision"
        )
    if engine == "exact":
        if sharding != "auto" or plan is not None:
            raise ArgumentError(
                "the exact engine copies every table to every process: drop --sharding and --plan, or use "
                "--engine fused"
            )
        return ExactEngine(
            model,
            learning_rate=learning_rate,
            embedding_l2=embedding_l2,
            network_l2=network_l2,
            average_weights=average_weights,
            precision=precision,
            loss=loss,
            device=device,
        )
    if embedding_l2:
        raise ArgumentError(
            f"the fused engine has no L2 on tables (it leaves untouched rows alone), got embedding_l2={embedding_l2}: "
            "set it to 0, or use the exact engine"
        )
    if average_weights:
        raise ArgumentError(
            "the fused engine averages no weights (it leaves untouched rows alone): drop --average-weights, or use "
            "--engine exact"
        )
    return FusedEngine(
        model,
        learning_rate=learning_rate,
        network_l2=network_l2,
        embedding_learning_rate=embedding_learning_rate,
        precision=precision,
        sharding=sharding,
        plan=plan,
        check_ids=check_ids,
        loss=loss,
        device=device,
    )
