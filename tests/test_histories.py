"""The data-set scripts that make behaviour histories: nothing of the present or the future gets into a row."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib.data.download import DownloadError


def load(name: str) -> ModuleType:
    path = Path(__file__).parent.parent / "datasets" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"datasets_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


grocery, movielens = load("amazon_grocery"), load("movielens_1m")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------------------------------------------- amazon grocery

NUM_ITEMS = 30


def purchases(seed: int = 0, num_users: int = 12) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Few days, so that most events share theirs with another one of the user; per user, later events are held out."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, str]] = []
    for user in range(100, 100 + num_users):
        items = rng.choice(np.arange(1, NUM_ITEMS + 1), size=rng.integers(5, 20), replace=False)
        days = np.sort(rng.integers(1, 7, size=len(items))) * 86_400
        splits = ["train"] * (len(items) - 2) + ["valid", "test"]
        rows += [(user, int(item), int(day), split) for item, day, split in zip(items, days, splits)]
    events = pl.DataFrame(rows, schema=["user", "item", "time", "split"], orient="row")
    categories = rng.integers(0, 4, size=NUM_ITEMS)
    return events, pl.DataFrame({"item": range(1, NUM_ITEMS + 1), "category": categories})


@pytest.mark.parametrize(("max_length", "min_history"), [(50, 1), (4, 0), (3, 5)])
def test_grocery_rows_are_what_the_protocol_says(max_length: int, min_history: int) -> None:
    events, items = purchases()
    category = dict(items.iter_rows())
    rows = grocery.make_rows(events, items, max_length=max_length, min_history=min_history)
    assert list(rows) == ["train", "valid", "test"]

    expected: list[Any] = []
    for user, item, time, split in events.iter_rows():
        earlier = sorted((t, i) for u, i, t, _ in events.iter_rows() if u == user and t < time)
        if len(earlier) >= min_history:
            history = [i for _, i in earlier][-max_length:]
            expected.append((split, user, item, category[item], history, [category[i] for i in history]))
    found = [
        (split, *row[:-1])
        for split, frame in rows.items()
        for row in frame.filter(pl.col("label") == 1).iter_rows()
    ]  # fmt: skip
    assert sorted(found) == sorted(expected)
    if min_history == 0:
        assert len(found) == len(events)

    touched = {user: set(events.filter(pl.col("user") == user)["item"]) for user in events["user"].unique()}
    for frame in rows.values():
        positive, negative = frame.gather_every(2), frame.gather_every(2, offset=1)
        assert positive["label"].to_list() == [1] * len(positive)
        assert negative["label"].to_list() == [0] * len(positive)
        pair = ["user", "item_history", "category_history"]
        assert positive.select(pair).equals(negative.select(pair))
        for user, item, item_category in negative.select("user", "item", "category").iter_rows():
            assert item not in touched[user] and category[item] == item_category


def test_grocery_rows_are_ordered_by_time() -> None:
    events, items = purchases(seed=1)
    time = {(user, item): time for user, item, time, _ in events.iter_rows()}
    for frame in grocery.make_rows(events, items, min_history=0).values():
        times = [time[row] for row in frame.filter(pl.col("label") == 1).select("user", "item").iter_rows()]
        assert times == sorted(times)


def test_grocery_events_of_one_day_do_not_see_each_other() -> None:
    events = pl.DataFrame(
        [(1, 5, 10, "train"), (1, 9, 20, "train"), (1, 2, 20, "valid"), (1, 7, 20, "test"), (1, 4, 21, "test")],
        schema=["user", "item", "time", "split"],
        orient="row",
    )
    items = pl.DataFrame({"item": range(1, 10), "category": [0] * 9})
    rows = grocery.make_rows(events, items)
    histories = {split: frame["item_history"].to_list()[::2] for split, frame in rows.items()}
    assert histories == {"train": [[5]], "valid": [[5]], "test": [[5], [5, 2, 7, 9]]}


def split_mix(number: int, seed: int) -> int:
    """SplitMix64's output function (S. Vigna, public domain), in Python's integers."""
    mask = 2**64 - 1
    z = ((number + seed * 0xD1342543DE82EF95 + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 7])
def test_grocery_negatives_are_the_hash_of_the_event_among_the_items_left(seed: int) -> None:
    events, items = purchases(seed=2)
    found = grocery.negatives(events, items["item"], seed=seed).to_list()
    for (user, item, time, _), negative in zip(events.iter_rows(), found):
        left = sorted(set(items["item"]) - set(events.filter(pl.col("user") == user)["item"]))
        key = split_mix(split_mix(split_mix(user, seed) ^ item, seed) ^ time, seed)
        assert negative == left[key % len(left)]


def test_grocery_negatives_are_uniform() -> None:
    events = pl.DataFrame({"user": [1] * 6000, "item": [2, 3] * 3000, "time": range(6000), "split": "train"})
    counts = Counter(grocery.negatives(events, pl.Series([5, 4, 3, 2, 1]), seed=0))
    assert set(counts) == {1, 4, 5}
    # Standard deviation of each: sqrt(6000 / 3 * 2 / 3) = 37.
    assert max(abs(count - 2000) for count in counts.values()) < 4 * 37


def test_grocery_negatives_of_a_user_know_nothing_of_others() -> None:
    events, items = purchases(seed=3)
    alone = events.filter(pl.col("user") == 104)
    together = grocery.negatives(events, items["item"], seed=0).filter(events["user"] == 104)
    assert together.equals(grocery.negatives(alone, items["item"], seed=0))


def test_grocery_seed_changes_negatives_only() -> None:
    events, items = purchases(seed=4)
    a, b = (grocery.make_rows(events, items, seed=seed)["train"] for seed in (0, 1))
    assert a.filter(pl.col("label") == 1).equals(b.filter(pl.col("label") == 1))
    assert (a["item"] != b["item"]).mean() > 0.4


def write_grocery(folder: Path, *, shuffled: bool) -> Path:
    """The four files: gzip and commas, or as published: tabs, more columns, and here in another order.

    There are many more items than events, so that some of valid and test are in no row of train.
    """
    events, items = purchases(seed=5)
    items = pl.concat([items, pl.DataFrame({"item": range(NUM_ITEMS + 1, 301), "category": [4] * (300 - NUM_ITEMS)})])
    folder.mkdir()
    if shuffled:
        events, items = events.sample(fraction=1, shuffle=True, seed=1), items.sample(fraction=1, shuffle=True, seed=2)
    tables = {
        name: events.filter(pl.col("split") == split).select(user_id="user", item_id="item", time="time")
        for split, name in grocery.FILES.items()
    }
    tables["item_meta"] = items.select(item_id="item", i_category="category", r_substitute=pl.lit("[1, 2]"))
    for name, table in tables.items():
        if shuffled:
            negatives = {"neg_items": pl.lit("[3, 4, 5]")} if name in ("dev", "test") else {}
            table.with_columns(**negatives).write_csv(folder / f"{name}.csv", separator="\t")
        else:
            text = table.write_csv(line_terminator="\r\n")
            (folder / f"{name}.csv.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_grocery_folder_is_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    folders = []
    for name, shuffled in (("a", False), ("b", False), ("c", True)):
        raw = write_grocery(tmp_path / f"raw_{name}", shuffled=shuffled)
        grocery.main(grocery.Arguments(out=tmp_path / name, raw=raw))
        folders.append(content(tmp_path / name))
    assert folders[0] == folders[1] == folders[2]

    schema = ctr.Schema.load(tmp_path / "a")
    assert [feature.name for feature in schema.features] == ["item", "category", "item_history", "category_history"]
    assert {name: len(features) for name, features in schema.vocabularies.items()} == {"item": 2, "category": 2}
    assert schema.group == "user"
    # Category 0 is a value like others: a history of nulls would be shorter than that of items.
    for split in grocery.FILES:
        frame = pl.read_parquet(tmp_path / "a" / split)
        assert frame["item_history"].list.len().equals(frame["category_history"].list.len())
        assert (frame["item_history"].list.len() >= 1).all()

    grocery.main(grocery.Arguments(out=tmp_path / "d", raw=tmp_path / "raw_a", user_feature=True))
    assert ctr.Schema.load(tmp_path / "d").features[0] == ctr.Categorical("user", num_embeddings=12 + 3)


def test_grocery_vocabulary_is_of_train_only(tmp_path: Path) -> None:
    raw = write_grocery(tmp_path / "raw", shuffled=False)
    events, items = grocery.read(raw)
    grocery.main(grocery.Arguments(out=tmp_path / "d", raw=raw))
    rows = grocery.make_rows(events, items)
    seen = {str(item) for item in [*rows["train"]["item"], *rows["train"]["item_history"].explode()]}
    vocabulary = pl.read_parquet(tmp_path / "d" / "vocab" / "item.parquet")
    assert set(vocabulary["value"]) == seen
    ids = dict(vocabulary.select("value", "id").iter_rows())
    encoded = [ids.get(str(item), 2) for item in rows["test"]["item"]]
    assert 2 in encoded and pl.read_parquet(tmp_path / "d" / "test")["item"].to_list() == encoded


def test_grocery_refuses_what_it_cannot_sample(tmp_path: Path) -> None:
    events = pl.DataFrame({"user": [8, 8], "item": [1, 2], "time": [1, 2], "split": "train"})
    with pytest.raises(ValueError, match="user 8 has all 2 items"):
        grocery.negatives(events, pl.Series([1, 2]), seed=0)
    raw = write_grocery(tmp_path / "raw", shuffled=True)
    (raw / "item_meta.csv").write_text("item_id\ti_category\n1\t0\n")
    with pytest.raises(ValueError, match=r"items \[2, 3, 4, 5, 6\] have events but are not in item_meta"):
        grocery.read(raw)


def test_grocery_download_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, *, checksum: str | None, folder: Path) -> Path:
        path = folder / url.rsplit("/", 1)[-1]
        path.write_bytes(b"hello\n")
        return path

    monkeypatch.setattr(grocery, "download", download)
    with pytest.raises(DownloadError, match=r"train\.csv is git blob ce01362"):
        grocery.fetch(tmp_path)
    # `git hash-object` says so of these six bytes.
    hello = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert hashlib.sha1(b"blob 6\0hello\n").hexdigest() == hello
    monkeypatch.setattr(grocery, "BLOBS", dict.fromkeys(grocery.BLOBS, hello))
    assert grocery.fetch(tmp_path) == tmp_path


@pytest.mark.parametrize(("max_length", "min_history"), [(50, 1), (2, 3)])
def test_grocery_baskets_are_what_the_protocol_says(max_length: int, min_history: int) -> None:
    events, items = purchases(seed=6)
    rows = grocery.make_basket_rows(events, items, max_length=max_length, min_history=min_history)
    size = Counter((user, time) for user, _, time, _ in events.iter_rows())
    expected: dict[str, list[Any]] = {"train": [], "valid": [], "test": []}
    for user, item, time, _ in events.iter_rows():
        days = sorted({t for u, _, t, _ in events.iter_rows() if u == user}, reverse=True)
        earlier = sorted((t, i) for u, i, t, _ in events.iter_rows() if u == user and t < time)
        if len(earlier) >= min_history:
            in_basket = [i for t, i in earlier if size[user, t] > 1][-max_length:]
            alone = [i for t, i in earlier if size[user, t] == 1][-max_length:]
            row = (user, item, in_basket, alone, 1, int(size[user, time] > 1))
            expected[["test", "valid", "train"][min(days.index(time), 2)]].append(row)
    columns = ["user", "item", "basket_history", "single_history", "reviewed", "basket"]
    for split, frame in rows.items():
        positive, negative = frame.gather_every(2), frame.gather_every(2, offset=1)
        assert sorted(positive.select(columns).iter_rows()) == sorted(expected[split])
        assert positive.select(columns[2:4]).equals(negative.select(columns[2:4]))
        assert set(negative["reviewed"]) == {0} and set(negative["basket"]) == {None}


def test_grocery_baskets_keep_their_rows_whichever_label_is_asked_for(tmp_path: Path) -> None:
    raw = write_grocery(tmp_path / "raw", shuffled=False)
    for label in ("both", "basket"):
        grocery.main(grocery.Arguments(out=tmp_path / label, raw=raw, protocol="baskets", label=label))
    both, alone = (ctr.Schema.load(tmp_path / label) for label in ("both", "basket"))
    assert both.labels == ("reviewed", "basket") and alone.labels == ("basket",)
    assert [feature.name for feature in both.vocabularies["item"]] == ["item", "basket_history", "single_history"]
    for split in grocery.FILES:
        frames = [pl.read_parquet(tmp_path / label / split) for label in ("both", "basket")]
        assert frames[0].drop("reviewed").equals(frames[1])
        assert frames[0]["basket"].is_nan().equals(frames[0]["reviewed"] == 0)
    with pytest.raises(ValueError, match="label 'basket' is one of the protocol 'baskets', got 'leave_one_out'"):
        grocery.main(grocery.Arguments(out=tmp_path / "d", raw=raw, label="basket"))


# ------------------------------------------------------------------------------------------------- movielens histories


def ratings(seed: int = 0, num_users: int = 15) -> pl.DataFrame:
    """As `read` gives them: users and movies are text, several ratings share a second."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str, int, int]] = []
    for user in range(1, num_users + 1):
        start = int(rng.integers(1000))
        movies = rng.choice(np.arange(1, 60), size=rng.integers(3, 40), replace=False)
        rows += [(str(user), str(movie), int(rng.integers(1, 6)), start + int(rng.integers(8))) for movie in movies]
    frame = pl.DataFrame(rows, schema=["user", "movie", "rating", "time"], orient="row")
    return frame.with_columns(label=(pl.col("rating") > 3).cast(pl.Int8))


