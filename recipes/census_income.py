"""Census-Income (KDD) with two labels, income above 50,000 and never married: heads of several labels side by side.

    python recipes/census_income.py --model mmoe --seed 1 [--protocol numbers] [--raw DIR] [--engine fused] [--record]
    python recipes/census_income.py --model single_task --label income
    python recipes/census_income.py --model mmoe --report runs/transfer

The data is MMoE's (J. Ma et al., KDD 2018); datasets/census_income.py says what `numbers` adds, what `hard` leaves out
and how the rows are split, and why torch-rechub's published numbers are to be compared with `leaked` only.
`single_task` is the floor: one model for each label. `--record` appends a row for each label; `--report` says whether a
label gains or loses by the other's company (`ctrlib.analysis.transfer`).

Width 16, dropout .3, batch 2048, Adam 2e-3, L2 1e-5 on tables, chosen on validation with shared_bottom; learning rate
x 0.1 on plateau of the mean validation AUC, patience 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from harness import LabelKnobs, run_label_recipe

COMMON = {"embedding_dim": 16, "dropout": 0.3}
EXPERTS = {"expert_hidden": (64, 32), "tower_hidden": (16,)}
LEVEL = {"num_own": 1, "num_shared": 1}

# Everything in which the variants differ: the published model and its arguments. Each label's path through any of
# them has the same widths, 64 and 32, then 16 of its own, and there are three experts (in each level) if any.
VARIANTS: dict[str, dict[str, Any]] = {
    "single_task": {"model": "shared_bottom", "bottom_hidden": (64, 32), "tower_hidden": (16,)},
    "shared_bottom": {"model": "shared_bottom", "bottom_hidden": (64, 32), "tower_hidden": (16,)},
    "omoe": {"model": "mmoe", **EXPERTS, "num_experts": 3, "one_gate": True},
    "mmoe": {"model": "mmoe", **EXPERTS, "num_experts": 3},
    "cgc": {"model": "ple", **EXPERTS, **LEVEL, "num_levels": 1},
    "ple": {"model": "ple", **EXPERTS, **LEVEL, "num_levels": 2},
    # Married or not follows from no income, nor the other way round: chains of labels are not these, so AITM goes
    # without its calibrator, and ESMM is not for this data.
    "aitm": {"model": "aitm", "tower_hidden": (64, 32, 16), "penalty": 0.0},
    "stem": {"model": "stem", **EXPERTS},
    "apem": {"model": "apem", "num_groups": 4, "tower_hidden": (64, 32), "chain": False},
    "mmoe_refined": {"model": "mmoe", **EXPERTS, "num_experts": 3, "refine": True},
    "ple_refined": {"model": "ple", **EXPERTS, **LEVEL, "num_levels": 2, "refine": True},
}


@dataclass(frozen=True)
class Knobs(LabelKnobs):
    """Train one model on Census-Income and report its test AUC once, label by label."""

    model: Literal[tuple(VARIANTS)] = "mmoe"  # type: ignore[valid-type]
    """Which variant."""
    protocol: Literal["all", "hard", "numbers", "leaked"] = "all"
    """Every column; without those that nearly tell the marital status; with numbers as numbers besides; or with what
    leaks in torch-rechub's script."""
    label: Literal["income", "never_married"] | None = None
    """One label, for `single_task`; its prepared folder has the label's name behind that of both. Otherwise both."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report.

    Raises:
        SystemExit: `single_task` is asked for both labels or for a report, another model for one label, or a run to be
            recorded is cut short.
    """
    run_label_recipe(
        knobs,
        recipe=__file__,
        data="census_income" + ("" if knobs.protocol == "all" else f"_{knobs.protocol}"),
        script=["census_income.py", "--protocol", knobs.protocol],
        labels=("income", "never_married"),
        model=knobs.model,
        config={**COMMON, **VARIANTS[knobs.model]},
        single={**COMMON, **VARIANTS["single_task"]},
        batch_size=2048,
        learning_rate=2e-3,
        embedding_l2=1e-5,
    )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
