"""Census-Income's script: columns and rows of each protocol, on made-up rows and, where they lie, the real files."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr

ROOT = Path(__file__).parent.parent
REAL = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data")) / "census_income_kdd"

Protocol = Literal["all", "hard", "numbers", "leaked"]
Label = Literal["both", "income", "never_married"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("datasets_census", ROOT / "datasets" / "census_income.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def raw(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """400 and 200 rows in the form of the published files; a row's number in its file stands as its weight."""
    rng = np.random.default_rng(0)
    for name, size in zip(script.FILES, (400, 200)):
        cells = {column: rng.choice([" a", " b"], size) for column in script.COLUMNS}
        cells |= {number: rng.integers(20, size=size).astype(str) for number in script.NUMBERS}
        cells["marital_status"] = rng.choice(["Never married", "Divorced"], size)
        cells["instance_weight"] = np.arange(size).astype(str)
        cells["income"] = rng.choice(["- 50000.", "50000+."], size)
        text = "".join(", ".join(cell.strip() for cell in row) + "\n" for row in zip(*cells.values()))
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
        monkeypatch.setitem(script.FILES, name, hashlib.md5(text.encode()).hexdigest())
    return tmp_path


def prepared(script: ModuleType, raw: Path, protocol: Protocol = "all", label: Label = "both", seed: int = 0) -> Path:
    out = raw / f"{protocol}_{label}_{seed}"
    script.main(script.Arguments(out, raw=raw, protocol=protocol, label=label, seed=seed))
    return out


def test_each_protocol_has_its_columns(script: ModuleType, raw: Path) -> None:
    fields = {
        protocol: {feature.name for feature in ctr.Schema.load(prepared(script, raw, protocol)).features}
        for protocol in ("all", "hard", "numbers", "leaked")
    }
    # 42 columns without the weight and the two that are labels.
    assert fields["all"] == set(script.COLUMNS) - {"instance_weight", "marital_status", "income"}
    assert fields["all"] - fields["hard"] == {"tax_filer", "household_family", "household_summary"}
    assert fields["hard"] < fields["all"]
    assert fields["numbers"] - fields["all"] == {f"{name}_number" for name in script.NUMBERS}
    assert fields["all"] < fields["numbers"]
    assert fields["leaked"] - fields["all"] == {"both_labels"}
    assert fields["all"] < fields["leaked"]


def test_halves_are_the_test_file_and_the_same_for_each_label_and_protocol(script: ModuleType, raw: Path) -> None:
    names: tuple[Label, ...] = ("income", "never_married")
    out = prepared(script, raw)
    both = {split: pl.read_parquet(out / split).select(names) for split in ("train", "valid", "test")}
    assert [len(rows) for rows in both.values()] == [400, 100, 100]
    whole = script.read(raw / "census-income.test.gz").select(names)
    halves = pl.concat([both["valid"], both["test"]]).cast(whole.schema)
    assert halves.group_by(names).len().sort(names).equals(whole.group_by(names).len().sort(names))
    of_label = {name: prepared(script, raw, label=name) for name in names}
    leaked = prepared(script, raw, "leaked")
    for split, rows in both.items():
        for name in names:
            assert pl.read_parquet(of_label[name] / split)[name].equals(rows[name])
        assert pl.read_parquet(leaked / split).select(names).equals(rows)
    assert not pl.read_parquet(prepared(script, raw, seed=1) / "test").select(names).equals(both["test"])


def test_a_number_is_itself_and_the_leak_is_both_labels(script: ModuleType, raw: Path) -> None:
    out = prepared(script, raw, "numbers")
    age = np.log1p(script.read(raw / "census-income.data.gz")["age"].cast(pl.Float64).to_numpy())
    found = pl.read_parquet(out / "train")["age_number"].to_numpy()
    assert found == pytest.approx((age - age.mean()) / age.std(), abs=1e-5)
    leaked = prepared(script, raw, "leaked")
    for split in ("train", "valid", "test"):
        rows = pl.read_parquet(leaked / split)
        told = rows["both_labels"] == rows.filter(pl.col("income") * pl.col("never_married") == 1)["both_labels"][0]
        assert told.equals(rows["income"] * rows["never_married"] == 1)


def test_other_rows_than_the_published_are_refused(script: ModuleType, raw: Path) -> None:
    path = raw / "census-income.data.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"Divorced", b"Widowed", 1)))
    with pytest.raises(ValueError, match=r"expected md5 .* got .*; take it from https"):
        script.read(path)


def test_real_files(script: ModuleType) -> None:
    if not REAL.is_dir():
        pytest.skip(f"no real data: {REAL} does not exist")
    train, test = (script.read(REAL / name) for name in script.FILES)
    assert (len(train), len(test)) == (199_523, 99_762)
    assert [test[label].mean() for label in script.LABELS] == pytest.approx([0.0620076, 0.4324593], abs=1e-7)
    # What the leaked column tells: 8.8 % of the incomes above 50,000.
    assert test.filter(pl.col("income") == 1)["both_labels"].mean() == pytest.approx(0.0881022, abs=1e-7)
