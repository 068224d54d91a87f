"""FiBiNET: T. Huang et al., "FiBiNET: Combining Feature Importance and Bilinear feature Interaction for Click-Through
Rate Prediction", RecSys 2019, https://arxiv.org/abs/1905.09433."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear

_ROWS = 256  # of a batch at a time: with 39 fields of width 16, the pairs of one left field then take 1.2 MB

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
        num_pairs = num_fields * (num_fields - 1) // 2
        reduced = max(1, int(num_fields / reduction_ratio))
        self.excitation = nn.Sequential(
            nn.Linear(num_fields, reduced, bias=False), nn.ReLU(), nn.Linear(reduced, num_fields, bias=False), nn.ReLU()
        )
        init_linear(self)
        num_matrices = {"field_all": 1, "field_each": num_fields, "field_interaction": num_pairs}[bilinear]
        self.weight = nn.Parameter(torch.empty(1 if share_bilinear else 2, num_matrices, dim, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)
        self.each_pair = bilinear == "field_interaction"
        self.in_shape = tuple(in_shape)
        self.out_shape = (2 * num_pairs * dim,)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, H)."""
        weights = self.excitation(x_BFD.mean(2)).unsqueeze(2)
        fields = torch.stack([x_BFD, x_BFD * weights], dim=1)  # (B, 2, F, D), e and v: pairs need no concatenation then
        if self.each_pair and self.training and not torch.compiler.is_compiling():
            pairs = _trained_pairs(fields, self.weight)
        elif self.each_pair:  # what a graph can record, for a `Predictor` and for exports
            x, matrices, blocks = fields.flatten(2).transpose(0, 1), _side_by_side(self.weight), _blocks(*self.in_shape)
            products = (torch.bmm(x[:, :, left], matrices[:, :, pair]) * x[:, :, right] for left, right, pair in blocks)
            pairs = torch.cat([product.transpose(0, 1) for product in products], dim=2)
        else:
            left = torch.matmul(fields.permute(1, 2, 0, 3), self.weight).permute(2, 0, 1, 3)
            pairs = _PairProducts.apply(left, fields, self.in_shape[0])  # type: ignore[no-untyped-call]
        return pairs.flatten(1)


@torch.fx.wrap
def _trained_pairs(fields: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _BilinearPairs.apply(fields, weight)  # type: ignore[no-untyped-call]
    return out


class _BilinearPairs(torch.autograd.Function):
    """(x_i W_ij) * x_j for i < j, for both sets of fields: (B, 2, F, D) and (1 or 2, P, D, D) -> (B, 2, P * D).

    One step for each left field, whose matrices side by side are one product, for as many rows as a cache holds. To
    make a product for each pair gathers, transposes, keeps and, backwards, scatters tensors of the output's size, and
    takes twice as long on a CPU. The gradient makes the left sides again, which takes no longer than to read them.
    """

    @staticmethod
    def forward(ctx: Any, fields: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(fields, weight)
        matrices = _side_by_side(weight)
        out = fields.new_empty(len(fields), 2, matrices.shape[2])
        for rows in zip(*(torch.split(tensor, _ROWS) for tensor in (fields.flatten(2), out))):
            x, y = (part.transpose(0, 1) for part in rows)  # both sets are one batched product
            for left, right, pairs in _blocks(*fields.shape[2:]):
                torch.mul(torch.bmm(x[:, :, left], matrices[:, :, pairs]), x[:, :, right], out=y[:, :, pairs])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        fields, weight = ctx.saved_tensors
        matrices = _side_by_side(weight)
        grad_fields, grad_matrices = torch.zeros_like(fields), matrices.new_zeros(matrices.shape)
        flat = fields.flatten(2), grad, grad_fields.view(len(fields), 2, -1)
        for rows in zip(*(torch.split(tensor, _ROWS) for tensor in flat)):
            x, grad_y, grad_x = (part.transpose(0, 1) for part in rows)
            for left, right, pairs in _blocks(*fields.shape[2:]):
                x_i, x_j, matrix = x[:, :, left], x[:, :, right], matrices[:, :, pairs]
                grad_x[:, :, right].addcmul_(grad_y[:, :, pairs], torch.bmm(x_i, matrix))
                grad_left = grad_y[:, :, pairs] * x_j
                grad_matrices[:, :, pairs] += torch.bmm(x_i.transpose(1, 2), grad_left)
                grad_x[:, :, left] += torch.bmm(grad_left, matrix.transpose(1, 2))
        _, num_pairs, dim, _ = weight.shape
        grad_weight = grad_matrices.view(2, dim, num_pairs, dim).transpose(1, 2)
        return grad_fields, grad_weight.sum_to_size(weight.shape)


def _side_by_side(weight: Tensor) -> Tensor:
    """(1 or 2, P, D, D) -> (2, D, P * D)."""
    return weight.transpose(1, 2).flatten(2).expand(2, -1, -1)


def _blocks(num_fields: int, dim: int) -> Iterator[tuple[slice, slice, slice]]:
    """For each left field: its columns among those of all fields, those of the fields behind it, and its pairs'."""
    start = 0
    for field in range(num_fields - 1):
        pairs = slice(start, start + (num_fields - 1 - field) * dim)
        yield slice(field * dim, (field + 1) * dim), slice((field + 1) * dim, None), pairs
        start = pairs.stop


class _PairProducts(torch.autograd.Function):
    """left_i * right_j for i < j, (B, 2, F, D) twice -> (B, 2, P, D).

    One step for each left field, whose pairs lie side by side: to gather both sides of all pairs first would write,
    keep and, backwards, scatter twice the output's size, and take 2.5 times as long on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, num_fields: int) -> Tensor:
        ctx.save_for_backward(left, right)
        blocks = _blocks(num_fields, 1)
        return torch.cat([left[:, :, lefts] * right[:, :, rights] for lefts, rights, _ in blocks], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        for lefts, rights, pairs in _blocks(left.shape[2], 1):
            grad_left[:, :, lefts] = (grad[:, :, pairs] * right[:, :, rights]).sum(2, keepdim=True)
            grad_right[:, :, rights].addcmul_(grad[:, :, pairs], left[:, :, lefts])
        return grad_left, grad_right, None
