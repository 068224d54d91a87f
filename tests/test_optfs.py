"""OptFS: the schedule and the gates by their formulas, what it prunes on planted data, and that pruned means gone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from torch import Tensor

import ctrlib as ctr
from ctrlib import joined, models
from ctrlib.embeddings.table import table_name
from ctrlib.losses import collect_auxiliary
from ctrlib.schema import NUM_RESERVED_IDS, OOV_ID
from ctrlib.search import optfs
from ctrlib.search.bytes import bytes_of
from ctrlib.search.gates import GatedTables, start_rows
from ctrlib.search.optfs import OptFS, ValueGates, gated, plan_of, temperature_at
from ctrlib.search.plan import Plan, materialise
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.exact import ExactEngine

QUIET = Console(quiet=True)
INFORMATIVE, NOISE = 4, 4
# For 1,280 values and 36 steps an epoch; lambda is of each value, and of few steps needs more.
SETTINGS = OptFS(penalty=6e-4, temperature=5000.0, epochs=5, rewind=1, learning_rate=5e-3)


def write_planted(
    folder: Path, *, rows: int = 18_000, values: int = 20, noise_values: int = 300, seed: int = 0
) -> Path:
    """Fields i0, i1, ... each of whose values moves the logit, and n0, n1, ... which do nothing."""
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(INFORMATIVE, values)) * 0.9
    effects += np.sign(effects) * 0.3  # every value says something
    informative = rng.integers(0, values, (rows, INFORMATIVE))
    logits = effects[np.arange(INFORMATIVE), informative].sum(1)
    columns = {f"i{field}": informative[:, field] for field in range(INFORMATIVE)}
    columns |= {f"n{field}": rng.integers(0, noise_values, rows) for field in range(NOISE)}
    frame = pl.DataFrame({**columns, "label": (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)})
    cuts = [0, rows * 2 // 3, rows * 5 // 6, rows]
    splits = {name: frame[a:b] for name, a, b in zip(("train", "valid", "test"), cuts, cuts[1:])}
    ctr.prepare(splits, folder, features=[ctr.Categorical(name) for name in columns], labels="label", log=None)
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("optfs") / "data")


def build(schema: ctr.Schema, *, seed: int = 0, tower: str = "fm", **options: Any) -> ctr.Model:
    torch.manual_seed(seed)
    return models.build({"model": tower, "embedding_dim": 4, **options}, schema)


def loader(data: Path, split: str = "train", *, batch_size: int = 333) -> ctr.Loader:
    return ctr.Loader(data, split, batch_size=batch_size, shuffle=split == "train", workers=0)


def share(plan: Plan, kind: str) -> float:
    """Of the values of the informative (i) or the noise (n) fields, how many are kept."""
    kept, every = zip(*(counts for name, counts in plan.summary["kept"].items() if name[0] == kind))
    return sum(kept) / sum(every)


def test_the_temperature_rises_as_in_the_paper() -> None:
    settings = OptFS(temperature=200.0, epochs=15)
    wanted = [1, 1.46, 2.1317, 3.1123, 4.544, 6.6343, 9.6863, 14.1421, 20.6478, 30.1463, 44.0142]
    wanted += [64.2617, 93.8235, 136.9843, 200]
    assert [temperature_at(epoch, settings) for epoch in range(15)] == pytest.approx(wanted, abs=5e-4)


@pytest.mark.parametrize("tower", ["fm", "deepfm", "dcn", "ipnn"])
@pytest.mark.parametrize("stacked", [0, 2])
def test_nothing_is_changed_at_first(tower: str, stacked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits with gates are those of the backbone: bit by bit by plain layers, else up to the order of sums."""
    schema = example_schema()
    model = build(schema, tower=tower, stacked=stacked)
    batch = example_batch(schema, 50)
    searched, gates = gated(model, schema, OptFS())
    torch.testing.assert_close(searched(batch), model(batch))
    monkeypatch.setattr(joined, "ENABLED", False)
    assert torch.equal(searched(batch), model(batch))
    with torch.no_grad():
        next(iter(gates.logits.values())).sub_(0.3)
    assert not torch.equal(searched(batch), model(batch))


