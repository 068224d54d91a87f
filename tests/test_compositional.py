"""Quotient-remainder, MEmCom, hash embedding and mixed dimension: the papers' formulas, bytes, AUC, every engine."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib.distributed import rank
from ctrlib.embeddings.compositional import FeatureIds, NumbersPerId, Residues
from ctrlib.embeddings.hash_embedding import HashEmbeddingTables
from ctrlib.embeddings.memcom import MemComTables
from ctrlib.embeddings.mixed_dimension import MixedDimensionTables, mixed_dimensions
from ctrlib.embeddings.quotient_remainder import (
    QuotientRemainderTables,
    num_remainders,
    quotient_remainder_rows,
    smallest_num_rows,
)
from ctrlib.embeddings.unified import UnifiedTables, proportional_rows
from ctrlib.metrics import auc
from ctrlib.schema import Categorical, Feature, MultiValued, Numeric, RawId, Schema, Sequence
from ctrlib.testing import check_embedding, example_batch, example_schema

SCHEMA = example_schema()  # vocabularies of 20 users, 30 items, for a history too, and 10 genres
SINGLE = Schema(
    (
        Categorical("item", num_embeddings=30),
        RawId("user", form="integer"),
        Numeric("price", parameters={}),
        Categorical("genre", num_embeddings=10),
    ),
    ("label",),
)
MAPPED = {"user": 9, "item": 11, "genres": 7}
DIMENSIONS = {"user": 4, "item": 4, "genres": 8}
VARIANTS: dict[str, Callable[..., Any]] = {
    "product": lambda features, **more: QuotientRemainderTables(features, num_embeddings=30, **more),
    "product_mapped": lambda features, **more: QuotientRemainderTables(features, num_embeddings=MAPPED, **more),
    "sum": lambda features, **more: QuotientRemainderTables(features, num_embeddings=30, combine="sum", **more),
    "concat": lambda features, **more: QuotientRemainderTables(features, num_embeddings=30, combine="concat", **more),
    "memcom": lambda features, **more: MemComTables(features, num_embeddings=7, **more),
    "memcom_bias": lambda features, **more: MemComTables(features, num_embeddings=MAPPED, bias=True, **more),
    "hash_embedding": lambda features, **more: HashEmbeddingTables(features, num_embeddings=7, **more),
    "hash_embedding_3": lambda features, **more: HashEmbeddingTables(
        features, num_embeddings=7, num_hashes=3, num_weights=6, **more
    ),
    "mixed": lambda features, **more: MixedDimensionTables(features, dimensions=DIMENSIONS, **more),
}


def build(variant: str, schema: Schema = SCHEMA, **more: Any) -> Any:
    """The variant's tables, with numbers everywhere."""
    torch.manual_seed(0)
    tables = VARIANTS[variant](schema.features, embedding_dim=8, **more)
    for parameter in tables.parameters():
        nn.init.normal_(parameter, std=0.5)
    return tables


def bags(**of_keys: list[list[int]]) -> KeyedJaggedTensor:
    """The rows of each key as lists of ids."""
    rows = [row for column in of_keys.values() for row in column]
    values = torch.tensor([value for row in rows for value in row], dtype=torch.int64)
    return KeyedJaggedTensor.from_lengths_sync(list(of_keys), values, torch.tensor([len(row) for row in rows]))


def fill(tables: Any, **weights: list[list[float]]) -> Any:
    """The tables with these weights."""
    for name, rows in weights.items():
        weight = tables.tables.embedding_bags[name].weight
        assert weight.shape == torch.Size([len(rows), len(rows[0])])
        weight.data = torch.tensor(rows)
    return tables


def vectors(tables: Any, name: str, ids: list[int]) -> list[list[float]]:
    """Of single ids."""
    empty: dict[str, list[list[int]]] = {other: [[0]] * len(ids) for other in tables.names}
    found: list[list[float]] = tables(bags(**{**empty, name: [[value] for value in ids]}))[name].tolist()
    return found


def seed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def hashed(value: int, text: str, rows: int) -> int:
    """splitmix64 from the seed of this text, scaled to rows, in Python's integers."""
    mask = 2**64 - 1
    z = (value * 0x9E3779B97F4A7C15 + seed(text)) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return (z >> 32) * rows >> 32


