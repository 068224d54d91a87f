"""Frappe_x1 in BARS' protocol: every tower, with its published settings where there are any.

    python recipes/frappe.py --model finalmlp --seed 2021 [--raw DIR] [--engine fused] [--record]

Settings common to all rows of BARS: width 10, batch 4096, Adam 1e-3, exact engine, learning rate x 0.1 on plateau,
patience 2. Published numbers stand in results.py. Where BARS has no row, settings are said to be ours.

    python recipes/frappe.py --model fibinet --seed 1 --raw DIR --peer-python PYTHON --peer-source DIR [--record]

trains FuxiCTR's model of that name instead, by its own loop on the very same files: docs/speed.md says how to get an
environment and a checkout.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tyro.conf import FlagCreatePairsOff

from ctrlib import Schema
from ctrlib.training.loop import to_json
from harness import RecipeKnobs, prepared, run_ensemble_recipe, run_recipe
from programs import Program, installed, unpack
from records import AVERAGED, record

DATA: dict[str, Any] = {"recipe": __file__, "data": "frappe_x1", "script": ["frappe.py"]}

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
    "autoint": {"embedding_l2": 0.05, "num_layers": 6, "num_heads": 4, "head_dim": 32, "identity": True}
    | {"scale": False, "norm_before_relu": False},
    "autoint_plus": {
        "embedding_l2": 0.1,
        **{"num_layers": 5, "num_heads": 4, "head_dim": 32, "identity": True, "scale": True, "norm_before_relu": True},
        **{**MLP, "dropout": 0.1, "attention_dropout": 0.1},
    },
    "ipnn": {"embedding_l2": 0.05, "hidden": (400, 400, 400), "dropout": 0.3},
    "fgcnn": {  # ours
        **{"embedding_l2": 0.05, **MLP, "dropout": 0.2, "kernel_height": 5, "num_channels": (6, 8)},
        **{"pooling_size": 2, "num_new": 3, "share_embedding": False},
    },
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
    "eulernet": {"embedding_l2": 0.05, "network_l2": 1e-5, "num_orders": (52,), "layer_norm": True},  # the authors'
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
    average: bool = False
    """Score and keep a moving average of the weights (`average_weights`), which no paper does; it is in the name."""
    peer_python: Path | None = None
    """Python of an environment with FuxiCTR, to train its model instead; needs --raw."""
    peer_source: Path | None = None
    """Checkout of FuxiCTR."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    if knobs.peer_python or knobs.peer_source:
        run_peer(knobs)
    elif knobs.model == "ensemble":
        if knobs.average:
            raise SystemExit(
                "--average is for a single model: the ensemble's members have the weights of the last step"
            )
        run_ensemble_recipe(knobs, model=knobs.model, members=[settings(name) for name in ENSEMBLE], **DATA)
    else:
        config, training = settings(knobs.model)
        name = knobs.model + AVERAGED * knobs.average
        run_recipe(knobs, model=name, config=config, average_weights=knobs.average, **training, **DATA)


def run_peer(knobs: Knobs) -> None:
    """FuxiCTR's model with the same settings: a line of JSON, and a row of results.csv."""
    if not (knobs.peer_python and knobs.peer_source and knobs.raw) or knobs.model == "ensemble" or knobs.average:
        raise SystemExit("a peer needs --peer-python, --peer-source and --raw, no ensemble and no average")
    net, training = settings(knobs.model)
    if knobs.model == "fibinet":
        net |= {"share_bilinear": False}  # FuxiCTR 2.3.7 has no other
    schema = Schema.load(prepared(knobs, **DATA))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        unpack(knobs.raw, work / "raw")
        setting = {
            **{"raw": str(work / "raw"), "work": str(work), "source": str(knobs.peer_source)},
            **{"ids": [feature.name for feature in schema.sparse], "numbers": [], "seed": knobs.seed},
            **{"embedding_dim": net["embedding_dim"], "batch_size": training["batch_size"]},
            **{"l2": training["embedding_l2"], "network_l2": training.get("network_l2", 0.0)},
        }
        with Program("fuxictr", knobs.peer_python, setting, work=work, threads=torch.get_num_threads()) as program:
            program.do("open", model=knobs.model, net=net)
            trained = program.do("fit")
            test_auc = program.do("score")["found"]
    curve = [auc for _, auc in trained["found"]]
    row = {
        **{"engine": "exact", "precision": "fp32", "seed": knobs.seed, "data_hash": schema.hash},
        **{"valid_auc": max(curve), "test_auc": test_auc, "epochs": len(curve), "seconds": trained["seconds"]},
        "note": installed(knobs.peer_python, "fuxictr"),
    }
    print(to_json({"model": f"{knobs.model} of fuxictr", **row}))
    if knobs.record:
        path = Path(__file__).parent / "results.csv"
        record(row, path, data=DATA["data"], model=f"{knobs.model} of fuxictr")


def settings(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and the training of a variant."""
    variant = dict(VARIANTS[name])
    training: dict[str, Any] = {"batch_size": 4096, "learning_rate": 1e-3}
    training |= {name: variant.pop(name) for name in ("embedding_l2", "network_l2") if name in variant}
    return {"model": name, "embedding_dim": 10, **variant}, training


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
