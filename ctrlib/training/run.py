"""One whole experiment by the evaluation protocol: train, choose by validation, report test once, write it all down."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from torch import nn

from ctrlib import plots
from ctrlib._target import check_target
from ctrlib.data.loader import Loader
from ctrlib.distributed import init_process_group, rank, world_size
from ctrlib.errors import WrongTypeError, check_callable, check_number, check_path, check_type, check_whole
from ctrlib.making import new_file, remove, write_text
from ctrlib.manifest import check_folder, load_schema
from ctrlib.model import Model
from ctrlib.schema import Schema, SchemaError
from ctrlib.sharding.plan import Sharding, ShardingPlan, load_plan, save_plan
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.evaluate import evaluate, predict, score
from ctrlib.training.exact import ExactEngine
from ctrlib.training.fused import FusedEngine, Precision
from ctrlib.training.loop import Engine, check_schedule, fit, to_json

EngineName = Literal["exact", "fused"]
Device = Literal["auto", "cpu", "cuda"]


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
    build: Callable[[Schema], Model],
    *,
    engine: EngineName = "exact",
    batch_size: int = 4096,
    learning_rate: float = 1e-3,
    embedding_l2: float = 0.0,
    embedding_learning_rate: float = 0.02,
    precision: Precision = "fp32",
    sharding: Literal["auto"] | Sharding | Mapping[str, Sharding] = "auto",
    plan: str | Path | None = None,
    max_epochs: int = 100,
    patience: int = 2,
    seed: int = 0,
    workers: int = 1,
    device: Device = "auto",
    out: str | Path | None = None,
    checkpoint_seconds: float | None = 300.0,
    asynchronous_checkpoints: bool = False,
    identity: dict[str, Any] | None = None,
    tensorboard: bool = False,
    on_trained: Callable[[Model], None] | None = None,
    console: Console | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Train `build(schema)` on a prepared folder with train, valid and test; returns the model and the result.

    The epoch is chosen by validation AUC, then validation and test are each scored once. The result has at least
    valid_auc, test_auc, test_logloss, parameters, embedding_bytes, samples_per_second (of training), the same of
    inference (the test split, loading included), seconds (of everything), engine and seed. `out` receives log.jsonl,
    metrics.json and curve.png. `on_trained` gets the trained model, on the CPU, before anything is scored: the place
    to save it.

    While it trains, `out`/checkpoints holds all that is needed to go on: after a kill, start the same run again (`fit`
    tells more). None for `checkpoint_seconds`: no checkpoints. `identity`: what makes it this run, beside the
    arguments; checkpoints of a run with another one are refused.

    Started by `torchrun`, the processes share each batch of `batch_size` rows evenly, and all get the result. The
    trained model is on rank 0, which alone calls `on_trained` and writes; elsewhere the returned model has no weights
    (it is on the "meta" device). With the fused engine, tables are spread as `sharding` says (`make_plan`) or as the
    file `plan` does (`save_plan`); the plan is printed, and written to `out`/plan.json.

    Two runs with the same arguments and as many threads of torch give the same bits on a CPU, whatever `workers` is.

    Raises:
        ValueError: an argument does not fit, or `out` holds the checkpoints of another run.
        TargetError: `out` is the data, or a folder of another kind.
        DataError: train or valid has one class of a label only, or no row with weight.
        TypeError: an argument is of another type.
    """
    started = time.perf_counter()
    check_path("a prepared folder", data=data)
    if isinstance(build, nn.Module):
        raise WrongTypeError("build must be a function from a Schema to a model, got a model: give what makes it")
    check_callable("a function from a Schema to a model, such as lambda s: ctr.models.build(config, s)", build=build)
    check_schedule(max_epochs, patience)
    check_whole(1, batch_size=batch_size)
    check_whole(0, seed=seed, workers=workers)
    check_number(0, learning_rate=learning_rate, embedding_learning_rate=embedding_learning_rate)
    check_number(0, embedding_l2=embedding_l2)
    if checkpoint_seconds is not None:
        check_number(0, checkpoint_seconds=checkpoint_seconds)
    if out is not None:
        check_target(out, ("model", "run", "other"), inputs=(data, plan), overwrite=True)
    data, out = Path(data), None if out is None else Path(out)
    if batch_size % world_size():
        raise ValueError(
            f"{world_size()} processes cannot share a batch of {batch_size} rows evenly: use a multiple of "
            f"{world_size()}"
        )
    chosen_device = choose_device(device)
    if world_size() > 1:
        init_process_group(chosen_device)
    is_first = rank() == 0
    console = (console or Console(stderr=True)) if is_first else Console(quiet=True)
    check_folder(data)  # all that is read after the training, too
    schema, note = load_schema(data), _note(data)
    torch.manual_seed(seed)
    model = build(schema)
    check_type("a function that returns a ctrlib.Model", Model, build=model)
    parameters, embedding_bytes, printout = model.num_parameters(), model.embedding_bytes(), str(model)
    trainer = make_engine(
        model,
        engine,
        learning_rate=learning_rate,
        embedding_l2=embedding_l2,
        embedding_learning_rate=embedding_learning_rate,
        precision=precision,
        sharding=sharding,
        plan=None if plan is None else load_plan(plan),
        check_ids=False,  # the loaders have
        device=chosen_device,
    )
    if is_first and isinstance(trainer, FusedEngine) and world_size() > 1:
        console.print(trainer.plan_table)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_plan(trainer.plan, out / "plan.json")
    if not is_first:
        torch.manual_seed(seed + rank())  # dropout draws other masks for other rows
    with_group = schema.group is not None
    share: dict[str, Any] = {"rank": rank(), "world_size": world_size(), "workers": workers}
    own_size = batch_size // world_size()
    train = Loader(data, "train", batch_size=own_size, shuffle=True, seed=seed, **share)
    # Scoring needs no gradients: larger batches, so fewer calls.
    valid, test = (
        Loader(data, split, batch_size=2 * own_size, with_group=with_group, **share) for split in ("valid", "test")
    )
    for loader in (train, valid):
        loader.check_classes()
    identity = {
        **(identity or {}),
        **{"data": schema.hash, "model": hashlib.sha256(printout.encode()).hexdigest(), "engine": engine},
        "rows": train.data_hash,
        **{"batch_size": batch_size, "learning_rate": learning_rate, "embedding_l2": embedding_l2, "seed": seed},
        **{"embedding_learning_rate": embedding_learning_rate, "precision": precision, "patience": patience},
    }
    before_training = time.perf_counter() - started
    with contextlib.ExitStack() as stack:
        checkpoints = None
        if out is not None and checkpoint_seconds is not None:
            checkpoints = stack.enter_context(
                Checkpoints(out / "checkpoints", asynchronous=asynchronous_checkpoints, log=console.print)
            )
        history = fit(
            trainer,
            train,
            valid,
            max_epochs=max_epochs,
            patience=patience,
            out=out,
            checkpoints=checkpoints,
            checkpoint_seconds=checkpoint_seconds or 0.0,
            identity=identity,
            tensorboard=tensorboard,
            console=console,
        )
    trained = time.perf_counter()
    # The engine may have wrapped the model or moved it: a plain one with the trained weights, for saving and serving.
    weights = trainer.weights()
    with contextlib.nullcontext() if is_first else torch.device("meta"):
        plain = build(schema)
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
        "precision": precision,
        "seed": seed,
        "data_hash": schema.hash,
        "note": note,
    }
    if out is not None and is_first:
        write_text(out / "metrics.json", to_json(result, indent=1) + "\n")
        with new_file(out / "curve.png") as picture:
            plots.learning_curve(history, picture)
        if checkpoint_seconds is not None:
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
