"""What mutual information with a label is by chance alone: its exact mean and variance when labels are permuted.

With n_v rows of value v, k_v of them positive, K of N rows positive and p = K / N,

    N I(F; Y) = sum_v psi(n_v, k_v),   psi(n, k) = k ln(k / (n p)) + (n - k) ln((n - k) / (n (1 - p))),

and all permutations of the labels are equally likely if F says nothing. Then k_v is hypergeometric, so that the mean is
a sum over k for each n_v (N. X. Vinh, J. Epps and J. Bailey, "Information Theoretic Measures for Clusterings
Comparison", JMLR 2010). For the variance, let c_j(n) be the coefficients of psi(n, .) in the orthonormal polynomials of
that distribution (Hahn's). Two values of n and m rows have hypergeometric counts whose joint distribution is diagonal
in them,

    Cov(psi_v, psi_w) = sum_j (-1)^j c_j(n) r_j(n) c_j(m) r_j(m),
    r_j(n)^2 = n (n - 1) ... (n - j + 1) / ((N - n) (N - n - 1) ... (N - n - j + 1)),

so the sum over all pairs of values is a square for each j. Values with equal counts share one computation, and nothing
is drawn. c_j falls with n and r_j with n / N; `NUM_POLYNOMIALS` of them leave nothing that a double would show. Where a
count has a standard deviation of several rows, the sums take a third of it as their step, which for such smooth bells
changes no digit.

The p-value is that of a gamma distribution with this mean, this variance and the skewness that follows from the cells
by themselves and, between them, from the quadratic part of psi: exact in the limit of many rows, where 2 N I is
chi-squared, and heavy-tailed where a few rare cells decide.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

from ctrlib.errors import ArgumentError

Array = npt.NDArray[Any]
NUM_POLYNOMIALS = 10
REACH = 12.0  # standard deviations of a count that are summed over
SMOOTH = 9.0  # standard deviations from which on the end of a support does not show in a sum
FINENESS = 3  # steps per standard deviation, at least
BLOCK = 1 << 16  # points of the sums that are held at once


@dataclass(frozen=True)
class Null:
    """The distribution of plug-in mutual information under permuted labels, in nats."""

    mean: float
    sd: float
    skewness: float

    def z(self, information: float) -> float:
        """How many standard deviations above the mean; 0 where permuting changes nothing."""
        return (information - self.mean) / self.sd if self.sd > 0 else 0.0

    def p_value(self, information: float) -> float:
        """P(I >= information) when the labels are permuted; 1 where permuting changes nothing.

        >>> round(Null(0.0, 1.0, 0.0).p_value(1.96), 4)
        0.025
        """
        if self.sd <= 0:
            return 1.0
        z = self.z(information)
        if self.skewness < 1e-3:
            return float(special.ndtr(-z))
        shape = 4 / self.skewness**2
        return float(special.gammaincc(shape, max(0.0, shape + z * np.sqrt(shape))))


class NullTable:
    """The moments of psi(n, k) for the counts n that come up, for N rows of which K are positive.

    Args:
        num_rows: N.
        num_positives: K, with 0 < K < N.

    >>> table = NullTable(4, 2)
    >>> round(table.of(np.array([2]), np.array([2])).mean, 6)  # ln 2 or 0, with probabilities 1/3 and 2/3
    0.231049
    """

    def __init__(self, num_rows: int, num_positives: int) -> None:
        if not 0 < num_positives < num_rows:
            raise ArgumentError(f"{num_positives} of {num_rows} rows are positive: expected both classes")
        self.num_rows, self.num_positives = num_rows, num_positives
        self._counts = np.empty(0, np.int64)
        self._moments = np.empty((0, 3 + NUM_POLYNOMIALS))

    def lookup(self, counts: Array) -> Array:
        """Mean, variance, third central moment and c_1 r_1, ..., c_J r_J of psi for each count, those not known made.

        Shape: counts (D,), ascending and distinct -> (D, 3 + NUM_POLYNOMIALS).
        """
        place = np.searchsorted(self._counts, counts)
        is_new = np.ones(len(counts), bool)
        inside = place < len(self._counts)
        is_new[inside] = self._counts[place[inside]] != counts[inside]
        if is_new.any():
            new = counts[is_new]
            made = moments(new, np.full(len(new), self.num_rows), np.full(len(new), self.num_positives))
            order = np.argsort(known := np.concatenate([self._counts, new]), kind="stable")
            self._counts, self._moments = known[order], np.concatenate([self._moments, made])[order]
            place = np.searchsorted(self._counts, counts)
        found: Array = self._moments[place]
        return found

    def of(self, counts: Array, times: Array) -> Null:
        """The null of a feature that has `times[i]` values with `counts[i]` rows each, which sum to N.

        Shape: counts (D,), ascending and distinct; times (D,), both whole numbers.
        """
        every = np.zeros(1, np.int64)
        return _null(*_sums_of_strata(self.lookup(counts), counts, times, self.num_rows, every), self.num_rows)


def conditional_null(strata: Array, rows: Array, positives: Array) -> tuple[float, Null]:
    """I(F; Y | G), and its distribution when labels are permuted among rows with equal values of G, in nats.

    Shape: a cell for each pair of values that comes up: strata (C,), the value of G, ascending; rows, positives (C,).

    >>> strata = np.array([0, 0, 1, 1])  # of two coins, whose exclusive or is the label
    >>> information, null = conditional_null(strata, np.full(4, 25), np.array([0, 25, 25, 0]))
    >>> round(information, 4), null.p_value(information) < 1e-10
    (0.6931, True)
    """
    first = np.flatnonzero(np.diff(strata, prepend=strata[0] - 1))
    sizes = np.diff(first, append=len(strata))
    of_stratum, ones = np.add.reduceat(rows, first), np.add.reduceat(positives, first)
    total = int(of_stratum.sum())
    kept = np.repeat((ones > 0) & (ones < of_stratum) & (sizes > 1), sizes)
    if not kept.any():
        return 0.0, Null(0.0, 0.0, 0.0)
    place = np.repeat(np.arange(len(first)), sizes)[kept]
    rows, positives = rows[kept], positives[kept]
    around, positive = of_stratum[place], ones[place]
    information = float(psi(rows, positives, positive / around).sum()) / total
    # Equal counts within a stratum are one; of strata that are as large and as positive, the moments are the same.
    order = np.lexsort((rows, place))
    rows, place, around, positive = (one[order] for one in (rows, place, around, positive))
    new = np.flatnonzero(np.concatenate([[True], (np.diff(place) != 0) | (np.diff(rows) != 0)]))
    times = np.diff(new, append=len(rows))
    rows, place, around, positive = (one[new] for one in (rows, place, around, positive))
    alike = np.unique(around * (total + 1) + positive, return_inverse=True)[1]
    _, at, back = np.unique(alike * (total + 1) + rows, return_index=True, return_inverse=True)
    found = moments(rows[at], around[at], positive[at])[back]
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    return information, _null(*_sums_of_strata(found, rows, times, around, starts), total)


def _null(mean: float, variance: float, third: float, num_rows: int) -> Null:
    skewness = third / variance**1.5 if variance > 0 else 0.0
    return Null(mean / num_rows, float(np.sqrt(variance)) / num_rows, max(0.0, float(skewness)))


def _sums_of_strata(
    moments: Array, counts: Array, times: Array, num_rows: Array | int, starts: Array
) -> tuple[float, float, float]:
    """Mean, variance and third central moment of N I, which add over strata, independent and beginning at `starts`."""
    times = times.astype(np.float64)

    def add(values: Array) -> Array:
        return np.add.reduceat((times * values.T).T, starts, axis=0)

    # Where each row has its own value, or all the same, nothing varies; rounding would leave something.
    ends = np.append(starts[1:], len(counts)) - 1
    fixed = (counts[ends] == 1) | ((ends == starts) & (times[starts] == 1))
    crossed = moments[:, 3:]
    signs = (-1.0) ** np.arange(1, NUM_POLYNOMIALS + 1)
    variance = add(moments[:, 1]) + (add(crossed) ** 2 - add(crossed**2)) @ signs
    variance = np.where(fixed, 0.0, np.maximum(variance, 0.0))
    # Between values, of psi's quadratic parts a z^2 / 2, z correlated by -r_v r_w: tr((A R)^3) less each by itself.
    ratio = _ratios(counts, num_rows, 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        curvature = np.where(ratio[:, 1] > 0, np.sqrt(2) * np.abs(moments[:, 4]) / ratio[:, 1], 0.0)
    square = ratio[:, 0] ** 2
    own, weight = curvature * (1 + square), curvature * square
    total = add(weight)
    third = add(moments[:, 2] + own**3 - 3 * own**2 * weight - curvature**3)
    third = np.where(fixed, 0.0, third + 3 * total * add(own * weight) - total**3)
    return float(times @ moments[:, 0]), float(variance.sum()), float(third.sum())


@functools.lru_cache(maxsize=8)
def null_table(num_rows: int, num_positives: int) -> NullTable:
    """The table for so many rows and positives, which those who ask for it share."""
    return NullTable(num_rows, num_positives)


def psi(rows: Array, positives: Array, share: Array | float) -> Array:
    """k ln(k / (n p)) + (n - k) ln((n - k) / (n (1 - p))), the part that a value has in N I(F; Y)."""
    rows, positives = rows.astype(np.float64), positives.astype(np.float64)
    mean = rows * share
    d = positives - mean
    return _deviance(mean, d, positives) + _deviance(rows - mean, -d, rows - positives)


def _ratios(counts: Array, num_rows: Array | int, number: int = NUM_POLYNOMIALS) -> Array:
    """r_j(n) for j = 1, ..., number, 0 where no other value can have j rows: (D, number)."""
    places = np.arange(number)
    above = np.maximum(counts[:, None] - places, 0.0)
    below = (num_rows - counts)[:, None] - places
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(below > 0, above / below, 0.0)
    ratios: Array = np.sqrt(np.cumprod(factors, axis=1))
    return ratios


def moments(counts: Array, num_rows: Array, num_positives: Array) -> Array:
    """Mean, variance, third central moment and c_j r_j of psi, for counts in strata of their own.

    Those of a count do not depend on which others there are, to the bit.

    Shape: all (D,), with 0 < K < N and 0 < n <= N -> (D, 3 + NUM_POLYNOMIALS).
    """
    found = np.empty((len(counts), 3 + NUM_POLYNOMIALS))
    for at, bells in _bells(counts, num_rows, num_positives):
        information = bells.positive + bells.negative
        average = bells.mean(information)
        away = information - bells.spread(average)
        square = away * away
        found[at, 0] = average
        found[at, 1] = bells.mean(square)
        found[at, 2] = bells.mean(square * away)
        found[at, 3:] = _coefficients(bells, away) * _ratios(counts[at], num_rows[at])
    return found


def positive_part(counts: Array, num_rows: Array, num_positives: Array) -> Array:
    """The mean of k ln(k / (n p)) for hypergeometric k. Shape: all (D,) -> (D,)."""
    found = np.empty(len(counts))
    for at, bells in _bells(counts, num_rows, num_positives):
        found[at] = bells.mean(bells.positive)
    return found


@dataclass(frozen=True)
class _Bells:
    """Hypergeometric distributions of counts k, on points of their supports, one distribution after the other.

    Shape: sizes (D,), how many points each has; deviation (D,), the standard deviation of k, and degree (D,), how many
    steps its support has; mass (P,), what each point has of its distribution; d (P,), k less its mean; positive and
    negative (P,), both parts of psi.
    """

    sizes: Array
    deviation: Array
    degree: Array
    mass: Array
    d: Array
    positive: Array
    negative: Array

    def mean(self, values: Array) -> Array:
        """Of each distribution. Shape: (P,) -> (D,)."""
        return self.sum(self.mass * values)

    def sum(self, values: Array) -> Array:
        """Over the points of each distribution, in an order that depends on their number alone."""
        found: Array = np.add.reduceat(values, np.cumsum(self.sizes) - self.sizes)
        return found

    def spread(self, values: Array) -> Array:
        """To all points of each distribution. Shape: (D,) -> (P,)."""
        return np.repeat(values, self.sizes)


def _bells(counts: Array, num_rows: Array, num_positives: Array) -> Iterator[tuple[slice, _Bells]]:
    """The distributions of k for these counts, as many at once as fit into a block, and which these are."""
    n, rows, positives = (one.astype(np.float64) for one in (counts, num_rows, num_positives))
    share = positives / rows
    mean = n * share
    sd = np.sqrt(n * share * (1 - share) * (rows - n) / np.maximum(1.0, rows - 1))
    least, most = np.maximum(0.0, n + positives - rows), np.minimum(n, positives)
    first, last = np.floor(mean - REACH * sd) - 1, np.ceil(mean + REACH * sd) + 30
    inner = (mean - SMOOTH * sd > least) & (mean + SMOOTH * sd < most)
    step = np.where(inner, np.maximum(1.0, np.floor(sd / FINENESS)), 1.0)
    first, last = np.maximum(first, least), np.minimum(last, most)
    sizes = ((last - first) // step).astype(np.int64) + 1
    ends = (np.cumsum(sizes) - 1) // BLOCK
    starts = np.flatnonzero(np.diff(ends, prepend=-1))
    for at in (slice(a, b) for a, b in zip(starts, [*starts[1:], len(counts)])):
        size = sizes[at]
        of = np.repeat(np.arange(at.start, at.stop), size)
        place = np.arange(len(of)) - np.repeat(np.cumsum(size) - size, size)
        k = first[of] + step[of] * place
        # The four cells of the table: k, n - k, K - k, N - K - n + k, each its mean plus or minus d.
        middle, total, ones = mean[of], n[of], positives[of]
        rest = rows[of] - ones - total
        d = k - middle
        cells = (k, total - k, ones - k, rest + k)
        positive, negative = _deviance(middle, d, k), _deviance(total - middle, -d, cells[1])
        others = _deviance(ones - middle, -d, cells[2]) + _deviance(rest + middle, d, cells[3])
        log = -(positive + negative + others + _stirling(cells))
        bells = _Bells(size, sd[at], (most - least)[at], log, d, positive, negative)
        mass = np.exp(log - bells.spread(np.maximum.reduceat(log, np.cumsum(size) - size)))
        mass /= bells.spread(bells.sum(mass))
        yield at, dataclasses.replace(bells, mass=mass)


def _coefficients(bells: _Bells, values: Array) -> Array:
    """Of values in the polynomials of degree 1, 2, ... that are orthonormal under `mass`, by Stieltjes' recurrence."""
    found = np.zeros((len(bells.sizes), NUM_POLYNOMIALS))
    x = bells.d / bells.spread(np.maximum(bells.deviation, 1e-300))
    weighed = bells.mass * values
    now, before = np.ones_like(x), np.zeros_like(x)
    norm = np.zeros(len(bells.sizes))
    for j in range(NUM_POLYNOMIALS):
        centre = bells.sum(bells.mass * x * now * now)
        following = x - bells.spread(centre)
        following *= now
        before *= bells.spread(norm)
        following -= before
        norm = np.sqrt(bells.sum(bells.mass * following * following))
        good = (norm > 1e-100) & (bells.degree > j)
        following *= bells.spread(np.where(good, 1 / np.where(good, norm, 1.0), 0.0))
        found[:, j] = bells.sum(weighed * following)
        before, now = now, following
    return found


