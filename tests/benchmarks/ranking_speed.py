"""Speed, memory and order of `ctr.rank` beside OutRank's heuristics, on planted columns whose order is known.

The label's rate is a product of one factor for each planted column, with mean 1, so that the mutual information of each
column and the label is known exactly. Columns with 2 to 10,000 values and two numbers are planted; noise of 10 to
10,000 values, of ids with few rows each and of numbers, a row id, and an exclusive or, whose two columns tell nothing
alone, stand between them. 40 columns are these twice, the second time with half the effects.

    python tests/benchmarks/ranking_speed.py --rows 100000 --outrank ~/outrank/bin/python

The python is of an environment with `outrank` and `xxhash<4`. OutRank waits 4 s in every minibatch, whatever that
takes. So each heuristic runs in one minibatch with a wait of 10 ms, and with `--pauses` also as it comes: minibatches
of 16,384 rows with its own waits. "Scoring" is what OutRank itself says its scores took, and the CPU of its workers,
without imports, reading and counting; of ours, all of `ctr.rank` of a folder that is prepared, without imports and with
reading. Memory is that of all processes, shared pages once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HEURISTICS = ("AMI", "MI-numba-randomized", "MI", "correlation-Pearson", "max-value-coverage")
EFFECTS = {2: 0.22, 4: 0.18, 10: 0.15, 30: 0.10, 100: 0.13, 300: 0.11, 1_000: 0.20, 3_000: 0.16, 10_000: 0.25}
NUMBERS = {"price": 0.45, "age": 0.3}
XOR = 0.2
NOISE = (10, 100, 1_000, 10_000)


def entropy(share: np.ndarray | float) -> np.ndarray:
    """Of a label that is 1 in this share of the rows, in nats; 0 < share < 1."""
    share = np.asarray(share)
    return -share * np.log(share) - (1 - share) * np.log(1 - share)


def write_data(out: Path, num_rows: int, copies: int) -> None:
    """data.csv, and truth.json: column -> its mutual information with the label, in nats."""
    import polars as pl

    rng = np.random.default_rng(0)
    columns: dict[str, pl.Series] = {}
    factor, effects, most = np.ones(num_rows), {}, 1.0
    for copy in range(copies):
        scale, end = 0.5**copy, f"_{copy}"
        for values, effect in EFFECTS.items():
            codes = rng.integers(0, values, num_rows)
            up = rng.permutation(np.arange(values) % 2) * 2 - 1
            factor *= 1 + scale * effect * up[codes]
            columns[f"c{values}{end}"] = pl.Series(codes)
            effects[f"c{values}{end}"] = scale * effect * np.array([-1.0, 1.0])
        for name, effect in NUMBERS.items():
            rank = rng.random(num_rows)
            factor *= 1 + scale * effect * (2 * rank - 1)
            columns[f"{name}{end}"] = pl.Series(np.round(-10 * np.log(1 - rank), 4))
            effects[f"{name}{end}"] = scale * effect * (np.arange(1, 20_000, 2) / 10_000 - 1)
        left, right = rng.integers(0, 2, (2, num_rows))
        factor *= 1 + scale * XOR * (2 * (left ^ right) - 1)
        columns |= {f"left{end}": pl.Series(left), f"right{end}": pl.Series(right)}
        columns |= {f"noise{values}{end}": pl.Series(rng.integers(0, values, num_rows)) for values in NOISE}
        columns[f"rare{end}"] = pl.Series(rng.zipf(1.3, num_rows) % 50_000)
        columns[f"random{end}"] = pl.Series(np.round(rng.normal(size=num_rows), 4))
        columns[f"row{end}"] = pl.Series(rng.permutation(num_rows))
        most *= np.prod([1 + scale * effect for effect in (*EFFECTS.values(), *NUMBERS.values(), XOR)])
    base = 0.95 / most  # no rate is above that
    label = (rng.random(num_rows) < base * factor).astype(np.int8)
    order = sorted(columns, key=lambda name: hash_of(name))
    pl.DataFrame({"label": label, **{name: columns[name] for name in order}}).write_csv(out / "data.csv")
    told = {name: float(entropy(base) - entropy(base * (1 + effects[name])).mean()) for name in effects}
    truth = {name: told.get(name, 0.0) for name in order}
    (out / "truth.json").write_text(json.dumps({"rows": num_rows, "positive": float(label.mean()), "truth": truth}))


def hash_of(name: str) -> int:
    """An order of columns that is no order of theirs."""
    import zlib

    return zlib.crc32(name.encode())


# ------------------------------------------------------------------------------------------ in a process of its own


def ours(data: Path, out: Path, *, pairs: bool, threads: int) -> None:
    """`ctr.rank` of a prepared folder; with what was found. OutRank's scoring is without its imports, so ours is."""
    from ctrlib.ranking.run import rank

    start, used = time.perf_counter(), time.process_time()
    ranking = rank(data / "prepared", pairs=pairs, threads=threads)
    scoring = (time.perf_counter() - start, time.process_time() - used)
    one = ranking["label"]
    scores = {score.feature: score.relevance for score in one.scores}
    found = [f"{pair.first} x {pair.second}" for pair in one.pairs if pair.found]
    (out / "found.json").write_text(json.dumps({"scores": scores, "scoring": scoring, "pairs": found}))


