"""ctrlib as `recipes/speed.py` measures it, with what the machine allows beside it."""

from __future__ import annotations

import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ctrlib as ctr
from ctrlib.joined import product
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.config import EngineName, Precision
from ctrlib.training.engines import make_engine, native_bfloat16
from worker import Program, now, serve

# How a product of matrices is called: operation, and shape, stride and kind of each tensor.
Call = tuple[str, tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]]


class Ctrlib(Program):
    """`prepare`, `Loader` and an engine, with the settings of the command line."""

    def __init__(self, *, engine: EngineName, precision: Precision, average: bool = False, **setting: Any) -> None:
        super().__init__(**setting)
        keep_freed_memory()  # as the command line does
        self.folder = Path(self.work) / "prepared"
        self.features = [*(ctr.Numeric(name, "log") for name in self.numbers), *map(ctr.Categorical, self.ids)]
        self.how: dict[str, Any] = {"engine": engine, "precision": precision, "average_weights": average}
        self.how |= {"embedding_l2": self.l2} if engine == "exact" else {}

    def prepare(self) -> None:
        """From CSV to a prepared folder."""
        files = {split: Path(self.raw) / f"{split}.csv" for split in ("train", "valid", "test")}
        shutil.rmtree(self.folder, ignore_errors=True)
        ctr.prepare(files, self.folder, features=self.features, labels="label", log=None)

    def open(self, model: str, net: dict[str, Any]) -> None:
        """Make loaders and a model."""
        if not self.folder.exists():
            self.prepare()
        torch.manual_seed(self.seed)
        config = {"model": model, "embedding_dim": self.embedding_dim, **net}
        config = ctr.models.for_engine(config, self.how["engine"])
        made = ctr.models.build(config, ctr.Schema.load(self.folder))
        self.engine: Any = make_engine(made, check_ids=False, **self.how)  # the loader has checked them
        self.model = self.engine.model
        self.train = ctr.Loader(self.folder, "train", batch_size=self.batch_size, shuffle=True, seed=self.seed)
        self.valid, self.test = (ctr.Loader(self.folder, split, batch_size=8192) for split in ("valid", "test"))

    def hold(self, batches: int) -> None:
        """Keep batches in memory for `step` and `infer`."""
        self.batches = [batch for batch, _ in zip(self.train, range(batches))]
        held = ctr.Loader(self.folder, "train", batch_size=8192)
        self.rows = {8192: next(iter(held))}
        for rows in (1, 256):
            self.rows[rows] = next(iter(ctr.Loader(self.folder, "train", batch_size=rows)))

    def step(self, steps: int) -> None:
        """Training steps on the batches in memory."""
        self.engine.model.train()
        for number in range(steps):
            self.engine.step(self.batches[number % len(self.batches)])

    def epoch(self) -> None:
        """Train on every row once."""
        self.engine.model.train()
        for _ in self.engine.train(self.train):
            pass

    def first(self, rows: int) -> ctr.Batch:
        """So many of the rows in memory."""
        batch: ctr.Batch = self.rows[rows]
        return batch

    def score(self) -> float:
        """AUC of test."""
        return float(ctr.evaluate(self.engine.model, self.test, quick=True)["auc"])

    def fit(self) -> list[list[float]]:
        """Train until validation AUC stops rising: seconds and AUC after each epoch."""
        curve: list[list[float]] = []
        started = now()
        ctr.fit(
            self.engine,
            self.train,
            self.valid,
            on_epoch=lambda epoch: curve.append([now() - started, epoch.valid_auc]),
        )
        return curve

    def machine(self) -> dict[str, float]:
        """What the machine allows: each product of matrices of a training step by itself, and copying memory.

        Rates are in units of 10^9 a second. "step products" is the milliseconds that the products of one step take if
        nothing else is done, which is the least that the step can take in this precision.
        """
        with _products() as calls:
            self.step(1)
        flops = sum(_flops(call) * count for call, count in calls.items())
        seconds = sum(_seconds(call) * count for call, count in calls.items())
        found = {"GFLOP of a step": flops / 1e9, "step products, ms": 1e3 * seconds, "GFLOP/s": flops / seconds / 1e9}
        if all(dtype == torch.float32 for call in calls for *_, dtype in call[1]) and native_bfloat16():
            narrow = {_in_bf16(call): count for call, count in calls.items()}
            found["GFLOP/s in bf16"] = flops / sum(_seconds(call) * count for call, count in narrow.items()) / 1e9
        large, other = torch.zeros(2**25), torch.ones(2**25)  # 128 MiB each, more than caches hold
        found["memory, GB/s"] = 3 * 4 * large.numel() / _median(lambda: large.add_(other)) / 1e9
        return found


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how matrices are multiplied, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, Tensor)]
        if name == "_linear_pointwise":  # x W^T + b, as `ctrlib.joined.product` calls it: matrices last, as in addmm
            x, weight, *bias = tensors
            tensors = [*bias, x, weight.t()]
        if name in ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise"):
            self.calls[name, tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _products() -> Iterator[Counter[Call]]:
    with _Products() as mode:
        yield mode.calls


def _flops(call: Call) -> int:
    """A multiplication and an addition for each product of two numbers."""
    (*left, inner), right = call[1][-2][0], call[1][-1][0]
    rows = 1
    for size in left:
        rows *= size
    return 2 * rows * inner * right[-1]


def _seconds(call: Call) -> float:
    """Of one such product, the median of some."""
    name, tensors = call
    made = [torch.randn(_span(shape, stride)).to(dtype).as_strided(shape, stride) for shape, stride, dtype in tensors]
    if name == "_linear_pointwise":
        *bias, x, transposed = made
        return _median(lambda: product(x, transposed.t(), *bias))
    operation = getattr(torch, name)
    return _median(lambda: operation(*made))


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Numbers from the first to the last of a tensor in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride))


def _in_bf16(call: Call) -> Call:
    return call[0], tuple((shape, stride, torch.bfloat16) for shape, stride, _ in call[1])


def _median(function: Callable[[], Any], calls: int = 15) -> float:
    """Seconds of a call."""
    seconds = []
    for _ in range(calls + 2):
        started = now()
        function()
        seconds.append(now() - started)
    return statistics.median(seconds[2:])


if __name__ == "__main__":
    serve(Ctrlib)
