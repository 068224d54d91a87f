"""Layers that towers and heads share. Knows nothing of the rest of ctrlib but which layers may be done together."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.errors import ArgumentError
from ctrlib.joined import ScaledFields, by_onednn, has_hooks, may_join, multiply


def full_precision() -> contextlib.AbstractContextManager[Any]:
    """Where bfloat16 autocast is on, off inside the block: for fields (a number's fifth digit can matter) and logits.

    >>> with torch.autocast("cpu", torch.bfloat16), full_precision():
    ...     print((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
    torch.float32
    """
    on = [device_type for device_type in ("cpu", "cuda") if torch.is_autocast_enabled(device_type)]
    if not on:
        return _AS_IT_IS
    stack = contextlib.ExitStack()
    for device_type in on:
        stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


_AS_IT_IS = contextlib.nullcontext()
_ONE_IN_BFLOAT16 = 0x3F80  # its bits


def init_linear(module: nn.Module) -> None:
    """Xavier-normal weights and zero biases for every `nn.Linear` inside: the initialisation of FuxiCTR and BARS.

    >>> layer = nn.Linear(2, 3)
    >>> init_linear(layer)
    >>> layer.bias.tolist()
    [0.0, 0.0, 0.0]
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class Dropout(nn.Module):
    """y = x m / (1 - p), m ~ Bernoulli(1 - p) per element, in training; y = x in evaluation (Srivastava et al. 2014).

    The same distribution as `nn.Dropout` with p rounded to 1/65,536, and torch's own generator, but four masks are cut
    from each 64-bit draw: on a CPU `F.dropout` samples one Bernoulli at a time, which costs a third of the training
    step of a small CTR network.

    Shape: any -> the same.

    >>> _ = torch.manual_seed(0)
    >>> y = Dropout(0.25)(torch.ones(1000))
    >>> sorted(set(y.tolist())), abs(y.mean().item() - 1) < 0.1
    ([0.0, 1.3333333730697632], True)
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ArgumentError(f"dropout probability must be in [0, 1), got {p}")
        self.p = p
        self._dropped = min(round(p * 65536), 65535)  # of 65,536 equally likely 16-bit draws

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements (training) or pass through (evaluation)."""
        if not self.training or self._dropped == 0:
            return x
        return x * self._kept(x).to(x.dtype).mul_(self._scale())

    def after_relu(self, x: Tensor) -> Tensor:
        """The same of ReLU(x) in training, in place of x, going half as often through memory, which is all it costs."""
        if self._dropped == 0:
            return x.relu_()
        kept = self._kept(x)
        if x.dtype == torch.bfloat16:
            kept = kept.mul_(_ONE_IN_BFLOAT16).view(torch.bfloat16)  # floats without a copy
        dropped: Tensor = _DropAfterReLU.apply(x, kept, self._scale())  # type: ignore[no-untyped-call]
        return dropped

    def _scale(self) -> float:
        return 65536 / (65536 - self._dropped)

    def _kept(self, x: Tensor) -> Tensor:
        """1 for each element of x that is kept, else 0, as 16-bit whole numbers."""
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        draws.random_(-(2**63), None)  # all 64 bits
        draws = draws.view(torch.int16)[: x.numel()].view(x.shape)
        if torch.compiler.is_compiling():  # which cannot work in place on a view of another kind of numbers
            return draws.ge(self._dropped - 32768).short()
        # In place: to make truth values and then floats of them takes twelve times as long.
        return draws.ge_(self._dropped - 32768)

    def extra_repr(self) -> str:
        """Shown inside the model's printout."""
        return f"p={self.p}"


class _DropAfterReLU(torch.autograd.Function):
    """y = ReLU(x) m / (1 - p) takes the place of x; its gradient wants y alone, which is positive where x goes through.

    Autograd would keep a mask of floats beside it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.mark_dirty(x)
        ctx.scale = scale
        x.relu_().mul_(kept).mul_(scale)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, y, 0).mul_(ctx.scale), None, None


class Hidden(nn.Sequential):
    """Hidden layers, each Linear -> [BatchNorm] -> ReLU -> [Dropout]; no final linear layer.

    The order inside a layer is that of FuxiCTR and BARS: batch normalisation comes before the activation.

    Shape: (..., num_inputs) -> (..., widths[-1]); with `batch_norm`, (B, num_inputs) only.

    >>> Hidden(6, (4, 2), batch_norm=True)(torch.zeros(3, 6)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self, num_inputs: int, widths: Sequence[int], *, batch_norm: bool = False, dropout: float = 0.0
    ) -> None:
        if not widths or any(width < 1 for width in widths):
            raise ArgumentError(f"hidden widths must be one or more positive integers, got {tuple(widths)}")
        layers: list[nn.Module] = []
        for width in widths:
            layers.append(nn.Linear(num_inputs, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            # In place: neither a linear layer nor a normalisation needs its output again.
            layers.append(nn.ReLU(inplace=True))
            if dropout:
                layers.append(Dropout(dropout))
            num_inputs = width
        super().__init__(*layers)
        init_linear(self)

    def forward(self, x: Tensor | ScaledFields) -> Tensor:
        """(..., num_inputs), or fields of so many numbers -> (..., widths[-1])."""
        return through(self, x)


def through(layers: Iterable[nn.Module], x: Tensor | ScaledFields) -> Tensor:
    """What `nn.Sequential(*layers)(x)` gives, with ReLU done in one pass with what is before or behind it.

    What goes into a ReLU that is in place may be overwritten, as by the ReLU itself, and nothing else.

    Shape: (B, num_inputs) -> (B, num_outputs).

    >>> layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    >>> x = torch.randn(5, 3)
    >>> bool(torch.allclose(through(layers, x), nn.Sequential(*layers)(x), atol=1e-6))
    True
    """
    waiting = deque(layers)
    if isinstance(x, ScaledFields) and not by_onednn(x.looked_up.flatten(1), waiting[0]):
        x = x.written_out().flatten(1)
    watched = False  # whether somebody may hold what the layer before gave, so that it must stay as it is
    while waiting:
        layer = waiting.popleft()
        if isinstance(x, ScaledFields) or by_onednn(x, layer):
            relu = bool(waiting) and _is_joined(waiting[0], nn.ReLU) and not _drops(*itertools.islice(waiting, 2))
            x = multiply(layer, x, relu=relu)
            if relu:
                waiting.popleft()
        elif not watched and _drops(layer, *itertools.islice(waiting, 1)):
            x = cast(Dropout, waiting.popleft()).after_relu(x)
        else:
            x = layer(x)
        watched = has_hooks(layer)
    return cast(Tensor, x)


def _is_joined(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer is plainly of this kind, in training, and may be done together with another."""
    return type(layer) is kind and layer.training and may_join() and not has_hooks(layer)


def _drops(*layers: nn.Module) -> bool:
    """Whether these are ReLU, in place, and dropout."""
    return (
        len(layers) == 2
        and _is_joined(layers[0], nn.ReLU)
        and cast(nn.ReLU, layers[0]).inplace
        and _is_joined(layers[1], Dropout)
    )


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` in the precision of its weights, under bfloat16 autocast too.

    On a CPU, torch (2.13) adds up the gradients of gain and bias in bfloat16 if its input is: over 10,000 rows they are
    6 to 16 % off, over 100,000 nearly half (findings/torch-layer-norm-bf16.sh).

    Shape: (..., C) -> (..., C).

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     LayerNorm(3)(torch.zeros(2, 3).bfloat16()).dtype
    torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return super().forward(x.to(self.weight.dtype))


class LowRankLinear(nn.Sequential):
    """y = U (V x + a) + b, with U of R columns: two thin layers in the place of one `nn.Linear`.

    R (in + out) + R + out weights instead of in * out + out: fewer if R < in * out / (in + out). `activation` goes
    between the two. Initial weights as `init_linear` makes them.

    Shape: (..., num_inputs) -> (..., num_outputs).

    Raises:
        ValueError: the rank is not from 1 to the smaller of both widths.

    >>> layer = LowRankLinear(6, 5, rank=2)
    >>> layer(torch.zeros(3, 6)).shape, sum(weight.numel() for weight in layer.parameters())
    (torch.Size([3, 5]), 29)
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, rank: int, activation: nn.Module | None = None) -> None:
        if not 1 <= rank <= min(num_inputs, num_outputs):
            raise ArgumentError(
                f"rank={rank}: expected 1 to {min(num_inputs, num_outputs)}, the smaller width of a layer "
                f"{num_inputs} -> {num_outputs}"
            )
        between = [] if activation is None else [activation]
        super().__init__(nn.Linear(num_inputs, rank), *between, nn.Linear(rank, num_outputs))
        init_linear(self)
        self.num_inputs, self.num_outputs, self.rank = num_inputs, num_outputs, rank

    def describe(self) -> dict[str, int]:
        """What the constructor takes to make a linear one again, without its weights: plain data."""
        return {"num_inputs": self.num_inputs, "num_outputs": self.num_outputs, "rank": self.rank}


class Dice(nn.Module):
    """y = p x + (1 - p) alpha x,  p = sigmoid((x - E[x]) / sqrt(Var[x] + eps))  (DIN, KDD 2018).

    A PReLU whose turning point follows the data: per channel, mean and (biased) variance of the batch in training,
    running ones in evaluation or where a batch has fewer than two rows. alpha starts at 0. The paper's eps is 1e-8.
    Over events of histories, statistics are those of real events only; FuxiCTR's count padded positions too, so that
    there the amount of padding changes them. Momentum is FuxiCTR's.

    Shape: (N, C) -> (N, C).

    >>> [round(y, 4) for y in Dice(1)(torch.tensor([[-1.0], [0.0], [1.0], [2.0]])).flatten().tolist()]
    [-0.2072, 0.0, 0.61, 1.5855]
    """

    running_mean: Tensor
    running_var: Tensor
    # Takes the place of F.batch_norm in training where several processes share their statistics.
    batch_norm: Callable[..., Tensor] | None = None

    def __init__(self, num_channels: int, *, eps: float = 1e-8, momentum: float = 0.01) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.alpha = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        if self.training and self.batch_norm is not None:
            z = self.batch_norm(x, self.running_mean, self.running_var, momentum=self.momentum, eps=self.eps)
        elif self.training and x.shape[0] > 1:
            z = F.batch_norm(
                x, self.running_mean, self.running_var, training=True, momentum=self.momentum, eps=self.eps
            )
        else:
            scale = (self.running_var + self.eps).rsqrt()
            z = torch.addcmul(-self.running_mean * scale, x, scale)
        return x * torch.addcmul(self.alpha, z.sigmoid(), 1 - self.alpha)


class PairwiseDots(nn.Module):
    """<e_i, e_j> for every pair of fields i < j, row by row: (0, 1), (0, 2), ..., (F - 2, F - 1).

    Shape: (B, F, D) -> (B, F * (F - 1) / 2).

    >>> PairwiseDots(3)(torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 3.0]]])).tolist()
    [[2.0, 0.0, 3.0]]
    """

    pairs: Tensor
    entries: Tensor

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        first, second = torch.triu_indices(num_fields, num_fields, offset=1)
        self.num_pairs = len(first)
        # Entry (i, j) of the matrix of products holds pair entries[i F + j]; the diagonal none, so one past the last.
        entries = torch.full((num_fields, num_fields), self.num_pairs)
        entries[first, second] = entries[second, first] = torch.arange(self.num_pairs)
        self.register_buffer("pairs", first * num_fields + second, persistent=False)
        self.register_buffer("entries", entries.flatten(), persistent=False)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """(B, F, D) -> (B, F * (F - 1) / 2)."""
        dots: Tensor = _UpperTriangle.apply(x_BFD, self.pairs, self.entries)  # type: ignore[no-untyped-call]
        return dots


class _UpperTriangle(torch.autograd.Function):
    """The upper triangle of X X^T, with its gradient (G + G^T) X written out: one product where autograd takes two, and
    G + G^T is one gather. Autograd's scatter into G is the slowest part of a dot interaction on a CPU."""

    @staticmethod
    def forward(ctx: Any, x_BFD: Tensor, pairs: Tensor, entries: Tensor) -> Tensor:
        ctx.save_for_backward(x_BFD, entries)
        return torch.bmm(x_BFD, x_BFD.transpose(1, 2)).flatten(1).index_select(1, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BP: Tensor) -> tuple[Tensor, None, None]:
        x_BFD, entries = ctx.saved_tensors
        num_fields = x_BFD.shape[1]
        grad_BFF = F.pad(grad_BP, (0, 1)).index_select(1, entries).view(-1, num_fields, num_fields)
        # Under autocast the dots, and so their gradient, are narrower than the fields; backward does not run under it.
        return torch.bmm(grad_BFF, x_BFD.to(grad_BFF.dtype)).to(x_BFD.dtype), None, None
