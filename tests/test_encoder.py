"""The encoder: one text for one value whatever its type, two roads with the same bits, and those of preparation."""

from __future__ import annotations

import datetime
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, WAYS, column_of, feature_of

import ctrlib as ctr
from ctrlib import models
from ctrlib.data import stream
from ctrlib.data.collate import collate
from ctrlib.data.columns import Columns, Ragged, decode, find_row_groups, offsets_of
from ctrlib.data.counts import Counts
from ctrlib.data.encoder import FEW_CELLS, Encoder
from ctrlib.data.quick import Careful, texts_of_column
from ctrlib.data.rows import frame_of
from ctrlib.data.scan import DataError
from ctrlib.data.stream import blocks
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.data.table import RawTable, clean, numbered
from ctrlib.models import MODELS
from ctrlib.schema import (
    MISSING_ID,
    NUM_RESERVED_IDS,
    Categorical,
    Feature,
    MultiValued,
    Numeric,
    Schema,
    SchemaError,
    Sequence,
)
from ctrlib.serving.direct import Rows, direct
from ctrlib.testing import example_schema


@dataclass(frozen=True)
class Prepared:
    """All types as columns of one table, train and valid alike, and what every road makes of them."""

    way: str
    folder: Path
    schema: Schema
    found: list[Columns]


