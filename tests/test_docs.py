"""docs/: the code of each page runs and does what it says; tables, links, names, flags and figures are right."""

from __future__ import annotations

import contextlib
import csv
import doctest
import importlib.util
import json
import math
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli
from ctrlib.cli import COMMANDS
from ctrlib.inputs import LOOK_UPS
from ctrlib.models import MODELS
from ctrlib.retrieval.table import METHODS, arguments_of
from ctrlib.search.methods import SEARCHES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# results.md is made by recipes/results.py.
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "results.md")
LANGUAGES = ("python", "bash", "text")  # run, run, and shown only


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str, int]]:
    """(language, code, number of the line before the code) of every fenced block."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(match[1], match[2], text.count("\n", 0, match.start(2))) for match in found]


def prose(text: str) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def shell_commands(code: str) -> list[list[str]]:
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


class Ran:
    """What the code of a page left behind: its names, and what each block of Python and each command printed."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "docs"}
        self.python: list[str] = []
        self.ctrlib: dict[str, list[str]] = defaultdict(list)

    def number(self, block: int) -> float:
        """The last number that a block of Python printed."""
        return float(re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", self.python[block])[-1])

    def aucs(self, command: str) -> list[float]:
        """The first AUC that each call of a command printed."""
        found = [re.search(r"\bAUC\D+(\d\.\d+)", printed) for printed in self.ctrlib[command]]
        return [math.nan if match is None else float(match[1]) for match in found]


@pytest.mark.parametrize("name", PAGES)
def test_code_runs_in_order_and_does_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran, before = Ran(), ""
    for language, code, line in blocks(page(name)):
        where = f"docs/{name}:{line}"
        assert language in LANGUAGES, f"{where}: what is {language!r}? Expected one of {LANGUAGES}"
        if language == "python":
            # Padded, so that a traceback shows the page's own lines.
            exec(compile("\n" * line + code, DOCS / name, "exec"), ran.names)
            before = capsys.readouterr().out
            ran.python.append(before)
        elif language == "bash":
            for words in shell_commands(code):
                if words[0] == "ctrlib":
                    assert cli.main(words[1:]) == 0, f"{where}: {shlex.join(words)} failed: {capsys.readouterr().err}"
                    ran.ctrlib[words[1]].append(capsys.readouterr().out)
                else:
                    check_other_command(words, where)
            before = ""
        else:
            assert before in ("", code), f"{where}: the code before it prints\n{before}"
    CHECKS.get(name, lambda ran: None)(ran)


def check_other_command(words: list[str], where: str) -> None:
    """What takes too long to run here must at least exist."""
    where = f"{where}: {shlex.join(words)}"
    assert words[0] in ("make", "python", "pip", "torchrun"), f"{where}: expected ctrlib, make, python, pip or torchrun"
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, f"{where}: no such target in the Makefile"
    elif words[0] == "pip":
        extra = re.search(r"ctrlib\[(\w+)\]", words[2])
        assert words[1] == "install", where
        assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), where
    elif "-m" in words:
        module = words[words.index("-m") + 1]
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{where}: no module {module}"
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), f"{where}: {module} cannot be run"
    else:
        scripts = [word for word in words if word.endswith(".py")]
        assert scripts, f"{where}: which script?"
        assert (ROOT / scripts[0]).is_file(), f"{where}: no such script"


def above(floor: float, *scores: float) -> None:
    assert scores, "there are no scores"
    assert all(score > floor for score in scores), scores


# What pages say of their code's results.


def check_data(ran: Ran) -> None:
    assert ran.python[1].split("[")[1].startswith("'price', 'age', 'clicked', 'item', 'user', 'shop'")
    head = Path("clicks.csv").read_text().splitlines(keepends=True)[:3]
    assert "".join(head) == next(code for language, code, _ in blocks(page("data.md")) if language == "text")
    printed = "".join(ran.python)
    assert "row 2 (line 3 of the file) has 1 cells" in printed
    assert "skipped 1 rows (price: not a finite number)" in printed
    assert "\nvocab/item " in printed
    files = first_cells(section(page("data.md"), "The prepared folder"))
    assert set(files) == {path.name for path in Path("data/clicks").iterdir()}
    for name in ("report.json", "schema.json"):
        assert json.loads(Path("data/clicks", name).read_text())


