"""Multi-gate mixture of experts: J. Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
Mixture-of-Experts", KDD 2018, https://doi.org/10.1145/3219819.3220007."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.heads.stacked import StackedHidden, StackedLinear, TaskTowers, check_streams


class MMoE(nn.Module):
    """z_t = h_t(sum_e g_t(x)_e f_e(x)),  g_t(x) = softmax(W_t x): experts for all tasks, weighted by each task's gate.

    `one_gate`: one W for all tasks, the paper's OMoE. Gates are linear as in the paper (FuxiCTR's are MLPs). With a
    stream for each task, experts and gates read task t's: f_e(x_t), g_t(x_t).

    Shape: (B, H) or (T, B, H) -> (B, T) logits.

    Raises:
        ValueError: the input has neither one stream nor T, or there is no expert.

    >>> head = MMoE((6,), num_tasks=2, num_experts=3, expert_hidden=(8,), tower_hidden=(4,))
    >>> x = torch.randn(5, 6)
    >>> head(x).shape, head.gate_weights(x).shape
    (torch.Size([5, 2]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int,
        num_experts: int = 8,
        expert_hidden: Sequence[int] = (128, 64),
        tower_hidden: Sequence[int] = (32,),
        dropout: float = 0.0,
        one_gate: bool = False,
    ) -> None:
        super().__init__()
        width = check_streams(self, in_shape, num_tasks, {num_tasks})
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks,)
        # Experts take the rows of all streams one after the other.
        self.experts = StackedHidden(num_experts, width, expert_hidden, dropout=dropout, one_input=True)
        self.gate: nn.Module
        if one_gate:
            self.gate = nn.Linear(width, num_experts, bias=False)
            nn.init.xavier_normal_(self.gate.weight)
        else:
            self.gate = StackedLinear(num_tasks, width, num_experts, bias=False, one_input=len(in_shape) == 1)
        shape = (num_tasks, expert_hidden[-1])
        self.towers = TaskTowers(shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)

    def gate_weights(self, x: Tensor) -> Tensor:
        """The weight of every expert for every task: (B, H) or (T, B, H) -> (T, B, E), sums over E are 1."""
        gates: Tensor = self.gate(x).float().softmax(-1)
        return gates.expand(self.out_shape[0], -1, -1)

    def start_at(self, rates: Tensor) -> None:
        """As `TaskTowers.start_at`."""
        self.towers.start_at(rates)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) or (T, B, H) -> (B, T) logits."""
        gates_TBE = self.gate_weights(x)
        if len(self.in_shape) == 1:
            mixed_TBC = torch.einsum("ebc,tbe->tbc", self.experts(x), gates_TBE)
        else:
            experts_ETBC = self.experts(x.flatten(0, 1)).unflatten(1, (self.out_shape[0], -1))
            mixed_TBC = torch.einsum("etbc,tbe->tbc", experts_ETBC, gates_TBE)
        logits: Tensor = self.towers(mixed_TBC)
        return logits
