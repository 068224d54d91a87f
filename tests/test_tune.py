"""Searches over settings: what is tried, that kills change nothing, that test is not looked at, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli
from ctrlib.errors import ArgumentError
from ctrlib.selection import tuning
from ctrlib.selection.space import said_by, space_of
from ctrlib.training.config import complete
from ctrlib.training.defaults import config_for
from ctrlib.training.loop import NonFiniteLossError
from ctrlib.training.progress import Epoch

optuna = pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a test split: whoever looks at it fails."""
    generator, rows = np.random.default_rng(1), 1500
    item, price = generator.integers(30, size=rows), generator.normal(size=rows)
    logit = 1.5 * generator.normal(size=30)[item] + price
    frame = pl.DataFrame(
        {"item": item, "price": price, "label": (generator.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)}
    )
    folder = tmp_path_factory.mktemp("tune") / "data"
    features = [ctr.Categorical("item"), ctr.Numeric("price")]
    ctr.prepare(frame, folder, features=features, split=(4, 1, 0), log=None)
    return folder


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_clock(part) for name, part in value.items() if "second" not in name}
    return [without_clock(part) for part in value] if isinstance(value, list) else value


TRIALS = 9


@pytest.fixture(scope="module")
def searched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    out, lines = tmp_path_factory.mktemp("searched") / "out", []
    return out, ctr.tune(data, ["mlp", "fm"], out, trials=TRIALS, seed=3, log=lines.append), lines


