"""OptEmbed: derivatives and draws by their formulas, what it finds on planted data, and the evolution by itself."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

import ctrlib as ctr
from ctrlib import models
from ctrlib.embeddings.narrow import NarrowTable, NarrowTables
from ctrlib.schema import NUM_RESERVED_IDS, PADDING_ID
from ctrlib.search import optembed
from ctrlib.search.bytes import bytes_of
from ctrlib.search.evolution import Evolution, Genes, evolve
from ctrlib.search.gates import prune
from ctrlib.search.optembed import OptEmbed, RowGates, UnitStep, make_supernet
from ctrlib.search.plan import materialise
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.exact import ExactEngine

QUIET = Console(quiet=True)


def write(folder: Path, ids: np.ndarray, logits: np.ndarray, *, values: int) -> Path:
    """A prepared folder of fields f0, f1, ... with `values` values each, of which train may lack some."""
    rng = np.random.default_rng(1)
    columns = {f"f{n}": pa.array(NUM_RESERVED_IDS + ids[:, n], "int32") for n in range(ids.shape[1])}
    columns["click"] = pa.array(rng.random(len(ids)) < 1 / (1 + np.exp(-logits))).cast("int8").cast("float32")
    table = pa.table(columns)
    cuts = [0, len(ids) * 7 // 10, len(ids) * 17 // 20, len(ids)]
    for split, start, stop in zip(("train", "valid", "test"), cuts, cuts[1:]):
        (folder / split).mkdir(parents=True)
        pq.write_table(table.slice(start, stop - start), folder / split / "0.parquet")
    features = tuple(ctr.Categorical(f"f{n}", num_embeddings=values + NUM_RESERVED_IDS) for n in range(ids.shape[1]))
    ctr.Schema(features, ("click",)).save(folder / "schema.json")
    return folder


def loaders(data: Path, batch_size: int = 500) -> tuple[ctr.Loader, ctr.Loader]:
    return (
        ctr.Loader(data, "train", batch_size=batch_size, shuffle=True, workers=0),
        ctr.Loader(data, "valid", batch_size=8192, workers=0),
    )


def build(schema: ctr.Schema, *, dim: int, std: float = 0.1, tower: str = "fm", seed: int = 0) -> ctr.Model:
    torch.manual_seed(seed)
    model = models.build({"model": tower, "embedding_dim": dim, "stacked": 1}, schema)
    for weight in model.embedding.parameters():
        torch.nn.init.normal_(weight, std=std)
    return model


def test_the_step_has_the_long_tail_derivative() -> None:
    x = torch.tensor([-2, -1, -0.5, -0.4, -0.2, 0, 0.2, 0.4, 1, 1.01], requires_grad=True)
    step = UnitStep.apply(x)
    step.sum().backward()
    assert step.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([0, 0.4, 0.4, 0.4, 1.2, 2, 1.2, 0.4, 0.4, 0], abs=1e-6)


def test_gradients_are_the_formulas() -> None:
    """dL/dE_v = m_v g + s' <g, E_v> sign(E_v), so that masked rows can come back; dL/dt = -sum_v s' <g, E_v>."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(9, 3, generator=generator) * 0.2)
    gates = RowGates({"item": weight}, learning_rate=0.7)
    threshold = 0.45
    gates.thresholds.data.fill_(threshold)
    g = torch.randn(9, 3, generator=generator)
    (gates("item")[:, None] * weight * g).sum().backward()
    rows = torch.arange(9) >= NUM_RESERVED_IDS
    norms = weight.detach().abs().sum(1)
    x = (norms - threshold).abs()
    slope = torch.where(x <= 0.4, 2 - 4 * x, torch.where(x <= 1, 0.4, 0.0)) * rows
    m = (norms > threshold) | ~rows
    inner = (g * weight.detach()).sum(1)
    wanted = m[:, None] * g + (slope * inner)[:, None] * weight.detach().sign()
    torch.testing.assert_close(weight.grad, wanted)
    revived = rows & ~m & (slope > 0)
    assert revived.any() and weight.grad is not None and weight.grad[revived].abs().min() > 0
    # The step of plain SGD is taken at once.
    torch.testing.assert_close(gates.thresholds, torch.tensor([threshold]) + 0.7 * (slope * inner).sum())
    assert gates.thresholds.grad is None
    gates.push().backward()
    after = threshold + 0.7 * (slope * inner).sum()
    torch.testing.assert_close(gates.thresholds, (after + 0.7 * torch.exp(-after)).view(1))


