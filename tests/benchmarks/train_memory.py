"""Peak memory of training: it must not grow with the number of rows.

Writes prepared folders of random ids (half a gigabyte for 25 million rows) and trains one epoch on each, in a process
of its own. Validation has the same size in all: scores of its rows are kept.

    python tests/benchmarks/train_memory.py --rows 2500000 25000000
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

import ctrlib as ctr
from ctrlib.training.allocator import keep_freed_memory

FEATURES = tuple(ctr.Categorical(f"c{n}", num_embeddings=10 ** (n % 4 + 2)) for n in range(8))


def write_folder(folder: Path, num_rows: int) -> None:
    """A prepared folder with random ids: `num_rows` to train on, 100,000 to validate and to test on."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    ctr.Schema(FEATURES, ("click",)).save(folder / "schema.json")
    for split, total in (("train", num_rows), ("valid", 100_000), ("test", 100_000)):
        (folder / split).mkdir()
        for start in range(0, total, 500_000):
            size = min(500_000, total - start)
            columns = {f.name: rng.integers(3, f.num_embeddings, size, dtype=np.int32) for f in FEATURES}
            frame = pl.DataFrame({**columns, "click": rng.integers(0, 2, size).astype(np.float32)})
            frame.write_parquet(folder / split / f"{start:09d}.parquet", row_group_size=65_536)


def train(folder: Path) -> None:
    """One epoch; prints the peak in MiB, and rows per second."""
    keep_freed_memory()  # as the command line and the recipes do
    started = time.perf_counter()
    config = {"model": "mlp", "embedding_dim": 8, "stacked": 4, "hidden": [32]}
    training = {"engine": "fused", "batch_size": 16_384, "max_epochs": 1}
    ctr.run(folder, {**config, "training": training}, out=folder / "run")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_mib": round(peak), "seconds": round(time.perf_counter() - started)}))


def main() -> None:
    """Write, train, print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_500_000, 25_000_000])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for num_rows in arguments.rows:
            folder = Path(temporary) / f"{num_rows}"
            write_folder(folder, num_rows)
            command = [sys.executable, __file__, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            print(f"{num_rows:,} rows: {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
