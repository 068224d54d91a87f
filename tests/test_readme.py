"""README.md: its code runs in order and does what it says, its tables are those of results.csv, its files exist."""

from __future__ import annotations

import csv
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli
from ctrlib.training.run import RECORD_COLUMNS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str, int]]:
    """(language, code, number of the line before the code) of every fenced block."""
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(match[1], match[2], text.count("\n", 0, match.start(2))) for match in found]


def shell_commands(code: str) -> list[list[str]]:
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def test_code_runs_in_order_and_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    printed: dict[str, str] = {}
    for language, code, line in blocks(TEXT):
        assert language in ("python", "bash"), f"README.md:{line}: what is {language}?"
        if language == "python":
            # Padded, so that a traceback shows the README's own lines.
            exec(compile("\n" * line + code, README, "exec"), names)
            printed[f"python {sum(key.startswith('python') for key in printed)}"] = capsys.readouterr().out
            continue
        for words in shell_commands(code):
            if words[0] == "ctrlib":
                assert cli.main(words[1:]) == 0, f"README.md:{line}: {words} failed"
                printed[f"ctrlib {words[1]}"] = capsys.readouterr().out
            else:
                check_other_command(words, line)

    bayes = float(printed["python 0"].split()[-1])
    for command in ("ctrlib train", "ctrlib evaluate"):
        found = re.search(r"\bAUC\D+(\d\.\d+)", printed[command])
        assert found is not None, printed[command]
        assert 0.65 < float(found[1]) < bayes + 0.04  # 2,000 test rows: a standard error of .014
    assert {"model.safetensors", "metrics.json", "log.jsonl", "curve.png"} <= set(listed("runs/clicks"))
    assert listed("data/clicks") == listed("data/clicks_py")
    scores = pl.read_csv("scores.csv")["click"]
    assert len(scores) == 1000
    assert scores.is_between(0, 1).all()
    assert "1,000 rows scored" in printed["ctrlib predict"]

    assert 0.65 < names["result"]["test_auc"] < bayes + 0.04
    assert names["counts"]["rows"] == len(names["probabilities"]) == 1000
    assert float(printed["python 2"]) > 0.65  # loaders, engine and fit
    assert names["products"].out_shape == (15,)
    assert float(printed["python 8"]) > 0.65  # the fused engine
    assert names["interval"].low < names["interval"].auc < names["interval"].high
    assert names["test"].difference > 0
    assert names["test"].p_value < 0.01


def listed(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def check_other_command(words: list[str], line: int) -> None:
    """What takes too long to run here must at least exist."""
    where = f"README.md:{line}: {shlex.join(words)}"
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, f"{where}: no such target in the Makefile"
    else:
        assert words[0] == "python", f"{where}: neither ctrlib nor make nor python"
        assert (ROOT / words[1]).is_file(), f"{where}: no such script"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_commands_in_the_text_and_links_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for code in re.findall(r"`((?:make|python) [^`]+)`", text):
        check_other_command(shlex.split(code), text.count("\n", 0, text.index(code)) + 1)
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), f"{name} links to {target}, which does not exist"