def _deviance(mean: Array, d: Array, x: Array) -> Array:
    """x ln(x / mean) - (x - mean), where x = mean + d, without cancellation; 0 ln 0 is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = d / mean
    if not mean.all():
        found[mean == 0] = 0.0  # and d
    np.maximum(found, -1 + 2**-53, out=found)  # only 0 is as near to -1
    np.log1p(found, out=found)
    found *= x
    found -= d
    return found


# ln x! - (x ln x - x), for the first whole numbers.
_FIRST = special.gammaln(np.arange(16) + 1.0) - special.xlogy(np.arange(16), np.arange(16)) + np.arange(16)


def _series(x: Array) -> Array:
    """ln x! - (x ln x - x) - ln(2 pi x) / 2, for x of 16 and more."""
    inverse = 1 / x
    square = inverse * inverse
    found: Array = inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return found


# What is to be added for smaller ones to what is computed for 16.
_LESS = np.append(_FIRST - 0.5 * np.log(2 * np.pi * 16) - _series(np.array(16.0)), 0.0)


def _stirling(cells: Sequence[Array]) -> Array:
    """The sum of ln x! - (x ln x - x), for four whole numbers each."""
    product, found = np.full(len(cells[0]), (2 * np.pi) ** 4), np.zeros(len(cells[0]))
    for x in cells:
        large = np.maximum(x, 16.0)
        product *= large
        found += _series(large)
        found += _LESS[np.minimum(x, 16.0).astype(np.int8)]
    np.log(product, out=product)
    product *= 0.5
    found += product
    return found
