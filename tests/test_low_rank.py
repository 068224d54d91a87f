"""Low-rank compression against what it claims: optimal for the data, exact where it says so, bytes as counted."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import ctrlib as ctr
from ctrlib import models
from ctrlib.batch import Batch
from ctrlib.distributed import rank
from ctrlib.embeddings.narrow import NarrowTable, NarrowTables
from ctrlib.inputs import Inputs
from ctrlib.layers import LowRankLinear
from ctrlib.losses import binary_cross_entropy
from ctrlib.schema import Categorical, Numeric, Schema
from ctrlib.search.counting import count_reads
from ctrlib.search.folding import fold_decoders
from ctrlib.search.mimicking import (
    Moments,
    apply_low_rank,
    factorise,
    full_table,
    linear_layers,
    low_rank,
    low_rank_layers,
    low_rank_tables,
    output_statistics,
    spectrum,
    weighted_pca,
)
from ctrlib.search.ranks import Goal, allocate_ranks, rank_for_energy
from ctrlib.testing import example_batch, example_schema

SCHEMA = example_schema()
# One id a row, a vocabulary shared by two features, and numbers in between.
SINGLE = Schema(
    (
        Categorical("user", num_embeddings=60),
        Numeric("price", parameters={}),
        Categorical("item", num_embeddings=90),
        Categorical("last", vocabulary="item", num_embeddings=90),
        Numeric("age", parameters={}),
    ),
    ("click",),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skewed(rows: int = 200, dim: int = 8) -> tuple[Tensor, Tensor]:
    """A table of which frequent rows lie elsewhere than rare ones, and its counts."""
    counts = (10_000 / torch.arange(1, rows + 1) ** 1.5).long()
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator())).Q
    often = torch.randn(rows, dim, generator=generator(1)) * (2.0 ** -torch.arange(dim)) @ axes
    rare = 2 * torch.randn(rows, dim, generator=generator(2)) * (2.0 ** -torch.arange(dim)) @ axes.flip(0)
    table = torch.where(torch.arange(rows).unsqueeze(1) < 20, often, rare) + 3 * torch.randn(
        dim, generator=generator(3)
    )
    return table, counts


def projected(rows: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    return (rows - mean) @ basis.T @ basis + mean


def batches_of(schema: Schema, number: int = 4, size: int = 64) -> list[Batch]:
    return [example_batch(schema, size, seed=seed) for seed in range(number)]


def trained_like(model: ctr.Model, seed: int = 0) -> ctr.Model:
    """Weights of the size that training gives them, so that every part of the model matters."""
    for name, weight in model.named_parameters():
        if "tables" in name or "vectors" in name:
            weight.data = 0.5 * torch.randn(weight.shape, generator=generator(seed))
    return model


def plant(model: ctr.Model, rank: int) -> None:
    """Make every vocabulary's rows a mean and `rank` directions of its own."""
    for number, weight in enumerate(model.embedding.tables.parameters()):
        dim = weight.shape[1]
        axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator(number))).Q[:rank]
        rows = torch.randn(len(weight), rank, generator=generator(10 + number)) @ axes
        weight.data = rows + torch.randn(dim, generator=generator(20 + number))


# Tables: weighted, centred PCA.


def test_pca_is_optimal_for_the_look_ups() -> None:
    table, counts = skewed()
    p = counts.double() / counts.sum()
    table = table.double()
    mean, basis, energies = weighted_pca(table, counts, smooth=0.0)

    def error(approximation: Tensor) -> float:
        return float(p @ (table - approximation).square().sum(1))

    right = torch.linalg.svd(table, full_matrices=False).Vh
    plain_mean = table.mean(0)
    plain = torch.linalg.svd(table - plain_mean, full_matrices=False).Vh
    for r in range(1, 8):
        own = error(projected(table, mean, basis[:r]))
        assert own == pytest.approx(float(energies[r:].sum()), rel=1e-8)
        assert own < 0.9 * error(table @ right[:r].T @ right[:r])
        assert own < 0.9 * error(projected(table, plain_mean, plain[:r]))
    torch.testing.assert_close(projected(table, mean, basis), table, rtol=0, atol=1e-12)


