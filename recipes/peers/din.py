"""What the peers' DINs that `recipes/histories.py` runs share: rows as ctrlib prepared them, and how a run is told.

It runs in a peer's own environment, so it needs nothing but NumPy and torch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Rows = dict[str, torch.Tensor]


class Data:
    """A folder that `recipes/histories.py` wrote: settings.json, and NAME.npz of each split.

    `features` are, in the schema's order, {"name", "kind": "id", "bag" or "history", "table", "rows", "length"}: ids
    are numbers from 0 on, and 0 fills bags and histories up to their length. `l2` is that of l2 / 2 |table|^2.
    """

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "settings.json").read_text())
        self.features: list[dict[str, Any]] = settings["features"]
        self.seed, self.l2, self.batch_size = settings["seed"], settings["l2"], settings["batch_size"]
        self.embedding_dim, self.hidden = settings["embedding_dim"], settings["hidden"]
        self.dropout, self.attention_hidden = settings["dropout"], settings["attention_hidden"]
        self.splits: dict[str, Rows] = {}
        for split in ("train", "valid", "test"):
            with np.load(folder / f"{split}.npz") as arrays:
                self.splits[split] = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        torch.manual_seed(self.seed)

    def pairs(self) -> list[tuple[str, str]]:
        """Each history with the id that shares its table."""
        ids = {feature["table"]: feature["name"] for feature in self.features if feature["kind"] == "id"}
        return [(ids[feature["table"]], feature["name"]) for feature in self.features if feature["kind"] == "history"]


class Batches:
    """The rows of a split in batches; those of train in a new order each time."""

    def __init__(self, data: Data, split: str, of: Callable[[Rows], Any] = lambda rows: rows) -> None:
        self.rows, self.of, self.shuffled = data.splits[split], of, split == "train"
        self.size = data.batch_size if self.shuffled else 8192

    def __len__(self) -> int:
        return -(-len(self.rows["label"]) // self.size)

    def __iter__(self) -> Iterator[Any]:
        total = len(self.rows["label"])
        order = torch.randperm(total) if self.shuffled else torch.arange(total)
        for some in torch.split(order, self.size):
            yield self.of({name: column[some] for name, column in self.rows.items()})


def tell(distribution: str, run: Callable[[Data], dict[str, Any]]) -> None:
    """Run, and write what it found to result.json: validation's and test's AUC, epochs, parameters."""
    folder = Path(sys.argv[1])
    started = time.perf_counter()
    found = run(Data(folder))
    found |= {"seconds": time.perf_counter() - started, "note": f"{distribution} {version(distribution)}"}
    (folder / "result.json").write_text(json.dumps(found))