# The papers' formulas.

ITEM = [Categorical("item", num_embeddings=6)]


@pytest.mark.parametrize(
    ("combine", "remainder", "quotient", "expected"),
    [
        # Id 1 is remainder 1 and quotient 0, id 5 is 2 and 1. Factors are stored less 1.
        ("product", [[1, 2], [3, 4], [5, 6]], [[0, 0.5], [1, -3]], [[3, 6], [10, -12]]),
        ("sum", [[1, 2], [3, 4], [5, 6]], [[0, 0.5], [1, -3]], [[3, 4.5], [6, 3]]),
        ("concat", [[1], [3], [5]], [[0.5], [-3]], [[3, 0.5], [5, -3]]),
    ],
)
def test_quotient_remainder_by_hand(combine: Any, remainder: Any, quotient: Any, expected: Any) -> None:
    tables = QuotientRemainderTables(ITEM, num_embeddings={"item": 5}, combine=combine, embedding_dim=2)
    fill(tables, remainder=[[float(x) for x in row] for row in remainder], quotient=quotient)
    assert vectors(tables, "item", [1, 5]) == expected


def test_memcom_by_hand() -> None:
    tables = MemComTables(ITEM, num_embeddings={"item": 2}, embedding_dim=3)
    fill(tables, memcom=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], memcom_numbers=[[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 9.0, 9.0]])
    # Numbers are stored less 1: ids 2 and 3 multiply by 3 and 4, id 5 by 6.
    assert vectors(tables, "item", [2, 3, 5]) == [[3.0, 6.0, 9.0], [16.0, 20.0, 24.0], [24.0, 30.0, 36.0]]
    tables = MemComTables(ITEM, num_embeddings={"item": 2}, bias=True, embedding_dim=3)
    numbers = [[0.0, 0.0, 0.0, 0.0], [1.0, 0.5, 2.0, -7.0], [0.0, 0.0, 1.0, 100.0]]
    fill(tables, memcom=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], memcom_numbers=numbers)
    assert vectors(tables, "item", [2, 3, 5]) == [[2.5, 4.5, 6.5], [5.0, 8.0, 11.0], [108.0, 110.0, 112.0]]


@pytest.mark.parametrize("num_weights", [None, 4])
def test_hash_embedding_by_hand(num_weights: int | None) -> None:
    pool = [[float(2**row), float(row)] for row in range(5)]
    weights = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]][: num_weights and num_weights // 2]
    tables = HashEmbeddingTables(ITEM, num_embeddings=5, num_weights=num_weights, embedding_dim=2)
    fill(tables, pool=pool, importances=weights)
    for item in range(6):
        owner = item if num_weights is None else hashed(item, "ctrlib/hash_embedding/v1/weights|item|0", 4)
        first, second = (pool[hashed(item, f"ctrlib/hash_embedding/v1|item|{number}", 5)] for number in (0, 1))
        p, q = 1.0 + 2 * owner, 2.0 + 2 * owner  # stored less 1: pairs 0 1, 2 3, 4 5, ...
        assert vectors(tables, "item", [item]) == [[p * x + q * y for x, y in zip(first, second)]]


def test_mixed_dimension_by_hand() -> None:
    features = [Categorical("gender", num_embeddings=2), Categorical("item", num_embeddings=3)]
    features += [Categorical("city", num_embeddings=2)]
    tables = MixedDimensionTables(features, dimensions={"gender": 2, "item": 1, "city": 1}, embedding_dim=2)
    # Cities come before items in their table: by name.
    fill(tables, width_1=[[10.0], [20.0], [1.0], [2.0], [3.0]], width_2=[[1.0, 2.0], [3.0, 4.0]])
    tables.projections["width_1"].data = torch.tensor([[[1.0, -1.0]], [[0.5, 2.0]]])
    assert vectors(tables, "gender", [1]) == [[3.0, 4.0]]
    assert vectors(tables, "item", [0, 2]) == [[0.5, 2.0], [1.5, 6.0]]
    assert vectors(tables, "city", [1]) == [[20.0, -20.0]]


def test_dimensions_follow_popularity() -> None:
    # d_f = 16 sqrt(1 / n_f) is 16, 4, 16 / 9 and 0.16.
    sizes = {"a": 1, "b": 16, "c": 81, "d": 10_000}
    assert mixed_dimensions(sizes, 16, alpha=0.5, multiple_of=1) == {"a": 16, "b": 4, "c": 2, "d": 1}
    assert mixed_dimensions(sizes, 16, alpha=0.5) == {"a": 16, "b": 4, "c": 4, "d": 4}
    assert mixed_dimensions(sizes, 16, alpha=0.0) == dict.fromkeys(sizes, 16)
    assert mixed_dimensions({"a": 4, "b": 9}, 12, alpha=0.5) == {"a": 12, "b": 8}


def test_vocabularies_that_share_rows_start_from_places_of_their_own() -> None:
    features = [Categorical(name, num_embeddings=20) for name in ("user", "item")]
    tables = MemComTables(features, num_embeddings=7, embedding_dim=1)
    weight = tables.tables.embedding_bags["memcom"].weight
    weight.data = torch.arange(7.0).unsqueeze(1)
    starts = {name: seed(f"ctrlib/residues/v1|{name}|0") % 7 for name in ("user", "item")}
    assert starts["user"] != starts["item"]
    for name, start in starts.items():
        assert vectors(tables, name, list(range(20))) == [[(start + value) % 7] for value in range(20)]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6])
