"""What is refused, and when: targets that would be lost, arguments that make no sense, data that cannot teach anything,
configs of other models, things of other types; and that the command line says so without a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from rich.console import Console
from tyro.conf import Positional

import ctrlib as ctr
from ctrlib import cli, models, search
from ctrlib._target import NAMES, Kind, TargetError, check_target, kind_of
from ctrlib.cli.evaluate import Evaluate
from ctrlib.cli.refusals import explain
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.errors import ArgumentError, WrongTypeError
from ctrlib.manifest import write_manifest
from ctrlib.search.compression import compress
from ctrlib.search.run import search_and_retrain
from ctrlib.serving.model_folder import save_model
from ctrlib.structure import describe
from ctrlib.testing import example_batch, example_schema
from ctrlib.training import loop, run
from ctrlib.training.progress import Epoch, Progress

QUIET = Console(quiet=True)
CONFIG: dict[str, Any] = {"model": "mlp", "embedding_dim": 4, "hidden": [4]}
ROWS = 300


def build(schema: ctr.Schema) -> ctr.Model:
    return models.build(CONFIG, schema)


def frame(**columns: Any) -> pl.DataFrame:
    made, _ = generate(Teacher(num_rows=ROWS, cardinalities=(9, 5), num_numeric=1, seed=1))
    return made.with_columns(**{name: pl.Series(values) for name, values in columns.items()})


def prepared(folder: Path, **arguments: Any) -> Path:
    rows = arguments.pop("rows", None)
    rows = frame() if rows is None else rows
    splits = rows if isinstance(rows, dict) else {"train": rows[:200], "valid": rows[200:250], "test": rows[250:]}
    ctr.prepare(splits, folder, **{"labels": "label", "log": None, **arguments})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw file x.csv, and a folder of each kind, data and model real ones."""
    folder = tmp_path_factory.mktemp("home")
    frame().write_csv(folder / "x.csv")
    prepared(folder / "data")
    torch.manual_seed(0)
    save_model(build(ctr.Schema.load(folder / "data")), CONFIG, folder / "data", folder / "model")
    shutil.copytree(folder / "data", folder / "data2")
    shutil.copytree(folder / "model", folder / "model2")
    for name, markers in {
        "compressed": ["model.json", "schema.json", "compression.json"],
        "searched": ["model.json", "schema.json", "search.json", "plan.safetensors"],
        "ranked": ["ranking.json", "ranking.parquet"],
        "retrieved": ["retrieval.json"],
        "exported": ["export.json", "model.onnx"],
        "compared": ["comparison.json"],
        "tuned": ["trials.json", "best.json"],
        "run": ["metrics.json", "log.jsonl", "curve.png"],
        "other": ["thesis.txt"],
    }.items():
        (folder / name).mkdir()
        for marker in markers:
            (folder / name / marker).write_text("{}")
    (folder / "scores.csv").write_text("label\n0.5\n")
    (folder / "log.csv").write_text("user_id,item_id\n1,1\n2,2\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def answer(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(arguments.split())
    printed, said = capsys.readouterr()
    assert printed == ""
    assert "Traceback" not in said
    return status, said


def reached(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was to be refused before any work")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes time must not be reached."""
    monkeypatch.setattr(loop, "evaluate", reached)
    monkeypatch.setattr(run, "predict", reached)
    monkeypatch.setattr("ctrlib.search.compression.evaluate", reached)
    monkeypatch.setattr("ctrlib.search.stages.search_epochs", reached)
    monkeypatch.setattr("ctrlib.ranking.run.rank", reached)
    monkeypatch.setattr("ctrlib.retrieval.run.train", reached)
    monkeypatch.setattr("ctrlib.export.folder.Program", reached)
    monkeypatch.setattr(ctr.Predictor, "_encoded", reached)


@pytest.fixture
def no_work(no_training: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may any preparation."""
    monkeypatch.setattr("ctrlib.data.prepare.describe", reached)


# One rule for what may be overwritten.

KINDS: dict[str, Kind] = {
    **{"data2": "prepared", "model2": "model", "compressed": "compressed", "searched": "search", "run": "run"},
    **{
        "ranked": "ranking",
        "retrieved": "retrieval",
        "exported": "export",
        "compared": "comparison",
        "tuned": "tuning",
    },
    **{"other": "other", "scores.csv": "file"},
}
COMMANDS = {
    "prepare x.csv": ("prepared",),
    "train data --epochs 1": ("model", "run"),
    "compare data --models fm,mlp": ("comparison",),
    "tune data --trials 1": ("tuning",),
    "search optfs data": ("search",),
    "compress model data --ratio 2": ("compressed",),
    "export model": ("export",),
    "predict model x.csv": ("file",),
    "report model": ("file",),
    "rank data": ("ranking",),
    "retrieve train log.csv": ("retrieval",),
}
OF_FILES = ("predict", "report")  # which write a file, and no folder


def own_fields(group: type) -> dict[str, Any]:
    """Name of each argument of a command, as it is typed, -> its type with all that is said of it."""
    hints, found = get_type_hints(group, include_extras=True), {}
    for one in dataclasses.fields(group):
        hint = hints[one.name]
        plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if dataclasses.is_dataclass(plain):
            found |= own_fields(plain)  # type: ignore[arg-type]
        else:
            name = one.name.replace("_", "-")
            found[name.upper() if Positional in getattr(hint, "__metadata__", ()) else f"--{name}"] = hint
    return found


FIELDS = {name: own_fields(cli.command_class(name)) for name in cli.COMMANDS}
# Of each command that writes, every argument that is a path, from its class, so that a new one must be thought of here.
PATHS = [
    (command, name)
    for command, named in FIELDS.items()
    for name, hint in named.items()
    if "--out" in named and name not in ("--out", "--scores") and "path" in repr(hint).lower()  # which are written
]
# What they are, and what the command needs besides.
READ = {
    ("prepare", "DATA"): ("x.csv", "prepare x.csv"),
    ("prepare", "--valid"): ("y.csv", "prepare x.csv --valid y.csv --test x.csv"),
    ("prepare", "--test"): ("y.csv", "prepare x.csv --valid x.csv --test y.csv"),
    ("prepare", "--like"): ("data", "prepare x.csv --like data"),
    ("train", "DATA"): ("data", "train data --epochs 1"),
    ("train", "--warm-start"): ("model", "train data --epochs 1 --warm-start model"),
    ("train", "--plan"): ("plan.json", "train data --epochs 1 --engine fused --plan plan.json"),
    ("train", "--config"): ("model/model.json", "train data --config model/model.json"),
    ("compare", "DATA"): ("data", "compare data --models fm,mlp"),
    ("tune", "DATA"): ("data", "tune data --trials 1"),
    ("predict", "MODEL"): ("model", "predict model x.csv"),
    ("predict", "DATA"): ("x.csv", "predict model x.csv"),
    ("report", "RUN"): ("model", "report model"),
    ("report", "--data"): ("data", "report model --data data"),
    ("compress", "MODEL"): ("model", "compress model data --ratio 2"),
    ("compress", "DATA"): ("data", "compress model data --ratio 2"),
    ("compress", "--teachers"): ("model2", "compress model data --ratio 2 --teachers model2"),
    ("export", "MODEL"): ("model", "export model"),
    ("search", "DATA"): ("data", "search optfs data"),
    ("search", "--config"): ("search.json", "search optfs data --config search.json"),
    ("prepare", "--from-ranking"): ("ranked", "prepare x.csv --from-ranking ranked --top 1"),
    ("rank", "DATA"): ("data", "rank data"),
    ("rank", "--from-ranking"): ("ranked", "rank x.csv --from-ranking ranked --top 1"),
    ("rank", "--valid"): ("y.csv", "rank x.csv --valid y.csv --test x.csv"),
    ("rank", "--test"): ("y.csv", "rank x.csv --valid x.csv --test y.csv"),
    ("retrieve", "PATH"): ("log.csv", "retrieve train log.csv"),
    ("retrieve", "LOG"): ("y.csv", "retrieve recommend retrieved y.csv"),
    ("retrieve", "--test"): ("y.csv", "retrieve train log.csv --test y.csv"),
}


def test_every_command_that_writes_is_tested_here() -> None:
    writing = {command for command, named in FIELDS.items() if "--out" in named}
    assert {command.split()[0] for command in COMMANDS} == writing
    assert set(cli.COMMANDS) - writing == {"evaluate", "models", "doctor", "update", "serve"}  # which have no target
    assert all("--overwrite" in FIELDS[command] for command in writing)
    assert set(READ) == set(PATHS)


@pytest.mark.parametrize("spelling", ["link", "inside"])
@pytest.mark.parametrize(("command", "argument"), READ)
def test_no_argument_is_written_over(
    command: str, argument: str, spelling: str, home: Path, no_work: None, capsys: Any, monkeypatch: Any
) -> None:
    """Under another name, which ends so that any command takes it; in a folder that is read; and around a file."""
    monkeypatch.chdir(home)
    shutil.copy("x.csv", "y.csv")
    (home / "plan.json").write_text("{}")
    (home / "search.json").write_text('{"model": "deepfm"}')
    read, line = READ[command, argument]
    link = home / "link.csv"
    if spelling == "link":
        link.symlink_to(home / read)
        out, how = Path("link.csv"), "is"
    elif (home / read).is_dir():
        out, how = Path(read) / "deep" / "scores.csv", "lies in"
    elif command in OF_FILES:
        pytest.skip("a file lies around nothing")
    else:
        out, how = Path("..") / home.name / Path(read).parent, "holds"
    before = contents(home)
    try:
        status, said = answer(f"{line} --out {out} --overwrite", capsys)
        assert (status, contents(home)) == (1, before)
    finally:
        link.unlink(missing_ok=True)
        (home / "y.csv").unlink()
        (home / "plan.json").unlink()
        (home / "search.json").unlink()
    if how == "holds":  # more than that, and any of it may be named
        assert f"--out {out} holds " in said
    else:
        assert f"--out {out} {how} {read}, which is read: nothing is written over" in said


def test_each_folder_is_known_for_what_it_is(home: Path, tmp_path: Path) -> None:
    assert {name: kind_of(home / name) for name in KINDS} == KINDS
    assert kind_of(tmp_path) is kind_of(tmp_path / "nowhere") is None
    (tmp_path / ".DS_Store").touch()
    assert kind_of(tmp_path) is None
    (tmp_path / "search").mkdir()  # what a search that was killed at once leaves
    assert kind_of(tmp_path) == "search"
    (tmp_path / "search" / "engine.py").touch()  # a folder of somebody else that happens to have that name
    assert kind_of(tmp_path) == "other"


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_stays(
    command: str, target: str, home: Path, no_work: None, capsys: Any, monkeypatch: Any
) -> None:
    """Without --overwrite always, and with it where something of another kind would go."""
    monkeypatch.chdir(home)
    of_file = command.split()[0] in OF_FILES
    out = target if target.endswith(".csv") or not of_file else f"{target}/../{target}"
    if of_file and not target.endswith(".csv"):
        (home / "folder.csv").symlink_to(home / target)  # the name must end so
        out = "folder.csv"
    before = contents(home)
    try:
        status, said = answer(f"{command} --out {out}", capsys)
        assert status == 1
        assert said.startswith("ctrlib: ")
        assert "give another --out" in said or "that is a" in said, said
        if KINDS[target] not in COMMANDS[command]:
            assert answer(f"{command} --out {out} --overwrite", capsys) == (1, said)
        else:
            assert said == (
                f"ctrlib: {out} is {NAMES[KINDS[target]]} already: give another --out, or --overwrite "
                "(overwrite=True) to replace it\n"
            )
            check_target(home / target, COMMANDS[command], overwrite=True)  # type: ignore[arg-type]
    finally:
        (home / "folder.csv").unlink(missing_ok=True)
    assert contents(home) == before


@pytest.mark.parametrize("spelling", ["{}", "./{}", "other/../{}", "link", "{}/inside", "{}/vocab/deep/er"])
@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("train data --epochs 1", "data"),
        ("train data --epochs 1 --warm-start model", "model"),
        ("search optfs data", "data"),
        ("compress model data --ratio 2", "model"),
        ("compress model data --ratio 2", "data"),
        ("compress model data --ratio 2 --teachers model2", "model2"),
        ("prepare x.csv --like data", "data"),
        ("prepare x.csv --like model", "model"),
    ],
)
def test_no_command_takes_its_own_input(
    command: str, own: str, spelling: str, home: Path, no_work: None, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(home)
    link = home / "link"
    link.symlink_to(home / own)
    before = contents(home)
    try:
        status, said = answer(f"{command} --out {spelling.format(own)} --overwrite", capsys)
    finally:
        link.unlink()
    assert status == 1
    how = "is" if "in" not in spelling.replace("link", "") and "deep" not in spelling else "lies in"
    assert f"--out {Path(spelling.format(own))} {how} {own}, which is read: nothing is written over" in said
    link.symlink_to(home / own)
    assert contents(home) == before
    link.unlink()


@pytest.mark.parametrize(
    ("out", "how"), [("x.csv", "is"), ("./x.csv", "is"), ("link.csv", "is"), ("hard.csv", "is"), ("model/s.csv", "in")]
)
def test_predictions_do_not_replace_what_they_are_of(
    out: str, how: str, home: Path, no_work: None, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(home)
    links = {"link.csv": Path.symlink_to, "hard.csv": Path.hardlink_to}
    if out in links:
        links[out](Path(out), Path("x.csv"))
    before = (home / "x.csv").read_bytes()
    status, said = answer(f"predict model x.csv --out {out} --overwrite", capsys)
    if out in links:
        (home / out).unlink()
    assert status == 1
    assert f"--out {Path(out)} {'is x.csv' if how == 'is' else 'lies in model'}, which is read" in said
    assert (home / "x.csv").read_bytes() == before


def test_no_target_lies_around_its_input(home: Path, no_work: None, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(home.parent)
    for command in (f"train {home.name}/data", f"prepare {home.name}/x.csv", f"search optfs {home.name}/data"):
        status, said = answer(f"{command} --out {home.name} --overwrite", capsys)
        assert status == 1
        assert f"--out {home.name} holds {home.name}/" in said
    with pytest.raises(TargetError, match="which is read"):
        ctr.run(home / "data", CONFIG, out=home)
    with pytest.raises(TargetError, match=r"is .*data, which is read"):
        save_model(build(ctr.Schema.load(home / "data")), CONFIG, home / "data", home / "data")
    with pytest.raises(TargetError, match="data2 is a prepared folder, and what is written is a model folder"):
        save_model(build(ctr.Schema.load(home / "data")), CONFIG, home / "data", home / "data2")
    with pytest.raises(TargetError, match=r"is .*model, which is read"):
        compress(home / "model", home / "data", home / "model", ratio=2)
    with pytest.raises(FileExistsError, match=r"model is a model folder, and what is written is a prepared folder"):
        ctr.prepare(frame(), home / "model", overwrite=True)


def test_a_link_to_nowhere_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(TargetError, match=r"link is a link to .*gone, which does not exist"):
        check_target(tmp_path / "link", "model")
    check_target(tmp_path / "gone", "model")
    (tmp_path / "link").unlink()
    check_target(tmp_path, "model")  # nothing is in it


def test_what_a_killed_command_left_is_taken_over(tmp_path: Path) -> None:
    """The same command, without --overwrite, goes on there; `run` and the searches refuse another run's checkpoints."""
    for name, kind, markers in (
        ("run", ("model", "run"), ["log.jsonl"]),
        ("checkpoints", ("model", "run"), ["model.json", "checkpoints/step-000000001/MANIFEST"]),
        ("search", ("search",), ["plan.safetensors"]),
        ("retraining", ("search",), ["plan.safetensors", "model.json", "checkpoints/LATEST"]),
        ("compression", ("compressed",), ["compression.json"]),
    ):
        for marker in markers:
            path = tmp_path / name / marker
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        check_target(tmp_path / name, kind)  # type: ignore[arg-type]


def test_overwriting_replaces_and_predictions_are_no_exception(
    home: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(home)
    out = tmp_path / "s.csv"
    assert cli.main(["predict", "model", "x.csv", "--out", str(out)]) == 0
    first = out.read_bytes()
    out.write_text("old")
    assert answer(f"predict model x.csv --out {out}", capsys)[0] == 1
    assert out.read_text() == "old"
    with pytest.raises(FileExistsError, match="is a file already"):
        ctr.Predictor.load("model").predict_to("x.csv", out)
    assert cli.main(["predict", "model", "x.csv", "--out", str(out), "--overwrite"]) == 0
    assert out.read_bytes() == first
    assert len(first.splitlines()) == ROWS + 1


# Arguments are checked before work.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train data --epochs 0", "max_epochs (--epochs) must be 1 or more, got 0"),
        ("train data --epochs -3", "max_epochs (--epochs) must be 1 or more, got -3"),
        ("train data --patience 0", "patience (--patience) must be 1 or more, got 0"),
        ("train data --batch-size 0", "batch_size (--batch-size) must be 1 or more, got 0"),
        ("train data --seed -1", "seed (--seed) must be 0 or more, got -1"),
        ("train data --workers -1", "workers (--workers) must be 0 or more, got -1"),
        ("train data --learning-rate nan", "learning_rate (--learning-rate) must be a finite number that is 0 or more"),
        ("train data --learning-rate inf", "learning_rate (--learning-rate) must be a finite number that is 0 or more"),
        ("train data --l2 -1e-3", "embedding_l2 (--l2) must be a finite number that is 0 or more, got -0.001"),
        ("train data --embedding-learning-rate -1", "embedding_learning_rate (--embedding-learning-rate) must be a"),
        ("train data --checkpoint-seconds nan", "checkpoint_seconds (--checkpoint-seconds) must be a finite number"),
        ("train data --numeric bucketised --bins 0", "bins (--bins) must be 1 or more, got 0"),
        ("train data --dim 0", "dim (--dim) must be 1 or more, got 0"),
        ("train data --hidden 8 0", "hidden (--hidden) must be 1 or more, got 0"),
        ("train data --cross-layers 0", "cross_layers (--cross-layers) must be 1 or more, got 0"),
        ("train data --dropout 1", "dropout (--dropout) must be a finite number that is 0 or more and below 1, got 1"),
        ("train data --dropout nan", "dropout (--dropout) must be a finite number"),
        ("search optfs data --epochs 0", "max_epochs (--epochs) must be 1 or more, got 0"),
        ("search optfs data --patience 0", "patience (--patience) must be 1 or more, got 0"),
        ("search optfs data --batch-size 0", "batch_size (--batch-size) must be 1 or more, got 0"),
        ("search optfs data --learning-rate -1", "learning_rate (--learning-rate) must be a finite number"),
        ('search optfs data --setting penalty="much"', "optfs does not take these settings, one is of the wrong kind"),
        ("compress model data --ratio 1", "ratio (--ratio) must be a finite number above 1, got 1.0"),
        ("compress model data --ratio nan", "ratio (--ratio) must be a finite number above 1, got nan"),
        ("compress model data --ratio -2", "ratio (--ratio) must be a finite number above 1, got -2.0"),
        ("compress model data --ratio inf", "ratio (--ratio) must be a finite number above 1, got inf"),
        ("compress model data --ratio 2 --layer-ratio 0", "layer_ratio (--layer-ratio) must be a finite number above"),
        ("compress model data --bytes 0", "num_bytes (--bytes) must be 1 or more, got 0"),
        ("compress model data --bytes -5MB", "num_bytes (--bytes) must be 1 or more, got -5000000"),
        ("compress model data --bytes lots", "'lots' is no number of bytes: write 5MB, 800kB, 2MiB or 1000"),
        ("compress model data --bytes inf", "'inf' is no number of bytes"),
        ("compress model data --ratio 2 --epochs -1", "epochs (--epochs) must be 0 or more, got -1"),
        ("compress model data --ratio 2 --batch-size 0", "batch_size (--batch-size) must be 1 or more, got 0"),
        ("compress model data --ratio 2 --learning-rate inf", "learning_rate (--learning-rate) must be a finite"),
        ("predict model x.csv --batch-size 0", "batch_size (--batch-size) must be 1 or more, got 0"),
        ("predict model x.csv --batch-size -5", "batch_size (--batch-size) must be 1 or more, got -5"),
        ("evaluate model x.csv --batch-size 0", "batch_size (--batch-size) must be 1 or more, got 0"),
        ("evaluate model data --batch-size -5", "batch_size (--batch-size) must be 1 or more, got -5"),
        ("prepare x.csv --split nan 1 1", "split is (nan, 1.0, 1.0), expected three numbers"),
        ("prepare x.csv --split 0 1 1", "split is (0.0, 1.0, 1.0), expected three numbers"),
        ("prepare x.csv --split 1 -1 1", "split is (1.0, -1.0, 1.0), expected three numbers"),
        ("prepare x.csv --min-count 0", "min_count is 0, expected at least 1"),
    ],
)
def test_numbers_are_checked_before_work(
    arguments: str, message: str, home: Path, tmp_path: Path, no_work: None, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(home)
    out = tmp_path / "out.csv"
    status, said = answer(arguments + ("" if "evaluate" in arguments else f" --out {out}"), capsys)
    assert (status, message in said) == (1, True), said
    assert not out.exists()  # no untrained model, no empty folder stays


def test_the_same_of_python(home: Path, tmp_path: Path, no_work: None) -> None:
    data, out = home / "data", tmp_path / "out"
    config = {**CONFIG, "model": "deepfm"}
    for name, value in {
        "max_epochs": 0,
        "patience": 0,
        "batch_size": 0,
        "seed": -1,
        "learning_rate": float("nan"),
    }.items():
        with pytest.raises(ArgumentError, match=name):
            ctr.run(data, {**CONFIG, "training": {name: value}}, out=out)
        with pytest.raises(ArgumentError, match=name):
            search_and_retrain("optfs", data, config, out, **{name: value})  # type: ignore[arg-type]
    predictor = ctr.Predictor.load(home / "model")
    for score in (predictor.predict, predictor.evaluate):
        with pytest.raises(ArgumentError, match="batch_size"):
            score(home / "x.csv", batch_size=0)  # type: ignore[operator]
    assert not out.exists()


# Data that cannot teach, or that nothing can be chosen by.


@pytest.mark.parametrize(
    ("split", "labels", "found"),
    [
        ("train", [1], "it is 1 in all of them that have one, 200 rows"),
        ("train", [0], "it is 0 in all of them that have one, 200 rows"),
        ("train", [None], "none of them has one, 200 rows"),
        ("train", [1, None], "it is 1 in all of them that have one, 200 rows"),
        ("valid", [0], "it is 0 in all of them that have one, 50 rows"),
        ("valid", [None], "none of them has one, 50 rows"),
    ],
)
def test_one_class_is_refused_by_name_of_split(
    split: str, labels: list[Any], found: str, home: Path, tmp_path: Path, no_training: None
) -> None:
    rows = {"train": frame()[:200], "valid": frame()[200:250], "test": frame()[250:]}
    part = rows[split]
    values = (labels * len(part))[: len(part)]
    rows[split] = part.with_columns(label=pl.Series(values, dtype=part["label"].dtype))
    data, out = prepared(tmp_path / "data", rows=rows, missing_labels="mask"), tmp_path / "out"
    said = rf"data/{split}: label 'label' has one class only among the rows \({found}"
    with pytest.raises(ctr.DataError, match=said):
        ctr.run(data, CONFIG, out=out)
    with pytest.raises(ctr.DataError, match=said):
        search_and_retrain("optfs", data, {**CONFIG, "model": "deepfm"}, out)
    if split == "valid":
        shutil.copytree(home / "model", tmp_path / "model")
        save_model(build(ctr.Schema.load(data)), CONFIG, data, tmp_path / "model")
        with pytest.raises(ctr.DataError, match=said):
            compress(tmp_path / "model", data, out, ratio=1.5, console=QUIET)
    assert not out.exists()


@pytest.mark.parametrize("split", ["train", "valid"])
def test_weights_that_are_all_zero_are_refused(split: str, tmp_path: Path, no_training: None) -> None:
    places = {"train": slice(0, 200), "valid": slice(200, 250)}
    for weighty, said in ((0, "the weight, column 'w', is 0 in all"), (1, "one class only among the rows with weight")):
        rows = frame(w=np.ones(ROWS))
        weights = np.ones(ROWS)
        # Either no row counts, or those of one class alone do.
        weights[places[split]] = weighty * rows["label"].to_numpy()[places[split]]
        data = prepared(tmp_path / f"data{weighty}", rows=rows.with_columns(w=pl.Series(weights)), weight="w")
        with pytest.raises(ctr.DataError, match=rf"data{weighty}/{split}: .*{said}"):
            ctr.run(data, CONFIG)


def test_every_label_has_both_classes_but_test_may_have_one(tmp_path: Path) -> None:
    rows = frame(buy=np.arange(ROWS) % 2, never=np.zeros(ROWS, np.int64))
    data = prepared(tmp_path / "two", rows=rows, labels=["label", "never"])
    with pytest.raises(ctr.DataError, match="train: label 'never' has one class only"):
        ctr.run(data, CONFIG)
    rows = frame(label=[*(np.arange(250) % 2), *np.zeros(50, np.int64)])
    config = {**CONFIG, "training": {"max_epochs": 1}}
    _, result = ctr.run(prepared(tmp_path / "one", rows=rows), config, console=QUIET)
    assert np.isnan(result["test_auc"])
    assert result["valid_auc"] > 0


def test_classes_are_looked_for_beyond_the_first_row_group(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data")
    table = pl.read_parquet(data / "train").sort("label").to_arrow()
    (path,) = (data / "train").glob("*.parquet")
    pa.parquet.write_table(table, path, row_group_size=10)
    write_manifest(data)
    ctr.Loader(data, "train", batch_size=8).check_classes()
    only = pl.from_arrow(table).filter(pl.col("label") == 0)  # type: ignore[union-attr]
    pa.parquet.write_table(only.to_arrow(), path, row_group_size=10)
    write_manifest(data)
    with pytest.raises(ctr.DataError, match=f"it is 0 in all of them that have one, {len(only)} rows"):
        ctr.Loader(data, "train", batch_size=8).check_classes()


# What cannot be compressed.


def test_a_model_without_tables_is_not_compressed(tmp_path: Path, no_training: None) -> None:
    data = prepared(tmp_path / "data", rows=frame().select("I1", "label"))
    save_model(build(ctr.Schema.load(data)), CONFIG, data, tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"the model in .*model has no tables, so there is nothing to compress"):
        compress(tmp_path / "model", data, tmp_path / "out", ratio=2)
    assert not (tmp_path / "out").exists()


def test_tables_that_are_small_already_or_of_another_kind_are_not_compressed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_training: None
) -> None:
    schema = ctr.Schema.load(home / "data")
    model = build(schema)
    plan = search.rounded_rows(model, 8)
    smaller = search.materialise(model, plan)
    save_model(smaller, {**CONFIG, "replaced": plan.replaced}, home / "data", tmp_path / "small")
    with pytest.raises(ArgumentError, match="small cannot be compressed, they are PackedTables: expected plain tables"):
        compress(tmp_path / "small", home / "data", tmp_path / "out", ratio=2)
    assert not (tmp_path / "out").exists()


# A config is that of its model.


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**CONFIG, "embedding_dim": 8}, r"is \(\d+, 4\), that of the config \(\d+, 8\)"),
        ({**CONFIG, "hidden": [4, 4]}, r"tower\.\S+ is missing, that of the config \(4"),
        ({**CONFIG, "hidden": []}, "hidden widths must be one or more positive integers"),
        ({**CONFIG, "model": "deepfm"}, r"tower\.layers\.0\.bias is \(4,\), that of the config missing"),
        ({**CONFIG, "stacked": 1}, "tables"),
        ({**CONFIG, "model": "no_such"}, "unknown model 'no_such'"),
        ({**CONFIG, "width": 3}, r"mlp takes no \['width'\]"),
        ({"embedding_dim": 4}, 'does not name a "model"'),
        ({}, 'does not name a "model"'),
    ],
)
def test_a_model_is_saved_with_its_own_config_only(
    config: dict[str, Any], said: str, home: Path, tmp_path: Path
) -> None:
    model = build(ctr.Schema.load(home / "data"))
    with pytest.raises(ValueError, match=said):
        save_model(model, config, home / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_is_saved_with_its_own_data_only(home: Path, tmp_path: Path) -> None:
    other = prepared(tmp_path / "other", rows=frame(C1=[f"v{n % 100}" for n in range(ROWS)]))
    with pytest.raises(ArgumentError, match="config describes another model than the one to save, 1 tensors differ"):
        save_model(build(ctr.Schema.load(home / "data")), CONFIG, other, tmp_path / "out")
    model = build(ctr.Schema.load(home / "data"))
    save_model(model, CONFIG, home / "data", tmp_path / "out")
    loaded = ctr.Predictor.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("numeric", ["vector", "bucketised", "piecewise_linear", "periodic", "autodis"])
def test_numbers_as_fields_of_any_kind_are_compared(numeric: str, home: Path, tmp_path: Path) -> None:
    """Some look at their edges when they are made, which the comparison makes without any values."""
    edges = {"edges": ctr.quantile_edges(home / "data", 4)} if numeric in ("bucketised", "piecewise_linear") else {}
    config = {**CONFIG, "numeric": numeric, **edges}
    model = models.build(config, ctr.Schema.load(home / "data"))
    state = torch.get_rng_state()
    save_model(model, config, home / "data", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)  # whoever goes on training draws what he would have drawn
    loaded = ctr.Predictor.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ArgumentError, match="config describes another model than the one to save"):
        save_model(model, {**config, "embedding_dim": 8}, home / "data", tmp_path / "other")


