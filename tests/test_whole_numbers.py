"""Whole numbers are looked up all at once, and get the ids of their texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_encoder import assert_same

from ctrlib.data.encoder import FEW_NUMBERS, Encoder
from ctrlib.data.whole_numbers import FACTOR, WholeNumbers
from ctrlib.schema import Categorical, MultiValued, Schema, Sequence

EDGES = [0, 1, -1, 7, 2**63 - 1, -(2**63), 2**31, -(2**31) - 1]
TEXTS = [
    "7",
    "-7",
    "07",
    "-0",
    "+7",
    "7.0",
    " 7",
    "",
    "x",
    "\u0667",
    str(2**63),
    str(-(2**63) - 1),
    *map(str, EDGES[1:]),
]
# Numbers of one bucket, however many buckets there are.
ALIKE = [n if n < 2**63 else n - 2**64 for n in (k * pow(int(FACTOR), -1, 2**64) % 2**64 for k in range(1, 40))]


@pytest.mark.parametrize(
    "numbers",
    [[], [7], [7, 8], EDGES, ALIKE, [*range(-500, 500)], np.random.default_rng(0).integers(0, 2**60, 30_000).tolist()],
    ids=["none", "one", "two", "edges", "one bucket", "a row", "many"],
)
def test_a_number_gets_the_id_of_its_text(numbers: list[int]) -> None:
    vocabularies = [dict.fromkeys(map(str, numbers)), dict.fromkeys(TEXTS), {}, dict.fromkeys(map(str, ALIKE[:10]))]
    known = [dict(zip(texts, range(3, 3 + len(texts)))) for texts in vocabularies]
    asked = np.array([*numbers, *EDGES, *ALIKE, *range(20)], np.int64)
    which = [1, 0, 3, 2, 0]
    found = WholeNumbers(known).look_up(np.stack([asked] * len(which)), which)
    assert found.tolist() == [[known[place].get(str(one), 2) for one in asked.tolist()] for place in which]


def encoder_of(fitted: str, padding: str | None = None) -> Encoder:
    features = (
        Categorical("a", num_embeddings=9),
        MultiValued("bag", max_length=3, num_embeddings=9, padding=padding),
        Categorical("b", num_embeddings=9),
        Sequence("history", vocabulary="a", max_length=3, num_embeddings=9, padding=padding),
    )
    names = ("a", "bag", "b", "history")
    schema = Schema(
        features,
        ("label",),
        vocabulary_hashes=dict.fromkeys(names[:3], ""),
        raw_format={"missing_values": ["", "5"], "types": dict.fromkeys(names, fitted)},
    )
    return Encoder(schema, {name: ["1", "-1", "5", "07", "x", "2"] for name in names[:3]})


NUMBER = st.one_of(st.integers(-3, 8), st.sampled_from([2**63 - 1, -(2**63)]))
LIST = st.lists(NUMBER, max_size=5)


@pytest.mark.parametrize(("fitted", "padding"), [("integer", None), ("parsed", "2"), ("integer", "07")])
@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(NUMBER, LIST, NUMBER, LIST), min_size=2, max_size=4))
def test_rows_of_whole_numbers_are_each_row_alone(fitted: str, padding: str | None, rows: list[Any]) -> None:
    encoder = encoder_of(fitted, padding)
    given = [dict(zip(("a", "bag", "b", "history"), row)) for row in rows]
    columns, counts = encoder.transform(given)
    alone = [encoder.transform(row) for row in given]
    assert_same(columns, type(columns).concatenate([one for one, _ in alone]), encoder.schema)
    for name in ("a", "bag", "b", "history"):
        for what in ("ids", "unseen", "missing", "empty"):
            assert getattr(counts, what).get(name, 0) == sum(getattr(one, what).get(name, 0) for _, one in alone)
        examples = dict.fromkeys(text for _, one in alone for text in one.examples.get(name, []))
        assert counts.examples.get(name, []) == list(examples)[:10]


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt16, pl.Int64, pl.UInt64, pl.Int128, pl.Float64])
@pytest.mark.parametrize("null", [False, True])
def test_frames_are_their_rows_whatever_holds_the_numbers(dtype: Any, null: bool) -> None:
    encoder = encoder_of("integer").only(["a", "b"])
    cells: list[int | None] = [1, 5, 2, 9, None if null else 3]
    frame = pl.DataFrame({"b": pl.Series(cells, dtype=dtype), "a": pl.Series(cells[::-1], dtype=dtype)})
    many = pl.concat([frame] * (FEW_NUMBERS // 10 + 1))  # column by column, each distinct value once
    expected = encoder.transform(frame.to_dicts())
    found = encoder.transform(frame)
    assert_same(found[0], expected[0], encoder.schema)
    assert found[1] == expected[1]
    assert_same(encoder.transform(many)[0].take(np.arange(5)), expected[0], encoder.schema)


def test_parts_are_kept_and_are_not_mixed_up() -> None:
    encoder = encoder_of("integer")
    assert encoder.only(["a"]) is encoder.only(("a",)) is not encoder.only(["b"])
    assert encoder.only(["a", "b"]).only(["b"]).single_names == ["b"]
    for place in range(100):
        encoder.only(["a", f"unknown {place}"])
    assert len(encoder._parts) <= 32
