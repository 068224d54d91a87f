"""OptInter: the mixture and its corners, crosses of train alone, what alpha may learn from, and a planted set."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from search_checks import check_a_killed_search_goes_on
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib import models
from ctrlib.data.loader import Loader
from ctrlib.embeddings.crosses import CrossTables, PairVectors
from ctrlib.embeddings.narrow import NarrowTable
from ctrlib.embeddings.table import TableEmbedding
from ctrlib.inputs import Inputs
from ctrlib.model import Model
from ctrlib.schema import Categorical, MultiValued, Numeric, Schema
from ctrlib.search import optinter
from ctrlib.search.bytes import bytes_of
from ctrlib.search.optinter import (
    CHOICES,
    JointEngine,
    OptInter,
    SoftCrosses,
    count_crosses,
    plan_of,
    soft_model,
    temperature_at,
)
from ctrlib.search.plan import Plan, materialise
from ctrlib.structure import describe
from ctrlib.testing import check_embedding
from ctrlib.training import crossing
from ctrlib.training.evaluate import evaluate

QUIET = Console(quiet=True)
PAIRS = [("user", "item"), ("user", "shop"), ("item", "shop")]
ROWS = {"user": 12, "item": 20, "shop": 20}
CONFIG = {"model": "dcnv2", "embedding_dim": 6, "hidden": [8], "num_cross_layers": 1, "dropout": 0.1}


def write(folder: Path, schema: Schema, splits: dict[str, dict[str, Any]]) -> Path:
    """A prepared folder by hand, so that ids are what the test says."""
    folder.mkdir(exist_ok=True)
    schema.save(folder / "schema.json")
    for split, columns in splits.items():
        (folder / split).mkdir()
        pl.DataFrame(columns).write_parquet(folder / split / "0.parquet")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three categorical features, two of one vocabulary, beside a number and a bag."""
    rng = np.random.default_rng(0)
    schema = Schema(
        (
            Categorical("user", num_embeddings=12),
            Numeric("price", parameters={}),
            Categorical("item", num_embeddings=20),
            MultiValued("genres", num_embeddings=8),
            Categorical("shop", vocabulary="item", num_embeddings=20),
        ),
        ("click",),
    )
    splits = {}
    for split, rows in (("train", 700), ("valid", 300)):
        ids = {name: rng.integers(1, ROWS[name], rows).astype(np.int32) for name in ROWS}
        genres = [rng.integers(3, 8, rng.integers(0, 4)).tolist() for _ in range(rows)]
        splits[split] = {
            **ids,
            "price": rng.standard_normal(rows).astype(np.float32),
            "genres": pl.Series(genres, dtype=pl.List(pl.Int32)),
            "click": ((ids["user"] * ids["item"]) % 3 == 0).astype(np.float32),
        }
    return write(tmp_path_factory.mktemp("optinter"), schema, splits)


def model_of(data: Path, **changed: Any) -> Model:
    torch.manual_seed(0)
    model = models.build({**CONFIG, **changed}, Schema.load(data))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embedding_bags" in name:
                weight.normal_(std=0.3)
    return model


def loaders(data: Path) -> tuple[Loader, Loader]:
    return Loader(data, "train", batch_size=100, shuffle=True), Loader(data, "valid", batch_size=100)


def searched_model(data: Path, settings: OptInter | None = None, **changed: Any) -> tuple[Model, SoftCrosses, Any]:
    model = model_of(data, **changed)
    crosses = count_crosses(loaders(data)[0], PAIRS, ROWS, min_count=2)
    searched, lookup = soft_model(model, PAIRS, crosses, settings or OptInter(cross_dim=4))
    with torch.no_grad():
        lookup.vectors.crosses.embedding_bags["crosses"].weight.normal_()
    return searched, lookup, crosses


# The mixture


def test_the_temperature_falls_by_steps_of_training_alone(data: Path) -> None:
    settings = OptInter()
    steps = (0, 1, 10_000, 19_799, 19_800, 10**7)
    found = [temperature_at(step, settings) for step in steps]
    assert found == pytest.approx([1, 1 - 5e-5, 0.5, 0.01005, 0.01, 0.01], abs=1e-12)
    searched, lookup, _ = searched_model(data)
    train, valid = loaders(data)
    engine = JointEngine(searched, lookup, valid, OptInter(cross_dim=4))
    evaluate(searched, valid, quick=True)
    assert int(lookup.steps) == 0
    assert len(list(engine.train(train))) == int(lookup.steps) == 7
    evaluate(searched, valid, quick=True)
    assert int(lookup.steps) == 7


