"""Candidates on Gowalla and MovieLens-1M, in the splits of LightGCN and UltraGCN: UltraGCN beside what it must beat.

    python recipes/retrieval.py --raw DIR --data movielens_1m --model ultragcn --seed 1 [--select-on-test] [--record]
    python recipes/retrieval.py --raw DIR --data gowalla --model ultragcn ials ease itemcf popularity --seeds 1 2 3
    python recipes/retrieval.py --raw DIR --data gowalla --time

DIR holds `gowalla/` and `ultragcn_ml1m/` with train.txt.gz and test.txt.gz, lines `user item item ...`: Gowalla from
https://github.com/kuandeng/LightGCN, MovieLens-1M from https://github.com/xue-pai/UltraGCN. Metrics are those of these
programs: top 20, training items left out, means over all users (each has test items in both).

The honest number chooses the epoch on a tenth of train and then trains on all of it; `--select-on-test` chooses on test
as the published numbers do. All settings were chosen on validation. `--time` says what an epoch of LightGCN and of the
published form takes here, from some of its batches.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from scipy import sparse
from torch import Tensor
from torch.nn.functional import softplus
from tyro.conf import FlagCreatePairsOff

from ctrlib.cli.flags import parse_option
from ctrlib.retrieval.interactions import Aligned, Interactions, read_log
from ctrlib.retrieval.objective import Objective
from ctrlib.retrieval.run import train
from ctrlib.retrieval.sampled import Sampler, make_tables
from ctrlib.retrieval.ultragcn import official
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.loop import to_json
from ctrlib.training.record import KEY
from records import record

FOLDERS = {"gowalla": "gowalla", "movielens_1m": "ultragcn_ml1m"}
NAMES = {"gowalla": "Gowalla, LightGCN's split", "movielens_1m": "MovieLens-1M, UltraGCN's split"}

# Settings of each data set, chosen by recall@20 of validation. w1 and w3 are 1e-6 in the published settings, where they
# do nothing: 0 spares a pass over every tile of scores.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "movielens_1m": {
        "ultragcn": {
            **{"w1": 0, "w3": 0, "negative_weight": 400, "neighbour_weight": 1e-3, "l2": 1e-4, "batch_size": 1024},
            **{"embedding_dim": 128, "epochs": 8, "step_share": 0.3},
            **{"ials_alpha": 0.3, "ials_l2": 0.01, "ials_epochs": 6},
        },
        "ials": {"embedding_dim": 128, "alpha": 0.3, "l2": 0.01, "epochs": 12},
        "ease": {"l2": 1000.0},
        "itemcf": {"num_neighbours": 20},
        "popularity": {},
    },
    "gowalla": {
        "ultragcn": {
            **{"w1": 0, "w3": 0, "negative_weight": 400, "neighbour_weight": 0.03, "l2": 1e-4, "batch_size": 512},
            **{"embedding_dim": 64, "epochs": 6},
            **{"ials_alpha": 0.003, "ials_l2": 0.03, "ials_epochs": 6},
        },
        "ials": {"embedding_dim": 128, "alpha": 0.003, "l2": 0.03, "epochs": 12},
        "ease": {"l2": 200.0},
        "itemcf": {"num_neighbours": 100},
        "popularity": {},
    },
}
Model = Literal["ultragcn", "ials", "ease", "itemcf", "popularity"]


@dataclass(frozen=True)
class Knobs:
    """Fit methods of retrieval on a public split and report recall@20 and NDCG@20 of test."""

    raw: Path
    """Folder with the two splits."""
    data: Literal["gowalla", "movielens_1m"] = "movielens_1m"
    """Which split."""
    model: tuple[Model, ...] = ("ultragcn",)
    """Which methods."""
    seeds: tuple[int, ...] = (1,)
    """A run of each."""
    setting: tuple[str, ...] = ()
    """Other settings of the methods, NAME=VALUE with values in JSON: epochs=60 l2=2e-4"""
    valid_only: bool = False
    """Report validation alone, of a fit on the rest: for choosing settings."""
    every: int = 1
    """Epochs from one look at validation to the next."""
    select_on_test: bool = False
    """Choose the epoch on test, as published numbers do."""
    time: bool = False
    """Time epochs of LightGCN and of the published form of UltraGCN, and do nothing else."""
    record: bool = False
    """Append the results to results.csv."""


def main(knobs: Knobs) -> None:
    """Read, fit, report."""
    keep_freed_memory()
    if knobs.record and (knobs.setting or knobs.valid_only):
        raise SystemExit("--record takes the settings of this script and whole runs: leave --setting and --valid-only")
    folder = knobs.raw / FOLDERS[knobs.data]
    log = Interactions.of(read_log(folder / "train.txt.gz"))
    test = log.aligned(read_log(folder / "test.txt.gz"))
    if knobs.time:
        print(to_json(times(knobs.data, log)))
        return
    for model in knobs.model:
        for seed in knobs.seeds:
            run(knobs, log, test, model, seed)


def run(knobs: Knobs, log: Interactions, test: Aligned, model: str, seed: int) -> None:
    """One method, one seed: a line of JSON, and a row of results.csv."""
    config = {"method": model, **VARIANTS[knobs.data][model]}
    config |= dict(map(parse_option, knobs.setting))
    trained = train(
        log,
        config,
        test=None if knobs.valid_only else test,
        select_on_test=knobs.select_on_test,
        over="all",
        every=knobs.every,
        refit=not knobs.valid_only,
        seed=seed,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    found = trained.record
    print(to_json({"data": knobs.data, "model": model, **found}), flush=True)
    if knobs.record:
        kept = ("recall@20", "ndcg@20")
        scores = {
            f"{split}_{name}": found[f"{split}_{name}"]
            for split in ("valid", "test")
            for name in kept
            if f"{split}_{name}" in found
        }
        scores |= {"peak_memory_mb": found["peak_memory_mb"], "fit_seconds": found["fit_seconds"]}
        row = {
            "engine": "exact",
            "seed": seed,
            "seconds": found["seconds"],
            "epochs": found["best_epoch"],
            KEY: found[KEY],
        }
        path = Path(__file__).parent / "results.csv"
        name = model + (", epoch selected on test" if knobs.select_on_test else "")
        record(row, path, data=NAMES[knobs.data], model=name, task="retrieval", scores=scores)


def times(data: Literal["gowalla", "movielens_1m"], log: Interactions, batches: int = 5) -> dict[str, float]:
    """Seconds of an epoch of LightGCN (3 layers, BPR, batch 2048) and of the published form of UltraGCN."""
    method = official(data)
    objective = Objective(log.matrix, method.weights)
    tables = make_tables(log.num_users, log.num_items, method.embedding_dim, init_std=method.init_std, seed=0)
    sampler = Sampler(objective, tables, method.draws, learning_rate=method.learning_rate, seed=0)
    given = sampler._batches()
    sampler.step(*next(given))
    started = time.perf_counter()
    for _, batch in zip(range(batches), given):
        sampler.step(*batch)
    of_step = (time.perf_counter() - started) / batches
    light = LightGCN(log, 64)
    light.step(2048)
    started = time.perf_counter()
    for _ in range(batches):
        light.step(2048)
    of_light = (time.perf_counter() - started) / batches
    return {
        "ultragcn_published_seconds_per_epoch": of_step * objective.num_batches,
        "ultragcn_published_epochs": method.epochs,
        "lightgcn_seconds_per_epoch": of_light * -(-log.matrix.nnz // 2048),
    }


class LightGCN:
    """Three layers of LightGCN (He et al., SIGIR 2020, https://arxiv.org/abs/2002.02126) with BPR, to be timed."""

    def __init__(self, log: Interactions, width: int, layers: int = 3) -> None:
        num_users, num_items = log.matrix.shape
        upper = sparse.hstack([sparse.csr_matrix((num_users, num_users)), log.matrix])
        lower = sparse.hstack([log.matrix.T, sparse.csr_matrix((num_items, num_items))])
        graph = sparse.csr_matrix(sparse.vstack([upper, lower]), dtype=np.float32)
        scale = sparse.diags(1 / np.sqrt(np.maximum(np.diff(graph.indptr), 1)))
        graph = sparse.csr_matrix(scale @ graph @ scale, dtype=np.float32)
        starts, columns, values = (torch.from_numpy(part) for part in (graph.indptr, graph.indices, graph.data))
        self.graph = torch.sparse_csr_tensor(starts, columns, values, size=graph.shape, check_invariants=False)
        self.log, self.layers = log, layers
        self.vectors = torch.nn.Parameter(torch.randn(num_users + num_items, width) * 0.1)
        self.adam = torch.optim.Adam([self.vectors], lr=1e-3)
        self.draws = np.random.default_rng(0)

    def step(self, batch: int) -> None:
        """One update by a batch of pairs, each with a negative."""
        matrix = self.log.matrix
        places = self.draws.integers(0, matrix.nnz, batch)
        users = torch.from_numpy(np.searchsorted(matrix.indptr, places, side="right") - 1)
        items = torch.from_numpy(matrix.indices[places].astype(np.int64)) + self.log.num_users
        others = torch.from_numpy(self.draws.integers(0, self.log.num_items, batch)) + self.log.num_users
        layer: Tensor = self.vectors
        total: Tensor = self.vectors
        for _ in range(self.layers):
            layer = torch.sparse.mm(self.graph, layer)
            total = total + layer
        total = total / (self.layers + 1)
        loss = softplus((total[users] * (total[others] - total[items])).sum(1)).mean()
        loss = loss + 1e-4 * sum(self.vectors[ids].square().sum() for ids in (users, items, others)) / batch
        self.adam.zero_grad()
        torch.autograd.backward(loss)
        self.adam.step()


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
