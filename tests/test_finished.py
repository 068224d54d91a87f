"""A run that was killed in its last clean-up is over: the same command says so, cleans up, and computes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from damaged_folders import rows

import ctrlib as ctr
from ctrlib import cli
from ctrlib.search import run as search_run  # noqa: F401  # imported before anything is patched
from ctrlib.training import finished, loop, run

TRAIN = "train data --model fm --dim 4 --batch-size 128 --epochs 1 --out out"
SEARCH = "search optfs data --model fm --dim 4 --batch-size 128 --epochs 1 --setting epochs=2 --out out"


class Killed(BaseException):
    """As if the process was no more."""


def killed(*_: Any) -> None:
    raise Killed


def not_reached(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is to be computed again")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "data"
    ctr.prepare(rows(0), folder, labels="click", ignore=["user", "tags"], log=None)
    return folder


@pytest.fixture(scope="module", params=[TRAIN, SEARCH], ids=["train", "search"])
def over(data: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A command, and a folder with its `data` and its `out`, whose clean-up was about to begin."""
    home = tmp_path_factory.mktemp("over")
    shutil.copytree(data, home / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(finished, "clean_up", killed)
        with pytest.raises(Killed):
            cli.main(request.param.split())
    return request.param, home


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def nothing(out: Path) -> None:
    """The checkpoints are all there."""


def renamed(out: Path) -> None:
    (out / "checkpoints").rename(out / ".0123abcd.deleted")


def half_removed(out: Path) -> None:
    renamed(out)
    next((out / ".0123abcd.deleted").rglob("MANIFEST")).unlink()


def removed(out: Path) -> None:
    for name in ("checkpoints", "search"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "unfinished.json").unlink(missing_ok=True)


@pytest.fixture
def killed_at(
    over: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Path], None]], str]:
    """Copies the folder, makes what a kill there leaves, and works there; returns the command."""
    command, home = over

    def copy(left: Callable[[Path], None]) -> str:
        shutil.copytree(home, tmp_path / "home")
        monkeypatch.chdir(tmp_path / "home")
        left(Path("out"))
        return command

    return copy


@pytest.mark.parametrize(
    ("left", "flags"), [(nothing, ""), (renamed, " --overwrite"), (half_removed, " --json"), (removed, "")]
)
def test_the_same_command_finishes(
    killed_at: Any, left: Callable[[Path], None], flags: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = killed_at(left)
    for module, name in ((run, "predict"), (loop, "evaluate")):
        monkeypatch.setattr(module, name, not_reached)
    assert cli.main((command + flags).split()) == 0
    printed, said = capsys.readouterr()
    assert "out was over; what was left of its clean-up is done" in " ".join(said.split())
    result = json.loads(Path("out", "search.json" if "search" in command else "metrics.json").read_text())
    if flags == " --json":
        told = json.loads(printed)
        assert {name: told[name] for name in result} == result
    assert {path.name for path in Path("out").iterdir()} == {
        *("MANIFEST", "README.md", "model.json", "model.safetensors", "schema.json", "vocab", "numbers", "log.jsonl"),
        *(("plan.safetensors", "search.json", "search.png") if "search" in command else ("metrics.json", "curve.png")),
    }
    ctr.Predictor.load("out").predict(rows(9, 5))
    # From here on it is a folder like others.
    assert cli.main(command.split()) == 1
    assert "already: give another --out, or --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("left", [nothing, removed])
def test_another_command_is_refused_there(killed_at: Any, left: Callable[[Path], None], capsys: Any) -> None:
    command = killed_at(left)
    before = contents(Path("out"))
    for other, said in (
        (f"{command} --seed 7", "training.seed was 0, is now 7"),
        (f"{command} --seed 7 --overwrite", "training.seed was 0, is now 7"),
        (command.replace("--dim 4", "--dim 8"), "embedding_dim was 4, is now 8"),
        ("compress out data --ratio 2 --out out", "which is read"),
    ):
        assert cli.main(other.split()) == 1
        assert said in " ".join(capsys.readouterr().err.split()), other
        assert contents(Path("out")) == before
    rows(0).write_csv("rows.csv")
    others = ["prepare rows.csv --label click --out out --overwrite", f"{TRAIN} --overwrite", f"{SEARCH} --overwrite"]
    for other in (one for one in others if one.split()[0] != command.split()[0]):
        assert cli.main(other.split()) == 1
        assert "nothing of another kind is replaced" in " ".join(capsys.readouterr().err.split()), other
        assert contents(Path("out")) == before
    # Other rows are other data.
    flipped = rows(0).with_columns(1 - pl.col("click"))
    ctr.prepare(flipped, "data", labels="click", ignore=["user", "tags"], overwrite=True, log=None)
    assert cli.main(command.split()) == 1
    assert "rows was '" in " ".join(capsys.readouterr().err.split())
    assert contents(Path("out")) == before


def test_more_processors_may_finish_it(killed_at: Any, capsys: Any) -> None:
    command = killed_at(renamed)
    if "search" not in command:
        assert cli.main(f"{command} --workers 2 --checkpoint-seconds 7".split()) == 0
        assert not list(Path("out").glob(".*"))


def test_a_damaged_word_is_named(killed_at: Any, capsys: Any) -> None:
    command = killed_at(removed)
    path = Path("out", ".finished")
    path.write_text(path.read_text()[:40])
    assert cli.main(command.split()) == 1
    assert "out/.finished is damaged" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("left", [nothing, removed])
def test_run_returns_its_model_all_the_same(killed_at: Any, left: Callable[[Path], None]) -> None:
    """Which is not there any more: from its checkpoints, or by training anew."""
    command = killed_at(left)
    if "search" in command:
        return
    config = json.loads(Path("out", "model.json").read_text())
    was = json.loads(Path("out", "metrics.json").read_text())
    weights = ctr.Predictor.load("out").model.state_dict()
    with pytest.raises(ValueError, match=r"is another: training.seed was 0, is now 3"):
        ctr.run("data", {**config, "training": {**config["training"], "seed": 3}}, out="out")
    model, result = ctr.run("data", config, out="out")
    assert all(bool((value == weights[name]).all()) for name, value in model.state_dict().items())
    assert result["test_auc"] == was["test_auc"]
    assert not list(Path("out").glob(".*"))


def test_a_model_that_somebody_else_saved_there_is_not_taken_for_it(killed_at: Any, capsys: Any) -> None:
    command = killed_at(removed)
    if "search" in command:
        return
    was = contents(Path("out"))
    config = {"model": "fm", "embedding_dim": 2}
    ctr.save_model(ctr.models.build(config, ctr.Schema.load("data")), config, "data", "out")
    assert cli.main(command.split()) == 0
    assert "was over" not in capsys.readouterr().err
    assert contents(Path("out"))["model.safetensors"] == was["model.safetensors"]
