"""AUC of models on the top K features of several rankings: real columns, and as many that tell nothing.

    python recipes/ranking.py --data criteo --raw DIR --out runs/ranking [--outrank PYTHON] [--record]

Beside each column stands a twin: the same values in another order. Features are ranked on train, then DCN V2 is trained
on the first K of each ranking: of `ctr.rank` in the order of 3MR and by relevance, by mutual information as it is, by
adjusted mutual information (scikit-learn), by permutation importance of a random forest (scikit-learn, by AUC on
validation), by OutRank as it recommends itself (with the python of an environment that has `outrank` and `xxhash<4`),
and at random. "ctr.rank, found" takes no K: all features of which q is below 0.05. "clean" is the model of all real
columns. All see the same codes: ids, and 32 quantile bins of numbers. A seed draws rows, twins, split, weights and what
is random in a ranking. The epoch is chosen by validation AUC, and so is K, once for all seeds. OUT receives
ranking.json, ranking.png, and for each seed a folder with the page of `ctr.rank`.

`criteo`: the first 10,000 rows of Criteo's train.txt, 39 columns. `census_income`: 30,000 rows of Census-Income (KDD)
and its 40 columns, by value. `movielens_1m`: 100,000 ratings, 4 and 5 positive and 3 left out, with user, movie,
gender, age, occupation and zip code. A tenth of the rows each is for validation and test, so an AUC is known to about
.02, .02 and .004: it is the number of twins that tells rankings apart.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.ranking import Source
from ctrlib.training.allocator import keep_freed_memory
from records import record

NUMBERS = [f"I{number}" for number in range(1, 14)]
CENSUS = (
    *("age", "class_of_worker", "industry", "occupation", "education", "wage_per_hour", "enrolled", "marital_status"),
    *("major_industry", "major_occupation", "race", "hispanic_origin", "sex", "union_member", "unemployment_reason"),
    *("employment_status", "capital_gains", "capital_losses", "dividends", "tax_filer", "previous_region"),
    *("previous_state", "household_family", "household_summary", "instance_weight", "migration_msa"),
    *("migration_region", "migration_within_region", "same_house", "migration_sunbelt", "num_employees"),
    *("family_under_18", "birth_father", "birth_mother", "birth_self", "citizenship", "own_business"),
    *("veteran_questionnaire", "veteran_benefits", "weeks_worked", "year", "label"),
)
TWIN = "_twin"
CLEAN = "clean"
FOUND = "ctr.rank, found"
CONFIG = {"model": "dcnv2", "embedding_dim": 8, "hidden": (64, 64), "dropout": 0.3, "num_cross_layers": 2}


def criteo(raw: Path) -> pl.DataFrame:
    """Its rows, numbers as numbers."""
    path = raw / "train.txt"
    names = ["label", *NUMBERS, *(f"C{number}" for number in range(1, 27))]
    return pl.read_csv(
        path if path.exists() else path.with_name("train.txt.gz"),
        separator="\t",
        has_header=False,
        new_columns=names,
        n_rows=10_000,
        schema_overrides={name: pl.String for name in names if name.startswith("C")},
    )


def census_income(raw: Path) -> pl.DataFrame:
    """The file for training."""
    text = gzip.decompress((raw / "census-income.data.gz").read_bytes()).decode("ascii").replace(", ", ",")
    frame = pl.read_csv(io.StringIO(text), has_header=False, new_columns=list(CENSUS), infer_schema=False)
    label = (pl.col("label") == "50000+.").cast(pl.Int8)
    return frame.drop("instance_weight").with_columns(label=label)


def movielens_1m(raw: Path) -> pl.DataFrame:
    """Ratings other than 3, with what is known of the user."""

    def read(name: str, columns: list[str]) -> pl.DataFrame:
        path = raw / name
        content = path.read_bytes() if path.exists() else gzip.decompress((raw / f"{name}.gz").read_bytes())
        lines = pl.Series("line", content.decode("iso-8859-1").splitlines())
        return lines.str.split_exact("::", len(columns) - 1).struct.rename_fields(columns).struct.unnest()

    ratings = read("ratings.dat", ["user", "movie", "rating", "time"]).filter(pl.col("rating") != "3")
    users = read("users.dat", ["user", "gender", "age", "occupation", "zip"])
    rows = ratings.join(users, on="user", how="left", maintain_order="left")
    return rows.with_columns(label=pl.col("rating").is_in(["4", "5"]).cast(pl.Int8)).drop("rating", "time")


@dataclass(frozen=True)
class Protocol:
    """What is done with a data set: how many of its rows, drawn anew by each seed, which K, and how it is trained."""

    read: Callable[[Path], pl.DataFrame]
    rows: int
    top: tuple[int, ...]
    min_count: int
    training: dict[str, Any]


PROTOCOLS = {
    "criteo": Protocol(criteo, 10_000, (6, 12, 24, 39), 2, {"batch_size": 256, "embedding_l2": 1e-4}),
    "census_income": Protocol(
        census_income, 30_000, (6, 12, 24, 40), 3, {"batch_size": 1024, "embedding_l2": 1e-5, "learning_rate": 2e-3}
    ),
    "movielens_1m": Protocol(movielens_1m, 100_000, (1, 2, 3, 4, 6), 1, {"batch_size": 1024, "embedding_l2": 1e-4}),
}

Codes = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Knobs:
    """Train a model on the top K of each ranking, and draw AUC against K."""

    data: Literal[tuple(PROTOCOLS)]  # type: ignore[valid-type]
    """Which data set."""
    raw: Path
    """Folder that holds train.txt, census-income.data.gz, or ratings.dat and users.dat; .dat and .txt may be packed
    (.gz)."""
    out: Path
    """For ranking.json and ranking.png."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Each of rows, twins, split and weights."""
    top: tuple[int, ...] = ()
    """Numbers of features to train with; those of the data set by default."""
    outrank: Path | None = None
    """Python of an environment with outrank; otherwise that ranking is left out."""
    record: bool = False
    """Append a row for each ranking and seed to results.csv."""


