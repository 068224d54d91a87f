#!/usr/bin/env bash
# torch-rechub 0.9.0: its DIN scores a user by how far the history was padded, too, in two ways.
#
# 1. `padding_idx` of a SequenceFeature with `shared_with` has no effect: the table is made by the feature that it is
#    shared with. Unless that one has padding_idx as well, row 0 is an ordinary vector, and each padded place is an event
#    that adds to the sum of attention.
# 2. With `use_softmax` attention is spread over padded places, whatever their vectors are: there is no mask.
#
# So the same row gets another probability where it was padded to another length, as in a server whose requests are
# padded to their own longest history.
#
# What to do: give padding_idx to the SparseFeature that owns the table, and leave use_softmax off (its default). Batch
# normalisation within attention, which cannot be turned off, still takes padded places into its statistics in training.
#
# Seen with torch-rechub 0.9.0, torch 2.13.0 (CPU build), Python 3.11: probability of one row with 0, 5 and 50 places of
# padding. Exits with 1 if the behaviour has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 torch-rechub==0.9.0
OMP_NUM_THREADS=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.basic.initializers import RandomNormal
from torch_rechub.models.ranking.din import DIN


def spread(owner_padding, use_softmax):
    torch.manual_seed(0)
    table = {"vocab_size": 20, "embed_dim": 8, "initializer": RandomNormal(0, 1)}  # as large as after training
    item = SparseFeature("item", padding_idx=owner_padding, **table)
    history = SequenceFeature("history", pooling="concat", shared_with="item", padding_idx=0, **table)
    user = SparseFeature("user", **table)
    attention = {"dims": [16], "use_softmax": use_softmax}
    model = DIN([user], [history], [item], mlp_params={"dims": [16]}, attention_mlp_params=attention).eval()
    found = []
    for padding in (0, 5, 50):
        row = {
            "user": torch.tensor([1]),
            "item": torch.tensor([7]),
            "history": torch.tensor([[3, 4, 5] + [0] * padding]),
        }
        found.append(model(row).item())
    where = "at its owner and history" if owner_padding == 0 else "at history only"
    print(f"padding_idx {where}, softmax {use_softmax}:", " ".join(f"{p:.4f}" for p in found))
    return max(found) - min(found)


print("torch-rechub", version("torch-rechub"), "torch", torch.__version__)
right = spread(0, False)
shared = spread(None, False)
softmax = spread(0, True)
as_described = right < 1e-5 and shared > 1e-3 and softmax > 1e-3
print("as described" if as_described else "CHANGED")
sys.exit(not as_described)
PYTHON
