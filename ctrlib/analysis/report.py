"""The page of `ctrlib report`: what runs reached, where they are wrong, and which is better, as pictures and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ctrlib.analysis.charts import Series, chart, dots, legend
from ctrlib.analysis.page import details, heading, page, table, text
from ctrlib.analysis.runs import Run, finite

NUMBERS = "these numbers as a table"
MOST = 12  # pictures of what was measured
EXPLAINED = (
    "Intervals are 95 %: an estimate and 1.96 standard errors to each side. AUC: the chance that a positive row has a "
    "higher score than a negative one. Normalised entropy: log-loss over that of the base rate, 1 for a constant. "
    "Calibration: predicted over observed, 1 if as many come as were predicted. A click on a heading sorts."
)
RANKING = (
    ("AUC", "auc"),
    ("SE", "auc_se"),
    ("SE, groups", "auc_se_groups"),
    ("GAUC", "gauc"),
    ("GAUC SE", "gauc_se"),
    ("PR-AUC", "pr_auc"),
    ("rows", "rows"),
    ("positives", "positives"),
)
PROBABILITIES = (
    ("log-loss", "log_loss"),
    ("SE", "log_loss_se"),
    ("SE, groups", "log_loss_se_groups"),
    ("NE", "normalized_entropy"),
    ("calibration", "calibration"),
    ("SE by chance", "calibration_se"),
    ("ECE", "ece"),
    ("ECE by chance", "ece_by_chance"),
)
OF_RUNS = (
    ("validation AUC", "valid_auc"),
    ("test AUC", "test_auc"),
    ("SE", "test_auc_se"),
    ("test log-loss", "test_logloss"),
    ("NE", "test_normalized_entropy"),
    ("calibration", "test_calibration"),
    ("GAUC", "test_gauc"),
    ("best epoch", "best_epoch"),
    ("epochs", "epochs"),
    ("seed", "seed"),
)
COSTS = (
    ("parameters", "parameters"),
    ("of the network", "network_parameters"),
    ("embedding bytes", "embedding_bytes"),
    ("training rows/s", "samples_per_second"),
    ("scored rows/s", "inference_samples_per_second"),
    ("seconds in all", "seconds"),
)
COUNTS = ("rows", "positives", "best_epoch", "epochs", "seed", "parameters", "network_parameters", "embedding_bytes")
Cell = str | int | float | None


@dataclass(frozen=True)
class Content:
    """What a page is made of; what is empty has no section."""

    title: str
    runs: Sequence[Run] = ()
    evaluated: Sequence[Mapping[str, Any]] = ()
    """What `evaluate_predictions` gave, of each label."""
    importance: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Name of a run -> what `permutation_importance` gave."""
    remarks: Sequence[str] = ()
    """What is to be said of how it was made."""
    refresh: int = 0
    """Seconds after which a browser reads the page again; 0 for never."""


def report(content: Content) -> str:
    """The whole page."""
    parts = [text(sentence) for sentence in content.remarks]
    parts.append(text(EXPLAINED))
    names = [run.name for run in content.runs]
    if content.runs:
        parts += [*_runs(content.runs), *_records(content.runs, drawn=not content.evaluated)]
    for evaluated in content.evaluated:
        several = len(content.evaluated) > 1
        parts += _evaluated(evaluated, f" of {evaluated['label']}" if several else "")
    parts += _importance(content.importance, names)
    parts += _beside(content.runs)
    parts += _curves(content.runs)
    parts += _costs(content.runs)
    return page(content.title, parts, refresh=content.refresh)


def _cell(value: Any, key: str = "") -> Cell:
    if isinstance(value, str):
        return value
    number = finite(value)
    if isinstance(value, float) and math.isinf(value):
        return "infinite"
    return int(number) if number is not None and (key in COUNTS or isinstance(value, int)) else number


