"""Scoring: predictions row by row, and their metrics, over the batches of one process or of many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ctrlib import metrics
from ctrlib.batch import Batch
from ctrlib.calibration import Calibration, fit_calibration
from ctrlib.data.loader import Loader
from ctrlib.distributed import broadcast, gather_to_first
from ctrlib.errors import ArgumentError, check_batches, check_type
from ctrlib.metrics.probability import sigmoid


@dataclass(frozen=True)
class Scores:
    """Aligned arrays, a row each: logits and labels (rows, T), weights (rows,), groups (rows,) or None."""

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    groups: np.ndarray | None


def predict(model: nn.Module, batches: Iterable[Batch], *, device: str | torch.device = "cpu") -> Scores:
    """Score every row, in the loader's order, in evaluation mode and without gradients.

    Of several processes, each scores its own batches; they must have equally many. Memory: about 12 bytes a row with
    one label.
    """
    check_type("a torch module; a model folder is for ctrlib.Predictor", nn.Module, model=model)
    check_batches(batches=batches)
    device = torch.device(device)
    was_training = model.training
    model.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    with torch.no_grad():  # not inference_mode: fbgemm's fused CPU kernels exist below autograd only
        for batch in batches:
            check_type("what gives Batches", Batch, batches=batch)
            logits = model(batch.to(device)).float().cpu().numpy()
            group = batch.group if batch.group is not None else torch.empty(0, dtype=torch.int64)
            parts.append((logits, *(t.cpu().numpy() for t in (batch.labels, batch.weights, group))))
    model.train(was_training)
    if not parts:
        raise ArgumentError("there is nothing to score: the loader gave no batch")
    logits, labels, weights, groups = (np.concatenate(columns) for columns in zip(*parts))
    return Scores(logits, labels, weights, groups if len(groups) == len(logits) else None)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: str | torch.device = "cpu",
    quick: bool = False,
    calibrate: bool = False,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Metrics of a model on labelled batches, for one label those of `ctrlib.metrics.evaluate_binary`.

    With the groups of rows (`Batch.group`, which a `Loader` that does not shuffle fills where the schema names a group)
    GAUC is among them. For several labels "auc" and "log_loss" are the means over labels and "tasks" lists each label's
    metrics in order; each says first which "label" it is of: by `labels`, or by the schema of a `Loader`.
    `quick` computes AUC and log-loss only. With `calibrate` the log-loss is that after the slope and intercept that fit
    these rows best (`ctrlib.calibration`), of several labels the mean. Rows of weight 0 and missing labels are left
    out. Of several processes, all get the metrics of all their rows.
    """
    if labels is None and isinstance(batches, Loader):
        labels = batches.schema.labels
    return score(predict(model, batches, device=device), quick=quick, calibrate=calibrate, labels=labels)


def score(
    scores: Scores, *, quick: bool = False, calibrate: bool = False, labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """The metrics of `evaluate`, of rows that are scored already. Of several processes, every one must call it."""
    parts = gather_to_first(scores)
    return dict(broadcast(_score(_concatenate(parts), quick, calibrate, labels) if parts else {}))


def whole(scores: Scores) -> Scores | None:
    """Those of all processes together, on the first one; elsewhere None. Every process must call it."""
    parts = gather_to_first(scores)
    return _concatenate(parts) if parts else None


def calibrated(scores: Scores, calibration: Calibration) -> Scores:
    """The same rows with calibrated logits, bit for bit those of a model that has this calibrator."""
    return replace(scores, logits=calibration(torch.from_numpy(scores.logits)).numpy())


def calibration_of(scores: Scores, num_labels: int) -> Calibration:
    """The calibrator that fits the predictions of all processes together; every process must call it, and gets it."""
    found: dict[str, Any] = {}
    if (together := whole(scores)) is not None:
        found |= fit_calibration(together.logits, together.labels, together.weights).as_dict()
    return Calibration.of(broadcast(found), num_labels)


def reliability_of(scores: Scores, labels: Sequence[str]) -> dict[str, metrics.Reliability]:
    """What was predicted and what came, of each label."""
    found = {}
    for task, label in enumerate(labels):
        y, z, _, weights = known(scores, task)
        found[label] = metrics.reliability(y, sigmoid(z), weights)
    return found


def known(scores: Scores, task: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Of the rows with weight whose label is known: labels, logits, groups or None, weights (None if all are alike)."""
    labels, logits = scores.labels[:, task], scores.logits[:, task]
    keep = are_known(labels, scores.weights)
    groups = None if scores.groups is None else scores.groups[keep]
    return labels[keep], logits[keep], groups, unless_uniform(scores.weights[keep])


def are_known(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Which rows of one label count: those that have it, and weight.

    >>> are_known(np.array([1.0, np.nan, 0.0]), np.array([1.0, 1.0, 0.0]))
    array([ True, False, False])
    """
    return np.asarray(~np.isnan(labels) & (weights > 0))


def unless_uniform(weights: np.ndarray) -> np.ndarray | None:
    """None where all are alike, as metrics want it.

    >>> unless_uniform(np.array([2.0, 2.0])), unless_uniform(np.array([1.0, 2.0]))
    (None, array([1., 2.]))
    """
    return None if len(weights) == 0 or bool((weights == weights[0]).all()) else weights


def _concatenate(parts: list[Scores]) -> Scores:
    if len(parts) == 1:
        return parts[0]
    logits, labels, weights = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("logits", "labels", "weights")
    )
    groups = [part.groups for part in parts if part.groups is not None]
    return Scores(logits, labels, weights, np.concatenate(groups) if len(groups) == len(parts) else None)


def _score(scores: Scores, quick: bool, calibrate: bool, labels: Sequence[str] | None) -> dict[str, Any]:
    tasks = [_evaluate_task(scores, task, quick) for task in range(scores.labels.shape[1])]
    # AUC is NaN where a label has one class only, by which nothing can be fitted; it is the same after calibration.
    if calibrate and not any(np.isnan(task["auc"]) for task in tasks):
        after = calibrated(scores, fit_calibration(scores.logits, scores.labels, scores.weights))
        for number, task in enumerate(tasks):
            y, z, _, weights = known(after, number)
            task["log_loss"] = metrics.log_loss(y, z, weights)
    if len(tasks) == 1:
        return tasks[0]
    means = {name: float(np.mean([task[name] for task in tasks])) for name in ("auc", "log_loss")}
    if labels is not None:
        tasks = [{"label": name, **task} for name, task in zip(labels, tasks, strict=True)]
    return {**means, "tasks": tasks}


def _evaluate_task(scores: Scores, task: int, quick: bool) -> dict[str, Any]:
    labels, logits, groups, sample_weights = known(scores, task)
    if quick:
        return {
            "auc": metrics.auc(labels, logits, sample_weights),
            "log_loss": metrics.log_loss(labels, logits, sample_weights),
        }
    return dict(metrics.evaluate_binary(labels, logits, groups=groups, weights=sample_weights))
