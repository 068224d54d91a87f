"""FuxiCTR 2.3.7's DIN on the rows of `recipes/histories.py`, with its own training loop: Adam at 1e-3, cut by ten.

    python recipes/peers/fuxictr_din.py FOLDER SOURCE

SOURCE is a checkout of https://github.com/reczoo/FuxiCTR, tag v2.3.7, whose model_zoo/ the wheel leaves out.
"""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from fuxictr.features import FeatureMap

import fuxictr_shims  # noqa: F401
from din import Batches, Data, tell

SPECS: dict[str, dict[str, Any]] = {
    "id": {"type": "categorical"},
    "history": {"type": "sequence", "feature_encoder": None},
    "bag": {"type": "sequence", "feature_encoder": "layers.MaskedAveragePooling()"},
}


def run(data: Data) -> dict[str, Any]:
    """Train until validation AUC stops rising twice."""
    folder = Path(sys.argv[1])
    features = FeatureMap("rows", str(folder))
    features.labels, features.default_emb_dim = ["label"], data.embedding_dim
    features.features = OrderedDict()
    holders = {feature["table"]: feature["name"] for feature in reversed(data.features) if feature["kind"] == "id"}
    for feature in data.features:
        spec = {**SPECS[feature["kind"]], "source": "", "vocab_size": feature["rows"], "padding_idx": 0}
        if feature["kind"] != "id":
            spec["max_len"] = feature["length"]
        if holders.get(feature["table"], feature["name"]) != feature["name"]:
            spec["share_embedding"] = holders[feature["table"]]
        features.features[feature["name"]] = spec
    features.num_fields = len(data.features)
    features.set_column_index()
    sys.path.insert(0, str(Path(sys.argv[2]) / "model_zoo" / "DIN"))
    targets, histories = zip(*data.pairs())
    as_one = len(targets) > 1  # all things of an event are compared at once, as in ctrlib
    model = importlib.import_module("src").DIN(
        features,
        **{"model_root": str(folder), "verbose": 0, "gpu": -1, "task": "binary_classification"},
        **{"optimizer": "adam", "learning_rate": 1e-3, "loss": "binary_crossentropy", "metrics": ["AUC", "logloss"]},
        **{"monitor": "AUC", "monitor_mode": "max", "early_stop_patience": 2, "save_best_only": True},
        **{"embedding_dim": data.embedding_dim, "embedding_regularizer": data.l2, "net_regularizer": 0},
        **{"dnn_hidden_units": data.hidden, "net_dropout": data.dropout, "batch_norm": True},
        **{"attention_hidden_units": data.attention_hidden, "attention_hidden_activations": "Dice"},
        din_target_field=[targets if as_one else targets[0]],
        din_sequence_field=[histories if as_one else histories[0]],
    )
    Path(model.model_dir).mkdir(parents=True, exist_ok=True)
    valid = Batches(data, "valid")
    model.fit(Batches(data, "train"), validation_data=valid, epochs=100)
    found = {f"{split}_auc": model.evaluate(Batches(data, split))["AUC"] for split in ("valid", "test")}
    return {**found, "epochs": model._epoch_index + 1, "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    tell("fuxictr", run)
