"""A model folder: a trained model, written so that it can be read where nothing else is.

It holds model.safetensors (weights; no pickle anywhere), model.json (the preset and its arguments), schema.json and
vocab/ (how raw cells become ids and numbers), and MANIFEST with checksums of these. It needs nothing else. For later
data, which is prepared like this one's, there is also numbers/ (what edges of numbers are made from); for people there
is README.md, the model card.
"""

from __future__ import annotations

import contextlib
import json
import reprlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from ctrlib import models
from ctrlib._target import target
from ctrlib.data.event_state import FOLDER as EVENTS
from ctrlib.data.event_state import has_events
from ctrlib.data.quantiles import has_points
from ctrlib.errors import ArgumentError, check_path, check_type
from ctrlib.making import new_folder, remove, size_of
from ctrlib.manifest import CARD, inside, load_schema, manifest_of, refuse_pickle, write_manifest
from ctrlib.schema import Schema, SchemaError
from ctrlib.serving import card
from ctrlib.structure import attributes, describe
from ctrlib.training.config import differences

BESIDE = 1 << 16  # bytes of a model folder beside weights and vocabularies, and some to spare


def save_model(
    model: nn.Module,
    config: dict[str, Any],
    data: str | Path,
    out: str | Path,
    *,
    modules: Sequence[str] = (),
    result: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder, with a model card (`ctrlib.serving.card`).

    Args:
        model: a trained, plain (not sharded) model.
        config: what `models.build` needs to make it again, `{"model": name, **arguments}` or a tree of constructors.
        data: the prepared folder it was trained on; schema and vocabularies are copied from it.
        out: the folder; made if missing, other files in it are left alone. A model that was there is the old one or
            the new one, whenever this is stopped.
        modules: where a model of your own may be imported from (`ctrlib.models.build`).
        result: what `ctr.run` gave beside the model, for the card, which has no metrics otherwise.

    Raises:
        SchemaError: a file of `data` that is copied is damaged.
        ValueError: `config` describes another model than this one, or none.
        TargetError: `out` is `data`, or a prepared folder.
        LockedError: somebody else writes into `out`; the message says who.
        TypeError: an argument is of another type.
        OSError: the disk is full.
    """
    check_type("a torch module", nn.Module, model=model)
    check_type('a dictionary {"model": name, **arguments}', dict, config=config)
    check_path("a prepared folder", data=data)
    if result is not None:
        check_type("what ctr.run returns beside the model", Mapping, result=result)
    config = _with_calibration(_counted(model, config), model)
    with target(out, ("model", "run", "search", "compressed", "other"), inputs=[data], overwrite=True):
        _check_config(model, config, load_schema(data), modules)
        with model_in_the_making(model, config, data, out, result=result):
            pass


@contextlib.contextmanager
def model_in_the_making(
    model: nn.Module,
    config: dict[str, Any],
    data: str | Path,
    out: str | Path,
    kind: str = "model",
    *,
    result: Mapping[str, Any] | None = None,
    rows: str | Path | None = None,
) -> Iterator[Path]:
    """As `save_model`; what is written into the folder that this gives appears in `out` together with the model.

    Args:
        model, config, data, out: as in `save_model`.
        kind: says what makes it again (`ctrlib.manifest.MENDS`).
        result: as in `save_model`; otherwise it is the metrics.json, search.json or compression.json that is written
            meanwhile.
        rows: the prepared folder, where `data` is a model folder whose schema and vocabularies are carried over.
    """
    data, out = Path(data), Path(out)
    config = _with_calibration(_counted(model, config), model)
    schema = load_schema(data)
    report, last_event = card.counted(rows or data), card.last_event_in(data, schema)
    parts = ["vocab", *(["numbers"] if has_points(data) else []), *([EVENTS] if has_events(schema) else [])]
    for part in parts:
        for path in sorted((data / part).rglob("*")):
            inside(data, path.relative_to(data).as_posix())
    if (manifest := manifest_of(data)) is not None:
        for name in (name for part in parts for name in manifest.under(part)):
            manifest.check(name)  # before a copy of it gets a checksum of its own
    tensors = model.state_dict()
    needed = sum(tensor.nbytes for tensor in tensors.values()) + sum(size_of(data / part) for part in parts) + BESIDE
    with new_folder(out, keep=True, needed=needed) as making:
        schema.save(making / "schema.json", manifest=True)
        for part in parts:
            shutil.copytree(data / part, making / part)
        content = json.dumps(config, indent=1) + "\n"
        (making / "model.json").write_text(content, encoding="utf-8")
        # Cloned, since tables of a model that has scored are views of one tensor (`ctrlib.serving.direct`).
        weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(weights, str(making / "model.safetensors"), metadata={"schema_hash": schema.hash})
        shutil.copymode(making / "model.json", making / "model.safetensors")  # safetensors lets nobody else read it
        if kind == "model":  # beside which a run writes how it went, which is no part of it
            write_manifest(making, kind)
        yield making
        if kind != "model":
            write_manifest(making, kind)
        text = card.model_card(
            model,
            config,
            schema,
            data=str(rows or data),
            report=report,
            result=result if result is not None else card.result_in(making),
            num_bytes=(making / "model.safetensors").stat().st_size,
            last_event=last_event,
        )
        (making / CARD).write_text(text, encoding="utf-8")
    for part in {"numbers", EVENTS} - {*parts}:
        remove(out / part)  # an older model's


def _with_calibration(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The config with the model's own calibrator, if it has one, and with no other."""
    config = {name: value for name, value in config.items() if name != "calibration"}
    calibration = getattr(model, "calibration", None)
    return config if calibration is None else {**config, "calibration": calibration.as_dict()}


def _counted(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """The config with what counting its crosses has made of the model, without which it cannot be built."""
    return config if not config.get("crosses") or config.get("replaced") else {**config, "replaced": describe(model)}


def _check_config(model: nn.Module, config: dict[str, Any], schema: Schema, modules: Sequence[str]) -> None:
    """Refuse a config that makes another model, which could be saved and then not be loaded.

    Raises:
        ArgumentError: as said.
    """
    if "model" not in config:
        raise ArgumentError(f'config does not name a "model": expected {{"model": name, **arguments}}, got {config}')
    try:
        with torch.device("meta"):  # its shapes alone, which cost no memory
            described = models.build(config, schema, modules=modules)
    except (RuntimeError, NotImplementedError):  # a part of somebody's own may read values when it is made
        with _Undrawn():
            described = models.build(config, schema, modules=modules)
    expected = {name: tensor.shape for name, tensor in described.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    unfit = [
        f"{name} is {_shape(shapes.get(name))}, that of the config {_shape(expected.get(name))}"
        for name in sorted({*shapes, *expected})
        if shapes.get(name) != expected.get(name)
    ]
    what = f"{len(unfit)} tensors differ"
    if not unfit and (tied := _tied(model)) != (tied_there := _tied(described)):
        unfit, what = [f"tied are {tied or 'none'}, in that of the config {tied_there or 'none'}"], "tied tensors"
    if not unfit:  # what has the same weights may still compute something else
        unfit, what = differences(attributes(model), attributes(described)), "its parts differ"
    if unfit:
        raise ArgumentError(
            f"config describes another model than the one to save, {what}: {'; '.join(unfit[:3])}. Give what "
            f"`ctrlib.models.build` made this model from: {reprlib.repr(config)}"
        )


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of those parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [these for these in names.values() if len(these) > 1]


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))


def load_model(folder: str | Path, *, modules: Sequence[str] = ()) -> tuple[nn.Module, Schema]:
    """The model of a model folder, in evaluation, and its schema; arguments and errors as of `Predictor.load`."""
    check_path("a model folder", folder=folder)
    folder = Path(folder)
    manifest = manifest_of(folder)
    for name in ("model.json", "model.safetensors", "schema.json"):
        if manifest is not None and manifest.kind != "prepared":
            manifest.check(name)
        elif not inside(folder, name).is_file():
            raise SchemaError(f"{folder} is not a model folder, it has no {name}: `ctrlib train --out` writes one")
    schema = load_schema(folder)
    with _Undrawn():
        model = _build(folder / "model.json", schema, modules)
    path = folder / "model.safetensors"
    try:
        with safe_open(str(path), "pt") as file:
            trained_with = (file.metadata() or {}).get("schema_hash")
        weights = load_file(str(path))
    except SafetensorError as error:
        refuse_pickle(path)
        raise SchemaError(f"{path} is damaged ({error}): copy or train it again") from error
    if trained_with != schema.hash:
        raise SchemaError(
            f"{path} was trained with a schema of hash {trained_with}, {folder / 'schema.json'} has {schema.hash}: "
            "the files are of different models; copy the whole folder again"
        )
    expected = model.state_dict()
    unfit = sorted(set(weights) ^ set(expected)) or sorted(
        name for name in expected if expected[name].shape != weights[name].shape
    )
    if unfit:
        raise SchemaError(f"{folder / 'model.safetensors'} does not fit model.json and schema.json at {unfit[:5]}")
    model.load_state_dict(weights)
    return model.eval(), schema


class _Undrawn(TorchFunctionMode):
    """No random number is drawn meanwhile: of a model that is read from a file, the file has all that is random.

    To draw the rows of large tables takes much longer than to read them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:
            return torch.empty(*args, **kwargs)
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        drawn = ("uniform_", "normal_")  # xavier_uniform_ and others, too
        if getattr(func, "__module__", "") == nn.init.__name__ and func.__name__.endswith(drawn):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _build(path: Path, schema: Schema, modules: Sequence[str]) -> nn.Module:
    """The model that model.json describes, whatever its weights."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        refuse_pickle(path)
        raise SchemaError(f"{path} is not JSON ({error}): copy it or train the model again") from error
    if not isinstance(config, dict) or "model" not in config:
        raise SchemaError(f'{path} does not name a "model": copy it or train the model again')
    try:
        return models.build(config, schema, modules=modules)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or "alloc" in str(error)
        why = "its sizes take more memory than there is" if full else f"{type(error).__name__}: {error}".splitlines()[0]
        raise SchemaError(f"{path} describes no model that can be built ({why}): copy it again") from error
