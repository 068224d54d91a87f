"""Factorization machine: S. Rendle, "Factorization Machines", ICDM 2010, https://doi.org/10.1109/ICDM.2010.127."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.joined import ScaledFields
from ctrlib.layers import full_precision


class FM(nn.Module):
    """sum_{i<j} <e_i, e_j> = 1/2 sum_d [ (sum_i e_id)^2 - sum_i e_id^2 ]  (eq. 5 and lemma 3.1), second order only.

    The first-order term is `ctrlib.Wide` and the bias is the head's. DeepFM (Guo et al., IJCAI 2017,
    https://arxiv.org/abs/1703.04247) is `Parallel(MLP(s), FM(s))` with `LinearHead(..., unweighted=1)` and `Wide`.

    Shape: (B, F, D) -> (B, 1).

    Raises:
        ValueError: there are fewer than two fields.

    >>> pairs = FM((3, 2))(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]]))
    >>> round(pairs.item(), 4)  # 2 + 0 + 3
    5.0
    """

    reads_scaled_fields = True

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        if in_shape[0] < 2:
            raise ArgumentError(
                f"FM needs at least 2 fields to form a pair, got {in_shape[0]}: use MLP, or add a feature"
            )
        self.in_shape = tuple(in_shape)
        self.out_shape = (1,)

    def forward(self, x_BFD: Tensor | ScaledFields) -> Tensor:
        """(B, F, D) -> (B, 1)."""
        pairs: Tensor
        if not isinstance(x_BFD, ScaledFields):
            pairs = _PairwiseProducts.apply(x_BFD, None)  # type: ignore[no-untyped-call]
            return pairs
        with full_precision():
            x, v = x_BFD.numbers, x_BFD.vectors
            pairs = _PairwiseProducts.apply(x_BFD.looked_up, x @ v)  # type: ignore[no-untyped-call]
            return pairs - 0.5 * x.square() @ v.square().sum(1, keepdim=True)


class _PairwiseProducts(torch.autograd.Function):
    """Lemma 3.1 with its gradient d/de_i = sum_{j != i} e_j = s - e_i written out: autograd would go through memory of
    the fields' size seven times, this two times. Most of FM's cost is such passes.

    `others` (B, D), if given, is the sum of further fields, whose squares are not counted: their gradient is s.
    """

    @staticmethod
    def forward(ctx: Any, x_BFD: Tensor, others_BD: Tensor | None) -> Tensor:
        sum_BD = x_BFD.sum(1) if others_BD is None else x_BFD.sum(1).add_(others_BD)
        ctx.save_for_backward(x_BFD, sum_BD)
        norm_B1 = torch.linalg.vector_norm(x_BFD.flatten(1), dim=1, keepdim=True)  # reads the fields, writes B numbers
        pairs: Tensor = 0.5 * (sum_BD.square().sum(1, keepdim=True) - norm_B1.square())
        return pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B1: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BFD, sum_BD = ctx.saved_tensors
        gradient: Tensor = (sum_BD.unsqueeze(1) - x_BFD).mul_(grad_B1.unsqueeze(2))
        return gradient, sum_BD * grad_B1 if ctx.needs_input_grad[1] else None
