"""A folder of somebody else's executes nothing and reads nothing beside it: whatever it holds is refused by name.

What is planted is harmless. A pickle would only touch a file in the test's own folder, which must not appear.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ctrlib as ctr
from ctrlib import cli
from ctrlib.errors import ArgumentError, CtrlibError, UnsupportedError
from ctrlib.export.folder import Exported, export_model
from ctrlib.manifest import inside, refuse_pickle, seal, write_manifest
from ctrlib.retrieval.folder import load as load_retrieval
from ctrlib.search.plan import Plan
from ctrlib.training.checkpoint import CheckpointError
from ctrlib.training.finished import clean_up, finish, finished

CONFIG: dict[str, Any] = {"model": "mlp", "embedding_dim": 4, "hidden": [8]}
ROW = {"item": "i1", "price": 2.0}


class Touch:
    """Pickled, it touches a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def read_model(folder: Path) -> Any:
    return ctr.Predictor.load(folder).predict(ROW)


def read_classifier(folder: Path) -> Any:
    return ctr.CTRClassifier.load(folder)


def read_encoder(folder: Path) -> Any:
    return ctr.Encoder.load(folder).transform(ROW)


def read_checkpoint(folder: Path) -> Any:
    with ctr.Checkpoints(folder) as checkpoints:
        return checkpoints.load({"table": torch.zeros(4, 2)}, name="step-000000001")


READ: dict[str, Callable[[Path], Any]] = {
    "model": read_model,
    "classifier": read_classifier,
    "encoder": read_encoder,
    "onnx": Exported,
    "retrieval": load_retrieval,
    "checkpoint": read_checkpoint,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound folder of each kind."""
    home = tmp_path_factory.mktemp("sound")
    random = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "click": random.integers(0, 2, 200),
            "item": [f"i{n}" for n in random.integers(0, 9, 200)],
            "price": random.random(200),
        }
    )
    ctr.prepare(frame, home / "data", features=[ctr.Numeric("price")], labels="click", log=None)
    model = ctr.models.build(CONFIG, ctr.Schema.load(home / "data"))
    ctr.save_model(model, CONFIG, home / "data", home / "model")
    export_model(home / "model", home / "onnx", to="onnx")
    ctr.Encoder.load(home / "data").save(home / "encoder")
    fitted = ctr.CTRClassifier("mlp", max_epochs=1, config={"hidden": [8]})
    fitted.fit(frame.drop("click"), frame["click"]).save(home / "classifier")
    frame.select(user=pl.col("item"), item=pl.lit("a")).unique().write_csv(home / "log.csv")
    words = ["retrieve", "train", home / "log.csv", "--method", "popularity", "--valid-share", "0"]
    assert cli.main([*map(str, words), "--out", str(home / "retrieval")]) == 0
    with ctr.Checkpoints(home / "checkpoint") as checkpoints:
        checkpoints.save(1, {"table": torch.ones(4, 2)}, {"epoch": 1})
    return home


@pytest.fixture
def folder_of(sources: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(kind: str) -> Path:
        shutil.copytree(sources / kind, tmp_path / kind)
        return tmp_path / kind

    return copy


def resealed(folder: Path) -> None:
    """Checksums as whoever plants something would write them."""
    if (folder / "MANIFEST").exists():
        said = json.loads((folder / "MANIFEST").read_bytes().partition(b"\n")[2])
        write_manifest(folder, said["kind"])


def with_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    said = json.loads((folder / "MANIFEST").read_bytes().partition(b"\n")[2])
    change(said)
    (folder / "MANIFEST").write_bytes(seal(said)[1])


@pytest.mark.parametrize("kind", READ)
def test_sound_folders_are_read(kind: str, folder_of: Callable[[str], Path]) -> None:
    assert READ[kind](folder_of(kind)) is not None


# Pickles.

PICKLED = [
    *(("model", name) for name in ("model.safetensors", "model.json", "vocab/item.parquet")),
    *(("classifier", name) for name in ("model.safetensors", "model.json")),
    *(("encoder", name) for name in ("vocab/item.parquet", "numbers/price.parquet")),
    ("onnx", "model.onnx"),
    *(("retrieval", name) for name in ("method.safetensors", "pairs.safetensors")),
]


@pytest.mark.parametrize("how", ["pickle", "torch.save", "joblib"])
@pytest.mark.parametrize(("kind", "name"), PICKLED)
def test_a_pickle_is_refused_by_name_and_not_opened(
    kind: str, name: str, how: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, marker = folder_of(kind), tmp_path / "marker"
    content = io.BytesIO()
    if how == "torch.save":
        torch.save({"weight": Touch(marker)}, content)
    elif how == "pickle":
        pickle.dump({"weight": Touch(marker)}, content)
    else:
        content.write(pickle.dumps([Touch(marker)], protocol=2))
    (folder / name).write_bytes(content.getvalue())
    resealed(folder)
    with pytest.raises(ctr.SchemaError, match="is a pickle") as caught:
        READ[kind](folder)
    assert str(folder.name) in str(caught.value) and Path(name).name in str(caught.value)
    assert not marker.exists()
    if how == "pickle":
        pickle.loads(content.getvalue())
        assert marker.exists()  # it would have been seen


@pytest.mark.parametrize("name", ["schema.json", "encoder.json", "export.json", "retrieval.json"])
def test_a_pickle_in_the_place_of_json_is_no_json(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    kind = {"schema.json": "model", "retrieval.json": "retrieval"}.get(name, "onnx")
    folder, marker = folder_of(kind), tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    resealed(folder)
    with pytest.raises(ctr.SchemaError, match=name.replace(".", r"\.")):
        READ[kind](folder)
    assert not marker.exists()


def test_pickles_beside_are_nothing_to_anybody(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for kind, read in READ.items():
        folder = folder_of(kind)
        for name in ("model.pkl", "pytorch_model.bin", "optimizer.pt", ".metadata", "sitecustomize.py"):
            (folder / name).write_bytes(pickle.dumps(Touch(marker)))
        assert read(folder) is not None
    assert not marker.exists()


def test_a_plan_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "marker")))
    with pytest.raises(CtrlibError, match=r"plan\.safetensors is a pickle"):
        Plan.load(tmp_path / "plan.safetensors")
    assert not (tmp_path / "marker").exists()


def test_a_file_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Its first bytes are the length of its head: 0x280 begins as a pickle does, 0x4B50 as an archive."""
    from safetensors.torch import load_file

    for length in (0x280, 0x4B50):
        head = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
        (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + head + b"\0\0\0\0")
        assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0.0]
        with pytest.raises(ctr.SchemaError):  # which is why it is asked only of what could not be read
            refuse_pickle(tmp_path / "a.safetensors")


