"""Columns of which train knew no value at all: new ones, or written otherwise? And columns of train that share a
vocabulary and write its values in two ways."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import polars as pl

from ctrlib.data.cells import holds
from ctrlib.data.table import RawTable
from ctrlib.data.vocabulary import values_of, vocabulary_path
from ctrlib.schema import RawId, Schema, SchemaError, SparseFeature, vocabulary_of

MIN_UNSEEN = 10  # values that have to be unseen, all of them, before a column that may be right is remarked on


def judge(
    schema: Schema,
    ids: Mapping[str, int],
    unseen: Mapping[str, int],
    missing: Mapping[str, int],
    examples: Mapping[str, list[str]],
    known_of: Callable[[str], Collection[str]],
    name: str,
) -> list[str]:
    """Look at id features of which no value at all is known; new users or items are normal and score.

    Args:
        schema: fitted.
        ids: feature -> how many ids were looked up.
        unseen: feature -> how many of them train did not have.
        missing: feature -> how many of them were the missing id.
        examples: feature -> some of the unseen values.
        known_of: vocabulary -> its values, in the order of their ids; asked only where it matters.
        name: what to call the rows.

    Returns:
        A sentence for each column that may be right, for a person to judge.

    Raises:
        SchemaError: a column cannot be right: written otherwise its values are known, or all values of train are
            integers (or "true" and "false") and none of these is.
    """
    remarks = []
    for feature in schema.sparse:
        some = examples.get(feature.name, [])
        if not some or not knows_none(feature, ids, unseen, missing):
            continue
        known = known_of(vocabulary_of(feature))
        remark = (
            f"{name}: column {feature.name!r} holds {unseen[feature.name]:,} values and train knew none of them: it "
            f"has {some[:3]}, train has values such as {list(itertools.islice(known, 3))}"
        )
        respelt = [next((other for other in spellings(one) if other in known), None) for one in some]
        if None not in respelt:
            raise SchemaError(f"{remark}, and {respelt[0]!r} for {some[0]!r}: write the column as in training")
        if unseen[feature.name] < MIN_UNSEEN:
            continue
        for form in (r"-?[0-9]+", r"true|false"):
            alike = bool(known) and all(re.fullmatch(form, one) for one in known)
            if alike and not any(re.fullmatch(form, one) for one in some):
                raise SchemaError(f"{remark}: give the right column, written as in training")
        remarks.append(f"{remark}; is it the right column, written as in training?")
    return remarks


def knows_none(
    feature: SparseFeature, ids: Mapping[str, int], unseen: Mapping[str, int], missing: Mapping[str, int]
) -> bool:
    """Whether there are ids, and train had none of them; arguments as in `judge`."""
    present = ids.get(feature.name, 0) - missing.get(feature.name, 0)
    return not isinstance(feature, RawId) and 0 < present <= unseen.get(feature.name, 0)


def refuse_two_spellings(train: RawTable, schema: Schema, vocab_folder: Path) -> None:
    """Refuse features of one vocabulary of which one has 5 where another has 5.0, such as a history joined from floats.

    Raises:
        SchemaError: as said.
    """
    value = pl.col("value")
    like_float = value.str.contains(r"^-?\d+\.0$")
    for name, features in schema.vocabularies.items():
        values = pl.scan_parquet(vocabulary_path(vocab_folder, name), glob=False).select("value")
        if len(features) < 2 or not values.select(like_float.any()).collect().item():
            continue
        floats = values.filter(like_float).select(value.str.strip_suffix(".0"))
        twice = values.join(floats, "value", how="semi").head(1).collect()["value"]
        if twice.is_empty():
            continue
        of = {feature.name: train.map(values_of((feature,), train.dtypes)) for feature in features}
        joined = [one for one, table in of.items() if not holds(table, ~like_float) and holds(table, like_float)]
        plain = [one for one, table in of.items() if not holds(table, like_float)]
        if joined and plain:
            raise SchemaError(
                f"{train.name}: column {joined[0]!r} holds values such as '{twice[0]}.0' and {plain[0]!r}, which "
                f"shares its vocabulary {name!r}, {twice[0]!r}: write both as integers (floats that are joined to text "
                "keep their .0)"
            )


def spellings(value: str) -> Iterator[str]:
    """How else the same value may be written.

    >>> list(spellings("17.0"))[0], list(spellings("True"))[:2], "7" in spellings("007")
    ('17', ['1', 'true'], True)
    """
    if re.fullmatch(r"-?[0-9]+\.0+", value):
        yield value.partition(".")[0]
    elif re.fullmatch(r"-?[0-9]+", value):
        yield f"{value}.0"
        yield str(int(value))
    yield from {"1": ("true", "True"), "0": ("false", "False"), "true": ("1",), "false": ("0",)}.get(value.lower(), ())
    yield from (value.lower(), value.upper(), value.capitalize())
