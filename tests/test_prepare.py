"""Raw data -> prepared folder: values of ids and numbers, splits, and what is inferred."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from ctrlib.data.encoder import Encoder
from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.infer import infer_features
from ctrlib.data.prepare import prepare
from ctrlib.data.raw import read_raw
from ctrlib.data.scan import DataError
from ctrlib.data.split import row_hash
from ctrlib.data.table import RawTable
from ctrlib.manifest import write_manifest
from ctrlib.schema import Categorical, MultiValued, Numeric, Schema, SchemaError, Sequence


def run(data: Any, out: Path, **options: Any) -> tuple[Schema, dict[str, pl.DataFrame], dict[str, Any]]:
    """Prepare, and read back everything that was written."""
    schema = prepare(data, out, **{"log": None, "overwrite": True, **options})
    splits = {name: pl.read_parquet(out / name) for name in ("train", "valid", "test") if (out / name).is_dir()}
    report = json.loads((out / "report.json").read_text())
    assert Schema.load(out) == schema
    return schema, splits, report


def vocabulary(out: Path, name: str) -> list[tuple[str, int, int]]:
    return pl.read_parquet(out / "vocab" / f"{name}.parquet").rows()


def test_vocabulary_is_ordered_by_count_then_value_and_comes_from_train_only(tmp_path):
    train = pl.DataFrame({"item": ["b", "a", "c", "c", None, "z", "a"], "label": [0, 1] * 3 + [1]})
    test = pl.DataFrame({"item": ["new", "a", None, "z"], "label": [0, 0, 1, 1]})
    schema, splits, report = run({"train": train, "test": test}, tmp_path / "p", features=[Categorical("item")])
    assert vocabulary(tmp_path / "p", "item") == [("a", 3, 2), ("c", 4, 2), ("b", 5, 1), ("z", 6, 1)]
    assert schema["item"].num_embeddings == 7
    assert splits["train"]["item"].to_list() == [5, 3, 4, 4, 1, 6, 3]
    assert splits["test"]["item"].to_list() == [2, 3, 1, 6]
    assert "valid" not in splits
    assert splits["train"].schema == {"item": pl.Int32, "label": pl.Float32}
    item = report["features"]["item"]
    assert item["oov"] == {"train": 0.0, "test": 0.25}
    assert item["missing"] == {"train": pytest.approx(1 / 7), "test": 0.25}
    assert report["rows"] == {"train": 7, "test": 4}
    assert report["label_mean"]["test"] == {"label": 0.5}


@pytest.mark.parametrize(
    ("feature", "values", "ids"),
    [
        (Categorical("x", min_count=2), ["a", "c"], [3, 3, 3, 4, 4, 2, 2]),
        (Categorical("x", max_values=1), ["a"], [3, 3, 3, 2, 2, 2, 2]),
        (Categorical("x", min_count=4), [], [2] * 7),
    ],
)
def test_rare_values_share_the_oov_id(tmp_path, feature, values, ids):
    frame = pl.DataFrame({"x": ["a", "a", "a", "c", "c", "b", "d"], "label": [0] * 7})
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=[feature])
    assert [value for value, _, _ in vocabulary(tmp_path / "p", "x")] == values
    assert splits["train"]["x"].to_list() == ids


def test_a_shared_vocabulary_counts_all_columns(tmp_path):
    frame = pl.DataFrame({"item": ["a", "b"], "history": ["b|b", "c"], "label": [0, 1]})
    features = [Categorical("item"), Sequence("history", vocabulary="item")]
    schema, splits, _ = run({"train": frame}, tmp_path / "p", features=features)
    assert vocabulary(tmp_path / "p", "item") == [("b", 3, 3), ("a", 4, 1), ("c", 5, 1)]
    assert not (tmp_path / "p" / "vocab" / "history.parquet").exists()
    assert schema["item"].num_embeddings == schema["history"].num_embeddings == 6
    assert splits["train"]["history"].to_list() == [[3, 3], [5]]
    with pytest.raises(SchemaError, match="share vocabulary 'item' must agree"):
        run({"train": frame}, tmp_path / "q", features=[Categorical("item", min_count=2), features[1]])


def test_sequences_keep_their_end_and_bags_their_start(tmp_path):
    cells = ["a|b|c|d", "d", None, " a || b ", "|"]
    frame = pl.DataFrame({"bag": cells, "history": cells, "label": [0, 1, 0, 1, 0]})
    features = [MultiValued("bag", max_length=2), Sequence("history", max_length=2)]
    _, splits, report = run({"train": frame}, tmp_path / "p", features=features)
    # What is cut off does not count: the bag never holds c; d occurs once there.
    assert vocabulary(tmp_path / "p", "bag") == [("a", 3, 2), ("b", 4, 2), ("d", 5, 1)]
    assert splits["train"]["bag"].to_list() == [[3, 4], [5], [1], [3, 4], [1]]
    # Events keep their places, and empty ones are missing: of " a || b " the last two are missing and b.
    assert vocabulary(tmp_path / "p", "history") == [("d", 3, 2), ("b", 4, 1), ("c", 5, 1)]
    assert splits["train"]["history"].to_list() == [[5, 3], [3], [], [1, 4], [1, 1]]
    assert splits["train"].schema["history"] == pl.List(pl.Int32)
    assert report["features"]["bag"]["missing"]["train"] == 0.4
    assert report["features"]["history"]["missing"]["train"] == pytest.approx(3 / 7)
    assert report["features"]["history"]["empty"]["train"] == 0.2


def test_list_columns_of_any_type_equal_their_text(tmp_path):
    label = [0, 1, 1]
    as_text = pl.DataFrame({"bag": ["1|2", "2", None], "label": label})
    expected = run({"train": as_text}, tmp_path / "p", features=[MultiValued("bag")])[1]["train"]
    for values in ([[1, 2], [2], None], [["1", " 2"], ["2", None], []], [[1.0, 2.0], [2.0], []]):
        frame = pl.DataFrame({"bag": values, "label": label}, strict=False)
        assert run({"train": frame}, tmp_path / "q", features=[MultiValued("bag")])[1]["train"].equals(expected)


@pytest.mark.parametrize("transform", ["none", "log", "log_squared", "minmax", "standard"])
def test_numeric_transforms_are_exact_on_train_statistics(tmp_path, transform):
    train, test = [0.0, -3.0, 7.5, 2.0, 100.0], [50.0, -200.0]
    feature = Numeric("x", transform=transform)
    data = {
        "train": pl.DataFrame({"x": [*train, None], "label": [0, 1] * 3}),
        "test": pl.DataFrame({"x": [*test, None], "label": [0, 1, 0]}),
    }
    schema, splits, _ = run(data, tmp_path / "p", features=[feature])
    x = np.array(train)
    apply = {
        "none": lambda v: v,
        "log": lambda v: np.sign(v) * np.log1p(np.abs(v)),
        "log_squared": lambda v: np.array([math.log(e) ** 2 if e > 2 else e for e in v]),
        "minmax": lambda v: (v - x.min()) / (x.max() - x.min()),
        "standard": lambda v: (v - x.mean()) / x.std(),
    }[transform]
    fill = 0.0 if transform == "standard" else apply(x).mean()
    np.testing.assert_allclose(splits["train"]["x"], [*apply(x), fill], rtol=1e-6)
    np.testing.assert_allclose(splits["test"]["x"], [*apply(np.array(test)), fill], rtol=1e-6)
    assert splits["test"].schema["x"] == pl.Float32
    assert schema["x"].parameters["fill"] == pytest.approx(fill)


def test_numbers_without_spread_or_without_values_stay_finite(tmp_path):
    frame = pl.DataFrame({"same": [2.0, 2.0, None], "none": [None, None, None], "label": [0, 1, 1]})
    for transform, expected in (("standard", [0.0, 0, 0]), ("minmax", [0.0, 0, 0]), ("none", [2.0, 2, 2])):
        features = [Numeric("same", transform), Numeric("none", transform)]
        _, splits, _ = run({"train": frame}, tmp_path / "p", features=features)
        assert splits["train"]["same"].to_list() == expected
        assert splits["train"]["none"].to_list() == [0.0] * 3


@pytest.mark.parametrize("spread", [5e-324, 2.0**-1030, 2.0**-1022, 2.0**-999, 2.0**-940])
@pytest.mark.parametrize("transform", ["standard", "minmax"])
def test_numbers_that_hardly_differ_are_alike_or_scaled(tmp_path, transform, spread):
    frame = pl.DataFrame({"x": [0.0, spread, None], "y": [1.0, 1.0 + 2.0**-51, None], "label": [0, 1, 1]})
    features = [Numeric("x", transform), Numeric("y", transform)]
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=features)
    scaled = [0.0, 1.0, 0.5] if transform == "minmax" else [-1.0, 1.0, 0.0]
    assert splits["train"]["x"].to_list() == (scaled if spread >= 2.0**-1000 else [0.0, 0.0, 0.0])
    assert splits["train"]["y"].to_list() == scaled
    # The same in memory, by both roads.
    encoder = Encoder.load(tmp_path / "p")
    for rows in (frame, pl.concat([frame] * 1500)):
        assert encoder.transform(rows)[0].floats[:3, 0].tolist() == splits["train"]["x"].to_list()


@pytest.mark.parametrize("transform", ["standard", "minmax", "log_standard"])
@pytest.mark.parametrize("large", [1e20, -1e20])
def test_numbers_that_are_too_large_after_their_transform(tmp_path, transform, large):
    train = {"x": [0.0, 1e-39, 2e-39], "label": [0, 1, 0]}
    frames = {"train": pl.DataFrame(train), "test": pl.DataFrame({"x": [1e-39, large, 2e-39], "label": [0, 1, 1]})}
    features = {"features": [Numeric("x", transform)]}
    with pytest.raises(DataError, match=rf"^test: row 2, column 'x' holds {re.escape(repr(large))}; .*{transform!r}"):
        run(frames, tmp_path / "p", **features)
    _, splits, report = run(frames, tmp_path / "p", **features, on_bad_row="skip")
    assert splits["test"]["label"].to_list() == [0, 1]
    assert report["skipped"] == {"test": {"x: too large after its transform": 1}}
    # Of one table that is split, as well.
    whole = pl.concat([frames["train"], frames["test"]]).with_columns(t=pl.int_range(6))
    options = {**features, "split": (1, 0, 1), "split_by": "t"}
    with pytest.raises(DataError, match=r"^data: row 5, column 'x'"):
        run(whole, tmp_path / "p", **options)
    _, splits, report = run(whole, tmp_path / "p", **options, on_bad_row="skip")
    assert (len(splits["train"]), splits["test"]["label"].to_list()) == (3, [0, 1])
    assert report["skipped"] == {"data": {"x: too large after its transform": 1}}
    # Numbers of a usual size may be as large as they like.
    usual = {"train": pl.DataFrame({"x": [0.0, 4.0, 8.0], "label": [0, 1, 0]}), "test": frames["test"]}
    _, splits, _ = run(usual, tmp_path / "p", **features)
    assert splits["test"]["x"].is_finite().all()


NAMES = ["long" * 70, "long" * 70 + "er", "日本語" * 12, "arrow", ".", "..", "a/b", "g.group", "groups.g", "parquet"]


def test_any_name_of_a_column_will_do(tmp_path):
    frame = pl.DataFrame({name: [f"{name[:3]}{i}" for i in (0, 1, 0)] for name in NAMES})
    frame = frame.with_columns(g=pl.Series(["u", "v", "u"]), label=pl.Series([0, 1, 1]))
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=list(map(Categorical, NAMES)), group="g")
    assert [splits["train"][name].to_list() for name in [*NAMES, "g"]] == [[3, 4, 3]] * (len(NAMES) + 1)
    assert splits["train"]["__group__"].to_list() == [0, 1, 0]
    assert all(len(path.name) < 230 for path in (tmp_path / "p" / "vocab").iterdir())
    columns, counts = Encoder.load(tmp_path / "p").transform(frame)
    assert columns.ids.T.tolist() == [[3, 4, 3]] * (len(NAMES) + 1)
    assert not any(counts.unseen.values())
    assert fingerprint(tmp_path / "p")["groups"]


def test_log_squared_buckets(tmp_path):
    frame = pl.DataFrame({"x": ["1", "2", "3", "100", "-1.5", None, "20"], "label": [0] * 7})
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=[Categorical("x", bucket="log_squared")])
    values = {value: id for value, id, _ in vocabulary(tmp_path / "p", "x")}
    expected = ["1", "2", str(int(math.log(3) ** 2)), str(int(math.log(100) ** 2)), "-2", None, "8"]
    assert splits["train"]["x"].to_list() == [values.get(value, 1) for value in expected]
    assert set(values) == {"1", "2", "21", "-2", "8"}


def test_ids_have_one_text_whatever_their_type(tmp_path):
    label = [0, 1, 1, 0]
    texts = pl.DataFrame({"x": ["1", "12", None, "1"], "label": label})
    expected = run({"train": texts}, tmp_path / "p", features=[Categorical("x")])[1]["train"]
    for values in ([1, 12, None, 1], [1.0, 12.0, None, 1.0], [1.0, 12.0, math.nan, 1.0], [" 1", "12 ", "", "1"]):
        frame = pl.DataFrame({"x": values, "label": label})
        assert run({"train": frame}, tmp_path / "q", features=[Categorical("x")])[1]["train"].equals(expected)
    flags = pl.DataFrame({"x": [True, False, True, None], "label": label})
    run({"train": flags}, tmp_path / "q", features=[Categorical("x")])
    assert vocabulary(tmp_path / "q", "x") == [("true", 3, 2), ("false", 4, 1)]
    kinds = pl.DataFrame({"x": pl.Series(["u", "v", "u", None], dtype=pl.Categorical), "label": label})
    run({"train": kinds}, tmp_path / "q", features=[Categorical("x")])
    assert vocabulary(tmp_path / "q", "x") == [("u", 3, 2), ("v", 4, 1)]


def test_labels_weight_and_group(tmp_path):
    frame = pl.DataFrame(
        {"user": [7, 3, 7], "click": [1.0, math.nan, 0], "buy": [True, None, False], "w": [0.5, 2, 0]}, strict=False
    )
    options: dict[str, Any] = {"labels": ["click", "buy"], "weight": "w", "group": "user", "missing_labels": "mask"}
    _, splits, report = run({"train": frame}, tmp_path / "p", features=[Categorical("user")], **options)
    train = splits["train"]
    assert train.columns == ["user", "click", "buy", "w", "__group__"]
    assert str(train["click"].to_list()) == str(train["buy"].to_list()) == "[1.0, nan, 0.0]"
    assert train["w"].to_list() == [0.5, 2.0, 0.0]
    assert train["w"].dtype == pl.Float32
    assert train["__group__"].to_list() == [7, 3, 7]
    assert train["__group__"].dtype == pl.Int64
    assert report["label_mean"]["train"] == {"click": 0.5, "buy": 0.5}
    assert not (tmp_path / "p" / "groups.parquet").exists()


def test_groups_that_are_text_get_codes_over_all_splits(tmp_path):
    data = {
        "train": pl.DataFrame({"user": ["u2", "u9"], "x": ["a", "b"], "label": [0, 1]}),
        "test": pl.DataFrame({"user": ["u1", "u2"], "x": ["a", "b"], "label": [0, 1]}),
    }
    _, splits, _ = run(data, tmp_path / "p", features=[Categorical("x"), Categorical("user")], group="user")
    assert [splits[name]["__group__"].to_list() for name in ("train", "test")] == [[1, 2], [0, 1]]
    assert pl.read_parquet(tmp_path / "p" / "groups.parquet").rows() == [("u1", 0), ("u2", 1), ("u9", 2)]
    # Text that spells integers keeps their values.
    for name in data:
        data[name] = data[name].with_columns(user=pl.Series(["-5", "40"]))
    _, splits, _ = run(data, tmp_path / "p", features=[Categorical("x"), Categorical("user")], group="user")
    assert splits["test"]["__group__"].to_list() == [-5, 40]


def test_text_labels_need_their_positive_class(tmp_path):
    frame = pl.DataFrame({"x": ["a", "b", "a"], "income": [" <=50K", " >50K", " <=50K"]})
    features = [Categorical("x")]
    with pytest.raises(SchemaError, match=r"'income' holds '<=50K'.*label_positive"):
        run({"train": frame}, tmp_path / "p", features=features, labels="income")
    positive = {"labels": "income", "label_positive": {"income": ">50K"}}
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=features, **positive)
    assert splits["train"]["income"].to_list() == [0, 1, 0]
    holes = frame.with_columns(income=pl.Series(["nan", ">50K", None]))
    _, splits, _ = run({"train": holes}, tmp_path / "p", features=features, **positive, missing_labels="mask")
    assert str(splits["train"]["income"].to_list()) == "[nan, 1.0, nan]"
    with pytest.raises(SchemaError, match=r"^train: label 'income' never holds 'yes' in train"):
        run({"train": frame}, tmp_path / "p", features=features, **{**positive, "label_positive": {"income": "yes"}})


# -------------------------------------------------------------------------------------------------------------- splits


def test_row_hash_is_splitmix64():
    # The published first outputs of SplitMix64 with seed 0.
    assert pl.select(row_hash(pl.int_range(3), 0)).to_series().to_list() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def splitmix64(row: int) -> int:
    z = (row + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def numbered(num_rows: int) -> pl.DataFrame:
    return pl.DataFrame({"row": range(num_rows), "label": [0, 1] * (num_rows // 2)})


def test_random_split_is_deterministic_and_keeps_order(tmp_path):
    features = [Numeric("row", "none")]
    _, first, _ = run(numbered(10_000), tmp_path / "a", features=features)
    _, again, _ = run(numbered(10_000).lazy(), tmp_path / "b", features=features)
    _, other, _ = run(numbered(10_000), tmp_path / "c", features=features, seed=1)
    assert all(first[name].equals(again[name]) for name in first)
    assert not first["test"].equals(other["test"])
    assert first["test"]["row"].to_list() == [row for row in range(10_000) if splitmix64(row) >= 0.9 * 2**64]
    assert [len(first[name]) for name in ("train", "valid", "test")] == pytest.approx([8000, 1000, 1000], rel=0.1)
    rows = [first[name]["row"].to_list() for name in first]
    assert all(part == sorted(part) for part in rows)
    assert sorted(row for part in rows for row in part) == list(range(10_000))
    _, halves, _ = run(numbered(1000), tmp_path / "d", features=features, split=(1, 0, 1))
    assert set(halves) == {"train", "test"}


@pytest.mark.parametrize("kind", ["integer", "text", "date", "date text"])
def test_split_by_time(tmp_path, kind):
    order = np.random.default_rng(0).permutation(100)
    times = pl.Series("time", order)
    if kind == "text":
        times = times.cast(pl.String)
    elif kind.startswith("date"):
        times = pl.Series("time", np.datetime64("2024-01-01") + order)
        times = times.cast(pl.String) if kind == "date text" else times
    frame = pl.DataFrame({"row": order, "time": times, "label": [0, 1] * 50})
    _, splits, report = run(frame, tmp_path / "p", features=[Numeric("row", "none")], split_by="time")
    assert splits["train"]["row"].to_list() == [row for row in order if row < 80]
    assert sorted(splits["valid"]["row"]) == list(range(80, 90))
    assert sorted(splits["test"]["row"]) == list(range(90, 100))
    assert report["left_out"] == {"time": "ignored: the split goes by it"}


def test_rows_of_the_same_time_stay_together(tmp_path):
    frame = pl.DataFrame({"x": range(10), "time": [1] * 7 + [2] * 3, "label": [0, 1] * 5})
    _, splits, _ = run(frame, tmp_path / "p", features=[Numeric("x", "none")], split_by="time", split=(6, 0, 4))
    assert [len(splits["train"]), len(splits["test"])] == [7, 3]


# ------------------------------------------------------------------------------------------------------- files, folder


CSV = "label, item ,price\n1,a,2.5\n0, b ,\n1,a,4\n"


@pytest.mark.parametrize(
    "content",
    [
        CSV,
        CSV.replace("\n", "\r\n"),
        "\ufeff" + CSV,
        CSV.rstrip("\n"),
        CSV + "\n\n",
        CSV.replace("1,a,", '1,"a",'),
        CSV.replace(",a,", ',"a ",'),
    ],
)
def test_harmless_differences_of_csv_files_do_not_matter(tmp_path, content):
    path = tmp_path / "train.csv"
    path.write_bytes(content.encode())
    _, splits, _ = run({"train": path}, tmp_path / "p", features=[Categorical("item"), Numeric("price", "none")])
    assert splits["train"].rows() == [(3, 2.5, 1.0), (4, 3.25, 0.0), (3, 4.0, 1.0)]


def test_quoted_cells_hold_separators_newlines_and_quotes(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('label,title\n1,"a,\nb"\n0,"say ""hi"""\n')
    run({"train": path}, tmp_path / "p", features=[Categorical("title")])
    assert [value for value, _, _ in vocabulary(tmp_path / "p", "title")] == ["a,\nb", 'say "hi"']


