"""What `ctrlib train` does where nothing is said: counts of the data, rules on them, and what comes of it."""

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
from ctrlib import cli, models
from ctrlib.data.facts import Facts, facts_of
from ctrlib.models import MODELS
from ctrlib.testing import example_batch, example_schema
from ctrlib.training import loop
from ctrlib.training.config import Training
from ctrlib.training.defaults import rows_per_step, settings_for
from ctrlib.training.run import start_at_base_rate

QUIET = Console(quiet=True)


def prepared(folder: Path, frame: pl.DataFrame, **arguments: Any) -> Path:
    ctr.prepare(frame, folder, log=None, **arguments)
    return folder


# Counts.


def test_facts_are_counts_of_train_by_weight_and_by_known_label(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "item": ["a", "b", "a", "c", "a"],
            "user": ["x", "y", "x", "x", "z"],
            "price": [1.0, 2.5, 3.0, 4.5, 5.0],
            "click": [1, 0, 0, 0, 1],
            "buy": [1, None, 0, 0, 0],
            "weight": [1.0, 2.0, 3.0, 4.0, 0.0],
        }
    )
    other = frame[:2].with_columns(buy=pl.Series([1, 0]))
    data = prepared(
        tmp_path / "data",
        {"train": frame, "valid": other, "test": other},  # type: ignore[arg-type]
        features=[ctr.Categorical("item"), ctr.Categorical("user"), ctr.Numeric("price")],
        labels=["click", "buy"],
        weight="weight",
        missing_labels="mask",
    )
    # The last row weighs nothing: click has 1 of 10 by weight, buy 1 of 8, each in one row.
    assert facts_of(data) == Facts(rows=5, rates=(0.1, 0.125), positives=1, values=6, fields=3, numbers=1)


def test_features_of_one_vocabulary_count_its_values_once(tmp_path: Path) -> None:
    frame = pl.DataFrame({"item": ["a", "b"] * 50, "seen": ["a|b", "b"] * 50, "label": [0, 1] * 50})
    features = [ctr.Categorical("item"), ctr.Sequence("seen", vocabulary="item")]
    data = prepared(tmp_path / "data", frame, features=features)
    assert facts_of(data).values == 2 and facts_of(data).fields == 2


# Where a model starts.