def outrank(data: Path, out: Path, *, heuristic: str, pauses: bool, threads: int) -> None:
    """OutRank's command line with one heuristic, on the CSV file."""
    import csv
    import types

    from outrank import __main__ as program
    from outrank import core_ranking

    rows = json.loads((data / "truth.json").read_text())["rows"]
    if not pauses:
        sleep = time.sleep
        core_ranking.time = types.SimpleNamespace(sleep=lambda seconds: sleep(0.01))
    os.chdir(out)
    sys.argv = ["outrank", "--task", "ranking", "--data_source", "csv-raw", "--data_path", str(data)]
    sys.argv += ["--heuristic", heuristic, "--subsampling", "1", "--output_folder", str(out / "ranks")]
    sys.argv += ["--include_cardinality_in_feature_names", "False", "--num_threads", str(threads)]
    sys.argv += ["--disable_tqdm", "True", *([] if pauses else ["--minibatch_size", str(rows)])]
    program.main()
    path = out / "ranks" / "pairwise_ranks.tsv"  # it exits 0 without one if something is wrong
    if not path.exists():
        raise SystemExit(f"{heuristic} wrote no {path.name}")
    scores: dict[str, float] = {}
    with path.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            if row["FeatureB"] == "label" != row["FeatureA"]:
                scores[row["FeatureA"]] = float(row["Score"] or "nan")
    timings = json.loads((out / "ranks" / "timings.json").read_text())
    scoring = (sum(timings["feature_score_computation"].values()), sum(os.times()[2:4]))  # which its workers did
    (out / "found.json").write_text(json.dumps({"scores": scores, "scoring": scoring, "pairs": []}))


def run_once(arguments: dict) -> None:
    """Run one program, and print seconds on the wall and seconds of CPU, with those of its own processes."""
    data, out, name = Path(arguments.pop("data")), Path(arguments.pop("out")), arguments.pop("program")
    start = time.perf_counter()
    {"ours": ours, "outrank": outrank}[name](data, out, **arguments)
    used = os.times()
    print("measured", time.perf_counter() - start, sum(used[:4]))


# ------------------------------------------------------------------------------------------ around them