def test_gzip_tsv_without_header(tmp_path):
    import gzip

    path = tmp_path / "train.txt.gz"
    path.write_bytes(gzip.compress(b"1\ta\t\n0\tb\t3\n"))
    options = {"columns": ["label", "item", "price"], "features": [Categorical("item"), Numeric("price", "none")]}
    _, splits, _ = run({"train": path}, tmp_path / "p", **options)
    assert splits["train"].rows() == [(3, 3.0, 1.0), (4, 3.0, 0.0)]


def test_missing_values(tmp_path):
    frame = pl.DataFrame({"x": ["?", "a", "", " ? "], "label": [0, 1, 0, 1]})
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=[Categorical("x")], missing_values=("", "?"))
    assert splits["train"]["x"].to_list() == [1, 3, 1, 1]


def test_the_order_of_columns_does_not_matter(tmp_path):
    frame = pl.DataFrame({"a": ["x", "y"] * 20, "b": [i / 3 for i in range(40)], "label": [0, 1] * 20})
    turned = frame.select("label", "b", "a")
    features = [Categorical("a"), Numeric("b")]
    _, first, _ = run({"train": frame, "valid": frame}, tmp_path / "p", features=features)
    _, second, _ = run({"train": turned, "valid": turned}, tmp_path / "q", features=features)
    assert first["valid"].equals(second["valid"])
    for name in ("schema.json", "report.json"):
        mine, theirs = ((tmp_path / folder / name).read_text() for folder in "pq")
        assert name == "report.json" or mine == theirs
    _, third, _ = run({"train": frame, "valid": turned}, tmp_path / "r")  # all inferred
    assert third["valid"].equals(first["valid"])


