"""Look-ups by hashing into one table: the hash functions, what they mean for gradients and AUC, and every engine."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

import ctrlib as ctr
from ctrlib.distributed import rank
from ctrlib.embeddings import unified
from ctrlib.embeddings.hashing import MAX_ROWS, Lookup, hash_bags, repeat_bags, rows_of, seed_of, splitmix64
from ctrlib.embeddings.unified import UnifiedTables, proportional_rows
from ctrlib.metrics import auc
from ctrlib.schema import Categorical, MultiValued, Numeric, RawId, Schema, Sequence
from ctrlib.testing import check_embedding, example_batch, example_schema

EXTREMES = [0, 1, -1, -7, 2**31, 2**40, 2**40 + 1, 2**63 - 1, -(2**63)]


def reference_row(vocabulary: str, chunk: int, value: int, rows: int) -> int:
    """The definition, in Python's integers."""
    mask = 2**64 - 1
    digest = hashlib.blake2b(f"ctrlib/ue/v1|{vocabulary}|{chunk}".encode(), digest_size=8).digest()
    z = (value * 0x9E3779B97F4A7C15 + int.from_bytes(digest, "little")) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 32) * rows >> 32


def bags(**of_keys: list[list[int]]) -> KeyedJaggedTensor:
    """The rows of each key as lists of ids."""
    rows = [row for column in of_keys.values() for row in column]
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return KeyedJaggedTensor.from_lengths_sync(list(of_keys), values, torch.tensor([len(row) for row in rows]))


def singles(**of_keys: Tensor) -> KeyedJaggedTensor:
    """One id in every bag."""
    values = torch.cat(list(of_keys.values()))
    return KeyedJaggedTensor(list(of_keys), values, lengths=torch.ones_like(values))


def lookups(features: Any, rows: int, chunks: int = 1) -> list[Lookup]:
    return UnifiedTables(features, num_embeddings=rows, embedding_dim=chunks, width=1).lookups


def count_rows(tables: UnifiedTables) -> UnifiedTables:
    """Every number in row m becomes m, so that what is read tells from where."""
    (bag,) = tables.tables.embedding_bags.values()
    with torch.no_grad():
        bag.weight.copy_(torch.arange(tables.num_embeddings)[:, None].expand_as(bag.weight))
    return tables


# -------------------------------------------------------------------------------------------------------------- hashing


def test_splitmix64_gives_the_published_sequence() -> None:
    bits = splitmix64(torch.arange(1, 6), 1234567)
    assert [int(value) % 2**64 for value in bits] == [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]


def test_rows_are_those_of_the_definition_for_any_64_bits() -> None:
    ids = torch.tensor(EXTREMES)
    for rows in (1, 3, 1000, 84_000, MAX_ROWS):
        want = [reference_row("item", 2, value, rows) for value in EXTREMES]
        assert rows_of(ids, seed_of("ctrlib/ue/v1", "item", 2), rows).tolist() == want
        look = Lookup("item", "x", seed_of("ctrlib/ue/v1", "item", 2), rows)
        assert hash_bags(singles(item=ids), [look]).values().tolist() == want
    assert len(set(splitmix64(ids, 5).tolist())) == len(EXTREMES)
    narrow = singles(item=torch.tensor([7, -7, 2**31 - 1], dtype=torch.int32))
    wide = hash_bags(singles(item=narrow.values().long()), lookups([RawId("item")], 1000))
    assert torch.equal(hash_bags(narrow, lookups([RawId("item")], 1000)).values(), wide.values())


