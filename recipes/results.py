"""docs/results.md, the README's table and docs/speed.svg, made from results.csv, beside what was published.

    python recipes/results.py

Runs are repeats if data (and the hash of its schema), model, engine, precision and note are the same. If one seed was
run twice, the later row counts: results.csv is append-only. Data of the same name but another hash is other data, so it
has a row of its own; so have runs whose records say that they saw other rows. Rows from before the column "record" say
nothing of theirs, and count as repeats of the first runs that do.
"""

from __future__ import annotations

import csv
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from records import AVERAGED

HERE = Path(__file__).parent
BEGIN = "<!-- results: made by recipes/results.py from recipes/results.csv, do not edit -->"
END = "<!-- end of results -->"
PAGE = """# Results

Every recorded run, by data set. This page is made by `python recipes/results.py` from `recipes/results.csv`: do not
edit it. How a run is trained is in the recipe of its data set, `recipes/NAME.py`.

## How the numbers are made

* The epoch is chosen by validation AUC. That model's test AUC is computed once and reported. Settings are tuned on
  validation only.
* Comparisons are means and standard deviations over seeds, with engine and data named. If one seed was run twice, the
  later run counts.
* AUC is exact, ties count one half. GAUC weights users by their rows. Log-loss is in nats.
* On a CPU, with as many threads of torch (`OMP_NUM_THREADS`), the same seed gives the same bits.
* What others published stands in a column of its own, with its source.
* A row of `recipes/results.csv` names commit, versions, hardware and the hash of the prepared data's schema. Rows are
  added and never edited. `python recipes/frappe.py --model deepfm --seed 1 --record` adds one.

{}
"""

BARS = "BARS, mean of 5 seeds"
CHOSEN = "BARS, the run chosen by validation"
BEST = "BARS, best test AUC of a grid"
AUTOINT = "AutoInt, CIKM 2019, mean of 10 runs"
RECHUB = "torch-rechub's own run, with the leak; another half of the test file"
RERUN = "torch-rechub 0.9.0 without the leak, rerun, 2 seeds"
UNIFIED = "Unified Embedding, NeurIPS 2023, collisionless tables"
# (data, model) of results.csv -> test AUC as published, and by whom. Where the model is not quite ours, it is named.
PUBLISHED: dict[tuple[str, str], str] = {
    ("frappe_x1", "fm"): f"0.9671 ({BEST})",
    ("frappe_x1", "mlp"): f"0.98405 ({BARS})",
    ("frappe_x1", "wide_deep"): f"0.98307 ({BARS})",
    ("frappe_x1", "deepfm"): f"0.98395 ({BARS})",
    ("frappe_x1", "xdeepfm"): f"0.98414 ({BARS})",
    ("frappe_x1", "dcn"): f"0.98342 ({BARS})",
    ("frappe_x1", "dcnv2"): f"0.98382 ({BARS})",
    ("frappe_x1", "gdcn"): "0.9852 (GDCN-P, CIKM 2023, width 16)",
    ("frappe_x1", "eulernet"): "0.98478 (log of the authors)",
    ("frappe_x1", "dlrm"): f"plain MLP: 0.98400 ({BEST})",
    ("frappe_x1", "autoint"): f"0.98309 ({BEST})",
    ("frappe_x1", "autoint_plus"): f"0.98398 ({CHOSEN})",
    ("frappe_x1", "ipnn"): f"0.98412 ({BEST})",
    ("frappe_x1", "fibinet"): f"0.98318 ({BEST})",
    ("frappe_x1", "masknet"): f"0.98368 ({BEST})",
    ("frappe_x1", "dualmlp"): f"0.98465 ({BEST})",
    ("frappe_x1", "finalmlp"): f"0.98594 ({CHOSEN})",
    ("frappe_x1", "finalnet"): f"0.98554 ({CHOSEN})",
    ("movielens_1m_autoint", "fm"): f"0.8252 ({AUTOINT})",
    ("movielens_1m_autoint", "wide_deep"): f"0.8300 ({AUTOINT})",
    ("movielens_1m_autoint", "dcn"): f"0.8446 ({AUTOINT})",
    ("movielens_1m_autoint", "dcnv2"): f"DCN: 0.8446 ({AUTOINT})",
    ("movielens_1m_autoint", "dcnv2_time"): f"DCN: 0.8446 ({AUTOINT})",
    ("movielens_1m_autoint", "deepfm"): f"0.8437 ({AUTOINT})",
    ("movielens_1m_autoint", "xdeepfm"): f"0.8463 ({AUTOINT})",
    ("movielens_1m_autoint", "autoint"): f"0.8456 ({AUTOINT})",
    ("movielens_1m_autoint", "autoint_plus"): f"0.8488 ({AUTOINT})",
    **{
        (f"census_income_leaked, {label}", model): f"{auc} ({RECHUB})"
        for model, *both in (
            ("shared_bottom", "0.9560", "0.9948"),
            ("mmoe", "0.9579", "0.9950"),
            ("ple", "0.9593", "0.9950"),
            ("aitm", "0.9595", "0.9951"),
        )
        for label, auc in zip(("income", "never_married"), both)
    },
    ("census_income_numbers, income", "mmoe"): f"0.9485 ({RERUN})",
    ("census_income_numbers, never_married", "mmoe"): f"0.9948 ({RERUN})",
    **{
        ("movielens_1m_ids", model): f"{paper} (Unified Embedding, NeurIPS 2023); {rerun} (rerun by others)"
        for model, paper, rerun in (
            ("collisionless", "0.8872", "0.8985"),
            ("hashing_1600k", "0.8537", "0.8684"),
            ("hashing_791k", "0.8300", "0.8407"),
            ("hashing_158k", "0.7707", "0.7712"),
            ("multiplexed_1600k", "0.8774", "0.8872"),
            ("multiplexed_791k", "0.8693", "0.8759"),
            ("multiplexed_158k", "0.8200", "0.8263"),
        )
    },
    ("movielens_1m_ids", "dcnv2"): f"0.8872 ({UNIFIED}); 0.8985 (rerun by others)",
}

