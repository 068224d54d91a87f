"""Which models export to which format, how far the files are from the models, and how long they take to score.

    python tests/benchmarks/export.py                     # the table of docs/export.md
    python tests/benchmarks/export.py --speed             # latency of each format beside ctrlib's own Predictor
    python tests/benchmarks/export.py --speed --deepctr PYTHON --rechub PYTHON      # and beside two other libraries
    python tests/benchmarks/export.py --small             # files of compressed models, and how far they are from these

The table has every published model on a schema with ids, a bag, a history and numbers, every look-up and every encoding
of numbers; weights are random and large. Differences are of logits over max(1, |logit|), the largest of batches of 1,
16 and 1,000 rows. One thread.

`--small` measures files of models with 150,000 rows of width 16, compressed by each method: their bytes, those of the
model folder's weights, the largest relative error of a row (`ctrlib.search.row_errors`), and the difference between the
file and the compressed model. Rows are random normal numbers, which have no structure that a method could use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import tyro
from safetensors.torch import save
from serving_speed import model_folder
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.errors import UnsupportedError
from ctrlib.export.folder import parity
from ctrlib.export.formats import FORMATS
from ctrlib.export.onnx import quantise, strip, to_onnx
from ctrlib.export.program import Program, quiet
from ctrlib.inputs import LOOK_UPS
from ctrlib.models import MODELS, build
from ctrlib.schema import NumericFields
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import transform_coding
from ctrlib.search.floors import rounded_rows
from ctrlib.search.mimicking import apply_low_rank, low_rank
from ctrlib.search.plan import materialise
from ctrlib.search.ranks import Goal
from ctrlib.search.row_errors import row_errors
from ctrlib.testing import example_batch, example_schema

SCHEMA = example_schema(num_tasks=2)
SMALL: dict[str, dict[str, Any]] = {"finalmlp": {"num_heads": 2, "contexts": (("user",), ("price",))}}
TABLES: dict[str, dict[str, Any]] = {
    "unified": {"num_embeddings": 64},
    "hash_embedding": {"num_embeddings": 32},
    "memcom": {"num_embeddings": 16},
    "quotient_remainder": {"num_embeddings": 16},
    "mixed_dimension": {"dimensions": {"user": 4, "item": 8, "genres": 2}},
}


@dataclass(frozen=True)
class Knobs:
    """What to measure."""

    only: tuple[str, ...] = ()
    """Names of rows of the table; otherwise all."""
    formats: tuple[str, ...] = ("pt2", "onnx")
    """Formats of the table."""
    speed: bool = False
    """Measure how long scoring takes instead."""
    deepctr: Path | None = None
    """Python of an environment with DeepCTR-Torch, to be measured in turns with it."""
    rechub: Path | None = None
    """Python of an environment with torch-rechub, likewise."""
    seconds: float = 0.5
    """Of a turn."""
    rounds: int = 3
    """Turns."""
    small: bool = False
    """Measure compressed models instead; --only takes names of methods."""


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """A name for each row, and the model's config."""
    for name in MODELS:
        hidden = {"hidden": (32, 16)} if "hidden" in MODELS[name].arguments else {}
        yield name, {"model": name, "embedding_dim": 8, **hidden, **SMALL.get(name, {})}
    base = {"model": "dcnv2", "embedding_dim": 8, "hidden": (32, 16)}
    for name in LOOK_UPS:
        yield f"tables: {name}", {**base, "tables": {"kind": name, **TABLES.get(name, {})}}
    for name in get_args(NumericFields):
        edges = [[-1.0, 0.0, 1.0]] * 2 if name in ("bucketised", "piecewise_linear") else None
        yield f"numeric: {name}", {**base, "numeric": name, **({"edges": edges} if edges else {})}
    for name in ("din", "bst", "sim"):
        yield f"sequence: {name}", {**base, "sequence": name}


def difference(config: dict[str, Any], name: str) -> str:
    """A cell of the table."""
    torch.manual_seed(0)
    model = build(config, SCHEMA).eval()
    with torch.no_grad():
        for parameter in model.embedding.parameters():
            parameter.normal_(0, 0.1)
    program, form = Program(model, SCHEMA), FORMATS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form.file
        try:
            form.write(program, path)
        except UnsupportedError as error:
            print(error, file=sys.stderr)
            return "no"
        found = parity(program, form.read(path, program.signature.names))
    return f"{found['relative']:.0e}" if found["relative"] else "0"


