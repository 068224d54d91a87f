"""Runs in several processes, and runs that go on: what `run` and `fit` promise beside what test_sharding.py shows."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from rich.console import Console
from torch import Tensor, nn

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.distributed import rank, world_size
from ctrlib.layers import Dice
from ctrlib.testing import example_batch, example_schema
from ctrlib.training import loop, run
from ctrlib.training.batch_norm import synchronise_batch_norm
from ctrlib.training.config import Training
from ctrlib.training.loop import LostProcessError, _name_lost_processes

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
TEACHER = Teacher(num_rows=6000, cardinalities=(50, 40, 30), num_numeric=2, max_history=5, seed=3)
CONFIG = {"model": "deepfm", "embedding_dim": 8, "hidden": [16], "wide_columns": 4, "batch_norm": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "prepared"
    ctr.prepare(generate(TEACHER)[0], folder, features=TEACHER.features(), group="C1", log=None)
    return folder


def quick_run(data: Path, **arguments: Any) -> tuple[ctr.Model, dict[str, Any]]:
    """Arguments of the model, of the training and of `run`, as they come."""
    config = {**CONFIG, **{name: arguments.pop(name) for name in ("dropout", "batch_norm") if name in arguments}}
    names = [field.name for field in dataclasses.fields(Training) if field.name in arguments]
    training = {"batch_size": 256, "learning_rate": 5e-3, "max_epochs": 2, **{n: arguments.pop(n) for n in names}}
    return ctr.run(data, {**config, "training": training}, **{"console": QUIET, **arguments})


@pytest.mark.parametrize("engine", ["exact", "fused"])
def test_a_run_of_two_processes_gives_the_result_of_one(data: Path, engine: str, tmp_path: Path) -> None:
    def whole_run(out: Path) -> Any:
        saved: list[dict[str, Tensor]] = []
        _, result = quick_run(
            # Without it, since a bias before batch normalisation has rounding errors for gradients.
            data,
            engine=engine,
            batch_norm=False,
            out=out,
            on_trained=lambda m: saved.append(dict(m.state_dict())),
        )
        return result, saved

    ((alone, (whole,)),) = run_ranks(1, functools.partial(whole_run, tmp_path / "one"))
    (first, saved), (second, nothing) = run_ranks(2, functools.partial(whole_run, tmp_path / "two"))
    for name in ("valid_auc", "test_auc", "test_logloss", "test_gauc"):
        assert first[name] == second[name]
        assert first[name] == pytest.approx(alone[name], abs=1e-5)
    assert (first["processes"], first["parameters"]) == (2, alone["parameters"])
    for name, value in saved[0].items():
        torch.testing.assert_close(value, whole[name], atol=2e-5, rtol=1e-3)
    assert not nothing
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["test_auc"] == first["test_auc"]
    assert not (tmp_path / "two" / "checkpoints").exists()
    assert (tmp_path / "two" / "plan.json").exists() == (engine == "fused")


def test_evaluation_of_two_processes_is_that_of_one(data: Path) -> None:
    def scores() -> dict[str, Any]:
        torch.manual_seed(0)
        model = models.build(CONFIG, ctr.Schema.load(data))
        loader = ctr.Loader(
            data, "test", batch_size=128 // world_size(), rank=rank(), world_size=world_size(), with_group=True
        )
        return ctr.evaluate(model, loader)

    (alone,), (first, second) = run_ranks(1, scores), run_ranks(2, scores)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-9)
    assert first["rows"] == ctr.Loader(data, "test", batch_size=1).num_rows


class Killed(Exception):
    pass


@pytest.mark.parametrize(("engine", "average"), [("exact", False), ("exact", True), ("fused", False)])
def test_a_stopped_run_goes_on_to_the_same_bits(
    data: Path, engine: str, average: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of the second epoch, just before its validation, and just before the test."""
    arguments: dict[str, Any] = {
        "engine": engine,
        "dropout": 0.2,
        "checkpoint_seconds": 0.0,
        "average_weights": average,
    }
    expected, result = quick_run(data, **arguments)

    def patch_calls(patch: pytest.MonkeyPatch, where: Any, name: str, allowed: int) -> None:
        original, calls = getattr(where, name), iter(range(allowed))

        def limited(*positional: Any, **named: Any) -> Any:
            if next(calls, None) is None:
                raise Killed
            return original(*positional, **named)

        patch.setattr(where, name, limited)

    # After the last step an engine is its weights and the optimiser's state, as before it.
    stops = [(ctr.ExactEngine, "step", 27), (loop, "evaluate", 1), (run, "predict", 0)]
    for number, (where, name, allowed) in enumerate(stops if engine == "exact" else [(ctr.FusedEngine, "step", 27)]):
        out = tmp_path / f"{number}"
        with monkeypatch.context() as patch:
            patch_calls(patch, where, name, allowed)
            with pytest.raises(Killed):
                quick_run(data, out=out, **arguments)
        model, again = quick_run(data, out=out, **arguments)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
        same = ("valid_auc", "valid_logloss", "test_auc", "test_logloss", "epochs", "best_epoch")
        assert {name: again[name] for name in same} == {name: result[name] for name in same}
        assert len((out / "log.jsonl").read_text().splitlines()) == result["epochs"]