def check_models(ran: Ran) -> None:
    above(0.6, *ran.aucs("train"), *map(ran.number, (2, 3, 5, 6)))
    assert ran.names["products"].out_shape == (15,)


def check_training(ran: Ran) -> None:
    above(0.6, *ran.aucs("train"), ran.names["result"]["test_auc"], ran.number(2), ran.number(5))
    text = page("training.md")
    beside = {"baselines", "warnings"}
    usual = documented_metrics() - {"valid_tasks", "test_tasks"}
    for out, expected in {
        "runs/monday": usual,
        "runs/monday_py": usual - beside - {"calibrator"},
        "runs/calibrated": usual,
    }.items():
        result = json.loads(Path(out, "metrics.json").read_text())
        assert set(result) == expected
        for line in result.get("baselines", []):
            assert all(f"`{key}`" in section(text, "Beside every result") for key in line)
        for line in Path(out, "log.jsonl").read_text().splitlines():
            assert set(json.loads(line)) == set(first_cells(section(text, "log.jsonl")))
    files = section(text, "What a run writes")
    written = {path.name for path in Path("runs/monday").iterdir()}
    assert written == set(first_cells(files)) - {"plan.json", "checkpoints", "non_finite_batch.pt", "events.*"}
    assert {path.name for path in Path("runs/tuesday").iterdir()} == written


def check_smaller_models(ran: Ran) -> None:
    above(0.6, *ran.aucs("train"))
    assert "times fewer bytes of embeddings" in ran.ctrlib["compress"][0]
    result = json.loads(Path("runs/clicks_small/compression.json").read_text())
    assert result["ratio"] >= 3
    above(result["test_auc_before"] - 0.03, result["test_auc_after"])
    before, after = map(int, re.findall(r"\d+", ran.python[1].splitlines()[0]))
    assert after <= 6_000 < before
    assert set(first_cells(section(page("smaller_models.md"), "What counts as bytes"))) == set(result["bytes_after"])


def check_searches(ran: Ran) -> None:
    above(0.6, *ran.aucs("search"), *ran.aucs("evaluate"), ran.number(1))
    kept = {name: int(share) for name, share in re.findall(r"(\w+) (\d+)%", ran.ctrlib["search"][0])}
    assert kept["noise"] < kept["shop"]
    files = first_cells(section(page("searches.md"), "What a search writes"))
    for out in ("runs/optfs", "runs/dnis"):
        assert {path.name for path in Path(out).iterdir()} == set(files)
        result = json.loads(Path(out, "search.json").read_text())
        assert result["embedding_bytes"] < result["embedding_bytes_before"]


def check_labels(ran: Ran) -> None:
    above(0.8, *ran.aucs("train"), *ran.aucs("evaluate"))
    aucs = json.loads(ran.python[1])
    above(0.8, *aucs)
    verdicts = [task["verdict"] for task in ran.names["report"]["tasks"]]
    assert len(aucs) == len(verdicts) == len(ran.python[2].splitlines()) == 2
    assert Path("transfer.png").is_file()
    result = json.loads(Path("runs/both/metrics.json").read_text())
    assert {"valid_tasks", "test_tasks"} <= set(result) <= documented_metrics()


def check_serving(ran: Ran) -> None:
    above(0.6, *ran.aucs("train"), *ran.aucs("evaluate"), ran.number(3), ran.number(4))
    assert set(first_cells(section(page("serving.md"), "Score rows"))) == set(ran.names["counts"])
    assert set(ran.names["by_rows"]) == set(ran.names["by_split"]) | (set(ran.names["counts"]) - {"rows"})
    scores = pl.read_csv("scores.csv")["click"]
    assert len(scores) == 1000
    assert scores.is_between(0, 1).all()
    assert "1,000 rows scored" in ran.ctrlib["predict"][0]
    folder = set(first_cells(section(page("serving.md"), "A model folder")))
    assert folder <= {path.name for path in Path("runs/clicks").iterdir()}


