"""Candidates on Gowalla and MovieLens-1M, in the splits of LightGCN and UltraGCN: UltraGCN beside what it must beat.

    python recipes/retrieval.py --raw DIR --data movielens_1m --model ultragcn --seed 1 [--select-on-test] [--record]
    python recipes/retrieval.py --raw DIR --data gowalla --model ultragcn ials ease itemcf popularity --seeds 1 2 3
    python recipes/retrieval.py --raw DIR --data gowalla --rivals published lightgcn --minutes 30 --record

DIR holds `gowalla/` and `ultragcn_ml1m/` with train.txt.gz and test.txt.gz, lines `user item item ...`: Gowalla from
https://github.com/kuandeng/LightGCN, MovieLens-1M from https://github.com/xue-pai/UltraGCN. Metrics are those of these
programs: top 20, training items left out, means over all users (each has test items in both).

The honest number chooses the epoch on a tenth of train and then trains on all of it; `--select-on-test` chooses on test
as the published numbers do. All settings were chosen on validation. `--rivals` trains LightGCN, or UltraGCN as it was
published, for so many minutes and says how far they are then, and what one of their epochs takes.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import tyro
from scipy import sparse
from torch import Tensor
from torch.nn.functional import softplus
from tyro.conf import FlagCreatePairsOff

from ctrlib.cli.flags import parse_option
from ctrlib.retrieval.evaluate import evaluate
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
        "ials": {"embedding_dim": 512, "alpha": 0.01, "l2": 0.003, "epochs": 8},
        "ease": {"l2": 200.0},
        "itemcf": {"num_neighbours": 100},
        "popularity": {},
    },
}
Model = Literal["ultragcn", "ials", "ease", "itemcf", "popularity"]
Rival = Literal["published", "lightgcn"]
Scores = Callable[[npt.NDArray[np.int64]], Tensor]


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
    rivals: tuple[Rival, ...] = ()
    """Train these instead, for --minutes: UltraGCN as it was published, or LightGCN."""
    minutes: float = 1.0
    """How long."""
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
    for seed in knobs.seeds:
        for rival in knobs.rivals:
            race(knobs, log, test, rival, seed)
        for model in () if knobs.rivals else knobs.model:
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
        kept = {f"{split}_{name}" for split in ("valid", "test") for name in ("recall@20", "ndcg@20")}
        kept |= {"peak_memory_mb", "fit_seconds"}
        name = model + (", epoch selected on test" if knobs.select_on_test else "")
        row = {"seed": seed, "seconds": found["seconds"], "epochs": found["best_epoch"], KEY: found[KEY]}
        keep(knobs, name, row, {key: value for key, value in found.items() if key in kept})


def keep(knobs: Knobs, name: str, row: dict[str, Any], scores: dict[str, float]) -> None:
    """Append a row to results.csv."""
    path = Path(__file__).parent / "results.csv"
    record({"engine": "exact", **row}, path, data=NAMES[knobs.data], model=name, task="retrieval", scores=scores)


def race(knobs: Knobs, log: Interactions, test: Aligned, rival: Rival, seed: int) -> None:
    """Train another form for so many minutes: how good it is then, and what an epoch of it takes.

    With one thread, minutes are those of its processor, which do not depend on what else is at work.
    """
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    trained = Published(knobs.data, log, seed) if rival == "published" else LightGCN(log, seed)
    trained.step()  # the first one also makes what Adam keeps
    started = now()
    steps = 0
    while (seconds := now() - started) < 60 * knobs.minutes:
        trained.step()
        steps += 1
    found = evaluate(trained.scores(), log.matrix, test, over="all")
    scores = {f"test_{name}": found[name] for name in ("recall@20", "ndcg@20")}
    scores |= {"epochs_done": steps / trained.batches, "seconds_per_epoch": seconds / steps * trained.batches}
    print(to_json({"data": knobs.data, "rival": rival, "seed": seed, **scores}), flush=True)
    if knobs.record:
        keep(knobs, f"{rival}, {knobs.minutes:g} minutes", {"seed": seed, "seconds": seconds}, scores)


class Published:
    """UltraGCN as it was published: vectors that begin near 0, negatives drawn for each pair, Adam."""

    def __init__(self, data: Literal["gowalla", "movielens_1m"], log: Interactions, seed: int) -> None:
        method = official(data)
        objective = Objective(log.matrix, method.weights)
        tables = make_tables(log.num_users, log.num_items, method.embedding_dim, init_std=method.init_std, seed=seed)
        self.sampler = Sampler(objective, tables, method.draws, learning_rate=method.learning_rate, seed=seed)
        self.batches = objective.num_batches
        self._given = (batch for _ in itertools.count() for batch in self.sampler.batches())

    def step(self) -> None:
        """One update by the next batch of pairs."""
        self.sampler.step(*next(self._given))

    def scores(self) -> Scores:
        """Scores of all items for some users, by what has been learnt so far."""
        users, items = self.sampler.vectors()
        return lambda some: users[torch.from_numpy(some)] @ items.T


class LightGCN:
    """LightGCN (He et al., SIGIR 2020, https://arxiv.org/abs/2002.02126): three layers, 64 columns, BPR, batch 2048."""

    layers, batch = 3, 2048

    def __init__(self, log: Interactions, seed: int) -> None:
        num_users, num_items = log.matrix.shape
        upper = sparse.hstack([sparse.csr_matrix((num_users, num_users)), log.matrix])
        lower = sparse.hstack([log.matrix.T, sparse.csr_matrix((num_items, num_items))])
        graph = sparse.csr_matrix(sparse.vstack([upper, lower]), dtype=np.float32)
        scale = sparse.diags(1 / np.sqrt(np.maximum(np.diff(graph.indptr), 1)))
        graph = sparse.csr_matrix(scale @ graph @ scale, dtype=np.float32)
        starts, columns, values = (torch.from_numpy(part) for part in (graph.indptr, graph.indices, graph.data))
        self.graph = torch.sparse_csr_tensor(starts, columns, values, size=graph.shape, check_invariants=False)
        self.log, self.batches = log, -(-log.matrix.nnz // self.batch)
        first = torch.randn(num_users + num_items, 64, generator=torch.Generator().manual_seed(seed))
        self.vectors = torch.nn.Parameter(first * 0.1)
        self.adam = torch.optim.Adam([self.vectors], lr=1e-3)
        self.draws = np.random.default_rng(seed)
        self.users = np.flatnonzero(np.diff(log.matrix.indptr))

    def step(self) -> None:
        """One update by users drawn alike, each with one of their items and one of all."""
        matrix, shift = self.log.matrix, self.log.num_users
        drawn = self.draws.choice(self.users, self.batch)
        places = self.draws.integers(matrix.indptr[drawn], matrix.indptr[drawn + 1])
        users = torch.from_numpy(drawn)
        items = torch.from_numpy(matrix.indices[places].astype(np.int64)) + shift
        others = torch.from_numpy(self.draws.integers(0, self.log.num_items, self.batch)) + shift
        final = self._final()
        loss = softplus((final[users] * (final[others] - final[items])).sum(1)).mean()
        l2 = torch.stack([self.vectors[ids].square().sum() for ids in (users, items, others)]).sum()
        loss = loss + 1e-4 / 2 / self.batch * l2
        self.adam.zero_grad()
        torch.autograd.backward(loss)
        self.adam.step()

    def _final(self) -> Tensor:
        layer: Tensor = self.vectors
        total: Tensor = self.vectors
        for _ in range(self.layers):
            layer = torch.sparse.mm(self.graph, layer)
            total = total + layer
        return total / (self.layers + 1)

    def scores(self) -> Scores:
        """Scores of all items for some users, by what has been learnt so far."""
        users, items = self._final().detach().tensor_split([self.log.num_users])
        return lambda some: users[torch.from_numpy(some)] @ items.T


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
