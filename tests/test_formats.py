"""What users bring: files of every usual format, packed or in parts, lists of files, and times in all their forms."""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import json
import lzma
import math
import os
import pickle
import re
import threading
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.data import jsonlines, stream
from ctrlib.data.infer import HOURS, infer_features
from ctrlib.data.raw import read_raw
from ctrlib.data.scan import DataError
from ctrlib.data.split import _quantile
from ctrlib.data.table import RawTable, of_arrow
from ctrlib.schema import Categorical, MultiValued, Numeric, RawId, SchemaError

N = 60
FEATURES = [Categorical("item"), Categorical("user"), Numeric("price"), MultiValued("tags"), Categorical("member")]
FLAT = [FEATURES[0], FEATURES[1], FEATURES[2]]
CONFIG: dict[str, Any] = {"model": "fm", "embedding_dim": 4}


def rows(number: int = N) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item": [None if i == 5 else f"i{i % 7}" for i in range(number)],
            "user": [None if i == 3 else i % 11 for i in range(number)],
            "price": [None if i == 4 else i / 4 for i in range(number)],
            "tags": [[i % 3, i % 5][: i % 3] for i in range(number)],
            "member": [i % 2 == 0 for i in range(number)],
            "label": [i % 2 for i in range(number)],
        }
    )


def flat() -> pl.DataFrame:
    return rows().drop("tags", "member")


def prints(data: Any, folder: Path, **options: Any) -> dict[str, str]:
    """Fingerprints of what is prepared: equal where schema, vocabularies and rows are, bit for bit."""
    options = {"features": FEATURES, "labels": "label", "log": None, "overwrite": True, **options}
    ctr.prepare({"train": data}, folder / "out", **options)
    return ctr.fingerprint(folder / "out")


def packed(path: Path, content: bytes, how: str) -> Path:
    """A file with this content, packed."""
    path = path.with_name(path.name + how)
    if how in (".zst", ".lz4"):
        with pa.CompressedOutputStream(str(path), {".zst": "zstd", ".lz4": "lz4"}[how]) as file:
            file.write(content)
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[how].compress(content))
    return path


def json_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctr.Predictor:
    folder = tmp_path_factory.mktemp("model")
    schema = ctr.prepare({"train": rows()}, folder / "p", features=FEATURES, labels="label", log=None)
    ctr.save_model(models.build(CONFIG, schema), CONFIG, folder / "p", folder / "m")
    return ctr.Predictor.load(folder / "m")


def scores(predictor: ctr.Predictor, data: Any, **options: Any) -> np.ndarray:
    return predictor.predict(data, **options)[0]["label"].to_numpy()


# ------------------------------------------------------------------------------------------- one table, many formats


def written(folder: Path, kind: str) -> Path | list[Path]:
    """The rows in a file (or files) of this kind."""
    frame = rows()
    if kind.startswith("jsonl"):
        frame.write_ndjson(folder / "a.jsonl")
        how = kind.removeprefix("jsonl")
        return packed(folder / "a.jsonl", (folder / "a.jsonl").read_bytes(), how) if how else folder / "a.jsonl"
    if kind == "json":  # often JSON lines, by its content
        frame.write_ndjson(folder / "a.json")
        return folder / "a.json"
    if kind == "no name":
        frame.write_ndjson(folder / "rows")
        return folder / "rows"
    if kind == "arrow":
        frame.write_ipc(folder / "a.arrow", compression="zstd", record_batch_size=7)
        return folder / "a.arrow"
    if kind == "feather":
        with pa.OSFile(str(folder / "a.feather"), "wb") as file:
            table = frame.with_columns(pl.col("item").cast(pl.Categorical)).to_arrow()
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        return folder / "a.feather"
    folder = folder / "parts"
    folder.mkdir()
    if kind == "parquet without name":
        frame.write_parquet(folder / "rows")
        return folder / "rows"
    frame[:25].write_parquet(folder / "part-0.parquet")
    frame[25:].write_parquet(folder / "part-1.parquet")
    for name in ("_SUCCESS", ".part-0.parquet.crc", "._part-0.parquet", "_tmp.parquet", "README.md"):
        (folder / name).write_bytes(b"no parquet")
    return sorted(folder.glob("part-*")) if kind == "list" else folder


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "no name", "arrow", "feather", "parts", "parquet without name"]