def test_histogram_path_is_the_data_pass() -> None:
    batches = batches_of(SINGLE)
    counts = count_reads(SINGLE, batches)
    embedding = trained_like(models.mlp(Inputs(SINGLE, embedding_dim=8), hidden=(4,))).embedding
    moments = Moments(8)
    for batch in batches:
        fields = embedding(batch)
        for name in ("item", "last"):
            moments.add(fields[:, SINGLE.position(name)].detach())
    assert moments.count == int(counts["item"].sum())
    table = full_table(embedding, "last", 90)
    mean, basis, energies = weighted_pca(table, counts["item"], smooth=0.0)
    torch.testing.assert_close(mean, moments.mean, rtol=0, atol=1e-12)
    covariance = moments.scatter / moments.count
    torch.testing.assert_close(basis.T @ torch.diag(energies) @ basis, covariance, rtol=0, atol=1e-12)


def test_rows_never_seen_are_smoothed() -> None:
    table = torch.zeros(6, 2)
    table[:4, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    table[4:, 1] = torch.tensor([50.0, -50.0])  # never looked up
    counts = torch.tensor([100, 100, 100, 100, 0, 0])
    assert weighted_pca(table, counts, smooth=0.0)[1][0].abs().tolist() == [1.0, 0.0]
    assert weighted_pca(table, counts, smooth=1.0)[1][0].abs().tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="no row has a weight"):
        weighted_pca(table, torch.zeros(6), smooth=0.0)


def test_without_a_mean_directions_go_through_zero() -> None:
    table, counts = skewed()
    mean, basis, energies = weighted_pca(table, counts, smooth=0.0, centred=False)
    assert not mean.any()
    p, rows = counts.double() / counts.sum(), table.double()
    error = p @ (rows - rows @ basis[:2].T @ basis[:2]).square().sum(1)
    assert float(error) == pytest.approx(float(energies[2:].sum()), rel=1e-8)


