"""What to make of a raw log of events, whose rows are a user, an item, a time and a label: histories and rates.

A row is told what happened before it and nothing else, so that its own label, and what came after it, is in no feature
of it. `ctrlib.data.past` looks back, `ctrlib.data.event_state` keeps what prediction and newer data need of a log, and
`ctrlib.data.derived` puts the columns beside those of the raw files.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, WrongTypeError, check_type
from ctrlib.schema import Categorical, Feature, Numeric, SchemaError, Sequence, kind_of, vocabulary_of

EventsOf = Literal["positive", "all"]


@dataclass(frozen=True)
class History:
    """The values that a column had in the last events of the same `by` before a row: the list column `ITEM_history`.

    Oldest first; values of one time are in the order of their text. A row without `by`, and an event without item, has
    no part in any.

    Args:
        item: column whose values are listed, such as the item's id.
        by: column that says whose events they are, such as the user.
        max_length: events, at most, the last ones.
        events: "positive" lists rows whose label is 1; "all" lists every row, as it was shown.
    """

    item: str
    by: str
    max_length: int = 50
    events: EventsOf = "positive"

    @property
    def name(self) -> str:
        """Of the column.

        >>> History("item", by="user").name
        'item_history'
        """
        return f"{self.item}_history"


@dataclass(frozen=True)
class Events:
    """Which columns to make of a log: histories, and smoothed rates of a label with their counts.

    A row of time t sees the events of times before t - delay, all splits' and files' together: events of its own time
    never, whatever the order of the rows. The rate of a key, such as an item or a user's category, is

        (clicks + strength * prior) / (count + strength),   prior = (all clicks + 1/2) / (all events + 1)

    of what the row sees, so .5 where nothing has happened yet. It is the column `KEY_rate`, and `KEY_count` is the
    count. A key of several columns is called after all of them, `user_category_rate`. A row in which a column of the
    key is missing has the prior and a count of 0, and is no event of it; neither is a row without label.

    Without `time`, a row of train sees the rows of train in the nine other tenths, which are drawn by the row's number,
    and a row of valid or test all of train. There are no histories then.

    Args:
        time: column with the times: numbers, or dates.
        histories: `History` objects.
        rates: keys, each a column or a tuple of columns.
        delay: how long after an event its label is known, in the unit of the times; seconds where these are dates.
        strength: of the prior, in events. The best is about p (1 - p) / v - 1, where the rates of the keys have mean p
            and variance v: about 5 where half of all events are positive, 30 where 2 of 100 are.
        label: whose rates, and whose positive events; by default the only one.

    Raises:
        ArgumentError: nothing is asked for, histories without time, a delay below 0, a strength of 0 or less, or two
            columns would have one name.

    >>> events = Events("ts", [History("item", by="user")], ["item", ("user", "shop")])
    >>> events.columns, events.names
    (('item', 'user', 'shop'), ('item_history', 'item_rate', 'item_count', 'user_shop_rate', 'user_shop_count'))
    """

    time: str | None = None
    histories: Several[History] = ()
    rates: Collection[str | Collection[str]] = ()
    delay: float = 0.0
    strength: float = 10.0
    label: str | None = None

    def __post_init__(self) -> None:
        check_type("the name of a column", (str, type(None)), time=self.time, label=self.label)
        check_type("a sequence of ctr.History(item, by=...)", Iterable, histories=self.histories)
        check_type("a sequence of names, or of tuples of names", Iterable, rates=self.rates)
        check_type("a number", (int, float), delay=self.delay, strength=self.strength)
        if isinstance(self.rates, str):
            raise WrongTypeError(f"rates is {self.rates!r}, expected a sequence of names: write [{self.rates!r}]")
        object.__setattr__(self, "histories", tuple(self.histories))
        keys = tuple((key,) if isinstance(key, str) else tuple(key) for key in self.rates)
        object.__setattr__(self, "rates", keys)  # such that what means the same is equal
        for history in self.histories:
            check_type("a ctr.History(item, by=...)", History, history=history)
            if history.max_length < 1:
                raise ArgumentError(f"{history.name}: max_length is {history.max_length}, expected 1 or more")
            if history.events not in get_args(EventsOf):
                said = instead([history.events], get_args(EventsOf))
                raise ArgumentError(f"{history.name}: events is {history.events!r}; {said}")
        for key in keys:
            if not key or len(set(key)) < len(key) or not all(isinstance(name, str) and name for name in key):
                raise ArgumentError(f"a rate is of {key}, expected a column, or several that differ")
        if not self.histories and not keys:
            raise ArgumentError("events make nothing: name histories (--history ITEM:USER) or rates (--rate ITEM)")
        if self.histories and self.time is None:
            raise ArgumentError(
                "a history needs the times of the events, since without them nobody knows what was before a row: name "
                "their column by time=... (--time)"
            )
        if not (math.isfinite(self.delay) and self.delay >= 0):
            raise ArgumentError(f"delay is {self.delay}, expected 0 or more, in the unit of the times")
        if self.delay and self.time is None:
            raise ArgumentError("a delay needs times: name their column by time=... (--time)")
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise ArgumentError(f"strength is {self.strength}, expected more than 0 events")
        object.__setattr__(self, "delay", float(self.delay))
        object.__setattr__(self, "strength", float(self.strength))
        if twice := sorted(name for name, number in Counter(self.names).items() if number > 1):
            raise ArgumentError(f"events would make columns {twice} twice: ask for each once")

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """The columns of each rate."""
        return tuple((key,) if isinstance(key, str) else tuple(key) for key in self.rates)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are items, users and keys."""
        named = [name for history in self.histories for name in (history.item, history.by)]
        return tuple(dict.fromkeys([*named, *(name for key in self.keys for name in key)]))

    @property
    def inputs(self) -> tuple[str, ...]:
        """All that a row must have to be told its past."""
        return (*self.columns, *([self.time] if self.time is not None and self.time not in self.columns else []))

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that are made, in order."""
        rates = [f"{'_'.join(key)}_{what}" for key in self.keys for what in ("rate", "count")]
        return (*(history.name for history in self.histories), *rates)

    def features(
        self, given: Collection[Feature], ignored: Collection[str], limits: Mapping[str, Any]
    ) -> list[Feature]:
        """What the columns mean.

        Args:
            given: features that are named already; one of the columns that are made may be, of its own kind.
            ignored: columns that are no features, some of those that are made perhaps.
            limits: `min_count` and `max_values` of vocabularies.

        Raises:
            SchemaError: the item of a history is said to be something else than one id.
        """
        kinds = {feature.name: feature for feature in given}
        found: list[Feature] = []
        for history in self.histories:
            item = kinds.get(history.item)
            if item is not None and not isinstance(item, Categorical):
                raise SchemaError(
                    f"the history of {history.item!r} is one of ids, and that column is said to be {kind_of(item)}: "
                    f"make it a Categorical (--categorical {history.item})"
                )
            vocabulary = None if history.item in ignored else history.item
            if item is not None:
                vocabulary, limits = vocabulary_of(item), {name: getattr(item, name) for name in limits}
            found.append(Sequence(history.name, vocabulary=vocabulary, max_length=history.max_length, **limits))
        for key in self.keys:
            made = "_".join(key)
            found += [Numeric(f"{made}_rate"), Numeric(f"{made}_count", "log_standard")]
        return [feature for feature in found if feature.name not in kinds and feature.name not in ignored]

    def reasons(self) -> dict[str, str]:
        """Column -> what to say of it in a report.

        >>> Events("ts", [History("item", "user", 9)], ["item"]).reasons()["item_history"]
        "made: the last 9 'item' of positive events before, by 'user'"
        """
        found = {
            one.name: f"made: the last {one.max_length} {one.item!r} of {one.events} events before, by {one.by!r}"
            for one in self.histories
        }
        seen = "before the row" if self.time is not None else "in other rows"
        for key in self.keys:
            what = " and ".join(map(repr, key))
            found["_".join(key) + "_rate"] = f"made: smoothed rate of {what} {seen}"
            found["_".join(key) + "_count"] = f"made: events of {what} {seen}"
        return found

    def refuse_clashes(self, columns: Collection[str], source: str) -> None:
        """Refuse rows without the columns that are needed, or with one of those that are made.

        Raises:
            SchemaError: as said.
        """
        if clash := [name for name in self.names if name in columns]:
            raise SchemaError(
                f"{source} has columns {clash} already, which are made from its events: leave them out of the file, "
                "rename them, or do not ask for them"
            )
        for name in self.inputs:
            if name not in columns:
                what = "time" if name == self.time else "histories and rates"
                near = difflib.get_close_matches(name, list(columns), n=3, cutoff=0.0)
                raise SchemaError(f"{source} has no column {name!r}, for {what} of events; the closest are {near}")

    def settled(self, labels: tuple[str, ...]) -> Events:
        """The same with its label named.

        Raises:
            SchemaError: it is no label, or there are several and none is named.
        """
        if self.label is None and len(labels) > 1:
            raise SchemaError(f"events are of one of the labels {list(labels)}: name it by label=... (--event-label)")
        if self.label is not None and self.label not in labels:
            raise SchemaError(f"events are of label {self.label!r}, expected one of {list(labels)}")
        return dataclasses.replace(self, label=self.label or labels[0])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON.

        >>> events = Events("ts", [History("item", "user")], ["item"])
        >>> Events.of_dict(events.as_dict()) == events
        True
        """
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))  # lists for tuples, as it is read
        return plain

    @classmethod
    def of_dict(cls, said: Mapping[str, Any]) -> Events:
        """The inverse of `as_dict`."""
        return cls(**{**said, "histories": [History(**one) for one in said["histories"]]})
