"""Batch normalisation over the rows of all processes, so that several train as one does on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.distributed import all_rows
from ctrlib.layers import Dice


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
    y, mean, var, count = _Normalise.apply(rows, weight, bias, eps)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1).clamp(min=1)), momentum)
    if x.dim() > 2:
        y = y.view(x.transpose(1, -1).shape).transpose(1, -1)
    return y


class _Normalise(torch.autograd.Function):
    """y = n w + b with n = (x - mean) / s, s = sqrt(var + eps), by the moments of all processes' rows.

    Also returns mean, var and count. dx = (dy - mean(dy) - n mean(dy n)) w / s, both means over all processes again.
    What goes over all elements is left to torch's kernels of batch normalisation, which take one pass where the
    formulas would take one for every operation (forward and backward of 2,048 x 400: 2.7 ms on one core, and 7.0).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype, x = x.dtype, x.float().contiguous()  # bfloat16 cannot even count the rows
        num_rows, num_columns = x.shape
        # Moments of the process's own rows, put together as Chan et al. (1979) do: sums of squares would cancel.
        mean, var = x.new_zeros(2, num_columns)
        if num_rows:
            mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        parts = all_rows(torch.cat([x.new_tensor([num_rows]), mean, var]).unsqueeze(0))
        counts, means, variances = parts[:, :1], *parts[:, 1:].chunk(2, dim=1)
        count = counts.sum().clamp(min=1)
        total_mean = (counts * means).sum(0) / count
        total_var = (counts * (variances + (means - total_mean).square())).sum(0) / count
        y = x
        if num_rows:
            y = torch.native_batch_norm(x, weight, bias, total_mean, total_var, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, total_mean, total_var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(total_mean, total_var, count)
        return y.to(dtype), total_mean, total_var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        dtype, grad = grad.dtype, grad.float().contiguous()
        products, sums = x.new_zeros(2, x.shape[1])  # of dy n and of dy, over the process's own rows
        if len(x):
            _, products, sums = torch.ops.aten.native_batch_norm_backward(
                grad, x, None, mean, var, None, None, False, ctx.eps, [False, True, True]
            )
        total = torch.stack([products, sums])
        dist.all_reduce(total)
        mean_product, mean_grad = total / count
        scale = (var + ctx.eps).rsqrt()
        slope = scale if weight is None else scale * weight
        dx = grad
        if len(x):  # -n mean(dy n) - mean(dy), then + dy, all of it times w / s
            terms = (-mean_product * slope, -mean_grad * slope)
            dx = torch.native_batch_norm(x, *terms, mean, var, False, 0.0, ctx.eps)[0].addcmul_(grad, slope)
        of_weight, of_bias = (None, None) if weight is None else (products, sums)
        return dx.to(dtype), of_weight, of_bias, None
