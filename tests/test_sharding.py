"""Several processes train as one does, in both engines and under every way of sharding: losses, weights, states."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

import ctrlib as ctr
from ctrlib import models
from ctrlib.batch import Batch
from ctrlib.distributed import rank, world_size
from ctrlib.embeddings.din import DIN, MiniBatchAwareL2
from ctrlib.inputs import Inputs
from ctrlib.testing import example_batch, example_schema
from ctrlib.training.guard import refuse_what_needs_one_process

SCHEMA = example_schema()


def build(**arguments: Any) -> ctr.Model:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"hidden": (8,), "batch_norm": True}
    return models.deepfm(Inputs(SCHEMA, embedding_dim=8, wide_columns=4), **{**defaults, **arguments})


def deep() -> ctr.Model:
    torch.manual_seed(0)
    return models.mlp(Inputs(SCHEMA, embedding_dim=8), hidden=(8,))


def part(batch: Batch) -> Batch:
    """This rank's rows of a batch."""
    own = batch.size // world_size()
    start = rank() * own
    rows = slice(start, start + own)
    bags = {key: jagged.to_dense()[rows] for key, jagged in batch.sparse.to_dict().items()}
    lengths = torch.cat([torch.tensor([len(row) for row in column]) for column in bags.values()])
    values = torch.cat([row for column in bags.values() for row in column])
    sparse = type(batch.sparse)(keys=list(bags), values=values, lengths=lengths)
    return Batch(sparse, batch.dense[rows], batch.labels[rows], batch.weights[rows])


