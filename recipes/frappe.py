"""Frappe_x1 in BARS' protocol: every tower, with its published settings where there are any.

    python recipes/frappe.py --model finalmlp --seed 2021 [--raw DIR] [--engine fused] [--record]

Settings common to all rows of BARS: width 10, batch 4096, Adam 1e-3, exact engine, learning rate x 0.1 on plateau,
patience 2. Published numbers stand in results.py. Where BARS has no row, settings are said to be ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff

from harness import RecipeKnobs, run_ensemble_recipe, run_recipe

MLP = {"hidden": (400, 400, 400), "batch_norm": True}

# Everything in which the variants differ: L2 on the tables, and the model.
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"embedding_l2": 0.05, **MLP, "dropout": 0.2},
    "fm": {"embedding_l2": 5e-6},
    "wide_deep": {"embedding_l2": 0.05, **MLP, "dropout": 0.2},  # ours
    "deepfm": {"embedding_l2": 0.05, **MLP, "dropout": 0.2},
    "xdeepfm": {"embedding_l2": 0.1, **MLP, "dropout": 0.2, "num_maps": (64,)},
    "dcn": {"embedding_l2": 0.05, **MLP, "dropout": 0.2, "num_cross_layers": 3},
    "dcnv2": {"embedding_l2": 0.05, **MLP, "dropout": 0.4, "num_cross_layers": 4},
    "dcnv2_mix": {"embedding_l2": 0.05, **MLP, "dropout": 0.4, "num_cross_layers": 4, "rank": 16},  # ours
    "gdcn": {"embedding_l2": 0.05, **MLP, "dropout": 0.4, "num_cross_layers": 4},  # ours
    "dlrm": {"embedding_l2": 0.1, **MLP, "dropout": 0.4},  # BARS' row of that name has no inner products
    "autoint": {"embedding_l2": 0.05, "num_layers": 6, "num_heads": 4, "head_dim": 32, "identity": True},
    "autoint_plus": {
        "embedding_l2": 0.1,
        **{"num_layers": 5, "num_heads": 4, "head_dim": 32, "identity": True, "scale": True, "norm_before_relu": True},
        **{**MLP, "dropout": 0.1, "attention_dropout": 0.1},
    },
    "ipnn": {"embedding_l2": 0.05, "hidden": (400, 400, 400), "dropout": 0.3},
    "fgcnn": {"embedding_l2": 0.05, **MLP, "dropout": 0.2, "kernel_height": 5, "num_channels": (6, 8)},  # ours
    "fibinet": {
        "embedding_l2": 0.05,
        **MLP,
        "dropout": 0.3,
        "bilinear": "field_all",
        "reduction_ratio": 2,
        "share_bilinear": True,
    },
    "masknet": {
        "embedding_l2": 0.1,
        **{"num_blocks": 3, "block_dim": 50, "reduction_ratio": 2, "embedding_norm": False},
        **{"hidden": (400, 400, 400), "dropout": 0.1},
    },
    "dualmlp": {
        "embedding_l2": 0.05,
        **{"hidden_1": (400, 400, 400), "dropout_1": 0.2, "batch_norm_1": True},
        **{"hidden_2": (500, 500, 500), "dropout_2": 0.3, "batch_norm_2": True},
    },
    "finalmlp": {
        "embedding_l2": 0.05,
        **{"hidden_1": (400,), "dropout_1": 0.4, "batch_norm_1": True},
        **{"hidden_2": (100,), "dropout_2": 0.4, "batch_norm_2": True},
        **{"contexts": (("user",), ("item",)), "gate_hidden": (400,), "num_heads": 5},
    },
    "eulernet": {"embedding_l2": 0.05, "layer_norm": True},  # the authors', without their L2 on the network
    "finalnet": {
        "embedding_l2": 0.1,
        **{"hidden_1": (400, 400), "dropout_1": 0.1, "hidden_2": (400,), "dropout_2": 0.1},
    },
}

# Trained apart, their logits averaged: the two best variants of width 10 on validation, one run each.
ENSEMBLE = ("finalmlp", "xdeepfm")


@dataclass(frozen=True)
class Knobs(RecipeKnobs):
    """Train one model on Frappe_x1 and report its test AUC once."""

    model: Literal[(*VARIANTS, "ensemble")] = "deepfm"  # type: ignore[valid-type]
    """Which variant."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    common: dict[str, Any] = {"recipe": __file__, "data": "frappe_x1", "script": ["frappe.py"], "model": knobs.model}
    if knobs.model == "ensemble":
        run_ensemble_recipe(knobs, members=[settings(name) for name in ENSEMBLE], **common)
    else:
        config, training = settings(knobs.model)
        run_recipe(knobs, config=config, **training, **common)


def settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and the training of a variant."""
    variant = dict(VARIANTS[name])
    training = {"embedding_l2": variant.pop("embedding_l2"), "batch_size": 4096, "learning_rate": 1e-3}
    return {"model": name, "embedding_dim": 10, **variant}, training


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
