"""MovieLens-1M: 1,000,209 ratings of 3,883 movies by 6,040 users (GroupLens; research use), in four protocols.

    python datasets/movielens_1m.py --out data/movielens_1m
    python datasets/movielens_1m.py --protocol ids --out data/movielens_1m_ids
    python datasets/movielens_1m.py --protocol histories --out data/movielens_1m_histories
    python datasets/movielens_1m.py --protocol labels --out data/movielens_1m_labels

`autoint` (W. Song et al., AutoInt, CIKM 2019, https://arxiv.org/abs/1810.11921): ratings of 3 dropped, more than 3 is
positive (77.8 %); no user and movie ids, but gender, age, occupation, zip code, genres (up to 6, mean), release year
(1919-29, then by decade to 1969, then by year) and the rating's time, min-max scaled. The authors' split is used where
its row numbers lie beside the ratings (autoint_split/{train,valid,test}_rows.npy); elsewhere a random 8:1:1, and then
the numbers are not comparable.

`ids` (B. Coleman et al., Unified Embedding, NeurIPS 2023, https://arxiv.org/abs/2305.12102): user, movie, gender, age,
occupation and zip code; ratings of 3 dropped, 4 and 5 positive; random 8:1:1.

`histories`, for sequence models (no published protocol): movie, genres, gender, age, occupation, and the movies that
the user rated more than 3 at earlier seconds, oldest first, the last 50. Ratings of 3 are no targets and in no history.
77 % of the ratings share their second with another of the user: these are not in each other's history; in a later one
they stand by movie number. The split is 8:1:1 by time over all users: every row of train is older than those of valid,
and these than those of test; histories may reach back to any earlier time. 63 % of the users rate within one day only,
so that 75 % of the rows of valid and 22 % of test are of users whom train does not know: the user only groups rows for
GAUC, unless `user_feature` makes him a feature. Rows without history are kept: to have liked nothing yet tells
something.

`labels`, for models of several labels (no published protocol): the fields of `ids`, all ratings, and two labels:
`liked`, rated more than 3 (57.5 %), and `loved`, rated 5 (22.6 %). Random 8:1:1, the same rows whichever labels are
kept.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.data.download import download, extract

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
MD5 = "md5:c4d9eecfca2ab87c1945afe126590906"


@dataclass(frozen=True)
class Arguments:
    """Prepare MovieLens-1M for training."""

    out: Path
    """Prepared folder to write."""
    raw: Path | None = None
    """Folder that holds ratings.dat (or .gz), users.dat and movies.dat already; otherwise they are downloaded."""
    protocol: Literal["autoint", "ids", "histories", "labels"] = "autoint"
    """Which protocol; see the top of this file."""
    label: Literal["both", "liked", "loved"] = "both"
    """Of the protocol "labels": which to keep."""
    seed: int = 0
    """Of the random split, where there is one."""
    max_length: int = 50
    """Of the history, where there is one: so many movies at most, the latest."""
    user_feature: bool = False
    """Make the user a feature in the protocol "histories", too."""


def fetch(folder: Path) -> Path:
    """A folder with the raw files."""
    archive = download(URL, checksum=MD5, folder=folder)
    extract(archive, {f"ml-1m/{name}": name for name in ("ratings.dat", "users.dat", "movies.dat")}, folder)
    return folder


def read(raw: Path) -> pl.DataFrame:
    """One row per rating, in the order of ratings.dat."""
    ratings = _read(raw / "ratings.dat", ["user", "movie", "rating", "time"])
    users = _read(raw / "users.dat", ["user", "gender", "age", "occupation", "zip"])
    year = pl.col("title").str.extract(r"\((\d{4})\)\s*$").cast(pl.Int32)
    movies = _read(raw / "movies.dat", ["movie", "title", "genres"]).select(
        "movie",
        "genres",
        year=pl.when(year < 1930)
        .then(pl.lit("1919-29"))
        .when(year < 1970)
        .then(pl.format("{}s", year // 10 * 10))
        .otherwise(year.cast(pl.String)),
    )
    return (
        ratings.join(users, on="user", how="left", maintain_order="left")
        .join(movies, on="movie", how="left", maintain_order="left")
        .with_columns(pl.col("rating", "time").cast(pl.Int64))
        .with_columns(label=(pl.col("rating") > 3).cast(pl.Int8))
    )


def _read(path: Path, columns: list[str]) -> pl.DataFrame:
    """A file of GroupLens' "::"-separated kind."""
    content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    lines = pl.Series("line", content.decode("iso-8859-1").splitlines())
    parts = lines.str.split_exact("::", len(columns) - 1)
    return parts.struct.rename_fields(columns).struct.unnest()


