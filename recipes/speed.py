"""Speed and memory of ctrlib beside its peers, all in one run, and beside what the machine allows: docs/speed.md.

    python recipes/speed.py --fuxictr ~/fuxictr/bin/python --fuxictr-source ~/FuxiCTR [--deepctr PYTHON] [--record]
    python recipes/speed.py --data frappe --raw DIR --measures fit --seed 1 --fuxictr ... [--record]

Every program runs in processes of its own, in turn: one works while the others wait, over and over, so that what else
happens on the machine hits all of them. Rates are medians over the rounds, and a ratio is the median of the ratios of
each round. Only ratios of one run mean something; figures of different days do not compare.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from tyro.conf import FlagCreatePairsOff

from ctrlib.data.synthetic import Teacher, write
from ctrlib.training.engines import native_bfloat16
from programs import SPLITS, Program, installed, unpack
from records import record

HERE = Path(__file__).parent
Model = Literal[
    "deepfm", "dcnv2", "finalmlp", "autoint_plus", "autoint", "finalnet", "gdcn", "masknet", "fgcnn", "fibinet"
]
Measure = Literal["prepare", "load", "step", "epoch", "infer", "cold", "fit"]

PLAIN = {"batch_norm": False, "dropout": 0.0}
BARS = {"hidden": (400, 400, 400), "batch_norm": True}
ATTENTION = {"num_layers": 3, "num_heads": 2, "head_dim": 16, "identity": True, "scale": False}
# The network of each model, by the names of ctrlib's arguments; the scripts in peers/ translate them. There is none
# where nobody published settings for these data.
NETS: dict[str, dict[str, dict[str, Any]]] = {
    "criteo": {
        "deepfm": {"hidden": (400, 400, 400), **PLAIN},
        "dcnv2": {"hidden": (400, 400, 400), "num_cross_layers": 3, **PLAIN},
        "finalmlp": {
            **{f"{name}_{n}": value for n in (1, 2) for name, value in {"hidden": (400, 400, 400), **PLAIN}.items()},
            **{"gate_hidden": (400,), "num_heads": 10, "contexts": ((), ())},
        },
        "autoint_plus": {"hidden": (400, 400, 400), **PLAIN, **ATTENTION, "norm_before_relu": False},
        "autoint": {**ATTENTION, "norm_before_relu": False},
        "finalnet": {
            **{f"hidden_{n}": (400, 400, 400) for n in (1, 2)},
            **{f"dropout_{n}": 0.0 for n in (1, 2)},
            **{"field_gate": True, "batch_norm": False},
        },
        "gdcn": {"hidden": (400, 400, 400), "num_cross_layers": 3, **PLAIN},
        "masknet": {
            **{"hidden": (400, 400, 400), "dropout": 0.0},
            **{"num_blocks": 3, "block_dim": 64, "reduction_ratio": 1, "embedding_norm": True},
        },
        "fgcnn": {
            **{"hidden": (400, 400, 400), **PLAIN},
            **{"num_channels": (14, 16, 18, 20), "kernel_height": 7, "pooling_size": 2, "num_new": 3},
            "share_embedding": False,
        },
        "fibinet": {
            **{"hidden": (400, 400, 400), **PLAIN},
            **{"bilinear": "field_interaction", "reduction_ratio": 3, "share_bilinear": False},
        },
    },
    "frappe": {
        "deepfm": {**BARS, "dropout": 0.2},
        "dcnv2": {**BARS, "dropout": 0.4, "num_cross_layers": 4},
        "finalmlp": {
            **{"hidden_1": (400,), "dropout_1": 0.4, "batch_norm_1": True},
            **{"hidden_2": (100,), "dropout_2": 0.4, "batch_norm_2": True},
            **{"contexts": (("user",), ("item",)), "gate_hidden": (400,), "num_heads": 5},
        },
        "autoint_plus": {
            **{**BARS, "dropout": 0.1},
            **{"num_layers": 5, "num_heads": 4, "head_dim": 32},
            **{"identity": True, "scale": True, "norm_before_relu": True},
        },
        "autoint": {
            **{"num_layers": 6, "num_heads": 4, "head_dim": 32},
            **{"identity": True, "scale": False, "norm_before_relu": False},
        },
        "finalnet": {
            **{"hidden_1": (400, 400), "dropout_1": 0.1, "hidden_2": (400,), "dropout_2": 0.1},
            **{"field_gate": True, "batch_norm": True},
        },
        "masknet": {
            **{"hidden": (400, 400, 400), "dropout": 0.1},
            **{"num_blocks": 3, "block_dim": 50, "reduction_ratio": 2, "embedding_norm": False},
        },
        # BARS' FuxiCTR had one set of bilinear matrices for raw and reweighted fields; 2.3.7 always has two.
        "fibinet": {
            **{**BARS, "dropout": 0.3},
            **{"bilinear": "field_all", "reduction_ratio": 2, "share_bilinear": False},
        },
    },
}
COMMON: dict[str, dict[str, Any]] = {
    "criteo": {
        "ids": [f"C{n}" for n in range(1, 27)],
        "numbers": [f"I{n}" for n in range(1, 14)],
        **{"embedding_dim": 16, "l2": 1e-5},
    },
    "frappe": {
        "ids": "user item daytime weekday isweekend homework cost weather country city".split(),
        "numbers": [],
        **{"embedding_dim": 10, "l2": 0.05},
    },
}
DISTRIBUTIONS = {"fuxictr": "fuxictr", "deepctr": "deepctr-torch", "rechub": "torch-rechub"}
# What peers/deepctr_speed.py and peers/rechub_speed.py build.
OF_ALL = {"deepfm", "dcnv2", "autoint_plus"}
LACK = {(peer, model) for peer in ("deepctr", "rechub") for model in get_args(Model) if model not in OF_ALL}


@dataclass(frozen=True)
class Knobs:
    """Measure ctrlib beside its peers."""

    data: Literal["criteo", "frappe"] = "criteo"
    """Criteo-shaped rows of a known formula, or Frappe_x1."""
    rows: int = 1_000_000
    """Of the Criteo-shaped data, 8:1:1."""
    raw: Path | None = None
    """Folder with Frappe's {train,valid,test}.csv or .csv.gz."""
    models: tuple[Model, ...] = ("deepfm",)
    """Which models; a peer that lacks one sits out."""
    measures: tuple[Measure, ...] = ("prepare", "load", "step", "epoch", "infer", "cold")
    """prepare: CSV to what trains. load: an epoch's batches. step: on batches in memory. epoch: an epoch, loading
    included. infer: forward passes. cold: a new process, CSV, an epoch, test AUC. fit: until validation AUC stops
    rising."""
    fuxictr: Path | None = None
    """Python of an environment with FuxiCTR."""
    fuxictr_source: Path | None = None
    """Checkout of FuxiCTR."""
    deepctr: Path | None = None
    """Python of an environment with DeepCTR-Torch."""
    rechub: Path | None = None
    """Python of an environment with torch-rechub."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of ctrlib's engine."""
    average: bool = False
    """Of the weights that ctrlib scores, in the exact engine: it needs fewer epochs, which counts in `fit`."""
    rounds: int = 3
    """Turns of each program."""
    steps: int = 20
    """Training steps in a turn."""
    batch_size: int = 4096
    """Rows of a step."""
    own_batch_size: int | None = None
    """Of ctrlib in `fit`, where it is another: smaller ones need fewer epochs."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: seconds of processors, for a machine that others use; with --threads 1, since it does not see waiting."""
    threads: int = os.cpu_count() or 1
    """Of torch, in each program."""
    seed: int = 1
    """Of initial weights and the order of rows."""
    work: Path = HERE.parent / "data" / "speed"
    """Folder for what the programs write; emptied first."""
    record: bool = False
    """Append a row for each measure to results.csv."""