HEADS = {
    "linear": lambda: ctr.heads.LinearHead((6,), num_tasks=2),
    "linear, unweighted": lambda: ctr.heads.LinearHead((6,), num_tasks=2, unweighted=6),
    "ensemble": lambda: ctr.heads.EnsembleHead((6,), widths=(2, 4), num_tasks=2),
    "shared_bottom": lambda: ctr.heads.SharedBottom((6,), num_tasks=2),
    "mmoe": lambda: ctr.heads.MMoE((6,), num_tasks=2),
    "ple": lambda: ctr.heads.PLE((6,), num_tasks=2),
    "esmm": lambda: ctr.heads.ESMM((6,), num_tasks=2),
    "aitm": lambda: ctr.heads.AITM((6,), num_tasks=2),
    "stem": lambda: ctr.heads.STEM((3, 6), num_tasks=2),
    "towers": lambda: ctr.heads.TaskTowers((6,), num_tasks=2, hidden=(4,)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_starts_at_the_rates(name: str) -> None:
    head = HEADS[name]().eval()
    head.start_at(torch.tensor([0.25, 0.005]))
    streams = (3,) if name == "stem" else ()
    found = head(torch.zeros(*streams, 4, 6)).sigmoid()
    torch.testing.assert_close(found, torch.tensor([[0.25, 0.005]]).expand(4, 2), rtol=1e-4, atol=1e-7)


def test_a_chain_whose_later_label_is_the_more_frequent_one_starts_at_the_first() -> None:
    head = ctr.heads.ESMM((6,), num_tasks=2)
    head.start_at(torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(head(torch.zeros(1, 6)).sigmoid(), torch.tensor([[0.1, 0.0999]]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_every_published_model_has_a_start(name: str) -> None:
    assert hasattr(models.build({"model": name, "embedding_dim": 4}, example_schema(num_tasks=2)).head, "start_at")


def test_a_head_without_a_start_is_refused(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", pl.DataFrame({"item": list("ab") * 50, "label": [0, 1] * 50}))
    schema = ctr.Schema.load(data)
    embedding = ctr.TableEmbedding(schema.features, embedding_dim=4)
    tower = ctr.MLP(embedding.out_shape, hidden=(4,))
    head = torch.nn.Linear(4, 1)
    head.in_shape, head.out_shape = (4,), (1,)
    with pytest.raises(ValueError, match="Linear has no method start_at"):
        start_at_base_rate(ctr.Model(embedding, tower, head), data)


# What chooses the epoch.

SCRIPT: dict[str, list[float]] = {
    "auc": [0.60, 0.62, 0.64, 0.63, 0.63, 0.63, 0.63],
    "log_loss": [0.50, 0.45, 0.47, 0.49, 0.51, 0.53, 0.55],
    "gauc": [0.70, 0.50, 0.50, 0.71, 0.50, 0.50, 0.50],
}


class Nothing:
    """An engine that trains nothing, and notes the rate of each epoch."""

    name = "nothing"
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.model = torch.nn.Linear(1, 1)
        self.learning_rates, self.rates = [1.0], []

    def train(self, batches: Any) -> Any:
        self.rates.append(self.learning_rates[0])
        for batch in batches:
            yield batch, torch.zeros(())

    def state(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}


def scripted(monkeypatch: pytest.MonkeyPatch, of: int = 1, **how: Any) -> tuple[ctr.training.History, list[float]]:
    engine = Nothing()

    def evaluate(*_: Any, quick: bool, **__: Any) -> dict[str, Any]:
        assert quick == (how.get("select_by") != "gauc")
        line = {name: values[len(engine.rates) - 1] for name, values in SCRIPT.items()}
        return line if of == 1 else {**line, "gauc": None, "tasks": [line, {"gauc": 0.5}]}

    monkeypatch.setattr(loop, "evaluate", evaluate)
    batches = [example_batch(example_schema(), 4)]
    history = ctr.fit(engine, batches, batches, max_epochs=7, console=QUIET, **how)
    return history, engine.rates


@pytest.mark.parametrize(
    ("how", "best", "rates"),
    [
        ({}, 3, [1, 1, 1, 1, 0.1]),
        ({"select_by": "auc", "cut_factor": 0.5, "patience": 3}, 3, [1, 1, 1, 1, 0.5, 0.25]),
        ({"select_by": "log_loss"}, 2, [1, 1, 1, 0.1]),
        ({"select_by": "log_loss", "cut_factor": 1.0}, 2, [1, 1, 1, 1]),
        ({"select_by": "log_loss", "min_delta": 0.06}, 1, [1, 1, 0.1]),
        ({"select_by": "gauc", "patience": 3}, 4, [1, 1, 0.1, 0.01, 0.01, 0.001, 1e-4]),
        ({"min_delta": 0.03}, 3, [1, 1, 0.1, 0.1, 0.01]),  # .60, then .64: by less than .03 each, but not together
    ],
)
def test_the_score_chooses_the_epoch(
    how: dict[str, Any], best: int, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    history, found = scripted(monkeypatch, **how)
    assert history.best_epoch == best
    assert found == pytest.approx(rates)
    gauc = SCRIPT["gauc"][: len(found)] if how.get("select_by") == "gauc" else [None] * len(found)
    assert [line.valid_gauc for line in history.epochs] == gauc


def test_gauc_of_several_labels_is_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    history, _ = scripted(monkeypatch, of=2, select_by="gauc")
    assert [line.valid_gauc for line in history.epochs][:2] == [pytest.approx(0.6), pytest.approx(0.5)]


def test_gauc_needs_groups(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data", pl.DataFrame({"item": list("ab") * 100, "label": [0, 1, 1, 0] * 50}))
    config = {"model": "mlp", "embedding_dim": 4, "training": {"select_by": "gauc", "max_epochs": 1}}
    with pytest.raises(ValueError, match=r"--select-by gauc\) needs groups with both classes"):
        ctr.run(data, config, console=QUIET)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("select_by", "acu", "unknown select_by 'acu'; the closest are auc"),
        ("min_delta", -1.0, "min_delta .* must be a finite number that is 0 or more, got -1.0"),
        ("cut_factor", 1.5, "cut_factor must be at most 1, got 1.5"),
        ("start_at_base_rate", 1, "start_at_base_rate is .*1.*, expected True or False|True or False"),
    ],
)
def test_a_training_that_makes_no_sense_is_refused(entry: str, value: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Training(**{entry: value})


# The rules, by value.


def facts(**changed: Any) -> Facts:
    """Of a middling table, but for what is said."""
    usual = {"rows": 40_000, "rates": (0.24,), "positives": 9_600, "values": 100, "fields": 14, "numbers": 6}
    return Facts(**{**usual, **changed})


@pytest.mark.parametrize(
    ("changed", "model", "training"),
    [
        (
            {},
            {"embedding_dim": 8, "hidden": [128, 64]},
            {"batch_size": 512, "learning_rate": 2e-3, "embedding_l2": 0.021},
        ),
        ({"values": 7_000, "numbers": 0}, {"embedding_dim": 16}, {"embedding_l2": 0.085}),
        ({"rows": 5_000}, {"hidden": [128, 64]}, {"batch_size": 128, "embedding_l2": 0.17}),
        ({"rows": 1_000_000}, {"hidden": [256, 128]}, {"batch_size": 4096, "embedding_l2": 0.00085}),
        ({"rows": 100_000_000}, {"hidden": [400, 200]}, {"batch_size": 4096, "embedding_l2": 8.5e-6}),
        (
            {"rates": (0.005,), "positives": 200},
            {},
            {"min_delta": 1.6e-05, "learning_rate": 2e-3, "embedding_l2": 0.0035},
        ),
        ({"rates": (0.5, 0.005), "positives": 200}, {}, {"min_delta": 0.00018, "embedding_l2": 0.014}),
    ],
)
def test_settings_by_the_data(changed: dict[str, Any], model: dict[str, Any], training: dict[str, Any]) -> None:
    settings = settings_for(facts(**changed))
    assert {name: settings.model[name] for name in model} == model
    assert {name: settings.training[name] for name in training} == training
    assert ("numeric" in settings.model) == (changed.get("numbers") != 0)
    assert settings.model["dropout"] == 0.2 and settings.training["start_at_base_rate"] is True
    assert settings.training["average_weights"] is True
    Training(**settings.training)  # takes them


def test_the_fused_engine_has_no_l2_no_average_and_widths_of_four() -> None:
    settings = settings_for(facts(), "fused")
    assert "embedding_l2" not in settings.training and settings.model["embedding_dim"] % 4 == 0
    assert "average_weights" not in settings.training
    assert "L2" not in settings.reason and "average" not in settings.reason


@pytest.mark.parametrize(
    ("engine", "device", "has", "processes", "expected"),
    [
        ("fused", "cpu", True, 1, "bf16"),
        ("fused", "cpu", False, 1, None),
        ("fused", "cpu", True, 2, None),  # whose machines may differ
        ("exact", "cpu", True, 1, None),
    ],
)
def test_bf16_is_chosen_where_the_processor_has_it(
    engine: str, device: Any, has: bool, processes: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctrlib.training.engines.native_bfloat16", lambda: has)
    monkeypatch.setattr("ctrlib.distributed.world_size", lambda: processes)
    settings = settings_for(facts(), engine, device)
    assert settings.training.get("precision") == expected
    assert ("bf16, which this processor multiplies itself" in settings.reason) == (expected == "bf16")


def test_the_reason_is_one_line_with_the_counts_and_what_they_led_to() -> None:
    expected = (
        "settings by the data: 40,000 rows (9,600 of the rarer class), so layers of 128-64, batches of 512, and L2 of "
        "0.085; 875 values per id field, so width 16; the average of weights; 6 numbers, piecewise "
        "linear; calibrated, and the epoch by that log-loss (flags change them)"
    )
    assert settings_for(facts(values=7_000)).reason == expected


def test_batches_are_powers_of_two() -> None:
    sizes = [rows_per_step(rows, steps=50, least=128) for rows in (1, 6_000, 32_000, 80_000, 10**9)]
    assert sizes == [128, 128, 512, 1024, 4096]


# The command line.


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label that follows from a hump of one number, a number that is mostly 0, and whether two ids agree."""
    rng = np.random.default_rng(0)
    n = 6_000
    age, gain = rng.normal(size=n), np.where(rng.random(n) < 0.9, 0.0, rng.lognormal(2, 1, n))
    a, b = rng.integers(0, 4, (2, n))
    logit = 1 - 2 * age**2 + 3 * (gain > 7) - 2 * ((gain > 0) & (gain < 7)) + np.where(a == b, 2.0, -0.5)
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    columns = {"age": age, "gain": gain, "a": [f"a{i}" for i in a], "b": [f"b{i}" for i in b], "label": label}
    folder = tmp_path_factory.mktemp("planted") / "data"
    return prepared(folder, pl.DataFrame(columns), split=(4, 1, 1))


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert cli.main(["train", *map(str, arguments), "--print-config"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_flags_leave_open_is_chosen_and_a_flag_wins(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_for(facts_of(planted))
    config = printed(capsys, planted)
    assert settings.model.items() <= config.items()
    assert settings.training.items() <= config["training"].items()
    assert config["model"] == "dcnv2" and config["edges"] == ctr.quantile_edges(planted, 64, missing_apart=True)
    flags = "--dim 4 --hidden 9 --dropout 0 --cross-layers 1 --numeric vector --l2 0 --learning-rate 0.5 --patience 9"
    flags += " --batch-size 77 --epochs 3 --select-by auc --min-delta 0.25 --cut-factor 0.75"
    said = printed(capsys, planted, *flags.split())
    expected = {"embedding_dim": 4, "hidden": [9], "dropout": 0, "num_cross_layers": 1, "numeric": "vector"}
    assert expected.items() <= said.items() and said["edges"] is None
    rates = {"embedding_l2": 0, "learning_rate": 0.5, "patience": 9, "batch_size": 77, "max_epochs": 3}
    assert {**rates, "select_by": "auc", "min_delta": 0.25, "cut_factor": 0.75}.items() <= said["training"].items()
    assert len(printed(capsys, planted, "--bins", 4)["edges"][0]) == 5


def test_a_model_gets_what_it_has_arguments_for(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, planted, "--model", "autoint")
    assert config["numeric"] == "piecewise_linear" and config["training"]["learning_rate"] == 2e-3
    assert "hidden" not in config and "dropout" not in config


def test_a_config_is_not_changed_by_the_data(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"model": "fm", "training": {"seed": 3}}))
    config = printed(capsys, planted, "--config", path)
    assert (config["numeric"], config["embedding_dim"], config["training"]["learning_rate"]) == ("vector", 16, 1e-3)
    assert config["training"]["select_by"] == "auc" and not config["training"]["start_at_base_rate"]


@pytest.mark.parametrize("numeric", ["vector", "piecewise_linear", "periodic"])
def test_a_warm_start_keeps_the_model_that_it_starts_from(
    numeric: str, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rules may have come to others on the newer rows, and the weights would not fit."""
    flags = ["--dim", "4", "--hidden", "8", "--numeric", numeric, "--epochs", "1", "--out", str(tmp_path / "monday")]
    assert cli.main(["train", str(planted), *flags]) == 0
    capsys.readouterr()
    config = printed(capsys, planted, "--warm-start", tmp_path / "monday")
    before = json.loads((tmp_path / "monday" / "model.json").read_text())
    assert before.pop("calibration")  # the newer rows get one of their own
    assert {**config, "training": 0} == {**before, "training": 0}
    again = printed(capsys, planted, "--warm-start", tmp_path / "monday", "--hidden", "6")
    assert (again["embedding_dim"], again["hidden"]) == (4, [6])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--cut-factor 2", "--cut-factor 2.0: expected at most 1"),
        ("--min-delta -1", "min_delta (--min-delta) must be a finite number that is 0 or more, got -1.0"),
        ("--bins 4 --numeric vector", "there are no bins in --numeric vector"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_any_work(
    flags: str, message: str, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(planted), "--out", str(tmp_path / "out"), *flags.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# What comes out.


def scores_of_logistic_regression(data: Path, split: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Its AUC on a split, with the labels and probabilities: one-hot ids beside the numbers as they are prepared."""
    from sklearn.linear_model import LogisticRegression

    def rows(part: str) -> tuple[np.ndarray, np.ndarray]:
        (batch,) = ctr.Loader(data, part, batch_size=10**6)
        ids = batch.sparse.values().view(len(batch.sparse.keys()), -1).numpy()
        one_hot = [np.eye(num.num_embeddings)[i] for num, i in zip(batch_features(data), ids)]
        return np.hstack([batch.dense.numpy(), *one_hot]), batch.labels[:, 0].numpy()

    model = LogisticRegression(max_iter=500).fit(*rows("train"))
    x, labels = rows(split)
    probabilities = model.predict_proba(x)[:, 1]
    return ctr.metrics.auc(labels, probabilities), labels, probabilities


def batch_features(data: Path) -> list[Any]:
    return list(ctr.Schema.load(data).sparse)


def test_defaults_find_what_no_line_through_the_numbers_shows(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(planted), "--out", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert settings_for(facts_of(planted)).reason in err
    linear, _, _ = scores_of_logistic_regression(planted, "test")
    assert result["test_auc"] > linear + 0.05
    assert result["test_normalized_entropy"] < 0.9


def test_defaults_are_better_than_a_constant_at_half_a_percent_of_positives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """90 positives in train: the noise of 300 ids could be learnt by heart."""
    rng = np.random.default_rng(3)
    n = 24_000
    a, b = rng.integers(0, 20, n), rng.integers(0, 300, n)
    logit = -6.1 + np.linspace(-1.8, 1.8, 20)[a]
    label = (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(int)
    frame = pl.DataFrame({"a": [f"a{i}" for i in a], "b": [f"b{i}" for i in b], "label": label})
    data = prepared(tmp_path / "data", frame, split=(8, 4, 4), stratify="label")
    assert facts_of(data).rates[0] == pytest.approx(0.005, abs=0.002)
    assert cli.main(["train", str(data), "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["test_normalized_entropy"] < 1
    assert math.isfinite(result["test_auc"]) and result["test_auc"] > 0.6
