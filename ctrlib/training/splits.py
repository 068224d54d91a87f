"""The splits of a prepared folder as a run reads them: each process its share."""

from __future__ import annotations

from pathlib import Path

from ctrlib.data.loader import Loader
from ctrlib.distributed import rank, world_size
from ctrlib.manifest import check_folder
from ctrlib.schema import Schema
from ctrlib.training.config import Training


def load_splits(data: str | Path, how: Training) -> tuple[Loader, Loader, Loader]:
    """This process's share of train, shuffled, and of valid and test, of a prepared folder that is looked through.

    Raises:
        SchemaError: a file is damaged.
        DataError: train or valid has one class of a label only, or no row with weight.
    """
    train, valid = load_train_and_valid(data, how)
    return train, valid, load_to_score(data, "test", how, train.schema)


def load_train_and_valid(data: str | Path, how: Training) -> tuple[Loader, Loader]:
    """As `load_splits`, where test is not to be looked at, or there is none."""
    check_folder(data)  # all that is read after the training, too
    train = Loader(
        data,
        "train",
        batch_size=how.batch_size // world_size(),
        shuffle=True,
        seed=how.seed,
        keep_negatives=how.keep_negatives,
        rank=rank(),
        world_size=world_size(),
        workers=how.workers,
    )
    valid = load_to_score(data, "valid", how, train.schema)
    for loader in (train, valid):
        loader.check_classes()
    return train, valid


def load_to_score(data: str | Path, split: str, how: Training, schema: Schema) -> Loader:
    """This process's share of a split, in its order, with the groups of its rows if there are any."""
    return Loader(
        data,
        split,
        batch_size=2 * (how.batch_size // world_size()),  # no gradients: larger batches, so fewer calls
        rank=rank(),
        world_size=world_size(),
        workers=how.workers,
        with_group=schema.group is not None,
    )
