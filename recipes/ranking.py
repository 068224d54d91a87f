"""AUC of models on the top K features of several rankings: Criteo's columns, and as many that tell nothing.

    python recipes/ranking.py --raw DIR --out runs/ranking [--outrank PYTHON]

Beside each column of the first 10,000 rows of Criteo's train.txt stands a twin: the same values in another order.
Features are ranked on train, then DCN V2 is trained on the first K of each ranking: of `ctr.rank` in the order of 3MR
and by relevance, by mutual information as it is, by adjusted mutual information (scikit-learn), by permutation
importance of a random forest (scikit-learn, by AUC on validation), by OutRank as it recommends itself (with the python
of an environment that has `outrank` and `xxhash<4`), and at random. All see the same codes: ids, and 32 quantile bins
of numbers. A seed draws twins, split, weights and what is random in a ranking. The epoch is chosen by validation AUC,
and so is K, once for all seeds. OUT receives ranking.json and ranking.png.

The test split has 1,000 rows, so an AUC is known to about .02: rankings are told apart by how many twins they take.
"""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.ranking import Source
from ctrlib.training.allocator import keep_freed_memory

NUMBERS = [f"I{number}" for number in range(1, 14)]
CATEGORIES = [f"C{number}" for number in range(1, 27)]
TWIN = "_twin"
CONFIG = {"model": "dcnv2", "embedding_dim": 8, "hidden": (64, 64), "dropout": 0.3, "num_cross_layers": 2}
TRAINING = {"batch_size": 256, "embedding_l2": 1e-4, "max_epochs": 20}

Codes = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Knobs:
    """Train a model on the top K of each ranking, and draw AUC against K."""

    raw: Path
    """Folder that holds train.txt or train.txt.gz."""
    out: Path
    """For ranking.json and ranking.png."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each of twins, split and weights."""
    top: tuple[int, ...] = (3, 6, 12, 24, 39)
    """Values of K."""
    rows: int = 10_000
    """The first so many."""
    outrank: Path | None = None
    """Python of an environment with outrank; otherwise that ranking is left out."""


@dataclass(frozen=True)
class Data:
    """What a ranking may look at: a prepared folder, codes of its train and valid splits, and their labels."""

    folder: Path
    seed: int
    train: Codes
    valid: Codes
    outrank: Path | None

    @classmethod
    def of(cls, folder: Path, seed: int, outrank: Path | None) -> Data:
        """Read the codes."""
        return cls(folder, seed, codes_of(folder, "train"), codes_of(folder, "valid"), outrank)

    @property
    def names(self) -> list[str]:
        """Features."""
        return [name for name in self.train if name != "label"]


def codes_of(folder: Path, split: str) -> Codes:
    """Feature -> codes, and the label."""
    blocks = list(Source(folder).blocks(split))
    codes = {name: np.concatenate([one.codes[name] for one in blocks]).astype(np.int64) for name in blocks[0].codes}
    return {**codes, "label": np.concatenate([one.labels[:, 0] for one in blocks]).astype(np.int64)}


def ordered(scores: dict[str, float]) -> list[str]:
    """Highest first."""
    return sorted(scores, key=lambda name: -scores[name])


def three_mr(data: Data) -> list[str]:
    """Relevance, less overlap, and synergy."""
    order: list[str] = ctr.rank(data.folder)["label"].orders["3mr"]
    return order


def relevance(data: Data) -> list[str]:
    """Mutual information beyond chance."""
    order: list[str] = ctr.rank(data.folder, pairs=False)["label"].orders["relevance"]
    return order


def information(data: Data) -> list[str]:
    """Mutual information as it is."""
    found = ctr.rank(data.folder, pairs=False)["label"].scores
    return ordered({score.feature: score.information for score in found})


def adjusted(data: Data) -> list[str]:
    """Adjusted mutual information of scikit-learn."""
    from sklearn.metrics import adjusted_mutual_info_score

    label = data.train["label"]
    return ordered({name: adjusted_mutual_info_score(data.train[name], label) for name in data.names})