def test_widths_are_drawn_evenly_and_apart() -> None:
    """Of each sample and field, 1 to D alike, fields independent; the features of a table together; none in scoring."""
    schema = example_schema()
    model = build(schema, dim=6, std=1.0)
    _, masked, _ = make_supernet(model, schema, OptEmbed())
    batch = example_batch(schema, 6000)
    torch.manual_seed(5)
    pooled = masked.train()(batch.sparse)
    full = masked.lookup(batch.sparse)
    drawn = {}
    for key in pooled.keys():  # noqa: SIM118
        shown = pooled[key].ne(0)
        assert torch.equal(pooled[key], full[key] * shown) and torch.equal(shown.long().cummin(1).values, shown.long())
        drawn[key] = shown.sum(1)
    bags = batch.sparse["history"].lengths() > 0
    counts = torch.bincount(drawn["user"], minlength=7)[1:].double()
    assert ((counts - 1000).square() / 1000).sum() < 25.7  # chi^2 of 5, at 1e-4
    joint = torch.bincount((drawn["user"] - 1) * 6 + drawn["item"] - 1, minlength=36).double()
    assert ((joint - 6000 / 36).square() / (6000 / 36)).sum() < 78  # chi^2 of 35, at 1e-4
    assert torch.equal(drawn["item"][bags], drawn["history"][bags])  # one table, one width
    masked.whole = 0.5
    pooled = masked(batch.sparse)
    whole = torch.stack([pooled[key].ne(0).sum(1) == 6 for key in ("user", "item")])
    assert abs(whole.all(0).double().mean() - (1 / 2 + 1 / 2 / 36)) < 0.026  # 4 sigma
    assert abs(whole.sum(0).eq(1).double().mean() - 1 / 2 * 10 / 36) < 0.018
    masked.eval()
    masked.genes = (2,) * len(masked.genes)
    once, again = masked(batch.sparse), masked(batch.sparse)
    assert torch.equal(once.values(), again.values())
    assert torch.equal(once["user"], full["user"] * torch.tensor([1.0, 1, 0, 0, 0, 0]))


@pytest.fixture(scope="module")
def rows_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 fields of 60 values: 20 that say something, 20 as frequent that do not, 20 that train lacks."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 40, (20_000, 4))
    vectors = np.zeros((4, 60, 3))
    vectors[:, :20] = rng.normal(size=(4, 20, 3))
    vectors[:, :20] *= 1.2 / np.linalg.norm(vectors[:, :20], axis=2, keepdims=True)
    chosen = vectors[np.arange(4), ids]
    logits = 0.75 * ((chosen.sum(1) ** 2).sum(1) - (chosen**2).sum((1, 2)))
    return write(tmp_path_factory.mktemp("rows") / "data", ids, logits, values=60)


def shares_kept(data: Path, settings: OptEmbed, *, num_epochs: int) -> list[float]:
    """Of the informative, the noise and the unseen values, by a factorization machine without first-order weights."""
    train, _ = loaders(data)
    model = build(train.schema, dim=4, std=0.2)
    model.wide = None
    supernet, _, gates = make_supernet(model, train.schema, settings)
    engine = ExactEngine(
        supernet, learning_rate=settings.learning_rate, embedding_l2=settings.embedding_l2, max_grad_norm=None
    )
    for _ in range(num_epochs):
        supernet.train()
        for _ in engine.train(train):
            pass
    kept = [gates(name).detach()[NUM_RESERVED_IDS:] for name in gates.vocabularies]
    return [torch.cat([part[20 * kind : 20 * kind + 20] for part in kept]).mean().item() for kind in range(3)]


def test_rows_that_the_data_do_not_need_go(rows_data: Path) -> None:
    """Unseen ones by decay alone, noise by thresholds that rise; without decay of untouched rows all would stay."""
    slow = {"alpha": 0.03, "threshold_learning_rate": 0.01, "learning_rate": 0.01}
    informative, _, unseen = shares_kept(rows_data, OptEmbed(embedding_l2=1e-3, **slow), num_epochs=8)
    assert (informative, unseen) == (1, 0)
    assert shares_kept(rows_data, OptEmbed(embedding_l2=0.0, **slow), num_epochs=8) == [1, 1, 1]
    fast = OptEmbed(alpha=0.1, threshold_learning_rate=0.01, learning_rate=0.02, embedding_l2=1e-3)
    informative, noise, unseen = shares_kept(rows_data, fast, num_epochs=15)
    assert (informative, unseen) == (1, 0) and noise <= 0.2


