"""Exports: what is written gives the trained model's logits, and its reader the encoder's ids, with numpy alone."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from test_models import SCHEMA, make
from torch import nn

import ctrlib as ctr
from ctrlib.cli import main
from ctrlib.data.encoder import Encoder
from ctrlib.data.quick import MISSING_RAW_ID
from ctrlib.errors import ArgumentError, UnsupportedError
from ctrlib.export.folder import Exported, export_model
from ctrlib.export.onnx import DECOMPOSED, aten, row_of_each
from ctrlib.export.program import Program, Signature
from ctrlib.export.reader import Reader
from ctrlib.schema import MISSING_RAW_ID as OF_SCHEMA
from ctrlib.testing import example_batch, example_schema

# Towers, heads and ways to read histories that torch.export treats in ways of their own; all of them are in
# tests/benchmarks/export.py.
MODELS = ["mlp", "deepfm", "fibinet", "mmoe", "dtrn", "din", "bst", "sim"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DIN of rows with ids, a bag, a history and numbers, among them cells that are missing or written oddly."""
    folder = tmp_path_factory.mktemp("export")
    random = np.random.default_rng(0)
    rows = 400
    items = [f"i{item}" for item in range(12)]
    frame = pl.DataFrame(
        {
            "click": random.integers(0, 2, rows),
            "user": random.integers(0, 9, rows),
            "item": random.choice(items, rows),
            "tags": ["|".join(random.choice(["a", "b", "c"], random.integers(0, 4))) for _ in range(rows)],
            "history": ["|".join(random.choice(items, random.integers(0, 5))) for _ in range(rows)],
            "price": [None if place % 7 == 0 else float(place % 50) for place in range(rows)],
            "age": random.integers(10, 60, rows),
        }
    )
    features = [
        ctr.MultiValued("tags"),
        ctr.Sequence("history", vocabulary="item"),
        ctr.Numeric("price", transform="log"),
        ctr.Numeric("age"),
    ]
    ctr.prepare(frame, folder / "data", features=features, labels="click", log=None)
    torch.manual_seed(0)
    config = {"model": "din", "embedding_dim": 4, "hidden": [8]}
    model = ctr.models.build(config, ctr.Schema.load(folder / "data"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    ctr.save_model(model, config, folder / "data", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def exported(model_folder: Path) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """The folder of an export in a format, each made once, and what `export_model` returned."""

    @functools.cache
    def made(to: str) -> tuple[Path, dict[str, Any]]:
        out = model_folder.parent / to
        return out, export_model(model_folder, out, to=to)

    return made


@pytest.fixture(scope="module")
def exported_folder(exported: Callable[[str], tuple[Path, dict[str, Any]]]) -> Path:
    """It as a .pt2."""
    return exported("pt2")[0]


ROWS: list[dict[str, Any]] = [
    {"user": 3, "item": "i4", "tags": "a|c", "history": "i1|i2", "price": 7.5, "age": 30},
    {"user": 5, "item": " i5 ", "tags": "", "history": "", "price": "12", "age": "41"},
    {"user": None, "item": "never seen", "tags": ["b", "zzz"], "history": ["i3", None, "i9"], "price": None, "age": 1},
    {"user": 7.0, "item": "", "tags": None, "history": '["i3", "i4"]', "price": "", "age": "44"},
    {"user": 99, "item": "i0", "tags": "a| |b", "history": "i1||i2", "price": -3, "age": "1e1", "other": object()},
]


def test_reader_gives_the_encoders_ids(model_folder: Path, exported_folder: Path) -> None:
    encoder = Encoder.load(model_folder)
    known = [{name: cell for name, cell in row.items() if name != "other"} for row in ROWS]
    whole = [known[0], {**known[0], "item": "unheard of", "tags": "", "history": "", "price": None}]
    for rows in (whole, *([row] for row in known)):
        expected = Signature(encoder.schema).arrays(encoder.transform(rows)[0])
        got = Reader(exported_folder).arrays(rows)
        assert got.keys() == expected.keys()
        for name, array in expected.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert MISSING_RAW_ID == OF_SCHEMA


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": 3.5}, "row 2, column 'user' holds 3.5 "),
        ({"price": "cheap"}, "row 2, column 'price' holds 'cheap' "),
        ({"history": [["i1"]]}, "row 2, column 'history' holds "),
        ({"age": None, "price": object()}, "row 2, column 'price' holds "),
    ],
)
def test_reader_names_the_cell(exported_folder: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reader(exported_folder).arrays([ROWS[0], {**ROWS[0], **change}])
    with pytest.raises(ValueError, match="row 1 has no column 'user'"):
        Reader(exported_folder).arrays([{"item": "i1"}])


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_an_export_scores_as_the_model_does(
    model_folder: Path, exported: Callable[[str], tuple[Path, dict[str, Any]]], to: str
) -> None:
    out, found = exported(to)
    assert found["parity"]["relative"] <= (0 if to == "pt2" else 1e-6)
    assert found["bytes"] == (out / found["file"]).stat().st_size
    known = [{name: cell for name, cell in row.items() if name != "other"} for row in ROWS]
    predictor = ctr.Predictor.load(model_folder)
    expected = [predictor.predict([row])[0]["click"][0] for row in known]
    read = Exported(out, trust=to == "pt2")
    np.testing.assert_allclose(read.predict(ROWS)[:, 0], expected, rtol=0, atol=1e-6)
    for place, row in enumerate(ROWS):  # alone
        np.testing.assert_allclose(read.predict([row])[0, 0], expected[place], rtol=0, atol=1e-6)


def test_onnx_is_read_where_nothing_of_ctrlib_is(
    model_folder: Path, exported: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    """In another process, from the folder alone; no table is read by a loop, and the logits come out, not their
    sigmoid."""
    shutil.copytree(exported("onnx")[0], tmp_path / "out")
    program = """
        import json, sys
        sys.path.insert(0, "out")
        import numpy, onnxruntime
        from reader import Reader
        rows = json.load(open("rows.json"))
        reader = Reader("out")
        logits = onnxruntime.InferenceSession("out/model.onnx").run(None, reader.arrays(rows))[0]
        assert not {"ctrlib", "torch", "polars", "pyarrow"} & set(sys.modules)
        print(json.dumps(logits.tolist()))
    """
    rows = [{name: cell for name, cell in row.items() if name != "other"} for row in ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", textwrap.dedent(program)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": ""})
    assert answer.returncode == 0, answer.stderr
    probabilities = Reader.probabilities(np.array(json.loads(answer.stdout)))[:, 0]
    predictor = ctr.Predictor.load(model_folder)
    expected = [predictor.predict([row])[0]["click"][0] for row in rows]
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)
    onnx = pytest.importorskip("onnx")
    assert "Loop" not in {node.op_type for node in onnx.load(tmp_path / "out/model.onnx").graph.node}


@pytest.mark.parametrize("name", MODELS)
def test_a_program_is_the_model(name: str) -> None:
    """Rows of any number, also one that it was not recorded with."""
    torch.manual_seed(0)
    model = make(name).eval()
    program = Program(model, SCHEMA)
    batch = example_batch(SCHEMA, 6)
    ids = batch.sparse.to_dict()
    arrays = {
        "ids": torch.stack([ids["user"].values(), ids["item"].values()], 1).numpy(),
        "numbers": batch.dense.numpy(),
    }
    for bag in ("genres", "history"):
        arrays |= {bag: ids[bag].values().numpy(), f"{bag}.offsets": ids[bag].offsets().numpy()}
    with torch.no_grad():  # sums over fields may be taken in another order
        np.testing.assert_allclose(program.run(arrays), model(batch).numpy(), rtol=1e-6, atol=1e-8)
    module = program.export().module()
    program.one_more = False
    for size in (1, 3, 40):
        arrays = program.signature.examples(size, seed=size)
        got = module(*(torch.from_numpy(arrays[name]) for name in program.signature.names)).detach().numpy()
        np.testing.assert_allclose(got, program.run(arrays), rtol=0, atol=1e-7)


def test_a_program_shares_nothing_with_the_model() -> None:
    schema = example_schema()
    model = ctr.models.mlp(ctr.Inputs(schema, embedding_dim=4), hidden=(8,))
    program = Program(model, schema)
    arrays = program.signature.examples(3)
    before = program.run(arrays).copy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    np.testing.assert_array_equal(program.run(arrays), before)
    assert model.training  # and is left as it was


def test_row_of_each_with_empty_rows() -> None:
    offsets = torch.tensor([0, 0, 3, 3, 4, 4])
    assert row_of_each(offsets, 4).tolist() == [1, 1, 1, 3]


def test_operations_that_onnx_lacks_are_written_in_others() -> None:
    """To the bit, with empty bags and bags of one id."""
    torch.manual_seed(0)
    weight, ids, offsets = torch.randn(9, 4), torch.tensor([1, 8, 3, 3, 0]), torch.tensor([0, 0, 3, 4, 4, 5])
    bag, repeat = DECOMPOSED[aten.embedding_bag.padding_idx], DECOMPOSED[aten.repeat_interleave.self_Tensor]
    for mode, number in (("sum", 0), ("mean", 1)):
        expected = nn.functional.embedding_bag(ids, weight, offsets, mode=mode, include_last_offset=True)
        torch.testing.assert_close(bag(weight, ids, offsets, mode=number, include_last_offset=True)[0], expected)
        expected = nn.functional.embedding_bag(ids, weight, offsets[:-1], mode=mode)
        torch.testing.assert_close(bag(weight, ids, offsets[:-1], mode=number)[0], expected)
    counts = offsets.diff()
    assert torch.equal(repeat(weight[:5], counts, 0, output_size=5), weight[:5].repeat_interleave(counts, 0))
    scores = torch.tensor([2.0, 1.0, 2.5, 3.0, 1.5])  # of equal ones torch's topk takes any, ONNX's the first
    for descending in (True, False):
        expected = scores.argsort(stable=True, descending=descending)
        assert torch.equal(DECOMPOSED[aten.argsort.stable](scores, descending=descending), expected)
    values = torch.randn(5, 4)
    padded = DECOMPOSED[torch.ops.fbgemm.jagged_to_padded_dense.default]
    expected = torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [4], 0.0)
    assert torch.equal(padded(values, [offsets], [4]), expected)
    cumsum = torch.ops.fbgemm.asynchronous_complete_cumsum
    assert torch.equal(DECOMPOSED[cumsum.default](counts), cumsum(counts))
    assert torch.equal(DECOMPOSED[aten.remainder.Scalar](torch.tensor([-1, 0, 7]), 5), torch.tensor([4, 0, 2]))


