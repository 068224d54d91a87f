"""What stands beside a result: each baseline by values, what is said of a model, and samples of large data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli, metrics
from ctrlib.data.columns import decode, find_row_groups
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.training import baselines
from ctrlib.training.baselines import NUM_FOLDS, PRIOR_ROWS, compare, remarks
from ctrlib.training.evaluate import Scores

NAMES = ["constant", "logistic regression", "gradient boosting"]
TEACHER = Teacher(4_000, cardinalities=(60, 20), num_numeric=2, interaction_sd=0.0, numeric_sd=1.0, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder of rows from a teacher without interactions, and its true logits of test."""
    rows, logits = generate(TEACHER)
    folder = tmp_path_factory.mktemp("baselines") / "data"
    ends = {"train": (0, 2_500), "valid": (2_500, 3_000), "test": (3_000, 4_000)}
    numbers = [ctr.Numeric(name, "log_standard") for name in ("I1", "I2")]
    ctr.prepare({name: rows[slice(*ends[name])] for name in ends}, folder, features=numbers, log=None)
    return folder, logits[3_000:]


def scores_of(folder: Path, logits: np.ndarray) -> Scores:
    schema = ctr.Schema.load(folder)
    columns = decode(find_row_groups(folder, "test", schema), schema)
    labels = columns.floats[:, len(schema.dense) : len(schema.dense) + len(schema.labels)]
    weights = columns.floats[:, -1] if schema.weight else np.ones(len(labels), np.float32)
    return Scores(logits.astype(np.float32).reshape(len(labels), -1), labels, weights, None)


def test_of_a_teacher_without_interactions_the_regression_is_best(made: tuple[Path, np.ndarray]) -> None:
    folder, best = made
    scores = scores_of(folder, best)
    lines = compare(folder, scores, name="the teacher")
    model, *others = lines
    assert [line["name"] for line in lines] == ["the teacher", *NAMES]
    assert {line["label"] for line in lines} == {"label"}
    assert {(line["rows"], line["train_rows"]) for line in lines} == {(1_000, 2_500)}
    labels = scores.labels[:, 0]
    assert model["auc"] == metrics.auc(labels, best.astype(np.float32))
    train = pl.read_parquet(folder / "train")["label"].mean()
    constant, regression, boosting = others
    assert constant["auc"] == 0.5
    by_hand = -np.mean(labels * math.log(train) + (1 - labels) * math.log(1 - train))
    assert constant["log_loss"] == pytest.approx(by_hand, rel=1e-6)
    assert model["auc"] >= regression["auc"] - 0.005
    assert regression["auc"] > model["auc"] - 0.03
    assert regression["auc"] > boosting["auc"] > 0.6
    assert regression["normalized_entropy"] < boosting["normalized_entropy"] < 1
    for line in others:
        assert line["difference"] == pytest.approx(model["auc"] - line["auc"])
        assert line["seconds"] >= 0
    test = metrics.auc_paired_test(labels, scores.logits[:, 0].astype(float), np.zeros(1_000))
    assert (constant["difference_se"], constant["p_value"]) == (test.standard_error, test.p_value)


def test_a_useless_model_is_warned_of(made: tuple[Path, np.ndarray]) -> None:
    folder, _ = made
    noise = np.random.default_rng(0).normal(0, 2, 1_000)
    said = remarks(compare(folder, scores_of(folder, noise), name="noise"))
    assert said[0].startswith("noise is worse than a constant: log-loss 1.")
    assert said[1].startswith("noise cannot be told apart from constant: AUC 0.0")
    assert said[2].startswith("noise ranks worse than logistic regression: AUC 0.")
    assert said[3].startswith("noise ranks worse than gradient boosting: AUC 0.")
    assert len(said) == 4


LINE = {"label": "y", "name": "fm", "auc": 0.7, "log_loss": 0.5, "normalized_entropy": 0.9}


def beside(difference: float, error: float, p_value: float) -> list[str]:
    constant = {**LINE, "name": "constant", "log_loss": 0.6, "difference": 0.2, "difference_se": 0.01, "p_value": 0.0}
    other = {**LINE, "name": "boosting", "difference": difference, "difference_se": error, "p_value": p_value}
    return remarks([LINE, constant, other])


