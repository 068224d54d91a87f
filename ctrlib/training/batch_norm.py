"""Batch normalisation over the rows of all processes, so that several train as one does on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.layers import Dice
from ctrlib.training.distributed import all_rows


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let every BatchNorm and Dice in `model` take mean and variance over the batches of all processes, in training.

    `nn.SyncBatchNorm` does this on GPUs only. Names and values of the weights stay; evaluation is untouched. Every
    process must then run every such layer equally often.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _SynchronisedBatchNorm
        elif isinstance(module, Dice):
            module.batch_norm = batch_norm


class _SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass  # the layer it was has built the network's shapes

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None, "cumulative averages (momentum=None) are not used in ctrlib"
        return batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, momentum=self.momentum, eps=self.eps
        )


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    momentum: float,
    eps: float,
) -> Tensor:
    """`F.batch_norm` in training mode, with the mean and variance of the rows of all processes.

    Shape: (N, C, ...) -> the same; N may differ between processes, and be 0.
    """
    size = x.shape
    rows = x.transpose(1, -1).reshape(-1, size[1]) if x.dim() > 2 else x
    y: Tensor
    y, mean, var, count = _Normalise.apply(rows, eps)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
    if weight is not None and bias is not None:
        y = torch.addcmul(bias, y, weight)
    if x.dim() > 2:
        y = y.view(x.transpose(1, -1).shape).transpose(1, -1)
    return y


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) with the moments of all processes' rows; also returns mean, var and count.

    dx = (dy - mean(dy) - y mean(dy y)) / sqrt(var + eps), both means over all processes again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype, x = x.dtype, x.float()  # bfloat16 cannot even count the rows
        num_rows = x.shape[0]
        # Deviations from the process's own mean, put together as Chan et al. (1979) do: sums of squares would cancel.
        mean = x.mean(0) if num_rows else x.new_zeros(x.shape[1])
        deviation = (x - mean).square().sum(0)
        parts = all_rows(torch.cat([x.new_tensor([num_rows]), mean, deviation]).unsqueeze(0))
        counts, means, deviations = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
        count = counts.sum().clamp(min=1)
        total_mean = (counts * means).sum(0) / count
        var = (deviations + counts * (means - total_mean).square()).sum(0) / count
        scale = (var + eps).rsqrt()
        y = (x - total_mean) * scale
        ctx.save_for_backward(y, scale, count)
        ctx.mark_non_differentiable(total_mean, var, count)
        return y.to(dtype), total_mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        y, scale, count = ctx.saved_tensors
        dtype, grad = grad.dtype, grad.float()
        sums = torch.stack([grad.sum(0), (grad * y).sum(0)])
        dist.all_reduce(sums)
        means = sums / count
        return ((grad - means[0] - y * means[1]) * scale).to(dtype), None
