"""What the rest of a training depends on, saved while it runs and put back: of a run, or of a search."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.distributed import any_rank, world_size
from ctrlib.errors import WrongTypeError, check_type
from ctrlib.sharding.shards import State
from ctrlib.training.checkpoint import Checkpoints
from ctrlib.training.config import refuse_another
from ctrlib.training.progress import Progress, random_state, set_random_state
from ctrlib.training.state import copy_state, restore_state


class Batches(Sized, Protocol):
    """What the loop needs of a loader: a length, and a new epoch of batches at every iteration."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one epoch."""
        ...


class Resumable(Batches, Protocol):
    """What checkpoints need of a loader besides; `Loader` documents the meaning."""

    def state_dict(self, in_flight: int = 0) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # noqa: D102


class Engine(Protocol):
    """What `fit` needs of an engine; `ExactEngine` documents the meaning."""

    name: str
    model: nn.Module
    device: torch.device
    learning_rates: list[float]

    def train(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]: ...  # noqa: D102
    def state(self) -> State: ...  # noqa: D102
    def weights(self) -> dict[str, Tensor]: ...  # noqa: D102


class Terminated(SystemExit):
    """The run was told to end (SIGTERM), has saved a checkpoint, and ends with exit code 143 = 128 + 15."""

    def __init__(self) -> None:
        super().__init__(143)


class Keeper:
    """Saves all that the rest of a training depends on, and puts it back: of a run, or (`what`) of a search.

    That is the engine's state and `tensors` besides, its learning rates, the batches trained on, the random generators,
    and plain values of the caller's own. What is of another `identity` is refused. Within `with`, SIGTERM saves after
    the step in progress. Without checkpoints, the best weights are kept in memory.
    """

    def __init__(
        self,
        engine: Engine,
        train: Batches,
        checkpoints: Checkpoints | None,
        identity: dict[str, Any],
        console: Console,
        *,
        seconds: float = math.inf,
        what: str = "run",
        tensors: State | None = None,
    ) -> None:
        if checkpoints is not None and not hasattr(train, "load_state_dict"):
            raise WrongTypeError(
                f"checkpoints need a loader that can go on in mid-epoch: give a ctrlib.Loader, not {train!r}"
            )
        self._engine, self._loader, self._checkpoints = engine, cast(Resumable, train), checkpoints
        self._identity, self._console, self._seconds = identity, console, seconds
        self._what, self._tensors = what, tensors or {}
        self._best: State | None = None  # a copy, where no checkpoint has it
        self._given = 0  # batches handed to the engine since the start of this process ...
        self._taken = 0  # ... and trained on
        self._saved_at = time.monotonic()
        self._signals: set[int] = set()  # that came
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM] if self._checkpoints is not None else []
            # Ctrl-C reaches several processes in different steps: they agree on one.
            numbers += [signal.SIGINT] if world_size() > 1 else []
            for number in numbers:
                self._handlers[number] = signal.signal(number, lambda came, frame: self._signals.add(came))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if signal.SIGTERM in self._signals and kind is None:  # came when all was done
            signal.raise_signal(signal.SIGTERM)

    def count(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches: a pipeline takes some before it trains on them, and those must be loaded again."""
        for batch in batches:
            check_type("what gives Batches", Batch, train=batch)
            self._given += 1
            yield batch

    def load(self) -> dict[str, Any] | None:
        """The caller's own values, with all else put back; None if nothing was saved.

        Raises:
            ArgumentError: what was saved is of another run, and what differs is named.
        """
        if self._checkpoints is None:
            return None
        what = f"the checkpoints in {self._checkpoints.folder} are of another {self._what}"
        saved = self._checkpoints.load(
            self._state(), check=lambda saved: refuse_another(saved.get("identity", {}), self._identity, what)
        )
        if saved is not None:
            self._loader.load_state_dict(saved["loader"])
            self._engine.learning_rates = saved["learning_rates"]
            set_random_state(saved["random_state"], world_size())
        return saved

    def save(self, step: int, own: dict[str, Any], *, needs: str | None = None) -> str | None:
        """Save it after a step, with the caller's own values; the name of the checkpoint, if there are any."""
        if self._checkpoints is None:
            return None
        state = {
            "identity": self._identity,
            **own,
            "loader": self._loader.state_dict(in_flight=self._given - self._taken),
            "learning_rates": self._engine.learning_rates,
            "random_state": random_state(),
        }
        return self._checkpoints.save(step, self._state(), state, needs=needs)

    def _state(self) -> State:
        return {**self._engine.state(), **self._tensors}

    def progress(self) -> Progress:
        """Where the saved run stands, with everything put back; a new run if there is none."""
        if (saved := self.load()) is None:
            return Progress()
        progress = Progress.from_dict(saved["progress"])
        if saved["best"] and self._checkpoints is not None:  # it could not yet know its own name
            progress.best_checkpoint = self._checkpoints.last
        self._console.print(f"goes on after step {progress.step:,}, in epoch {len(progress.epochs) + 1}")
        return progress

    def save_if_due(self, progress: Progress) -> None:
        """After a step: save if it is time, or the process is to end."""
        self._taken += 1
        due = self._checkpoints is not None and time.monotonic() - self._saved_at >= self._seconds
        came = (number in self._signals for number in (signal.SIGTERM, signal.SIGINT))
        due, terminated, interrupted = any_rank(due, *came)
        if due or terminated:
            self._save(progress, best=False)
        if terminated:
            self._end()
        if interrupted:
            raise KeyboardInterrupt

    def save_epoch(self, progress: Progress, *, best: bool) -> None:
        """After an epoch."""
        if self._checkpoints is not None:
            self._save(progress, best=best)
            if any_rank(signal.SIGTERM in self._signals)[0]:
                self._end()
        elif best:
            self._best = copy_state(self._weights())

    def _save(self, progress: Progress, *, best: bool) -> None:
        needs = None if best else progress.best_checkpoint
        name = self.save(progress.step, {"best": best, "progress": progress.to_dict()}, needs=needs)
        if best:
            progress.best_checkpoint = name
        self._saved_at = time.monotonic()

    def _end(self) -> None:
        assert self._checkpoints is not None
        self._checkpoints.wait()
        self._console.print(
            f"told to end (SIGTERM): saved in {self._checkpoints.folder}; start the same command again to go on"
        )
        raise Terminated

    def restore_best(self, progress: Progress) -> None:
        """The best epoch's weights back into the model."""
        if self._checkpoints is not None and progress.best_checkpoint is not None:
            self._checkpoints.load(self._weights(), name=progress.best_checkpoint, prefix="model.")
        elif self._best is not None:
            restore_state(self._weights(), self._best)

    def _weights(self) -> State:
        return {name: tensor for name, tensor in self._engine.state().items() if name.startswith("model.")}