@pytest.mark.parametrize(
    ("difference", "error", "p_value", "said"),
    [
        (0.03, 0.01, 0.003, None),
        (0.01, 0.01, 0.32, "cannot be told apart from boosting: AUC 0.0100 higher, with a standard error of 0.0100"),
        (-0.01, 0.01, 0.32, "cannot be told apart from boosting: AUC 0.0100 lower, with a standard error of 0.0100"),
        (-0.03, 0.01, 0.003, "ranks worse than boosting: AUC 0.0300 lower, with a standard error of 0.0100"),
        (0.0, 0.0, 1.0, "cannot be told apart from boosting: AUC 0.0000 higher, with a standard error of 0.0000"),
        (0.01, math.nan, math.nan, None),  # weights differ: there is no test
        (-0.01, math.nan, math.nan, "ranks worse than boosting: AUC 0.0100 lower"),
        (math.nan, math.nan, math.nan, None),
    ],
)
def test_what_is_said_of_a_difference(difference: float, error: float, p_value: float, said: str | None) -> None:
    assert beside(difference, error, p_value) == ([] if said is None else [f"fm {said}"])


def test_a_model_with_nothing_beside_it_is_not_spoken_of() -> None:
    assert remarks([{**LINE, "normalized_entropy": 2.0}]) == []


def test_rates_are_those_of_other_rows() -> None:
    labels, weights = np.array([1, 1, 0, 0.0]), np.array([1, 1, 1, 1.0])
    ids, every = np.array([7, 5, 5, 5]), np.arange(5)
    fold = np.array([0, 0, 1, 2])
    other = (np.array([5, 7, 9, 5, 7]), np.array([0, 1, 2, 3, 3, 5]))  # ids of rows: [5], [7], [9], [], [5, 7]
    (rates, counts), (rates_2, counts_2) = baselines._rates(labels, weights, fold, [(ids, every), other])
    k, mean = PRIOR_ROWS, 0.5
    assert rates[0] == mean  # an id that is seen once tells nothing of its own row
    np.testing.assert_allclose(rates[1:], [k * mean / (k + 2), (1 + k * mean) / (k + 2), (1 + k * mean) / (k + 2)])
    assert counts.tolist() == [0, 2, 2, 2]
    five, seven = (1 + k * mean) / (k + 3), (1 + k * mean) / (k + 1)
    np.testing.assert_allclose(rates_2, [five, seven, mean, mean, (five + seven) / 2])
    assert counts_2.tolist() == [3, 1, 0, 0, 2]
    assert fold.max() < NUM_FOLDS


def test_labels_of_test_change_nothing_and_those_of_train_do(made: tuple[Path, np.ndarray]) -> None:
    folder, _ = made
    schema = ctr.Schema.load(folder)
    train, valid, test = (
        baselines.sample_of(folder, name, schema, 10_000, np.random.default_rng(0))
        for name in ("train", "valid", "test")
    )
    flipped = baselines.Split(test.places, test.columns, 1 - test.labels, test.weights, test.num_rows)
    for fit in (baselines._constant, baselines._logistic_regression, baselines._gradient_boosting):
        scores = fit(train, valid, test, schema, 0, 0)
        np.testing.assert_array_equal(scores, fit(train, valid, flipped, schema, 0, 0))


