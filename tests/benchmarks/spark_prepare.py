"""Prepare the same data with polars on this machine and with Spark in local mode: fingerprints and rows per second.

    python tests/benchmarks/spark_prepare.py --rows 2000000
    python tests/benchmarks/spark_prepare.py --raw ../shared/data --only criteo movielens

Synthetic rows are shaped like Criteo's (13 numbers, 26 categories), in a text file, as is Criteo-10k, which is prepared
with counts as categories and as numbers. MovieLens-1M comes as polars frames and as Spark DataFrames, in the three
protocols of datasets/movielens_1m.py. Needs PySpark and Java; fails where folders differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
from prepare_memory import NAMES, write_rows

import ctrlib as ctr
from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.prepare import prepare

ROOT = Path(__file__).parent.parent.parent


def synthetic(folder: Path, num_rows: int) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    path = folder / "raw.tsv"
    write_rows(path, num_rows)
    features = [ctr.Numeric(name, "log_standard") if name[0] == "I" else ctr.Categorical(name) for name in NAMES[1:]]
    yield "synthetic", path, {"features": features, "columns": NAMES, "separator": "\t"}


def criteo(raw: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for counts in ("buckets", "log"):
        features: list[ctr.Feature] = [
            ctr.Categorical(name, bucket="log_squared", min_count=10)
            if counts == "buckets"
            else ctr.Numeric(name, "log")
            for name in NAMES[1:14]
        ]
        features += [ctr.Categorical(name, min_count=10) for name in NAMES[14:]]
        options = {"features": features, "columns": NAMES, "separator": "\t"}
        yield f"Criteo-10k, counts as {counts}", raw / "criteo_10k" / "train.txt.gz", options


def movielens(raw: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """What datasets/movielens_1m.py gives to `prepare`."""
    sys.path.insert(0, str(ROOT / "datasets"))
    import movielens_1m

    given: list[tuple[Any, dict[str, Any]]] = []
    movielens_1m.ctr.prepare = lambda data, out, **options: given.append((data, options))  # type: ignore[attr-defined]
    for protocol in ("autoint", "ids", "histories"):
        movielens_1m.main(movielens_1m.Arguments(out=Path(), raw=raw / "movielens_1m", protocol=protocol))
        data, options = given.pop()
        yield f"MovieLens-1M, {protocol}", data, options


def as_frames(spark: Any, data: Any, folder: Path) -> Any:
    """Polars frames as Spark DataFrames; paths as they are."""
    if isinstance(data, dict):
        return {name: as_frames(spark, part, folder / name) for name, part in data.items()}
    if not isinstance(data, pl.DataFrame):
        return data
    folder.mkdir(parents=True)
    data.write_parquet(folder / "0.parquet")
    return spark.read.parquet(str(folder / "0.parquet"))


def main() -> None:
    """Prepare, compare, and print two lines for each set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--raw", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--only", nargs="+", default=["synthetic", "criteo", "movielens"])
    arguments = parser.parse_args()
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    spark = (
        SparkSession.builder.master(f"local[{os.cpu_count()}]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "8")
        .config("spark.driver.memory", "3g")
        .getOrCreate()
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = {
            "synthetic": lambda: synthetic(folder, arguments.rows),
            "criteo": lambda: criteo(arguments.raw),
            "movielens": lambda: movielens(arguments.raw),
        }
        for chosen in arguments.only:
            for title, data, options in sets[chosen]():
                found = []
                for who in ("polars", "spark"):
                    given = data if who == "polars" else as_frames(spark, data, folder / "frames" / title)
                    start = time.perf_counter()
                    options = {**options, "log": None, "overwrite": True, "spark": spark if who == "spark" else None}
                    prepare(given, folder / who, **options)
                    seconds = time.perf_counter() - start
                    parts = fingerprint(folder / who)
                    digits = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
                    num_rows = sum(json.loads((folder / who / "report.json").read_text())["rows"].values())
                    print(
                        f"{title}: {who:6} {num_rows:>9,} rows, {seconds:5.0f} s ({num_rows / seconds:>7,.0f} rows/s), "
                        f"{len(parts)} parts, all together {digits}; load {os.getloadavg()[0]:.1f}",
                        flush=True,
                    )
                    found.append(parts)
                differing = [part for part in found[0] if found[0][part] != found[1].get(part)]
                assert found[0] == found[1], f"{title}: {differing} differ"
    spark.stop()


if __name__ == "__main__":
    main()
