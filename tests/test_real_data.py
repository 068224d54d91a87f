"""The data-set scripts on the real files, where these lie in ../shared/data (or where CTRLIB_DATA says)."""

from __future__ import annotations

import gzip
import json
import os
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from encoder_on_recipes import DATA_SETS, compare, prepared

import ctrlib as ctr
from ctrlib import cli, metrics

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))


def raw(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data: {REAL / name} does not exist")
    return REAL / name


def prepare(script: str, name: str, out: Path, *flags: str) -> dict[str, dict[str, Any]]:
    path = str(ROOT / "datasets" / script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, "--raw", str(raw(name)), "--out", str(out), *flags])
        runpy.run_path(path, run_name="__main__")
    report: dict[str, dict[str, Any]] = json.loads((out / "report.json").read_text())
    return report


def rows_in_tables(out: Path) -> int:
    return sum(feature.num_embeddings or 0 for feature in ctr.Schema.load(out).sparse)


def test_frappe(tmp_path: Path) -> None:
    report = prepare("frappe.py", "frappe_x1", tmp_path / "d")
    assert report["rows"] == {"train": 202_027, "valid": 57_722, "test": 28_860}
    # 5,379 values in train, and 3 reserved ids for each of 10 fields.
    assert rows_in_tables(tmp_path / "d") == 5_379 + 30
    assert report["label_mean"]["test"]["label"] == pytest.approx(9_536 / 28_860)


def test_movielens_1m_in_both_protocols(tmp_path: Path) -> None:
    report = prepare("movielens_1m.py", "movielens_1m", tmp_path / "autoint")
    assert report["rows"] == {"train": 591_209, "valid": 73_901, "test": 73_902}
    assert report["label_mean"]["train"]["label"] == pytest.approx(0.778, abs=1e-3)
    schema = ctr.Schema.load(tmp_path / "autoint")
    names = [feature.name for feature in schema.features]
    assert names == ["gender", "age", "occupation", "zip", "genres", "year", "time"]
    # The paper counts 3,529 features over all rows, time as one; 2 gender + 7 + 21 + 18 genres + years + zip codes.
    assert (schema["gender"].num_embeddings, schema["age"].num_embeddings, schema["genres"].num_embeddings) == (
        5,
        10,
        21,
    )
    assert 3_480 < rows_in_tables(tmp_path / "autoint") - 18 <= 3_528
    frame = pl.read_parquet(tmp_path / "autoint" / "train")
    assert (frame["time"].min(), frame["time"].max()) == (0.0, 1.0)
    assert frame["genres"].list.len().max() == 6

    report = prepare("movielens_1m.py", "movielens_1m", tmp_path / "ids", "--protocol", "ids")
    assert sum(report["rows"].values()) == 739_012
    assert report["rows"]["test"] == pytest.approx(73_901, rel=0.02)


def test_amazon_grocery_with_histories(tmp_path: Path) -> None:
    report = prepare("amazon_grocery.py", "amazon_grocery", tmp_path / "d")
    assert report["rows"] == {"train": 197_268, "valid": 27_644, "test": 28_210}
    assert all(mean["label"] == 0.5 for mean in report["label_mean"].values())
    schema = ctr.Schema.load(tmp_path / "d")
    # Every item is in train, most of them as a positive, all as a negative; 57 categories; 3 reserved ids each.
    assert [feature.num_embeddings for feature in schema.sparse] == [8_713 + 3, 57 + 3, 8_713 + 3, 57 + 3]

    # For orientation, and what the script's docstring says: popularity ranks, the last category does not.
    train, test = (pl.read_parquet(tmp_path / "d" / split) for split in ("train", "test"))
    popularity = train.group_by("item").agg(count=pl.col("label").sum())
    count = test.join(popularity, on="item", how="left", maintain_order="left")["count"].fill_null(0)
    assert metrics.auc(test["label"].to_numpy(), count.to_numpy()) == pytest.approx(0.6551, abs=5e-4)
    same = test.select(pl.col("category_history").list.last() == pl.col("category")).to_series()
    assert metrics.auc(test["label"].to_numpy(), same.cast(pl.Float64).to_numpy()) == pytest.approx(0.502, abs=5e-4)


