"""torch-rechub 0.9.0's DIN on the rows of `recipes/histories.py`, with its own trainer: Adam at 1e-3, never cut.

    python recipes/peers/rechub_din.py FOLDER

Each thing of an event has an attention of its own; all networks have batch normalisation and Dice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.models.ranking.din import DIN
from torch_rechub.trainers import CTRTrainer

from din import Batches, Data, Rows, tell


def run(data: Data) -> dict[str, Any]:
    """Train until validation AUC stops rising twice."""
    made: dict[str, Any] = {}
    holders: dict[str, str] = {}
    for feature in sorted(data.features, key=lambda feature: feature["kind"] != "id"):
        common: dict[str, Any] = {"vocab_size": feature["rows"], "embed_dim": data.embedding_dim, "padding_idx": 0}
        common["shared_with"] = holders.get(feature["table"])
        holders.setdefault(feature["table"], feature["name"])
        if feature["kind"] == "id":
            made[feature["name"]] = SparseFeature(feature["name"], **common)
        else:
            pooling = "concat" if feature["kind"] == "history" else "mean"
            made[feature["name"]] = SequenceFeature(feature["name"], pooling=pooling, **common)
    targets, histories = ([made[name] for name in names] for names in zip(*data.pairs()))
    rest = [made[f["name"]] for f in data.features if made[f["name"]] not in (*targets, *histories)]
    model = DIN(
        rest or targets,  # it must have some
        histories,
        targets,
        mlp_params={"dims": data.hidden, "dropout": data.dropout},
        attention_mlp_params={"dims": data.attention_hidden},
    )
    trainer = CTRTrainer(
        model,
        optimizer_params={"lr": 1e-3, "weight_decay": 0},
        regularization_params={"embedding_l2": data.l2 / 2},
        n_epoch=100,
        earlystop_patience=2,
        model_path=str(Path(sys.argv[1])),
    )

    def parts(rows: Rows) -> tuple[Rows, torch.Tensor]:
        return {name: column for name, column in rows.items() if name != "label"}, rows["label"]

    trainer.fit(Batches(data, "train", parts), Batches(data, "valid", parts))
    found = {f"{split}_auc": float(trainer.evaluate(model, Batches(data, split, parts))) for split in ("valid", "test")}
    return {**found, "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    tell("torch-rechub", run)