@pytest.mark.parametrize("max_length", [50, 3])
def test_movielens_histories_are_the_movies_liked_before(max_length: int) -> None:
    rows = ratings()
    found = movielens.with_histories(rows, max_length=max_length)
    assert found["time"].is_sorted()
    expected = []
    for user, movie, rating, time, label in rows.iter_rows():
        liked = sorted((t, int(m)) for u, m, r, t, _ in rows.iter_rows() if u == user and t < time and r > 3)
        if rating != 3:
            expected.append((int(user), int(movie), time, label, [m for _, m in liked][-max_length:]))
    columns = ["user", "movie", "time", "label", "movie_history"]
    assert sorted(found.select(columns).iter_rows()) == sorted(expected)
    shuffled = rows.sample(fraction=1, shuffle=True, seed=1)
    assert movielens.with_histories(shuffled, max_length=max_length).equals(found)


def write_movielens(folder: Path, *, shuffled: bool) -> Path:
    rows = ratings(seed=6)
    folder.mkdir()
    if shuffled:
        rows = rows.sample(fraction=1, shuffle=True, seed=3)
    lines = [f"{user}::{movie}::{rating}::{time}" for user, movie, rating, time, _ in rows.iter_rows()]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n")
    users = [f"{user}::{'FM'[user % 2]}::{18 + user % 3}::{user % 4}::0{user}" for user in range(1, 16)]
    (folder / "users.dat").write_text("\n".join(users) + "\n")
    movies = [f"{movie}::Title (19{40 + movie})::{'Drama|Comedy' if movie % 2 else 'War'}" for movie in range(1, 60)]
    (folder / "movies.dat").write_text("\n".join(movies) + "\n")
    return folder