def test_numbers_per_id_fill_their_rows(width: int) -> None:
    numbers = NumbersPerId(11, width)
    assert numbers.columns % 4 == 0
    table = torch.arange(float(numbers.rows * numbers.columns)).view(numbers.rows, numbers.columns)
    assert table.numel() - 11 * width < numbers.columns  # the last row at most is not full
    ids = torch.arange(11)
    assert torch.equal(numbers.pick(table[numbers.read(ids)], ids).flatten(), torch.arange(11.0 * width))


# What an id reads.


@pytest.mark.parametrize("num_embeddings", [30, {"a": 20, "b": 24}])
def test_every_id_has_a_pair_of_its_own(num_embeddings: Any) -> None:
    features = [Categorical("a", num_embeddings=90), Categorical("b", num_embeddings=100)]
    tables = QuotientRemainderTables(features, num_embeddings=num_embeddings, embedding_dim=8)
    shapes = [bag.weight.shape[0] for bag in tables.tables.embedding_bags.values()]
    assert sum(shapes) == (num_embeddings if isinstance(num_embeddings, int) else sum(num_embeddings.values()))
    read: list[dict[str, Tensor]] = []
    tables.tables.register_forward_pre_hook(
        lambda _, args: read.append({key: bag.values() for key, bag in args[0].to_dict().items()})
    )
    tables(bags(a=[[x % 90] for x in range(100)], b=[[x] for x in range(100)]))
    a, b = (set(zip(*(of_key[part].tolist() for of_key in read[0].values()))) for part in (slice(90), slice(100, 200)))
    assert len(a) == 90 and len(b) == 100
    assert [int(of_key.max()) + 1 for of_key in read[0].values()] == shapes


@pytest.mark.parametrize("sizes", [{"a": 1}, {"a": 17}, {"a": 100}, {"a": 3, "b": 50, "c": 7}])
def test_remainders_are_as_many_as_there_is_room_for(sizes: dict[str, int]) -> None:
    def rows(moduli: int) -> int:
        return moduli + sum(math.ceil(size / moduli) for size in sizes.values())

    smallest = min(map(rows, range(1, 101)))
    assert smallest_num_rows(sizes) == smallest
    for budget in range(smallest, 150):
        assert num_remainders(budget, sizes) == max(moduli for moduli in range(1, 151) if rows(moduli) <= budget)
    for budget in range(smallest):
        with pytest.raises(ValueError, match=f"it takes {smallest}$"):
            num_remainders(budget, sizes)


