"""Click histories: mean pooling, DIN, BST and SIM under one MLP, on Amazon Grocery and on MovieLens-1M ordered by time.

    python recipes/histories.py --data-set amazon_grocery --model din --seed 1 [--raw DIR] [--engine fused] [--record]

A row's history holds only what the user did strictly before it; how the rows are split, say the docstrings of
datasets/amazon_grocery.py and datasets/movielens_1m.py (protocol `histories`). There is no published number for either;
`mean` is the floor that knows no target. Width 16, MLP 200-80 with batch normalisation and dropout .2, Adam 1e-3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from harness import RecipeKnobs, run_recipe

MODEL = {"model": "mlp", "embedding_dim": 16, "hidden": (200, 80), "batch_norm": True, "dropout": 0.2}

# Everything in which the variants differ: how histories become fields.
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {"sequence": "mean"},
    "din": {"sequence": "din"},
    "din_softmax": {"sequence": "din_softmax"},
    "bst": {"sequence": "bst"},
    "sim": {"sequence": "sim"},
}

# The data-set script with its arguments, and L2 on the tables: 1e-3 was the best of 1e-5, 1e-4 and 1e-3 on Amazon's
# validation rows with din.
DATA: dict[str, dict[str, Any]] = {
    "amazon_grocery": {"script": ["amazon_grocery.py"], "embedding_l2": 1e-3},
    "movielens_1m_histories": {"script": ["movielens_1m.py", "--protocol", "histories"], "embedding_l2": 1e-3},
}


@dataclass(frozen=True)
class Knobs(RecipeKnobs):
    """Train one model on histories and report its test AUC once."""

    data_set: Literal[tuple(DATA)] = "amazon_grocery"  # type: ignore[valid-type]
    """Which data."""
    model: Literal[tuple(VARIANTS)] = "din"  # type: ignore[valid-type]
    """Which variant."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    data = DATA[knobs.data_set]
    run_recipe(
        knobs,
        recipe=__file__,
        data=knobs.data_set,
        script=data["script"],
        model=knobs.model,
        config={**MODEL, **VARIANTS[knobs.model]},
        batch_size=1024,
        learning_rate=1e-3,
        embedding_l2=data["embedding_l2"],
    )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
