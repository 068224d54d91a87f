"""Speed of `prepare` beside what others do with the same CSV files, each in a process of its own, all in one run.

Beside ctrlib run a plain Arrow program (read, dictionary-encode, write: no splits' own vocabularies, no checks, no
order of ids), pandas (read, factorize, write), and, with the pythons of environments that have them, FuxiCTR's
preparation (--fuxictr), and the recipe that the examples of DeepCTR-Torch and torch-rechub give: pandas and
scikit-learn's LabelEncoder over all rows, nothing written (--label-encoder). A folder with another version of ctrlib is
another entry (--ctrlib).

    python tests/benchmarks/prepare_speed.py --data FOLDER --repeat 3 --fuxictr ~/fuxictr/bin/python

The folder holds train.csv, valid.csv and test.csv: a column `label`, numbers I1, I2, ..., and everything else ids.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPLITS = ("train", "valid", "test")


def columns_of(data: Path) -> tuple[list[str], list[str]]:
    """Names of numbers and of ids."""
    with (data / "train.csv").open() as file:
        names = [name for name in file.readline().strip().split(",") if name != "label"]
    numbers = [name for name in names if name[0] == "I" and name[1:].isdigit()]
    return numbers, [name for name in names if name not in numbers]


def ctrlib(data: Path, out: Path, *, typed: bool = True) -> None:
    """All of `prepare`; with types inferred, too, if they are not told."""
    from ctrlib.data.prepare import prepare
    from ctrlib.schema import Categorical, Numeric

    numbers, ids = columns_of(data)
    features = [*(Numeric(name, "log") for name in numbers), *map(Categorical, ids)] if typed else None
    prepare({split: data / f"{split}.csv" for split in SPLITS}, out, labels="label", features=features, log=None)


def ctrlib_inferred(data: Path, out: Path) -> None:
    """The same without telling types."""
    ctrlib(data, out, typed=False)


def arrow(data: Path, out: Path) -> None:
    """Read everything, number the values of each column, write."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet as pq

    numbers, ids = columns_of(data)
    types = {**dict.fromkeys(ids, pa.string()), **dict.fromkeys(["label", *numbers], pa.float32())}
    options = pyarrow.csv.ConvertOptions(column_types=types)
    tables = [pyarrow.csv.read_csv(data / f"{split}.csv", convert_options=options) for split in SPLITS]
    table = pa.concat_tables(tables)
    made = {"label": table["label"]}
    for name in numbers:
        x = pc.fill_null(table[name], 0).to_numpy()
        made[name] = pa.array(np.sign(x) * np.log1p(np.abs(x)))
    for name in ids:
        made[name] = pa.chunked_array([chunk.indices for chunk in table[name].dictionary_encode().chunks])
    encoded, start = pa.table(made), 0
    out.mkdir()
    for split, part in zip(SPLITS, tables):
        pq.write_table(encoded.slice(start, part.num_rows), out / f"{split}.parquet")
        start += part.num_rows


def pandas(data: Path, out: Path) -> None:
    """Read everything, factorize each column, write."""
    import numpy as np
    import pandas as pd

    numbers, ids = columns_of(data)
    parts = [pd.read_csv(data / f"{split}.csv", dtype=dict.fromkeys(ids, str)) for split in SPLITS]
    frame = pd.concat(parts, ignore_index=True)
    for name in ids:
        frame[name] = pd.factorize(frame[name])[0].astype(np.int32)
    for name in numbers:
        frame[name] = np.log1p(frame[name].fillna(0).clip(lower=0)).astype(np.float32)
    out.mkdir()
    frame.to_parquet(out / "all.parquet", index=False)


def label_encoder(data: Path, out: Path) -> None:
    """The recipe of DeepCTR-Torch's and torch-rechub's examples."""
    import pandas as pd
    from sklearn.preprocessing import LabelEncoder, MinMaxScaler

    numbers, ids = columns_of(data)
    parts = [pd.read_csv(data / f"{split}.csv", dtype=dict.fromkeys(ids, str)) for split in SPLITS]
    frame = pd.concat(parts, ignore_index=True)
    frame[ids] = frame[ids].fillna("-1")
    for name in ids:
        frame[name] = LabelEncoder().fit_transform(frame[name])
    if numbers:
        frame[numbers] = MinMaxScaler().fit_transform(frame[numbers].fillna(0))


def fuxictr(data: Path, out: Path) -> None:
    """FuxiCTR's own preparation with its usual settings for Criteo."""
    from fuxictr.preprocess import FeatureProcessor, build_dataset

    numbers, ids = columns_of(data)
    kinds = [{"name": ids, "active": True, "dtype": "str", "type": "categorical"}]
    if numbers:
        kinds.append(
            {"name": numbers, "active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"}
        )
    settings = {
        "data_root": str(out),
        "dataset_id": "data",
        "data_format": "csv",
        **{f"{split}_data": str(data / f"{split}.csv") for split in SPLITS},
        "feature_cols": kinds,
        "label_col": {"name": "label", "dtype": "float"},
        "min_categr_count": 1,
    }
    build_dataset(FeatureProcessor(**settings), **settings)


PROGRAMS = {one.__name__: one for one in (ctrlib, ctrlib_inferred, arrow, pandas, label_encoder, fuxictr)}


def run_once(name: str, data: Path, out: Path) -> None:
    """Run a program, and print seconds on the wall, seconds of CPU and the peak of memory in MiB."""
    import resource

    start = time.perf_counter()
    PROGRAMS[name](data, out)
    wall = time.perf_counter() - start
    print("measured", wall, time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Measure and print a line for each program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.csv, valid.csv and test.csv")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each program, in turn; medians are printed")
    parser.add_argument("--fuxictr", metavar="PYTHON", help="of an environment with FuxiCTR")
    parser.add_argument("--label-encoder", metavar="PYTHON", help="of an environment with pandas and scikit-learn")
    parser.add_argument("--ctrlib", metavar="FOLDER", nargs="*", default=[], help="checkouts of other versions")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        run_once(arguments.once[0], *map(Path, arguments.once[1:]))
        return
    here = str(Path(__file__).resolve().parents[2])
    entries = [(name, name, sys.executable, here) for name in ("ctrlib", "ctrlib_inferred", "arrow", "pandas")]
    entries += [(f"ctrlib of {Path(folder).name}", "ctrlib", sys.executable, folder) for folder in arguments.ctrlib]
    for name in ("label_encoder", "fuxictr"):
        if python := getattr(arguments, name):
            entries.append((name, name, python, here))
    num_rows = sum(sum(1 for _ in (arguments.data / f"{split}.csv").open("rb")) - 1 for split in SPLITS)
    walls: dict[str, list[float]] = {label: [] for label, *_ in entries}
    for _ in range(arguments.repeat):
        for label, name, python, source in entries:
            with tempfile.TemporaryDirectory() as folder:
                command = [python, __file__, "--once", name, str(arguments.data), str(Path(folder) / "out")]
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": source}
                )
            wall, cpu, peak = map(float, done.stdout.rpartition("measured")[2].split())
            walls[label].append(wall)
            print(
                f"{label:<24} {wall:7.2f} s, {cpu:6.2f} s CPU, {num_rows / wall:9,.0f} rows/s, peak {peak:,.0f} MiB; "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    ours = statistics.median(walls["ctrlib"])
    for label, times in walls.items():
        print(
            f"{label:<24} median {statistics.median(times):7.2f} s, {statistics.median(times) / ours:5.2f} x ctrlib's"
        )


if __name__ == "__main__":
    main()
