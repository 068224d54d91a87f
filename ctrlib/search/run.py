"""A search from data to a smaller model: build, search, materialise, retrain, report test once, explain, write."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ctrlib import presets
from ctrlib.data.loader import Loader
from ctrlib.model import Model
from ctrlib.schema import Schema
from ctrlib.search.bytes import bytes_of
from ctrlib.search.plan import Plan, materialise
from ctrlib.search.stages import identity_of
from ctrlib.serving.predictor import save_model
from ctrlib.structure import describe
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.evaluate import evaluate
from ctrlib.training.exact import ExactEngine
from ctrlib.training.loop import fit, to_json

# Method -> its settings; these and its `search` are in ctrlib.search.METHOD.
METHODS = {"optfs": "OptFS", "optembed": "OptEmbed", "dnis": "DNIS", "optinter": "OptInter"}


def settings_of(method: str, values: dict[str, Any]) -> Any:
    """The settings of a method, with some values of one's own.

    Raises:
        ValueError: there is no such method, or it has no such setting.

    >>> settings_of("optfs", {"penalty": 1e-5}).penalty
    1e-05
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {list(METHODS)}")
    settings = getattr(importlib.import_module(f"ctrlib.search.{method}"), METHODS[method])
    names = [field.name for field in dataclasses.fields(settings)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{method} has no setting {unknown}, expected some of {names}")
    return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


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
    console: Console | None = None,
) -> dict[str, Any]:
    """Search on train (and validation, if the method asks it), retrain what is found, choose its epoch by validation.

    `out` receives a model folder, plan.safetensors, search.json with the result, and search.png. Killed and started
    again, it goes on from the last epoch of search or retraining.

    Args:
        method: one of `METHODS`.
        data: a prepared folder.
        config: of the model, as `presets.build` takes it.
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
        console: where progress is shown.

    Raises:
        ValueError: an argument does not fit, or `out` holds another search.
    """
    data, out, console = Path(data), Path(out), console or Console(stderr=True)
    settings = settings or settings_of(method, {"learning_rate": learning_rate, "embedding_l2": embedding_l2})
    torch.manual_seed(seed)
    model = presets.build(config, Schema.load(data))
    before = bytes_of(model)
    train = Loader(data, "train", batch_size=batch_size, shuffle=True, seed=seed)
    valid, test = (Loader(data, split, batch_size=2 * batch_size) for split in ("valid", "test"))
    out.mkdir(parents=True, exist_ok=True)

    plan = _plan(method, model, train, valid, settings, seed, out, checkpoints or out / "search", console)
    for sentence in plan.summary.get("words", ()):
        console.print(sentence, highlight=False)
    smaller = materialise(model, plan)
    size = bytes_of(smaller)
    train.set_epoch(0)
    torch.manual_seed(seed)
    identity = {
        **{"plan": hashlib.sha256((out / "plan.safetensors").read_bytes()).hexdigest(), "patience": patience},
        **{"learning_rate": learning_rate, "embedding_l2": embedding_l2, "seed": seed, "batch_size": batch_size},
    }
    with Checkpoints(out / "checkpoints", log=console.print) as epochs:
        engine = ExactEngine(smaller, learning_rate=learning_rate, embedding_l2=embedding_l2)
        history = fit(
            engine,
            train,
            valid,
            max_epochs=max_epochs,
            patience=patience,
            out=out,
            checkpoints=epochs,
            identity=identity,
            console=console,
        )
    save_model(smaller, {**config, "replaced": describe(smaller)}, data, out)
    valid_scores, test_scores = evaluate(smaller, valid, quick=True), evaluate(smaller, test)
    result = {
        "method": method,
        "settings": asdict(settings),
        "valid_auc": valid_scores["auc"],
        "valid_logloss": valid_scores["log_loss"],
        "test_auc": test_scores["auc"],
        "test_logloss": test_scores["log_loss"],
        "parameters": sum(smaller.num_parameters().values()),
        "network_parameters": smaller.num_parameters()["network"],
        "embedding_bytes_before": before.embedding,
        "embedding_bytes": size.embedding,
        "bytes_before": asdict(before),
        "bytes_after": asdict(size),
        "ratio": before.embedding / size.embedding,
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        "seed": seed,
        "summary": {name: value for name, value in plan.summary.items() if name != "identity"},
    }
    (out / "search.json").write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
    draw(result, out / "search.png")
    for folder in ("search", "checkpoints"):
        shutil.rmtree(out / folder, ignore_errors=True)  # it is over: started again, it begins anew
    return result


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


def draw(result: dict[str, Any], path: Path) -> None:
    """What was found as a picture: of each field what is kept and how wide it is, of each pair what was chosen."""
    from matplotlib.figure import Figure  # here, since it takes longer to import than a small model to score

    summary = result["summary"]
    panels = [name for name in ("kept", "dims", "pairs") if name in summary]
    if not panels:
        raise ValueError(f"the plan's summary has none of kept, dims and pairs to draw, only {sorted(summary)}")
    most = max(len(summary[name]["fields"] if name == "pairs" else summary[name]) for name in panels)
    figure = Figure(figsize=(1 + 4.5 * len(panels), 1.6 + 0.28 * max(most, 8)), layout="constrained")
    for name, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        if name == "pairs":
            _draw_pairs(axes, **summary["pairs"])
            continue
        fields = list(summary[name])
        if name == "kept":
            values = [some / max(1, every) for some, every in summary["kept"].values()]
            texts = [f"{some:,} of {every:,}" for some, every in summary["kept"].values()]
            axes.set(xlabel="share of the values", title="Values kept", xlim=(0, 1.35), xticks=(0, 0.5, 1))
        else:
            values = [float(dim) for dim in summary["dims"].values()]
            texts = [f"{dim:.3g}" for dim in values]
            axes.set(xlabel="numbers per value", title="Width", xlim=(0, 1.2 * max(values)))
        bars = axes.barh(fields, values)
        axes.bar_label(bars, texts, padding=3, fontsize="small")
        axes.invert_yaxis()
    title = f"{result['method']}: test AUC {result['test_auc']:.5f}, {result['ratio']:.1f} times fewer embedding bytes"
    figure.suptitle("\n".join(textwrap.wrap(title, 30 * len(panels) + 10)))
    figure.savefig(path, dpi=120)


def _draw_pairs(axes: Any, fields: list[str], choice: list[list[str | None]]) -> None:
    """A square for each pair, coloured by what was chosen; none for None."""
    from matplotlib.patches import Patch

    kinds = sorted({kind for row in choice for kind in row if kind is not None})
    places = [[float("nan") if kind is None else float(kinds.index(kind)) for kind in row] for row in choice]
    image = axes.imshow(places, cmap="viridis", vmin=0, vmax=max(1, len(kinds) - 1))
    axes.set_xticks(range(len(fields)), fields, rotation=90)
    axes.set_yticks(range(len(fields)), fields)
    axes.set_title("Pairs of fields")
    axes.legend(
        handles=[Patch(color=image.cmap(image.norm(place)), label=kind) for place, kind in enumerate(kinds)],
        fontsize="small",
        loc="upper right",
    )
