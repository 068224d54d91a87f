"""FuxiCTR 2.3.7 as `recipes/speed.py` measures it: run by the python of an environment that has it.

Its wheel has no models: they come from `model_zoo/` of a checkout of https://github.com/reczoo/FuxiCTR, tag v2.3.7.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor, build_dataset
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.torch_utils import seed_everything

import fuxictr_shims  # noqa: F401
from worker import Program, now, serve

# Model -> folder in the model zoo, and class.
MODELS = {
    "deepfm": ("DeepFM/DeepFM_torch", "DeepFM"),
    "dcnv2": ("DCNv2", "DCNv2"),
    "finalmlp": ("FinalMLP", "FinalMLP"),
    "autoint_plus": ("AutoInt", "AutoInt"),
    "autoint": ("AutoInt", "AutoInt"),
    "finalnet": ("FinalNet", "FinalNet"),
    "gdcn": ("GDCN", "GDCNP"),  # its GDCN is the stacked one
    "masknet": ("MaskNet", "MaskNet"),
    "fgcnn": ("FGCNN", "FGCNN"),
    "fibinet": ("FiBiNET", "FiBiNET"),
    "dualmlp": ("FinalMLP", "DualMLP"),
    "eulernet": ("EulerNet", "EulerNet"),
}


def arguments_of(model: str, net: dict[str, Any]) -> dict[str, Any]:
    """FuxiCTR's names for ctrlib's arguments of a model. Its activations are said, since some classes have none.

    These are the same networks: beside tables and their dimensions, FuxiCTR has the same number of parameters, and one
    more in DeepFM, FinalMLP and AutoInt+, where two parts of the logit have a bias each (tests/test_speed.py has the
    numbers). Initial weights differ in FGCNN's convolutions and FiBiNET's matrices, as ctrlib's docstrings say; FGCNN
    pools 39 and 5 fields from another end.
    """
    if model in ("finalmlp", "dualmlp"):
        two = {
            **{f"mlp{n}_hidden_units": net[f"hidden_{n}"] for n in (1, 2)},
            **{f"mlp{n}_hidden_activations": "relu" for n in (1, 2)},
            **{f"mlp{n}_dropout": net[f"dropout_{n}"] for n in (1, 2)},
            **{f"mlp{n}_batch_norm": net[f"batch_norm_{n}"] for n in (1, 2)},
        }
        if model == "dualmlp":
            return two
        first, second = net["contexts"]
        return {
            **two,
            **{"use_fs": True, "fs_hidden_units": net["gate_hidden"], "num_heads": net["num_heads"]},
            **{"fs1_context": first, "fs2_context": second},
        }
    if model == "finalnet":
        return {
            **{f"block{n}_hidden_units": net[f"hidden_{n}"] for n in (1, 2)},
            **{f"block{n}_hidden_activations": "relu" for n in (1, 2)},
            **{f"block{n}_dropout": net[f"dropout_{n}"] for n in (1, 2)},
            **{"block_type": "2B", "residual_type": "concat"},
            **{"use_feature_gating": net["field_gate"], "batch_norm": net["batch_norm"]},
        }
    if model == "eulernet":
        return {"shape": net["num_orders"], "layer_norm": net["layer_norm"]}
    if model == "masknet":
        return {
            **{"model_type": "ParallelMaskNet", "parallel_num_blocks": net["num_blocks"]},
            **{"parallel_block_dim": net["block_dim"], "reduction_ratio": net["reduction_ratio"]},
            **{"dnn_hidden_units": net["hidden"], "dnn_hidden_activations": "relu", "net_dropout": net["dropout"]},
            **{"emb_layernorm": net["embedding_norm"], "net_layernorm": True},
        }
    if model == "fgcnn":
        layers = len(net["num_channels"])
        return {
            **{"share_embedding": net["share_embedding"], "channels": net["num_channels"]},
            **{"kernel_heights": [net["kernel_height"]] * layers, "pooling_sizes": [net["pooling_size"]] * layers},
            **{"recombined_channels": [net["num_new"]] * layers, "conv_activation": "Tanh", "conv_batch_norm": True},
            **{"dnn_hidden_units": net["hidden"], "dnn_activations": "relu"},
            **{"dnn_batch_norm": net["batch_norm"], "net_dropout": net["dropout"]},
        }
    common = {"net_dropout": net.get("dropout", 0.0), "batch_norm": net.get("batch_norm", False)}
    if model == "deepfm":
        return {**common, "hidden_units": net["hidden"], "hidden_activations": "relu"}
    if model == "dcnv2":
        return {
            **common,
            **{"model_structure": "parallel", "use_low_rank_mixture": False},
            **{"num_cross_layers": net["num_cross_layers"], "parallel_dnn_hidden_units": net["hidden"]},
        }
    if model == "gdcn":
        return {**common, "num_cross_layers": net["num_cross_layers"], "dnn_hidden_units": net["hidden"]}
    if model == "fibinet":
        if net["share_bilinear"]:
            raise ValueError("FuxiCTR 2.3.7 always has two sets of bilinear matrices: set share_bilinear=False")
        return {
            **common,
            **{"hidden_units": net["hidden"], "hidden_activations": "relu", "bilinear_type": net["bilinear"]},
            "reduction_ratio": net["reduction_ratio"],
        }
    return {  # an AutoInt without an MLP is the same class
        **common,
        **{"attention_layers": net["num_layers"], "num_heads": net["num_heads"]},
        **{"attention_dim": net["num_heads"] * net["head_dim"], "dnn_hidden_units": net.get("hidden", [])},
        **{"use_residual": True, "use_scale": net["scale"], "layer_norm": net["norm_before_relu"], "use_wide": False},
    }


class FuxiCTR(Program):
    """Its own preparation, loader and training loop, with the settings of its examples."""

    def __init__(self, *, source: str, **setting: Any) -> None:
        super().__init__(**setting)
        self.source, self.folder = Path(source), Path(self.work) / "data"
        kinds: list[dict[str, Any]] = [{"name": self.ids, "active": True, "dtype": "str", "type": "categorical"}]
        if self.numbers:
            number = {"active": True, "dtype": "float", "type": "numeric", "normalizer": "StandardScaler"}
            kinds.insert(0, {"name": self.numbers, **number})
        self.settings: dict[str, Any] = {
            **{"data_root": self.work, "dataset_id": "data", "model_root": f"{self.work}/checkpoints"},
            "data_format": "csv",
            **{f"{split}_data": f"{self.raw}/{split}.csv" for split in ("train", "valid", "test")},
            **{"feature_cols": kinds, "label_col": {"name": "label", "dtype": "float"}, "min_categr_count": 1},
            **{"loss": "binary_crossentropy", "metrics": ["AUC", "logloss"], "task": "binary_classification"},
            **{"optimizer": "adam", "learning_rate": 1e-3, "batch_size": self.batch_size},
            **{"embedding_dim": self.embedding_dim, "embedding_regularizer": self.l2},
            **{"net_regularizer": self.network_l2, "shuffle": True, "num_workers": 1, "verbose": 0},
            **{"monitor": "AUC", "monitor_mode": "max", "early_stop_patience": 2, "save_best_only": True},
            **{"eval_steps": None, "gpu": -1, "seed": self.seed, "feature_specs": None, "model_id": "model"},
        }

    def prepare(self) -> None:
        """From CSV to its own files."""
        build_dataset(FeatureProcessor(**self.settings), **self.settings)

    def open(self, model: str, net: dict[str, Any]) -> None:
        """Make loaders and a model."""
        if not (self.folder / "feature_map.json").exists():
            self.prepare()
        prepared = {f"{split}_data": str(self.folder / f"{split}.parquet") for split in ("train", "valid", "test")}
        self.settings |= {**prepared, "data_format": "parquet"}
        features = FeatureMap("data", str(self.folder))
        features.load(str(self.folder / "feature_map.json"), self.settings)
        folder, name = MODELS[model]
        sys.path.insert(0, str(self.source / "model_zoo" / folder))
        seed_everything(self.seed)
        made = getattr(importlib.import_module("src"), name)
        self.model = made(features, **self.settings, **arguments_of(model, net))
        loaders = RankDataLoader(features, stage="both", **self.settings).make_iterator()
        self.train, self.valid, self.test = loaders
        # What `fit` sets before its first epoch; no validation in the epochs that are timed.
        self.model._max_gradient_norm, self.model._eval_steps, self.model._total_steps = 10.0, 10**9, 0
        self.model._stop_training = False

    def hold(self, batches: int) -> None:
        """Keep batches in memory for `step` and `infer`."""
        held = [batch for batch, _ in zip(self.train, range(batches))]
        self.batches = held
        self.rows = {name: torch.cat([batch[name] for batch in held])[:8192] for name in held[0]}

    def step(self, steps: int) -> None:
        """Training steps on the batches in memory."""
        self.model.train()
        for number in range(steps):
            self.model.train_step(self.batches[number % len(self.batches)]).item()

    def epoch(self) -> None:
        """Train on every row once."""
        self.model.train_epoch(self.train)

    def score(self) -> float:
        """AUC of test."""
        return float(self.model.evaluate(self.test)["AUC"])

    def fit(self) -> list[list[float]]:
        """Train until validation AUC stops rising: seconds and AUC after each epoch."""
        Path(self.model.model_dir).mkdir(parents=True, exist_ok=True)
        curve: list[list[float]] = []
        evaluate, started = self.model.evaluate, now()

        def evaluated(*arguments: Any, **named: Any) -> Any:
            found = evaluate(*arguments, **named)
            curve.append([now() - started, float(found["AUC"])])
            return found

        self.model.evaluate = evaluated
        self.model._eval_steps = None
        self.model.fit(self.train, validation_data=self.valid, epochs=100)
        return curve


if __name__ == "__main__":
    serve(FuxiCTR)