def hardened(model: Model, lookup: SoftCrosses, crosses: Any, choice: list[str]) -> Model:
    """The model of a choice, with the weights of the search."""
    plan = plan_of(model, PAIRS, crosses, choice, cross_dim=4)
    smaller = materialise(model, plan)
    hard = smaller.embedding.tables
    with torch.no_grad():
        hard.base.load_state_dict(lookup.base.state_dict())
        slots = [place for kind in CHOICES[:2] for place, chosen in enumerate(choice) if chosen == kind]
        kept = lookup.projection.weight.view(-1, len(PAIRS), 4)[:, slots]
        hard.projection.weight.copy_(kept.flatten(1))
        if hard.vectors.factors is not None:
            soft = lookup.vectors.factors.state_dict()
            hard.vectors.factors.load_state_dict({name: soft[name] for name in hard.vectors.factors.state_dict()})
        if hard.vectors.crosses is not None:
            full, small = (v.crosses.embedding_bags["crosses"].weight for v in (lookup.vectors, hard.vectors))
            places = [place for place, chosen in enumerate(choice) if chosen == "memorise"]
            firsts = np.cumsum([3, *map(len, crosses)])
            rows = [torch.tensor(places)]
            rows += [torch.arange(firsts[place], firsts[place] + len(crosses[place])) for place in places]
            small.copy_(full[torch.cat(rows)])
    return smaller


@pytest.mark.parametrize("choice", [["memorise"] * 3, ["factorise"] * 3, ["naive"] * 3])
def test_with_one_choice_for_all_it_is_that_model_bit_for_bit(data: Path, choice: list[str]) -> None:
    searched, lookup, crosses = searched_model(data)
    lookup.alpha[:, CHOICES.index(choice[0])] = 1000
    model = model_of(data)
    if choice[0] == "naive":
        assert plan_of(model, PAIRS, crosses, choice, cross_dim=4).replaced == {}
    else:
        model = hardened(model, lookup, crosses, choice)
    seen = 0.0
    for batch in itertools.chain(*loaders(data)):
        logits = searched.eval()(batch)
        assert torch.equal(model.eval()(batch), logits)
        seen = max(seen, (logits - model_of(data).eval()(batch)).abs().max().item())
    assert (seen > 1e-3) == (choice[0] != "naive")  # what is crossed does count


def test_a_mixed_choice_is_the_mixture_at_its_corner(data: Path, tmp_path: Path) -> None:
    searched, lookup, crosses = searched_model(data, stacked=2)
    choice = ["factorise", "naive", "memorise"]
    for place, kind in enumerate(choice):
        lookup.alpha[place, CHOICES.index(kind)] = 1000
    smaller = hardened(model_of(data, stacked=2), lookup, crosses, choice)
    for batch in itertools.chain(*loaders(data)):
        torch.testing.assert_close(smaller.eval()(batch), searched.eval()(batch), atol=1e-6, rtol=0)
    # A model folder keeps the preset's config and what is replaced: it gives the same model again.
    again = models.build({**CONFIG, "stacked": 2, "replaced": describe(smaller)}, Schema.load(data))
    again.load_state_dict(smaller.state_dict())
    batch = next(iter(loaders(data)[1]))
    assert torch.equal(again.eval()(batch), smaller.eval()(batch))


def test_gumbel_noise_draws_from_the_softmax_in_training_and_not_in_evaluation(data: Path) -> None:
    _, lookup, _ = searched_model(data, OptInter(cross_dim=4, gumbel=True))
    lookup.alpha.copy_(torch.tensor([[1.0, 0.0, -1.0]]).expand(3, 3))
    torch.manual_seed(0)
    expected = torch.tensor([1.0, 0.0, -1.0]).softmax(0)
    draws = torch.stack([lookup.train().mixture() for _ in range(4000)])
    shares = torch.bincount(draws.argmax(2).flatten(), minlength=3) / 12_000
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(draws.sum(2), torch.ones(4000, 3))
    assert torch.equal(lookup.eval().mixture(), expected.expand(3, 3))
    lookup.steps += 10_000  # t = 1/2
    torch.testing.assert_close(lookup.mixture()[0], torch.tensor([2.0, 0.0, -2.0]).softmax(0))


