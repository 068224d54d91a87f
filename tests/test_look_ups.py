"""Every way to look ids up goes with every tower, from a config of plain data, and back through a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib import models
from ctrlib.embeddings.table import look_up
from ctrlib.manifest import write_manifest
from ctrlib.serving.model_folder import save_model
from ctrlib.serving.predictor import Predictor
from ctrlib.testing import example_batch, example_schema

TABLES: list[dict[str, Any]] = [
    {"kind": "unified", "num_embeddings": 12, "width": 4},
    {"kind": "unified", "num_embeddings": {"user": 5, "item": 8, "genres": 4}},
    {"kind": "unified", "num_embeddings": 20, "width": 4, "block": 2},
    {"kind": "quotient_remainder", "num_embeddings": 30},
    {"kind": "hash_embedding", "num_embeddings": 9, "num_weights": 8},
    {"kind": "memcom", "num_embeddings": 9},
    {"kind": "mixed_dimension", "dimensions": {"user": 8, "item": 4, "genres": 4}},
]
# What these towers must be told of a schema.
ARGUMENTS: dict[str, dict[str, Any]] = {"autoint": {"head_dim": 4}, "autoint_plus": {"head_dim": 4}}


@pytest.mark.parametrize("tables", TABLES, ids=lambda tables: f"{tables['kind']}-{len(tables)}")
def test_every_tower_learns_on_every_look_up(tables: dict[str, Any]) -> None:
    schema = example_schema(num_tasks=2)
    batch = example_batch(schema, 64)
    with pytest.raises(ValueError, match="are for sequence='pooled', got 'tim'"):
        models.build({"model": "dtrn", "embedding_dim": 8, "tables": tables}, schema)
    of_histories = {name for name, model in models.MODELS.items() if model.kind == "sequence"} | {"dtrn"}
    for name in sorted(models.MODELS.keys() - of_histories):  # whose events need a row for each id
        torch.manual_seed(0)
        config = {
            "model": name,
            "embedding_dim": 8,
            "tables": json.loads(json.dumps(tables)),
            **ARGUMENTS.get(name, {}),
        }
        model = models.build(config, schema)
        engine = ctr.ExactEngine(model, learning_rate=0.003)
        model.train()
        losses = [engine.step(batch).item()]
        while losses[-1] >= losses[0] and len(losses) < 12:
            losses.append(engine.step(batch).item())
        assert losses[-1] < losses[0], (name, losses)
        stored = [
            n for n, p in model.named_parameters() if "tables" in n and p.grad is not None and p.grad.abs().sum() > 0
        ]
        assert stored, name


def test_a_saved_model_looks_up_alike(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2, 3, 4] * 5, "b": ["x", "y"] * 10, "label": [0, 1] * 10})
    splits = {"train": frame, "valid": frame, "test": frame}
    features = [ctr.Categorical("a"), ctr.Categorical("b")]
    ctr.prepare(splits, tmp_path / "data", features=features, labels="label", log=None)
    schema = ctr.Schema.load(tmp_path / "data")
    config = {"model": "mlp", "embedding_dim": 4, "hidden": [4], "tables": {"kind": "unified", "num_embeddings": 6}}
    model = models.build(config, schema).eval()
    save_model(model, config, tmp_path / "data", tmp_path / "model")
    batch = next(iter(ctr.Loader(tmp_path / "data", "test", batch_size=20)))
    assert torch.equal(Predictor.load(tmp_path / "model").model(batch), model(batch))
    # Another number of rows is refused by name, and so is another seed of the hashes.
    changed = {**config, "tables": {"kind": "unified", "num_embeddings": 7}}
    (tmp_path / "model" / "model.json").write_text(json.dumps(changed))
    write_manifest(tmp_path / "model")
    with pytest.raises(ctr.SchemaError, match="does not fit"):
        Predictor.load(tmp_path / "model")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"tables": {"kind": "magic"}}, 'unknown "kind" .magic.; the closest are memcom'),
        ({"tables": {"kind": "unified", "rows": 9}}, "takes no \\['rows'\\]; the closest are "),
        ({"tables": {"kind": "memcom", "num_embeddings": 9}, "sequence": "din"}, "sequence='pooled'"),
    ],
)
def test_wrong_look_ups(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        models.build({"model": "mlp", "embedding_dim": 8, **arguments}, example_schema())


@pytest.mark.parametrize("single", [True, False], ids=["single ids", "and bags"])
@pytest.mark.parametrize("width", [1, 10, 16])  # numbers are added one by one, and rows of 16 as rows
@pytest.mark.parametrize("size", [300, 1, 0])  # TorchRec itself fails at none
def test_rows_and_their_gradients_are_those_of_torchrec(width: int, single: bool, size: int) -> None:
    """Features that share a table, bags beside single ids, and an order that is not the batch's."""
    pair = EmbeddingBagConfig(
        name="pair", embedding_dim=width, num_embeddings=7, feature_names=["a", "b"], pooling=PoolingType.MEAN
    )
    other = EmbeddingBagConfig(name="other", embedding_dim=width, num_embeddings=40, feature_names=["c"])
    tables = EmbeddingBagCollection(tables=[pair, other])
    generator = torch.Generator().manual_seed(0)
    lengths = torch.ones(3 * size, dtype=torch.int64)
    if not single:
        lengths[size : 2 * size] = torch.randint(0, 4, (size,), generator=generator)  # those of b
    ids = torch.randint(0, 7, (int(lengths.sum()),), generator=generator)
    sparse = KeyedJaggedTensor(["a", "b", "c"], ids, lengths=lengths, stride=size)
    direction = torch.randn(size, 3, width, generator=generator)

    def run(names: list[str]) -> list[torch.Tensor]:
        for weight in tables.parameters():
            weight.grad = None
        fields = look_up(tables, sparse, names)
        torch.autograd.backward((fields * direction).sum())
        return [fields.detach(), *(weight.grad.clone() for weight in tables.parameters() if weight.grad is not None)]

    for names in (["a", "b", "c"], ["c", "a", "b"]):
        ours = run(names)
        assert ours[0].shape == (size, 3, width) and len(ours) == 3
        if not size:
            assert not any(gradient.any() for gradient in ours[1:])
            continue
        hook = tables.register_forward_hook(lambda *_: None)  # somebody waits for what TorchRec is asked
        theirs = run(names)
        hook.remove()
        assert len(theirs) == 3
        for mine, torchrecs in zip(ours, theirs):
            torch.testing.assert_close(mine, torchrecs)
