"""Peak memory and speed of `prepare` on Criteo-shaped rows: it must not grow with their number.

Makes tab-separated files (13 numbers, 26 categories with up to 100,000 values each) and prepares each in a process of
its own. 10 million rows need about 6 GB of disk while it runs.

    python tests/benchmarks/prepare_memory.py --rows 1000000 10000000
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

NAMES = ["label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
VALUES = pl.Series([f"{i * 2654435761 % 2**32:08x}" for i in range(100_000)])


def write_rows(path: Path, num_rows: int, chunk: int = 250_000) -> None:
    """A file with `num_rows` random rows; numbers are skewed and a sixth of them missing."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, num_rows, chunk):
            n = min(chunk, num_rows - start)
            columns = {"label": pl.Series(rng.integers(0, 2, n))}
            for i in range(1, 14):
                numbers = pl.Series(rng.lognormal(2, 2, n).astype(np.int64)).cast(pl.String)
                columns[f"I{i}"] = numbers.set(pl.Series(rng.random(n) < 1 / 6), None)
            for i in range(1, 27):
                distinct = (100_000, 20_000, 5_000, 100)[i % 4]
                columns[f"C{i}"] = VALUES.gather((rng.random(n) ** 3 * distinct).astype(np.int64))
            pl.DataFrame(columns).write_csv(file, separator="\t", include_header=False)


def prepare_once(path: Path, out: Path) -> None:
    """Prepare, and print seconds on the wall, seconds of CPU and the peak of memory in MiB."""
    from ctrlib.data.prepare import prepare
    from ctrlib.schema import Categorical, Numeric

    features = [Numeric(name, "log") if name.startswith("I") else Categorical(name) for name in NAMES[1:]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    prepare({"train": path}, out, features=features, columns=NAMES, log=None)
    wall = time.perf_counter() - start
    print(wall, time.process_time(), before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure and print a line for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--once", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        prepare_once(*arguments.once)
        return
    for num_rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "raw.tsv"
            write_rows(path, num_rows)
            command = [sys.executable, __file__, "--once", str(path), str(Path(folder) / "out")]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            wall, cpu, before, peak = map(float, printed.split())
            size, load, cores = path.stat().st_size / 2**20, os.getloadavg()[0], os.cpu_count()
            speed = num_rows / wall
            print(
                f"{num_rows:>12,} rows, {size:,.0f} MiB: {wall:.0f} s ({speed:,.0f} rows/s), {cpu:.0f} s CPU, "
                f"peak {peak:,.0f} MiB ({before:,.0f} before); load {load:.1f} on {cores} cores",
                flush=True,
            )


if __name__ == "__main__":
    main()
