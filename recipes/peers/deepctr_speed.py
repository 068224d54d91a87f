"""DeepCTR-Torch 0.3.0 as `recipes/speed.py` measures it: run by the python of an environment that has it.

Preparation is the recipe of its examples: pandas, and scikit-learn's encoders over all rows. Numbers go into the
network as they are, where ctrlib and FuxiCTR give each a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from deepctr_torch.callbacks import EarlyStopping
from deepctr_torch.inputs import DenseFeat, SparseFeat
from deepctr_torch.models import DCN, AutoInt, DeepFM
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import LabelEncoder, MinMaxScaler

from worker import Program, now, serve

SPLITS = ("train", "valid", "test")


class DeepCTR(Program):
    """Its examples' preparation, and its own loader and training loop."""

    columns: Sequence[Any] = ()

    def prepare(self) -> None:
        """From CSV to arrays in memory."""
        parts = [pd.read_csv(f"{self.raw}/{split}.csv", dtype=dict.fromkeys(self.ids, str)) for split in SPLITS]
        frame = pd.concat(parts, ignore_index=True)
        frame[self.ids] = frame[self.ids].fillna("-1")
        for name in self.ids:
            frame[name] = LabelEncoder().fit_transform(frame[name])
        if self.numbers:
            frame[self.numbers] = MinMaxScaler().fit_transform(frame[self.numbers].fillna(0))
        width = self.embedding_dim
        ids = [SparseFeat(name, frame[name].max() + 1, embedding_dim=width) for name in self.ids]
        self.columns = [*ids, *(DenseFeat(name, 1) for name in self.numbers)]
        ends = np.cumsum([len(part) for part in parts])
        self.arrays, self.labels = {}, {}
        for split, start, end in zip(SPLITS, [0, *ends], ends):
            rows = frame.iloc[start:end]
            self.arrays[split] = {name: rows[name].to_numpy() for name in (*self.ids, *self.numbers)}
            self.labels[split] = rows["label"].to_numpy(dtype=np.float64)

    def open(self, model: str, net: dict[str, Any]) -> None:
        """Make a model."""
        if not self.columns:
            self.prepare()
        common = {
            "dnn_hidden_units": tuple(net["hidden"]),
            "dnn_dropout": net["dropout"],
            "dnn_use_bn": net["batch_norm"],
        }
        common |= {"l2_reg_embedding": self.l2, "seed": self.seed, "task": "binary", "device": "cpu"}
        if model == "deepfm":
            self.model = DeepFM(self.columns, self.columns, l2_reg_linear=self.l2, **common)
        elif model == "dcnv2":
            cross = {"cross_num": net["num_cross_layers"], "cross_parameterization": "matrix"}
            self.model = DCN(self.columns, self.columns, l2_reg_linear=self.l2, **cross, **common)
        else:
            attention = {"att_layer_num": net["num_layers"], "att_head_num": net["num_heads"]}
            self.model = AutoInt(self.columns, self.columns, **attention, **common)
        adam = torch.optim.Adam(self.model.parameters(), 1e-3)
        self.model.compile(adam, "binary_crossentropy", metrics=["binary_crossentropy", "auc"])

    def _matrix(self, rows: int | None = None) -> np.ndarray:
        train = self.arrays["train"]
        return np.stack([train[name][:rows] for name in self.model.feature_index], axis=1)

    def hold(self, batches: int) -> None:
        """Keep batches in memory for `step` and `infer`."""
        x = torch.from_numpy(self._matrix(max(8192, batches * self.batch_size))).float()
        y = torch.from_numpy(self.labels["train"]).float()
        starts = [start for start in range(0, batches * self.batch_size, self.batch_size) if start < len(x)]
        self.rows = x[:8192]
        self.batches = [(x[at : at + self.batch_size], y[at : at + self.batch_size]) for at in starts]

    def load(self) -> None:
        """All batches of an epoch, as its `fit` makes them."""
        rows = torch.utils.data.TensorDataset(torch.from_numpy(self._matrix()), torch.from_numpy(self.labels["train"]))
        for x, _ in torch.utils.data.DataLoader(rows, shuffle=True, batch_size=self.batch_size):
            x.float()

    def step(self, steps: int) -> None:
        """The body of its `fit`."""
        model = self.model.train()
        for number in range(steps):
            x, y = self.batches[number % len(self.batches)]
            predicted = model(x).squeeze(-1)
            model.optim.zero_grad()
            loss = model.loss_func(predicted, y, reduction="sum")
            total = loss + model.get_regularization_loss() + model.aux_loss
            loss.item()
            total.sum().backward()
            model.optim.step()

    def epoch(self) -> None:
        """Train on every row once."""
        self.model.fit(
            dict(self.arrays["train"]), self.labels["train"], batch_size=self.batch_size, epochs=1, verbose=2
        )

    def first(self, rows: int) -> torch.Tensor:
        """So many of the rows in memory."""
        found: torch.Tensor = self.rows[:rows]
        return found

    def score(self) -> float:
        """AUC of test."""
        return float(roc_auc_score(self.labels["test"], self.model.predict(dict(self.arrays["test"]), self.batch_size)))

    def fit(self) -> list[list[float]]:
        """Train until validation AUC stops rising: seconds and AUC after each epoch."""
        curve: list[list[float]] = []
        started = now()

        class Curve(EarlyStopping):  # type: ignore[misc]
            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                curve.append([now() - started, float(logs["val_auc"])])
                super().on_epoch_end(epoch, logs)

        self.model.fit(
            dict(self.arrays["train"]),
            self.labels["train"],
            **{"batch_size": self.batch_size, "epochs": 100, "verbose": 2},
            validation_data=(dict(self.arrays["valid"]), self.labels["valid"]),
            callbacks=[Curve(monitor="val_auc", min_delta=1e-6, patience=2, mode="max")],
        )
        return curve


if __name__ == "__main__":
    serve(DeepCTR)
