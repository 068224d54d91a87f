"""Spark prepares the same folder as one machine, bit for bit, and says the same of damaged data."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from every_kind import COLUMNS, EVERY_KIND, every_kind
from kinds import KINDS, WAYS, column_of, feature_of

import ctrlib as ctr
from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.prepare import prepare
from ctrlib.ranking import Source, count, count_with_spark, scores
from ctrlib.schema import Categorical, MultiValued, Numeric

ROOT = Path(__file__).parent.parent
WIDE = "12345678901234567890123456789012345678"
REAL = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    if importlib.util.find_spec("pyspark") is None:
        pytest.skip('PySpark is not installed: pip install "ctrlib[spark]"')
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("PySpark needs Java 17 or later, and there is no java on the path and no JAVA_HOME")
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.driver.extraJavaOptions", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")  # starts twice as fast
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    yield session
    session.stop()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: Any) -> None:
    monkeypatch.setattr("ctrlib.data.spark.PIECE_ROWS", 400)


def check_same(spark: Any, tmp_path: Path, data: Any, spark_data: Any, **options: Any) -> dict[str, int]:
    """Prepare with both; the number of files of each split that Spark wrote."""
    options = {"log": None, "overwrite": True, **options}
    expected = prepare(data, tmp_path / "polars", **options)
    assert prepare(spark_data, tmp_path / "spark", spark=spark, **options) == expected
    assert fingerprint(tmp_path / "spark") == fingerprint(tmp_path / "polars")
    files = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "part-" not in path.name)
             for folder in (tmp_path / "polars", tmp_path / "spark")]  # fmt: skip
    assert files[0] == files[1]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("polars", "spark")]
    assert reports[0] == reports[1]
    return {split: len(list((tmp_path / "spark" / split).iterdir())) for split in reports[0]["rows"]}


def test_a_text_file(spark, tmp_path):
    path = every_kind(tmp_path)
    files = check_same(spark, tmp_path, path, path, **EVERY_KIND["random"])
    assert files == {"train": 2, "valid": 2, "test": 2}
    skipped = json.loads((tmp_path / "spark" / "report.json").read_text())["skipped"]["data"]
    assert skipped == {"too few cells": 6, "price: not a finite number": 7}


def test_a_stratified_split(spark, tmp_path):
    path = every_kind(tmp_path)  # by a label of text, some of whose rows are skipped
    check_same(spark, tmp_path, path, path, **EVERY_KIND["random"], stratify="buy")


def test_a_spark_frame_split_by_time(spark, tmp_path):
    rows = pl.read_csv(
        every_kind(tmp_path),
        separator="\t",
        has_header=False,
        new_columns=COLUMNS,
        truncate_ragged_lines=True,
        infer_schema=False,
    )
    rows = rows.filter(pl.col("score").is_not_null()).with_columns(
        pl.col("seen").str.split("|"), pl.col("age", "time").cast(pl.Int32, strict=False), none=pl.lit(None, pl.String)
    ).with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))  # fmt: skip
    options = {**EVERY_KIND["by time"], "ignore": ("row", "score", "w")}
    rows.sample(fraction=1.0, shuffle=True, seed=0).write_parquet(tmp_path / "rows.parquet")
    # Three partitions, the first without a row.
    frame = spark.read.parquet(str(tmp_path / "rows.parquet")).repartitionByRange(3, "row").orderBy("row")
    check_same(spark, tmp_path, rows, frame, **options)


def test_parquet_files_that_are_split_already(spark, tmp_path):
    for split, num_rows in (("train", 150), ("test", 40)):
        (tmp_path / split).mkdir()
        for number in range(3):
            columns = {
                "label": [0, 1] * num_rows,
                "item": range(2 * num_rows),
                "price": np.arange(2 * num_rows) / (3 + number),
            }
            pl.DataFrame(columns).write_parquet(tmp_path / split / f"{number}.parquet", row_group_size=300)
    data = {"train": tmp_path / "train", "test": tmp_path / "test"}
    # Only numbers, so that there is nothing to look up.
    files = check_same(spark, tmp_path, data, data, features=[ctr.Numeric("price")], ignore="item")
    assert files == {"train": 3, "test": 1}
    frames = {"train": pl.read_parquet(tmp_path / "train"), "test": pl.read_parquet(tmp_path / "test").lazy()}
    check_same(spark, tmp_path, frames, frames, features=[ctr.Categorical("item"), ctr.Numeric("price")])


def test_newer_data_like_the_old(spark, tmp_path):
    for number in (0, 1):
        columns = {
            "item": [f"i{row % (7 + 5 * number) + number}" for row in range(900)],
            "price": np.arange(900) % 11 / 7,
        }
        frame = pl.DataFrame(columns).with_columns(tags=pl.col("item") + "|t", label=pl.Series([0, 1] * 450))
        frame.write_csv(tmp_path / f"{number}.csv")
    features = [ctr.Categorical("item", min_count=80), ctr.MultiValued("tags"), ctr.Numeric("price")]
    path = tmp_path / "0.csv"
    check_same(spark, tmp_path, path, path, features=features)
    shutil.copytree(tmp_path / "polars", tmp_path / "old")
    path = tmp_path / "1.csv"
    for extend in (False, True):
        check_same(spark, tmp_path, path, path, like=tmp_path / "old", extend=extend)
        report = json.loads((tmp_path / "spark" / "report.json").read_text())
        assert report["new_values"] == ({"item": 0, "tags": 6} if extend else {})


def test_criteo(spark, tmp_path, monkeypatch):
    path = REAL / "criteo_10k" / "train.txt.gz"
    if not path.exists():
        pytest.skip(f"no real data: {path} does not exist")
    monkeypatch.setattr("ctrlib.data.spark.PIECE_ROWS", 6000)
    counts, categories = [f"I{i}" for i in range(1, 14)], [f"C{i}" for i in range(1, 27)]
    features = [ctr.Categorical(name, bucket="log_squared") for name in counts[:6]]
    features += [ctr.Numeric(name, "log_standard") for name in counts[6:]]
    features += [ctr.Categorical(name, min_count=2) for name in categories]
    options = {"columns": ["label", *counts, *categories], "separator": "\t", "features": features}
    check_same(spark, tmp_path, path, path, **options)


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"price": ["1"] * 700 + ["dear"] + ["2"] * 99}, {}),
        ({"price": ["dear"] * 800}, {}),
        ({"time": ["2024-05-31"] * 500 + ["noon"] * 300}, {"split_by": "time"}),
        ({}, {"features": [ctr.Categorical("colour")]}),
        ({}, {"split": (1, 1e-9, 0)}),
        ({"*": [1] * 800}, {}),
    ],
)  # fmt: skip
def test_damaged_data_is_refused_in_the_same_words(spark, tmp_path, columns, options):
    rows = pl.DataFrame(
        {"label": [0, 1] * 400, "item": ["a", "b"] * 400, "price": ["1"] * 800, **columns}, strict=False
    )
    options = {"features": [ctr.Categorical("item"), ctr.Numeric("price")], "log": None, **options}
    messages = []
    for session in (None, spark):
        with pytest.raises((ctr.DataError, ctr.SchemaError)) as error:
            prepare(rows, tmp_path / "out", spark=session, **options)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]
    assert list(tmp_path.iterdir()) == []  # nothing half done


def test_the_table_of_kinds(spark, tmp_path):
    """Every raw type as every id feature (`kinds`), from parquet, and from Spark's own frames."""
    columns, features, changed = {}, [], []
    for kind, (cells, _) in KINDS.items():
        for way in WAYS:
            name = f"{kind}, {way}"
            columns[name] = column_of(way, cells)
            features.append(feature_of(way, name))
            # Spark does not read times in nanoseconds from parquet, and makes integers of columns of nulls.
            changed += [name] if kind in ("datetime in ns", "null") else []
    frame = pl.DataFrame(columns).with_columns(label=pl.Series([0, 1, 1]))
    frame.write_parquet(tmp_path / "rows.parquet")
    data = {"train": tmp_path / "rows.parquet", "valid": tmp_path / "rows.parquet"}
    check_same(spark, tmp_path, data, data, features=features)
    for kind, (_, texts) in KINDS.items():
        for way in WAYS:
            known = pl.read_parquet(tmp_path / "spark" / "vocab" / f"{kind}, {way}.parquet", glob=False)["value"]
            assert set(known) == set(texts), f"{kind}, {way}"

    frame = frame.drop(changed)
    frame.write_parquet(tmp_path / "rows.parquet")
    features = [feature for feature in features if feature.name not in changed]
    zone = spark.conf.get("spark.sql.session.timeZone")
    spark.conf.set("spark.sql.session.timeZone", "America/New_York")  # in which times with any zone come
    try:
        rows = spark.read.parquet(str(tmp_path / "rows.parquet"))
        check_same(spark, tmp_path, {"train": frame}, {"train": rows}, features=features)
    finally:
        spark.conf.set("spark.sql.session.timeZone", zone)


