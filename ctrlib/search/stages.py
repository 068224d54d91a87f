"""The epochs of a search, which goes on where a killed one stood.

`fit` trains until validation stops rising; a search trains for as many epochs as its schedule has, and does something
of its own between them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ctrlib.batch import Batch
from ctrlib.data.loader import Loader
from ctrlib.distributed import world_size
from ctrlib.errors import UnsupportedError
from ctrlib.model import Model
from ctrlib.models.build import plain
from ctrlib.sharding.shards import State
from ctrlib.structure import attributes
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.keeper import Engine, Keeper
from ctrlib.training.loop import train_epoch
from ctrlib.training.progress import Progress


def search_epochs(
    engine: Engine,
    train: Loader,
    num_epochs: int,
    *,
    before: Callable[[int], None] = lambda epoch: None,
    after: Callable[[int], bool] = lambda epoch: False,
    tensors: dict[str, Tensor] | None = None,
    memory: dict[str, Any] | None = None,
    out: Path | None = None,
    identity: dict[str, Any] | None = None,
    console: Console | None = None,
) -> None:
    """Train for `num_epochs` over the loader's epochs from its first one on.

    With `out`, everything that the rest depends on is saved after every epoch, and a search that is started again there
    goes on from the last one, with the same bits.

    Args:
        engine: trains a batch at a time, and has all of its state in `state()`.
        train: its epochs from 0 on, wherever it stands.
        num_epochs: at most.
        before: called before each epoch with its number, from 0.
        after: called after it; True ends the search.
        tensors: the method's own, by name, saved and put back in place: a copy of weights, say.
        memory: the method's own plain values, as JSON holds them, likewise.
        out: folder for checkpoints.
        identity: of the search (`identity_of`); the checkpoints of one with another are refused.
        console: gets a line an epoch.

    Raises:
        NotImplementedError: there are several processes.
        NonFiniteLossError: a loss is NaN or infinite.
        ValueError: the checkpoints in `out` are of another search.
    """
    refuse_several_processes()
    console, memory = console or Console(stderr=True), {} if memory is None else memory
    state: State = {f"search.{name}": tensor for name, tensor in (tensors or {}).items()}
    checkpoints = None if out is None else Checkpoints(out, log=console.print)
    keeper = Keeper(engine, train, checkpoints, identity or {}, console, what="search", tensors=state)
    first, over = 0, False
    train.set_epoch(0)
    if (saved := keeper.load()) is not None:
        first, over = saved["epoch"], saved["over"]
        memory.clear()
        memory.update(saved["memory"])
        console.print(f"the search goes on after epoch {first}")
    for epoch in range(first, num_epochs):
        if over:
            break
        before(epoch)
        progress = Progress()
        train_epoch(engine, train, progress, keeper, f"search, epoch {epoch + 1}", console)
        console.print(
            f"search epoch {epoch + 1:2d}  loss {progress.train_loss:.5f}  {progress.seconds:.1f} s", highlight=False
        )
        over = after(epoch)
        keeper.save(epoch + 1, {"epoch": epoch + 1, "over": over, "memory": memory})


def refuse_several_processes() -> None:
    """Raise NotImplementedError if there are several."""
    if world_size() > 1:
        raise UnsupportedError(f"searches run in one process, and {world_size()} were started: start one")


def without_end(loader: Loader) -> Iterator[Batch]:
    """The batches of the loader's first epoch, over and over: validation, for the steps of a bilevel search."""
    while True:
        loader.set_epoch(0)
        yield from loader


def identity_of(model: Model, train: Loader, settings: Any, seed: int) -> dict[str, Any]:
    """What makes it this search: its settings, seed and data, and the model with its weights.

    `settings` is a dataclass. The model is told by the class and the plain attributes of each of its modules, since a
    search takes any model, one that no config describes too; its weights by their sha256.
    """
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return plain(
        {
            "settings": {type(settings).__name__: dataclasses.asdict(settings)},
            "seed": seed,
            "data": train.schema.hash,
            "rows": train.data_hash,
            "batch_size": train.batch_size,
            "model": attributes(model),
            "weights": weights.hexdigest(),
        }
    )
