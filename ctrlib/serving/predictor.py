"""Save a trained model to a folder and score raw rows with it later.

A model folder holds model.safetensors (weights; no pickle anywhere), model.json (the preset and its arguments),
schema.json and vocab/ (how raw cells become ids and numbers). It needs nothing else.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ctrlib import presets
from ctrlib.data.loader import Loader
from ctrlib.schema import Schema, SchemaError
from ctrlib.training.loop import evaluate, predict


def save_model(model: nn.Module, config: dict[str, Any], data: Path, out: Path) -> None:
    """Write a model folder.

    Args:
        model: a trained, plain (not sharded) model.
        config: what `presets.build` needs to make it again, `{"preset": name, **arguments}`.
        data: the prepared folder it was trained on; schema and vocabularies are copied from it.
        out: the folder; made if missing, other files in it are left alone.
    """
    out.mkdir(parents=True, exist_ok=True)
    schema = Schema.load(data)
    schema.save(out / "schema.json")
    shutil.copytree(data / "vocab", out / "vocab", dirs_exist_ok=True)
    (out / "model.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"schema_hash": schema.hash})


@dataclass(frozen=True)
class Predictor:
    """A loaded model folder: raw rows in, probabilities out."""

    model: nn.Module
    schema: Schema
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> Predictor:
        """Read a model folder.

        Raises:
            SchemaError: a file is missing, damaged, or of another model; the message names it.
        """
        folder = Path(folder)
        for name in ("model.json", "model.safetensors", "schema.json"):
            if not (folder / name).is_file():
                raise SchemaError(f"{folder} is not a model folder, it has no {name}: `ctrlib train --out` writes one")
        schema = Schema.load(folder)
        model = presets.build(json.loads((folder / "model.json").read_text(encoding="utf-8")), schema)
        try:
            weights = load_file(str(folder / "model.safetensors"))
        except SafetensorError as error:
            raise SchemaError(f"{folder / 'model.safetensors'} is damaged ({error}): copy or train it again") from error
        expected = model.state_dict()
        unfit = sorted(set(weights) ^ set(expected)) or sorted(
            name for name in expected if expected[name].shape != weights[name].shape
        )
        if unfit:
            raise SchemaError(f"{folder / 'model.safetensors'} does not fit model.json and schema.json at {unfit[:5]}")
        model.load_state_dict(weights)
        return cls(model.eval(), schema, folder)
