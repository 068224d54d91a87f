"""What an engine remembers, as named tensors: read for a checkpoint, and written into again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ctrlib.sharding.shards import Shards, State


def make_adam(parameters: Mapping[str, Tensor], learning_rate: float) -> torch.optim.Adam:
    """Adam whose moments exist before the first step, at zero as the first step would make them.

    A fresh optimiser's state is empty, and a checkpoint read into it would lose the moments without a word.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> sorted(make_adam({"w": weight}, 0.1).state[weight])
    ['exp_avg', 'exp_avg_sq', 'step']
    """
    # fused=True: one pass over the tables instead of seven, 5 to 9 times faster on a CPU and the same arithmetic.
    optimiser = torch.optim.Adam(list(parameters.values()), lr=learning_rate, fused=True)
    for parameter in parameters.values():
        optimiser.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimiser


def optimiser_state(optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> State:
    """The optimiser's own tensors, not copies, as optimiser.PARAMETER.STATISTIC."""
    return {
        f"optimiser.{name}.{statistic}": tensor
        for name, parameter in parameters.items()
        for statistic, tensor in optimiser.state[parameter].items()
    }


def copy_state(state: State) -> State:
    """A copy that later steps leave alone."""
    return {name: _map(value) for name, value in state.items()}


def _map(value: Tensor | Shards) -> Tensor | Shards:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return Shards(value.size, tuple((offsets, part.detach().clone()) for offsets, part in value.parts))


def restore_state(state: State, copy: State) -> None:
    """Write a copy back into the tensors that it was taken from."""
    for name, value in state.items():
        saved = copy[name]
        if isinstance(value, Tensor):
            assert isinstance(saved, Tensor)
            value.copy_(saved)
        else:
            assert isinstance(saved, Shards)
            for (_, part), (_, kept) in zip(value.parts, saved.parts):
                part.copy_(kept)
