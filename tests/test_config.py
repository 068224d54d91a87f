"""A run is its configuration: what makes it the same, what may change when it goes on, and where it is written down."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from ranks import run_ranks
from rich.console import Console

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.errors import CtrlibError, WrongTypeError
from ctrlib.models import MODELS
from ctrlib.search.experiment import HEEDED, experiment_of, parts_of, settings_of
from ctrlib.search.methods import SEARCHES
from ctrlib.search.run import search_and_retrain
from ctrlib.search.stages import identity_of as identity_of_search
from ctrlib.structure import attributes
from ctrlib.testing import example_schema
from ctrlib.training import loop, run
from ctrlib.training.config import MAY_CHANGE, Training, complete, differences, identity_of, refuse_another

QUIET = Console(quiet=True)
SCHEMA = example_schema(num_tasks=2)
INPUTS = [field for field in dataclasses.fields(ctr.Inputs) if field.name != "schema"]
# Another value of an argument, where the default does not say one.
OTHERS: dict[str, Any] = {
    "bilinear": "field_all",
    "contexts": [["user"], []],
    "kernel_height": 9,
    "num_heads": 4,
    "numeric": "periodic",
    "edges": [[0.5], [1.5]],
    "sequence": "din",
    "tables": {"kind": "memcom", "num_embeddings": 9},
    "keep_negatives": 0.5,
    "engine": "fused",
    "precision": "bf16",
    "warm_start": "runs/yesterday",
    "device": "cpu",
    "sharding": "row_wise",
    "plan": "plan.json",
    "select_by": "log_loss",
}


def other_than(name: str, value: Any) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 0.25
    assert isinstance(value, list), f"say another value of {name} in OTHERS"
    return [*value, value[-1]]


def every_argument() -> Iterator[tuple[str, str]]:
    for name, model in MODELS.items():
        yield from ((name, argument) for argument in [*model.arguments, *(field.name for field in INPUTS)])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels that follow two of three ids."""
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(0, 12, 2_000) for name in ("a", "b", "c")}
    chance = 1 / (1 + np.exp(-np.subtract.outer([0.0, 1.0], ((ids["a"] - 6) * (ids["b"] - 6)) / 8)))
    labels = {name: (rng.random(2_000) < row).astype(int) for name, row in zip(("click", "like"), chance)}
    folder = tmp_path_factory.mktemp("config") / "data"
    ctr.prepare(pl.DataFrame({**ids, **labels}), folder, labels=["click", "like"], log=None)
    return folder


def experiment(model: str, training: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    quick = {"batch_size": 200, "learning_rate": 0.01, "max_epochs": 2, "device": "cpu"}
    return {"model": model, "embedding_dim": 4, **arguments, "training": {**quick, **(training or {})}}


class Killed(Exception):
    pass


def kill_before_test(data: Path, config: dict[str, Any], out: Path, **arguments: Any) -> None:
    """A run that ends when all is trained, and nothing written but its checkpoints and its log."""

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "predict", killed)
        ctr.run(data, config, out=out, console=QUIET, **arguments)


# What is compared.


@pytest.mark.parametrize(("model", "argument"), list(every_argument()))
def test_another_argument_is_another_run(model: str, argument: str) -> None:
    """Generated from the signatures; a default that is spelled out is the same run."""
    before = complete({"model": model})
    value = other_than(argument, before[argument])
    saved = json.loads(json.dumps(identity_of(before, "hash", "rows")))
    refuse_another(saved, identity_of(complete({"model": model, argument: before[argument]}), "hash", "rows"), "same")
    now = identity_of(complete({"model": model, argument: value}), "hash", "rows")
    with pytest.raises(ValueError) as refused:
        refuse_another(saved, now, "checkpoints of another run")
    said, _, cure = str(refused.value).partition(". Start with the same settings to go on (only max_epochs, ")
    assert said.startswith(f"checkpoints of another run: {argument}") and " was " in said and ";" not in said
    assert "number of processes may change), or give another folder" in cure
    with pytest.raises(ValueError, match=rf": {argument} was not said|: {argument} was .* is now not said"):
        del saved[argument]
        refuse_another(saved, identity_of(before, "hash", "rows"), "a run of an older version")


