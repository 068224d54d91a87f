"""Gated cross network of GDCN: F. Wang et al., "Towards Deeper, Lighter and Interpretable Cross Network for CTR
Prediction", CIKM 2023, https://arxiv.org/abs/2311.04635."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.joined import by_onednn, in_autocast, product
from ctrlib.layers import init_linear


class GatedCrossNet(nn.Module):
    """c_{l+1} = c_0 * (W_l^c c_l + b_l) * sigmoid(W_l^g c_l) + c_l on the flattened fields c_0: the paper's gated cross
    layer. The information gate, the last factor, decides element by element how much of the crossing comes through.

    The paper's GDCN-P is `Parallel(GatedCrossNet(s), MLP(s))` and its GDCN-S is `Stack(cross, MLP(cross.out_shape))`;
    its GCN is this tower alone.

    The initial biases are uniform on [0, 1), as in the authors' code and in FuxiCTR, so that the first steps already
    cross something; the weights are Xavier-normal, as in FuxiCTR (the authors keep torch's default). The gate has no
    bias.

    Shape: (B, F, D) or (B, H) -> (B, F * D) or (B, H).

    Raises:
        ValueError: there is no layer.

    >>> cross = GatedCrossNet((2, 1), num_layers=1)
    >>> with torch.no_grad():  # a gate of weight 0 lets half of each crossing through
    ...     _ = cross.crosses[0].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]])), cross.crosses[0].bias.zero_()
    ...     _ = cross.gates[0].weight.zero_()
    >>> cross(torch.tensor([[[2.0], [3.0]]])).tolist()  # [2*3/2 + 2, 3*2/2 + 3]
    [[5.0, 6.0]]
    """

    def __init__(self, in_shape: tuple[int, ...], *, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ArgumentError(f"GatedCrossNet needs at least one layer, got num_layers={num_layers}")
        width = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (width,)
        crosses = [nn.Linear(width, width) for _ in range(num_layers)]
        self.crosses = nn.ModuleList(crosses)
        self.gates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))
        init_linear(self)
        for cross in crosses:
            nn.init.uniform_(cross.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) or (B, H) -> (B, F * D) or (B, H)."""
        c_0 = c_l = x.flatten(1)
        biases = [cross.bias for cross in self.crosses]
        if by_onednn(c_0, *self.crosses, *self.gates) and all(bias is not None for bias in biases):
            weights = [layer.weight for layer in (*self.crosses, *self.gates)]
            crossed: Tensor = _GatedCrosses.apply(c_0, *in_autocast(*biases, *weights))  # type: ignore[no-untyped-call]
            return crossed
        for cross, gate in zip(self.crosses, self.gates):
            c_l = torch.addcmul(c_l, c_0, cross(c_l) * torch.sigmoid(gate(c_l)))
        return c_l


class _GatedCrosses(torch.autograd.Function):
    """All layers of `GatedCrossNet` as c_l = c_0 * (1 + s_l) with s_{l+1} = s_l + (W^c c_l + b_l) * sigmoid(W^g c_l).

    As in `ctrlib.towers.crossnet`: the gradient of c_l, g_l, gives g_l * c_0 to s_l and g_l * (1 + s_l) to c_0.
    """

    @staticmethod
    def forward(ctx: Any, c_0: Tensor, *parameters: Tensor) -> Tensor:
        num_layers = len(parameters) // 3
        narrow = c_l = c_0.to(parameters[0].dtype)
        saved: list[Tensor] = []
        total = torch.zeros_like(narrow)
        for bias, cross, gate in zip(*(parameters[n * num_layers :][:num_layers] for n in range(3))):
            u, s = product(c_l, cross, bias), product(c_l, gate).sigmoid_()
            saved += [cross, gate, c_l, u, s, total]
            total = torch.addcmul(total, u, s)
            c_l = torch.addcmul(narrow, narrow, total)
        ctx.save_for_backward(narrow, total, *saved)
        return torch.addcmul(c_0, c_0, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        narrow, total, *saved = ctx.saved_tensors
        of_c = grad.to(narrow.dtype)
        of_c_0, of_sum = torch.addcmul(of_c, of_c, total), of_c * narrow
        of_biases, of_crosses, of_gates = [], [], []
        for start in range(len(saved) - 6, -1, -6):
            cross, gate, c_l, u, s, total = saved[start : start + 6]
            of_u = of_sum * s
            of_gate = (of_u * u).mul_(1 - s)
            of_biases.append(of_u.sum(0))
            of_crosses.append(of_u.t() @ c_l)
            of_gates.append(of_gate.t() @ c_l)
            of_c = product(of_u, cross.t()).add_(product(of_gate, gate.t()))
            of_c_0.add_(of_c).addcmul_(of_c, total)
            of_sum.addcmul_(of_c, narrow)
        return of_c_0.to(grad.dtype), *of_biases[::-1], *of_crosses[::-1], *of_gates[::-1]
