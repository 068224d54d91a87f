"""Mean of branches that learn from it: the head of FinalNet with two blocks, J. Zhu et al., "FINAL: Factorized
Interaction Layer for CTR Prediction", SIGIR 2023, https://doi.org/10.1145/3539618.3591988."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import full_precision, init_linear
from ctrlib.losses import add_auxiliary


class EnsembleHead(nn.Module):
    """z = 1/N sum_n z_n with z_n = w_n^T h_n + b_n for each of the N branches h = [h_1, ..., h_N] (`widths`).

    In training each branch also fits the ensemble (self-distillation): sum_n BCE(z_n, sigma(z)) joins the loss with
    weight 1, as in FuxiCTR, and no gradient goes through its target sigma(z). With several labels it is summed over
    them; since the target is no label, it counts where a label is missing too.

    Shape: (B, H) -> (B, T) logits.

    Raises:
        ValueError: `widths` are not two or more positive integers that add up to H.

    >>> head = EnsembleHead((5,), widths=(2, 3))
    >>> with torch.no_grad():
    ...     for branch, value in zip(head.branches, (1.0, 3.0)):
    ...         _ = branch.weight.fill_(value)
    >>> head(torch.ones(1, 5)).tolist()  # (2 * 1 + 3 * 3) / 2
    [[5.5]]
    """

    def __init__(
        self, in_shape: tuple[int], *, widths: Sequence[int], num_tasks: int = 1, distill: bool = True
    ) -> None:
        super().__init__()
        if len(widths) < 2 or any(width < 1 for width in widths) or sum(widths) != in_shape[0]:
            raise ArgumentError(
                f"widths must be two or more positive integers that add up to the tower's width {in_shape[0]}, got "
                f"{tuple(widths)}: give each branch's width in the order of Parallel, or use LinearHead for one branch"
            )
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_tasks,)
        self.distill = distill
        self.branches = nn.ModuleList(nn.Linear(width, num_tasks) for width in widths)
        init_linear(self)

    def start_at(self, rates: Tensor) -> None:
        """Set the biases of every branch to the logits of the labels' rates, (T,): what an input of 0 then gives."""
        with torch.no_grad():
            for branch in self.branches:
                branch.bias.copy_(rates.logit())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) -> (B, T) logits."""
        # One product with the branches' weights on the diagonal: the gradient of x is then made in one piece.
        weight = torch.block_diag(*[branch.weight for branch in self.branches])  # type: ignore[no-untyped-call]
        bias = torch.cat([branch.bias for branch in self.branches])  # type: ignore[misc]
        with full_precision():  # as every head's: rows whose scores hardly differ must not become ties
            logits_BNT = F.linear(x.to(weight.dtype), weight, bias).view(-1, len(self.branches), self.out_shape[0])
        logits = logits_BNT.mean(1)
        if self.training and self.distill:
            target = logits.detach().sigmoid().unsqueeze(1).expand_as(logits_BNT)
            losses = F.binary_cross_entropy_with_logits(logits_BNT, target, reduction="none")
            add_auxiliary(losses.sum((1, 2)))
        return logits