@pytest.mark.parametrize("entry", [field.name for field in dataclasses.fields(Training)])
def test_another_entry_of_training_is_another_run_unless_it_may_change(entry: str) -> None:
    before = complete({"model": "fm"})
    value = other_than(entry, before["training"][entry])
    now = complete({"model": "fm", "training": {entry: value}})
    found = differences(identity_of(before, "hash", "rows"), identity_of(now, "hash", "rows"))
    expected = f"training.{entry} was {before['training'][entry]!r}, is now {value!r}"
    assert found == ([] if entry in MAY_CHANGE else [expected])
    assert set(MAY_CHANGE) == {"max_epochs", "workers", "device", "sharding", "plan", "checkpoint_seconds"}


def test_other_data_is_another_run() -> None:
    config = complete({"model": "fm"})
    assert differences(identity_of(config, "a", "x"), identity_of(config, "b", "y")) == [
        "data was 'a', is now 'b'",
        "rows was 'x', is now 'y'",
    ]


def test_a_difference_is_named_where_it_is() -> None:
    saved = {
        "hidden": [400, 400],
        "edges": [[0.25] * 30, [0.5] * 30],
        "tables": {"kind": "memcom"},
        "nan": float("nan"),
    }
    now = {**saved, "hidden": [400, 40], "tables": {"kind": "memcom", "rows": 9}, "nan": math.nan}
    assert differences(saved, now) == [
        "hidden was [400, 400], is now [400, 40]",
        "tables.rows was not said, is now 9",
    ]
    now = {**saved, "edges": [[0.25] * 30, [0.5] * 29 + [0.75]]}
    assert differences(saved, now) == ["edges[1][29] was 0.5, is now 0.75"]
    (said,) = differences({"edges": [1.0] * 100}, {"edges": None})
    assert said.endswith(" 1.0, 1.0], is now None") and len(said) < 120


@pytest.mark.parametrize("name", MODELS)
def test_a_complete_config_makes_the_same_model_and_a_search_knows_all_others(name: str) -> None:
    """Searches take any model, and know it by the attributes of its parts and by its weights."""
    train: Any = SimpleNamespace(schema=SCHEMA, batch_size=8, data_hash="rows")

    def identity(config: dict[str, Any]) -> dict[str, Any]:
        torch.manual_seed(0)
        return identity_of_search(models.build(config, SCHEMA), train, Training(), seed=0)

    config = {"model": name, "embedding_dim": 8}
    every = models.complete(config)
    assert models.complete(every) == every and json.loads(json.dumps(every)) == every
    before = identity(config)
    assert identity(every) == before
    for argument in MODELS[name].arguments:
        changed = identity({**config, argument: other_than(argument, every[argument])})
        assert differences(before, changed) != [], argument
        with pytest.raises(ValueError, match="of another search: "):
            refuse_another(before, changed, "of another search")


def test_attributes_are_plain_and_public() -> None:
    model = models.autoint(ctr.Inputs(SCHEMA, embedding_dim=4), scale=True)
    layers = [found for found in attributes(model).values() if found["class"].endswith(".InteractingLayer")]
    assert [layer["num_heads"] for layer in layers] == [2, 2, 2]
    assert json.loads(json.dumps(layers)) and all("training" not in layer for layer in layers)