def test_movielens_histories_folder(tmp_path: Path) -> None:
    folders = []
    for name, shuffled in (("a", False), ("b", False), ("c", True)):
        raw = write_movielens(tmp_path / f"raw_{name}", shuffled=shuffled)
        movielens.main(movielens.Arguments(out=tmp_path / name, raw=raw, protocol="histories"))
        folders.append(content(tmp_path / name))
    assert folders[0] == folders[1] == folders[2]

    schema = ctr.Schema.load(tmp_path / "a")
    names = ["movie", "genres", "gender", "age", "occupation", "movie_history"]
    assert [feature.name for feature in schema.features] == names
    assert [feature.name for feature in schema.vocabularies["movie"]] == ["movie", "movie_history"]

    # The folder holds no times; its rows are those of `with_histories` in order, cut where the time changes.
    rows = movielens.with_histories(movielens.read(tmp_path / "raw_a"))
    splits = {split: pl.read_parquet(tmp_path / "a" / split) for split in ("train", "valid", "test")}
    edges = np.cumsum([len(frame) for frame in splits.values()])
    assert edges[-1] == len(rows)
    times = [rows["time"][start : int(end)] for start, end in zip([0, *edges.tolist()], edges)]
    assert times[0].max() < times[1].min() and times[1].max() < times[2].min()
    values = pl.read_parquet(tmp_path / "a" / "vocab" / "movie.parquet")
    train = rows[: int(edges[0])]
    seen = {str(movie) for movie in [*train["movie"], *train["movie_history"].explode().drop_nulls()]}
    assert set(values["value"]) == seen
    ids = dict(values.select("value", "id").iter_rows())
    assert pl.concat(splits.values())["movie"].to_list() == [ids.get(str(movie), 2) for movie in rows["movie"]]
    encoded = [[ids.get(str(movie), 2) for movie in history] for history in rows["movie_history"]]
    assert pl.concat(splits.values())["movie_history"].to_list() == encoded


