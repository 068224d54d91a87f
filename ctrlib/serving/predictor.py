"""Save a trained model to a folder and score raw rows with it later.

A model folder holds model.safetensors (weights; no pickle anywhere), model.json (the preset and its arguments),
schema.json and vocab/ (how raw cells become ids and numbers). It needs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ctrlib import presets
from ctrlib.data.encode import GROUP, encode
from ctrlib.data.loader import Loader
from ctrlib.data.raw import RawData, read_raw
from ctrlib.schema import MISSING_ID, OOV_ID, Categorical, Schema, SchemaError
from ctrlib.training.loop import evaluate, predict


def save_model(model: nn.Module, config: dict[str, Any], data: str | Path, out: str | Path) -> None:
    """Write a model folder.

    Args:
        model: a trained, plain (not sharded) model.
        config: what `presets.build` needs to make it again, `{"preset": name, **arguments}`.
        data: the prepared folder it was trained on; schema and vocabularies are copied from it.
        out: the folder; made if missing, other files in it are left alone.
    """
    data, out = Path(data), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    schema = Schema.load(data)
    schema.save(out / "schema.json")
    shutil.copytree(data / "vocab", out / "vocab", dirs_exist_ok=True)
    (out / "model.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"schema_hash": schema.hash})


@dataclass(frozen=True)
class Predictor:
    """A loaded model folder: raw rows in, probabilities out.

    A model composed by hand works too: `Predictor(model.eval(), schema, folder)`, with the prepared folder it was
    trained on (all that is read there is `vocab`).
    """

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

    def predict(self, data: RawData, *, batch_size: int = 8192) -> tuple[pl.DataFrame, dict[str, Any]]:
        """Probabilities for raw rows, a column per label, in the order of the rows; labels are not needed.

        Args:
            data: a CSV, TSV or parquet file, or a polars frame, with the raw feature columns in any order.
            batch_size: rows per step.

        Returns:
            The probabilities, and the counts: "rows", per id feature how many ids were "unseen" in train and how many
            were "missing" (both score normally), and the columns "ignored" because the model does not know them.

        Raises:
            SchemaError: a column is missing or has another type than in training.
            DataError: a cell or row is damaged; the message names it.
        """
        with self._encoded(data, with_labels=False) as (folder, ignored):
            counts = {**self._count(folder), "ignored": ignored}
            scores = predict(self.model, Loader(folder, "rows", batch_size=batch_size))
        probabilities = 1 / (1 + np.exp(-scores.logits.astype(np.float64)))
        return pl.DataFrame(dict(zip(self.schema.labels, probabilities.T))), counts

    def evaluate(self, data: RawData, *, batch_size: int = 8192) -> dict[str, Any]:
        """Metrics on raw rows with labels, as `ctrlib.evaluate` gives them.

        Raises:
            SchemaError, DataError: as in `predict`, labels included.
        """
        with self._encoded(data, with_labels=True) as (folder, _):
            loader = Loader(folder, "rows", batch_size=batch_size, with_group=self.schema.group is not None)
            return evaluate(self.model, loader)

    def evaluate_prepared(self, folder: str | Path, split: str, *, batch_size: int = 8192) -> dict[str, Any]:
        """Metrics on a split of a prepared folder.

        Raises:
            SchemaError: the folder was prepared differently from what the model was trained on.
        """
        schema = Schema.load(folder)
        if schema.hash != self.schema.hash:
            lines = "; ".join(self.schema.difference(schema)[:5])
            raise SchemaError(
                f"{folder} was prepared differently from the data of model {self.folder}: {lines}. "
                "Evaluate on the raw file instead, or on the folder that the model was trained on"
            )
        loader = Loader(folder, split, batch_size=batch_size, with_group=schema.group is not None)
        return evaluate(self.model, loader)

    @contextlib.contextmanager
    def _encoded(self, data: RawData, *, with_labels: bool) -> Iterator[tuple[Path, list[str]]]:
        """A temporary prepared folder with the split "rows", and the columns that are not in it."""
        reading = dict(self.schema.raw_format or {})
        positive = reading.pop("label_positive", None)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            raw = read_raw(data, folder / "raw", **reading)
            rows = encode(raw, self.schema, self.folder / "vocab", require_labels=with_labels, label_positive=positive)
            if not with_labels:
                # The loader wants every column of the schema; what is not known is not used either.
                rows = rows.with_columns(
                    *(pl.lit(float("nan"), pl.Float32).alias(label) for label in self.schema.labels),
                    *([pl.lit(1.0, pl.Float32).alias(self.schema.weight)] if self.schema.weight else []),
                    *([pl.lit(0, pl.Int64).alias(GROUP)] if self.schema.group else []),
                )
            (folder / "rows").mkdir()
            rows.sink_parquet(folder / "rows" / "part-00000.parquet")
            self.schema.save(folder / "schema.json")
            known = {feature.name for feature in self.schema.features} | set(self.schema.labels)
            known |= {name for name in (self.schema.weight, self.schema.group) if name is not None}
            yield folder, [name for name in raw.dtypes if name not in known]

    def _count(self, folder: Path) -> dict[str, Any]:
        rows = pl.scan_parquet(folder / "rows" / "*.parquet")
        ids = {
            feature.name: pl.col(feature.name) if isinstance(feature, Categorical) else pl.col(feature.name).explode()
            for feature in self.schema.sparse
        }
        unseen, missing = (
            rows.select((column == reserved).sum().alias(name) for name, column in ids.items()).collect().to_dicts()
            for reserved in (OOV_ID, MISSING_ID)
        )
        num_rows = rows.select(pl.len()).collect().item()
        return {"rows": num_rows, "unseen": (unseen or [{}])[0], "missing": (missing or [{}])[0]}