def timed(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call in so many seconds."""
    taken: list[float] = []
    for _ in range(3):
        call()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return taken


class Peer:
    """A process of `peer_latency.py`."""

    def __init__(self, python: Path, name: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        packages = {"LATENCY_PACKAGES": sysconfig.get_paths()["purelib"]}
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("peer_latency.py")), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **threads, **packages},
        )
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args} ended: run it by hand to see why")
        return line

    def __call__(self, size: int, seconds: float) -> dict[str, list[float]]:
        assert self.process.stdin is not None
        print(size, seconds, file=self.process.stdin, flush=True)
        return dict(json.loads(self._answer()))

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


def products(model: ctr.Model, size: int) -> Callable[[], object]:
    """All linear layers on so many rows, without anything between them: the least that a call can take."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    given = [(torch.randn(size, layer.in_features), layer.weight.detach(), layer.bias) for layer in layers]

    def call() -> None:
        with torch.inference_mode():
            for x, weight, bias in given:
                torch.nn.functional.linear(x, weight, bias)

    return call


def speed(knobs: Knobs) -> None:
    """A DCN V2 over 10 ids of 1,000 values, width 16, as `serving_speed.py` has it, in turns with the peers."""
    sizes = (1, 100, 1000, 8192)
    peers = [Peer(path, name) for name, path in (("deepctr", knobs.deepctr), ("rechub", knobs.rechub)) if path]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        predictor = ctr.Predictor.load(model_folder(Path(name), 1_000, hidden=[400, 400, 400]))
        program = Program(predictor.model, predictor.schema)
        random = np.random.default_rng(0)
        rows = [
            {f"c{n}": int(one) * 7919 + n for n, one in enumerate(ids)} for ids in random.integers(0, 1_000, (8192, 10))
        ]
        arrays = {size: program.signature.examples(size) for size in sizes}
        runs: dict[str, Callable[[int], Any]] = {
            "its matrix products": lambda size: products(predictor.model, size),  # type: ignore[arg-type]
            "`Predictor.predict`, from raw rows": lambda size: lambda: predictor.predict(rows[:size]),
            "torch, eager": lambda size: lambda: program.run(arrays[size]),
        }
        for to, form in FORMATS.items():
            path = Path(name) / form.file
            form.write(program, path)
            run = form.read(path, program.signature.names)
            runs[to] = lambda size, run=run: lambda: run(arrays[size])  # type: ignore[misc]
        found: dict[str, dict[int, list[float]]] = {}
        for size in sizes:
            for _ in range(knobs.rounds):
                for way, call in runs.items():
                    found.setdefault(way, {}).setdefault(size, []).extend(timed(call(size), knobs.seconds))
                for peer in peers:
                    for way, taken in peer(size, knobs.seconds).items():
                        found.setdefault(way, {}).setdefault(size, []).extend(taken)
        for peer in peers:
            peer.close()
    print("| p50 / p99, ms | " + " | ".join(f"{size:,}" for size in sizes) + " |\n| --- |" + " --: |" * len(sizes))
    for way, by_size in found.items():
        cells = [f"{np.percentile(by_size[size], 50):.3g} / {np.percentile(by_size[size], 99):.3g}" for size in sizes]
        print(f"| {way} | " + " | ".join(cells) + " |")


LARGE = ctr.Schema(
    (
        ctr.Categorical("user", num_embeddings=50_003),
        ctr.Categorical("item", num_embeddings=100_003),
        ctr.MultiValued("genres", num_embeddings=23),
        ctr.Sequence("history", vocabulary="item", num_embeddings=100_003),
        ctr.Numeric("price", parameters={}),
    ),
    ("label",),
)


def shrink(model: ctr.Model, method: str, batches: list[ctr.Batch]) -> ctr.Model:
    """A smaller model by one of the methods of `ctrlib compress`."""
    if method == "none":
        return model
    if method.startswith("low rank"):
        goal = Goal(rank=int(method.split()[-1]))
        return apply_low_rank(model, low_rank(model, LARGE, batches, tables=goal))
    if method.startswith("transform coding"):
        num_bytes = bytes_of(model).embedding // int(method.split("x")[-1])
        return materialise(model, transform_coding(model, batches, num_bytes=num_bytes))
    return materialise(model, rounded_rows(model, {"float16": 16, "int8": 8, "int4": 4, "int2": 2}[method]))  # type: ignore[arg-type]


def small(knobs: Knobs) -> None:
    """Print the table of compressed models."""
    methods = ["none", "float16", "int8", "int4", "int2", "transform coding x10", "low rank 8"]
    forms = ("pt2", "onnx", "ort-int8")
    heads = [
        "model",
        "method",
        "weights of the folder",
        *forms,
        "row error",
        *(f"logits, {form}" for form in forms[:2]),
    ]
    print("| " + " | ".join(heads) + " |\n| --- | --- |" + " --: |" * (len(heads) - 2))
    for name in ("din", "dcnv2"):
        torch.manual_seed(0)
        model = build({"model": name, "embedding_dim": 16, "hidden": (32, 16)}, LARGE).eval()
        with torch.no_grad():
            for parameter in model.embedding.parameters():
                parameter.normal_(0, 0.1)
        batches = [example_batch(LARGE, 4096)]
        for method in methods:
            if knobs.only and method not in knobs.only:
                continue
            smaller = shrink(model, method, batches)
            weights = len(save({key: tensor.contiguous() for key, tensor in smaller.state_dict().items()}))
            program, sizes, logits = Program(smaller, LARGE), [], []
            exported = program.export()  # once for all formats
            with tempfile.TemporaryDirectory() as folder, quiet():
                paths, whole = {form: Path(folder) / FORMATS[form].file for form in forms}, Path(folder) / "whole.onnx"
                torch.export.save(exported, paths["pt2"])
                to_onnx(exported, whole, program.signature.names)
                strip(whole, paths["onnx"])
                quantise(whole, paths["ort-int8"])
                strip(paths["ort-int8"], paths["ort-int8"])
                for form, path in paths.items():
                    sizes.append(f"{path.stat().st_size:,}")
                    found = parity(program, FORMATS[form].read(path, program.signature.names))
                    logits.append(f"{found['relative']:.0e}" if found["relative"] else "0")
            error = f"{row_errors(model, smaller).largest:.1e}" if smaller is not model else ""
            print("| " + " | ".join([name, method, f"{weights:,}", *sizes, error, *logits[:2]]) + " |", flush=True)


def main(knobs: Knobs) -> None:
    """Print the table, or the times."""
    torch.set_num_threads(1)
    if knobs.speed or knobs.small:
        speed(knobs) if knobs.speed else small(knobs)
        return
    print("| model | " + " | ".join(knobs.formats) + " |\n| --- |" + " --- |" * len(knobs.formats))
    for name, config in cases():
        if not knobs.only or name in knobs.only:
            cells = [difference(config, form) for form in knobs.formats]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