def forest(data: Data) -> list[str]:
    """What a forest's AUC on validation loses when a column is permuted."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.inspection import permutation_importance

    names = data.names
    train, valid = (np.stack([codes[name] for name in names], axis=1) for codes in (data.train, data.valid))
    model = RandomForestClassifier(100, min_samples_leaf=5, random_state=data.seed).fit(train, data.train["label"])
    found = permutation_importance(
        model, valid, data.valid["label"], scoring="roc_auc", n_repeats=3, random_state=data.seed
    )
    return ordered(dict(zip(names, found["importances_mean"])))


def outrank(data: Data) -> list[str]:
    """OutRank's recommended score, MI-numba-randomized, of all rows in one minibatch.

    Raises:
        RuntimeError: it wrote no ranks, which it may do with the exit status 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        pl.DataFrame(data.train).write_csv(Path(folder) / "data.csv")
        command = [str(data.outrank), "-m", "outrank", "--task", "ranking", "--data_source", "csv-raw"]
        command += ["--data_path", folder, "--subsampling", "1", "--minibatch_size", str(len(data.train["label"]))]
        command += ["--output_folder", "ranks", "--include_cardinality_in_feature_names", "False"]
        command += ["--num_threads", "1", "--disable_tqdm", "True"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        path = Path(folder) / "ranks" / "pairwise_ranks.tsv"
        if done.returncode or not path.exists():
            raise RuntimeError(f"{data.outrank} -m outrank wrote no ranks: {done.stderr[-2000:]}")
        with path.open() as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    return ordered(
        {row["FeatureA"]: float(row["Score"]) for row in rows if row["FeatureB"] == "label" != row["FeatureA"]}
    )


def drawn(data: Data) -> list[str]:
    """At random."""
    names: list[str] = np.random.default_rng(data.seed).permutation(data.names).tolist()
    return names


RANKINGS: dict[str, Callable[[Data], list[str]]] = {
    "ctr.rank, 3MR": three_mr,
    "ctr.rank, relevance": relevance,
    "mutual information": information,
    "adjusted mutual information": adjusted,
    "permutation importance": forest,
    "outrank": outrank,
    "random": drawn,
}


def main(knobs: Knobs) -> None:
    """Rank, train, report."""
    keep_freed_memory()
    path = knobs.raw / "train.txt"
    names = ["label", *NUMBERS, *CATEGORIES]
    frame = pl.read_csv(
        path if path.exists() else path.with_name("train.txt.gz"),
        separator="\t",
        has_header=False,
        new_columns=names,
        n_rows=knobs.rows,
        schema_overrides=dict.fromkeys(CATEGORIES, pl.String),
    )
    found: list[dict[str, Any]] = []
    for seed in knobs.seeds:
        with tempfile.TemporaryDirectory() as folder:
            found += run_seed(knobs, frame, seed, Path(folder))
    report(knobs, found)


def run_seed(knobs: Knobs, frame: pl.DataFrame, seed: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each ranking and K."""
    rng = np.random.default_rng(seed)
    twins = {f"{name}{TWIN}": frame[name].gather(rng.permutation(len(frame))) for name in (*NUMBERS, *CATEGORIES)}
    frame = frame.with_columns(**twins)[rng.permutation(len(frame))]
    tenth = len(frame) // 10
    splits = {
        "train": frame[: -2 * tenth],
        "valid": frame[-2 * tenth : -tenth],
        "test": frame[-tenth:],
    }

    def prepared(chosen: list[str], out: Path) -> Path:
        features = [
            ctr.Numeric(name, "log") if name.startswith("I") else ctr.Categorical(name, min_count=2) for name in chosen
        ]
        parts = {split: part.select("label", *chosen) for split, part in splits.items()}
        ctr.prepare(parts, out, labels="label", features=features, log=None)
        return out

    everything = [*NUMBERS, *CATEGORIES, *twins]
    data = Data.of(prepared(everything, folder / "all"), seed, knobs.outrank)
    found: list[dict[str, Any]] = []
    aucs: dict[tuple[str, ...], dict[str, float]] = {}
    for title, ranking in RANKINGS.items():
        if title == "outrank" and knobs.outrank is None:
            continue
        start = time.perf_counter()
        order = ranking(data)
        seconds = time.perf_counter() - start
        for number in knobs.top:
            chosen = [name for name in everything if name in order[:number]]  # sets that are equal are trained once
            key = tuple(chosen)
            if key not in aucs:
                out = prepared(chosen, folder / f"{len(aucs)}")
                _, result = ctr.run(out, {**CONFIG, "training": {"seed": seed, **TRAINING}})
                aucs[key] = {"valid_auc": result["valid_auc"], "test_auc": result["test_auc"]}
            twins_taken = sum(name.endswith(TWIN) for name in chosen)
            row = {"ranking": title, "seed": seed, "top": number, "twins": twins_taken, "seconds": seconds}
            found.append({**row, **aucs[key]})
            print(json.dumps(found[-1]), flush=True)
    return found


def mean_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over seeds; the standard deviation is 0 for one."""
    names = ("twins", "valid_auc", "test_auc")
    sd = statistics.stdev(row["test_auc"] for row in rows) if len(rows) > 1 else 0.0
    return {**{name: statistics.fmean(row[name] for row in rows) for name in names}, "test_auc_sd": sd}


def report(knobs: Knobs, found: list[dict[str, Any]]) -> None:
    """Means over seeds, and, of each ranking, the K that is best on validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    summary = {}
    for title in dict.fromkeys(row["ranking"] for row in found):
        means = [mean_of([row for row in found if (row["ranking"], row["top"]) == (title, k)]) for k in knobs.top]
        best = max(range(len(means)), key=lambda at: means[at]["valid_auc"])
        summary[title] = {"chosen": {"top": knobs.top[best], **means[best]}, "means": dict(zip(knobs.top, means))}
        axes.plot(knobs.top, [one["test_auc"] for one in means], marker="o", label=title)
        print(f"{title:<28} {json.dumps(summary[title]['chosen'])}", file=sys.stderr)
    axes.set(xlabel="number of features", ylabel=f"test AUC, mean of {len(knobs.seeds)} seeds")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    knobs.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(knobs.out / "ranking.png", dpi=120)
    (knobs.out / "ranking.json").write_text(json.dumps({"runs": found, "summary": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
