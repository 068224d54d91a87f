"""Speed, memory and order of `ctr.rank` beside OutRank's heuristics, on planted columns whose order is known.

The label's rate is a product of one factor for each planted column, with mean 1, so that the mutual information of each
column and the label is known exactly. Columns with 2 to 10,000 values and two numbers are planted; noise of 10 to
10,000 values, of ids with few rows each and of numbers, a row id, and an exclusive or, whose two columns tell nothing
alone, stand between them. 40 columns are these twice, the second time with half the effects.

    python tests/benchmarks/ranking_speed.py --rows 100000 --outrank ~/outrank/bin/python
    python tests/benchmarks/ranking_speed.py --rows 10000000 --ids --memory 64 256 4096

The first ends with hashes of all scores, of one part and of 8 that are counted apart and merged, which must be equal.
The second is of six columns, of which three have very many values: a request id that comes once, a device id with half
as many values as rows, and a user id with a twentieth. Its memory is that above what the process has before.

The python is of an environment with `outrank` and `xxhash<4`. OutRank waits 4 s in every minibatch, whatever that
takes. So each heuristic runs in one minibatch with a wait of 10 ms, and with `--pauses` also as it comes: minibatches
of 16,384 rows with its own waits. "Scoring" is what OutRank itself says its scores took, and the CPU of its workers,
without imports, reading and counting; of ours, all of `ctr.rank` of a folder that is prepared, without imports and with
reading. "Codes" is of scores only, on the same whole numbers in memory and in one thread, the least of three runs.
Memory is that of all processes, shared pages once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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


def write_ids(out: Path, num_rows: int) -> None:
    """A folder of parquet files, a million rows each."""
    import polars as pl

    (out / "data").mkdir()
    rng = np.random.default_rng(0)
    for start in range(0, num_rows, 1_000_000):
        rows = min(1_000_000, num_rows - start)
        spread = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no two ids become one
        values = {"device": num_rows // 2, "user": num_rows // 20, "hour": 24, "country": 200, "slot": 5}
        codes = {name: rng.integers(0, most, rows) for name, most in values.items()}
        codes["request"] = np.arange(start, start + rows)
        label = rng.random(rows) < 0.05 + 0.1 * (codes["slot"] == 2) + 0.05 * (codes["user"] % 3 == 0)
        ids = {name: (codes[name].astype(np.uint64) * spread).view(np.int64) for name in ("request", "device", "user")}
        frame = pl.DataFrame({**codes, **ids, "label": label.astype(np.int8)})
        frame.write_parquet(out / "data" / f"{start:012}.parquet")


def hash_of(name: str) -> int:
    """An order of columns that is no order of theirs."""
    import zlib

    return zlib.crc32(name.encode())


# ------------------------------------------------------------------------------------------ in a process of its own


def ours(data: Path, out: Path, *, pairs: bool, threads: int, memory: int = 1_024) -> None:
    """`ctr.rank` of a prepared folder; with what was found. OutRank's scoring is without its imports, so ours is."""
    from ctrlib.ranking.run import rank

    before = resident(os.getpid()) / 1024
    start, used = time.perf_counter(), time.process_time()
    ranking = rank(data / "prepared", pairs=pairs, threads=threads, memory=memory << 20)
    scoring = (time.perf_counter() - start, time.process_time() - used)
    one = ranking["label"]
    scores = {score.feature: score.relevance for score in one.scores}
    place = {(pair.first, pair.second): at for at, pair in enumerate(one.pairs, 1)}
    known = {f"{first} x {second}": at for (first, second), at in place.items() if is_xor(first, second)}
    found = [f"{pair.first} x {pair.second}" for pair in one.pairs if pair.found]
    said = {"scores": scores, "scoring": scoring, "pairs": found, "xor": known, "before": before}
    (out / "found.json").write_text(json.dumps(said))


def is_xor(first: str, second: str) -> bool:
    """Whether the two columns are those of an exclusive or."""
    return {first.split("_")[0], second.split("_")[0]} == {"left", "right"} and first[-1] == second[-1]


