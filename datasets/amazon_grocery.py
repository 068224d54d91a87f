"""Amazon Grocery and Gourmet Food with behaviour histories: 151,254 reviews of 8,713 items by 14,681 users.

    python datasets/amazon_grocery.py --out data/amazon_grocery
    python datasets/amazon_grocery.py --protocol baskets --out data/amazon_grocery_baskets

Would this user review this item on this day, given what he reviewed before? Reviews carry the day only.

Split: the files' own, leave-one-out: each user's last event is for test, the one before for valid, the others train.
It is in the order of time for each user, not over all users: train holds events of others that are later than a user's
test event, so an item's count in train knows of the future. The files order a user's events of one day by item number.

Rows: each event gives two, the item itself (label 1) and one that the user has in none of the three files (label 0),
drawn uniformly by a hash of seed, user, item and day, so that neither the order of the rows nor another user matters.
Both have the same history, which alone therefore says nothing about the label. Popularity does, as the negatives are
uniform: an item's count among the positive rows of train has a test AUC of about 0.66. DIN's code samples like this (G.
Zhou et al., KDD 2018, https://arxiv.org/abs/1706.06978). ReChorus' valid and test files bring 99 negatives per event,
drawn by the same rule, to rank one item among 100 (HR, NDCG); they are not used, and an AUC does not compare with its
tables.

History: the user's events of earlier days, whichever split they are in, oldest first, the last 50. Events of one day
are not in each other's history; in a later one they stand by item number. An event with fewer than `min_history`
earlier ones gives no rows but does stand in later histories; with 1, as in DIN's data and BARS' AmazonElectronics_x1,
nobody's first day is a target. Item and category histories go position by position.

Category: 96 % of the items have none, which is category 0 and not a missing cell, or the two histories would not be of
equal length. The user is no feature, as at BARS, but the group for GAUC; in valid and test a group is one pair, so GAUC
is the share of pairs in order.

`baskets`, for models of several labels and behaviours (no published protocol; the files hold no ratings, so what a user
does besides reviewing an item has to come from the days). A basket is two or more reviews of a user on one day. Labels:
`reviewed`, as above, and `basket`: did the item come in one? That is known where it was reviewed, and missing in the
negative rows. Histories: items of earlier baskets, and items reviewed alone on their day. Category is a feature without
a history. Split by days, since those of one day share history and label: each user's last day is for test, the one
before for valid, all earlier ones train. Baskets grow commoner with time: 33, 49 and 56 % of the reviews in train,
valid and test are of one.

Source: R. He and J. McAuley, "Ups and Downs", WWW 2016, https://arxiv.org/abs/1602.01585; 5-core, items with relations
only, as built by C. Wang et al., "Make It a Chorus", SIGIR 2020, https://github.com/THUwangcy/ReChorus.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.data.download import DownloadError, download
from ctrlib.data.split import row_hash

COMMIT = "e58d752558634d42be60de561d6f74df748583cc"
URL = f"https://raw.githubusercontent.com/THUwangcy/ReChorus/{COMMIT}/data/Grocery_and_Gourmet_Food"
# The names git has for their contents at that commit.
BLOBS = {
    "train": "76e05bd4c3adac964ddbe1813dfa72dc82dba4bb",
    "dev": "36fb3bbd0360758aeb823c137330cf86091235ca",
    "test": "8feeef5ffa270b613ad6c6da0b8e8c26cb164c0a",
    "item_meta": "75887551b8661064297931b7b786996ca1c590f4",
}
FILES = {"train": "train", "valid": "dev", "test": "test"}


@dataclass(frozen=True)
class Arguments:
    """Prepare Amazon Grocery for training."""

    out: Path
    """Prepared folder to write."""
    raw: Path | None = None
    """Folder that holds {train,dev,test,item_meta}.csv or .csv.gz already; otherwise they are downloaded."""
    max_length: int = 50
    """Of the histories: so many events at most, the latest."""
    protocol: Literal["leave_one_out", "baskets"] = "leave_one_out"
    """One label and the files' split, or two labels and behaviours; see the top of this file."""
    label: Literal["both", "reviewed", "basket"] = "both"
    """Of the protocol "baskets": which labels to keep."""
    min_history: int = 1
    """Events with fewer earlier ones than this are no targets; 0 keeps all."""
    user_feature: bool = False
    """Make the user a feature, too."""
    seed: int = 0
    """Of the negatives."""