def test_row_groups_and_parquet_input(tmp_path):
    import pyarrow.parquet as pq

    frame = numbered(70_000).with_columns(x=pl.col("row") % 5)
    frame.write_parquet(tmp_path / "raw.parquet")
    _, splits, _ = run({"train": tmp_path / "raw.parquet"}, tmp_path / "p", features=[Categorical("x")], ignore="row")
    metadata = pq.ParquetFile(tmp_path / "p" / "train" / "part-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [65_536, 4_464]
    assert splits["train"]["x"].to_list() == [3 + i % 5 for i in range(70_000)]
    (tmp_path / "parts").mkdir()
    frame.head(30_000).write_parquet(tmp_path / "parts" / "0.parquet")
    frame.tail(40_000).write_parquet(tmp_path / "parts" / "1.parquet")
    _, parts, _ = run({"train": tmp_path / "parts"}, tmp_path / "q", features=[Categorical("x")], ignore="row")
    assert parts["train"].equals(splits["train"])


def test_an_existing_folder_is_kept_unless_told(tmp_path):
    frame = pl.DataFrame({"x": ["a", "b"], "label": [0, 1]})
    prepare({"train": frame}, tmp_path / "p", features=[Categorical("x")], log=None)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        prepare({"train": frame}, tmp_path / "p", features=[Categorical("x")], log=None)
    with pytest.raises(SchemaError):  # fails half way: the old folder is still whole, and nothing else is left
        prepare({"train": frame}, tmp_path / "p", features=[Numeric("x")], log=None, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert Schema.load(tmp_path / "p")["x"].num_embeddings == 5
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"mine is a folder with other files \(thesis.txt\)"):
        prepare({"train": frame}, tmp_path / "mine", log=None, overwrite=True)


# ------------------------------------------------------------------------------------------------------------ inference


def test_types_are_inferred_with_reasons(tmp_path):
    n = 400
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "row_id": range(n),
            "user_id": rng.integers(0, 90, n),
            "user": rng.integers(1000, 1090, n),
            "age": rng.integers(17, 90, n),
            "capital-gain": [0] * 300 + list(range(0, 100_000, 1000)),
            "clicks_7d": (rng.lognormal(1, 2, n)).astype(int),
            "weekday": rng.integers(0, 7, n),
            "price": rng.normal(size=n),
            "floats": pl.Series([1.0, 2.0, None, 3.0] * 100),
            "zip": ["02139", "94110"] * 200,
            "city": ["Rome", "Oslo"] * 200,
            "genres": ["Drama|Comedy", "Drama"] * 200,
            "tags": [["a"], ["b", "c"]] * 200,
            "hash": [f"h{i}" for i in range(n)],
            "same": ["x"] * n,
            "maybe": [None, "x"] * 200,
            "empty": pl.Series([None] * n, dtype=pl.String),
            "hours": ["40", "?", "38", "20"] * 100,
            "label": [0, 1] * 200,
        }
    )
    expected = {
        "row_id": None,
        "user_id": Categorical("user_id"),
        "user": Categorical("user"),
        "age": Numeric("age"),
        "capital-gain": Numeric("capital-gain", "log_standard"),
        "clicks_7d": Numeric("clicks_7d", "log_standard"),
        "weekday": Categorical("weekday"),
        "price": Numeric("price"),
        "floats": Categorical("floats"),
        "zip": Categorical("zip"),
        "city": Categorical("city"),
        "genres": MultiValued("genres"),
        "tags": MultiValued("tags"),
        "hash": None,
        "same": None,
        "maybe": Categorical("maybe"),
        "empty": None,
        "hours": Categorical("hours"),
    }
    guesses = infer_features(RawTable((frame.lazy(),), "test"), [name for name in frame.columns if name != "label"])
    assert {guess.name: guess.feature for guess in guesses} == expected
    assert all(guess.reason for guess in guesses)
    reasons = {guess.name: guess.reason for guess in guesses}
    assert reasons["same"] == "ignored: always 'x'"
    assert "'?' (missing_values?)" in reasons["hours"]
    as_text = frame.drop("tags").with_columns(pl.all().exclude("tags").cast(pl.String))
    names = [name for name in as_text.columns if name not in ("label", "floats")]
    guesses = infer_features(RawTable((as_text.lazy(),), "test"), names)
    assert {g.name: g.feature for g in guesses} == {n: expected[n] for n in names}

    messages: list[Any] = []
    features = [Categorical("price"), Sequence("genres")]
    with pytest.raises(SchemaError, match=r"column 'price' holds .*expected text or integers"):
        run({"train": frame}, tmp_path / "p", features=features)
    schema, _, report = run(
        {"train": frame}, tmp_path / "p", features=features[1:], ignore="hours", log=messages.append
    )
    assert [f.name for f in schema.features][:3] == ["genres", "user_id", "user"]
    assert set(report["left_out"]) == {"row_id", "hash", "same", "empty", "hours"}
    assert messages[0].row_count == len(frame.columns)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1e30, 2e30], Numeric),
        ([0.0, 2.0**63], Numeric),
        ([0.0, 2.0**62], Categorical),
        ([-(2.0**63), 1.0], Numeric),
        ([2**63, 2**64 - 1], Categorical),  # integers stay what they are
        (["1" + "0" * 30, "2" + "0" * 30], Categorical),
    ],
)
def test_floats_beyond_the_integers_are_numbers(tmp_path, values, kind):
    dtype = pl.UInt64 if values[0] == 2**63 else None
    frame = pl.DataFrame({"x": pl.Series(values * 3, dtype=dtype), "label": [0, 1] * 3})
    schema, splits, _ = run({"train": frame}, tmp_path / "p")
    assert type(schema["x"]) is kind
    assert splits["train"]["x"].n_unique() == 2