def test_two_processes_with_half_of_the_rows_each_find_the_same() -> None:
    table, counts = skewed(rows=201)
    mean, basis, energies = weighted_pca(table, counts)

    def of_shard() -> Any:
        rows = slice(0, 101) if rank() == 0 else slice(101, 201)
        return weighted_pca(table[rows], counts[rows], is_shard=True)

    for other_mean, other_basis, other_energies in run_ranks(2, of_shard):
        torch.testing.assert_close(other_mean, mean, rtol=0, atol=1e-6)
        torch.testing.assert_close(other_energies, energies, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(
            projected(table.double(), other_mean, other_basis[:3]), projected(table.double(), mean, basis[:3]),
            rtol=0, atol=1e-6,
        )  # fmt: skip


def test_a_large_table_is_taken_in_chunks() -> None:
    table = torch.randn(150_001, 2, generator=generator()) @ torch.tensor([[3.0, 1.0], [0.0, 0.5]]) + 7
    counts = torch.randint(0, 5, (150_001,), generator=generator())
    mean, basis, energies = weighted_pca(table, counts, smooth=0.5)
    p = (counts.double() + 0.5) / (counts + 0.5).double().sum()
    centred = table.double() - p @ table.double()
    covariance = (centred * p.unsqueeze(1)).T @ centred
    torch.testing.assert_close(mean, p @ table.double())
    torch.testing.assert_close(basis.T @ torch.diag(energies) @ basis, covariance)


def test_histogram_counts_look_ups() -> None:
    batches = batches_of(SCHEMA)
    batches[1].weights[40:] = 0  # rows that only pad
    counts = count_reads(SCHEMA, batches)
    expected = {
        name: torch.zeros(rows, dtype=torch.int64) for name, rows in (("user", 20), ("item", 30), ("genres", 10))
    }
    for batch, (name, vocabulary) in itertools.product(
        batches, (("user", "user"), ("item", "item"), ("history", "item"), ("genres", "genres"))
    ):
        for weight, ids in zip(batch.weights, batch.sparse[name].to_dense()):
            for one in ids.tolist() if weight else ():
                expected[vocabulary][one] += 1
    assert counts.keys() == expected.keys()
    assert all(torch.equal(counts[name], expected[name]) for name in expected)

    def of_rank() -> Any:
        return count_reads(SCHEMA, batches[2 * rank() : 2 * rank() + 2])

    for of_both in run_ranks(2, of_rank):
        assert all(torch.equal(of_both[name], expected[name]) for name in expected)


def test_histogram_refuses_what_does_not_fit() -> None:
    small = Schema(tuple(Categorical(name, num_embeddings=20) for name in ("user", "item")), ("click",))
    batch = example_batch(SINGLE, 64)
    with pytest.raises(ValueError, match=r"'user' has id \d+, but its vocabulary has 20"):
        count_reads(small, [batch])
    with pytest.raises(ValueError, match="no size yet"):
        count_reads(Schema((Categorical("user"),), ("click",)), [batch])


# Ranks.


def test_planted_rank_is_found() -> None:
    model = models.mlp(Inputs(SINGLE, embedding_dim=16), hidden=(4,))
    plant(model, rank=3)
    counts = count_reads(SINGLE, batches_of(SINGLE))
    table = full_table(model.embedding, "user", 60)
    mean, basis, energies = weighted_pca(table[1:], counts["user"][1:])
    assert rank_for_energy(energies, 0.999) == 3
    torch.testing.assert_close(projected(table.double(), mean, basis[:3]), table.double(), rtol=0, atol=1e-5)
    (tables,) = low_rank_tables(model, SINGLE, counts, goal=Goal(energy=0.999)).values()
    assert [(table.stored.name, table.stored.rank) for table in tables] == [("user", 4), ("item", 4)]
    (tables,) = low_rank_tables(model, SINGLE, counts, goal=Goal(energy=0.999), multiple_of=1).values()
    assert [table.stored.rank for table in tables] == [3, 3]


def test_rank_for_energy() -> None:
    energies = torch.tensor([6.0, 3.0, 1.0, 0.0])
    assert [rank_for_energy(energies, part) for part in (0.1, 0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(torch.zeros(4), 0.9) == 1


def test_small_tables_are_left_whole() -> None:
    dim, energies = 16, 2.0 ** -torch.arange(16)
    for rows in range(3, 60):
        tables = {"small": (rows, energies), "large": (1000, energies)}
        rank_of_small = allocate_ranks(tables, 4 * (1000 * 16), multiple_of=4)["small"]
        if rows <= dim * rank_of_small / max(dim - rank_of_small, 1e-9):
            assert rank_of_small == dim
        assert rank_of_small == dim or rows * rank_of_small + (rank_of_small + 1) * dim < rows * dim
    # At the lowest rank, 4: rows * 4 + 5 * 16 < rows * 16 from 7 rows on.
    least = [
        sum(_bytes(tables, allocate_ranks(tables, _least(tables))))
        for tables in ({"v": (6, energies)}, {"v": (7, energies)})
    ]
    assert least == [4 * 6 * 16, 4 * (7 * 4 + 5 * 16)]


def _bytes(tables: dict[str, tuple[int, Tensor]], ranks: dict[str, int]) -> list[int]:
    return [
        sum(NarrowTable(name, (name,), rows, ranks[name]).num_bytes(len(energies)).values())
        for name, (rows, energies) in tables.items()
    ]


def _least(tables: dict[str, tuple[int, Tensor]]) -> int:
    with pytest.raises(ValueError, match="lowest ranks take") as refusal:
        allocate_ranks(tables, 1)
    return int(str(refusal.value).split()[4].replace(",", ""))


def test_budget_is_met_and_well_spent() -> None:
    tables = {
        f"v{n}": (rows, scale * torch.rand(16, generator=generator(n)).sort(descending=True).values.double())
        for n, (rows, scale) in enumerate(((500, 1.0), (300, 5.0), (40, 1.0), (7, 1.0)))
    }
    least, whole = _least(tables), sum(4 * rows * 16 for rows, _ in tables.values())
    with pytest.raises(ValueError, match=f"{whole:,}, which is more than {least - 1:,}"):
        allocate_ranks(tables, least - 1)
    choices = [(4, 8, 12, 16)] * 4
    for budget in range(least, whole, 2500):
        ranks = allocate_ranks(tables, budget)
        assert sum(_bytes(tables, ranks)) <= budget

        def kept(ranks: dict[str, int]) -> float:
            return sum(float(energies[: ranks[name]].sum()) for name, (_, energies) in tables.items())

        best = max(
            kept(other)
            for combination in itertools.product(*choices)
            if sum(_bytes(tables, other := dict(zip(tables, combination)))) <= budget
        )
        assert kept(ranks) >= 0.95 * best  # a knapsack: greedy is near the best, not always at it
        for uniform in (4, 8, 12):
            if sum(_bytes(tables, same := dict.fromkeys(tables, uniform))) <= budget:
                assert kept(ranks) >= kept(same)
    assert set(allocate_ranks(tables, whole).values()) == {16}


@pytest.mark.parametrize("arguments", [{}, {"rank": 4, "ratio": 2}, {"ratio": 0.5}, {"energy": 1.1}, {"num_bytes": 0}])
def test_goals_that_make_no_sense_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Goal(**arguments)


# Layers.


def test_layers_mimic_outputs_where_weights_are_not_low_rank() -> None:
    linear = nn.Linear(64, 48)
    nn.init.orthogonal_(linear.weight, 3.0)  # as far from low rank as can be
    spread = torch.linalg.qr(torch.randn(64, 64, generator=generator())).Q * (2.0 ** -torch.arange(64.0)) * 20
    x = torch.randn(4000, 64, generator=generator(1)) @ spread.T + torch.randn(64, generator=generator(2))
    y = linear(x).detach()
    moments = Moments(48)
    for rows in y.split(1000):
        moments.add(rows)
    basis, energies = spectrum(moments.scatter / moments.count)
    made = factorise(linear, moments.mean, basis[:4]).requires_grad_(False)
    error = float((made(x) - y).square().sum(1).mean())
    assert error == pytest.approx(float(energies[4:].sum()), rel=1e-3)
    linear.requires_grad_(False)
    u, s, v = torch.linalg.svd(linear.weight)
    of_weights = x @ (u[:, :4] * s[:4] @ v[:4]).T + linear.bias
    assert error < float((of_weights - y).square().sum(1).mean()) / 5
    # Full rank is exact; the published first and second layers; and what they count.
    full = factorise(linear, moments.mean, basis)
    torch.testing.assert_close(full(x), y, rtol=0, atol=1e-5 * float(y.abs().max()))
    torch.testing.assert_close(made[0].weight, basis[:4].float() @ linear.weight)
    torch.testing.assert_close(made[0].bias, basis[:4].float() @ linear.bias)
    remainder = (torch.eye(48).double() - basis[:4].T @ basis[:4]) @ moments.mean
    torch.testing.assert_close(made[1].bias, remainder.float())
    assert sum(weight.numel() for weight in made.parameters()) == 4 * (64 + 48) + 4 + 48
    active: Any = factorise(linear, moments.mean, basis, activation=nn.ReLU()).requires_grad_(False)
    assert [type(layer) for layer in active] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(active(x), active[2](active[0](x).relu()))
    assert float((active(x) - y).abs().max()) > 1  # as said: no longer the projection
    without = factorise(nn.Linear(64, 48, bias=False), torch.zeros(48), basis)
    assert not without[0].bias.any() and not without[1].bias.any()
    with pytest.raises(ValueError, match="rank=49: expected 1 to 48"):
        LowRankLinear(64, 48, rank=49)


def test_statistics_are_those_of_all_outputs() -> None:
    model = trained_like(
        models.xdeepfm(Inputs(SCHEMA, embedding_dim=4), num_maps=(3,), hidden=(8, 8), batch_norm=True, dropout=0.5)
    )
    batches = batches_of(SCHEMA)
    batches[0].weights[10:] = 0
    layers = list(linear_layers(model))
    model.train()
    found = output_statistics(model, layers, batches)
    assert model.training and model.tower.training
    # CIN and the head use their layers' weights without calling them: such a layer cannot be replaced.
    assert set(layers) - set(found) >= {"head.linear"} and "tower.towers.0.layers.0" in found
    outputs: list[Tensor] = []
    layer: Any = model.get_submodule("tower.towers.0.layers.4")
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.eval()
    for batch in batches:
        model(batch)
    hook.remove()
    y = torch.cat([outputs[0][:10], *outputs[1:]]).double().detach()
    mean, covariance = found["tower.towers.0.layers.4"]
    torch.testing.assert_close(mean, y.mean(0), rtol=0, atol=1e-10)
    torch.testing.assert_close(covariance, (y - y.mean(0)).T @ (y - y.mean(0)) / len(y), rtol=0, atol=1e-10)

    def of_rank() -> Any:
        return output_statistics(model, layers, batches[2 * rank() : 2 * rank() + 2])

    for other in run_ranks(2, of_rank):
        for name, expected in found.items():
            for one, another in zip(other[name], expected):
                torch.testing.assert_close(one, another, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="gave no batch"):
        output_statistics(model, layers, [])


def test_layers_that_would_not_shrink_stay() -> None:
    model = models.mlp(Inputs(SINGLE, embedding_dim=16), hidden=(64, 64, 6))
    batches = batches_of(SINGLE)
    statistics = output_statistics(model, list(linear_layers(model)), batches)
    for goal in (Goal(energy=0.9), Goal(rank=32), Goal(rank=8), Goal(ratio=2), Goal(energy=1.0)):
        for path, layer in low_rank_layers(model, statistics, goal=goal).items():
            linear: Any = model.get_submodule(path)
            ins, outs = linear.in_features, linear.out_features
            assert len(layer.basis) < ins * outs / (ins + outs)
    # 80 -> 64, 64 -> 64, 64 -> 6: rank 32 saves in the first only (limits 35.5, 32 and 5.5), 8 in the first two.
    assert list(low_rank_layers(model, statistics, goal=Goal(rank=32))) == ["tower.layers.0"]
    assert list(low_rank_layers(model, statistics, goal=Goal(rank=8))) == ["tower.layers.0", "tower.layers.2"]
    assert low_rank_layers(model, statistics, goal=Goal(energy=1.0)) == {}


def test_layers_meet_a_budget() -> None:
    model = models.mlp(Inputs(SINGLE, embedding_dim=16), hidden=(64, 64, 64))
    batches = batches_of(SINGLE)
    statistics = output_statistics(model, list(linear_layers(model)), batches)

    def held(model: ctr.Model) -> int:
        return 4 * sum(weight.numel() for weight in model.tower.parameters())

    for goal in (Goal(num_bytes=held(model) // 2), Goal(ratio=2)):
        plan = low_rank(model, SINGLE, batches, layers=goal)
        assert plan.tables == {} and plan.layers
        small = apply_low_rank(model, plan)
        assert held(model) // 2 - 4 * 4 * 145 < held(small) <= held(model) // 2  # nearly all of it is used
    # A layer whose outputs are large is not the more important one.
    name = "tower.layers.2"
    louder = statistics | {name: (1e3 * statistics[name][0], 1e6 * statistics[name][1])}
    ranks = [
        {path: len(layer.basis) for path, layer in low_rank_layers(model, given, goal=Goal(ratio=2)).items()}
        for given in (statistics, louder)
    ]
    assert ranks[0] == ranks[1]
    with pytest.raises(ValueError, match="lowest ranks take"):
        low_rank_layers(model, statistics, goal=Goal(num_bytes=100))


# Models.

MODELS = {
    "mlp": lambda inputs: models.mlp(inputs, hidden=(32, 32), batch_norm=True),
    "deepfm": lambda inputs: models.deepfm(inputs, hidden=(32, 32)),
    "dcnv2": lambda inputs: models.dcnv2(inputs, hidden=(32, 32), num_cross_layers=2),
    "finalmlp": lambda inputs: models.finalmlp(inputs, hidden_1=(32,), hidden_2=(32,)),
}


@pytest.mark.parametrize("stacked", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_becomes_smaller_and_keeps_its_function_at_planted_rank(name: str, stacked: int) -> None:
    torch.manual_seed(0)
    model = trained_like(MODELS[name](Inputs(SCHEMA, embedding_dim=16)))
    reference = trained_like(MODELS[name](Inputs(SCHEMA, embedding_dim=16, stacked=stacked)))
    batches = batches_of(SCHEMA)
    for collection in (module for module in model.modules() if isinstance(module, ctr.TableEmbedding)):
        for number, weight in enumerate(collection.tables.parameters()):
            axes = torch.linalg.qr(torch.randn(16, 16, generator=generator(number))).Q[:4]
            weight.data = torch.randn(len(weight), 4, generator=generator(number)) @ axes + 1
    _copy_unstacked(model, reference)
    expected = model.eval()(batches[0])
    torch.testing.assert_close(reference.eval()(batches[0]), expected)
    before = copy.deepcopy(reference.state_dict())
    small = apply_low_rank(reference, low_rank(reference, SCHEMA, batches, tables=Goal(rank=4)))
    torch.testing.assert_close(small(batches[0]), expected, rtol=1e-5, atol=2e-5)
    assert all(torch.equal(before[key], value) for key, value in reference.state_dict().items())
    shared = {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in reference.parameters()}
    assert not shared and not small.training
    assert small.embedding_bytes() < 0.85 * reference.embedding_bytes()  # of 60 rows; decoders take 80 numbers each


def _copy_unstacked(model: ctr.Model, stacked: ctr.Model) -> None:
    """The weights of a model into the same model with stacked tables."""
    state = model.state_dict()
    if set(state) == set(stacked.state_dict()):
        stacked.load_state_dict(state)
        return
    rest = {name: value for name, value in state.items() if ".embedding_bags." not in name}
    missing = stacked.load_state_dict(rest, strict=False)
    assert all(".embedding_bags." in name for name in missing.missing_keys) and not missing.unexpected_keys
    for path, module in model.named_modules():
        if isinstance(module, ctr.TableEmbedding | ctr.Wide):
            other: Any = stacked.get_submodule(path)
            for config in module.tables.embedding_bag_configs():
                weight = module.tables.embedding_bags[config.name].weight
                full_table(other, config.feature_names[0], len(weight)).copy_(weight.detach())


def test_every_feature_counts_and_the_padding_row_does_not() -> None:
    model = models.mlp(Inputs(SINGLE, embedding_dim=8), hidden=(4,))
    counts = {"user": torch.ones(60), "item": torch.ones(90)}
    for weight in model.embedding.tables.parameters():
        weight.data = torch.randn(90, 8, generator=generator())[: len(weight)]
        weight.data[0] = 1e6
    # One step for 60 rows costs less and keeps as much as one for 90 rows, but those are read twice.
    (tables,) = low_rank_tables(model, SINGLE, counts, goal=Goal(num_bytes=4 * (60 * 4 + 90 * 8 + 5 * 8))).values()
    assert [(table.stored.name, table.stored.rank) for table in tables] == [("user", 4), ("item", 8)]
    (tables,) = low_rank_tables(model, SINGLE, counts, goal=Goal(rank=4)).values()
    assert all(table.mean.abs().max() < 1 for table in tables if table.mean is not None)


def test_a_model_of_low_rank_is_compressed_no_further_than_its_other_layers() -> None:
    model = models.mlp(Inputs(SINGLE, embedding_dim=16), hidden=(32, 32))
    batches = batches_of(SINGLE)
    small = apply_low_rank(model, low_rank(model, SINGLE, batches, tables=Goal(rank=4), layers=Goal(rank=12)))
    assert [type(layer) for layer in small.tower.layers] == [LowRankLinear, nn.ReLU] * 2
    assert list(linear_layers(small)) == ["head.linear"]


def test_several_look_ups_of_one_model_stay_apart() -> None:
    features = SINGLE.features
    embedding = ctr.embeddings.ConcatFields(
        ctr.TableEmbedding(features, embedding_dim=16),
        ctr.TableEmbedding(features, only=["item", "age"], embedding_dim=16, suffix="_context"),
    )
    tower = ctr.MLP(embedding.out_shape, hidden=(8,))
    model = trained_like(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape)))
    batches = batches_of(SINGLE)
    plan = low_rank(model, SINGLE, batches, tables=Goal(rank=4))
    assert list(plan.tables) == ["embedding.embeddings.0.tables", "embedding.embeddings.1.tables"]
    small = apply_low_rank(model, plan)
    names = [name.split(".")[-2] for name in ctr.sharding.tables_of(small)]
    assert names == ["table_user", "table_item", "table_item_1"]
    for path, tables in plan.tables.items():
        for table in tables:
            assert table.basis is not None and table.mean is not None
            before, after = (one.get_submodule(path)(batches[0].sparse).to_dict() for one in (model, small))
            for name in table.stored.feature_names:
                torch.testing.assert_close(after[name], projected(before[name], table.mean, table.basis))
    (losses,) = run_ranks(1, lambda: [float(ctr.FusedEngine(small).step(batches[0]))])
    assert torch.isfinite(torch.tensor(losses)).all()


def test_bytes_of_the_plan_are_those_of_the_model() -> None:
    model = models.deepfm(Inputs(SINGLE, embedding_dim=16), hidden=(32,))
    batches = batches_of(SINGLE)
    for goal, most in ((Goal(num_bytes=4000), 4000), (Goal(ratio=3), 150 * 64 // 3), (Goal(energy=0.5), 150 * 64)):
        plan = low_rank(model, SINGLE, batches, tables=goal)
        small = apply_low_rank(model, plan)
        lookup: Any = small.embedding.tables
        held = [tensor.numel() * tensor.element_size() for tensor in (*lookup.parameters(), *lookup.buffers())]
        counted = [sum(table.stored.num_bytes(16).values()) for table in plan.tables["embedding.tables"]]
        assert sum(held) == sum(counted) <= most
        # The wide part, and the numbers' vectors, are as before.
        assert model.embedding_bytes() - small.embedding_bytes() == 150 * 64 - sum(held)


def test_tables_and_layers_together_then_fold() -> None:
    torch.manual_seed(0)
    model = trained_like(models.mlp(Inputs(SINGLE, embedding_dim=16), hidden=(32, 16), batch_norm=True))
    plant(model, rank=4)
    batches = batches_of(SINGLE, size=256)
    for _ in range(3):  # running statistics other than at birth
        model(batches[0])
    model.eval()
    plan = low_rank(model, SINGLE, batches, tables=Goal(rank=4), layers=Goal(rank=10))
    assert {path: len(layer.basis) for path, layer in plan.layers.items()} == {
        "tower.layers.0": 10,
        "tower.layers.3": 10,
    }
    small = apply_low_rank(model, low_rank(model, SINGLE, batches, tables=Goal(rank=4)))
    torch.testing.assert_close(small(batches[1]), model(batches[1]), rtol=0, atol=1e-5)
    for narrow in (small, apply_low_rank(model, plan)):
        folded = fold_decoders(narrow, SINGLE)
        assert folded.embedding.out_shape == folded.tower.in_shape == (5, 4)
        torch.testing.assert_close(folded(batches[1]), narrow(batches[1]), rtol=0, atol=1e-5)
        assert not folded.embedding.tables.decoders and not folded.embedding.tables.means
        assert sum(map(torch.Tensor.numel, folded.parameters())) < sum(map(torch.Tensor.numel, narrow.parameters()))
        folded.train()
        loss = binary_cross_entropy(folded(batches[0]), batches[0].labels, batches[0].weights)
        loss.backward()
        assert all(weight.grad is not None for weight in folded.parameters())


def test_bags_are_folded_without_means() -> None:
    torch.manual_seed(0)
    model = trained_like(models.mlp(Inputs(SCHEMA, embedding_dim=16), hidden=(8,))).eval()
    batches = batches_of(SCHEMA)
    assert (batches[0].sparse.lengths() == 0).any()
    small = apply_low_rank(model, low_rank(model, SCHEMA, batches, tables=Goal(rank=4), centred=False))
    torch.testing.assert_close(fold_decoders(small, SCHEMA)(batches[0]), small(batches[0]), rtol=0, atol=1e-5)


def test_what_cannot_be_folded_is_refused() -> None:
    batches = batches_of(SCHEMA)

    def narrow(model: ctr.Model, **arguments: Any) -> ctr.Model:
        return apply_low_rank(model, low_rank(model, SCHEMA, batches, **{"tables": Goal(rank=4), **arguments}))

    inputs = Inputs(SCHEMA, embedding_dim=16)
    mlp = models.mlp(inputs, hidden=(8,))
    with pytest.raises(ValueError, match=r"\('item', 'history'\).*centred=False"):
        fold_decoders(narrow(mlp), SCHEMA)
    with pytest.raises(ValueError, match="got MLP, TableEmbedding and EmbeddingBagCollection"):
        fold_decoders(mlp, SCHEMA)
    with pytest.raises(ValueError, match="got Parallel, TableEmbedding and NarrowTables"):
        fold_decoders(narrow(models.deepfm(inputs, hidden=(8,))), SCHEMA)
    with pytest.raises(ValueError, match=r"got ranks \[4, 16\]"):
        fold_decoders(narrow(mlp, tables=Goal(num_bytes=3200), centred=False), SCHEMA)
    periodic = models.mlp(Inputs(SCHEMA, embedding_dim=16, numeric="periodic"), hidden=(8,))
    with pytest.raises(ValueError, match="got Periodic"):
        fold_decoders(narrow(periodic, centred=False), SCHEMA)
    small = narrow(mlp, centred=False)
    dropping = NarrowTable("user", ("user",), 20, 4, kept="first", num_kept=9, dropped_to=0)
    rest = [table for table in small.embedding.tables.stored.values() if table.name != "user"]
    small.embedding.tables = NarrowTables([dropping, *rest], embedding_dim=16)
    with pytest.raises(ValueError, match=r"\('user',\)"):
        fold_decoders(small, SCHEMA)


def test_what_cannot_be_compressed_is_refused() -> None:
    batches = batches_of(SCHEMA)
    events = models.mlp(Inputs(SCHEMA, embedding_dim=8, sequence="din"), hidden=(32,))
    assert low_rank(events, SCHEMA, batches, layers=Goal(rank=4)).layers
    plain = models.mlp(Inputs(SCHEMA, embedding_dim=8), hidden=(8,))
    with pytest.raises(ValueError, match="nothing to do"):
        low_rank(plain, SCHEMA, batches)
    with pytest.raises(ValueError, match="lowest ranks take"):
        low_rank(plain, SCHEMA, batches, tables=Goal(num_bytes=100))
    with pytest.raises(ValueError, match="'user' has 20 ids, but 0 counts"):
        low_rank_tables(plain, SCHEMA, {}, goal=Goal(rank=4))
    small = apply_low_rank(plain, low_rank(plain, SCHEMA, batches, tables=Goal(rank=4)))
    with pytest.raises(ValueError, match="it was done already"):
        low_rank(small, SCHEMA, batches, tables=Goal(rank=4))


# Fine-tuning.


def test_fine_tuning_starts_far_ahead_of_a_random_low_rank_model() -> None:
    torch.manual_seed(0)
    sizes = {"user": 60, "item": 40, "place": 20}
    schema = Schema(tuple(Categorical(name, num_embeddings=rows) for name, rows in sizes.items()), ("click",))
    truth = {name: 0.7 * torch.randn(rows, 8, generator=generator(rows)) for name, rows in sizes.items()}

    def batch(seed: int, size: int = 1024) -> Batch:
        made = example_batch(schema, size, seed=seed)
        ids = {name: made.sparse[name].values() for name in sizes}
        pairs = itertools.combinations(sizes, 2)
        logits = sum((truth[a][ids[a]] * truth[b][ids[b]]).sum(1) for a, b in pairs)
        made.labels[:, 0] = torch.bernoulli(torch.as_tensor(logits).sigmoid(), generator=generator(seed))
        return made

    data, held_out = [batch(seed) for seed in range(20)], batch(99, size=8192)

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(binary_cross_entropy(model(held_out), held_out.labels, held_out.weights))

    model = models.deepfm(Inputs(schema, embedding_dim=16), hidden=(32,))
    engine = ctr.ExactEngine(model, learning_rate=0.01)
    for _ in range(4):
        for step in data:
            engine.step(step)
    base = loss(model)
    plan = low_rank(model, schema, data, tables=Goal(rank=4))
    start = apply_low_rank(model, plan)
    random = copy.deepcopy(start)
    stored = [table.stored for table in plan.tables["embedding.tables"]]
    random.embedding.tables = NarrowTables(stored, embedding_dim=16, init_std=0.3)

    def steps_to_base(model: ctr.Model, most: int) -> int:
        engine = ctr.ExactEngine(model, learning_rate=0.01)
        for step in range(most):
            if loss(model) <= base:
                return step
            engine.step(data[step % len(data)])
        return most

    ahead = steps_to_base(start, 60)
    assert ahead < 60  # 15 when written, where the random start took 151
    assert steps_to_base(random, 3 * ahead + 5) > 3 * ahead
