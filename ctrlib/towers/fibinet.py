"""FiBiNET: T. Huang et al., "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for Click-Through
Rate Prediction", RecSys 2019, https://arxiv.org/abs/1905.09433."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear

Bilinear = Literal["field_all", "field_each", "field_interaction"]


class FiBiNET(nn.Module):
    """[p, q]: the bilinear interactions of all pairs of fields e_i, and of the same fields reweighted by SENET, v_i:

        a = ReLU(W_2 ReLU(W_1 z)),  z_i = mean(e_i),  v_i = a_i e_i          (the SENET layer),
        p_ij = (e_i W) * e_j,  q_ij = (v_i W') * v_j,  i < j                 (the bilinear-interaction layer).

    The network is `Stack(fibinet, MLP(...))` with `Wide`.

    `bilinear`: one matrix W for all pairs (`"field_all"`), one for each left field (`"field_each"`), or one for each
    pair (`"field_interaction"`). `share_bilinear`: W' = W, as in the first FuxiCTR, which made BARS' results; the paper
    does not say, and FuxiCTR today has two.

    Each matrix starts Xavier-normal; FuxiCTR takes a stack of matrices for one convolution and starts it smaller by
    sqrt((D + N) / 2), N the number of matrices. `reduction_ratio` r: W_1 maps F numbers to max(1, floor(F / r)).

    Shape: (B, F, D) -> (B, F * (F - 1) * D): all p, then all q, pairs row by row.

    Raises:
        ValueError: there are fewer than two fields, the ratio is not positive, or the type of interaction is unknown.

    >>> FiBiNET((3, 4), bilinear="field_each").out_shape
    (24,)
    """

    left_fields: Tensor

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        bilinear: Bilinear = "field_interaction",
        reduction_ratio: float = 3,
        share_bilinear: bool = False,
    ) -> None:
        super().__init__()
        num_fields, dim = in_shape
        if num_fields < 2:
            raise ArgumentError(
                f"FiBiNET needs at least 2 fields to form a pair, got {num_fields}: use MLP, or add a feature"
            )
        if not reduction_ratio > 0:
            raise ArgumentError(f"reduction_ratio must be positive, got {reduction_ratio}")
        if bilinear not in get_args(Bilinear):
            raise ArgumentError(f"bilinear must be one of {get_args(Bilinear)}, got {bilinear!r}")
        first, _ = torch.triu_indices(num_fields, num_fields, offset=1)
        reduced = max(1, int(num_fields / reduction_ratio))
        self.excitation = nn.Sequential(
            nn.Linear(num_fields, reduced, bias=False), nn.ReLU(), nn.Linear(reduced, num_fields, bias=False), nn.ReLU()
        )
        init_linear(self)
        num_matrices = {"field_all": 1, "field_each": num_fields, "field_interaction": len(first)}[bilinear]
        self.weight = nn.Parameter(torch.empty(1 if share_bilinear else 2, num_matrices, dim, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)
        self.each_pair = bilinear == "field_interaction"
        self.register_buffer("left_fields", first, persistent=False)
        self.in_shape = tuple(in_shape)
        self.out_shape = (2 * len(first) * dim,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, H)."""
        weights = self.excitation(x_BFD.mean(2)).unsqueeze(2)
        right = torch.stack([x_BFD, x_BFD * weights], dim=1)  # (B, 2, F, D), e and v: pairs need no concatenation then
        left = right.index_select(2, self.left_fields) if self.each_pair else right
        left = torch.matmul(left.permute(1, 2, 0, 3), self.weight).permute(2, 0, 1, 3)
        pairs: Tensor = _PairProducts.apply(left, right, self.in_shape[0], self.each_pair)  # type: ignore[no-untyped-call]
        return pairs.flatten(1)


class _PairProducts(torch.autograd.Function):
    """left_i * right_j for i < j, (B, 2, F, D) twice -> (B, 2, P, D); `each_pair`: left has a vector for each pair.

    One step for each left field, whose pairs lie side by side: to gather both sides of all pairs first would write,
    keep and, backwards, scatter twice the output's size, and take 2.5 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, num_fields: int, each_pair: bool) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.sizes = num_fields, each_pair
        blocks = _blocks(num_fields, each_pair)
        return torch.cat([left[:, :, lefts] * right[:, :, rights] for _, lefts, rights in blocks], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        left, right = ctx.saved_tensors
        num_fields, each_pair = ctx.sizes
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        for pairs, lefts, rights in _blocks(num_fields, each_pair):
            products = grad[:, :, pairs] * right[:, :, rights]
            grad_left[:, :, lefts] = products if each_pair else products.sum(2, keepdim=True)
            grad_right[:, :, rights].addcmul_(grad[:, :, pairs], left[:, :, lefts])
        return grad_left, grad_right, None, None


def _blocks(num_fields: int, each_pair: bool) -> Iterator[tuple[slice, slice, slice]]:
    """For each left field: where its pairs are, and where left and right vectors of these pairs are."""
    start = 0
    for field in range(num_fields - 1):
        pairs = slice(start, start + num_fields - 1 - field)
        yield pairs, pairs if each_pair else slice(field, field + 1), slice(field + 1, None)
        start = pairs.stop
