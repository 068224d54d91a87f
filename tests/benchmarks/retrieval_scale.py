"""Retrieval at 200,000 users x 1,000,000 items x 64: training in bounded memory, and exact search beside two libraries.

    python tests/benchmarks/retrieval_scale.py [--users 200000 --items 1000000] [--peers PYTHON]

Synthetic pairs; the sampled form with negatives shared by a batch, on fused tables, for some of an epoch's batches;
then the 20 best of some users, in blocks, without a matrix of all scores. PYTHON is an interpreter that has implicit
and faiss-cpu (not in our environment): the same vectors are searched there, with as many threads, right after. Seconds
of the processor are given too, which others' work on the machine does not change as much.
"""

from __future__ import annotations

import json
import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from ctrlib.retrieval.interactions import Interactions, Log
from ctrlib.retrieval.objective import Objective, Weights
from ctrlib.retrieval.recommend import search
from ctrlib.retrieval.sampled import Draws, Sampler, make_tables
from ctrlib.training.allocator import keep_freed_memory

PEER = """
import json, sys, time
import numpy as np
users, items, k, threads = np.load(sys.argv[1]), np.load(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
found = {}
import faiss
faiss.omp_set_num_threads(threads)
index = faiss.IndexFlatIP(items.shape[1])
index.add(items)
index.search(users[:8], k)
start = time.perf_counter(), time.process_time()
_, lists = index.search(users, k)
found["faiss"] = time.perf_counter() - start[0], time.process_time() - start[1]
np.save(sys.argv[5], lists)
from implicit.cpu.topk import topk
topk(items, users[:8], k, num_threads=threads)
start = time.perf_counter(), time.process_time()
topk(items, users, k, num_threads=threads)
found["implicit"] = time.perf_counter() - start[0], time.process_time() - start[1]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Arguments:
    """Train some batches and search for some users."""

    users: int = 200_000
    """Users."""
    items: int = 1_000_000
    """Items."""
    dim: int = 64
    """Width of the vectors."""
    per_user: int = 20
    """Pairs of each user."""
    batches: int = 100
    """Batches that are trained on."""
    search: int = 1024
    """Users that are searched for."""
    k: int = 20
    """Items of each."""
    peers: str = ""
    """Interpreter with implicit and faiss-cpu."""


def peak() -> int:
    """Peak memory of this process in MB."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main(arguments: Arguments) -> None:
    """Print a line of JSON."""
    keep_freed_memory()
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(arguments.users), arguments.per_user)
    items = np.minimum(random.pareto(1.2, len(users)) * arguments.items / 200, arguments.items - 1).astype(np.int64)
    items[: arguments.items] = random.permutation(arguments.items)[: len(items)]  # every item is in a pair
    log = Interactions.of(Log.of(users, items))
    found: dict[str, float] = {"pairs": log.matrix.nnz, "peak_mb_data": peak()}
    objective = Objective(log.matrix, Weights(neighbour_weight=0.0, batch_size=4096))
    tables = make_tables(log.num_users, log.num_items, arguments.dim, init_std=0.1, seed=0)
    sampler = Sampler(objective, tables, Draws(1024, shared=True), learning_rate=0.02, seed=0, engine="fused")
    batches = sampler._batches()
    sampler.step(*next(batches))
    started = time.perf_counter()
    for _, batch in zip(range(arguments.batches), batches):
        sampler.step(*batch)
    seconds = time.perf_counter() - started
    found |= {"pairs_per_second": arguments.batches * 4096 / seconds, "peak_mb_trained": peak()}
    user_vectors, item_vectors = sampler.vectors()
    some = user_vectors[: arguments.search].contiguous()
    search(some[:8], item_vectors, arguments.k)
    started, cpu = time.perf_counter(), time.process_time()
    lists = torch.cat([search(block, item_vectors, arguments.k)[0] for block in some.split(256)])
    found |= {"search_seconds": time.perf_counter() - started, "search_cpu_seconds": time.process_time() - cpu}
    found["peak_mb_searched"] = peak()
    if arguments.peers:
        with tempfile.TemporaryDirectory() as folder:
            names = [str(Path(folder) / name) for name in ("users.npy", "items.npy", "lists.npy")]
            for name, vectors in zip(names, (some, item_vectors)):
                np.save(name, vectors.numpy())
            given = [names[0], names[1], str(arguments.k), str(torch.get_num_threads()), names[2]]
            ran = subprocess.run([arguments.peers, "-c", PEER, *given], capture_output=True, text=True, check=True)
            for name, (wall, spent) in json.loads(ran.stdout).items():
                found |= {f"{name}_seconds": wall, f"{name}_cpu_seconds": spent}
            found["lists_equal_to_faiss"] = float((np.load(names[2]) == lists.numpy()).mean())
    print(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