KEY = ("task", "data", "data_hash", "model", "engine", "precision", "note")
VALUES = ("valid_auc", "test_auc", "test_logloss", "network_parameters", "embedding_bytes", "samples_per_second")
INFERENCE = "inference_samples_per_second"  # not known of the first runs
NEEDED = (*KEY, "seed", *VALUES, INFERENCE, "hardware", "scores", "record")
# Data sets in the README's table, and what they are.
SHORT = {
    "frappe_x1": "Frappe (its train split rebuilt)",
    "movielens_1m_autoint": "MovieLens-1M, AutoInt's split, no ids",
    "movielens_1m_ids": "MovieLens-1M with ids",
    "movielens_1m_histories": "MovieLens-1M, histories by time",
    "amazon_grocery": "Amazon Grocery, histories by time",
    "movielens_1m_labels, liked": "MovieLens-1M, two labels: liked",
    "census_income, income": "Census-Income, two labels: income",
    "criteo_synthetic": "Criteo-shaped synthetic, 1.1 M ids",
}
HEADINGS = (
    *("data", "model", "engine", "seeds", "test AUC", "log-loss (nats)"),
    *("network parameters", "embedding bytes", "training samples/s", "inference samples/s", "published test AUC"),
)
EMPTY = (
    "No run is recorded yet. `python recipes/frappe.py --record` appends one to recipes/results.csv, and "
    "`python recipes/results.py` makes this table from that file."
)


@dataclass(frozen=True)
class Arguments:
    """Write the tables of results."""

    results: Path = HERE / "results.csv"
    """What `--record` of the recipes has appended to."""
    readme: Path = HERE.parent / "README.md"
    """File with the two markers between which the best of each data set stand."""
    page: Path = HERE.parent / "docs" / "results.md"
    """File for all results."""


def read(path: Path) -> list[list[dict[str, str]]]:
    """The runs in groups of repeats, in the order in which each group first comes up; nothing if there is no file.

    Raises:
        ValueError: a column is missing, or a row has too few cells or too many.
    """
    if not path.exists():
        return []
    rows: list[tuple[tuple[str, ...], dict[str, str]]] = []
    saw: dict[tuple[str, ...], str] = {}  # the hash of the rows that the first runs saw of which one knows
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no columns {missing}: expected what `--record` of the recipes writes")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} cells")
            row["task"] = row["task"] or "ctr"  # of rows before the column was added
            key = tuple(row[name] for name in KEY)
            if row["record"]:
                saw.setdefault(key, json.loads(row["record"])["rows_hash"])
            rows.append((key, row))
    groups: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for key, row in rows:
        rows_hash = json.loads(row["record"])["rows_hash"] if row["record"] else saw.get(key, "")
        groups.setdefault((*key, rows_hash), {})[row["seed"]] = row
    return [list(by_seed.values()) for by_seed in groups.values()]


def best_of_each(groups: list[list[dict[str, str]]]) -> list[list[dict[str, str]]]:
    """Of each data set the runs with the best mean validation AUC."""
    best: dict[str, list[dict[str, str]]] = {}
    for runs in groups:
        kept = best.setdefault(runs[0]["data"], runs)
        if _mean(runs, "valid_auc") > _mean(kept, "valid_auc"):
            best[runs[0]["data"]] = runs
    return list(best.values())