@dataclass(frozen=True)
class Data:
    """What a ranking may look at: a prepared folder, codes of its train and valid splits, and their labels; and a
    folder for the page of it.
    """

    folder: Path
    page: Path
    title: str
    seed: int
    train: Codes
    valid: Codes
    outrank: Path | None

    @classmethod
    def of(cls, folder: Path, page: Path, title: str, seed: int, outrank: Path | None) -> Data:
        """Read the codes."""
        return cls(folder, page, title, seed, codes_of(folder, "train"), codes_of(folder, "valid"), outrank)

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
    ranking = ctr.rank(data.folder)
    dataclasses.replace(ranking, data=data.title).save(data.page)
    order: list[str] = ranking["label"].orders["3mr"]
    return order


def relevance(data: Data) -> list[str]:
    """Mutual information beyond chance."""
    order: list[str] = ctr.rank(data.folder, pairs=False)["label"].orders["relevance"]
    return order


def found(data: Data) -> list[str]:
    """Those of which q is below 0.05."""
    scores = ctr.rank(data.folder, pairs=False)["label"].scores
    return [score.feature for score in scores if score.q < 0.05]


def information(data: Data) -> list[str]:
    """Mutual information as it is."""
    scores = ctr.rank(data.folder, pairs=False)["label"].scores
    return ordered({score.feature: score.information for score in scores})


def adjusted(data: Data) -> list[str]:
    """Adjusted mutual information of scikit-learn."""
    from sklearn.metrics import adjusted_mutual_info_score

    label = data.train["label"]
    return ordered({name: adjusted_mutual_info_score(data.train[name], label) for name in data.names})


def forest(data: Data) -> list[str]:
    """What a forest's AUC on validation loses when a column is permuted.

    Of many rows, each of its trees sees 20,000, and its AUC is that of 5,000.
    """
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.inspection import permutation_importance

    names = data.names
    train, valid = (np.stack([codes[name] for name in names], axis=1) for codes in (data.train, data.valid))
    rows = min(20_000, len(train))
    model = RandomForestClassifier(100, min_samples_leaf=5, max_samples=rows, random_state=data.seed)
    model.fit(train, data.train["label"])
    lost = permutation_importance(
        model, valid[:5_000], data.valid["label"][:5_000], scoring="roc_auc", n_repeats=3, random_state=data.seed
    )
    return ordered(dict(zip(names, lost["importances_mean"])))


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


def clean(data: Data) -> list[str]:
    """All that are real."""
    return [name for name in data.names if not name.endswith(TWIN)]


def drawn(data: Data) -> list[str]:
    """At random."""
    names: list[str] = np.random.default_rng(data.seed).permutation(data.names).tolist()
    return names


RANKINGS: dict[str, Callable[[Data], list[str]]] = {
    "ctr.rank, 3MR": three_mr,
    "ctr.rank, relevance": relevance,
    FOUND: found,
    "mutual information": information,
    "adjusted mutual information": adjusted,
    "permutation importance": forest,
    "outrank": outrank,
    "random": drawn,
    CLEAN: clean,
}


def main(knobs: Knobs) -> None:
    """Rank, train, report."""
    keep_freed_memory()
    protocol = PROTOCOLS[knobs.data]
    protocol = dataclasses.replace(protocol, top=knobs.top or protocol.top)
    frame = protocol.read(knobs.raw)
    rows: list[dict[str, Any]] = []
    for seed in knobs.seeds:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_seed(knobs, protocol, frame, seed, Path(folder))
    report(knobs, protocol, rows)


