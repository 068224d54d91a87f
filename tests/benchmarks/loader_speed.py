"""Rows per second and peak memory of the loader on made-up data of Criteo's shape (13 numbers, 26 ids, one label).

python tests/benchmarks/loader_speed.py                      # the split fits one window
python tests/benchmarks/loader_speed.py --window_rows 100000 # windows are decoded again in every epoch
python tests/benchmarks/loader_speed.py --rows 3200000 --window_rows 100000 --epochs 1
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlib.data.loader import Loader
from ctrlib.schema import Categorical, Numeric, Schema


def write_criteo_shape(folder: Path, num_rows: int, row_group_rows: int) -> None:
    """A prepared folder whose train split has `num_rows` rows, in files of ten row groups."""
    rng = np.random.default_rng(0)
    numeric = [Numeric(f"I{i}", parameters={}) for i in range(1, 14)]
    sizes = np.geomspace(10, 300_000, 26).astype(int)
    ids = [Categorical(f"C{i}", num_embeddings=int(size)) for i, size in enumerate(sizes, 1)]
    (folder / "train").mkdir(parents=True)
    Schema((*numeric, *ids), ("label",)).save(folder / "schema.json")
    for part, start in enumerate(range(0, num_rows, 10 * row_group_rows)):
        count = min(10 * row_group_rows, num_rows - start)
        columns = {feature.name: rng.standard_normal(count, dtype=np.float32) for feature in numeric}
        # squared, so that small ids are frequent, as preparation makes them
        columns |= {f.name: (rng.random(count) ** 2 * size).astype(np.int32) for f, size in zip(ids, sizes)}
        columns["label"] = (rng.random(count) < 0.25).astype(np.float32)
        path = folder / "train" / f"part-{part:05}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=row_group_rows, compression="zstd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 800_000),
        ("batch_size", 4096),
        ("window_rows", 1 << 20),
        ("row_group_rows", 20_000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        write_criteo_shape(folder, args.rows, args.row_group_rows)
        print(f"{args.rows} rows, batch {args.batch_size}, windows of {args.window_rows}")
        for workers in args.workers:
            start = time.perf_counter()
            loader = Loader(
                folder,
                "train",
                batch_size=args.batch_size,
                shuffle=True,
                workers=workers,
                window_rows=args.window_rows,
            )
            opened = time.perf_counter() - start
            rates = []
            for _ in range(args.epochs):
                start = time.perf_counter()
                seen = sum(batch.size for batch in loader)
                rates.append(seen / (time.perf_counter() - start) / 1e6)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
            shown = ", ".join(f"{rate:.2f}" for rate in rates)
            print(f"workers {workers}: opened in {opened:.3f} s; epochs at {shown} M rows/s; peak so far {peak} MiB")


if __name__ == "__main__":
    main()