def make_table(groups: list[list[dict[str, str]]], published: dict[tuple[str, str], str]) -> str:
    """The table of all groups, as markdown.

    Best mean test AUC first. A published number stands beside every engine; where the note on the data says that they
    differ from what was published, it says to see that note.
    """
    if not groups:
        return EMPTY
    data_names = list(dict.fromkeys(runs[0]["data"] for runs in groups))
    groups = sorted(groups, key=lambda runs: (data_names.index(runs[0]["data"]), -_mean(runs, "test_auc")))
    notes = list(dict.fromkeys(runs[0]["note"] for runs in groups if runs[0]["note"]))
    lines = [" | ".join(HEADINGS), " | ".join(["---"] * 3 + ["--:"] * 7 + ["---"])]
    for runs in groups:
        first = runs[0]
        note = f" [{notes.index(first['note']) + 1}]" if first["note"] else ""
        engine = first["engine"] + ("" if first["precision"] in ("", "fp32") else f", {first['precision']}")
        source = published.get((first["data"], first["model"].removesuffix(AVERAGED)), "")
        cells = (
            first["data"] + note,
            first["model"],
            engine,
            str(len(runs)),
            _mean_and_sd(runs, "test_auc"),
            _mean_and_sd(runs, "test_logloss"),
            _whole(runs, "network_parameters"),
            _whole(runs, "embedding_bytes"),
            _speed(runs, "samples_per_second"),
            _speed(runs, INFERENCE),
            source + "; see note" if source and first["note"] else source,
        )
        lines.append(" | ".join(cells))
    table = "\n".join(f"| {line} |" for line in lines)
    said = [f"[{number}] {note}" for number, note in enumerate(notes, start=1)]
    hashes = ", ".join(f"{name} {', '.join(_distinct(groups, name, 'data_hash'))}" for name in data_names)
    hardware = "; ".join(dict.fromkeys(run["hardware"] for runs in groups for run in runs))
    said.append(
        "Mean ± standard deviation over seeds; each run's epoch was chosen by validation. Samples/s: training alone "
        f"and inference alone, loading included, median over seeds ({hardware}; several runs at a time, so that they "
        f"say little; recipes/speed.py measures). Schema hashes: {hashes}."
    )
    return "\n\n".join([table, *said])


def _distinct(groups: list[list[dict[str, str]]], data: str, column: str) -> list[str]:
    return list(dict.fromkeys(runs[0][column] for runs in groups if runs[0]["data"] == data))


def _mean(runs: list[dict[str, str]], column: str) -> float:
    return statistics.fmean(float(run[column]) for run in runs)


def _mean_and_sd(runs: list[dict[str, str]], column: str) -> str:
    """Nothing where a run did not tell, as those of other libraries."""
    return _in_words([float(run[column]) for run in runs]) if all(run[column] for run in runs) else ""


def _in_words(values: list[float]) -> str:
    """Mean and standard deviation; thousands as whole numbers."""
    mean = statistics.fmean(values)
    form = ".5f" if abs(mean) < 1000 else ",.0f"
    return f"{mean:{form}} ± {statistics.stdev(values):{form}}" if len(values) > 1 else f"{mean:{form}}"


def _whole(runs: list[dict[str, str]], column: str) -> str:
    return " or ".join(dict.fromkeys(f"{int(run[column]):,}" for run in runs if run[column]))


def _speed(runs: list[dict[str, str]], column: str) -> str:
    """The median; nothing if it was not measured, or on several machines: their mean would be the speed of none."""
    if len({run["hardware"] for run in runs}) > 1:
        return "several machines"
    values = [float(run[column]) for run in runs if run[column]]
    return f"{statistics.median(values):,.0f}" if values else ""