def run_seed(knobs: Knobs, protocol: Protocol, frame: pl.DataFrame, seed: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each ranking and K."""
    rng = np.random.default_rng(seed)
    frame = frame[rng.permutation(len(frame))[: protocol.rows]]
    real = [name for name in frame.columns if name != "label"]
    twins = {f"{name}{TWIN}": frame[name].gather(rng.permutation(len(frame))) for name in real}
    frame = frame.with_columns(**twins)
    tenth = len(frame) // 10
    splits = {"train": frame[: -2 * tenth], "valid": frame[-2 * tenth : -tenth], "test": frame[-tenth:]}

    def prepared(chosen: list[str], out: Path) -> Path:
        features = [
            ctr.Numeric(name, "log")
            if frame.schema[name].is_numeric()
            else ctr.Categorical(name, min_count=protocol.min_count)
            for name in chosen
        ]
        parts = {split: part.select("label", *chosen) for split, part in splits.items()}
        ctr.prepare(parts, out, labels="label", features=features, log=None)
        return out

    everything = [*real, *twins]
    title = f"{knobs.data} with twins, seed {seed}"
    data = Data.of(prepared(everything, folder / "all"), knobs.out / f"seed{seed}", title, seed, knobs.outrank)
    rows: list[dict[str, Any]] = []
    trained: dict[tuple[str, ...], dict[str, Any]] = {}
    for title, ranking in RANKINGS.items():
        if title == "outrank" and knobs.outrank is None:
            continue
        start = time.perf_counter()
        order = ranking(data)
        seconds = time.perf_counter() - start
        below = num_below_twin(order)
        for number in [len(order)] if title in (CLEAN, FOUND) else protocol.top:
            chosen = [name for name in everything if name in order[:number]]  # sets that are equal are trained once
            key = tuple(chosen)
            if key not in trained:
                out = prepared(chosen, folder / f"{len(trained)}")
                training = {"seed": seed, "max_epochs": 20, **protocol.training}
                _, trained[key] = ctr.run(out, {**CONFIG, "training": training})
            row = {"ranking": title, "seed": seed, "top": number, "twins": num_twins(chosen), "seconds": seconds}
            measured = {name: trained[key][name] for name in ("valid_auc", "test_auc", "test_logloss")}
            rows.append({**row, "below_twin": below, **measured})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def num_twins(names: list[str]) -> int:
    """How many of the features tell nothing."""
    return sum(name.endswith(TWIN) for name in names)


def num_below_twin(order: list[str]) -> int:
    """How many real columns have their twin before them."""
    place = {name: at for at, name in enumerate(order)}
    twins = [name for name in order if name.endswith(TWIN)]
    return sum(place.get(twin.removesuffix(TWIN), len(order)) > place[twin] for twin in twins)


def mean_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over seeds; the standard deviation is 0 for one."""
    names = ("top", "twins", "below_twin", "valid_auc", "test_auc")
    sd = statistics.stdev(row["test_auc"] for row in rows) if len(rows) > 1 else 0.0
    return {**{name: statistics.fmean(row[name] for row in rows) for name in names}, "test_auc_sd": sd}


def report(knobs: Knobs, protocol: Protocol, measured: list[dict[str, Any]]) -> None:
    """Means over seeds, and, of each ranking, the K that is best on validation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    summary = {}
    reference = {row["seed"]: row["test_auc"] for row in measured if row["ranking"] == CLEAN}
    for title in dict.fromkeys(row["ranking"] for row in measured):
        own = [row for row in measured if row["ranking"] == title]
        # What takes no K has a number of features for each seed.
        numbers = [0] if title in (CLEAN, FOUND) else list(protocol.top)
        means = {k: mean_of([row for row in own if k in (0, row["top"])]) for k in numbers}
        best = max(means, key=lambda k: means[k]["valid_auc"])
        summary[title] = {"chosen": means[best], "means": means}
        if title in (CLEAN, FOUND):
            axes.axhline(means[best]["test_auc"], label=title, color="gray", linestyle="--" if title == CLEAN else ":")
        else:
            axes.plot(list(means), [one["test_auc"] for one in means.values()], marker="o", label=title)
        print(f"{title:<28} {json.dumps(summary[title]['chosen'])}", file=sys.stderr)
        for seed in knobs.seeds if knobs.record else ():
            rows = {row["top"]: row for row in own if row["seed"] == seed}
            most = rows[max(rows)]
            chosen = rows[best] if best else most
            scores = {
                "top": chosen["top"],
                "test_auc": chosen["test_auc"],
                "test_auc_above_clean": chosen["test_auc"] - reference[seed],
                "twins": chosen["twins"],
                "twins_of_as_many_as_real": most["twins"],
                "ranking_seconds": chosen["seconds"],
                "below_twin": chosen["below_twin"],
            }
            data, path = f"{knobs.data} with twins", Path(__file__).parent / "results.csv"
            record({"seed": seed, "engine": "exact"}, path, data=data, model=title, task="ranking", scores=scores)
    axes.set(xlabel="number of features", ylabel=f"test AUC, mean of {len(knobs.seeds)} seeds")
    axes.set_title(f"{knobs.data}: {max(protocol.top)} columns and as many twins that tell nothing")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    knobs.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(knobs.out / "ranking.png", dpi=120)
    (knobs.out / "ranking.json").write_text(json.dumps({"runs": measured, "summary": summary}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
