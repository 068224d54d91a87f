"""Compression of a trained model: the damage foretold is the damage done, budgets are met, what is saved is small."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.batch import Batch
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.schema import NUM_RESERVED_IDS
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import allocate_bits, transform_coding, usage
from ctrlib.search.compression import compress
from ctrlib.search.floors import frequency_cut, rounded_rows
from ctrlib.search.plan import Plan, materialise
from ctrlib.serving.model_folder import save_model
from ctrlib.serving.predictor import Predictor
from ctrlib.training.run import run

CONFIG = {"model": "deepfm", "embedding_dim": 8, "hidden": [16], "stacked": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prepared folder with bags, histories and numbers, and a model folder."""
    folder = tmp_path_factory.mktemp("compress")
    frame, _ = generate(Teacher(num_rows=12_000, cardinalities=(600, 300, 30), num_numeric=2, max_history=5, seed=5))
    features = [ctr.Categorical(f"C{n}") for n in (1, 2, 3)]
    features += [ctr.Numeric("I1"), ctr.Numeric("I2"), ctr.Sequence("history", vocabulary="C1")]
    splits = {"train": frame[:8000], "valid": frame[8000:10_000], "test": frame[10_000:]}
    ctr.prepare(splits, folder / "data", features=features, labels="label", log=None)

    def save(model: ctr.Model) -> None:
        save_model(model, CONFIG, folder / "data", folder / "model")

    run(
        folder / "data",
        {**CONFIG, "training": {"batch_size": 256, "max_epochs": 3, "embedding_l2": 1e-4}},
        on_trained=save,
    )
    return folder / "data", folder / "model"


def loader(data: Path, split: str = "train") -> ctr.Loader:
    return ctr.Loader(data, split, batch_size=1000)


def logits(model: ctr.Model, batches: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(batch) for batch in batches])


def test_usage_is_what_a_loop_over_rows_finds() -> None:
    """Reads, and the mean of p (1 - p) g g^T over look-ups, one row and one id at a time."""
    schema = ctr.testing.example_schema()
    torch.manual_seed(0)
    model = models.deepfm(ctr.Inputs(schema, embedding_dim=3), hidden=(5,)).double().eval()
    batch = ctr.testing.example_batch(schema, 40)
    batch = Batch(batch.sparse, batch.dense.double(), batch.labels.double(), batch.weights.double())
    found = usage(model, [batch])
    jagged = batch.sparse.to_dict()
    for table, features in (("item", ("item", "history")), ("genres", ("genres",))):
        name = f"embedding.tables.embedding_bags.table_{table}.weight"
        weight = dict(model.named_parameters())[name]
        total, reads = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(len(weight), dtype=torch.float64)
        for feature in features:
            reads += torch.bincount(jagged[feature].values(), minlength=len(weight))
            position = schema.position(feature)
            fields = model.embedding(batch).detach().requires_grad_()
            assert model.wide is not None
            out = model.head(model.tower(fields)) + model.wide(batch).detach()
            gradient = torch.autograd.grad(out.sum(), fields)[0][:, position]
            p = torch.sigmoid(out.detach())[:, 0]
            for row, ids in enumerate(jagged[feature].to_dense()):
                for _ in ids:
                    g = gradient[row] / len(ids)  # bags and histories are means, a single id is its own
                    total += p[row] * (1 - p[row]) * torch.outer(g, g)
        torch.testing.assert_close(found[name].reads, reads / 40)
        torch.testing.assert_close(found[name].metric, total / reads.sum(), rtol=1e-6, atol=1e-12)