@pytest.fixture(scope="module")
def widths_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of fields, f0 and f1, whose product has rank 1, and one, f2 and f3, of rank 8; both matter alike."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, (40_000, 4))
    products = []
    for place, rank in ((0, 1), (2, 8)):
        first, second = rng.normal(size=(2, 20, rank))
        product = (first[ids[:, place]] * second[ids[:, place + 1]]).sum(1)
        products.append(2 * product / product.std())
    return write(tmp_path_factory.mktemp("widths") / "data", ids, sum(products), values=20)


def test_planted_widths_are_found(widths_data: Path, tmp_path: Path) -> None:
    """Under a budget the pair of rank 8 gets the columns; started again, the search ends with the same bits."""
    train, valid = loaders(widths_data)
    model = build(train.schema, dim=8, std=0.3)
    model.wide = None
    rows = 4 * 4 * 23  # bytes of a column of all four tables
    settings = OptEmbed(
        alpha=0.0,
        learning_rate=0.02,
        embedding_l2=0.0,
        epochs=6,
        generations=10,
        parents=8,
        mutations=6,
        crossovers=6,
        rows=6000,
        num_bytes=rows * 5,
        price=2e-3,
    )
    plan = optembed.search(model, train, valid, settings=settings, out=tmp_path / "search", console=QUIET)
    dims = plan.summary["dims"]
    assert min(dims["f2"], dims["f3"]) >= 6 and min(dims["f0"], dims["f1"]) <= 2
    assert plan.summary["kept"] == {f"f{n}": [20, 20] for n in range(4)}
    smaller = materialise(model, plan)
    assert bytes_of(smaller).embedding == 4 * 23 * sum(dims.values()) <= rows * 5
    assert all(str(width) in " ".join(plan.summary["words"]) for width in dims.values())
    again = optembed.search(model, train, valid, settings=settings, out=tmp_path / "search", console=QUIET)
    assert again.summary == plan.summary
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in plan.weights.items())
    narrow = replace(settings, num_bytes=rows * 3)
    plans = [
        optembed.search(model, train, valid, settings=narrow, out=tmp_path / name, console=QUIET)
        for name in ("search", "anew")
    ]
    assert plans[0].summary == plans[1].summary != plan.summary
    with pytest.raises(ValueError, match=r"of another search: seed was 0, is now 1\."):
        optembed.search(model, train, valid, settings=settings, seed=1, out=tmp_path / "search", console=QUIET)
    aucs = []
    for one in (model, smaller):
        ctr.fit(ExactEngine(one, learning_rate=0.02), train, valid, max_epochs=10, console=QUIET)
        aucs.append(ctr.evaluate(one, ctr.Loader(widths_data, "test", batch_size=8192), quick=True)["auc"])
    assert aucs[1] >= aucs[0] - 0.003


def test_the_supernet_knows_which_widths_count(widths_data: Path) -> None:
    """One training tells all: (1, 1, 8, 8) is as good as (8, 8, 8, 8), and (8, 8, 1, 1) much worse."""
    train, valid = loaders(widths_data)
    model = build(train.schema, dim=8, std=0.3)
    model.wide = None
    supernet, masked, _ = make_supernet(model, train.schema, OptEmbed(alpha=0.0))
    engine = ExactEngine(supernet, learning_rate=0.02, max_grad_norm=None)
    torch.manual_seed(0)
    for _ in range(6):
        supernet.train()
        for _ in engine.train(train):
            pass
    aucs = {}
    for genes in ((8, 8, 8, 8), (1, 1, 8, 8), (8, 8, 1, 1)):
        masked.genes = genes
        aucs[genes] = ctr.evaluate(supernet, valid, quick=True)["auc"]
    assert aucs[1, 1, 8, 8] > aucs[8, 8, 8, 8] - 0.003
    assert aucs[8, 8, 1, 1] < aucs[8, 8, 8, 8] - 0.05


