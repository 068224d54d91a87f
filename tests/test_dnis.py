"""DNIS: the rule by which alpha moves, what validation may touch, planted widths, and tables by blocks."""

from __future__ import annotations

import copy
import itertools
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

import ctrlib as ctr
from ctrlib import models
from ctrlib.batch import Batch
from ctrlib.data.loader import Loader
from ctrlib.embeddings.blocks import BlockedVocabulary, BlockTables
from ctrlib.embeddings.table import TableEmbedding
from ctrlib.inputs import Inputs
from ctrlib.model import Model
from ctrlib.schema import Categorical, MultiValued, Numeric, Schema, Sequence
from ctrlib.search import dnis
from ctrlib.search.bytes import bytes_of
from ctrlib.search.dnis import DNIS, BilevelEngine, alpha_step, choose_columns, frequency_blocks, soft_model
from ctrlib.search.plan import Plan, materialise
from ctrlib.structure import describe
from ctrlib.testing import check_embedding

QUIET = Console(quiet=True)
RANKS, PER_BLOCK = (8, 4, 2, 0), 200


def write(folder: Path, schema: Schema, splits: dict[str, dict[str, Any]]) -> Path:
    """A prepared folder by hand, so that ids are what the test says."""
    folder.mkdir(exist_ok=True)
    schema.save(folder / "schema.json")
    for split, columns in splits.items():
        (folder / split).mkdir()
        pl.DataFrame(columns).write_parquet(folder / split / "0.parquet")
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks on <x, v_item>: items of block l, each rarer than the one before, have v in the first RANKS[l] of 8."""
    rng = np.random.default_rng(0)
    v = 0.8 * rng.standard_normal((4, PER_BLOCK, 8))
    for block, rank in enumerate(RANKS):
        v[block, :, rank:] = 0
    features = [Categorical("item", num_embeddings=3 + 4 * PER_BLOCK)]
    schema = Schema((*features, *(Numeric(f"x{j}", parameters={}) for j in range(8))), ("click",))
    splits = {}
    for split, rows in (("train", 60_000), ("valid", 15_000)):
        block, item = rng.choice(4, rows, p=(0.4, 0.25, 0.2, 0.15)), rng.integers(PER_BLOCK, size=rows)
        x = rng.standard_normal((rows, 8)).astype(np.float32)
        clicks = rng.random(rows) < 1 / (1 + np.exp(-(x * v[block, item]).sum(1)))
        numbers = {f"x{j}": x[:, j] for j in range(8)}
        ids = (3 + block * PER_BLOCK + item).astype(np.int32)
        splits[split] = {"item": ids, **numbers, "click": clicks.astype(np.float32)}
    return write(tmp_path_factory.mktemp("planted"), schema, splits)


def planted_search(folder: Path, **changed: Any) -> torch.Tensor:
    """Alpha after a search in a factorization machine whose numbers are a fixed basis: logit = <x, e_item>."""
    torch.manual_seed(0)
    model = models.fm(Inputs(Schema.load(folder), embedding_dim=8))
    with torch.no_grad():
        for basis in model.embedding.numeric.parameters():
            basis.copy_(torch.eye(8).view(basis.shape)).requires_grad_(False)
    settings = DNIS(blocks=4, ratio=1.5, learning_rate=3e-3, **changed)
    train = Loader(folder, "train", batch_size=1000, shuffle=True)
    valid = Loader(folder, "valid", batch_size=5000, shuffle=True)
    plan = dnis.search(model, train, valid, settings=settings, console=QUIET)
    columns = plan.replaced["embedding.tables"]["columns"]
    if settings.normalise == "task":
        assert columns[0] == list(range(8)) and columns[1] == [0, 1, 2, 3] and not columns[3]
        assert {0, 1} <= set(columns[2]) and len(columns[2]) == 4
    return torch.tensor(plan.summary["alpha"])


def is_useful() -> torch.Tensor:
    return torch.arange(8) < torch.tensor(RANKS).unsqueeze(1)


def recovers(alpha: torch.Tensor) -> bool:
    useful = is_useful()
    return bool((alpha[useful] > 0.9).all() and (alpha[~useful] < 0.25).all() and (alpha[3] < 0.1).all())


def test_planted_ranks_are_found_and_without_normalising_they_are_not(planted: Path) -> None:
    alpha = planted_search(planted, warm_epochs=5, epochs=11, penalty=0.3)
    assert recovers(alpha), alpha.tolist()
    raw = planted_search(planted, warm_epochs=2, epochs=4, normalise="none")
    assert raw.min() > 0.9  # as good as nothing has moved
    pushed = planted_search(planted, warm_epochs=2, epochs=4, normalise="none", penalty=0.3)
    assert not recovers(pushed) and pushed.max() < 0.6  # the penalty does not tell them apart


def test_a_step_of_alpha_is_the_rule() -> None:
    alpha = torch.tensor([[0.5, 0.2, 0.9], [0.5, 0.5, 0.0], [0.3, 0.6, 1.0]])
    gradient = torch.tensor([[3e-3, -1e-3, 2e-3], [0.0, 0.0, 0.0], [-5.0, 5.0, -50.0]])
    settings = DNIS(alpha_learning_rate=0.1)
    moved = alpha_step(alpha, gradient, settings)
    expected = alpha - 0.1 * torch.tensor([[1.5, -0.5, 1.0], [0, 0, 0], [-0.25, 0.25, -2.5]])
    torch.testing.assert_close(moved, expected.clamp(0, 1), atol=2e-6, rtol=0)
    # The size of the loss does not matter (but for 1e-8 beside it), nor does a power of two to the last bit.
    torch.testing.assert_close(alpha_step(alpha, 1024 * gradient, settings), moved, atol=2e-6, rtol=0)
    assert torch.equal(moved[1], alpha[1])


def test_the_penalty_comes_after_the_normalisation_unless_asked() -> None:
    alpha, gradient = torch.tensor([[0.5, 0.5], [0.5, 0.0]]), torch.tensor([[1e-6, -3e-6], [2.0, -2.0]])
    after = alpha_step(alpha, gradient, DNIS(penalty=0.1, alpha_learning_rate=0.1))
    torch.testing.assert_close(after, torch.tensor([[0.44, 0.64], [0.39, 0.1]]), atol=1e-3, rtol=0)
    # In the code's order a rare block sees next to nothing but the penalty, as large as a whole gradient.
    before = alpha_step(alpha, gradient, DNIS(penalty=0.1, alpha_learning_rate=0.1, normalise="task_and_penalty"))
    torch.testing.assert_close(before[0], torch.tensor([0.4, 0.4]), atol=1e-4, rtol=0)
    none = alpha_step(alpha, gradient, DNIS(penalty=0.1, alpha_learning_rate=0.1, normalise="none"))
    torch.testing.assert_close(none, torch.tensor([[0.49, 0.49], [0.29, 0.2]]), atol=1e-6, rtol=0)


# What validation may touch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of feature; ids in order of frequency, and the last of each vocabulary never in train."""
    rng = np.random.default_rng(1)
    schema = Schema(
        (
            Categorical("user", num_embeddings=40),
            Numeric("price", parameters={}),
            Categorical("item", num_embeddings=60),
            MultiValued("genres", num_embeddings=12, pooling="mean"),
            Sequence("history", vocabulary="item", num_embeddings=60, pooling="sum"),
        ),
        ("click",),
    )

    def ids(count: int, rows: int, unseen: int = 0) -> np.ndarray:
        return np.minimum(3 + (rng.random(rows) ** 2 * (count - 4)), count - 2 + unseen).astype(np.int32)

    def bags(count: int, rows: int, pooling: int) -> list[list[int]]:
        return [ids(count, rng.integers(0, pooling)).tolist() for _ in range(rows)]

    splits = {}
    for split, rows in (("train", 1200), ("valid", 500)):
        user, item = ids(40, rows), ids(60, rows)
        splits[split] = {
            "user": user,
            "price": rng.standard_normal(rows).astype(np.float32),
            "item": item,
            "genres": pl.Series(bags(12, rows, 4), dtype=pl.List(pl.Int32)),
            "history": pl.Series(bags(60, rows, 5), dtype=pl.List(pl.Int32)),
            "click": ((user + item + rng.integers(0, 9, rows)) % 3 == 0).astype(np.float32),
        }
    return write(tmp_path_factory.mktemp("dnis"), schema, splits)


