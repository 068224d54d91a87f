"""How long another library takes to score some rows; `export.py --speed` runs this by the python that has the library.

    PYTHON tests/benchmarks/peer_latency.py {deepctr,rechub}

DCN V2 with random weights over 10 ids of 1,000 values, width 16, three full cross layers and hidden layers of 400, as
`export.py` has it; one thread. Each line of standard input is a number of rows and seconds; the answer is a line of
JSON: for each way to score, milliseconds of each call in that time.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = [f"c{n}" for n in range(10)]
Score = Callable[[dict[str, Any]], object]  # of column -> ids (B,)


def deepctr() -> dict[str, Score]:
    """DeepCTR-Torch: its predict, and its network alone."""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DCN

    columns = [SparseFeat(name, 1_003, embedding_dim=16) for name in NAMES]
    model = DCN([], columns, cross_num=3, cross_parameterization="matrix", dnn_hidden_units=(400, 400, 400)).eval()

    def network(ids: dict[str, Any]) -> object:
        with torch.no_grad():
            return model(torch.from_numpy(np.stack(list(ids.values()), axis=1)).float()).numpy()

    return {
        "DeepCTR-Torch, predict": lambda ids: model.predict(dict(ids), 8192),
        "DeepCTR-Torch, network": network,
    }


def rechub() -> dict[str, Score]:
    """torch-rechub: its predict with its loader, its network alone, and what it exports, through onnxruntime."""
    # Its environment may lack these, and the caller's has them.
    sys.path.append(os.environ["LATENCY_PACKAGES"])
    import onnxruntime
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models.ranking.dcn_v2 import DCNv2
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    features = [SparseFeature(name, vocab_size=1_003, embed_dim=16) for name in NAMES]
    layers = {"dims": [400, 400, 400], "dropout": 0.0, "activation": "relu"}
    model = DCNv2(features=features, n_cross_layers=3, mlp_params=layers, use_low_rank_mixture=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        trainer = CTRTrainer(model, device="cpu", model_path=folder)
        path = Path(folder) / "model.onnx"
        trainer.export_onnx(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {one.name: np.int64 if "int64" in one.type else np.float32 for one in session.get_inputs()}

    def predict(ids: dict[str, Any]) -> object:
        size = len(ids[NAMES[0]])
        loader, _, _ = DataGenerator(ids, np.zeros(size)).generate_dataloader(
            x_val=ids, y_val=np.zeros(size), x_test=ids, y_test=np.zeros(size), batch_size=8192, num_workers=0
        )
        return trainer.predict(model, loader)

    def network(ids: dict[str, Any]) -> object:
        with torch.no_grad():
            return model({name: torch.from_numpy(some) for name, some in ids.items()}).numpy()

    def exported(ids: dict[str, Any]) -> object:
        return session.run(None, {name: ids[name].astype(kind, copy=False) for name, kind in types.items()})

    return {
        "torch-rechub, predict": predict,
        "torch-rechub, network": network,
        "torch-rechub, its ONNX": exported,
    }


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")  # libraries print what they like
    os.dup2(2, 1)
    ways = {"deepctr": deepctr, "rechub": rechub}[sys.argv[1]]()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        size, seconds = int(line.split()[0]), float(line.split()[1])
        random = np.random.default_rng(size)
        ids = {name: random.integers(1, 1_003, size) for name in NAMES}
        found: dict[str, list[float]] = {}
        for name, score in ways.items():
            taken: list[float] = []
            with contextlib.redirect_stderr(io.StringIO()):  # of bars of progress
                for _ in range(3):
                    score(ids)
                until = time.perf_counter() + seconds
                while time.perf_counter() < until:
                    started = time.perf_counter()
                    score(ids)
                    taken.append(1000 * (time.perf_counter() - started))
            found[name] = taken
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
