"""What preparation remarks on: data that can be read, and may not mean what it was taken for.

Nothing is refused here and nothing is changed: a remark says what was seen and what to do about it; a person judges.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import polars as pl

from ctrlib.data.cells import holds, text
from ctrlib.data.encode import Totals
from ctrlib.data.infer import separator_in
from ctrlib.data.table import RawTable
from ctrlib.schema import Categorical, MultiValued, Schema, Sequence, kind_of, vocabulary_of

FIRST_ROWS = 10_000  # that are looked at
MIN_CELLS = 20  # of fewer, an equal length says nothing
FEW_LABELS = 100  # of the rarer class; the standard error of an AUC is then about .03
CHANCE = 1e-3
OTHERWISE_MISSING = 0.2  # difference of shares of missing numbers from which on a split is made otherwise than train


def on_lists(train: RawTable, schema: Schema) -> Iterator[str]:
    """Bags and histories of text that no separator divides, and those that seem to be filled up to one length."""
    dtypes = train.dtypes
    lists = [feature for feature in schema.sparse if isinstance(feature, MultiValued | Sequence)]
    if not lists:
        return
    # As histories, since those keep every event; whole.
    whole = [Sequence(feature.name, separator=feature.separator, max_length=1 << 30) for feature in lists]
    looked_at = [pl.col(feature.name).alias(f"cells {number}") for number, feature in enumerate(whole)]
    looked_at += [text(feature, dtypes[feature.name]).alias(f"lists {number}") for number, feature in enumerate(whole)]
    first = train.gather(lambda piece: piece.head(FIRST_ROWS).select(looked_at)).head(FIRST_ROWS)
    for number, feature in enumerate(lists):
        name, cells = feature.name, first[f"cells {number}"].drop_nulls().alias(feature.name)
        if dtypes[name] == pl.String and len(cells):
            column = pl.col(name)
            divided = column.str.contains(feature.separator, literal=True)
            divided = divided | (column.str.starts_with("[") & column.str.ends_with("]"))
            if not cells.to_frame().select(divided.any()).item() and not holds(train, divided):
                what = "event" if isinstance(feature, Sequence) else "value"
                remark = f"no cell of {name!r} holds the separator {feature.separator!r}, so that each is one {what}"
                others = [one for one in ",;| " if cells.str.contains(one, literal=True).any()]
                if other := separator_in(cells) or next(iter(others), None):
                    remark += f": if {other!r} separates them, say {_option(feature, 'separator', other)}"
                yield f"{remark}; it holds cells such as {cells[0]!r}"
        lists_of = first[f"lists {number}"].drop_nulls()
        lengths = lists_of.list.len()
        if feature.padding is None and len(lengths) >= MIN_CELLS and lengths.n_unique() == 1 and lengths[0] > 1:
            counts = lists_of.explode().fill_null("").alias("event").value_counts()
            most = counts.sort("count", "event", descending=[True, False])["event"][0]
            ends = pl.concat([lists_of.list.first(), lists_of.list.last()]).fill_null("")
            dropped = most == "" and isinstance(feature, MultiValued)  # as empty values of bags are
            if most in ("", "0") and (ends == most).any() and not dropped:
                yield (
                    f"every cell of {name!r} has {lengths[0]} values, and {most!r} is the most frequent of them: if it "
                    f"only fills cells up, say {_option(feature, 'padding', most)}"
                )


def _option(feature: MultiValued | Sequence, argument: str, value: str) -> str:
    """How to say an argument of a feature."""
    flag, shared = ("--sequence", feature.vocabulary) if isinstance(feature, Sequence) else ("--multi", None)
    name = f"{feature.name}:{shared}" if shared else feature.name
    return f"{argument}={value!r} (on the command line {flag} {name}:{argument}={value})"


def on_lengths(train: RawTable, schema: Schema, written: Path) -> Iterator[str]:
    """Histories that a model may read event by event, and that differ in length.

    Args:
        train: the rows.
        schema: fitted.
        written: the folder of what became of the rows.
    """
    targets = {vocabulary_of(feature) for feature in schema.sparse if isinstance(feature, Categorical)}
    # As `ctrlib.Inputs` puts them together: the first history of each thing.
    unit: dict[str, Sequence] = {}
    for feature in schema.sparse:
        if isinstance(feature, Sequence) and vocabulary_of(feature) in targets:
            unit.setdefault(vocabulary_of(feature), feature)
    if len(unit) < 2:
        return
    one, *others = unit.values()
    rows = pl.scan_parquet(sorted(written.glob("*.parquet")), glob=False)
    differ = [
        (pl.col(one.name).list.len() != pl.col(other.name).list.len()).sum().alias(other.name) for other in others
    ]
    totals = rows.select(differ).collect(engine="streaming").row(0, named=True)
    for other in others:
        if not totals[other.name]:
            continue
        lengths = [text(f, train.dtypes[f.name]).list.len().fill_null(0) for f in (one, other)]
        row, value = train.first(lengths[0] != lengths[1], other.name)
        yield (
            f"{train.place(row)}, column {other.name!r} holds {value!r}, which has another number of events than "
            f"{one.name!r} ({totals[other.name]:,} rows of train): models that read both event by event (din, bst, "
            "sim) refuse them; an empty event keeps its place, and both need one max_length and padding"
        )


def on_time(time: str, split_by: str | None) -> Iterator[str]:
    """A log of events that is not split by its times.

    >>> next(on_time("ts", None))[:75]
    "rows see the events before them by 'ts', and are split at random: rows of t"
    """
    if split_by != time:
        how = "at random" if split_by is None else f"by {split_by!r}"
        yield (
            f"rows see the events before them by {time!r}, and are split {how}: rows of train see labels of valid and "
            f"test, and what is measured there is not what comes later; split by it, too (--split-by {time})"
        )


def on_labels(totals: Mapping[str, Totals], schema: Schema, can_stratify: bool) -> Iterator[str]:
    """Labels of which a split holds few of either class, or that differ between splits by more than chance."""
    for name in schema.labels:
        counts = {split: found.labels[name] for split, found in totals.items()}
        few = {}
        for split, found in counts.items():
            rarer = min((found["positive"], "1"), (found["present"] - found["positive"], "0"))
            if rarer[0] < FEW_LABELS:
                few[split] = rarer
        if few:
            least = min(number for number, _ in few.values())
            error = (
                f": an AUC of {least} has a standard error of about {math.sqrt(1 / 12 / least):.2f}" if least else ""
            )
            said = ", ".join(f"{number} in {split} with {name} = {which}" for split, (number, which) in few.items())
            yield f"label {name!r} has few rows of one class, {said}{error}"
        train = counts["train"]
        for split, found in counts.items():
            p = _p_of_difference(train["positive"], train["present"], found["positive"], found["present"])
            if p < CHANCE:
                means = [one["positive"] / one["present"] for one in (train, found)]
                remedy = (
                    f"stratify={name!r} (--stratify {name}) gives both the same"
                    if can_stratify
                    else "metrics of the two cannot be compared"
                )
                yield (
                    f"label {name!r} has mean {means[0]:.4f} in train and {means[1]:.4f} in {split}, which differ by "
                    f"more than chance (p < {CHANCE}): {remedy}"
                )


def _p_of_difference(positive_a: int, number_a: int, positive_b: int, number_b: int) -> float:
    """How probable two shares so far apart, or farther, are if both are drawn from one: the two-proportion z test.

    >>> round(_p_of_difference(50, 100, 62, 100), 3), _p_of_difference(0, 10, 0, 5), _p_of_difference(1, 2, 0, 0)
    (0.087, 1.0, 1.0)
    """
    if not number_a or not number_b:
        return 1.0
    share = (positive_a + positive_b) / (number_a + number_b)
    variance = share * (1 - share) * (1 / number_a + 1 / number_b)
    if not variance:
        return 1.0
    z = (positive_a / number_a - positive_b / number_b) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2))


def on_missing_numbers(present: Mapping[str, Mapping[str, int]], rows: Mapping[str, int]) -> Iterator[str]:
    """Numbers that a split lacks far more often than train, or far more seldom.

    Args:
        present: split -> number -> rows that have one.
        rows: split -> its rows.

    >>> next(on_missing_numbers({"train": {"age": 990}, "test": {"age": 0}}, {"train": 1000, "test": 100}))[:70]
    "numbers of 'age' are missing in 1% of the rows of train and in 100% of"
    """
    for name, in_train in present["train"].items():
        of_train = 1 - in_train / rows["train"]
        for split, found in present.items():
            share = 1 - found[name] / rows[split]
            p = _p_of_difference(in_train, rows["train"], found[name], rows[split])
            if abs(share - of_train) > OTHERWISE_MISSING and p < CHANCE:
                yield (
                    f"numbers of {name!r} are missing in {of_train:.0%} of the rows of train and in {share:.0%} of "
                    f"those of {split}; they become train's mean, and nothing tells a model: look how {split} was "
                    f"made, or leave the column out (--ignore {name})"
                )


def on_unseen(totals: Mapping[str, Totals], schema: Schema, guessed: Collection[str]) -> Iterator[str]:
    """Columns that were taken for ids without being told, and of whose values more than half are new in a split."""
    for feature in schema.sparse:
        if feature.name not in guessed:
            continue
        for split, found in totals.items():
            counts = found.ids[feature.name]
            present = counts["ids"] - counts["missing"]
            if split != "train" and present >= MIN_CELLS and counts["unseen"] > present / 2:
                yield (
                    f"column {feature.name!r} was taken for a {kind_of(feature)} feature, and "
                    f"{counts['unseen'] / present:.0%} of its values in {split} are not in train: if nearly every row "
                    f"has its own (an identifier, a time), leave it out (--ignore {feature.name}) or make parts of it "
                    "that come again"
                )
                break
