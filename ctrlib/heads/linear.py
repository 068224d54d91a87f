"""One linear layer per label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import full_precision, init_linear


class LinearHead(nn.Module):
    """z_t = w_t^T h + b_t.

    `unweighted`: the last so many columns of h are added to every logit as they are, without a weight: for terms that
    are logits already, such as FM's second-order sum in DeepFM (eq. 1 there).

    Shape: (B, H) -> (B, T) logits.

    Raises:
        ValueError: `unweighted` is more than H.

    >>> head = LinearHead((3,), unweighted=3)
    >>> head(torch.tensor([[1.0, 2.0, 4.0]])).tolist()
    [[7.0]]
    """

    def __init__(self, in_shape: tuple[int], *, num_tasks: int = 1, unweighted: int = 0) -> None:
        super().__init__()
        (width,) = in_shape
        if not 0 <= unweighted <= width:
            raise ArgumentError(f"unweighted must be between 0 and the tower's width {width}, got {unweighted}")
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_tasks,)
        self.unweighted = unweighted
        # No linear layer where nothing is weighted: torch warns about one without inputs.
        self.linear = nn.Linear(width - unweighted, num_tasks, bias=False) if width > unweighted else None
        self.ones: Tensor
        self.register_buffer("ones", torch.ones(num_tasks, unweighted), persistent=False)
        self.bias = nn.Parameter(torch.zeros(num_tasks))
        init_linear(self)

    def start_at(self, rates: Tensor) -> None:
        """Set the biases b_t to the logits of the labels' rates, (T,): what an input of 0 then gives."""
        with torch.no_grad():
            self.bias.copy_(rates.logit())

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) -> (B, T) logits."""
        if self.linear is None:
            return x.sum(1, keepdim=True) + self.bias
        weight = self.linear.weight
        if self.unweighted:
            # One product with fixed ones: to cut x in two would make its gradient in pieces.
            weight = torch.cat([weight, self.ones], dim=1)
        with full_precision():
            return F.linear(x.to(weight.dtype), weight, self.bias)
