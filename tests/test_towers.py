"""Towers and heads against the papers' equations, published parameter counts, and the public contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from conformance import HEAD_SHAPE, conforms
from torch import nn

import ctrlib as ctr
from ctrlib import models
from ctrlib.embeddings.table import tables_by_name
from ctrlib.heads.linear import LinearHead
from ctrlib.layers import Dropout, Hidden
from ctrlib.schema import Categorical, MultiValued, Numeric, Schema
from ctrlib.testing import check_embedding, check_tower
from ctrlib.towers.combine import Parallel, Stack
from ctrlib.towers.crossnet import CrossNetV2
from ctrlib.towers.fm import FM
from ctrlib.towers.mlp import MLP

test_variants = conforms(
    {
        "norm_and_dropout": lambda s: MLP(s, hidden=(8,), batch_norm=True, dropout=0.3),
        "parallel": lambda s: Parallel(FM(s), CrossNetV2(s), MLP(s, hidden=(4,))),
        "stack": lambda s: Stack(CrossNetV2(s), MLP((s[0] * s[1],), hidden=(4,))),
    }
)
test_variants_of_the_head = conforms(
    {"tasks": lambda s: LinearHead(s, num_tasks=3), "unweighted": lambda s: LinearHead(s, unweighted=2)},
    HEAD_SHAPE,
    head=True,
)


def test_fm_is_the_sum_over_pairs() -> None:
    x = torch.randn(9, 6, 5, dtype=torch.float64)
    pairs = sum((x[:, i] * x[:, j]).sum(1) for i, j in itertools.combinations(range(6), 2))
    torch.testing.assert_close(ctr.FM((6, 5))(x)[:, 0], pairs)


def test_fm_does_not_care_about_the_order_of_fields() -> None:
    x = torch.randn(4, 6, 5)
    torch.testing.assert_close(ctr.FM((6, 5))(x), ctr.FM((6, 5))(x[:, torch.randperm(6)]))


def test_crossnet_v2_follows_equation_1() -> None:
    cross = ctr.CrossNetV2((2, 3), num_layers=3).double()
    x0 = torch.randn(4, 6, dtype=torch.float64)
    x = x0
    for layer in cross.layers:
        nn.init.normal_(layer.bias)
        x = x0 * (x @ layer.weight.T + layer.bias) + x
    torch.testing.assert_close(cross(x0.view(4, 2, 3)), x)


def test_deepfm_logit_is_wide_plus_fm_plus_mlp() -> None:
    schema = ctr.testing.example_schema()
    model = models.deepfm(ctr.Inputs(schema, embedding_dim=4), hidden=(5,)).eval()
    batch = ctr.testing.example_batch(schema, 8)
    fields = model.embedding(batch)
    mlp, fm = model.tower.towers
    expected = model.wide(batch) + fm(fields) + model.head.linear(mlp(fields)) + model.head.bias
    torch.testing.assert_close(model(batch), expected)


def frappe_schema() -> Schema:
    # 5,379 values in train; ctrlib keeps 3 reserved ids per field where FuxiCTR v1 keeps 1 and v2 keeps 2.
    return Schema(tuple(Categorical(f"f{i}", num_embeddings=3 + (537 if i else 546)) for i in range(10)), ("y",))


def movielens_latest_schema() -> Schema:
    return Schema(tuple(Categorical(f"f{i}", num_embeddings=100 + i) for i in range(3)), ("y",))


@pytest.mark.parametrize(
    ("schema", "make", "arguments", "published", "embedding_weights"),
    [
        # Published totals are those of BARS' logs; their embedding rows are FuxiCTR v1's: values + 1 a field.
        (frappe_schema, models.mlp, {}, 417_891, 5_389 * 10),
        (frappe_schema, models.dcnv2, {"num_cross_layers": 4}, 458_391, 5_389 * 10),
        (frappe_schema, models.deepfm, {}, 423_280, 5_389 * 11),
        (movielens_latest_schema, models.mlp, {}, 1_238_391, 90_239 * 10),
        (movielens_latest_schema, models.dcnv2, {"num_cross_layers": 5}, 1_243_071, 90_239 * 10),
        (movielens_latest_schema, models.deepfm, {}, 1_328_630, 90_239 * 11),
    ],
)
def test_published_parameter_counts(
    schema: Callable[[], Schema],
    make: Callable[..., ctr.Model],
    arguments: dict[str, int],
    published: int,
    embedding_weights: int,
) -> None:
    made = schema()
    model = make(ctr.Inputs(made, embedding_dim=10), hidden=(400, 400, 400), batch_norm=True, dropout=0.2, **arguments)
    counts = model.num_parameters()
    assert counts["network"] == published - embedding_weights
    rows = sum(feature.num_embeddings or 0 for feature in made.sparse)
    assert counts["embedding"] == rows * (11 if make is models.deepfm else 10)


def test_frappe_rows_are_values_plus_three_reserved_ids_per_field() -> None:
    assert sum(feature.num_embeddings or 0 for feature in frappe_schema().sparse) == 5_379 + 10 * 3


# Vocabularies of very different sizes; a and b share one, and so do tags and more.
STACKABLE = Schema(
    (
        Categorical("a", num_embeddings=50),
        Categorical("small", num_embeddings=7),
        Numeric("price"),
        Categorical("b", vocabulary="a", num_embeddings=50),
        MultiValued("tags", pooling="mean", num_embeddings=20),
        Categorical("large", num_embeddings=90),
        Categorical("middle", num_embeddings=40),
        MultiValued("words", pooling="mean", num_embeddings=30),
        MultiValued("more", vocabulary="tags", pooling="mean", num_embeddings=20),
    ),
    ("y",),
)


@pytest.mark.parametrize(
    ("stacked", "rows"),
    [
        (1, {"stacked_sum": ["a", "small", "large", "middle"], "stacked_mean": ["tags", "words"]}),
        (
            3,
            {
                "stacked_sum_0": ["large"],  # 90 of 187 rows and 1 of 5 look-ups
                "stacked_sum_1": ["a"],  # 50 and 2
                "stacked_sum_2": ["small", "middle"],
                "stacked_mean_0": ["tags"],  # no more stacks than vocabularies
                "stacked_mean_1": ["words"],
            },
        ),
    ],
)
def test_stacked_tables_give_the_same_vectors(stacked: int, rows: dict[str, list[str]]) -> None:
    plain = ctr.TableEmbedding(STACKABLE.features, embedding_dim=8)
    together = ctr.TableEmbedding(STACKABLE.features, embedding_dim=8, stacked=stacked)
    wide, wide_together = ctr.Wide(STACKABLE.features), ctr.Wide(STACKABLE.features, stacked=stacked)
    for one, other, suffix in ((plain, together, ""), (wide, wide_together, "_wide")):
        separate = {name: bag.weight.detach() for name, bag in one.tables.embedding_bags.items()}
        stacks = other.tables.embedding_bags
        assert list(stacks) == [name + suffix for name in rows]
        for name, vocabularies in rows.items():
            tables = [separate[f"table_{vocabulary}{suffix}"] for vocabulary in vocabularies]
            paddings = [sum(map(len, tables[:position])) for position in range(len(tables))]
            assert stacks[name + suffix].weight.abs().sum(1).eq(0).nonzero()[:, 0].tolist() == paddings
            stacks[name + suffix].weight.data = torch.cat(tables)
    together.numeric.vectors.data = plain.numeric.vectors.data
    wide_together.numeric_weights.data = wide.numeric_weights.data
    batch = ctr.testing.example_batch(STACKABLE, 16)
    assert torch.equal(plain(batch), together(batch))
    torch.testing.assert_close(wide(batch), wide_together(batch))


@pytest.mark.parametrize("stacked", [1, 2, 3])
def test_stacked_tables_keep_the_contract(stacked: int) -> None:
    check_embedding(lambda schema: ctr.TableEmbedding(schema.features, embedding_dim=8, stacked=stacked))


def test_stacks_share_rows_and_lookups() -> None:
    sizes = torch.randint(10, 100_000, (26,), generator=torch.Generator().manual_seed(0)).tolist()
    features = [Categorical(f"c{n}", num_embeddings=size) for n, size in enumerate(sizes)]
    stacks = tables_by_name(features, 4)
    assert list(stacks) == [f"stacked_sum_{number}" for number in range(4)]
    for vocabularies in stacks.values():
        rows = sum(member.num_embeddings or 0 for members in vocabularies for member in members)
        assert rows / sum(sizes) + len(vocabularies) / 26 == pytest.approx(2 / 4, rel=0.1)
    # Where all are alike, fractions would round differently with the order of sums, and weights be read by another.
    alike = [Categorical(f"c{n}", num_embeddings=13) for n in range(9)]
    names = [[members[0].name for members in stack] for stack in tables_by_name(alike, 3).values()]
    assert names == [["c0", "c3", "c6"], ["c1", "c4", "c7"], ["c2", "c5", "c8"]]


def test_models_saved_with_one_stack_as_true_keep_their_layout() -> None:
    one, true = (
        models.build({"model": "deepfm", "embedding_dim": 4, "stacked": stacked}, STACKABLE) for stacked in (1, True)
    )
    true.load_state_dict(one.state_dict())
    batch = ctr.testing.example_batch(STACKABLE, 16)
    assert torch.equal(one.eval()(batch), true.eval()(batch))
    with pytest.raises(ValueError, match="stacked=-1: expected a number of stacks"):
        ctr.TableEmbedding(STACKABLE.features, stacked=-1)


def test_any_column_name_makes_a_table() -> None:
    names = ["type", "items", "training", "user.id", "a%2Eb"]
    schema = Schema(tuple(Categorical(name, num_embeddings=9) for name in names), ("y",))
    batch = ctr.testing.example_batch(schema, 8)
    for engine in (ctr.ExactEngine, ctr.FusedEngine):
        inputs = ctr.Inputs(schema, embedding_dim=4, wide_columns=4)
        assert torch.isfinite(engine(models.deepfm(inputs, hidden=(4,))).step(batch))


def test_fm_is_bias_first_order_and_pairs() -> None:
    model = models.fm(ctr.Inputs(movielens_latest_schema(), embedding_dim=10))
    assert model.num_parameters() == {"embedding": 303 * 11, "network": 1}


def test_dropout_keeps_the_mean_and_the_share() -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.2)
    y = dropout(torch.ones(1000, 999))  # an odd number of elements
    assert abs((y == 0).float().mean().item() - 0.2) < 3 * (0.16 / 999_000) ** 0.5
    assert y.unique().tolist() == pytest.approx([0.0, 1.25], abs=1e-5)  # p is rounded to 1/65,536
    assert dropout.eval()(y) is y
    # Neighbouring elements share one 64-bit draw: they must be independent all the same.
    kept = (y.flatten()[:-1] != 0).double()
    assert abs(torch.corrcoef(torch.stack([kept[:-1], kept[1:]]))[0, 1].item()) < 0.005


def test_dropout_gradient_is_the_mask() -> None:
    x = torch.ones(5, 7, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())


def test_hidden_layer_order_is_linear_norm_relu_dropout() -> None:
    names = [type(layer).__name__ for layer in Hidden(3, (4,), batch_norm=True, dropout=0.1)]
    assert names == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ctr.FM((1, 4)), "at least 2 fields"),
        (lambda: ctr.CrossNetV2((2, 4), num_layers=0), "at least one layer"),
        (lambda: ctr.MLP((2, 4), hidden=()), "one or more positive"),
        (lambda: Dropout(1.0), r"\[0, 1\)"),
        (lambda: ctr.LinearHead((3,), unweighted=4), "between 0 and the tower's width 3"),
        (lambda: ctr.Parallel(ctr.FM((3, 4)), ctr.FM((2, 4))), "one input shape"),
        (lambda: ctr.Stack(ctr.FM((3, 4)), ctr.MLP((3, 4))), r"in_shape=\(1,\)"),
        (lambda: ctr.Parallel(nn.Linear(1, 1)), "publishes no in_shape"),
        (
            lambda: ctr.Model(
                ctr.TableEmbedding([Categorical("a", num_embeddings=4)], embedding_dim=4),
                ctr.MLP((2, 4)),
                ctr.LinearHead((400,)),
            ),
            r"in_shape=\(1, 4\)",
        ),
        (lambda: ctr.TableEmbedding([Categorical("a")]), "ctrlib.prepare"),
        (lambda: ctr.TableEmbedding([Categorical("a", num_embeddings=4)], embedding_dim=0), "1 or more"),
        (lambda: ctr.Schema((ctr.Numeric("a", transform="sqrt"),), ("y",)), "expected one of"),  # type: ignore[arg-type]
        (lambda: ctr.Schema((ctr.MultiValued("a", max_length=0),), ("y",)), "expected 1 or more"),
        (
            lambda: ctr.Model(
                ctr.TableEmbedding([Categorical("a", num_embeddings=4)], embedding_dim=4),
                ctr.MLP((1, 4), hidden=(4,)),
                ctr.LinearHead((4,)),
                wide=ctr.Wide([Categorical("a", num_embeddings=4)], num_tasks=2),
            ),
            "same number of tasks",
        ),
        (
            lambda: ctr.TableEmbedding(
                [
                    ctr.MultiValued("a", vocabulary="v", num_embeddings=4),
                    ctr.Sequence("b", vocabulary="v", num_embeddings=4, pooling="sum"),
                ]
            ),
            "same pooling",
        ),
    ],
)
def test_wrong_use_says_how_to_fix_it(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_checks_catch_broken_parts() -> None:
    class Leaky(ctr.MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) - super().forward(x).mean(0)

    class Liar(ctr.MLP):
        def __init__(self, in_shape: tuple[int, int]) -> None:
            super().__init__(in_shape, hidden=(4,))
            self.out_shape = (5,)

    class Idle(ctr.MLP):
        def __init__(self, in_shape: tuple[int, int]) -> None:
            super().__init__(in_shape, hidden=(4,))
            self.unused = nn.Parameter(torch.zeros(1))

    for broken, message in ((lambda s: Leaky(s, hidden=(4,)), "beside it"), (Liar, "promises"), (Idle, "no gradient")):
        with pytest.raises(AssertionError, match=message):
            check_tower(broken)


def test_embedding_gives_the_right_rows_in_schema_order() -> None:
    schema = ctr.testing.example_schema()
    embedding = ctr.TableEmbedding(schema.features, embedding_dim=4)
    batch = ctr.testing.example_batch(schema, 16)
    out = embedding(batch)
    bags = embedding.tables.embedding_bags
    weights = {name.removeprefix("table_"): bag.weight for name, bag in bags.items()}
    jagged = batch.sparse.to_dict()
    dense = {feature.name: batch.dense[:, i] for i, feature in enumerate(schema.dense)}
    for position, feature in enumerate(schema.features):
        if feature.name in dense:
            vector = embedding.numeric.vectors[[f.name for f in schema.dense].index(feature.name)]
            expected = dense[feature.name][:, None] * vector
        else:
            table = weights[getattr(feature, "vocabulary", None) or feature.name]
            rows = [table[ids].mean(0) if len(ids) else torch.zeros(4) for ids in jagged[feature.name].to_dense()]
            expected = torch.stack(rows)
        torch.testing.assert_close(out[:, position], expected)
