"""Exports of compressed models: what is small in the model folder is small in the file, and gives the same logits."""

from __future__ import annotations

import contextlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ctrlib as ctr
from ctrlib.cli import main
from ctrlib.embeddings.packed import PackedTable, PackedTables, RoundedRows
from ctrlib.export.folder import Exported, parity
from ctrlib.export.formats import FORMATS
from ctrlib.export.onnx import quantise, strip, to_onnx
from ctrlib.export.program import Program, quiet
from ctrlib.models import build
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import transform_coding
from ctrlib.search.floors import frequency_cut, rounded_rows
from ctrlib.search.mimicking import apply_low_rank, low_rank
from ctrlib.search.plan import materialise
from ctrlib.search.ranks import Goal
from ctrlib.serving.direct import direct
from ctrlib.testing import example_batch

ROWS = 4003
SCHEMA = ctr.Schema(
    (
        ctr.Categorical("user", num_embeddings=1000),
        ctr.Numeric("price", parameters={}),
        ctr.Categorical("item", num_embeddings=ROWS),
        ctr.MultiValued("genres", num_embeddings=10, pooling="sum"),
        ctr.Sequence("history", vocabulary="item", num_embeddings=ROWS),
    ),
    ("click",),
)
METHODS = ["float16", "int8", "int4", "int2", "frequency_cut", "transform_coding", "low_rank"]


