"""Models composed by hand, described as trees of constructors: saved, loaded, refused by their place in the tree."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from rich.console import Console
from test_conformance import ARGUMENTS, EMBEDDINGS, HEADS, TOWERS
from torch import nn

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.errors import ArgumentError, CtrlibError
from ctrlib.models.tree import PLACES
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.config import complete, differences, identity_of

QUIET = Console(quiet=True)
Tree = dict[str, Any]
ALL = {"features_of_schema": "all"}
POLICIES = "torchrec.modules.mc_modules"


def part(name: str, **arguments: Any) -> Tree:
    return {"class": f"ctrlib.{name}", "arguments": arguments}


def unit(encoder: Tree) -> Tree:
    return part("embeddings.Unit", targets=["item"], histories=["history"], encoder=encoder)


TABLES = part("TableEmbedding", features=ALL, embedding_dim=12)
MLP = part("MLP", in_shape=[6, 12], hidden=[5])
LINEAR = part("LinearHead", in_shape=[5], num_tasks=2)
# What constructors must be told, as `ARGUMENTS` and `EMBEDDING_ARGUMENTS` of tests/test_conformance.py say it.
EMBEDDING_ARGUMENTS: Tree = {
    "target": "item",
    "num_tasks": None,
    "units": [unit(part("embeddings.MeanPooling", dim=12))],
    "num_embeddings": {"item": 64, "genres": 16},
    "eviction_policy": {"class": f"{POLICIES}.LRU_EvictionPolicy"},
}


def whole(embedding: Tree = TABLES, tower: Tree = MLP, head: Tree = LINEAR, **rest: Any) -> Tree:
    return {"model": part("Model", embedding=embedding, tower=tower, head=head, **rest)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One feature of each kind, as `example_schema` has them, and two labels."""
    rows = range(240)
    frame = pl.DataFrame(
        {
            "user": [f"u{row % 19}" for row in rows],
            "price": [row % 7 / 2 for row in rows],
            "item": [f"i{row % 23}" for row in rows],
            "genres": ["|".join(f"g{(row + k) % 8}" for k in range(row % 3)) for row in rows],
            "history": ["|".join(f"i{(row * 5 + k) % 23}" for k in range(row % 4)) for row in rows],
            "age": [row % 50 for row in rows],
            "click": [row % 23 % 2 for row in rows],
            "like": [row % 19 // 10 for row in rows],
        }
    )
    out = tmp_path_factory.mktemp("tree") / "data"
    ctr.prepare(frame, out, features=_unfitted(), labels=["click", "like"], log=None)
    return out


def _unfitted() -> list[Any]:
    kinds: dict[str, Any] = {"genres": ctr.MultiValued, "price": ctr.Numeric, "age": ctr.Numeric}
    found = []
    for feature in example_schema().features:
        if feature.name == "history":
            found.append(ctr.Sequence("history", vocabulary="item"))
        else:
            found.append(kinds.get(feature.name, ctr.Categorical)(feature.name))
    return found


def out_shape(tree: Tree) -> list[int]:
    return list(models.tree.make_tree(tree, example_schema(), [POLICIES]).out_shape)


def head_for(tower: Tree) -> Tree:
    shape = out_shape(tower)
    return part("LinearHead" if len(shape) == 1 else "heads.TaskTowers", in_shape=shape, num_tasks=2)


def encoded(encoder: Tree) -> Tree:
    return part("embeddings.SequenceEmbedding", features=ALL, units=[unit(encoder)], embedding_dim=12)


def numbers(name: str, **arguments: Any) -> Tree:
    return part("TableEmbedding", features=ALL, embedding_dim=12, numeric=part(f"embeddings.{name}", **arguments))


def looked_up(name: str, **arguments: Any) -> Tree:
    sparse = {"features_of_schema": ["user", "item", "genres", "history"]}
    tables = part(f"embeddings.{name}", features=sparse, embedding_dim=12, **arguments)
    return part("TableEmbedding", features=ALL, embedding_dim=12, tables=tables)


def needed(kind: Any, arguments: Tree) -> Tree:
    takes = list(inspect.signature(kind).parameters.values())[1:]
    return {one.name: arguments[one.name] for one in takes if one.default is one.empty}


TOWER_TREES = {
    **{name: part(f"towers.{name}", in_shape=[6, 12], **needed(kind, ARGUMENTS)) for name, kind in TOWERS.items()},
    "Parallel": part("Parallel", towers=[MLP, part("towers.FM", in_shape=[6, 12])]),
    "Stack": part("Stack", towers=[part("towers.CIN", in_shape=[6, 12], num_maps=[4]), part("MLP", in_shape=[4])]),
}
TOWER_TREES["EulerNet"]["arguments"]["num_orders"] = [3]
STREAMS = {1: MLP, 2: part("towers.Streams", in_shape=[6, 12], num_streams=2)}
STREAMS[3] = part("towers.Streams", in_shape=[6, 12], num_streams=3)
EMBEDDING_TREES = {
    **{
        name: part(f"embeddings.{name}", features=ALL, embedding_dim=12, **needed(kind, EMBEDDING_ARGUMENTS))
        for name, kind in EMBEDDINGS.items()
    },
    "ConcatFields": part(
        "embeddings.ConcatFields",
        embeddings=[TABLES, part("TableEmbedding", features=ALL, only=["user"], embedding_dim=12, suffix="_context")],
    ),
    "subset": part("TableEmbedding", features={"features_of_schema": ["item", "user"]}, embedding_dim=12),
    **{
        name: encoded(part(f"embeddings.{name}", dim=12, **more))
        for name, more in {"DIN": {"dice": True}, "BST": {"max_length": 50}, "TargetAttention": {}}.items()
    },
    "SIM": encoded(part("embeddings.SIM", attention=part("embeddings.TargetAttention", dim=12), top_k=2)),
    "ValueTimesVector": numbers("ValueTimesVector", num_features=2, embedding_dim=12),
    "Periodic": numbers("Periodic", num_features=2, embedding_dim=12, sigma=0.5),
    "AutoDis": numbers("AutoDis", num_features=2, embedding_dim=12),
    "Bucketised": numbers("Bucketised", edges=[[0.5, 1.0], [10.0, 20.0]], embedding_dim=12),
    "PiecewiseLinear": numbers("PiecewiseLinear", edges=[[0.5, 1.0, 2.0], [10.0, 20.0]], embedding_dim=12),
    "UnifiedTables": looked_up("UnifiedTables", num_embeddings=64),
    "HashEmbeddingTables": looked_up("HashEmbeddingTables", num_embeddings=16),
    "MemComTables": looked_up("MemComTables", num_embeddings=16),
    "QuotientRemainderTables": looked_up("QuotientRemainderTables", num_embeddings=40),
    "MixedDimensionTables": looked_up("MixedDimensionTables", dimensions={"user": 4, "item": 12, "genres": 2}),
}


def every_model() -> dict[str, Tree]:
    found = {}
    for name, tree in TOWER_TREES.items():
        shape = out_shape(tree)
        if len(shape) == 2 and shape[0] != 2:  # fields, not streams
            tree = part("Stack", towers=[tree, part("MLP", in_shape=shape, hidden=[5])])
        found[f"tower {name}"] = whole(tower=tree, head=head_for(tree))
    for name, (kind, shape) in HEADS.items():
        tower = STREAMS[1 if len(shape) == 1 else shape[0]]
        arguments = {**needed(kind, ARGUMENTS), "in_shape": out_shape(tower)}
        if name.startswith("EnsembleHead"):
            arguments |= {"widths": [3, 2], "num_tasks": 2}
        if name.startswith("LinearHead"):
            arguments["num_tasks"] = 2
        found[f"head {name}"] = whole(tower=tower, head=part(f"heads.{kind.__name__}", **arguments))
    for name, tree in EMBEDDING_TREES.items():
        shape = out_shape(tree)
        found[f"embedding {name}"] = whole(tree, part("MLP", in_shape=shape, hidden=[5]))
    found["wide"] = whole(wide=part("embeddings.Wide", features=ALL, num_tasks=2))
    return found


MODELS = every_model()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_composed_by_hand_is_saved_and_loaded(data: Path, tmp_path: Path, name: str) -> None:
    """Every tower, head and embedding: the scores are those of before, and the description is whole."""
    config, modules = MODELS[name], [POLICIES]
    schema = ctr.Schema.load(data)
    torch.manual_seed(1)
    model = models.build(config, schema, modules=modules).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ctr.save_model(model, config, data, tmp_path / "model", modules=modules)
    loaded = ctr.Predictor.load(tmp_path / "model", modules=modules).model
    batch = example_batch(schema, 9)
    expected = model(batch)
    assert expected.shape[1] == 2 and torch.equal(loaded(batch), expected)
    assert not torch.equal(models.build(config, schema, modules=modules).eval()(batch), expected)
    every = complete(config, modules=modules)
    assert complete(every, modules=modules) == every and json.loads(json.dumps(every)) == every
    again = models.build(every, schema, modules=modules)
    assert str(again) == str(model)


def test_a_tree_is_what_the_constructors_make() -> None:
    """The same as in Python, whatever stands between: positions, lists of parts, features of the schema."""
    schema = example_schema(2)
    embedding = ctr.TableEmbedding(schema.features, embedding_dim=12)
    tower = ctr.Parallel(ctr.towers.AutoInt((6, 12), num_heads=4), ctr.MLP((6, 12), hidden=(5,)))
    by_hand = ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape, num_tasks=2))
    trees = [part("towers.AutoInt", in_shape=[6, 12], num_heads=4), part("MLP", in_shape=[6, 12], hidden=[5])]
    head = part("LinearHead", in_shape=list(tower.out_shape), num_tasks=2)
    made = models.build(whole(tower=part("Parallel", towers=trees), head=head), schema)
    assert str(made) == str(by_hand)
    assert [p.shape for p in made.parameters()] == [p.shape for p in by_hand.parameters()]


