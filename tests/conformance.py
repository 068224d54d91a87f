"""What every tower and head must do, as checks: keep the contract, trace and export, compute under bfloat16 autocast.

`tests/test_conformance.py` runs them on every part of the library as its constructor makes it. Where options change the
path through the code, the part's own test file runs them on variants, in one line: `test_variants = conforms(TOWERS)`.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ctrlib import joined
from ctrlib.testing import check_head, check_tower

Make = Callable[[Any], nn.Module]

TOWER_SHAPE = (5, 8)
HEAD_SHAPE = (6,)


def conforms(makes: Mapping[str, Make], in_shape: tuple[int, ...] = TOWER_SHAPE, *, head: bool = False) -> Any:
    """A test of all checks for each of these towers, or heads."""

    @pytest.mark.parametrize("check", CHECKS)
    @pytest.mark.parametrize("name", makes)
    def test(name: str, check: str) -> None:
        torch.manual_seed(0)
        CHECKS[check](makes[name], in_shape, head)

    return test


# The contract.


class Rows(nn.Module):
    """A part that takes or gives streams (S, B, H), or gives fields (B, F, D), as one from rows to rows."""

    def __init__(self, part: nn.Module, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.part, self.in_shape, self.out_shape = part, in_shape, (math.prod(part.out_shape),)

    def forward(self, x: Tensor) -> Tensor:
        size, inner, outer = len(x), self.part.in_shape, self.part.out_shape
        if x.shape[1:] != inner:
            x = x.view(size, *inner).transpose(0, 1)
        out: Tensor = self.part(x)
        if out.shape == (outer[0], size, *outer[1:]):
            out = out.transpose(0, 1)
        assert out.shape == (size, *outer), f"{type(self.part).__name__} gives {tuple(out.shape)}, published {outer}"
        return out.flatten(1)


def check_contract(make: Make, in_shape: tuple[int, ...], head: bool) -> None:
    """`ctrlib.testing.check_tower` or `check_head`, through `Rows` where the part has more than rows at an end."""
    of_rows = (math.prod(in_shape),) if head else in_shape
    part = make(in_shape)
    assert part.in_shape == in_shape, f"in_shape is {part.in_shape}, was built for {in_shape}"
    plain = of_rows == in_shape and len(part.out_shape) == 1
    check = check_head if head else check_tower
    check(lambda _: make(in_shape) if plain else Rows(make(in_shape), of_rows), in_shape=of_rows)  # type: ignore[operator]


# Tracing and export.


def inputs(in_shape: tuple[int, ...], size: int, head: bool) -> tuple[Tensor, int]:
    """Random input of `size` rows, and which of its axes the rows are: streams come before it."""
    axis = len(in_shape) - (1 if head else 2)
    return torch.randn(*in_shape[:axis], size, *in_shape[axis:]), axis


def check_traced_and_exported(make: Make, in_shape: tuple[int, ...], head: bool) -> None:
    """A trace by torch.fx and an export with any number of rows give what the part gives."""
    part = make(in_shape).eval()
    with torch.no_grad():
        for name, tensor in part.state_dict().items():  # away from zeros and ones, so that each has its effect
            if tensor.is_floating_point():
                tensor.add_(0.1 * (torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)))
    traced = torch.fx.symbolic_trace(part)
    example, axis = inputs(in_shape, 4, head)
    dynamic = ({axis: torch.export.Dim("rows", min=1)},)
    exported = torch.export.export(part, (example,), dynamic_shapes=dynamic).module()
    for size in (1, 130):
        x, _ = inputs(in_shape, size, head)
        torch.testing.assert_close(traced(x), part(x))
        torch.testing.assert_close(exported(x), part(x))


# Joined forms.


def check_fused(make: Make, in_shape: tuple[int, ...], head: bool) -> None:
    """In training on a CPU, output and gradients are those of the plain layers, up to the order of sums."""
    part = make(in_shape)
    x = inputs(in_shape, 32, head)[0].requires_grad_()
    fused = _run(part, x, contextlib.nullcontext(), 0)
    with mock.patch.object(joined, "ENABLED", False):
        plain = _run(part, x, contextlib.nullcontext(), 0)
    assert fused.keys() == plain.keys()
    for name, value in plain.items():
        error, size = (fused[name] - value).norm().item(), value.norm().item()
        assert error <= 1e-5 * size + 1e-6, f"{name} is off by {error}, where its size is {size}"


# Autocast.
#
# Under autocast a product of matrices takes and gives bfloat16, and so do the steps on its result until something is
# float32 again. bfloat16 has 8 significant bits: a rounding changes a number by up to 2^-8 of it, and a vector by
# about 2^-9.4. What comes of that depends on the part. Degrees add up, differences cancel, and a ReLU or a maximum
# near its edge may switch, which a gradient shows as a change of size one. So a fixed percentage is either loose, or
# fails with the next processor. Instead, the same run is made once more in float32, with every value and every gradient
# rounded where autocast holds it in bfloat16 (`_Rounded`), and once in plain float32. The distance of these two is what
# the roundings do to this part; autocast has to come as close to the rounded run. Most parts hit it to the last bit.


class _Round(torch.autograd.Function):
    """x, rounded to bfloat16 and kept in float32; its gradient likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.bfloat16().float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.bfloat16().float()


