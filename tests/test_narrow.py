"""Narrow tables: every id's vector against decode-then-pool written out, and the public contract."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib.distributed import rank, world_size
from ctrlib.embeddings.narrow import NarrowTable, NarrowTables, count_bits
from ctrlib.schema import MISSING_ID, OOV_ID, PADDING_ID, Categorical, MultiValued, Numeric, Schema
from ctrlib.sharding.sharded import shard
from ctrlib.testing import check_embedding, example_batch, example_schema

SCHEMA = example_schema()
DIM = 8


def example_tables(**changes: Any) -> list[NarrowTable]:
    """One of each kind: a cut, a bitmap with a mean and two features, and zeros for what was dropped."""
    user = {"rows": 20, "rank": 4, "kept": "first", "num_kept": 12, "centred": False}
    item = {"rows": 30, "rank": 4, "kept": "some", "num_kept": 17, "pooling": "mean"}
    genres = {"rows": 10, "rank": 8, "kept": "first", "num_kept": 6, "pooling": "mean", "dropped_to": PADDING_ID}
    return [
        NarrowTable("user", ("user",), **{**user, **changes}),  # type: ignore[arg-type]
        NarrowTable("item", ("item", "history"), **{**item, **changes}),  # type: ignore[arg-type]
        NarrowTable("genres", ("genres",), **{**genres, **changes}),  # type: ignore[arg-type]
    ]


def build(lookup: NarrowTables) -> ctr.Model:
    embedding = ctr.TableEmbedding(SCHEMA.features, embedding_dim=DIM, tables=lookup)
    tower = ctr.Parallel(ctr.MLP(embedding.out_shape, hidden=(8,)), ctr.FM(embedding.out_shape))
    return ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape, unweighted=1))


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough for every one to matter."""
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)


def test_keeps_the_contract() -> None:
    def make(schema: Schema) -> nn.Module:
        lookup = NarrowTables(example_tables(), embedding_dim=DIM)
        return ctr.TableEmbedding(schema.features, embedding_dim=DIM, tables=lookup)

    torch.manual_seed(0)
    check_embedding(make)
    check_embedding(
        lambda schema: ctr.TableEmbedding(
            schema.features,
            embedding_dim=DIM,
            tables=NarrowTables(example_tables(kept="all", num_kept=None, rank=3, centred=True), embedding_dim=DIM),
        )
    )


@pytest.mark.parametrize(
    ("kept", "dropped_to"), [("all", OOV_ID), *itertools.product(("first", "some"), (OOV_ID, PADDING_ID))]
)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("rank", [3, 5])
def test_bags_are_decoded_then_pooled(pooling: Any, is_weighted: bool, kept: Any, dropped_to: int, rank: int) -> None:
    dim, rows = 5, 150
    generator = torch.Generator().manual_seed(rank)
    num_kept = None if kept == "all" else 70
    table = NarrowTable("v", ("a", "b"), rows, rank, pooling, kept, num_kept, dropped_to)
    other = NarrowTable("w", ("c",), 9, 3, kept="some", num_kept=4)
    lookup = NarrowTables([other, table], embedding_dim=dim, names=["a", "c", "b"], is_weighted=is_weighted)
    randomise(lookup)
    full = torch.randn(rows, dim, generator=generator)
    ids = 3 + torch.randperm(rows - 3, generator=generator)[: (num_kept or rows) - 3].sort().values
    some = torch.cat([torch.arange(3), ids]) if kept == "some" else None
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q[:rank] if rank < dim else None
    mean = torch.randn(dim, generator=generator) if rank < dim else None
    lookup.fill("v", full, kept=some, mean=mean, decoder=basis)

    decoded = full.double()
    if mean is not None and basis is not None:
        decoded = (full.double() - mean.double()) @ basis.double().T @ basis.double() + mean.double()
    has_row = torch.zeros(rows, dtype=torch.bool)
    has_row[torch.arange(num_kept or rows) if some is None else some] = True
    decoded[~has_row] = 0.0 if dropped_to == PADDING_ID else decoded[OOV_ID].clone()

    lengths = torch.tensor([0, 1, 3, 2, 0, 1, 1, 1, 1, 3, 0, 1])  # of a, c and b
    values = torch.randint(1, rows, (14,), generator=generator)
    values[lengths[:4].sum() : lengths[:8].sum()] %= 9
    assert has_row[values].any() and (kept == "all" or not has_row[values].all())
    weights = torch.rand(14, generator=generator) + 0.5 if is_weighted else None
    pooled = lookup(KeyedJaggedTensor.from_lengths_sync(["a", "c", "b"], values, lengths, weights)).to_dict()
    starts = lengths.cumsum(0) - lengths
    for name, bags in (("a", range(4)), ("b", range(8, 12))):
        for row, bag in enumerate(bags):
            own = slice(int(starts[bag]), int(starts[bag] + lengths[bag]))
            vectors = decoded[values[own]] * (1.0 if weights is None else weights[own].double().unsqueeze(1))
            expected = vectors.sum(0) / (max(int(lengths[bag]), 1) if pooling == "mean" else 1)
            torch.testing.assert_close(pooled[name][row].double(), expected, atol=2e-6, rtol=0)
    assert list(pooled) == ["a", "c", "b"]