def test_amazon_grocery_knows_nothing_of_the_present(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "datasets" / "amazon_grocery.py"))
    events, items = script["read"](raw("amazon_grocery"))
    assert len(events) == 151_254 and len(events.unique(["user", "item"])) == len(events)
    last = events.group_by("user", "split").agg(pl.col("time").max()).pivot("split", index="user", values="time")
    assert last.select(((pl.col("train") <= pl.col("valid")) & (pl.col("valid") <= pl.col("test"))).all()).item()
    rows = pl.concat(script["make_rows"](events, items, min_history=0).values())
    assert len(rows) == 2 * len(events)
    assert rows["item_history"].list.len().eq(0).sum() == 2 * 24_693
    seen = events.select("user", "item", "time")
    positives, negatives = rows.filter(pl.col("label") == 1), rows.filter(pl.col("label") == 0)
    assert negatives.join(seen, on=["user", "item"], how="semi").is_empty()
    history = (
        positives.join(seen, on=["user", "item"])
        .select("user", "time", item="item_history")
        .explode("item")
        .drop_nulls()
        .join(seen.rename({"time": "earlier"}), on=["user", "item"], how="left", maintain_order="left")
    )
    assert history.select((pl.col("earlier") < pl.col("time")).all()).item()
    assert history["earlier"].null_count() == 0


def test_movielens_1m_with_histories(tmp_path: Path) -> None:
    flags = ["--protocol", "histories", "--max-length", "5"]
    report = prepare("movielens_1m.py", "movielens_1m", tmp_path / "d", *flags)
    assert report["rows"] == {"train": 591_210, "valid": 73_901, "test": 73_901}
    means = [report["label_mean"][split]["label"] for split in ("train", "valid", "test")]
    assert means == pytest.approx([0.7807, 0.7795, 0.7592], abs=5e-5)
    schema = ctr.Schema.load(tmp_path / "d")
    train, test = (pl.read_parquet(tmp_path / "d" / split) for split in ("train", "test"))
    # Of the 3,700 movies with a rating other than 3, train has 3,626.
    assert schema["movie"].num_embeddings == schema["movie_history"].num_embeddings == 3_626 + 3
    lengths = train["movie_history"].list.len()
    assert lengths.max() == 5 and (lengths == 0).mean() == pytest.approx(0.0207, abs=5e-3)
    # For orientation: a movie's smoothed mean label in train.
    mean = train.group_by("movie").agg(mean=(pl.col("label").sum() + 7.8) / (pl.len() + 10))
    score = test.join(mean, on="movie", how="left", maintain_order="left")["mean"].fill_null(0.78)
    assert metrics.auc(test["label"].to_numpy(), score.to_numpy()) == pytest.approx(0.8076, abs=5e-4)


def test_movielens_1m_histories_are_earlier_and_liked() -> None:
    script = runpy.run_path(str(ROOT / "datasets" / "movielens_1m.py"))
    ratings = script["read"](raw("movielens_1m"))
    rows = script["with_histories"](ratings)
    assert len(rows) == 739_012 and rows["time"].is_sorted()
    lengths = rows["movie_history"].list.len()
    in_train = lengths.head(591_210)
    assert (in_train.mean(), (in_train == 0).mean()) == pytest.approx((37.08, 0.0207), abs=5e-3)
    # How many movies the user liked before does not rank.
    assert 0.45 < metrics.auc(rows["label"].tail(73_901).to_numpy(), lengths.tail(73_901).to_numpy()) < 0.5
    seen = ratings.select(pl.col("user", "movie").cast(pl.Int32), "rating", earlier="time")
    history = (
        rows.gather_every(7)
        .select("user", "time", movie="movie_history")
        .explode("movie")
        .drop_nulls()
        .join(seen, on=["user", "movie"], how="left")
    )
    assert history.select(((pl.col("earlier") < pl.col("time")) & (pl.col("rating") > 3)).all()).item()
    assert history["rating"].null_count() == 0


def test_criteo_in_the_kaggle_format(tmp_path: Path) -> None:
    report = prepare("criteo.py", "criteo_10k", tmp_path / "d")
    assert sum(report["rows"].values()) == 10_000
    schema = ctr.Schema.load(tmp_path / "d")
    assert len(schema.sparse) == 39
    with gzip.open(raw("criteo_10k") / "train.txt.gz", "rt") as file:
        cells = [line.rstrip("\n").split("\t") for line in file]
    missing = sum(row[1] == "" for row in cells) / len(cells)
    assert report["features"]["I1"]["missing"]["train"] == pytest.approx(missing, abs=0.02)