def test_code_is_run_only_where_it_is_trusted(exported_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(exported_folder, tmp_path / "out")
    path = tmp_path / "out/export.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "format": "aoti"}))
    with pytest.raises(ctr.SchemaError, match=r"export\.json"):  # the manifest tells
        Exported(tmp_path / "out")
    ctr.manifest.write_manifest(tmp_path / "out", "export")
    with pytest.raises(UnsupportedError, match=r"machine instructions .*trust=True"):
        Exported(tmp_path / "out")
    with pytest.raises(UnsupportedError, match=r"a program of torch's .*model\.pt2.*trust=True"):
        Exported(exported_folder)
    Exported(exported_folder, trust=True)


def test_what_is_no_export_is_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"no export\.json"):
        Exported(model_folder)
    with pytest.raises(ArgumentError, match="unknown format 'tflite', expected one of pt2, aoti, onnx, ort-int8"):
        export_model(model_folder, tmp_path / "out", to="tflite")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="nothing of another kind is replaced"):
        export_model(model_folder, tmp_path / "notes", to="pt2", overwrite=True)


def test_command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["export", str(model_folder), "--to", "pt2", "--out", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parity"]["largest"] == 0 and found["format"] == "pt2" and found["output"]["labels"] == ["click"]
    assert main(["export", str(model_folder), "--to", "pt2", "--out", out]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["export", str(model_folder), "--to", "pt2", "--out", out, "--overwrite"]) == 0
    assert "largest difference" in capsys.readouterr().out
