"""MovieLens-100K: 100,000 ratings of 1,682 movies by 943 users (GroupLens; research use, see its README).

    python datasets/movielens_100k.py --out data/movielens_100k

Label: rating >= 4 (55.4 % positive). Features: user, movie, age, gender, occupation, zip code, genres, release year.
Random split 8:1:1; GAUC groups by user. Source: F. M. Harper and J. A. Konstan, "The MovieLens Datasets: History and
Context", TiiS 2015, https://doi.org/10.1145/2827872.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.data.download import DownloadError, download, download_package, extract

URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
MD5 = "md5:0e33842e24a9c977be4e0107933c0723"
# The same ratings travel inside this package, for machines that reach package registries only.
PACKAGE = "recbole==1.2.1"
PACKAGE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"

GENRES = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


@dataclass(frozen=True)
class Arguments:
    """Prepare MovieLens-100K for training."""

    out: Path
    """Prepared folder to write."""
    raw: Path | None = None
    """Folder that holds u.data, u.user and u.item already; otherwise they are downloaded."""
    seed: int = 0
    """Of the random split."""


def fetch(folder: Path) -> Path:
    """A folder with the raw files: from GroupLens, else the copy inside a package."""
    try:
        archive = download(URL, checksum=MD5, folder=folder)
        extract(archive, {f"ml-100k/{name}": name for name in ("u.data", "u.user", "u.item")}, folder)
    except DownloadError as error:
        print(f"{error}; taking the copy inside {PACKAGE}")
        archive = download_package(PACKAGE, checksum=PACKAGE_SHA256, folder=folder)
        inside = "recbole/dataset_example/ml-100k/ml-100k"
        extract(archive, {f"{inside}.{name}": f"ml-100k.{name}" for name in ("inter", "user", "item")}, folder)
    return folder


def read(raw: Path) -> pl.DataFrame:
    """One row per rating, the same whichever copy `raw` holds."""
    if (raw / "u.data").exists():
        ratings = _read(raw / "u.data", "\t", ["user", "movie", "rating", "time"])
        users = _read(raw / "u.user", "|", ["user", "age", "gender", "occupation", "zip"])
        names = ["movie", "title", "date", "video_date", "url", *GENRES]
        movies = _read(raw / "u.item", "|", names).select(
            "movie",
            year=pl.col("title").str.extract(r"\((\d{4})\)\s*$"),
            genres=pl.concat_list(
                [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in GENRES]
            ).list.drop_nulls(),
        )
    else:
        ratings = _read(raw / "ml-100k.inter", "\t", ["user", "movie", "rating", "time"], header=True)
        users = _read(raw / "ml-100k.user", "\t", ["user", "age", "gender", "occupation", "zip"], header=True)
        movies = _read(raw / "ml-100k.item", "\t", ["movie", "title", "year", "genres"], header=True).select(
            "movie",
            pl.col("year").str.extract(r"^(\d{4})$"),
            pl.col("genres").str.split(" "),
        )
    return (
        ratings.join(users, on="user", how="left", maintain_order="left")
        .join(movies, on="movie", how="left", maintain_order="left")
        .with_columns(pl.col("age").cast(pl.Int32), label=(pl.col("rating").cast(pl.Float64) >= 4).cast(pl.Int8))
        .drop("rating", "time")
    )


def _read(path: Path, separator: str, columns: list[str], header: bool = False) -> pl.DataFrame:
    return pl.read_csv(
        path,
        separator=separator,
        has_header=header,
        new_columns=columns,
        infer_schema=False,
        encoding="iso-8859-1",
        quote_char=None,
    )


def main(arguments: Arguments) -> None:
    """Fetch if needed, then prepare."""
    raw = arguments.raw or fetch(arguments.out.parent / "raw" / "movielens_100k")
    ctr.prepare(
        read(raw),
        arguments.out,
        features=[
            ctr.Categorical("user"),
            ctr.Categorical("movie"),
            ctr.Categorical("age"),
            ctr.Categorical("gender"),
            ctr.Categorical("occupation"),
            ctr.Categorical("zip"),
            ctr.MultiValued("genres"),
            ctr.Categorical("year"),
        ],
        labels=["label"],
        group="user",
        seed=arguments.seed,
        overwrite=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