def test_gates_and_penalty_are_the_formulas() -> None:
    gates = ValueGates({"item": 6})
    gates.logits["table_item"].data = torch.tensor([-0.2, 0.0, 0.3])
    gates.temperature = 7.0

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    soft = [sigmoid(7 * g) for g in (-0.2, 0.0, 0.3)]
    assert gates("item").tolist() == pytest.approx([1, 1, 1, *(s * 1.606531 for s in soft)], rel=1e-6)
    assert gates.total().item() == pytest.approx(sum(soft), rel=1e-6)
    gates.hard = True
    assert gates("item").tolist() == pytest.approx([1, 1, 1, 0, 0, 1.606531], rel=1e-6)
    assert not gates("item").requires_grad
    schema = example_schema()
    model, own = gated(build(schema), schema, OptFS(penalty=0.01))
    for training, wanted in ((True, [0.01 * own.total().item()]), (False, [])):
        with collect_auxiliary() as losses:
            model.train(training)(example_batch(schema, 4))
        assert [loss.item() for loss in losses] == pytest.approx(wanted)


def test_a_gate_of_an_unseen_value_drifts_as_the_recursion_says() -> None:
    """Only lambda moves it, by a dense Adam with eps 1e-8: with eps 0 it would fall as fast as Adam goes. The published
    setting: .210 after the first epoch, -.204 after the second."""

    def drift(num_epochs: int, steps: int, *, penalty: float, gamma: float, total: int, eps: float) -> list[float]:
        gate, first, second, after = 0.5, 0.0, 0.0, []
        for step in range(num_epochs * steps):
            tau = gamma ** ((step // steps) / (total - 1))
            s = 1 / (1 + math.exp(-tau * gate))
            gradient = penalty * tau * s * (1 - s)
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            unbiased = math.sqrt(second / (1 - 0.999 ** (step + 1)))
            gate -= 3e-4 * first / (1 - 0.9 ** (step + 1)) / (unbiased + eps)
            if (step + 1) % steps == 0:
                after.append(gate)
        return after

    published = drift(2, 8953, penalty=5e-9, gamma=200.0, total=15, eps=1e-8)
    assert published == pytest.approx([0.210, -0.204], abs=5e-4)
    # The engine's own steps, on a value that no batch has, beside L2 and data.
    schema = example_schema()
    settings = OptFS(penalty=5e-9, temperature=200.0, epochs=15, learning_rate=3e-4)
    model, gates = gated(build(schema), schema, settings)
    engine = ExactEngine(model, learning_rate=3e-4, embedding_l2=0.1, max_grad_norm=None)
    batch = example_batch(schema, 20)
    seen = torch.cat([batch.sparse[name].values() for name in ("item", "history")])
    rows = gates.rows["item"]
    unseen = next(v for v in range(NUM_RESERVED_IDS, rows) if v not in seen.tolist()) - NUM_RESERVED_IDS
    for epoch in range(2):
        gates.temperature = temperature_at(epoch, settings)
        for _ in range(40):
            engine.step(batch)
        wanted = drift(epoch + 1, 40, penalty=5e-9, gamma=200.0, total=15, eps=1e-8)[-1]
        assert gates.logits["table_item"][unseen].item() == pytest.approx(wanted, abs=2e-6)
    without_eps = drift(2, 40, penalty=5e-9, gamma=200.0, total=15, eps=0.0)[-1]
    assert abs(without_eps - gates.logits["table_item"][unseen].item()) > 5e-3


def test_noise_goes_and_information_stays(planted: Path) -> None:
    """And the retrained model is as good; what remains is what the plan says, to the byte."""
    schema = ctr.Schema.load(planted)
    model, train, valid = build(schema), loader(planted), loader(planted, "valid")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = optfs.search(model, train, valid, settings=SETTINGS, console=QUIET)
    assert share(plan, "i") >= 0.98
    assert share(plan, "n") <= 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    smaller = materialise(model, plan)
    kept = [some for some, _ in plan.summary["kept"].values()]
    tables = {path: part["tables"] for path, part in plan.replaced.items()}
    remap = {path: sum(12 * -(-t["rows"] // 64) for t in some if t["kept"] == "some") for path, some in tables.items()}
    size, rows = bytes_of(smaller), sum(kept) + NUM_RESERVED_IDS * len(kept)
    assert size.weights == 4 * 4 * rows and size.remap == remap["embedding.tables"] > 0
    assert size.wide == 4 * rows + remap["wide.tables"]
    assert size.total == sum(t.numel() * t.element_size() for t in (*smaller.parameters(), *smaller.buffers()))
    aucs = []
    for one in (build(schema), smaller):
        engine = ExactEngine(one, learning_rate=5e-3)
        ctr.fit(engine, train, valid, max_epochs=12, console=QUIET)
        aucs.append(ctr.evaluate(one, loader(planted, "test"), quick=True)["auc"])
    assert aucs[1] >= aucs[0] - 0.003


def test_without_penalty_nothing_goes(planted: Path) -> None:
    """So that it is lambda which prunes, and not the schedule."""
    train = loader(planted)
    settings = OptFS(penalty=0.0, epochs=3, learning_rate=5e-3)
    plan = optfs.search(build(train.schema), train, loader(planted, "valid"), settings=settings, console=QUIET)
    assert share(plan, "n") > 0.9 and share(plan, "i") == 1


def test_it_says_so_if_no_gate_can_close(planted: Path, capsys: Any) -> None:
    """Of a learning rate that is too small for so few steps."""
    train = loader(planted, batch_size=4000)
    settings = OptFS(penalty=1.0, epochs=2, learning_rate=1e-2)
    plan = optfs.search(build(train.schema), train, train, settings=settings, console=Console(width=300))
    assert "none will close: raise learning_rate or epochs" in capsys.readouterr().out
    assert share(plan, "n") == 1


@pytest.mark.parametrize("tower", ["deepfm", "ipnn"])
def test_materialised_is_masked(tower: str) -> None:
    """On all ids, pruned and reserved ones too, in bags, means, histories and first-order weights."""
    schema = example_schema()
    model = build(schema, tower=tower, hidden=(8,), stacked=2)
    for weight in model.parameters():
        weight.data.normal_(generator=torch.Generator().manual_seed(weight.numel()))
    searched, gates = gated(model, schema, OptFS())
    generator = torch.Generator().manual_seed(1)
    for logits in gates.logits.values():
        logits.data = torch.randn(logits.shape, generator=generator)
    gates.hard = True
    smaller = materialise(model, plan_of(searched, gates, schema)).eval()
    assert not [name for name, _ in smaller.named_parameters() if "gates" in name]
    batch = example_batch(schema, 400)
    with torch.no_grad():
        torch.testing.assert_close(smaller(batch), searched.eval()(batch), rtol=1e-6, atol=1e-6)
        pruned = [v + NUM_RESERVED_IDS for v in (gates.logits["table_item"] <= 0).nonzero()[:, 0].tolist()]
        assert 5 < len(pruned) < 25
        field = schema.position("item")
        every = set()
        for start in range(0, gates.rows["item"], 400):
            ids = torch.arange(start, start + 400) % gates.rows["item"]
            probe = with_ids(batch, "item", ids)
            vectors = smaller.embedding(probe)[:, field]
            zero = {int(i) for i, v in zip(ids, vectors) if not v.any()}
            assert zero >= {p for p in pruned if p in ids.tolist()} and OOV_ID not in zero
            every |= zero
        assert every <= {*pruned, 0}


def with_ids(batch: ctr.Batch, name: str, ids: Tensor) -> ctr.Batch:
    """The batch with other ids in a field of one id a row."""
    sparse = batch.sparse
    parts = {key: sparse[key].values() for key in sparse.keys()}  # noqa: SIM118
    parts[name] = ids
    values = torch.cat([parts[key] for key in sparse.keys()])  # noqa: SIM118
    kjt = type(sparse)(keys=sparse.keys(), values=values, lengths=sparse.lengths())
    return ctr.Batch(kjt, batch.dense, batch.labels, batch.weights)


def test_the_weights_are_those_of_the_rewound_epoch(planted: Path) -> None:
    """Kept rows, times the constant of an open gate, and the network, as they were at the start of epoch `rewind`."""
    schema = ctr.Schema.load(planted)
    model, train = build(schema, tower="deepfm", hidden=(8,)), loader(planted, batch_size=1500)
    settings = OptFS(penalty=1e-3, epochs=3, rewind=1, learning_rate=5e-3)
    plan = optfs.search(model, train, train, settings=settings, seed=3, console=QUIET)
    torch.manual_seed(3)
    twin, gates = gated(model, schema, settings)
    start_rows(twin.embedding.tables.tables.parameters())  # type: ignore[union-attr]
    train.set_epoch(0)
    engine = ExactEngine(twin, learning_rate=5e-3, max_grad_norm=None)
    for _ in engine.train(train):
        pass
    for name, tensor in twin.tower.state_dict().items():
        assert torch.equal(plan.weights[f"tower.{name}"], tensor)
    smaller = materialise(model, plan)
    for name, tensor in twin.head.state_dict().items():
        assert torch.equal(smaller.head.state_dict()[name], tensor)
    before = twin.embedding.tables
    assert isinstance(before, GatedTables) and gates.temperature == 1.0
    rows = before.tables.embedding_bags[table_name("i0")].weight.detach()
    assert plan.summary["kept"]["i0"] == [20, 20]
    torch.testing.assert_close(
        plan.weights["embedding.tables.tables.embedding_bags.table_table_i0.weight"][3:], rows[3:] * 1.606531
    )


def test_or_the_model_s_own(planted: Path) -> None:
    """Without `rewind`, rows and network are those that the model had before."""
    schema = ctr.Schema.load(planted)
    model, train = build(schema, tower="deepfm", hidden=(8,)), loader(planted)
    settings = dataclasses.replace(SETTINGS, rewind=None)
    plan = optfs.search(model, train, train, settings=settings, console=QUIET)
    smaller, batch = materialise(model, plan), next(iter(train))
    kept = smaller.embedding(batch)
    is_open = kept.any(dim=2, keepdim=True)
    assert 0.4 < is_open.float().mean() < 0.6
    assert torch.equal(kept, model.embedding(batch) * is_open)
    assert all(torch.equal(a, b) for a, b in zip(smaller.tower.parameters(), model.tower.parameters(), strict=True))


def test_gates_have_no_l2(planted: Path) -> None:
    schema = ctr.Schema.load(planted)
    model, gates = gated(build(schema), schema, OptFS(penalty=0.0))
    engine = ExactEngine(model, embedding_l2=10.0)
    unseen = {name: logits.detach().clone() for name, logits in gates.logits.items()}
    for logits in gates.logits.values():
        logits.register_hook(torch.zeros_like)  # no data either
    table = model.embedding.tables.tables.embedding_bags[table_name("n0")].weight  # type: ignore[union-attr]
    norm = table.detach().norm()
    for _, batch in zip(range(3), loader(planted)):
        engine.step(batch)
    assert all(torch.equal(unseen[name], logits) for name, logits in gates.logits.items())
    assert table.detach().norm() != norm


def test_settings_are_checked() -> None:
    for wrong, complaint in (
        ({"penalty": -1.0}, "penalty must be 0 or more, got -1.0"),
        ({"temperature": 0.5}, "temperature must be 1 or more"),
        ({"epochs": 1}, "epochs must be 2 or more"),
        ({"rewind": 5}, "rewind=5 must be one of the epochs 0 to 4"),
    ):
        with pytest.raises(ValueError, match=complaint):
            OptFS(**wrong)  # type: ignore[arg-type]
