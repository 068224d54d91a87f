"""Anybody's predictions: a file with labels and scores, whoever made them, and every metric of it.

Bad cells are refused with the row that they are in, before anything is computed. Memory grows with the rows, by about
two hundred bytes each, and not with the other columns of the file, which are not read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl

from ctrlib import metrics
from ctrlib._lazy import instead
from ctrlib.data.cells import Check, number, without_bad_rows
from ctrlib.data.quick import FLOAT32_MAX
from ctrlib.data.raw import RawData, read_raw
from ctrlib.data.slices import slices_of
from ctrlib.data.table import RawTable, is_cell
from ctrlib.errors import ArgumentError
from ctrlib.metrics.once import Scale
from ctrlib.schema import SchemaError

OF_SLICE = ("rows", "positives", "auc", "auc_se", "log_loss", "normalized_entropy", "calibration", "calibration_se")


@dataclass(frozen=True)
class Predictions:
    """Aligned columns, a row each; B rows."""

    name: str
    """What to call them."""
    label: str
    labels: np.ndarray
    """(B,) booleans."""
    scores: dict[str, np.ndarray]
    """Name -> (B,) floats."""
    scale: Scale = "probability"
    """What the scores are; of "order", any numbers that are greater where a click is more probable."""
    groups: np.ndarray | None = None
    """(B,) whole numbers, equal within a user."""
    group: str | None = None
    """What the column of groups is called."""
    weights: np.ndarray | None = None
    by: dict[str, pl.Series] = field(default_factory=dict)
    """Columns by whose values rows are told apart."""
    group_values: pl.Series | None = None
    """(B,) what groups are called, where their numbers are ours."""


def read_predictions(
    data: RawData,
    *,
    label: str,
    scores: Sequence[str],
    group: str | None = None,
    weight: str | None = None,
    by: Sequence[str] = (),
    scale: Scale = "probability",
) -> Predictions:
    """Predictions of a file, of a folder of parquet files, of a list of files, or of a frame, as `ctr.prepare` takes.

    Args:
        data: where they are.
        label: column of 0 and 1.
        scores: columns of scores, of one model each.
        group: column of users, for GAUC and for errors of rows that are not independent; numbers or text.
        weight: column of weights, 0 or more; rows of weight 0 do not count.
        by: columns by whose values rows are told apart.
        scale: what the scores are: "probability", "logit" (log-odds), or "order": numbers of which only the order
            counts.

    Raises:
        DataError: a cell is missing, no number, or out of range; the message names the row.
        SchemaError: there is no such column, or it holds lists.
        ValueError: no score is named, or one twice.

    >>> frame = pl.DataFrame({"click": [1, 0, 1], "p": [0.9, 0.2, 0.4]})
    >>> read_predictions(frame, label="click", scores=["p"]).scores["p"].tolist()
    [0.9, 0.2, 0.4]
    """
    if isinstance(scores, str) or not scores or len(set(scores)) < len(scores):
        raise ArgumentError(f"scores must be names of columns, each once, such as ['p'], got {scores!r}")
    if scale not in get_args(Scale):
        raise ArgumentError(f"scale must be one of {', '.join(get_args(Scale))}, got {scale!r}")
    columns = [label, *scores, *(name for name in (group, weight) if name is not None), *by]
    with tempfile.TemporaryDirectory(prefix="ctrlib-") as temporary:
        raw = read_raw(data, Path(temporary))
        dtypes = raw.dtypes
        if unknown := [name for name in dict.fromkeys(columns) if name not in dtypes]:
            raise SchemaError(f"{raw.name} has no columns {unknown}; {instead(unknown, dtypes)}")
        if nested := [name for name in dict.fromkeys(columns) if not is_cell(dtypes[name])]:
            raise SchemaError(f"{raw.name}: columns {nested} hold lists or bytes, expected a value in every row")
        without_bad_rows(raw, _checks(raw, label, scores, group, weight, scale), "raise")
        wanted = {"labels": number(label, dtypes[label]) == 1}
        for name in scores:
            wanted[f"score {name}"] = pl.col(name) if dtypes[name] == pl.Float32 else number(name, dtypes[name])
        if group is not None:
            wanted["groups"] = _codes(group, dtypes[group])
        if weight is not None:
            wanted["weights"] = number(weight, dtypes[weight])
        wanted |= {f"by {name}": pl.col(name) for name in by}
        frame = raw.gather(lambda piece: piece.select(value.alias(name) for name, value in wanted.items()))
        named = _numbers(raw, by)

    def taken(name: str) -> np.ndarray:
        return np.asarray(frame.drop_in_place(name).to_numpy())  # one by one: most are copied

    return Predictions(
        raw.name,
        label,
        taken("labels"),
        {name: taken(f"score {name}") for name in scores},
        scale,
        None if group is None else taken("groups"),
        group,
        None if weight is None else taken("weights"),
        {name: _typed(frame.drop_in_place(f"by {name}"), name in named).alias(name) for name in by},
    )


def _checks(
    raw: RawTable, label: str, scores: Sequence[str], group: str | None, weight: str | None, scale: Scale
) -> list[Check]:
    """What every row must satisfy."""
    dtypes = raw.dtypes

    def of_numbers(name: str, good: pl.Expr, expected: str) -> Check:
        return Check(name, ~good.fill_null(False), "", expected)

    value = number(label, dtypes[label])
    found = [of_numbers(label, value.is_in([0.0, 1.0]), "a label of 0 or 1 in every row: drop rows without one")]
    for name in scores:
        value = number(name, dtypes[name])
        if scale == "probability":
            expected = (
                "a probability from 0 to 1; say that scores are logits with --scale logit (scale='logit'), or that "
                "only their order counts with --scale order"
            )
            found.append(of_numbers(name, (value >= 0) & (value <= 1), expected))
        else:
            found.append(of_numbers(name, value.is_finite(), "a finite number"))
    if weight is not None:
        value = number(weight, dtypes[weight])
        found.append(of_numbers(weight, (value >= 0) & (value <= FLOAT32_MAX), "a finite weight, 0 or more"))
    if group is not None:
        value = pl.col(group).is_not_null()
        if dtypes[group].is_float():
            value &= pl.col(group).is_not_nan()
        found.append(of_numbers(group, value, "a group in every row: give rows without user one of their own"))
    return found


def _codes(name: str, dtype: pl.DataType) -> pl.Expr:
    """Groups as whole numbers."""
    if dtype.is_integer():
        return pl.col(name)
    return pl.col(name).cast(pl.String).cast(pl.Categorical).to_physical()


def _numbers(raw: RawTable, columns: Sequence[str]) -> set[str]:
    """Columns of a text file that hold numbers, and nothing else."""
    if not raw.parsed or not columns:
        return set()
    odd = raw.gather(
        lambda piece: piece.select(
            (pl.col(name).is_not_null() & pl.col(name).cast(pl.Float64, strict=False).is_null()).any()
            for name in dict.fromkeys(columns)
        )
    )
    return {name for name in odd.columns if not odd[name].any()}


def _typed(values: pl.Series, is_number: bool) -> pl.Series:
    return values.cast(pl.Float64) if is_number and values.n_unique() > 20 else values


def evaluate_predictions(predictions: Predictions) -> dict[str, Any]:
    """Every metric of predictions, as plain data but for the bins of `ctrlib.metrics.Reliability`.

    Returns:
        "data", "label" and "scale"; "scores", a line for each score of what `ctrlib.metrics.evaluate_scores` gives;
        "reliability", of each score its bins (none where only the order counts); "paired", for each two scores the test
        of their AUCs' difference, by groups if there are some, without weights; and "by", a line for each value of each
        column of `by`, and each score.

    >>> frame = pl.DataFrame({"click": [1, 0, 1, 0], "p": [0.9, 0.2, 0.4, 0.4], "shop": ["a", "a", "b", "b"]})
    >>> found = evaluate_predictions(read_predictions(frame, label="click", scores=["p"], by=["shop"]))
    >>> found["scores"][0]["auc"], [(line["value"], line["auc"]) for line in found["by"]]
    (0.875, [('a', 1.0), ('b', 0.5)])
    """
    one = predictions
    if one.weights is not None and not (one.weights > 0).any():
        raise ArgumentError(f"{one.name}: no row has weight: expected one or more")
    lines, bins = [], {}
    # Two at a time: sorting, which is most of it, lets other threads run.
    with ThreadPoolExecutor(2) as pool:
        whole = [
            pool.submit(
                metrics.evaluate_scores, one.labels, values, scale=one.scale, groups=one.groups, weights=one.weights
            )
            for values in one.scores.values()
        ]
        slices = [pool.submit(_slices, one, column, values) for column, values in one.by.items()]
        for name, future in zip(one.scores, whole):
            found, bins[name] = future.result()
            lines.append({"score": name, **found})
        result: dict[str, Any] = {"data": one.name, "label": one.label, "scale": one.scale, "scores": lines}
        result["reliability"] = bins if one.scale != "order" else {}
        result["paired"] = _paired(one)
        if one.by:
            result["by"] = [line for future in slices for line in future.result()]
    return result


def _paired(one: Predictions) -> list[dict[str, Any]]:
    if len(one.scores) < 2 or (one.weights is not None and not np.isin(one.weights, (0, 1)).all()):
        return []
    keep = slice(None) if one.weights is None else one.weights > 0
    groups = None if one.groups is None else one.groups[keep]
    scores = {name: values[keep] for name, values in one.scores.items()}
    return [
        {
            "score": a,
            "other": b,
            "difference": test.difference,
            "standard_error": test.standard_error,
            "p_value": test.p_value,
            "by_groups": groups is not None,
        }
        for (a, b), test in metrics.auc_paired_tests(one.labels[keep], scores, groups=groups).items()
    ]


def _slices(one: Predictions, column: str, values: pl.Series) -> list[dict[str, Any]]:
    names, codes = slices_of(values)
    found = []
    for code, value in enumerate(names):
        rows = codes == code
        weights = None if one.weights is None else one.weights[rows]
        if weights is not None and not (weights > 0).any():
            continue
        for name, scores in one.scores.items():
            report, _ = metrics.evaluate_scores(one.labels[rows], scores[rows], scale=one.scale, weights=weights)
            line = {key: report[key] for key in OF_SLICE if key in report}
            found.append({"column": column, "value": value, "score": name, **line})
    return found


def as_plain(found: dict[str, Any]) -> dict[str, Any]:
    """What `evaluate_predictions` gives, with bins as lists."""
    bins = {
        name: {part: getattr(one, part).tolist() for part in ("rows", "predicted", "observed", "by_chance")}
        for name, one in found["reliability"].items()
    }
    return {**found, "reliability": bins}