# What is no experiment.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, 'config names no "model": expected {"model": name'),
        ({"model": "dcnv3"}, "unknown model 'dcnv3'; the closest are dcnv2"),
        ({"model": "fm", "trainings": {}}, r"fm takes no ['trainings']"),
        ({"model": "fm", "training": {"epochs": 3}}, r"training has no ['epochs']; the closest are max_epochs"),
        ({"model": "fm", "training": 3}, "training is 3, expected a dictionary"),
        ({"model": "fm", "training": {"seed": "3"}}, "seed (--seed) must be a whole number, got str '3'"),
        ({"model": "fm", "training": {"seed": 3.0}}, "seed (--seed) must be a whole number, got float 3.0"),
        (
            {"model": "fm", "training": {"patience": True}},
            "patience (--patience) must be a whole number",
        ),
        ({"model": "fm", "training": {"plan": 1}}, "plan must be a text or None, got int 1"),
        (
            {"model": "fm", "training": {"learning_rate": None}},
            "learning_rate (--learning-rate) must be a number",
        ),
        ({"model": "fm", "embedding_dim": {4}}, "embedding_dim={4} is not plain data"),
    ],
)
def test_no_experiment(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CtrlibError) as refused:
        complete(config)
    assert message in str(refused.value)


def test_a_function_is_no_config(data: Path) -> None:
    with pytest.raises(WrongTypeError, match=r"config must be a dictionary such as .* named by the import path"):
        ctr.run(data, lambda schema: models.build({"model": "fm"}, schema))  # type: ignore[arg-type]


def test_a_warm_start_that_nobody_carries_out_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match=r"warm_start='runs/a': carry the rows over in on_built="):
        ctr.run(data, experiment("fm", {"warm_start": "runs/a"}), console=QUIET)


# Whole runs.


@pytest.mark.parametrize(
    ("config", "argument", "value"),
    [
        (experiment("aitm", tower_hidden=[4]), "penalty", 0.7),
        (experiment("finalnet", hidden_1=[4], hidden_2=[4]), "distill", False),
        (experiment("autoint", num_layers=1, head_dim=4), "scale", True),
        (experiment("autoint", num_layers=1, head_dim=4), "num_heads", 4),  # other shapes: still the setting is named
        (experiment("finalmlp", hidden_1=[4], hidden_2=[4], gate_hidden=[4]), "zero_context", True),
    ],
)
def test_a_run_with_another_argument_is_refused_and_loses_nothing(
    data: Path, tmp_path: Path, config: dict[str, Any], argument: str, value: Any
) -> None:
    kill_before_test(data, config, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert tmp_path / "log.jsonl" in before
    with pytest.raises(ValueError, match=rf"checkpoints are of another run|of another run: {argument} was .*, is now "):
        ctr.run(data, {**config, argument: value}, out=tmp_path, console=QUIET)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    spelled = models.complete(config)
    _, result = ctr.run(data, spelled, out=tmp_path, console=QUIET)
    assert result["epochs"] == 2


def test_what_may_change_changes_nothing(data: Path, tmp_path: Path) -> None:
    """The rest of the run has the bits that it would have had."""
    config = experiment("dcnv2", {"max_epochs": 3}, hidden=[8], dropout=0.2)
    whole, expected = ctr.run(data, config, console=QUIET)
    allowed = {"workers": 2, "device": "auto", "checkpoint_seconds": 0.0, "max_epochs": 3, "sharding": "auto"}
    if torch.cuda.is_available():
        del allowed["device"]
    for entry, value in allowed.items():
        out = tmp_path / entry
        kill_before_test(data, {**config, "training": {**config["training"], "max_epochs": 2}}, out)
        model, result = ctr.run(
            data, {**config, "training": {**config["training"], entry: value}}, out=out, console=QUIET
        )
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole.state_dict().items())
        assert (result["test_auc"], result["epochs"]) == (expected["test_auc"], expected["epochs"])


def test_sharding_plan_and_processes_may_change(data: Path, tmp_path: Path) -> None:
    """From one process to two by another sharding, then by a plan."""
    fused = experiment("deepfm", {"engine": "fused", "max_epochs": 1}, hidden=[8], wide_columns=4)

    def part(entries: dict[str, Any], killed: bool) -> Any:
        config = {**fused, "training": {**fused["training"], **entries}}
        if killed:
            return kill_before_test(data, config, tmp_path / "run")
        return ctr.run(data, config, out=tmp_path / "run", console=QUIET)[1]

    ((alone,),) = (run_ranks(1, lambda: part({}, True)),)
    assert alone is None
    first, second = run_ranks(2, lambda: part({"sharding": "row_wise", "max_epochs": 2}, False))
    assert first["epochs"] == second["epochs"] == 2 and first["processes"] == 2
    plan = str(tmp_path / "plan.json")
    (tmp_path / "run" / "plan.json").rename(plan)
    run_ranks(1, lambda: part({}, True))
    first, _ = run_ranks(2, lambda: part({"plan": plan, "max_epochs": 2}, False))
    assert first["epochs"] == 2


