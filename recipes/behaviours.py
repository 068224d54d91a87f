"""Two behaviours and two labels: DTRN's interests (TIM) beside other ways to read histories, on Amazon Grocery.

    python recipes/behaviours.py --model dtrn --seed 1 [--raw DIR] [--engine fused] [--report DIR] [--record]
    python recipes/behaviours.py --model single_task --label basket

Will a user review this item, and will it come in a basket, with others on that day? His earlier reviews are two
histories, of baskets and of single items; datasets/amazon_grocery.py (protocol `baskets`) says how they are made. There
is no published number. Every variant has the same head, MMoE behind refined fields, and differs in how histories become
fields: `mean` knows no target, `din` is attention to it, `tim_shared` is one transformer, told the behaviour and not
the label, and `dtrn` the same told both. `single_task` is `tim_shared` with one label.

Width 16, dropout .2, batch 1024, Adam 1e-3, L2 1e-3 on tables; learning rate x 0.1 on plateau of the mean validation
AUC, patience 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from harness import LabelKnobs, run_label_recipe

HEAD = {"num_experts": 3, "expert_hidden": (64, 32), "tower_hidden": (16,), "dropout": 0.2, "embedding_dim": 16}
REFINED = {"model": "mmoe", "refine": True, **HEAD}

# Everything in which the variants differ: the published model and its arguments.
VARIANTS: dict[str, dict[str, Any]] = {
    "single_task": {**REFINED, "sequence": "tim_shared"},
    "mean": {**REFINED, "sequence": "mean"},
    "din": {**REFINED, "sequence": "din"},
    "tim_shared": {**REFINED, "sequence": "tim_shared"},
    "dtrn": {"model": "dtrn", **HEAD},
}


@dataclass(frozen=True)
class Knobs(LabelKnobs):
    """Train one model on two behaviours and report its test AUC once, label by label."""

    model: Literal[tuple(VARIANTS)] = "dtrn"  # type: ignore[valid-type]
    """Which variant."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    run_label_recipe(
        knobs,
        recipe=__file__,
        data="amazon_grocery_baskets",
        script=["amazon_grocery.py", "--protocol", "baskets", "--max-length", "10"],
        labels=("reviewed", "basket"),
        model=knobs.model,
        config=VARIANTS[knobs.model],
        single=VARIANTS["single_task"],
        batch_size=1024,
        learning_rate=1e-3,
        embedding_l2=1e-3,
    )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
