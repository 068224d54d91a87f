"""One linear layer per label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
        weight = self._weight(self.linear)
        with full_precision():
            return F.linear(x.to(weight.dtype), weight, self.bias)

    def of_parts(self, parts: Sequence[Tensor]) -> Tensor:
        """The logits of x_1, x_2, ... side by side, (B, H_1), (B, H_2), ... -> (B, T), without putting them there: on a
        CPU a wide tower's output and its gradient are copied at the cost of a layer."""
        if self.linear is None:
            return self.forward(torch.cat([*parts], dim=1))
        weights = torch.split(self._weight(self.linear), [x.shape[1] for x in parts], dim=1)
        with full_precision():
            logits: Tensor = _Scores.apply(parts[0], weights[0], self.bias)  # type: ignore[no-untyped-call]
            for x, weight in zip(parts[1:], weights[1:]):
                logits = logits + _Scores.apply(x, weight, None)  # type: ignore[no-untyped-call]
            return logits

    def _weight(self, linear: nn.Linear) -> Tensor:
        """(T, H), that of unweighted columns 1."""
        return torch.cat([linear.weight, self.ones], dim=1) if self.unweighted else linear.weight


class _Scores(torch.autograd.Function):
    """x w^T + b in the precision of w; the gradient of x is made in the precision of x, where autograd makes it in that
    of w, and for a single logit as the outer product that it is, in half the time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        narrow, narrow_weight = grad.to(x.dtype), weight.to(x.dtype)
        of_x = narrow * narrow_weight if len(weight) == 1 else narrow @ narrow_weight
        return of_x, grad.t() @ x.to(weight.dtype), grad.sum(0) if ctx.needs_input_grad[2] else None