def test_seconds_count_all_parts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate, config = loop.evaluate, experiment("fm")

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.4)
        return evaluate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", slow)
        kill_before_test(data, config, tmp_path)
    _, result = ctr.run(data, config, out=tmp_path, console=QUIET)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(line["seconds"] for line in lines) >= 0.8
    assert result["seconds"] >= sum(line["seconds"] for line in lines)


# Searches.


def test_a_search_with_another_argument_is_refused_in_the_search_and_in_the_retraining(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"model": "autoint", "embedding_dim": 4, "num_layers": 1, "head_dim": 4}
    settings = settings_of("optfs", {"penalty": 1e-5, "epochs": 2, "learning_rate": 0.02})

    def whole(changes: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        options = {"settings": settings, "batch_size": 400, "max_epochs": 1, "console": QUIET, **arguments}
        return search_and_retrain("optfs", data, {**config, **changes}, tmp_path, **options)

    def refused(message: str, changes: dict[str, Any], **arguments: Any) -> None:
        with pytest.raises(ValueError, match=rf"holds an unfinished search.*: {message}"):
            whole(changes, **arguments)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for place in ("ctrlib.search.optfs.plan_of", "ctrlib.search.run.model_in_the_making"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, killed)
            whole({})
        refused("scale was False, is now True", {"scale": True})
        refused("num_heads was 2, is now 4", {"num_heads": 4})
        refused("training.patience was 2, is now 3", {}, patience=3)
        refused("training.seed was 0, is now 1", {}, seed=1)
        refused("search.penalty was 1e-05, is now 0.001", {}, settings=dataclasses.replace(settings, penalty=1e-3))
    result = whole({"scale": False, "num_heads": 2}, max_epochs=2)  # spelled out; and a longer retraining
    assert result["epochs"] == 2 and not (tmp_path / "unfinished.json").exists()
    saved = json.loads((tmp_path / "model.json").read_text())
    assert saved["search"]["method"] == "optfs" and saved["training"]["batch_size"] == 400
    assert ctr.Predictor.load(tmp_path).evaluate_prepared(data, "test")["tasks"] == result["test_tasks"]


def test_refused_settings_are_no_search(data: Path, tmp_path: Path) -> None:
    """A first call that fails before anything was saved does not stand in the way of a better one."""
    settings = settings_of("optinter", {"epochs": 1, "features": ["a"]})
    options: dict[str, Any] = {"batch_size": 400, "max_epochs": 1, "console": QUIET}
    config = {"model": "fm", "embedding_dim": 4}
    with pytest.raises(ValueError, match="two or more of the categorical features"):
        search_and_retrain("optinter", data, config, tmp_path, settings=settings, **options)
    settings = dataclasses.replace(settings, features=("a", "b"))
    assert search_and_retrain("optinter", data, config, tmp_path, settings=settings, **options)["epochs"] == 1


def test_a_damaged_description_of_a_search_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "unfinished.json").write_text('{"model"')
    with pytest.raises(ValueError, match=r"unfinished\.json is damaged .*: delete .* to start anew"):
        search_and_retrain("optfs", data, {"model": "fm", "embedding_dim": 4}, tmp_path, console=QUIET)


SEARCH_SETTINGS = {"normalise": "none", "num_bytes": 900, "features": ["a", "b"], "rewind": 2}


def every_setting() -> Iterator[tuple[str, str]]:
    for method in SEARCHES:
        names = [field.name for field in dataclasses.fields(settings_of(method, {}))]
        yield from ((method, f"search.{name}") for name in names)
    yield from (("optfs", f"training.{name}") for name in HEEDED)
    yield from (("optfs", name) for name in ("embedding_dim", "hidden", "numeric"))


