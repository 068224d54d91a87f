"""The evaluation protocol: train, choose by validation, report test once, write it all down.

`run` goes the whole road; a search, a compression or a recipe whose model comes from elsewhere takes the same steps:
`ctrlib.training.splits.load_splits`, `train_model`, `score_once`, `write_result`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import nn

from ctrlib import models, plots
from ctrlib._lock import holding
from ctrlib._target import FINISHED, check_target
from ctrlib.calibration import Calibration
from ctrlib.data.facts import facts_of
from ctrlib.data.loader import Loader
from ctrlib.distributed import broadcast, init_process_group, rank, world_size
from ctrlib.errors import ArgumentError, WrongTypeError, check_path, shown
from ctrlib.losses import after_sampling, binary_cross_entropy
from ctrlib.making import new_file, write_text
from ctrlib.model import Model
from ctrlib.models.build import check_calibratable
from ctrlib.schema import SchemaError
from ctrlib.sharding.plan import load_plan, save_plan
from ctrlib.structure import describe
from ctrlib.training.baselines import compare, remarks
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.config import (
    Training,
    complete,
    counted_anew,
    identity_of,
    name_of,
    training_of,
)
from ctrlib.training.crossing import crossed
from ctrlib.training.engines import choose_device, make_engine
from ctrlib.training.evaluate import Scores, calibrated, calibration_of, predict, reliability_of, score, whole
from ctrlib.training.finished import finish, finished
from ctrlib.training.fused import FusedEngine
from ctrlib.training.guard import Loss
from ctrlib.training.keeper import Engine
from ctrlib.training.loop import History, OnEpoch, fit, to_json
from ctrlib.training.record import KEY, recorded
from ctrlib.training.splits import load_to_score, load_train_and_valid
from ctrlib.training.trackers import Tracker, finishing


def start_at_base_rate(model: Model, data: str | Path) -> None:
    """Let a new model's head start at the labels' rates in the train split of a prepared folder.

    Otherwise the first steps, of a rare label many, do little else than bring all scores down to its rate.

    Raises:
        ValueError: the head has no such start.
    """
    start_at = getattr(model.head, "start_at", None)
    if start_at is None:
        raise ArgumentError(
            f"start_at_base_rate: {type(model.head).__name__} has no method start_at(rates), which sets its biases: "
            "give it one, as LinearHead has it, or leave start_at_base_rate out"
        )
    start_at(torch.tensor(facts_of(data).rates, dtype=torch.float32))


def train_model(
    model: Model,
    how: Training,
    train: Loader,
    valid: Loader,
    *,
    out: Path | None = None,
    identity: dict[str, Any] | None = None,
    asynchronous_checkpoints: bool = False,
    tensorboard: bool = False,
    on_epoch: OnEpoch | None = None,
    trackers: Sequence[Tracker] = (),
    console: Console | None = None,
) -> tuple[Engine, History]:
    """Train a model; the engine's model is left with the weights that validation chose.

    `out` receives log.jsonl and, while it trains, checkpoints: started again there with the same `identity`, it goes on
    (`fit`). They are there until the caller, who has saved the model, removes them.

    Raises:
        ValueError: what `how` says does not fit, or `out` holds the checkpoints of another run.
    """
    started = time.perf_counter()
    console = console or Console(stderr=True)
    loss: Loss = binary_cross_entropy
    if how.keep_negatives < 1:
        loss = functools.partial(after_sampling, keep_negatives=how.keep_negatives)
    engine = make_engine(
        model,
        how.engine,
        learning_rate=how.learning_rate,
        embedding_l2=how.embedding_l2,
        network_l2=how.network_l2,
        average_weights=how.average_weights,
        embedding_learning_rate=how.embedding_learning_rate,
        precision=how.precision,
        sharding=cast(Any, how.sharding),  # `make_engine` looks at it
        plan=None if how.plan is None else load_plan(how.plan),
        check_ids=False,  # the loaders have
        loss=loss,
        device=choose_device(how.device),
    )
    sharded = engine if isinstance(engine, FusedEngine) and world_size() > 1 else None
    if sharded is not None:
        console.print(sharded.plan_table)
    if rank():
        torch.manual_seed(how.seed + rank())  # dropout draws other masks for other rows
    built = time.perf_counter() - started
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if out is not None and how.checkpoint_seconds is not None:
            checkpoints = stack.enter_context(
                Checkpoints(out / "checkpoints", asynchronous=asynchronous_checkpoints, log=console.print)
            )
        history = fit(
            engine,
            train,
            valid,
            max_epochs=how.max_epochs,
            patience=how.patience,
            select_by=how.select_by,
            calibrate=how.calibrate,
            min_delta=how.min_delta,
            cut_factor=how.cut_factor,
            out=out,
            checkpoints=checkpoints,
            checkpoint_seconds=how.checkpoint_seconds or 0.0,
            identity=identity,
            tensorboard=tensorboard,
            on_epoch=on_epoch,
            trackers=trackers,
            console=console,
        )
    history.seconds += built
    if sharded is not None and out is not None and rank() == 0:
        save_plan(sharded.plan, out / "plan.json")
    return engine, history


def score_once(
    model: nn.Module,
    valid: Loader | Scores,
    test: Loader,
    *,
    device: str | torch.device = "cpu",
    calibration: Calibration | None = None,
) -> tuple[dict[str, Any], Scores]:
    """What is reported of a model that was chosen, and its predictions for test.

    That is valid_auc, valid_logloss, test_auc, test_logloss, every other metric of test as test_NAME, with several
    labels those of each, and how many rows of test were scored a second, loading included. All is of the logits as
    `calibration` leaves them. `valid` may be what was predicted for it already.
    """
    labels = test.schema.labels
    result, _ = _score_valid(model, valid, labels, device, calibration)
    started = time.perf_counter()
    scored = predict(model, test, device=device)
    inference = test.num_rows / (time.perf_counter() - started)
    scored = scored if calibration is None else calibrated(scored, calibration)
    of_test = score(scored, labels=labels)
    result = {
        "valid_auc": result.pop("valid_auc"),
        "valid_logloss": result.pop("valid_logloss"),
        "test_auc": of_test["auc"],
        "test_logloss": of_test["log_loss"],
        **{f"test_{name}": value for name, value in of_test.items() if name not in ("auc", "log_loss")},
        **result,
        "inference_samples_per_second": round(inference, 1),
    }
    return result, scored


def _score_valid(
    model: nn.Module,
    valid: Loader | Scores,
    labels: Sequence[str],
    device: str | torch.device,
    calibration: Calibration | None,
) -> tuple[dict[str, Any], Scores]:
    """valid_auc, valid_logloss, with several labels valid_tasks, and the predictions, calibrated."""
    scored = valid if isinstance(valid, Scores) else predict(model, valid, device=device)
    scored = scored if calibration is None else calibrated(scored, calibration)
    found = score(scored, labels=labels)
    result = {"valid_auc": found["auc"], "valid_logloss": found["log_loss"]}
    return result | ({"valid_tasks": found["tasks"]} if "tasks" in found else {}), scored


def sizes_of(model: Model) -> dict[str, int]:
    """A model's size, as it is reported: parameters, those of the network, and bytes of the other ones."""
    parameters = model.num_parameters()
    return {
        "parameters": sum(parameters.values()),
        "network_parameters": parameters["network"],
        "embedding_bytes": model.embedding_bytes(),
    }