@pytest.mark.parametrize("budget", [300, 1000, 5000, 10_047])
def test_rows_are_divided_by_one_compression_factor(budget: int) -> None:
    sizes = {"tiny": 3, "small": 40, "middle": 1000, "large": 9000}
    features = [Categorical(name, num_embeddings=size) for name, size in sizes.items()]
    rows = quotient_remainder_rows(features, budget)
    assert sum(rows.values()) == budget
    moduli = {name: num_remainders(rows[name], {name: size}) for name, size in sizes.items()}
    assert moduli["large"] / 9000 == pytest.approx(moduli["middle"] / 1000, abs=0.02)
    QuotientRemainderTables(features, num_embeddings=rows)
    for wrong in (270, 10_048):
        with pytest.raises(ValueError, match="take 271 to 10047 rows"):
            quotient_remainder_rows(features, wrong)


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_features_and_suffix_change_nothing(variant: str) -> None:
    tables = build(variant)
    other = VARIANTS[variant](SCHEMA.features[::-1], embedding_dim=8, suffix="_2")
    named = {name.replace("_2.", "."): parameter for name, parameter in other.named_parameters()}
    assert named.keys() == dict(tables.named_parameters()).keys()
    if variant == "mixed":
        assert [name for name in named if "embedding_bags" in name] == [
            f"tables.embedding_bags.width_{width}.weight" for width in (4, 8)
        ]
    for name, parameter in tables.named_parameters():
        named[name].data = parameter.data
    assert all("_2." in name for name, _ in other.tables.named_parameters())
    sparse = example_batch(SCHEMA, 9).sparse
    expected, got = tables(sparse), other(sparse)
    for name in tables.names:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