def test_bags_are_hashed_as_ids_are_and_copied_with_their_weights() -> None:
    sparse = bags(a=[[1, 2], [], [3]], b=[[], [4], [1]])
    sparse = KeyedJaggedTensor(sparse.keys(), sparse.values(), torch.arange(5) / 4, lengths=sparse.lengths())
    before = sparse.values().clone()
    looks = [Lookup("b", "x", 5, 1000), Lookup("a", "y", -6, 50, 100), Lookup("b", "z", 7, 10, 40, step=3)]
    rows = hash_bags(sparse, looks)
    assert rows.keys() == ["x", "y", "z"]
    assert rows.lengths().tolist() == [0, 1, 1, 2, 0, 1, 0, 1, 1]
    assert rows.weights().tolist() == [0.75, 1.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    a, b = torch.tensor([1, 2, 3]), torch.tensor([4, 1])
    want = [rows_of(b, 5, 1000), rows_of(a, -6, 50) + 100, (rows_of(b, 7, 10) + 3) % 10 + 40]
    assert torch.equal(rows.values(), torch.cat(want))
    assert torch.equal(sparse.values(), before)
    whole = repeat_bags(sparse, ["a", "b"], ["a", "b"])
    whole.values().zero_()
    assert torch.equal(sparse.values(), before)
    with pytest.raises(ValueError, match=r"has features \['a', 'b'\], without \['c'\]"):
        hash_bags(sparse, [Lookup("c", "c#0", 1, 10)])
    with pytest.raises(ValueError, match="expected 1 to 2147483647 rows"):
        Lookup("a", "a#0", 1, MAX_ROWS + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_rows() -> None:
    sparse, looks = singles(item=torch.tensor(EXTREMES)), lookups([RawId("item")], 84_000, chunks=3)
    assert torch.equal(
        hash_bags(sparse.to(torch.device("cuda")), looks).values().cpu(), hash_bags(sparse, looks).values()
    )


def test_look_ups_are_independent() -> None:
    """Two values share all k rows with probability M^-k, an id shares one with itself in another feature with 1 / M."""
    rows, ids = 64, torch.arange(10_000)
    features = [RawId(f"f{number}") for number in range(100)]
    sparse = singles(**{feature.name: ids for feature in features})
    first, second = hash_bags(sparse, lookups(features, rows, chunks=2)).values().view(100, 2, -1).unbind(1)
    pairs = [(first == first.roll(shift, 1)) & (second == second.roll(shift, 1)) for shift in (1, 3)]
    assert torch.stack(pairs).double().mean().item() == pytest.approx(rows**-2, rel=0.2)  # 488 expected, sd 22
    for one, other in ((first, second), (first, first.roll(1, 0)), (second, first.roll(1, 0))):
        assert (one == other).double().mean().item() == pytest.approx(1 / rows, rel=0.05)
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1]
        assert abs(correlation.item()) < 4 / 1000
    counts = first.flatten().bincount(minlength=rows).double()
    expected = counts.mean()
    assert ((counts - expected).square() / expected).sum() < rows + 4 * math.sqrt(2 * rows)
    # Hash functions that forget their seeds always collide.
    alike = hash_bags(sparse, [Lookup(feature.name, feature.name, 5, rows) for feature in features]).values()
    assert torch.equal(alike.view(100, -1), alike.view(100, -1).roll(1, 0))


# ------------------------------------------------------------------------------------------------ which rows a field is


def test_other_features_may_come_and_go() -> None:
    item, user, shop = RawId("item"), RawId("user"), RawId("shop")
    ids = torch.tensor(EXTREMES)
    sparse = singles(item=ids, user=ids, shop=ids, history=ids)
    whole = hash_bags(sparse, lookups([item, user, shop], 1000, chunks=2))
    for others in ([item], [user, item], [shop, item, user], [Sequence("history", vocabulary="item"), item]):
        fewer = hash_bags(sparse, lookups(others, 1000, chunks=2))
        for key in ("item#0", "item#1"):
            assert torch.equal(fewer[key].values(), whole[key].values())
    shares = {"item": 100, "user": 50}
    forth, back = (UnifiedTables(order, num_embeddings=shares).lookups for order in ([item, user], [user, item]))
    assert sorted(forth, key=lambda look: look.key) == sorted(back, key=lambda look: look.key)


def test_chunks_stand_in_numeric_order() -> None:
    tables = count_rows(UnifiedTables([RawId("item"), RawId("user")], num_embeddings=999, embedding_dim=24, width=2))
    ids = torch.tensor(EXTREMES)
    pooled = tables(singles(item=ids, user=ids))
    assert pooled.keys() == ["item", "user"]
    for name in ("item", "user"):
        want = [[reference_row(name, chunk // 2, value, 999) for chunk in range(24)] for value in EXTREMES]
        assert pooled[name].tolist() == want


class Backwards(nn.Module):
    """Tables whose keys come in an order of their own, as those of TorchRec may when they are sharded."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, rows: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.tables(rows)
        keys = pooled.keys()[::-1]
        return KeyedTensor(keys, pooled.length_per_key()[::-1], torch.cat([pooled[key] for key in keys], dim=1))


def test_the_order_in_which_tables_answer_does_not_matter() -> None:
    tables = UnifiedTables(example_schema().features, num_embeddings=40, embedding_dim=8, width=4)
    sparse = example_batch(example_schema(), 9).sparse
    before = tables(sparse)
    tables.tables = Backwards(tables.tables)
    after = tables(sparse)
    assert after.keys() == before.keys()
    assert torch.equal(after.values(), before.values())


def test_features_of_one_vocabulary_read_the_same_rows() -> None:
    features = [Categorical("item"), Sequence("history", vocabulary="item"), Categorical("user")]
    tables = UnifiedTables(features, num_embeddings=1000, embedding_dim=8, width=4)
    ids = torch.arange(50)
    pooled = tables(singles(item=ids, history=ids, user=ids))
    assert torch.equal(pooled["item"], pooled["history"])
    assert not torch.isclose(pooled["item"], pooled["user"]).all(1).any()


def test_look_ups_of_a_block_read_neighbouring_rows() -> None:
    """ROBE-Z: blocks of Z numbers, the array being a ring; with width 1 they begin anywhere."""
    tables = count_rows(UnifiedTables([RawId("item")], num_embeddings=7, embedding_dim=6, width=1, block=3))
    ids = torch.arange(100)
    field = tables(singles(item=ids)).values()
    starts = [[reference_row("item", block, value, 7) for block in range(2)] for value in range(100)]
    assert field.tolist() == [[(start + step) % 7 for start in row for step in range(3)] for row in starts]
    assert {start for row in starts for start in row} == set(range(7))


def test_a_share_of_rows_for_each_vocabulary() -> None:
    features = [Categorical("user", num_embeddings=600), Categorical("item", num_embeddings=300), MultiValued("tags")]
    shares = {"user": 60, "tags": 5, "item": 30}
    tables = count_rows(UnifiedTables(features, num_embeddings=shares, embedding_dim=2, width=1))
    ids = torch.arange(500)
    pooled = tables(singles(user=ids, item=ids, tags=ids))
    # One below the other, by name.
    assert pooled["item"].unique().tolist() == list(range(30))
    assert pooled["tags"].unique().tolist() == list(range(30, 35))
    assert pooled["user"].unique().tolist() == list(range(35, 95))
    assert sum(weight.numel() for weight in tables.parameters()) == 95 * 2 // 2


def test_shares_are_proportional_and_add_up() -> None:
    sizes = {"user": 6043, "movie": 3639, "gender": 5, "age": 10, "occupation": 24, "zip": 3442}
    features = [Categorical(name, num_embeddings=size) for name, size in sizes.items()]
    history = Sequence("history", vocabulary="movie", num_embeddings=3639)
    total = sum(sizes.values())
    for rows in (6, 7, 100, 1316, 13_163):
        shares = proportional_rows([*features, Numeric("price"), history], rows)
        assert sum(shares.values()) == rows
        assert min(shares.values()) >= 1
        if rows > 100:
            for name, share in shares.items():
                assert share == pytest.approx(rows * sizes[name] / total, abs=6)
    assert proportional_rows(features, 100, collisionless=["user", "movie", "zip"]).keys() == {
        "gender",
        "age",
        "occupation",
    }
    with pytest.raises(ValueError, match="num_embeddings=5: expected a row or more"):
        proportional_rows(features, 5)
    with pytest.raises(ValueError, match="has raw ids"):
        proportional_rows([RawId("user")], 5)


def test_fewer_look_ups_make_a_narrower_field_filled_up_with_zeros() -> None:
    features = [RawId("item"), RawId("sex"), RawId("user")]
    tables = UnifiedTables(features, num_embeddings=50, embedding_dim=8, width=2, lookups={"sex": 1})
    ids = torch.arange(20)
    pooled = tables(singles(item=ids, sex=ids, user=ids))
    whole = UnifiedTables(features, num_embeddings=50, embedding_dim=8, width=2)
    whole.tables.load_state_dict(
        {"embedding_bags.unified.weight": tables.tables.embedding_bags["unified"].weight}, False
    )
    want = whole(singles(item=ids, sex=ids, user=ids))
    assert torch.equal(pooled["item"], want["item"])
    assert torch.equal(pooled["user"], want["user"])
    assert torch.equal(pooled["sex"][:, :2], want["sex"][:, :2])
    assert not pooled["sex"][:, 2:].any()
    assert pooled["sex"][:, :2].all()


def test_collisionless_vocabularies_keep_a_row_for_each_id() -> None:
    schema = example_schema()
    tables = UnifiedTables(
        schema.features, num_embeddings=40, embedding_dim=8, width=4, collisionless=["item", "genres"], suffix="_x"
    )
    assert sum(weight.numel() for weight in tables.parameters()) == 40 * 4 + (30 + 10) * 8
    batch = example_batch(schema, 9)
    pooled = tables(batch.sparse)
    assert pooled.keys() == ["user", "item", "genres", "history"]
    for name, table in {"item": "item", "history": "item", "genres": "genres"}.items():
        weight = tables.own.embedding_bags[f"table_{table}_own_x"].weight
        for row, ids in enumerate(batch.sparse[name].to_dense()):
            want = weight[ids].mean(0) if len(ids) else torch.zeros(8)
            torch.testing.assert_close(pooled[name][row], want)
    alone = UnifiedTables([schema["user"]], num_embeddings=40, embedding_dim=8, width=4)
    alone.tables.embedding_bags["unified"].load_state_dict(tables.tables.embedding_bags["unified_x"].state_dict())
    assert torch.equal(alone(batch.sparse)["user"], pooled["user"])


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_bags_are_the_pooled_vectors_of_their_ids(pooling: Any) -> None:
    features = [MultiValued("tags", pooling=pooling), Categorical("item"), MultiValued("words", pooling="sum")]
    tables = UnifiedTables(features, num_embeddings=200, embedding_dim=6, width=2)
    ids = [[5], [], [5, 9, 9, 2**41], [-3, 5]]
    pooled = tables(bags(tags=ids, item=[[1]] * 4, words=ids))
    assert not pooled["tags"][1].any()
    for row, bag in enumerate(ids):
        if not bag:
            continue
        vectors = tables(bags(tags=[[value] for value in bag], item=[[1] for _ in bag], words=[[] for _ in bag]))[
            "tags"
        ]
        want = vectors.mean(0) if pooling == "mean" else vectors.sum(0)
        torch.testing.assert_close(pooled["tags"][row], want, atol=1e-8, rtol=1e-6)


def test_texts_mean_the_same_in_all_preparations(tmp_path: Path) -> None:
    texts = ["alice", "zoë", "😀", "bob", "012", None]
    frames = [
        pl.DataFrame({"user": texts, "label": [0, 1] * 3}),
        pl.DataFrame({"user": ["carol", *texts[::-1]], "label": [1, *[1, 0] * 3]}),
    ]
    fields = []
    for number, frame in enumerate(frames):
        schema = ctr.prepare({"train": frame}, tmp_path / str(number), features=[RawId("user")], log=None)
        torch.manual_seed(0)
        tables = UnifiedTables(schema.features, num_embeddings=1000, embedding_dim=8, width=4)
        (batch,) = ctr.Loader(tmp_path / str(number), "train", batch_size=frame.height)
        fields.append(tables(batch.sparse).values())
    assert torch.equal(fields[0], fields[1].flip(0)[:6])
    assert len(fields[1].unique(dim=0)) == 7


# ---------------------------------------------------------------------------------------------------------- the theory


def logistic(tables: UnifiedTables, theta: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
    """z_i = sum_t <theta_t, e_t(x_it)>."""
    return tables(sparse).values() @ theta.flatten()


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradients_are_true_ones_plus_collisions_within_and_between_features(chunks: int) -> None:
    """dL/dE_m = sum_t theta_t sum_{v: h_t(v) = m} rho_t(v), rho_t(v) the summed residuals of the rows with v."""
    generator = torch.Generator().manual_seed(0)
    features = [RawId("a"), RawId("b"), MultiValued("c", pooling="sum")]
    count, rows, width = 60, 7, 4
    tables = UnifiedTables(features, num_embeddings=rows, embedding_dim=chunks * width, width=width).double()
    theta = torch.randn(3, chunks, width, generator=generator, dtype=torch.float64)
    columns = {
        "a": torch.randint(-9, 9, (count, 1), generator=generator).tolist(),
        "b": torch.randint(-9, 9, (count, 1), generator=generator).tolist(),
        "c": [torch.randint(-9, 9, (i % 4,), generator=generator).tolist() for i in range(count)],
    }
    labels = torch.randint(0, 2, (count,), generator=generator).double()
    logits = logistic(tables, theta, bags(**columns))
    nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum").backward()
    residuals = (logits.sigmoid() - labels).detach()
    want = torch.zeros(rows, width, dtype=torch.float64)
    for t, (name, column) in enumerate(columns.items()):
        for value in {value for row in column for value in row}:
            rho = sum(residuals[i] * row.count(value) for i, row in enumerate(column))
            for chunk in range(chunks):
                want[reference_row(name, chunk, value, rows)] += theta[t, chunk] * rho
    (weight,) = tables.parameters()
    assert weight.grad is not None
    assert (weight.grad - want).abs().max() < 1e-10
    assert want.abs().min() > 0


def test_orthogonal_read_outs_undo_collisions_between_features() -> None:
    """A step on data of feature b alone does not move the logits of feature a, though they share all rows."""
    generator = torch.Generator().manual_seed(0)
    features = [MultiValued("a", pooling="sum"), MultiValued("b", pooling="sum")]
    orthogonal = torch.linalg.qr(torch.randn(4, 2, generator=generator, dtype=torch.float64))[0].T
    ids = [[value] for value in range(50)]
    none: list[list[int]] = [[] for _ in ids]
    for theta, orthogonally in ((orthogonal, True), (orthogonal[:1].expand(2, 4), False)):
        tables = UnifiedTables(features, num_embeddings=5, embedding_dim=4).double()
        before = logistic(tables, theta, bags(a=ids, b=none)).detach()
        logits = logistic(tables, theta, bags(a=none, b=ids))
        nn.functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits)).backward()
        torch.optim.SGD(tables.parameters(), lr=10.0).step()
        moved = (logistic(tables, theta, bags(a=ids, b=none)) - before).abs().max().item()
        assert moved < 1e-12 if orthogonally else moved > 0.1
        assert (logistic(tables, theta, bags(a=none, b=ids)) - logits).abs().min() > 0.1


class Zipf:
    """Rows of features with Zipf's frequencies, and labels of a model of second order on them."""

    def __init__(self, *, num_features: int, num_values: int, second_order: float) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.names = [f"f{number}" for number in range(num_features)]
        self.features = [Categorical(name, num_embeddings=num_values) for name in self.names]
        self.frequencies = 1 / torch.arange(1.0, num_values + 1)
        self.first = 0.8 * torch.randn(num_features, num_values, generator=self.generator)
        self.second = second_order * torch.randn(num_features, num_values, 4, generator=self.generator)

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """(F, count) ids and (count,) labels."""
        draw = [self.frequencies.multinomial(count, replacement=True, generator=self.generator) for _ in self.names]
        vectors = torch.stack([self.second[t][ids] for t, ids in enumerate(draw)])
        logits = sum(self.first[t][ids] for t, ids in enumerate(draw))
        logits = logits + 0.5 * (vectors.sum(0).square() - vectors.square().sum(0)).sum(1)
        return torch.stack(draw), torch.bernoulli(logits.sigmoid(), generator=self.generator)

    def batch(self, ids: Tensor, labels: Tensor) -> ctr.Batch:
        size = len(labels)
        return ctr.Batch(singles(**dict(zip(self.names, ids))), torch.zeros(size, 0), labels[:, None], torch.ones(size))


def test_sharing_beats_splitting_and_two_narrow_look_ups_one_wide() -> None:
    """At a tenth of the collisionless table's bytes."""
    teacher = Zipf(num_features=6, num_values=2000, second_order=0.35)
    (ids, labels), test = teacher.rows(120_000), teacher.rows(20_000)
    budget = 6 * 2000 // 10

    def trained(**arguments: Any) -> float:
        torch.manual_seed(0)
        tables = UnifiedTables(teacher.features, embedding_dim=16, **arguments)
        assert sum(weight.numel() for weight in tables.parameters()) == budget * 16
        embedding = ctr.TableEmbedding(teacher.features, embedding_dim=16, tables=tables)
        tower = ctr.MLP(embedding.out_shape, hidden=(64, 32))
        engine = ctr.ExactEngine(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape)), learning_rate=2e-3)
        for rows in torch.randperm(len(labels)).split(500):
            engine.step(teacher.batch(ids[:, rows], labels[rows]))
        with torch.no_grad():
            return auc(test[1].numpy(), engine.model(teacher.batch(*test))[:, 0].numpy())

    split = trained(num_embeddings=proportional_rows(teacher.features, budget))
    shared = trained(num_embeddings=budget)
    narrow = trained(num_embeddings=2 * budget, width=8)
    assert shared - split >= 0.03, (split, shared)
    assert narrow >= shared, (shared, narrow)


def test_read_outs_turn_away_from_each_other_the_more_rows_are_shared() -> None:
    """They start all alike, at angle 0."""

    def mean_angle(num_embeddings: int) -> float:
        teacher = Zipf(num_features=12, num_values=500, second_order=0.0)
        ids, labels = teacher.rows(20_000)
        torch.manual_seed(0)
        tables = UnifiedTables(teacher.features, num_embeddings=num_embeddings, embedding_dim=16)
        theta = nn.Parameter(torch.randn(16).repeat(12, 1))
        optimiser = torch.optim.Adam([theta, *tables.parameters()], lr=0.02)
        for _ in range(300):
            rows = torch.randint(0, len(labels), (500,))
            logits = logistic(tables, theta, singles(**dict(zip(teacher.names, ids[:, rows]))))
            optimiser.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(logits, labels[rows]).backward()
            optimiser.step()
        directions = nn.functional.normalize(theta.detach(), dim=1)
        pairs = [directions[one] @ directions[other] for one, other in itertools.combinations(range(12), 2)]
        return torch.rad2deg(torch.stack(pairs).clamp(-1, 1).arccos()).mean().item()

    angles = [mean_angle(num_embeddings) for num_embeddings in (3200, 1600, 800)]
    assert 40 < angles[0] < angles[1] < angles[2], angles


# -------------------------------------------------------------------------------------------- contract, state, engines


def make(schema: Schema, **arguments: Any) -> ctr.TableEmbedding:
    given = {"num_embeddings": 40, "embedding_dim": 8, "width": 4, **arguments}
    return ctr.TableEmbedding(schema.features, embedding_dim=8, tables=UnifiedTables(schema.features, **given))


SHARES = {"user": 10, "item": 20, "genres": 10}
VARIANTS: dict[str, dict[str, Any]] = {
    "multiplexed": {},
    "one look-up": {"width": 8},
    "narrow": {"lookups": {"user": 1, "history": 1}},
    "hashing": {"num_embeddings": SHARES, "width": 8},
    "robe": {"block": 2},
    "collisionless": {"collisionless": ["genres"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_keeps_the_contract_of_an_embedding(variant: str) -> None:
    check_embedding(lambda schema: make(schema, **VARIANTS[variant]))


def test_raw_ids_keep_the_contract() -> None:
    schema = Schema((RawId("user", form="integer"), *example_schema().features[1:]), ("label",))
    check_embedding(make, schema=schema)


def test_weights_are_the_table_and_nothing_else() -> None:
    """M * w numbers, on disk and in memory, however many values and features there are."""
    for count, size in ((1, 10), (30, 10**9)):
        features = [Categorical(f"f{number}", num_embeddings=size) for number in range(count)]
        tables = UnifiedTables(features, num_embeddings=123, embedding_dim=16, width=4)
        (weight,) = tables.parameters()
        assert weight.untyped_storage().nbytes() == 123 * 4 * 4
        # Beside it, the seed map: 32 bytes for each look-up.
        assert sum(buffer.nbytes for buffer in tables.buffers()) == 32 * (count * 4 + 1)
        assert weight.abs().max() <= 0.05
        assert weight.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.1)


def model(**arguments: Any) -> ctr.Model:
    torch.manual_seed(0)
    embedding = make(example_schema(), **arguments)
    tower = ctr.MLP(embedding.out_shape, hidden=(8,))
    return ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))


def test_a_saved_model_reads_the_same_rows(tmp_path: Path) -> None:
    first = model()
    save_file(first.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        second = copy.deepcopy(model())
        for tensor in second.state_dict().values():
            tensor.zero_()
    second.load_state_dict(load_file(tmp_path / "model.safetensors"))
    batch = example_batch(example_schema(), 20)
    assert torch.equal(first(batch), second(batch))
    assert torch.equal(first.state_dict()["embedding.tables.hashing"], second.state_dict()["embedding.tables.hashing"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_embeddings": 41}, "num_embeddings is 40, expected 41"),
        ({"width": 8}, r"width is 4, expected 8; its seed map lacks look-ups \[\] and has 3 that are not expected"),
        ({"block": 2}, r"its seed map lacks look-ups \['user#1', 'item#1', 'genres#1', 'history#1'\] and has 3 that"),
        ({"num_embeddings": {"user": 11, "item": 19, "genres": 10}}, r"look-ups \['user#0', .*\] have other shares"),
        ({"lookups": {"genres": 1}}, r"lacks look-ups \[\] and has 1 that are not expected"),
    ],
)
def test_a_state_that_was_hashed_otherwise_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments).load_state_dict(model().state_dict())


def test_a_state_of_other_names_or_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(name: str) -> UnifiedTables:
        return UnifiedTables([RawId("user"), RawId(name)], num_embeddings=9, embedding_dim=4)

    state = of("item").state_dict()
    of("item").load_state_dict(state)
    with pytest.raises(ValueError, match=r"lacks look-ups \['article#0'\] and has 1 that are not expected"):
        of("article").load_state_dict(state)
    assert repr(of("article")) != repr(of("item")) == repr(of("item"))
    monkeypatch.setattr(unified, "SPACE", "ctrlib/ue/v2")
    with pytest.raises(ValueError, match=r"lacks look-ups \['user#0', 'item#0'\] and has 2 that are not expected"):
        of("item").load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 3}, "multiple of width"),
        ({"block": 0}, "a block of 1 or more"),
        ({"init": 0.0}, "init above 0"),
        ({"num_embeddings": 0}, "expected 1 row or more"),
        ({"num_embeddings": {"user": 5}}, "for each of the hashed vocabularies, \\['user', 'item', 'genres'\\]"),
        ({"lookups": {"history": 3}}, "expected 1 to embedding_dim / width = 2 look-ups"),
        ({"lookups": {"price": 1}}, "for some of \\['user', 'item', 'genres', 'history'\\]"),
        ({"collisionless": ["history"]}, "of the vocabularies \\['user', 'item', 'genres'\\]"),
        ({"collisionless": ["user", "item", "genres"]}, "some, but not all"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(example_schema(), **arguments)


def part(batch: ctr.Batch, world_size: int) -> ctr.Batch:
    """This rank's rows of a batch."""
    own = batch.size // world_size
    rows = slice(rank() * own, (rank() + 1) * own)
    columns = {key: [row.tolist() for row in jagged.to_dense()[rows]] for key, jagged in batch.sparse.to_dict().items()}
    return ctr.Batch(bags(**columns), batch.dense[rows], batch.labels[rows], batch.weights[rows])


def batches() -> list[ctr.Batch]:
    return [example_batch(example_schema(), 32, seed=seed) for seed in range(6)]


def fused(world_size: int, **arguments: Any) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """Losses of six steps, logits before them, and the weights afterwards."""
    engine = ctr.FusedEngine(model(**arguments), learning_rate=0.01, sharding="row_wise", max_grad_norm=None)
    with torch.no_grad():
        before = engine.model(part(batches()[0], world_size))
    losses = [loss.item() for _, loss in engine.train([part(batch, world_size) for batch in batches()])]
    return losses, before, engine.weights()


@pytest.mark.parametrize("variant", ["multiplexed", "narrow", "collisionless"])
def test_fused_and_sharded_tables_are_the_plain_ones(variant: str) -> None:
    arguments = VARIANTS[variant]
    plain = model(**arguments)
    with torch.no_grad():
        logits = plain(batches()[0])
    # What the fused kernels compute: row-wise Adagrad, here on dense gradients.
    tables = set(ctr.sharding.tables_of(plain))
    named = dict(plain.named_parameters())
    optimisers: list[torch.optim.Optimizer] = [
        ctr.training.RowwiseAdagrad([named[name] for name in tables], lr=0.02),
        ctr.training.make_adam({name: weight for name, weight in named.items() if name not in tables}, 0.01),
    ]
    losses = []
    for batch in batches():
        loss = ctr.binary_cross_entropy(plain(batch), batch.labels, batch.weights)
        for optimiser in optimisers:
            optimiser.zero_grad()
        torch.autograd.backward(loss)
        for optimiser in optimisers:
            optimiser.step()
        losses.append(loss.item())
    (alone,) = run_ranks(1, lambda: fused(1, **arguments))
    together = run_ranks(2, lambda: fused(2, **arguments))
    torch.testing.assert_close(alone[1], logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([of_rank[1] for of_rank in together]), logits, atol=1e-6, rtol=0)
    for got in (alone, *together):
        assert got[0] == pytest.approx(losses, abs=1e-6)
    for got in (alone, together[0]):
        assert got[2].keys() == plain.state_dict().keys()
        for name, weight in plain.state_dict().items():
            torch.testing.assert_close(got[2][name], weight, atol=1e-6, rtol=0, msg=name)
        model(**arguments).load_state_dict(got[2])


class FromTensors(nn.Module):
    """A model that takes what a batch is made of, for `torch.export`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, lengths: Tensor, dense: Tensor) -> Tensor:
        names = [feature.name for feature in example_schema().sparse]
        sparse = KeyedJaggedTensor(names, ids, lengths=lengths, stride=dense.shape[0])
        out: Tensor = self.model(ctr.Batch(sparse, dense, dense[:, :1], dense[:, 0]))
        return out


@pytest.mark.parametrize("variant", ["multiplexed", "hashing", "robe", "collisionless"])
def test_exports_with_dynamic_batches(variant: str) -> None:
    whole = FromTensors(model(**VARIANTS[variant]).eval())
    rows = torch.export.Dim("rows", min=2)
    inputs = [
        (batch.sparse.values(), batch.sparse.lengths(), batch.dense)
        for batch in (example_batch(example_schema(), size, seed=size) for size in (8, 13, 3))
    ]
    shapes = ({0: torch.export.Dim.DYNAMIC}, {0: len(example_schema().sparse) * rows}, {0: rows})
    exported = torch.export.export(whole, inputs[0], dynamic_shapes=shapes).module()
    for example in inputs:
        torch.testing.assert_close(exported(*example), whole(*example))


def test_weights_of_other_seeds_are_refused_by_a_sharded_model_too() -> None:
    def refused() -> str:
        engine = ctr.FusedEngine(model(**VARIANTS["multiplexed"]))
        weights = engine.weights()
        (name,) = (name for name in weights if name.endswith(".hashing"))
        weights[name] = weights[name] + 1
        with pytest.raises(ValueError, match="ids have other rows there"):
            engine.load_weights(weights)
        return name

    assert run_ranks(1, refused) == ["embedding.tables.hashing"]