def rewritten(text: str, table: str) -> str:
    """The text with `table` between the markers.

    Raises:
        ValueError: a marker is missing or not there once.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"expected the line {marker!r} once, found it {text.count(marker)} times")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def make_short_table(groups: list[list[dict[str, str]]], published: dict[tuple[str, str], str]) -> str:
    """For the README: of each data set named in `SHORT` its best model, in few columns."""
    best = {runs[0]["data"]: runs for runs in best_of_each(groups)}
    lines = ["| data | best model | seeds | test AUC | published |", "| --- | --- | --: | --: | --- |"]
    for data, title in SHORT.items():
        if (runs := best.get(data)) is not None:
            source = published.get((data, runs[0]["model"].removesuffix(AVERAGED)), "")
            cells = (title, runs[0]["model"], str(len(runs)), _mean_and_sd(runs, "test_auc"), source)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else EMPTY


def make_scores_table(groups: list[list[dict[str, str]]]) -> str:
    """The table of a task whose numbers have no columns of their own, as markdown: a column for each score."""
    scores = [[json.loads(run["scores"] or "{}") for run in runs] for runs in groups]
    names = list(dict.fromkeys(name for of_runs in scores for run in of_runs for name in run))
    lines = [["data", "model", "seeds", *names], ["---", "---", "--:", *["--:"] * len(names)]]
    for runs, of_runs in zip(groups, scores):
        cells = [runs[0]["data"], runs[0]["model"], str(len(runs))]
        for name in names:
            values = [run[name] for run in of_runs if name in run]
            cells.append(_in_words(values) if values else "")
        lines.append(cells)
    return _table(lines)


def make_record_table(groups: list[list[dict[str, str]]]) -> str:
    """What the records of runs say, of every task alike, as markdown; nothing if no row has one."""
    lines = [
        ["data", "model", "split", "label", "metric", "seeds", "value", "95 %", "independent", "epoch by", "rows"],
        ["---"] * 5 + ["--:"] * 3 + ["---"] * 3,
    ]
    for runs in groups:
        records = [json.loads(run["record"]) for run in runs if run["record"]]
        measured: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for one in (one for said in records for one in said["metrics"] if one["value"] is not None):
            measured.setdefault((one["split"], one["label"], one["metric"]), []).append(one)
        for what, found in measured.items():
            halves = [(one["high"] - one["low"]) / 2 for one in found if one["low"] is not None]
            cells = [*what, str(len(found)), _in_words([one["value"] for one in found])]
            cells.append(f"± {statistics.fmean(halves):.5f}" if halves else "")
            said = records[0]
            cells += [said["independent"], said["chosen_by"], said["rows_hash"][:12]]
            lines.append([runs[0]["data"], runs[0]["model"], *cells])
    explained = (
        "From the records of the runs that left one. Value: mean ± standard deviation over seeds. 95 %: to each side "
        "of one run's value, what other rows of the split would change, where what is named independent is drawn anew; "
        "more seeds do not make that smaller. Rows: the hash of all rows and their split."
    )
    return f"{explained}\n\n{_table(lines)}" if len(lines) > 2 else ""


def make_rerun_table(groups: list[list[dict[str, str]]], published: dict[tuple[str, str], str]) -> str:
    """Models that another library was run with on the same rows, as markdown: what was published, its run, ours."""

    def key(run: dict[str, str], model: str, precision: str) -> tuple[str, ...]:
        return (*(run[name] for name in ("data", "data_hash", "engine")), precision, model)

    ours = {key(runs[0], runs[0]["model"], runs[0]["precision"]): runs for runs in groups}
    lines = [["data", "model", "published test AUC", "run here", "seeds", "its test AUC", "our seeds", "our test AUC"]]
    lines.append(["---"] * 4 + ["--:"] * 4)
    for runs in groups:
        model, _, library = runs[0]["model"].partition(" of ")
        for name, precision in itertools.product((model, model + AVERAGED), ("fp32", "bf16")):
            own = ours.get(key(runs[0], name, precision))
            if library and own:
                called = name + ", bf16" * (precision == "bf16")
                cells = [runs[0]["data"], called, published.get((runs[0]["data"], model), ""), runs[0]["note"]]
                for some in (runs, own):
                    cells += [str(len(some)), _mean_and_sd(some, "test_auc")]
                lines.append(cells)
    return _table(lines) if len(lines) > 2 else ""


def make_speed_tables(groups: list[list[dict[str, str]]]) -> str:
    """What `recipes/speed.py` recorded, as markdown: ctrlib beside its peers, and what the machines allowed."""
    beside: list[tuple[list[dict[str, str]], dict[str, float]]] = []
    machines: list[tuple[list[dict[str, str]], dict[str, float]]] = []
    for runs in groups:
        of_runs = [json.loads(run["scores"]) for run in runs]
        names = dict.fromkeys(name for scores in of_runs for name in scores)
        medians = {name: statistics.median(s[name] for s in of_runs if name in s) for name in names}
        (beside if "ctrlib" in medians else machines).append((runs, medians))
    named = [name for _, scores in beside for name in scores if not name.startswith("times ") and name != "ctrlib"]
    peers = list(dict.fromkeys(named))
    lines = [["data", "model", "engine", "measure", "ctrlib", *peers, "machine", "note"]]
    lines.append(["---"] * 4 + ["--:"] * (1 + len(peers)) + ["---"] * 2)
    for runs, scores in beside:
        cells = [*_measured(runs), _figure(scores["ctrlib"])]
        for peer in peers:
            ratio = f" ({scores[f'times {peer}']:.2f}x)" if f"times {peer}" in scores else ""
            cells.append(_figure(scores[peer]) + ratio if peer in scores else "")
        lines.append([*cells, runs[-1]["hardware"], runs[-1]["note"]])
    said = (
        "In brackets: how many times better ctrlib is, which is how many times faster or smaller. Everything in a row "
        "was measured in one run, in turns; [speed](speed.md) says how."
    )
    text = f"{_table(lines)}\n\n{said}"
    if machines:
        names = dict.fromkeys(name for _, scores in machines for name in scores)
        lines = [["data", "model", "engine", *names, "machine"], ["---"] * 3 + ["--:"] * len(names) + ["---"]]
        for runs, scores in machines:
            figures = [_figure(scores[name]) if name in scores else "" for name in names]
            lines.append([*_measured(runs)[:3], *figures, runs[-1]["hardware"]])
        text += f"\n\nWhat the machines allowed:\n\n{_table(lines)}"
    return text


def _measured(runs: list[dict[str, str]]) -> list[str]:
    """Data, model, engine and what was measured."""
    run = runs[-1]
    model, _, measure = run["model"].partition(": ")
    return [
        run["data"],
        model,
        run["engine"] + ("" if run["precision"] == "fp32" else f", {run['precision']}"),
        measure,
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw_speed(groups: list[list[dict[str, str]]], path: Path) -> None:
    """Bars of how many times better ctrlib is than each peer, from the last run of each measure, on a doubling axis."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ratios: dict[str, dict[str, float]] = {}
    for runs in groups:
        scores = json.loads(runs[-1]["scores"])
        data, model, engine, measure = _measured(runs)
        found = {name.removeprefix("times "): value for name, value in scores.items() if name.startswith("times ")}
        if found:
            what = f"{data.partition('_')[0]}, {model}: {measure.partition(', ')[0]}"
            ratios[what + ", bf16" * engine.endswith("bf16")] = found
    # A step is part of an epoch, and need not stand beside it.
    ratios = {
        what: found
        for what, found in ratios.items()
        if ": step" not in what or what.replace(": step", ": epoch") not in ratios
    }
    peers = list(dict.fromkeys(peer for found in ratios.values() for peer in found))
    # Text stays text and no date is written, so that the same numbers give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "speed"}):
        figure = Figure(figsize=(9, 0.8 + 0.22 * len(ratios) * (1 + len(peers))), layout="constrained")
        axes = figure.subplots()
        for place, peer in enumerate(peers):
            at = [n + 0.8 * (place + 0.5) / len(peers) for n, found in enumerate(ratios.values()) if peer in found]
            values = [found[peer] for found in ratios.values() if peer in found]
            bars = axes.barh(at, [value - 1 for value in values], 0.8 / len(peers), left=1, label=peer)
            axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize="small")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_yticks([n + 0.4 for n in range(len(ratios))], list(ratios))
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set(xlabel="how many times better ctrlib is", title="Beside other libraries: each bar within one run")
        axes.legend()
        axes.grid(axis="x", alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(arguments: Arguments) -> None:
    """Write all results, and the best of them into the README."""
    groups = read(arguments.results)
    by_task: dict[str, list[list[dict[str, str]]]] = {"ctr": []}
    for runs in groups:
        by_task.setdefault(runs[0]["task"], []).append(runs)
    text = arguments.readme.read_text(encoding="utf-8")
    arguments.readme.write_text(rewritten(text, make_short_table(by_task["ctr"], PUBLISHED)), encoding="utf-8")
    of_ctr = by_task.pop("ctr")
    sections = [f"## Click-through rate\n\n{make_table(of_ctr, PUBLISHED)}"]
    if rerun := make_rerun_table(of_ctr, PUBLISHED):
        sections.append(f"## The same models of other libraries on the same rows\n\n{rerun}")
    speed = by_task.pop("speed", [])
    sections += [f"## {task.capitalize()}\n\n{make_scores_table(some)}" for task, some in by_task.items()]
    if recorded := make_record_table(groups):
        sections.append(f"## With intervals\n\n{recorded}")
    if speed:
        sections.append(f"## Speed\n\n{make_speed_tables(speed)}")
        draw_speed(speed, arguments.page.with_name("speed.svg"))
    arguments.page.write_text(PAGE.format("\n\n".join(sections)), encoding="utf-8")
    print(f"{arguments.page}: {len(groups)} rows from {sum(map(len, groups))} runs")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
