"""Frappe_x1 in BARS' protocol: MLP, DeepFM and DCN V2 with the published settings.

    python recipes/frappe.py --model deepfm --seed 2021 [--raw DIR] [--engine fused] [--record]

Published (BARS, five-seed means of test AUC, exact engine): MLP .98405, DeepFM .98395, DCNv2 .98382. Settings common to
all rows there: width 10, batch 4096, Adam 1e-3, batch normalisation, learning rate x 0.1 on plateau, patience 2.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr

HERE = Path(__file__).parent

# Everything in which the variants differ: the model, and the L2 on its tables.
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"embedding_l2": 0.05, "model": {"dropout": 0.2}},
    "deepfm": {"embedding_l2": 0.05, "model": {"dropout": 0.2}},
    "dcnv2": {"embedding_l2": 0.05, "model": {"dropout": 0.4, "num_cross_layers": 4}},
}


@dataclass(frozen=True)
class Knobs:
    """Train one model on Frappe_x1 and report its test AUC once."""

    model: Literal["mlp", "deepfm", "dcnv2"] = "deepfm"
    """Which variant."""
    raw: Path | None = None
    """Folder with the raw files, to prepare them (anew); otherwise they are downloaded."""
    data: Path = HERE.parent / "data" / "frappe"
    """Prepared folder; made first if it does not exist."""
    seed: int = 2021
    """Of initial weights, shuffle and dropout."""
    engine: Literal["exact", "fused"] = "exact"
    """exact is what BARS means; fused is row-wise Adagrad through TorchRec, with width 12 (its kernels want multiples
    of 4) and no L2."""
    epochs: int = 100
    """Upper limit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    record: bool = False
    """Append the result to results.csv."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    if knobs.record and knobs.epochs != Knobs.epochs:
        raise SystemExit("--record takes whole runs only: leave --epochs out")
    if knobs.raw or not knobs.data.exists():
        script = [sys.executable, str(HERE.parent / "datasets" / "frappe.py"), "--out", str(knobs.data)]
        subprocess.run(script + (["--raw", str(knobs.raw)] if knobs.raw else []), check=True, stdout=sys.stderr)
    variant = VARIANTS[knobs.model]
    fused = knobs.engine == "fused"
    config = {
        "preset": knobs.model,
        "embedding_dim": 12 if fused else 10,
        "hidden": (400, 400, 400),
        "batch_norm": True,
        **variant["model"],
    }
    _, result = ctr.run(
        knobs.data,
        lambda schema: ctr.presets.build(ctr.presets.for_engine(config, knobs.engine), schema),
        engine=knobs.engine,
        batch_size=4096,
        learning_rate=1e-3,
        embedding_l2=0.0 if fused else variant["embedding_l2"],
        max_epochs=knobs.epochs,
        seed=knobs.seed,
        device=knobs.device,
    )
    if knobs.record:
        ctr.record(result, HERE / "results.csv", data="frappe_x1", model=knobs.model)
    print(ctr.to_json({"data": "frappe_x1", "model": knobs.model, **result}))


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
