"""Metrics of slices of the rows, by the values of a column: where a model ranks badly, or promises too much."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ctrlib import metrics
from ctrlib._lazy import instead
from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.slices import slices_of
from ctrlib.data.vocabulary import vocabulary_path
from ctrlib.manifest import check_file
from ctrlib.schema import OOV_ID, Categorical, Schema, SchemaError, vocabulary_of
from ctrlib.training.evaluate import Scores, known

UNSEEN = "(unseen or rare)"


def prepared_values(folder: Path, split: str, schema: Schema, name: str) -> pl.Series:
    """The values of a column in the rows of a prepared split, in the loader's order.

    Raises:
        SchemaError: it is neither a feature with one id a row nor the group.
    """
    names = {f.name: vocabulary_path(Path("vocab"), vocabulary_of(f)) for f in schema.sparse if type(f) is Categorical}
    if name not in (*names, schema.group):
        known_names = [*names, *([schema.group] if schema.group else [])]
        raise SchemaError(
            f"{folder} has no column {name!r} with one id a row; {instead([name], known_names)}: or evaluate a raw file"
        )
    column = name if name in names else GROUP_COLUMN
    if column == GROUP_COLUMN:
        return prepared_groups(folder, split).alias(name)
    ids = _ids(folder, split, column)
    values, unseen = _named(folder, names[name].as_posix(), ids), ids == OOV_ID
    return pl.DataFrame([values.alias("value"), unseen.alias("unseen")]).select(
        pl.when("unseen").then(pl.lit(UNSEEN)).otherwise("value").alias(name)
    )[name]


def prepared_groups(folder: Path, split: str) -> pl.Series:
    """The groups of the rows of a prepared split, in the loader's order, as they were called before."""
    ids, file = _ids(folder, split, GROUP_COLUMN), "groups.parquet"
    return _named(folder, file, ids) if (folder / file).is_file() else ids  # integers stand for themselves


def _ids(folder: Path, split: str, column: str) -> pl.Series:
    files = sorted((folder / split).glob("*.parquet"))
    return pl.concat([pl.read_parquet(path, columns=[column]) for path in files]).to_series().cast(pl.Int64)


def _named(folder: Path, file: str, ids: pl.Series) -> pl.Series:
    check_file(folder, file)
    of_id = pl.read_parquet(folder / file).select("id", "value").with_columns(pl.col("id").cast(pl.Int64))
    return ids.to_frame("id").join(of_id, on="id", how="left", maintain_order="left")["value"].cast(pl.String)


def score_slices(scores: Scores, values: pl.Series, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Of each slice, and of each label in it: "value", "label", and metrics as `ctrlib.metrics` has them.

    These are rows, positives, auc, auc_se, log_loss, normalized_entropy, calibration and calibration_se; nan where the
    rows of a slice do not define one.
    """
    names, codes = slices_of(values)
    wanted = ("rows", "positives", "auc", "auc_se", "log_loss", "normalized_entropy", "calibration", "calibration_se")
    found = []
    for code, name in enumerate(names):
        rows = codes == code
        part = Scores(scores.logits[rows], scores.labels[rows], scores.weights[rows], None)
        for task, label in enumerate(labels):
            y, z, _, weights = known(part, task)
            report = metrics.evaluate_binary(y, z, weights=weights)
            found.append({"value": name, "label": label, **{key: report[key] for key in wanted}})
    return found
