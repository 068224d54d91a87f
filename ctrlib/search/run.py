"""A search from data to a smaller model: build, search, materialise, retrain, report test once, explain, write."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ctrlib import models, plots
from ctrlib._lock import holding
from ctrlib._target import check_target
from ctrlib.data.loader import Loader
from ctrlib.errors import ArgumentError, WrongTypeError, check_path, check_type, shown
from ctrlib.making import write_text
from ctrlib.model import Model
from ctrlib.search.bytes import bytes_of
from ctrlib.search.experiment import experiment_of, settings_of
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.stages import identity_of
from ctrlib.serving.model_folder import model_in_the_making
from ctrlib.structure import describe
from ctrlib.training.config import Training, refuse_another
from ctrlib.training.config import identity_of as identity_of_run
from ctrlib.training.finished import clean_up, finish, finished
from ctrlib.training.record import KEY, recorded
from ctrlib.training.run import score_once, sizes_of, train_model, write_result
from ctrlib.training.splits import load_splits


@holding()
def search_and_retrain(
    method: str,
    data: str | Path,
    config: dict[str, Any],
    out: str | Path,
    *,
    settings: Any = None,
    batch_size: int = 4096,
    learning_rate: float = 1e-3,
    embedding_l2: float = 0.0,
    max_epochs: int = 100,
    patience: int = 2,
    seed: int = 0,
    checkpoints: Path | None = None,
    modules: Sequence[str] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Search on train (and validation, if the method asks it), retrain what is found, choose its epoch by validation.

    `out` receives a model folder, plan.safetensors, search.json with the result, and search.png. Killed and started
    again, it goes on from the last epoch of search or retraining. Until it is over, `out`/unfinished.json has all that
    makes it this search: another one is refused, and what differs is named. Only `max_epochs` may.

    Args:
        method: one of `SEARCHES`.
        data: a prepared folder.
        config: of the model, as `models.build` takes it.
        out: where all goes.
        settings: the method's; otherwise its defaults with this learning rate and L2.
        batch_size: rows per step.
        learning_rate: of the retraining.
        embedding_l2: of the retraining, on whole tables.
        max_epochs: of the retraining.
        patience: epochs without a better validation AUC before it stops.
        seed: of everything.
        checkpoints: folder where those of the search stay, for another that goes on from them (`OptEmbed` with another
            budget or evolution); otherwise they are deleted in the end.
        modules: where a model of your own may be imported from.
        console: where progress is shown.

    Raises:
        ValueError: an argument does not fit, or `out` holds another search.
        TargetError: `out` is the data, or a folder of another kind.
        LockedError: somebody else writes into `out`; the message says who.
        DataError: train or valid has one class of a label only, or no row with weight.
        TypeError: an argument is of another type.
    """
    check_type("the name of a method", str, method=method)
    check_path("a prepared folder", data=data)
    if settings is not None and not dataclasses.is_dataclass(settings):
        raise WrongTypeError(f"settings must be what settings_of(method, values) gives, got {shown(settings)}")
    check_type('a dictionary {"model": name, **arguments}', dict, config=config)
    training = Training(
        batch_size=batch_size,
        learning_rate=learning_rate,
        embedding_l2=embedding_l2,
        max_epochs=max_epochs,
        patience=patience,
        seed=seed,
    )
    check_target(out, ("search", "other"), inputs=[data], overwrite=True)
    data, out, console = Path(data), Path(out), console or Console(stderr=True)
    settings = settings or settings_of(method, {"learning_rate": learning_rate, "embedding_l2": embedding_l2})
    config = experiment_of(method, config, settings, training, modules=modules)
    train, valid, test = load_splits(data, training)
    torch.manual_seed(seed)
    model = models.build(config, train.schema, modules=modules)
    before = bytes_of(model)
    out.mkdir(parents=True, exist_ok=True)
    unfinished, experiment = out / "unfinished.json", identity_of_run(config, train.schema.hash, train.data_hash)
    if (result := finished(out, experiment)) is not None:
        console.print(f"the search in {out} was over; what was left of its clean-up is done")
        clean_up(out)
        return result
    _begin(unfinished, experiment)

    plan = _plan(method, model, train, valid, settings, seed, out, checkpoints or out / "search", console)
    for sentence in plan.summary.get("words", ()):
        console.print(sentence, highlight=False)
    smaller = materialise(model, plan)
    size = bytes_of(smaller)
    train.set_epoch(0)
    torch.manual_seed(seed)
    # The whole search, and the plan that came of it.
    identity = {**experiment, "plan": hashlib.sha256((out / "plan.safetensors").read_bytes()).hexdigest()}
    on_cpu = dataclasses.replace(training, device="cpu")  # as the search was
    _, history = train_model(smaller, on_cpu, train, valid, out=out, identity=identity, console=console)
    scores, scored = score_once(smaller, valid, test)
    del scores["inference_samples_per_second"]  # a search that was killed ends with the same result
    result = {
        "method": method,
        "settings": asdict(settings),
        **scores,
        **sizes_of(smaller),
        "embedding_bytes_before": before.embedding,
        "embedding_bytes": size.embedding,
        "bytes_before": asdict(before),
        "bytes_after": asdict(size),
        "ratio": before.embedding / size.embedding,
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        "seed": seed,
        "summary": {name: value for name, value in plan.summary.items() if name != "identity"},
        KEY: recorded(config, train.schema, scored, data=data, rows_hash=train.data_hash),
    }
    config = {**config, "replaced": describe(smaller)}
    with model_in_the_making(smaller, config, data, out, "search") as making:
        write_result(making, result, ("search.json", "search.png"), functools.partial(plots.search_result, result))
    finish(out, experiment, result, ["search", "checkpoints", unfinished.name])  # started again, it begins anew
    return result


def _begin(path: Path, identity: dict[str, Any]) -> None:
    """Write what makes it this search, or compare it with what a killed one has written.

    One that has saved nothing yet is none: perhaps its settings were refused, and these are better ones.
    """
    if path.is_file() and any((path.parent / folder).exists() for folder in ("search", "checkpoints")):
        try:
            saved = json.loads(path.read_bytes())
        except ValueError as error:
            raise ArgumentError(f"{path} is damaged ({error}): delete {path.parent} to start anew") from error
        refuse_another(saved, identity, f"{path.parent} holds an unfinished search, and that is another one")
        return
    write_text(path, json.dumps(identity, indent=1) + "\n")


def _plan(
    method: str,
    model: Model,
    train: Loader,
    valid: Loader,
    settings: Any,
    seed: int,
    out: Path,
    checkpoints: Path,
    console: Console,
) -> Plan:
    """The plan of this very search if it is there, or a search."""
    path = out / "plan.safetensors"
    identity = json.loads(json.dumps({"method": method, **identity_of(model, train, settings, seed)}))
    if path.is_file() and (found := Plan.load(path)).summary.get("identity") == identity:
        console.print(f"{path} is of this search already")
        return found
    search = importlib.import_module(f"ctrlib.search.{method}").search
    plan: Plan = search(model, train, valid, settings=settings, seed=seed, out=checkpoints, console=console)
    plan = dataclasses.replace(plan, summary={**plan.summary, "identity": identity})
    plan.save(path)
    return plan