def test_the_rows_of_a_sample_are_those_of_the_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.data.codes.ROWS_PER_GROUP", 128)
    rows, _ = generate(Teacher(3_000, cardinalities=(30,), seed=1))
    ctr.prepare(rows, tmp_path / "data", split=(1, 1, 1), log=None)
    schema = ctr.Schema.load(tmp_path / "data")
    assert len(find_row_groups(tmp_path / "data", "test", schema)) > 4
    columns = decode(find_row_groups(tmp_path / "data", "test", schema), schema)
    labels = columns.floats[:, :1]
    told = Scores(10 * labels - 5, labels, np.ones(len(labels)), None)
    lines = compare(tmp_path / "data", told, most_rows=400)
    assert lines[0]["auc"] == 1.0
    assert all(350 < line["rows"] <= 400 for line in lines)
    assert all(350 < line["train_rows"] <= 400 for line in lines[1:])
    again = compare(tmp_path / "data", told, most_rows=400)
    assert [{**line, "seconds": 0} for line in again] == [{**line, "seconds": 0} for line in lines]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with two labels, the second of which is missing in half of them, weights, a bag, a history and raw text."""
    rows, _ = generate(Teacher(1_500, cardinalities=(300, 10), num_numeric=1, max_history=5, seed=3))
    draw = np.random.default_rng(0)
    second = [None if draw.random() < 0.5 else int(draw.random() < 0.3) for _ in range(1_500)]
    rows = rows.rename({"label": "click"}).with_columns(
        pl.Series("buy", second),
        pl.Series("weight", draw.integers(0, 3, 1_500)),
        pl.Series("tags", [["a", "b", "c"][: draw.integers(0, 4)] for _ in range(1_500)]),
    )
    path = tmp_path_factory.mktemp("raw") / "rows.parquet"
    rows.write_parquet(path)
    return path


def test_several_labels_weights_and_lists(raw: Path, tmp_path: Path) -> None:
    features = [ctr.MultiValued("tags"), ctr.Sequence("history", vocabulary="C1"), ctr.RawId("C2")]
    ctr.prepare(
        raw,
        tmp_path / "data",
        features=features,
        labels=("click", "buy"),
        weight="weight",
        missing_labels="mask",
        split=(2, 1, 1),
        log=None,
    )
    columns = decode(
        find_row_groups(tmp_path / "data", "test", schema := ctr.Schema.load(tmp_path / "data")), schema
    ).floats
    labels, weights = columns[:, 1:3], columns[:, 3]
    lines = compare(tmp_path / "data", scores_of(tmp_path / "data", np.zeros((len(labels), 2))))
    assert [(line["label"], line["name"]) for line in lines] == [
        (label, name) for label in ("click", "buy") for name in ("model", *NAMES)
    ]
    for task, label in enumerate(("click", "buy")):
        known = ~np.isnan(labels[:, task]) & (weights > 0)
        model, constant, *others = (line for line in lines if line["label"] == label)
        assert {line["rows"] for line in (model, constant, *others)} == {known.sum()}
        assert model["log_loss"] == pytest.approx(math.log(2))
        train = pl.read_parquet(tmp_path / "data" / "train").filter(pl.col(label).is_not_nan() & (pl.col("weight") > 0))
        rate = float(np.average(train[label], weights=train["weight"]))
        y = labels[known, task]
        losses = -(y * math.log(rate) + (1 - y) * math.log(1 - rate))
        assert constant["log_loss"] == pytest.approx(np.average(losses, weights=weights[known]), rel=1e-5)
        assert all(math.isnan(line["p_value"]) for line in (constant, *others))


def test_rare_clicks_that_a_sample_does_not_hold(tmp_path: Path) -> None:
    rows = pl.DataFrame({"item": ["a", "b"] * 1_000, "label": [1, 1] + [0] * 1_998})
    parts = {"train": rows, "valid": rows[:100], "test": rows[:100]}
    ctr.prepare(parts, tmp_path / "data", log=None)
    lines = compare(tmp_path / "data", scores_of(tmp_path / "data", np.zeros(100)), most_rows=100)
    assert [line["name"] for line in lines] == ["model"]


def test_the_command_shows_them_and_can_leave_them_out(
    made: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*more: str) -> dict[str, Any]:
        flags = ["--model", "fm", "--dim", "4", "--epochs", "1", "--batch-size", "512", "--overwrite", *more]
        assert cli.main(["train", str(made[0]), "--out", str(tmp_path / "run"), *flags]) == 0
        return dict(json.loads((tmp_path / "run" / "metrics.json").read_text()))

    result = run()
    lines, printed = result["baselines"], capsys.readouterr().out
    assert [line["name"] for line in lines] == ["fm", *NAMES]
    assert lines[0]["auc"] == pytest.approx(result["test_auc"], abs=1e-6)
    assert lines[0]["log_loss"] == pytest.approx(result["test_logloss"], rel=1e-5)
    assert result["warnings"] == remarks(lines)
    for line in lines:
        assert f"{line['name']}  ".ljust(20) in printed
        assert f"{line['auc']:.5f}" in printed
    assert "beside simple models, on the same 1,000 rows of test" in printed
    assert all(f"warning: {sentence}" in printed for sentence in result["warnings"])
    assert result["warnings"][0].startswith("fm ")
    result = run("--no-baselines")
    assert not {"baselines", "warnings"} & set(result)
    assert "beside" not in capsys.readouterr().out