def _columns(rows: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that a row has."""
    return [(name, key) for name, key in wanted if any(_cell(row.get(key)) is not None for row in rows)]


def _interval(values: Sequence[Any], errors: Sequence[Any]) -> tuple[list[float], list[float], list[float]]:
    """Values with the ends of their intervals, nan for what is undefined."""
    middle = [math.nan if finite(value) is None else float(value) for value in values]
    half = [math.nan if finite(error) is None else 1.96 * float(error) for error in errors]
    return middle, [a - b for a, b in zip(middle, half)], [a + b for a, b in zip(middle, half)]


# ---------------------------------------------------------------------------------------------------------------- runs


def _runs(runs: Sequence[Run]) -> list[str]:
    results = [run.result for run in runs]
    columns = _columns(results, OF_RUNS)
    parts = [heading("Runs" if len(runs) > 1 else "The run"), text(_how(runs))]
    rows: list[list[Cell]] = [
        [
            run.name,
            run.model,
            str(run.result.get("engine", "")),
            *(_cell(run.result.get(key), key) for _, key in columns),
        ]
        for run in runs
    ]
    parts.append(table(["run", "model", "engine", *(name for name, _ in columns)], rows, 6))
    notes = [f"{run.name}: {note}" for run in runs if (note := str(run.result.get("note", "")))]
    return parts + [text(note) for note in notes]


def _how(runs: Sequence[Run]) -> str:
    missing = [run.name for run in runs if not run.result and run.is_over]
    at_work = [run.name for run in runs if not run.is_over]
    said = "What each run reported when it was over: its epoch was chosen by validation, and test was scored once."
    if len({run.result.get("data_hash") for run in runs if run.result}) > 1:
        said += " These runs were prepared in different ways: their test rows may differ, and so do not compare."
    said += f" Nothing was reported by {', '.join(missing)}." if missing else ""
    return said + (f" Not over yet: {', '.join(at_work)}." if at_work else "")


def _records(runs: Sequence[Run], *, drawn: bool) -> list[str]:
    """What was measured in the end, with intervals, in one form for all tasks; drawn unless that is done anew below."""
    lines = [(place, run, line) for place, run in enumerate(runs) if run.record for line in run.record["metrics"]]
    if not lines:
        return []
    parts = [heading("What was measured")] if drawn else []
    wanted = list(dict.fromkeys((line["split"], line["label"], line["metric"]) for _, _, line in lines))
    labels = {label for _, label, _ in wanted}
    for split, label, metric in wanted[:MOST] if drawn else ():
        mine = [(place, run, line) for place, run, line in lines if _is(line, split, label, metric)]
        names = [run.name for _, run, _ in mine]
        series = []
        for row, (place, run, line) in enumerate(mine):
            ends = [math.nan if line[end] is None else line[end] for end in ("value", "low", "high")]
            series.append(_alone(run.name, row, len(mine), ends, place))
        of_label = f" of {label}" if len(labels) > 1 else ""
        parts.append(dots(f"{split} {metric}{of_label}", names, series, metric, overlaid=True))
    rows: list[list[Cell]] = [
        [
            *(run.name, line["split"], line["label"], line["metric"]),
            *(_cell(line[key]) for key in ("value", "standard_error", "low", "high")),
            *(run.record["independent"], run.record["chosen_by"], run.record["rows_hash"][:12]),
        ]
        for _, run, line in lines
        if run.record
    ]
    columns = ["run", "split", "label", "metric", "value", "SE", "low", "high", "independent", "epoch by", "rows"]
    return [*parts, details(NUMBERS if drawn else "what was measured then, with intervals", table(columns, rows, 5))]


def _is(line: Mapping[str, Any], split: str, label: str, metric: str) -> bool:
    return (line["split"], line["label"], line["metric"]) == (split, label, metric)


def _alone(name: str, row: int, number: int, ends: Sequence[float], colour: int) -> Series:
    """A value and its interval in one row, and nothing in the others."""
    value, low, high = ([end if at == row else math.nan for at in range(number)] for end in ends)
    return Series(name, [], value, low, high, colour=colour)


def _beside(runs: Sequence[Run]) -> list[str]:
    """Simple models beside, as training has found them."""
    lines = [{"run": run.name, **line} for run in runs for line in run.result.get("baselines", ())]
    if not lines:
        return []
    wanted = (
        *(("AUC", "auc"), ("log-loss", "log_loss"), ("NE", "normalized_entropy"), ("calibration", "calibration")),
        *(("AUC of the run minus it", "difference"), ("SE", "difference_se"), ("p", "p_value")),
        *(("rows", "rows"), ("seconds", "seconds")),
    )
    columns = _columns(lines, wanted)
    rows = [
        [line["run"], line["label"], line["name"], *(_cell(line.get(key), key) for _, key in columns)] for line in lines
    ]
    said = "Fitted on train by the run's own command, and scored on the same rows of test."
    parts = [heading("Beside simple models"), text(said)]
    parts.append(table(["run", "label", "model", *(name for name, _ in columns)], rows, 5))
    warnings = [f"{run.name}: {sentence}" for run in runs for sentence in run.result.get("warnings", ())]
    return parts + [text(f"Warning: {sentence}.") for sentence in warnings]


def _curves(runs: Sequence[Run]) -> list[str]:
    shown = [(place, run) for place, run in enumerate(runs) if run.epochs]
    if not shown:
        return []

    def series(key: str, name: str = "", dashed: bool = False) -> list[Series]:
        found = []
        for place, run in shown:
            best = int(run.result.get("best_epoch", 0)) - 1
            y = [math.nan if finite(line.get(key)) is None else float(line[key]) for line in run.epochs]
            x = [float(line["epoch"]) for line in run.epochs]
            marked = (best,) if not dashed else ()
            found.append(Series(f"{run.name}{name}", x, y, dashed=dashed, colour=place, marked=marked))
        return found

    columns = ["epoch", "train_loss", "valid_auc", "valid_log_loss", "valid_gauc", "learning_rate", "seconds"]
    columns = [name for name in columns if any(line.get(name) is not None for _, run in shown for line in run.epochs)]
    rows = [[run.name, *(_cell(line.get(name)) for name in columns)] for _, run in shown for line in run.epochs]
    return [
        heading("Learning curves"),
        text("The larger dot is the epoch that was kept. Dashed: loss on the rows trained on, as the weights moved."),
        legend([run.name for run in runs]),
        chart("Validation AUC", series("valid_auc"), "epoch", "AUC", whole=True),
        chart(
            "Log-loss",
            [*series("valid_log_loss", ", validation"), *series("train_loss", ", train", dashed=True)],
            "epoch",
            "nats",
            whole=True,
        ),
        details(NUMBERS, table(["run", *(name.replace("_", " ") for name in columns)], rows, 6)),
    ]


def _costs(runs: Sequence[Run]) -> list[str]:
    columns = _columns([run.result for run in runs], COSTS)
    if not columns:
        return []
    rows = [[run.name, *(_cell(run.result.get(key), key) for _, key in columns)] for run in runs]
    said = "Rows a second with loading, on the machine of the run; bytes of tables, wide part and vectors of numbers."
    return [heading("Throughput and bytes"), text(said), table(["run", *(name for name, _ in columns)], rows, 6)]


# -------------------------------------------------------------------------------------------------- scores on some rows


def _evaluated(found: Mapping[str, Any], of_label: str) -> list[str]:
    lines = found["scores"]
    names = [line["score"] for line in lines]
    parts = [heading(f"Metrics{of_label}"), text(f"On {found['data']}, label {found['label']}.")]
    middle, low, high = _interval([line["auc"] for line in lines], [_error_of(line) for line in lines])
    number = len(names)  # a row for each name, in the colour that it has everywhere
    series = [
        _alone(name, place, number, [ends[place] for ends in (middle, low, high)], place)
        for place, name in enumerate(names)
    ]
    parts.append(dots("AUC and its 95 % interval", names, series, "AUC", overlaid=True))
    for wanted in (RANKING, PROBABILITIES):
        if columns := _columns(lines, wanted):
            rows = [[line["score"], *(_cell(line.get(key), key) for _, key in columns)] for line in lines]
            parts.append(table(["run", *(name for name, _ in columns)], rows, 5))
    parts += [
        text(f"{line['score']}: {line['refuted']:,.0f} rows have a probability of 0 or 1 and the other label.")
        for line in lines
        if line.get("refuted")
    ]
    parts += _paired(found["paired"], len(lines), of_label)
    parts += _reliability(found["reliability"], names, of_label)
    parts += _slices(found.get("by", []), names, of_label)
    return parts


def _error_of(line: Mapping[str, Any]) -> Any:
    """Where groups are known, the error of rows that are independent between groups only."""
    error = line.get("auc_se_groups")
    return line.get("auc_se") if finite(error) is None else error


def _paired(lines: Sequence[Mapping[str, Any]], number: int, of_label: str) -> list[str]:
    if number < 2:
        return []
    parts = [heading(f"Which ranks better{of_label}")]
    if not lines:
        return [*parts, text("Rows have weights that differ, and of such rows there is no paired test.")]
    independent = "groups (users)" if lines[0]["by_groups"] else "rows"
    parts.append(
        text(
            f"AUC of the first minus that of the second, on the same rows; {independent} are taken as independent. p "
            "is that of no difference. It says nothing of another seed of training."
        )
    )
    names = [f"{line['score']} - {line['other']}" for line in lines]
    middle, low, high = _interval([line["difference"] for line in lines], [line["standard_error"] for line in lines])
    parts.append(
        dots("Difference of AUC, 95 %", names, [Series("difference", [], middle, low, high)], "AUC", guide=0.0)
    )
    rows: list[list[Cell]] = [
        [
            line["score"],
            line["other"],
            _cell(a),
            _cell(line["standard_error"]),
            _cell(b),
            _cell(c),
            _cell(line["p_value"]),
        ]
        for line, a, b, c in zip(lines, middle, low, high)
    ]
    return [*parts, table(["first", "second", "difference", "SE", "low", "high", "p"], rows, 4)]


def _reliability(bins: Mapping[str, Any], names: Sequence[str], of_label: str) -> list[str]:
    if not bins:
        return []
    series, rows = [], []
    spread = [rate for one in bins.values() for rate in one.predicted.tolist()]
    log = min(spread) > 0 and max(spread) > 10 * min(spread)
    for place, name in enumerate(names):
        one = bins[name]
        predicted, observed, chance = (list(map(float, part)) for part in (one.predicted, one.observed, one.by_chance))
        low = [max(0.0, a - 2 * b) for a, b in zip(predicted, chance)]
        high = [a + 2 * b for a, b in zip(predicted, chance)]
        series.append(Series(name, predicted, observed, low, high, colour=place))
        rows += [
            [name, int(number) if float(number).is_integer() else float(number), a, b, c]
            for number, a, b, c in zip(one.rows, predicted, observed, chance)
        ]
    return [
        heading(f"Reliability{of_label}"),
        text(
            "What was predicted and what came, in twenty bins of equally many rows. Bars show where points of a "
            "perfect model may lie: twice the distance to expect by chance to each side of the line."
        ),
        legend(names),
        chart("Reliability", series, "mean predicted", "share of positives", log=log, diagonal=True),
        details(NUMBERS, table(["run", "rows", "predicted", "observed", "by chance"], rows, 4)),
    ]


def _slices(lines: Sequence[Mapping[str, Any]], names: Sequence[str], of_label: str) -> list[str]:
    parts = []
    for column in dict.fromkeys(line["column"] for line in lines):
        mine = [line for line in lines if line["column"] == column]
        values = list(dict.fromkeys(line["value"] for line in mine))
        parts += [heading(f"By {column}{of_label}"), legend(names)]
        for title, key, error, guide in (
            ("AUC", "auc", "auc_se", None),
            ("Calibration (predicted / observed)", "calibration", "calibration_se", 1.0),
        ):
            series = []
            for place, name in enumerate(names):
                of_value = {line["value"]: line for line in mine if line["score"] == name}
                found = [of_value.get(value, {}) for value in values]
                numbers = _interval([line.get(key) for line in found], [line.get(error) for line in found])
                series.append(Series(name, [], *numbers, colour=place))
            parts.append(dots(title, values, series, title.split(" (")[0], guide=guide))
        columns = _columns(mine, (*RANKING, *PROBABILITIES))
        rows = [[line["value"], line["score"], *(_cell(line.get(key), key) for _, key in columns)] for line in mine]
        parts.append(details(NUMBERS, table([column, "run", *(name for name, _ in columns)], rows, 5)))
    return parts


def _importance(found: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> list[str]:
    if not found:
        return []
    lines = [{"run": name, **line} for name, of_run in found.items() for line in of_run]
    parts = [
        heading("Permutation importance"),
        text(
            f"By how much the AUC of {lines[0]['rows']:,} rows falls when the values of a feature, or of several "
            "together, come from other rows. Features that tell the same stand in for each other: alone, each seems to "
            "matter less than both."
        ),
        legend(list(found)),
    ]
    for label in dict.fromkeys(line["label"] for line in lines):
        mine = [line for line in lines if line["label"] == label]
        features = list(dict.fromkeys(line["features"] for line in mine))
        series = []
        for name in found:
            of_feature = {line["features"]: line for line in mine if line["run"] == name}
            drop, low, high = (
                [float(of_feature.get(feature, {}).get(key, math.nan)) for feature in features]
                for key in ("auc_drop", "low", "high")
            )
            series.append(Series(name, [], drop, low, high, colour=list(names).index(name)))
        title = "Fall of AUC, 95 %" + (f", {label}" if len({line["label"] for line in lines}) > 1 else "")
        parts.append(dots(title, features, series, "AUC", guide=0.0))
    columns = ["run", "label", "features", "auc_drop", "standard_error", "low", "high", "log_loss_rise"]
    rows = [[_cell(line[name]) for name in columns] for line in lines]
    return [*parts, details(NUMBERS, table([name.replace("_", " ") for name in columns], rows, 4))]