def test_a_sample_does_not_decide_alone_what_is_left_out(monkeypatch):
    monkeypatch.setattr("ctrlib.data.infer.SAMPLE_ROWS", 100)
    values = ["a"] * 1000
    values[501] = "b"
    frame = pl.LazyFrame({"nearly": values, "same": ["a"] * 1000})
    nearly, same = infer_features(RawTable((frame,), "test"))
    assert (nearly.feature, same.feature) == (Categorical("nearly"), None)


# -------------------------------------------------------------------------------------------------- encoding raw rows


@pytest.fixture
def fitted(tmp_path):
    frame = pl.DataFrame({"user": [1, 2, 1, 3], "price": [1.0, 2.0, 3.0, 2.0], "label": [0, 1, 0, 1]})
    features = [Categorical("user"), Numeric("price", "minmax")]
    schema = prepare({"train": frame}, tmp_path / "p", features=features, log=None)
    return schema, tmp_path / "p" / "vocab"


def test_raw_rows_are_encoded_by_name(fitted, tmp_path):
    schema, vocab = fitted
    path = tmp_path / "new.csv"
    path.write_text("note,price,user\nhi,3,2\n,,99\n,1,\n")
    columns, counts = Encoder.of(schema, vocab.parent).transform_table(read_raw(path, tmp_path / "t"))
    assert columns.ids.tolist() == [[4], [2], [1]]
    assert columns.floats[:, 0].tolist() == [1.0, 0.5, 0.0]
    assert (counts.missing, counts.unseen, counts.ids) == ({"user": 1}, {"user": 1}, {"user": 3})
    assert counts.ignored == ["note"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [1]}, r"columns \['price'\] are missing"),
        ({"user": ["1.0", "2.0"], "price": [1.0, 2.0]}, "column 'user' holds values of kind text"),
        ({"user": [1.5, 2.0], "price": [1.0, 2.0]}, "row 1, column 'user' holds 1.5.*whole numbers"),
        ({"user": [1, 2], "price": ["cheap", "dear"]}, "column 'price' holds 'cheap', and no other row is better"),
        ({"user": [[1], [2]], "price": [1.0, 2.0]}, r"column 'user' has type List\(Int64\), expected text or integer"),
        ({"user": [1, 2], "price": [[1.0], [2.0]]}, "column 'price' has type .* expected a number"),
    ],
)
def test_retyped_columns_are_refused(fitted, tmp_path, columns, message):
    schema, vocab = fitted
    with pytest.raises(SchemaError, match=message):
        Encoder.of(schema, vocab.parent).transform(pl.DataFrame(columns))


