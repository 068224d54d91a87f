"""Click histories: mean pooling, DIN, BST and SIM under one MLP, on Amazon Grocery, MovieLens-1M and planted interests.

    python recipes/histories.py --data-set amazon_grocery --model din --seed 1 [--raw DIR] [--engine fused] [--record]

A row's history holds only what the user did strictly before it; how the rows are split by time, say the docstrings of
datasets/amazon_grocery.py and datasets/movielens_1m.py (protocol `histories`). There is no published number for either;
`mean` is the floor that knows no target. `planted_interests` (`ctrlib.data.synthetic.interests`) is where attention to
the target must win: 60,000 rows, 8:1:1, with histories of 30 events, whose best possible AUC is known.

Width 16, MLP 200-80 with batch normalisation and dropout .2, Adam 1e-3.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.data.synthetic import interests
from ctrlib.distributed import rank
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

# The data-set script with its arguments (planted rows need none), and L2 on the tables: 1e-3 was the best of 1e-5, 1e-4
# and 1e-3 on Amazon's validation rows with din.
DATA: dict[str, dict[str, Any]] = {
    "amazon_grocery": {"script": ["amazon_grocery.py"], "embedding_l2": 1e-3},
    "movielens_1m_histories": {"script": ["movielens_1m.py", "--protocol", "histories"], "embedding_l2": 1e-3},
    "planted_interests": {"script": [], "embedding_l2": 1e-5},
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
    if not data["script"]:
        knobs = dataclasses.replace(knobs, data=prepare_planted(knobs))
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


def prepare_planted(knobs: Knobs) -> Path:
    """The folder of the planted rows, made first if it is not there."""
    if knobs.raw is not None:
        raise SystemExit("planted_interests are made up, there are no raw files: leave --raw out")
    folder = knobs.data or Path(__file__).parent.parent / "data" / knobs.data_set
    if rank() == 0 and not folder.exists():
        frame, logits = interests(60_000)
        best = ctr.metrics.auc(frame["label"], logits)
        features = [ctr.Categorical("item", vocabulary="item"), ctr.Sequence("history", vocabulary="item")]
        note = f"synthetic: the best possible AUC is {best:.4f}"
        ctr.prepare(frame, folder, features=features, labels="label", note=note)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
