"""What the recipes share: their flags, and the road from a data-set script to a row of results.csv.

It stands beside them, so that `python recipes/frappe.py` finds it.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctrlib import models, plots
from ctrlib.analysis.transfer import compare_tasks, gate_usage, gradient_cosines
from ctrlib.data.loader import Loader
from ctrlib.data.quantiles import quantile_edges
from ctrlib.distributed import rank, world_size
from ctrlib.model import Ensemble, Model
from ctrlib.training.allocator import keep_freed_memory
from ctrlib.training.config import Device, EngineName, Precision, Training
from ctrlib.training.engines import choose_device
from ctrlib.training.evaluate import predict
from ctrlib.training.loop import to_json
from ctrlib.training.record import KEY, measured_on
from ctrlib.training.run import run, score_once, write_result
from ctrlib.training.splits import load_splits
from records import record


@dataclass(frozen=True)
class RecipeKnobs:
    """Flags of every recipe; a recipe adds `model`, its variants."""

    raw: Path | None = None
    """Folder with the raw files, to prepare them (anew); otherwise they are downloaded."""
    data: Path | None = None
    """Prepared folder, made first if it does not exist; otherwise one below data/."""
    seed: int = 2021
    """Of initial weights, shuffle and dropout."""
    engine: EngineName = "exact"
    """exact: dense Adam with L2 on whole tables, what the papers mean. fused: row-wise Adagrad through TorchRec, widths
    rounded up to multiples of 4 and no L2."""
    precision: Precision = "fp32"
    """Arithmetic of tower and head."""
    epochs: int = 100
    """Upper limit."""
    device: Device = "auto"
    """Where to compute."""
    out: Path | None = None
    """Folder for the log, the curve and, while it trains, checkpoints: the same command goes on after a kill."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"
    """How the fused engine spreads tables over the processes that torchrun starts."""
    plan: Path | None = None
    """A plan.json of an earlier run, to spread tables as that did."""
    record: bool = False
    """Append the result to results.csv."""


@dataclass(frozen=True)
class LabelKnobs(RecipeKnobs):
    """Flags of recipes of several labels."""

    label: str | None = None
    """One label, for `single_task`; its prepared folder has the label's name behind that of all. Otherwise all."""
    report: Path | None = None
    """Folder for transfer.json and transfer.png; a model of each label alone is trained for it as well."""


def run_recipe(
    knobs: RecipeKnobs,
    *,
    recipe: str,
    data: str,
    script: Sequence[str],
    model: str,
    config: dict[str, Any],
    **training: Any,
) -> dict[str, Any]:
    """Prepare if needed, train, report once (a line of JSON), and record if asked to.

    Args:
        knobs: the flags.
        recipe: path of the recipe: data/, datasets/ and results.csv are found from there.
        data: name of the data in results.csv, and of the prepared folder.
        script: file name of the data-set script and its arguments.
        model: name of the variant in results.csv.
        config: what `models.build` needs; `bins` in place of `edges` means that many quantiles of the training rows.
        training: entries of the `training` of `ctrlib.run`.

    Raises:
        SystemExit: `record` is asked for a run that is cut short.
    """
    folder = prepared(knobs, recipe, data, script)
    result = {"data": data, "model": model, **_train(knobs, folder, config, training)[1]}
    _report(knobs, recipe, result)
    return result


def run_label_recipe(
    knobs: LabelKnobs,
    *,
    recipe: str,
    data: str,
    script: Sequence[str],
    labels: Sequence[str],
    model: str,
    config: dict[str, Any],
    single: dict[str, Any],
    **training: Any,
) -> dict[str, Any]:
    """As `run_recipe`, of several labels: a row of results.csv for each, and a report of who hurts whom.

    Args:
        knobs: the flags.
        recipe: path of the recipe.
        data: name of the data in results.csv, behind which stands the label's, and of the prepared folder.
        script: file name of the data-set script and its arguments; gets `--label NAME` for a model of one label.
        labels: all that the script makes, in its order.
        model: name of the variant in results.csv; `single_task`, and no other, is of one label.
        config: what `models.build` needs, as in `run_recipe`.
        single: the same for the models of one label that a report compares with.
        training: entries of the `training` of `ctrlib.run`.

    Raises:
        SystemExit: as `run_recipe`; a model of one label is asked for without one or with a report, or another with a
            label.
    """
    if (model == "single_task") != (knobs.label in labels) or (knobs.label and knobs.report):
        raise SystemExit(f"single_task, and only that, takes a --label of {', '.join(labels)}, and no --report")
    trained, folder, result = _train_labels(knobs, recipe, data, script, config, training)
    result = {"data": data, "model": model, **result}
    _report(dataclasses.replace(knobs, record=False), recipe, result)
    if knobs.record and rank() == 0:
        path = Path(recipe).parent / "results.csv"
        if knobs.label:
            record(result, path, data=f"{data}, {knobs.label}", model=model)
        for label, valid, test in zip(labels, result.get("valid_tasks", ()), result.get("test_tasks", ())):
            scores = {"valid_auc": valid["auc"], "test_auc": test["auc"], "test_logloss": test["log_loss"]}
            lines = [line for line in result[KEY]["metrics"] if line["label"] == label]
            row = {**result, **scores, "test_gauc": test.get("gauc"), KEY: {**result[KEY], "metrics": lines}}
            record(row, path, data=f"{data}, {label}", model=model)
    if knobs.report:
        singles = [
            _train_labels(dataclasses.replace(knobs, label=label), recipe, data, script, single, training)[:2]
            for label in labels
        ]
        if rank() == 0:
            _report_transfer(knobs.report, labels, (trained, folder), singles)
    return result