@pytest.mark.parametrize("tower", ["deepfm", "finalmlp"])
def test_materialised_is_masked(tower: str) -> None:
    """On all ids, pruned ones too, in bags, means, histories, second sets of fields and first-order weights."""
    schema = example_schema()
    torch.manual_seed(0)
    options: dict[str, Any] = {"hidden": (8,)} if tower == "deepfm" else {"hidden_1": (8,), "hidden_2": (8,)}
    if tower == "finalmlp":
        options |= {"contexts": (("user",), ("item",)), "gate_hidden": (8,)}
    model = models.build({"model": tower, "embedding_dim": 8, "stacked": 2, **options}, schema)
    for weight in model.parameters():
        weight.data.normal_(generator=torch.Generator().manual_seed(weight.numel()), std=0.5)
    supernet, masked, gates = make_supernet(model, schema, OptEmbed(multiple_of=2))
    assert masked.levels == 4
    masked.genes = tuple(1 + place % 4 for place in range(len(masked.genes)))
    for place, name in enumerate(gates.vocabularies):
        gates.thresholds.data[place] = gates.weights[name].abs().sum(1).median()
    kept = {name: gates(name).detach() > 0 for name in gates.vocabularies}
    plan = prune(model, schema, kept, method="optembed", dropped_to=PADDING_ID, dims=masked.widths)
    smaller = materialise(model, plan).eval()
    batch = example_batch(schema, 500)
    with torch.no_grad():
        torch.testing.assert_close(smaller(batch), supernet.eval()(batch), rtol=1e-6, atol=1e-5)
        pruned = ~kept["item"][batch.sparse["item"].values()]
        assert 100 < int(pruned.sum()) < 400
        assert not smaller.embedding(batch)[pruned, schema.position("item")].any()


def test_padded_tables_store_what_they_show() -> None:
    """The first columns and no decoder; bags, means and dropped ids as with rows in full, and gradients too."""
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(30, 8, generator=generator)
    kept = torch.tensor([0, 1, 2, 5, 6, 11, 29])
    for pooling in ("sum", "mean"):
        common: dict[str, Any] = {"rows": 30, "kept": "some", "num_kept": 7, "dropped_to": PADDING_ID, "centred": False}
        table = NarrowTable("item", ("item", "history"), rank=3, pooling=pooling, padded=True, **common)  # type: ignore[arg-type]
        wide = NarrowTable("item", ("item", "history"), rank=8, pooling=pooling, **common)  # type: ignore[arg-type]
        assert table.num_bytes(8) == {"weights": 4 * 7 * 3, "remap": 12, "decoder": 0}
        narrow, reference = (NarrowTables([one], embedding_dim=8) for one in (table, wide))
        narrow.fill("item", full, kept=kept)
        reference.fill("item", full * (torch.arange(8) < 3), kept=kept)
        ids = example_batch(example_schema(), 60).sparse
        got, wanted = narrow(ids), reference(ids)
        assert list(got.keys()) == list(wanted.keys()) and torch.equal(got.values(), wanted.values())
        assert got.values().any()
        got.values().square().sum().backward()
        assert [name for name, weight in narrow.named_parameters() if weight.grad is not None and weight.grad.any()]
        assert not narrow.decoders and sum(weight.numel() for weight in narrow.parameters()) == 7 * 3
        again = NarrowTables(**narrow.describe())
        again.load_state_dict(narrow.state_dict())
        assert torch.equal(again(ids).values(), wanted.values())
    with pytest.raises(ValueError, match="expected centred=False with padded=True"):
        NarrowTable("item", ("item",), rows=30, rank=3, padded=True)


def analytic(seed: int, *, length: int = 12, largest: int = 16) -> Any:
    """A fitness with one best width for each field, and a little noise that belongs to the candidate."""
    rng = np.random.default_rng(seed)
    wanted, worth = rng.integers(1, largest + 1, length), rng.uniform(0.2, 1, length)

    def fitness(genes: Genes) -> float:
        noise = np.random.default_rng([seed, *genes]).normal() * 0.01
        return float(-(worth * (np.array(genes) - wanted) ** 2).sum() / largest**2 + noise)

    return fitness


