"""Folders of runs, read to be looked at: what they reached, how they got there, and what they predict."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrlib._target import is_unfinished, kind_of
from ctrlib.analysis.predictions import Predictions
from ctrlib.data.loader import Loader
from ctrlib.errors import ArgumentError
from ctrlib.making import settle
from ctrlib.metrics.probability import sigmoid
from ctrlib.schema import SchemaError
from ctrlib.serving.predictor import Predictor
from ctrlib.serving.slices import prepared_groups, prepared_values
from ctrlib.training.evaluate import Scores, are_known, predict, unless_uniform
from ctrlib.training.record import load_record

RESULTS = ("metrics.json", "search.json", "compression.json", "retrieval.json")  # the one of them that a folder has


@dataclass(frozen=True)
class Run:
    """What a folder holds of a run."""

    name: str
    folder: Path
    model: str
    result: dict[str, Any]
    """What was reported when it was over; empty for a model that was saved without."""
    epochs: list[dict[str, Any]]
    """Lines of log.jsonl."""
    record: dict[str, Any] | None = None
    """As `ctrlib.training.record` has it; None of a run that is not over, or of an earlier version."""
    is_over: bool = True


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in folders, by names that tell them apart: the last parts of their paths, as many as that takes.

    Raises:
        SchemaError: a folder holds no run, or a damaged file.
        ArgumentError: a folder is given twice.
    """
    paths = [Path(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ArgumentError(f"{', '.join(map(str, paths))}: give each folder once")
    longest = max(len(path.resolve().parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.resolve().parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [_load(path, name) for path, name in zip(paths, names)]


def _load(folder: Path, name: str) -> Run:
    settle(folder)
    has_model = (folder / "model.json").is_file()
    results = [file for file in RESULTS if (folder / file).is_file()]
    at_work = is_unfinished(folder) and kind_of(folder) in ("run", "model", "search")
    if not has_model and not results and not at_work:
        what = "holds neither model.json nor metrics.json" if folder.is_dir() else "is no folder"
        raise SchemaError(f"{folder} {what}: expected a folder that `ctrlib train --out` has written")
    described = _read(folder / "model.json") if has_model else {}
    result = {} if not results or at_work else _read(folder / results[0])
    if results and results[0] == "retrieval.json":
        result, described = result["record"], {"model": result["config"]["method"]}
    log = folder / "log.jsonl"
    epochs = [_parse(log, line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    record = None if at_work else load_record(folder)
    return Run(name, folder, _name_of(described) or str(result.get("model", "")), result, epochs, record, not at_work)


def _name_of(described: dict[str, Any]) -> str:
    model = described.get("model", "")
    return model if isinstance(model, str) else str(next(iter(model), "")) if isinstance(model, dict) else ""


def _read(path: Path) -> dict[str, Any]:
    return _parse(path, path.read_text(encoding="utf-8"))


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{path} is damaged ({error}): copy it again, or train again") from error


def score_runs(
    runs: Sequence[Run],
    data: str | Path | Sequence[str | Path],
    *,
    split: str | None = "test",
    by: Sequence[str] = (),
    batch_size: int = 8192,
    with_groups: bool = False,
) -> list[Predictions]:
    """What the models of runs predict for the same rows, as logits: one `Predictions` for each label.

    Args:
        runs: whose folders hold models.
        data: a prepared folder, or raw files.
        split: of the prepared folder; None where `data` is raw.
        by: columns by whose values rows are told apart: of a prepared folder features with one id a row, or the group.
        batch_size: rows per step.
        with_groups: whether to find out what groups are called, for `scores_frame`.

    Raises:
        SchemaError: a folder holds no model, or the data do not fit one.
        ArgumentError: the models have other labels, or see other rows.
    """
    predictors = {}
    for run in runs:
        if not (run.folder / "model.json").is_file():
            raise SchemaError(f"{run.folder} holds no model.json: there is nothing that could score rows")
        predictors[run.name] = Predictor.load(run.folder)
    first = next(iter(predictors.values()))
    scored: dict[str, Scores] = {}
    values: dict[str, pl.Series] = {}
    called: pl.Series | None = None
    group = first.schema.group if with_groups else None
    for name, predictor in predictors.items():
        if predictor.schema.labels != first.schema.labels:
            raise ArgumentError(
                f"{name} predicts {', '.join(predictor.schema.labels)}, and {runs[0].name} "
                f"{', '.join(first.schema.labels)}: give runs of the same labels"
            )
        if split is not None:
            assert isinstance(data, str | Path)
            schema = predictor.check_prepared(data)
            values = values or {one: prepared_values(Path(data), split, schema, one) for one in by}
            called = prepared_groups(Path(data), split) if called is None and group else called
            scored[name] = predict(predictor.model, Loader(data, split, batch_size=batch_size))
        else:
            keep = tuple(dict.fromkeys([*by, *([group] if group else [])]))
            scored[name], kept, _ = predictor.score(data, batch_size=batch_size, keep=keep)
            values = values or {one: kept[one] for one in by}
            called = kept[group] if group else None
    return _predictions(scored, values, called, first, data)


def _predictions(
    scored: dict[str, Scores], values: dict[str, pl.Series], called: pl.Series | None, first: Predictor, data: Any
) -> list[Predictions]:
    one = next(iter(scored.values()))
    for name, other in scored.items():
        if not np.array_equal(other.labels, one.labels, equal_nan=True):
            raise ArgumentError(
                f"{name} and {next(iter(scored))} see other labels in {data}: give runs of the same data"
            )
    found = []
    for task, label in enumerate(first.schema.labels):
        keep = are_known(one.labels[:, task], one.weights)
        if not keep.any():
            raise ArgumentError(f"no row of {data} has a known label {label} and weight: expected one or more")
        weights = unless_uniform(one.weights[keep])
        for name, scores in scored.items():
            bad = ~np.isfinite(scores.logits[:, task])
            if bad.any():
                row, score = int(np.argmax(bad)), scores.logits[np.argmax(bad), task]
                raise ArgumentError(f"{name} gives {score} for row {row + 1} of {data}, which is no score")
        found.append(
            Predictions(
                str(data),
                label,
                one.labels[keep, task] == 1,
                {name: scores.logits[keep, task] for name, scores in scored.items()},
                "logit",
                None if one.groups is None else one.groups[keep],
                first.schema.group if one.groups is not None else None,
                weights,
                {name: column.filter(pl.Series(keep)) for name, column in values.items()},
                None if called is None else called.filter(pl.Series(keep)),
            )
        )
    return found


def scores_frame(evaluated: Sequence[Predictions]) -> pl.DataFrame:
    """Predictions as a table that `ctrlib evaluate` reads: label, group, the columns of `by`, and probabilities.

    With several labels, a row for each row and label, whose name stands in a column "label".

    >>> one = Predictions("x", "click", np.array([True]), {"fm": np.array([0.0])}, "logit")
    >>> scores_frame([one]).to_dicts()
    [{'click': 1, 'fm': 0.5}]
    """
    frames = []
    for one in evaluated:
        several = len(evaluated) > 1
        columns: dict[str, Any] = {"label": [one.label] * len(one.labels)} if several else {}
        columns["value" if several else one.label] = one.labels.astype(np.int8)
        if one.groups is not None:
            columns[one.group or "group"] = one.groups if one.group_values is None else one.group_values
        columns |= {name: values for name, values in one.by.items() if name not in columns}
        if one.weights is not None:
            columns["weight"] = one.weights
        for name, scores in one.scores.items():
            columns[name] = sigmoid(scores) if one.scale == "logit" else scores
        frames.append(pl.DataFrame(columns))
    return pl.concat(frames)


def finite(value: Any) -> float | None:
    """A number of a result, None where it is missing or undefined.

    >>> finite(0.5), finite(math.nan), finite("fm")
    (0.5, None, None)
    """
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
