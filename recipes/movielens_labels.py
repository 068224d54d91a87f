"""MovieLens-1M with two labels, rated more than 3 and rated 5: heads of several labels side by side.

    python recipes/movielens_labels.py --model ple --seed 1 [--raw DIR] [--engine fused] [--report DIR] [--record]
    python recipes/movielens_labels.py --model single_task --label loved

User, movie, gender, age, occupation and zip code; all ratings, 8:1:1 at random (datasets/movielens_1m.py, protocol
`labels`). There is no published number. The labels agree more than those of other recipes: who loves a film likes it,
so that AITM's chain holds here. `single_task` is the floor: one model for each label.

Width 16, dropout .3, batch 2048, Adam 2e-3, L2 3e-4 on tables; learning rate x 0.1 on plateau of the mean validation
AUC, patience 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from harness import LabelKnobs, run_label_recipe

EXPERTS = {"expert_hidden": (64, 32), "tower_hidden": (16,)}
LEVEL = {"num_own": 1, "num_shared": 1}

# Everything in which the variants differ: the published model and its arguments. Each label's path has the same widths.
VARIANTS: dict[str, dict[str, Any]] = {
    "single_task": {"model": "shared_bottom", "bottom_hidden": (64, 32), "tower_hidden": (16,)},
    "shared_bottom": {"model": "shared_bottom", "bottom_hidden": (64, 32), "tower_hidden": (16,)},
    "mmoe": {"model": "mmoe", **EXPERTS, "num_experts": 3},
    "ple": {"model": "ple", **EXPERTS, **LEVEL, "num_levels": 2},
    "aitm": {"model": "aitm", "tower_hidden": (64, 32, 16)},
}


@dataclass(frozen=True)
class Knobs(LabelKnobs):
    """Train one model on both labels and report its test AUC once, label by label."""

    model: Literal[tuple(VARIANTS)] = "ple"  # type: ignore[valid-type]
    """Which variant."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    run_label_recipe(
        knobs,
        recipe=__file__,
        data="movielens_1m_labels",
        script=["movielens_1m.py", "--protocol", "labels"],
        labels=("liked", "loved"),
        model=knobs.model,
        config={"embedding_dim": 16, "dropout": 0.3, **VARIANTS[knobs.model]},
        single={"embedding_dim": 16, "dropout": 0.3, **VARIANTS["single_task"]},
        batch_size=2048,
        learning_rate=2e-3,
        embedding_l2=3e-4,
    )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
