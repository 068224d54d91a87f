"""README.md: its code runs in order and does what it says, its tables are those of results.csv, its files exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from ctrlib import cli
from ctrlib.metrics import auc

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
pytestmark = pytest.mark.usefixtures("drawn_pictures")


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
    assert Path("runs/clicks/curve.png").read_bytes().startswith(b"\x89PNG")
    assert listed("data/clicks") == listed("data/clicks_py")
    scores = pl.read_csv("scores.csv")["click"]
    assert len(scores) == 1000
    assert scores.is_between(0, 1).all()
    assert "1,000 rows scored" in printed["ctrlib predict"]

    page, scored = Path("report.html").read_text(), pl.read_parquet("scores.parquet")
    assert page.count("<figure>") >= 7
    assert "By shop" in page
    assert scored.columns == ["click", "user_id", "shop", "clicks"]
    assert (
        abs(
            auc(scored["click"], scored["clicks"])
            - json.loads(Path("runs/clicks/metrics.json").read_text())["test_auc"]
        )
        < 1e-6
    )

    assert 0.65 < names["result"]["test_auc"] < bayes + 0.04
    assert names["counts"]["rows"] == len(names["probabilities"]) == 1000
    assert float(printed["python 2"]) > 0.65  # loaders, engine and fit
    assert names["head"].out_shape == (1,)


def test_it_is_short() -> None:
    size = len(README.read_bytes())
    assert size <= 12_000, f"README.md has {size:,} bytes of 12,000: what is reference belongs into docs/"


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
