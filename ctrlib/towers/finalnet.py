"""FINAL: J. Zhu et al., "FINAL: Factorized Interaction Layer for CTR Prediction", SIGIR 2023,
https://doi.org/10.1145/3539618.3591988."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.joined import linear
from ctrlib.layers import Dropout, init_linear, through


class FinalBlock(nn.Module):
    """x_l = ReLU(BN([h_l1, h_l2])), h_l1 = W_l1 x_{l-1} + b_l1, h_l2 = h_l1 * (W_l2 x_{l-1} + b_l2): the FINAL block.

    Each layer doubles the degree of what it reads, where a linear layer keeps it. FinalNet with one block is
    `FinalBlock` with `LinearHead`; with two, `Parallel(FinalBlock(s, field_gate=True), FinalBlock(s))` with
    `EnsembleHead(tower.out_shape, widths=(H_1, H_2))`, where each block learns from their mean as well.

    The layer is that of the authors' code in FuxiCTR and of its published results. The paper has an activation around
    the second factor, any number of factors, and adds the terms up: `concat=False` adds h_l1 + h_l2, and then the two
    have H weight rows each in place of H / 2. Order inside a layer: norm, ReLU, dropout.

    `field_gate` appends a gated copy of every field before the first layer (`FieldGate`).

    Shape: (B, F, D) -> (B, hidden[-1]).

    Raises:
        ValueError: a hidden width is not positive, or odd with `concat`.

    >>> block = FinalBlock((3, 4), hidden=(8, 6), field_gate=True)
    >>> block.out_shape, block(torch.zeros(2, 3, 4)).shape
    ((6,), torch.Size([2, 6]))
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        hidden: Sequence[int] = (400, 400),
        field_gate: bool = False,
        concat: bool = True,
        batch_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise ArgumentError(f"hidden widths must be one or more positive integers, got {tuple(hidden)}")
        num_fields, field_dim = in_shape
        self.in_shape = tuple(in_shape)
        self.out_shape = (hidden[-1],)
        layers: list[nn.Module] = []
        num_inputs = num_fields * field_dim
        if field_gate:
            layers.append(FieldGate(num_fields))
            num_inputs *= 2
        layers.append(nn.Flatten())
        for width in hidden:
            layers.append(FactorizedInteraction(num_inputs, width, concat=concat))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers.append(nn.ReLU(inplace=True))  # neither norm nor interaction needs its output again
            if dropout:
                layers.append(Dropout(dropout))
            num_inputs = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, hidden[-1])."""
        return through(self.layers, x_BFD)


class FactorizedInteraction(nn.Module):
    """[h_1, h_1 * h_2] (`concat`) or h_1 + h_1 * h_2 with [h_1, h_2] = W x + b: linear and quadratic terms of x.

    Shape: (B, num_inputs) -> (B, num_outputs).

    Raises:
        ValueError: `num_outputs` is odd with `concat`: half of the columns are linear, half quadratic.

    >>> layer = FactorizedInteraction(1, 2)
    >>> with torch.no_grad():
    ...     _ = layer.linear.weight.copy_(torch.tensor([[2.0], [3.0]]))
    >>> layer(torch.tensor([[1.0], [2.0]])).tolist()  # 2 x and 2 x * 3 x
    [[2.0, 6.0], [4.0, 24.0]]
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, concat: bool = True) -> None:
        super().__init__()
        if concat and num_outputs % 2:
            raise ArgumentError(
                f"concat gives one half of the outputs to linear terms and one to quadratic ones, got {num_outputs} "
                "outputs: take an even number, or concat=False"
            )
        self.concat = concat
        self.linear = nn.Linear(num_inputs, num_outputs if concat else 2 * num_outputs)
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, num_inputs) -> (B, num_outputs)."""
        h = linear(self.linear, x)
        if not self.concat:
            h_1, h_2 = h.chunk(2, dim=1)
            return torch.addcmul(h_1, h_1, h_2)
        out: Tensor = _AppendProduct.apply(h)  # type: ignore[no-untyped-call]
        return out


class _AppendProduct(torch.autograd.Function):
    """[h_1, h_2] -> [h_1, h_1 * h_2], whose gradient is written straight into one tensor of h's size: autograd would
    make it in pieces, add and join them."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        h_1, h_2 = h.chunk(2, dim=1)
        return torch.cat([h_1, h_1 * h_2], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        h_1, h_2 = h.chunk(2, dim=1)
        grad_1, grad_2 = grad.chunk(2, dim=1)
        out = torch.empty_like(h)
        out_1, out_2 = out.chunk(2, dim=1)
        torch.addcmul(grad_1, grad_2, h_2, out=out_1)
        torch.mul(grad_2, h_1, out=out_2)
        return out


class FieldGate(nn.Module):
    """[e_f, e_f * g_f] with g_f = sum_g W_fg e_g + b_f, for each dimension by itself: a gated copy of every field.

    W starts at 0 and b at 1, so that the copies start as the fields.

    Shape: (B, F, D) -> (B, 2 F, D), the gated copies last.

    >>> FieldGate(2)(torch.tensor([[[3.0], [4.0]]])).flatten().tolist()
    [3.0, 4.0, 3.0, 4.0]
    """

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_fields, num_fields))
        self.bias = nn.Parameter(torch.ones(num_fields, 1))

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, 2 F, D)."""
        gates = torch.matmul(self.weight, x_BFD) + self.bias
        return torch.cat([x_BFD, x_BFD * gates], dim=1)