def test_movielens_user_as_a_feature(tmp_path: Path) -> None:
    raw = write_movielens(tmp_path / "raw", shuffled=False)
    movielens.main(movielens.Arguments(out=tmp_path / "d", raw=raw, protocol="histories", user_feature=True))
    schema = ctr.Schema.load(tmp_path / "d")
    assert schema.features[0].name == "user" and schema.group == "user"
    with pytest.raises(ValueError, match="'ids' fixes its features"):
        movielens.main(movielens.Arguments(out=tmp_path / "e", raw=raw, protocol="ids", user_feature=True))


def test_movielens_labels_are_of_all_ratings(tmp_path: Path) -> None:
    raw = write_movielens(tmp_path / "raw", shuffled=False)
    for label in ("both", "liked", "loved"):
        movielens.main(movielens.Arguments(out=tmp_path / label, raw=raw, protocol="labels", label=label))
    rating = ratings(seed=6)["rating"]
    frames = {
        label: pl.concat([pl.read_parquet(tmp_path / label / split) for split in ("train", "valid", "test")])
        for label in ("both", "liked", "loved")
    }
    assert ctr.Schema.load(tmp_path / "both").labels == ("liked", "loved")
    assert frames["both"]["liked"].sum() == (rating > 3).sum() and frames["both"]["loved"].sum() == (rating == 5).sum()
    assert (frames["both"]["liked"] >= frames["both"]["loved"]).all() and len(frames["both"]) == len(rating)
    assert frames["both"].drop("loved").equals(frames["liked"])
    assert frames["both"].drop("liked").equals(frames["loved"])
    with pytest.raises(ValueError, match="protocol 'ids' has one label: label 'liked' goes with 'labels'"):
        movielens.main(movielens.Arguments(out=tmp_path / "e", raw=raw, protocol="ids", label="liked"))