def test_movielens_100k_is_the_same_from_its_home_and_from_the_package(tmp_path: Path) -> None:
    # The package's copy, rebuilt here from the original files in the package's own format.
    source, copy = raw("movielens_100k"), tmp_path / "copy"
    copy.mkdir()
    prepare("movielens_100k.py", "movielens_100k", tmp_path / "home")
    (copy / "ml-100k.inter").write_text("u\ti\tr\tt\n" + (source / "u.data").read_text())
    (copy / "ml-100k.user").write_text("u\ta\tg\to\tz\n" + (source / "u.user").read_text().replace("|", "\t"))
    sys.path.insert(0, str(ROOT / "datasets"))
    try:
        import movielens_100k as script
    finally:
        sys.path.pop(0)
    lines = ["item_id\ttitle\tyear\tclass"]
    for line in (source / "u.item").read_text(encoding="iso-8859-1").splitlines():
        movie, title, *_, flags = line.split("|", 5)
        genres = [genre for genre, flag in zip(script.GENRES, flags.split("|")) if flag == "1"]
        year = title.strip()[-5:-1] if title.strip().endswith(")") else ""
        lines.append(f"{movie}\t{title}\t{year}\t{' '.join(genres)}")
    (copy / "ml-100k.item").write_text("\n".join(lines) + "\n", encoding="iso-8859-1")
    assert script.read(source).equals(script.read(copy))


def test_package_wheel_holds_what_the_script_takes(tmp_path: Path) -> None:
    """The names inside the wheel, so that a change there shows here; the wheel's checksum pins the content."""
    sys.path.insert(0, str(ROOT / "datasets"))
    try:
        import movielens_100k as script
    finally:
        sys.path.pop(0)
    from ctrlib.data.download import DownloadError, extract

    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("other", "")
    with pytest.raises(DownloadError, match="holds no"):
        extract(wheel, {"recbole/dataset_example/ml-100k/ml-100k.inter": "x"}, tmp_path)
    with pytest.raises(DownloadError, match="sha256"):
        script.download_package(script.PACKAGE, checksum=script.PACKAGE_SHA256, folder=tmp_path)


def test_a_model_on_movielens_100k_ranks_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("movielens_100k.py", "movielens_100k", tmp_path / "d")
    capsys.readouterr()
    flags = ["--model", "fm", "--dim", "8", "--l2", "1e-4", "--batch-size", "1024", "--learning-rate", "0.01", "--json"]
    assert cli.main(["train", str(tmp_path / "d"), "--out", str(tmp_path / "m"), "--epochs", "4", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["test_auc"] > 0.765


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("avazu_8k/train.csv.gz", "--label click".split()),
        (
            "amazon_grocery/item_meta.csv.gz",
            "--label i_category --categorical item_id --ignore r_complement r_substitute".split(),
        ),
    ],
)
def test_other_files_prepare_or_are_refused_clearly(
    file: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(
        ["prepare", str(raw(file.split("/")[0]) / file.split("/")[1]), "--out", str(tmp_path / "d"), *flags]
    )
    if file.startswith("avazu"):
        assert status == 0
        schema = ctr.Schema.load(tmp_path / "d")
        assert "id" not in [feature.name for feature in schema.features]  # a row identifier
        assert len(schema.features) > 15
    else:  # a category number is no label
        assert status == 1
        assert "i_category" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["criteo, counts as numbers", "movielens_100k"])
def test_raw_rows_give_what_the_prepared_folder_has(tmp_path: Path, name: str) -> None:
    """As tests/encoder_on_recipes.py says, which does it for every data set and more rows."""
    script, source, flags = DATA_SETS[name]
    data = prepared(ROOT / "datasets" / script, [*flags, "--raw", str(raw(source))], tmp_path / "d", num_rows=600)
    found = compare(data, tmp_path)
    assert found.wrong == []
    assert len(found.roads) == 14


def test_raw_rows_that_are_others_are_noticed(tmp_path: Path) -> None:
    script, source, flags = DATA_SETS["movielens_100k"]
    data = prepared(ROOT / "datasets" / script, [*flags, "--raw", str(raw(source))], tmp_path / "d", num_rows=50)
    data.splits["test"] = data.splits["test"].with_columns(pl.col("zip").reverse())
    found = compare(data, tmp_path)
    assert found.wrong == [*found.roads, *found.scores]