def test_a_vocabulary_of_other_data_is_refused(fitted, tmp_path):
    schema, vocab = fitted
    table = pl.read_parquet(vocab / "user.parquet")
    table.reverse().write_parquet(vocab / "user.parquet")
    with pytest.raises(SchemaError, match=r"user.parquet is damaged: .* `ctrlib prepare ... --out .*p --overwrite`"):
        Encoder.of(schema, vocab.parent)
    write_manifest(vocab.parent)
    with pytest.raises(SchemaError, match="belongs to other data"):
        Encoder.of(schema, vocab.parent)
    (vocab / "user.parquet").unlink()
    with pytest.raises(SchemaError, match="is missing"):
        Encoder.of(schema, vocab.parent)


# ------------------------------------------------------------------------------------------------- names and arguments


def with_history(number: int = 300) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    price = rng.integers(1, 10_000, number)  # distinct integers, so inferred as numeric
    return pl.DataFrame(
        {
            "item_price": price,
            "shop": ["a", "b", "c"] * (number // 3),
            "seen": [f"{a}|{b}" for a, b in zip(price, np.roll(price, 1))],
            "label": [0, 1] * (number // 2),
        }
    )


def test_a_shared_vocabulary_makes_its_column_categorical(tmp_path):
    frame = {"train": with_history()}
    assert isinstance(run(frame, tmp_path / "p")[0]["item_price"], Numeric)
    sequence = Sequence("seen", vocabulary="item_price", min_count=2)
    schema, _, report = run(frame, tmp_path / "p", features=[sequence])
    assert isinstance(schema["item_price"], Categorical)
    assert (schema["item_price"].min_count, schema["shop"].min_count) == (2, 1)
    assert list(schema.vocabularies) == ["item_price", "shop"]
    assert report["features"]["item_price"]["reason"] == "'seen' shares its vocabulary"
    schema, *_ = run(frame, tmp_path / "p", features=[sequence], ignore="item_price")
    assert list(schema.vocabularies) == ["item_price", "shop"]


def test_a_misspelt_vocabulary_is_refused(tmp_path):
    frame = {"train": with_history()}
    with pytest.raises(SchemaError, match=r"'seen' has vocabulary='shpo', which is neither .* did you mean \['shop'\]"):
        run(frame, tmp_path / "p", features=[Sequence("seen", vocabulary="shpo")])
    with pytest.raises(SchemaError, match=r"vocabulary='item_price', which is numeric"):
        run(frame, tmp_path / "p", features=[Sequence("seen", vocabulary="item_price"), Numeric("item_price")])
    both = [Sequence("seen", vocabulary="things"), Categorical("item_price", vocabulary="things")]
    assert list(run(frame, tmp_path / "p", features=both)[0].vocabularies) == ["things", "shop"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_positive": {"clik": "yes"}}, SchemaError, r"label_positive names \['clik'\].*\['label'\]"),
        ({"on_bad_row": "ignore"}, ValueError, r"on_bad_row is 'ignore', expected one of \('raise', 'skip'\)"),
        ({"missing_labels": "error"}, ValueError, r"missing_labels is 'error', expected one of \('raise', 'mask'\)"),
        ({"min_count": 0}, ValueError, "min_count is 0, expected at least 1"),
        ({"max_values": 0}, ValueError, "max_values is 0"),
        ({"features": [Categorical("shop", min_count=0)]}, ValueError, "min_count of feature 'shop' is 0"),
        ({"features": [MultiValued("seen", max_length=0)]}, ValueError, "max_length of feature 'seen' is 0"),
    ],
)
def test_arguments_are_checked_before_work_begins(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "nowhere.csv", tmp_path / "p", **options)


def test_an_empty_cell_is_missing_whatever_the_missing_values(tmp_path):
    path = tmp_path / "raw.csv"
    path.write_text('label,item,shop\n1,"",a\n0,,b\n1,NA,c\n0,x,d\n')
    features = [Categorical("item"), Categorical("shop")]
    _, splits, _ = run({"train": path}, tmp_path / "p", features=features, missing_values=("NA",))
    assert splits["train"]["item"].to_list() == [1, 1, 1, 3]
    frame = pl.DataFrame({"item": ["", " ", None, "x"], "shop": list("abcd"), "label": [0, 1, 0, 1]})
    _, splits, _ = run({"train": frame}, tmp_path / "p", features=features, missing_values=("NA",))
    assert splits["train"]["item"].to_list() == [1, 1, 1, 3]


def test_types_are_inferred_from_train_alone(tmp_path):
    # In the newest tenth, which is test, `code` has fractions and `late` its only second value.
    frame = pl.DataFrame(
        {
            "time": range(1000),
            "code": [float(i % 30) for i in range(900)] + [0.5] * 100,
            "late": ["a"] * 900 + ["b"] * 100,
            "shop": ["a", "b"] * 500,
            "label": [0, 1] * 500,
        }
    )
    with pytest.raises(SchemaError, match=r"row 901, column 'code' holds 0.5"):
        run(frame, tmp_path / "p", split_by="time")
    frame = frame.with_columns(code=pl.col("code").floor())
    schema, _, report = run(frame, tmp_path / "p", split_by="time")
    assert isinstance(schema["code"], Categorical)
    assert report["left_out"]["late"].startswith("ignored: always")


def test_shares_are_of_cells_and_ids(tmp_path):
    frame = pl.DataFrame({"seen": ["a|b", "", None, "a|c"], "label": [0, 1, 0, 1]})
    _, _, report = run({"train": frame}, tmp_path / "p", features=[Sequence("seen", min_count=2)])
    assert report["features"]["seen"]["empty"] == {"train": 0.5}
    assert report["features"]["seen"]["missing"] == {"train": 0}
    assert report["features"]["seen"]["oov"] == {"train": 0.5}
