"""Inner products of PNN: Y. Qu et al., "Product-based Neural Networks for User Response Prediction", ICDM 2016,
https://arxiv.org/abs/1611.00144."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import PairwiseDots


class IPNN(nn.Module):
    """[z, p]: z = the fields f_1, ..., f_N side by side, p = their inner products <f_i, f_j>, i < j  (section III).

    The pairs come row by row: (0, 1), (0, 2), ..., (F - 2, F - 1). The network (IPNN) is `Stack(products, MLP(...))`,
    whose first layer is the paper's l_1 = relu(W_z z + W_p p + b_1). There W_p is symmetric, has a diagonal and
    is factorised to rank one in each unit; here, as in FuxiCTR and the authors' later code, each pair has one free
    weight and a field has no product with itself.

    Shape: (B, F, D) -> (B, F * D + F * (F - 1) / 2).

    Raises:
        ValueError: there are fewer than two fields.

    >>> IPNN((3, 2))(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]])).tolist()
    [[1.0, 0.0, 2.0, 1.0, 0.0, 3.0, 2.0, 0.0, 3.0]]
    """

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        num_fields, dim = in_shape
        if num_fields < 2:
            raise ArgumentError(
                f"IPNN needs at least 2 fields to form a pair, got {num_fields}: use MLP, or add a feature"
            )
        self.dots = PairwiseDots(num_fields)
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_fields * dim + self.dots.num_pairs,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, H)."""
        return torch.cat([x_BFD.flatten(1), self.dots(x_BFD)], dim=1)