def test_checkpoints_of_another_run_are_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.delattr(run, "predict")
        with pytest.raises(NameError):
            quick_run(data, out=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r": training.seed was 0, is now 1. Start with the same settings"):
        quick_run(data, out=tmp_path, seed=1)
    with pytest.raises(ValueError, match=r": dropout was 0.0, is now 0.5\."):
        quick_run(data, out=tmp_path, dropout=0.5)
    _, more = quick_run(data, out=tmp_path, max_epochs=2)  # a higher limit is the same run
    assert more["epochs"] == 2


def test_a_batch_that_cannot_be_shared_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="3 processes cannot share a batch of 256 rows"):
        quick_run(data)


def test_checkpoints_need_a_loader_that_resumes(tmp_path: Path) -> None:
    batches = [example_batch(example_schema(), 8)]
    engine = ctr.ExactEngine(models.mlp(ctr.Inputs(example_schema(), embedding_dim=4), hidden=(4,)))
    with ctr.Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError, match=r"a ctrlib\.Loader"):
        ctr.fit(engine, batches, batches, checkpoints=checkpoints, console=QUIET)


def test_random_states_of_each_rank_come_back_and_other_counts_get_their_own() -> None:
    def draw() -> Any:
        torch.manual_seed(rank())
        states = ctr.training.random_state()
        first = torch.rand(3)
        ctr.training.set_random_state(states, world_size())
        assert torch.equal(first, torch.rand(3))
        ctr.training.set_random_state(states[:1], world_size())
        return states, torch.rand(3)

    (states, first), (_, second) = run_ranks(2, draw)
    assert states[0] != states[1]
    assert not torch.equal(first, second)
    ctr.training.set_random_state(states, world_size=1)
    (again,) = run_ranks(1, lambda: (ctr.training.set_random_state(states, 1), torch.rand(3))[1])
    assert not torch.equal(again, first)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 2)])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(shape: tuple[int, ...]) -> None:
    """Unequal shares, one of them empty; values, gradients and running statistics."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 100  # far from 0: sums of squares would cancel
    weight = torch.randn(shape, generator=generator)
    whole: Any = nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)
    leaf = x.clone().requires_grad_()
    (whole(leaf) * weight).sum().backward()

    def part() -> Any:
        rows = [slice(0, 4), slice(4, 4), slice(4, 6)][rank()]
        layer: Any = nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)
        synchronise_batch_norm(layer)
        own = x[rows].clone().requires_grad_()
        y = layer(own)
        (y * weight[rows]).sum().backward()
        grads = torch.stack([layer.weight.grad, layer.bias.grad])
        return y.detach(), own.grad, grads, layer.running_mean, layer.running_var, layer.num_batches_tracked

    parts = run_ranks(3, part)
    torch.testing.assert_close(torch.cat([y for y, *_ in parts]), whole(x).detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([grad for _, grad, *_ in parts]), leaf.grad, atol=2e-5, rtol=1e-5)
    total = sum(grads for _, _, grads, *_ in parts)
    torch.testing.assert_close(total, torch.stack([whole.weight.grad, whole.bias.grad]), atol=1e-4, rtol=1e-4)
    fresh: Any = nn.BatchNorm1d(3) if len(shape) == 2 else nn.BatchNorm2d(3)
    fresh(x)
    for _, _, _, mean, var, tracked in parts:
        torch.testing.assert_close(mean, fresh.running_mean)
        torch.testing.assert_close(var, fresh.running_var)
        assert tracked == 1


def test_dice_shares_its_statistics() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    whole = Dice(3)
    expected = whole(x)

    def part() -> Tensor:
        layer = Dice(3)
        synchronise_batch_norm(layer)
        return layer(x[4 * rank() : 4 * rank() + 4]).detach()  # type: ignore[no-any-return]

    torch.testing.assert_close(torch.cat(run_ranks(2, part)), expected.detach())
    assert not torch.allclose(expected, F.prelu(x, torch.zeros(3)))


def test_a_lost_process_is_named_and_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.training.loop.world_size", lambda: 2)
    with (
        pytest.raises(LostProcessError, match=r"died or does not answer.*Connection closed by peer"),
        _name_lost_processes(),
    ):
        raise RuntimeError("[gloo] Connection closed by peer [::1]:2")
    with pytest.raises(RuntimeError, match="shapes do not match"), _name_lost_processes():
        raise RuntimeError("shapes do not match")


def test_ctrl_c_ends_two_processes_in_the_same_step(data: Path) -> None:
    def run_until_interrupted() -> int:
        taken = 0
        original = ctr.ExactEngine.step

        def step(self: Any, batch: ctr.Batch) -> Tensor:
            nonlocal taken
            taken += 1
            if taken == 24 + rank():  # in the second epoch, and not at the same time
                signal.raise_signal(signal.SIGINT)
            return original(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ctr.ExactEngine, "step", step)
            _, result = quick_run(data)
        assert result["best_epoch"] == 1
        return taken

    assert run_ranks(2, run_until_interrupted) == [24, 24]


def test_the_command_goes_on_after_its_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(data), "--model", "mlp", "--hidden", "8", "--epochs", "1", "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.delattr(run, "predict")
        assert cli.main(command) == 1
    assert "NameError: name 'predict' is not defined. That is a fault of ctrlib" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.json").exists()  # it comes with its metrics
    assert cli.main(command) == 0
    assert "goes on after step" in capsys.readouterr().err
    assert {"model.json", "metrics.json", "curve.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert cli.main(command) == 1
    assert "run is a model folder already: give another --out, or --overwrite" in capsys.readouterr().err


def test_the_example_of_a_trainer_goes_on_under_torchrun(data: Path, tmp_path: Path) -> None:
    path, flags = str(ROOT / "recipes" / "own_trainer.py"), ["--data", str(data), "--out", str(tmp_path / "own")]
    flags += ["--checkpoint-steps", "19"]

    def of_two() -> str:
        """As torchrun runs it, but without its imports."""
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", [path, *flags, "--batch-size", "128", "--epochs", "1"])
            runpy.run_path(path, run_name="__main__")
        return printed.getvalue()

    assert "step 19: valid AUC" in run_ranks(2, of_two)[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", path, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--batch-size", "256", "--epochs", "2"], capture_output=True, text=True, timeout=180, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "step 38: valid AUC" in done.stdout
