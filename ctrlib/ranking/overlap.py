"""Chance in pairs of features, by tables: quick, and within about 2 %, where many pairs are looked through."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.ranking.null import moments, positive_part

Array = npt.NDArray[Any]
EXACT = 48  # counts up to here are points of the table, and groups by themselves
POINTS = 160  # of the table, for shares of 1e-3 and more
GROUPS = 64  # of larger counts, evenly on a logarithmic scale
MANY = 1 << 40  # rows of which the table's counts are a vanishing part


def chance_information(first: tuple[Array, Array], second: tuple[Array, Array], num_rows: int) -> float:
    """The mean of I(A; B) when rows are permuted, in nats, within about 2 %.

    For values with n and m of N rows, n >= m, the joint count is binomial with m trials and n / N, as if m rows were
    drawn with replacement, and the mean is that of a table for these two numbers, times (N - m) / (N - 1).

    Shape: of each feature, distinct numbers of rows (D,), ascending, and how many values have each (D,).

    >>> ones = (np.array([1]), np.array([1000]))
    >>> round(chance_information(ones, (np.array([500]), np.array([2])), 1000), 3)  # of a row id and a coin: H(coin)
    0.693
    """
    counts, times = _grouped(*first)
    others, other_times = _grouped(*second)
    more, less = np.maximum.outer(counts, others), np.minimum.outer(counts, others)
    found = _interpolate(_one_part, np.log(more / num_rows), np.log(less)) * (num_rows - less) / (num_rows - 1)
    return float(times @ found @ other_times) / num_rows


def overlap(
    first: tuple[Array, Array],
    second: tuple[Array, Array],
    information: float,
    entropies: tuple[float, float],
    num_rows: int,
) -> float:
    """(I - chance) / (min(H(A), H(B)) - chance), the adjusted mutual information: 1 if one follows from the other.

    0 where chance leaves nothing to tell, as for a row id.
    """
    chance, most = chance_information(first, second, num_rows), min(entropies)
    left = most - chance
    return (information - chance) / left if left > 0.05 * most else 0.0


def _grouped(counts: Array, times: Array) -> tuple[Array, Array]:
    """Large counts as their means in groups."""
    if len(counts) <= EXACT + GROUPS:
        return counts.astype(np.float64), times.astype(np.float64)
    scale = np.log(counts / EXACT) / np.log(counts[-1] / EXACT) * GROUPS
    group = np.where(counts <= EXACT, counts, EXACT + 1 + np.floor(np.maximum(scale, 0.0))).astype(np.int64)
    first = np.flatnonzero(np.diff(group, prepend=-1))
    sums, rows = np.add.reduceat(times, first), np.add.reduceat(counts * times, first)
    return rows / sums, sums.astype(np.float64)


def chance_within(counts: Array, rows: Array, share: Array) -> Array:
    """The mean of psi(n, k) when labels are permuted within a stratum of so many rows and this share of positive ones.

    Shape: all (C,) -> (C,).
    """
    counts, rows, rarer = np.broadcast_arrays(counts, rows, np.minimum(share, 1 - share))
    mixed, found = rarer > 0, np.zeros(rarer.shape)
    n, rows, rarer = counts[mixed], rows[mixed], rarer[mixed]
    found[mixed] = _interpolate(_both_parts, np.log(rarer), np.log(n)) * (rows - n) / (rows - 1)
    return found


@functools.lru_cache(maxsize=1)
def _one_part() -> tuple[Array, Array, Array]:
    """Logarithms of shares and of numbers of trials, and the mean of k ln(k / (m f)) at each."""
    return _table(_shares(1.0), positive_part)


@functools.lru_cache(maxsize=1)
def _both_parts() -> tuple[Array, Array, Array]:
    """The same for psi, up to a share of one half."""
    return _table(_shares(0.5), lambda *table: moments(*table)[:, 0])


def _shares(most: float) -> Array:
    """From 1e-9, and more densely from 1e-3, to the most that there is."""
    return np.concatenate([np.geomspace(1e-9, 1e-3, 40, endpoint=False), np.geomspace(1e-3, most, POINTS)])


def _table(shares: Array, mean: Callable[[Array, Array, Array], Array]) -> tuple[Array, Array, Array]:
    trials = np.concatenate([np.arange(1, EXACT), np.geomspace(EXACT, 1e9, 80).astype(np.int64)])
    positives = np.clip(np.rint(shares * MANY), 1, MANY - 1).astype(np.int64)
    m, of = np.tile(trials, len(shares)), np.repeat(positives, len(trials))
    found = mean(m, np.full(len(m), MANY), of).reshape(len(shares), len(trials))
    if shares[-1] == 1:
        found[-1] = 0.0  # all rows have it
    return np.log(shares), np.log(trials), found


def _interpolate(made: Callable[[], tuple[Array, Array, Array]], log_share: Array, log_trials: Array) -> Array:
    shares, trials, table = made()
    row = np.clip(np.searchsorted(shares, log_share, side="right") - 1, 0, len(shares) - 2)
    column = np.clip(np.searchsorted(trials, log_trials, side="right") - 1, 0, len(trials) - 2)
    x = (log_share - shares[row]) / (shares[row + 1] - shares[row])
    y = (log_trials - trials[column]) / (trials[column + 1] - trials[column])
    low = table[row, column] * (1 - y) + table[row, column + 1] * y
    high = table[row + 1, column] * (1 - y) + table[row + 1, column + 1] * y
    found: Array = low * (1 - x) + high * x
    return found