def test_damage_foretold_is_damage_done(trained: tuple[Path, Path]) -> None:
    """The plan's figure is the mean divergence of the predictions, of which it is the second-order term."""
    data, folder = trained
    model: Any = Predictor.load(folder).model
    before = logits(model, loader(data))
    size = bytes_of(model).embedding
    seen = []
    for ratio in (4, 8):
        plan = transform_coding(model, loader(data), num_bytes=size // ratio)
        after = logits(materialise(model, plan), loader(data))
        p, q = torch.sigmoid(before).double(), torch.sigmoid(after).double()
        divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().item()
        seen.append((plan.summary["damage"], divergence))
        assert 0.5 < plan.summary["damage"] / divergence < 2, seen
    assert seen[1][1] > 2 * seen[0][1]  # so there was something to foretell


def test_the_metric_and_the_frequencies_both_matter(trained: tuple[Path, Path], monkeypatch: Any) -> None:
    """Without either, predictions move more at the same size, in the mean over sizes: bits are whole numbers."""
    from ctrlib.search import coding as module

    data, folder = trained
    model: Any = Predictor.load(folder).model
    before = logits(model, loader(data))
    p = torch.sigmoid(before)

    def moved() -> torch.Tensor:
        found = []
        for ratio in (10, 13, 16, 20):
            plan = transform_coding(model, loader(data), num_bytes=bytes_of(model).embedding // ratio)
            change = (logits(materialise(model, plan), loader(data)) - before).square()
            found.append((change * p * (1 - p)).mean())
        return torch.stack(found)

    whole, real = moved(), module.usage

    def plain(*arguments: Any, **options: Any) -> Any:
        return {
            name: module.Usage(used.reads, torch.eye(len(used.metric)).double())
            for name, used in real(*arguments, **options).items()
        }

    def even(*arguments: Any, **options: Any) -> Any:
        return {
            name: module.Usage(used.reads.mean().expand_as(used.reads), used.metric)
            for name, used in real(*arguments, **options).items()
        }

    monkeypatch.setattr(module, "usage", plain)
    without_metric = moved()
    monkeypatch.setattr(module, "usage", even)
    without_frequencies = moved()
    assert (without_metric / whole).mean() > 1.3
    assert (without_frequencies / whole).mean() > 1.05  # ids are only mildly skewed here


@pytest.mark.parametrize("ratio", [3, 6, 12])
def test_budgets_are_met_to_the_byte(trained: tuple[Path, Path], ratio: int) -> None:
    data, folder = trained
    model: Any = Predictor.load(folder).model
    budget = bytes_of(model).embedding // ratio
    smaller = materialise(model, transform_coding(model, loader(data), num_bytes=budget))
    size = bytes_of(smaller)
    assert 0.9 * budget < size.embedding <= budget
    tensors = {id(t): t.numel() * t.element_size() for t in (*smaller.parameters(), *smaller.buffers())}
    assert size.total == sum(tensors.values())
    assert bytes_of(model).network == size.network


def test_an_impossible_budget_names_the_smallest(trained: tuple[Path, Path]) -> None:
    data, folder = trained
    model: Any = Predictor.load(folder).model
    with pytest.raises(ValueError, match="is the smallest feasible budget") as error:
        transform_coding(model, loader(data), num_bytes=100)
    smallest = int(str(error.value).split("bytes, ")[1].split(" ")[0].replace(",", ""))
    plan = transform_coding(model, loader(data), num_bytes=smallest)
    assert bytes_of(materialise(model, plan)).embedding == smallest
    with pytest.raises(ValueError, match="smallest feasible"):
        transform_coding(model, loader(data), num_bytes=smallest - 1)


def test_much_room_changes_nothing(trained: tuple[Path, Path]) -> None:
    """Half of the bytes are more than float16 for the large tables: logits stay to within its rounding."""
    data, folder = trained
    model: Any = Predictor.load(folder).model
    plan = transform_coding(model, loader(data), num_bytes=int(bytes_of(model).embedding * 0.52))
    change = logits(materialise(model, plan), loader(data, "test")) - logits(model, loader(data, "test"))
    assert change.abs().max() < 2e-3


def test_rows_not_worth_their_bytes_share_one(trained: tuple[Path, Path]) -> None:
    """Ids that train never reads are the first to go, and what they share is their mean."""
    data, folder = trained
    model: Any = Predictor.load(folder).model
    plan = transform_coding(model, loader(data), num_bytes=bytes_of(model).embedding // 14)
    tables = {t["name"]: t for part in plan.replaced.values() for t in part["tables"]}
    cut = {name: t for name, t in tables.items() if t["dropped_to"]}
    assert cut, "the budget was meant to be too small for all rows"
    for table in cut.values():
        assert table["dropped_to"] == table["rows"] - 1 > NUM_RESERVED_IDS


def test_plans_are_saved_and_of_one_model(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, folder = trained
    model: Any = Predictor.load(folder).model
    plan = transform_coding(model, loader(data), num_bytes=bytes_of(model).embedding // 5)
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    batches = list(loader(data, "test"))
    assert torch.equal(logits(materialise(model, plan), batches), logits(materialise(model, again), batches))
    other = models.build({"model": "mlp", "embedding_dim": 8, "hidden": [16]}, ctr.Schema.load(data))
    with pytest.raises(ValueError, match=r"which has no \['wide.tables'\]"):
        materialise(other, plan)
    with pytest.raises(ValueError, match="is not a plan"):
        Plan.load(folder / "model.safetensors")
    with pytest.raises(ValueError, match="coded already"):
        transform_coding(materialise(model, plan), loader(data), num_bytes=1000)


def test_floors(trained: tuple[Path, Path]) -> None:
    """Rounded rows take the bytes they should; a frequency cut keeps the most frequent ids and meets its budget."""
    data, folder = trained
    model: Any = Predictor.load(folder).model
    before = logits(model, loader(data, "test"))
    gaps = []
    for bits, row in ((16, 16), (8, 12), (4, 8), (2, 6)):
        smaller = materialise(model, rounded_rows(model, bits))  # type: ignore[arg-type]
        assert bytes_of(smaller).weights == sum(f.num_embeddings or 0 for f in _vocabularies(data)) * row
        gaps.append((logits(smaller, loader(data, "test")) - before).square().mean().item())
    assert gaps == sorted(gaps) and gaps[0] < 1e-6 < gaps[3]
    budget = bytes_of(model).embedding // 4
    plan = frequency_cut(model, loader(data), num_bytes=budget)
    size = bytes_of(materialise(model, plan)).embedding
    assert 0.8 * budget < size <= budget
    with pytest.raises(ValueError, match="do not hold any row"):
        frequency_cut(model, loader(data), num_bytes=50)


def _vocabularies(data: Path) -> list[Any]:
    return [members[0] for members in ctr.Schema.load(data).vocabularies.values()]


def test_bits_go_where_they_count() -> None:
    """Equal variances share evenly; a factor of 4 is worth a bit; words hold what they can."""
    assert [bits for word in allocate_bits(torch.ones(4), 2) for _, bits in word] == [4, 4, 4, 4]
    ((_, first), (_, second)) = allocate_bits(torch.tensor([16.0, 1.0]), 1)[0]
    assert (first, second) == (5, 3)
    for num_bytes in range(1, 9):
        words = allocate_bits(torch.logspace(0, -4, 20), num_bytes)
        assert sum(bits for word in words for _, bits in word) == 8 * num_bytes
        assert all(sum(bits for _, bits in word) <= 32 for word in words)
        assert len({c for word in words for c, _ in word}) == sum(len(word) for word in words)


@pytest.mark.usefixtures("drawn_pictures")
def test_the_command(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From model folder to smaller model folder, which scores raw rows as the printed AUC says."""
    data, folder = trained
    command = ["compress", str(folder), str(data), "--out", str(tmp_path / "small")]
    assert cli.main([*command, "--ratio", "8", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"] >= 8
    # 4 KB of 20 are left of the embeddings: on disk too.
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, tmp_path / "small")]
    saved = result["embedding_bytes_before"] - result["embedding_bytes_after"]
    assert sizes[0] - sizes[1] == pytest.approx(saved, rel=0.15)
    scores = Predictor.load(tmp_path / "small").evaluate_prepared(data, "test")
    assert scores["auc"] == pytest.approx(result["test_auc_after"], abs=1e-12)
    assert result["valid_auc_after"] > result["valid_auc_before"] - 0.01
    assert (tmp_path / "small" / "compression.png").stat().st_size > 5000
    for arguments, complaint in (
        (["--ratio", "4"], "small is a folder of `ctrlib compress` already: give another --out, or --overwrite"),
        (["--bytes", "10", "--overwrite"], "smallest feasible"),
        (["--bytes", "10", "--ratio", "2"], "one of them"),
        (["--bytes", "many"], "is no number of bytes"),
        (["--bytes", "9GB", "--overwrite"], "asks for nothing"),
    ):
        assert cli.main([*command, *arguments]) == 1
        assert complaint in capsys.readouterr().err
    assert json.loads((tmp_path / "small" / "compression.json").read_text()) == result
    assert cli.main([*command, "--ratio", "4", "--epochs", "0", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] == result["embedding_bytes_before"] // 4


def test_distillation_brings_it_nearer_and_never_loses(trained: tuple[Path, Path], tmp_path: Path) -> None:
    data, folder = trained
    results = [
        compress(folder, data, tmp_path / f"{epochs}", ratio=10, epochs=epochs, batch_size=512) for epochs in (0, 3)
    ]
    assert results[0]["tried"][-1]["valid_auc"] == results[0]["tried"][-2]["valid_auc"]
    assert results[1]["valid_auc_after"] >= results[0]["valid_auc_after"]
    assert results[1]["bytes_after"] == results[0]["bytes_after"]
    model: Any = Predictor.load(folder).model
    wanted = logits(model, loader(data))
    gaps = [
        (logits(Predictor.load(tmp_path / f"{epochs}").model, loader(data)) - wanted).square().mean()
        for epochs in (0, 3)
    ]
    assert gaps[1] < gaps[0]


def test_several_models_teach_together(trained: tuple[Path, Path], tmp_path: Path) -> None:
    """Their mean logit is what is learnt, and one prepared from other data is refused."""
    data, folder = trained
    model, other = (Predictor.load(folder).model for _ in range(2))
    torch.nn.init.constant_(other.head.bias, 4.0)  # type: ignore[union-attr, arg-type]
    teacher = ctr.Ensemble([model, other])
    small: Any = copy.deepcopy(model)
    gap = (logits(teacher, loader(data)) - logits(model, loader(data))).mean()
    assert gap > 1.5
    order = itertools.count()
    ctr.search.distil(
        small, teacher, loader(data), loader(data, "valid"), learning_rate=0.02, choose=lambda _: next(order)
    )
    left = (logits(teacher, loader(data)) - logits(small, loader(data))).mean()
    assert abs(left) < 0.5
    splits = dict.fromkeys(("train", "valid", "test"), generate(Teacher(num_rows=200, cardinalities=(9, 9)))[0])
    features = [ctr.Categorical("C1"), ctr.Categorical("C2")]
    ctr.prepare(splits, tmp_path / "data", features=features, labels="label", log=None)
    stranger = models.build(CONFIG, ctr.Schema.load(tmp_path / "data"))
    save_model(stranger, CONFIG, tmp_path / "data", tmp_path / "stranger")
    with pytest.raises(ValueError, match="prepared"):
        compress(folder, data, tmp_path / "out", ratio=4, teachers=[tmp_path / "stranger"])
