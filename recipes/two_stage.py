"""Two stages on MovieLens-1M: retrieve candidates, rank them by a CTR model, and measure the chain against each alone.

    python recipes/two_stage.py --raw DIR [--candidates 100] [--model dcnv2] [--seed 1]

DIR holds ratings.dat (or .gz), users.dat and movies.dat. Liked (rated 4 or 5) pairs are cut at random, 7 in 10 for the
first stage, and the rest to find. iALS learns from the first part and lists candidates for every user. A CTR model
learns to tell, in the lists of nine tenths of the users, what is to be found from what is not: the missed are added,
and negatives are drawn from the list and from all items. Its features come from both sides, with the first stage's
score and rank among them, and it does not know users by their id, since the users that it is tested on are the last
tenth, of whom it has seen nothing.

Printed are recall and NDCG at 20 for these users: of the first stage's order, of the CTR model's order of the same
candidates, of a CTR model without the first stage's score and rank over all items, and the share of what is to be found
that is among the candidates at all, which no order can exceed.
"""

from __future__ import annotations

import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.retrieval.baselines import IALS
from ctrlib.retrieval.evaluate import evaluate_lists
from ctrlib.retrieval.interactions import Aligned, Interactions, Log
from ctrlib.retrieval.recommend import recommend
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.loop import to_json

FIRST_STAGE = ("score", "rank")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Knobs:
    """Retrieve, rank, and measure both."""

    raw: Path
    """Folder with ratings.dat, users.dat and movies.dat."""
    candidates: int = 100
    """Items of each user that the first stage hands on."""
    negatives: int = 20
    """Items that each user's row in the training of the second stage has of the list, and as many of all items."""
    model: str = "dcnv2"
    """The CTR model."""
    epochs: int = 10
    """Of the CTR model, at most."""
    alone_users: int = 100
    """Test users for whom the CTR model alone orders all items."""
    seed: int = 1
    """Of all draws."""


