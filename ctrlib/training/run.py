"""One whole experiment by the evaluation protocol: train, choose by validation, report test once, write it all down."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from rich.console import Console

from ctrlib import models, plots
from ctrlib._target import check_target
from ctrlib.data.loader import Loader
from ctrlib.distributed import init_process_group, rank, world_size
from ctrlib.errors import WrongTypeError, check_path, shown
from ctrlib.making import new_file, remove, write_text
from ctrlib.manifest import check_folder, load_schema
from ctrlib.model import Model
from ctrlib.schema import SchemaError
from ctrlib.sharding.plan import Sharding, ShardingPlan, load_plan, save_plan
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.config import Device, EngineName, Precision, complete, identity_of, training_of
from ctrlib.training.evaluate import evaluate, predict, score
from ctrlib.training.exact import ExactEngine
from ctrlib.training.fused import FusedEngine
from ctrlib.training.loop import Engine, fit, to_json


def choose_device(device: Device) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Of several processes on a machine, each gets a card of its own.

    Raises:
        ValueError: CUDA is asked for and there is none.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    if device not in get_args(Device):
        raise ValueError(f"unknown device {device!r}, expected one of {get_args(Device)}")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError("device 'cuda' was asked for, but torch sees none: use --device cpu, or run `ctrlib doctor`")
    if device == "cpu" or not available:
        return torch.device("cpu")
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(chosen)
    return chosen


def make_engine(
    model: Model,
    engine: EngineName,
    *,
    learning_rate: float = 1e-3,
    embedding_l2: float = 0.0,
    embedding_learning_rate: float = 0.02,
    precision: Precision = "fp32",
    sharding: Literal["auto"] | Sharding | Mapping[str, Sharding] = "auto",
    plan: ShardingPlan | None = None,
    check_ids: bool = True,
    device: str | torch.device = "cpu",
) -> Engine:
    """The engine of that name, given the arguments that concern it.

    Raises:
        ValueError: there is no such engine, a rate is negative, or an argument is given that the engine would ignore.
    """
    if engine not in get_args(EngineName):
        raise ValueError(f"unknown engine {engine!r}, expected one of {get_args(EngineName)}")
    rates = {
        "learning_rate": learning_rate,
        "embedding_l2": embedding_l2,
        "embedding_learning_rate": embedding_learning_rate,
    }
    for name, rate in rates.items():
        if not rate >= 0:
            raise ValueError(f"{name} must be 0 or more, got {rate}")
    if engine == "exact":
        if precision != "fp32":
            raise ValueError("the exact engine computes in fp32 only: drop --precision, or use --engine fused")
        if sharding != "auto" or plan is not None:
            raise ValueError(
                "the exact engine copies every table to every process: drop --sharding and --plan, or use "
                "--engine fused"
            )
        return ExactEngine(model, learning_rate=learning_rate, embedding_l2=embedding_l2, device=device)
    if embedding_l2:
        raise ValueError(
            f"the fused engine has no L2 on tables (it leaves untouched rows alone), got embedding_l2={embedding_l2}: "
            "set it to 0, or use the exact engine"
        )
    return FusedEngine(
        model,
        learning_rate=learning_rate,
        embedding_learning_rate=embedding_learning_rate,
        precision=precision,
        sharding=sharding,
        plan=plan,
        check_ids=check_ids,
        device=device,
    )


def run(
    data: str | Path,
    config: Mapping[str, Any],
    *,
    modules: Sequence[str] = (),
    out: str | Path | None = None,
    asynchronous_checkpoints: bool = False,
    tensorboard: bool = False,
    on_built: Callable[[Model], None] | None = None,
    on_trained: Callable[[Model], None] | None = None,
    console: Console | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train what `config` describes on a prepared folder with train, valid and test; returns the model and the result.

    `config` is one dictionary of plain data: the model's name, its arguments and those of `Inputs`, and `training`,
    whose entries are those of `ctrlib.training.Training`. What it leaves out is at its default.

    The epoch is chosen by validation AUC, then validation and test are each scored once. The result has at least
    valid_auc, test_auc, test_logloss, parameters, embedding_bytes, samples_per_second (of training), the same of
    inference (the test split, loading included), seconds (of everything, in all parts of a run that was killed), engine
    and seed. `out` receives log.jsonl, metrics.json and curve.png. `on_trained` gets the trained model, on the CPU,
    before anything is scored: the place to save it. `on_built` gets the new one before it is trained: the place to
    carry over what `warm_start` names.

    While it trains, `out`/checkpoints holds all that is needed to go on: after a kill, start the same run again (`fit`
    tells more). What makes it the same is `config`, with all defaults filled in, and the data. Only max_epochs,
    workers, device, sharding, plan, checkpoint_seconds and the number of processes may be others; checkpoints of a run
    that differs in anything else are refused, and the entry is named.

    `modules`: where the model may be imported from, if it is one of your own (`ctrlib.models.build`).

    Started by `torchrun`, the processes share each batch of `batch_size` rows evenly, and all get the result. The
    trained model is on rank 0, which alone calls `on_trained` and writes; elsewhere the returned model has no weights
    (it is on the "meta" device). With the fused engine, tables are spread as `sharding` says (`make_plan`) or as the
    file `plan` does (`save_plan`); the plan is printed, and written to `out`/plan.json.

    Two runs with the same arguments and as many threads of torch give the same bits on a CPU, whatever `workers` is.

    Raises:
        ValueError: an entry of the config does not fit, or `out` holds the checkpoints of another run.
        TargetError: `out` is the data, or a folder of another kind.
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
    config = complete(config, modules=modules)
    how = training_of(config)
    if out is not None:
        check_target(out, ("model", "run", "other"), inputs=(data, how.plan), overwrite=True)
    data, out = Path(data), None if out is None else Path(out)
    if how.batch_size % world_size():
        raise ValueError(
            f"{world_size()} processes cannot share a batch of {how.batch_size} rows evenly: use a multiple of "
            f"{world_size()}"
        )
    if how.warm_start is not None and on_built is None:
        raise ValueError(
            f"warm_start={how.warm_start!r}: carry the rows over in on_built=lambda model: ctrlib.warm_start(model, "
            "data, folder), or use `ctrlib train --warm-start`"
        )
    chosen_device = choose_device(how.device)
    if world_size() > 1:
        init_process_group(chosen_device)
    is_first = rank() == 0
    console = (console or Console(stderr=True)) if is_first else Console(quiet=True)
    check_folder(data)  # all that is read after the training, too
    schema, note = load_schema(data), _note(data)
    torch.manual_seed(how.seed)
    model = models.build(config, schema, modules=modules)
    if on_built is not None:
        on_built(model)
    parameters, embedding_bytes = model.num_parameters(), model.embedding_bytes()
    trainer = make_engine(
        model,
        how.engine,
        learning_rate=how.learning_rate,
        embedding_l2=how.embedding_l2,
        embedding_learning_rate=how.embedding_learning_rate,
        precision=how.precision,
        sharding=cast(Any, how.sharding),  # `make_engine` looks at it
        plan=None if how.plan is None else load_plan(how.plan),
        check_ids=False,  # the loaders have
        device=chosen_device,
    )
    if is_first and isinstance(trainer, FusedEngine) and world_size() > 1:
        console.print(trainer.plan_table)
    if not is_first:
        torch.manual_seed(how.seed + rank())  # dropout draws other masks for other rows
    with_group = schema.group is not None
    share: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "workers": how.workers}
    own_size = how.batch_size // world_size()
    train = Loader(data, "train", batch_size=own_size, shuffle=True, seed=how.seed, **share)
    # Scoring needs no gradients: larger batches, so fewer calls.
    valid, test = (
        Loader(data, split, batch_size=2 * own_size, with_group=with_group, **share) for split in ("valid", "test")
    )
    for loader in (train, valid):
        loader.check_classes()
    before_training = time.perf_counter() - started
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if out is not None and how.checkpoint_seconds is not None:
            checkpoints = stack.enter_context(
                Checkpoints(out / "checkpoints", asynchronous=asynchronous_checkpoints, log=console.print)
            )
        history = fit(
            trainer,
            train,
            valid,
            max_epochs=how.max_epochs,
            patience=how.patience,
            out=out,
            checkpoints=checkpoints,
            checkpoint_seconds=how.checkpoint_seconds or 0.0,
            identity=identity_of(config, schema.hash, train.data_hash),
            tensorboard=tensorboard,
            console=console,
        )
    trained = time.perf_counter()
    if is_first and out is not None and isinstance(trainer, FusedEngine) and world_size() > 1:
        save_plan(trainer.plan, out / "plan.json")
    # The engine may have wrapped the model or moved it: a plain one with the trained weights, for saving and serving.
    weights = trainer.weights()
    with contextlib.nullcontext() if is_first else torch.device("meta"):
        plain = models.build(config, schema, modules=modules)
    if is_first:
        plain.load_state_dict(weights)
        if on_trained is not None:
            on_trained(plain)
    valid_scores = evaluate(trainer.model, valid, device=chosen_device, labels=schema.labels)
    scoring = time.perf_counter()
    scored = predict(trainer.model, test, device=chosen_device)
    inference = test.num_rows / (time.perf_counter() - scoring)
    test_scores = score(scored, labels=schema.labels)
    if math.isnan(test_scores["auc"]):
        console.print("warning: test holds one class only (or no known label), so its AUC is undefined (NaN)")
    result = {
        "valid_auc": valid_scores["auc"],
        "valid_logloss": valid_scores["log_loss"],
        "test_auc": test_scores["auc"],
        "test_logloss": test_scores["log_loss"],
        **{f"test_{name}": value for name, value in test_scores.items() if name not in ("auc", "log_loss")},
        **({"valid_tasks": valid_scores["tasks"]} if "tasks" in valid_scores else {}),
        "parameters": sum(parameters.values()),
        "network_parameters": parameters["network"],
        "embedding_bytes": embedding_bytes,
        "samples_per_second": history.samples_per_second,
        "inference_samples_per_second": round(inference, 1),
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
    if out is not None and is_first:
        write_text(out / "metrics.json", to_json(result, indent=1) + "\n")
        with new_file(out / "curve.png") as picture:
            plots.learning_curve(history, picture)
        if how.checkpoint_seconds is not None:
            remove(out / "checkpoints")  # the run is over: started again, it begins anew
    return plain, result


def _note(data: Path) -> str:
    """What whoever prepared the data wants said with every number."""
    report = data / "report.json"
    if not report.is_file():
        return ""
    try:
        return str(dict(json.loads(report.read_text(encoding="utf-8"))).get("note", ""))
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{report} cannot be read ({error}): copy it again, or delete it") from error
