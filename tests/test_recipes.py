"""What the recipes share: records of every task, and the road from a data-set script to a row of results.csv."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import ctrlib as ctr
import defaults
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.manifest import data_hash
from ctrlib.schema import NUM_RESERVED_IDS
from harness import RecipeKnobs, run_ensemble_recipe, run_recipe
from records import COLUMNS, OF_RECORD, commit_of, record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    frame, _ = generate(Teacher(num_rows=6_000, cardinalities=(50, 40, 30), num_numeric=2, seed=3))
    folder = tmp_path_factory.mktemp("clicks") / "data"
    ctr.prepare(frame, folder, labels="label", log=None)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_record_appends_and_refuses_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    result = {"valid_auc": 0.71234567, "test_auc": 0.7, "seed": 1, "unknown": "left out"}
    record(result, path, data="d", model="m")
    record({**result, "seed": 2}, path, data="d", model="m")
    rows = rows_of(path)
    assert [list(row) for row in rows] == [COLUMNS] * 2
    assert [(row["seed"], row["valid_auc"], row["task"], row["scores"]) for row in rows] == [
        ("1", "0.712346", "ctr", ""),
        ("2", "0.712346", "ctr", ""),
    ]
    of_another = {"run_record": {"seed": 3, "engine": "", "schema_hash": ""}}
    with pytest.raises(ValueError, match="seed is 1, and 3 in the record of the run"):
        record({**result, **of_another}, path, data="d", model="m")
    assert len(rows_of(path)) == 2
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other"):
        record(result, path, data="d", model="m")


@pytest.mark.parametrize(
    ("task", "scores"),
    [
        ("retrieval", {"test_recall@20": 0.1862, "test_ndcg@20": 0.158}),
        ("ranking", {"test_kendall_tau": 0.9}),
        ("speed", {"rows_per_second": 75_000}),
    ],
)
def test_a_record_fits_every_task(tmp_path: Path, task: Any, scores: dict[str, float]) -> None:
    record({"seed": 1}, tmp_path / "results.csv", data="d", model="m", task=task, scores=scores)
    (row,) = rows_of(tmp_path / "results.csv")
    assert (row["task"], row["test_auc"]) == (task, "")
    assert json.loads(row["scores"]) == scores
    with pytest.raises(ValueError, match="are not numbers"):
        record({}, tmp_path / "results.csv", data="d", model="m", task=task, scores={"good": True})


def test_commit_is_marked_only_if_other_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    results, code = tmp_path / "results.csv", tmp_path / "code.py"
    assert commit_of(results) == ""  # no checkout
    git("init")
    results.write_text("a\n")
    code.write_text("a\n")
    git("add", ".")
    git("commit", "-m", "first")
    clean = commit_of(results)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    results.write_text("a\nb\n")
    assert commit_of(results) == clean
    code.write_text("b\n")
    assert commit_of(results) == clean + "+"


def test_recipe_trains_records_and_finds_its_own_bins(tmp_path: Path, data: Path) -> None:
    recipe = str(tmp_path / "recipes" / "x.py")
    (tmp_path / "recipes").mkdir()
    arguments: dict[str, Any] = {"recipe": recipe, "data": "clicks", "script": ["none.py"], "model": "mlp_bins"}
    config = {"model": "mlp", "embedding_dim": 6, "hidden": (8,), "numeric": "bucketised", "bins": 4}
    knobs = RecipeKnobs(data=data, seed=3, engine="fused", record=True, device="cpu")
    with pytest.raises(SystemExit, match="whole runs only"):
        run_recipe(replace(knobs, epochs=1), config=config, **arguments)
    result = run_recipe(knobs, config=config, **arguments, batch_size=512, patience=1, embedding_l2=0.1)
    with (tmp_path / "recipes" / "results.csv").open(newline="") as file:
        (row,) = list(csv.DictReader(file))
    assert (row["data"], row["model"], row["engine"], row["seed"]) == ("clicks", "mlp_bins", "fused", "3")
    assert float(row["test_auc"]) == pytest.approx(result["test_auc"], abs=1e-6)
    assert float(row["inference_samples_per_second"]) > 0
    said = json.loads(row["record"])
    assert said == {name: result["run_record"][name] for name in OF_RECORD}
    assert said["rows_hash"] == data_hash(data)
    auc = said["metrics"][0]
    assert (auc["metric"], auc["value"]) == ("auc", pytest.approx(result["test_auc"], rel=1e-7))
    assert auc["low"] < auc["value"] < auc["high"]
    # Width 6 is made 8 for the kernels, and each number has 4 bins and a row for its largest value.
    schema = ctr.Schema.load(data)
    rows = sum(features[0].num_embeddings or 0 for features in schema.vocabularies.values())
    assert int(row["embedding_bytes"]) == 4 * 8 * (rows + 5 * len(schema.dense))


def test_the_record_of_an_ensemble_is_its_own(data: Path) -> None:
    knobs = RecipeKnobs(data=data, seed=3, epochs=1, device="cpu")
    members = [({"model": "fm", "embedding_dim": width}, {"batch_size": 512}) for width in (2, 4)]
    arguments: dict[str, Any] = {"recipe": "recipes/x.py", "data": "clicks", "script": ["none.py"], "model": "fm_pair"}
    result = run_ensemble_recipe(knobs, members=members, **arguments)
    said = result["run_record"]
    assert (said["model"], said["rows_hash"]) == ("fm_pair", data_hash(data))
    values = {line["metric"]: line["value"] for line in said["metrics"]}
    assert values["auc"] == pytest.approx(result["test_auc"], rel=1e-7)
    assert values["log_loss"] == pytest.approx(result["test_logloss"], rel=1e-7)


def test_defaults_are_set_beside_the_best_of_the_simple_models() -> None:
    def line(name: str, auc: float, **other: float) -> dict[str, Any]:
        return {"name": name, "auc": auc, "normalized_entropy": 1 - auc, **other}

    lines = [
        line("dcnv2", 0.75),
        line("constant", 0.5, difference=0.25, p_value=0.0),
        line("logistic regression", 0.7, difference=0.05, p_value=0.01),
        line("gradient boosting", 0.76, difference=-0.01, p_value=0.2),
    ]
    measured = {f"test_{name}": 0.5 for name in ("calibration", "calibration_se", "ece", "ece_by_chance")}
    scores = defaults.scores_of({"baselines": lines, "seconds": 3.0, **measured})
    assert (scores["auc above the best"], scores["p of that"], scores["ne"]) == (-0.01, 0.2, 0.25)
    assert scores["auc, logistic regression"] == 0.7 and "auc, constant" not in scores


@pytest.mark.parametrize("name", defaults.MADE)
def test_made_up_data_are_of_their_kind(name: str, tmp_path: Path) -> None:
    defaults.MADE[name](tmp_path / "data")
    parts = {split: pl.read_parquet(tmp_path / "data" / split / "*.parquet") for split in ("train", "valid", "test")}
    schema = ctr.Schema.load(tmp_path / "data")
    label, train = schema.labels[0], parts["train"]
    if name == "mostly_zero":
        assert len(schema.dense) == 6 and 0.15 < train[label].mean() < 0.5
    elif name == "rare_clicks":
        assert 0.004 < train[label].mean() < 0.006
    else:
        unseen = (parts["test"]["item"] < NUM_RESERVED_IDS).mean()
        assert unseen > 0.9
