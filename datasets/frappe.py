"""Frappe_x1: mobile app usage in context, BARS' split: 202,027 / 57,722 / 28,860 rows, 10 categorical fields.

    python datasets/frappe.py --out data/frappe

A third of the rows is positive. Source: L. Baltrunas et al., "Frappe: Understanding the Usage and Perception of Mobile
App Recommendations In-The-Wild", 2015, https://arxiv.org/abs/1505.03014; split and negatives: W. Cheng et al., AFN,
AAAI 2020; archive and checksums: BARS.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tyro

import ctrlib as ctr
from ctrlib.data.download import DownloadError, download, extract

URL = "https://zenodo.org/record/5700987/files/Frappe_x1.zip"
FIELDS = ["user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
# As BARS publishes them.
MD5 = {
    "train": "ba7306e6c4fc19dd2cd84f2f0596d158",
    "valid": "88d51bf2173505436d3a8f78f2a59da8",
    "test": "3470f6d32713dc5f7715f198ca7c612a",
}


@dataclass(frozen=True)
class Arguments:
    """Prepare Frappe_x1 for training."""

    out: Path
    """Prepared folder to write."""
    raw: Path | None = None
    """Folder that holds {train,valid,test}.csv or .csv.gz already; otherwise they are downloaded."""


def fetch(folder: Path) -> Path:
    """A folder with the three raw files. The archive is known by the checksums of what is in it."""
    extract(download(URL, checksum=None, folder=folder), {f"{split}.csv": f"{split}.csv" for split in MD5}, folder)
    for split, expected in MD5.items():
        got = hashlib.md5((folder / f"{split}.csv").read_bytes()).hexdigest()
        if got != expected:
            raise DownloadError(
                f"{URL}: {split}.csv has md5 {got}, published is {expected}: delete {folder}, try again"
            )
    return folder


def read(raw: Path, split: str) -> tuple[pl.LazyFrame, bool]:
    """One split, and whether it is the published file."""
    path = raw / f"{split}.csv"
    content = path.read_bytes() if path.exists() else gzip.decompress((raw / f"{split}.csv.gz").read_bytes())
    is_published = hashlib.md5(content).hexdigest() == MD5[split]
    return pl.read_csv(content, infer_schema=False).lazy(), is_published


def main(arguments: Arguments) -> None:
    """Fetch if needed, then prepare with BARS' settings: every value of train has a row."""
    raw = arguments.raw or fetch(arguments.out.parent / "raw" / "frappe")
    splits = {split: read(raw, split) for split in MD5}
    other = [split for split, (_, is_published) in splits.items() if not is_published]
    note = f"Frappe_x1 with another {', '.join(other)} split than the published one" if other else ""
    ctr.prepare(
        {split: rows for split, (rows, _) in splits.items()},
        arguments.out,
        features=[ctr.Categorical(field) for field in FIELDS],
        labels=["label"],
        group="user",
        note=note,
        overwrite=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
