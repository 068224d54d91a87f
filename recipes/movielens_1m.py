"""MovieLens-1M in AutoInt's protocol (no ids, 7 fields) or with ids (6 fields): MLP, DeepFM and DCN V2.

    python recipes/movielens_1m.py --model dcnv2 --seed 1 [--protocol ids] [--raw DIR] [--engine fused] [--record]

Published for `autoint` (W. Song et al., CIKM 2019, table 3, mean of 10 runs, test AUC): DCN .8446, DeepFM .8437; for
`ids` (B. Coleman et al., NeurIPS 2023): DCN V2 collisionless .8872, and .8985 in a rerun by others.
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

# Everything in which the variants differ.
VARIANTS: dict[str, dict[str, Any]] = {"mlp": {}, "deepfm": {}, "dcnv2": {"num_cross_layers": 3}}
# L2 on the tables, chosen on validation.
EMBEDDING_L2 = {"autoint": 1e-5, "ids": 1e-4}


@dataclass(frozen=True)
class Knobs:
    """Train one model on MovieLens-1M and report its test AUC once."""

    model: Literal["mlp", "deepfm", "dcnv2"] = "dcnv2"
    """Which variant."""
    protocol: Literal["autoint", "ids"] = "autoint"
    """Which published protocol; datasets/movielens_1m.py describes both."""
    raw: Path | None = None
    """Folder with the raw files, to prepare them (anew); otherwise they are downloaded."""
    data: Path | None = None
    """Prepared folder, made first if it does not exist; otherwise data/movielens_1m_PROTOCOL."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""
    engine: Literal["exact", "fused"] = "exact"
    """exact: dense Adam with L2 on whole tables. fused: row-wise Adagrad through TorchRec, no L2."""
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
    data = knobs.data or HERE.parent / "data" / f"movielens_1m_{knobs.protocol}"
    if knobs.raw or not data.exists():
        script = [sys.executable, str(HERE.parent / "datasets" / "movielens_1m.py"), "--protocol", knobs.protocol]
        script += ["--out", str(data)] + (["--raw", str(knobs.raw)] if knobs.raw else [])
        subprocess.run(script, check=True, stdout=sys.stderr)
    fused = knobs.engine == "fused"
    config = {
        "preset": knobs.model,
        "embedding_dim": 16,
        "hidden": (400, 400),
        "batch_norm": True,
        "dropout": 0.2,
        **VARIANTS[knobs.model],
    }
    _, result = ctr.run(
        data,
        lambda schema: ctr.presets.build(ctr.presets.for_engine(config, knobs.engine), schema),
        engine=knobs.engine,
        batch_size=1024,
        learning_rate=1e-3,
        embedding_l2=0.0 if fused else EMBEDDING_L2[knobs.protocol],
        max_epochs=knobs.epochs,
        seed=knobs.seed,
        device=knobs.device,
    )
    name = f"movielens_1m_{knobs.protocol}"
    if knobs.record:
        ctr.record(result, HERE / "results.csv", data=name, model=knobs.model)
    print(ctr.to_json({"data": name, "model": knobs.model, **result}))


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