def shards(data: Path, out: Path, *, threads: int) -> None:
    """Hashes of all scores, of one part and of eight."""
    from ctrlib.ranking import Source, count, scores

    source = Source(data / "prepared")
    whole = count(source)
    merged = whole.merge([count(source, shard=(part, 8)) for part in range(8)])
    hashes = []
    for counts in (whole, merged):
        said = repr(scores(counts, source.schema.features, "label"))
        hashes.append(hashlib.sha256(said.encode()).hexdigest()[:16])
    (out / "found.json").write_text(json.dumps({"hashes": hashes}))


def codes(data: Path, out: Path, *, heuristic: str | None, threads: int) -> None:
    """Scores only, of whole numbers in memory: ours, or those of a heuristic of OutRank."""
    columns = dict(np.load(data / "codes.npz"))
    label = columns.pop("label")
    scores: dict[str, float] = {}
    times = []
    if heuristic is None:
        from ctrlib.ranking import score_columns
        from ctrlib.ranking.null import null_table

        def score() -> dict[str, float]:
            null_table.cache_clear()
            return {one.feature: one.relevance for one in score_columns(columns, label)}

    else:
        import logging
        import types
        import warnings

        from outrank.algorithms.importance_estimator import conduct_feature_ranking

        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        how = types.SimpleNamespace(heuristic=heuristic, mi_stratified_sampling_ratio=1.0)

        def score() -> dict[str, float]:
            return {name: float(conduct_feature_ranking(column, label, how)) for name, column in columns.items()}

        conduct_feature_ranking(next(iter(columns.values()))[:1000], label[:1000], how)  # it is compiled
    for _ in range(3):
        start, used = time.perf_counter(), time.process_time()
        scores = score()
        times.append((time.process_time() - used, time.perf_counter() - start))
        if times[0][0] > 60:
            break
    cpu, wall = min(times)
    (out / "found.json").write_text(json.dumps({"scores": scores, "scoring": (wall, cpu), "pairs": []}))


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
    {"ours": ours, "outrank": outrank, "shards": shards, "codes": codes}[name](data, out, **arguments)
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