def resident(pid: int) -> int:
    """KiB of a process and its descendants; pages that they share count once."""
    total = 0
    with contextlib.suppress(OSError):  # which ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(resident(int(child)) for child in (task / "children").read_text().split())
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def measure(python: str, data: Path, arguments: dict) -> dict:
    """What a program found, its seconds on the wall and of CPU, and its peak of memory in MiB, sampled 5 times a s; or
    the last line that it printed, if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = json.dumps({**arguments, "data": str(data), "out": folder})
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        environment |= {name: str(arguments["threads"]) for name in ("POLARS_MAX_THREADS", "OMP_NUM_THREADS")}
        with (Path(folder) / "said").open("w+") as file:
            command = [python, __file__, "--once", said]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            peak = 0
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(0.2)
            file.seek(0)
            printed = file.read()
        found = Path(folder) / "found.json"
        if process.returncode or not found.exists():
            return {"failed": printed.strip().rpartition("\n")[2]}
        wall, cpu = map(float, printed.rpartition("measured")[2].split())
        return {**json.loads(found.read_text()), "wall": wall, "cpu": cpu, "peak": peak / 1024}


def agreement(truth: dict[str, float], scores: dict[str, float]) -> tuple[float, int]:
    """Spearman's correlation with the known order, and how many planted columns have noise above them."""
    from scipy.stats import spearmanr

    names = list(truth)
    values = np.array([scores.get(name, np.nan) for name in names])
    known = np.array(list(truth.values()))
    values[np.isnan(values)] = -np.inf  # what has no score comes last
    noise = values[known == 0].max()
    return float(spearmanr(known, values).statistic), int(np.sum(values[known > 0] <= noise))


def report(label: str, measured: dict, truth: dict[str, float]) -> None:
    """A line."""
    if "failed" in measured:
        print(f"{label:<44} failed: {measured['failed']}", flush=True)
        return
    spearman, below = agreement(truth, measured["scores"])
    wall, cpu = measured["scoring"]
    print(
        f"{label:<44} {measured['wall']:6.1f} s, {measured['cpu']:6.1f} s CPU, "
        f"scoring {wall:6.2f} s, {cpu:6.2f} s CPU, peak {measured['peak']:6,.0f} MiB, "
        f"Spearman {spearman:6.3f}, {below:2} planted not above noise; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    if measured["pairs"]:
        print(f"{'':<44} pairs: {', '.join(measured['pairs'])}")


def main() -> None:
    """Measure and print a line for each program.

    Raises:
        SystemExit: an argument is out of range.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--columns", type=int, choices=(20, 40), default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every program")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each program, in turn")
    parser.add_argument("--outrank", metavar="PYTHON", help="of an environment with outrank and xxhash<4")
    parser.add_argument("--heuristics", nargs="*", default=HEURISTICS, help="of OutRank")
    parser.add_argument("--pauses", action="store_true", help="run OutRank as it comes, too")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        run_once(json.loads(arguments.once))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_data(data, arguments.rows, arguments.columns // 20)
        known = json.loads((data / "truth.json").read_text())
        truth = known["truth"]
        prepare(data, truth)
        print(
            f"{arguments.rows:,} rows, {len(truth)} columns, {known['positive']:.1%} positive, "
            f"{arguments.threads} threads"
        )
        told = sorted((name for name in truth if truth[name]), key=lambda name: -truth[name])
        print("known order, in thousandths of a nat: " + ", ".join(f"{name} {1000 * truth[name]:.2f}" for name in told))
        entries = [
            (f"ctr.rank, {'with pairs' if pairs else 'singles'}", sys.executable, {"program": "ours", "pairs": pairs})
            for pairs in (False, True)
        ]
        for heuristic in arguments.heuristics if arguments.outrank else ():
            for pauses in (False, True)[: 1 + arguments.pauses]:
                label = f"outrank {heuristic}, {'as it comes' if pauses else 'without pauses'}"
                entry = {"program": "outrank", "heuristic": heuristic, "pauses": pauses}
                entries.append((label, arguments.outrank, entry))
        for _ in range(arguments.repeat):
            for label, python, entry in entries:
                report(label, measure(python, data, {**entry, "threads": arguments.threads}), truth)


def prepare(data: Path, truth: dict[str, float]) -> None:
    """The file as a folder that `ctr.rank` takes."""
    import ctrlib as ctr

    numbers = ("price", "age", "random")
    features = [ctr.Numeric(name) if name.startswith(numbers) else ctr.Categorical(name) for name in truth]
    start, used = time.perf_counter(), time.process_time()
    ctr.prepare({"train": data / "data.csv"}, data / "prepared", labels="label", features=features, log=None)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    print(f"{'ctr.prepare, before ctr.rank':<44} {wall:6.1f} s, {cpu:6.1f} s CPU")


if __name__ == "__main__":
    main()