def changed(path: str, value: Any) -> Tree:
    """`whole()` with another value at a place."""
    config = copy.deepcopy(whole())
    *before, last = path.split(".")
    inner = config
    for name in before:
        inner = inner[name]
    inner[last] = value
    return config


TOWER = "model.arguments.tower"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{TOWER}.arguments.hiden", [8], f"{TOWER}: ctrlib.MLP takes no ['hiden']; the closest are hidden"),
        (f"{TOWER}.arguments.hidden", "wide", f"{TOWER}: ctrlib.MLP does not take these arguments ("),
        (f"{TOWER}.arguments.in_shape", [6, "8"], f"{TOWER}: ctrlib.MLP does not take these arguments (TypeError"),
        (f"{TOWER}.arguments", {"hidden": [5]}, f"{TOWER}: ctrlib.MLP cannot be made without ['in_shape']"),
        (f"{TOWER}.arguments", [5], f"{TOWER}.arguments is list [5], expected a dictionary"),
        (
            f"{TOWER}.arguments.in_shape",
            [6, 4],
            "model: ctrlib.Model does not take these arguments (ArgumentError: MLP",
        ),
        (
            f"{TOWER}.class",
            "ctrlib.towers.AutoIn",
            f"{TOWER}: ctrlib.towers has no part 'AutoIn'; the closest",
        ),
        (f"{TOWER}.class", "ctrlib.towers.autoint.AutoInt", f"{TOWER}: 'ctrlib.towers.autoint.AutoInt' is no public"),
        (f"{TOWER}.class", "ctrlib.towers.autoint.AutoInt", "write ctrlib.towers.AutoInt"),
        (f"{TOWER}.class", 3, f"{TOWER}.class is int 3, expected an import path"),
        (f"{TOWER}.kind", "MLP", f'{TOWER} has [\'kind\'] beside "class" and "arguments"'),
        (f"{TOWER}", part("Parallel", towers=MLP), f"{TOWER}.arguments.towers is dict {{"),
        (
            f"{TOWER}",
            part("Parallel", towers=[MLP, part("FMM")]),
            f"{TOWER}.arguments.towers[1]: ctrlib has no part",
        ),
        ("model.arguments.embedding.arguments.features", {"features_of_schema": ["itm"]}, "the schema has no ['itm']"),
        ("model.arguments.embedding.arguments.features", {"features_of_schema": 3}, ".features.features_of_schema is"),
        ("model.arguments.embedding", 3, "model: ctrlib.Model does not take these arguments (AttributeError"),
        ("model", MLP, "model must be a tree whose class is ctrlib.Model or made of one, got MLP"),
        ("model", {"arguments": {}}, "model is dict {'arguments': {}}, expected a name or"),
        ("embedding_dim", 4, "config has ['embedding_dim'] beside a tree of constructors"),
    ],
)
def test_a_wrong_tree_is_refused_by_its_place(path: str, value: Any, message: str) -> None:
    with pytest.raises(CtrlibError) as refused:
        models.build(changed(path, value), example_schema(2))
    assert message in str(refused.value)