def check_metrics(ran: Ran) -> None:
    assert ran.names["interval"].low < ran.names["interval"].auc < ran.names["interval"].high
    assert ran.names["test"].difference > 0
    assert ran.names["test"].p_value < 0.01
    assert set(first_cells(section(page("metrics.md"), "All at once"))) == set(ran.names["report"])
    found = ran.names["found"]
    assert set(first_cells(section(page("metrics.md"), "A file of predictions"))) == set(found)
    assert f"{found['scores'][1]['auc']:.5f}" in ran.ctrlib["evaluate"][0]


def check_reports(ran: Ran) -> None:
    above(0.6, *ran.aucs("train"), *ran.aucs("evaluate"))
    for name in ("first", "report", "predictions"):
        assert "<svg" in Path(f"{name}.html").read_text()
    record = ran.names["record"]
    assert set(record) == set(first_cells(section(page("reports.md"), "The record of a run")))


def check_retrieval(ran: Ran) -> None:
    above(0.2, ran.number(-1))
    files = first_cells(section(page("retrieval.md"), "What is in the folder"))
    assert set(files) == {path.name for path in Path("runs/ials").iterdir()}
    assert pl.read_parquet("lists.parquet").columns == ["user", "item", "rank", "score"]
    assert len(pl.read_parquet("new_users.parquet")) == 10
    methods = first_cells(section(page("retrieval.md"), "Methods"))
    assert set(METHODS) <= set(methods)
    known = {name for method in METHODS for name in arguments_of(method)}
    assert set(methods) - set(METHODS) - {"--method"} <= known


def documented_metrics() -> set[str]:
    return set(first_cells(section(page("training.md"), "metrics.json")))


def check_tuning(ran: Ran) -> None:
    assert 0 <= ran.number(1) <= 1 and set(ran.names["config"]["training"]) == {"max_epochs", "batch_size"}
    (compared,) = ran.ctrlib["compare"]
    assert all(re.search(rf"^ *{name} ", compared, re.MULTILINE) for name in ("fm", "mlp")) and "p (Holm)" in compared
    assert sorted(path.name for path in Path("runs/compared").iterdir() if path.is_dir()) == [
        *("fm-0", "fm-1"),
        *("mlp-2", "mlp-3"),
    ]
    assert "0 (defaults)" in ran.ctrlib["tune"][0] and ran.names["found"]["best"]["value"] > 0.6
    above(0.6, *ran.aucs("train"))
    above(0.55, *map(float, re.findall(r"0\.\d+", ran.python[3].splitlines()[0])))


CHECKS: dict[str, Callable[[Ran], None]] = {
    "data.md": check_data,
    "models.md": check_models,
    "training.md": check_training,
    "smaller_models.md": check_smaller_models,
    "searches.md": check_searches,
    "labels.md": check_labels,
    "serving.md": check_serving,
    "metrics.md": check_metrics,
    "reports.md": check_reports,
    "tuning.md": check_tuning,
    "retrieval.md": check_retrieval,
}


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second or third level."""
    found = re.search(rf"^(##+) {re.escape(heading)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no heading {heading!r}"
    return found[2]


def rows_of(text: str) -> list[list[str]]:
    """The cells of all rows of tables, headings included."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[|: -]+", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def first_cells(text: str) -> list[str]:
    """What stands in code in the first cells of a section's tables."""
    return [name for row in rows_of(text)[1:] for name in re.findall(r"`([^`]+)`", row[0])]


# What the text says.


def load_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_tables_are_up_to_date(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert load_tables().rewritten(text) == text, "run: python docs/tables.py"


def test_tables_name_everything() -> None:
    tables = load_tables()
    assert doctest.testmod(tables).failed == 0
    for name, make in tables.TABLES.items():
        known = {"look_ups": LOOK_UPS, "searches": SEARCHES}.get(name, MODELS)
        place = 1 if name == "models_short" else 0
        rows = [row for row in rows_of(make()) if row[place].startswith("`")]
        assert [kind for row in rows for kind in re.findall(r"`(\w+)`", row[place])] == list(known)
    with pytest.raises(ValueError, match="expected <!-- end of table --> behind it"):
        tables.rewritten("<!-- table: models -->")


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", [*PAGES, "results.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]+))?\)", prose(page(name))):
        path = DOCS / (target or name)
        assert path.exists(), f"docs/{name} links to {target}, which does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"docs/{name} links to {path.name}#{anchor}: no such heading"


