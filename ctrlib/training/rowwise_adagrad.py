"""Row-wise Adagrad on dense gradients: what fbgemm's kernels do, for tables that every process holds as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ctrlib.errors import ArgumentError


class RowwiseAdagrad(torch.optim.Optimizer):
    """s_r += mean_d g_rd^2,  w_r -= lr g_r / (sqrt(s_r) + eps): one number s_r for each row r of a table.

    The rule of fbgemm's EXACT_ROWWISE_ADAGRAD, so that a table is trained alike whether its rows are spread over
    processes or copied to all of them. A row without gradient stays as it is. Every step passes over the whole
    table: it is meant for small ones.

    Shape: parameters (rows, columns), with dense gradients.

    Raises:
        ValueError: a parameter is not a matrix.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimiser = RowwiseAdagrad([weight], lr=0.1)
    >>> weight.grad = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    >>> optimiser.step()
    >>> weight.detach().tolist()
    [[0.0, 0.0], [-0.10000000149011612, -0.10000000149011612]]
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float = 0.02, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "eps": eps})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.dim() != 2:
                    raise ArgumentError(
                        f"row-wise Adagrad needs matrices, got a parameter of shape {tuple(weight.shape)}"
                    )
                self.state[weight]["sum"] = weight.new_zeros(weight.shape[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ArgumentError("row-wise Adagrad takes no closure: call backward, then step()")
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    total = self.state[weight]["sum"]
                    total += weight.grad.square().mean(1)
                    weight.addcdiv_(weight.grad, (total.sqrt() + group["eps"]).unsqueeze(1), value=-group["lr"])