def test_rows_shared_by_all_do_not_move_when_a_feature_comes() -> None:
    few, many = ["item", "user"], ["a", "item", "m", "user", "z"]
    before, after = Residues.of(100, few), Residues.of(100, many)
    assert {name: after.starts[name] for name in few} == before.starts
    features = [Categorical(name, num_embeddings=50) for name in many]
    ids = [[value] for value in range(50)]
    found = []
    for some in (features[1:4:2], features):
        tables = HashEmbeddingTables(some, num_embeddings=1000, embedding_dim=1)
        fill(tables, pool=[[float(row)] for row in range(1000)])
        found.append(tables(bags(**{feature.name: ids for feature in some}))["user"])
    assert torch.equal(*found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_of_one_vocabulary_read_the_same_numbers(variant: str) -> None:
    tables = build(variant)
    rows = [[value] for value in range(3, 13)]
    found = tables(bags(user=rows, item=rows, genres=[[3]] * 10, history=rows))
    assert torch.equal(found["item"], found["history"])
    assert (found["item"] - found["user"]).abs().min() > 0


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bags_are_the_pooled_vectors_of_their_ids(variant: str, pooling: Any) -> None:
    history = Sequence("history", vocabulary="item", pooling=pooling, num_embeddings=30)
    features = (*SCHEMA.features[:4], history)
    tables = build(variant, Schema(features, ("label",)))
    of_ids = dict(enumerate(tables(bags(**{key: [[x] for x in range(10)] for key in tables.names}))["history"]))
    columns = [[3], [], [4, 4, 9], [9, 8, 7, 6, 5], [1]]
    genres = [[5, 6], [], [1, 2, 3], [], [4]]
    got = tables(bags(user=[[3]] * 5, item=[[3]] * 5, genres=genres, history=columns))["history"]
    for row, ids in zip(got, columns):
        expected = sum((of_ids[x] for x in ids), torch.zeros(8)) / (max(len(ids), 1) if pooling == "mean" else 1)
        torch.testing.assert_close(row, expected)
    empty: list[list[int]] = [[], []]
    only = build(variant, Schema(features, ("label",)))(bags(user=empty, item=empty, genres=empty, history=empty))
    assert torch.equal(only.values(), torch.zeros(2, 32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_ids_and_bags_of_one_are_the_same(variant: str) -> None:
    sizes = {"user": 20, "item": 30, "genres": 10}
    singles = [Categorical(name, num_embeddings=size) for name, size in sizes.items()]
    as_bags = [MultiValued(name, pooling="sum", num_embeddings=size) for name, size in sizes.items()]
    rows = {name: [[x % size] for x in range(30)] for name, size in sizes.items()}
    one, other = (build(variant, Schema(tuple(features), ("y",))) for features in (singles, as_bags))
    assert one.ids.single and not other.ids.single
    torch.testing.assert_close(one(bags(**rows)).values(), other(bags(**rows)).values())


def test_raw_ids_are_hashed_with_all_their_bits() -> None:
    extremes = [0, 1, -1, 2**31, 2**40, 2**40 + 1, 2**63 - 1, -(2**63)]
    ids = FeatureIds([RawId("user")], hash_sizes={"user": 1000}).read(bags(user=[[x] for x in extremes]))
    assert ids.values.tolist() == [hashed(x, "ctrlib/ids/v1|user|0", 1000) for x in extremes]
    assert len(set(ids.values.tolist())) == len(extremes)
    # Another vocabulary may be hashed too, and its own numbers are left as they are otherwise.
    features: list[Feature] = [Categorical("item", num_embeddings=50), RawId("user")]
    sparse = bags(item=[[7], [49]], user=[[7], [49]])
    both = FeatureIds(features, hash_sizes={"user": 1000, "item": 5})
    assert both.num_ids == {"item": 5, "user": 1000}
    want = [hashed(x, f"ctrlib/ids/v1|{name}|0", size) for name, size in (("item", 5), ("user", 1000)) for x in (7, 49)]
    assert both.read(sparse).values.tolist() == want
    assert FeatureIds(features, hash_sizes={"user": 1000}).read(sparse).values.tolist() == [7, 49, *want[2:]]


# Contract, bytes, state.


@pytest.mark.parametrize("variant", VARIANTS)
def test_keeps_the_contract_of_an_embedding(variant: str) -> None:
    check_embedding(
        lambda schema: ctr.TableEmbedding(schema.features, embedding_dim=8, tables=build(variant, schema)),
        schema=SCHEMA,
    )


@pytest.mark.parametrize("variant", ["product", "sum", "memcom", "hash_embedding", "hash_embedding_3"])
def test_raw_ids_keep_the_contract(variant: str) -> None:
    check_embedding(
        lambda schema: ctr.TableEmbedding(
            schema.features, embedding_dim=8, tables=build(variant, schema, hash_sizes={"user": 25})
        ),
        schema=SINGLE,
    )


@pytest.mark.parametrize(
    ("variant", "numbers"),
    [
        ("product", 30 * 8),
        ("product_mapped", (9 + 11 + 7) * 8),
        ("sum", 30 * 8),
        ("concat", 30 * 4),
        ("memcom", 7 * 8 + 60),  # 60 ids in the three vocabularies
        ("memcom_bias", (9 + 11 + 7) * 8 + 2 * 60),
        ("hash_embedding", 7 * 8 + 2 * 60),
        ("hash_embedding_3", 7 * 8 + 3 * 8),  # lots of 6, in rows of 4
        ("mixed", (20 + 30) * 4 + 2 * 4 * 8 + 10 * 8),  # projections of users and items
    ],
)
def test_bytes_are_those_of_the_formula(variant: str, numbers: int) -> None:
    tables = build(variant)
    assert sum(parameter.numel() * parameter.element_size() for parameter in tables.parameters()) == 4 * numbers
    assert all(config.embedding_dim % 4 == 0 for config in tables.tables.embedding_bag_configs())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_new_table_starts_as_a_hashed_one(variant: str) -> None:
    """Multipliers start at 1, and rows so that gradients reach everything: not at 0, nor at rounding errors."""
    torch.manual_seed(0)
    tables = VARIANTS[variant](SCHEMA.features, embedding_dim=8)
    out = tables(example_batch(SCHEMA, 500).sparse)
    spread = torch.cat([out["user"], out["item"]]).std()
    assert 0.01 < spread < 0.1
    torch.autograd.backward(out.values().square().sum())
    for name, parameter in tables.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("product", "sum", "combine is sum, expected product"),
        ("product", "product_mapped", "vocabulary 'genres' is {.*'rows': 5.*}, expected {.*'rows': 2[0-9]"),
        ("memcom", "memcom_bias", "bias is True, expected False"),
        ("hash_embedding", "hash_embedding_3", "num_hashes is 3, expected 2; num_weights is 6, expected None"),
    ],
)
def test_a_state_of_another_layout_is_refused_by_name(one: str, other: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(one).load_state_dict(build(other).state_dict())
    assert repr(build(one)) != repr(build(other))
    build(one).load_state_dict(build(one).state_dict())


def test_dimensions_in_another_order_of_names_are_refused() -> None:
    def mixed(**dimensions: int) -> Any:
        features = [Categorical(name, num_embeddings=5) for name in dimensions]
        return MixedDimensionTables(features, dimensions=dimensions, embedding_dim=8)

    with pytest.raises(ValueError, match=r"vocabulary 'a' is {'dimension': 8, 'ids': 5, 'seed': None}, expected"):
        mixed(a=4, b=8).load_state_dict(mixed(a=8, b=4).state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: QuotientRemainderTables(f, num_embeddings=30, combine=cast(Any, "max")), "expected combine of"),
        (lambda f: QuotientRemainderTables(f, num_embeddings=30, combine="concat", embedding_dim=7), "even for concat"),
        (lambda f: QuotientRemainderTables(f, num_embeddings=10), "it takes 1[0-9]"),
        (lambda f: QuotientRemainderTables(f, num_embeddings={"user": 9, "item": 11}), "gives 1 or more to each"),
        (lambda f: QuotientRemainderTables(f, num_embeddings={**MAPPED, "item": 32}), r"more rows for \['item'\]"),
        (lambda f: QuotientRemainderTables(f, num_embeddings=30, init=0), "init above 0"),
        (lambda f: MemComTables(f, num_embeddings=0), "expected 1 row or more"),
        (lambda f: MemComTables(f, num_embeddings={**MAPPED, "price": 3}), "and to nothing else"),
        (lambda f: MemComTables(f, num_embeddings=5, embedding_dim=0), "embedding_dim of 1 or more"),
        (lambda f: HashEmbeddingTables(f, num_embeddings=0), "num_embeddings=0"),
        (lambda f: HashEmbeddingTables(f, num_embeddings=5, num_hashes=0), "num_hashes=0"),
        (lambda f: HashEmbeddingTables(f, num_embeddings=5, num_weights=0), "num_weights=0"),
        (lambda f: MixedDimensionTables(f, dimensions={**DIMENSIONS, "user": 32}), "expected 1 to embedding_dim=16"),
        (lambda f: MixedDimensionTables(f, dimensions={"user": 4}), "for each of the vocabularies"),
        (lambda f: MemComTables(f, num_embeddings=5, hash_sizes={"price": 3}), "for some of the vocabularies"),
        (lambda f: MemComTables(f, num_embeddings=5, hash_sizes={"user": 0}), "numbers in 1 ..."),
        (lambda f: MemComTables([f[1]], num_embeddings=5), "one or more features with ids"),
        (lambda f: MemComTables([Categorical("a")], num_embeddings=5), "has no num_embeddings yet"),
        (lambda f: MemComTables([RawId("a")], num_embeddings=5), "hash_sizes={'a': 1000000}"),
        (lambda f: mixed_dimensions({"a": 4}, 6), "multiple of multiple_of"),
        (lambda f: mixed_dimensions({}, 8), "expected vocabularies"),
        (lambda f: mixed_dimensions({"a": 4}, 8, alpha=-0.1), "alpha of 0 or more"),
        (
            lambda f: MemComTables(ITEM, num_embeddings=5)(bags(item=[[1, 2], [3]])),
            "3 ids in 2 rows, expected one in each",
        ),
        (lambda f: MemComTables(ITEM, num_embeddings=5)(bags(user=[[1]])), "item"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(SCHEMA.features)


# Engines.


def model(variant: str) -> ctr.Model:
    embedding = ctr.TableEmbedding(SCHEMA.features, embedding_dim=8, tables=build(variant))
    tower = ctr.MLP(embedding.out_shape, hidden=(4,))
    wide = ctr.Wide(SCHEMA.features, columns=4)  # whose ids TorchRec's pipeline sends around ahead of time
    return ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape), wide=wide)


def part(batch: ctr.Batch, world_size: int) -> ctr.Batch:
    """This rank's rows of a batch."""
    own = batch.size // world_size
    rows = slice(rank() * own, (rank() + 1) * own)
    columns = {key: [row.tolist() for row in jagged.to_dense()[rows]] for key, jagged in batch.sparse.to_dict().items()}
    return ctr.Batch(bags(**columns), batch.dense[rows], batch.labels[rows], batch.weights[rows])


def batches() -> list[ctr.Batch]:
    return [example_batch(SCHEMA, 16, seed=number) for number in range(4)]


def fused(variant: str, world_size: int, sharding: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and the weights after them."""
    engine = ctr.FusedEngine(model(variant), learning_rate=0.01, sharding=sharding, max_grad_norm=None)
    losses = [loss.item() for _, loss in engine.train([part(batch, world_size) for batch in batches()])]
    return losses, engine.weights()


def plain(variant: str) -> tuple[list[float], dict[str, Tensor]]:
    """What `fused` computes, on dense gradients."""
    whole = model(variant)
    tables, named = ctr.sharding.tables_of(whole), dict(whole.named_parameters())
    optimisers: list[torch.optim.Optimizer] = [
        ctr.training.RowwiseAdagrad([named[name] for name in tables], lr=0.02),
        ctr.training.make_adam({name: weight for name, weight in named.items() if name not in tables}, 0.01),
    ]
    losses = []
    for batch in batches():
        loss = ctr.binary_cross_entropy(whole(batch), batch.labels, batch.weights)
        for optimiser in optimisers:
            optimiser.zero_grad()
        torch.autograd.backward(loss)
        for optimiser in optimisers:
            optimiser.step()
        losses.append(loss.item())
    return losses, whole.state_dict()


@pytest.mark.parametrize("variant", ["product", "concat", "memcom_bias", "hash_embedding_3", "mixed"])
def test_fused_and_sharded_tables_are_the_plain_ones(variant: str) -> None:
    losses, weights = plain(variant)
    (alone,) = run_ranks(1, lambda: fused(variant, 1, "auto"))
    for sharding in ("row_wise", "table_wise", "data_parallel") if variant in ("product", "mixed") else ("row_wise",):
        together = run_ranks(2, lambda sharding=sharding: fused(variant, 2, sharding))
        for got in (alone, *together):
            assert got[0] == pytest.approx(losses, abs=1e-6)
        for got in (alone, together[0]):
            assert got[1].keys() == weights.keys()
            for name, weight in weights.items():
                torch.testing.assert_close(got[1][name], weight, atol=1e-6, rtol=0, msg=name)


class FromTensors(nn.Module):
    """An embedding of what a batch is made of, for `torch.export`."""

    def __init__(self, embedding: nn.Module, schema: Schema) -> None:
        super().__init__()
        self.embedding, self.names = embedding, [feature.name for feature in schema.sparse]

    def forward(self, ids: Tensor, lengths: Tensor, dense: Tensor) -> Tensor:
        sparse = KeyedJaggedTensor(self.names, ids, lengths=lengths, stride=dense.shape[0])
        out: Tensor = self.embedding(ctr.Batch(sparse, dense, dense[:, :1], dense[:, 0]))
        return out


# How single ids are read is the same for all but the last.
@pytest.mark.parametrize(
    ("variant", "schema"),
    [(variant, SCHEMA) for variant in ("product", "sum", "memcom", "hash_embedding", "mixed")]
    + [("product", SINGLE), ("mixed", SINGLE)],
    ids=lambda value: value if isinstance(value, str) else "single" if value is SINGLE else "bags",
)
def test_exports_with_dynamic_batches(variant: str, schema: Schema) -> None:
    more: dict[str, Any] = {"hash_sizes": {"user": 25}} if schema is SINGLE else {}
    if variant == "mixed" and schema is SINGLE:
        dimensions = {"user": 4, "item": 4, "genre": 8}
        tables = MixedDimensionTables(schema.features, dimensions=dimensions, embedding_dim=8, **more)
    else:
        tables = build(variant, schema, **more)
    whole = FromTensors(ctr.TableEmbedding(schema.features, embedding_dim=8, tables=tables).eval(), schema)
    rows = torch.export.Dim("rows", min=2)
    inputs = [
        (batch.sparse.values(), batch.sparse.lengths(), batch.dense)
        for batch in (example_batch(schema, size, seed=size) for size in (8, 13, 3))
    ]
    shapes = ({0: torch.export.Dim.DYNAMIC}, {0: len(schema.sparse) * rows}, {0: rows})
    exported = torch.export.export(whole, inputs[0], dynamic_shapes=shapes).module()
    for example in inputs:
        torch.testing.assert_close(exported(*example), whole(*example))


# AUC at equal bytes.

SIZES = {"a": 20, "b": 200, "c": 1000, "d": 2000, "e": 3000, "f": 3000}
FEATURES = [Categorical(name, num_embeddings=size) for name, size in SIZES.items()]
NUM_IDS = sum(SIZES.values())


@functools.lru_cache(maxsize=1)
def clicks() -> tuple[Tensor, Tensor]:
    """(F, rows) ids of Zipf's frequencies, the most frequent first, and labels of a second-order model of them."""
    generator = torch.Generator().manual_seed(0)
    ids, first, vectors = [], torch.zeros(40_000), []
    for size in SIZES.values():
        frequencies = (torch.arange(size) + 20.0) ** -1.05
        ids.append(frequencies.multinomial(40_000, replacement=True, generator=generator))
        first += 0.8 * torch.randn(size, generator=generator)[ids[-1]]
        vectors.append(0.42 * torch.randn(size, 4, generator=generator)[ids[-1]])
    terms = torch.stack(vectors)
    logits = first + (terms.sum(0).square() - terms.square().sum(0)).sum(1) / 2 - 1
    return torch.stack(ids), torch.bernoulli(logits.sigmoid(), generator=generator)


def learned(tables: Any) -> float:
    """AUC on the last fifth of the rows, after an epoch on the others."""
    ids, labels = clicks()

    def batch(rows: slice) -> ctr.Batch:
        size = len(labels[rows])
        sparse = KeyedJaggedTensor(list(SIZES), ids[:, rows].flatten(), lengths=torch.ones(len(SIZES) * size).long())
        return ctr.Batch(sparse, torch.zeros(size, 0), labels[rows, None], torch.ones(size))

    embedding = ctr.TableEmbedding(FEATURES, embedding_dim=16, tables=tables)
    tower = ctr.MLP(embedding.out_shape, hidden=(32,))
    whole = ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))
    engine = ctr.ExactEngine(whole, learning_rate=0.01)
    for start in range(0, 32_000, 400):
        engine.step(batch(slice(start, start + 400)))
    with torch.no_grad():
        return auc(labels[32_000:].numpy(), whole(batch(slice(32_000, None)))[:, 0].numpy())