@pytest.mark.parametrize("kind", [*KINDS, "list"])
def test_a_table_is_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    assert prints(written(tmp_path, kind), tmp_path) == prints(rows(), tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv"])
def test_missing_columns_are_named_beside_those_that_are_there(tmp_path: Path, model: ctr.Predictor, name: str) -> None:
    frame = pl.DataFrame({"itm": ["a"], "usr": [1]})
    {"a.parquet": frame.write_parquet, "a.arrow": frame.write_ipc, "a.csv": frame.write_csv}[name](tmp_path / name)
    with pytest.raises(SchemaError, match=r"columns \['item', .*\] are missing, it has \['itm', 'usr'\]: name columns"):
        model.predict(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_is_scored(
    tmp_path: Path, model: ctr.Predictor, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 16)
    monkeypatch.setattr(jsonlines, "BLOCK_BYTES", 700)
    path = written(tmp_path, kind)
    np.testing.assert_allclose(scores(model, path), scores(model, rows()), rtol=0, atol=1e-6)
    found, expected = model.evaluate(path), model.evaluate(rows())
    assert found["auc"] == pytest.approx(expected["auc"])
    assert found["rows"] == N
    model.predict_to(path, tmp_path / "out.parquet", keep=["user"])
    assert pl.read_parquet(tmp_path / "out.parquet")["user"].to_list() == rows()["user"].to_list()


def test_frames_of_other_libraries(tmp_path: Path) -> None:
    import pandas as pd

    expected = prints(rows(), tmp_path)
    frame = rows().to_pandas()
    frame["user"] = frame["user"].astype("Int64")
    frame["item"] = pd.Categorical(frame["item"])
    frame["price"] = frame["price"].astype("Float64")
    frame["member"] = frame["member"].astype("boolean")
    assert prints(frame, tmp_path) == expected
    assert prints(rows().to_pandas(), tmp_path) == expected  # ids as floats, since one is missing
    assert prints(rows().to_arrow(), tmp_path) == expected
    with pytest.raises(TypeError, match="train is a int, expected"):
        prints(7, tmp_path)


@pytest.mark.parametrize("how", [".gz", ".zst", ".bz2", ".xz", ".lz4"])
@pytest.mark.parametrize("named", [True, False])
def test_packed_text_is_told_by_its_bytes(tmp_path: Path, how: str, named: bool) -> None:
    content = flat().write_csv().encode()
    path = packed(tmp_path / "a.csv", content, how)
    if not named:
        path = path.rename(tmp_path / "a.csv")
    (tmp_path / "plain.csv").write_bytes(content)
    expected = prints(tmp_path / "plain.csv", tmp_path, features=FLAT)
    assert prints(path, tmp_path, features=FLAT) == expected
    # Files that were put together are one.
    twice = tmp_path / ("twice.csv" + how)
    twice.write_bytes(path.read_bytes() + packed(tmp_path / "b.csv", b"i1,2,3,1\n", how).read_bytes())
    assert prints(twice, tmp_path, features=FLAT)["train"] != expected["train"]
    assert pl.read_parquet(tmp_path / "out" / "train").height == N + 1


@pytest.mark.parametrize("how", [".gz", ".zst", ".bz2", ".xz", ".lz4"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_damaged_packed_text_is_refused(tmp_path: Path, how: str, damage: str) -> None:
    rng = np.random.default_rng(1)
    lines = "".join(f"i{a},{b},{b / 7},1\n" for a, b in rng.integers(0, 1 << 30, (30_000, 2)).tolist())
    path = packed(tmp_path / "a.csv", f"item,user,price,label\n{lines}".encode(), how)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2 : len(content) // 2 + 64] = b"\xff" * 64
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        prints(path, tmp_path, features=FLAT)


def test_pipes_are_read_once(tmp_path: Path, model: ctr.Predictor) -> None:
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    content = rows().with_columns(pl.col("tags").cast(pl.List(pl.String)).list.join("|")).drop("member").write_csv()
    path = tmp_path / "a.csv"
    path.write_text(content.replace("label", "label,member").replace("\n", ",true\n").replace("member,true", "member"))
    writer = threading.Thread(target=lambda: pipe.write_bytes(path.read_bytes()))
    writer.start()
    found = scores(model, pipe)
    writer.join()
    np.testing.assert_array_equal(found, scores(model, path))


# ----------------------------------------------------------------------------------------------------------- in parts


def hive(folder: Path, frame: pl.DataFrame) -> Path:
    """A folder partitioned by date and shop."""
    for number, (date, shop) in enumerate([("2024-01-01", "a%2Fb"), ("2024-01-02", "__HIVE_DEFAULT_PARTITION__")]):
        place = folder / f"date={date}" / f"shop={shop}"
        place.mkdir(parents=True)
        frame[number * 30 : (number + 1) * 30].write_parquet(place / "part-0.parquet")
        (place / ".part-0.parquet.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    return folder


def test_folders_that_are_partitioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"date": ["2024-01-01"] * 30 + ["2024-01-02"] * 30, "shop": ["a/b"] * 30 + [None] * 30}
    features = [*FEATURES, Categorical("date"), Categorical("shop")]
    expected = prints(rows().with_columns(**{k: pl.Series(v) for k, v in columns.items()}), tmp_path, features=features)
    folder = hive(tmp_path / "table[1]", rows())
    found = prints(folder, tmp_path, features=features)
    assert {**found, "schema": ""} == {**expected, "schema": ""}  # where train came from is in the schema

    schema = ctr.Schema.load(tmp_path / "out")
    ctr.save_model(models.build(CONFIG, schema), CONFIG, tmp_path / "out", tmp_path / "m")
    predictor = ctr.Predictor.load(tmp_path / "m")
    frame = rows().with_columns(**{name: pl.Series(cells) for name, cells in columns.items()})
    np.testing.assert_array_equal(scores(predictor, folder), scores(predictor, frame))
    # A date that is typed is that date.
    typed = frame.with_columns(pl.col("date").str.to_date())
    np.testing.assert_array_equal(scores(predictor, typed), scores(predictor, frame))
    assert cli.main(["evaluate", str(tmp_path / "m"), str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == N
    out = str(tmp_path / "s.parquet")
    assert cli.main(["predict", str(tmp_path / "m"), str(folder), "--out", out, "--keep", "date"]) == 0
    assert pl.read_parquet(out)["date"].to_list() == columns["date"]
    assert cli.main(["evaluate", str(tmp_path / "m"), str(folder), "--split", "test"]) == 1
    assert "has no schema.json, only prepared folders have splits" in capsys.readouterr().err

    by_date = ctr.prepare(folder, tmp_path / "split", labels="label", split=(1, 1, 0), split_by="date", log=None)
    assert "date" not in [feature.name for feature in by_date.features]
    assert pl.read_parquet(tmp_path / "split" / "valid").height == 30


def test_all_features_may_be_names_of_folders(tmp_path: Path) -> None:
    folder = hive(tmp_path / "table", rows())
    options: dict[str, Any] = {"labels": "label", "features": [Categorical("date"), Categorical("shop")], "log": None}
    schema = ctr.prepare({"train": folder}, tmp_path / "p", ignore=[f.name for f in FEATURES], **options)
    config = {"model": "mlp", "embedding_dim": 4, "hidden": [4]}
    predictor = ctr.Predictor(models.build(config, schema).eval(), schema, tmp_path / "p")
    found, counts = predictor.predict(folder)
    assert counts["rows"] == N
    days = [{"date": "2024-01-01", "shop": "a/b"}, {"date": "2024-01-02", "shop": None}]
    expected = scores(predictor, days)
    np.testing.assert_allclose(found["label"], np.repeat(expected, 30), rtol=1e-6)
    assert expected[0] != expected[1]


@pytest.mark.parametrize("inner", [pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.int32()])
@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_lists_are_scored_over_row_groups(tmp_path: Path, inner: pa.DataType, kind: Any) -> None:
    values = [[["b", "a"], ["c"], [], None, ["a", "b"]][i % 5] for i in range(N)]
    if pa.types.is_integer(inner):
        values = [None if value is None else list(map(ord, value)) for value in values]
    flat = pa.array(values, pa.list_(pa.int32() if pa.types.is_integer(inner) else pa.string()))
    event = flat.flatten().dictionary_encode().cast(inner) if pa.types.is_dictionary(inner) else flat.flatten()
    offsets = flat.offsets if kind is pa.list_ else flat.offsets.cast(pa.int64())
    of_kind = pa.ListArray if kind is pa.list_ else pa.LargeListArray
    tags = of_kind.from_arrays(offsets, event, mask=flat.is_null())
    table = pa.table({"tags": tags, "item": [f"i{i % 7}" for i in range(N)], "label": [i % 2 for i in range(N)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    features = [MultiValued("tags"), Categorical("item")]
    schema = ctr.prepare({"train": tmp_path / "a.parquet"}, tmp_path / "p", features=features, labels="label", log=None)
    predictor = ctr.Predictor(models.build(CONFIG, schema).eval(), schema, tmp_path / "p")
    plain = [{"tags": value, "item": f"i{i % 7}"} for i, value in enumerate(values)]
    np.testing.assert_allclose(scores(predictor, tmp_path / "a.parquet"), scores(predictor, plain), rtol=1e-5)


FIXED: dict[str, tuple[list[Any], pa.DataType]] = {
    "booleans": ([[True, False], None, [None, True], [False, False]], pa.bool_()),
    "integers": ([[1, 2], None, [None, 3], [2, 1]], pa.int64()),
    "floats": ([[1.0, 2.0], None, [None, 3.0], [2.0, 1.0]], pa.float32()),
    "text": ([["a", "b"], None, [None, "c"], ["b", "a"]], pa.string()),
    "categories": ([["a", "b"], None, [None, "c"], ["b", "a"]], pa.dictionary(pa.int8(), pa.string())),
    "dates": ([[dt.date(2024, 1, 1), dt.date(2024, 1, 2)], None, [None, dt.date(2024, 1, 3)]], pa.date32()),
    "never missing": ([[1, 2], [3, 4], [2, 3]], pa.int64()),
    "always missing": ([None, None, None], pa.int64()),
}


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("form", ["parquet", "parts", "arrow", "table", "batch", "pandas", "polars"])
def test_lists_of_fixed_size_are_scored_as_they_are_prepared(
    tmp_path: Path, kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of rows are parts of longer arrays, which polars refuses where such lists are missing."""
    monkeypatch.setattr(stream, "BLOCK_ROWS", 7)
    cells, inner = FIXED[kind]
    pairs = [cells[i % len(cells)] for i in range(N)]
    # Each row group has a dictionary of its own, at which Arrow cuts the other columns.
    shops = pa.array([f"s{i % 3}" for i in range(N)]).dictionary_encode()
    columns = {"pair": pa.array(pairs, pa.list_(inner, 2)), "shop": shops, "label": [i % 2 for i in range(N)]}
    table = pa.table({**columns, "item": [f"i{i % 7}" for i in range(N)]})
    longer = pa.concat_tables([table.slice(50), table, table.slice(0, 9)]).combine_chunks()
    data: Any = longer.slice(N - 50, N)
    if form == "parquet":
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=9)
        data = tmp_path / "a.parquet"
    elif form == "parts":
        data = tmp_path / "parts"
        data.mkdir()
        for part, (start, size) in enumerate([(0, 6), (6, 20), (26, 34)]):
            pq.write_table(table.slice(start, size), data / f"{part}.parquet", row_group_size=5)
    elif form == "arrow":
        data = tmp_path / "a.arrow"
        with pa.OSFile(str(data), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    elif form == "batch":
        (data,) = data.to_batches()
    elif form == "pandas":
        pandas = pytest.importorskip("pandas")
        data = longer.to_pandas(types_mapper=pandas.ArrowDtype)[N - 50 :][:N]
    elif form == "polars":
        data = of_arrow(longer)[N - 50 :][:N]
    features = [MultiValued("pair"), Categorical("item"), Categorical("shop")]
    schema = ctr.prepare({"train": data}, tmp_path / "p", features=features, labels="label", log=None)
    ids = pl.read_parquet(tmp_path / "p" / "train")["pair"].to_list()
    known = {None: 1}
    for pair, found in zip(pairs, ids):  # a bag leaves out what is missing in it
        events = [event for event in pair if event is not None] if pair is not None else [None]
        assert len(found) == len(events)
        assert [known.setdefault(event, one) for event, one in zip(events, found)] == found
    assert len(set(known.values())) == len(known)
    predictor = ctr.Predictor(models.build(CONFIG, schema).eval(), schema, tmp_path / "p")
    plain = [{"pair": pair, "item": f"i{i % 7}", "shop": f"s{i % 3}"} for i, pair in enumerate(pairs)]
    if kind == "dates":
        plain = [{**row, "pair": pair and [event and str(event) for event in pair]} for row, pair in zip(plain, pairs)]
    np.testing.assert_allclose(scores(predictor, data), scores(predictor, plain), rtol=1e-5)
    columns_of_data, _ = predictor.encoder.transform(data)
    ragged = columns_of_data.ragged["pair"]
    assert np.split(ragged.values, ragged.offsets[1:-1])[5].tolist() == ids[5]
    assert ragged.values.tolist() == [one for row in ids for one in row]


PAIRS = pa.array([[1, 2], None, [5, None], [7, 8]], pa.list_(pa.int64(), 2))
NESTED: dict[str, pa.Array] = {
    "fixed": PAIRS,
    "fixed of fixed": pa.array([[[1, 2], None], None, [[5, 6], [1, 2]], [None, None]], pa.list_(PAIRS.type, 2)),
    "list of fixed": pa.array([[[1, 2], None], None, [[5, 6]], []], pa.list_(PAIRS.type)),
    "list of a part": pa.ListArray.from_arrays(pa.array([0, 1, 2, 2], pa.int32()), PAIRS.slice(0, 2)),
    "struct of fixed": pa.array([{"x": [1, 2]}, None, {"x": None}, {"x": [7, 8]}], pa.struct([("x", PAIRS.type)])),
    "struct of a part": pa.StructArray.from_arrays([PAIRS.slice(1, 2)], ["x"]),
    "fixed of structs": pa.array(
        [[{"x": 1}, {"x": 2}], None, [None, {"x": 2}]], pa.list_(pa.struct({"x": pa.int8()}), 2)
    ),
    "tensors": pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.int64(), (2,)), PAIRS),
    "of none": pa.array([[], None, [], []], pa.list_(pa.int64(), 0)),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_part_of_an_arrow_table_has_its_cells(kind: str) -> None:
    column = NESTED[kind]
    for start in range(len(column) + 1):
        for size in range(len(column) - start + 1):
            part = pa.table({"x": column, "y": range(len(column))}).slice(start, size)
            expected = column.slice(start, size).to_pylist()
            assert of_arrow(part).to_dict(as_series=False) == {"x": expected, "y": [*range(start, start + size)]}
            for batch in part.to_batches():
                assert of_arrow(batch)["x"].to_list() == expected
    assert (
        of_arrow(pa.concat_tables([pa.table({"x": column}).slice(1)] * 2))["x"].to_list() == 2 * column[1:].to_pylist()
    )


def test_lists_of_no_values(tmp_path: Path) -> None:
    frame = rows().with_columns(pl.Series("none", [[], None, []] * 20, dtype=pl.Array(pl.Int64, 0)))
    frame.write_parquet(tmp_path / "a.parquet")
    features = [Categorical("item"), MultiValued("none")]
    expected = prints(frame.with_columns(pl.col("none").arr.to_list()), tmp_path, features=features)
    assert prints(frame, tmp_path, features=features) == expected
    assert prints(tmp_path / "a.parquet", tmp_path, features=features) == expected


def test_a_part_that_breaks_its_reader_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Polars panics at what Arrow writes for such lists; batches that are collected then just end."""
    rows().select("item", "label", none=pl.Series([[]] * N, dtype=pl.Array(pl.Int64, 0))).write_parquet(tmp_path / "0")
    none = pa.array([[], None], pa.list_(pa.int64(), 0))
    pq.write_table(pa.table({"item": ["a", "b"], "label": [0, 1], "none": none}), tmp_path / "1")
    for data in (tmp_path / "1", [tmp_path / "0", tmp_path / "1"]):
        with pytest.raises(
            DataError, match=rf"{re.escape(str(tmp_path))}/\d.* cannot be read, it may be truncated or dam"
        ):
            prints(data, tmp_path, features=[Categorical("item")])
    assert not (tmp_path / "out").exists()
    capfd.readouterr()  # the panic's own words


def test_folders_that_are_partitioned_in_two_ways_are_refused(tmp_path: Path) -> None:
    folder = hive(tmp_path / "a", rows())
    rows().write_parquet(folder / "stray.parquet")
    with pytest.raises(SchemaError, match=r"stray.parquet lies in folders that name \[\].*\['date', 'shop'\]"):
        prints(folder, tmp_path)
    folder = hive(tmp_path / "b", rows().with_columns(shop=pl.lit("x")))
    with pytest.raises(SchemaError, match=r"b/date=2024-01-01.*columns \['shop'\] appear more than once"):
        prints(folder, tmp_path)
    (tmp_path / "c" / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match="a folder without parquet files"):
        prints(tmp_path / "c", tmp_path)


@pytest.mark.parametrize(
    ("mark", "what"), [("_delta_log/0.json", "Delta"), (".hoodie/x", "Hudi"), ("metadata/v1.metadata.json", "Iceberg")]
)
def test_tables_with_a_log_are_refused(tmp_path: Path, mark: str, what: str) -> None:
    folder = hive(tmp_path / "table", rows())
    (folder / mark).parent.mkdir()
    (folder / mark).touch()
    (folder / "data").mkdir()
    for place in (folder, folder / "date=2024-01-01", folder / "data", folder / "date=2024-01-01" / "shop=a%2Fb"):
        with pytest.raises(DataError, match=f"is part of a {what} table.*pass the frame"):
            prints(place, tmp_path)


BIG = 2**62 + 1
DAY = dt.datetime(2024, 3, 5)


@pytest.mark.parametrize(
    ("first", "second", "dtype", "cells"),
    [
        (pl.Series([1, 2], dtype=pl.Int32), pl.Series([BIG, None]), pl.Int64, [1, 2, BIG, None]),
        (pl.Series([1, 2], dtype=pl.UInt8), pl.Series([-1, None], dtype=pl.Int8), pl.Int64, [1, 2, -1, None]),
        (pl.Series([BIG, 2]), pl.Series([3.0, None]), pl.Int64, [BIG, 2, 3, None]),
        (pl.Series([3.0, float("nan")]), pl.Series([BIG, 2]), pl.Int64, [3, None, BIG, 2]),
        (pl.Series([1, 2]), pl.Series([2.5, None]), pl.Float64, [1.0, 2.0, 2.5, None]),
        (pl.Series([1, 2]), pl.Series([2**64 - 1, 0], dtype=pl.UInt64), pl.UInt64, [1, 2, 2**64 - 1, 0]),
        (pl.Series([0.5, 2], dtype=pl.Float32), pl.Series([2.5, None]), pl.Float64, [0.5, 2.0, 2.5, None]),
        (pl.Series(["a", None]), pl.Series(["b", "a"], dtype=pl.Categorical), pl.String, ["a", None, "b", "a"]),
        (pl.Series(["a", "b"], dtype=pl.Enum(["a", "b"])), pl.Series(["c", " d "]), pl.String, ["a", "b", "c", "d"]),
        (pl.Series([None, None]), pl.Series([1, 2]), pl.Int64, [None, None, 1, 2]),
        (pl.Series([DAY.date(), None]), pl.Series([DAY, DAY]), pl.Datetime("us"), [DAY, None, DAY, DAY]),
        (
            pl.Series([DAY, None], dtype=pl.Datetime("ms")),
            pl.Series([DAY, DAY], dtype=pl.Datetime("us")),
            pl.Datetime("us"),
            [DAY, None, DAY, DAY],
        ),
        (pl.Series([[1], []]), pl.Series([[2.0, None], None]), pl.List(pl.Int64), [[1], [], [2, None], None]),
        (pl.Series([[1, 2]] * 2, dtype=pl.Array(pl.Int64, 2)), pl.Series([[3], []]), pl.List(pl.Int64),
         [[1, 2], [1, 2], [3], []]),
        (pl.Series([["a"], None]), pl.Series([["b"], []], dtype=pl.List(pl.Categorical)), pl.List(pl.String),
         [["a"], None, ["b"], []]),
    ],
)  # fmt: skip
def test_types_that_lose_nothing_become_one(
    tmp_path: Path, first: pl.Series, second: pl.Series, dtype: Any, cells: list[Any]
) -> None:
    for number, column in enumerate((first, second)):
        pl.DataFrame({"a": column}).write_parquet(tmp_path / f"{number}.parquet")
    for data in (tmp_path, sorted(tmp_path.glob("*.parquet"))):
        for piece_rows in (None, 3):
            table = read_raw(data, tmp_path / "t", piece_rows=piece_rows)
            assert table.dtypes == {"a": dtype}
            found = table.gather(lambda piece: piece)
            assert found["a"].to_list() == cells
            assert found["__row__"].to_list() == [0, 1, 2, 3]
    for wanted in (None, {"a"}):
        tables = list(stream.blocks(tmp_path, wanted=wanted))
        assert pl.concat(table.frame.collect() for table in tables)["a"].to_list() == cells


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pl.Series([1]), pl.Series(["1"])),
        (pl.Series([True]), pl.Series([1])),
        (pl.Series([DAY]), pl.Series([DAY]).dt.replace_time_zone("UTC")),
        (pl.Series([DAY.date()]), pl.Series([DAY]).dt.replace_time_zone("UTC")),
        (pl.Series([[1]]), pl.Series([1])),
        (pl.Series([[1]]), pl.Series([["1"]])),
    ],
)
def test_other_types_are_refused(tmp_path: Path, first: pl.Series, second: pl.Series) -> None:
    for one, other in ((first, second), (second, first)):
        pl.DataFrame({"b": one}).write_parquet(tmp_path / "0.parquet")
        pl.DataFrame({"b": other}).write_parquet(tmp_path / "1.parquet")
        message = re.escape(f"1.parquet: column 'b' has type {other.dtype}, in {tmp_path}/0.parquet it has type")
        for read in (lambda: read_raw(tmp_path, tmp_path / "t"), lambda: list(stream.blocks(tmp_path))):
            with pytest.raises(SchemaError, match=f"{message} {re.escape(str(one.dtype))}"):
                read()


def test_parts_with_other_columns_are_refused(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    flat().write_parquet(raw / "0.parquet")
    flat().drop("user").write_parquet(raw / "1.parquet")
    with pytest.raises(SchemaError, match=r"1.parquet lacks columns \['user'\], which .*0.parquet has"):
        prints(raw, tmp_path, features=FLAT)
    flat().with_columns(more=1).write_parquet(raw / "1.parquet")
    with pytest.raises(SchemaError, match=r"1.parquet has columns \['more'\], which .*0.parquet lacks"):
        prints(raw, tmp_path, features=FLAT)


def test_lists_of_text_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = flat()
    content.write_csv(tmp_path / "all.csv")
    content[:20].write_csv(tmp_path / "0.csv")
    packed(tmp_path / "1.csv", content[20:50].select("label", "price", "user", "item").write_csv().encode(), ".gz")
    content[50:].write_csv(tmp_path / "2.tsv", separator="\t")
    files = [tmp_path / "0.csv", str(tmp_path / "1.csv.gz"), tmp_path / "2.tsv"]
    expected = prints(tmp_path / "all.csv", tmp_path, features=FLAT)
    assert prints(files, tmp_path, features=FLAT) == expected
    # Random splits go by the number of the row in the whole, and so does the command line.
    options: dict[str, Any] = {"features": FLAT, "log": None}
    ctr.prepare(tmp_path / "all.csv", tmp_path / "one", **options)
    ctr.prepare(files, tmp_path / "many", **options)
    assert ctr.fingerprint(tmp_path / "one") == ctr.fingerprint(tmp_path / "many")
    flags = ["--categorical", "item", "user", "--numeric", "price"]
    for out, data in (("three", [*map(str, files)]), ("single", [str(tmp_path / "all.csv")])):
        splits = ["--valid", *data, "--test", *data]
        assert cli.main(["prepare", *data, "--out", str(tmp_path / out), *flags, *splits]) == 0
    assert ctr.fingerprint(tmp_path / "three") == ctr.fingerprint(tmp_path / "single")
    capsys.readouterr()
    assert cli.main(["prepare", str(files[0]), "--out", str(tmp_path / "x"), "--valid", "--test", *flags]) == 2
    assert "expected one path or more" in capsys.readouterr().err

    (tmp_path / "bad.csv").write_text("item,user,price,label\na,1,2,1\nb,1,x,0\n")
    with pytest.raises(DataError, match=r"bad.csv: row 2 \(line 3 of the file\), column 'price' holds 'x'"):
        prints([tmp_path / "0.csv", tmp_path / "bad.csv", files[1]], tmp_path, features=FLAT)
    (tmp_path / "short.csv").write_text("item,user,price,label\na,1,2\nb,1,2,0\n")
    bad = [tmp_path / "short.csv", tmp_path / "0.csv", tmp_path / "bad.csv"]
    prints(bad, tmp_path, features=FLAT, on_bad_row="skip")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"]["train"] == {"too few cells": 1, "price: not a finite number": 1}
    assert report["rows"]["train"] == 1 + 20 + 1
    table = read_raw(bad, tmp_path / "t", on_bad_row="skip")
    assert table.place(21) == f"{tmp_path}/bad.csv: row 1 (line 2 of the file)"
    assert table.place(0) == f"{tmp_path}/short.csv: row 2"
    assert table.skipped_rows == [1]

    (tmp_path / "other.csv").write_text("item,user,label\na,1,1\n")
    with pytest.raises(SchemaError, match=r"other.csv lacks columns \['price'\], which .*0.csv has"):
        prints([tmp_path / "0.csv", tmp_path / "other.csv"], tmp_path, features=FLAT)
    content.write_parquet(tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=r"a.parquet and .*0.csv are of two kinds of files"):
        prints([tmp_path / "0.csv", tmp_path / "a.parquet"], tmp_path, features=FLAT)
    for wrong in ([], [content]):
        with pytest.raises(TypeError, match="expected paths of files, or one frame"):
            prints(wrong, tmp_path, features=FLAT)


# --------------------------------------------------------------------------------------------------------- JSON lines


def test_cells_of_json_lines_are_those_of_a_dictionary(tmp_path: Path, model: ctr.Predictor) -> None:
    lines = [
        {"item": "i1", "user": 3, "price": 1, "tags": [1, 2], "member": True},
        {"item": " i2 ", "user": None, "price": 1.5, "tags": [], "member": False},
        {"user": 4.0, "price": -2e3, "tags": [3.0, None], "member": None},
        {"item": "", "user": 10, "price": None, "tags": None, "member": True, "new": {"a": [1]}},
    ]
    path = json_lines(tmp_path / "a.jsonl", lines)
    table = read_raw(path, tmp_path / "t")
    assert table.types == {
        "item": "text", "user": "integer", "price": "integer", "tags": "integer", "member": "boolean",
        "new": "Struct({'json': String})",
    }  # fmt: skip
    found, _ = model.encoder.transform_table(table)
    for number, line in enumerate(lines):
        cells = {name: line.get(name) for name in ("item", "user", "price", "tags", "member")}
        one, _ = model.encoder.transform(cells)
        assert one.ids.tolist() == [found.ids[number].tolist()]
        assert one.floats[:, 0].tolist() == [found.floats[number, 0]]
        ragged = found.ragged["tags"]
        assert one.ragged["tags"].values.tolist() == ragged.values[slice(*ragged.offsets[number : number + 2])].tolist()


@pytest.mark.parametrize("block_bytes", [1, 30, 1 << 20])
def test_blocks_of_json_lines_change_nothing(
    tmp_path: Path, block_bytes: int, model: ctr.Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells: dict[str, list[Any]] = {
        "whole": [None, 1, 2.0, None, 3, 2**53 + 1],
        "fraction": [1, 2, 2.5, None, 2**40, -1],
        "unsigned": [1, 2**64 - 1, None, 0, 5, 6],
        "text": [None, "a", "1", "", None, " b"],
        "flag": [None, None, True, False, None, True],
        "bag": [None, [], [1], [2.0, None], [3], []],
        "words": [[], ["a", "b"], None, [" a"], [], [None]],
        "object": [[], None, {"a": 1}, [[1]], [{"b": 2}], []],
        "late": [None, None, None, None, None, 7],
        "nothing": [None, None, None, None, None, None],
    }
    lines = [{name: column[i] for name, column in cells.items() if (i, name) != (2, "whole")} for i in range(6)]
    del lines[0]["late"]
    monkeypatch.setattr(jsonlines, "BLOCK_BYTES", block_bytes)
    table = read_raw(json_lines(tmp_path / "a.ndjson", lines), tmp_path / "t")
    frame = table.gather(lambda piece: piece).drop("__row__")
    assert dict(frame.schema) == {
        "whole": pl.Int64, "fraction": pl.Float64, "unsigned": pl.UInt64, "text": pl.String, "flag": pl.Boolean,
        "bag": pl.List(pl.Int64), "words": pl.List(pl.String), "object": pl.Struct({"json": pl.String}),
        "late": pl.Int64, "nothing": pl.Null,
    }  # fmt: skip
    assert frame["whole"].to_list() == [None, 1, None, None, 3, 2**53 + 1]
    assert frame["fraction"].to_list() == cells["fraction"]
    assert frame["unsigned"].to_list() == cells["unsigned"]
    assert frame["text"].to_list() == [None, "a", "1", None, None, "b"]
    assert frame["bag"].to_list() == cells["bag"]
    assert frame["words"].to_list() == cells["words"]
    # And the ids of a model that reads a block at a time.
    path = json_lines(tmp_path / "b.jsonl", [{**row, "member": None} for row in rows().to_dicts()])
    expected = scores(model, rows().with_columns(member=pl.lit(None, pl.Boolean)))
    np.testing.assert_allclose(scores(model, path), expected, rtol=0, atol=1e-6)


def test_a_key_that_comes_late_or_never(tmp_path: Path, model: ctr.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlines, "BLOCK_BYTES", 40)
    lines = [{"item": "i1", "price": 2, "tags": [], "member": True} for _ in range(9)]
    path = json_lines(tmp_path / "a.jsonl", [*lines, {**lines[0], "user": 3}])
    frame = pl.DataFrame({**{k: [v] * 10 for k, v in lines[0].items()}, "user": [None] * 9 + [3]})
    frame = frame.with_columns(pl.col("tags").cast(pl.List(pl.Int64)))
    np.testing.assert_allclose(scores(model, path), scores(model, frame), rtol=0, atol=1e-6)
    with pytest.raises(SchemaError, match=r"a.jsonl: columns \['user'\] are missing, its lines have the keys"):
        model.predict(json_lines(tmp_path / "a.jsonl", lines))


BAD_LINES = [
    ("foo", "no JSON object", "has no JSON object"),
    ('{"item": "a", "label": 1', "no JSON object", "has no JSON object"),
    ('[{"item": "a"}]', "no JSON object", "has no JSON object"),
    ("{'item': 'a'}", "no JSON object", "has no JSON object"),
    ('{"item": "a"} {"item": "b"}', "no JSON object", "has no JSON object"),
    ('{"item": "\\ud800", "label": 1}', "bad UTF-8", "has bytes that are not UTF-8"),
    ("", "blank line", "has nothing: a blank line"),
    ("[" * 100_000, "no JSON object", "has no JSON object"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_a_bad_line_of_json_is_named_or_skipped(tmp_path: Path, line: str, reason: str, message: str) -> None:
    good = [{"item": "a", "label": 1}, {"item": "b", "label": 0}]
    path = json_lines(tmp_path / "a.jsonl", [good[0], line, good[1], "", ""])  # blank lines at the end are fine
    options: dict[str, Any] = {"features": [Categorical("item")]}
    with pytest.raises(DataError, match=rf"a.jsonl: row 2 \(line 2 of the file\) {re.escape(message)}"):
        prints(path, tmp_path, **options)
    found = prints(path, tmp_path, on_bad_row="skip", **options)
    assert found == prints(json_lines(tmp_path / "b.jsonl", good), tmp_path, **options)
    prints(path, tmp_path, on_bad_row="skip", **options)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == {"train": {reason: 1}}
    assert read_raw(path, tmp_path / "t", on_bad_row="skip").skipped_rows == [2]
    assert [table.skipped_rows for table in stream.blocks(path, on_bad_row="skip")] == [[2]]


def test_bad_cells_of_json_lines_are_named(tmp_path: Path, model: ctr.Predictor) -> None:
    def refused(*cells: Any) -> str:
        path = json_lines(tmp_path / "a.jsonl", [{"x": cell, "label": i % 2} for i, cell in enumerate(cells)])
        with pytest.raises((SchemaError, DataError)) as caught:
            prints(path, tmp_path, features=[])
        return str(caught.value).removeprefix(f"{path}: ")

    where = "row 3 (line 3 of the file), column 'x' holds "
    assert refused(None, 1, "1").startswith(where + "\"1\", but the kind of row 2 is 'number'")
    assert refused("1", None, 1).startswith(where + "1, but the kind of row 1 is 'text'")
    assert refused(True, None, 1).startswith(where + "1, but the kind of row 1 is 'boolean'")
    assert refused([1], [], ["a"]).startswith(where + "[\"a\"], but the kind of row 1 is 'list of number'")
    assert refused(None, None, [1, "a"]).startswith(where + '[1, "a"], which mixes kinds')
    assert refused(1, None, [1]).startswith(where + "[1], but the kind")
    assert refused(1, -1, 2**64 - 1).startswith(where + "18446744073709551615: integers of up to 64 bits")
    assert refused(1, None, float("inf")).startswith(where + "inf; expected a finite number")
    path = json_lines(tmp_path / "b.jsonl", [{**row, "price": "x"} for row in rows(2).to_dicts()])
    with pytest.raises((SchemaError, DataError), match="column 'price' holds 'x'"):
        model.predict(path)
    for content in (b"", b" \n\n", b"\xef\xbb\xbf"):
        (tmp_path / "c.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"c\.jsonl"):
            prints(tmp_path / "c.jsonl", tmp_path)
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf{}\n{}\n")
    with pytest.raises(DataError, match="row 1 has no keys"):
        prints(tmp_path / "d.jsonl", tmp_path)


def test_raw_ids_of_json_lines(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", [{"u": 2**63 - 1, "label": 1}, {"u": 2.0, "label": 0}])
    prints(path, tmp_path, features=[RawId("u")])
    assert pl.read_parquet(tmp_path / "out" / "train")["u"].to_list() == [2**63 - 1, 2]


# ------------------------------------------------------------------------------------------------ what is not read


def binary(path: Path, kind: str) -> None:
    frame = flat()
    if kind == "avro":
        frame.write_avro(path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(frame.to_dicts()))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.csv", frame.write_csv())
    elif kind == "numpy":
        np.save(path.with_suffix(".npy"), frame["price"].to_numpy())
        path.with_suffix(".npy").rename(path)
    elif kind == "json":
        path.write_text(json.dumps(frame.to_dicts(), indent=1))
    elif kind == "object":
        path.write_text(json.dumps({"rows": frame.to_dicts()}, indent=1))
    elif kind == "stream":
        frame.write_ipc_stream(path)
    elif kind == "packed parquet":
        frame.write_parquet(path)
        path.write_bytes(gzip.compress(path.read_bytes()))
    else:
        path.write_bytes(kind.encode("latin-1"))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("a.avro", "avro", "is an Avro file.*polars.read_avro"),
        ("a", "avro", "is an Avro file"),
        ("a.orc", "ORC\x08", "is an ORC file.*pyarrow.orc.read_table"),
        ("a.xlsx", "zip", "is an Excel file.*pandas.read_excel"),
        ("a.zip", "zip", "is an archive.*unpack it"),
        ("a.csv", "zip", "is an archive"),
        ("a.npz", "zip", "is a NumPy file.*numpy.load"),
        ("a.dat", "numpy", "is a NumPy file"),
        ("a.h5", "\x89HDF\r\n\x1a\n", "is an HDF5 file.*pandas.read_hdf"),
        ("a.pkl", "pickle", "is a pickle, which may run code"),
        ("a.bin", "pickle", "is a pickle"),
        ("a.json", "json", "is JSON, but not of one object a line.*polars.read_json"),
        ("a.json", "object", "is JSON, but not of one object a line"),
        ("a.arrows", "stream", "is a stream of Arrow batches"),
        ("a.bin", "stream", "is a stream of Arrow batches"),
        ("a.feather", "FEA1", "is a Feather file of version 1"),
        ("a.parquet.gz", "packed parquet", "is a packed file of columns.*unpack it"),
        ("a.tar.gz", "x", "is an archive"),
        ("a.csv.br", "x", "packed in a way that is not known here"),
        ("a.arrow", "ARROW1 cut", "cannot be read, it may be truncated or damaged"),
        ("a.parquet", "PAR1 cut", "cannot be read, it may be truncated or damaged"),
    ],
)
def test_other_formats_are_refused_by_name(
    tmp_path: Path, model: ctr.Predictor, name: str, kind: str, message: str
) -> None:
    path = tmp_path / name
    binary(path, kind)
    for read in (lambda: prints(path, tmp_path, features=FLAT), lambda: model.predict(path)):
        with pytest.raises(DataError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("what", "name", "content"),
    [
        ("libsvm", "a.libsvm", "1 3:1 7:0.5\n-1 4:1\n"),
        ("libsvm", "a.txt", "+1 qid:3 1:0.5 # comment\n0 qid:3 2:1e-3\n"),
        ("libffm", "a.ffm", "1 0:3:1 1:7:0.5\n0 0:4:1\n"),
        ("Vowpal Wabbit", "a.vw", "1 |user u1 |item i2 price:3.5\n-1 |user u2\n"),
        ("Vowpal Wabbit", "a.dat", "1 2.0 'tag|f a b:2\n-1 'other |f c\n"),
        ("Vowpal Wabbit", "a.txt", "1 | a b c\n-1 | d\n"),
        ("RecBole", "a.inter", "user_id:token\titem_id:token\trating:float\nu\ti\t3\n"),
        ("RecBole", "a.tsv", "item_id:token\tgenres:token_seq\ni\tx y\n"),
        ("MovieLens", "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n"),
        ("MovieLens", "users.dat", "1::F::1::10::48067\n"),
    ],
)
def test_formats_of_the_field_lead_to_the_docs(tmp_path: Path, what: str, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=f'looks like a {what} file, .*docs/data.md says under "Other formats"'):
        prints(path, tmp_path)
    assert "\n## Other formats\n" in (Path(__file__).parent.parent / "docs" / "data.md").read_text()


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("item|user|label\na b|1|0\n3 c|2|1\n", {}),
        ("item,label\n12:30,0\n3:4,1\n", {}),
        ("label item\n1 3:1\n0 4:1\n", {"separator": " "}),
        ("label;item\n1;a::b\n0;c\n", {}),
        ("label\titem\n1\ta::b::c\n0\tc::d::e\n", {}),
        ("item:token;label\na;1\nb;0\n", {}),
    ],
)
def test_tables_that_look_a_little_like_them_are_read(tmp_path: Path, content: str, options: dict[str, Any]) -> None:
    (tmp_path / "a.txt").write_text(content)
    table = read_raw(tmp_path / "a.txt", tmp_path / "t", **options)
    assert table.gather(lambda piece: piece.select(pl.len())).item() == 2


# -------------------------------------------------------------------------------------------------------------- times


INSTANTS = [dt.datetime(2024, 1, 1) + dt.timedelta(days=i * 40, seconds=i, milliseconds=250) for i in range(10)]


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.isoformat(),
        lambda t: t.isoformat() + "Z",
        lambda t: t.isoformat(" ", "microseconds") + "+00:00",
        lambda t: t.isoformat(" ") + "+00",
        lambda t: t.isoformat() + "+0000",
        lambda t: t.isoformat(" ") + " UTC",
        lambda t: t.isoformat(" ") + " +0200",
        lambda t: t.strftime("%Y/%m/%d %H:%M:%S"),
        lambda t: t.strftime("%Y-%m-%dT%H:%MZ"),
        lambda t: t.strftime("%Y-%m-%d"),
        lambda t: (
            (t + dt.timedelta(hours=len(INSTANTS) - INSTANTS.index(t))).isoformat() + f"+{10 - INSTANTS.index(t):02}:00"
        ),
        lambda t: t.timestamp(),
        lambda t: int(t.timestamp()),
        lambda t: int(t.timestamp() * 1e3),
        lambda t: t.strftime("%y%m%d%H"),
        lambda t: t.strftime("%Y%m%d"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "frame"])
def test_splits_by_times_in_every_form(tmp_path: Path, write: Any, form: str) -> None:
    order = [3, 0, 9, 5, 1, 8, 2, 7, 6, 4]
    frame = pl.DataFrame({"hour": [write(INSTANTS[i]) for i in order], "n": order, "label": [i % 2 for i in order]})
    data: Any = frame
    if form == "csv":
        frame.write_csv(tmp_path / "a.csv")
        data = tmp_path / "a.csv"
    options: dict[str, Any] = {"features": [Numeric("n", "none")], "split": (6, 2, 2), "log": None}
    ctr.prepare(data, tmp_path / "out", split_by="hour", **options)
    found = [sorted(pl.read_parquet(tmp_path / "out" / split)["n"].to_list()) for split in ("train", "valid", "test")]
    assert found == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    "times",
    [
        [-1.7e308, -1.6e308, 0.0, 1.6e308, 1.7e308],  # whose range is infinite
        [-1.7e308, 1.7e308],
        [0.0, 5e-324, 1e-323, 1.5e-323],  # whose bins are narrower than any number
        [0.0, 1e-310, 2e-310, 1e-200],
        [1.0, 1.0 + 2**-52, 1.0 + 2**-51],
        [7.0, 7.0, 7.0, 8.0],
        [float(n % 11) for n in range(50)],
    ],
)
def test_quantiles_of_any_range_end_and_are_right(times: list[float]) -> None:
    for order in (times, times[::-1]):
        table = RawTable((pl.DataFrame({"time": order}).lazy(),), "test")
        for share in (0.05, 0.2, 1 / 3, 0.5, 0.8, 0.9, 1.0):
            expected = sorted(times)[max(0, math.ceil(round(share * len(times), 6)) - 1)]
            assert _quantile(table, share) == expected, share


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["2024-03-05T08:15:30", "2024-03-05T08:15:30Z"], "in the whole column"),
        (["2024-03-05", "2024-03-05 08:15:30"], "in the whole column"),
        ([1_717_149_600, 1_717_149_600_000], "row 2.*holds '?1717149600000'?, .*row 1.*: times of two units"),
        ([1_717_149_600_000.0, 1_717_149_600.5], "row 1.*times of two units"),
        (["31.05.2024", "01.06.2024"], "column 'time' holds '31.05.2024'"),
        ([None, "2024-03-05"], "column 'time' holds None"),
    ],
)
def test_times_that_cannot_be_compared_are_refused(tmp_path: Path, cells: list[Any], message: str) -> None:
    frame = pl.DataFrame({"time": cells, "item": ["a", "b"], "label": [0, 1]})
    frame.write_csv(tmp_path / "a.csv")
    for data in (frame, tmp_path / "a.csv"):
        with pytest.raises(DataError, match=message):
            ctr.prepare(data, tmp_path / "out", split_by="time", log=None)


def test_hours_of_avazu_are_no_numbers(tmp_path: Path) -> None:
    hours = [(dt.datetime(2014, 10, 21) + dt.timedelta(hours=i)).strftime("%y%m%d%H") for i in range(240)]

    def guess(name: str, cells: list[Any]) -> Any:
        return infer_features(RawTable((pl.LazyFrame({name: cells * 3}),), "demo"))[0]

    for cells in (hours, [int(hour) for hour in hours]):
        assert guess("hour", cells)[1:3] == (Categorical("hour"), HOURS)
    assert guess("hour", [14102100, 14102101])[1:3] == (Categorical("hour"), HOURS)  # an extract
    assert guess("price", [14102100, 14102101])[1:3] == (Categorical("price"), "integers, only 2 distinct")
    assert guess("count", [14102100 + i for i in range(240)])[1] == Numeric("count")
    assert guess("day", [20240101 + i for i in range(28)])[2] != HOURS
    assert guess("hour", [i % 24 for i in range(240)])[1:3] == (Numeric("hour"), "integers, the name of a measurement")
    said: list[Any] = []
    frame = pl.DataFrame({"hour": hours, "item": ["a", "b"] * 120, "label": [0, 1] * 120})
    ctr.prepare(frame, tmp_path / "out", log=said.append)
    assert f"remark: column 'hour' holds {HOURS}" in said


# --------------------------------------------------------------------------------------------------------- odd cells


@pytest.mark.parametrize("token", ["nan", "NaN", "inf", "-inf", "Infinity"])
def test_numbers_that_are_none_in_csv(tmp_path: Path, token: str) -> None:
    cells = [f"{i / 4}" for i in range(30)]
    for odd in ([token], [token, token, "-inf"]):
        every = [*cells, *odd]
        columns = {"item": [f"i{i % 3}" for i in range(len(every))], "label": [i % 2 for i in range(len(every))]}
        frame = pl.DataFrame({"price": every, "count": every, **columns})
        frame.write_csv(tmp_path / "a.csv")
        if {odd_cell.lower() for odd_cell in odd} == {"nan"}:
            prints(tmp_path / "a.csv", tmp_path, features=[])
            assert [f.name for f in ctr.Schema.load(tmp_path / "out").dense] == ["price", "count"]
        else:
            first = 31 if odd[0].lower() != "nan" else 33
            with pytest.raises(DataError, match=rf"row {first} .*column 'price' holds '{re.escape(every[first - 1])}'"):
                prints(tmp_path / "a.csv", tmp_path, features=[])


IDS = [uuid.UUID(int=i).bytes for i in range(120)]
ODD: dict[str, Any] = {
    "duration": pa.array(range(120), pa.duration("us")),
    "binary": pa.array(IDS, pa.binary()),
    "bytes of 16": pa.array(IDS, pa.binary(16)),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array(IDS, pa.binary(16))),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', "2"] * 60)),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1] * 60, pa.int8())),
    "map": pa.array([[("a", 1)]] * 120, pa.map_(pa.string(), pa.int64())),
    "struct": pa.array([{"a": i} for i in range(120)]),
    "list of structs": pa.array([[{"a": i}] for i in range(120)]),
    "list of bytes": pa.array([[one] for one in IDS]),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("form", ["table", "parquet", "arrow"])
def test_columns_of_odd_types_are_left_out_and_said(tmp_path: Path, kind: str, form: str) -> None:
    length = len(ODD[kind])
    table = pa.table({"item": ["a", "b"] * (length // 2), "label": [0, 1] * (length // 2), "odd": ODD[kind]})
    data: Any = table
    if form == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
        data = tmp_path / "a.parquet"
    elif form == "arrow":
        with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        data = tmp_path / "a.arrow"
    said: list[Any] = []
    schema = ctr.prepare({"train": data}, tmp_path / "out", labels="label", log=said.append)
    assert [feature.name for feature in schema.features] == ["item"]
    reason = json.loads((tmp_path / "out" / "report.json").read_text())["left_out"]["odd"]
    assert re.match("ignored: values of type .*, neither text nor numbers nor times", reason)
    assert f"remark: column 'odd' is {reason}" in said
    for feature in (Categorical("odd"), Numeric("odd"), MultiValued("odd"), RawId("odd")):
        with pytest.raises(SchemaError, match=r"column 'odd' has type .*, expected"):
            prints(data, tmp_path, features=[feature])
    for options in ({"group": "odd"}, {"labels": "odd"}, {"weight": "odd"}):
        with pytest.raises(SchemaError, match=r"column 'odd' has type .*, expected"):
            prints(data, tmp_path, **{"features": [Categorical("item")], **options})


def test_a_sample_does_not_read_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.data.infer.SAMPLE_ROWS", 10)
    frame = pl.LazyFrame({"a": [b"\xff", b"\xfe"] * 30, "b": [dt.timedelta(1), dt.timedelta(2)] * 30})
    assert [guess.feature for guess in infer_features(RawTable((frame,), "demo"))] == [None, None]
