"""Look back: what each row of a log may know of the events before it, all rows at once.

Keys are numbered in the order of their text, and times in theirs. Events are sorted once for each key by (key, time),
so that what a row sees of its key is a range of them: it begins where the key does, and ends before the first event of
a time that is too late. Sums over a range are differences of running sums, and its last events the history.

Memory: about 400 bytes an event, of three rates and a history (measured), some of it while a key is looked at. Lists
are made block by block. Time: 6 to 10 microseconds an event, on one core.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ctrlib.data.events import Events, History
from ctrlib.errors import ArgumentError

NUM_FOLDS = 10  # of train, where there are no times
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_TEXT = pa.large_string()


@dataclass(frozen=True)
class Column:
    """Texts: `values`, distinct and sorted, and of each row its place among them, -1 where it is missing."""

    codes: Ints
    values: pl.Series

    @classmethod
    def of(cls, texts: pl.Series) -> Column:
        """Of a text for each row.

        >>> column = Column.of(pl.Series(["b", None, "a", "b"]))
        >>> column.codes.tolist(), column.values.to_list()
        ([1, -1, 0, 1], ['a', 'b'])
        """
        coded = texts.cast(pl.String).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_TEXT).dictionary_encode()
        values = pl.Series(pl.from_arrow(coded.dictionary), dtype=pl.String)
        order = values.arg_sort().to_numpy()
        rank = np.empty(len(order) + 1, np.int64)
        rank[order], rank[-1] = np.arange(len(order)), -1
        return cls(rank[coded.indices.fill_null(len(order)).to_numpy(zero_copy_only=False)], values.gather(order))

    def texts(self) -> pl.Series:
        """The text of each row."""
        return self.values.gather(pl.Series(self.codes).replace(-1, None).cast(pl.UInt32))

    def take(self, rows: Any) -> Column:
        """Some rows."""
        return Column(self.codes[rows], self.values)


def together(columns: Sequence[Column]) -> tuple[list[Ints], pl.Series]:
    """Codes of several columns among the values of all of them, and those values.

    >>> codes, values = together([Column.of(pl.Series(["b", "c"])), Column.of(pl.Series(["a", None, "b"]))])
    >>> [one.tolist() for one in codes], values.to_list()
    ([[1, 2], [0, -1, 1]], ['a', 'b', 'c'])
    """
    if len(columns) == 1:
        return [columns[0].codes], columns[0].values
    values = pl.concat([column.values for column in columns]).unique().sort().alias("value")
    place = values.to_frame().with_row_index("place")
    found = []
    for column in columns:
        joined = column.values.alias("value").to_frame().join(place, on="value", how="left", maintain_order="left")
        found.append(np.append(joined["place"].to_numpy().astype(np.int64), -1)[column.codes])
    return found, values


@dataclass(frozen=True)
class Log:
    """Rows of a log.

    `columns`: those of `Events.columns`. `times` (rows,), in the unit of the column, microseconds where it has dates;
    None if there are none. `labels` (rows,): 1, 0, or -1 where it is not known.
    """

    columns: Mapping[str, Column]
    times: Floats | None
    labels: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Any) -> Log:
        """Some rows."""
        times = None if self.times is None else self.times[rows]
        return Log({name: column.take(rows) for name, column in self.columns.items()}, times, self.labels[rows])

    @classmethod
    def joined(cls, logs: Sequence[Log]) -> Log:
        """Logs that follow each other."""
        logs = [log for log in logs if len(log)] or list(logs[:1])
        if len(logs) == 1:
            return logs[0]
        columns = {}
        for name in logs[0].columns:
            codes, values = together([log.columns[name] for log in logs])
            columns[name] = Column(np.concatenate(codes), values)
        times = [log.times for log in logs if log.times is not None]
        return cls(columns, np.concatenate(times) if times else None, np.concatenate([log.labels for log in logs]))


@dataclass(frozen=True)
class Settled:
    """What is left of events that every row to come sees: sums, and the ends of histories.

    `clicks` and `count`: of all. `rates`, a frame for each: columns "0", "1", ... with the texts of the key, "clicks",
    "count". `histories`, a frame for each: "by", and "items", a list of texts, oldest first.
    """

    clicks: int
    count: int
    rates: tuple[pl.DataFrame, ...]
    histories: tuple[pl.DataFrame, ...]

    @classmethod
    def nothing(cls, events: Events) -> Settled:
        """Of no event."""
        rates = tuple(pl.DataFrame(schema=rate_schema(len(key))) for key in events.keys)
        return cls(0, 0, rates, tuple(pl.DataFrame(schema=HISTORY_SCHEMA) for _ in events.histories))


HISTORY_SCHEMA = {"by": pl.String(), "items": pl.List(pl.String())}


def rate_schema(num_columns: int) -> dict[str, pl.DataType]:
    """Of a frame of `Settled.rates`."""
    return {**{str(i): pl.String() for i in range(num_columns)}, "clicks": pl.Int64(), "count": pl.Int64()}


class _Key(NamedTuple):
    """One key: its codes are those of its column or, of several, places among the pairs that come up, `pairs`.

    `place`, sorted: code * (number of moments + 1) + the event's moment. `starts`: where each code begins there, and a
    number more, for no code. `clicks`: running sum over it, from 0 on. Of settled events, sums for each code.
    """

    columns: tuple[str, ...]
    sizes: tuple[int, ...]
    pairs: Ints | None
    place: Ints
    starts: Ints
    clicks: Ints
    settled_clicks: Ints
    settled_count: Ints


class _Line(NamedTuple):
    """The events of histories in the order of user and time; settled ones have moment 0."""

    place: Ints
    starts: Ints
    items: Ints


class Past:
    """Events, to be asked for what was before.

    Args:
        events: what to make of them; its label is named.
        settled: events that every row sees.
        log: further events.
        folds: (rows of log,) of each event, where there are no times.
    """

    def __init__(self, events: Events, settled: Settled, log: Log, folds: Ints | None = None) -> None:
        self.events = events
        self._settled_totals = settled.clicks, settled.count
        self._codes: dict[str, Ints] = {}
        self.values: dict[str, pl.Series] = {}
        self._known: dict[str, dict[str, int]] = {}
        of_settled = self._number(settled, log)
        if log.times is None:
            self._moments = np.zeros(0)
            moment = np.zeros(len(log), np.int64) if folds is None else folds
            self._num_moments = NUM_FOLDS
        else:
            self._moments, moment = np.unique(log.times, return_inverse=True)
            self._num_moments = len(self._moments)
        known = log.labels >= 0
        sums = np.bincount(moment[known], minlength=self._num_moments).astype(np.int64)
        clicks = np.bincount(moment[log.labels == 1], minlength=self._num_moments).astype(np.int64)
        self._totals = _running(clicks), _running(sums)
        self._keys = [
            self._key(key, frame, codes, known, moment, log.labels)
            for key, frame, codes in zip(events.keys, settled.rates, of_settled)
        ]
        self._lines = [
            self._line(one, frame, moment, log.labels) for one, frame in zip(events.histories, settled.histories)
        ]

        texts = [self.values[one.item].to_arrow(compat_level=pl.CompatLevel.oldest()) for one in events.histories]
        self._items = [one.cast(_TEXT) for one in texts]

    def _number(self, settled: Settled, log: Log) -> list[list[Ints]]:
        """Number the texts of each column, and give the codes of the settled keys."""
        found: dict[str, list[Column]] = {name: [log.columns[name]] for name in self.events.columns}
        where: list[list[tuple[str, int]]] = []
        for key, frame in zip(self.events.keys, settled.rates):
            where.append([])
            for i, name in enumerate(key):
                where[-1].append((name, len(found[name])))
                found[name].append(Column.of(frame[str(i)]))
        for history, frame in zip(self.events.histories, settled.histories):
            found[history.by].append(Column.of(frame["by"]))
            found[history.item].append(Column.of(frame["items"].explode(empty_as_null=False, keep_nulls=False)))
        codes: dict[str, list[Ints]] = {}
        for name, columns in found.items():
            codes[name], self.values[name] = together(columns)
            self._codes[name] = codes[name][0]
        return [[codes[name][i] for name, i in one] for one in where]

    def _key(
        self,
        key: tuple[str, ...],
        frame: pl.DataFrame,
        of_settled: list[Ints],
        known: npt.NDArray[np.bool_],
        moment: Ints,
        labels: npt.NDArray[np.int8],
    ) -> _Key:
        sizes = tuple(len(self.values[name]) for name in key)
        codes, base = _paired([self._codes[name] for name in key], sizes), _paired(of_settled, sizes)
        pairs, num_codes = None, sizes[0]
        if len(key) > 1:
            pairs, places = np.unique(np.concatenate([codes, base]), return_inverse=True)
            if len(pairs) and pairs[0] < 0:  # of rows in which a column is missing
                pairs, places = pairs[1:], places - 1
            codes, base, num_codes = places[: len(codes)], places[len(codes) :], len(pairs)
        kept = known & (codes >= 0)
        place = codes[kept] * (self._num_moments + 1) + moment[kept]
        order = np.argsort(place, kind="stable")
        settled = np.zeros((2, num_codes + 1), np.int64)  # the last is that of no key
        settled[0, base], settled[1, base] = frame["clicks"].to_numpy(), frame["count"].to_numpy()
        clicks = _running(labels[kept][order].astype(np.int64))
        place = place[order]
        starts = np.searchsorted(place, np.arange(num_codes + 1) * (self._num_moments + 1))
        return _Key(key, sizes, pairs, place, starts, clicks, settled[0], settled[1])

    def _line(self, history: History, frame: pl.DataFrame, moment: Ints, labels: npt.NDArray[np.int8]) -> _Line:
        by, items = self._codes[history.by], self._codes[history.item]
        kept = (by >= 0) & (items >= 0)
        if history.events == "positive":
            kept &= labels == 1
        width = self._num_moments + 2
        place, items = by[kept] * width + moment[kept] + 1, items[kept]
        order = np.lexsort((items, place))
        place, items = place[order], items[order]
        if frame.height:
            flat = frame["items"].explode(empty_as_null=False, keep_nulls=False)
            before = np.repeat(self._look_up(history.by, frame["by"]) * width, frame["items"].list.len().to_numpy())
            place = np.concatenate([before, place])
            items = np.concatenate([self._look_up(history.item, flat), items])
            order = np.argsort(place, kind="stable")
            place, items = place[order], items[order]
        return _Line(place, np.searchsorted(place, np.arange(len(self.values[history.by]) + 1) * width), items)

    def known(self, name: str) -> dict[str, int]:
        """The code of each text of a column."""
        if name not in self._known:
            self._known[name] = {value: code for code, value in enumerate(self.values[name].to_list())}
        return self._known[name]

    def _look_up(self, name: str, texts: pl.Series) -> Ints:
        """Codes of texts, each distinct one looked up once; -1 for those that never came up."""
        known, column = self.known(name), Column.of(texts)
        codes = np.array([*(known.get(value, -1) for value in column.values.to_list()), -1], np.int64)
        return codes[column.codes]

    def of_log(self, rows: slice, times: Floats | None, folds: Ints | None) -> Answers:
        """What some of the events themselves see."""
        return self._answers({name: codes[rows] for name, codes in self._codes.items()}, times, folds)

    def of_rows(self, texts: Mapping[str, pl.Series], times: Floats | None) -> Answers:
        """What other rows see, of which none is an event."""
        return self.of_codes({name: self._look_up(name, texts[name]) for name in self.events.columns}, times)

    def of_codes(self, codes: Mapping[str, Ints], times: Floats | None) -> Answers:
        """The same of rows of whose texts the codes are known, -1 for those that never came up."""
        return self._answers(codes, times, None)

    def _answers(self, codes: Mapping[str, Ints], times: Floats | None, folds: Ints | None) -> Answers:
        num_rows = len(next(iter(codes.values())))
        if times is None:
            own = np.full(num_rows, NUM_FOLDS, np.int64) if folds is None else folds
            seen = np.full(num_rows, self._num_moments, np.int64)
        else:
            own, seen = None, _places(self._moments, times)
        totals = [sums[seen] + base for sums, base in zip(self._totals, self._settled_totals)]
        if own is not None:
            after = np.minimum(own + 1, self._num_moments)
            totals = [total - (sums[after] - sums[own]) for total, sums in zip(totals, self._totals)]
        prior = (totals[0] + 0.5) / (totals[1] + 1.0)
        rates = []
        for key in self._keys:
            code = _paired([codes[name] for name in key.columns], key.sizes)
            code = code if key.pairs is None else _found(code, key.pairs)
            first = code * (self._num_moments + 1)
            start, stop = key.starts[code], _places(key.place, first + seen)
            count, clicks = stop - start, key.clicks[stop] - key.clicks[start]
            if own is not None:
                start, stop = _places(key.place, first + own), _places(key.place, first + own + 1)
                count, clicks = count - (stop - start), clicks - (key.clicks[stop] - key.clicks[start])
            nobody = code < 0
            count[nobody] = clicks[nobody] = 0
            found = (clicks + key.settled_clicks[code], count + key.settled_count[code])
            rates.append((found[0].astype(np.int32), found[1].astype(np.int32)))
        ranges = []
        for history, line in zip(self.events.histories, self._lines):
            by = codes[history.by]
            start, stop = line.starts[by], _places(line.place, by * (self._num_moments + 2) + seen + 1)
            stop = np.where(by < 0, start, stop)
            ranges.append((np.maximum(start, stop - history.max_length), stop))
        return Answers(self, prior, rates, ranges)

    def items(self, history: int, start: Ints, stop: Ints) -> pa.Array:
        """Lists of the texts of a history's events in some ranges."""
        lengths = stop - start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], lengths)
        codes = self._lines[history].items[places]
        texts = self._items[history].take(pa.array(codes))
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), texts)


