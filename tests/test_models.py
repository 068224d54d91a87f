"""Every published model, as the command line and the recipes name it: in both engines, sharded, traced and exported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib.embeddings import table
from ctrlib.embeddings.table import shift_ids
from ctrlib.errors import WrongTypeError
from ctrlib.models import MODELS, build, for_engine
from ctrlib.testing import example_batch, example_schema

SCHEMA = example_schema(num_tasks=2)
SMALL: dict[str, dict[str, Any]] = {
    "autoint": {"num_layers": 2, "head_dim": 4},
    "autoint_plus": {"num_layers": 2, "head_dim": 4},
    "dtrn": {"num_experts": 2, "expert_hidden": (8,), "tower_hidden": (4,)},
    "dualmlp": {"hidden_1": (8,), "hidden_2": (6,)},
    "fgcnn": {"num_channels": (3, 4), "kernel_height": 3},
    "finalmlp": {"hidden_1": (8,), "hidden_2": (6,), "num_heads": 2, "contexts": (("user",), ("price", "history"))},
    "finalnet": {"hidden_1": (8, 6), "hidden_2": (4,)},
    "masknet": {"block_dim": 6},
}


def make(name: str, engine: str = "exact", **layout: Any) -> ctr.Model:
    config = {"model": name, "embedding_dim": 8, **layout, **SMALL.get(name, {})}
    if "hidden" in MODELS[name].arguments:
        config["hidden"] = (8, 6)
    return build(for_engine(config, engine), SCHEMA)


FIRSTS = {
    "schema": SCHEMA,
    "data": "data/clicks",
    "features": SCHEMA.features,
    "config": {"embedding_dim": 8},
    "width": 16,
    "none": None,
    "class": ctr.Inputs,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_first_argument_is_answered(name: str) -> None:
    """By the class of errors that users cause, with how it is called."""
    make, cure = getattr(ctr.models, name), rf"write ctrlib\.models\.{name}\(ctrlib\.Inputs\(schema"
    for first in FIRSTS.values():
        for call in (lambda first=first: make(first), lambda first=first: make(inputs=first)):  # type: ignore[misc]
            with pytest.raises(WrongTypeError, match=rf"{name} takes ctrlib\.Inputs first, got .*{cure}"):
                call()
    with pytest.raises(WrongTypeError, match=rf"{name} takes ctrlib\.Inputs first, got nothing: {cure}"):
        make()
    with pytest.raises(WrongTypeError, match=rf"{name} takes ctrlib\.Inputs first, got int 8: {cure}"):
        make(8, ctr.Inputs(SCHEMA))  # the other way round
    inputs = ctr.Inputs(SCHEMA, embedding_dim=8)
    with pytest.raises(WrongTypeError, match="by position and all else by name, got int 3"):
        make(inputs, 3)
    with pytest.raises(WrongTypeError, match=rf"{name} takes no \['no_such'\]; (the closest are|only inputs)"):
        make(inputs, no_such=3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["exact", "fused"])
def test_model_learns_in_both_engines(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model = make(name, engine)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer = ctr.training.make_engine(model, engine, learning_rate=0.01, embedding_learning_rate=0.05)  # type: ignore[arg-type]
    batch = example_batch(SCHEMA, 64)
    losses = [trainer.step(batch).item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1, losses
    after = trainer.weights()
    assert after.keys() == before.keys()
    still = [key for key in before if before[key].is_floating_point() and torch.equal(before[key], after[key])]
    # fbgemm's rows that no id of the batch meets stay, but no tensor as a whole does.
    assert still == []


@pytest.mark.parametrize("name", MODELS)
def test_model_gives_the_same_logits_sharded(name: str) -> None:
    torch.manual_seed(0)
    model = make(name, "fused")
    plain = copy.deepcopy(model).eval()
    sharded = ctr.sharding.shard(model).eval()
    batch = example_batch(SCHEMA, 16)
    with torch.no_grad():
        torch.testing.assert_close(sharded(batch), plain(batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_model_traces_and_exports(name: str) -> None:
    torch.manual_seed(0)
    model = make(name)
    network = nn.Sequential(model.tower, model.head).eval()
    *tasks, num_fields, dim = model.tower.in_shape
    example, other = (torch.randn(*tasks, rows, num_fields, dim) for rows in (4, 9))
    expected = network(other)
    torch.testing.assert_close(torch.fx.symbolic_trace(network)(other), expected)
    dynamic = {len(tasks): torch.export.Dim("batch")}
    exported = torch.export.export(network, (example,), dynamic_shapes=(dynamic,)).module()
    torch.testing.assert_close(exported(other), expected)


@pytest.mark.parametrize("numeric", ["vector", "bucketised", "piecewise_linear", "periodic", "autodis"])
def test_numbers_become_fields_in_every_way(numeric: str) -> None:
    torch.manual_seed(0)
    edges = [[-1.0, 0.0, 1.0], [-0.5, 0.5]] if numeric in ("bucketised", "piecewise_linear") else None
    config = {"numeric": numeric, "edges": edges, "contexts": (("age",), ("user",))}
    model = build({"model": "finalmlp", "embedding_dim": 4, "num_heads": 1, "gate_hidden": (4,), **config}, SCHEMA)
    batch = example_batch(SCHEMA, 8)
    fields = model.embedding(batch)
    tables = model.embedding.embeddings[0]
    expected = tables.numeric(batch.dense)
    torch.testing.assert_close(fields[:, [SCHEMA.position("price"), SCHEMA.position("age")]], expected)
    context = model.embedding.embeddings[1].numeric(batch.dense[:, 1:])
    torch.testing.assert_close(fields[:, len(SCHEMA.features)], context[:, 0])
    trainer = ctr.ExactEngine(model, learning_rate=0.01)
    losses = [trainer.step(batch).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "transformer"}, "unknown model 'transformer'"),
        ({"model": "mlp", "num_heads": 2}, r"takes no \['num_heads'\]"),
        ({"model": "mlp", "numeric": "splines"}, "unknown numeric 'splines'"),
        ({"model": "mlp", "numeric": "piecewise_linear"}, "needs edges for 2 numeric features, got 0"),
        ({"model": "finalmlp", "contexts": [["nobody"], []]}, r"no features \['nobody'\]"),
        ({"model": "finalmlp", "contexts": ["user", "item"]}, "two lists of distinct feature names"),
        ({"model": "finalmlp", "contexts": [["user", "user"], []]}, "two lists of distinct feature names"),
        ({"model": "finalmlp", "contexts": [["user"]]}, "two lists of distinct feature names"),
        ({"model": "eulernet", "num_orders": 3}, "eulernet does not take these arguments"),
        ({"model": "mlp", "sigma": 3.0}, "is for numeric='periodic'"),
        ({"model": "mlp", "sequence": "tim"}, "makes fields of each label's own, which dtrn takes"),
        ({"model": "mmoe", "sequence": "tim"}, "mmoe and ple with refine=True"),
        ({"model": "dtrn", "sequence": "din"}, "this model reads histories in its own way, 'tim', got sequence='din'"),
        ({"model": "mlp", "edges": [[1.0, 2.0]]}, "edges are for bucketised and piecewise_linear"),
    ],
)
def test_wrong_config_says_what_is_right(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config, SCHEMA)


def test_a_config_with_a_value_of_another_type_names_it() -> None:
    with pytest.raises(TypeError, match=r"embedding_dim must be a whole number, got float 8\.5"):
        build({"model": "mlp", "embedding_dim": 8.5}, SCHEMA)


@pytest.mark.parametrize("sequence", ["mean", "din", "din_softmax", "bst", "sim", "tim_shared"])
@pytest.mark.parametrize("engine", ["exact", "fused"])
def test_histories_become_fields_in_every_way_under_any_tower(sequence: str, engine: str) -> None:
    torch.manual_seed(0)
    model = make("finalmlp", engine, sequence=sequence)
    counts = model.num_parameters()
    tables = sum(
        feature.num_embeddings * 8
        for name, feature in {f.vocabulary or f.name: f for f in SCHEMA.sparse}.items()
        if feature.num_embeddings
    )
    contexts = (20 + 30) * 8 + 1 * 8  # FinalMLP's own tables of user and history, its own vector of price
    assert counts["embedding"] == tables + 2 * 8 + contexts  # what the encoders weigh counts as network
    trainer = ctr.training.make_engine(model, engine, learning_rate=0.01, embedding_learning_rate=0.05)  # type: ignore[arg-type]
    batch = example_batch(SCHEMA, 64)
    losses = [trainer.step(batch).item() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.1, losses


def two_behaviours(*labels: str) -> ctr.Schema:
    item = ctr.Categorical("item", num_embeddings=9)
    histories = [ctr.Sequence(name, vocabulary="item", num_embeddings=9) for name in ("clicks", "purchases")]
    return ctr.Schema((item, *histories), labels)


def test_dtrn_reads_each_behaviour_for_each_label() -> None:
    schema = two_behaviours("click", "buy")
    torch.manual_seed(0)
    arguments = {"embedding_dim": 4, "expert_hidden": (8,), "tower_hidden": ()}
    models = {
        "dtrn": build({"model": "dtrn", **arguments}, schema),
        "mmoe": build({"model": "mmoe", "refine": True, "sequence": "tim", **arguments}, schema),
        "ple": build({"model": "ple", "refine": True, "sequence": "tim", **arguments}, schema),
    }
    models["dtrn"].load_state_dict(models["mmoe"].state_dict())
    batch = example_batch(schema, 64)
    assert torch.equal(models["dtrn"](batch), models["mmoe"](batch))
    for name in ("dtrn", "ple"):
        model = models[name]
        assert model.embedding.histories == ["clicks", "purchases"]
        assert model.tower.in_shape == (2, 3, 4)
        tasks = model.embedding.interests.tasks.detach().clone()
        trainer = ctr.ExactEngine(model, learning_rate=0.005)
        losses = [trainer.step(batch).item() for _ in range(40)]
        assert losses[-1] < losses[0] - 0.1, (name, losses)
        assert not torch.equal(model.embedding.interests.tasks, tasks)


def test_tim_reads_histories_of_one_thing_and_pools_others() -> None:
    schema = two_behaviours("y")
    shop = ctr.Categorical("shop", num_embeddings=5)
    shops = ctr.Sequence("shops", vocabulary="shop", num_embeddings=5)
    schema = ctr.Schema((shop, *schema.features, shops), ("y",))
    model = build({"model": "mlp", "embedding_dim": 4, "hidden": (4,), "sequence": "tim_shared"}, schema)
    batch = example_batch(schema, 16)
    plain = ctr.TableEmbedding(schema.features, only=["shop", "shops"], embedding_dim=4)
    plain.load_state_dict(model.embedding.rest.state_dict())
    assert model.embedding.histories == ["clicks", "purchases"]
    assert torch.equal(model.embedding(batch)[:, [0, 4]], plain(batch))


@pytest.mark.parametrize("stacked", [0, 1, 2])
def test_rows_are_those_that_torchrec_looks_up(stacked: int) -> None:
    features = (
        ctr.Categorical("shop", num_embeddings=9),
        ctr.MultiValued("tags", num_embeddings=7),
        ctr.Categorical("user", num_embeddings=20),
        ctr.Sequence("shops", vocabulary="shop", num_embeddings=9),
    )
    embedding = ctr.TableEmbedding(features, embedding_dim=4, stacked=stacked)
    batch = example_batch(ctr.Schema(features, ("y",)), 64)
    turned = {name: batch.sparse[name] for name in ("tags", "shops", "user", "shop")}
    batch.sparse = KeyedJaggedTensor.from_jt_dict(turned)
    assert (batch.sparse["shops"].lengths() == 0).any()  # of no bag that is empty is a row
    pooled = embedding.tables(shift_ids(batch.sparse, embedding.first_rows)).to_dict()
    expected = torch.stack([pooled[feature.name] for feature in features], dim=1)
    found = embedding(batch)
    assert torch.equal(found, expected)
    weights, slopes = list(embedding.parameters()), torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad((out * slopes).sum(), weights) for out in (found, expected))):
        torch.testing.assert_close(ours, theirs)
    asked: list[Any] = []
    for part in (embedding.tables, next(iter(embedding.tables.embedding_bags.values()))):
        with part.register_forward_hook(lambda _, arguments, found: asked.append(found)):
            assert torch.equal(embedding(batch), expected)
    assert len(asked) >= 2
    assert torch.equal(torch.stack([asked[0].to_dict()[feature.name] for feature in features], dim=1), expected)


def test_a_second_history_of_one_thing_is_a_second_unit() -> None:
    schema = two_behaviours("y")
    model = build({"model": "mlp", "embedding_dim": 4, "hidden": (4,), "sequence": "din"}, schema)
    assert [unit[:2] for unit in model.embedding.units] == [(("item",), ("clicks",)), (("item",), ("purchases",))]
    trainer = ctr.ExactEngine(model, learning_rate=0.01)
    batch = example_batch(schema, 64)  # the two histories of a row differ in length
    losses = [trainer.step(batch).item() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.1


def test_one_encoder_in_two_units_counts_once() -> None:
    item = ctr.Categorical("item", num_embeddings=9)
    names = ("clicks", "purchases")
    features = [item, *(ctr.Sequence(name, vocabulary="item", num_embeddings=9) for name in names)]
    din = ctr.embeddings.DIN(4, hidden=(8,))
    units = [ctr.embeddings.Unit(("item",), (name,), din) for name in names]
    embedding = ctr.embeddings.SequenceEmbedding(features, units=units, embedding_dim=4)
    tower = ctr.MLP(embedding.out_shape, hidden=(4,))
    model = ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))
    assert model.num_parameters()["embedding"] == 9 * 4
    assert sum(model.num_parameters().values()) == sum(p.numel() for p in model.parameters())


def test_numbers_keep_their_digits_under_bf16() -> None:
    torch.manual_seed(0)
    config = {"model": "mlp", "embedding_dim": 4, "numeric": "periodic", "sigma": 5.0, "hidden": (8,)}
    model = build(config, SCHEMA).eval()
    batch = example_batch(SCHEMA, 64)
    expected = model.embedding(batch)
    seen: list[torch.Tensor] = []
    model.tower.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch)
    assert torch.equal(seen[0], expected)
    assert logits.dtype == torch.float32


def test_export_of_stacked_tables_leaves_nothing_behind() -> None:
    schema = ctr.Schema(tuple(ctr.Categorical(name, num_embeddings=9) for name in "ab"), ("y",))
    model = build({"model": "mlp", "embedding_dim": 4, "hidden": (4,), "stacked": 1}, schema).eval()
    batch = example_batch(schema, 5)
    expected = model(batch)
    table._shift.cache_clear()
    torch.export.export(FromIds(model, schema), (batch.sparse.values(), batch.labels))
    again = model(batch)
    assert type(again) is torch.Tensor
    assert torch.equal(again, expected)


class FromIds(nn.Module):
    """A model of plain tensors: torch.export knows nothing of batches."""

    def __init__(self, model: ctr.Model, schema: ctr.Schema) -> None:
        super().__init__()
        self.model = model
        self.names = [feature.name for feature in schema.sparse]

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        size = labels.shape[0]
        sparse = KeyedJaggedTensor.from_lengths_sync(self.names, ids, torch.ones_like(ids))
        logits: torch.Tensor = self.model(ctr.Batch(sparse, torch.zeros(size, 0), labels, torch.ones(size)))
        return logits


def test_a_history_needs_a_target() -> None:
    features = (ctr.Categorical("item", num_embeddings=5), ctr.Sequence("clicks", num_embeddings=7))
    with pytest.raises(ValueError, match="'clicks' shares its vocabulary with no categorical feature"):
        build({"model": "mlp", "sequence": "din"}, ctr.Schema(features, ("y",)))
    with pytest.raises(ValueError, match="the schema has none"):
        build({"model": "mlp", "sequence": "din"}, ctr.Schema(features[:1], ("y",)))
