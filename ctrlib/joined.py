"""Layers done together in training on a CPU: when that may be, and what it is made of.

A step of a CTR network goes through memory for a third of its time. What is done in one pass, or never written out,
spares that, and gives what the plain layers give up to the order of sums. Whoever looks on, or asks for more than
gradients, gets the plain layers.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import torch.nn.modules.module as hooks
from torch import Tensor, nn
from torch.autograd import forward_ad

# Tests compare with the plain layers, which they get by False.
ENABLED: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


def has_hooks(*modules: nn.Module) -> bool:
    """Whether somebody waits for one of them to be called, or for its gradients, or has replaced what it does."""
    everywhere = (
        hooks._global_forward_hooks,
        hooks._global_forward_pre_hooks,
        hooks._global_backward_hooks,
        hooks._global_backward_pre_hooks,
    )
    return any(everywhere) or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )


def may_join() -> bool:
    """Whether layers may be done together: in a pass that autograd differentiates, and nothing else looks into."""
    return (
        ENABLED
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def own(module: nn.Module, name: str) -> bool:
    """Whether the very class of a module has this attribute: one that inherits it may do something else."""
    return name in vars(type(module))


class ScaledFields(NamedTuple):
    """Fields (B, F, D) of which those of N numbers, x_n v_n, are not written out: `numbers` x and `vectors` v.

    A linear layer of all fields reads x_n v_n as the number x_n by a weight of its own, W_n v_n, so that N columns do
    the work of N D; and all inner products of fields come out of sums. What is small stays in the processor's caches.
    """

    looked_up: Tensor  # (B, C, D)
    numbers: Tensor  # (B, N)
    vectors: Tensor  # (N, D)
    numbers_first: bool  # in the order of fields

    def written_out(self) -> Tensor:
        """The fields themselves, (B, F, D)."""
        blocks = [self.numbers.unsqueeze(2) * self.vectors, self.looked_up]
        return torch.cat(blocks if self.numbers_first else blocks[::-1], dim=1)

    def in_columns(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, H) and W (num_outputs, H), H = C D + N and up, with W x = weight times all fields behind each other."""
        rows = self.looked_up.flatten(1)
        if self.numbers_first:
            of_numbers, of_rows = weight.tensor_split([self.vectors.numel()], dim=1)
        else:
            of_rows, of_numbers = weight.tensor_split([rows.shape[1]], dim=1)
        of_numbers = (torch.unflatten(of_numbers, 1, self.vectors.shape) * self.vectors).sum(2)
        filling = (0, -(rows.shape[1] + len(self.vectors)) % 32)  # products of matrices like rows of 64 bytes
        x = torch.cat([rows, F.pad(self.numbers, filling)], dim=1)
        return x, torch.cat([of_rows, F.pad(of_numbers, filling)], dim=1)


def by_onednn(x: Tensor, *layers: nn.Module) -> bool:
    """Whether products of x (B, num_inputs) with these layers are to be those of `product`: in training on a CPU.

    torch multiplies fp32 matrices by MKL, after it has copied the bias to every row. oneDNN adds the bias as it writes,
    and its products themselves are up to a fifth faster on AMD's processors. It makes a program for each number of
    rows, though, which pays where that stays the same.
    """
    narrow = torch.is_autocast_enabled("cpu")
    return (
        isinstance(x, Tensor)  # `torch.fx` comes with a stand-in for one
        and x.device.type == "cpu"
        and x.dim() == 2
        and x.dtype in (torch.float32, torch.bfloat16 if narrow else torch.float32)
        and all(type(layer) is nn.Linear and layer.training for layer in layers)
        and all(weight.dtype == torch.float32 for layer in layers for weight in layer.parameters())
        and bool(torch.backends.mkldnn.enabled)
        and may_join()
        and not has_hooks(*layers)
        and (not narrow or (torch.get_autocast_dtype("cpu") == torch.bfloat16 and _multiplies_bfloat16()))
    )


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN does on this processor; without AVX-512 it does not, and torch multiplies in another way."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
    except RuntimeError:
        return False
    return True


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, of tensors of one kind (`in_autocast`), inside of a `torch.autograd.Function`.

    oneDNN could do ReLU as well, but its ReLU of NaN is 0 (findings/torch-fused-relu-hides-nan.sh): a step would go
    wrong without a word.
    """
    if torch.is_grad_enabled():  # a backward pass that is to be differentiated itself
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def in_autocast(*tensors: Any) -> list[Any]:
    """Tensors (or None) in the kind of numbers that autocast on a CPU multiplies, where it is on."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    kind = torch.get_autocast_dtype("cpu")
    return [None if tensor is None else tensor.to(kind) for tensor in tensors]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by oneDNN where that is faster.

    Shape: (B, num_inputs) -> (B, num_outputs).

    >>> layer = nn.Linear(3, 2)
    >>> x = torch.randn(4, 3)
    >>> bool(torch.allclose(linear(layer, x), layer(x), atol=1e-6))
    True
    """
    return multiply(layer, x) if by_onednn(x, layer) else cast(Tensor, layer(x))


def multiply(layer: nn.Module, x: Tensor | ScaledFields, *, relu: bool = False) -> Tensor:
    """layer(x), or ReLU of it, where `by_onednn` holds of x, or of the rows of fields.

    Shape: (B, num_inputs), or fields of so many numbers -> (B, num_outputs).
    """
    weight = cast(Tensor, layer.weight)
    if isinstance(x, ScaledFields):
        x, weight = x.in_columns(weight)
    y: Tensor = _Linear.apply(*in_autocast(x, weight, layer.bias), relu)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    """y = x W^T + b, or ReLU of it, whose gradient wants y alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        y = product(x, weight, bias)
        if relu:
            y.relu_()
        ctx.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        if y is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        return (
            product(grad, weight.t()) if of_x else None,
            grad.t() @ x if of_weight else None,
            grad.sum(0) if of_bias else None,
            None,
        )
