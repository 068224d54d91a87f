"""The loops, whole runs, saved models and the command line, on a planted teacher whose best AUC is known."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import ctrlib as ctr
from ctrlib import cli, models, plots
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.testing import example_batch, example_schema
from ctrlib.training import engines, loop
from ctrlib.training.config import Training

QUIET = Console(quiet=True)
TEACHER = Teacher(num_rows=24_000, cardinalities=(50, 40, 30), num_numeric=2, max_history=5, seed=3)
CONFIG = {"model": "deepfm", "embedding_dim": 8, "hidden": [32], "wide_columns": 4}
pytestmark = pytest.mark.usefixtures("drawn_pictures")


@pytest.fixture(scope="session")
def teacher() -> tuple[pl.DataFrame, np.ndarray]:
    return generate(TEACHER)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, teacher: tuple[pl.DataFrame, np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "prepared"
    ctr.prepare(teacher[0], folder, features=TEACHER.features(), group="C1", log=None)
    return folder


def quick_run(data: Path, **arguments: Any) -> tuple[ctr.Model, dict[str, Any]]:
    names = [field.name for field in dataclasses.fields(Training) if field.name in arguments]
    training = {"batch_size": 512, "learning_rate": 5e-3, "max_epochs": 3, **{n: arguments.pop(n) for n in names}}
    return ctr.run(data, {**CONFIG, "training": training}, **{"console": QUIET, **arguments})


class Scripted:
    """An engine whose validation AUC is what a script says: weights hold one number, the epoch."""

    name, device = "scripted", torch.device("cpu")

    def __init__(self) -> None:
        self.model: nn.Module = nn.Linear(1, 1)
        self.learning_rates, self.epoch = [1.0], torch.tensor(0)

    def train(self, batches: Any) -> Iterator[tuple[Any, Tensor]]:
        for batch in batches:
            yield batch, torch.tensor(0.5)

    def state(self) -> dict[str, Tensor | ctr.sharding.Shards]:
        return {"model.epoch": self.epoch}

    def weights(self) -> dict[str, Tensor]:
        return {"epoch": self.epoch.clone()}


def test_schedule_is_that_of_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Rises, stalls once (cut), rises by less than 1e-6 (a stall: cut), stalls again: the second in a row ends it.
    aucs = [0.7, 0.8, 0.75, 0.81, 0.8100005, 0.8, 0.9]
    engine = Scripted()

    def scripted(*_: Any, **__: Any) -> dict[str, float]:
        engine.epoch += 1
        return {"auc": aucs[engine.epoch - 1], "log_loss": 0.5}

    monkeypatch.setattr(loop, "evaluate", scripted)
    batches = [example_batch(example_schema(), 4)]
    history = ctr.fit(engine, batches, batches, out=tmp_path, console=QUIET)
    assert [line.learning_rate for line in history.epochs] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])
    assert (history.best_epoch, engine.epoch) == (4, 4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["valid_auc"] for line in lines] == aucs[:6]


def test_run_comes_near_the_teacher(tmp_path: Path) -> None:
    frame, logits = generate(Teacher(num_rows=24_000, cardinalities=(50, 40, 30), num_numeric=2, seed=3))
    bayes = ctr.metrics.auc(frame["label"].to_numpy(), logits)
    ctr.prepare(frame, tmp_path / "d", log=None)
    _, result = quick_run(tmp_path / "d", max_epochs=20)
    assert 0.75 < bayes - 0.03 < result["test_auc"] < bayes + 0.03  # 2,400 test rows: a standard error of .01
    assert {"test_logloss", "embedding_bytes", "samples_per_second", "seconds", "engine", "seed"} <= result.keys()


@pytest.mark.parametrize("engine", ["exact", "fused"])
def test_same_seed_same_bits_whatever_the_workers(data: Path, engine: str) -> None:
    counts = (0, 1, 4, 1) if engine == "exact" else (0, 4)  # a loader knows no engine
    runs = [quick_run(data, engine=engine, workers=workers, seed=5, max_epochs=2) for workers in counts]
    for model, result in runs[1:]:
        for (name, a), b in zip(runs[0][0].state_dict().items(), model.state_dict().values()):
            assert torch.equal(a, b), name
        for key in ("valid_auc", "test_auc", "test_logloss"):
            assert result[key] == runs[0][1][key]
    other = quick_run(data, engine=engine, seed=6, max_epochs=2)[1]
    assert other["test_logloss"] != runs[0][1]["test_logloss"]


def test_reordered_raw_columns_change_no_bit(tmp_path: Path, teacher: tuple[pl.DataFrame, np.ndarray]) -> None:
    frame = teacher[0].head(4000)
    losses = []
    for name, columns in (("a", frame.columns), ("b", frame.columns[::-1])):
        ctr.prepare(frame.select(columns), tmp_path / name, features=TEACHER.features(), group="C1", log=None)
        losses.append(quick_run(tmp_path / name)[1]["test_logloss"])
    assert losses[0] == losses[1]


def test_a_nan_loss_stops_before_any_weight_and_saves_the_batch(tmp_path: Path) -> None:
    schema = example_schema()
    bad = example_batch(schema, 8)
    bad.dense[0, 0] = float("nan")
    engine = ctr.ExactEngine(models.mlp(ctr.Inputs(schema, embedding_dim=4), hidden=(4,)))
    before = engine.weights()
    good = example_batch(schema, 8)
    with pytest.raises(loop.NonFiniteLossError, match="epoch 1, batch 0") as caught:
        ctr.fit(engine, [bad], [good], out=tmp_path, console=QUIET)
    assert "non_finite_batch.pt" in str(caught.value)
    saved = torch.load(tmp_path / "non_finite_batch.pt", weights_only=True)
    assert torch.equal(saved["values"], bad.sparse.values())
    assert math.isnan(saved["dense"][0, 0])
    assert all(torch.equal(before[name], value) for name, value in engine.weights().items())


def test_validation_of_one_class_is_refused() -> None:
    schema = example_schema()
    batch = example_batch(schema, 8)
    batch.labels[:] = 1
    engine = ctr.ExactEngine(models.mlp(ctr.Inputs(schema, embedding_dim=4), hidden=(4,)))
    with pytest.raises(ValueError, match="one class only"):
        ctr.fit(engine, [batch], [batch], console=QUIET)


def test_ctrl_c_keeps_the_best_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, aucs = Scripted(), [0.7, 0.8, 0.75]

    def scripted(*_: Any, **__: Any) -> dict[str, float]:
        engine.epoch += 1
        if engine.epoch > 3:
            raise KeyboardInterrupt
        return {"auc": aucs[engine.epoch - 1], "log_loss": 0.5}

    monkeypatch.setattr(loop, "evaluate", scripted)
    batches = [example_batch(example_schema(), 4)]
    history = ctr.fit(engine, batches, batches, console=QUIET)
    assert (history.best_epoch, engine.epoch, len(history.epochs)) == (2, 2, 3)


def test_undefined_metrics_are_null_in_json() -> None:
    assert json.loads(ctr.training.to_json({"a": float("nan"), "b": [1.5, float("inf")], "c": "NaN"})) == {
        "a": None,
        "b": [1.5, None],
        "c": "NaN",
    }


def test_evaluate_masks_missing_labels_and_padding_per_task() -> None:
    class Given(nn.Module):
        def forward(self, batch: ctr.Batch) -> Tensor:
            return batch.dense

    batch = example_batch(example_schema(num_tasks=2), 6)
    batch.dense = torch.tensor([[1.0, 5.0], [2.0, 4.0], [3.0, 3.0], [4.0, 2.0], [9.0, 9.0], [9.0, 9.0]])
    nan = float("nan")
    batch.labels = torch.tensor([[0.0, 1.0], [1.0, nan], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    batch.weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    scores = ctr.evaluate(Given(), [batch])
    assert [task["auc"] for task in scores["tasks"]] == [0.75, 1.0]
    assert scores["auc"] == 0.875
    assert scores["tasks"][1]["rows"] == 3


def test_predict_leaves_the_mode_of_the_model_alone() -> None:
    schema = example_schema()
    model = models.mlp(ctr.Inputs(schema, embedding_dim=4), hidden=(4,), dropout=0.5)
    first = ctr.predict(model, [example_batch(schema, 8)]).logits
    assert model.training
    assert np.array_equal(first, ctr.predict(model, [example_batch(schema, 8)]).logits)


def test_model_trains_without_the_trainer() -> None:
    schema = example_schema()
    model = models.dcnv2(ctr.Inputs(schema, embedding_dim=4), hidden=(8,))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = example_batch(schema, 64)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = ctr.binary_cross_entropy(model(batch), batch.labels, batch.weights)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("saved") / "model"
    model, _ = quick_run(data, out=out)
    ctr.save_model(model, CONFIG, data, out)
    return out


def test_saved_model_scores_raw_rows_as_prepared_ones(
    saved: Path, data: Path, teacher: tuple[pl.DataFrame, np.ndarray]
) -> None:
    predictor = ctr.Predictor.load(saved)
    frame = teacher[0]
    # Every row of the raw data is in one of the splits, so the scores must be the same numbers.
    raw, counts = predictor.predict(frame.drop("label"))
    prepared = [
        1
        / (
            1
            + np.exp(-ctr.predict(predictor.model, ctr.Loader(data, split, batch_size=999)).logits[:, 0].astype(float))
        )
        for split in ("train", "valid", "test")
    ]
    np.testing.assert_allclose(np.sort(raw["label"].to_numpy()), np.sort(np.concatenate(prepared)), atol=1e-6)
    assert counts["rows"] == frame.height
    # Evaluation on raw rows is exact AUC of these scores.
    expected = ctr.metrics.auc(frame["label"].to_numpy(), raw["label"].to_numpy())
    assert predictor.evaluate(frame)["auc"] == pytest.approx(expected, abs=1e-6)


def test_unseen_and_missing_ids_score_normally_and_are_counted(
    saved: Path, teacher: tuple[pl.DataFrame, np.ndarray]
) -> None:
    frame = teacher[0].head(4).drop("label")
    odd = frame.with_columns(
        surplus=pl.lit("x"),
        C1=pl.Series([None, "never seen", "nor this", frame["C1"][3]]),
        C2=pl.Series([None, *frame["C2"][1:]]),
    )
    scores, counts = ctr.Predictor.load(saved).predict(odd)
    assert (counts["unseen"]["C1"], counts["missing"]["C1"], counts["missing"]["C2"]) == (2, 1, 1)
    assert counts["ignored"] == ["surplus"]
    assert np.isfinite(scores["label"].to_numpy()).all()
    normal = ctr.Predictor.load(saved).predict(frame)[0]
    assert scores["label"][3] == normal["label"][3]
    assert scores["label"][0] != normal["label"][0]


def test_predictor_refuses_what_does_not_fit(
    saved: Path, data: Path, tmp_path: Path, teacher: tuple[pl.DataFrame, np.ndarray]
) -> None:
    predictor = ctr.Predictor.load(saved)
    with pytest.raises(ctr.SchemaError, match="C2"):
        predictor.predict(teacher[0].drop("C2"))
    ctr.prepare(teacher[0].tail(9000), tmp_path / "other", features=TEACHER.features(), group="C1", log=None)
    with pytest.raises(ctr.SchemaError, match="prepared differently"):
        predictor.evaluate_prepared(tmp_path / "other", "test")
    with pytest.raises(ctr.SchemaError, match="not a model folder"):
        ctr.Predictor.load(data)


def test_damaged_weights_are_named(saved: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ctr.SchemaError, match=re.escape(str(weights))):
        ctr.Predictor.load(broken)


def test_no_file_of_a_model_folder_is_a_pickle(saved: Path) -> None:
    assert {path.suffix for path in saved.rglob("*") if path.is_file() and path.name != "MANIFEST"} <= {
        ".json", ".jsonl", ".md", ".png", ".parquet", ".safetensors",
    }  # fmt: skip


def test_curve_is_a_picture(saved: Path, tmp_path: Path) -> None:
    assert (saved / "curve.png").read_bytes().startswith(b"\x89PNG")
    plots.learning_curve(loop.History(), tmp_path / "empty.png")  # a run of no epochs draws axes, and does not fail


def test_engines_refuse_arguments_they_would_ignore(data: Path) -> None:
    with pytest.raises(ValueError, match="no L2"):
        quick_run(data, engine="fused", embedding_l2=0.1)
    for argument, value in {"engine": "Exact", "precision": "fp16", "device": "gpu"}.items():
        with pytest.raises(ValueError, match="expected one of"):
            quick_run(data, **{argument: value})
    with pytest.raises(ValueError, match="0 or more"):
        quick_run(data, learning_rate=-1.0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cpu"):
            quick_run(data, device="cuda")


def test_several_labels_weight_and_group(tmp_path: Path, teacher: tuple[pl.DataFrame, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    frame = (
        teacher[0]
        .head(6000)
        .with_columns(
            like=pl.col("label").sample(fraction=1, shuffle=True, seed=0), weight=pl.Series(rng.uniform(0.5, 2, 6000))
        )
    )
    ctr.prepare(
        frame,
        tmp_path / "d",
        features=TEACHER.features(),
        labels=("label", "like"),
        weight="weight",
        group="C1",
        log=None,
    )
    _, result = quick_run(tmp_path / "d", max_epochs=6)
    clicks, noise = result["test_tasks"]
    assert clicks["auc"] > 0.62 > noise["auc"]
    assert result["test_auc"] == pytest.approx((clicks["auc"] + noise["auc"]) / 2)


# The command line.


def command(*arguments: str) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def csv_file(tmp_path: Path, teacher: tuple[pl.DataFrame, np.ndarray]) -> Iterator[Path]:
    path = tmp_path / "clicks.csv"
    teacher[0].head(6000).write_csv(path)
    yield path


def test_command_line_from_csv_to_scores(csv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared, model, scores = tmp_path / "prepared", tmp_path / "model", tmp_path / "scores.csv"
    flags = ["--group", "C1", "--numeric", "I1:log", "--sequence", "history:C1", "--json"]
    assert command("prepare", csv_file, "--out", prepared, *flags) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(report["rows"].values()) == 6000
    assert ctr.Schema.load(prepared)["I1"].transform == "log"
    assert ctr.Schema.load(prepared)["history"].vocabulary == "C1"

    training = ["--model", "dcnv2", "--dim", "8", "--hidden", "16", "--batch-size", "256", "--epochs", "8"]
    assert command("train", prepared, "--out", model, *training, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["test_auc"] > 0.6

    assert command("evaluate", model, prepared, "--json") == 0
    assert json.loads(capsys.readouterr().out)["auc"] == pytest.approx(result["test_auc"], abs=1e-9)
    assert command("evaluate", model, csv_file) == 0
    table = capsys.readouterr().out
    assert "6,000" in table
    assert "test AUC" not in table  # these rows are train and test alike

    assert command("predict", model, csv_file, "--out", scores) == 0
    assert "6,000 rows scored" in capsys.readouterr().out
    frame = pl.read_csv(scores)
    assert frame.columns == ["label"]
    assert frame.height == 6000
    assert frame["label"].is_between(0, 1).all()


@pytest.mark.parametrize(
    ("cpuinfo", "native"),
    [
        ("flags\t\t: fpu sse2 fma avx2", False),
        ("flags\t\t: avx2 avx512f avx512bw avx512_vnni", False),  # torch has bf16 kernels here, which emulate it
        ("model name\t: amx_bf16\nflags\t\t: avx2", False),
        ("flags\t\t: avx2 avx512bw avx512_bf16", True),
        ("flags\t\t: avx2 amx_tile amx_bf16", True),
        ("Features\t: fp asimd i8mm bf16", True),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_which_processors_multiply_bfloat16(cpuinfo: str, native: bool) -> None:
    assert engines.native_bfloat16(cpuinfo) is native


def test_emulated_bf16_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "native_bfloat16", lambda: False)
    with pytest.raises(ValueError, match=r"no instructions for it .*slower than fp32: drop --precision"):
        quick_run(data, engine="fused", precision="bf16")
    monkeypatch.setattr(engines, "native_bfloat16", lambda: True)
    for engine in ("exact", "fused"):
        assert quick_run(data, engine=engine, precision="bf16")[1]["precision"] == "bf16"


def test_command_line_on_the_fused_engine(
    csv_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "native_bfloat16", lambda: True)  # slow where it is not, but the same
    assert command("prepare", csv_file, "--out", tmp_path / "p") == 0
    flags = ["--model", "deepfm", "--engine", "fused", "--precision", "bf16", "--dim", "8", "--epochs", "1", "--json"]
    assert command("train", tmp_path / "p", "--out", tmp_path / "m", "--batch-size", "256", *flags) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["engine"] == "fused"
    assert command("evaluate", tmp_path / "m", tmp_path / "p", "--json") == 0
    again = json.loads(capsys.readouterr().out)["auc"]
    assert again == pytest.approx(result["test_auc"], abs=1e-6)
