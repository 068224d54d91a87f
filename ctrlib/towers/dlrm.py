"""Dot interaction of DLRM: M. Naumov et al., "Deep Learning Recommendation Model for Personalization and
Recommendation Systems", 2019, https://arxiv.org/abs/1906.00091."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import PairwiseDots


class DotInteraction(nn.Module):
    """[e_k for k in dense_fields, <e_i, e_j> for i < j]: the dot products of all pairs of fields, behind the fields
    that are passed on as they are. The pairs come row by row, (0, 1), (0, 2), ..., (F - 2, F - 1), as in TorchRec.

    The paper's DLRM is `Stack(dots, MLP(dots.out_shape))`. There the numbers go through a bottom MLP into one vector of
    width D, which is a field and is also passed on. A tower sees fields only, so a bottom MLP belongs to the
    embedding; `dense_fields` says where its field is. Without a bottom MLP, pass on the numeric fields, or nothing (the
    default; so does FuxiCTR where there are no numbers). The products of a field with itself, an option in the paper's
    code that is off by default, are not here.

    FuxiCTR also has `interaction_op: cat`, the fields side by side. That is `MLP(s)`, and so is the model which BARS
    lists as DLRM on Frappe and MovieLens, where there are no numbers.

    Shape: (B, F, D) -> (B, len(dense_fields) * D + F * (F - 1) / 2).

    Raises:
        ValueError: there are fewer than two fields, or `dense_fields` are not distinct positions.

    >>> dots = DotInteraction((3, 2), dense_fields=[0])
    >>> dots(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]])).tolist()  # e_0, then e_0 e_1, e_0 e_2, e_1 e_2
    [[1.0, 0.0, 2.0, 0.0, 3.0]]
    """

    def __init__(self, in_shape: tuple[int, int], *, dense_fields: Sequence[int] = ()) -> None:
        super().__init__()
        num_fields, width = in_shape
        if num_fields < 2:
            raise ArgumentError(
                f"DotInteraction needs at least 2 fields to form a pair, got {num_fields}: use MLP, or add a feature"
            )
        if len(set(dense_fields)) < len(dense_fields) or not all(0 <= k < num_fields for k in dense_fields):
            raise ArgumentError(
                f"dense_fields must be distinct positions from 0 to {num_fields - 1}, got {list(dense_fields)}"
            )
        self.dots = PairwiseDots(num_fields)
        self.dense_fields = tuple(dense_fields)
        self.in_shape = tuple(in_shape)
        self.out_shape = (len(dense_fields) * width + self.dots.num_pairs,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, H)."""
        dots: Tensor = self.dots(x_BFD)
        if not self.dense_fields:
            return dots
        return torch.cat([*(x_BFD[:, k] for k in self.dense_fields), dots], dim=1)
