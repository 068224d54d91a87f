"""Probabilities that can be believed: the calibrator, rare clicks, and the numbers that say how good they are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console

import ctrlib as ctr
from ctrlib import cli, metrics, models, plots
from ctrlib.calibration import Calibration, fit_calibration
from ctrlib.data.scan import DataError
from ctrlib.data.slices import slices_of
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.models.build import check_calibratable
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.config import complete, identity_of

QUIET = Console(quiet=True)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


# The calibrator.


def drawn(rows: int = 40_000, *, base: float = -2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    true = draw.normal(base, 1, (rows, 1))
    return true, (draw.random((rows, 1)) < sigmoid(true)).astype(np.float32)


@pytest.mark.parametrize(("slope", "intercept"), [(0.5, 1.0), (3.0, -2.0), (1.0, 0.0)])
def test_a_known_slope_and_intercept_are_found(slope: float, intercept: float) -> None:
    true, labels = drawn()
    found = fit_calibration((true - intercept) / slope, labels, np.ones(len(labels)))
    assert found.slope.item() == pytest.approx(slope, rel=0.06)  # three standard errors of 2 %
    again = found(torch.from_numpy((true - intercept) / slope)).detach().numpy()
    assert metrics.calibration(labels[:, 0], sigmoid(again[:, 0])) == pytest.approx(1, abs=1e-3)
    assert np.abs(again - true).max() < 0.4


def test_units_of_logits_and_weights_do_not_matter() -> None:
    true, labels = drawn(5_000)
    weights = np.random.default_rng(1).integers(1, 4, 5_000).astype(float)
    found = fit_calibration(true, labels, weights)
    for scale, weight in ((1e-6, 1.0), (1e6, 1.0), (1.0, 1e-6), (1.0, 1e6)):
        other = fit_calibration(scale * true, labels, weight * weights)
        assert other.slope.item() * scale == pytest.approx(found.slope.item(), rel=1e-5)
        assert other.intercept.item() == pytest.approx(found.intercept.item(), rel=1e-5)


def test_scores_that_separate_the_classes_get_a_slope_with_an_end() -> None:
    found = fit_calibration([[-1.0], [-2.0], [3.0], [4.0]], [[0.0], [0.0], [1.0], [1.0]], np.ones(4))
    assert 0 < found.slope.item() < 2
    far = fit_calibration([[-1e8], [1e8]], [[0.0], [1.0]], np.ones(2))
    assert sigmoid(far(torch.tensor([[1e8]])).numpy())[0, 0] == pytest.approx(
        2 / 3, rel=1e-4
    )  # Platt's (1 + 1) / (1 + 2)


@pytest.mark.parametrize("logits", [[[3.0], [2.0], [-2.0], [-3.0]], [[7.0]] * 4])
def test_scores_that_rank_the_wrong_way_or_not_at_all_keep_their_slope(logits: list[list[float]]) -> None:
    labels = np.array([[0.0], [0.0], [0.0], [1.0]])
    found = fit_calibration(logits, labels, np.ones(4))
    assert found.slope.item() == 1
    assert sigmoid(found(torch.tensor(logits)).numpy()).mean() == pytest.approx(
        (2 / 3 + 3 * 1 / 5) / 4,
        abs=1e-4,  # the mean of Platt's targets of one positive and three negatives
    )


def test_each_label_has_its_own_by_its_known_rows() -> None:
    true, labels = drawn(2_000)
    both, two = np.hstack([true, 2 * true]), np.hstack([labels, labels])
    two[1_000:, 1] = np.nan
    weights = np.ones(2_000)
    weights[::7] = 0
    found = fit_calibration(both, two, weights)
    kept, known = weights > 0, (weights > 0) & (np.arange(2_000) < 1_000)
    for task, rows in ((0, kept), (1, known)):
        alone = fit_calibration(both[rows][:, [task]], labels[rows], np.ones(rows.sum()))
        assert found.slope[task].item() == pytest.approx(alone.slope.item(), rel=1e-5)
        assert found.intercept[task].item() == pytest.approx(alone.intercept.item(), rel=1e-5)
    with pytest.raises(ValueError, match="label 0 has one class only among 3 rows"):
        fit_calibration(np.zeros((3, 1)), np.zeros((3, 1)), np.ones(3))


@pytest.mark.parametrize(
    "described",
    [
        {"slope": [1.0]},
        {"slope": [1.0, 1.0], "intercept": [0.0, 0.0]},
        {"slope": 1.0, "intercept": 0.0},
        {"slope": [0.0], "intercept": [0.0]},
        {"slope": [1.0], "intercept": [math.nan]},
        [1.0, 0.0],
    ],
)
def test_what_is_no_calibration_is_refused(described: Any) -> None:
    with pytest.raises(ValueError, match="a slope"):
        Calibration.of(described, 1)


# Metrics.


@pytest.mark.parametrize(
    ("rows", "base", "bins"), [(2_000, -4.0, 20), (2_000, -4.0, 200), (400, 0.0, 20), (60, 2.0, 5)]
)
def test_the_error_to_expect_by_chance_is_the_mean_of_many_draws(rows: int, base: float, bins: int) -> None:
    draw = np.random.default_rng(0)
    p = sigmoid(draw.normal(base, 1, rows))
    errors = [metrics.expected_calibration_error(draw.random(rows) < p, p, num_bins=bins) for _ in range(200)]
    expected = metrics.ece_by_chance(np.zeros(rows), p, num_bins=bins)
    assert expected == pytest.approx(np.mean(errors), abs=4 * np.std(errors) / math.sqrt(200) + 0.01 * expected)
    ratios = [metrics.calibration(draw.random(rows) < p, p) for _ in range(200)]
    typical = metrics.calibration_se(np.arange(rows) < round(p.sum()), p)
    assert np.std(ratios) == pytest.approx(typical, rel=0.25)


def test_weights_of_one_size_change_neither_error() -> None:
    true, labels = drawn(500)
    p, y, same = sigmoid(true[:, 0]), labels[:, 0], np.ones(500)
    for function in (metrics.ece_by_chance, metrics.calibration_se):
        assert function(y, p) == function(y, p, same) == function(np.r_[y, 1], np.r_[p, 0.9], np.r_[same, 0])
    assert metrics.calibration_se(y, p, 2 * same) == pytest.approx(metrics.calibration_se(y, p))
    assert metrics.ece_by_chance(y, p, 2 * same) == pytest.approx(metrics.ece_by_chance(y, p), rel=0.1)
    assert math.isnan(metrics.calibration_se([0, 0], [0.1, 0.2]))
    assert math.isnan(metrics.ece_by_chance([], []))


def test_reliability_is_drawn(tmp_path: Path) -> None:
    true, labels = drawn(3_000)
    found = {"click": metrics.reliability(labels[:, 0], sigmoid(true[:, 0])), "buy": metrics.reliability([], [])}
    assert found["click"].rows.tolist() == [150.0] * 20
    assert not found["buy"]
    plots.reliability(found, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"


# Rows of which one in ten is kept.

TEACHER = Teacher(16_000, cardinalities=(40, 20), num_numeric=1, base_rate=0.04, seed=9)


@pytest.fixture(scope="module")
def raw() -> pl.DataFrame:
    return generate(TEACHER)[0]


@pytest.fixture(scope="module")
def data(raw: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration") / "data"
    ctr.prepare(raw, folder, split=(2, 1, 1), group="C2", log=None)
    return folder


def rows_of(loader: ctr.Loader) -> list[tuple[float, ...]]:
    return [
        (*label, *dense, *ids)
        for batch in loader
        for label, dense, ids in zip(
            batch.labels.tolist(), batch.dense.tolist(), batch.sparse.values().view(2, -1).T.tolist()
        )
    ]


def test_some_negatives_are_kept_and_all_positives(data: Path) -> None:
    every = sorted(rows_of(ctr.Loader(data, "train", batch_size=512)))
    kept = ctr.Loader(data, "train", batch_size=512, shuffle=True, seed=1, keep_negatives=0.1)
    first, second = rows_of(kept), rows_of(kept)
    assert first != second and sorted(first) == sorted(second)
    assert len(first) == kept.num_rows == sum(batch.size for batch in kept)
    assert [row for row in sorted(first) if row[0] == 1] == [row for row in every if row[0] == 1]
    negatives = sum(row[0] == 0 for row in every)
    assert sum(row[0] == 0 for row in first) == pytest.approx(negatives / 10, abs=4 * math.sqrt(negatives * 0.09))
    assert set(first) <= set(every)
    same = ctr.Loader(data, "train", batch_size=512, shuffle=True, seed=1, keep_negatives=0.1)
    assert rows_of(same) == first
    other = ctr.Loader(data, "train", batch_size=512, shuffle=True, seed=2, keep_negatives=0.1)
    assert sorted(rows_of(other)) != sorted(first)
    assert rows_of(ctr.Loader(data, "train", batch_size=512, seed=1, keep_negatives=1.0)) == rows_of(
        ctr.Loader(data, "train", batch_size=512)
    )


def test_a_loader_of_some_negatives_goes_on_in_mid_epoch(data: Path) -> None:
    def made(**more: Any) -> ctr.Loader:
        return ctr.Loader(data, "train", batch_size=128, shuffle=True, seed=1, **more)

    loader = made(keep_negatives=0.1)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = [batch.labels.tolist() for batch in batches]
    other = made(keep_negatives=0.1)
    other.load_state_dict(state)
    assert [batch.labels.tolist() for batch in other] == rest
    with pytest.raises(ValueError, match="cannot resume"):
        made(keep_negatives=0.2).load_state_dict(state)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(data: Path, share: float) -> None:
    with pytest.raises(ValueError, match="keep_negatives"):
        ctr.Loader(data, "train", batch_size=64, keep_negatives=share)
    with pytest.raises(ValueError, match="keep_negatives"):
        complete({"model": "fm", "training": {"keep_negatives": share}})


def test_no_negatives_or_several_labels_are_refused(tmp_path: Path) -> None:
    rows = pl.DataFrame({"item": ["a", "b"] * 50, "click": [0, 1] * 50, "buy": [1, 0] * 50})
    ctr.prepare(rows, tmp_path / "both", labels=("click", "buy"), log=None)
    with pytest.raises(ValueError, match=r"keep_negatives=0.5 goes with one label, and there are \['click', 'buy'\]"):
        ctr.Loader(tmp_path / "both", "train", batch_size=8, keep_negatives=0.5)
    ctr.prepare(rows.drop("buy"), tmp_path / "one", labels="click", log=None)
    with pytest.raises(DataError, match="keep_negatives=1e-09 leaves no row with label 0 of 'click'"):
        ctr.Loader(tmp_path / "one", "train", batch_size=8, keep_negatives=1e-9)


# Whole runs.

TRAINING = {"batch_size": 64, "learning_rate": 0.05, "max_epochs": 8, "seed": 1}


def config_of(**training: Any) -> dict[str, Any]:
    return {"model": "fm", "embedding_dim": 4, "training": {**TRAINING, **training}}


def within_chance(result: dict[str, Any], deviations: float = 4.0) -> None:
    assert result["test_calibration"] == pytest.approx(1, abs=deviations * result["test_calibration_se"])
    assert result["test_ece"] < 2 * result["test_ece_by_chance"]


def test_predictions_have_the_base_rate_where_one_negative_of_ten_is_kept(
    data: Path, raw: pl.DataFrame, tmp_path: Path
) -> None:
    config = config_of(keep_negatives=0.1)
    model, result = ctr.run(data, config, console=QUIET)
    assert result["test_calibration"] == pytest.approx(1, abs=0.25)  # of .04; without the correction it is about 7
    assert result["test_normalized_entropy"] < 1
    config = config_of(keep_negatives=0.1, calibrate=True)
    saved: dict[str, Any] = {}
    model, result = ctr.run(
        data,
        config,
        console=QUIET,
        out=tmp_path / "run",
        on_trained=lambda model: ctr.save_model(model, config, data, tmp_path / "model"),
    )
    within_chance(result)
    saved = json.loads((tmp_path / "model" / "model.json").read_text())
    assert saved["calibration"] == result["calibrator"] == model.calibration.as_dict()
    assert result["calibrator"]["slope"][0] != 1

    # By every road the same, to the last bit.
    test = ctr.Loader(data, "test", batch_size=512)
    scored = ctr.predict(model, test)
    predictor = ctr.Predictor.load(tmp_path / "model")
    assert torch.equal(predictor.model.calibration.slope, model.calibration.slope)
    np.testing.assert_array_equal(ctr.predict(predictor.model, test).logits, scored.logits)
    found = predictor.evaluate_prepared(data, "test", batch_size=512)
    for name, value in found.items():
        assert result[f"test_{'logloss' if name == 'log_loss' else name}"] == value, name
    assert "gauc" in found
    whole = predictor.evaluate(raw)
    probabilities = predictor.predict(raw)[0]["label"]
    assert whole["calibration"] == pytest.approx(probabilities.sum() / raw["label"].sum(), rel=1e-5)
    bare = models.build({name: value for name, value in saved.items() if name != "calibration"}, predictor.schema)
    bare.load_state_dict(model.state_dict())
    plain = ctr.predict(bare, test).logits
    np.testing.assert_array_equal(
        scored.logits, plain * np.float32(saved["calibration"]["slope"]) + np.float32(saved["calibration"]["intercept"])
    )
    # It is not what a run is known by, nor carried into a new one.
    assert complete(saved) == complete(config)
    assert identity_of({**complete(config), "calibration": saved["calibration"]}, "a", "b") == identity_of(
        complete(config), "a", "b"
    )


def test_a_killed_run_ends_with_the_same_calibrator(data: Path, tmp_path: Path) -> None:
    config = config_of(keep_negatives=0.2, calibrate=True, max_epochs=2)

    def die(model: ctr.Model) -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        ctr.run(data, config, out=tmp_path / "killed", console=QUIET, on_trained=die)
    went_on, result = ctr.run(data, config, out=tmp_path / "killed", console=QUIET)
    at_once, expected = ctr.run(data, config, console=QUIET)
    assert result["calibrator"] == expected["calibrator"]
    assert result["test_logloss"] == expected["test_logloss"]
    for name, weight in at_once.state_dict().items():
        assert torch.equal(weight, went_on.state_dict()[name])


def test_the_epoch_is_chosen_by_the_log_loss_after_calibration(data: Path) -> None:
    """That of the calibrator which fits validation at that epoch, and is kept with the model in the end."""
    config = {"model": "mlp", "hidden": [64], "embedding_dim": 8, "numeric": "vector"}
    how = {"batch_size": 64, "max_epochs": 4, "learning_rate": 0.02, "select_by": "log_loss", "patience": 9}
    lines: dict[bool, list[Any]] = {}
    results: dict[bool, dict[str, Any]] = {}
    for calibrate in (False, True):
        training = {**how, "calibrate": calibrate, "cut_factor": 1.0}
        lines[calibrate] = []
        _, results[calibrate] = ctr.run(
            data, {**config, "training": training}, on_epoch=lines[calibrate].append, console=QUIET
        )
    for plain, after in zip(lines[False], lines[True], strict=True):
        assert plain.valid_auc == pytest.approx(after.valid_auc, abs=1e-12)
        assert after.valid_log_loss < plain.valid_log_loss - 1e-4  # such large steps make it too sure of itself
    best = min(lines[True], key=lambda line: line.valid_log_loss)
    assert results[True]["best_epoch"] == best.epoch
    assert results[True]["valid_logloss"] == pytest.approx(best.valid_log_loss, abs=1e-7)


def test_log_loss_after_calibration_is_the_mean_of_each_labels() -> None:
    true, labels = drawn(3_000)
    logits = np.concatenate([2 * true + 1, -1 - true / 2], 1)
    both = np.concatenate([labels, drawn(3_000, base=0.0, seed=1)[1]], 1)
    both[::7, 1] = np.nan

    class Given(torch.nn.Module):
        def forward(self, batch: ctr.Batch) -> torch.Tensor:
            return torch.from_numpy(logits)

    batch = ctr.Batch(
        example_batch(example_schema(), 1).sparse, torch.zeros(3_000, 0), torch.from_numpy(both), torch.ones(3_000)
    )
    found = ctr.evaluate(Given(), [batch], calibrate=True)
    z = fit_calibration(logits, both, np.ones(3_000))(torch.from_numpy(logits)).numpy()
    known = ~np.isnan(both[:, 1])
    each = [metrics.log_loss(both[:, 0], z[:, 0]), metrics.log_loss(both[known, 1], z[known, 1])]
    assert found["log_loss"] == pytest.approx(np.mean(each), abs=1e-6)
    assert found["log_loss"] < ctr.evaluate(Given(), [batch])["log_loss"] - 0.01


def test_a_model_with_a_forward_of_its_own_is_refused() -> None:
    class Own(ctr.Model):
        def forward(self, batch: ctr.Batch) -> torch.Tensor:
            return super().forward(batch)

    schema = ctr.testing.example_schema()
    made = ctr.models.fm(ctr.Inputs(schema, embedding_dim=4))
    own = Own(made.embedding, made.tower, made.head)
    with pytest.raises(ValueError, match="Own has a forward of its own, which applies no calibrator"):
        check_calibratable(own)


# Slices.


def test_slices() -> None:
    names, codes = slices_of(pl.Series([f"v{n % 25}" for n in range(60)] + [None]))
    assert names == [
        *(f"v{n}" for n in range(10)),
        *sorted(f"v{n}" for n in range(10, 25))[:10],
        "(others)",
        "(missing)",
    ]
    assert codes[0] == 0 and codes[60] == 21 and codes[24] == 20
    numbers = pl.Series([float(n) for n in range(100)] + [None, math.nan])
    names, codes = slices_of(numbers)
    assert names[0] == "0 to 9.9" and names[-2:] == ["89.1 to 99", "(missing)"]
    assert np.bincount(codes).tolist() == [10] * 10 + [2]
    names, codes = slices_of(pl.Series([1.5, None, 1.5, 2.0, math.nan]))
    assert (names, codes.tolist()) == (["1.5", "2.0", "(missing)"], [0, 2, 0, 1, 2])


def test_metrics_by_the_values_of_a_column(
    raw: pl.DataFrame, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    flags = [
        "--model",
        "fm",
        "--dim",
        "4",
        "--epochs",
        "1",
        "--calibrate",
        "True",
        "--keep-negatives",
        "0.5",
        "--no-baselines",
    ]
    assert cli.main(["train", str(data), "--out", str(tmp_path / "run"), *flags]) == 0
    raw.write_parquet(tmp_path / "rows.parquet")
    capsys.readouterr()
    for rows, by in ((tmp_path / "rows.parquet", "C2"), (tmp_path / "rows.parquet", "I1"), (data, "C1"), (data, "C2")):
        assert cli.main(["evaluate", str(tmp_path / "run"), str(rows), "--by", by, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        slices = result["by"]
        assert sum(line["rows"] for line in slices) == result["rows"]
        assert sum(line["positives"] for line in slices) == result["positives"]
        mean = sum(line["log_loss"] * line["rows"] for line in slices) / result["rows"]
        assert mean == pytest.approx(result["log_loss"], rel=1e-6)
    predictor = ctr.Predictor.load(tmp_path / "run")
    value = predictor.evaluate(raw, by="C2")["by"][3]["value"]
    alone = predictor.evaluate(raw.filter(pl.col("C2") == value))
    (line,) = (line for line in predictor.evaluate(raw, by="C2")["by"] if line["value"] == value)
    assert all(line[name] == pytest.approx(alone[name]) for name in line if name not in ("value", "label"))
    assert cli.main(["evaluate", str(tmp_path / "run"), str(data), "--by", "C1"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[1:])) <= 80
    assert "(others)" in printed
    with pytest.raises(ctr.SchemaError, match="no column 'I1' with one id"):
        predictor.evaluate_prepared(data, "test", by="I1")


def test_python_gives_gauc_and_names_of_labels_by_itself(data: Path, tmp_path: Path) -> None:
    model = ctr.models.fm(ctr.Inputs(ctr.Schema.load(data), embedding_dim=4))
    result = ctr.evaluate(model, ctr.Loader(data, "test", batch_size=512))
    assert result["gauc_groups"] > 5
    assert next(iter(ctr.Loader(data, "train", batch_size=8, shuffle=True))).group is None
    rows = pl.DataFrame({"item": ["a", "b", "c"] * 40, "click": [0, 1] * 60, "buy": [1, 0, None] * 40})
    rows = rows.with_columns(shop=pl.col("item"))
    schema = ctr.prepare(rows, tmp_path / "both", labels=("click", "buy"), missing_labels="mask", log=None)
    model = ctr.models.fm(ctr.Inputs(schema, embedding_dim=4))
    tasks = ctr.evaluate(model, ctr.Loader(tmp_path / "both", "test", batch_size=512))["tasks"]
    assert [task["label"] for task in tasks] == ["click", "buy"]
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert sum(part["buy"] for part in report["missing_labels"].values()) == 40
    assert report["missing_labels"]["train"]["click"] == 0
