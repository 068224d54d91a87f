"""Whether the files and folders that a command is told of are there, asked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ctrlib.errors import ArgumentError
from ctrlib.making import settle
from ctrlib.manifest import load_schema
from ctrlib.schema import Schema


def check_prepared(folder: Path) -> Schema:
    """The schema of a prepared folder.

    Raises:
        ValueError: it is none.
    """
    if folder.is_file():
        raise ArgumentError(
            f"{folder} is a file, not a prepared folder; make one with `ctrlib prepare {folder} --out FOLDER`"
        )
    return load_schema(folder)


def check_model(folder: Path) -> None:
    """Refuse what is no model folder.

    Raises:
        ValueError: as said.
    """
    settle(folder)
    if not (folder / "model.json").is_file():
        what = "has no model.json" if folder.is_dir() else "does not exist"
        raise ArgumentError(f"{folder} is not a model folder, it {what}: `ctrlib train --out` writes one")


def check_raw(path: Path) -> None:
    """Refuse a raw file that is not there; a folder may hold parquet files.

    Raises:
        ValueError: as said.
    """
    if not path.is_file():
        settle(path)
    if not path.exists():
        raise ArgumentError(
            f"{path} does not exist: expected a CSV, TSV or parquet file, or another that docs/data.md names"
        )


def named(paths: Sequence[Path]) -> str:
    """What to call raw files in a line of output.

    >>> named([Path("a.csv")]), named([Path("a.csv"), Path("b.csv"), Path("c.csv")])
    ('a.csv', 'a.csv and 2 more')
    """
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else str(paths[0])


def holds_parquet(folder: Path) -> bool:
    """Whether there are parquet files in a folder, or in folders in it."""
    return any(path.suffix in (".parquet", ".pq", ".parq") for path in folder.rglob("*"))