def model_of(data: Path, **inputs: Any) -> Model:
    torch.manual_seed(0)
    model = models.deepfm(Inputs(Schema.load(data), embedding_dim=8, **inputs), hidden=(8,), dropout=0.2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embedding_bags" in name:
                weight.normal_(std=0.3)
    return model


def loaders(data: Path) -> tuple[Loader, Loader]:
    return Loader(data, "train", batch_size=100, shuffle=True), Loader(data, "valid", batch_size=100)


def engine_of(data: Path, **settings: Any) -> tuple[BilevelEngine, Loader]:
    train, valid = loaders(data)
    searched, lookup, _ = soft_model(model_of(data), train, DNIS(blocks=3))
    return BilevelEngine(searched, lookup, valid, DNIS(blocks=3, **settings)), train


def test_a_step_of_alpha_moves_alpha_and_nothing_else(data: Path) -> None:
    engine, _ = engine_of(data)
    before = {name: tensor.clone() for name, tensor in engine.state().items()}
    generator = torch.get_rng_state()
    for part in engine.model.network():
        part.eval()
    engine._step_alpha(next(iter(loaders(data)[1])))
    changed = {name for name, tensor in engine.state().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.embedding.tables.alpha"}
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_step_of_the_weights_leaves_alpha(data: Path) -> None:
    engine, train = engine_of(data)
    before = {name: tensor.clone() for name, tensor in engine.state().items() if name.startswith("model.")}
    engine.step(next(iter(train)))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, engine.state()[name])}
    assert "model.embedding.tables.alpha" not in changed
    tables = {name for name in before if "embedding_bags" in name}
    assert tables <= changed and all(name.startswith(("model.embedding.", "model.wide.")) for name in changed)