class _Recorded(TorchFunctionMode):
    """Notes every call, and the types of what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[torch.dtype]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, [tensor.dtype for tensor in _tensors(out)]))
        return out


class _Rounded(TorchFunctionMode):
    """Computes in float32, and rounds where the recorded run, call by call the same, held bfloat16.

    Only what comes of products is held in bfloat16: a part that narrows float32 by itself is refused.
    """

    PRODUCTS = frozenset(
        [F.linear, torch.conv2d, torch.einsum, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__]
        + [getattr(place, name) for place in (torch, Tensor) for name in ("mm", "bmm", "addmm", "baddbmm")]
    )

    def __init__(self, calls: list[tuple[Any, list[torch.dtype]]]) -> None:
        super().__init__()
        self.calls = iter(calls)
        self.num_roundings = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorded, dtypes = next(self.calls)
        assert recorded is func or recorded == func, f"{func} is called where autocast called {recorded}"
        is_product = func in self.PRODUCTS and torch.bfloat16 in dtypes
        if not is_product and not any(_is_narrow(tensor) for tensor in _tensors([args, list(kwargs.values())])):
            out = func(*args, **kwargs)
            own = [tensor for tensor in _tensors(out) if tensor.dtype == torch.bfloat16]
            assert not own, (
                f"{func.__name__} narrows float32 to bfloat16: leave that to autocast, at products of matrices"
            )
            return out

        def use(tensor: Tensor) -> Tensor:
            if tensor.dtype == torch.float32 and (is_product or _is_narrow(tensor)):
                return self._round(tensor)
            return tensor

        # What works in place has to work on that place.
        first = args[:1] if func.__name__.endswith("_") and not func.__name__.endswith("__") else _mapped(use, args[:1])
        with torch.autocast("cpu", enabled=False) if is_product else contextlib.nullcontext():
            out = func(*first, *_mapped(use, args[1:]), **_mapped(use, kwargs))
        types_of_out = iter(dtypes)

        def hold(tensor: Tensor) -> Tensor:
            if next(types_of_out) == torch.bfloat16 and tensor.is_floating_point():
                if not torch.equal(low := tensor.bfloat16().to(tensor.dtype), tensor):
                    tensor.data.copy_(low)  # where it is, since derivatives (of softmax, tanh) may read what came out
                tensor = self._round(tensor.float())
                tensor.is_narrow = True  # type: ignore[attr-defined]
            return tensor

        return _mapped(hold, out)

    def _round(self, tensor: Tensor) -> Tensor:
        self.num_roundings += 1
        rounded: Tensor = _Round.apply(tensor)
        return rounded


def _is_narrow(tensor: Tensor) -> bool:
    return getattr(tensor, "is_narrow", False)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _tensors(branch)


def _mapped(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _mapped(change, branch) for name, branch in tree.items()}
    return type(tree)(_mapped(change, branch) for branch in tree) if type(tree) in (list, tuple) else tree


def check_autocast(make: Make, in_shape: tuple[int, ...], head: bool, *, seed: int = 0) -> None:
    """Under bfloat16 autocast, output and gradients are those of float32 with the same numbers rounded."""
    shares = autocast_shares(make, in_shape, head, seed=seed)
    beyond = {name: round(share, 2) for name, share in shares.items() if not share < 1}
    assert not beyond, f"under autocast these are off, in units of what rounding explains: {beyond}"


def autocast_shares(make: Make, in_shape: tuple[int, ...], head: bool, *, seed: int = 0) -> dict[str, float]:
    """Of the output and of every gradient, the difference from the rounded run as a share of what is allowed.

    Allowed are two things. Twice what the roundings do: two sets of roundings of the same numbers that fall differently
    are sqrt(2) times that apart. And what kernels narrow inside, where the rounded run sees only what goes in and comes
    out, such as the sum of a number's gradients from all its readers: two or three roundings of 2^-9.4, say 2^-8 of the
    whole. A part without a product rounds nothing, and has to be float32's to its last digits.

    The share is the median over 7 draws of weights and inputs: a single one may be near an edge. Over 20 times 7 draws
    the largest median of any part was 0.65. A step inside that is 3 % off brings most parts beyond 1.
    """
    shares: dict[str, list[float]] = {}
    for number in range(7 * seed, 7 * seed + 7):
        torch.manual_seed(number)
        part = make(in_shape)
        x = inputs(in_shape, 32, head)[0].requires_grad_()
        exact = _run(part, x, contextlib.nullcontext(), number)
        for backward_inside in (True, False):
            record = _Recorded()
            with mock.patch.object(joined, "ENABLED", False):
                plain = _run(part, x, record, number, autocast=True, backward_inside=backward_inside)
                rounding = _Rounded(record.calls)
                rounded = _run(part, x, rounding, number, autocast=True, backward_inside=backward_inside)
            # What is joined by hand for CPUs rounds in other places, and is held to the same measure.
            fused = _run(part, x, contextlib.nullcontext(), number, autocast=True, backward_inside=backward_inside)
            inside = 2**-8 if rounding.num_roundings else 1e-5
            for how, got in (("plain", plain), ("fused", fused)):
                assert got.keys() == exact.keys(), f"no gradient under autocast: {exact.keys() - got.keys()}"
                for name, value in exact.items():
                    allowed = 2 * (rounded[name] - value).norm() + inside * value.norm()
                    share = (got[name] - rounded[name]).norm() / allowed.clamp(min=1e-30)
                    key = f"{name}, {how}, backward {'inside' if backward_inside else 'outside'}"
                    shares.setdefault(key, []).append(share.item())
    return {key: statistics.median(values) for key, values in shares.items()}


def _run(
    part: nn.Module, x: Tensor, mode: Any, seed: int, *, autocast: bool = False, backward_inside: bool = False
) -> dict[str, Tensor]:
    """The output, and the gradients of a random sum of it."""
    leaves = {"input": x, **dict(part.named_parameters())}
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(seed)  # of dropout
    with mode:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = part(x)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and backward_inside):
            torch.autograd.backward(out.float(), direction)
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": out.detach().float(), **found}


CHECKS: dict[str, Callable[[Make, tuple[int, ...], bool], None]] = {
    "contract": check_contract,
    "export": check_traced_and_exported,
    "fused": check_fused,
    "autocast": check_autocast,
}