def test_the_evolution_keeps_its_best_and_beats_chance() -> None:
    """What is returned was scored, is the best of all, and over 5 seeds is far better than as many random ones."""
    settings = Evolution(generations=30, parents=15, mutations=10, crossovers=10)
    assert settings.num_evaluations == 615
    differences = []
    for seed in range(5):
        fitness = analytic(seed)
        calls: list[Genes] = []

        def counted(genes: Genes, fitness: Any = fitness, calls: list[Genes] = calls) -> float:
            calls.append(genes)
            return float(fitness(genes))

        found = evolve(counted, length=12, largest=16, settings=settings, seed=seed)
        assert fitness(found.best) == found.fitness == found.scored[found.best] == max(found.scored.values())
        assert len(calls) == len(set(calls)) == len(found.scored) <= 615
        assert all(found.scored[genes] == fitness(genes) for genes in calls)
        assert found.curve == sorted(found.curve) and found.curve[0] == max(fitness(g) for g in calls[:15])
        assert len(found.curve) == 31 and found.curve[-1] == found.fitness
        assert {gene for genes in calls for gene in genes} == set(range(1, 17))
        chance = evolve(
            fitness, length=12, largest=16, settings=Evolution(generations=0, parents=len(calls)), seed=seed
        )
        assert len(chance.scored) == len(calls)
        differences.append(found.fitness - chance.fitness)
    error = np.std(differences, ddof=1) / 5**0.5
    assert np.mean(differences) > 3 * error and min(differences) > 0


def test_a_budget_is_never_exceeded() -> None:
    """And is used up where more is better; a budget below the smallest candidate is refused."""
    seen = []

    def fitness(genes: Genes) -> float:
        seen.append(genes)
        return float(sum(gene * weight for gene, weight in zip(genes, (5, 4, 3, 2, 1))))

    sizes = (7, 1, 3, 2, 5)

    def size(genes: Genes) -> int:
        return sum(gene * weight for gene, weight in zip(genes, sizes))

    found = evolve(fitness, length=5, largest=8, size=size, budget=60, first=[(8,) * 5], seed=1)
    assert max(map(size, seen)) <= 60 and size(found.best) > 55
    assert found.best[1] == 8  # most for its size
    with pytest.raises(ValueError, match="the budget of 17 is below the smallest size, 18"):
        evolve(fitness, length=5, largest=8, size=size, budget=17)
    with pytest.raises(ValueError, match=r"first candidate \(9, 1, 1, 1, 1\)"):
        evolve(fitness, length=5, largest=8, first=[(9, 1, 1, 1, 1)])
    # Of a small space no more is scored than there is.
    assert len(evolve(lambda genes: 0.0, length=1, largest=3).scored) == 3


def test_settings_are_checked() -> None:
    for wrong, complaint in (
        ({"alpha": -1.0}, "OptEmbed: alpha must be 0 or more, got -1.0"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"whole": 1.5}, "whole must be 1 or less, got 1.5"),
        ({"mutation_rate": 2.0}, "mutation_rate must be between 0 and 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            OptEmbed(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embedding_dim=6 is no multiple of multiple_of=4"):
        make_supernet(build(example_schema(), dim=6), example_schema(), OptEmbed(multiple_of=4))


def test_what_inherits_the_supernet_is_its_best_candidate(rows_data: Path) -> None:
    """Retraining starts from all of its weights: on validation the small model is what the evolution scored."""
    train, valid = loaders(rows_data)
    model = build(train.schema, dim=4)
    settings = OptEmbed(
        alpha=0.1,
        threshold_learning_rate=0.01,
        learning_rate=0.02,
        epochs=3,
        generations=1,
        price=0.0,
        num_bytes=bytes_of(model).embedding * 6 // 10,
        inherit=True,
    )
    plan = optembed.search(model, train, valid, settings=settings, console=QUIET)
    assert min(plan.summary["dims"].values()) < 4
    smaller = materialise(model, plan)
    assert ctr.evaluate(smaller, valid, quick=True)["auc"] == pytest.approx(plan.summary["fitness"], abs=1e-9)
    fresh = materialise(
        model, optembed.search(model, train, valid, settings=replace(settings, inherit=False), console=QUIET)
    )
    assert ctr.evaluate(fresh, valid, quick=True)["auc"] < plan.summary["fitness"] - 0.1


def test_widths_alone_can_be_searched(rows_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row stays, whatever pushes the thresholds; the supernet stops after two epochs that are no better."""
    monkeypatch.setattr(optembed, "evaluate", lambda *_, **__: {"auc": 0.5})
    said = io.StringIO()
    settings = OptEmbed(
        alpha=10.0, threshold_learning_rate=1.0, prune_rows=False, epochs=9, patience=2, generations=1, price=0.1
    )
    train, valid = loaders(rows_data)
    model = build(train.schema, dim=4)
    plan = optembed.search(model, train, valid, settings=settings, console=Console(file=said))
    assert all(kept == every for kept, every in plan.summary["kept"].values())
    assert said.getvalue().count("search epoch") == 3  # the first is better than none
    assert min(plan.summary["dims"].values()) < 4 == model.embedding.out_shape[1]  # the price decides