@functools.lru_cache(maxsize=2)
def split_hashing(num_embeddings: int) -> tuple[float, int]:
    """AUC and bytes of the hashing trick, where every vocabulary has its share of the rows."""
    torch.manual_seed(0)
    tables = UnifiedTables(FEATURES, num_embeddings=proportional_rows(FEATURES, num_embeddings))
    return learned(tables), num_bytes(tables)


def num_bytes(tables: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in tables.parameters())


ROWS = NUM_IDS // 10
SMALL: dict[str, Callable[[], Any]] = {
    "product": lambda: QuotientRemainderTables(FEATURES, num_embeddings=ROWS),
    "sum": lambda: QuotientRemainderTables(FEATURES, num_embeddings=ROWS, combine="sum"),
    "concat": lambda: QuotientRemainderTables(FEATURES, num_embeddings=2 * ROWS, combine="concat"),
    "product_mapped": lambda: QuotientRemainderTables(FEATURES, num_embeddings=quotient_remainder_rows(FEATURES, ROWS)),
    "memcom": lambda: MemComTables(FEATURES, num_embeddings=ROWS - NUM_IDS // 16 - 1),
    "hash_embedding": lambda: HashEmbeddingTables(
        FEATURES, num_embeddings=ROWS - NUM_IDS // 32 - 1, num_weights=NUM_IDS // 4
    ),
    "mixed": lambda: MixedDimensionTables(FEATURES, dimensions=mixed_dimensions(SIZES, 16)),
}


@pytest.mark.parametrize("variant", SMALL)
def test_beats_the_hashing_trick_at_equal_bytes(variant: str) -> None:
    torch.manual_seed(0)
    tables = SMALL[variant]()
    # Rows of 4 numbers for every id are a quarter of the plain table's 16 already.
    floor, floor_bytes = split_hashing(ROWS if variant != "mixed" else num_bytes(tables) // 64)
    assert 0 <= floor_bytes - num_bytes(tables) < 64
    found = learned(tables)
    assert found > floor + {"product_mapped": 0.025, "mixed": 0.05}.get(variant, 0.07)
