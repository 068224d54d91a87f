"""Census-Income (KDD) with two labels, income above 50,000 and never married: heads of several labels side by side.

    python recipes/census_income.py --model mmoe --seed 1 [--protocol numbers] [--raw DIR] [--engine fused] [--record]
    python recipes/census_income.py --model single_task --label income
    python recipes/census_income.py --model mmoe --report runs/transfer

The data is MMoE's (J. Ma et al., KDD 2018); datasets/census_income.py says what `numbers` adds, what `hard` leaves out
and how the rows are split, and why torch-rechub's published numbers are to be compared with `leaked` only.
`single_task` is the floor: one model for each label. `--record` appends a row for each label; `--report` says whether a
label gains or loses by the other's company (`ctrlib.training.transfer`).

Width 16, dropout .3, batch 2048, Adam 2e-3, L2 1e-5 on tables, chosen on validation with shared_bottom; learning rate
x 0.1 on plateau of the mean validation AUC, patience 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.training.distributed import rank
from ctrlib.training.recipe import RecipeKnobs

LABELS: tuple[Literal["income"], Literal["never_married"]] = ("income", "never_married")
EXPERTS = {"expert_hidden": (64, 32), "tower_hidden": (16,)}
LEVEL = {"num_own": 1, "num_shared": 1}

# Everything in which the variants differ: the preset and its arguments. Each label's path through any of them has the
# same widths, 64 and 32, then 16 of its own, and there are three experts (in each level) where there are any.
VARIANTS: dict[str, dict[str, Any]] = {
    "single_task": {"preset": "shared_bottom", "bottom_hidden": (64, 32), "tower_hidden": (16,)},
    "shared_bottom": {"preset": "shared_bottom", "bottom_hidden": (64, 32), "tower_hidden": (16,)},
    "omoe": {"preset": "mmoe", **EXPERTS, "num_experts": 3, "one_gate": True},
    "mmoe": {"preset": "mmoe", **EXPERTS, "num_experts": 3},
    "cgc": {"preset": "ple", **EXPERTS, **LEVEL, "num_levels": 1},
    "ple": {"preset": "ple", **EXPERTS, **LEVEL, "num_levels": 2},
    # Married or not follows from no income, nor the other way round: chains of labels are not these, so AITM goes
    # without its calibrator, and ESMM is not for this data.
    "aitm": {"preset": "aitm", "tower_hidden": (64, 32, 16), "penalty": 0.0},
    "stem": {"preset": "stem", **EXPERTS},
    "apem": {"preset": "apem", "num_groups": 4, "tower_hidden": (64, 32), "chain": False},
    "mmoe_refined": {"preset": "mmoe", **EXPERTS, "num_experts": 3, "refine": True},
    "ple_refined": {"preset": "ple", **EXPERTS, **LEVEL, "num_levels": 2, "refine": True},
}


@dataclass(frozen=True)
class Knobs(RecipeKnobs):
    """Train one model on Census-Income and report its test AUC once, label by label."""

    model: Literal[tuple(VARIANTS)] = "mmoe"  # type: ignore[valid-type]
    """Which variant."""
    protocol: Literal["all", "hard", "numbers", "leaked"] = "all"
    """Every column; without those that nearly tell the marital status; with numbers as numbers besides; or with what
    leaks in torch-rechub's script."""
    label: Literal["both", "income", "never_married"] = "both"
    """Which labels; `single_task` takes one. Its prepared folder has the label's name behind that of both."""
    report: Path | None = None
    """Folder for transfer.json and transfer.png; a model of each label alone is trained for it as well."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report.

    Raises:
        SystemExit: `single_task` is asked for both labels or for a report, or a run to be recorded is cut short.
    """
    if knobs.model == "single_task" and (knobs.label == "both" or knobs.report):
        raise SystemExit(f"a model of a single task has one label: add --label, one of {', '.join(LABELS)}")
    if knobs.report and knobs.label != "both":
        raise SystemExit(f"a report compares a model of both labels with one of each: leave --label {knobs.label} out")
    if knobs.record and knobs.epochs != RecipeKnobs.epochs:
        raise SystemExit("--record takes whole runs only: leave --epochs out")
    model, folder, result = _train(knobs)
    if knobs.record and rank() == 0:
        valid = ctr.evaluate(model, ctr.Loader(folder, "valid", batch_size=8192), quick=True)
        labels = LABELS if knobs.label == "both" else (knobs.label,)
        tasks = zip(valid.get("tasks", [valid]), result.get("test_tasks", [_as_task(result)]), labels)
        for of_valid, of_test, label in tasks:
            scores = {
                "valid_auc": of_valid["auc"],
                "test_auc": of_test["auc"],
                "test_logloss": of_test["log_loss"],
            }
            data = f"{_name(knobs.protocol)}, {label}"
            ctr.record({**result, **scores}, Path(__file__).parent / "results.csv", data=data, model=knobs.model)
    if knobs.report:
        alone = [_train(dataclasses.replace(knobs, model="single_task", label=label)) for label in LABELS]
        _report(knobs.report, (model, folder), [pair[:2] for pair in alone])


def _name(protocol: str) -> str:
    return "census_income" + ("" if protocol == "all" else f"_{protocol}")


def _as_task(result: dict[str, Any]) -> dict[str, Any]:
    return {"auc": result["test_auc"], "log_loss": result["test_logloss"]}


def _train(knobs: Knobs) -> tuple[ctr.Model, Path, dict[str, Any]]:
    """The trained model, its prepared folder, and what `run` found."""
    suffix = "" if knobs.label == "both" else f"_{knobs.label}"
    folder = knobs.data or Path(__file__).parent.parent / "data" / _name(knobs.protocol)
    folder = folder.with_name(folder.name + suffix)
    trained: list[ctr.Model] = []
    result = ctr.run_recipe(
        dataclasses.replace(knobs, record=False, data=folder),
        recipe=__file__,
        data=_name(knobs.protocol) + suffix,
        script=["census_income.py", "--protocol", knobs.protocol, "--label", knobs.label],
        model=knobs.model,
        config={"embedding_dim": 16, "dropout": 0.3, **VARIANTS[knobs.model]},
        batch_size=2048,
        learning_rate=2e-3,
        embedding_l2=1e-5,
        on_trained=trained.append,
    )
    return trained[0], folder, result


def _report(out: Path, both: tuple[ctr.Model, Path], alone: list[tuple[ctr.Model, Path]]) -> None:
    scores = [ctr.predict(model, ctr.Loader(folder, "test", batch_size=8192)) for model, folder in (both, *alone)]
    model, folder = both
    valid = list(ctr.Loader(folder, "valid", batch_size=2048))
    report = {
        "tasks": ctr.compare_tasks(scores[0], scores[1:], tasks=LABELS),
        "gradients": ctr.gradient_cosines(model, valid),
        "gates": ctr.gate_usage(model, valid),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "transfer.json").write_text(ctr.to_json(report, indent=1) + "\n", encoding="utf-8")
    ctr.draw_transfer(report, out / "transfer.png")
    print(ctr.to_json(report["tasks"]))


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
