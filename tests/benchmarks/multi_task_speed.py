"""The cost of one model of T labels against T models of one label each: a script to read, not a test.

    python tests/benchmarks/multi_task_speed.py data/census_income

Steps of training on the same batches, all models of recipes/census_income.py in turn, as ratios to T of its single
models, whose path to the label is as long and wide, and to T models of the head's own kind. Compare ratios.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from tyro.conf import Positional

import ctrlib as ctr
from ctrlib import models
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.engines import make_engine

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from census_income import COMMON, VARIANTS


@dataclass(frozen=True)
class Arguments:
    """Time steps of training."""

    data: Positional[Path]
    """Prepared folder with several labels."""
    batch_size: int = 2048
    """Rows per step."""
    steps: int = 10
    """Of each model in a round."""
    rounds: int = 5
    """The median counts."""
    threads: int = 1
    """Of torch."""


class Timed:
    """A model that takes the first labels of batches that have more."""

    def __init__(self, config: dict[str, Any], schema: ctr.Schema, num_labels: int) -> None:
        torch.manual_seed(0)
        self.num_labels = num_labels
        model = models.build({**COMMON, **config}, replace(schema, labels=schema.labels[:num_labels]))
        self.engine = make_engine(model, "exact", learning_rate=1e-3, embedding_l2=1e-5)
        self.seconds: list[float] = []

    def run(self, batches: Sequence[ctr.Batch]) -> None:
        """Train on all batches once."""
        mine = [replace(batch, labels=batch.labels[:, : self.num_labels].contiguous()) for batch in batches]
        self.engine.model.train()
        started = time.perf_counter()
        for _ in self.engine.train(mine):
            pass
        self.seconds.append((time.perf_counter() - started) / len(batches))


def main(arguments: Arguments) -> None:
    """Print a line for each model: samples per second with all labels, and the two ratios."""
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    loader = ctr.Loader(arguments.data, "train", batch_size=arguments.batch_size, shuffle=True, seed=0)
    batches = list(islice(loader, arguments.steps))
    num_labels = len(loader.schema.labels)
    models = {
        (name, count): Timed(config, loader.schema, count)
        for name, config in VARIANTS.items()
        for count in (1, num_labels)
        if (name, count) not in (("aitm", 1), ("single_task", num_labels))  # a chain of one step is no chain
    }
    for _ in range(1 + arguments.rounds):
        for model in models.values():
            model.run(batches)
    seconds = {key: statistics.median(model.seconds[1:]) for key, model in models.items()}
    for name in VARIANTS:
        if name == "single_task":
            continue
        whole, own = seconds[name, num_labels], seconds.get((name, 1))
        line = {
            "model": name,
            "samples_per_second": round(arguments.batch_size / whole),
            "against_single_models": round(whole / (num_labels * seconds["single_task", 1]), 2),
            "against_its_own_kind": None if own is None else round(whole / (num_labels * own), 2),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
