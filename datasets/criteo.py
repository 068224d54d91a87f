"""Criteo Display Advertising (Kaggle 2014): 45,840,617 rows, 13 counts and 26 hashed categories, 25.6 % positive.

    python datasets/criteo.py --raw DIR --out data/criteo

The data may not be redistributed: get train.txt from Criteo AI Lab and name its folder with --raw. The format is
tab-separated without a header, with blanks for missing cells. Preparation follows BARS' Criteo_x4: the counts become
categories floor(log(x)^2), values seen fewer than `min_count` times in train share one row, random split 8:1:1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

import ctrlib as ctr

COUNTS = [f"I{number}" for number in range(1, 14)]
CATEGORIES = [f"C{number}" for number in range(1, 27)]


@dataclass(frozen=True)
class Arguments:
    """Prepare Criteo's Kaggle data for training."""

    raw: Path
    """Folder that holds train.txt or train.txt.gz."""
    out: Path
    """Prepared folder to write."""
    counts: Literal["buckets", "log"] = "buckets"
    """The 13 counts as categories floor(log(x)^2), or as numbers log(1 + x)."""
    min_count: int = 10
    """Values rarer than this in train share the out-of-vocabulary row."""
    seed: int = 0
    """Of the random split."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What to do with a damaged line: stop and name it, or leave it out and count it."""


def main(arguments: Arguments) -> None:
    """Prepare."""
    path = arguments.raw / "train.txt"
    counts: list[ctr.Feature] = [
        ctr.Categorical(name, bucket="log_squared", min_count=arguments.min_count)
        if arguments.counts == "buckets"
        else ctr.Numeric(name, transform="log")
        for name in COUNTS
    ]
    ctr.prepare(
        path if path.exists() else path.with_name("train.txt.gz"),
        arguments.out,
        columns=["label", *COUNTS, *CATEGORIES],
        separator="\t",
        features=[*counts, *(ctr.Categorical(name, min_count=arguments.min_count) for name in CATEGORIES)],
        labels=["label"],
        seed=arguments.seed,
        on_bad_row=arguments.on_bad_row,
        overwrite=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