class Table:
    """Measures of several programs, in turns."""

    def __init__(self) -> None:
        # measure -> program -> a value of each round. Of most measures more is better.
        self.values: dict[str, dict[str, list[float]]] = {}
        self.others: list[float] = []

    def add(self, measure: str, program: str, value: float, answer: dict[str, Any] | None = None) -> None:
        """A value of one turn."""
        self.values.setdefault(measure, {}).setdefault(program, []).append(value)
        if answer is not None:
            self.others.append(answer["others"])
        print(f"{measure:40} {program:10} {value:14,.4g}", flush=True)

    def scores(self, measure: str, versions: dict[str, str]) -> dict[str, float]:
        """Medians of all programs, and how many times better ctrlib is than each peer."""
        values = self.values[measure]
        found = {versions[name]: statistics.median(some) for name, some in values.items()}
        if "AUC" not in measure.rpartition(",")[2]:
            sign = -1 if measure.endswith((", s", ", MiB")) else 1
            for name, some in values.items():
                if name != "ctrlib" and "ctrlib" in values:
                    ratios = [(ours / theirs) ** sign for ours, theirs in zip(values["ctrlib"], some)]
                    found[f"times {versions[name]}"] = statistics.median(ratios)
        return found


def engine_of(knobs: Knobs) -> Literal["exact", "fused"]:
    """The engine that does what the peers do where tables are small, and the one for large tables elsewhere."""
    return "exact" if knobs.data == "frappe" else "fused"


