"""Cross network of DCN V2: R. Wang et al., "DCN V2", WWW 2021, https://arxiv.org/abs/2008.13535."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ctrlib.layers import init_linear


class CrossNetV2(nn.Module):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l on the flattened fields x_0  (eq. 1), full-rank W_l.

    The paper's parallel DCN-V2 is `Parallel(CrossNetV2(s), MLP(s))`; the stacked one
    `Stack(cross, MLP(cross.out_shape))`.

    Shape: (B, F, D) or (B, H) -> (B, F * D) or (B, H).

    >>> cross = CrossNetV2((2, 1), num_layers=1)
    >>> with torch.no_grad():
    ...     _ = cross.layers[0].weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> cross(torch.tensor([[[2.0], [3.0]]])).tolist()  # [2*3 + 2, 3*2 + 3]
    [[8.0, 9.0]]
    """

    def __init__(self, in_shape: tuple[int, ...], *, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"CrossNetV2 needs at least one layer, got num_layers={num_layers}")
        width = math.prod(in_shape)
        self.in_shape = tuple(in_shape)
        self.out_shape = (width,)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        init_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) or (B, H) -> (B, F * D) or (B, H)."""
        x_0 = x_l = x.flatten(1)
        for layer in self.layers:
            x_l = torch.addcmul(x_l, x_0, layer(x_l))
        return x_l