def test_types_that_only_spark_has(spark, tmp_path):
    """Texts of ids, also of times from before there were time zones or the Gregorian calendar."""
    cells = {
        "void": ("null", []),
        "char": ("cast('a' as char(3))", ["a"]),
        "collated": ("'A' collate utf8_lcase", ["A"]),
        "wide": (
            "cast('12345678901234567890123456789012345678' as decimal(38, 0))",
            ["12345678901234567890123456789012345678"],
        ),
        "unsigned": ("cast('18446744073709551615' as decimal(20, 0))", ["18446744073709551615"]),
        "first date": ("date'0001-01-01'", ["0001-01-01"]),
        "Julian date": ("date'1500-02-28'", ["1500-02-28"]),
        "old date": ("date'1850-06-01'", ["1850-06-01"]),
        "old time": ("timestamp_ntz'1850-06-01 08:00:00.5'", ["1850-06-01 08:00:00.5"]),
        "old zoned time": ("timestamp'1850-06-01 08:00:00+00:00'", ["1850-06-01 08:00:00"]),
        "time of day": ("time'08:00:00'", ["08:00:00"]),
    }
    row = spark.sql("select 1 as label, " + ", ".join(f"{cell} as `{name}`" for name, (cell, _) in cells.items()))
    lists = row.selectExpr("label", *(f"array(`{name}`) as `{name}`" for name in cells))
    for frame, kind in ((row, ctr.Categorical), (lists, ctr.MultiValued)):
        prepare({"train": frame}, tmp_path / "p", features=map(kind, cells), log=None, overwrite=True)
        for name, (_, texts) in cells.items():
            found = pl.read_parquet(tmp_path / "p" / "vocab" / f"{name}.parquet", glob=False)["value"]
            assert found.to_list() == texts, name


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("interval '1' year", "Spark's type interval year, which parquet cannot hold: cast it"),
        ("array(interval '1-2' year to month)", "Spark's type array<interval year to month>, which parquet"),
        ("make_interval(1)", "Spark's type interval, which parquet cannot hold: cast it"),
        ("interval '1' day", r"has type Duration\(.*\), expected text or integer"),
        ("X'01'", "has type Binary, expected text or integer"),
        ("map(1, 2)", r"has type Map\(.*, expected text or integer"),
        ("named_struct('interval', 1)", r"has type Struct\(.*, expected text or integer"),
        ("parse_json('1')", r"has type Struct\(.*, expected text or integer"),
        ("1.5", r"row 1, column 'x' holds Decimal\('1.5'\); expected text or integers"),
    ],
)  # fmt: skip
def test_types_of_spark_that_are_no_ids(spark, tmp_path, cell, message):
    frame = spark.sql(f"select 1 as label, {cell} as x")
    with pytest.raises(ctr.SchemaError, match=f"^train: .*{message}"):
        prepare({"train": frame}, tmp_path / "p", features=[ctr.Categorical("x")], log=None)