def test_ids_find_their_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (64, 40), "b": (129, 128), "c": (500, 3), "d": (200, 200)}
    tables = [NarrowTable(n, (n,), rows, 1, kept="some", num_kept=k) for n, (rows, k) in sizes.items()]
    lookup = NarrowTables([*tables, NarrowTable("e", ("e",), 50, 1, kept="first", num_kept=7)], embedding_dim=1)
    names = ["unknown", *reversed(lookup.names)]
    kept = {}
    for name, (rows, num_kept) in sizes.items():
        rest = 3 + torch.randperm(rows - 3, generator=generator)[: num_kept - 3].sort().values
        kept[name] = torch.cat([torch.arange(3), rest])
        lookup.fill(name, torch.arange(rows).float().unsqueeze(1), kept=kept[name])  # a row holds its id
    lookup.fill("e", torch.arange(50.0).unsqueeze(1))
    values = torch.stack(
        [
            torch.randint(
                0, {"e": 50, **{n: r for n, (r, _) in sizes.items()}}.get(name, 10**9), (900,), generator=generator
            )
            for name in names
        ]
    )
    out = lookup(KeyedJaggedTensor.from_lengths_sync(names, values.flatten(), torch.ones(values.numel()).long()))
    for name in lookup.names:
        ids = values[names.index(name)]
        has_row = torch.isin(ids, kept[name]) if name != "e" else ids < 7
        assert torch.equal(out[name][:, 0], torch.where(has_row, ids, OOV_ID).float())


def test_bits_are_counted() -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(0))
    assert count_bits(words).tolist() == [(word & (2**64 - 1)).bit_count() for word in words.tolist()]


@pytest.mark.parametrize("wrong", [-1, 20, 63, 2**40])
@pytest.mark.parametrize("kept", ["first", "some"])
def test_an_id_beyond_its_vocabulary_is_not_taken_for_another(kept: Any, wrong: int) -> None:
    table = NarrowTable("v", ("a",), 20, 4, kept=kept, num_kept=10)
    beside = NarrowTable("w", ("b",), 20, 4, kept="some", num_kept=10)
    kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([3, wrong, 4, 5]), torch.ones(4).long())
    with pytest.raises((RuntimeError, IndexError)):
        NarrowTables([table, beside], embedding_dim=8)(kjt)


def test_wrong_ids_are_refused_by_fused_kernels_too() -> None:
    def refused() -> str:
        lookup = shard(NarrowTables([NarrowTable("v", ("a",), 20, 4, kept="first", num_kept=10)], embedding_dim=8))
        with pytest.raises(RuntimeError):
            lookup(KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([3, 20]), torch.ones(2).long()))
        return "refused"

    assert run_ranks(1, refused) == ["refused"]


