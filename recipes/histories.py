"""Click histories: mean pooling, DIN, BST and SIM under one MLP, on Amazon Grocery, MovieLens-1M and planted interests.

    python recipes/histories.py --data-set amazon_grocery --model din --seed 1 [--raw DIR] [--engine fused] [--record]
    python recipes/histories.py --data-set movielens_1m_histories --model din --average

A row's history holds only what the user did strictly before it; how the rows are split by time, say the docstrings of
datasets/amazon_grocery.py and datasets/movielens_1m.py (protocol `histories`). There is no published number for either;
`mean` is the floor that knows no target. `planted_interests` (`ctrlib.data.synthetic.interests`) is where attention to
the target must win: 60,000 rows, 8:1:1, with histories of 30 events, whose best possible AUC is known.

Width 16, MLP 200-80 with batch normalisation and dropout .2, Adam 1e-3.

    python recipes/histories.py --data-set planted_interests --peer fuxictr --peer-python PYTHON --peer-source DIR

trains the DIN of another library on the very same rows, with the same network as far as it has it, by its own loop:
`recipes/peers/` says what differs.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.data.synthetic import interests
from ctrlib.distributed import rank
from ctrlib.schema import Categorical, MultiValued, Sequence, SparseFeature, vocabulary_of
from ctrlib.training.loop import to_json
from harness import RecipeKnobs, prepared, run_recipe
from records import AVERAGED, record

MODEL = {"model": "mlp", "embedding_dim": 16, "hidden": (200, 80), "batch_norm": True, "dropout": 0.2}

# Everything in which the variants differ: how histories become fields.
VARIANTS: dict[str, dict[str, Any]] = {
    "mean": {"sequence": "mean"},
    "din": {"sequence": "din"},
    "din_softmax": {"sequence": "din_softmax"},
    "bst": {"sequence": "bst"},
    "sim": {"sequence": "sim"},
}

# The data-set script with its arguments (planted rows need none), and L2 on the tables: 1e-3 was the best of 1e-5, 1e-4
# and 1e-3 on Amazon's validation rows with din. An average of the weights bears more: of 1e-3, 3e-3, 1e-2 and 3e-2, the
# third was best on MovieLens' validation rows (din, seed 1: .8267, .8343, .8368, .8351; without it, 3e-3: .8287).
DATA: dict[str, dict[str, Any]] = {
    "amazon_grocery": {"script": ["amazon_grocery.py"], "embedding_l2": 1e-3},
    "movielens_1m_histories": {
        **{"script": ["movielens_1m.py", "--protocol", "histories"], "embedding_l2": 1e-3},
        "averaged_l2": 1e-2,
    },
    "planted_interests": {"script": [], "embedding_l2": 1e-5},
}


@dataclass(frozen=True)
class Knobs(RecipeKnobs):
    """Train one model on histories and report its test AUC once."""

    data_set: Literal[tuple(DATA)] = "amazon_grocery"  # type: ignore[valid-type]
    """Which data."""
    model: Literal[tuple(VARIANTS)] = "din"  # type: ignore[valid-type]
    """Which variant."""
    seed: int = 1
    """Of initial weights, shuffle and dropout."""
    average: bool = False
    """Score and keep a moving average of the weights (`average_weights`), with L2 of its own; it is in the name."""
    peer: Literal["fuxictr", "rechub"] | None = None
    """Train this library's DIN instead."""
    peer_python: Path | None = None
    """Python of an environment with it."""
    peer_source: Path | None = None
    """Checkout of FuxiCTR."""


def main(knobs: Knobs) -> None:
    """Prepare if needed, train, report."""
    data = DATA[knobs.data_set]
    if knobs.average and (knobs.peer or "averaged_l2" not in data):
        tuned = ", ".join(name for name, each in DATA.items() if "averaged_l2" in each)
        raise SystemExit(f"--average is for ctrlib's models, on data with L2 tuned for it: {tuned}")
    if not data["script"]:
        knobs = dataclasses.replace(knobs, data=prepare_planted(knobs))
    if knobs.peer:
        run_peer(knobs, prepared(knobs, __file__, knobs.data_set, data["script"]), data["embedding_l2"])
        return
    run_recipe(
        knobs,
        recipe=__file__,
        data=knobs.data_set,
        script=data["script"],
        model=knobs.model + AVERAGED * knobs.average,
        config={**MODEL, **VARIANTS[knobs.model]},
        batch_size=1024,
        learning_rate=1e-3,
        embedding_l2=data["averaged_l2" if knobs.average else "embedding_l2"],
        average_weights=knobs.average,
    )


