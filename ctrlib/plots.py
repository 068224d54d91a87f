"""All pictures: a learning curve, what a search found, bytes against AUC, what labels gain by each other.

matplotlib is imported inside the functions, since that takes longer than scoring a small model.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrlib.errors import ArgumentError


def learning_curve(history: Any, path: str | Path, *, reliability: Mapping[str, Any] | None = None) -> None:
    """Of a `History` that `ctrlib.fit` returns: validation AUC, both losses, and where the learning rate was cut.

    With `reliability` (label -> what `ctrlib.metrics.reliability` returns), a third panel shows what was predicted for
    test and what came.
    """
    from matplotlib.figure import Figure

    # Margins are fixed: every run draws this, and a layout that fits itself to its texts takes twice as long.
    width = 9.0 if reliability is None else 13.5
    figure = Figure(figsize=(width, 3.5))
    left, right, *more = figure.subplots(
        1,
        2 if reliability is None else 3,
        gridspec_kw={"left": 0.75 / width, "right": 1 - 0.2 / width, "bottom": 0.15, "top": 0.9, "wspace": 0.22},
    )
    if reliability is not None:
        _draw_reliability(more[0], reliability)
        more[0].set_title("Reliability on test")
    epochs = [line.epoch for line in history.epochs]
    left.plot(epochs, [line.valid_auc for line in history.epochs], marker="o", label="validation")
    best = next((line for line in history.epochs if line.epoch == history.best_epoch), None)
    if best is not None:
        left.plot(best.epoch, best.valid_auc, marker="*", markersize=16, label=f"kept: {best.valid_auc:.5f}")
    left.set(xlabel="epoch", ylabel="AUC", title="Validation AUC")
    right.plot(epochs, [line.train_loss for line in history.epochs], marker="o", label="train")
    right.plot(epochs, [line.valid_log_loss for line in history.epochs], marker="o", label="validation")
    right.set(xlabel="epoch", ylabel="nats", title="Log-loss")
    for axes in (left, right):
        for before, after in zip(history.epochs, history.epochs[1:]):
            if after.learning_rate < before.learning_rate:
                axes.axvline(after.epoch - 0.5, color="grey", linestyle=":", linewidth=1)
        axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="learning rate cut")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def reliability(found: Mapping[str, Any], path: str | Path) -> None:
    """What was predicted and what came, by bins of equal mass: label -> what `ctrlib.metrics.reliability` returns.

    Bars show how far rates that are exactly right may lie beside the line: twice the distance to expect by chance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    _draw_reliability(figure.subplots(), found)
    figure.savefig(path, dpi=120)


def _draw_reliability(axes: Any, found: Mapping[str, Any]) -> None:
    """On logarithmic axes where rates span more than a tenfold, as those of clicks do."""
    lowest, highest = 1.0, 0.0
    for label, bins in found.items():
        if not bins:
            continue
        axes.errorbar(
            bins.predicted,
            bins.predicted,
            yerr=[np.minimum(2 * bins.by_chance, 0.999 * bins.predicted), 2 * bins.by_chance],
            fmt="none",
            ecolor="lightgrey",
            elinewidth=4,
        )
        axes.plot(bins.predicted, bins.observed, marker="o", markersize=4, linewidth=1, label=label)
        rates = np.r_[bins.predicted, bins.observed[bins.observed > 0]]
        lowest, highest = min(lowest, rates.min()), max(highest, rates.max())
    if highest > 10 * lowest > 0:
        axes.set(xscale="log", yscale="log")
    if highest >= lowest:
        axes.plot([lowest, highest], [lowest, highest], color="grey", linestyle=":", linewidth=1)
        axes.set_xlim(0.8 * lowest, 1.2 * highest)
        axes.set_ylim(0.8 * lowest, 1.2 * highest)
    axes.set(xlabel="mean predicted", ylabel="share of clicks", title="Reliability")
    axes.errorbar([], [], yerr=[], fmt="none", ecolor="lightgrey", elinewidth=4, label="by chance")
    axes.grid(alpha=0.3)
    axes.legend()


def search_result(result: dict[str, Any], path: str | Path) -> None:
    """Of what `search_and_retrain` returns: what is kept of each field, how wide it is, what was chosen for each pair.

    Raises:
        ValueError: the summary has nothing to draw.
    """
    from matplotlib.figure import Figure

    summary = result["summary"]
    panels = [name for name in ("kept", "dims", "pairs") if name in summary]
    if not panels:
        raise ArgumentError(f"the plan's summary has none of kept, dims and pairs to draw, only {sorted(summary)}")
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


def compression(tried: Sequence[Any], budget: int, path: str | Path) -> None:
    """Of the `Candidate`s that `compress` tried, the uncompressed model first: bytes against validation AUC."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(one.method for one in tried[1:]):
        points = sorted((one.embedding_bytes, one.valid_auc) for one in tried[1:] if one.method == method)
        gone = " (below)" if all(auc < tried[0].valid_auc - 0.02 for _, auc in points) else ""
        marker = "*" if "tuned" in method else "o"
        axes.plot(*zip(*points), marker=marker, label=method.replace("_", " ") + gone)
    axes.axhline(tried[0].valid_auc, color="grey", linestyle=":", label=f"uncompressed, {tried[0].embedding_bytes:,} B")
    axes.axvline(budget, color="grey", linewidth=1, label=f"budget, {budget:,} B")
    # Methods that ruin the model would press all others together: they are named, not shown.
    best = max(one.valid_auc for one in tried)
    shown = [one.valid_auc for one in tried if one.valid_auc > best - 0.02]
    margin = max(5e-4, 0.08 * (best - min(shown)))
    axes.set_ylim(min(shown) - margin, best + margin)
    axes.set(xscale="log", xlabel="bytes of embeddings", ylabel="validation AUC")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def transfer(report: dict[str, Any], path: str | Path) -> None:
    """Of "tasks" of `compare_tasks`, and, if there, "gradients" and "gates": what each task gains by the others."""
    from matplotlib.figure import Figure

    tasks = [task["task"] for task in report["tasks"]]
    matrices = [
        (f"gradient cosine, {part}", np.array(found["cosine"]), tasks, (-1.0, 1.0))
        for part, found in report.get("gradients", {}).items()
    ]
    for part, found in report.get("gates", {}).items():
        mean = np.array(found["mean"])
        matrices.append((f"mean gate, {part}", mean, [str(n) for n in range(mean.shape[1])], (0.0, mean.max())))
    figure = Figure(figsize=(4 * (1 + len(matrices)), 1.5 + 0.6 * len(tasks)), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(matrices), squeeze=False)[0]
    colours = {"gains": "tab:green", "loses": "tab:red"}
    for row, task in enumerate(report["tasks"]):
        low, high = task["interval"]
        colour = colours.get(task["verdict"], "grey")
        first.plot([low, high], [row, row], color=colour, linewidth=2)
        first.plot(task["difference"], row, marker="o", color=colour)
    first.axvline(0, color="grey", linestyle=":")
    first.set(yticks=range(len(tasks)), yticklabels=tasks, xlabel="AUC, together minus alone", title="Transfer")
    first.invert_yaxis()
    first.locator_params(axis="x", nbins=4)
    for axes, (title, matrix, columns, (low, high)) in zip(others, matrices):
        image = axes.imshow(matrix, vmin=low, vmax=high, cmap="RdYlGn" if low < 0 else "Blues", aspect="auto")
        axes.set(title=title, yticks=range(len(tasks)), yticklabels=tasks)
        if len(columns) <= 12:
            axes.set(xticks=range(len(columns)), xticklabels=columns)
        figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=120)
