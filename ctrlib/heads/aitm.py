"""Adaptive information transfer: D. Xi et al., "Modeling the Sequential Dependence among Audience Multi-step
Conversions with Multi-task Learning in Targeted Display Advertising", KDD 2021, https://doi.org/10.1145/3447548.3467071."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.heads.stacked import StackedHidden, TaskTowers, check_streams
from ctrlib.layers import init_linear
from ctrlib.losses import add_auxiliary


class AITM(nn.Module):
    """Each task hands on what it knows to the next: z_t = w_t^T u_t + b_t,  u_t = AIT(g_t(u_{t-1}), q_t),  u_1 = q_1.

    q_t is task t's own hidden network. AIT weighs its two slots s by softmax_s(<Q s, K s> / sqrt(C)) and adds up V s;
    Q, K, V and g are linear, for each pair of neighbours their own.

    In training the calibrator joins the loss: `penalty` sum_t max(p_{t+1} - p_t, 0), the mean over rows, since a later
    step cannot be likelier than an earlier one. With labels that are no such chain, set it to 0. The gradient goes
    through u_{t-1} into the earlier task, as in the authors' code (EasyRec stops it).

    Shape: (B, H) or (T, B, H) -> (B, T) logits.

    Raises:
        ValueError: the input has neither one stream nor T, or `penalty` is negative.

    >>> head = AITM((6,), num_tasks=3, tower_hidden=(8, 4))
    >>> head(torch.zeros(5, 6)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int,
        tower_hidden: Sequence[int] = (128, 64, 32),
        dropout: float = 0.0,
        penalty: float = 0.6,
    ) -> None:
        super().__init__()
        width = check_streams(self, in_shape, num_tasks, {num_tasks})
        if penalty < 0:
            raise ArgumentError(f"penalty must be 0 or more, got {penalty}: 0 leaves the calibrator out")
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks,)
        self.penalty = penalty
        self.bottoms = StackedHidden(num_tasks, width, tower_hidden, dropout=dropout, one_input=len(in_shape) == 1)
        self.transfers = nn.ModuleList(_Transfer(tower_hidden[-1]) for _ in range(num_tasks - 1))
        self.last = TaskTowers((num_tasks, tower_hidden[-1]), num_tasks=num_tasks)

    def start_at(self, rates: Tensor) -> None:
        """As `TaskTowers.start_at`."""
        self.last.start_at(rates)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) or (T, B, H) -> (B, T) logits."""
        own = self.bottoms(x)
        known = [own[0]]
        for task, transfer in enumerate(self.transfers, start=1):
            known.append(transfer(known[-1], own[task]))
        logits: Tensor = self.last(torch.stack(known))
        if self.training and self.penalty:
            add_auxiliary(self.penalty * order_violation(logits))
        return logits


class _Transfer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.handed_on = nn.Linear(dim, dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        init_linear(self)

    def forward(self, before: Tensor, own: Tensor) -> Tensor:
        slots_B2C = torch.stack([self.handed_on(before), own], dim=1)
        query, key, value = self.query_key_value(slots_B2C).chunk(3, dim=2)
        weights_B2 = ((query * key).sum(2).float() * self.scale).softmax(1)
        return torch.einsum("bs,bsc->bc", weights_B2, value.float())


def order_violation(logits: Tensor) -> Tensor:
    """sum_t max(p_{t+1} - p_t, 0): by how much later steps are held likelier than earlier ones. (B, T) -> (B,).

    >>> order_violation(torch.tensor([[0.0, 0.0], [-100.0, 100.0]])).tolist()
    [0.0, 1.0]
    """
    return logits.float().sigmoid().diff(dim=1).relu().sum(1)
