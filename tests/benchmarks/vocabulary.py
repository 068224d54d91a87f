"""What a training step of the fused engine costs as a table grows: nothing may be proportional to the vocabulary.

    python tests/benchmarks/vocabulary.py --values 10000 1000000 30000000

A DeepFM of 26 fields, of which one has that many values and the others 1,000 each, in batches of 4096 whose ids of the
large field are drawn uniformly, so that nearly every look-up of it misses all caches. Tables of all sizes take turns,
each in a process of its own. A line each: milliseconds of a step (median), its ratio to the smallest table, bytes of
the process at its peak, and those of the table with its optimiser's state.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NUM_FIELDS, SMALL = 26, 1_000


def serve(values: int, embedding_dim: int, batch_size: int) -> None:
    """Make the model, then answer each number on stdin with the seconds of so many steps."""
    import ctrlib as ctr
    from ctrlib.training.allocator import keep_freed_memory
    from ctrlib.training.engines import make_engine

    keep_freed_memory()
    sizes = [values, *[SMALL] * (NUM_FIELDS - 1)]
    features = [ctr.Categorical(f"c{number}", num_embeddings=size) for number, size in enumerate(sizes)]
    schema = ctr.Schema(tuple(features), ("label",))
    config = {"model": "deepfm", "embedding_dim": embedding_dim, "hidden": (400, 400, 400)}
    engine: Any = make_engine(ctr.models.build(ctr.models.for_engine(config, "fused"), schema), "fused")
    batches = [ctr.testing.example_batch(schema, batch_size, seed=seed) for seed in range(8)]
    at = 0
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            engine.step(batches[at % len(batches)])
            at += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": time.perf_counter() - started, "peak": peak}), flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, nargs="+", default=(10_000, 100_000, 1_000_000, 10_000_000, 30_000_000))
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve, given.embedding_dim, given.batch_size)
        return
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    shared = ["--embedding-dim", str(given.embedding_dim), "--batch-size", str(given.batch_size)]
    workers = {}
    for values in given.values:
        command = [sys.executable, __file__, "--serve", str(values), *shared]
        workers[values] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        ask(workers[values])
    seconds: dict[int, list[float]] = {values: [] for values in workers}
    peaks = {}
    for turn in range(given.rounds + 1):  # the first warms up
        for values, worker in workers.items():
            said = ask(worker, given.steps)
            peaks[values] = said["peak"]
            if turn:
                seconds[values].append(said["seconds"] / given.steps)
    first = given.values[0]
    print(f"{'values':>12} {'ms a step':>10} {'ratio':>6} {'peak, MiB':>10} {'table, MiB':>11}")
    for values, worker in workers.items():
        ratio = statistics.median(one / other for one, other in zip(seconds[values], seconds[first]))
        table = values * (given.embedding_dim + 1) * 4
        print(
            f"{values:12,} {1e3 * statistics.median(seconds[values]):10.1f} {ratio:6.2f} "
            f"{peaks[values] / 2**20:10,.0f} {table / 2**20:11,.0f}"
        )
        worker.terminate()


def ask(worker: subprocess.Popen[str], steps: int | None = None) -> Any:
    """What the process says next, after being told to do so many steps."""
    assert worker.stdin is not None and worker.stdout is not None
    if steps is not None:
        worker.stdin.write(f"{steps}\n")
        worker.stdin.flush()
    return json.loads(worker.stdout.readline())


if __name__ == "__main__":
    main()
