"""The forms that a program can be written in, and how each is read back and run."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ctrlib.errors import ArgumentError, MissingPackageError
from ctrlib.export.program import Arrays, Program, quiet
from ctrlib.manifest import refuse_pickle
from ctrlib.schema import SchemaError

Run = Callable[[Arrays], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Format:
    """One form: the file's name, how it is written and read, which packages that takes, and whether it is code.

    `code` says why whoever loads the file runs what its author says; empty for a file of plain data.
    """

    file: str
    what: str
    write: Callable[[Program, Path], None]
    read: Callable[[Path, list[str]], Run]
    packages: tuple[str, ...] = ()
    code: str = ""

    def check(self) -> None:
        """Refuse before any work.

        Raises:
            MissingPackageError: a package is not installed.
        """
        for package in self.packages:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise MissingPackageError(
                    f"this format needs {package}, which is not installed: pip install 'ctrlib[export]'"
                ) from error


def _write_pt2(program: Program, path: Path) -> None:
    exported = program.export()
    with quiet():
        torch.export.save(exported, path)


def _read_pt2(path: Path, names: list[str]) -> Run:
    with quiet():
        module: Any = torch.export.load(path).module()
    return _of_torch(module, names)


def _write_aoti(program: Program, path: Path) -> None:
    exported = program.export()
    with quiet():
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))


def _read_aoti(path: Path, names: list[str]) -> Run:
    with quiet():
        module: Any = torch._inductor.aoti_load_package(str(path))
    return _of_torch(module, names)


def _of_torch(module: Any, names: list[str]) -> Run:
    def run(arrays: Arrays) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = module(*(torch.from_numpy(arrays[name]) for name in names)).numpy()
        return found

    return run


def _write_onnx(program: Program, path: Path) -> None:
    from ctrlib.export.onnx import strip, to_onnx

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder) / "whole.onnx"
        to_onnx(program.export(), whole, program.signature.names)
        strip(whole, path)


def _write_int8(program: Program, path: Path) -> None:
    from ctrlib.export.onnx import quantise, strip, to_onnx

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole, rounded = Path(folder) / "whole.onnx", Path(folder) / "int8.onnx"
        to_onnx(program.export(), whole, program.signature.names)
        with quiet():
            quantise(whole, rounded)
        strip(rounded, path)


def _read_onnx(path: Path, names: list[str]) -> Run:
    import onnxruntime

    refuse_files_beside(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # not all of the machine, beside a server's other threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(arrays: Arrays) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = session.run(None, arrays)[0]
        return found

    return run


def refuse_files_beside(path: Path) -> None:
    """Refuse a model in ONNX that reads other files, of which it may name any; what `ctrlib export` writes is one file.

    Raises:
        SchemaError: as said, or it is no ONNX.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        refuse_pickle(path)
        raise SchemaError(f"{path} is no ONNX ({error}): export the model again") from error

    def tensors(graph: Any) -> Iterator[Any]:
        yield from getattr(graph, "initializer", ())  # a function has none
        for one in getattr(graph, "sparse_initializer", ()):
            yield from (one.values, one.indices)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from tensors(inner)

    for tensor in (one for graph in (model.graph, *model.functions) for one in tensors(graph)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            where = {entry.key: entry.value for entry in tensor.external_data}.get("location")
            raise SchemaError(
                f"{path}: {tensor.name or 'a tensor'} is read from another file, {where!r}, and a model may not choose "
                "which: export it again"
            )


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    # torch.export's reader is not made for files of strangers.
    "pt2": Format(
        "model.pt2",
        "torch.export's program, for torch of the same or a later version",
        _write_pt2,
        _read_pt2,
        code="a program of torch's",
    ),
    "aoti": Format(
        "model.aoti.pt2",
        "compiled by AOTInductor for this kind of processor, runs without Python",
        _write_aoti,
        _read_aoti,
        code="machine instructions",
    ),
    "onnx": Format("model.onnx", "for onnxruntime and other runtimes", _write_onnx, _read_onnx, _ONNX),
    "ort-int8": Format("model.int8.onnx", "as onnx, with matrices in 8-bit integers", _write_int8, _read_onnx, _ONNX),
}


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ArgumentError(f"unknown format {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]
