"""What several commands print for people to read, made to fit 80 columns."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

# What a person wants to know first: name in the result, of test where it begins so, label, format.
OF_ROWS: tuple[tuple[str, str, str], ...] = (
    ("auc", "AUC", ".5f"),
    ("auc_se", "  standard error (DeLong)", ".5f"),
    ("auc_se_groups", "  standard error, groups independent", ".5f"),
    ("gauc", "GAUC", ".5f"),
    ("gauc_se", "  standard error, groups independent", ".5f"),
    ("gauc_groups", "  groups that count, having both classes", ",.0f"),
    ("log_loss", "log-loss (nats)", ".5f"),
    ("log_loss_se", "  standard error", ".5f"),
    ("normalized_entropy", "  normalised entropy (a constant has 1)", ".4f"),
    ("calibration", "calibration (predicted / observed)", ".4f"),
    ("calibration_se", "  standard error", ".4f"),
    ("ece", "calibration error (20 bins)", ".5f"),
    ("ece_by_chance", "  of perfect scores, by chance", ".5f"),
    ("rows", "rows", ",.0f"),
    ("positives", "  positives", ",.0f"),
)
SCORES: tuple[tuple[str, str, str], ...] = (
    *(
        (f"test_{'logloss' if key == 'log_loss' else key}", name if name[0] == " " else f"test {name}", form)
        for key, name, form in OF_ROWS
    ),
    ("valid_auc", "validation AUC", ".5f"),
    *OF_ROWS,
    ("embedding_bytes", "embedding bytes", ",.0f"),
    ("parameters", "parameters", ",.0f"),
    ("samples_per_second", "training samples/s", ",.0f"),
    ("best_epoch", "best epoch", ".0f"),
    ("seconds", "seconds in all", ".1f"),
)
# The same of each of several labels, in two tables: how well it ranks, and how good its probabilities are.
TASKS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (
        ("auc", "AUC", ".5f"),
        ("auc_se", "SE", ".5f"),
        ("gauc", "GAUC", ".5f"),
        ("gauc_groups", "groups", ",.0f"),
        ("rows", "known rows", ",.0f"),
        ("positives", "positives", ",.0f"),
    ),
    (
        ("log_loss", "log-loss", ".5f"),
        ("normalized_entropy", "NE", ".4f"),
        ("calibration", "calibration", ".4f"),
        ("calibration_se", "SE", ".4f"),
        ("ece", "error", ".5f"),
        ("ece_by_chance", "by chance", ".5f"),
    ),
)


def new_table(*columns: str, numbers: int = 0) -> Table:
    """An empty table with these headings, the last `numbers` of which are above numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for place, heading in enumerate(columns):
        if place < len(columns) - numbers:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    return table


def show(table: Table) -> None:
    """Print a table to stdout."""
    from rich.console import Console

    Console().print(table)


def print_scores(scores: dict[str, Any], title: str) -> None:
    """The metrics below their title; of several labels their means, and then each one's by its name."""
    print(title)
    of_test = "test_tasks" in scores
    tasks = scores.get("test_tasks" if of_test else "tasks", ())
    table = new_table("", "", numbers=1)
    for key, name, form in SCORES:
        if key in scores:
            is_mean = tasks and key.endswith(("auc", "log_loss", "logloss"))
            table.add_row(f"{name}, mean of the labels" if is_mean else name, format(scores[key], form))
    show(table)
    if not tasks:
        return
    for group in TASKS:
        columns = {key: (name, form) for key, name, form in group if key in tasks[0]}
        headings = [
            f"test {name}" if of_test and key in ("auc", "log_loss") else name for key, (name, _) in columns.items()
        ]
        table = new_table("label", *headings, numbers=len(headings))
        for task in tasks:
            table.add_row(task["label"], *(format(task[key], form) for key, (_, form) in columns.items()))
        show(table)


def print_beside(result: dict[str, Any]) -> None:
    """The model of a run beside simple ones, on the same rows of test, and what is to be said of that."""
    lines = result.get("baselines", ())
    if not lines:
        return
    several = len({line["label"] for line in lines}) > 1
    known = result["test_tasks"][0]["rows"] if several else result["test_rows"]
    fewer = [line["train_rows"] for line in lines if "seconds" in line and line["train_rows"] < lines[0]["train_rows"]]
    drawn = f" drawn from the {known:,.0f}" if lines[0]["rows"] < known else ""
    print(f"beside simple models, on the same {lines[0]['rows']:,} rows{drawn} of test")
    table = new_table(*(["label"] if several else []), "model", "AUC", "log-loss", "NE", "seconds", numbers=4)
    for before, line in zip((None, *lines), lines):
        is_first = before is None or before["label"] != line["label"]
        label = [line["label"] if is_first else ""] if several else []
        numbers = [format(line[key], form) for key, form in BESIDE]
        table.add_row(*label, line["name"], *numbers, format(line.get("seconds", result["seconds"]), ".1f"))
    show(table)
    if fewer:
        print(f"  the simple models learnt from {fewer[0]:,} rows, drawn from {lines[0]['train_rows']:,}")
    for sentence in result["warnings"]:
        print(f"warning: {sentence}")


def print_slices(slices: list[dict[str, Any]], column: str) -> None:
    """Metrics of the rows of each value of a column, and of each label or score."""
    kind = next(kind for kind in ("label", "score") if kind in slices[0])
    several = len({line[kind] for line in slices}) > 1
    # Of several scores, all columns would not fit.
    columns = [one for one in SLICES if one[0] in slices[0] and not (several and (kind, one[0]) in LESS)]
    table = new_table(column, *([kind] if several else []), *(name for _, name, _ in columns), numbers=len(columns))
    for line in slices:
        which = [line[kind]] if several else []
        table.add_row(line["value"], *which, *(format(line[key], form) for key, _, form in columns))
    show(table)


SLICES = (
    ("rows", "rows", ",.0f"),
    ("positives", "positives", ",.0f"),
    ("auc", "AUC", ".4f"),
    ("auc_se", "SE", ".4f"),
    ("normalized_entropy", "NE", ".4f"),
    ("calibration", "calibration", ".3f"),
    ("calibration_se", "SE", ".3f"),
)
LESS = (("score", "positives"), ("score", "calibration_se"))
BESIDE = (("auc", ".5f"), ("log_loss", ".5f"), ("normalized_entropy", ".4f"))


def print_counts(counts: dict[str, Any]) -> None:
    """What was odd about raw rows; nothing for a prepared folder."""
    for name, unseen in counts.get("unseen", {}).items():
        missing, empty = counts["missing"][name], counts["empty"].get(name, 0)
        if unseen or missing or empty:
            histories = f", {empty:,} empty histories" if empty else ""
            print(f"  {name}: {unseen:,} unseen and {missing:,} missing ids{histories}")
    if counts.get("ignored"):
        print(f"  columns that the model does not know were ignored: {', '.join(counts['ignored'])}")
    for remark in counts.get("remarks", ()):
        print(f"  {remark}", file=sys.stderr)
    if rows := counts.get("skipped_rows"):
        reasons = ", ".join(f"{reason}: {number:,}" for reason, number in counts["skipped"].items())
        which = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5:,} more" if len(rows) > 5 else "")
        print(f"  {len(rows):,} bad rows were left out ({reasons}): rows {which}")


@contextlib.contextmanager
def progress_line(what: str, *, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """What to call with a growing number, shown on one line of stderr where a person watches it; None elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    started = time.perf_counter()

    def show(number: int) -> None:
        speed = number / max(time.perf_counter() - started, 1e-9)
        print(f"\r{number:,} {what}, {speed:,.0f} a second \x1b[K", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