def fetch(folder: Path) -> Path:
    """A folder with the four raw files."""
    for name, expected in BLOBS.items():
        path = download(f"{URL}/{name}.csv", checksum=None, folder=folder)
        content = path.read_bytes()
        got = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if got != expected:
            raise DownloadError(f"{URL}/{name}.csv is git blob {got}, expected {expected}: delete {path}, try again")
    return folder


def read(raw: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events (user, item, time, split) and items (item, category).

    Raises:
        ValueError: an event's item is not among the items.
    """
    events = pl.concat(
        [_read(raw / f"{name}.csv", ["user_id", "item_id", "time"]).with_columns(split=pl.lit(split))
         for split, name in FILES.items()]
    ).rename({"user_id": "user", "item_id": "item"})  # fmt: skip
    items = _read(raw / "item_meta.csv", ["item_id", "i_category"])
    items = items.rename({"item_id": "item", "i_category": "category"})
    unknown = events.join(items, on="item", how="anti")["item"].unique().sort()
    if len(unknown):
        raise ValueError(f"{raw}: items {unknown[:5].to_list()} have events but are not in item_meta: mend the files")
    return events, items


def _read(path: Path, columns: list[str]) -> pl.DataFrame:
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    separator = "\t" if b"\t" in content.partition(b"\n")[0] else ","
    return pl.read_csv(content, separator=separator, columns=columns, schema_overrides=dict.fromkeys(columns, pl.Int64))


def make_rows(
    events: pl.DataFrame, items: pl.DataFrame, *, max_length: int = 50, min_history: int = 1, seed: int = 0
) -> dict[str, pl.DataFrame]:
    """Split -> its rows, oldest first; the order of `events` and `items` does not matter."""
    histories = {"item_history": pl.col("item"), "category_history": pl.col("category")}
    rows = _pairs(events, items, histories, max_length=max_length, min_history=min_history, seed=seed)
    return _splits(rows, ["user", "item", "category", *histories, "label"])


def make_basket_rows(
    events: pl.DataFrame, items: pl.DataFrame, *, max_length: int = 50, min_history: int = 1, seed: int = 0
) -> dict[str, pl.DataFrame]:
    """As `make_rows`, in the protocol `baskets`: two histories, two labels, whole days in each split."""
    day = pl.col("time").rank("dense", descending=True).over("user")
    events = events.with_columns(
        basket=pl.len().over("user", "time") > 1,
        split=pl.when(day == 1).then(pl.lit("test")).when(day == 2).then(pl.lit("valid")).otherwise(pl.lit("train")),
    )
    histories = {
        "basket_history": pl.col("item").filter(pl.col("basket")),
        "single_history": pl.col("item").filter(~pl.col("basket")),
    }
    rows = _pairs(events, items, histories, max_length=max_length, min_history=min_history, seed=seed)
    rows = rows.with_columns(
        reviewed="label", basket=pl.when(pl.col("label") == 1).then(pl.col("basket").cast(pl.Int64))
    )
    return _splits(rows, ["user", "item", "category", *histories, "reviewed", "basket"])


def _pairs(
    events: pl.DataFrame,
    items: pl.DataFrame,
    histories: dict[str, pl.Expr],
    *,
    max_length: int,
    min_history: int,
    seed: int,
) -> pl.DataFrame:
    """Each event and its negative, with what `histories` makes of the user's events of earlier days; oldest first."""
    events = events.with_columns(negative=negatives(events, items["item"], seed=seed))
    events = events.join(items, on="item", how="left").sort("user", "time", "item", "split")
    everything = f"{events['time'].max() - events['time'].min() + 1}i"  # type: ignore[operator]
    earlier = events.rolling("time", period=everything, closed="left", group_by="user").agg(
        num_earlier=pl.len(), **{name: history.tail(max_length) for name, history in histories.items()}
    )
    return (
        events.join(earlier.unique(["user", "time"]), on=["user", "time"])
        .filter(pl.col("num_earlier") >= min_history)
        .sort("time", "user", "item", "split")
        .with_columns(item=pl.concat_list("item", "negative"), label=pl.lit([1, 0]))
        .explode("item", "label")
        .drop("category")
        .join(items, on="item", how="left", maintain_order="left")
    )


def _splits(rows: pl.DataFrame, columns: list[str]) -> dict[str, pl.DataFrame]:
    return {split: rows.filter(pl.col("split") == split).select(columns) for split in FILES}


def negatives(events: pl.DataFrame, items: pl.Series, *, seed: int) -> pl.Series:
    """For each event an item that its user has in no event: uniform, a function of seed, user, item and time alone.

    Raises:
        ValueError: a user has all items.
    """
    items = items.unique().sort()
    num_items = len(items)
    users = events["user"].unique().sort()
    user = users.search_sorted(events["user"]).to_numpy()
    key = row_hash(pl.col("user"), seed)
    for name in ("item", "time"):
        key = row_hash(key ^ pl.col(name).cast(pl.UInt64), seed)
    random = events.select(key).to_series().to_numpy()

    # Items count from 0. Of a user's items t_0 < t_1 < ..., those with t_j - j <= k lie before the k-th item that he
    # does not have, which is therefore item k + (how many there are). One search finds it for all users at once.
    touched = np.unique(user * np.int64(num_items) + items.search_sorted(events["item"]).to_numpy())
    owner, item = np.divmod(touched, num_items)
    start = np.searchsorted(owner, np.arange(len(users) + 1))
    num_free = num_items - np.diff(start)
    if len(users) and num_free.min() < 1:
        raise ValueError(f"user {users[int(num_free.argmin())]} has all {num_items} items: there is no negative")
    gaps = owner * (num_items + 1) + item - (np.arange(len(touched)) - start[owner])
    k = (random % num_free[user].astype(np.uint64)).astype(np.int64)
    passed = np.searchsorted(gaps, user * np.int64(num_items + 1) + k, side="right") - start[user]
    return items.gather(k + passed)


def main(arguments: Arguments) -> None:
    """Fetch if needed, then prepare.

    Raises:
        ValueError: `label` chooses among the labels of a protocol that has one.
    """
    baskets = arguments.protocol == "baskets"
    if arguments.label != "both" and not baskets:
        raise ValueError(f"label {arguments.label!r} is one of the protocol 'baskets', got {arguments.protocol!r}")
    events, items = read(arguments.raw or fetch(arguments.out.parent / "raw" / "amazon_grocery"))
    length = arguments.max_length
    make, histories = make_rows, {"item_history": "item", "category_history": "category"}
    labels = ["label"]
    if baskets:
        make, histories = make_basket_rows, {"basket_history": "item", "single_history": "item"}
        labels = ["reviewed", "basket"] if arguments.label == "both" else [arguments.label]
    rows = make(events, items, max_length=length, min_history=arguments.min_history, seed=arguments.seed)
    users: list[ctr.Feature] = [ctr.Categorical("user")] if arguments.user_feature else []
    things = [ctr.Categorical("item"), ctr.Categorical("category")]
    ctr.prepare(
        {split: frame.drop({"reviewed", "basket"} - set(labels), strict=False) for split, frame in rows.items()},
        arguments.out,
        features=[
            *users,
            *things,
            *(ctr.Sequence(name, vocabulary=thing, max_length=length) for name, thing in histories.items()),
        ],
        labels=labels,
        group="user",
        ignore=() if arguments.user_feature else ("user",),
        missing_labels="mask" if "basket" in labels else "raise",
        overwrite=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