@pytest.fixture(scope="module", params=WAYS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    way = request.param
    columns = {name: column_of(way, values) for name, (values, _) in KINDS.items()}
    frame = pl.DataFrame(columns).with_columns(label=pl.Series([0, 1, 1]))
    folder = tmp_path_factory.mktemp("kinds") / "p"
    features = [feature_of(way, name) for name in KINDS]
    ctr.prepare({"train": frame, "valid": frame}, folder, features=features, labels="label", log=None)
    encoder = Encoder.load(folder)
    one_by_one = Columns.concatenate([encoder.transform(row)[0] for row in frame.to_dicts()])
    many = pl.concat([frame] * (FEW_CELLS // len(KINDS)))  # too many to go cell by cell
    roads = [encoder.transform(rows)[0] for rows in (frame, frame.to_dicts(), frame.to_arrow(), many)]
    return Prepared(way, folder, encoder.schema, [one_by_one, *roads])


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_for_one_value(prepared: Prepared, kind: str) -> None:
    texts = KINDS[kind][1]
    known = pl.read_parquet(prepared.folder / "vocab" / f"{kind}.parquet")["value"].to_list()
    assert set(known) == set(texts)
    expected = [[known.index(text) + NUM_RESERVED_IDS] for text in texts] or [[MISSING_ID]] * 3
    for split in ("train", "valid"):
        found = pl.read_parquet(prepared.folder / split / "*.parquet")[kind].to_list()
        assert [ids if isinstance(ids, list) else [ids] for ids in found] == expected
    for columns in prepared.found:
        assert ids_of(columns, prepared.schema, kind)[:3] == expected


def ids_of(columns: Columns, schema: Schema, name: str) -> list[list[int]]:
    if name in columns.ragged:
        ragged = columns.ragged[name]
        return [part.tolist() for part in np.split(ragged.values, ragged.offsets[1:-1])]
    single = [feature.name for feature in schema.sparse if feature.name not in columns.ragged]
    return columns.ids[:, single.index(name)].reshape(-1, 1).tolist()


# ------------------------------------------------------------------------------------------------------ the two roads

FEATURES: tuple[Feature, ...] = (
    Categorical("id", num_embeddings=9),
    Categorical("bucket", bucket="log_squared", num_embeddings=9),
    MultiValued("bag", max_length=2, num_embeddings=9),
    Sequence("history", vocabulary="id", max_length=2, num_embeddings=9),
    MultiValued("padded bag", separator=",", vocabulary="id", max_length=3, padding="1", num_embeddings=9),
    Sequence("padded", separator=" ", vocabulary="id", max_length=3, padding="1", num_embeddings=9),
    Sequence("dense", vocabulary="id", padding="", num_embeddings=9),
    *(
        Numeric(transform, transform, {"fill": 0.25, "mean": 0.5, "sd": 3.0, "min": -1.0, "max": 5.0})
        for transform in ("none", "log", "log_standard", "log_squared", "minmax", "standard")
    ),
)
VALUES = ["a", "b", "1", "-1", "true", "2"]
NAMES = [feature.name for feature in FEATURES]
LISTS = [feature.name for feature in FEATURES if isinstance(feature, MultiValued | Sequence)]
NUMERIC = [feature.name for feature in FEATURES if isinstance(feature, Numeric)]


def encoder_for(kind: str) -> Encoder:
    """Fitted on columns of that kind."""
    types = dict.fromkeys(("id", "bucket", *LISTS), kind)
    raw_format = {"missing_values": ["", "NA"], "types": types}
    hashes = dict.fromkeys(("id", "bucket", "bag"), "")
    schema = Schema(FEATURES, ("label",), vocabulary_hashes=hashes, raw_format=raw_format)
    return Encoder(schema, dict.fromkeys(("id", "bucket", "bag"), VALUES))


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(), st.integers(-5, 5), st.sampled_from([1e30, -1e39, 0.1, 2.0, 2.5])
)
ODD = ["nan", "NA", "inf", "-Infinity", "1e3", "+5", "5.", ".5", "1_000", "0x1", "\u0661", "1.0", "1e400", "true"]
WORDS = st.one_of(st.text("ab1-|. \t\x85\u2003\x1cNé", max_size=5), st.sampled_from(ODD), st.floats().map(str))
EVENTS = st.one_of(st.sampled_from(["", " ", "a", "b", "1", " 1", "0", "NA", "[", "]"]), WORDS)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.integers(-3, 3), EVENTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(EVENTS, inner, max_size=1),
    max_leaves=5,
)
IN_TEXT = st.one_of(
    WORDS,
    st.builds(str.join, st.sampled_from("|, "), st.lists(EVENTS, max_size=5)),
    st.lists(JSON, max_size=4).map(json.dumps),
    st.text('[]",1a \t|\\ud8', max_size=8).map(lambda inside: f"[{inside}]"),
)
CELLS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "text": {
        "id": WORDS,
        "bucket": WORDS,
        **dict.fromkeys(LISTS, st.one_of(IN_TEXT, st.lists(st.one_of(st.none(), EVENTS), max_size=5))),
        **dict.fromkeys(NUMERIC, WORDS),
    },
    "integer": {
        "id": st.integers(-3, 3),
        "bucket": NUMBERS.filter(lambda x: abs(x) < 1e9),
        **dict.fromkeys(LISTS, st.lists(st.one_of(st.none(), st.integers(-3, 3)), max_size=4)),
        **dict.fromkeys(NUMERIC, NUMBERS),
    },
}


