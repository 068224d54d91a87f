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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ctrlib import models
from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.encode import check_unknown, count_ids, encode
from ctrlib.data.loader import Loader
from ctrlib.data.raw import RawData, naming, read_raw
from ctrlib.data.scan import DataError, OnBadRow, check_on_bad_row
from ctrlib.schema import Schema, SchemaError
from ctrlib.training.evaluate import evaluate, predict


def save_model(model: nn.Module, config: dict[str, Any], data: str | Path, out: str | Path) -> None:
    """Write a model folder.

    Args:
        model: a trained, plain (not sharded) model.
        config: what `models.build` needs to make it again, `{"model": name, **arguments}`.
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
        model = _build(folder / "model.json", schema)
        path = folder / "model.safetensors"
        try:
            with safe_open(str(path), "pt") as file:
                trained_with = (file.metadata() or {}).get("schema_hash")
            weights = load_file(str(path))
        except SafetensorError as error:
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
        return cls(model.eval(), schema, folder)

    def predict(
        self, data: RawData, *, batch_size: int = 8192, on_bad_row: OnBadRow = "raise"
    ) -> tuple[pl.DataFrame, dict[str, Any]]:
        """Probabilities for raw rows, a column per label, in the order of the rows; labels are not needed.

        Args:
            data: a CSV, TSV or parquet file, or a polars frame, with the raw feature columns in any order.
            batch_size: rows per step.
            on_bad_row: "raise" at the first damaged row, or "skip": such rows get no probability and are counted.

        Returns:
            The probabilities, and the counts: "rows", per id feature how many ids were "unseen" in train and how many
            cells were "missing" (both score normally), the columns "ignored" because the model does not know them, and
            how many rows were "skipped" for which reason and which they are ("skipped_rows", counted from 1), and
            "remarks" on columns of which train knew no value at all.

        Raises:
            SchemaError: a column is missing, or has another type than in training.
            DataError: a cell or row is damaged; the message names it.
        """
        with self._encoded(data, on_bad_row, with_labels=False) as (folder, counts):
            scores = predict(self.model, Loader(folder, "rows", batch_size=batch_size))
        probabilities = 1 / (1 + np.exp(-scores.logits.astype(np.float64)))
        frame = pl.DataFrame(dict(zip(self.schema.labels, probabilities.T)))
        return frame, {"rows": frame.height, **counts}

    def evaluate(self, data: RawData, *, batch_size: int = 8192, on_bad_row: OnBadRow = "raise") -> dict[str, Any]:
        """Metrics on raw rows with labels, as `ctrlib.evaluate` gives them, and the counts that `predict` gives.

        Raises:
            SchemaError, DataError: as in `predict`, labels included.
        """
        with self._encoded(data, on_bad_row, with_labels=True) as (folder, counts):
            loader = Loader(folder, "rows", batch_size=batch_size, with_group=self.schema.group is not None)
            return {**evaluate(self.model, loader, labels=self.schema.labels), **counts}

    def evaluate_prepared(self, folder: str | Path, split: str, *, batch_size: int = 8192) -> dict[str, Any]:
        """Metrics on a split of a prepared folder.

        Raises:
            SchemaError: the folder was prepared differently from what the model was trained on.
        """
        schema = self.check_prepared(folder)
        loader = Loader(folder, split, batch_size=batch_size, with_group=schema.group is not None)
        return evaluate(self.model, loader, labels=schema.labels)

    def check_prepared(self, folder: str | Path) -> Schema:
        """The schema of a prepared folder, if the model can read it.

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
        return schema

    @contextlib.contextmanager
    def _encoded(
        self, data: RawData, on_bad_row: OnBadRow, *, with_labels: bool
    ) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A temporary prepared folder with the split "rows", and what is to be said about the rows."""
        check_on_bad_row(on_bad_row)
        schema = self.schema
        raw_format = schema.raw_format or {}
        reading = {name: raw_format[name] for name in ("separator", "columns", "missing_values") if name in raw_format}
        known = {feature.name for feature in schema.features}
        only_labels = [name for name in (*schema.labels, schema.weight, schema.group) if name and name not in known]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            raw = read_raw(
                data,
                folder / "raw",
                on_bad_row=on_bad_row,
                may_lack=() if with_labels else (schema.labels, only_labels),
                **reading,
            )
            rows = encode(
                raw,
                schema,
                self.folder / "vocab",
                require_labels=with_labels,
                missing_labels=raw_format.get("missing_labels", "raise"),
                label_positive=raw_format.get("label_positive"),
                on_bad_row=on_bad_row,
            )
            if not with_labels:
                # The loader wants every column of the schema; what is not known is not used either.
                rows = rows.with_columns(
                    *(pl.lit(float("nan"), pl.Float32).alias(label) for label in schema.labels),
                    *([pl.lit(1.0, pl.Float32).alias(schema.weight)] if schema.weight else []),
                    *([pl.lit(0, pl.Int64).alias(GROUP_COLUMN)] if schema.group else []),
                )
            (folder / "rows").mkdir()
            path = folder / "rows" / "part-00000.parquet"
            with naming(raw.name):
                rows.sink_parquet(path)
            encoded = pl.scan_parquet(path, glob=False)
            if not encoded.select(pl.len()).collect().item():
                skipped = f" but {dict(raw.skipped)}, which were skipped" if raw.skipped else ""
                raise DataError(f"{raw.name} has no rows{skipped}: expected at least one")
            ids = count_ids(encoded, schema)
            remarks = check_unknown(raw, ids, schema, self.folder / "vocab")
            schema.save(folder / "schema.json")
            yield (
                folder,
                {
                    "unseen": {name: counts["unseen"] for name, counts in ids.items()},
                    "missing": {name: counts["missing"] for name, counts in ids.items()},
                    "ignored": [name for name in raw.dtypes if name not in known and name not in only_labels],
                    "skipped": dict(raw.skipped),
                    "skipped_rows": raw.skipped_rows,
                    "remarks": remarks,
                },
            )


def _build(path: Path, schema: Schema) -> nn.Module:
    """The model that model.json describes, with fresh weights."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SchemaError(f"{path} is not JSON ({error}): copy it or train the model again") from error
    if not isinstance(config, dict) or "model" not in config:
        raise SchemaError(f'{path} does not name a "model": copy it or train the model again')
    try:
        return models.build(config, schema)
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{path} describes no model that can be built ({error}): copy it again") from error