def test_file_tree_is_true() -> None:
    section = TEXT.partition("## What is where\n")[2].partition("\n## ")[0]
    paths: list[str] = []
    folders: list[str] = []
    for indent, name in re.findall(r"^    ((?:  )*)([\w./]+) +\S", section, re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        paths.append("".join(folders))
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []
    package = ROOT / "ctrlib"
    parts = [f"ctrlib/{path.name}" for path in package.glob("*.py") if not path.name.startswith("__")]
    parts += [f"ctrlib/{path.parent.name}/" for path in package.glob("*/__init__.py")]
    for folder in ("towers", "heads", "embeddings"):  # what people choose from: every file is listed
        parts += [f"ctrlib/{folder}/{path.name}" for path in (package / folder).glob("[!_]*.py")]
    assert sorted(set(parts) - set(paths)) == []


# ------------------------------------------------------------------------------------------------------- the results


@pytest.fixture(scope="module")
def results() -> ModuleType:
    """The script recipes/results.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("recipes_results", ROOT / "recipes" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up there
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def write_results(path: Path, *changes: dict[str, Any]) -> Path:
    run = dict.fromkeys(RECORD_COLUMNS, "") | {
        **{"data": "frappe_x1", "model": "deepfm", "engine": "exact", "precision": "fp32", "seed": 1},
        **{
            "valid_auc": 0.98,
            "test_auc": 0.984,
            "test_logloss": 0.2,
            "network_parameters": 417000,
            "embedding_bytes": 216360,
        },
        **{"samples_per_second": 30000.0, "hardware": "x86_64, 1 threads", "data_hash": "abc"},
        **{"inference_samples_per_second": 90000.0},
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, RECORD_COLUMNS)
        writer.writeheader()
        writer.writerows({**run, **change} for change in changes)
    return path


def rows_of(table: str) -> list[list[str]]:
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1, "rows differ in their number of cells"
    return rows[2:]


def test_tables_are_those_of_results_csv(results: ModuleType, tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text(TEXT, encoding="utf-8")
    results.main(results.Arguments(ROOT / "recipes" / "results.csv", readme, page))
    assert readme.read_text(encoding="utf-8") == TEXT, "run: python recipes/results.py"
    all_results = (ROOT / "recipes" / "RESULTS.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == all_results, "run: python recipes/results.py"
    assert len(rows_of(TEXT.partition(results.BEGIN)[2].partition(results.END)[0])) < len(rows_of(all_results)) / 3


def test_repeats_are_grouped_and_published_numbers_stand_beside_them(results: ModuleType, tmp_path: Path) -> None:
    path = write_results(
        tmp_path / "results.csv",
        {"test_auc": 0.5},  # seed 1 again below: the later row counts
        {"seed": 2, "test_auc": 0.985, "samples_per_second": 40000.0},
        {"data": "movielens_1m_autoint", "model": "dcnv2", "note": "another split", "data_hash": "def"},
        {"test_auc": 0.983},
        {"engine": "fused", "precision": "bf16", "hardware": "a, 1"},
        {"engine": "fused", "precision": "bf16", "hardware": "b, 2", "seed": 2},
        {"data_hash": "abd", "model": "own", "valid_auc": 0.97, "test_auc": 0.5, "inference_samples_per_second": ""},
    )
    table = results.make_table(results.read(path), results.PUBLISHED)
    exact, fused, other, split = rows_of(table)
    best = rows_of(results.make_table(results.best_of_each(results.read(path)), results.PUBLISHED))
    assert best == [exact, split]
    assert exact[:4] == ["frappe_x1", "deepfm", "exact", "2"]
    assert exact[4:6] == ["0.98400 ± 0.00141", "0.20000 ± 0.00000"]
    assert exact[6:] == ["417,000", "216,360", "35,000", "90,000", "0.98395 (BARS, mean of 5 seeds)"]
    assert fused[2:4] + fused[8:10] == ["fused, bf16", "2", "several machines", "several machines"]
    assert other == ["frappe_x1", "own", "exact", "1", "0.50000", "0.20000", "417,000", "216,360", "30,000", "", ""]
    assert (split[0], split[-1]) == (
        "movielens_1m_autoint [1]",
        "DCN: 0.8446 (AutoInt, CIKM 2019, mean of 10 runs); see note",
    )
    assert "[1] another split" in table
    assert "frappe_x1 abc, abd, movielens_1m_autoint def" in table


def test_script_rewrites_only_what_is_between_the_markers(results: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    path, page = tmp_path / "results.csv", tmp_path / "RESULTS.md"
    results.main(results.Arguments(path, readme, page))
    assert "No run is recorded" in readme.read_text()
    write_results(path, {})
    for _ in range(2):  # the second time changes nothing
        results.main(results.Arguments(path, readme, page))
        text = readme.read_text()
        assert text.startswith(f"before\n{results.BEGIN}\n\n| data |")
        assert text.endswith(f"\n\n{results.END}\nafter\n")
        assert "old" not in text
        assert "No run" not in text


def test_script_refuses_what_it_cannot_read(results: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("data,model\nfrappe_x1,mlp\n")
    with pytest.raises(ValueError, match=r"has no columns .*test_auc"):
        results.read(path)
    write_results(path, {})
    path.write_text(path.read_text() + "frappe_x1,mlp\n")
    with pytest.raises(ValueError, match="line 3: expected 22 cells"):
        results.read(path)
    with pytest.raises(ValueError, match="found it 0 times"):
        results.rewritten("no markers", "table")


def test_recipes_record_what_the_table_needs(results: ModuleType, tmp_path: Path) -> None:
    assert set(results.NEEDED) <= set(RECORD_COLUMNS)
    names = (*results.VALUES, "engine", "precision", "seed", "data_hash")
    result = dict(zip(names, (0.8, 0.9, 0.3, 8, 64, 1000.5, "exact", "fp32", 3, "abc"), strict=True))
    ctr.record(result, tmp_path / "results.csv", data="frappe_x1", model="mlp")
    (row,) = rows_of(results.make_table(results.read(tmp_path / "results.csv"), results.PUBLISHED))
    assert row[3:8] == ["1", "0.90000", "0.30000", "8", "64"]
