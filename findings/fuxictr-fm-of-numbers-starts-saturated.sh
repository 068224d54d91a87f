#!/usr/bin/env bash
# FuxiCTR 2.3.7: a factorization machine over numbers starts saturated, as the one in its DeepFM does.
#
# A number is multiplied by a vector that starts Xavier-normal, as the weight of a Linear(1, D): .34 at a width of 16,
# where rows of ids start at .0001. FM adds the inner products of all pairs of fields to the logit, so that 13 standard
# normal numbers make logits with a standard deviation of 5 before the first step, and ids none at all. Probabilities
# are 0 and 1 by chance then, and training spends its first epochs on taking that back: after one epoch on 320,000
# Criteo-shaped rows (78 steps) its DeepFM has a test AUC of .629, and of .685 if they start smaller.
#
# What to do: scale the numbers' vectors before training, for instance by .3 / sqrt(number of numbers), or bin numbers.
#
# Seen with fuxictr 2.3.7, torch 2.13.0 (CPU build), Python 3.11: logits of 13 fields of either kind before training.
# Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 fuxictr==2.3.7 "polars<2" scikit-learn==1.9.1
cd "$folder"
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
from collections import OrderedDict
from importlib.metadata import version

import numpy as np
import torch

np.Inf = np.inf  # FuxiCTR 2.3.7 was written for NumPy 1
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding
from fuxictr.pytorch.models import BaseModel

NUMBERS, ROWS, WIDTH = 13, 4096, 16


class Machine(BaseModel):
    """A factorization machine of FuxiCTR's own parts, initialised by its own method."""

    def __init__(self, features):
        super().__init__(features, model_id="fm", gpu=-1, task="binary_classification", verbose=0, metrics=["AUC"],
                         monitor="AUC", monitor_mode="max", model_root="unused/")
        self.embedding_layer = FeatureEmbedding(features, WIDTH)
        self.fm = FactorizationMachine(features)
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()

    def forward(self, inputs):
        return self.fm(inputs, self.embedding_layer(inputs))


def start(numbers, columns):
    features = FeatureMap("rows", ".")
    features.labels, features.default_emb_dim = ["label"], WIDTH
    features.features = OrderedDict()
    for name in columns:
        spec = {"type": "numeric"} if name.startswith("n") else {"type": "categorical", "vocab_size": 50, "padding_idx": 0}
        features.features[name] = {"source": "", **spec}
    features.num_fields = len(columns)
    features.set_column_index()
    torch.manual_seed(0)
    model = Machine(features)
    with torch.no_grad():
        logits = model({name: numbers[name] for name in columns})
    print(f"{len(columns)} fields ({columns[0]}, ...): logits {logits.mean():.2f} +- {logits.std():.2f}")
    return logits.std().item()


torch.manual_seed(0)
rows = {f"n{n}": torch.randn(ROWS) for n in range(NUMBERS)} | {f"c{n}": torch.randint(1, 50, (ROWS,)) for n in range(NUMBERS)}
print("fuxictr", version("fuxictr"), "torch", torch.__version__)
of_ids = start(rows, [name for name in rows if name.startswith("c")])
of_numbers = start(rows, [name for name in rows if name.startswith("n")])
as_described = of_ids < 0.1 and of_numbers > 3
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