def with_histories(rows: pl.DataFrame, *, max_length: int = 50) -> pl.DataFrame:
    """The ratings other than 3, oldest first, with `movie_history`; the order of `rows` does not matter."""
    rows = rows.with_columns(pl.col("user", "movie").cast(pl.Int32)).sort("user", "time", "movie")
    everything = f"{rows['time'].max() - rows['time'].min() + 1}i"  # type: ignore[operator]
    earlier = rows.rolling("time", period=everything, closed="left", group_by="user").agg(
        movie_history=pl.col("movie").filter(pl.col("rating") > 3).tail(max_length)
    )
    return (
        rows.filter(pl.col("rating") != 3)
        .join(earlier.unique(["user", "time"]), on=["user", "time"])
        .sort("time", "user", "movie")
    )


def main(arguments: Arguments) -> None:
    """Fetch if needed, then prepare.

    Raises:
        ValueError: `user_feature` in a protocol that says itself whether the user is a feature, or `label` in one that
            has one label.
    """
    if arguments.user_feature and arguments.protocol != "histories":
        raise ValueError(f"protocol {arguments.protocol!r} fixes its features: user_feature goes with 'histories' only")
    if arguments.label != "both" and arguments.protocol != "labels":
        raise ValueError(f"protocol {arguments.protocol!r} has one label: label {arguments.label!r} goes with 'labels'")
    raw = arguments.raw or fetch(arguments.out.parent / "raw" / "movielens_1m")
    rows = read(raw)
    note = ""
    kept = rows.filter(pl.col("rating") != 3)
    person: list[ctr.Feature] = [ctr.Categorical(name) for name in ("gender", "age", "occupation", "zip")]
    genres = ctr.MultiValued("genres", max_length=6)
    ids: list[ctr.Feature] = [ctr.Categorical("user"), ctr.Categorical("movie"), *person]
    labels = ["label"]
    if arguments.protocol == "ids":
        data: pl.DataFrame | dict[str, pl.DataFrame] = kept.drop("rating", "time", "genres", "year")
        features = ids
    elif arguments.protocol == "labels":
        made = {"liked": (pl.col("rating") > 3).cast(pl.Int8), "loved": (pl.col("rating") == 5).cast(pl.Int8)}
        labels = list(made) if arguments.label == "both" else [arguments.label]
        data = rows.select(*(feature.name for feature in ids), **{label: made[label] for label in labels})
        features = ids
    elif arguments.protocol == "histories":
        data = with_histories(rows, max_length=arguments.max_length).drop("rating", "zip", "year")
        history = ctr.Sequence("movie_history", vocabulary="movie", max_length=arguments.max_length)
        user = [ctr.Categorical("user")] if arguments.user_feature else []
        features = [*user, ctr.Categorical("movie"), genres, *person[:-1], history]
    else:
        split_files = raw / "autoint_split"
        if split_files.is_dir():
            data = {
                split: rows[np.load(split_files / f"{split}_rows.npy")].drop("rating", "movie")
                for split in ("train", "valid", "test")
            }
        else:
            note = "a random 8:1:1 split, not the authors': not comparable with published numbers"
            data = kept.drop("rating", "movie")
        features = [*person, genres, ctr.Categorical("year"), ctr.Numeric("time", transform="minmax")]
    ctr.prepare(
        data,
        arguments.out,
        features=features,
        labels=labels,
        group="user",
        # A user who is no feature only groups rows for GAUC.
        ignore=() if any(feature.name == "user" for feature in features) else ("user",),
        split_by="time" if arguments.protocol == "histories" else None,
        seed=arguments.seed,
        note=note,
        overwrite=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