def write_result(folder: Path, result: dict[str, Any], names: tuple[str, str], draw: Callable[[Path], None]) -> None:
    """Write a result as JSON, and what `draw` makes of it beside, by these names."""
    numbers, picture = names
    write_text(folder / numbers, to_json(result, indent=1) + "\n")
    with new_file(folder / picture) as making:
        draw(making)


@holding(when=lambda: rank() == 0)
@finishing(when=lambda: rank() == 0)
def run(
    data: str | Path,
    config: Mapping[str, Any],
    *,
    modules: Sequence[str] = (),
    out: str | Path | None = None,
    asynchronous_checkpoints: bool = False,
    tensorboard: bool = False,
    trackers: Sequence[Tracker] = (),
    baselines: bool = False,
    score_test: bool = True,
    on_epoch: OnEpoch | None = None,
    on_built: Callable[[Model], None] | None = None,
    on_trained: Callable[[Model], None] | None = None,
    saving: Callable[[Model], contextlib.AbstractContextManager[Path]] | None = None,
    console: Console | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train what `config` describes on a prepared folder with train, valid and test; returns the model and the result.

    `config` is one dictionary of plain data: the model's name, its arguments and those of `Inputs`, and `training`,
    whose entries are those of `ctrlib.training.Training`. What it leaves out is at its default. It may have `crosses`,
    pairs of categorical features as [["user", "item"]], each pair of whose values gets a row of its own
    (`ctrlib.training.crossing`).

    The epoch is chosen by validation AUC, then validation and test are each scored once. The result has at least
    valid_auc, test_auc, test_logloss, parameters, embedding_bytes, samples_per_second (of training), the same of
    inference (the test split, loading included), seconds (of everything, in all parts of a run that was killed), engine
    and seed. `out` receives log.jsonl, metrics.json and curve.png. `on_trained` gets the trained model, on the CPU,
    before anything is scored: the place to save it. `on_built` gets the new one before it is trained: the place to
    carry over what `warm_start` names. `saving` gets it when all is scored, and gives the folder that metrics.json and
    curve.png are written into instead, such that they appear in `out` with the model, or none of them does.

    While it trains, `out`/checkpoints holds all that is needed to go on: after a kill, start the same run again (`fit`
    tells more). What makes it the same is `config`, with all defaults filled in, and the data. Only max_epochs,
    workers, device, sharding, plan, checkpoint_seconds and the number of processes may be others; checkpoints of a run
    that differs in anything else are refused, and the entry is named.

    With `calibrate` in `training`, slope and intercept of the logits are fitted on validation when the epoch is chosen,
    and belong to the model (`ctrlib.calibration`); validation's own log-loss is then of rows that they were fitted on.

    `baselines`: set a constant, a logistic regression and a gradient boosting beside the model, on the same rows of
    test (`ctrlib.training.baselines.compare`). The result then has their numbers as "baselines", and as "warnings"
    sentences that say where the model is not better than they are. Its "seconds" are without them.

    `score_test=False`: test is not looked at, and need not be there; the result then has nothing of it, as it should
    where settings are chosen. `on_epoch`: see `fit`.

    `trackers` are told of the training while it lasts (`ctrlib.training.trackers`): what `start` raises ends it at
    once, and what the other methods raise is a warning.

    `modules`: where the model may be imported from, if it is one of your own (`ctrlib.models.build`).

    Started by `torchrun`, the processes share each batch of `batch_size` rows evenly, and all get the result. The
    trained model is on rank 0, which alone calls `on_trained` and `saving`, and writes; elsewhere the returned model
    has no weights (it is on the "meta" device). With the fused engine, tables are spread as `sharding` says
    (`make_plan`) or as the file `plan` does (`save_plan`); the plan is printed, and written to `out`/plan.json.

    Two runs with the same arguments and as many threads of torch give the same bits on a CPU, whatever `workers` is.

    Raises:
        ValueError: an entry of the config does not fit, or `out` holds the checkpoints of another run.
        TargetError: `out` is the data, or a folder of another kind.
        LockedError: somebody else writes into `out`; the message says who.
        DataError: train or valid has one class of a label only, or no row with weight.
        TypeError: an argument is of another type.
    """
    started = time.perf_counter()
    check_path("a prepared folder", data=data)
    if not isinstance(config, Mapping):
        raise WrongTypeError(
            f'config must be a dictionary such as {{"model": "fm", "training": {{"seed": 1}}}}, got {shown(config)}: '
            "a model of your own is named by the import path of the function that makes it (see `ctrlib.models.build`)"
        )
    config = counted_anew(complete(config, modules=modules))
    how = training_of(config)
    if out is not None:
        check_target(out, ("model", "run", "other"), inputs=(data, how.plan), overwrite=True)
    data, out = Path(data), None if out is None else Path(out)
    if how.batch_size % world_size():
        raise ArgumentError(
            f"{world_size()} processes cannot share a batch of {how.batch_size} rows evenly: use a multiple of "
            f"{world_size()}"
        )
    if baselines and not score_test:
        raise ArgumentError("baselines=True needs test, where they stand beside the model: leave score_test=False out")
    if how.warm_start is not None and on_built is None:
        raise ArgumentError(
            f"warm_start={how.warm_start!r}: carry the rows over in on_built=lambda model: ctrlib.warm_start(model, "
            "data, folder), or use `ctrlib train --warm-start`"
        )
    chosen_device = choose_device(how.device)
    if world_size() > 1:
        init_process_group(chosen_device)
    is_first = rank() == 0
    console = (console or Console(stderr=True)) if is_first else Console(quiet=True)
    train, valid = load_train_and_valid(data, how)
    test = load_to_score(data, "test", how, train.schema) if score_test else None
    schema, note = train.schema, _note(data)
    torch.manual_seed(how.seed)
    described = {name: value for name, value in config.items() if name != "crosses"}
    model = models.build(described, schema, modules=modules)
    if config.get("crosses"):
        model = crossed(model, data, config["crosses"])
        described["replaced"] = describe(model)
    if how.calibrate:
        check_calibratable(model)
    if how.start_at_base_rate:
        start_at_base_rate(model, data)
    if on_built is not None:
        on_built(model)
    sizes = sizes_of(model)
    identity = identity_of(config, schema.hash, train.data_hash)
    if out is not None and is_first and finished(out, identity) is not None:
        (out / FINISHED).unlink()  # from here on it is at work again
    before_training = time.perf_counter() - started
    for tracker in trackers:
        tracker.start(config)
    trainer, history = train_model(
        model,
        how,
        train,
        valid,
        out=out,
        identity=identity,
        asynchronous_checkpoints=asynchronous_checkpoints,
        tensorboard=tensorboard,
        on_epoch=on_epoch,
        trackers=trackers,
        console=console,
    )
    trained = time.perf_counter()
    # The engine may have wrapped the model or moved it: a plain one with the trained weights, for saving and serving.
    weights = trainer.weights()
    with contextlib.nullcontext() if is_first else torch.device("meta"):
        plain = models.build(described, schema, modules=modules)
    of_valid: Loader | Scores = valid
    calibration: Calibration | None = None
    if how.calibrate:
        of_valid = predict(trainer.model, valid, device=chosen_device)
        plain.calibration = calibration = calibration_of(of_valid, len(schema.labels))
    if is_first:
        plain.load_state_dict(weights)
        if on_trained is not None:
            on_trained(plain)
    if test is None:
        scores, scored = _score_valid(trainer.model, of_valid, schema.labels, chosen_device, calibration)
    else:
        scores, scored = score_once(trainer.model, of_valid, test, device=chosen_device, calibration=calibration)
    if math.isnan(scores.get("test_auc", 0.0)):
        console.print("warning: test holds one class only (or no known label), so its AUC is undefined (NaN)")
    result = {
        **scores,
        **({} if calibration is None else {"calibrator": calibration.as_dict()}),
        **sizes,
        "samples_per_second": history.samples_per_second,
        "seconds": round(before_training + history.seconds + time.perf_counter() - trained, 2),
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        "engine": trainer.name,
        "processes": world_size(),
        "precision": how.precision,
        "seed": how.seed,
        "data_hash": schema.hash,
        "note": note,
    }
    all_scored = whole(scored)
    split = "valid" if test is None else "test"
    result[KEY] = recorded(config, schema, all_scored, split=split, data=data, rows_hash=train.data_hash)
    if test is not None and baselines:
        result |= _beside(plain, scored, test, name_of(config))
    if out is not None and is_first:
        assert all_scored is not None
        reliability = reliability_of(all_scored, schema.labels)
        draw = functools.partial(plots.learning_curve, history, reliability=reliability)
        with contextlib.nullcontext(out) if saving is None else saving(plain) as folder:
            write_result(folder, result, ("metrics.json", "curve.png"), draw)
        if how.checkpoint_seconds is not None:
            finish(out, identity, result, ["checkpoints"])  # it is over: started again, it begins anew
    return plain, result


def _beside(plain: Model, scored: Scores, test: Loader, name: str) -> dict[str, Any]:
    """What simple models make of the same data, and what is to be said of that; every process gets it."""
    found: dict[str, Any] = {}
    if rank() == 0:
        if world_size() > 1:  # each has scored its share of every batch: here the rows have to be in their order
            scored = predict(plain, Loader(test.folder, "test", batch_size=test.batch_size, workers=test.workers))
        lines = compare(test.folder, scored, name=name)
        found = {"baselines": lines, "warnings": remarks(lines)}
    return dict(broadcast(found))


def _note(data: Path) -> str:
    """What whoever prepared the data wants said with every number."""
    report = data / "report.json"
    if not report.is_file():
        return ""
    try:
        return str(dict(json.loads(report.read_text(encoding="utf-8"))).get("note", ""))
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{report} cannot be read ({error}): copy it again, or delete it") from error
