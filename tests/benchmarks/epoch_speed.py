"""Samples per second of whole training epochs, loading included and validation not: a script to read, not a test.

    python tests/benchmarks/epoch_speed.py data/frappe --embedding-dim 10 --batch-norm --dropout 0.2 --l2 0.05
    python tests/benchmarks/epoch_speed.py data/criteo_synthetic --engine fused --precision bf16
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 tests/benchmarks/epoch_speed.py data/criteo_synthetic --engine fused

Compare ratios of runs made one after the other on a quiet machine, never figures of different days.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tyro.conf import FlagCreatePairsOff, Positional

import ctrlib as ctr
from ctrlib.cli.kinds import ModelName
from ctrlib.distributed import rank, world_size
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.engines import make_engine


@dataclass(frozen=True)
class Arguments:
    """Time training epochs."""

    data: Positional[Path]
    """Prepared folder."""
    model: ModelName = "deepfm"
    """Which published model."""
    engine: Literal["exact", "fused"] = "exact"
    """Which engine."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the fused engine."""
    embedding_dim: int = 16
    """Width of the embeddings."""
    hidden: tuple[int, ...] = (400, 400, 400)
    """Widths of the MLP."""
    batch_norm: bool = False
    """Batch normalisation in the MLP."""
    dropout: float = 0.0
    """Dropout of the MLP."""
    l2: float = 0.0
    """L2 on whole tables."""
    batch_size: int = 4096
    """Rows per step, of all processes together."""
    sharding: Literal["auto", "table_wise", "row_wise", "data_parallel"] = "auto"
    """How tables are spread over processes."""
    stacked: int | None = None
    """Lay tables one below the other in that many stacks; otherwise as the engine wants it."""
    epochs: int = 3
    """How many to time; the median counts. The first includes decoding the files."""
    workers: int = 1
    """Threads of the loader."""
    evaluate: bool = False
    """Also score valid and test after every epoch, outside the timing."""


def main(arguments: Arguments) -> None:
    """Run and print one JSON object."""
    keep_freed_memory()  # as the command line and the recipes do
    schema = ctr.Schema.load(arguments.data)
    torch.manual_seed(0)
    config: dict[str, Any] = {"model": arguments.model, "embedding_dim": arguments.embedding_dim}
    takes = ctr.models.MODELS[arguments.model].arguments
    config |= {name: getattr(arguments, name) for name in ("hidden", "batch_norm", "dropout") if name in takes}
    config = ctr.models.for_engine(config, arguments.engine)
    config |= {} if arguments.stacked is None else {"stacked": arguments.stacked}
    engine = make_engine(
        ctr.models.build(config, schema),
        arguments.engine,
        embedding_l2=arguments.l2,
        precision=arguments.precision,
        sharding=arguments.sharding,
        check_ids=False,  # as in ctr.run: the loader has
    )
    share: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "workers": arguments.workers}
    train = ctr.Loader(arguments.data, "train", batch_size=arguments.batch_size // world_size(), shuffle=True, **share)
    seconds, scores = [], []
    for _ in range(arguments.epochs):
        engine.model.train()
        started = time.perf_counter()
        for _ in engine.train(train):
            pass
        seconds.append(time.perf_counter() - started)
        if arguments.evaluate:
            splits = {split: ctr.Loader(arguments.data, split, batch_size=4096, **share) for split in ("valid", "test")}
            scores.append(
                {split: ctr.evaluate(engine.model, part, quick=True)["auc"] for split, part in splits.items()}
            )
    result = {
        "engine": arguments.engine,
        "precision": arguments.precision,
        "model": arguments.model,
        "processes": world_size(),
        "threads": torch.get_num_threads(),
        "samples_per_second": round(train.num_rows / statistics.median(seconds)),
        "epoch_seconds": [round(value, 2) for value in seconds],
        **({"auc": scores} if scores else {}),
    }
    if rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(FlagCreatePairsOff,)))
