"""How long a row takes from a dictionary to a probability, a frame of 100, and a parquet file of any size.

    python tests/benchmarks/serving_speed.py --values 1000 1000000 --rows 1000000 10000000

DCN V2 over 10 ids of so many values each, one thread. p50 and p99 in milliseconds over 2,000 calls, and beside them
those of the matrix products of the network alone, which are the least that a call can take; of files, rows a second,
that of the model alone beside it, and the peak of memory (in a process of its own, so that it is this file's).
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import tyro

import ctrlib as ctr
from ctrlib.serving.predictor import Report

FIELDS = 10
BLOCK = 200_000


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    values: tuple[int, ...] = (1_000, 1_000_000)
    """Values of each vocabulary, for single rows."""
    rows: tuple[int, ...] = (1_000_000,)
    """Rows of files."""
    one_file: Path | None = None
    """Only score this file with the model beside it; for processes that this script starts."""


def model_folder(folder: Path, num_values: int, **config: Any) -> Path:
    """A model with fresh weights, and vocabularies of that size."""
    rng = np.random.default_rng(0)
    columns = {f"c{n}": rng.permutation(num_values) * 7919 + n for n in range(FIELDS)}
    frame = pl.DataFrame({**columns, "label": np.arange(num_values) % 2})
    features = [ctr.Categorical(name) for name in columns]
    schema = ctr.prepare({"train": frame}, folder / "data", features=features, labels="label", log=None)
    config = {"model": "dcnv2", "embedding_dim": 16, **config}
    ctr.save_model(ctr.models.build(config, schema), config, folder / "data", folder / "model")
    return folder / "model"


def milliseconds(call: Callable[[], object], number: int = 2_000) -> str:
    """p50 and p99 of a call."""
    for _ in range(50):
        call()
    taken = []
    for _ in range(number):
        started = time.perf_counter()
        call()
        taken.append(1000 * (time.perf_counter() - started))
    return f"p50 {np.percentile(taken, 50):.3f} ms, p99 {np.percentile(taken, 99):.3f} ms"


def measure_rows(num_values: int) -> None:
    """One row, and a hundred."""
    with tempfile.TemporaryDirectory() as name:
        predictor = ctr.Predictor.load(model_folder(Path(name), num_values))
        rng = np.random.default_rng(1)
        ids = rng.integers(0, num_values, (100, FIELDS)) * 7919
        frame = pl.DataFrame({f"c{n}": ids[:, n] + n for n in range(FIELDS)})
        row = frame.row(0, named=True)
        started = time.perf_counter()
        predictor.predict(row)
        print(f"{num_values:>9,} values: first call {time.perf_counter() - started:.2f} s")
        print(f"{num_values:>9,} values: a dictionary {milliseconds(lambda: predictor.predict(row))}")
        print(f"{'':>17} its matrix products {products(predictor.model, 1)}")
        print(f"{num_values:>9,} values: a frame of 100 {milliseconds(lambda: predictor.predict(frame), 300)}")
        print(f"{'':>17} its matrix products {products(predictor.model, 100, 300)}")


def products(model: torch.nn.Module, num_rows: int, calls: int = 2_000) -> str:
    """p50 and p99 of all linear layers on so many rows, without anything between them."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    inputs = [torch.randn(num_rows, layer.in_features) for layer in layers]
    weights = [(layer.weight.detach(), None if layer.bias is None else layer.bias.detach()) for layer in layers]

    def call() -> None:
        for x, (weight, bias) in zip(inputs, weights):
            F.linear(x, weight, bias)

    with torch.inference_mode():
        return milliseconds(call, calls)


def measure_file(num_rows: int, folder: Path) -> None:
    """Score a file in a process of its own."""
    path = folder / f"{num_rows}.parquet"
    rng = np.random.default_rng(1)
    with pq.ParquetWriter(path, _block(rng, 1).to_arrow().schema) as writer:
        for start in range(0, num_rows, BLOCK):
            writer.write_table(_block(rng, min(BLOCK, num_rows - start)).to_arrow())
    subprocess.run([sys.executable, __file__, "--one-file", str(path)], check=True)
    path.unlink()


def _block(rng: np.random.Generator, num_rows: int) -> pl.DataFrame:
    ids = rng.zipf(1.3, (num_rows, FIELDS)) % 100_000 * 7919
    return pl.DataFrame({**{f"c{n}": ids[:, n] + n for n in range(FIELDS)}, "user_id": np.arange(num_rows)})


def score_file(path: Path) -> None:
    """Rows a second, beside the model's alone, and the peak of memory."""
    predictor = ctr.Predictor.load(path.parent / "model")
    rng = np.random.default_rng(2)
    columns, _ = predictor.encoder.transform(_block(rng, BLOCK))
    report = Report(predictor.encoder)
    predictor._probabilities(columns, 8192, report)
    started = time.perf_counter()
    predictor._probabilities(columns, 8192, report)
    alone = BLOCK / (time.perf_counter() - started)
    started = time.perf_counter()
    counts = predictor.predict_to(path, path.with_suffix(".out.parquet"), keep=["user_id"])
    speed = counts["rows"] / (time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{counts['rows']:>10,} rows: {speed:,.0f} rows/s, the model alone {alone:,.0f} ({speed / alone:.0%}), "
        f"peak {peak:,.0f} MB",
        flush=True,
    )


def main(arguments: Arguments) -> None:
    """Print what was measured."""
    torch.set_num_threads(1)
    if arguments.one_file is not None:
        score_file(arguments.one_file)
        return
    for num_values in arguments.values:
        measure_rows(num_values)
    with tempfile.TemporaryDirectory() as name:
        model_folder(Path(name), 100_000)
        for num_rows in arguments.rows:
            measure_file(num_rows, Path(name))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