def program_of(knobs: Knobs, name: str, raw: Path) -> Program:
    """Start a program."""
    work = knobs.work / name
    settings = {**COMMON[knobs.data], "raw": str(raw), "work": str(work)}
    settings |= {"batch_size": knobs.batch_size, "seed": knobs.seed}
    if name == "ctrlib":
        settings |= {"engine": engine_of(knobs), "precision": knobs.precision, "average": knobs.average}
    if name == "fuxictr":
        settings["source"] = str(knobs.fuxictr_source)
    python = Path(sys.executable) if name == "ctrlib" else getattr(knobs, name)
    return Program(name, python, settings, work=work, clock=knobs.clock, threads=knobs.threads)


def raw_files(knobs: Knobs) -> Path:
    """Folder with train.csv, valid.csv and test.csv."""
    folder = knobs.work / "raw"
    if knobs.data == "criteo":
        write(Teacher.criteo(knobs.rows), folder)
        return folder
    if knobs.raw is None:
        raise SystemExit("--data frappe needs --raw DIR with train.csv, valid.csv and test.csv, or .csv.gz")
    unpack(knobs.raw, folder)
    return folder


def count_rows(path: Path) -> int:
    """Rows of a CSV file with a header."""
    with path.open("rb") as file:
        return sum(1 for _ in file) - 1


def version_of(knobs: Knobs, name: str) -> str:
    """Name and version of a program."""
    return name if name == "ctrlib" else installed(getattr(knobs, name), DISTRIBUTIONS[name])


def measure_model(knobs: Knobs, names: list[str], raw: Path, model: str) -> tuple[Table, dict[str, float]]:
    """Everything that the flags ask for, of one model; and what the machine allows, where steps are measured."""
    table, machine = Table(), {}
    opening = {"model": model, "net": NETS[knobs.data][model]}
    num_rows = {split: count_rows(raw / f"{split}.csv") for split in SPLITS}
    if "prepare" in knobs.measures:
        measure_preparation(knobs, table, names, raw, sum(num_rows.values()))
    if {"load", "step", "epoch", "infer"} & set(knobs.measures):
        with contextlib.ExitStack() as stack:
            programs = [stack.enter_context(program_of(knobs, name, raw)) for name in names]
            for program in programs:
                program.do("open", **opening)
            machine = measure_training(knobs, table, programs, num_rows["train"])
    if "cold" in knobs.measures:
        measure_cold(knobs, table, names, raw, opening)
    if "fit" in knobs.measures:
        measure_fit(knobs, table, names, raw, opening)
    return table, machine


def measure_preparation(knobs: Knobs, table: Table, names: list[str], raw: Path, num_rows: int) -> None:
    """Each time in a new process and a new folder."""
    for _ in range(knobs.rounds):
        for name in names:
            shutil.rmtree(knobs.work / name, ignore_errors=True)
            with program_of(knobs, name, raw) as program:
                answer = program.do("prepare")
            table.add("preparation, rows/s", name, num_rows / answer["seconds"], answer)
            table.add("memory of preparation, MiB", name, answer["peak_mib"])


def measure_training(knobs: Knobs, table: Table, programs: list[Program], num_rows: int) -> dict[str, float]:
    """What is measured of an open model; returns what the machine allows."""
    turns: list[tuple[str, str, dict[str, Any], int]] = []
    if "load" in knobs.measures:
        turns.append(("loader, rows/s", "load", {}, num_rows))
    if "epoch" in knobs.measures:
        turns.append(("epoch, rows/s", "epoch", {}, num_rows))
    if "step" in knobs.measures:
        turns.append(("step, rows/s", "step", {"steps": knobs.steps}, knobs.steps * knobs.batch_size))
    if "infer" in knobs.measures:
        for rows, calls in ((1, 500), (256, 100), (8192, 5)):
            turns.append((f"inference at {rows}, rows/s", "infer", {"rows": rows, "calls": calls}, rows * calls))
    if {"step", "infer"} & set(knobs.measures):
        for program in programs:
            program.do("hold", batches=12)
    found: dict[str, list[float]] = {}
    for round_ in range(knobs.rounds):
        for measure, method, arguments, rows in turns:
            for program in programs:
                if round_ == 0 and method in ("step", "infer"):
                    program.do(method, **arguments)  # what is made at first use
                answer = program.do(method, **arguments)
                table.add(measure, program.name, rows / answer["seconds"], answer)
                if round_ == 0 and method == "epoch":
                    table.add("memory of training, MiB", program.name, answer["peak_mib"])
        if "step" in knobs.measures:
            for name, value in programs[0].do("machine")["found"].items():
                found.setdefault(name, []).append(value)
    machine = {name: statistics.median(values) for name, values in found.items()}
    if machine:
        step = 1e3 * knobs.batch_size / statistics.median(table.values["step, rows/s"]["ctrlib"])
        machine |= {"step, ms": step, "matrix share": machine["step products, ms"] / step}
    return machine


