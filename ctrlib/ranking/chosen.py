"""Which features a written ranking chooses: what `ctrlib prepare --from-ranking` asks, so nothing heavy is imported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ctrlib.errors import ArgumentError, CtrlibError, check_whole

Order = Literal["relevance", "mrmr", "3mr"]
VERSION = 1
LEVEL = 0.05  # share of false discoveries among what is taken for found


class RankingError(CtrlibError, ValueError):
    """A file is no ranking."""


def choose(orders: Sequence[Sequence[str]], number: int) -> list[str]:
    """So many names, taken from all orders in turn.

    >>> choose([["a", "b", "c"], ["c", "a", "b"]], 2)
    ['a', 'c']
    """
    turns = (name for names in itertools.zip_longest(*orders) for name in names if name is not None)
    return list(dict.fromkeys(turns))[:number]


def _read(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a ranking, and what it holds.

    Raises:
        RankingError: it is none, or of another version.
    """
    file = Path(path) / "ranking.json" if Path(path).is_dir() else Path(path)
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        version = content["version"]
    except OSError as error:
        raise RankingError(
            f"{file} cannot be read ({error.strerror}): expected what `ctrlib rank --out` writes"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise RankingError(f"{file} is no ranking: expected ranking.json, as `ctrlib rank --out` writes it") from error
    if version != VERSION:
        raise RankingError(f"{file} has version {version}, this ctrlib reads {VERSION}: rank again")
    return file, content


def not_chosen(path: str | Path, number: int, order: Order = "3mr") -> list[str]:
    """The columns that a written ranking knows, without the `number` that it would choose: for `prepare(ignore=...)`.

    Args:
        path: ranking.json, or the folder that it is in.
        number: of features to keep.
        order: by which they are chosen.

    Raises:
        RankingError: it is no ranking, or of another version.
        ArgumentError: `number` is below 1, or above the number of features that may be chosen.
    """
    check_whole(1, top=number)
    file, content = _read(path)
    orders = [one["orders"][order] for one in content["labels"]]
    known = choose(orders, 1 << 62)
    if number > len(known):
        raise ArgumentError(f"{file} has {len(known)} features to choose from, got top (--top) {number}: say fewer")
    names = [*(score["feature"] for one in content["labels"] for score in one["scores"]), *content["left_out"]]
    kept = {*choose(orders, number)}
    return [name for name in dict.fromkeys(names) if name not in kept]


def crosses(path: str | Path) -> list[tuple[str, str]]:
    """The pairs of categorical features that a written ranking has found to tell more together than both alone.

    Those with most synergy come first; of several labels, they are taken from each in turn. What is found of a number
    is of its bins, which are no ids that a model could cross.

    Args:
        path: ranking.json, or the folder that it is in.

    Raises:
        RankingError: it is no ranking, or of another version.
    """
    _, content = _read(path)
    found: list[list[tuple[str, str]]] = []
    for one in content["labels"]:
        able = {score["feature"] for score in one["scores"] if score["kind"] == "categorical" and not score["leak"]}
        pairs = [pair for pair in one["pairs"] if pair["q"] is not None and pair["q"] < LEVEL and pair["synergy"] > 0]
        pairs.sort(key=lambda pair: -pair["synergy"])
        found.append([(pair["first"], pair["second"]) for pair in pairs if {pair["first"], pair["second"]} <= able])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*found))
    return list(dict.fromkeys(pair for pair in turns if pair is not None))
