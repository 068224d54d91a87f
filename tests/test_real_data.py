"""The data-set scripts on the real files, where these lie in ../shared/data (or where CTRLIB_DATA says)."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))


def raw(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data: {REAL / name} does not exist")
    return REAL / name


def prepare(script: str, name: str, out: Path, *flags: str) -> dict[str, dict[str, int]]:
    command = [sys.executable, str(ROOT / "datasets" / script), "--raw", str(raw(name)), "--out", str(out), *flags]
    subprocess.run(command, check=True, capture_output=True)
    report: dict[str, dict[str, int]] = json.loads((out / "report.json").read_text())
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
    flags = ["--tower", "fm", "--dim", "8", "--l2", "1e-4", "--batch-size", "1024", "--learning-rate", "0.01", "--json"]
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