def trained(make: Callable[[], Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of six steps, on batches of 32 rows of unequal weight, and the weights after them."""
    engine = make()
    engine.model.train()
    batches = []
    for seed in range(6):
        batch = example_batch(SCHEMA, 32, seed=seed)
        batch.weights[:] = torch.rand(32, generator=torch.Generator().manual_seed(seed))
        batches.append(part(batch))
    losses = [loss.item() for _, loss in engine.train(batches)]
    if isinstance(engine, ctr.FusedEngine) and world_size() > 1:
        assert engine._pipelined, "TorchRec's pipeline found no tables"
    return losses, engine.weights()


def assert_same_training(alone: Any, together: list[Any]) -> None:
    for losses, _ in together:
        assert losses == pytest.approx(alone[0], abs=1e-6)
    for name, weight in alone[1].items():
        # A bias before batch normalisation has a gradient of rounding errors, which Adam makes steps of; means follow.
        if name not in ("tower.towers.0.layers.0.bias", "tower.towers.0.layers.1.running_mean"):
            torch.testing.assert_close(together[0][1][name], weight, atol=1e-6, rtol=1e-5, msg=name)


# Histories and genres are means: of rows on both ranks here, and of rows on one.
MIXED = {
    "embedding.tables.embedding_bags.table_user.weight": "data_parallel",
    "embedding.tables.embedding_bags.table_genres.weight": "table_wise",
    "embedding.tables.embedding_bags.table_item.weight": "row_wise",
    "wide.tables.embedding_bags.table_item_wide.weight": "table_wise",
}


@pytest.mark.parametrize(
    "sharding", ["table_wise", "row_wise", "data_parallel", "auto", pytest.param(MIXED, id="mixed")]
)
def test_two_ranks_train_as_one_does(sharding: Any) -> None:
    def run() -> Any:
        return trained(lambda: ctr.FusedEngine(build(), learning_rate=0.01, sharding=sharding))

    (alone,) = run_ranks(1, lambda: trained(lambda: ctr.FusedEngine(build(), learning_rate=0.01)))
    assert_same_training(alone, run_ranks(2, run))


@pytest.mark.parametrize("sharding", ["auto", "row_wise", "table_wise"])
def test_stacked_tables_are_sent_ahead_too(sharding: Any) -> None:
    """Fields and wide part look up ids that were shifted; TorchRec's pipeline must send what the model will look up."""

    def run(sharding: Any = "auto") -> Any:
        torch.manual_seed(0)
        inputs = Inputs(SCHEMA, embedding_dim=8, wide_columns=4, stacked=2)
        engine = ctr.FusedEngine(models.deepfm(inputs, hidden=(8,)), learning_rate=0.01, sharding=sharding)
        result = trained(lambda: engine)
        assert world_size() == 1 or len(engine._pipelined or ()) == 2
        return result

    (alone,) = run_ranks(1, run)
    assert_same_training(alone, run_ranks(2, functools.partial(run, sharding)))


def test_column_wise_is_for_adagrad_of_every_weight() -> None:
    def run(sharding: Any) -> Any:
        return trained(
            lambda: ctr.FusedEngine(deep(), learning_rate=0.01, table_optimiser="adagrad", sharding=sharding)
        )

    (alone,) = run_ranks(1, lambda: run("table_wise"))
    assert_same_training(alone, run_ranks(2, lambda: run("column_wise")))


def test_exact_engine_with_l2_and_clipping() -> None:
    def run() -> Any:
        return trained(lambda: ctr.ExactEngine(build(), learning_rate=0.01, embedding_l2=0.1, max_grad_norm=0.05))

    (alone,) = run_ranks(1, run)
    assert_same_training(alone, run_ranks(2, run))


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, read by one process as a whole."""

    def read() -> Any:
        state = ctr.FusedEngine(build()).state()
        plain = {
            name: torch.zeros(value.size) if isinstance(value, ctr.sharding.Shards) else torch.zeros_like(value)
            for name, value in state.items()
        }
        assert ctr.Checkpoints(folder).load(plain) is not None
        return plain

    (plain,) = run_ranks(1, read)
    return dict(plain)


def test_a_walk_over_rank_counts_and_shardings_changes_no_bit(tmp_path: Path) -> None:
    walk: list[tuple[int, Any]] = [
        *[(1, "auto"), (2, "row_wise"), (4, "data_parallel"), (2, "row_wise"), (4, "table_wise"), (2, "data_parallel")],
        (1, "data_parallel"),
    ]
    for hop, (ranks, sharding) in enumerate(walk):

        def visit(hop: int = hop, sharding: Any = sharding) -> None:
            engine = ctr.FusedEngine(build(), learning_rate=0.01, sharding=sharding)
            if hop:
                with ctr.Checkpoints(tmp_path / f"{hop - 1}") as checkpoints:
                    assert checkpoints.load(engine.state()) == {"hop": hop - 1}
                with ctr.Checkpoints(tmp_path / f"{hop - 1} again") as checkpoints:
                    checkpoints.save(hop, engine.state(), {})
            engine.model.train()
            for seed in range(3):
                engine.step(part(example_batch(SCHEMA, 32, seed=10 * hop + seed)))
            with ctr.Checkpoints(tmp_path / f"{hop}") as checkpoints:
                checkpoints.save(hop, engine.state(), {"hop": hop})

        run_ranks(ranks, visit)
        if hop:
            saved, again = whole(tmp_path / f"{hop - 1}"), whole(tmp_path / f"{hop - 1} again")
            assert set(saved) == set(again)
            assert all(torch.equal(saved[name], again[name]) for name in saved)
    sums = [tensor for name, tensor in whole(tmp_path / f"{len(walk) - 1}").items() if name.endswith(".sum")]
    assert len(sums) == 6
    assert all(tensor.count_nonzero() for tensor in sums)


def test_a_plan_is_saved_pinned_and_refused_where_it_does_not_fit(tmp_path: Path) -> None:
    model = build()
    plan = ctr.sharding.make_plan(model, world_size=2, sharding="row_wise")
    ctr.sharding.save_plan(plan, tmp_path / "plan.json")
    assert ctr.sharding.load_plan(tmp_path / "plan.json") == plan

    def pinned() -> Any:
        return ctr.FusedEngine(build(), plan=ctr.sharding.load_plan(tmp_path / "plan.json")).plan

    assert run_ranks(2, pinned) == [plan, plan]
    with pytest.raises(ValueError, match="there are 1 processes"):
        ctr.FusedEngine(build(), plan=plan)
    plan.popitem()
    with pytest.raises(ValueError, match="on one side only"):
        ctr.FusedEngine(build(), plan=plan)
    (tmp_path / "plan.json").write_text('{"a": {"sharding": "diagonal", "ranks": [0]}}')
    with pytest.raises(ValueError, match="diagonal"):
        ctr.sharding.load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a sharding plan"):
        ctr.sharding.load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sharding": "column_wise"}, "row-wise Adagrad keeps one number per row"),
        ({"sharding": "data_parallel", "table_optimiser": "adagrad"}, "row-wise Adagrad only"),
        ({"sharding": "by_hand"}, "unknown sharding 'by_hand'"),
        ({"sharding": {"embedding.nowhere": "row_wise"}}, "no tables"),
    ],
)
def test_a_plan_that_would_change_the_optimiser_is_refused(arguments: dict[str, Any], message: str) -> None:
    def refused() -> str:
        with pytest.raises(ValueError, match=message):
            ctr.FusedEngine(deep(), **arguments)
        return "refused"

    assert run_ranks(2, refused) == ["refused", "refused"]


def test_planner_gives_each_process_its_share() -> None:
    features = [ctr.Categorical(f"c{n}", num_embeddings=1000) for n in range(8)]
    embedding = ctr.TableEmbedding([*features, ctr.Categorical("large", num_embeddings=100_000)], embedding_dim=8)
    plan = ctr.sharding.make_plan(embedding, world_size=4)
    assert plan["tables.embedding_bags.table_large.weight"].sharding == "row_wise"
    sizes = ctr.sharding.plan_bytes(plan, embedding, world_size=4)
    per_rank = [sum(size[n] for size in sizes.values()) for n in range(4)]
    assert per_rank == [25_000 * 9 * 4 + 2 * 1000 * 9 * 4] * 4


def test_small_tables_are_copied_on_demand_up_to_a_mebibyte_together() -> None:
    rows = {"c0": 25_000, "c1": 10_000, "c2": 5_000, "c3": 2_500}  # of 32 bytes: the two largest do not fit together
    embedding = ctr.TableEmbedding([ctr.Categorical(n, num_embeddings=r) for n, r in rows.items()], embedding_dim=8)

    def copied(**arguments: Any) -> list[str]:
        plan = ctr.sharding.make_plan(embedding, world_size=2, **arguments)
        return [name.split(".")[2] for name, placement in plan.items() if placement.sharding == "data_parallel"]

    assert copied(copy_small=True) == ["table_c1", "table_c2", "table_c3"]
    pinned = {"tables.embedding_bags.table_c2.weight": "row_wise"}
    assert copied(copy_small=True, sharding=pinned) == ["table_c1", "table_c3"]
    assert copied() == []
    assert copied(copy_small=True, sharding="row_wise") == []


def test_auto_plans_tables_that_no_machine_here_could_hold() -> None:
    with torch.device("meta"):
        features = [ctr.Categorical(f"c{n}", num_embeddings=1000) for n in range(4)]
        large = ctr.Categorical("large", num_embeddings=1_000_000_000)
        embedding = ctr.TableEmbedding([*features, large], embedding_dim=64)
    for device_type in ("cpu", "cuda"):
        plan = ctr.sharding.make_plan(embedding, world_size=4, device_type=device_type)
        assert plan["tables.embedding_bags.table_large.weight"].sharding == "row_wise"
        assert sorted(p.ranks for p in plan.values() if p.sharding == "table_wise") == [(0,), (1,), (2,), (3,)]


def test_tables_that_are_kept_whole_are_spread_over_processes() -> None:
    embedding = ctr.TableEmbedding([ctr.Categorical(f"c{n}", num_embeddings=1000) for n in range(4)], embedding_dim=8)
    plan = ctr.sharding.make_plan(embedding, world_size=2, sharding="table_wise")
    assert {placement.sharding for placement in plan.values()} == {"table_wise"}
    assert sorted(placement.ranks for placement in plan.values()) == [(0,), (0,), (1,), (1,)]
    first, *_ = plan
    pinned = ctr.sharding.make_plan(embedding, world_size=2, sharding={first: "table_wise"})
    assert pinned[first].sharding == "table_wise"


def test_no_process_keeps_the_whole_table() -> None:
    def held() -> int:
        model = build()
        engine = ctr.FusedEngine(model, sharding="row_wise")
        engine.model.train()
        engine.step(part(example_batch(SCHEMA, 32)))
        gc.collect()
        weights = [t for t in gc.get_objects() if isinstance(t, nn.Parameter) and tuple(t.shape) == (30, 8)]
        return sum(t.untyped_storage().nbytes() for t in weights)

    assert run_ranks(2, held) == [0, 0]  # the items' table: rows are held in parts only


def test_row_losses_of_all_processes_add_up() -> None:
    def losses() -> Any:
        torch.manual_seed(0)
        decay = MiniBatchAwareL2(torch.ones(30), strength=5.0, per_occurrence=True)
        embedding = ctr.embeddings.SequenceEmbedding(
            SCHEMA.features,
            units=(ctr.embeddings.Unit(("item",), ("history",), DIN(8)),),
            embedding_dim=8,
            row_losses={"item": decay},
        )
        tower = ctr.MLP(embedding.out_shape, hidden=(8,))
        return trained(lambda: ctr.FusedEngine(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))))

    (alone,), together = run_ranks(1, losses), run_ranks(2, losses)
    assert_same_training(alone, together)

    def refused() -> str:
        with pytest.raises(NotImplementedError, match="per_occurrence=True"):
            refuse_what_needs_one_process(MiniBatchAwareL2(torch.ones(30)))
        return "refused"

    assert run_ranks(2, refused) == ["refused", "refused"]


def test_bf16_counts_and_averages_in_float32() -> None:
    x = (torch.randn(600, 3, generator=torch.Generator().manual_seed(0)) + 30).bfloat16()

    def part_of() -> Tensor:
        layer = nn.BatchNorm1d(3)
        ctr.training.synchronise_batch_norm(layer)
        layer(x[300 * rank() : 300 * rank() + 300])
        assert layer.running_mean is not None
        return layer.running_mean

    for mean in run_ranks(2, part_of):
        torch.testing.assert_close(mean, x.float().mean(0) * 0.1, atol=1e-5, rtol=1e-5)


def test_reported_bytes_are_the_bytes_held() -> None:
    def held(sharding: Any) -> tuple[int, int]:
        engine = ctr.FusedEngine(build(), sharding=sharding)
        reported = ctr.sharding.plan_bytes(engine.plan, build(), world_size=2)
        tensors = [
            value
            for name, value in engine.state().items()
            if "embedding_bags" in name and name.startswith(("model.", "optimiser."))
        ]
        parts = [t for v in tensors for t in ([v] if isinstance(v, Tensor) else [part for _, part in v.parts])]
        if sharding in ("data_parallel", "auto"):  # gradients exist in a step only
            parts += [t for t in parts if t.dim() == 2]
        return sum(sizes[rank()] for sizes in reported.values()), sum(t.nbytes for t in parts)

    for sharding in ("table_wise", "row_wise", "data_parallel", "auto"):
        pairs = run_ranks(2, functools.partial(held, sharding))
        assert all(reported == measured for reported, measured in pairs)
        assert sum(measured for _, measured in pairs) > 0


def test_tables_that_do_not_fit_are_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.sharding.sharded.available_memory", lambda device: 1000)
    with pytest.raises(MemoryError, match="start more processes"):
        ctr.FusedEngine(build())


def test_learning_rates_are_the_same_on_ranks_without_tables() -> None:
    def rates() -> tuple[list[float], bool]:
        engine = ctr.FusedEngine(build(), learning_rate=0.01, embedding_learning_rate=0.04, sharding="table_wise")
        engine.learning_rates = [rate / 2 for rate in engine.learning_rates]
        before = engine.weights()
        engine.learning_rates = [0.0, 0.0]
        engine.model.train()
        engine.step(part(example_batch(SCHEMA, 32)))
        after = engine.weights()
        learned = [name for name in before if "running_" not in name and "num_batches" not in name]
        return engine.learning_rates, all(torch.equal(before[name], after[name]) for name in learned)

    assert run_ranks(2, rates) == [([0.0, 0.0], True)] * 2