def test_values_that_are_no_plain_data_are_named() -> None:
    config = whole(part("TableEmbedding", features=ALL, embedding_dim=12, numeric=nn.Linear(2, 8)))
    with pytest.raises(ArgumentError, match=r"model=.* is not plain data .*Linear.*: expected numbers, texts"):
        complete(config)


# Whose code runs.


class Doubled(nn.Module):
    """A tower of one's own."""

    def __init__(self, in_shape: tuple[int, int], *, factor: float = 2.0) -> None:
        super().__init__()
        self.in_shape, self.out_shape, self.factor = in_shape, (in_shape[0] * in_shape[1],), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x.flatten(1)


OWN = whole(
    tower={"class": f"{__name__}.Doubled", "arguments": {"in_shape": [6, 12]}},
    head=part("LinearHead", in_shape=[72], num_tasks=2),
)


@pytest.mark.parametrize(
    ("path", "modules", "message"),
    [
        (
            "os.system",
            [],
            "'os' is not among the modules that classes may come from, []: if you trust it, pass",
        ),
        ("os.system", ["os"], "os.system is no class"),
        ("subprocess.Popen", [], "'subprocess' is not among the modules"),
        ("ctrlib.cli.__main__.x", [], "ctrlib.cli.__main__' is not among the modules"),
        ("ctrlib.Checkpoints", [], "ctrlib has no part 'Checkpoints'"),
        ("ctrlib.embeddings.FeatureIds", [], "ctrlib.embeddings has no part 'FeatureIds'"),
        ("ctrlib.towers._shape", [], "ctrlib.towers has no part '_shape'"),
        ("ctrlib.prepare", [], "ctrlib has no part 'prepare'"),
        (f"{__name__}.Nobody", [__name__], "cannot be imported"),
        ("no_such_module.Tower", ["no_such_module"], "cannot be imported"),
    ],
)
def test_only_parts_and_what_the_caller_names_are_made(path: str, modules: list[str], message: str) -> None:
    with pytest.raises(CtrlibError) as refused:
        models.build(changed(f"{TOWER}.class", path), example_schema(2), modules=modules)
    assert message in str(refused.value) and f"{TOWER}: " in str(refused.value)


