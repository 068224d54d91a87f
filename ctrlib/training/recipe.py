"""What the recipes share: their flags, and the road from a data-set script to a row of results.csv."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctrlib import presets
from ctrlib.data.quantiles import quantile_edges
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.distributed import rank, world_size
from ctrlib.training.loop import to_json
from ctrlib.training.run import Device, EngineName, record, run


@dataclass(frozen=True)
class RecipeKnobs:
    """Flags of every recipe; a recipe adds `model`, its variants."""

    raw: Path | None = None
    """Folder with the raw files, to prepare them (anew); otherwise they are downloaded."""
    data: Path | None = None
    """Prepared folder, made first if it does not exist; otherwise one below data/."""
    seed: int = 2021
    """Of initial weights, shuffle and dropout."""
    engine: EngineName = "exact"
    """exact: dense Adam with L2 on whole tables, what the papers mean. fused: row-wise Adagrad through TorchRec, widths
    rounded up to multiples of 4 and no L2."""
    epochs: int = 100
    """Upper limit."""
    device: Device = "auto"
    """Where to compute."""
    out: Path | None = None
    """Folder for the log, the curve and, while it trains, checkpoints: the same command goes on after a kill."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"
    """How the fused engine spreads tables over the processes that torchrun starts."""
    plan: Path | None = None
    """A plan.json of an earlier run, to spread tables as that did."""
    record: bool = False
    """Append the result to results.csv."""


def run_recipe(
    knobs: RecipeKnobs,
    *,
    recipe: str,
    data: str,
    script: Sequence[str],
    model: str,
    config: dict[str, Any],
    **training: Any,
) -> dict[str, Any]:
    """Prepare if needed, train, report once (a line of JSON), and record if asked to.

    Args:
        knobs: the flags.
        recipe: path of the recipe: data/, datasets/ and results.csv are found from there.
        data: name of the data in results.csv, and of the prepared folder.
        script: file name of the data-set script and its arguments.
        model: name of the variant in results.csv.
        config: what `presets.build` needs; `bins` in place of `edges` means that many quantiles of the training rows.
        training: arguments of `ctrlib.run`.

    Raises:
        SystemExit: `record` is asked for a run that is cut short.
    """
    if knobs.raw and world_size() > 1:
        raise SystemExit("--raw prepares the data: run the recipe with it in one process first, then start several")
    if knobs.record and knobs.epochs != RecipeKnobs.epochs:
        raise SystemExit("--record takes whole runs only: leave --epochs out")
    keep_freed_memory()
    here = Path(recipe).parent
    folder = knobs.data or here.parent / "data" / data
    if rank() == 0 and (knobs.raw or not folder.exists()):
        command = [sys.executable, str(here.parent / "datasets" / script[0]), *script[1:], "--out", str(folder)]
        subprocess.run(command + (["--raw", str(knobs.raw)] if knobs.raw else []), check=True, stdout=sys.stderr)
    while not folder.exists():  # the first process makes it, and it appears when it is complete
        time.sleep(1)
    if knobs.engine == "fused":
        config = {**config, "embedding_dim": -(-config["embedding_dim"] // 4) * 4}
        training = {**training, "embedding_l2": 0.0}
    config = presets.for_engine(config, knobs.engine)
    if "bins" in config:
        config = {**config, "edges": quantile_edges(folder, config["bins"])}
        del config["bins"]
    _, result = run(
        folder,
        lambda schema: presets.build(config, schema),
        engine=knobs.engine,
        max_epochs=knobs.epochs,
        seed=knobs.seed,
        device=knobs.device,
        out=knobs.out,
        sharding=knobs.sharding,
        plan=knobs.plan,
        **training,
    )
    result = {"data": data, "model": model, **result}
    if rank() == 0:
        print(to_json(result))
        if knobs.record:
            record(result, here / "results.csv", data=data, model=model)
    return result