@pytest.mark.parametrize(("method", "path"), list(every_setting()))
def test_a_search_goes_on_only_with_the_same_settings(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, path: str
) -> None:
    """Generated from the settings of each method; and no search but of the same method."""
    before = experiment_of(method, {"model": "mlp"}, settings_of(method, {}), Training())
    part, _, name = path.rpartition(".")
    inner = before[part] if part else before
    value = SEARCH_SETTINGS.get(name) if part == "search" else None
    other = value if value is not None else other_than(name, inner[name])
    changed = {**before, part: {**inner, name: other}} if part else {**before, name: other}

    def killed(*_: Any, **__: Any) -> None:
        (tmp_path / "search").mkdir(exist_ok=True)  # where its checkpoints would be
        raise Killed

    def start(experiment: dict[str, Any]) -> None:
        _, config, settings, training = parts_of(experiment)
        entries = {entry: getattr(training, entry) for entry in HEEDED}
        search_and_retrain(experiment["search"]["method"], data, config, tmp_path, settings=settings, **entries)

    monkeypatch.setattr("ctrlib.search.run._plan", killed)
    monkeypatch.setattr("ctrlib.models.build", lambda *_, **__: models.mlp(ctr.Inputs(SCHEMA, embedding_dim=4)))
    with pytest.raises(Killed):
        start(before)
    if path == "training.max_epochs":
        with pytest.raises(Killed):
            start(changed)
        return
    with pytest.raises(ValueError, match=rf"holds an unfinished search.*: {re.escape(path)} was "):
        start(changed)
    if path == "search.learning_rate":
        another = "dnis" if method == "optfs" else "optfs"
        with pytest.raises(ValueError, match=rf"search\.method was '{method}', is now '{another}'"):
            start(experiment_of(another, {"model": "mlp"}, settings_of(another, {}), Training()))


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ({"model": "fm"}, 'search is None, expected a dictionary {"method": name'),
        ({"model": "fm", "search": "optfs"}, "search is str 'optfs', expected a dictionary"),
        ({"model": "fm", "search": {"penalty": 1}}, 'expected a dictionary {"method": name'),
        ({"model": "fm", "search": {"method": "optsf"}}, "unknown method 'optsf'; the closest are optfs"),
        ({"model": "fm", "search": {"method": "optfs", "penalti": 1}}, "optfs has no setting ['penalti']"),
        (
            {"model": "fm", "search": {"method": "optfs"}, "training": {"engine": "fused"}},
            "{'engine': 'fused'}, which no",
        ),
        ({"model": "fm", "search": {"method": "optfs"}, "training": {"device": "cuda"}}, "training says {'device'"),
        ({"model": "fm", "search": {"method": "optfs"}, "training": {"workers": 2}}, "training says {'workers': 2}"),
        ({"model": "fm", "search": {"method": "optfs"}, "training": {"epochs": 2}}, "training has no ['epochs']"),
    ],
)
def test_no_experiment_of_a_search(experiment: dict[str, Any], message: str) -> None:
    with pytest.raises(CtrlibError) as refused:
        parts_of(experiment)
    assert message in str(refused.value)


def test_a_searchs_config_is_of_the_model_alone(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CtrlibError, match=r"config holds \['training'\]: expected the model alone"):
        search_and_retrain("optfs", data, experiment("fm"), tmp_path, console=QUIET)


# Models of one's own.


