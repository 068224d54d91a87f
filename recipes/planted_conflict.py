"""Three tasks that are planted to be in each other's way: what a shared bottom loses, and who wins it back.

    python recipes/planted_conflict.py --model shared_bottom --seed 1 [--report runs/conflict] [--record]
    python recipes/planted_conflict.py --model single_task --label label_1

The data is `ctrlib.data.synthetic.conflict`: 60,000 rows, 8:1:1, whose best possible AUC is known. Each task's path has
4 hidden units, enough for one task and too few for three. `--record` appends a row for each label; `--report` compares
each with a model of its own (`ctrlib.analysis.transfer`).

Width 8, batch 512, Adam 1e-2, learning rate x 0.1 on plateau of the mean validation AUC, patience 2.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.data.synthetic import conflict
from ctrlib.distributed import rank
from harness import LabelKnobs, run_label_recipe

LABELS = ("label_1", "label_2", "label_3")
BOTTOM = {"model": "shared_bottom", "bottom_hidden": (4,), "tower_hidden": ()}
EXPERTS = {"expert_hidden": (4,), "tower_hidden": ()}

# Everything in which the variants differ: the published model and its arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "single_task": BOTTOM,
    "shared_bottom": BOTTOM,
    "mmoe": {"model": "mmoe", **EXPERTS, "num_experts": 4},
    "cgc": {"model": "ple", **EXPERTS, "num_levels": 1, "num_own": 1, "num_shared": 1},
    "ple": {"model": "ple", **EXPERTS, "num_levels": 2, "num_own": 1, "num_shared": 1},
    "stem": {"model": "stem", **EXPERTS},
    # A shared bottom, which is MMoE with one expert, behind refined fields: no more hidden units than the bottom alone.
    "shared_bottom_refined": {"model": "mmoe", **EXPERTS, "num_experts": 1, "refine": True},
}


@dataclass(frozen=True)
class Knobs(LabelKnobs):
    """Train one model on three tasks in conflict and report its test AUC once, label by label."""

    model: Literal[tuple(VARIANTS)] = "shared_bottom"  # type: ignore[valid-type]
    """Which variant."""
    seed: int = 1
    """Of initial weights and shuffle."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    if knobs.raw is not None:
        raise SystemExit("the data is made up, there are no raw files: leave --raw out")
    folder = knobs.data or Path(__file__).parent.parent / "data" / "planted_conflict"
    if rank() == 0:
        prepare(folder, LABELS)
        for label in LABELS if knobs.report else filter(None, [knobs.label]):
            prepare(folder.with_name(f"{folder.name}_{label}"), (label,))
    run_label_recipe(
        dataclasses.replace(knobs, data=folder),
        recipe=__file__,
        data="planted_conflict",
        script=[],
        labels=LABELS,
        model=knobs.model,
        config={"embedding_dim": 8, **VARIANTS[knobs.model]},
        single={"embedding_dim": 8, **BOTTOM},
        batch_size=512,
        learning_rate=1e-2,
    )


def prepare(folder: Path, labels: tuple[str, ...]) -> None:
    """The data with these labels, if it is not there."""
    if folder.exists():
        return
    frame, logits = conflict(60_000, num_tasks=len(LABELS))
    best = ", ".join(f"{ctr.metrics.auc(frame[name], z):.4f}" for name, z in zip(LABELS, logits.T))
    ctr.prepare(
        frame.drop(set(LABELS) - set(labels)),
        folder,
        features=[ctr.Categorical(name) for name in frame.columns[len(LABELS) :]],
        labels=list(labels),
        note=f"synthetic: the best possible AUC of the three labels is {best}",
    )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