def read(raw: Path) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Liked pairs, users and items, with their features."""

    def table(name: str, columns: list[str]) -> pl.DataFrame:
        path = raw / name
        content = path.read_bytes() if path.exists() else gzip.decompress((raw / f"{name}.gz").read_bytes())
        lines = content.decode("latin-1").splitlines()
        return pl.DataFrame([line.split("::") for line in lines], schema=columns, orient="row")

    ratings = table("ratings.dat", ["user", "item", "rating", "time"])
    users = table("users.dat", ["user", "gender", "age", "occupation", "zip"]).drop("zip")
    items = table("movies.dat", ["item", "title", "genres"])
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").alias("year")
    liked = ratings.filter(pl.col("rating").is_in(["4", "5"])).select("user", "item")
    items = items.select("item", "genres", year)
    return (
        liked.cast(pl.Int64),
        users.with_columns(pl.col("user").cast(pl.Int64)),
        items.with_columns(pl.col("item").cast(pl.Int64)),
    )


@dataclass(frozen=True)
class Stage:
    """The first stage: its log, what is to be found, and the lists of all users."""

    log: Interactions
    test: Aligned
    lists: Ints  # (U, candidates), -1 where there is none
    scores: npt.NDArray[np.float32]

    def rows(self, users: Ints, items: Ints) -> pl.DataFrame:
        """Pairs of numbers with score, rank, and whether the item is to be found."""
        place = {(int(u), int(i)): at for u in np.unique(users) for at, i in enumerate(self.lists[u])}
        found = [place.get((int(u), int(i)), -1) for u, i in zip(users, items)]
        at = np.array(found)
        width = self.lists.shape[1]
        return pl.DataFrame(
            {
                "user": self.log.users.gather(users),
                "item": self.log.items.gather(items),
                # What the list does not hold has the rank behind it, and a score no better than its last.
                "score": np.where(at >= 0, self.scores[users, at], self.scores[users, -1]),
                "rank": np.where(at >= 0, at, width),
                "popularity": np.bincount(self.log.matrix.indices, minlength=self.log.num_items)[items],
                "activity": np.diff(self.log.matrix.indptr)[users],
                "label": np.asarray(self.test.matrix[users, items]).ravel().astype(np.int64),
            }
        )


def first_stage(pairs: pl.DataFrame, knobs: Knobs) -> Stage:
    """Fit iALS on a part of the pairs, and list candidates."""
    first = np.random.default_rng(knobs.seed).random(len(pairs)) < 0.7
    some, rest = (pairs.filter(pl.Series(part)) for part in (first, ~first))
    log = Interactions.of(Log.of(some["user"], some["item"]))
    test = log.aligned(Log.of(rest["user"], rest["item"]))
    method = IALS(embedding_dim=64, alpha=0.3, l2=0.01, epochs=8).fit(log, seed=knobs.seed)
    blocks = list(recommend(method, log, knobs.candidates))
    lists = np.concatenate([items.numpy() for _, items, _ in blocks])
    scores = np.concatenate([scores.numpy() for *_, scores in blocks])
    return Stage(log, test, lists, scores)


def training_rows(stage: Stage, users: Ints, knobs: Knobs) -> pl.DataFrame:
    """What is to be found, in the list or not, and negatives of the list and of all items."""
    random = np.random.default_rng(knobs.seed)
    chosen: list[tuple[int, int]] = []
    for user in users:
        positive = stage.test.matrix[user].indices
        known = set(stage.log.matrix[user].indices.tolist()) | set(positive.tolist())
        listed = [int(item) for item in stage.lists[user] if item >= 0 and item not in known]
        drawn = [int(item) for item in random.integers(0, stage.log.num_items, knobs.negatives) if item not in known]
        some = random.permutation(listed)[: knobs.negatives].tolist()
        chosen += [(int(user), int(item)) for item in (*positive, *dict.fromkeys([*some, *drawn]))]
    pairs = np.array(chosen)
    return stage.rows(pairs[:, 0], pairs[:, 1])


def fit_ranker(
    rows: dict[str, pl.DataFrame], folder: Path, sides: tuple[pl.DataFrame, pl.DataFrame], knobs: Knobs, ignore: Any
) -> ctr.Predictor:
    """Prepare rows and train the CTR model on them."""
    joined = {name: with_sides(some, sides) for name, some in rows.items()}
    features = [
        ctr.Categorical("item"),
        ctr.MultiValued("genres", separator="|"),
        *(ctr.Categorical(name) for name in ("gender", "age", "occupation", "year")),
        *(ctr.Numeric(name, transform="log") for name in ("popularity", "activity")),
        *(ctr.Numeric(name) for name in FIRST_STAGE if name not in ignore),
    ]
    data, out = folder / "data", folder / "model"
    ctr.prepare(joined, data, features=features, labels="label", group="user", ignore=["user", *ignore], log=None)
    config: dict[str, Any] = {
        "model": knobs.model,
        "embedding_dim": 16,
        "training": {"batch_size": 4096, "max_epochs": knobs.epochs, "seed": knobs.seed},
    }
    model, _ = ctr.run(data, config)
    ctr.save_model(model, config, data, out)
    return ctr.Predictor.load(out)


def with_sides(rows: pl.DataFrame, sides: tuple[pl.DataFrame, pl.DataFrame]) -> pl.DataFrame:
    """Rows with the features of user and item."""
    return rows.join(sides[0], on="user", how="left", maintain_order="left").join(
        sides[1], on="item", how="left", maintain_order="left"
    )


def reordered(stage: Stage, ranker: ctr.Predictor, users: Ints, lists: Ints, sides: Any, top: int = 20) -> Ints:
    """The lists (B, n) of some users in the order of the ranker, the best of it."""
    there = lists >= 0
    rows = stage.rows(np.repeat(users, there.sum(axis=1)), lists[there])
    scores = np.full(lists.shape, -np.inf)
    scores[there] = ranker.predict(with_sides(rows.drop("label"), sides))[0]["label"].to_numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(lists, order, axis=1)


def main(knobs: Knobs) -> None:
    """Both stages, and what each is worth."""
    keep_freed_memory()
    pairs, users, items = read(knobs.raw)
    sides = (users, items)
    stage = first_stage(pairs, knobs)
    order = np.random.default_rng(knobs.seed).permutation(np.flatnonzero(np.diff(stage.test.matrix.indptr)))
    test, valid, train = np.split(order, [len(order) // 10, len(order) // 5])
    parts = {"train": train, "valid": valid, "test": test}
    rows = {name: training_rows(stage, some, knobs) for name, some in parts.items()}
    found: dict[str, dict[str, float]] = {}

    def measure(name: str, some: Ints, lists: Ints, k: int = 20) -> None:
        of_these = np.zeros(stage.log.num_users, bool)
        of_these[some] = True
        kept = stage.test.matrix.multiply(of_these[:, None]).tocsr()
        kept.eliminate_zeros()
        judge = Aligned(kept, stage.test.unknown_items * of_these, {})
        metrics = evaluate_lists(lists, judge, users=some, ks=(k,))
        found[name] = {metric: metrics[f"{metric}@{k}"] for metric in ("recall", "ndcg")}

    with tempfile.TemporaryDirectory() as folder:
        both = fit_ranker(rows, Path(folder) / "both", sides, knobs, ())
        alone = fit_ranker(rows, Path(folder) / "alone", sides, knobs, FIRST_STAGE)
        lists = stage.lists[test]
        measure("first stage alone", test, lists)
        measure("both stages", test, reordered(stage, both, test, lists, sides))
        measure(f"all {knobs.candidates} candidates", test, lists, knobs.candidates)
        few = test[: knobs.alone_users]
        every = np.tile(np.arange(stage.log.num_items), (len(few), 1))
        every[stage.log.matrix[few].toarray() > 0] = -1
        measure(f"first stage alone, {len(few)} users", few, stage.lists[few])
        measure(f"both stages, {len(few)} users", few, reordered(stage, both, few, stage.lists[few], sides))
        measure(f"second stage alone, {len(few)} users", few, reordered(stage, alone, few, every, sides))
    for name, metrics in found.items():
        print(to_json({"lists": name, **metrics}))


if __name__ == "__main__":
    main(tyro.cli(Knobs))
