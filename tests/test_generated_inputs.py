"""Generated tables are refused by name or prepared and scored right: a share of `make inputs`."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import generated_inputs
import input_cases
import polars as pl
import pytest
from generated_inputs import BrokenError, Trials, reason_of, run

import ctrlib as ctr
from ctrlib.data.prepare import prepare
from ctrlib.data.scan import DataError


def test_generated_inputs_are_refused_by_name_or_right(tmp_path: Path) -> None:
    summary = run(Trials(number=24, seed=17), tmp_path)
    assert summary.failures == []
    assert summary.cases == 24
    assert 8 <= summary.results["accepted"] <= 23
    assert list(tmp_path.iterdir()) == []
    assert re.match(r"24 inputs in \d+ s \(.*\): \d+ accepted, \d+ refused \(.*\), 0 failures$", str(summary))


def test_a_case_is_made_again_by_its_number(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(input_cases.draw_case(random.Random("5 7"), tmp_path / name))
    one, other = made
    assert one.options == other.options
    assert [split.cells for split in one.table.splits] == [split.cells for split in other.table.splits]


def lose_a_row(data: Any, out: Path, **options: Any) -> ctr.Schema:
    schema = prepare(data, out, **options)
    path = next((Path(out) / "train").glob("*.parquet"))
    pl.read_parquet(path)[1:].write_parquet(path)
    return schema


def turn_labels(data: Any, out: Path, **options: Any) -> ctr.Schema:
    schema = prepare(data, out, **options)
    path = next((Path(out) / "train").glob("*.parquet"))
    pl.read_parquet(path).with_columns((1 - pl.col(name)).alias(name) for name in schema.labels).write_parquet(path)
    return schema


def fail(*_: Any, **__: Any) -> ctr.Schema:
    raise KeyError("item")


def refuse(*_: Any, **__: Any) -> ctr.Schema:
    raise DataError("some row is wrong")


@pytest.mark.parametrize(
    ("careless", "said"),
    [
        (lose_a_row, r"rows are|rows .* are there"),
        (turn_labels, "label .* is .*, expected"),
        (fail, "uncaught KeyError"),
        (refuse, "uncaught DataError|nobody has judged"),
    ],
)
def test_what_does_not_hold_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless: Any, said: str
) -> None:
    monkeypatch.setattr(ctr, "prepare", careless)
    summary = run(Trials(number=6, seed=3), tmp_path)
    assert summary.failures
    assert any(re.search(said, failure) for failure in summary.failures), summary.failures
    assert summary.failures[0].startswith("--seed 3 --first ")


def raised(text: str) -> BaseException:
    try:
        ctr.prepare("nowhere.csv", "out", log=None)
    except DataError as error:
        error.args = (text,)
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.csv: row 3 (line 4 of the file), column 'x' holds 'b'; expected", "cell"),
        ("b.csv: row 3 (line 4 of the file), column 'x' holds 'b'; expected", None),  # another file
        ("a.csv: row 3 (line 4 of the file), column 'y' holds 'b'; expected", None),  # another column
        ("a.csv: row 3 (line 4 of the file) has a NUL byte", "malformed row"),
        ("a.csv: some row has a NUL byte", None),
        ("a.csv has no rows: expected at least one", "no rows"),
        ("it has no rows: expected at least one", None),
    ],
)
def test_a_refusal_names_file_and_place(text: str, reason: str | None) -> None:
    if reason is None:
        with pytest.raises(BrokenError, match=r"names no|nobody has judged"):
            reason_of(raised(text), ["a.csv"], ["x"])
    else:
        assert reason_of(raised(text), ["a.csv"], ["x"]) == reason


def test_whoever_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> None:
        while True:
            pass

    monkeypatch.setattr(ctr, "prepare", hang)
    monkeypatch.setattr(generated_inputs, "PATIENCE", 0.3)
    summary = run(Trials(number=1, seed=3), tmp_path)
    assert "takes longer than 0.3 seconds" in summary.failures[0]
