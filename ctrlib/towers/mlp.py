"""Plain multi-layer perceptron on the concatenated fields: the floor that every interaction tower must beat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ctrlib.joined import ScaledFields
from ctrlib.layers import Hidden


class MLP(nn.Module):
    """h = ReLU(W_L ... ReLU(W_1 flatten(e) + b_1) ... + b_L); the last hidden layer is the output.

    Shape: (B, F, D) or (B, H) -> (B, hidden[-1]).

    >>> import torch
    >>> tower = MLP((3, 4), hidden=(8, 5))
    >>> tower.out_shape, tower(torch.zeros(2, 3, 4)).shape
    ((5,), torch.Size([2, 5]))
    """

    reads_scaled_fields = True

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        hidden: Sequence[int] = (400, 400, 400),
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.layers = Hidden(math.prod(in_shape), hidden, batch_norm=batch_norm, dropout=dropout)
        self.out_shape = (hidden[-1],)

    def forward(self, x: Tensor | ScaledFields) -> Tensor:
        """(B, F, D) or (B, H) -> (B, hidden[-1])."""
        if isinstance(x, ScaledFields) and type(self.layers) is not Hidden:
            x = x.written_out()
        out: Tensor = self.layers(x if isinstance(x, ScaledFields) else x.flatten(1))
        return out