def test_labels_of_validation_reach_weights_through_alpha_only(data: Path) -> None:
    def trained(flip: bool, rate: float) -> dict[str, torch.Tensor]:
        engine, train = engine_of(data, alpha_learning_rate=rate)
        held_out = list(loaders(data)[1])
        if flip:
            for batch in held_out:
                batch.labels = 1 - batch.labels
        engine._held_out = lambda: itertools.cycle(held_out)  # type: ignore[assignment, misc]
        for _ in engine.train(train):
            pass
        return engine.state()  # type: ignore[return-value]

    plain, flipped = trained(False, 0.0), trained(True, 0.0)
    assert all(torch.equal(tensor, flipped[name]) for name, tensor in plain.items())
    moved, other = trained(False, 0.02), trained(True, 0.02)
    assert (moved["model.embedding.tables.alpha"] - other["model.embedding.tables.alpha"]).abs().max() > 0.05


def test_the_gradient_of_alpha_is_that_of_finite_differences(data: Path) -> None:
    engine, train = engine_of(data)
    engine.model.double().eval()
    lookup = engine.model.embedding.tables
    batch = next(iter(train))
    batch.dense = batch.dense.double()
    batch.labels = batch.labels.double()
    lookup.alpha.copy_(torch.rand(lookup.alpha.shape, generator=torch.Generator().manual_seed(3)).double())

    def exact_loss(logits: torch.Tensor, labels: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    engine.loss = exact_loss
    gradient = engine.gradient(batch)
    assert gradient.abs().max() > 1e-3
    for block, column in itertools.product(range(3), (0, 5)):
        losses = []
        for shift in (1e-4, -1e-4):  # TorchRec pools in float32
            kept = lookup.alpha.clone()
            lookup.alpha[block, column] += shift
            losses.append(exact_loss(engine.model(batch), batch.labels, batch.weights).item())
            lookup.alpha.copy_(kept)
        assert abs((losses[0] - losses[1]) / 2e-4 - gradient[block, column].item()) < 1e-5


# Blocks, columns, and the tables that come of them


def test_blocks_are_of_train_counts_with_ties_in_order_and_unseen_values_last(data: Path) -> None:
    counts = {"a": torch.tensor([9, 0, 50, 7, 7, 1, 0, 0]), "b": torch.tensor([0, 0, 0, 7, 2, 1])}
    assert frequency_blocks(counts, (0.25, 0.25, 0.5)) == {"a": (5, 5, 8), "b": (3, 5, 6)}
    train = loaders(data)[0]
    _, lookup, found = soft_model(model_of(data), train, DNIS(blocks=(0.1, 0.4, 0.5)))
    seen = torch.zeros(60, dtype=torch.int64)
    for batch in train:
        for name in ("item", "history"):
            seen += torch.bincount(batch.sparse[name].values(), minlength=60)
    assert torch.equal(found["table_item"], seen) and seen[59] == 0
    assert lookup.blocks["table_item"][59] == 2 and lookup.blocks["table_item"][:3].tolist() == [0, 0, 0]
    assert sum(int((blocks == 0).sum()) - 3 for blocks in lookup.blocks.values()) == round(0.1 * (37 + 57 + 9))


def test_columns_follow_importance_and_fill_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    importance, rows = torch.rand(4, 10, generator=generator), [5, 50, 20, 7]
    importance[3] = 0
    for num_bytes in (100, 1000, 3000, 10_000):
        columns = choose_columns(importance, rows, num_bytes)
        spent = sum(len(chosen) * (4 * count + 8) for chosen, count in zip(columns, rows))
        assert spent <= num_bytes and not columns[3]
        for block, chosen in enumerate(columns):
            best = importance[block].argsort(descending=True)[: len(chosen)].sort().values.tolist()
            assert chosen == best and (len(chosen) % 4 == 0 or len(chosen) == 10)
            if len(chosen) < 10 and block < 3:
                assert spent + min(4, 10 - len(chosen)) * (4 * rows[block] + 8) > num_bytes


@pytest.mark.parametrize("power", [0.0, 0.25, 1.0])
def test_importance_is_alpha_times_the_size_of_what_is_read(data: Path, power: float) -> None:
    _, _, lookup, counts = trained_alpha(data, DNIS(blocks=3))
    found = dnis.importance(lookup, counts, power)
    for block, column in itertools.product(range(3), (0, 7)):
        terms = [
            float(counts[name][row]) ** power * float(bag.weight[row, column].detach()) ** 2
            for name, bag in lookup.tables.embedding_bags.items()
            for row in (lookup.blocks[name] == block).nonzero()[:, 0].tolist()
        ]
        expected = float(lookup.alpha[block, column]) * (sum(terms) / len(terms)) ** 0.5
        assert float(found[block, column]) == pytest.approx(expected, rel=1e-4)


def trained_alpha(data: Path, settings: DNIS, **inputs: Any) -> tuple[Model, Model, Any, dict[str, torch.Tensor]]:
    model = model_of(data, **inputs)
    searched, lookup, counts = soft_model(model, loaders(data)[0], settings)
    lookup.alpha.copy_(torch.rand(lookup.alpha.shape, generator=torch.Generator().manual_seed(7)))
    return model, searched, lookup, counts


def every_id(model: Model, data: Path) -> list[Batch]:
    """Batches with every id there is, unseen and reserved ones too, in bags of none to many."""
    train, valid = loaders(data)
    batches = [*train, *valid]
    jagged = batches[0].sparse
    lengths = jagged.lengths().view(4, -1).clone()
    lengths[2], lengths[3] = torch.arange(100) % 4, torch.arange(100) % 7
    rows = {"user": 40, "item": 60, "genres": 12, "history": 60}
    ids = [torch.arange(int(length.sum())) % rows[name] for name, length in zip(jagged.keys(), lengths)]
    sparse = type(jagged).from_lengths_sync(jagged.keys(), torch.cat(ids), lengths.flatten())
    return [*batches, Batch(sparse, batches[0].dense, batches[0].labels, batches[0].weights)]


@pytest.mark.parametrize("stacked", [0, 2])
def test_small_tables_are_the_masked_ones_and_take_what_they_say(data: Path, tmp_path: Path, stacked: int) -> None:
    settings = DNIS(blocks=(0.2, 0.3, 0.5))
    model, searched, lookup, counts = trained_alpha(data, settings, stacked=stacked)
    budget = bytes_of(model).embedding // 2
    plan = dnis.plan_of(searched, lookup, counts, dnis._bytes_for_columns(model, lookup, DNIS(num_bytes=budget)))
    plan.save(tmp_path / "plan.safetensors")
    smaller = materialise(model, Plan.load(tmp_path / "plan.safetensors"))
    columns = plan.replaced["embedding.tables"]["columns"]
    assert len({len(chosen) for chosen in columns}) > 1
    mask = torch.stack([torch.isin(torch.arange(8), torch.tensor(chosen)) for chosen in columns])
    lookup.alpha.mul_(mask)
    for batch in every_id(model, data):
        torch.testing.assert_close(
            smaller.embedding.tables(batch.sparse).values(), lookup(batch.sparse).values(), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(smaller.eval()(batch), searched.eval()(batch), atol=1e-6, rtol=0)
    allocated = bytes_of(smaller).embedding
    parts = [*smaller.embedding.parameters(), *smaller.embedding.buffers(), *smaller.wide.parameters()]
    assert allocated == sum(tensor.numel() * tensor.element_size() for tensor in parts) <= budget
    cheapest = min(4 * (4 * size + 8) for size, chosen in zip(dnis._rows(lookup), columns) if len(chosen) < 8)
    assert allocated + cheapest > budget
    assert describe(smaller)["embedding.tables"] == plan.replaced["embedding.tables"]
    assert plan.summary["kept"]["user"][1] == 37 and len(plan.summary["words"]) == 3


def test_folding_alpha_changes_nothing(data: Path) -> None:
    settings = DNIS(blocks=3)
    model, searched, lookup, counts = trained_alpha(data, settings)
    smaller = materialise(model, dnis.plan_of(searched, lookup, counts, 10**9))
    for batch in every_id(model, data):
        torch.testing.assert_close(smaller.eval()(batch), searched.eval()(batch), atol=1e-6, rtol=0)


def blocked() -> BlockTables:
    torch.manual_seed(0)
    return BlockTables(
        [
            BlockedVocabulary("user", ("user",), ends=(5, 12, 20)),
            BlockedVocabulary("item", ("item", "history"), ends=(10, 10, 30), pooling="mean"),
            BlockedVocabulary("genres", ("genres",), ends=(3, 6, 10), pooling="mean"),
        ],
        columns=[[0, 1, 2, 3], [1, 2], [0, 3]],
        embedding_dim=4,
        names=["user", "item", "genres", "history"],
        init_std=0.5,
    )


def test_block_tables_are_an_embedding_and_shard_by_key() -> None:
    check_embedding(lambda schema: TableEmbedding(schema.features, embedding_dim=4, tables=blocked()))
    lookup = blocked()
    schema = ctr.testing.example_schema()
    ids = ctr.testing.example_batch(schema, 9).sparse
    expected = lookup(ids).values()

    class Sharded(nn.Module):
        """Gives fields by key, in another order, as TorchRec does."""

        def __init__(self, tables: nn.Module) -> None:
            super().__init__()
            self.inner = tables

        def forward(self, kjt: Any) -> Any:
            pooled = self.inner(kjt)
            keys = pooled.keys()[::-1]
            fields = pooled.to_dict()
            return type(pooled)(keys, [fields[key].shape[1] for key in keys], torch.cat([fields[k] for k in keys], 1))

    sharded = copy.deepcopy(lookup)
    sharded.tables = Sharded(sharded.tables)
    torch.testing.assert_close(sharded(ids).values(), expected, atol=1e-6, rtol=0)


def test_an_id_beyond_its_vocabulary_is_refused() -> None:
    lookup = blocked()
    schema = ctr.testing.example_schema()
    for name, bad in (("user", 20), ("item", 30), ("user", -1)):
        ids = ctr.testing.example_batch(schema, 2).sparse
        ids.values()[ids.offset_per_key()[ids.keys().index(name)]] = bad
        with pytest.raises((RuntimeError, IndexError)):
            lookup(ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": [[0], [1]]}, "columns are of 2 blocks"),
        ({"columns": [[], [], []]}, "and some"),
        ({"columns": [[4], [], []]}, "ascending ones of 0 to 3"),
        ({"columns": [[1, 0], [], []]}, "ascending ones of 0 to 3"),
        ({"names": ["user"]}, "but the vocabularies are those of"),
        ({"vocabularies": []}, "expected one or more vocabularies"),
        ({"vocabularies": [{"name": "a", "feature_names": ["a"], "ends": [2, 5, 6]}]}, "the reserved ids"),
        ({"vocabularies": [{"name": "a", "feature_names": ["a"], "ends": [4, 3, 6]}]}, "expected them to ascend"),
        ({"vocabularies": [{"name": "a", "feature_names": [], "ends": [4, 5, 6]}]}, "one feature or more"),
    ],
)
def test_bad_blocks_say_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockTables(**{**blocked().describe(), **change})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "how many there are"),
        ({"blocks": (0.5, 0.4)}, "with the sum 1"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"ratio": 1.0}, "ratio must be more than 1"),
        ({"penalty": float("nan")}, "penalty must be 0 or more"),
        ({"normalise": "both"}, "expected one of"),
    ],
)
def test_bad_settings_say_what_was_expected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DNIS(**settings)


def test_what_cannot_be_searched_is_refused(data: Path) -> None:
    train, valid = loaders(data)
    with pytest.raises(ValueError, match="do not hold four columns of the smallest block"):
        dnis.search(model_of(data), train, valid, settings=DNIS(num_bytes=500), console=QUIET)
    model = model_of(data, tables={"kind": "hash_embedding", "num_embeddings": 50})
    with pytest.raises(ValueError, match="searches the plain tables of a TableEmbedding"):
        dnis.search(model, train, valid, console=QUIET)


def test_a_search_that_was_killed_ends_with_the_same_plan(data: Path, tmp_path: Path) -> None:
    settings = DNIS(blocks=3, warm_epochs=1, epochs=3, ratio=1.6)
    check_a_killed_search_goes_on(
        dnis.search,
        model_of(data),
        lambda: loaders(data),
        settings=settings,
        others=replace(settings, ratio=1.7),
        text="mean alpha",
        complaint="of another run: settings.DNIS.",
        out=tmp_path,
    )
