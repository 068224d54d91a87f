"""Ids of whole numbers, for columns of them at once and without a text for each.

A dictionary waits for memory three or four times in each of its look-ups, one after the other. Here each step is done
for all numbers together, so that the processor waits for many at the same time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrlib.data.columns import Ragged, offsets_of
from ctrlib.data.counts import NUM_EXAMPLES, Counts
from ctrlib.schema import OOV_ID, Categorical, MultiValued, RawId, Schema, vocabulary_of
from ctrlib.schema import Sequence as History

Ints = npt.NDArray[np.int64]
FITTING = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)  # into 64 bits
PLACES = 4  # in each bucket, of which there are at least as many as numbers: 1 of 250 numbers finds no place, or fewer
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: spreads neighbours evenly


class WholeNumbers:
    """Number -> id, for the values of vocabularies that are whole numbers of 64 bits as they are written in decimal.

    A text such as `007` is none: the number 7 does not mean it. It takes 24 to 40 bytes a value.

    Args:
        vocabularies: of each, text -> id.

    >>> whole = WholeNumbers([{"12": 3, "-7": 4, "007": 5, "x": 6}, {"7": 3}])
    >>> whole.look_up(np.array([[-7, 12, 7], [-7, 12, 7]]), [0, 1]).tolist()
    [[4, 3, 2], [2, 2, 3]]
    """

    def __init__(self, vocabularies: Sequence[Mapping[str, int]]) -> None:
        numbers, buckets, shifts = [np.zeros(1, np.int64)], [np.zeros((0, PLACES), np.int32)], []
        self._first, self._first_bucket = np.zeros((2, len(vocabularies), 1), np.int64)
        # Those without a place, of each vocabulary: in order, and their ids.
        self._others: list[tuple[Ints, npt.NDArray[np.int32]]] = []
        for place, known in enumerate(vocabularies):
            texts = pl.Series(list(known), dtype=pl.String)
            parsed = texts.cast(pl.Int64, strict=False)
            is_one = (parsed.cast(pl.String) == texts).fill_null(False)
            found = parsed.filter(is_one).to_numpy()
            ids = np.fromiter(known.values(), np.int32, len(known))[is_one.to_numpy()]
            # A number's place is the vocabulary's first and its id. Place 0, which none has, is what no number holds.
            self._first[place] = first = sum(map(len, numbers))
            self._first_bucket[place] = sum(map(len, buckets))
            of_ids = np.zeros(int(ids.max(initial=0)) + 1, np.int64)
            of_ids[ids] = found
            numbers.append(of_ids)
            bits = max(len(found) - 1, 1).bit_length()
            shifts.append(64 - bits)
            bucket = (found.view(np.uint64) * FACTOR >> np.uint64(64 - bits)).view(np.int64)
            order = np.argsort(bucket, kind="stable")
            found, ids, bucket = found[order], ids[order], bucket[order]
            within = np.arange(len(bucket)) - np.searchsorted(bucket, bucket)
            has_room = within < PLACES
            filled = np.zeros((1 << bits, PLACES), np.int32)
            filled[bucket[has_room], within[has_room]] = first + ids[has_room]
            buckets.append(filled)
            others = np.argsort(found[~has_room])
            self._others.append((found[~has_room][others], ids[~has_room][others]))
        self._numbers, self._buckets = np.concatenate(numbers), np.concatenate(buckets)
        self._shift = np.array(shifts, np.uint64)[:, None]

    def look_up(self, numbers: Ints, which: Sequence[int]) -> npt.NDArray[np.int32]:
        """The ids of columns of numbers, that of unknown values for those which are not there: (C, N) to (C, N).

        Args:
            numbers: each row of it is a column.
            which: of each column, the vocabulary's position.
        """
        chosen = list(which)
        buckets = (numbers.view(np.uint64) * FACTOR >> self._shift[chosen]).view(np.int64)
        buckets += self._first_bucket[chosen]
        places = self._buckets.take(buckets, axis=0)
        places *= self._numbers.take(places) == numbers[..., None]
        ids: npt.NDArray[np.int32] = places.max(2)
        ids -= self._first[chosen].astype(np.int32)
        np.maximum(ids, OOV_ID, out=ids)  # ids of values are larger
        for column, place in enumerate(chosen):
            others, ids_of_others = self._others[place]
            if len(others) and len(unknown := np.flatnonzero(ids[column] == OOV_ID)):
                asked = numbers[column, unknown]
                at = np.searchsorted(others, asked).clip(max=len(others) - 1)
                there = others[at] == asked
                ids[column, unknown[there]] = ids_of_others[at[there]]
        return ids


class WholeColumns:
    """The columns of rows that hold whole numbers only, as the encoder's quick road reads them cell by cell.

    Args:
        schema: fitted.
        known: vocabulary -> text -> id.
        kinds: feature -> the kind of values that train had (`ctrlib.data.table.family`).
    """

    def __init__(self, schema: Schema, known: Mapping[str, Mapping[str, int]], kinds: Mapping[str, str]) -> None:
        self._known = known
        # Features of which a whole number means the text that it is in decimal.
        features = [
            feature
            for feature in schema.sparse
            if not isinstance(feature, RawId)
            and getattr(feature, "bucket", None) is None
            and kinds.get(feature.name, "parsed") in ("parsed", "null", "integer")
        ]
        self._vocabularies = list(dict.fromkeys(map(vocabulary_of, features)))
        self._place = {feature.name: self._vocabularies.index(vocabulary_of(feature)) for feature in features}
        self._single = {feature.name for feature in features if isinstance(feature, Categorical)}

    @functools.cached_property
    def _numbers(self) -> WholeNumbers:  # made at first use; twice at worst, if threads ask at once
        return WholeNumbers([self._known[name] for name in self._vocabularies])

    def make_ready(self) -> None:
        """Make the tables now."""
        _ = self._numbers

    def of_frame(self, name: str, column: pl.Series) -> Ints | None:
        """A column of a frame for `singles`, if it has several whole numbers that mean their texts, and no null."""
        if len(column) < 2 or name not in self._single or column.dtype not in FITTING or column.null_count():
            return None
        return column.to_numpy().astype(np.int64)

    def singles(
        self, cells: Mapping[str, Any], names: Sequence[str], ids: npt.NDArray[Any], counts: Counts
    ) -> Collection[str]:
        """Put the ids of features with one a row into their columns of `ids`, (B, S), and count them.

        Args:
            cells: of each feature, as Python has them or as `of_frame` gives them.
            names: of the columns of `ids`.

        Returns:
            The names of features whose cells are all whole numbers; the others are left as they were.
        """
        if len(ids) < 2:  # which a dictionary knows sooner
            return ()
        found = [
            place
            for place, name in enumerate(names)
            if name in self._single and (isinstance(cells[name], np.ndarray) or set(map(type, cells[name])) == {int})
        ]
        chosen = [names[place] for place in found]
        try:
            numbers = np.array([cells[name] for name in chosen], np.int64)
        except OverflowError:  # some are beyond 64 bits
            return ()
        if found:
            ids[:, found] = self._look_up(chosen, numbers, counts).T
        return chosen

    def lists(self, feature: MultiValued | History, cells: Sequence[Any], counts: Counts) -> Ragged | None:
        """The ids of a bag or a history, if all cells are lists of whole numbers, and counts of them."""
        if feature.name not in self._place or len(cells) < 2 or set(map(type, cells)) != {list}:
            return None
        if isinstance(feature, MultiValued) and not all(cells):  # an empty bag holds the id of missing values
            return None
        values = list(itertools.chain.from_iterable(cells))
        if set(map(type, values)) != {int}:
            return None
        try:
            numbers = np.array(values, np.int64)
        except OverflowError:
            return None
        if feature.padding is not None and feature.padding in map(str, np.unique(numbers).tolist()):
            return None
        lengths = np.fromiter(map(len, cells), np.int64, len(cells))
        if lengths.max() > feature.max_length:
            kept = slice(-feature.max_length, None) if isinstance(feature, History) else slice(feature.max_length)
            numbers = np.array(list(itertools.chain.from_iterable(cell[kept] for cell in cells)), np.int64)
            lengths = np.minimum(lengths, feature.max_length)
        ids = self._look_up([feature.name], numbers[None], counts)[0]
        if isinstance(feature, History):
            counts.empty[feature.name] = int((lengths == 0).sum())
        return Ragged(ids, offsets_of(lengths))

    def _look_up(self, names: Sequence[str], numbers: Ints, counts: Counts) -> npt.NDArray[np.int32]:
        """The ids of features' numbers, (features, N) to (features, N)."""
        ids = self._numbers.look_up(numbers, [self._place[name] for name in names])
        unseen = ids == OOV_ID
        for row, (name, some) in enumerate(zip(names, unseen.sum(1).tolist())):
            counts.ids[name], counts.unseen[name], counts.missing[name] = ids.shape[1], some, 0
            if some:
                distinct = dict.fromkeys(numbers[row, unseen[row]].tolist())
                counts.examples[name] = list(map(str, itertools.islice(distinct, NUM_EXAMPLES)))
        return ids