def test_the_first_trials_are_the_defaults(data: Path, searched: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, found, lines = searched
    assert [one["number"] for one in found["trials"]] == list(range(TRIALS)) and len(lines) == TRIALS
    for name, one in zip(("mlp", "fm"), found["trials"]):
        plain = config_for(data, name, seed=3)
        assert one["model"] == one["parameters"]["model"] == name and one["state"] == "complete"
        assert config_for(data, name, said_by(one["parameters"]), seed=3) == plain
        _, result = ctr.run(data, plain, score_test=False)
        assert one["value"] == result["valid_auc"] and one["best_epoch"] == result["best_epoch"]


def test_the_best_is_the_best_and_trains_to_the_same(
    data: Path, searched: tuple[Path, dict[str, Any], list[str]]
) -> None:
    out, found, _ = searched
    values = [one["value"] for one in found["trials"] if one["state"] == "complete"]
    assert found["best"]["value"] == max(values) and len(values) >= 5
    config = json.loads((out / "best.json").read_text())
    assert config == found["config"] == complete(config)
    assert config["training"]["checkpoint_seconds"] == 300 and config["training"]["seed"] == 3
    _, result = ctr.run(data, config, score_test=False)
    assert result["valid_auc"] == found["best"]["value"]


def test_trials_differ_and_stay_in_their_ranges(data: Path, searched: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, found, _ = searched
    texts = {json.dumps(one["parameters"]) for one in found["trials"]}
    assert len(texts) == TRIALS
    for one in found["trials"]:
        ranges, first = space_of(config_for(data, one["model"]))
        assert set(one["parameters"]) == {"model", *ranges} and set(ranges) == set(first)
        for name, (kind, *limits) in ranges.items():
            value = one["parameters"][name]
            assert value in limits if kind == "one of" else limits[0] <= value <= limits[1]


KILLED = """
import json, os, signal, sys
from pathlib import Path
import ctrlib as ctr
from ctrlib.selection import tuning
data, out, at, trials = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = tuning.run

def dying(*arguments, on_epoch, **named):
    def die(line):
        on_epoch(line)
        if (out / "trials.json").is_file() and len(json.loads((out / "trials.json").read_text())["trials"]) == at:
            os.kill(os.getpid(), signal.SIGKILL)
    return run(*arguments, on_epoch=die, **named)

tuning.run = dying
ctr.tune(data, ["mlp", "fm"], out, trials=trials, seed=3)
"""


def test_killed_and_started_again_it_ends_with_the_same_trials(
    data: Path, searched: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    out, at = tmp_path / "out", 4
    command = [sys.executable, "-c", KILLED, data, out, str(at), str(TRIALS)]
    environment = {**os.environ, "PYTHONPATH": str(Path(ctr.__file__).parent.parent)}
    assert subprocess.run(command, env=environment, timeout=300).returncode == -signal.SIGKILL
    assert len(json.loads((out / "trials.json").read_text())["trials"]) == at
    lines: list[str] = []
    found = ctr.tune(data, ["mlp", "fm"], out, trials=TRIALS, seed=3, log=lines.append)
    assert len(lines) == TRIALS - at
    assert without_clock(found) == without_clock(searched[1])


def test_a_resumed_study_proposes_no_point_again(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Before there are enough trials for the sampler to look at, points are drawn at random."""

    def run(_: Any, config: Any, **__: Any) -> Any:
        return None, {"valid_auc": 0.5 + config["training"]["learning_rate"], "best_epoch": 1}

    monkeypatch.setattr(tuning, "run", run)
    for trials in range(1, 8):
        (tmp_path / "out" / "best.json").unlink(missing_ok=True)
        found = ctr.tune(data, "mlp", tmp_path / "out", trials=trials)
    rates = [one["parameters"]["learning_rate"] for one in found["trials"]]
    assert len(set(rates)) == 7
    at_once = ctr.tune(data, "mlp", tmp_path / "at_once", trials=7)
    assert rates == [one["parameters"]["learning_rate"] for one in at_once["trials"]]
    other = ctr.tune(data, "mlp", tmp_path / "other", trials=7, seed=1)
    assert not set(rates[1:]) & {one["parameters"]["learning_rate"] for one in other["trials"]}


def scripted(curves: list[list[float]], calls: list[dict[str, Any]]) -> Any:
    """A run whose validation is told beforehand."""

    def run(_: Any, config: dict[str, Any], *, on_epoch: Any, score_test: bool, **__: Any) -> Any:
        assert score_test is False
        curve = curves[len(calls)]
        calls.append(config)
        for number, value in enumerate(curve):
            on_epoch(Epoch(number + 1, 0.5, value, 1 - value, 1e-3, 1.0, 1.0))
        return None, {"valid_auc": max(curve), "valid_logloss": 1 - max(curve), "best_epoch": 1 + int(np.argmax(curve))}

    return run


@pytest.mark.parametrize("by", ["auc", "log_loss"])
def test_a_trial_that_is_behind_is_stopped(
    by: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = [[0.6, 0.7, 0.75], [0.6, 0.72, 0.74], [0.5, 0.69, 0.7], [0.6, 0.71, 0.8], [0.6, 0.7, 0.7]]
    curves += [[0.1, 0.9, 0.91], [0.9, 0.5, 0.99], [0.6, 0.695, 0.7]]
    monkeypatch.setattr(tuning, "run", scripted(curves, []))
    found = ctr.tune(data, "fm", tmp_path / "out", trials=8, by=by)
    states = [one["state"] for one in found["trials"]]
    # The sixth is behind in its first epoch only; the seventh has been better; the eighth is behind in its second.
    assert states == ["complete"] * 7 + ["pruned"]
    assert found["best"]["number"] == 6 and found["best"]["value"] == pytest.approx(0.99 if by == "auc" else 0.01)
    assert found["trials"][7]["value"] is None and list(found["trials"][7]["epochs"]) == ["1", "2"]


def test_a_trial_that_fails_is_noted_and_the_next_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def run(_: Any, config: Any, **__: Any) -> Any:
        calls.append(config)
        if len(calls) == 2:
            raise NonFiniteLossError("the loss is nan")
        if len(calls) == 3:
            raise ArgumentError("these do not go together")
        return None, {"valid_auc": float("nan") if len(calls) == 4 else 0.6, "best_epoch": 1}

    monkeypatch.setattr(tuning, "run", run)
    found = ctr.tune(data, "fm", tmp_path / "out", trials=6)
    assert [one["state"] for one in found["trials"]] == ["complete", "failed", "failed", "failed", *["complete"] * 2]
    assert found["trials"][1]["why"] == "the loss is nan" and found["best"]["number"] == 0


def test_minutes_end_it_and_stop_the_trial_at_work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: clock[0])

    def run(_: Any, config: Any, *, on_epoch: Any, **__: Any) -> Any:
        for number in range(3):
            clock[0] += 25
            on_epoch(Epoch(number + 1, 0.5, 0.7, 0.6, 1e-3, 1.0, 1.0))
        return None, {"valid_auc": 0.7, "best_epoch": 1}

    monkeypatch.setattr(tuning, "run", run)
    found = ctr.tune(data, "fm", tmp_path / "out", minutes=2)
    assert [one["state"] for one in found["trials"]] == ["complete", "out of time"]
    assert [one["seconds"] for one in found["trials"]] == [75, 50]
    assert len(ctr.tune(data, "fm", tmp_path / "tiny", minutes=0.01)["trials"]) == 1  # the first always ends
    assert len(ctr.tune(data, "fm", tmp_path / "few", minutes=60, trials=3)["trials"]) == 3


@pytest.mark.parametrize(
    ("models", "arguments", "said"),
    [
        ("mpl", {}, "unknown model 'mpl'; the closest are"),
        ([], {}, "models is empty"),
        ("fm", {"trials": 0}, "trials"),
        ("fm", {"minutes": 0}, "minutes"),
        ("fm", {"by": "gauc"}, "unknown by 'gauc'"),
        ("fm", {"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    models: Any, arguments: dict[str, Any], said: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ctr.CtrlibError, match=said):
        ctr.tune(data, models, tmp_path / "out", **{"trials": 1, **arguments})
    assert not (tmp_path / "out").exists()


def test_another_search_and_damage_are_refused(
    data: Path, searched: tuple[Path, dict[str, Any], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(searched[0], out)
    with pytest.raises(ctr.CtrlibError, match="is a folder of `ctrlib tune` already"):
        ctr.tune(data, ["mlp", "fm"], out, trials=TRIALS, seed=3)
    (out / "best.json").unlink()
    with pytest.raises(ctr.CtrlibError, match="an unfinished search, and that is another one: seed was 3, is now 4"):
        ctr.tune(data, ["mlp", "fm"], out, trials=TRIALS, seed=4)
    (out / "trials.json").write_text("[")
    with pytest.raises(ctr.CtrlibError, match=r"trials.json is damaged"):
        ctr.tune(data, ["mlp", "fm"], out, trials=TRIALS, seed=3)


def test_without_optuna_it_says_what_to_install(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert cli.main(["tune", str(data), "--trials", "1", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'ctrlib[tune]'" in capsys.readouterr().err


def test_the_command(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    calls: list[Any] = []

    def run(_: Any, config: Any, **__: Any) -> Any:
        calls.append(config)
        return None, {"valid_auc": 0.7 - 0.01 * len(calls), "best_epoch": 1}

    monkeypatch.setattr(tuning, "run", run)
    arguments = ["tune", str(data), "--models", "mlp,fm", "--trials", "14", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed, said = capsys.readouterr()
    assert "14 trials on" in printed and "14 complete" in printed and "0 (defaults)" in printed
    assert said.count("\n") == 14 and "trial 13 of 14, " in said and "; best 0.69000 (trial 0)" in said
    before = {name: (out / name).read_bytes() for name in ("best.json", "trials.json")}
    arguments += ["--json", "--overwrite", "--seed", "1"]

    class Killed(BaseException):
        """What no part of ctrlib catches."""

    def dying(_: Any, config: Any, **named: Any) -> Any:
        if len(calls) == 20:
            raise Killed
        return run(_, config, **named)

    monkeypatch.setattr(tuning, "run", dying)
    with pytest.raises(Killed):
        cli.main(arguments)
    assert {name: (out / name).read_bytes() for name in before} == before  # the older search stays until then
    capsys.readouterr()
    monkeypatch.setattr(tuning, "run", run)
    assert cli.main(arguments) == 0
    printed, said = capsys.readouterr()
    assert json.loads(printed)["best"]["number"] == 0 and said.count("\n") == 8
    assert json.loads((out / "trials.json").read_text())["identity"]["seed"] == 1
    assert json.loads((out / "best.json").read_text())["training"]["seed"] == 1
    assert {path.name for path in out.iterdir() if path.name != ".lock"} == set(before)
    for wrong, expected in ((["--models", "mpl"], "there is no model mpl"), (["--trials", "0"], "trials")):
        assert cli.main(["tune", str(data), "--out", f"{out}2", *wrong]) == 1
        assert expected in capsys.readouterr().err


def test_what_a_run_tells_of_its_epochs_and_not_of_test(data: Path, tmp_path: Path) -> None:
    config = {"model": "fm", "embedding_dim": 4, "training": {"max_epochs": 3, "batch_size": 128, "patience": 3}}
    lines: list[Any] = []
    _, result = ctr.run(data, config, out=tmp_path / "run", score_test=False, on_epoch=lines.append)
    assert [one.epoch for one in lines] == [1, 2, 3] and not [name for name in result if "test" in name]
    assert max(one.valid_auc for one in lines) == pytest.approx(result["valid_auc"])
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [one["valid_auc"] for one in logged] == [one.valid_auc for one in lines]

    def stop(line: Any) -> None:
        if line.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ctr.run(data, config, out=tmp_path / "other", score_test=False, on_epoch=stop)
    again: list[Any] = []
    ctr.run(data, config, out=tmp_path / "other", score_test=False, on_epoch=again.append)
    assert [one.epoch for one in again] == [1, 2, 3]  # those before the kill, too
    assert [one.valid_auc for one in again] == [one.valid_auc for one in lines]
    with pytest.raises(ctr.CtrlibError, match="baselines=True needs test"):
        ctr.run(data, config, score_test=False, baselines=True)
    with pytest.raises(ctr.SchemaError, match="test"):
        ctr.run(data, config)