def compressed(config: dict[str, Any], method: str) -> ctr.Model:
    """A model with large rows, made smaller."""
    torch.manual_seed(0)
    model = build({"embedding_dim": 16, "hidden": [8], **config}, SCHEMA).eval()
    with torch.no_grad():
        for part in (model.embedding, model.wide):
            for parameter in part.parameters() if part is not None else ():
                parameter.normal_(0, 0.1)
    batches = [example_batch(SCHEMA, 500)]
    size = bytes_of(model).embedding
    if method == "low_rank":
        return apply_low_rank(model, low_rank(model, SCHEMA, batches, tables=Goal(rank=4)))
    if method == "transform_coding":
        return materialise(model, transform_coding(model, batches, num_bytes=size // 11))  # several bytes a row
    if method == "frequency_cut":
        return materialise(model, frequency_cut(model, batches, num_bytes=size // 40))
    return materialise(model, rounded_rows(model, {"float16": 16, "int8": 8, "int4": 4, "int2": 2}[method]))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["int4"])  # half a minute each; all are in tests/benchmarks/export.py --small
def test_files_are_small_and_give_the_models_logits(tmp_path: Path, method: str) -> None:
    """No table is in the file with a float for each of its numbers, and matrices in 8 bits leave rows as they are.

    Of a DeepFM with attention: events one by one, single ids, a bag, and first-order weights.
    """
    onnx = pytest.importorskip("onnx")
    model = compressed({"model": "deepfm", "sequence": "din"}, method)
    program, tables = Program(model, SCHEMA), bytes_of(model).embedding
    exported, names = program.export(), program.signature.names
    with quiet():
        torch.export.save(exported, tmp_path / "model.pt2")
    to_onnx(exported, tmp_path / "whole.onnx", names)
    with quiet():
        quantise(tmp_path / "whole.onnx", tmp_path / "rounded.onnx")
    strip(tmp_path / "whole.onnx", tmp_path / "model.onnx")
    strip(tmp_path / "rounded.onnx", tmp_path / "int8.onnx")
    for file, to, nearest in (("model.onnx", "onnx", 1e-6), ("int8.onnx", "ort-int8", 0.2), ("model.pt2", "pt2", 1e-7)):
        found = parity(program, FORMATS[to].read(tmp_path / file, names))
        assert found["relative"] <= nearest, file
        with zipfile.ZipFile(tmp_path / file) if to == "pt2" else contextlib.nullcontext() as archive:
            graph_size = (
                sum(one.file_size for one in archive.infolist() if one.filename[-5:] == ".json") if archive else 0
            )
        size = (tmp_path / file).stat().st_size - graph_size
        assert tables - 500 < size < tables + 120_000, (file, size - tables)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not {"Loop", "If", "Scan"} & {node.op_type for node in graph.node}
    assert b".py" not in (tmp_path / "model.onnx").read_bytes()  # where the code lay that it was made of
    floats = {one.name: math.prod(one.dims) for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
    # First-order weights and narrow rows are floats.
    assert max(floats.values()) <= (4 * ROWS if method == "low_rank" else 6000), floats
    rounded = [one.name for one in onnx.load(tmp_path / "int8.onnx").graph.initializer if "_quantized" in one.name]
    linear = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    assert 0 < len(rounded) <= len(linear), rounded  # and no axes or decoders of rows


@pytest.mark.parametrize("method", METHODS)
def test_scores_of_the_predictor_are_the_models(method: str) -> None:
    """Read without TorchRec's collections: single ids, sums, a history that is pooled, first-order weights; one row."""
    model = compressed({"model": "deepfm"}, method)
    program = Program(model, SCHEMA)
    for size in (1, 7):
        batch = example_batch(SCHEMA, size, seed=size)
        jagged = batch.sparse.to_dict()
        arrays = {
            "ids": torch.stack([jagged["user"].values(), jagged["item"].values()], 1).numpy(),
            "numbers": batch.dense.numpy(),
        }
        for bag in ("genres", "history"):
            arrays |= {bag: jagged[bag].values().numpy(), f"{bag}.offsets": jagged[bag].offsets().numpy()}
        with torch.no_grad():
            np.testing.assert_allclose(program.run(arrays), model(batch).numpy(), rtol=1e-5, atol=1e-6)
    if method != "low_rank":
        quick = direct(model, SCHEMA)
        assert not any(type(part) is PackedTables for part in quick.modules())


@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_apart_change_nothing(bits: Any, width: int) -> None:
    """Rows of odd widths too, and a single one of them."""
    torch.manual_seed(0)
    tables = PackedTables([PackedTable("item", ("item",), embedding_dim=width, rows=9, rowwise=bits)])
    tables.fill("item", torch.randn(9, width))
    (group,) = tables.parts()
    assert isinstance(group, RoundedRows)
    every, one, none = torch.arange(9)[None], torch.tensor([[4]]), torch.empty(1, 0, dtype=torch.int64)
    expected = [group.look_up(ids, [0]) for ids in (every, one, none)]
    stored = group.rows.numel()
    group.split()
    assert group.ends is not None and group.rows.numel() + 2 * group.ends.numel() == stored
    for ids, before in zip((every, one, none), expected):
        assert torch.equal(group.look_up(ids, [0]), before)
    torch.testing.assert_close(expected[1][0, 0], expected[0][0, 4])
    assert expected[2].shape == (1, 0, width)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder, and the folder of a DIN that `ctrlib compress` has made smaller."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    items = [f"i{item}" for item in range(300)]
    frame = pl.DataFrame(
        {
            "click": random.integers(0, 2, 2000),
            "user": random.integers(0, 9, 2000),
            "item": random.choice(items, 2000),
            "history": ["|".join(random.choice(items, random.integers(0, 5))) for _ in range(2000)],
        }
    )
    ctr.prepare(frame, folder / "data", features=[ctr.Sequence("history", vocabulary="item")], labels="click", log=None)
    torch.manual_seed(0)
    config = {"model": "din", "embedding_dim": 16, "hidden": [8]}
    model = build(config, ctr.Schema.load(folder / "data"))
    with torch.no_grad():
        for parameter in model.embedding.parameters():
            parameter.normal_(0, 0.3)
    ctr.save_model(model, config, folder / "data", folder / "model")
    command = ["compress", str(folder / "model"), str(folder / "data"), "--out", str(folder / "small"), "--epochs", "0"]
    assert main([*command, "--ratio", "2.5"]) == 0
    return folder


def test_a_compressed_folder_is_exported_and_scores_raw_rows(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((folder / "small/compression.json").read_text())
    assert 0 < result["row_error"] < 1
    assert main(["export", str(folder / "small"), "--to", "onnx", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"largest relative error of a row, by compression: {result['row_error']:.1e}" in said
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["row_error"] == result["row_error"] and about["parity"]["relative"] <= 1e-6
    rows = [{"user": 3, "item": "i4", "history": "i1|i2"}, {"user": None, "item": "?", "history": ""}]
    predictor = ctr.Predictor.load(folder / "small")
    expected = [predictor.predict([row])[0]["click"][0] for row in rows]
    np.testing.assert_allclose(Exported(tmp_path / "out").predict(rows)[:, 0], expected, rtol=0, atol=1e-6)
    ranked = predictor.rank({"user": 3, "history": "i1|i2"}, [{"item": f"i{one}"} for one in range(20)], 5)
    assert len(ranked) == 5
