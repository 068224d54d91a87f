"""An exported model: a folder that another process, or another language, scores raw rows with.

| file | what it holds |
| --- | --- |
| `model.*` | the program (`ctrlib.export.formats`) |
| `export.json` | its format, inputs and labels, and how far it is from the model that was trained |
| `encoder.json`, `vocab.json` | how raw cells become inputs |
| `schema.json` | the same for ctrlib's own encoder, which takes columns at once |
| `reader.py`, `quick.py` | what reads these two, with numpy alone |
| `README.md` | the model's card, and how the export is loaded |
| `MANIFEST` | checksums of all |
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctrlib._target import target
from ctrlib.data import quick
from ctrlib.data.encoder import Encoder
from ctrlib.errors import ArgumentError, UnsupportedError, check_path
from ctrlib.export import reader
from ctrlib.export.formats import Run, format_named
from ctrlib.export.program import Program, Signature
from ctrlib.making import new_folder, size_of
from ctrlib.manifest import CARD, check_file, check_folder, manifest_of, write_manifest
from ctrlib.schema import Schema, SchemaError, kind_of
from ctrlib.serving.card import exported_card
from ctrlib.serving.direct import Rows
from ctrlib.serving.predictor import Predictor

VERSION = 1
SIZES = (1, 16, 1000)  # rows in a batch that parity is measured on


def export_model(model: str | Path, out: str | Path, *, to: str = "onnx", overwrite: bool = False) -> dict[str, Any]:
    """Write a model folder as a program that needs none of ctrlib, and measure the file that was written.

    Args:
        model: a model folder.
        out: the folder to make.
        to: a name of `ctrlib.export.formats.FORMATS`.
        overwrite: replace an export that is there.

    Returns:
        What export.json holds. `parity` has, for each number of rows of `SIZES`, the largest difference between a logit
        of the file and of the trained model, and `relative`, that over max(1, |logit|). Rows are random, with unseen
        and missing ids and empty bags among them. `row_error` is the largest relative error of a row that `ctrlib
        compress` measured, or None for a model that it has not made.

    Raises:
        UnsupportedError: the model has no such form; the message says why.
        MissingPackageError: a package is not installed.
        ValueError: there is no such format.
        TargetError, LockedError: as in `ctrlib._target.target`.
    """
    check_path("a model folder", model=model)
    form = format_named(to)
    form.check()
    with target(out, ("export",), inputs=[model], overwrite=overwrite):
        predictor = Predictor.load(model)
        program = Program(predictor.model, predictor.schema)
        with new_folder(Path(out), needed=2 * size_of(Path(model))) as making:
            path = making / form.file
            form.write(program, path)
            run = form.read(path, program.signature.names)
            found = {
                "version": VERSION,
                "format": to,
                "file": form.file,
                "bytes": path.stat().st_size,
                "inputs": _inputs(program.signature),
                "output": {"name": "logits", "labels": list(predictor.schema.labels)},
                "parity": parity(program, run),
                "row_error": _row_error(Path(model)),
                "made_by": {"torch": torch.__version__, "python": platform.python_version()},
            }
            (making / "export.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            _write_encoder(predictor, making)
            text = exported_card(model, found, is_code=bool(form.code))
            (making / CARD).write_text(text, encoding="utf-8")
            write_manifest(making, "export")
    return found


def parity(program: Program, run: Run) -> dict[str, Any]:
    """How far a file's logits are from those of the program it was made of."""
    rows, largest, relative = {}, 0.0, 0.0
    for size in SIZES:
        arrays = program.signature.examples(size, seed=size)
        expected, got = program.run(arrays), run(arrays)
        if got.shape != expected.shape:
            raise UnsupportedError(f"the file gives logits {got.shape} for {size} rows, expected {expected.shape}")
        difference = np.abs(got - expected)
        rows[str(size)] = float(difference.max())
        largest = max(largest, rows[str(size)])
        relative = max(relative, float((difference / np.maximum(1, np.abs(expected))).max()))
    return {"rows": rows, "largest": largest, "relative": relative}


def _row_error(model: Path) -> float | None:
    path = model / "compression.json"
    found: float | None = json.loads(path.read_text(encoding="utf-8")).get("row_error") if path.is_file() else None
    return found


def _inputs(signature: Signature) -> list[dict[str, Any]]:
    described = []
    for name in signature.names:
        if name == "ids":
            described.append({"name": name, "type": "int64", "shape": ["rows", len(signature.single)]})
            described[-1]["columns"] = signature.single
        elif name == "numbers":
            described.append({"name": name, "type": "float32", "shape": ["rows", len(signature.numbers)]})
            described[-1]["columns"] = signature.numbers
        else:
            described.append(
                {"name": name, "type": "int64", "shape": ["rows + 1" if name[-8:] == ".offsets" else name]}
            )
    return described