@pytest.mark.parametrize("kind", CELLS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_roads_agree_cell_by_cell(kind: str, data: st.DataObject) -> None:
    """Either both give the same bits, or the quick one leaves the cell to the other, or both refuse it."""
    encoder = encoder_for("parsed" if kind == "text" else kind)
    name = data.draw(st.sampled_from(NAMES), "feature")
    row = {**dict.fromkeys(NAMES), name: data.draw(st.one_of(st.none(), CELLS[kind][name]), "cell")}
    try:
        quick, counts = encoder._quick({key: [item] for key, item in row.items()}, NAMES)
    except Careful:
        return
    raw = RawTable((numbered(clean(frame_of([row], "rows").lazy(), encoder._missing)),), "rows")
    careful, counts_too = encoder.transform_table(raw)
    assert_same(quick, careful, encoder.schema)
    assert counts == counts_too


@pytest.mark.parametrize("kind", CELLS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_column_is_its_cells(kind: str, data: st.DataObject) -> None:
    """The quick road reads a column of several cells as it reads each of them alone, or leaves them all."""
    encoder = encoder_for("parsed" if kind == "text" else kind)
    name = data.draw(st.sampled_from(NAMES), "feature")
    cells = data.draw(st.lists(st.one_of(st.none(), CELLS[kind][name]), min_size=2, max_size=4), "cells")
    others: dict[str, list[Any]] = {other: [None] for other in NAMES}
    try:
        alone = [encoder._quick({**others, name: [cell]}, NAMES) for cell in cells]
    except Careful:
        with pytest.raises(Careful):
            encoder._quick({**{other: [None] * len(cells) for other in NAMES}, name: cells}, NAMES)
        return
    column, counts = encoder._quick({**{other: [None] * len(cells) for other in NAMES}, name: cells}, NAMES)
    assert_same(column, Columns.concatenate([one for one, _ in alone]), encoder.schema)
    added = Counts()
    for _, count in alone:
        added.add(count)
    assert counts == added


@pytest.mark.parametrize(
    ("fitted", "cells", "expected"),
    [
        ("text", ["a", " b\t", "NA", "", "1"], ["a", "b", None, None, "1"]),
        ("text", ["a", None], ["a", None]),
        ("integer", [3, -1, 2**70], ["3", "-1", str(2**70)]),
        ("integer", [3, 4.0, None, float("nan")], ["3", "4", None, None]),
        ("boolean", [True, False], ["true", "false"]),
        ("parsed", [1, "1", True], ["1", "1", "true"]),
        ("integer", ["NA", " "], [None, None]),  # missing tokens are missing, whatever the column's kind
        ("text", [1, 2], None),
        ("integer", ["1", "2"], None),
        ("integer", [True, False], None),
        ("boolean", [1, 0], None),
    ],
)
def test_columns_of_one_type_and_of_several(fitted: str, cells: list[Any], expected: list[str | None] | None) -> None:
    texts_of = texts_of_column(Categorical("x"), fitted, frozenset({"", "NA"}))
    for part in (cells, cells[:1]):
        if expected is None:
            with pytest.raises(Careful):
                texts_of(part)
        else:
            assert texts_of(part) == expected[: len(part)]


def assert_same(a: Columns, b: Columns, schema: Schema) -> None:
    """To the bit."""
    assert a.ids.dtype == b.ids.dtype
    assert np.array_equal(a.ids, b.ids)
    assert a.ragged.keys() == b.ragged.keys()
    for name in a.ragged:
        assert np.array_equal(a.ragged[name].values, b.ragged[name].values)
        assert np.array_equal(a.ragged[name].offsets, b.ragged[name].offsets)
    count = len(schema.dense)
    numbers = [np.ascontiguousarray(columns.floats[:, :count]).view(np.int32) for columns in (a, b)]
    assert np.array_equal(*numbers), (a.floats, b.floats)


# -------------------------------------------------------------------------------------------------- as preparation does


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, Path]:
    """Rows with every kind of column, missing cells too, prepared as train and as valid."""
    teacher = Teacher(2_000, cardinalities=(400, 50, 10), num_numeric=5, max_history=4, missing_rate=0.1, seed=3)
    frame, _ = generate(teacher)
    frame = frame.with_columns(day=pl.lit(datetime.date(2024, 1, 1)) + pl.duration(days=pl.int_range(pl.len()) % 9))
    transforms = ("log", "log_standard", "log_squared", "minmax", "standard")
    features = [Numeric(f"I{n}", transform) for n, transform in enumerate(transforms, start=1)]
    folder = tmp_path_factory.mktemp("teacher") / "p"
    features.append(Sequence("history", vocabulary="C1", max_length=3))  # type: ignore[arg-type]
    ctr.prepare({"train": frame, "valid": frame}, folder, features=features, labels="label", log=None)
    return frame, folder


def test_all_roads_give_the_bits_of_the_prepared_folder(teacher: tuple[pl.DataFrame, Path], tmp_path: Path) -> None:
    frame, folder = teacher
    encoder = Encoder.load(folder)
    expected = decode(find_row_groups(folder, "valid", encoder.schema), encoder.schema)
    some = np.arange(0, 2_000, 7)
    shuffled = np.random.default_rng(0).permutation(2_000)
    for rows, order in (
        (frame, np.arange(2_000)),
        (frame[shuffled.tolist()].to_arrow(), shuffled),
        (frame.to_pandas(), np.arange(2_000)),
        (frame.select(reversed(frame.columns)).lazy(), np.arange(2_000)),
        (frame[some.tolist()].to_dicts(), some),
        (frame[5:8], np.arange(5, 8)),
    ):
        assert_same(encoder.transform(rows)[0], expected.take(order), encoder.schema)
    for row in some.tolist():
        assert_same(encoder.transform(frame.row(row, named=True))[0], expected.take(np.array([row])), encoder.schema)
    frame.write_csv(tmp_path / "rows.csv")
    (table,) = blocks(tmp_path / "rows.csv")
    assert_same(encoder.transform_table(table)[0], expected, encoder.schema)


def test_an_encoder_is_fitted_and_saved_as_preparation_does(teacher: tuple[pl.DataFrame, Path], tmp_path: Path) -> None:
    frame, folder = teacher
    schema = Schema.load(folder)
    unfitted = [
        replace(one, **({"parameters": None} if isinstance(one, Numeric) else {"num_embeddings": None}))  # type: ignore[arg-type]
        for one in schema.features
    ]
    fitted = ctr.Encoder.fit(frame, features=unfitted, labels="label")
    assert fitted.schema == schema
    fitted.save(tmp_path / "saved")
    # Counts of values and edges of numbers are there as well, so that newer data can be prepared like it.
    files = sorted(path.relative_to(folder) for part in ("vocab", "numbers") for path in (folder / part).iterdir())
    assert len(files) == len(schema.vocabularies) + len(schema.dense)
    for file in files:
        saved = pl.read_parquet(tmp_path / "saved" / file, glob=False)
        assert saved.equals(pl.read_parquet(folder / file, glob=False)), file
    again = ctr.Encoder.load(tmp_path / "saved")
    assert_same(again.transform(frame)[0], fitted.transform(frame)[0], schema)
    ctr.prepare({"train": frame}, tmp_path / "newer", like=tmp_path / "saved", log=None)
    assert Schema.load(tmp_path / "newer").hash == schema.hash
    with pytest.raises(FileExistsError, match="is not empty"):
        fitted.save(tmp_path / "saved")


def test_a_file_is_transformed_as_its_rows_are(
    teacher: tuple[pl.DataFrame, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, folder = teacher
    encoder = ctr.Encoder.load(folder)
    monkeypatch.setattr(stream, "BLOCK_ROWS", 300)
    frame.write_parquet(tmp_path / "rows.parquet")
    whole, counts = encoder.transform(frame)
    from_file, found = encoder.transform(tmp_path / "rows.parquet")
    assert_same(whole, from_file, encoder.schema)
    assert (found.rows, found.unseen, found.missing) == (counts.rows, counts.unseen, counts.missing)


def test_pandas_columns_of_any_kind(teacher: tuple[pl.DataFrame, Path]) -> None:
    frame, folder = teacher
    encoder = Encoder.load(folder)
    rows = frame.to_pandas()
    nullable = rows.convert_dtypes().astype({"C1": "category", "C2": "string"})
    assert_same(encoder.transform(nullable)[0], encoder.transform(frame)[0], encoder.schema)
    assert isinstance(nullable["C1"].dtype, pd.CategoricalDtype)


def test_threads_share_an_encoder(teacher: tuple[pl.DataFrame, Path]) -> None:
    frame, folder = teacher
    encoder = Encoder.load(folder)
    expected = encoder.transform(frame)[0]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda row: encoder.transform(row)[0], frame[:300].to_dicts()))
        wholes = list(pool.map(lambda _: encoder.transform(frame)[0], range(4)))
    assert_same(Columns.concatenate(parts), expected.take(np.arange(300)), encoder.schema)
    for whole in wholes:
        assert_same(whole, expected, encoder.schema)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"C1": "a"}, SchemaError, r"columns \['I1', .*are missing"),
        ([], DataError, "no rows"),
        ([{"C1": "a"}, 3], TypeError, "a row is a int"),
        (3, TypeError, "rows is a int, expected a dictionary"),
        ([{"C1": 1}, {"C1": "a"}], DataError, "column 'C1' holds cells of several types"),
        (pl.DataFrame({"C1": []}), DataError, "no rows"),
    ],
)
def test_rows_of_another_kind_are_refused(
    teacher: tuple[pl.DataFrame, Path], rows: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Encoder.load(teacher[1]).transform(rows)


def test_a_bad_cell_is_named(teacher: tuple[pl.DataFrame, Path]) -> None:
    frame, folder = teacher
    encoder = Encoder.load(folder)
    row = frame.row(0, named=True)
    with pytest.raises(DataError, match=r"row 1, column 'I1' holds inf; expected a finite number"):
        encoder.transform({**row, "I1": float("inf")})
    with pytest.raises(SchemaError, match="'C1' holds values of kind integer"):
        encoder.transform([{**row, "C1": 5}] * 2)


# ---------------------------------------------------------------------------------------------------- written otherwise

OTHERWISE: dict[str, tuple[list[Any], list[Any]]] = {
    "integers as floats": (["1", "2", "3"], ["1.0", "2.0", "3.0"]),
    "floats as integers": (["1.0", "2.0", "3.0"], ["1", "2", "3"]),
    "capitals": (["true", "false", "true"], ["True", "False", "True"]),
    "booleans as numbers": (["true", "false", "true"], ["1", "0", "1"]),
    "leading zeros": (["7", "8", "9"], ["007", "008", "009"]),
    "upper case": (["de", "fr", "at"], ["DE", "FR", "AT"]),
}


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("name", OTHERWISE)
def test_a_column_written_otherwise_is_refused(tmp_path: Path, way: str, name: str) -> None:
    """However few its rows are, and wherever it comes: in valid, and at prediction."""
    train, other = (column_of(way, pl.Series("x", cells)) for cells in OTHERWISE[name])
    label = pl.Series("label", [0, 1, 1])
    frames = [pl.DataFrame([column.alias("x"), label]) for column in (train, other)]
    options: dict[str, Any] = {"features": [feature_of(way, "x")], "labels": "label", "log": None}
    with pytest.raises(SchemaError, match=r"column 'x' holds .*(train knew none|look like floats).*write the column"):
        ctr.prepare({"train": frames[0], "valid": frames[1]}, tmp_path / "a", **options)
    schema = ctr.prepare({"train": frames[0], "valid": frames[0]}, tmp_path / "b", **options)
    config = {"model": "mlp", "embedding_dim": 4, "hidden": [4]}
    predictor = ctr.Predictor(ctr.models.build(config, schema).eval(), schema, tmp_path / "b")
    for rows in (frames[1].drop("label"), frames[1].drop("label")[:1].to_dicts()):
        with pytest.raises(SchemaError, match="write the column as in training"):
            predictor.predict(rows)
    assert predictor.predict(frames[0].drop("label"))[1]["remarks"] == []


def test_what_is_merely_new_is_remarked_on(tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": [f"v{n % 5}" for n in range(40)], "label": [0, 1] * 20})
    new = frame.with_columns(x=pl.format("new{}", pl.int_range(pl.len())))
    said: list[str] = []
    ctr.prepare(
        {"train": frame, "valid": new},
        tmp_path / "p",
        features=[Categorical("x")],
        labels="label",
        log=lambda line: said.append(str(line)),
    )
    assert any("'x' holds 40 values and train knew none of them" in line for line in said)


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        (pl.Datetime("ns"), pl.Datetime("ms")),
        (pl.Datetime("us"), pl.Date()),
        (pl.Int64(), pl.Decimal(18, 2)),
        (pl.Int32(), pl.Float64()),
        (pl.Categorical(), pl.String()),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", WAYS[:3])
def test_types_that_lose_nothing_may_differ_between_splits(
    tmp_path: Path, way: str, train: pl.DataType, valid: pl.DataType
) -> None:
    cells = pl.Series("x", [datetime.datetime(2024, 3, day) for day in (1, 2, 3)]) if train.is_temporal() else None
    cells = pl.Series("x", ["a", "b", "c"] if valid == pl.String else [1, 2, 3]) if cells is None else cells
    frames = {
        split: pl.DataFrame([column_of(way, cells.cast(dtype)).alias("x"), pl.Series("label", [0, 1, 1])])
        for split, dtype in (("train", train), ("valid", valid))
    }
    ctr.prepare(frames, tmp_path / "p", features=[feature_of(way, "x")], labels="label", log=None)
    train_ids, valid_ids = (pl.read_parquet(tmp_path / "p" / split / "*.parquet")["x"].to_list() for split in frames)
    assert train_ids == valid_ids


def test_times_with_a_zone_are_not_those_without(tmp_path: Path) -> None:
    times = pl.Series("x", [datetime.datetime(2024, 3, day) for day in (1, 2, 3)])
    frames = {
        split: pl.DataFrame([column, pl.Series("label", [0, 1, 1])])
        for split, column in (("train", times), ("valid", times.dt.replace_time_zone("UTC")))
    }
    with pytest.raises(SchemaError, match="'x' holds values of kind zoned time"):
        ctr.prepare(frames, tmp_path / "p", features=[Categorical("x")], labels="label", log=None)


# ------------------------------------------------------------------------------------------------ scoring without files


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stacked", [0, 2])
def test_direct_look_ups_are_those_of_the_model(name: str, stacked: int) -> None:
    schema = example_schema(num_tasks=2)
    config = {"model": name, "embedding_dim": 8, "stacked": stacked}
    config |= {"head_dim": 4} if name.startswith("autoint") else {}
    torch.manual_seed(0)
    model = models.build(config, schema).eval()
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, f.num_embeddings, 9) for f in schema.sparse if isinstance(f, Categorical)]
    ragged = {}
    for feature in schema.sparse:
        if not isinstance(feature, Categorical):
            lengths = rng.integers(0, 4, 9)
            values = rng.integers(1, feature.num_embeddings, lengths.sum())
            ragged[feature.name] = Ragged(values.astype(np.int32), offsets_of(lengths))
    floats = rng.normal(size=(9, len(schema.dense) + 2 + (schema.weight is not None))).astype(np.float32)
    columns = Columns(np.stack(ids, 1).astype(np.int32), ragged, floats, None)
    with torch.no_grad():
        expected = model(collate(columns, schema, 9))
        quick = direct(model, schema)
        # The order in which first-order weights are added up may differ.
        torch.testing.assert_close(quick(Rows(columns, schema)), expected, rtol=0, atol=1e-6)
        assert torch.equal(model(collate(columns, schema, 9)), expected)
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert {p.untyped_storage().data_ptr() for p in quick.parameters()} <= shared