def crossed(inputs: ctr.Inputs, *, num_layers: int = 1, width: int = 8) -> ctr.Model:
    """A model composed by hand."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = ctr.Parallel(ctr.CrossNetV2(shape, num_layers=num_layers), ctr.MLP(shape, hidden=(width,)))
    return inputs.model(embedding, tower, wide=True)


class Shallow(ctr.Model):
    """The same for a class."""

    def __init__(self, inputs: ctr.Inputs, *, width: int = 8) -> None:
        embedding = inputs.embedding()
        tower = ctr.MLP(embedding.out_shape, hidden=(width,))
        super().__init__(embedding, tower, ctr.LinearHead(tower.out_shape, num_tasks=len(inputs.schema.labels)))


def unnamed(inputs: ctr.Inputs, **arguments: int) -> ctr.Model:
    return crossed(inputs, **arguments)


def test_a_model_of_ones_own_is_trained_saved_and_loaded(data: Path, tmp_path: Path) -> None:
    own = [__name__]
    config = experiment(f"{__name__}.crossed", width=6)
    kill_before_test(data, config, tmp_path, modules=own)
    with pytest.raises(ValueError, match=r"of another run: num_layers was 1, is now 2\."):
        ctr.run(data, {**config, "num_layers": 2}, modules=own, out=tmp_path, console=QUIET)
    model, result = ctr.run(data, config, modules=own, out=tmp_path, console=QUIET)
    ctr.save_model(model, config, data, tmp_path, modules=own)
    loaded = ctr.Predictor.load(tmp_path, modules=own)
    assert loaded.evaluate_prepared(data, "test")["tasks"][0]["auc"] == result["test_tasks"][0]["auc"]
    with pytest.raises(ctr.SchemaError, match=rf"if you trust it, pass modules=\['{__name__}'\]"):
        ctr.Predictor.load(tmp_path)


def test_a_class_is_a_model_of_ones_own_too() -> None:
    config = {"model": f"{__name__}.Shallow", "embedding_dim": 4}
    assert models.complete(config, modules=[__name__])["width"] == 8
    model = models.build({**config, "width": 5}, SCHEMA, modules=[__name__])
    assert type(model) is Shallow and model.tower.out_shape == (5,)


@pytest.mark.parametrize(
    ("name", "modules", "message"),
    [
        ("os.system", ["os"], "no function or class that os defines"),
        ("shutil.os.remove", ["shutil"], "shutil.os is not among the modules"),
        (f"{__name__}.nobody", [__name__], "cannot be imported"),
        ("no_such_module.crossed", ["no_such_module"], "cannot be imported"),
        (f"{__name__}.unnamed", [__name__], "are not all named"),
        (f"{__name__}.QUIET", [__name__], "no function or class"),
        ("ctrlib.data.prepare.prepare", [], "ctrlib.data.prepare is not among the modules"),
    ],
)
def test_only_what_the_caller_names_is_imported(name: str, modules: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build({"model": name}, SCHEMA, modules=modules)


# The command line.


def test_the_command_line_makes_prints_reads_and_saves_one_dictionary(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "masknet", "--dim", "4", "--hidden", "8", "--l2", "1e-6", "--epochs", "1", "--device", "cpu"]
    flags += ["--option", "num_blocks=2", "block_dim=8"]

    def printed(*arguments: str) -> Any:
        assert cli.main(["train", str(data), *arguments, "--print-config"]) == 0
        return json.loads(capsys.readouterr().out)

    config = printed(*flags)
    assert config == complete(config)
    assert (config["model"], config["num_blocks"], config["hidden"]) == ("masknet", 2, [8])
    assert config["training"]["batch_size"] == 128 and config["training"]["embedding_l2"] == 1e-6
    assert not (tmp_path / "one").exists()
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(config))
    assert printed("--config", str(path)) == config
    changed = printed("--config", str(path), "--seed", "3", "--epochs", "7")
    assert differences(config, changed) == ["training.seed was 0, is now 3", "training.max_epochs was 1, is now 7"]
    results = []
    for out, arguments in (("one", flags), ("two", ["--config", str(path)])):
        assert cli.main(["train", str(data), *arguments, "--out", str(tmp_path / out), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        saved = json.loads((tmp_path / out / "model.json").read_text())
        assert saved.pop("calibration") == results[-1]["calibrator"]  # what was fitted, and is no setting
        assert saved == config
    assert results[0]["test_auc"] == results[1]["test_auc"]
    assert printed("--config", str(tmp_path / "two" / "model.json")) == config


def test_the_command_line_makes_prints_reads_and_saves_one_dictionary_of_a_search(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "mlp", "--dim", "4", "--hidden", "8", "--l2", "1e-6", "--epochs", "1", "--batch-size", "200"]
    flags += ["--setting", "epochs=2", "rewind=null"]

    def printed(*arguments: str) -> Any:
        assert cli.main(["search", "optfs", str(data), *arguments, "--print-config"]) == 0
        return json.loads(capsys.readouterr().out)

    config = printed(*flags)
    method, of_model, settings, training = parts_of(config)
    assert experiment_of(method, of_model, settings, training) == config
    expected = {"method": "optfs", "epochs": 2, "rewind": None, "embedding_l2": 1e-6, "learning_rate": 1e-3}
    assert expected.items() <= config["search"].items()
    assert (config["model"], config["hidden"], config["training"]["batch_size"]) == ("mlp", [8], 200)
    path = tmp_path / "search.json"
    path.write_text(json.dumps(config))
    assert printed("--config", str(path)) == config
    changed = printed("--config", str(path), "--learning-rate", "0.01", "--setting", "rewind=1")
    assert sorted(differences(config, changed)) == [
        "search.learning_rate was 0.001, is now 0.01",
        "search.rewind was None, is now 1",
        "training.learning_rate was 0.001, is now 0.01",
    ]
    results = []
    for out, arguments in (("one", flags), ("two", ["--config", str(path)])):
        assert cli.main(["search", "optfs", str(data), *arguments, "--out", str(tmp_path / out), "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        saved = json.loads((tmp_path / out / "model.json").read_text())
        assert {name: value for name, value in saved.items() if name != "replaced"} == config
    assert results[0]["test_auc"] == results[1]["test_auc"]
    assert printed("--config", str(tmp_path / "two" / "model.json")) == config  # what it came to is left out
    trained = {name: value for name, value in config.items() if name != "search"}
    path.write_text(json.dumps(trained))
    assert printed("--config", str(path), "--setting", "epochs=2", "rewind=null") == config


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('{"model": "fm"}', ["--dim", "4"], "--dim: --config"),
        ('{"model": "fm", "search": []}', [], "search is [], expected a dictionary"),
        ('{"model": "fm", "search": {"method": "dnis"}}', [], "describes a search by dnis, and METHOD is optfs"),
        ('{"model": "fm", "search": {"penalti": 1}}', [], "optfs has no setting ['penalti']"),
        ('{"model": "fm", "crosses": [["a", "b"]]}', [], "a search has plain tables and no crosses beside them"),
        ('{"model": "fm", "replaced": {}}', [], "was made smaller (replaced)"),
        ('{"model": "fm", "training": {"engine": "fused"}}', [], "training says {'engine': 'fused'}, which no search"),
        (None, [], "there is no such file"),
    ],
)
def test_a_config_that_does_not_fit_a_search_is_refused(
    data: Path, tmp_path: Path, text: str | None, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.json"
    if text is not None:
        path.write_text(text)
    out = tmp_path / "out"
    assert cli.main(["search", "optfs", str(data), "--config", str(path), "--out", str(out), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ('{"model": "fm"}', ["--dim", "4", "--engine", "fused"], "--dim, --engine: --config"),
        ("{", [], "is not JSON"),
        ("[]", [], 'is no experiment: expected {"model": NAME'),
        ('{"model": 3}', [], "is no experiment"),
        ('{"model": "fm", "replaced": {}}', [], "was made smaller (replaced)"),
        ('{"model": "fm", "search": {"method": "optfs"}}', [], "describes a search: use `ctrlib search`"),
        ('{"model": "fm", "training": []}', [], "training is [], expected a dictionary"),
        ('{"model": "fm", "training": {"epochs": 1}}', [], "training has no ['epochs']"),
        ('{"model": "fm", "width": 1}', [], "fm takes no ['width']"),
        ('{"model": "shop.own"}', [], "shop is not among the modules"),
        (None, [], "there is no such file"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    data: Path, tmp_path: Path, text: str | None, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "experiment.json"
    if text is not None:
        path.write_text(text)
    assert cli.main(["train", str(data), "--config", str(path), "--out", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