def _write_encoder(predictor: Predictor, folder: Path) -> None:
    """What `ctrlib.export.reader` reads, and a copy of it."""
    schema = predictor.schema
    raw_format = schema.raw_format or {}
    described = {
        "version": reader.VERSION,
        "labels": list(schema.labels),
        "features": [{"kind": kind_of(feature), **dataclasses.asdict(feature)} for feature in schema.features],
        "missing_values": list(dict.fromkeys(["", *raw_format.get("missing_values", ())])),
        "types": raw_format.get("types", {}),
    }
    (folder / "encoder.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    predictor.schema.save(folder / "schema.json")
    values = {name: list(known) for name, known in predictor.encoder.known.items()}
    (folder / "vocab.json").write_text(json.dumps(values, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    for module in (reader, quick):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        source = source.replace("from ctrlib.data.quick import", "from quick import")
        (folder / Path(str(module.__file__)).name).write_text(source, encoding="utf-8")


class Exported:
    """An export, read back: raw rows to probabilities, through its file and its reader.

    Args:
        folder: what `export_model` wrote.
        trust: run code of the folder. Formats that are code (aoti, and pt2 as torch reads it) are refused without:
            whoever wrote the folder decides what they do. Nothing of a folder in another format is executed.

    Raises:
        SchemaError: a file of the folder is damaged, or names or links to what lies outside of it.
        UnsupportedError: it is code, and `trust` was not said.
    """

    def __init__(self, folder: str | Path, *, trust: bool = False) -> None:
        check_path("a folder of `ctrlib export`", folder=folder)
        self.folder = Path(folder)
        if not (self.folder / "export.json").is_file():
            raise ArgumentError(f"{folder} has no export.json: expected a folder that `ctrlib export` wrote")
        if manifest_of(self.folder) is None:
            raise SchemaError(f"{folder} has no MANIFEST, which `ctrlib export` writes last: export the model again")
        check_folder(self.folder)
        try:
            self.about = dict(json.loads((self.folder / "export.json").read_text(encoding="utf-8")))
            form, inputs = format_named(self.about["format"]), [str(one["name"]) for one in self.about["inputs"]]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise SchemaError(
                f"{self.folder / 'export.json'} is of no use ({error}): export the model again"
            ) from error
        if form.code and not trust:
            raise UnsupportedError(
                f"{folder} holds {form.code} ({form.file}): it can do anything that you can; say trust=True (--trust) "
                "if you know who made it"
            )
        form.check()
        for name in (form.file, "encoder.json", "vocab.json"):
            check_file(self.folder, name)
        try:
            self.reader = reader.Reader(self.folder)
        except ValueError as error:
            raise SchemaError(str(error)) from error
        self._run = form.read(self.folder / form.file, inputs)

    def logits(self, rows: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32]:
        """Logits of raw rows, (B, T)."""
        return self._run(self.reader.arrays(rows))

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
        """Probabilities of raw rows, (B, T)."""
        found: npt.NDArray[np.float64] = reader.Reader.probabilities(self.logits(rows))
        return found

    def predictor(self) -> ExportedPredictor:
        """What scores raw rows as a model folder's `Predictor` does, and ranks candidates: for servers.

        Of a model that reads a log of events, rows hold the histories and rates themselves, as for `predict`.

        Raises:
            SchemaError: the export is of an older version, or its files are of different models.
        """
        if not (self.folder / "schema.json").is_file():
            raise SchemaError(f"{self.folder} has no schema.json, an older ctrlib wrote it: export the model again")
        check_file(self.folder, "schema.json")
        schema = Schema.load(self.folder / "schema.json")
        raw_format = {name: value for name, value in (schema.raw_format or {}).items() if name != "events"}
        values = {name: list(known) for name, known in self.reader.known.items()}
        encoder = Encoder(dataclasses.replace(schema, raw_format=raw_format), values)
        model = _Called(self._run, Signature(schema)).eval()
        return ExportedPredictor(model, schema, self.folder, encoder)


class _Called(nn.Module):
    """The program of an export, called as `Predictor` calls a model."""

    def __init__(self, run: Run, signature: Signature) -> None:
        super().__init__()
        self.run, self.signature = run, signature

    def forward(self, rows: Rows) -> Tensor:
        return torch.from_numpy(self.run(self.signature.arrays(rows.columns)))


class ExportedPredictor(Predictor):
    """A `Predictor` of an export's program (`Exported.predictor`): what it scores in memory, and candidates."""

    def __init__(self, model: nn.Module, schema: Schema, folder: Path, encoder: Encoder) -> None:
        super().__init__(model, schema, folder)
        self.__dict__.update(encoder=encoder, _direct=model)  # which are made of a model folder otherwise
