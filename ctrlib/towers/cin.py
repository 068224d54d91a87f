"""Compressed interaction network of xDeepFM: J. Lian et al., KDD 2018, https://arxiv.org/abs/1803.05170."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear

_BLOCK_ROWS = 512  # products of so many rows fit a core's cache (39 fields, 64 maps: 5 MB; 10 fields: 1.3 MB)


class CIN(nn.Module):
    """X^k_{h,*} = sum_i sum_j W^{k,h}_{ij} (X^{k-1}_{i,*} * X^0_{j,*})  (eq. 6), pooled p^k_h = sum_d X^k_{hd} (7).

    The output is p^+ = [p^1, ..., p^T], to which the head gives the weights w^o (eq. 8). xDeepFM (eq. 9) is
    `Parallel(MLP(s), CIN(s))` with `Wide` and a `LinearHead`.

    `num_maps`: H_1, ..., H_T, the feature maps of each layer. `bias`: one number per feature map, added at all D
    positions, as FuxiCTR and the authors' code have it; eq. 6 has none. As in the paper's experiments there is no
    activation between layers, and every map of a layer is both pooled and passed on: the authors' code can also split
    them, half for each.

    The last layer is used only through its pool, in which the sum over d can be taken first,
    p^T_h = sum_ij W_ij <X^{T-1}_i, X^0_j>, for a D-th of the arithmetic. The products of the other layers, B x D x
    H_{k-1} x F numbers, are never held: blocks of rows small enough for the cache are made, multiplied and, in the
    backward pass, made again.

    Shape: (B, F, D) -> (B, sum(num_maps)).

    Raises:
        ValueError: there is no layer, or a layer without maps.

    >>> cin = CIN((2, 2), num_maps=(1,), bias=False)
    >>> with torch.no_grad():
    ...     _ = cin.layers[0].weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    >>> cin(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])).tolist()  # 1*3 + 2*4
    [[11.0]]
    """

    def __init__(self, in_shape: tuple[int, int], *, num_maps: Sequence[int] = (64, 64, 64), bias: bool = True) -> None:
        super().__init__()
        if not num_maps or any(maps < 1 for maps in num_maps):
            raise ArgumentError(f"num_maps must be one or more positive integers, one a layer, got {tuple(num_maps)}")
        num_fields, _ = in_shape
        self.in_shape = tuple(in_shape)
        self.out_shape = (sum(num_maps),)
        # Column j * H_{k-1} + i of a layer's weight is W_ij.
        self.layers = nn.ModuleList(
            nn.Linear(num_fields * before, maps, bias=bias)
            for before, maps in zip((num_fields, *num_maps), num_maps, strict=False)
        )
        init_linear(self)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, H)."""
        num_fields, dim = self.in_shape
        *inner, last = cast("list[nn.Linear]", [*self.layers])
        x_0 = x_k = x_BFD.transpose(1, 2).reshape(-1, num_fields).to(last.weight.dtype)  # a row for each example and d
        pooled = []
        for layer in inner:
            x_k = _compress(x_0, x_k, layer.weight)
            if layer.bias is not None:
                x_k = x_k + layer.bias
            pooled.append(x_k.view(-1, dim, layer.out_features).sum(1))
        gram = torch.bmm(x_BFD, x_k.view(-1, dim, last.in_features // num_fields)).flatten(1)
        pooled.append(F.linear(gram, last.weight, None if last.bias is None else dim * last.bias))
        return torch.cat(pooled, dim=1)


@torch.fx.wrap
def _compress(x_0: Tensor, x_k: Tensor, weight: Tensor) -> Tensor:
    """Outer products of rows, (R, F) and (R, H), times the weight (H', F * H) -> (R, H')."""
    if torch.compiler.is_compiling():  # a compiler makes its own blocks, and cannot unroll a loop over the batch
        return F.linear(_outer(x_0, x_k), weight)
    out: Tensor = _Compress.apply(x_0, x_k, weight)  # type: ignore[no-untyped-call]
    return out


def _outer(x_0: Tensor, x_k: Tensor) -> Tensor:
    return (x_0.unsqueeze(2) * x_k.unsqueeze(1)).flatten(1)


class _Compress(torch.autograd.Function):
    """`F.linear(_outer(x_0, x_k), weight)`, block by block, and under autocast too in the weight's precision: products
    of products should not be rounded to 8 bits in between. (Autocast leaves operations with `out=` alone.)"""

    @staticmethod
    def forward(ctx: Any, x_0: Tensor, x_k: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_0, x_k, weight)
        out = x_k.new_empty(len(x_k), len(weight))
        for a, b, y in zip(*(torch.split(tensor, _BLOCK_ROWS) for tensor in (x_0, x_k, out)), strict=True):
            torch.mm(_outer(a, b), weight.t(), out=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_0, x_k, weight = ctx.saved_tensors
        grads = torch.empty_like(x_0), torch.empty_like(x_k), torch.zeros_like(weight)
        blocks = (torch.split(tensor, _BLOCK_ROWS) for tensor in (x_0, x_k, grad, *grads[:2]))
        for a, b, grad_y, grad_a, grad_b in zip(*blocks, strict=True):
            grads[2].addmm_(grad_y.t(), _outer(a, b))
            products = torch.mm(grad_y, weight, out=weight.new_empty(len(a), weight.shape[1]))
            products = products.view(-1, a.shape[1], b.shape[1])
            torch.bmm(products, b.unsqueeze(2), out=grad_a.unsqueeze(2))
            torch.bmm(a.unsqueeze(1), products, out=grad_b.unsqueeze(1))
        return grads
