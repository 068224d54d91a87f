"""Preparation of a table in many pieces gives, bit for bit, what one piece gives; no Spark is needed to see that."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from every_kind import EVERY_KIND, every_kind
from plans import Plans

from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.infer import infer_features
from ctrlib.data.moments import moments
from ctrlib.data.prepare import prepare
from ctrlib.data.raw import read_raw
from ctrlib.data.scan import DataError
from ctrlib.data.table import RawTable
from ctrlib.data.vocabulary import hash_values
from ctrlib.data.workers import ThisMachine
from ctrlib.manifest import write_manifest
from ctrlib.schema import Categorical, MultiValued, Numeric, Schema, SchemaError

X = {"x": pl.col("x")}


def pieces(values: Any, ends: list[int]) -> RawTable:
    frame = pl.DataFrame({"x": values}, schema={"x": pl.Float64}, strict=False)
    parts = [frame[start:end].lazy() for start, end in zip([0, *ends], [*ends, len(frame)])]
    return RawTable(tuple(parts), "test")


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e9, 1e37])
def test_moments_do_not_depend_on_order_or_pieces(scale):
    rng = np.random.default_rng(0)
    x = rng.lognormal(0, 3, 5000) * scale * rng.choice([-1, 1], 5000)
    expected = moments(pieces(x, []), X)["x"]
    for ends in ([1], [17, 17, 4999], [2500, 5000]):
        assert moments(pieces(rng.permutation(x), ends), X)["x"] == expected
    mean = sum(map(Fraction, x.tolist())) / len(x)
    sd = math.sqrt(sum((Fraction(value) - mean) ** 2 for value in x.tolist()) / len(x))
    assert expected.mean == pytest.approx(float(mean), rel=1e-10, abs=2**-46 * (x.max() - x.min()))
    assert expected.sd == pytest.approx(sd, rel=1e-10)
    assert (expected.low, expected.high) == (x.min(), x.max())
    # An ordinary sum of floats would not do.
    assert len({rng.permutation(x).sum() for _ in range(50)}) > 1


def test_moments_of_whole_numbers_are_exact():
    x = np.random.default_rng(0).integers(978_000_000, 1_046_000_000, 10_000)  # seconds
    found = moments(pieces(x, [3000]), X)["x"]
    assert found.mean == float(Fraction(int(x.sum()), len(x)))
    assert moments(pieces([2.0**60, 2.0**60 + 2**20], []), X)["x"] == (
        2.0**60 + 2**19,
        2.0**19,
        2.0**60,
        2.0**60 + 2**20,
    )


def test_moments_of_columns_without_spread_or_numbers():
    assert moments(pieces([0.1, None, 0.1], [1]), X)["x"] == (0.1, 0.0, 0.1, 0.1)
    assert moments(pieces([None, None], [1]), X)["x"] == (0.0, 0.0, 0.0, 0.0)
    assert moments(pieces([5e-324, 0.0], []), X)["x"][:2] == pytest.approx((0.0, 0.0), abs=5e-324)


ROADS = {"coded": ThisMachine, "whole": Plans, "41": partial(Plans, 41), "200": partial(Plans, 200)}


def prepared(data: Any, out: Path, road: str, monkeypatch: Any, **options: Any) -> Schema:
    monkeypatch.setattr("ctrlib.data.prepare.ThisMachine", ROADS[road])
    return prepare(data, out, log=None, overwrite=True, **options)


@pytest.mark.parametrize("options", EVERY_KIND.values(), ids=EVERY_KIND)
def test_prepared_folders_do_not_depend_on_the_road(tmp_path, monkeypatch, options):
    path = every_kind(tmp_path, num_rows=300)
    monkeypatch.setattr("ctrlib.data.coded.BLOCK_BYTES", 7000)
    monkeypatch.setattr("ctrlib.data.coded._FEWEST_BYTES", 7000)
    monkeypatch.setattr("ctrlib.data.coded.BLOCK_ROWS", 137)
    monkeypatch.setattr("ctrlib.data.codes._FEWEST", 100)
    for road in ROADS:
        prepared(path, tmp_path / road, road, monkeypatch, **options)
    whole = fingerprint(tmp_path / "whole")
    assert set(whole) >= {"schema", "vocab/item", "vocab/tags", "train", "test"}
    for road in ROADS:
        assert fingerprint(tmp_path / road) == whole, road
        assert (tmp_path / road / "report.json").read_text() == (tmp_path / "whole" / "report.json").read_text(), road


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({400: "1,s1,i1,dear,,a,1,2"}, {}),
        ({17: "1,s1,i1,1,,a,1,2", 350: "2,s1,i1,1,,a,1,2", 351: "3,s1,i1,1,,a,1,2"}, {}),
        ({420: "1,s1,i1,1,,a,1,noon"}, {"split_by": "time"}),
        ({}, {"split_by": "item"}),
        ({}, {"features": [Numeric("item")]}),
    ],
)
def test_errors_do_not_depend_on_pieces(tmp_path, monkeypatch, change, options):
    lines = ["label,shop,item,price,weight,tags,user,time"] + [
        f"{i % 2},s,i{i % 9},{i},,a|b,{i},{i}" for i in range(500)
    ]
    for row, line in change.items():
        lines[row] = line
    (tmp_path / "raw.csv").write_text("\n".join(lines))
    options = {"features": [Categorical("item"), Numeric("price")], **options}
    messages = []
    monkeypatch.setattr("ctrlib.data.coded.BLOCK_BYTES", 7000)
    monkeypatch.setattr("ctrlib.data.coded._FEWEST_BYTES", 7000)
    for road in ("coded", "whole", "41"):
        with pytest.raises((DataError, SchemaError)) as error:
            prepared(tmp_path / "raw.csv", tmp_path / "out", road, monkeypatch, **options)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1] == messages[2]


def test_guesses_do_not_depend_on_pieces(monkeypatch):
    monkeypatch.setattr("ctrlib.data.infer.SAMPLE_ROWS", 300)
    rng = np.random.default_rng(0)
    n = 3001
    frame = pl.DataFrame(
        {
            "nearly_same": ["a"] * (n - 1) + ["b"],
            "same": [3] * n,
            "none": pl.Series([None] * n, dtype=pl.String),
            "nearly_none": pl.Series([None] * (n - 1) + ["x"], dtype=pl.String),
            "unique": [f"u{i}" for i in range(n)],
            # Unique in every tenth row only.
            "half": [f"h{i if i % 10 == 0 else i % 500}" for i in range(n)],
            "number": rng.normal(size=n),
            "tags": [["a", "b"]] * n,
        }
    )
    whole = infer_features(RawTable((frame.lazy(),), "test"))
    expected = {guess.name: type(guess.feature) for guess in whole}
    nothing = type(None)
    assert expected == {
        "nearly_same": Categorical,
        "same": nothing,
        "none": nothing,
        "nearly_none": Categorical,
        "unique": nothing,
        "half": Categorical,
        "number": Numeric,
        "tags": MultiValued,
    }
    for size in (7, 1000, 2999):
        parts = tuple(frame[start : start + size].lazy() for start in range(0, n, size))
        assert infer_features(RawTable(parts, "test")) == whole


def test_pieces_of_files_are_numbered_through(tmp_path):
    sizes = [5, 1, 9, 3]
    for number, size in enumerate(sizes):
        first = sum(sizes[:number])
        pl.DataFrame({"x": range(first, first + size)}).write_parquet(tmp_path / f"{number}.parquet", row_group_size=2)
    for piece_rows in (1, 2, 4, 18, 100):
        table = read_raw(tmp_path, tmp_path / "t", piece_rows=piece_rows)
        rows = [piece.collect() for piece in table.pieces]
        assert [len(piece) for piece in rows[:-1]] == [piece_rows] * (len(rows) - 1)
        assert pl.concat(rows).select("x", "__row__").rows() == [(i, i) for i in range(18)]


def test_hash_of_values_does_not_depend_on_slices(monkeypatch):
    values = pl.Series([f"é{i}" for i in range(10)])
    expected = hash_values(values)
    for size in (1, 3, 10):
        monkeypatch.setattr("ctrlib.data.vocabulary._SLICE", size)
        assert hash_values(values) == expected
    assert hash_values(values[:0]) == hash_values(pl.Series([], dtype=pl.String)) != expected


@pytest.mark.parametrize(
    "values",
    [
        ["a", "b"],
        ["é", "\U0001f600", "\x7f", "\u2028", "/"],
        ['"', "a"],
        ["\\"],
        ["a\tb"],
        ["\x00"],
        ["\x1f", "x"],
        [""],
        [],
    ],
    ids=ascii,
)
def test_hash_of_values_is_that_of_their_json(values):
    """Saved schemas hold it, so it must never change."""
    expected = hashlib.sha256(json.dumps(values, ensure_ascii=False).encode()).hexdigest()[:16]
    assert hash_values(pl.Series(values, dtype=pl.String)) == expected


def test_vocabularies_of_one_value_or_none(tmp_path):
    frame = pl.DataFrame(
        {"one": ["a", None, "a"], "none": [None] * 3, "label": [0, 1, 1]}, schema_overrides={"none": str}
    )
    prepare(
        {"train": frame, "test": frame.with_columns(none=pl.lit("z"), one=pl.lit("b"))},
        tmp_path / "p",
        features=[Categorical("one"), Categorical("none")],
        log=None,
    )
    assert pl.read_parquet(tmp_path / "p" / "train")["one"].to_list() == [3, 1, 3]
    assert pl.read_parquet(tmp_path / "p" / "train")["none"].to_list() == [1, 1, 1]
    assert pl.read_parquet(tmp_path / "p" / "test").select("one", "none").rows() == [(2, 2)] * 3


# --------------------------------------------------------------------------------------------------------- fingerprints


@pytest.fixture
def folder(tmp_path):
    frame = pl.DataFrame({"item": ["a", "b", "a"], "tags": ["x|y", "", "y"], "price": [1.0, 2, 4], "label": [0, 1, 1]})
    features = [Categorical("item"), MultiValued("tags"), Numeric("price")]
    prepare({"train": frame, "test": frame}, tmp_path / "p", features=features, group="item", log=None)
    return tmp_path / "p"


def test_a_fingerprint_does_not_see_files_and_row_groups(folder):
    before = fingerprint(folder)
    assert list(before) == ["schema", "vocab/item", "vocab/tags", "numbers/price", "groups", "train", "test"]
    path = folder / "train" / "part-00000.parquet"
    rows = pl.read_parquet(path)
    rows.head(2).write_parquet(path, row_group_size=1, compression="zstd")
    rows.tail(1).write_parquet(folder / "train" / "part-00001.parquet", use_pyarrow=True)
    write_manifest(folder)
    assert fingerprint(folder) == before


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("train", lambda rows: rows.reverse()),
        ("train", lambda rows: rows.head(2)),
        ("train", lambda rows: rows.with_columns(price=pl.col("price") * (1 + 2**-23))),
        ("train", lambda rows: rows.with_columns(tags=pl.Series([[3], [1], [3, 4]], dtype=pl.List(pl.Int32)))),
        ("vocab/item", lambda rows: rows.with_columns(count=pl.col("count") + 1)),
        ("vocab/item", lambda rows: rows.with_columns(value=pl.col("value") + " ")),
        ("numbers/price", lambda rows: rows.with_columns(count=pl.col("count") + 1)),
        ("groups", lambda rows: rows.with_columns(id=pl.col("id").cast(pl.Int32))),
    ],
)
def test_a_fingerprint_sees_every_other_change(folder, part, change):
    before = fingerprint(folder)
    path = folder / ("train/part-00000.parquet" if part == "train" else f"{part}.parquet")
    change(pl.read_parquet(path)).write_parquet(path)
    with pytest.raises(SchemaError, match=path.name):
        fingerprint(folder)
    write_manifest(folder)
    assert {name for name, digits in fingerprint(folder).items() if digits != before[name]} == {part}


def test_a_fingerprint_needs_a_whole_folder(folder):
    (folder / "vocab" / "tags.parquet").unlink()
    with pytest.raises(SchemaError, match=r"tags.parquet is missing"):
        fingerprint(folder)
