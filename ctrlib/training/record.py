"""The record of a run, one form for all tasks: what was run on what, how it was judged, and what it reached.

`ctrlib train`, `search` and `compress` write it into metrics.json, search.json and compression.json, `ctrlib retrieve
train` into the record of retrieval.json, each under "run_record". Whatever compares what runs have measured reads this.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrlib import metrics
from ctrlib._json import to_json
from ctrlib.distributed import broadcast
from ctrlib.schema import Schema, SchemaError
from ctrlib.training.config import name_of
from ctrlib.training.evaluate import Scores, known

VERSION = 1
KEY = "run_record"
FILES = ("metrics.json", "search.json", "compression.json", "retrieval.json")  # one of which a run's folder has
MEASURED = (
    ("auc", "auc_se", "auc_se_groups"),
    ("gauc", "gauc_se", "gauc_se"),
    ("log_loss", "log_loss_se", "log_loss_se_groups"),
    ("calibration", "calibration_se", "calibration_se"),
)


def record_of(
    *,
    task: str,
    model: str,
    engine: str,
    seed: int,
    data: str,
    schema_hash: str,
    rows_hash: str,
    chosen_by: str,
    independent: str,
    measured: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A record as plain data; what is not finite is None.

    Args:
        task: "ctr" or "retrieval".
        model: its name.
        engine: that trained it; "" where there is one only.
        seed: of the run.
        data: where the data were.
        schema_hash: of how they were prepared; "" where they were not.
        rows_hash: of their rows, split included: what runs must share to be compared.
        chosen_by: the score that chose the epoch, and of which split: "valid auc".
        independent: what standard errors take as independent draws: "rows", or what the groups are called.
        measured: lines of `line_of`.

    >>> line = line_of("click", "auc", 0.75, 0.01)
    >>> names = {"task": "ctr", "model": "fm", "engine": "exact", "seed": 0, "data": "data/clicks"}
    >>> names |= {"schema_hash": "1", "rows_hash": "2", "chosen_by": "valid auc", "independent": "rows"}
    >>> list(record_of(**names, measured=[line]))[-3:]
    ['chosen_by', 'independent', 'metrics']
    """
    record = {
        "version": VERSION,
        "task": task,
        "model": model,
        "engine": engine,
        "seed": seed,
        "data": data,
        "schema_hash": schema_hash,
        "rows_hash": rows_hash,
        "chosen_by": chosen_by,
        "independent": independent,
        "metrics": list(measured),
    }
    return dict(json.loads(to_json(record)))


def line_of(label: str, metric: str, value: float, error: float, split: str = "test") -> dict[str, Any]:
    """One measured number, with its 95 % interval.

    >>> line_of("click", "auc", 0.75, 0.01)["low"]
    0.7304
    """
    half = 1.96 * error
    return {
        "split": split,
        "label": label,
        "metric": metric,
        "value": value,
        "standard_error": error,
        "low": value - half,
        "high": value + half,
    }


def measured_on(scores: Scores, schema: Schema, split: str) -> tuple[str, list[dict[str, Any]]]:
    """What is independent, and AUC, GAUC, log-loss and calibration of each label with their intervals.

    Users are independent where there are some; calibration's error is that of exact probabilities by chance, of rows.
    """
    lines = []
    for task, label in enumerate(schema.labels):
        labels, logits, groups, weights = known(scores, task)
        if not len(labels):
            continue
        found, _ = metrics.evaluate_scores(labels, logits, scale="logit", groups=groups, weights=weights)
        for metric, of_rows, of_groups in MEASURED:
            if metric in found:
                error = found.get(of_groups if groups is not None else of_rows, math.nan)
                lines.append(line_of(label, metric, found[metric], error, split))
    return (schema.group if scores.groups is not None and schema.group else "rows"), lines


def recorded(
    config: Mapping[str, Any],
    schema: Schema,
    scored: Scores | None,
    *,
    split: str = "test",
    data: Path,
    rows_hash: str,
) -> dict[str, Any]:
    """The record of a run that is over, for every process; each must call it.

    `scored` is of all rows of the split, on the first process; elsewhere None.
    """
    found: dict[str, Any] = {}
    if scored is not None:
        training = config["training"]
        independent, measured = measured_on(scored, schema, split)
        found = record_of(
            task="ctr",
            model=name_of(config),
            engine=training["engine"],
            seed=training["seed"],
            data=str(data),
            schema_hash=schema.hash,
            rows_hash=rows_hash,
            chosen_by=f"valid {training['select_by']}",
            independent=independent,
            measured=measured,
        )
    return dict(broadcast(found))


def load_record(folder: str | Path) -> dict[str, Any] | None:
    """The record of a run's folder; None if it has none, being of an earlier version, or no run.

    Raises:
        SchemaError: its file is damaged.
    """
    for name in FILES:
        path = Path(folder) / name
        if not path.is_file():
            continue
        try:
            said = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise SchemaError(f"{path} is damaged ({error}): copy it again, or run it again") from error
        inner = said["record"] if name == "retrieval.json" else said
        found = inner.get(KEY)
        if found is not None:
            return dict(found)
    return None
