"""What `ctrlib train` does where nothing is said: counts of the data, rules on them, and what comes out on planted data."""

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
    other = pl.DataFrame({**{name: frame[name][:2] for name in frame.columns}}).with_columns(buy=pl.Series([1, 0]))
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
    data = prepared(tmp_path / "data", frame, features=[ctr.Categorical("item"), ctr.Sequence("seen", vocabulary="item")])
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
