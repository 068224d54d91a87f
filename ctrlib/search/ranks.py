"""Which rank each table and each layer deserves: where a byte keeps the most energy."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

from ctrlib.errors import ArgumentError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Goal:
    """How small tables, or layers, are to become: one of these.

    `num_bytes`: at most so many, decoders, means and biases included, with as much energy kept as there can be.
    `ratio`: as many times fewer bytes. `energy`: each keeps this fraction of its own, at the smallest such rank.
    `rank`: the same for all.

    Raises:
        ValueError: none or several are given, or one is out of its range.

    >>> Goal(ratio=8, rank=4)
    Traceback (most recent call last):
    ctrlib.errors.ArgumentError: expected one of num_bytes, ratio, energy and rank, got {'ratio': 8, 'rank': 4}
    """

    num_bytes: int | None = None
    ratio: float | None = None
    energy: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ArgumentError(f"expected one of num_bytes, ratio, energy and rank, got {given}")
        ((name, value),) = given.items()
        if value <= 0 or (name == "ratio" and value < 1) or (name == "energy" and value > 1):
            raise ArgumentError(
                f"{name}={value}: expected a positive number, a ratio from 1 on, an energy of 1 at most"
            )


def rank_for_energy(energies: Tensor, fraction: float) -> int:
    """The smallest rank, 1 at least, that keeps `fraction` of the sum of `energies`, the largest of which come first.

    >>> import torch
    >>> rank_for_energy(torch.tensor([6.0, 3.0, 1.0]), 0.9)
    2
    """
    kept = energies.cumsum(0)
    return min(int((kept < fraction * kept[-1]).sum()) + 1, len(energies))


def allocate_ranks(
    tables: Mapping[Key, tuple[int, Tensor]], num_bytes: int, *, multiple_of: int = 4, centred: bool = True
) -> dict[Key, int]:
    """Ranks that keep much energy in `num_bytes`, decoders and means counted, of tables given as (rows, energies (D,)).

    From the lowest rank on, the next bytes go where each keeps the most energy. Ranks are multiples of `multiple_of`;
    a table of rows <= D r / (D - r), for which rank r would take more bytes than whole rows, is kept whole instead.

    Raises:
        ValueError: the lowest ranks take more than `num_bytes`; the message says how much.

    >>> import torch
    >>> energies = torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    >>> tables = {"large": (1000, energies), "often": (100, 10 * energies), "few": (6, energies)}
    >>> allocate_ranks(tables, 20_000)
    {'large': 4, 'often': 8, 'few': 8}
    """
    levels, energies = table_levels(tables, multiple_of, centred)
    return _allocate(levels, energies, num_bytes)


class Level(NamedTuple):
    """A rank that a table or layer may be given, and the bytes it then takes."""

    rank: int
    num_bytes: int


def table_levels(
    tables: Mapping[Key, tuple[int, Tensor]], multiple_of: int, centred: bool
) -> tuple[dict[Key, list[Level]], dict[Key, Tensor]]:
    """The ranks that make each table smaller, and whole rows; and its energies."""
    levels = {}
    for key, (rows, energies) in tables.items():
        dim = len(energies)
        ranks = range(multiple_of, dim, multiple_of)
        found = [Level(rank, 4 * (rows * rank + (rank + centred) * dim)) for rank in ranks]
        levels[key] = smaller_levels(found, Level(dim, 4 * rows * dim))
    return levels, {key: energies for key, (_, energies) in tables.items()}


def smaller_levels(levels: Sequence[Level], whole: Level) -> list[Level]:
    """The levels that save bytes, and the whole."""
    return [*(level for level in levels if level.num_bytes < whole.num_bytes), whole]


def choose_ranks(levels: Mapping[Key, list[Level]], energies: Mapping[Key, Tensor], goal: Goal) -> dict[Key, int]:
    """Ranks by energy or for a budget."""
    if goal.energy is not None:
        needed = {key: rank_for_energy(energies[key], goal.energy) for key in levels}
        return {key: next(level.rank for level in levels[key] if level.rank >= needed[key]) for key in levels}
    num_bytes = goal.num_bytes
    if num_bytes is None:
        num_bytes = int(sum(ranks[-1].num_bytes for ranks in levels.values()) / (goal.ratio or 1))
    return _allocate(levels, energies, num_bytes)


def _allocate(levels: Mapping[Key, list[Level]], energies: Mapping[Key, Tensor], num_bytes: int) -> dict[Key, int]:
    least = sum(ranks[0].num_bytes for ranks in levels.values())
    if least > num_bytes:
        whole = sum(ranks[-1].num_bytes for ranks in levels.values())
        raise ArgumentError(
            f"the lowest ranks take {least:,} bytes of now {whole:,}, which is more than {num_bytes:,}: allow as many, "
            "or drop rows first"
        )
    kept = {key: [0.0, *energies[key].cumsum(0).tolist()] for key in levels}
    chosen, left = dict.fromkeys(levels, 0), num_bytes - least
    while True:
        best: tuple[float, Key, int, int] | None = None
        for key, ranks in levels.items():
            now = ranks[chosen[key]]
            # Any higher level, since the last one needs no decoder and can be a bargain.
            for position in range(chosen[key] + 1, len(ranks)):
                cost = ranks[position].num_bytes - now.num_bytes
                gain = (kept[key][ranks[position].rank] - kept[key][now.rank]) / cost
                if cost <= left and gain > (best[0] if best else 0):
                    best = gain, key, position, cost
        if best is None:
            return {key: levels[key][position].rank for key, position in chosen.items()}
        _, key, position, cost = best
        chosen[key], left = position, left - cost
