"""Metrics of slices of the rows, by the values of a column: where a model ranks badly, or promises too much."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrlib import metrics
from ctrlib._lazy import instead
from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.vocabulary import vocabulary_path
from ctrlib.manifest import check_file
from ctrlib.schema import OOV_ID, Categorical, Schema, SchemaError, vocabulary_of
from ctrlib.training.evaluate import Scores, known

MOST = 20  # values that are told apart, those in most rows
NUM_PARTS = 10  # of numbers
MISSING, OTHERS, UNSEEN = "(missing)", "(others)", "(unseen or rare)"


def slices_of(values: pl.Series) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Names of slices, and the slice of each row.

    A slice is a value: the twenty in most rows, then "(others)" and "(missing)". Numbers of more values are cut into
    ten parts of about as many rows instead, ascending.

    >>> slices_of(pl.Series(["b", "a", None, "b"]))
    (['b', 'a', '(missing)'], array([0, 1, 2, 0]))
    """
    present = values.drop_nulls()
    if values.dtype.is_float():
        present = present.drop_nans()
    if values.dtype.is_numeric() and present.n_unique() > MOST:
        return _parts(values, present)
    texts = values.cast(pl.String)
    counts = present.cast(pl.String).rename("value").value_counts().sort(["count", "value"], descending=[True, False])
    chosen = counts["value"][:MOST].to_list()
    names = [*chosen, *([OTHERS] if len(counts) > MOST else []), *([MISSING] if len(present) < len(values) else [])]
    place = {name: number for number, name in enumerate(chosen)}
    nothing = {None, "NaN"} if values.dtype.is_float() else {None}
    codes = [len(names) - 1 if text in nothing else place.get(text, MOST) for text in texts]
    return names, np.array(codes, np.int64)


def _parts(values: pl.Series, present: pl.Series) -> tuple[list[str], npt.NDArray[np.int64]]:
    numbers = values.cast(pl.Float64).fill_null(math.nan).to_numpy()
    edges = np.unique(np.quantile(present.cast(pl.Float64).to_numpy(), np.linspace(0, 1, NUM_PARTS + 1)))
    codes = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    names = [f"{low:.6g} to {high:.6g}" for low, high in itertools.pairwise(edges)]
    gone = np.isnan(numbers)
    if gone.any():
        codes[gone] = len(names)
        names.append(MISSING)
    return names, codes


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
    files = sorted((folder / split).glob("*.parquet"))
    ids = pl.concat([pl.read_parquet(path, columns=[column]) for path in files]).to_series().cast(pl.Int64)
    file = names.get(name, Path("groups.parquet")).as_posix()
    if column == GROUP_COLUMN and not (folder / file).is_file():
        return ids.alias(name)  # groups that are integers stand for themselves
    check_file(folder, file)
    of_id = pl.read_parquet(folder / file).select("id", "value").with_columns(pl.col("id").cast(pl.Int64))
    values = ids.to_frame("id").join(of_id, on="id", how="left", maintain_order="left")["value"].cast(pl.String)
    unseen = (ids == OOV_ID) & (column == name)
    return pl.DataFrame([values.alias("value"), unseen.alias("unseen")]).select(
        pl.when("unseen").then(pl.lit(UNSEEN)).otherwise("value").alias(name)
    )[name]


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