def test_a_file_is_scored_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame, _ = generate(Teacher(700, cardinalities=(40, 9), num_numeric=1, seed=3))
    ctr.prepare(frame, tmp_path / "p", labels="label", log=None)
    schema = ctr.Schema.load(tmp_path / "p")
    config = {"model": "deepfm", "embedding_dim": 4, "hidden": [8]}
    model = models.build(config, schema)
    ctr.save_model(model, config, tmp_path / "p", tmp_path / "m")
    predictor = ctr.Predictor.load(str(tmp_path / "m"))
    expected, counts = predictor.predict(frame)
    monkeypatch.setattr(stream, "BLOCK_ROWS", 64)
    rows = frame.with_columns(row=pl.int_range(pl.len()))
    rows.write_parquet(tmp_path / "rows.parquet")
    rows.write_csv(tmp_path / "rows.csv")
    for source in ("rows.parquet", "rows.csv"):
        for target in ("out.parquet", "out.csv"):
            seen: list[int] = []
            found = predictor.predict_to(
                tmp_path / source, tmp_path / target, keep=["row"], progress=seen.append, overwrite=True
            )
            read = (pl.read_parquet if target == "out.parquet" else pl.read_csv)(tmp_path / target)
            assert read["row"].cast(pl.Int64).to_list() == list(range(700))  # cells of a text file are kept as text
            np.testing.assert_allclose(read["label"], expected["label"], rtol=0, atol=1e-6)
            assert seen == sorted(seen)
            assert seen[-1] == 700
            assert {**found, "ignored": []} == {**counts, "ignored": []}
            assert found["ignored"] == ["row"]
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []
    with pytest.raises(SchemaError, match=r"no columns \['rwo'\] to keep; the closest are row"):
        predictor.predict_to(tmp_path / "rows.csv", tmp_path / "new.csv", keep=["rwo"])
    with pytest.raises(ValueError, match=r"columns \['label'\] cannot be kept"):
        predictor.predict_to(tmp_path / "rows.csv", tmp_path / "new.csv", keep=["label"])
    # A model that has scored, whose tables are views by then, is saved as before.
    ctr.save_model(predictor.model, config, tmp_path / "p", tmp_path / "again")
    assert ctr.Predictor.load(tmp_path / "again").predict(frame)[0].equals(expected)


