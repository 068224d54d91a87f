"""recipes/results.py: the tables of results are those of results.csv, and say what they should."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

import results
from ctrlib.training.record import line_of, record_of
from records import COLUMNS, OF_RECORD, record

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def write_results(path: Path, *changes: dict[str, Any]) -> Path:
    run = dict.fromkeys(COLUMNS, "") | {
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
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**run, **change} for change in changes)
    return path


def rows_of(table: str) -> list[list[str]]:
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1, "rows differ in their number of cells"
    return rows[2:]


def test_tables_are_those_of_results_csv(tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "results.md"
    readme.write_text(TEXT, encoding="utf-8")
    results.main(results.Arguments(ROOT / "recipes" / "results.csv", readme, page))
    assert readme.read_text(encoding="utf-8") == TEXT, "run: python recipes/results.py"
    all_results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == all_results, "run: python recipes/results.py"
    best = rows_of(TEXT.partition(results.BEGIN)[2].partition(results.END)[0])
    assert [row[0] for row in best] == list(results.SHORT.values())


def test_repeats_are_grouped_and_published_numbers_stand_beside_them(tmp_path: Path) -> None:
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


def test_script_rewrites_only_what_is_between_the_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    path, page = tmp_path / "results.csv", tmp_path / "results.md"
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


def test_script_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("data,model\nfrappe_x1,mlp\n")
    with pytest.raises(ValueError, match=r"has no columns .*test_auc"):
        results.read(path)
    write_results(path, {})
    path.write_text(path.read_text() + "frappe_x1,mlp\n")
    with pytest.raises(ValueError, match="line 3: expected 25 cells"):
        results.read(path)
    with pytest.raises(ValueError, match="found it 0 times"):
        results.rewritten("no markers", "table")


def test_recipes_record_what_the_table_needs(tmp_path: Path) -> None:
    assert set(results.NEEDED) <= set(COLUMNS)
    names = (*results.VALUES, "engine", "precision", "seed", "data_hash")
    result = dict(zip(names, (0.8, 0.9, 0.3, 8, 64, 1000.5, "exact", "fp32", 3, "abc"), strict=True))
    record(result, tmp_path / "results.csv", data="frappe_x1", model="mlp")
    (row,) = rows_of(results.make_table(results.read(tmp_path / "results.csv"), results.PUBLISHED))
    assert row[3:8] == ["1", "0.90000", "0.30000", "8", "64"]


def record_of_run(*, rows_hash: str = "f" * 64, auc: float = 0.9, error: float = 0.01) -> str:
    lines = [line_of("click", "auc", auc, error), line_of("click", "log_loss", 0.3, math.nan)]
    names = {"task": "ctr", "model": "fm", "engine": "exact", "seed": 1, "data": "d", "schema_hash": "abc"}
    said = record_of(**names, rows_hash=rows_hash, chosen_by="valid auc", independent="user", measured=lines)
    return json.dumps({name: said[name] for name in OF_RECORD})


def test_records_of_runs_have_a_table_of_their_own(tmp_path: Path) -> None:
    path, page, readme = (tmp_path / name for name in ("results.csv", "results.md", "README.md"))
    readme.write_text(f"{results.BEGIN}\n{results.END}\n")
    write_results(path, {}, {"seed": 2})
    results.main(results.Arguments(path, readme, page))
    before = page.read_text()
    assert "With intervals" not in before
    write_results(
        path,
        {},
        {"seed": 2, "record": record_of_run(auc=0.91, error=0.02)},
        {"seed": 3, "record": record_of_run(auc=0.93, error=0.04)},
        {"task": "retrieval", "model": "ease", "record": record_of_run()},
    )
    results.main(results.Arguments(path, readme, page))
    rows = rows_of(page.read_text().partition("## With intervals")[2])
    said = ["user", "valid auc", "f" * 12]
    assert rows == [
        ["frappe_x1", "deepfm", "test", "click", "auc", "2", "0.92000 ± 0.01414", "± 0.05880", *said],
        ["frappe_x1", "deepfm", "test", "click", "log_loss", "2", "0.30000 ± 0.00000", "", *said],
        ["frappe_x1", "ease", "test", "click", "auc", "1", "0.90000", "± 0.01960", *said],
        ["frappe_x1", "ease", "test", "click", "log_loss", "1", "0.30000", "", *said],
    ]


def test_runs_of_other_rows_are_no_repeats(tmp_path: Path) -> None:
    """A row from before there were records counts as one of the first rows that are known."""
    path = write_results(
        tmp_path / "results.csv",
        {"test_auc": 0.5},  # seed 1 again below
        {"seed": 4},
        {"seed": 2, "record": record_of_run()},
        {"seed": 3, "record": record_of_run(rows_hash="e" * 64)},
        {"record": record_of_run()},
        {"seed": 4, "record": record_of_run(rows_hash="e" * 64)},
    )
    groups = [[(run["seed"], run["test_auc"]) for run in runs] for runs in results.read(path)]
    assert groups == [[("1", "0.984"), ("4", "0.984"), ("2", "0.984")], [("3", "0.984"), ("4", "0.984")]]


def test_the_readme_shows_the_best_by_validation(tmp_path: Path) -> None:
    path = write_results(
        tmp_path / "results.csv",
        {"model": "mlp", "valid_auc": 0.99, "test_auc": 0.983},
        {"model": "mlp", "valid_auc": 0.99, "test_auc": 0.985, "seed": 2},
        {"model": "deepfm", "test_auc": 0.999},
        {"data": "of no interest"},
    )
    (row,) = rows_of(results.make_short_table(results.read(path), results.PUBLISHED))
    assert row == [results.SHORT["frappe_x1"], "mlp", "2", "0.98400 ± 0.00141", "0.98405 (BARS, mean of 5 seeds)"]


def test_what_another_library_does_not_tell_stays_blank(tmp_path: Path) -> None:
    untold = dict.fromkeys(("test_logloss", "network_parameters", "embedding_bytes", "samples_per_second"), "")
    path = write_results(tmp_path / "results.csv", {"model": "din of another", "note": "another 1.0", **untold})
    (row,) = rows_of(results.make_table(results.read(path), {}))
    assert row[:9] == ["frappe_x1 [1]", "din of another", "exact", "1", "0.98400", "", "", "", ""]


def test_the_same_model_of_another_library_stands_beside_ours(tmp_path: Path) -> None:
    path = write_results(
        tmp_path / "results.csv",
        {"test_auc": 0.984},
        {"test_auc": 0.986, "seed": 2},
        {"engine": "fused", "test_auc": 0.9},
        {"model": "deepfm of another", "note": "another 1.0", "test_auc": 0.98},
        {"model": "mlp of another", "note": "another 1.0"},  # which we have not run
        {"model": "deepfm, averaged", "test_auc": 0.99},
        {"model": "deepfm cut to 85% of the bytes"},
    )
    row, averaged = rows_of(results.make_rerun_table(results.read(path), results.PUBLISHED))
    published = results.PUBLISHED["frappe_x1", "deepfm"]
    assert row == ["frappe_x1", "deepfm", published, "another 1.0", "1", "0.98000", "2", "0.98500 ± 0.00141"]
    assert averaged == ["frappe_x1", "deepfm, averaged", published, "another 1.0", "1", "0.98000", "1", "0.99000"]


def test_other_tasks_have_a_table_of_their_own(tmp_path: Path) -> None:
    path, page = write_results(tmp_path / "results.csv", {}), tmp_path / "results.md"
    for seed, recall in ((1, 0.18), (2, 0.2)):
        found = {"seed": seed}
        record(found, path, data="gowalla", model="ultragcn", task="retrieval", scores={"test_recall@20": recall})
    record({"seed": 1}, path, data="gowalla", model="ease", task="retrieval", scores={"users_per_second": 75_000})
    readme = tmp_path / "README.md"
    readme.write_text(f"{results.BEGIN}\n{results.END}\n")
    results.main(results.Arguments(path, readme, page))
    assert "gowalla" not in readme.read_text()
    ctr, retrieval = page.read_text().partition("## Click-through rate")[2].split("## Retrieval")
    assert len(rows_of(ctr)) == 1
    assert rows_of(retrieval) == [
        ["gowalla", "ultragcn", "2", "0.19000 ± 0.01414", ""],
        ["gowalla", "ease", "1", "", "75,000"],
    ]