def test_bytes_are_those_allocated_and_a_description_makes_the_same_module() -> None:
    lookup = NarrowTables(example_tables(), embedding_dim=DIM)
    randomise(lookup)
    lookup.fill(
        "item", torch.randn(30, DIM), kept=torch.tensor([0, 1, 2, *range(9, 23)]), mean=torch.ones(DIM),
        decoder=torch.eye(DIM)[:4],
    )  # fmt: skip
    counted = [table.num_bytes(DIM) for table in lookup.stored.values()]
    allocated = [tensor.numel() * tensor.element_size() for tensor in (*lookup.parameters(), *lookup.buffers())]
    assert sum(sum(parts.values()) for parts in counted) == sum(allocated)
    # 12 rows of 4, 17 of 4, 6 of 8; a bitmap of one word; decoders of 4 x 8, one with a mean
    assert [list(parts.values()) for parts in counted] == [[192, 0, 128], [272, 12, 160], [192, 0, 0]]

    again = NarrowTables(**json.loads(json.dumps(lookup.describe())))
    again.load_state_dict(lookup.state_dict())
    batch = example_batch(SCHEMA, 16)
    assert torch.equal(again(batch.sparse).values(), lookup(batch.sparse).values())


def test_dropped_ids_that_read_zero_train_nothing() -> None:
    table = NarrowTable("v", ("a",), 20, 4, kept="first", num_kept=10, dropped_to=PADDING_ID)
    lookup = NarrowTables([table], embedding_dim=8)
    kjt = KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([15, 5]), torch.tensor([1, 1]))
    out = lookup(kjt)["a"]
    out.sum().backward()
    assert not out[0].any() and out[1].any()
    touched = lookup.tables.embedding_bags["table_v"].weight.grad.abs().sum(1).nonzero()
    assert touched.flatten().tolist() == [5]
    assert lookup.means["rank_4_centred"].grad.tolist() == [[1.0] * 8]  # once, not twice