def run_peer(knobs: Knobs, folder: Path, l2: float) -> None:
    """The DIN of another library on the rows of a prepared folder: a line of JSON, and a row of results.csv."""
    if knobs.peer_python is None or (knobs.peer == "fuxictr") != (knobs.peer_source is not None):
        raise SystemExit("--peer needs --peer-python, and fuxictr, and only that, --peer-source")
    schema = ctr.Schema.load(folder)
    if schema.dense:
        raise SystemExit(f"{folder} has numbers, of which the peers' DINs are not told")
    settings = {
        "features": [described(feature) for feature in schema.sparse],
        **{"seed": knobs.seed, "l2": l2, "batch_size": 1024},
        **{name: MODEL[name] for name in ("embedding_dim", "hidden", "dropout")},
        "attention_hidden": [64],
    }
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "settings.json").write_text(json.dumps(settings))
        for split in ("train", "valid", "test"):
            np.savez(work / f"{split}.npz", allow_pickle=False, **arrays_of(folder, split))
        program = Path(__file__).parent / "peers" / f"{knobs.peer}_din.py"
        source = [] if knobs.peer_source is None else [str(knobs.peer_source)]
        with (work / "log.txt").open("w") as log:
            command = [str(knobs.peer_python), str(program), str(work), *source]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"{program} failed; the end of what it said:\n{(work / 'log.txt').read_text()[-2000:]}")
        found = json.loads((work / "result.json").read_text())
    print(to_json({"data": knobs.data_set, "model": f"din of {knobs.peer}", "seed": knobs.seed, **found}))
    if knobs.record:
        row = {"engine": "exact", "precision": "fp32", "seed": knobs.seed, "data_hash": schema.hash, **found}
        record(row, Path(__file__).parent / "results.csv", data=knobs.data_set, model=f"din of {knobs.peer}")


def described(feature: SparseFeature) -> dict[str, Any]:
    """A feature as `peers/din.py` takes it."""
    kind = "id" if isinstance(feature, Categorical) else "bag" if isinstance(feature, MultiValued) else "history"
    length = {"length": feature.max_length} if isinstance(feature, MultiValued | Sequence) else {}
    table = {"table": vocabulary_of(feature), "rows": feature.num_embeddings}
    return {"name": feature.name, "kind": kind, **table, **length}


def arrays_of(folder: Path, split: str) -> dict[str, Any]:
    """Label and ids of a split, bags and histories filled up with 0: (B,) or (B, length)."""
    loader = ctr.Loader(folder, split, batch_size=8192)
    batches = list(loader)
    found = {"label": torch.cat([batch.labels[:, 0] for batch in batches]).numpy()}
    for feature in loader.schema.sparse:
        ids = [batch.sparse[feature.name] for batch in batches]
        if isinstance(feature, MultiValued | Sequence):
            found[feature.name] = torch.cat([one.to_padded_dense(feature.max_length) for one in ids]).long().numpy()
        else:
            found[feature.name] = torch.cat([one.values() for one in ids]).numpy()
    return found


def prepare_planted(knobs: Knobs) -> Path:
    """The folder of the planted rows, made first if it is not there."""
    if knobs.raw is not None:
        raise SystemExit("planted_interests are made up, there are no raw files: leave --raw out")
    folder = knobs.data or Path(__file__).parent.parent / "data" / knobs.data_set
    if rank() == 0 and not folder.exists():
        frame, logits = interests(60_000)
        best = ctr.metrics.auc(frame["label"], logits)
        features = [ctr.Categorical("item", vocabulary="item"), ctr.Sequence("history", vocabulary="item")]
        note = f"synthetic: the best possible AUC is {best:.4f}"
        ctr.prepare(frame, folder, features=features, labels="label", note=note)
    return folder


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