@dataclass(frozen=True)
class Answers:
    """What rows see of their past: `prior` (rows,), clicks and counts of each rate, and ranges of each history."""

    past: Past
    prior: Floats
    rates: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]]
    ranges: Sequence[tuple[Ints, Ints]]

    def columns(self, rows: slice) -> dict[str, pa.Array]:
        """The columns that are made, of some rows."""
        events = self.past.events
        found = [self.past.items(i, start[rows], stop[rows]) for i, (start, stop) in enumerate(self.ranges)]
        for clicks, count in self.rates:
            strength = events.strength
            rate = (clicks[rows] + strength * self.prior[rows]) / (count[rows] + strength)
            found += [pa.array(rate), pa.array(count[rows])]
        return dict(zip(events.names, found))


def _running(values: Ints) -> Ints:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])


def _places(among: npt.NDArray[Any], values: npt.NDArray[Any]) -> Ints:
    """`np.searchsorted`, which is several times as fast for values in order."""
    order = np.argsort(values)
    found = np.empty(len(values), np.int64)
    found[order] = np.searchsorted(among, values[order])
    return found


def _paired(codes: Sequence[Ints], sizes: Sequence[int]) -> Ints:
    """One number for the codes of several columns, in their order; -1 where one is missing."""
    if math.prod(sizes) >= 2**63:
        raise ArgumentError(f"a rate is of columns with {sizes} values, too many combinations to number: leave one out")
    found = codes[0]
    for code, size in zip(codes[1:], sizes[1:]):
        found = np.where((found < 0) | (code < 0), -1, found * size + code)
    return found


def _found(codes: Ints, among: Ints) -> Ints:
    """Places of codes in a sorted array, -1 for those that are not there."""
    if not len(among):
        return np.full(len(codes), -1, np.int64)
    places = np.minimum(_places(among, codes), len(among) - 1)
    return np.where(among[places] == codes, places, -1)
