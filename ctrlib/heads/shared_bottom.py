"""Shared bottom: R. Caruana, "Multitask Learning", Machine Learning 1997,
https://doi.org/10.1023/A:1007379606734. The floor of every head of several labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ctrlib.heads.stacked import TaskTowers, check_streams
from ctrlib.layers import Hidden


class SharedBottom(nn.Module):
    """z_t = t_t(f(x)): one hidden network for all tasks, then one of each task's own.

    With a stream for each task, the bottom reads each stream by itself, with the same weights.

    Shape: (B, H) or (T, B, H) -> (B, T) logits.

    Raises:
        ValueError: the input has neither one stream nor T.

    >>> import torch
    >>> head = SharedBottom((6,), num_tasks=2, bottom_hidden=(8,), tower_hidden=(4,))
    >>> head(torch.zeros(3, 6)).shape, sum(weight.numel() for weight in head.parameters())
    (torch.Size([3, 2]), 138)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int,
        bottom_hidden: Sequence[int] = (128, 64),
        tower_hidden: Sequence[int] = (32,),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = check_streams(self, in_shape, num_tasks, {num_tasks})
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks,)
        self.bottom = Hidden(width, bottom_hidden, dropout=dropout)
        shape = (*in_shape[:-1], bottom_hidden[-1])
        self.towers = TaskTowers(shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)

    def start_at(self, rates: Tensor) -> None:
        """As `TaskTowers.start_at`."""
        self.towers.start_at(rates)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) or (T, B, H) -> (B, T) logits."""
        logits: Tensor = self.towers(self.bottom(x))
        return logits