def test_spark_frames_that_cannot_be_prepared(spark, tmp_path):
    frame = spark.createDataFrame([(1, "a"), (0, "b")], "label int, item string")
    with pytest.raises(ctr.DataError, match="train has no rows: expected at least one"):
        prepare({"train": frame.where("label > 1")}, tmp_path / "out", log=None)
    with pytest.raises(ctr.SchemaError, match=r"train: columns \['item'\] appear more than once"):
        prepare({"train": frame.join(frame.select("item"))}, tmp_path / "out", log=None)
    with pytest.raises(TypeError, match=r"is a list of .*, expected paths of files"):
        prepare([1, 2], tmp_path / "out", spark=spark, log=None)


def test_damaged_files_are_named(spark, tmp_path):
    path = tmp_path / "raw.parquet"
    rng = np.random.default_rng(0)
    pl.DataFrame({"label": [0, 1] * 500, "item": rng.integers(0, 10**9, 1000).astype(str)}).write_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 3000 + content[3004:])
    with pytest.raises(ctr.DataError, match=r"raw.parquet cannot be read, it may be truncated or damaged"):
        prepare(path, tmp_path / "out", features=[ctr.Categorical("item")], spark=spark, log=None)


def test_pyspark_is_needed_by_those_only_who_use_it(tmp_path):
    code = f"""
import sys
sys.modules["pyspark"] = None
import ctrlib as ctr, polars as pl
frame = pl.DataFrame({{"item": ["a", "b"], "label": [0, 1]}})
ctr.prepare({{"train": frame}}, {str(tmp_path / "p")!r}, features=[ctr.Categorical("item")], log=None)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_counts_of_a_ranking_are_those_of_one_machine(spark: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "item": [f"i{code}" for code in rng.integers(0, 40, 3_000)],
            "row": [f"r{code}" for code in range(3_000)],
            "price": rng.normal(size=3_000),
            "tags": ["|".join(f"t{tag}" for tag in rng.integers(0, 9, 3)) for _ in range(3_000)],
            "click": rng.integers(0, 2, 3_000),
        }
    )
    features = [Categorical("item"), Categorical("row"), Numeric("price"), MultiValued("tags")]
    folder = tmp_path / "prepared"
    schema = prepare({"train": frame}, folder, features=features, labels="click", spark=spark, log=None)
    whole, parts = count(Source(folder)), count_with_spark(spark, folder, num_parts=3)
    assert len(list((folder / "train").glob("*.parquet"))) > 3  # so that all parts have rows
    assert parts.rows == whole.rows
    for name, joint in whole.by_label["click"].items():
        assert parts.by_label["click"][name].keys.tolist() == joint.keys.tolist()
        assert parts.by_label["click"][name].counts.tolist() == joint.counts.tolist()
    assert scores(parts, schema.features, "click") == scores(whole, schema.features, "click")
    with pytest.raises(ValueError, match=r"num_parts .*must be 1 or more, got 0"):
        count_with_spark(spark, folder, num_parts=0)
