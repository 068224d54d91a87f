"""Fit, evaluate and predict: optional loops around an engine and a loader. A model works without them."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ctrlib import metrics
from ctrlib.batch import Batch


class Batches(Sized, Protocol):
    """What the loops need of a loader: a length, and a new epoch of batches at every iteration."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one epoch."""
        ...


class Engine(Protocol):
    """What `fit` needs of an engine; `ExactEngine` documents the meaning."""

    name: str
    model: nn.Module
    device: torch.device

    @property
    def learning_rate(self) -> float: ...  # noqa: D102
    def step(self, batch: Batch) -> Tensor: ...  # noqa: D102
    def scale_learning_rate(self, factor: float, *, minimum: float = 0.0) -> None: ...  # noqa: D102
    def weights(self) -> dict[str, Tensor]: ...  # noqa: D102
    def load_weights(self, weights: dict[str, Tensor]) -> None: ...  # noqa: D102


class NonFiniteLossError(RuntimeError):
    """The loss of a batch is NaN or infinite. Raised before that batch touches a weight; says where."""


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve. Losses in nats, times in seconds."""

    epoch: int
    train_loss: float
    valid_auc: float
    valid_log_loss: float
    learning_rate: float
    seconds: float
    samples_per_second: float


@dataclass
class History:
    """What `fit` did. `samples_per_second` counts training alone, loading included and validation not."""

    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    samples_per_second: float = float("nan")
    seconds: float = 0.0


def fit(
    engine: Engine,
    train: Batches,
    valid: Batches,
    *,
    max_epochs: int = 100,
    patience: int = 2,
    cut_factor: float = 0.1,
    min_delta: float = 1e-6,
    out: str | Path | None = None,
    tensorboard: bool = False,
    console: Console | None = None,
) -> History:
    """Train until validation AUC stops rising, and leave the best epoch's weights in the model.

    The schedule is BARS': validate after every epoch; an epoch that does not beat the best AUC by more than `min_delta`
    multiplies the learning rate by `cut_factor`, and `patience` such epochs in a row end the run. With several labels
    the mean of their AUCs decides. Ctrl-C ends the run, and the best epoch so far is kept. `out` receives log.jsonl, a
    line an epoch (and, with `tensorboard`, event files).

    Args:
        engine: holds model and optimisers.
        train: training batches; iterated once an epoch.
        valid: validation batches. Their labels choose the epoch, so never pass test data here.
        max_epochs: upper limit.
        patience: epochs in a row without a better AUC before stopping.
        cut_factor: factor of the learning rate at each such epoch.
        min_delta: smallest rise of AUC that counts.
        out: folder for the log; made if missing.
        tensorboard: also write TensorBoard events (needs the extra `ctrlib[tensorboard]`).
        console: where progress is shown; `Console(quiet=True)` for none.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite; the batch is saved under `out` and no weight has seen it.
        ValueError: validation holds one class only, so that no epoch can be chosen.
    """
    out = None if out is None else Path(out)
    console = console or Console(stderr=True)
    history = History()
    best, best_weights, stale, rows, train_seconds = float("-inf"), engine.weights(), 0, 0, 0.0
    started = time.perf_counter()
    with _Log(out, tensorboard) as log:
        for epoch in range(1, max_epochs + 1):
            epoch_started = time.perf_counter()
            try:
                loss, epoch_rows = _train_epoch(engine, train, f"epoch {epoch}", out, console)
                epoch_seconds = time.perf_counter() - epoch_started
                scored = evaluate(engine.model, valid, device=engine.device, quick=True)
            except KeyboardInterrupt:
                if not history.best_epoch:
                    raise
                console.print(f"stopped by hand in epoch {epoch}; epoch {history.best_epoch} is kept")
                break
            rows, train_seconds = rows + epoch_rows, train_seconds + epoch_seconds
            if np.isnan(scored["auc"]):
                raise ValueError(
                    "validation holds one class only (or no known label), so AUC is undefined: use more rows"
                )
            line = Epoch(
                epoch=epoch,
                train_loss=loss,
                valid_auc=scored["auc"],
                valid_log_loss=scored["log_loss"],
                learning_rate=engine.learning_rate,
                seconds=round(time.perf_counter() - epoch_started, 3),
                samples_per_second=round(epoch_rows / epoch_seconds, 1),
            )
            history.epochs.append(line)
            log.write(line)
            better = line.valid_auc > best + min_delta
            console.print(
                f"epoch {epoch:3d}  loss {loss:.5f}  valid AUC {line.valid_auc:.6f}  "
                f"log-loss {line.valid_log_loss:.5f}  lr {line.learning_rate:.0e}  "
                f"{line.samples_per_second:,.0f} samples/s{'  *' if better else ''}",
                highlight=False,
                soft_wrap=True,
            )
            if better:
                best, best_weights, stale, history.best_epoch = line.valid_auc, engine.weights(), 0, epoch
            else:
                stale += 1
                engine.scale_learning_rate(cut_factor, minimum=1e-6)
                if stale >= patience:
                    break
    engine.load_weights(best_weights)
    history.samples_per_second = round(rows / train_seconds, 1) if train_seconds else float("nan")
    history.seconds = round(time.perf_counter() - started, 3)
    return history


def _train_epoch(engine: Engine, train: Batches, title: str, out: Path | None, console: Console) -> tuple[float, int]:
    """One pass; returns the mean loss over rows, and the number of rows."""
    engine.model.train()
    total, rows = 0.0, 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    # Only where somebody watches: in a log file the line per epoch says it all.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(train), loss="")
        for index, batch in enumerate(train):
            loss = engine.step(batch).item()
            if not np.isfinite(loss):
                where = _save_batch(batch, out)
                raise NonFiniteLossError(
                    f"{title}, batch {index}: the loss is {loss}; no weight was changed by this batch. {where} "
                    "Usual causes: a learning rate that is too high, or numeric features without a transform"
                )
            total += loss * batch.size
            rows += batch.size
            bar.update(task, advance=1, loss=f"loss {loss:.4f}")
    return total / max(rows, 1), rows


def _save_batch(batch: Batch, out: Path | None) -> str:
    if out is None:
        return "Pass out= to have the batch saved."
    path = out / "non_finite_batch.pt"
    tensors = {
        "keys": batch.sparse.keys(),
        "values": batch.sparse.values(),
        "lengths": batch.sparse.lengths(),
        "dense": batch.dense,
        "labels": batch.labels,
        "weights": batch.weights,
    }
    out.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)
    return f"The batch is saved as {path} (read it with torch.load(..., weights_only=True))."


@dataclass(frozen=True)
class Scores:
    """Aligned arrays, a row each: logits and labels (rows, T), weights (rows,), groups (rows,) or None."""

    logits: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    groups: np.ndarray | None


def predict(model: nn.Module, batches: Batches, *, device: str | torch.device = "cpu") -> Scores:
    """Score every row, in the loader's order, in evaluation mode and without gradients.

    Memory: about 12 bytes a row with one label.
    """
    device = torch.device(device)
    was_training = model.training
    model.eval()
    parts: list[tuple[np.ndarray, ...]] = []
    with torch.no_grad():  # not inference_mode: fbgemm's fused CPU kernels exist below autograd only
        for batch in batches:
            logits = model(batch.to(device)).float().cpu().numpy()
            group = batch.group if batch.group is not None else torch.empty(0, dtype=torch.int64)
            parts.append((logits, *(t.cpu().numpy() for t in (batch.labels, batch.weights, group))))
    model.train(was_training)
    if not parts:
        raise ValueError("there is nothing to score: the loader gave no batch")
    logits, labels, weights, groups = (np.concatenate(columns) for columns in zip(*parts))
    return Scores(logits, labels, weights, groups if len(groups) == len(logits) else None)


def evaluate(
    model: nn.Module, batches: Batches, *, device: str | torch.device = "cpu", quick: bool = False
) -> dict[str, Any]:
    """Metrics of a model on labelled batches, for one label those of `ctrlib.metrics.evaluate_binary`.

    For several labels "auc" and "log_loss" are the means over labels and "tasks" lists each label's metrics in order.
    `quick` computes AUC and log-loss only. Rows of weight 0 and missing labels are left out.
    """
    return score(predict(model, batches, device=device), quick=quick)


def score(scores: Scores, *, quick: bool = False) -> dict[str, Any]:
    """The metrics of `evaluate`, of rows that are scored already."""
    tasks = [_evaluate_task(scores, task, quick) for task in range(scores.labels.shape[1])]
    if len(tasks) == 1:
        return tasks[0]
    means = {name: float(np.mean([task[name] for task in tasks])) for name in ("auc", "log_loss")}
    return {**means, "tasks": tasks}


def _evaluate_task(scores: Scores, task: int, quick: bool) -> dict[str, Any]:
    labels, logits = scores.labels[:, task], scores.logits[:, task]
    keep = ~np.isnan(labels) & (scores.weights > 0)
    labels, logits, weights = labels[keep], logits[keep], scores.weights[keep]
    groups = None if scores.groups is None else scores.groups[keep]
    uniform = weights.size == 0 or bool((weights == weights[0]).all())
    sample_weights = None if uniform else weights
    if quick:
        return {
            "auc": metrics.auc(labels, logits, sample_weights),
            "log_loss": metrics.log_loss(labels, logits, sample_weights),
        }
    return dict(metrics.evaluate_binary(labels, logits, groups=groups, weights=sample_weights))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: an undefined metric (NaN), which JSON cannot say, is null.

    >>> to_json({"auc": float("nan"), "rows": [1, 2.5]})
    '{"auc": null, "rows": [1, 2.5]}'
    """

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [plain(part) for part in item]
        return None if isinstance(item, float) and not np.isfinite(item) else item

    return json.dumps(plain(value), indent=indent, allow_nan=False)


class _Log:
    """log.jsonl, and TensorBoard events if asked for."""

    def __init__(self, out: Path | None, tensorboard: bool) -> None:
        self._file = None
        self._events: Any = None
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            self._file = (out / "log.jsonl").open("w", encoding="utf-8")
        if tensorboard:
            if out is None:
                raise ValueError("tensorboard=True needs out=, the folder for the event files")
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    f"TensorBoard is not installed ({error}): pip install 'ctrlib[tensorboard]'"
                ) from error
            self._events = SummaryWriter(str(out))

    def write(self, line: Epoch) -> None:
        values = dataclasses.asdict(line)
        if self._file is not None:
            self._file.write(to_json(values) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, line.epoch)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