def test_a_folder_cannot_choose_what_runs(data: Path, tmp_path: Path) -> None:
    schema = ctr.Schema.load(data)
    model = models.build(OWN, schema, modules=[__name__])
    ctr.save_model(model, OWN, data, tmp_path / "model", modules=[__name__])
    with pytest.raises(ctr.SchemaError, match=rf"model\.json.*{TOWER}.*pass modules=\['{__name__}'\]"):
        ctr.Predictor.load(tmp_path / "model")
    loaded = ctr.Predictor.load(tmp_path / "model", modules=[__name__]).model
    assert type(loaded.tower) is Doubled


def test_public_places_hold_what_they_say() -> None:
    assert PLACES == ("ctrlib", "ctrlib.towers", "ctrlib.heads", "ctrlib.embeddings")


# What has the same weights and is another model.


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tower.factor", 3.0, r"its parts differ: tower\.factor was 3\.0, is now 2\.0"),
        ("tower", nn.Flatten(), r"tower\.class was 'torch.*Flatten', is now '.*Doubled'"),
    ],
)
def test_a_model_that_was_changed_after_it_was_made_is_not_saved(
    data: Path, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    model = models.build(OWN, ctr.Schema.load(data), modules=[__name__])
    before, _, last = path.rpartition(".")
    setattr(model.get_submodule(before), last, value)
    with pytest.raises(ArgumentError, match=message):
        ctr.save_model(model, OWN, data, tmp_path / "model", modules=[__name__])
    assert not (tmp_path / "model").exists()


def test_the_same_holds_for_published_models(data: Path, tmp_path: Path) -> None:
    """`scale` changes no shape: such a model was saved, and loaded as another."""
    config = {"model": "autoint", "embedding_dim": 4, "num_layers": 1, "head_dim": 4}
    schema = ctr.Schema.load(data)
    model = models.build({**config, "scale": True}, schema)
    with pytest.raises(ArgumentError, match=r"its parts differ: .*scale was 0.5, is now 1.0"):
        ctr.save_model(model, config, data, tmp_path / "model")
    ctr.save_model(model, {**config, "scale": True}, data, tmp_path / "model")


def test_tied_weights_are_told_from_untied_ones(data: Path, tmp_path: Path) -> None:
    towers = part("Parallel", towers=[MLP, MLP])
    config = whole(tower=towers, head=part("LinearHead", in_shape=[10], num_tasks=2))
    model = models.build(config, ctr.Schema.load(data))
    ctr.save_model(model, config, data, tmp_path / "untied")
    model.tower.towers[1] = model.tower.towers[0]  # type: ignore[operator, union-attr]
    with pytest.raises(ArgumentError, match=r"tied are \[\['tower\.towers\.0.*in that of the config none"):
        ctr.save_model(model, config, data, tmp_path / "tied")


# A tree is an experiment.


def test_a_tree_is_trained_resumed_saved_and_read_by_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"batch_size": 32, "learning_rate": 0.01, "max_epochs": 2, "device": "cpu"}
    config = {**whole(), "training": training}
    _, result = ctr.run(data, config, console=QUIET)
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps(config))
    assert cli.main(["train", str(data), "--config", str(path), "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["test_auc"] == result["test_auc"]
    saved = json.loads((tmp_path / "out" / "model.json").read_text())
    assert saved == complete(config) and saved["model"]["arguments"]["tower"]["arguments"]["dropout"] == 0.0
    scores = ctr.Predictor.load(tmp_path / "out").evaluate_prepared(data, "test")
    assert scores["tasks"][0]["auc"] == result["test_tasks"][0]["auc"]
    other = complete({**config, **changed(f"{TOWER}.arguments.dropout", 0.5)})
    found = differences(identity_of(complete(config), "x", "y"), identity_of(other, "x", "y"))
    assert found == [f"{TOWER}.arguments.dropout was 0.0, is now 0.5"]
    assert cli.main(["train", str(data), "--config", str(tmp_path / "out" / "model.json"), "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out) == saved


def test_a_tree_is_searched(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps({**whole(), "training": {"batch_size": 32, "max_epochs": 1}}))
    searched = ["search", "optfs", str(data), "--config", str(path), "--setting", "epochs=2"]
    assert cli.main([*searched, "--out", str(tmp_path / "searched"), "--json"]) == 0
    capsys.readouterr()
    saved = json.loads((tmp_path / "searched" / "model.json").read_text())
    assert saved["model"]["class"] == "ctrlib.Model" and saved["replaced"]
    assert len(ctr.Predictor.load(tmp_path / "searched").evaluate_prepared(data, "test")["tasks"]) == 2