# Classes and functions.

NAMES = ["os.path.join", "os.system", "builtins.exec", "torch.load", "subprocess.Popen", "ctrlib.prepare", "ctrlib.run"]


@pytest.mark.parametrize("kind", ["model", "classifier"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["function", "tree", "inner"])
def test_what_is_no_part_of_ctrlib_is_refused_by_name(
    kind: str, name: str, how: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(kind)
    part = {"class": name, "arguments": {}}
    model: Any = name if how == "function" else part
    if how == "inner":
        model = {"class": "ctrlib.Model", "arguments": {"embedding": part, "tower": part, "head": part}}
    (folder / "model.json").write_text(json.dumps({"model": model}))
    resealed(folder)
    with pytest.raises(ctr.SchemaError, match=r"model\.json describes no model") as caught:
        READ[kind](folder)
    assert name.rpartition(".")[2] in str(caught.value)


@pytest.mark.parametrize("kind", ["os.path.join", "../packed", "packed ", ["packed"]])
def test_a_kind_of_part_that_there_is_not_is_refused(kind: Any, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("model")
    config = {**CONFIG, "replaced": {"embedding.tables": {"kind": kind}}}
    (folder / "model.json").write_text(json.dumps(config))
    resealed(folder)
    with pytest.raises(ctr.SchemaError, match=r"model\.json describes no model"):
        READ["model"](folder)


def test_a_method_that_there_is_not_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("retrieval")
    said = json.loads((folder / "retrieval.json").read_text())
    (folder / "retrieval.json").write_text(json.dumps({**said, "config": {"method": "os.path.join"}}))
    resealed(folder)
    with pytest.raises(ArgumentError, match=r"no method 'os\.path\.join'"):
        load_retrieval(folder)


def test_a_format_that_there_is_not_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("onnx")
    about = json.loads((folder / "export.json").read_text())
    for said in ({**about, "format": "os.path.join"}, {"format": "onnx"}, [], {**about, "format": ["onnx"]}):
        (folder / "export.json").write_text(json.dumps(said))
        resealed(folder)
        with pytest.raises(ctr.SchemaError, match=r"export\.json is of no use"):
            Exported(folder)


def test_json_that_is_nested_without_end_is_refused(folder_of: Callable[[str], Path]) -> None:
    for kind, name in (("model", "model.json"), ("retrieval", "retrieval.json"), ("onnx", "export.json")):
        folder = folder_of(kind)
        (folder / name).write_text("[" * 200_000)
        resealed(folder)
        with pytest.raises(ctr.SchemaError, match=name.replace(".", r"\.")):
            READ[kind](folder)


# Names that lead out of the folder.

OUTSIDE = ["../x", "/etc/hostname", "vocab/../../x", "..", "vocab//x", "..\\x", "", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", [kind for kind in READ if kind != "checkpoint"])
def test_a_manifest_that_names_what_is_outside_is_refused(
    kind: str, name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of(kind)
    (tmp_path / "x").write_text("secret")
    with_manifest(folder, lambda said: said["files"].update({name: [6, [[0, "0" * 64]]]}))
    with pytest.raises(ctr.SchemaError, match="does not lie in the folder") as caught:
        READ[kind](folder)
    assert repr(name) in str(caught.value)
    with pytest.raises(ctr.SchemaError, match="does not lie in it"):
        inside(folder, name)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "..", "a/b"])
def test_a_checkpoint_that_names_what_is_outside_is_refused(
    name: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("checkpoint")
    step, latest = folder / "step-000000001", json.loads((folder / "LATEST").read_bytes().partition(b"\n")[2])
    (folder / "LATEST").write_bytes(seal({**latest, "folder": name})[1])
    with ctr.Checkpoints(folder, log=lambda line: lines.append(line)) as checkpoints:
        lines: list[str] = []
        assert checkpoints.load({"table": torch.zeros(4, 2)}) == {"epoch": 1}  # what is sound is read
    assert any(repr(name) in line and "does not lie in the folder" in line for line in lines)
    with_manifest(step, lambda said: said["files"].update({name: [6, "0" * 64]}))
    with pytest.raises(CheckpointError, match="it lists") as caught:
        READ["checkpoint"](folder)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("dtype", ["load", "os.path.join", "hub", 7, None])
def test_a_kind_of_number_that_there_is_not_is_refused(dtype: Any, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("checkpoint")
    path = folder / "step-000000001" / "tensors.json"
    index = json.loads(path.read_text())
    index["table"]["dtype"] = dtype
    path.write_text(json.dumps(index))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with_manifest(path.parent, lambda said: said["files"].update({path.name: [path.stat().st_size, digest]}))
    (folder / "LATEST").unlink()  # which knows the manifest as it was
    with pytest.raises(CheckpointError, match="no kind of number"):
        READ["checkpoint"](folder)


@pytest.mark.parametrize("name", ["../precious", "/precious", "..", ".", "", "a/../../precious", 7])
def test_what_a_run_left_to_remove_lies_in_its_folder(name: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "precious").write_text("kept")
    said = {"identity": {"seed": 1}, "result": {}, "needless": [name]}
    (out / ".finished").write_text(json.dumps(said))
    for read in (lambda: finished(out, {"seed": 1}), lambda: clean_up(out)):
        with pytest.raises(ArgumentError, match="does not lie in the folder"):
            read()
    assert (tmp_path / "precious").read_text() == "kept" and out.is_dir()
    (out / ".finished").unlink()
    (out / "checkpoints").mkdir()
    finish(out, {"seed": 1}, {}, ["checkpoints"])
    assert list(out.iterdir()) == []


# Links.

LINKED = [
    *(("model", name) for name in ("model.json", "model.safetensors", "schema.json", "vocab/item.parquet", "vocab")),
    *(("classifier", name) for name in ("model.safetensors", "vocab/item.parquet")),
    *(("encoder", name) for name in ("schema.json", "vocab/item.parquet", "numbers/price.parquet", "vocab")),
    *(("onnx", name) for name in ("model.onnx", "encoder.json", "vocab.json")),
    *(("retrieval", name) for name in ("retrieval.json", "method.safetensors", "users.parquet")),
    *(("checkpoint", name) for name in ("step-000000001/tensors-0.bin", "step-000000001/state.json", "step-000000001")),
]


@pytest.mark.parametrize("with_checksums", [True, False])
@pytest.mark.parametrize(("kind", "name"), LINKED)
def test_a_link_out_of_the_folder_is_not_followed(
    kind: str, name: str, with_checksums: bool, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, elsewhere = folder_of(kind), tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    if not with_checksums:
        if kind in ("checkpoint", "onnx"):
            pytest.skip("is not read without")
        (folder / "MANIFEST").unlink()
        path = folder / "schema.json"
        if path.exists():
            schema = {key: one for key, one in json.loads(path.read_text()).items() if key != "manifest"}
            path.write_text(json.dumps(schema))
    with pytest.raises((ctr.SchemaError, CheckpointError), match="link") as caught:
        READ[kind](folder)
    assert Path(name).name in str(caught.value)


def test_links_within_a_folder_and_to_a_folder_are_followed(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("model")
    (folder / "vocab" / "item.parquet").rename(folder / "vocab" / "values.parquet")
    (folder / "vocab" / "item.parquet").symlink_to("values.parquet")
    (tmp_path / "latest").symlink_to(folder)
    assert read_model(tmp_path / "latest")[0].height == 1
    monkeypatch.chdir(tmp_path)
    assert read_model(Path("latest"))[0].height == 1


def test_the_rows_of_a_prepared_folder_may_lie_on_another_disk(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("data")
    expected = ctr.Loader(folder, "train", batch_size=64).num_rows
    (folder / "train").rename(tmp_path / "disk")
    (folder / "train").symlink_to(tmp_path / "disk")
    assert ctr.Loader(folder, "train", batch_size=64).num_rows == expected
    (folder / "vocab").rename(tmp_path / "vocab")
    (folder / "vocab").symlink_to(tmp_path / "vocab")
    with pytest.raises(ctr.SchemaError, match="is a link out of the folder"):
        ctr.Encoder.load(folder)


def test_what_is_linked_is_not_copied_into_another_model(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("model")
    model, schema = ctr.models.build(CONFIG, ctr.Schema.load(folder)), folder / "schema.json"
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab" / "more.parquet").symlink_to(tmp_path / "secret")
    (folder / "MANIFEST").unlink()
    schema.write_text(json.dumps({k: one for k, one in json.loads(schema.read_text()).items() if k != "manifest"}))
    with pytest.raises(ctr.SchemaError, match=r"more\.parquet is a link out of the folder"):
        ctr.save_model(model, CONFIG, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Exports.


def test_an_export_without_checksums_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("onnx")
    (folder / "MANIFEST").unlink()
    with pytest.raises(ctr.SchemaError, match="has no MANIFEST"):
        Exported(folder)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "beside.bin"])
@pytest.mark.parametrize("where", ["initializer", "constant", "function"])
def test_a_model_in_onnx_reads_no_other_file(
    location: str, where: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    import onnx

    folder = folder_of("onnx")
    model = onnx.load(folder / "model.onnx")
    tensor = model.graph.initializer[0]
    if where != "initializer":
        tensor = onnx.TensorProto(name="planted", data_type=1, dims=[1])
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    node = onnx.helper.make_node("Constant", [], ["planted"], value=tensor)
    if where == "constant":
        model.graph.node.append(node)
    elif where == "function":
        model.functions.append(onnx.helper.make_function("own", "f", [], ["planted"], [node], model.opset_import))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "beside.bin").write_bytes(b"0000")
    resealed(folder)
    with pytest.raises(ctr.SchemaError, match="is read from another file") as caught:
        Exported(folder)
    assert repr(location) in str(caught.value)


def test_a_program_of_torch_is_not_opened_unless_it_is_trusted(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(sources / "model", tmp_path / "out", to="pt2")
    opened: list[Any] = []
    monkeypatch.setattr(torch.export, "load", lambda *path, **_: opened.append(path))
    with pytest.raises(UnsupportedError, match=r"a program of torch's .*model\.pt2.*trust=True"):
        Exported(tmp_path / "out")
    assert not opened


def test_the_reader_of_a_folder_is_not_the_one_that_reads_it(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("onnx")
    for name in ("reader.py", "quick.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    resealed(folder)
    assert Exported(folder).predict([ROW]).shape == (1, 1)
    assert not (tmp_path / "marker").exists()