def measure_cold(knobs: Knobs, table: Table, names: list[str], raw: Path, opening: dict[str, Any]) -> None:
    """From starting the program to the AUC of test after one epoch."""
    for _ in range(knobs.rounds):
        for name in names:
            shutil.rmtree(knobs.work / name, ignore_errors=True)
            with program_of(knobs, name, raw) as program:
                program.do("prepare")
                program.do("open", **opening)
                program.do("epoch")
                answer = program.do("score")
            table.add("CSV to test AUC, s", name, answer["age"], answer)
            table.add("test AUC of an epoch", name, answer["found"])


def measure_fit(knobs: Knobs, table: Table, names: list[str], raw: Path, opening: dict[str, Any]) -> None:
    """Train until validation AUC stops rising, and how long each took to be as good as the first peer became."""
    rival, curves = names[min(1, len(names) - 1)], {}
    for name in names:
        own = knobs.own_batch_size if name == "ctrlib" else None
        with program_of(replace(knobs, batch_size=own or knobs.batch_size), name, raw) as program:
            program.do("open", **opening)
            answer = program.do("fit")
        curves[name] = answer["found"]
        table.add("best validation AUC", name, max(auc for _, auc in curves[name]), answer)
    target = table.values["best validation AUC"][rival][0]
    for name, curve in curves.items():
        if reached := [seconds for seconds, auc in curve if auc >= target]:
            table.add(f"time to {rival}'s best validation AUC, s", name, reached[0])


def main(knobs: Knobs) -> None:
    """Measure, print, record."""
    if unknown := sorted(set(knobs.models) - set(NETS[knobs.data])):
        raise SystemExit(
            f"--data {knobs.data} has no network for {', '.join(unknown)}, since nobody published its settings there: "
            f"take --data criteo, or --models {' '.join(NETS[knobs.data])}"
        )
    shutil.rmtree(knobs.work, ignore_errors=True)
    raw = raw_files(knobs)
    names = ["ctrlib", *(name for name in ("fuxictr", "deepctr", "rechub") if getattr(knobs, name))]
    versions = {name: version_of(knobs, name) for name in names}
    torch.set_num_threads(knobs.threads)  # which the record says
    for model in knobs.models:
        present = [name for name in names if (name, model) not in LACK]
        table, machine = measure_model(knobs, present, raw, model)
        rows = {measure: table.scores(measure, versions) for measure in table.values}
        if machine:
            rows["machine"] = machine
        for measure, scores in rows.items():
            print(json.dumps({"model": model, "measure": measure, **scores}))
        others = statistics.median(table.others)
        print(f"other processes had {others:.0%} of the processors (median)")
        if not native_bfloat16():
            print("bf16: this processor emulates it, and ctrlib refuses it")
        if knobs.record:
            size = f", {knobs.rows:,} rows" if knobs.data == "criteo" else ""
            for measure, scores in rows.items():
                record(
                    {
                        **{"engine": engine_of(knobs), "precision": knobs.precision, "seed": knobs.seed},
                        "note": f"{knobs.rounds} rounds, {knobs.clock} clock, others had {others:.0%}"
                        + ", ctrlib's weights averaged" * knobs.average
                        + (f", ctrlib's steps of {knobs.own_batch_size:,} rows" if knobs.own_batch_size else ""),
                    },
                    HERE / "results.csv",
                    data=f"{'criteo_synthetic' if knobs.data == 'criteo' else 'frappe_x1'}{size}",
                    model=f"{model}: {measure}",
                    task="speed",
                    scores=scores,
                )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
