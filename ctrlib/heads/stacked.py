"""Networks of one shape side by side: their weights are stacked, so that experts and the tasks' own layers are one
batched product each, and no Python loop.

A head of several labels takes (B, H), which all tasks read, or (S, B, H): one stream for each task, then, where a head
wants it, one that all share. The published shapes are (H,) and (S, H).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import Dropout, full_precision


class StackedLinear(nn.Module):
    """y_n = W_n x_n + b_n for N layers at once, Xavier-normal weights each; with `one_input` all read one x.

    Shape: (N, B, I), or (B, I) with `one_input` -> (N, B, O).

    >>> layer = StackedLinear(2, 3, 5, one_input=True)
    >>> x = torch.randn(4, 3)
    >>> bool(torch.allclose(layer(x)[1], x @ layer.weight[1].T + layer.bias[1]))
    True
    """

    def __init__(
        self, num_copies: int, num_inputs: int, num_outputs: int, *, bias: bool = True, one_input: bool = False
    ) -> None:
        super().__init__()
        self.shape, self.one_input = (-1, num_copies, num_outputs), one_input
        self.weight = nn.Parameter(torch.empty(num_copies, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.zeros(num_copies, 1, num_outputs)) if bias else None
        for weight in self.weight.unbind():
            nn.init.xavier_normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, B, I), or (B, I) with `one_input` -> (N, B, O)."""
        if self.one_input:  # one product, and the gradient of x comes in one piece
            bias = None if self.bias is None else self.bias.flatten()
            return F.linear(x, self.weight.flatten(0, 1), bias).view(self.shape).transpose(0, 1)
        if self.bias is None:
            return torch.bmm(x, self.weight.mT)
        return torch.baddbmm(self.bias, x, self.weight.mT)


class StackedHidden(nn.Sequential):
    """N times `ctrlib.layers.Hidden` without normalisation: Linear -> ReLU -> [Dropout] for each width.

    Shape: (N, B, I), or (B, I) with `one_input` -> (N, B, widths[-1]).

    Raises:
        ValueError: there is no copy or no width, or one below 1.

    >>> StackedHidden(3, 6, (4, 2), one_input=True)(torch.zeros(5, 6)).shape
    torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        num_copies: int,
        num_inputs: int,
        widths: Sequence[int],
        *,
        dropout: float = 0.0,
        one_input: bool = False,
    ) -> None:
        if num_copies < 1 or not widths or any(width < 1 for width in widths):
            raise ArgumentError(
                f"expected one or more networks of one or more hidden widths, all positive, got {num_copies} of "
                f"{tuple(widths)}"
            )
        layers: list[nn.Module] = []
        for width in widths:
            linear = StackedLinear(num_copies, num_inputs, width, one_input=one_input and not layers)
            layers += [linear, nn.ReLU(inplace=True)]
            if dropout:
                layers.append(Dropout(dropout))
            num_inputs = width
        super().__init__(*layers)


class TaskTowers(nn.Module):
    """z_t = w_t^T h_t + b_t, h_t the last of task t's own hidden layers, or its input if there are none.

    The part that every head of several labels ends with, and a head by itself.

    Shape: (B, H) or (T, B, H) -> (B, T) logits.

    Raises:
        ValueError: the input has neither one stream nor T.

    >>> TaskTowers((2, 6), num_tasks=2, hidden=(4,))(torch.zeros(2, 3, 6)).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """

    def __init__(
        self, in_shape: tuple[int, ...], *, num_tasks: int, hidden: Sequence[int] = (), dropout: float = 0.0
    ) -> None:
        super().__init__()
        width = check_streams(self, in_shape, num_tasks, {num_tasks})
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks,)
        one_input = len(in_shape) == 1
        self.hidden: nn.Module = nn.Identity()
        if hidden:
            self.hidden = StackedHidden(num_tasks, width, hidden, dropout=dropout, one_input=one_input)
        self.last = StackedLinear(num_tasks, hidden[-1] if hidden else width, 1, one_input=one_input and not hidden)

    def start_at(self, rates: Tensor) -> None:
        """Set the biases b_t to the logits of the labels' rates, (T,): what h_t = 0 then gives."""
        assert self.last.bias is not None
        with torch.no_grad():
            self.last.bias.copy_(rates.logit().view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) or (T, B, H) -> (B, T) logits."""
        x = self.hidden(x)
        with full_precision():
            logits: Tensor = self.last(x.to(self.last.weight.dtype)).squeeze(2).T
        return logits


def check_streams(head: nn.Module, in_shape: tuple[int, ...], num_tasks: int, allowed: set[int]) -> int:
    """The width H of (H,) or (S, H).

    Raises:
        ValueError: there is no task, or S is not among the `allowed` numbers of streams.

    >>> check_streams(nn.Identity(), (3, 8), 2, {3})
    8
    """
    if num_tasks < 1:
        raise ArgumentError(f"{type(head).__name__} needs one or more tasks, got num_tasks={num_tasks}")
    *streams, width = in_shape
    if streams and (len(streams) > 1 or streams[0] not in allowed):
        raise ArgumentError(
            f"{type(head).__name__} of {num_tasks} tasks expects a tower of shape (H,) or (S, H) with S of "
            f"{sorted(allowed)} streams, got {tuple(in_shape)}: a stream for each task, and, where S is one more, a "
            "last one that all share"
        )
    return width