@pytest.mark.parametrize("method", ["packed", "narrow", "blocks"])
def test_models_that_were_made_smaller_are_compared(method: str, home: Path, tmp_path: Path) -> None:
    schema = ctr.Schema.load(home / "data")
    model = build(schema)
    if method == "packed":
        smaller = search.materialise(model, search.rounded_rows(model, 8))
    elif method == "narrow":
        batches = ctr.Loader(home / "data", "train", batch_size=50)
        smaller = search.apply_low_rank(model, search.low_rank(model, schema, batches, tables=search.Goal(rank=2)))
    else:
        path = next(path for path, part in model.named_modules() if type(part).__name__ == "EmbeddingBagCollection")
        vocabularies = [
            {"name": f.name, "feature_names": [f.name], "ends": [5, f.num_embeddings]} for f in schema.sparse
        ]
        replaced = {
            path: {
                "kind": "blocks",
                "vocabularies": vocabularies,
                "columns": [[0, 1, 2, 3], [0, 1]],
                "embedding_dim": 4,
            }
        }
        smaller = models.build({**CONFIG, "replaced": replaced}, schema)
    config = {**CONFIG, "replaced": describe(smaller)}
    save_model(smaller, config, home / "data", tmp_path / "out")
    loaded = ctr.Predictor.load(tmp_path / "out").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in smaller.state_dict().items())
    with pytest.raises(ArgumentError, match="config describes another model than the one to save"):
        save_model(smaller, CONFIG, home / "data", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_all_files_of_a_model_may_be_read_by_the_same_people(home: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(build(ctr.Schema.load(home / "data")), CONFIG, home / "data", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes == dict.fromkeys(["MANIFEST", "README.md", "model.json", "model.safetensors", "schema.json"], 0o640)


# What a run says of itself.


@pytest.mark.parametrize("labels", [["label"], ["label", "buy"]])
def test_the_loss_of_an_epoch_counts_rows_by_their_weight(labels: list[str], tmp_path: Path) -> None:
    """Weights that stand still: then it is the log-loss of train, which `evaluate` knows."""
    weight = np.where(np.arange(ROWS) < 100, 0.0, np.linspace(0.1, 9.0, ROWS) ** 2)
    rows = frame(w=weight, buy=np.arange(ROWS) % 2).drop([] if "buy" in labels else ["buy"])
    data = prepared(tmp_path / "data", rows=rows, weight="w", labels=labels)
    model, _ = ctr.run(
        data,
        {**CONFIG, "training": {"learning_rate": 0.0, "max_epochs": 1, "batch_size": 32}},
        out=tmp_path / "out",
        console=QUIET,
    )
    (line,) = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    truth = ctr.evaluate(model, ctr.Loader(data, "train", batch_size=64), quick=True)
    by_task = [task["log_loss"] for task in truth.get("tasks", [truth])]  # type: ignore[call-overload]
    assert line["train_loss"] == pytest.approx(sum(by_task), rel=1e-5)


def test_the_loss_of_an_epoch_leaves_out_rows_without_label(tmp_path: Path) -> None:
    label = frame()["label"].to_list()
    rows = frame().with_columns(label=pl.Series([None if 20 < n < 120 else one for n, one in enumerate(label)]))
    data = prepared(tmp_path / "data", rows=rows, missing_labels="mask")
    model, _ = ctr.run(
        data,
        {**CONFIG, "training": {"learning_rate": 0.0, "max_epochs": 1, "batch_size": 16}},
        out=tmp_path / "out",
        console=QUIET,
    )
    (line,) = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    truth = ctr.evaluate(model, ctr.Loader(data, "train", batch_size=64), quick=True)
    assert line["train_loss"] == pytest.approx(truth["log_loss"], rel=1e-5)


def test_the_loss_of_nothing_is_not_a_number() -> None:
    progress = Progress()
    assert np.isnan(progress.train_loss)
    progress.add(float("nan"), rows=4, weight=0.0)
    assert np.isnan(progress.train_loss)
    progress.add(0.5, rows=4, weight=3.0)
    progress.add(0.75, rows=4, weight=1.0)
    assert (progress.train_loss, progress.rows) == (0.5625, 12)
    progress.end_epoch(Epoch(1, 0.5, 0.7, 0.4, 1e-3, 2.0, 100.0), 0.7, better=True)
    assert np.isnan(progress.train_loss)


def test_seconds_are_those_before_the_kill_too(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.evaluate

    def again(calls: int, seconds: float) -> dict[str, Any]:
        def evaluate(*arguments: Any, **others: Any) -> Any:
            nonlocal calls
            if not calls:
                raise KeyError("killed")
            calls -= 1
            time.sleep(seconds)
            return original(*arguments, **others)

        monkeypatch.setattr(loop, "evaluate", evaluate)
        return ctr.run(
            home / "data", {**CONFIG, "training": {"max_epochs": 2, "patience": 2}}, out=tmp_path / "out", console=QUIET
        )[1]

    with pytest.raises(KeyError, match="killed"):
        again(1, 1.5)
    states = (tmp_path / "out" / "checkpoints").glob("*/state.json")
    (saved,) = (json.loads(path.read_text())["progress"]["all_seconds"] for path in states)
    assert saved > 1.5
    result = again(9, 0.0)
    assert result["epochs"] == 2
    assert result["seconds"] > saved
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["seconds"] == result["seconds"]


# Whoever's error it is, it is said in one message.


class Panic(BaseException):
    """As polars raises it."""


Panic.__name__ = "PanicException"
Panic.__module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (pl.exceptions.ComputeError("parquet: out of spec"), 1, "polars could not read or write a file, or hold it in"),
        (pl.exceptions.ColumnNotFoundError("item"), 1, "polars could not read or write a file, or hold it in memory: "),
        (pa.ArrowInvalid("Parquet magic bytes not found"), 1, "Arrow could not read or write a file, or hold it in"),
        (
            pa.ArrowMemoryError("malloc of size 9"),
            1,
            "there is not enough memory: malloc of size 9: use a smaller",
        ),
        (Panic("index out of bounds"), 1, "polars could not read or write a file, or hold it in memory: index out of"),
        (OSError(28, "No space left on device", "out/x"), 1, "out/x: No space left on device; make room, or write"),
        (PermissionError(13, "Permission denied", "out"), 1, "out: Permission denied; write elsewhere, or ask for the"),
        (
            shutil.Error([("a/x", "b/x", "[Errno 28] No space")]),
            1,
            "a/x could not be copied to b/x: [Errno 28] No space",
        ),
        (shutil.Error("`a` and `b` are the same file"), 1, "`a` and `b` are the same file"),
        (MemoryError(), 1, "there is not enough memory: use a smaller --batch-size"),
        (KeyError("item"), 1, "KeyError: 'item'. That is a fault of ctrlib, or of a package that it uses: --debug"),
        (AttributeError("no 'to'"), 1, "AttributeError: no 'to'. That is a fault of ctrlib"),
        (AssertionError(), 1, "AssertionError. That is a fault of ctrlib"),
        (ctr.DataError("x.csv, line 3: expected 4 cells"), 1, "x.csv, line 3: expected 4 cells"),
        (ctr.SchemaError("the schema has no feature"), 1, "the schema has no feature"),
        (KeyboardInterrupt(), 130, "stopped by hand"),
    ],
)
def test_no_traceback_without_debug(
    error: BaseException, status: int, said: str, capsys: Any, monkeypatch: Any
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Evaluate, "__call__", fail)
    found, message = answer("evaluate m d", capsys)
    assert found == status
    assert message.startswith(f"ctrlib: {said}")
    assert message.count("\n") == 1
    assert cli.main(["evaluate", "m", "d", "--debug"]) == status
    loud = capsys.readouterr().err
    assert loud.startswith("Traceback (most recent call last):")
    assert "in fail" in loud
    assert loud.endswith(message)


def test_an_error_on_the_disk_names_both_files() -> None:
    assert explain(OSError(18, "Invalid cross-device link", "a", None, "b")) == "a -> b: Invalid cross-device link"
    assert explain(OSError("no such device")) == "no such device"


def test_damaged_parquet_is_said_without_a_traceback(home: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rows.parquet"
    frame().write_parquet(path)
    path.write_bytes(path.read_bytes()[:-200])
    status, said = answer(f"prepare {path} --out {tmp_path / 'out'}", capsys)
    assert status == 1
    assert str(path) in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["SchemaError", "DataError", "CheckpointError"])
def test_one_class_catches_them_all(kind: str) -> None:
    raised = getattr(ctr, kind)
    assert issubclass(raised, ctr.CtrlibError)
    assert issubclass(raised, RuntimeError if kind == "CheckpointError" else ValueError)


# Things of other types.

MODEL: Callable[[], ctr.Model] = lambda: models.build(CONFIG, example_schema())  # noqa: E731
WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "run, a name": (
        lambda home: ctr.run(home / "data", "dcnv2"),
        "config must be a dictionary such as .* got str 'dcnv2'",
    ),  # type: ignore[arg-type]
    "run, a model": (
        lambda home: ctr.run(home / "data", MODEL()),
        "config must be a dictionary such as .* got Model",
    ),
    "run, returns": (
        lambda home: ctr.run(home / "data", lambda _: 3),
        "config must be a dictionary such as .* is named by the import path",
    ),  # type: ignore[arg-type, return-value]
    "run, a frame": (lambda _: ctr.run(frame(), CONFIG), "data must be the path of a prepared folder, got DataFrame"),  # type: ignore[arg-type]
    "run, epochs": (
        lambda home: ctr.run(home / "data", {**CONFIG, "training": {"max_epochs": 1.5}}),
        r"max_epochs \(--epochs\) must be a whole",
    ),  # type: ignore[arg-type]
    "run, batch": (
        lambda home: ctr.run(home / "data", {**CONFIG, "training": {"batch_size": True}}),
        r"must be a whole number, got bool True",
    ),
    "run, rate": (
        lambda home: ctr.run(home / "data", {**CONFIG, "training": {"learning_rate": "x"}}),
        "must be a number, got str 'x'",
    ),  # type: ignore[arg-type]
    "run, out": (lambda home: ctr.run(home / "data", CONFIG, out=3), "out must be the path of what is to be written"),  # type: ignore[arg-type]
    "fit, engine": (lambda _: ctr.fit("exact", [], []), "engine must be an engine, such as ctrlib.ExactEngine"),  # type: ignore[arg-type]
    "fit, model": (lambda _: ctr.fit(MODEL(), [], []), "engine must be an engine, such as ctrlib.ExactEngine"),  # type: ignore[arg-type]
    "fit, folder": (
        lambda _: ctr.fit(ctr.ExactEngine(MODEL()), "d", "d"),
        "train must be a ctrlib.Loader, or a list of",
    ),  # type: ignore[arg-type]
    "fit, once": (
        lambda _: ctr.fit(ctr.ExactEngine(MODEL()), iter([]), []),
        "train must be a ctrlib.Loader, or a list",
    ),  # type: ignore[arg-type]
    "fit, tensors": (
        lambda _: ctr.fit(ctr.ExactEngine(MODEL()), [torch.zeros(2)], [], console=QUIET),  # type: ignore[list-item]
        "train must be what gives Batches, got Tensor",
    ),
    "evaluate, folder": (
        lambda home: ctr.evaluate(home / "model", []),
        "model must be a torch module; a model folder is",
    ),  # type: ignore[arg-type]
    "evaluate, batches": (
        lambda _: ctr.evaluate(MODEL(), "test"),
        "batches must be a ctrlib.Loader, or a list of batch",
    ),  # type: ignore[arg-type]
    "evaluate, batch": (
        lambda _: ctr.evaluate(MODEL(), example_batch(example_schema(), 2)),
        "batches must be a ctrlib.L",
    ),  # type: ignore[arg-type]
    "predict, frame": (lambda _: ctr.predict(MODEL(), frame()), "batches must be what gives Batches, got Series"),  # type: ignore[arg-type]
    "ExactEngine": (lambda _: ctr.ExactEngine("mlp"), "model must be a ctrlib.Model, got str 'mlp'"),  # type: ignore[arg-type]
    "FusedEngine": (lambda _: ctr.FusedEngine(torch.nn.Linear(1, 1)), "model must be a ctrlib.Model, got Linear"),  # type: ignore[arg-type]
    "Loader": (
        lambda _: ctr.Loader(None, "train", batch_size=2),
        "folder must be the path of a prepared folder, got No",
    ),  # type: ignore[arg-type]
    "Loader, split": (
        lambda home: ctr.Loader(home / "data", 0, batch_size=2),
        "split must be the name of a split, got i",
    ),  # type: ignore[arg-type]
    "Loader, size": (
        lambda home: ctr.Loader(home / "data", "train", batch_size=2.5),
        "batch_size must be a whole number",
    ),  # type: ignore[arg-type]
    "Inputs": (
        lambda home: ctr.Inputs(home / "data"),
        "schema must be a ctrlib.Schema, as ctrlib.prepare returns it or",
    ),  # type: ignore[arg-type]
    "Inputs, dim": (lambda _: ctr.Inputs(example_schema(), embedding_dim="8"), "embedding_dim must be a whole number"),  # type: ignore[arg-type]
    "build, name": (lambda _: models.build("dcnv2", example_schema()), r'config must be a dictionary \{"model": name'),  # type: ignore[arg-type]
    "build, folder": (
        lambda _: models.build(CONFIG, "data"),
        "schema must be a ctrlib.Schema, as ctrlib.prepare returns",
    ),  # type: ignore[arg-type]
    "Schema": (lambda _: ctr.Schema(("item",), ("click",)), "feature must be a feature such as ctr.Categorical"),  # type: ignore[arg-type]
    "Schema, label": (lambda _: ctr.Schema((ctr.Categorical("i"),), "click"), r"write \('click',\)"),  # type: ignore[arg-type]
    "Schema, column": (
        lambda _: ctr.Schema((ctr.Categorical(3),), ("y",)),
        "name must be the name of a column, got int",
    ),  # type: ignore[arg-type]
    "Schema.load": (lambda _: ctr.Schema.load(3), "folder must be the path of a prepared folder, got int 3"),  # type: ignore[arg-type]
    "prepare": (lambda _: ctr.prepare(3, "o"), "data is a int, expected"),  # type: ignore[arg-type]
    "prepare, out": (lambda _: ctr.prepare(frame(), None), "out must be the path of what is to be written, got None"),  # type: ignore[arg-type]
    "prepare, features": (lambda _: ctr.prepare(frame(), "o", features=["a"]), "feature must be features such as ctr."),  # type: ignore[list-item]
    "prepare, split": (lambda _: ctr.prepare(frame(), "o", split=0.8), "split must be three numbers"),  # type: ignore[arg-type]
    "prepare, labels": (
        lambda _: ctr.prepare(frame(), "o", labels=3),
        "labels must be the name of a column, or several",
    ),  # type: ignore[arg-type]
    "prepare, count": (lambda _: ctr.prepare(frame(), "o", min_count="2"), "min_count must be a whole number, or None"),  # type: ignore[arg-type]
    "prepare, like": (
        lambda _: ctr.prepare(frame(), "o", like=3),
        "like must be the path of a prepared folder or model",
    ),  # type: ignore[arg-type]
    "prepare, log": (
        lambda _: ctr.prepare(frame(), "o", log="loud"),
        "log must be a function that is called with each",
    ),  # type: ignore[arg-type]
    "quantile_edges": (lambda _: ctr.quantile_edges(3), "data must be the path of a prepared folder, got int 3"),  # type: ignore[arg-type]
    "fingerprint": (lambda _: ctr.fingerprint(3), "folder must be the path of a prepared folder, got int 3"),  # type: ignore[arg-type]
    "Encoder.load": (lambda _: ctr.Encoder.load(None), "folder must be the path of a prepared folder, got None"),  # type: ignore[arg-type]
    "Checkpoints": (lambda _: ctr.Checkpoints(3), "folder must be the path of a folder for checkpoints, got int 3"),  # type: ignore[arg-type]
    "Predictor.load": (lambda _: ctr.Predictor.load(3), "folder must be the path of a model folder, got int 3"),  # type: ignore[arg-type]
    "predict, int": (
        lambda home: ctr.Predictor.load(home / "model").predict(3),
        "data is a int, expected a dictionary",
    ),  # type: ignore[arg-type]
    "predict_to": (
        lambda home: ctr.Predictor.load(home / "model").predict_to(home / "x.csv", None),
        "out must be the pa",
    ),  # type: ignore[arg-type]
    "save_model": (
        lambda home: save_model(MODEL(), "mlp", home / "data", "o"),
        r'config must be a dictionary \{"model"',
    ),  # type: ignore[arg-type]
    "save_model, model": (
        lambda home: save_model("mlp", CONFIG, home / "data", "o"),
        "model must be a torch module, got",
    ),  # type: ignore[arg-type]
    "warm_start": (
        lambda home: ctr.warm_start("mlp", home / "data", home / "model"),
        "model must be a torch module, as",
    ),  # type: ignore[arg-type]
    "compress": (
        lambda home: compress(home / "model", 3, "o", ratio=2),
        "data must be the path of a prepared folder, got",
    ),  # type: ignore[arg-type]
    "compress, teachers": (
        lambda home: compress(home / "model", home / "data", "o", ratio=2, teachers="model2"),
        "teachers must be a list of model folders, got str 'model2'",
    ),
    "compress, bytes": (
        lambda home: compress(home / "model", home / "data", "o", num_bytes="5MB"),  # type: ignore[arg-type]
        r"num_bytes \(--bytes\) must be a whole number, got str '5MB'",
    ),
    "search": (lambda home: search_and_retrain("optfs", home / "data", "deepfm", "o"), "config must be a dictionary"),  # type: ignore[arg-type]
    "search, settings": (
        lambda home: search_and_retrain("optfs", home / "data", CONFIG, "o", settings={"penalty": 1}),
        r"settings must be what settings_of\(method, values\) gives, got dict",
    ),
}


@pytest.mark.parametrize("call", WRONG)
def test_another_type_is_a_type_error_that_says_what_was_expected(
    call: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = WRONG[call]
    with pytest.raises(WrongTypeError, match=message) as raised:
        make(home)
    assert isinstance(raised.value, ctr.CtrlibError)
    assert isinstance(raised.value, TypeError)
    assert list(tmp_path.iterdir()) == []
