"""Every model of `ctrlib train --model` through train, compress, export, and another process that loads the folders.

    python tests/benchmarks/export_sweep.py
    python tests/benchmarks/export_sweep.py --only dcnv2 din --formats pt2 aoti onnx ort-int8

Rows have two labels, ids, a bag, a history and a number; training is one pass, and compression is to 1 / 2.5 of the
bytes. A line for each model: what the tables became, and how far the probabilities of 300 raw rows, unseen and missing
values among them, are from those of the process that made the folders: of the model folder and of the compressed one,
as `Predictor.load` reads them, and of each export, from the compressed model. 0 is equal to the bit. A line that begins
with "no" says what refused.
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import sys
import tempfile
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
import tyro

import ctrlib as ctr
from ctrlib.cli import main as ctrlib
from ctrlib.models import MODELS

ITEMS = [f"i{n}" for n in range(300)]


@dataclass(frozen=True)
class Knobs:
    """What to run."""

    only: tuple[str, ...] = ()
    """Names of models; otherwise all."""
    formats: tuple[str, ...] = ("pt2", "onnx")
    """Formats to export to."""


def rows(number: int, seed: int) -> pl.DataFrame:
    """Raw rows; some of 300 have a value that 2,000 others lack."""
    random = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "click": random.integers(0, 2, number),
            "buy": random.integers(0, 2, number),
            "user": random.integers(0, 40, number),
            "item": [None if place % 17 == 0 else str(one) for place, one in enumerate(random.choice(ITEMS, number))],
            "tags": ["|".join(random.choice(["a", "b", "c"], random.integers(0, 3))) for _ in range(number)],
            "history": ["|".join(random.choice(ITEMS, random.integers(0, 6))) for _ in range(number)],
            "price": random.random(number) * 100,
        }
    )


def asked() -> list[dict[str, Any]]:
    """The rows that are scored."""
    given = rows(300, 1).drop("click", "buy").to_dicts()
    for place in range(0, len(given), 10):
        given[place] |= {"user": 10_000 + place, "history": "i1|unheard"}
    return given


def scores(folder: Path) -> npt.NDArray[np.float64]:
    """Probabilities of a model folder or an export, (B, T)."""
    torch.set_num_threads(1)
    if (folder / "export.json").is_file():
        from ctrlib.export.folder import Exported

        return Exported(folder, trust=True).predictor().predict(asked())[0].to_numpy()
    return ctr.Predictor.load(folder).predict(asked())[0].to_numpy()


def run(*arguments: Any) -> dict[str, Any]:
    """One command of `ctrlib`, and what it prints as JSON.

    Raises:
        RuntimeError: its exit status is not 0.
    """
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        status = ctrlib([str(one) for one in (*arguments, "--json")])
    if status:
        raise RuntimeError(f"ctrlib {arguments[0]}: {wrong.getvalue().strip()}")
    return dict(json.loads(said.getvalue()))


def line(name: str, home: Path, knobs: Knobs, other: ProcessPoolExecutor) -> list[str]:
    """The cells of a model."""
    model, small = home / name, home / f"{name}_small"
    hidden = ["--hidden", 32, 16] if "hidden" in MODELS[name].arguments else []
    run("train", home / "data", "--model", name, "--dim", 8, *hidden, "--epochs", 1, "--batch-size", 256,
        "--no-baselines", "--out", model)  # fmt: skip
    run("compress", model, home / "data", "--ratio", 2.5, "--epochs", 0, "--out", small)
    about = json.loads((small / "compression.json").read_text())
    cells = [str(about["method"])]
    cells += [differing(scores(folder), other.submit(scores, folder).result()) for folder in (model, small)]
    for to in knobs.formats:
        try:
            run("export", small, "--to", to, "--out", home / f"{name}_{to}")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            cells.append("no")
            continue
        cells.append(differing(scores(small), other.submit(scores, home / f"{name}_{to}").result()))
    return cells


def differing(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> str:
    largest = float(np.abs(a - b).max())
    return "0" if largest == 0 else f"{largest:.0e}"


def main(knobs: Knobs) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    heads = ["model", "tables became", "loaded", "compressed, loaded", *knobs.formats]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|", flush=True)
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other,
    ):
        home = Path(name)
        features = [ctr.MultiValued("tags"), ctr.Sequence("history", vocabulary="item")]
        ctr.prepare(rows(2_000, 0), home / "data", features=features, labels=["click", "buy"], log=None)
        for model in knobs.only or tuple(MODELS):
            try:
                cells = line(model, home, knobs, other)
            except Exception as error:
                traceback.print_exc()
                cells = [f"no: {type(error).__name__}"]
            print("| " + " | ".join([model, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Knobs, description=__doc__))