def test_wide_weights_can_be_cut() -> None:
    wide = ctr.Wide(SCHEMA.features, num_tasks=2)
    randomise(wide)
    batch = example_batch(SCHEMA, 32)
    before = {name: bag.weight.detach().clone() for name, bag in wide.tables.embedding_bags.items()}
    tables = [
        NarrowTable("user", ("user",), 20, 2, kept="first", num_kept=10),
        NarrowTable("item", ("item", "history"), 30, 2, pooling="mean"),
        NarrowTable("genres", ("genres",), 10, 2, pooling="mean"),
    ]
    narrow = NarrowTables(tables, embedding_dim=2)
    for table in tables:
        narrow.fill(table.name, before[f"table_{table.name}_wide"])
    users = batch.sparse["user"].values()
    lost = before["table_user_wide"][users] - before["table_user_wide"][torch.where(users < 10, users, OOV_ID)]
    expected = wide(batch) - lost
    wide.tables = narrow
    torch.testing.assert_close(wide(batch), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": "none"}, "expected one of"),
        ({"pooling": "max"}, "expected one of"),
        ({"dropped_to": MISSING_ID}, r"expected one of \(2, 0\)"),
        ({"rank": 0}, "rank 1 or more"),
        ({"rows": 2}, "reserved ids"),
        ({"feature_names": ()}, "one feature or more"),
        ({"num_kept": 5}, "'first' and 'some' only"),
        ({"kept": "first"}, "'first' and 'some' only"),
        ({"kept": "first", "num_kept": 2}, r"expected 3 \(the reserved ids\) to 20"),
        ({"kept": "some", "num_kept": 21}, r"expected 3 \(the reserved ids\) to 20"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NarrowTable(**{"name": "v", "feature_names": ("a",), "rows": 20, "rank": 4, **changes})


def test_tables_that_do_not_go_together_are_refused() -> None:
    one, other = NarrowTable("v", ("a",), 20, 4), NarrowTable("w", ("a",), 20, 4)
    for tables, arguments, message in (
        ([], {}, "one or more tables"),
        ([one, other], {}, "different names and features"),
        ([one, one], {}, "different names and features"),
        ([one], {"embedding_dim": 3}, "beyond embedding_dim=3"),
        ([one], {"names": ["b"]}, r"tables are those of \['a'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            NarrowTables(tables, **arguments)  # type: ignore[arg-type]
    kjt = KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([3]), torch.tensor([1]), torch.tensor([0.5]))
    with pytest.raises(ValueError, match="come with weights"):
        NarrowTables([one], embedding_dim=8)(kjt)
    with pytest.raises(ValueError, match=r"embedding needs \['user'"):
        ctr.TableEmbedding(SCHEMA.features, embedding_dim=8, tables=NarrowTables([one], embedding_dim=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "w"}, "no table 'w'"),
        ({"full": torch.zeros(19, 8)}, r"full has shape \(19, 8\), expected \(20, 8\)"),
        ({"kept": None}, r"kept has shape None, expected \(5,\)"),
        ({"mean": None}, r"mean has shape None, expected \(8,\)"),
        ({"decoder": torch.eye(8)}, r"decoder has shape \(8, 8\), expected \(4, 8\)"),
        ({"kept": torch.tensor([0, 1, 3, 4, 5])}, "ascend from the reserved ids"),
        ({"kept": torch.tensor([0, 1, 2, 5, 5])}, "ascend"),
        ({"kept": torch.tensor([0, 1, 2, 5, 20])}, "to 19 at most"),
    ],
)
def test_rows_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    lookup = NarrowTables([NarrowTable("v", ("a",), 20, 4, kept="some", num_kept=5)], embedding_dim=8)
    good = {
        "name": "v", "full": torch.zeros(20, 8), "kept": torch.tensor([0, 1, 2, 7, 19]), "mean": torch.zeros(8),
        "decoder": torch.eye(8)[:4],
    }  # fmt: skip
    lookup.fill(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        lookup.fill(**{**good, **arguments})  # type: ignore[arg-type]


class FromTensors(nn.Module):
    """A model of plain tensors: torch.export knows nothing of batches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, lengths: Tensor, dense: Tensor) -> Tensor:
        names = [feature.name for feature in SCHEMA.sparse]
        sparse = KeyedJaggedTensor(names, ids, lengths=lengths, stride=dense.shape[0])
        out: Tensor = self.model(ctr.Batch(sparse, dense, dense[:, :1], dense[:, 0]))
        return out


def test_models_export_with_dynamic_batches() -> None:
    model = build(NarrowTables(example_tables(), embedding_dim=DIM))
    randomise(model)
    plain = FromTensors(model.eval())
    batches = [example_batch(SCHEMA, size, seed=size) for size in (8, 13, 3)]
    inputs = [(batch.sparse.values(), batch.sparse.lengths(), batch.dense) for batch in batches]
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: torch.export.Dim.DYNAMIC}, {0: len(SCHEMA.sparse) * rows}, {0: rows})
    exported = torch.export.export(plain, inputs[0], dynamic_shapes=shapes).module()
    for example in inputs:
        torch.testing.assert_close(exported(*example), plain(*example))


# Training.


def part(batch: ctr.Batch) -> ctr.Batch:
    """This rank's rows of a batch."""
    own = batch.size // world_size()
    rows = slice(rank() * own, (rank() + 1) * own)
    bags = {key: jagged.to_dense()[rows] for key, jagged in batch.sparse.to_dict().items()}
    lengths = torch.tensor([len(row) for column in bags.values() for row in column])
    sparse = KeyedJaggedTensor(
        list(bags), torch.cat([row for column in bags.values() for row in column]), lengths=lengths
    )
    return ctr.Batch(sparse, batch.dense[rows], batch.labels[rows], batch.weights[rows])


def trained(
    engine_of: Any, sharding: Any = None, *, is_pipelined: bool = False, **changes: Any
) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = build(NarrowTables(example_tables(**changes), embedding_dim=DIM, init_std=0.3))
    arguments = {"sharding": sharding} if sharding else {}
    engine = engine_of(model, learning_rate=0.02, **arguments)
    engine.model.train()
    batches = [part(example_batch(SCHEMA, 32, seed=step % 2)) for step in range(12)]
    losses = [loss.item() for _, loss in engine.train(batches)]
    assert bool(getattr(engine, "_pipelined", None)) == is_pipelined
    return losses, engine.weights()


@pytest.mark.parametrize("engine", [ctr.ExactEngine, ctr.FusedEngine])
def test_engines_train_rows_decoders_and_means(engine: Any) -> None:
    ((losses, weights),) = run_ranks(1, lambda: trained(engine))
    torch.manual_seed(0)
    before = build(NarrowTables(example_tables(), embedding_dim=DIM, init_std=0.3)).state_dict()
    assert losses[-2] + losses[-1] < 0.9 * (losses[0] + losses[1])
    moved = {name.removeprefix("embedding.tables.") for name in before if not torch.equal(before[name], weights[name])}
    inside = "tables.embedding_bags.table_"
    assert {f"{inside}user.weight", f"{inside}item.weight", f"{inside}genres.weight"} <= moved
    assert {"decoders.rank_4", "decoders.rank_4_centred", "means.rank_4_centred"} <= moved
    # No feature reads the padding row, and dropped genres read nothing.
    for name in ("user", "item", "genres"):
        assert not weights[f"embedding.tables.{inside}{name}.weight"][PADDING_ID].any()
    assert not {"kept_bits", "kept_before"} & moved


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", None])
def test_two_ranks_train_as_one_does(sharding: Any) -> None:
    engine: Any = ctr.FusedEngine if sharding else ctr.ExactEngine
    (alone,) = run_ranks(1, lambda: trained(engine))
    together = run_ranks(2, lambda: trained(engine, sharding))
    for losses, _ in together:
        assert losses == pytest.approx(alone[0], abs=1e-6)
    for name, weight in alone[1].items():
        torch.testing.assert_close(together[0][1][name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_rows_that_are_ids_are_sent_ahead_by_the_pipeline() -> None:
    whole = {"kept": "all", "num_kept": None, "dropped_to": OOV_ID}

    def run() -> Any:
        return trained(ctr.FusedEngine, "row_wise", is_pipelined=True, **whole)

    (alone,) = run_ranks(1, lambda: trained(ctr.FusedEngine, **whole))
    for losses, _ in run_ranks(2, run):
        assert losses == pytest.approx(alone[0], abs=1e-6)


def test_every_table_is_found_for_sharding() -> None:
    model = build(NarrowTables(example_tables(), embedding_dim=DIM))
    found = {name: config.embedding_dim for name, (_, _, config) in ctr.sharding.tables_of(model).items()}
    inside = "embedding.tables.tables.embedding_bags.table_"
    assert found == {f"{inside}user.weight": 4, f"{inside}item.weight": 4, f"{inside}genres.weight": 8}


def test_numbers_and_part_of_the_features() -> None:
    features = (
        Categorical("a", num_embeddings=9), Numeric("x"), MultiValued("b", num_embeddings=9, pooling="sum"),
    )  # fmt: skip
    schema = Schema(features, ("y",))
    lookup = NarrowTables([NarrowTable("b", ("b",), 9, 4)], embedding_dim=8)
    embedding = ctr.TableEmbedding(features, only=["b", "x"], embedding_dim=8, tables=lookup)
    batch = example_batch(schema, 6)
    out = embedding(batch)
    torch.testing.assert_close(out[:, 1], lookup(batch.sparse)["b"])
    torch.testing.assert_close(out[:, 0], batch.dense * embedding.numeric.vectors)
