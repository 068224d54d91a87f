"""Gated cross network of GDCN: F. Wang et al., "Towards Deeper, Lighter and Interpretable Cross Network for CTR
Prediction", CIKM 2023, https://arxiv.org/abs/2311.04635."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
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
        for cross, gate in zip(self.crosses, self.gates):
            c_l = torch.addcmul(c_l, c_0, cross(c_l) * torch.sigmoid(gate(c_l)))
        return c_l
