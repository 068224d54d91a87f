"""torch-rechub 0.9.0 as `recipes/speed.py` measures it: run by the python of an environment that has it.

Preparation is the recipe of its examples: pandas, and scikit-learn's encoders over all rows. Its networks always have
batch normalisation. Numbers go into the network as they are, where ctrlib and FuxiCTR give each a vector; its DCN V2
does not take them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.preprocessing import LabelEncoder, MinMaxScaler
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.ranking.autoint import AutoInt
from torch_rechub.models.ranking.dcn_v2 import DCNv2
from torch_rechub.models.ranking.deepfm import DeepFM
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator

from worker import Program, now, serve

SPLITS = ("train", "valid", "test")


class Rechub(Program):
    """Its examples' preparation, and its own loader and trainer."""

    sparse: Sequence[Any] = ()  # its trainer has no L2, but weight decay: 1e-5 in its examples

    def prepare(self) -> None:
        """From CSV to arrays in memory."""
        parts = [pd.read_csv(f"{self.raw}/{split}.csv", dtype=dict.fromkeys(self.ids, str)) for split in SPLITS]
        frame = pd.concat(parts, ignore_index=True)
        frame[self.ids] = frame[self.ids].fillna("0")
        if self.numbers:
            frame[self.numbers] = MinMaxScaler().fit_transform(frame[self.numbers].fillna(0))
        for name in self.ids:
            frame[name] = LabelEncoder().fit_transform(frame[name])
        width = self.embedding_dim
        self.sparse = [SparseFeature(name, vocab_size=frame[name].nunique(), embed_dim=width) for name in self.ids]
        self.dense = [DenseFeature(name) for name in self.numbers]
        ends = np.cumsum([len(part) for part in parts])
        data = []
        for start, end in zip([0, *ends], ends):
            rows = frame.iloc[start:end]
            arrays = {name: rows[name].to_numpy() for name in (*self.ids, *self.numbers)}
            data.append((arrays, rows["label"].to_numpy(dtype=np.float32)))
        (x, y), (x_valid, y_valid), (x_test, y_test) = data
        self.train, self.valid, self.test = DataGenerator(x, y).generate_dataloader(
            x_val=x_valid, y_val=y_valid, x_test=x_test, y_test=y_test, batch_size=self.batch_size, num_workers=0
        )

    def open(self, model: str, net: dict[str, Any]) -> None:
        """Make a model."""
        if not self.sparse:
            self.prepare()
        torch.manual_seed(self.seed)
        mlp = {"dims": net["hidden"], "dropout": net["dropout"], "activation": "relu"}
        if model == "deepfm":
            made = DeepFM(deep_features=[*self.dense, *self.sparse], fm_features=self.sparse, mlp_params=mlp)
        elif model == "dcnv2":
            layers = net["num_cross_layers"]
            made = DCNv2(features=self.sparse, n_cross_layers=layers, mlp_params=mlp, use_low_rank_mixture=False)
        else:
            attention = {"num_layers": net["num_layers"], "num_heads": net["num_heads"]}
            made = AutoInt(self.sparse, self.dense, mlp_params=mlp, **attention)
        self.model = made
        self.trainer = CTRTrainer(
            made,
            optimizer_params={"lr": 1e-3, "weight_decay": 1e-5},
            n_epoch=100,
            earlystop_patience=2,
            device="cpu",
            model_path=self.work,
        )

    def hold(self, batches: int) -> None:
        """Keep batches in memory for `step` and `infer`."""
        self.batches = [batch for batch, _ in zip(self.train, range(batches))]
        held = [x for x, _ in self.batches]
        self.rows = {name: torch.cat([x[name] for x in held])[:8192] for name in held[0]}

    def step(self, steps: int) -> None:
        """Training steps on the batches in memory."""
        self.model.train()
        for number in range(steps):
            self.trainer.train_one_epoch([self.batches[number % len(self.batches)]])

    def epoch(self) -> None:
        """Train on every row once."""
        self.trainer.train_one_epoch(self.train)

    def score(self) -> float:
        """AUC of test."""
        return float(self.trainer.evaluate(self.model, self.test))

    def fit(self) -> list[list[float]]:
        """Train until validation AUC stops rising: seconds and AUC after each epoch."""
        curve: list[list[float]] = []
        evaluate, started = self.trainer.evaluate, now()

        def evaluated(*arguments: Any) -> Any:
            auc = evaluate(*arguments)
            curve.append([now() - started, float(auc)])
            return auc

        self.trainer.evaluate = evaluated
        self.trainer.fit(self.train, self.valid)
        return curve


if __name__ == "__main__":
    serve(Rechub)