def test_every_page_stands_in_the_index_and_begins_with_what_it_is_for() -> None:
    linked = re.findall(r"\]\((\w+\.md)\)", page("README.md"))
    assert sorted(linked) == sorted({*PAGES, "results.md"} - {"README.md"})
    for name in set(PAGES) - {"README.md"}:
        text = page(name)
        assert re.match(r"# .+\n\nThis page says ", text), name
        headings = re.findall(r"^## (.+)$", prose(text), re.MULTILINE)
        contents = re.findall(r"^\* \[(.+)\]\(#.+\)$", text, re.MULTILINE)
        assert contents == headings, f"docs/{name}: the list of headings at its top is not that of its headings"
        assert [line for line in text.splitlines() if len(line) > 120 and line[0] != "|"] == []


def test_no_paragraph_stands_twice() -> None:
    seen: dict[str, str] = {}
    for name in PAGES:
        for paragraph in prose(page(name)).split("\n\n"):
            if len(paragraph) > 150 and paragraph[0] not in "|#":
                assert paragraph not in seen, f"docs/{name} and docs/{seen[paragraph]} both say: {paragraph}"
                seen[paragraph] = name


def code_in(text: str) -> list[str]:
    """What stands in code in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", prose(text))


@pytest.mark.parametrize("name", PAGES)
def test_names_in_the_text_exist(name: str) -> None:
    for code in code_in(page(name)):
        for dotted in re.findall(r"(?<![\w.])ctr\.(\w+(?:\.\w+)*)", code):
            found: Any = ctr
            for part in dotted.split("."):
                assert hasattr(found, part), f"docs/{name}: there is no ctr.{dotted}"
                found = getattr(found, part)
        for path in re.findall(r"(?:recipes|datasets|tests|ctrlib)/[\w/]+\.py", code):
            assert (ROOT / path).is_file(), f"docs/{name}: there is no {path}"
        if re.match(r"(make|python|pip|torchrun) ", code):
            check_other_command(shlex.split(code), f"docs/{name}")
        if command := re.match(r"ctrlib (\w+)", code):
            assert command[1] in COMMANDS, f"docs/{name}: there is no ctrlib {command[1]}"


def test_flags_in_the_text_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known = {"nproc-per-node", "max-restarts", "nnodes", "help"}  # torchrun's
    for command in COMMANDS:
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        known |= set(re.findall(r"--([a-z][a-z0-9-]*)", capsys.readouterr().out))
    for recipe in (ROOT / "recipes").glob("*.py"):
        knobs = re.findall(r"^    (\w+): ", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        known |= {knob.replace("_", "-") for knob in knobs}
    for name in PAGES:
        texts = [*code_in(page(name)), *(code for language, code, _ in blocks(page(name)) if language == "bash")]
        flags = {flag for text in texts for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text)}
        assert flags <= known, f"docs/{name}: no command has --{', --'.join(sorted(flags - known))}"


def test_figures_are_the_recorded_ones() -> None:
    """Tables with a column `recorded as` have the mean over seeds of results.csv."""
    runs: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    with (ROOT / "recipes" / "results.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["test_auc"]:
                key = (row["data"], row["model"], row["data_hash"], row["engine"], row["note"])
                runs[key][row["seed"]] = float(row["test_auc"])  # of a seed that ran twice the later run counts
    found = defaultdict(list)
    for (data, model, *_), of_seed in runs.items():
        found[data, model].append((str(len(of_seed)), f"{statistics.fmean(of_seed.values()):.5f}".lstrip("0")))
    checked = 0
    for name in PAGES:
        for table in re.findall(r"^\| data \| recorded as \|.*\n(?:\|.*\n)+", page(name), re.MULTILINE):
            for data, model, seeds, auc, *_ in rows_of(table)[1:]:
                said = (seeds, auc)
                assert said in found[data, model.strip("`")], f"docs/{name}: {data}, {model}: {said} is not recorded"
                checked += 1
    assert checked > 20
