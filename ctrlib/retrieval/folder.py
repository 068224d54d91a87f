"""A folder of `ctrlib retrieve train`: all that lists are made from, readable where nothing else is.

It holds retrieval.json (the method with its settings, how it was selected, what it reached), method.safetensors (what
it has learnt), pairs.safetensors (the pairs of training, so that they can be left out), users.parquet and items.parquet
(the ids in the order of their numbers), MANIFEST with checksums of these, and README.md, a card for people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrlib.data.scan import DataError
from ctrlib.errors import CtrlibError
from ctrlib.making import new_folder, settle
from ctrlib.manifest import CARD, check_file, refuse_pickle, write_manifest
from ctrlib.retrieval.card import retrieval_card
from ctrlib.retrieval.interactions import Interactions
from ctrlib.retrieval.methods import Retriever, csr_of, csr_state
from ctrlib.retrieval.table import build
from ctrlib.schema import SchemaError

FORMAT = 1


@dataclass(frozen=True)
class Trained:
    """A method that has been fitted, its pairs, and what is said of it."""

    method: Retriever
    log: Interactions
    config: dict[str, Any]
    record: dict[str, Any]


def save(trained: Trained, out: str | Path) -> None:
    """Write the folder; what was there is the old one or the new one, whenever this is stopped."""
    with new_folder(out) as making:
        said = {"format": FORMAT, "config": trained.config, "record": trained.record, "counts": trained.log.counts}
        (making / "retrieval.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        state = {name: tensor.contiguous() for name, tensor in trained.method.state().items()}
        save_file(state, making / "method.safetensors")
        save_file(csr_state("pairs", trained.log.matrix), making / "pairs.safetensors")
        trained.log.users.to_frame("user").write_parquet(making / "users.parquet")
        trained.log.items.to_frame("item").write_parquet(making / "items.parquet")
        text = retrieval_card(trained.config, trained.record, trained.log.counts)
        (making / CARD).write_text(text, encoding="utf-8")
        write_manifest(making, "retrieval")


def load(folder: str | Path) -> Trained:
    """Read the folder.

    Raises:
        DataError: it is none, or of another version.
        SchemaError: a file is damaged.
    """
    folder = Path(folder)
    check_retrieval(folder)
    for name in ("retrieval.json", "method.safetensors", "pairs.safetensors", "users.parquet", "items.parquet"):
        check_file(folder, name)
    try:
        said = dict(json.loads((folder / "retrieval.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise SchemaError(f"{folder / 'retrieval.json'} is damaged ({error}): copy the folder again") from error
    if said.get("format") != FORMAT:
        raise DataError(f"{folder} is of format {said.get('format')}, this version reads {FORMAT}: train it again")
    pairs = csr_of("pairs", _tensors(folder / "pairs.safetensors"))
    users, items = (pl.read_parquet(folder / f"{what}s.parquet")[what] for what in ("user", "item"))
    log = Interactions(pairs.astype("float32"), users, items, said["counts"])
    method = build(said["config"])
    prepare = getattr(method, "prepare", None)
    if prepare is not None:
        prepare(log)
    return Trained(method.load(_tensors(folder / "method.safetensors")), log, said["config"], said["record"])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        refuse_pickle(path)
        raise SchemaError(f"{path} is damaged ({error}): copy the folder again, or train it again") from error


def check_retrieval(folder: str | Path) -> None:
    """Refuse what is no such folder.

    Raises:
        DataError: as said.
    """
    folder = Path(folder)
    settle(folder)
    if not (folder / "retrieval.json").is_file():
        what = "has no retrieval.json" if folder.is_dir() else "does not exist" if not folder.exists() else "is a file"
        raise DataError(f"{folder} {what}: expected the folder that `ctrlib retrieve train LOG --out FOLDER` writes")


__all__ = ["CtrlibError", "Trained", "check_retrieval", "load", "save"]
