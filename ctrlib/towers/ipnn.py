"""Inner products of PNN: Y. Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016,
https://arxiv.org/abs/1611.00144."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class IPNN(nn.Module):
    """[z, p]: z = the fields f_1, .., f_N side by side, p = the inner products p_ij = <f_i, f_j>, i < j  (section III).

    The pairs come row by row: (0, 1), (0, 2), .., (F - 2, F - 1). The network (IPNN) is `Stack(products, MLP(...))`,
    whose first layer is the paper's l_1 = relu(W_z z + W_p p + b_1). There W_p is symmetric, has a diagonal and
    is factorised to rank one in each unit; here, as in FuxiCTR and the authors' later code, each pair has one free
    weight and a field has no product with itself.

    Shape: (B, F, D) -> (B, F * D + F * (F - 1) / 2).

    Raises:
        ValueError: there are fewer than two fields.

    >>> IPNN((3, 2))(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]])).tolist()
    [[1.0, 0.0, 2.0, 1.0, 0.0, 3.0, 2.0, 0.0, 3.0]]
    """

    pairs: Tensor
    entries: Tensor

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        num_fields, dim = in_shape
        if num_fields < 2:
            raise ValueError(
                f"IPNN needs at least 2 fields to form a pair, got {num_fields}: use MLP, or add a feature"
            )
        first, second = torch.triu_indices(num_fields, num_fields, offset=1)
        # Entry (i, j) of the matrix of products holds pair entries[i F + j]; the diagonal none, so one past the last.
        entries = torch.full((num_fields, num_fields), len(first))
        entries[first, second] = entries[second, first] = torch.arange(len(first))
        self.register_buffer("pairs", first * num_fields + second, persistent=False)
        self.register_buffer("entries", entries.flatten(), persistent=False)
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_fields * dim + len(first),)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, H)."""
        out: Tensor = _FieldsAndProducts.apply(x_BFD, self.pairs, self.entries)  # type: ignore[no-untyped-call]
        return out


class _FieldsAndProducts(torch.autograd.Function):
    """X and the upper triangle of X X^T, with the gradient G_z + (G_p + G_p^T) X in one product and one gather;
    autograd would take two products, a scatter (slower than all the rest) and a sum."""

    @staticmethod
    def forward(ctx: Any, x_BFD: Tensor, pairs: Tensor, entries: Tensor) -> Tensor:
        ctx.save_for_backward(x_BFD, entries)
        products = torch.bmm(x_BFD, x_BFD.transpose(1, 2)).flatten(1).index_select(1, pairs)
        return torch.cat([x_BFD.flatten(1), products], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor) -> tuple[Tensor, None, None]:
        x_BFD, entries = ctx.saved_tensors
        batch, num_fields, dim = x_BFD.shape
        grad_fields, grad_pairs = grad_BH.tensor_split([num_fields * dim], dim=1)
        symmetric = F.pad(grad_pairs, (0, 1)).index_select(1, entries).view(batch, num_fields, num_fields)
        return torch.baddbmm(grad_fields.view(batch, num_fields, dim), symmetric, x_BFD), None, None
