"""Customized gate control and progressive layered extraction: H. Tang et al., "Progressive Layered Extraction (PLE): A
Novel Multi-Task Learning Model for Personalized Recommendations", RecSys 2020,
https://doi.org/10.1145/3383313.3412236."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.heads.stacked import StackedHidden, StackedLinear, TaskTowers, check_streams


class PLE(nn.Module):
    """Experts of each task's own beside shared ones, level upon level; one level is the paper's CGC.

    x_t' = sum over own and shared experts e of softmax(W_t x_t)_e f_e(x_t or x_s): task t's experts read its own
    stream x_t, shared experts the shared stream x_s. Below the last level x_s' is the same sum over *all* experts,
    with a gate on x_s. The first level reads one x for all streams, or T + 1 streams, the shared one last.

    Without shared experts the tasks share nothing above the input, and the shared stream is left out; without own ones
    it is MMoE. `num_own` counts experts per task.

    Shape: (B, H) or (T + 1, B, H) -> (B, T) logits; without shared experts (T, B, H) too.

    Raises:
        ValueError: there is no expert or no level, or the number of streams does not fit.

    >>> head = PLE((6,), num_tasks=2, num_levels=2, expert_hidden=(8,), tower_hidden=(4,))
    >>> x = torch.randn(5, 6)
    >>> head(x).shape, head.gate_weights(x).shape  # 2 experts of its own and 2 shared ones
    (torch.Size([5, 2]), torch.Size([2, 5, 4]))
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int,
        num_levels: int = 1,
        num_own: int = 2,
        num_shared: int = 2,
        expert_hidden: Sequence[int] = (128, 64),
        tower_hidden: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = check_streams(self, in_shape, num_tasks, {num_tasks + 1} if num_shared else {num_tasks, num_tasks + 1})
        if num_levels < 1 or min(num_own, num_shared) < 0 or not num_own + num_shared:
            raise ArgumentError(
                f"PLE needs one or more levels, and experts, got num_levels={num_levels}, num_own={num_own}, "
                f"num_shared={num_shared}"
            )
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks,)
        self.levels = nn.ModuleList(
            _Level(
                expert_hidden[-1] if level else width,
                num_tasks=num_tasks,
                num_own=num_own,
                num_shared=num_shared,
                hidden=expert_hidden,
                dropout=dropout,
                one_input=level == 0 and len(in_shape) == 1,
                is_last=level == num_levels - 1,
            )
            for level in range(num_levels)
        )
        shape = (num_tasks, expert_hidden[-1])
        self.towers = TaskTowers(shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)

    def gate_weights(self, x: Tensor) -> Tensor:
        """The last level's weights, own experts first: -> (T, B, num_own + num_shared), sums are 1."""
        tasks, shared = self._streams(x)
        levels: list[Any] = list(self.levels)
        for level in levels[:-1]:
            tasks, shared = level(tasks, shared)
        weights: Tensor = levels[-1].weigh(tasks)
        return weights

    def start_at(self, rates: Tensor) -> None:
        """As `TaskTowers.start_at`."""
        self.towers.start_at(rates)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) or (T + 1, B, H) -> (B, T) logits."""
        tasks, shared = self._streams(x)
        for level in self.levels:
            tasks, shared = level(tasks, shared)
        logits: Tensor = self.towers(tasks)
        return logits

    def _streams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, x) if len(self.in_shape) == 1 else (x[: self.out_shape[0]], x[-1])


class _Level(nn.Module):
    """One extraction network: streams of the tasks (T, B, I), or (B, I) for all, and the shared (B, I), to new ones."""

    def __init__(
        self,
        width: int,
        *,
        num_tasks: int,
        num_own: int,
        num_shared: int,
        hidden: Sequence[int],
        dropout: float,
        one_input: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.num_tasks, self.num_own, self.one_input = num_tasks, num_own, one_input
        self.own: nn.Module | None = None
        if num_own:
            self.own = StackedHidden(num_tasks * num_own, width, hidden, dropout=dropout, one_input=one_input)
        self.shared: nn.Module | None = None
        if num_shared:
            self.shared = StackedHidden(num_shared, width, hidden, dropout=dropout, one_input=True)
        self.gates = StackedLinear(num_tasks, width, num_own + num_shared, bias=False, one_input=one_input)
        # Nothing reads the shared stream after the last level, or where no expert is shared.
        self.shared_gate: nn.Linear | None = None
        if num_shared and not is_last:
            self.shared_gate = nn.Linear(width, num_tasks * num_own + num_shared, bias=False)
            nn.init.xavier_normal_(self.shared_gate.weight)

    def weigh(self, tasks: Tensor) -> Tensor:
        weights: Tensor = self.gates(tasks).float().softmax(-1)
        return weights

    def forward(self, tasks: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        gates_TBE = self.weigh(tasks)
        mixed_TBC, shared_BC = gates_TBE.new_zeros(()), shared
        num_all_own = self.num_tasks * self.num_own
        all_gates = None if self.shared_gate is None else self.shared_gate(shared).float().softmax(-1)
        if self.own is not None:
            read = tasks if self.one_input else tasks.repeat_interleave(self.num_own, 0)
            own_EBC = self.own(read)
            own_TNBC = own_EBC.unflatten(0, (self.num_tasks, self.num_own))
            mixed_TBC = torch.einsum("tnbc,tbn->tbc", own_TNBC, gates_TBE[..., : self.num_own])
            if all_gates is not None:
                shared_BC = torch.einsum("ebc,be->bc", own_EBC, all_gates[:, :num_all_own])
        if self.shared is not None:
            shared_NBC = self.shared(shared)
            mixed_TBC = mixed_TBC + torch.einsum("nbc,tbn->tbc", shared_NBC, gates_TBE[..., self.num_own :])
            if all_gates is not None:
                of_shared = torch.einsum("nbc,bn->bc", shared_NBC, all_gates[:, num_all_own:])
                shared_BC = of_shared if self.own is None else shared_BC + of_shared
        return mixed_TBC, shared_BC
