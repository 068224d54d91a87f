"""The record of a run: one form for all tasks, with the numbers that the run reports, and intervals that hold."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli, metrics
from ctrlib.analysis.runs import load_runs
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.manifest import data_hash, load_schema
from ctrlib.retrieval.evaluate import evaluate_with_errors, list_metrics
from ctrlib.retrieval.interactions import Interactions, Log
from ctrlib.schema import SchemaError
from ctrlib.training.record import line_of, load_record, record_of

FORM = {
    *("version", "task", "model", "engine", "seed", "data", "schema_hash", "rows_hash", "chosen_by", "independent"),
    "metrics",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("record")
    rows = generate(Teacher(3_000, cardinalities=(40, 10), seed=2))[0]
    ctr.prepare(rows, where / "data", labels="label", group="C1", log=None)
    how = {"batch_size": 256, "max_epochs": 1, "seed": 3}
    config = {"model": "fm", "embedding_dim": 4, "training": how}
    for name in ("first", "again"):
        ctr.run(where / "data", config, out=where / name)
    return where


def test_a_run_writes_what_it_reports_with_intervals(folder):
    record = load_record(folder / "first")
    result = json.loads((folder / "first" / "metrics.json").read_text())
    assert set(record) == FORM
    assert (record["task"], record["model"], record["engine"], record["seed"]) == ("ctr", "fm", "exact", 3)
    assert record["data"] == str(folder / "data")
    assert record["schema_hash"] == load_schema(folder / "data").hash
    assert record["rows_hash"] == data_hash(folder / "data")
    assert (record["chosen_by"], record["independent"]) == ("valid auc", "C1")
    lines = {line["metric"]: line for line in record["metrics"]}
    assert list(lines) == ["auc", "gauc", "log_loss", "calibration"]
    for metric, key in (("auc", "auc"), ("gauc", "gauc"), ("log_loss", "logloss"), ("calibration", "calibration")):
        line = lines[metric]
        assert line["value"] == pytest.approx(result[f"test_{key}"], rel=1e-7)
        assert line["low"] == pytest.approx(line["value"] - 1.96 * line["standard_error"])
        assert line["high"] == pytest.approx(line["value"] + 1.96 * line["standard_error"])
        assert (line["split"], line["label"]) == ("test", "label")
    assert load_record(folder / "again") == record  # the same run twice
    assert load_runs([folder / "first"])[0].record == record


def test_errors_are_those_of_the_groups(folder, monkeypatch):
    """Against the metrics of the very predictions."""
    from ctrlib.training import record as module

    kept = []
    monkeypatch.setattr(
        module, "measured_on", lambda scores, schema, split: (kept.append(scores), ("rows", []))[1], raising=True
    )
    ctr.run(
        folder / "data",
        {"model": "fm", "embedding_dim": 4, "training": {"max_epochs": 1, "seed": 3, "batch_size": 256}},
    )
    (scores,) = kept
    lines = {line["metric"]: line for line in load_record(folder / "first")["metrics"]}
    expected = metrics.auc_delong(scores.labels[:, 0], scores.logits[:, 0], groups=scores.groups)
    assert lines["auc"]["standard_error"] == pytest.approx(expected.standard_error, rel=1e-6)
    assert (lines["auc"]["low"], lines["auc"]["high"]) == pytest.approx((expected.low, expected.high), abs=1e-5)


def test_retrieval_has_the_same_form(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    users, items = np.repeat(np.arange(60), 12), draw.integers(0, 40, 720) ** 2 // 40
    pl.DataFrame({"user_id": users, "item_id": items}).unique().sort("user_id", "item_id").write_csv("log.csv")
    test = pl.DataFrame({"user_id": np.arange(60), "item_id": draw.integers(0, 40, 60) ** 2 // 40})
    test.write_csv("test.csv")
    call = "retrieve train log.csv --test test.csv --method popularity --k 5 --out found"
    assert cli.main(call.split()) == 0, capsys.readouterr().err
    said = json.loads((tmp_path / "found" / "retrieval.json").read_text())["record"]
    record = load_record("found")
    assert set(record) == FORM
    assert (record["task"], record["model"], record["data"], record["independent"]) == (
        *("retrieval", "popularity", "log.csv", "users"),
    )
    lines = {line["metric"]: line for line in record["metrics"]}
    assert {name: line["value"] for name, line in lines.items()} == {
        key.removeprefix("test_"): value for key, value in said.items() if key.startswith("test_") and "@" in key
    }
    assert lines["f1_of_means@5"]["standard_error"] is None  # no mean over users
    assert 0 < lines["recall@5"]["standard_error"] < 0.1
    capsys.readouterr()
    assert cli.main("report found --out r.html".split()) == 0
    text = (tmp_path / "r.html").read_text()
    assert "test recall@5" in text
    assert f'data-value="{lines["recall@5"]["standard_error"]!r}"' in text


def test_errors_of_lists_are_those_of_the_mean_over_users():
    log = Interactions.of(Log.of([1, 1, 2, 3, 4], [10, 20, 30, 20, 10]))
    test = log.aligned(Log.of([1, 2, 3], [30, 10, 10]))
    import torch

    order = torch.tensor([3.0, 1.0, 2.0])
    for over, number in (("with_test", 3), ("all", 4)):
        found, errors = evaluate_with_errors(
            lambda users: order.repeat(len(users), 1), log.matrix, test, ks=(1,), over=over
        )
        recall = np.zeros(number)
        hits = np.array([[True], [True], [True]])
        recall[:3] = list_metrics(hits, np.ones(3, np.int64), 1)["recall"]
        assert found["recall@1"] == pytest.approx(recall.mean())
        assert errors["recall@1"] == pytest.approx(recall.std(ddof=1) / math.sqrt(number))


def test_what_is_undefined_is_none_and_what_is_damaged_is_named(tmp_path):
    line = line_of("click", "auc", math.nan, math.inf)
    names = {"task": "ctr", "model": "fm", "engine": "exact", "seed": 0, "data": "d", "schema_hash": "1"}
    record = record_of(**names, rows_hash="2", chosen_by="valid auc", independent="rows", measured=[line])
    assert {name for name, value in record["metrics"][0].items() if value is None} == {
        *("value", "standard_error", "low", "high"),
    }
    assert load_record(tmp_path) is None
    (tmp_path / "metrics.json").write_text('{"test_auc": 0.5}')
    assert load_record(tmp_path) is None  # of an earlier version
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(SchemaError, match=r"metrics\.json is damaged"):
        load_record(tmp_path)