def report(label: str, measured: dict, truth: dict[str, float] | None) -> None:
    """A line."""
    if "failed" in measured:
        print(f"{label:<44} failed: {measured['failed']}", flush=True)
        return
    if "hashes" in measured:
        same = "equal" if len({*measured["hashes"]}) == 1 else "DIFFERENT"
        print(f"{label:<44} {' and '.join(measured['hashes'])}: {same}", flush=True)
        return
    wall, cpu = measured["scoring"]
    if truth is None:
        print(
            f"{label:<44} {wall:6.1f} s, {cpu:6.1f} s CPU, "
            f"peak {measured['peak'] - measured['before']:6,.0f} MiB above {measured['before']:,.0f}",
            flush=True,
        )
        return
    spearman, below = agreement(truth, measured["scores"])
    print(
        f"{label:<44} {measured['wall']:6.1f} s, {measured['cpu']:6.1f} s CPU, "
        f"scoring {wall:6.2f} s, {cpu:6.2f} s CPU, peak {measured['peak']:6,.0f} MiB, "
        f"Spearman {spearman:6.3f}, {below:2} planted not above noise; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    if measured["pairs"]:
        print(f"{'':<44} pairs: {', '.join(measured['pairs'])}; places of the planted: {measured['xor']}", flush=True)


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
    parser.add_argument("--ids", action="store_true", help="six columns, three of very many values, without pairs")
    parser.add_argument("--memory", type=int, nargs="*", default=(1_024,), metavar="MIB", help="of --ids, several runs")
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
        if arguments.ids:
            run_ids(data, arguments)
        else:
            run_planted(data, arguments)


def run_ids(data: Path, arguments: argparse.Namespace) -> None:
    """A line for each budget of memory."""
    import ctrlib as ctr

    write_ids(data, arguments.rows)
    features = [ctr.RawId(name) for name in ("request", "device", "user")]
    features += [ctr.Categorical(name) for name in ("hour", "country", "slot")]
    ctr.prepare({"train": data / "data"}, data / "prepared", labels="label", features=features, log=None)
    print(f"{arguments.rows:,} rows, 6 columns, {arguments.threads} threads")
    for _ in range(arguments.repeat):
        for memory in arguments.memory:
            entry = {"program": "ours", "pairs": False, "memory": memory, "threads": arguments.threads}
            report(f"ctr.rank, singles, memory {memory} MiB", measure(sys.executable, data, entry), None)


def run_planted(data: Path, arguments: argparse.Namespace) -> None:
    """A line for each program, and what the numbers of two of them are to each other."""
    write_data(data, arguments.rows, arguments.columns // 20)
    known = json.loads((data / "truth.json").read_text())
    truth = known["truth"]
    prepare(data, truth)
    print(
        f"{arguments.rows:,} rows, {len(truth)} columns, {known['positive']:.1%} positive, {arguments.threads} threads"
    )
    told = sorted((name for name in truth if truth[name]), key=lambda name: -truth[name])
    print("known order, in thousandths of a nat: " + ", ".join(f"{name} {1000 * truth[name]:.2f}" for name in told))
    threads = arguments.threads
    entries = [
        (f"ctr.rank, {'with pairs' if pairs else 'singles'}", sys.executable, {"program": "ours", "pairs": pairs})
        for pairs in (False, True)
    ]
    entries.append(("hashes of 1 part and of 8 merged", sys.executable, {"program": "shards"}))
    in_memory = {"program": "codes", "threads": 1}
    entries.append(("codes, ctr.ranking.score_columns", sys.executable, {**in_memory, "heuristic": None}))
    for heuristic in arguments.heuristics if arguments.outrank else ():
        label = f"codes, outrank {heuristic}"
        entries.append((label, arguments.outrank, {**in_memory, "heuristic": heuristic}))
        for pauses in (False, True)[: 1 + arguments.pauses]:
            label = f"outrank {heuristic}, {'as it comes' if pauses else 'without pauses'}"
            entry = {"program": "outrank", "heuristic": heuristic, "pauses": pauses}
            entries.append((label, arguments.outrank, entry))
    found = {}
    for _ in range(arguments.repeat):
        for label, python, entry in entries:
            found[label] = measure(python, data, {"threads": threads, **entry})
            report(label, found[label], truth)
    for one, other in (
        ("codes, ctr.ranking.score_columns", "codes, outrank AMI"),
        ("ctr.rank, singles", "outrank AMI, without pauses"),
    ):
        if "failed" in found.get(other, {"failed": ""}):
            continue
        times = found[other]["scoring"][1] / found[one]["scoring"][1], found[other]["cpu"] / found[one]["cpu"]
        print(f"{other} to {one}: {times[0]:.1f} times the CPU of scores, {times[1]:.1f} times of the whole process")


def prepare(data: Path, truth: dict[str, float]) -> None:
    """The file as a folder that `ctr.rank` takes."""
    import ctrlib as ctr

    numbers = ("price", "age", "random")
    features = [ctr.Numeric(name) if name.startswith(numbers) else ctr.Categorical(name) for name in truth]
    start, used = time.perf_counter(), time.process_time()
    ctr.prepare({"train": data / "data.csv"}, data / "prepared", labels="label", features=features, log=None)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    print(f"{'ctr.prepare, before ctr.rank':<44} {wall:6.1f} s, {cpu:6.1f} s CPU")
    from ctrlib.ranking import Source

    blocks = list(Source(data / "prepared").blocks("train"))
    columns = {name: np.concatenate([block.codes[name] for block in blocks]).astype(np.int32) for name in truth}
    np.savez(
        data / "codes.npz", label=np.concatenate([block.labels[:, 0] for block in blocks]).astype(np.int32), **columns
    )


if __name__ == "__main__":
    main()
