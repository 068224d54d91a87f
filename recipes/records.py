"""One row of results.csv: what was run, on what, by which code, and what it reached, whatever the task."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from ctrlib.training.engines import native_bfloat16
from ctrlib.training.record import KEY

Task = Literal["ctr", "retrieval", "ranking", "speed", "defaults"]

# Columns are added at the end only; they are empty in the rows before, whose task is "ctr".
COLUMNS = [
    "date",
    "data",
    "model",
    "engine",
    "precision",
    "seed",
    "valid_auc",
    "test_auc",
    "test_logloss",
    "test_gauc",
    "parameters",
    "network_parameters",
    "embedding_bytes",
    "samples_per_second",
    "inference_samples_per_second",
    "seconds",
    "epochs",
    "hardware",
    "versions",
    "commit",
    "data_hash",
    "note",
    "task",
    "scores",
    "record",
]
# How the name of a model ends whose weights were averaged while it was trained.
AVERAGED = ", averaged"
# What the record of a run (`ctrlib.training.record`) says that has no column of its own.
OF_RECORD = ("version", "rows_hash", "chosen_by", "independent", "metrics")


def record(
    result: Mapping[str, Any],
    path: Path,
    *,
    data: str,
    model: str,
    task: Task = "ctr",
    scores: Mapping[str, float] | None = None,
) -> None:
    """Append one run to results.csv.

    Args:
        result: values of `COLUMNS`, as `ctrlib.run` returns them; others are left out. Of the record of the run, which
            it has under "run_record", hash of the rows, protocol and intervals go into the column "record", as JSON.
        path: the file; made if it is not there.
        data: name of the data.
        model: name of the variant.
        task: what the model is for. AUC and log-loss have columns of their own.
        scores: any other numbers, by names that say what they are and where: `test_recall@20`, `samples_per_second`.

    Raises:
        ValueError: the file has other columns, a score is not a number, or the record is that of another run.
    """
    said = result.get(KEY) or {}
    names = {"seed": "seed", "engine": "engine", "data_hash": "schema_hash"}
    for column, name in names.items():
        if said.get(name, "") not in ("", result.get(column)):
            raise ValueError(
                f"{column} is {result.get(column)!r}, and {said[name]!r} in the record of the run: expected one run's"
            )
    if wrong := [name for name, value in (scores or {}).items() if type(value) not in (int, float)]:
        raise ValueError(f"scores {wrong} are not numbers: expected name -> number, got {scores}")
    versions = []
    for package in ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    row = {
        **result,
        "date": time.strftime("%Y-%m-%d"),
        "data": data,
        "model": model,
        "hardware": f"{_processor()}, {torch.get_num_threads()} threads"
        + (f" in each of {result['processes']} processes" if result.get("processes", 1) > 1 else "")
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
        "versions": "; ".join(versions),
        "commit": commit_of(path),
        "task": task,
        "scores": json.dumps({name: round(value, 6) for name, value in scores.items()}) if scores else "",
        "record": json.dumps({name: said[name] for name in OF_RECORD}) if said else "",
    }
    is_new = not path.exists()
    if not is_new:
        with path.open(encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
        if header != COLUMNS:
            raise ValueError(f"{path} has columns {header}, expected {COLUMNS}: move it away, or name another file")
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()})


def _processor() -> str:
    """What decides how fast it multiplies: the instructions that torch uses, and whether it has bfloat16.

    >>> _processor().startswith(platform.machine())
    True
    """
    kinds = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return " ".join(kinds + ["bf16"] * native_bfloat16())


def commit_of(path: Path) -> str:
    """The checkout's commit, with "+" if files other than `path`, the record, differ from it; empty outside one."""

    def git(*arguments: str) -> str:
        try:
            command = ["git", "-C", str(path.parent), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    return commit + ("+" if commit and any(not line.endswith(path.name) for line in changed) else "")