def _train_labels(
    knobs: LabelKnobs, recipe: str, data: str, script: Sequence[str], config: dict[str, Any], training: dict[str, Any]
) -> tuple[Model, Path, dict[str, Any]]:
    """The trained model of all labels or of one, its prepared folder, and what `run` found."""
    if knobs.label:
        data, script = f"{data}_{knobs.label}", [*script, "--label", knobs.label]
        knobs = dataclasses.replace(
            knobs,
            data=knobs.data and knobs.data.with_name(f"{knobs.data.name}_{knobs.label}"),
            out=knobs.out and knobs.out / knobs.label,
        )
    folder = prepared(knobs, recipe, data, script)
    model, result = _train(knobs, folder, config, training)
    return model, folder, result


def _report_transfer(
    out: Path, labels: Sequence[str], together: tuple[Model, Path], alone: Sequence[tuple[Model, Path]]
) -> None:
    """What each label gains or loses by the others' company, as numbers and as a picture."""
    both, *singles = (predict(model, Loader(folder, "test", batch_size=8192)) for model, folder in (together, *alone))
    model, folder = together
    valid = list(Loader(folder, "valid", batch_size=2048))
    report = {
        "tasks": compare_tasks(both, singles, tasks=labels),
        "gradients": gradient_cosines(model, valid),
        "gates": gate_usage(model, valid),
    }
    write_result(out, report, ("transfer.json", "transfer.png"), functools.partial(plots.transfer, report))
    print(to_json(report["tasks"]))


def run_ensemble_recipe(
    knobs: RecipeKnobs,
    *,
    recipe: str,
    data: str,
    script: Sequence[str],
    model: str,
    members: Sequence[tuple[dict[str, Any], dict[str, Any]]],
) -> dict[str, Any]:
    """As `run_recipe`, of the mean of several models, each trained by itself.

    Args:
        knobs: the flags.
        recipe: path of the recipe.
        data: name of the data in results.csv, and of the prepared folder.
        script: file name of the data-set script and its arguments.
        model: name of the ensemble in results.csv.
        members: `config` and `training` of each, as in `run_recipe`.

    Raises:
        SystemExit: as `run_recipe`, and for several processes.
    """
    if world_size() > 1:
        raise SystemExit("the members of an ensemble are scored together in one process: start one")
    folder = prepared(knobs, recipe, data, script)
    models, results = [], []
    for number, (config, training) in enumerate(members):
        out = None if knobs.out is None else knobs.out / f"member-{number}"
        member, result = _train(dataclasses.replace(knobs, out=out), folder, config, training)
        models.append(member)
        results.append(result)
    device = choose_device(knobs.device)
    _, valid, test = load_splits(folder, Training())
    scores, scored = score_once(Ensemble(models).to(device), valid, test, device=device)
    summed = ("parameters", "network_parameters", "embedding_bytes", "seconds")
    result = {
        **{"data": data, "model": model, **results[0]},
        **{name: sum(result[name] for result in results) for name in summed},
        **scores,
        KEY: {**results[0][KEY], "model": model, "metrics": measured_on(scored, test.schema, "test")[1]},
        "samples_per_second": round(1 / sum(1 / result["samples_per_second"] for result in results), 1),
        "epochs": max(result["epochs"] for result in results),
        "best_epoch": max(result["best_epoch"] for result in results),
    }
    _report(knobs, recipe, result)
    return result


def prepare_by_script(root: Path, script: Sequence[str], folder: Path, raw: Path | None) -> None:
    """Run a script of datasets/ with its arguments; without a folder of raw files it gets them itself."""
    command = [sys.executable, str(root / "datasets" / script[0]), *script[1:], "--out", str(folder)]
    subprocess.run(command + (["--raw", str(raw)] if raw else []), check=True, stdout=sys.stderr)


def prepared(knobs: RecipeKnobs, recipe: str, data: str, script: Sequence[str]) -> Path:
    """The prepared folder, made first if need be."""
    if knobs.raw and world_size() > 1:
        raise SystemExit("--raw prepares the data: run the recipe with it in one process first, then start several")
    if knobs.record and knobs.epochs != RecipeKnobs.epochs:
        raise SystemExit("--record takes whole runs only: leave --epochs out")
    root = Path(recipe).parent.parent
    folder = knobs.data or root / "data" / data
    if rank() == 0 and (knobs.raw or not folder.exists()):
        prepare_by_script(root, script, folder, knobs.raw)
    while not folder.exists():  # the first process makes it, and it appears when it is complete
        time.sleep(1)
    return folder


def _train(
    knobs: RecipeKnobs, folder: Path, config: dict[str, Any], training: dict[str, Any]
) -> tuple[Model, dict[str, Any]]:
    """One model by the flags: what `run` returns."""
    keep_freed_memory()
    if knobs.engine == "fused":
        config = {**config, "embedding_dim": -(-config["embedding_dim"] // 4) * 4}
        training = {**training, "embedding_l2": 0.0}
    config = models.for_engine(config, knobs.engine)
    if "bins" in config:
        config = {**config, "edges": quantile_edges(folder, config["bins"])}
        del config["bins"]
    flags = {
        "engine": knobs.engine,
        "precision": knobs.precision,
        "max_epochs": knobs.epochs,
        "seed": knobs.seed,
        "device": knobs.device,
        "sharding": knobs.sharding,
        "plan": knobs.plan and str(knobs.plan),
    }
    return run(folder, {**config, "training": {**flags, **training}}, out=knobs.out)


def _report(knobs: RecipeKnobs, recipe: str, result: dict[str, Any]) -> None:
    if rank() == 0:
        print(to_json(result))
        if knobs.record:
            record(result, Path(recipe).parent / "results.csv", data=result["data"], model=result["model"])