def test_a_score_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    frame = pl.DataFrame({"age": [float(n % 50) for n in range(100)], "label": [0, 1] * 50})
    schema = ctr.prepare({"train": frame}, tmp_path / "p", features=[Numeric("age")], labels="label", log=None)
    model = models.build({"model": "dcnv2", "embedding_dim": 4, "hidden": [8], "num_cross_layers": 4}, schema)
    predictor = ctr.Predictor(model.eval(), schema, tmp_path / "p")
    with pytest.raises(DataError, match=r"row 2: the model gives .* is one of them far outside"):
        predictor.predict([{"age": 1.0}, {"age": 1e30}])


def test_buckets_at_the_ends_of_64_bits_agree_on_both_roads() -> None:
    ends = ["-9223372036854775808", "-9.223372036854778e+18", "-9.3e18", "1e30", "2", "5"]
    frame = pl.DataFrame({"x": ends * 2, "label": [0, 1] * 6})
    encoder = Encoder.fit(frame, labels="label", features=[Categorical("x", bucket="log_squared")])
    assert encoder.known["x"].keys() == {"-9223372036854775808", "4771", "2"}
    for text, bucket in zip(ends, ["-9223372036854775808", None, None, "4771", "2", "2"]):
        expected = MISSING_ID if bucket is None else encoder.known["x"][bucket]
        assert encoder.transform([{"x": text}])[0].ids.tolist() == [[expected]]
        column = pl.DataFrame({"x": [text] * 20_000})
        assert encoder.transform(column)[0].ids[-1].tolist() == [expected]


def test_a_single_column_may_lack_its_separator_only_in_text(tmp_path: Path) -> None:
    encoder = Encoder.fit(pl.DataFrame({"a": ["x", "y"], "b": ["u", "v"], "label": [0, 1]}), labels="label")
    (tmp_path / "rows.csv").write_text("a;b\nx;u\n")
    with pytest.raises(SchemaError, match=r"there is only one, so the separator is probably another"):
        encoder.transform(tmp_path / "rows.csv")
    for rows in ([{"a": "x"}], pl.DataFrame({"a": ["x"]})):
        with pytest.raises(SchemaError, match=r"columns \['b'\] are missing, it has \['a'\]: name columns"):
            encoder.transform(rows)
