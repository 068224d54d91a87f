"""How far a training run is: all that a killed run needs, beside its tensors, to go on as if nothing had happened."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from ctrlib.batch import Batch
from ctrlib.distributed import gather, rank


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve. Losses in nats, times in seconds."""

    epoch: int
    train_loss: float
    valid_auc: float
    valid_log_loss: float
    learning_rate: float
    seconds: float
    samples_per_second: float
    valid_gauc: float | None = None  # where the epoch is chosen by it


@dataclass
class Progress:
    """Where the schedule stands: the epochs that are over, and the sums of the one that is being trained."""

    step: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = float("-inf")  # of what the epoch is chosen by, the higher the better
    best_checkpoint: str | None = None  # which holds the best weights
    stale: int = 0  # epochs since the best one
    batches: int = 0  # of the epoch at work, as the next four
    rows: int = 0
    weight: float = 0.0  # of the rows whose label is known
    loss_sum: float = 0.0  # of the rows, each by its weight
    seconds: float = 0.0
    total_rows: int = 0
    total_seconds: float = 0.0
    # Of everything, in this process and in the ones before it that were killed, up to their last checkpoint.
    all_seconds: float = field(default=0.0, compare=False)
    _looked: float = field(default_factory=time.perf_counter, compare=False)

    def add(self, loss: float, rows: int, weight: float) -> None:
        """A step on so many rows, of which those with a label weigh so much together."""
        self.step += 1
        self.batches += 1
        self.rows += rows
        self.weight += weight
        # A batch in which nothing has weight has no loss.
        self.loss_sum += loss * weight if weight else 0.0

    @property
    def train_loss(self) -> float:
        """Mean loss of the epoch at work, in which every row counts by its weight; NaN before its first row."""
        return self.loss_sum / self.weight if self.weight else float("nan")

    def look_at_the_clock(self) -> float:
        """`all_seconds`, up to now."""
        now = time.perf_counter()
        self.all_seconds += now - self._looked
        self._looked = now
        return self.all_seconds

    def end_epoch(self, line: Epoch, score: float, better: bool) -> None:
        """The epoch at work is over, and validated."""
        self.epochs.append(line)
        self.total_rows += self.rows
        self.total_seconds += self.seconds
        self.batches, self.rows, self.weight, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0, 0.0
        if better:
            self.best_epoch, self.best_score, self.stale = line.epoch, score, 0
        else:
            self.stale += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        self.look_at_the_clock()
        plain = dataclasses.asdict(self)
        del plain["_looked"]  # a clock of this process
        return plain

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Progress:
        """What `to_dict` gave.

        >>> progress = Progress(step=3, epochs=[Epoch(1, 0.5, 0.7, 0.4, 1e-3, 2.0, 100.0)])
        >>> Progress.from_dict(progress.to_dict()) == progress
        True
        """
        return cls(**{**content, "epochs": [Epoch(**line) for line in content["epochs"]]})


def known_weight(batch: Batch) -> float:
    """The weight of a batch's rows whose label is known, of several labels their mean: how much its loss counts."""
    known = ~torch.isnan(batch.labels)
    return float((batch.weights.double().unsqueeze(1) * known).sum()) / known.shape[1]


def random_state() -> list[dict[str, str]]:
    """The state of torch's generators on every rank (dropout draws from them). Every process must call it."""
    own = {"cpu": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        own["cuda"] = _text(torch.cuda.get_rng_state())
    return gather(own)


def set_random_state(states: list[dict[str, str]], world_size: int) -> None:
    """Put back what `random_state` gave.

    With another number of processes the draws cannot be the same: each process then starts generators of its own, at a
    point that depends on the saved state alone.
    """
    if len(states) != world_size:
        digest = hashlib.sha256(f"{states[0]['cpu']} {rank()} of {world_size}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return
    own = states[rank()]
    torch.set_rng_state(_tensor(own["cpu"]))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(own["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
