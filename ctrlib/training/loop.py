"""Training epoch by epoch: an optional loop around an engine and loaders, which goes on where a killed run stood."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from ctrlib._json import to_json as to_json  # others take it from here
from ctrlib._lock import locked
from ctrlib.batch import Batch
from ctrlib.distributed import rank, total, world_size
from ctrlib.errors import ArgumentError, CtrlibError, check_batches, check_has
from ctrlib.training.average import renew_statistics
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.config import SelectBy, check_schedule
from ctrlib.training.evaluate import evaluate
from ctrlib.training.keeper import Batches, Engine, Keeper, Resumable
from ctrlib.training.progress import Epoch, Progress, known_weight
from ctrlib.training.tensor_files import CheckpointError
from ctrlib.training.trackers import Tracker, trackers_of

OnEpoch = Callable[[Epoch], None]


class NonFiniteLossError(CtrlibError, RuntimeError):
    """The loss of a batch is NaN or infinite. Raised before that batch touches a weight; says where."""


class LostProcessError(CtrlibError, RuntimeError):
    """Another process of the same training died, or did not answer in time."""


@dataclasses.dataclass
class History:
    """What `fit` did. `samples_per_second` counts training alone, loading included and validation not.

    `seconds` are of everything, those before a kill included, up to the checkpoint from which it went on.
    """

    epochs: list[Epoch] = dataclasses.field(default_factory=list)
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
    select_by: SelectBy = "auc",
    calibrate: bool = False,
    out: str | Path | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_seconds: float = 300.0,
    identity: dict[str, Any] | None = None,
    tensorboard: bool = False,
    on_epoch: OnEpoch | None = None,
    trackers: Sequence[Tracker] = (),
    console: Console | None = None,
) -> History:
    """Train until the validation score stops rising, and leave the best epoch's weights in the model.

    The schedule is BARS': validate after every epoch; an epoch that does not beat the best score (AUC) by more than
    `min_delta` multiplies the learning rate by `cut_factor`, and `patience` such epochs in a row end the run. With
    several labels the mean of their scores decides. Ctrl-C ends the run, and the best epoch so far is kept. `out`
    receives log.jsonl, a line an epoch (and, with `tensorboard`, event files).

    With `checkpoints`, everything that the rest of the run depends on is saved after every epoch and every
    `checkpoint_seconds` in between: weights, optimisers, the batches trained on, random generators, schedule, metrics.
    If there is a checkpoint already, the run goes on from there, and ends with the same bits as one that was never
    killed (with as many processes; with another number, up to the order of sums). SIGTERM saves after the step, or
    validation, in progress and ends the process with exit code 143.

    Args:
        engine: holds model and optimisers.
        train: training batches; iterated once an epoch. A `Loader`, if there are checkpoints.
        valid: validation batches. Their labels choose the epoch, so never pass test data here.
        max_epochs: upper limit.
        patience: epochs in a row without a better score before stopping.
        cut_factor: factor of the learning rate at each such epoch, at most 1.
        min_delta: smallest improvement of the score that counts; log-loss counts in nats.
        select_by: the score: "auc", "log_loss", or "gauc", for which the batches of `valid` must have groups.
        calibrate: whether the model is to be calibrated on validation in the end, so that its log-loss there, which
            may choose the epoch, is that after slope and intercept are fitted (`ctrlib.calibration`).
        out: folder for the log; made if missing.
        checkpoints: where to save and to go on from.
        checkpoint_seconds: at most so much work is lost, plus a step.
        identity: of the run, as plain data; a checkpoint of a run with another one is refused, and what differs named.
        on_epoch: is called after each epoch, with its line of the log; where training goes on, with those before, too.
            What it raises ends the run.
        tensorboard: also write TensorBoard events (needs the extra `ctrlib[tensorboard]`).
        trackers: whose `log` is called after each epoch; started already, and finished by the caller
            (`ctrlib.training.trackers`).
        console: where progress is shown; `Console(quiet=True)` for none.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite; the batch is saved under `out` and no weight has seen it.
        LostProcessError: another process died or hangs; start again to go on.
        LockedError: somebody else trains into `out`, or with these checkpoints; the message says who.
        ValueError: an argument is out of range; validation holds one class only, so that no epoch can be chosen, or no
            groups where they choose it; or the checkpoint is of another run.
    """
    check_has("an engine, such as ctrlib.ExactEngine(model)", ("train", "model", "state"), engine=engine)
    check_batches(("__iter__", "__len__"), train=train, valid=valid)
    check_schedule(max_epochs, patience, select_by, min_delta, cut_factor)
    out = None if out is None else Path(out)
    console = console or Console(stderr=True)
    keeper = Keeper(engine, train, checkpoints, identity or {}, console, seconds=checkpoint_seconds)
    with contextlib.ExitStack() as stack:
        for folder in (out, None if checkpoints is None else checkpoints.folder):
            stack.enter_context(locked(folder) if folder is not None and rank() == 0 else contextlib.nullcontext())
        stack.enter_context(keeper)
        stack.enter_context(_name_lost_processes())
        progress = keeper.progress()  # before the log is opened: that of another run stays as it is
        own = trackers_of(out, tensorboard) if rank() == 0 else []
        for tracker in own:
            stack.callback(tracker.finish, None)

        def tell(line: Epoch) -> None:
            for tracker in [*own, *trackers] if rank() == 0 else ():
                tracker.log(dataclasses.asdict(line), line.epoch)

        for line in progress.epochs:
            tell(line)
            if on_epoch is not None:
                on_epoch(line)
        while progress.stale < patience and len(progress.epochs) < max_epochs:
            number = len(progress.epochs) + 1
            try:
                if progress.batches < len(train):  # else only its validation was missing
                    keep = functools.partial(_save_batch, out)
                    train_epoch(engine, train, progress, keeper, f"epoch {number}", console, keep)
                validating = time.perf_counter()
                if getattr(engine, "averages", False):
                    renew_statistics(engine.model, _beginning(train), device=engine.device)
                scored = evaluate(
                    engine.model, valid, device=engine.device, quick=select_by != "gauc", calibrate=calibrate
                )
            except KeyboardInterrupt:
                if not progress.best_epoch:
                    raise
                console.print(f"stopped by hand in epoch {number}; epoch {progress.best_epoch} is kept")
                break
            if np.isnan(scored["auc"]):
                raise ArgumentError(
                    "validation holds one class only (or no known label), so AUC is undefined: use more rows"
                )
            score = _score_of(scored, select_by)
            line = Epoch(
                epoch=number,
                train_loss=progress.train_loss,
                valid_auc=scored["auc"],
                valid_log_loss=scored["log_loss"],
                learning_rate=engine.learning_rates[0],
                seconds=round(progress.seconds + time.perf_counter() - validating, 3),
                samples_per_second=round(progress.rows / progress.seconds, 1),
                valid_gauc=score if select_by == "gauc" else None,
            )
            better = score > progress.best_score + min_delta
            progress.end_epoch(line, score, better)
            tell(line)
            console.print(
                f"epoch {number:3d}  loss {line.train_loss:.5f}  valid AUC {line.valid_auc:.6f}  "
                f"log-loss {line.valid_log_loss:.5f}  "
                f"{'' if line.valid_gauc is None else f'GAUC {line.valid_gauc:.6f}  '}lr {line.learning_rate:.0e}  "
                f"{line.samples_per_second:,.0f} samples/s{'  *' if better else ''}",
                highlight=False,
                soft_wrap=True,
            )
            if not better:
                # None is brought below 1e-6, or raised to it.
                engine.learning_rates = [max(r * cut_factor, min(r, 1e-6)) for r in engine.learning_rates]
            keeper.save_epoch(progress, best=better)
            if on_epoch is not None:
                on_epoch(line)
        keeper.restore_best(progress)
    history = History(progress.epochs, progress.best_epoch)
    if progress.total_seconds:
        history.samples_per_second = round(progress.total_rows / progress.total_seconds, 1)
    history.seconds = round(progress.look_at_the_clock(), 3)
    return history


def _beginning(train: Batches) -> Iterator[Batch]:
    """Batches of the next epoch, which begins with them all the same."""
    state = train.state_dict() if hasattr(train, "state_dict") else None
    try:
        yield from train
    finally:
        if state is not None:
            cast(Resumable, train).load_state_dict(state)


def _score_of(scored: dict[str, Any], select_by: SelectBy) -> float:
    """The score that chooses the epoch, the higher the better.

    Raises:
        ArgumentError: it is GAUC, and validation has no groups, or none with both classes.
    """
    if select_by != "gauc":
        return float(scored["auc"] if select_by == "auc" else -scored["log_loss"])
    score = float(np.mean([task.get("gauc", math.nan) for task in scored.get("tasks", [scored])]))
    if math.isnan(score):
        raise ArgumentError(
            "select_by='gauc' (--select-by gauc) needs groups with both classes in validation, and there are none: "
            "prepare with group=... (--group), or choose by auc or log_loss"
        )
    return score


def train_epoch(
    engine: Engine,
    train: Batches,
    progress: Progress,
    keeper: Keeper,
    title: str,
    console: Console,
    keep: Callable[[Batch], str] = lambda batch: "",
) -> None:
    """One pass, or what is left of it; the sums go to `progress`.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite; `keep` gets the batch, and gives a sentence for the message.
    """
    engine.model.train()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    seconds, started = progress.seconds, time.perf_counter()
    # Only where somebody watches: in a log file the line per epoch says it all.
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(train), completed=progress.batches, loss="")
        for batch, loss in engine.train(keeper.count(train)):
            value = loss.item()
            if not np.isfinite(value):
                raise NonFiniteLossError(
                    f"{title}, batch {progress.batches}: the loss is {value}; no weight was changed by this batch."
                    f"{keep(batch)} Usual causes: a learning rate that is too high, or numeric features without a "
                    "transform"
                )
            progress.add(value, batch.size * world_size(), total(known_weight(batch)))
            progress.seconds = seconds + time.perf_counter() - started
            bar.update(task, advance=1, loss=f"loss {value:.4f}")
            keeper.save_if_due(progress)


# What gloo and nccl say when the other side of a connection is gone, or silent.
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    *("Timed out", "timed out", "timeout", "NCCL"),
)


@contextlib.contextmanager
def _name_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or isinstance(error, CheckpointError) or not any(text in str(error) for text in _LOST):
            raise
        raise LostProcessError(
            "another process of this training died or does not answer; this one ends too. Start the same command again "
            "to go on from the newest checkpoint, if it keeps any (torchrun --max-restarts does so by itself). "
            f"What the connection said: {error}"
        ) from error


def _save_batch(out: Path | None, batch: Batch) -> str:
    if out is None:
        return " Pass out= to have the batch saved."
    path = out / ("non_finite_batch.pt" if world_size() == 1 else f"non_finite_batch.rank-{rank()}.pt")
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
    return f" The batch is saved as {path} (read it with torch.load(..., weights_only=True))."
