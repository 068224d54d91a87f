"""Compression of models that read histories event by event: target and history read the same small rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib import cli
from ctrlib.batch import Batch
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.embeddings.narrow import NarrowTable
from ctrlib.embeddings.packed import PackedTable, PackedTables
from ctrlib.embeddings.small_events import NarrowEvents, PackedEvents
from ctrlib.errors import ArgumentError
from ctrlib.models import build
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import transform_coding, usage
from ctrlib.search.floors import frequency_cut, rounded_rows
from ctrlib.search.mimicking import apply_low_rank, low_rank
from ctrlib.search.plan import materialise
from ctrlib.search.ranks import Goal
from ctrlib.search.row_errors import row_errors
from ctrlib.serving.model_folder import save_model
from ctrlib.serving.predictor import Predictor
from ctrlib.sharding.plan import tables_of
from ctrlib.structure import describe, unstack
from ctrlib.testing import example_batch, example_schema

SCHEMA = example_schema(num_tasks=2)
DTRN = {"model": "dtrn", "num_experts": 2, "expert_hidden": [8], "tower_hidden": [4]}
CONFIGS: dict[str, dict[str, Any]] = {
    "din": {"model": "din", "hidden": [8]},
    "bst": {"model": "bst", "hidden": [8]},
    "sim": {"model": "sim", "hidden": [8]},
    "dtrn": DTRN,
    "deepfm, mean": {"model": "deepfm", "hidden": [8], "sequence": "mean", "stacked": 1},
    "mlp, tim_shared": {"model": "mlp", "hidden": [8], "sequence": "tim_shared"},
}


def make(name: str, schema: ctr.Schema = SCHEMA) -> tuple[dict[str, Any], ctr.Model]:
    """A model whose rows are large, as if it were trained."""
    torch.manual_seed(0)
    config = {"embedding_dim": 8, **CONFIGS[name]}
    model = build(config, schema).eval()
    with torch.no_grad():
        for part in (model.embedding, model.wide):
            for parameter in part.parameters() if part is not None else ():
                parameter.normal_(0, 0.3)
    return config, model


def low_ranked(model: ctr.Model, schema: ctr.Schema, batches: list[Batch]) -> ctr.Model:
    return apply_low_rank(model, low_rank(model, schema, batches, tables=Goal(rank=4)))


METHODS: dict[str, Callable[[ctr.Model, ctr.Schema, list[Batch]], ctr.Model]] = {
    "float16": lambda model, schema, batches: materialise(model, rounded_rows(model, 16)),
    "int8": lambda model, schema, batches: materialise(model, rounded_rows(model, 8)),
    "int4": lambda model, schema, batches: materialise(model, rounded_rows(model, 4)),
    "int2": lambda model, schema, batches: materialise(model, rounded_rows(model, 2)),
    "frequency_cut": lambda model, schema, batches: materialise(
        model, frequency_cut(model, batches, num_bytes=bytes_of(model).embedding // 3)
    ),
    "transform_coding": lambda model, schema, batches: materialise(
        model, transform_coding(model, batches, num_bytes=int(bytes_of(model).embedding / 1.6))
    ),
    "low_rank": low_ranked,
}


def integers(full: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """What rows are after having been rounded to so many bits, row by row, with numpy alone."""
    rounded = []
    for row in full:
        low = np.float32(np.float16(row.min()))
        scale = np.float32(np.float16((row.max() - low) / np.float32(2**bits - 1)))
        codes = np.clip(np.rint((row - low) / max(scale, np.float32(1e-12))), 0, 2**bits - 1)
        rounded.append(codes.astype(np.float32) * scale + low)
    return np.array(rounded)


def put_back(model: ctr.Model, smaller: ctr.Model, expected: int = 0) -> ctr.Model:
    """The plain model with the rows that the smaller one reads, asked for one id at a time, target by target.

    `expected`: these rows are also what `integers` makes of so many bits.
    """
    plain, smaller = copy.deepcopy(model), copy.deepcopy(smaller)
    unstack(plain)
    unstack(smaller)  # first-order tables that stay
    weights = dict(plain.named_parameters())
    for name, (path, part, config) in tables_of(plain).items():
        features = [feature for _, one, other in tables_of(part).values() for feature in other.feature_names]
        ids = torch.arange(config.num_embeddings)
        lengths = torch.cat([ids.new_full((len(ids),), feature == config.feature_names[0]) for feature in features])
        small = smaller.get_submodule(path)
        found: Any = small(KeyedJaggedTensor(features, ids, lengths=lengths.long(), stride=len(ids)))
        found = found if isinstance(found, dict) else found.to_dict()
        rows = found[config.feature_names[0]]
        rows = rows if isinstance(rows, Tensor) else rows.values()
        if expected:
            of_numpy = integers(weights[name].detach().numpy(), expected)
            np.testing.assert_allclose(rows.detach().numpy(), of_numpy, rtol=0, atol=1e-6)
        with torch.no_grad():
            weights[name].copy_(rows)
    return plain


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_rows_put_back(name: str, method: str) -> None:
    """Target and history read the same rows, once stored, and the plain model with these rows is the same function."""
    config, model = make(name)
    batches = [example_batch(SCHEMA, 100, seed=seed) for seed in range(2)]
    smaller = METHODS[method](model, SCHEMA, batches)
    assert any(isinstance(part, PackedEvents | NarrowEvents) for part in smaller.modules())
    assert not any(type(part) is EmbeddingCollection and len(part.embeddings) for part in _others(smaller))
    plain = put_back(model, smaller, {"int8": 8, "int4": 4, "int2": 2}.get(method, 0))
    batch = example_batch(SCHEMA, 50, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(smaller(batch), plain(batch), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(smaller(batch), model(batch), atol=1e-6)
    before, after = bytes_of(model), bytes_of(smaller)
    assert after.embedding < before.embedding and after.network == before.network
    again = build({**config, "replaced": json.loads(json.dumps(describe(smaller)))}, SCHEMA)
    again.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), smaller(batch))


def _others(smaller: ctr.Model) -> list[Any]:
    """All parts but those of narrow tables, which are collections themselves."""
    narrow = {id(one) for part in smaller.modules() if isinstance(part, NarrowEvents) for one in part.modules()}
    return [part for part in smaller.modules() if id(part) not in narrow]


def test_usage_of_events_is_what_a_loop_over_them_finds() -> None:
    """Reads of target and history in one count, and the mean of p (1 - p) g g^T over single look-ups."""
    schema = example_schema()
    torch.manual_seed(0)
    model = build({"model": "din", "embedding_dim": 3, "hidden": [5]}, schema).eval()
    batch = example_batch(schema, 30)
    found = usage(model, [batch])
    name = "embedding.tables.embeddings.table_item.weight"
    jagged = batch.sparse.to_dict()
    weight = dict(model.named_parameters())[name]
    reads = sum(torch.bincount(jagged[feature].values(), minlength=len(weight)) for feature in ("item", "history"))
    torch.testing.assert_close(found[name].reads, reads.double() / 30)  # type: ignore[union-attr]
    total = torch.zeros(3, 3, dtype=torch.float64)
    for row in range(30):
        events = [int(one) for one in jagged["history"].to_dense()[row]]
        item = int(jagged["item"].values()[row])
        # A table in which each of this row's look-ups has a row of its own, so that their gradients are apart.
        rows = weight[torch.tensor([item, *events])].detach().clone()
        alone: Any = copy.deepcopy(model)
        tables = EmbeddingCollection(tables=[copy.copy(model.embedding.tables.embedding_configs()[0])])  # type: ignore[union-attr, operator]
        tables.embeddings["table_item"].weight = torch.nn.Parameter(rows)
        alone.embedding.tables = tables
        parts, lengths = [], []
        for feature in batch.sparse.keys():  # noqa: SIM118  # no dictionary
            ids = jagged[feature].to_dense()[row]
            places = {"item": torch.tensor([0]), "history": torch.arange(1, len(events) + 1)}
            parts.append(places.get(feature, ids))
            lengths.append(len(parts[-1]))
        sparse = KeyedJaggedTensor(batch.sparse.keys(), torch.cat(parts), lengths=torch.tensor(lengths))
        slice_ = slice(row, row + 1)
        logit = alone(Batch(sparse, batch.dense[slice_], batch.labels[slice_], batch.weights[slice_]))
        gradient = torch.autograd.grad(logit.sum(), tables.embeddings["table_item"].weight)[0].double()
        p = torch.sigmoid(logit.detach()).item()
        total += p * (1 - p) * gradient.T @ gradient
    torch.testing.assert_close(found[name].metric, total / reads.sum(), rtol=1e-4, atol=1e-12)  # type: ignore[union-attr]


def test_row_errors_are_what_a_loop_over_rows_finds() -> None:
    _, model = make("deepfm, mean")  # first-order tables are stacked
    smaller = materialise(model, rounded_rows(model, 4))
    plain, rounded = put_back(model, model), put_back(model, smaller)
    before, after = dict(plain.named_parameters()), dict(rounded.named_parameters())
    errors, squares, total = [], 0.0, 0.0
    for name in tables_of(plain):
        for full, small in list(zip(before[name].tolist(), after[name].tolist()))[1:]:  # not the row that pads
            distance = sum((a - b) ** 2 for a, b in zip(full, small))
            norm = sum(a**2 for a in full)
            errors.append((distance / norm) ** 0.5)
            squares, total = squares + distance, total + norm
    found = row_errors(model, smaller)
    assert len(errors) == 2 * (20 + 30 + 10 - 3)
    assert found.largest == pytest.approx(max(errors), rel=1e-6)
    assert found.overall == pytest.approx((squares / total) ** 0.5, rel=1e-6)
    assert row_errors(model, model) == (0, 0)
    assert 0.01 < found.overall < found.largest < 1


def test_sums_of_as_many_ids_as_rows_are_sums() -> None:
    """Two bags of none and of two ids are not two single ids."""
    tables = PackedTables([PackedTable("tags", ("tags",), embedding_dim=2, rows=4)])
    tables.fill("tags", torch.tensor([[0.0, 0.0], [1.0, 2.0], [10.0, 20.0], [5.0, 5.0]]))
    ids = KeyedJaggedTensor.from_lengths_sync(["tags"], torch.tensor([1, 2]), torch.tensor([0, 2]))
    assert tables(ids).values().tolist() == [[0.0, 0.0], [11.0, 22.0]]


@pytest.mark.parametrize("bits", [16, 8])
def test_rows_that_float16_does_not_hold_are_refused(bits: Any) -> None:
    """They would be infinite, or NaN when they are read."""
    _, model = make("din")
    table = model.embedding.tables.embeddings["table_item"].weight  # type: ignore[union-attr, index]
    for value in (65_504.0, -65_504.0):
        with torch.no_grad():
            table[5, 2] = value
        assert all(torch.isfinite(rows).all() for rows in rounded_rows(model, bits).weights.values())
    with torch.no_grad():
        table[5, 2] = 65_600.0
    with pytest.raises(ArgumentError, match=r"table 'table_item' has numbers of up to 65,600, .* ends at 65,504"):
        rounded_rows(model, bits)


def test_narrow_events_say_what_does_not_fit() -> None:
    table = NarrowTable("item", ("item", "clicks"), rows=9, rank=2)
    for tables, said in (
        ([], "one or more tables"),
        ([table, table], "different names"),
        ([NarrowTable("item", ("item",), rows=9, rank=5)], "beyond embedding_dim=4"),
        ([NarrowTable("item", ("item",), rows=9, rank=2, kept="first", num_kept=4)], "lack rows"),
        ([NarrowTable("item", ("item",), rows=9, rank=2, centred=False, padded=True)], "padded"),
    ):
        with pytest.raises(ArgumentError, match=said):
            NarrowEvents(tables, embedding_dim=4)
    made = NarrowEvents([table], embedding_dim=4)
    full, mean, decoder = torch.randn(9, 4), torch.zeros(4), torch.eye(4)[:2]
    with pytest.raises(ArgumentError, match="no table 'user'"):
        made.fill("user", full, mean=mean, decoder=decoder)
    with pytest.raises(ArgumentError, match=r"mean has shape None, expected \(4,\)"):
        made.fill("item", full, decoder=decoder)
    made.fill("item", full, mean=mean, decoder=decoder)
    torch.testing.assert_close(made.tables.embeddings["table_item"].weight, full[:, :2])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A prepared folder with a history, and the folder of a DIN."""
    folder = tmp_path_factory.mktemp("events")
    frame, _ = generate(Teacher(num_rows=3000, cardinalities=(900, 300), num_numeric=1, max_history=5, seed=5))
    features = [ctr.Categorical("C1"), ctr.Categorical("C2"), ctr.Numeric("I1")]
    features += [ctr.Sequence("history", vocabulary="C1")]  # type: ignore[list-item]
    splits = {"train": frame[:2000], "valid": frame[2000:2500], "test": frame[2500:]}
    ctr.prepare(splits, folder / "data", features=features, labels="label", log=None)
    config, model = make("din", ctr.Schema.load(folder / "data"))
    save_model(model, config, folder / "data", folder / "model")
    return folder / "data", folder / "model"


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_small_and_read_again_to_the_bit(
    trained: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    data, folder = trained
    predictor = Predictor.load(folder)
    model: Any = predictor.model
    batches = list(ctr.Loader(data, "train", batch_size=1000))
    smaller = METHODS[method](model, predictor.schema, batches)
    config = {**json.loads((folder / "model.json").read_text()), "replaced": describe(smaller)}
    save_model(smaller, config, data, tmp_path / "small")
    again = Predictor.load(tmp_path / "small")
    batch = next(iter(ctr.Loader(data, "test", batch_size=500)))
    with torch.no_grad():
        assert torch.equal(again.model(batch), smaller(batch))
    sizes = [(one / "model.safetensors").stat().st_size for one in (folder, tmp_path / "small")]
    saved = bytes_of(model).total - bytes_of(smaller).total
    # Names and shapes of other tensors take other places in the file's head; what is not saved is where tables begin.
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=1500)
    rows = sum(table.num_embeddings for _, _, table in tables_of(model).values())
    taken = {"float16": 16, "int8": 12, "int4": 8, "int2": 6, "low_rank": 16}
    if method in taken:
        assert bytes_of(smaller).weights == taken[method] * rows


def test_the_command_takes_such_a_model(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = trained
    command = ["compress", str(folder), str(data), "--out", str(tmp_path / "small"), "--ratio", "1.9"]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ratio"] >= 1.9
    methods = {one["method"]: one["row_error"] for one in result["tried"]}
    assert {"uncompressed", "low_rank", "float16", "int8", "int4", "int2", "transform_coding"} <= set(methods)
    assert 0 == methods["uncompressed"] < methods["float16"] < methods["int8"] < methods["int4"] < methods["int2"]
    assert methods["float16"] < 1e-3 < methods["int4"]
    assert result["row_error"] == result["tried"][-1]["row_error"] > 0
    again: Any = Predictor.load(tmp_path / "small")
    assert again.evaluate_prepared(data, "test")["auc"] == pytest.approx(result["test_auc_after"], abs=1e-12)
    found = row_errors(Predictor.load(folder).model, again.model)  # type: ignore[arg-type]
    assert found.largest == pytest.approx(result["row_error"], rel=1e-6)
    assert cli.main([*command, "--overwrite"]) == 0
    assert "row error" in capsys.readouterr().out
