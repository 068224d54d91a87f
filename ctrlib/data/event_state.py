"""What is kept of a log of events: all that rows to come may know of it, in the folder `events` of a prepared folder.

Events that every later row sees, those of times before last - delay, are *settled*: only their sums and the ends of
histories are left. The others are *pending*, and kept as they are, so that a row of time t >= last sees exactly what it
would see of the whole log. More events bring the same state as all of them together would.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ctrlib.data.cells import checks, holds, label, text, without_bad_rows
from ctrlib.data.events import Events, History
from ctrlib.data.past import HISTORY_SCHEMA, Column, Floats, Ints, Log, Past, Settled
from ctrlib.data.quick import Careful, number_in, text_of_cell
from ctrlib.data.scan import DataError
from ctrlib.data.table import ROW, RawTable, is_cell, naming
from ctrlib.data.times import Times, times_of
from ctrlib.manifest import check_file
from ctrlib.schema import Categorical, Schema, SchemaError

FOLDER = "events"
FORMAT = 1
A_SECOND = 1e6  # in the unit of dates


@dataclass(frozen=True, eq=False)
class State:
    """What is kept of a log.

    `are_dates`: whether its times are; None before any came, and where there are none. `last`: the latest of them.
    """

    events: Events
    are_dates: bool | None
    last: float | None
    settled: Settled
    pending: Log

    @classmethod
    def new(cls, events: Events) -> State:
        """Of no event; the label of `events` is named."""
        return cls(events, None, None, Settled.nothing(events), _no_rows(events))

    # ------------------------------------------------------------------------------------------------ rows are asked

    def add(self, raw: RawTable) -> RawTable:
        """Rows to come with the columns that are made of their past; of a table that fits into memory.

        Raises:
            SchemaError: a column is missing, or one that is made is there already.
            DataError: a time is missing or none, or before the last event.
        """
        self.events.refuse_clashes(raw.dtypes, raw.name)
        with naming(raw.name):
            frame = raw.frame.collect()
            raw = dataclasses.replace(raw, pieces=(frame.lazy(),))
            dtypes = raw.dtypes
            refuse_no_keys(raw, self.events)
            texts = frame.select(text(Categorical(name), dtypes[name]) for name in self.events.columns)
            times = None
            if self.events.time is not None and frame.height:
                found = self.times(raw)
                times = frame.select(found.value.alias("time"))["time"].to_numpy()
                if self.last is not None and len(times) and times.min() < self.last:
                    raise self._too_early(raw, found.value < self.last, "before")
                times = self.seen_by(times)
            elif self.events.time is not None:
                times = np.zeros(0)
        made = self._past.of_rows({name: texts[name] for name in self.events.columns}, times)
        columns = made.columns(slice(0, frame.height))
        return dataclasses.replace(raw, pieces=(frame.hstack(_series(columns)).lazy(),))

    def add_to_cells(self, rows: Sequence[Mapping[str, Any]], missing: frozenset[str]) -> list[dict[str, Any]]:
        """As `add` of a few rows in Python, of cells of usual types; `Careful`, or a KeyError for a column that is not
        there, is raised for others, such as dates.

        Args:
            rows: column -> cell.
            missing: texts of cells without value.
        """
        events, past, times = self.events, self._past, None
        if self.are_dates or not all(row.keys().isdisjoint(events.names) for row in rows):
            raise Careful
        if events.time is not None:
            cells = [number_in(missing, row[events.time]) for row in rows]
            times = np.array([np.nan if cell is None else cell for cell in cells])
            low, high = times.min(), times.max()
            if not (self.last is None or low >= self.last) or (low < 1e10 and high >= 1e11):
                raise Careful
        codes = {}
        for name in events.columns:
            text_of, known = text_of_cell(Categorical(name), "parsed", missing), past.known(name)
            codes[name] = np.array([known.get(text_of(row[name]) or "", -1) for row in rows])
        made = past.of_codes(codes, self.seen_by(times)).columns(slice(0, len(rows)))
        columns = {name: column.to_pylist() for name, column in made.items()}
        return [{**row, **{name: column[i] for name, column in columns.items()}} for i, row in enumerate(rows)]

    @functools.cached_property
    def _past(self) -> Past:
        return Past(self.events, self.settled, self.pending)

    def past_of(self, log: Log, folds: Ints | None) -> Past:
        """The past with further events; those of `log` come after the pending ones."""
        return Past(self.events, self.settled, Log.joined([self.pending, log]), folds)

    @property
    def _delay(self) -> float:
        """In the unit of `Log.times`."""
        return self.events.delay * (A_SECOND if self.are_dates else 1.0)

    def seen_by(self, times: Floats | None) -> Floats | None:
        """The times before which rows of these times see events."""
        return None if times is None else times - self._delay

    # ----------------------------------------------------------------------------------------------- events are added

    def times(self, raw: RawTable) -> Times:
        """The times of rows, of the kind that those before had.

        Raises:
            SchemaError, DataError: as `ctrlib.data.times.times_of`, or they are of another kind.
        """
        name = self.events.time or ""
        found = times_of(raw, name, "time", "since what a row may know is told by it")
        if self.are_dates is not None and found.are_dates != self.are_dates:
            kinds = ("dates", "numbers") if found.are_dates else ("numbers", "dates")
            raise SchemaError(
                f"{raw.name}: column {name!r} holds {kinds[0]}, and in the events before {kinds[1]}: write it as there"
            )
        return found

    def read(self, raw: RawTable, label_positive: Mapping[str, str] | None) -> tuple[State, Log]:
        """Events to add, all later than those that are known, and the state with the kind of times they have.

        Raises:
            SchemaError: a column is missing, is made from the events, or has a type that no id has.
            DataError: a time is missing, or not after the last event.
        """
        events = self.events
        events.refuse_clashes(raw.dtypes, raw.name)
        refuse_no_keys(raw, events)
        dtypes, state, times = raw.dtypes, self, None
        if events.time is not None:
            found = self.times(raw)
            if self.last is not None and holds(raw, found.value <= self.last):
                raise self._too_early(raw, found.value <= self.last, "not after")
            times = _gathered(raw, found.value).to_numpy().astype(np.float64)
            state = dataclasses.replace(self, are_dates=found.are_dates)
        name = events.label or ""
        if name not in dtypes:
            raise SchemaError(f"{raw.name} has no column {name!r}, the label of events, expected one of {list(dtypes)}")
        value = label(name, dtypes[name], (label_positive or {}).get(name))
        value = pl.when(value == 1).then(1).when(value == 0).then(0).otherwise(-1).cast(pl.Int8)
        columns = {name: Column.of(_gathered(raw, text(Categorical(name), dtypes[name]))) for name in events.columns}
        return state, Log(columns, times, _gathered(raw, value).to_numpy().astype(np.int8))

    def _too_early(self, raw: RawTable, where: pl.Expr, how: str) -> DataError:
        name = self.events.time or ""
        row, value = raw.first(where, name)
        date = np.datetime64(int(self.last or 0), "us").item()
        last = date.isoformat(" ") if self.are_dates else f"{self.last:.15g}"
        mend = (
            "rows are scored, and events added, in the order of time: give rows that came later, or prepare again with "
            "all of the log; rows of the prepared folder are scored by its splits (`ctrlib evaluate MODEL FOLDER`)"
        )
        return DataError(
            f"{raw.place(row)}, column {name!r} holds {value!r}, {how} the last event that is known, of {last}: {mend}"
        )

    def after(self, log: Log) -> State:
        """The state when these events, which `read` gave, have happened, too."""
        everything = Log.joined([self.pending, log])
        if everything.times is None:
            old, last = np.ones(len(everything), bool), None
        else:
            last = float(max([everything.times.max(initial=-np.inf), *([] if self.last is None else [self.last])]))
            old = everything.times < last - self._delay
        gone, known = everything.take(old), everything.labels[old] >= 0
        clicks = int((gone.labels == 1).sum())
        settled = Settled(
            self.settled.clicks + clicks,
            self.settled.count + int(known.sum()),
            tuple(_summed(key, frame, gone) for key, frame in zip(self.events.keys, self.settled.rates)),
            tuple(_ends(one, frame, gone) for one, frame in zip(self.events.histories, self.settled.histories)),
        )
        return dataclasses.replace(self, last=last, settled=settled, pending=everything.take(~old))

    # --------------------------------------------------------------------------------------------------------- on disk

    def save(self, folder: Path) -> None:
        """Write it into a new folder `events` of a folder in the making."""
        folder = folder / FOLDER
        folder.mkdir()
        said = {
            "format": FORMAT,
            "events": self.events.as_dict(),
            "are_dates": self.are_dates,
            "last": self.last,
            "clicks": self.settled.clicks,
            "count": self.settled.count,
        }
        (folder / "state.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        for name, frame in self.frames():
            frame.write_parquet(folder / name)

    def frames(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """The tables that are kept, with the names of their files."""
        for i, frame in enumerate(self.settled.rates):
            yield f"rate-{i}.parquet", frame
        for i, frame in enumerate(self.settled.histories):
            yield f"history-{i}.parquet", frame
        texts = {str(i): self.pending.columns[name].texts() for i, name in enumerate(self.events.columns)}
        times = self.pending.times if self.pending.times is not None else np.zeros(len(self.pending))
        pending = pl.DataFrame({**texts, "time": times, "label": self.pending.labels})
        yield "pending.parquet", pending.sort("time", *texts, "label", nulls_last=True)

    @classmethod
    def load(cls, folder: str | Path, schema: Schema) -> State | None:
        """That of a prepared folder or a model folder; None if its data has no events.

        Raises:
            SchemaError: a file is missing or damaged, or is of other data.
        """
        folder = Path(folder)
        if (said := (schema.raw_format or {}).get("events")) is None:
            return None
        try:
            events = Events.of_dict(said)
        except (TypeError, KeyError, ValueError) as error:
            raise SchemaError(
                f"{folder / 'schema.json'} has events that this ctrlib does not know ({error}): a newer one wrote it; "
                "install that, or prepare the data again"
            ) from error
        names = [f"rate-{i}.parquet" for i in range(len(events.keys))]
        names += [f"history-{i}.parquet" for i in range(len(events.histories))]
        for name in ("state.json", "pending.parquet", *names):
            check_file(folder, f"{FOLDER}/{name}")
            if not (folder / FOLDER / name).is_file():
                raise SchemaError(f"{folder / FOLDER / name} is missing: copy the folder, or prepare the data, again")
        path = folder / FOLDER / "state.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            frames = [pl.read_parquet(folder / FOLDER / name, glob=False) for name in names]
            pending = pl.read_parquet(folder / FOLDER / "pending.parquet", glob=False)
            if kept["format"] != FORMAT or Events.of_dict(kept["events"]) != events:
                raise SchemaError(f"{path} is of other data, or another ctrlib wrote it: prepare the data again")
            columns = {name: Column.of(pending[str(i)]) for i, name in enumerate(events.columns)}
            times = None if events.time is None else pending["time"].to_numpy()
            num_rates = len(events.keys)
            settled = Settled(kept["clicks"], kept["count"], tuple(frames[:num_rates]), tuple(frames[num_rates:]))
            log = Log(columns, times, pending["label"].to_numpy())
            return cls(events, kept["are_dates"], kept["last"], settled, log)
        except (ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError, OSError) as error:
            if isinstance(error, SchemaError):
                raise
            raise SchemaError(f"{path.parent} cannot be read ({error}): copy it, or prepare the data, again") from error


def has_events(schema: Schema) -> bool:
    """Whether some of its columns are made of a log."""
    return (schema.raw_format or {}).get("events") is not None


def refuse_no_keys(raw: RawTable, events: Events) -> None:
    """Refuse columns that hold no single ids.

    Raises:
        SchemaError: as said.
    """
    dtypes = raw.dtypes
    for name in events.columns:
        if not is_cell(dtypes[name]):
            raise SchemaError(
                f"{raw.name}: column {name!r} has type {dtypes[name]}, expected one id a row, such as text or "
                "integers, to make histories and rates of"
            )
    ids = Schema(tuple(map(Categorical, events.columns)), ("",))
    without_bad_rows(raw, checks(ids, dtypes, with_labels=False), "raise")


def _gathered(raw: RawTable, value: pl.Expr) -> pl.Series:
    """A value for each row, in their order."""
    return raw.gather(lambda piece: piece.select(pl.col(ROW), value.alias("value")).select("value"))["value"]


def _series(columns: Mapping[str, pa.Array]) -> list[pl.Series]:
    return [pl.Series(name, pl.from_arrow(column)) for name, column in columns.items()]


def _no_rows(events: Events) -> Log:
    nothing = {name: Column.of(pl.Series(dtype=pl.String)) for name in events.columns}
    return Log(nothing, None if events.time is None else np.zeros(0), np.zeros(0, np.int8))


def _summed(key: tuple[str, ...], frame: pl.DataFrame, log: Log) -> pl.DataFrame:
    """The sums of a rate with those of more events."""
    names = [str(i) for i in range(len(key))]
    codes = {str(i): log.columns[name].codes for i, name in enumerate(key)}
    kept = pl.all_horizontal(pl.col(*names) >= 0, pl.col("label") >= 0)
    new = (
        pl.DataFrame({**codes, "label": log.labels})
        .filter(kept)
        .group_by(names)
        .agg(clicks=pl.col("label").cast(pl.Int64).sum(), count=pl.len().cast(pl.Int64))
    )
    texts = [_texts(log.columns[name], new[str(i)]).alias(str(i)) for i, name in enumerate(key)]
    return pl.concat([frame, new.with_columns(texts)]).group_by(names).agg(pl.col("clicks", "count").sum()).sort(names)


def _ends(history: History, frame: pl.DataFrame, log: Log) -> pl.DataFrame:
    """The ends of histories when more events have happened."""
    by, items = log.columns[history.by], log.columns[history.item]
    times = log.times if log.times is not None else np.zeros(len(log))
    rows = pl.DataFrame({"by": by.codes, "time": times, "item": items.codes, "label": log.labels})
    kept = pl.all_horizontal(pl.col("by", "item") >= 0)
    if history.events == "positive":
        kept &= pl.col("label") == 1
    new = rows.filter(kept).sort("by", "time", "item").group_by("by", maintain_order=True).tail(history.max_length)
    new = new.select(_texts(by, new["by"]).alias("by"), _texts(items, new["item"]).alias("items"))
    new = new.group_by("by", maintain_order=True).agg("items")
    both = frame.join(new, on="by", how="full", coalesce=True, suffix=" new")
    nothing = pl.lit([], HISTORY_SCHEMA["items"])
    joined = pl.concat_list(pl.col("items").fill_null(nothing), pl.col("items new").fill_null(nothing))
    return both.select("by", items=joined.list.tail(history.max_length)).sort("by")


def _texts(column: Column, codes: pl.Series) -> pl.Series:
    return column.values.gather(codes.cast(pl.UInt32))