# Crosses


def test_crosses_are_those_of_train_often_enough(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid = loaders(data)
    expected = []
    for first, second in PAIRS:
        columns = pl.read_parquet(data / "train" / "0.parquet")[[first, second]].rows()
        counts = Counter(a * ROWS[second] + b for a, b in columns)
        expected.append(sorted(code for code, count in counts.items() if count >= 2))
    for merge_at in (crossing.MERGE_AT, 700):
        monkeypatch.setattr(crossing, "MERGE_AT", merge_at)
        assert [codes.tolist() for codes in count_crosses(train, PAIRS, ROWS, min_count=2)] == expected
    batch = next(iter(valid))
    batch.weights[5:] = 0
    assert sum(map(len, count_crosses([batch], PAIRS, ROWS, min_count=1))) <= 15


def test_a_pair_of_values_has_a_row_and_others_read_their_own_pairs(data: Path) -> None:
    _, lookup, crosses = searched_model(data)
    known = [set(codes.tolist()) for codes in crosses]
    owner: dict[int, tuple[int, int]] = {}
    others = 0
    for batch in itertools.chain(*loaders(data)):
        ids = {name: batch.sparse[name].values().tolist() for name in ROWS}
        for row, read in enumerate(lookup.vectors.cross_rows(batch.sparse).tolist()):
            for place, (first, second) in enumerate(PAIRS):
                code = ids[first][row] * ROWS[second] + ids[second][row]
                if code in known[place]:
                    assert owner.setdefault(read[place], (place, code)) == (place, code) and read[place] >= 3
                else:
                    others += 1
                    assert read[place] == place
    assert len(owner) > 200 and others > 100
    assert len(set(owner.values())) == len(owner)


def test_retraining_has_the_crosses_of_chosen_pairs_alone(data: Path, tmp_path: Path) -> None:
    model = model_of(data, embedding_dim=8)
    crosses = count_crosses(loaders(data)[0], PAIRS, ROWS, min_count=2)
    plan = plan_of(model, PAIRS, crosses, ["memorise", "naive", "factorise"], cross_dim=4)
    plan.save(tmp_path / "plan.safetensors")
    smaller = materialise(model, Plan.load(tmp_path / "plan.safetensors"))
    before, after, count = bytes_of(model), bytes_of(smaller), len(crosses[0])
    assert after.network == before.network
    assert after.weights == before.weights + 4 * 4 * (1 + count) + 4 * 4 * ROWS["item"]  # item and shop share rows
    assert after.decoder == 4 * 2 * 4 * 4 * 8  # two pairs, 4 wide, into four fields, 8 wide
    assert after.remap == 8 * count + 8
    added = (1 + count) * 4 + ROWS["item"] * 4 + 2 * 4 * 4 * 8
    assert smaller.num_parameters()["embedding"] == model.num_parameters()["embedding"] + added
    assert torch.equal(smaller.embedding.tables.vectors.codes, crosses[0])
    batch = next(iter(loaders(data)[0]))
    fields = smaller.embedding.tables.base(batch.sparse).to_dict()
    assert all(torch.equal(x, fields[name]) for name, x in model.embedding.tables(batch.sparse).to_dict().items())
    expected = [[None, "memorise", "naive"], ["memorise", None, "factorise"], ["naive", "factorise", None]]
    assert plan.summary["pairs"] == {"fields": ["user", "item", "shop"], "choice": expected}


# What alpha learns from


def engine_of(data: Path, **settings: Any) -> tuple[JointEngine, SoftCrosses, Loader]:
    settings = {"cross_dim": 4, **settings}
    searched, lookup, _ = searched_model(data, OptInter(**settings), batch_norm=True)
    train, valid = loaders(data)
    return JointEngine(searched, lookup, valid, OptInter(**settings)), lookup, train


def test_a_step_of_alpha_on_validation_moves_alpha_alone(data: Path) -> None:
    engine, lookup, _ = engine_of(data)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    generator = torch.get_rng_state()
    lookup.alpha.grad = engine.gradient(next(iter(loaders(data)[1])))
    engine._step_alpha()
    changed = {name for name, tensor in engine.state().items() if not torch.equal(tensor, before[name])}
    alpha = {"model.embedding.tables.alpha", "model.embedding.tables.steps"}
    assert changed == alpha | {f"optimiser.alpha.{name}" for name in ("step", "exp_avg", "exp_avg_sq")}
    assert torch.equal(torch.get_rng_state(), generator) and not lookup.alpha.requires_grad
    engine.step(next(iter(loaders(data)[0])))
    assert torch.equal(lookup.alpha, engine.state()["model.embedding.tables.alpha"]) and lookup.alpha.grad is None


def test_labels_of_validation_reach_weights_through_alpha_only(data: Path) -> None:
    def trained(flip: bool, **settings: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        engine, _, train = engine_of(data, **settings)
        held_out = list(loaders(data)[1])
        for batch in held_out if flip else []:
            batch.labels = 1 - batch.labels
        engine._held_out = lambda: itertools.cycle(held_out)  # type: ignore[assignment, misc]
        for _ in engine.train(train):
            pass
        return {name: tensor for name, tensor in engine.state().items() if "optimiser.alpha" not in name}

    for settings in ({"alpha_learning_rate": 0.0}, {"bilevel": False}):
        plain, flipped = (trained(flip, **settings) for flip in (False, True))
        assert all(torch.equal(tensor, flipped[name]) for name, tensor in plain.items())
    alpha = "model.embedding.tables.alpha"
    assert plain[alpha].abs().max() > 1e-3  # joint search moves it, on train
    moved, other = (trained(flip, alpha_learning_rate=0.05) for flip in (False, True))
    assert (moved[alpha] - other[alpha]).abs().max() > 0.05


def test_the_gradient_of_alpha_is_that_of_finite_differences(data: Path) -> None:
    engine, lookup, _ = engine_of(data)
    engine.loss = lambda logits, labels, weights: (logits.double() * labels).sum()
    batch = next(iter(loaders(data)[1]))
    gradient = engine.gradient(batch)
    assert gradient.abs().max() > 1e-2
    engine.model.eval()
    for place in itertools.product(range(3), range(3)):
        values = []
        for shift in (1e-2, -1e-2):
            lookup.alpha[place] += shift
            values.append(engine.loss(engine.model(batch), batch.labels, batch.weights).item())
            lookup.alpha[place] -= shift
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(gradient[place]), rel=0.02, abs=2e-3)


# A planted set: f0 x f1 has a sign for each pair of values, f2 x f3 is of rank 2, and the rest is noise


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(6)
    sign, (u, v) = rng.choice([-1.0, 1.0], (32, 32)), rng.standard_normal((2, 32, 2))
    low = u @ v.T
    low = (low - low.mean()) / low.std()
    names = [f"f{field}" for field in range(6)]
    splits = {}
    for split, rows in (("train", 40_000), ("valid", 10_000)):
        x = rng.integers(32, size=(rows, 6))
        logit = sign[x[:, 0], x[:, 1]] + low[x[:, 2], x[:, 3]]
        clicks = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        splits[split] = {**{name: (3 + x[:, f]).astype(np.int32) for f, name in enumerate(names)}, "click": clicks}
    schema = Schema(tuple(Categorical(name, num_embeddings=35) for name in names), ("click",))
    return write(tmp_path_factory.mktemp("planted"), schema, splits)


def test_alpha_from_validation_is_closer_to_the_planted_truth_than_from_train(planted: Path) -> None:
    torch.manual_seed(0)
    model = models.mlp(Inputs(Schema.load(planted), embedding_dim=4), hidden=(32,))
    memorised, factorised = {}, {}
    for bilevel in (True, False):
        train = Loader(planted, "train", batch_size=1000, shuffle=True)
        valid = Loader(planted, "valid", batch_size=1000, shuffle=True)
        settings = OptInter(cross_dim=4, epochs=3, learning_rate=3e-3, alpha_learning_rate=1e-2, bilevel=bilevel)
        plan = optinter.search(model, train, valid, settings=settings, console=QUIET)
        for kind, found in (("memorise", memorised), ("factorise", factorised)):
            pairs = plan.replaced["embedding.tables"][f"{kind}d"]
            found[bilevel] = {(int(first[1]), int(second[1])) for first, second in pairs}
    assert (0, 1) in memorised[True] and (0, 1) in memorised[False]
    assert memorised[True] | factorised[True] <= {(0, 1), (2, 3)}  # no pair of noise
    assert len(memorised[False]) > 10  # what is memorised fits train best, noise too


def test_a_search_that_was_killed_ends_with_the_same_plan(data: Path, tmp_path: Path) -> None:
    settings = OptInter(cross_dim=4, epochs=3, gumbel=True, alpha_learning_rate=0.05)
    check_a_killed_search_goes_on(
        optinter.search,
        model_of(data),
        lambda: loaders(data),
        settings=settings,
        others=replace(settings, alpha_learning_rate=0.1),
        text="temperature",
        complaint="another search",
        out=tmp_path,
    )


# The look-up as a part, and what is refused


def crossed(schema: Schema) -> TableEmbedding:
    tables = [
        NarrowTable("user", ("user",), rows=20, rank=4),
        NarrowTable("item", ("item", "history"), rows=30, rank=4, pooling="mean"),
        NarrowTable("genres", ("genres",), rows=10, rank=4, pooling="mean"),
    ]
    pair = [("user", "item")]
    lookup = CrossTables(
        tables, embedding_dim=4, memorised=pair, factorised=pair, num_crosses=40, cross_dim=4, init_std=0.5
    )
    lookup.vectors.set_crosses([3 * 30 + 3 + 11 * torch.arange(40)])
    return TableEmbedding(schema.features, embedding_dim=4, tables=lookup)


def test_crossed_tables_are_an_embedding() -> None:
    check_embedding(crossed)


def test_crosses_of_sharded_tables_are_the_same(data: Path) -> None:
    _, lookup, _ = searched_model(data)
    batch = next(iter(loaders(data)[0]))
    expected = lookup.vectors(batch.sparse)

    class Sharded(nn.Module):
        """Not a plain collection: looked up key by key."""

        def __init__(self, tables: nn.Module) -> None:
            super().__init__()
            self.inner = tables

        def forward(self, kjt: Any) -> Any:
            return self.inner(kjt)

    lookup.vectors.crosses = Sharded(lookup.vectors.crosses)
    assert torch.equal(lookup.vectors(batch.sparse), expected)


def test_what_cannot_be_crossed_is_refused(data: Path) -> None:
    train, valid = loaders(data)
    for features in (("user",), ("user", "user"), ("user", "genres"), ("user", "nobody")):
        with pytest.raises(ValueError, match="two or more of the categorical features"):
            optinter.search(model_of(data), train, valid, settings=OptInter(features=features), console=QUIET)
    hashed = model_of(data, tables={"kind": "hash_embedding", "num_embeddings": 50})
    with pytest.raises(ValueError, match="beside the plain tables of a TableEmbedding"):
        optinter.search(hashed, train, valid, console=QUIET)
    with pytest.raises(ValueError, match="expected one of"):
        plan_of(model_of(data), PAIRS, [torch.empty(0)] * 3, ["memorise", "both", "naive"], cross_dim=4)
    vectors = PairVectors(ROWS, {name: name for name in ROWS}, memorised=PAIRS[:1], num_crosses=2)
    for codes in ([5, 5], [7, 3], [3, 12 * 20], [-1, 3]):
        with pytest.raises(ValueError, match="must be ascending codes below 240"):
            vectors.set_crosses([torch.tensor(codes)])
    with pytest.raises(ValueError, match="expected 2 crosses of 1 pairs"):
        vectors.set_crosses([torch.tensor([1])])
    bags = KeyedJaggedTensor.from_lengths_sync(["user", "item"], torch.tensor([3, 4, 5]), torch.tensor([2, 0, 1, 0]))
    with pytest.raises(ValueError, match="only categorical features"):
        vectors(bags)
    for pairs in ([("user", "user")], [("user", "nobody")], []):
        with pytest.raises(ValueError, match="expected"):
            PairVectors(ROWS, {name: name for name in ROWS}, memorised=pairs)
    with pytest.raises(ValueError, match="beyond 64 bits"):
        PairVectors({"a": 2**32, "b": 2**32}, {"a": "a", "b": "b"}, memorised=[("a", "b")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cross_dim": 0}, "cross_dim must be 1 or more"),
        ({"min_count": 0}, "min_count must be 1 or more"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"temperature_floor": 0.0}, "temperature_floor must be in"),
        ({"alpha_learning_rate": float("nan")}, "alpha_learning_rate must be 0 or more"),
    ],
)
def test_bad_settings_say_what_was_expected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptInter(**settings)
