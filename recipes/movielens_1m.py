"""MovieLens-1M in AutoInt's protocol (no ids, 7 fields) or with ids (6 fields): every tower.

    python recipes/movielens_1m.py --model autoint --seed 1 [--protocol ids] [--raw DIR] [--engine fused] [--record]

Published for `autoint`: W. Song et al., CIKM 2019, table 3, mean of 10 runs; for `ids`: B. Coleman et al., NeurIPS
2023. The numbers stand in results.py. Batch 1024, Adam 1e-3, learning rate x 0.1 on plateau, patience 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from harness import RecipeKnobs, run_recipe

MLP = {"hidden": (400, 400), "batch_norm": True, "dropout": 0.4}
# The one number of the protocol, the time of the rating, in 32 quantile bins, piecewise linear.
TIME = {"numeric": "piecewise_linear", "bins": 32}

# Everything in which the variants differ: the model (otherwise that of the variant's name) and its arguments. Widths
# and dropout were chosen on validation with dcnv2 and are those of all; AutoInt's are the paper's.
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": MLP,
    "fm": {},
    "wide_deep": MLP,
    "deepfm": MLP,
    "xdeepfm": {**MLP, "num_maps": (64,)},
    "dcn": MLP,
    "dcnv2": MLP,
    "dcnv2_mix": {**MLP, "rank": 16},
    "gdcn": MLP,
    "dlrm": MLP,
    "autoint": {"num_layers": 3, "num_heads": 2, "head_dim": 32},
    "autoint_plus": {**MLP, "num_layers": 3, "num_heads": 2, "head_dim": 32},
    "ipnn": MLP,
    "fgcnn": {**MLP, "kernel_height": 3, "num_channels": (6, 8)},
    "fibinet": {**MLP, "bilinear": "field_each"},
    "masknet": {**MLP, "num_blocks": 3, "block_dim": 64},
    "masknet_serial": {"hidden": (400, 400), "dropout": 0.4},
    "dualmlp": {f"{name}_{n}": value for n in (1, 2) for name, value in MLP.items()},
    "finalmlp": {f"{name}_{n}": value for n in (1, 2) for name, value in MLP.items()},
    "finalnet": {"hidden_1": (400, 400), "dropout_1": 0.4, "hidden_2": (400,), "dropout_2": 0.4},
    "eulernet": {"num_orders": (20,), "layer_norm": True},
    "mlp_time": {"model": "mlp", **MLP, **TIME},
    "dcnv2_time": {"model": "dcnv2", **MLP, **TIME},
    "autoint_plus_time": {
        "model": "autoint_plus",
        **{**MLP, **TIME, "num_layers": 3, "num_heads": 2, "head_dim": 32},
    },
}
# L2 on the tables, chosen on validation.
EMBEDDING_L2 = {"autoint": 1e-3, "ids": 1e-4}


@dataclass(frozen=True)
class Knobs(RecipeKnobs):
    """Train one model on MovieLens-1M and report its test AUC once."""

    model: Literal[tuple(VARIANTS)] = "dcnv2"  # type: ignore[valid-type]
    """Which variant."""
    protocol: Literal["autoint", "ids"] = "autoint"
    """Which published protocol; datasets/movielens_1m.py describes both."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    run_recipe(
        knobs,
        recipe=__file__,
        data=f"movielens_1m_{knobs.protocol}",
        script=["movielens_1m.py", "--protocol", knobs.protocol],
        model=knobs.model,
        config={"model": knobs.model, "embedding_dim": 16, **VARIANTS[knobs.model]},
        batch_size=1024,
        learning_rate=1e-3,
        embedding_l2=EMBEDDING_L2[knobs.protocol],
    )


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
