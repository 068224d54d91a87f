"""Shared and task-specific embeddings: L. Su et al., "STEM: Unleashing the Power of Embeddings for Multi-Task
Recommendation", AAAI 2024, https://doi.org/10.1609/aaai.v38i8.28749."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.heads.stacked import StackedHidden, StackedLinear, TaskTowers, check_streams


class STEM(nn.Module):
    """Each task has embeddings of its own, reads all tasks' experts, and teaches only its own and the shared ones.

    x_1, ..., x_T are streams of the tasks' own embeddings and x_s that of the shared ones; each stream has experts.
    Task t mixes all of them, with the gate softmax(W_t (x_t + x_s)); the outputs of other tasks' experts are detached
    in its mixture. So t's prediction depends on the embedding of another task, and its gradient there is exactly 0.

    The streams are slices of one wide table, which TorchRec shards as one: an embedding of width (T + 1) D and
    `ctrlib.towers.Streams` make them. `num_experts` counts experts per stream.

    Shape: (T + 1, B, H), the shared stream last -> (B, T) logits.

    Raises:
        ValueError: the input is not T + 1 streams.

    >>> head = STEM((3, 6), num_tasks=2, num_experts=2, expert_hidden=(8,), tower_hidden=(4,))
    >>> x = torch.randn(3, 5, 6)
    >>> head(x).shape, head.gate_weights(x).shape
    (torch.Size([5, 2]), torch.Size([2, 5, 6]))
    """

    own: Tensor

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int,
        num_experts: int = 1,
        expert_hidden: Sequence[int] = (128, 64),
        tower_hidden: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = check_streams(self, in_shape, num_tasks, {num_tasks + 1})
        if len(in_shape) == 1:
            raise ArgumentError(
                f"STEM needs {num_tasks + 1} streams of embeddings, one for each of {num_tasks} tasks and a shared "
                f"one, got shape {tuple(in_shape)}: put ctrlib.Streams(..., num_streams={num_tasks + 1}) before it"
            )
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks,)
        self.num_experts = num_experts
        self.experts = StackedHidden((num_tasks + 1) * num_experts, width, expert_hidden, dropout=dropout)
        self.gates = StackedLinear(num_tasks, width, (num_tasks + 1) * num_experts, bias=False)
        # (T, 1, E): 1 where task t teaches expert e.
        streams = torch.cat([torch.eye(num_tasks), torch.ones(num_tasks, 1)], dim=1)
        self.register_buffer("own", streams.repeat_interleave(num_experts, 1).unsqueeze(1), persistent=False)
        shape = (num_tasks, expert_hidden[-1])
        self.towers = TaskTowers(shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)

    def gate_weights(self, x: Tensor) -> Tensor:
        """The weight of every expert, stream by stream, for every task: (T + 1, B, H) -> (T, B, E)."""
        weights: Tensor = self.gates(x[:-1] + x[-1]).float().softmax(-1)
        return weights

    def start_at(self, rates: Tensor) -> None:
        """As `TaskTowers.start_at`."""
        self.towers.start_at(rates)

    def forward(self, x: Tensor) -> Tensor:
        """(T + 1, B, H) -> (B, T) logits."""
        gates_TBE = self.gate_weights(x)
        experts_EBC = self.experts(x.repeat_interleave(self.num_experts, 0))
        taught = torch.einsum("ebc,tbe->tbc", experts_EBC, gates_TBE * self.own)
        read_only = torch.einsum("ebc,tbe->tbc", experts_EBC.detach(), gates_TBE * (1 - self.own))
        logits: Tensor = self.towers(taught + read_only)
        return logits
