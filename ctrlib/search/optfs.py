"""OptFS: which values of the features deserve to exist. F. Lyu et al., "Optimizing Feature Set for Click-Through Rate
Prediction", WWW 2023, https://arxiv.org/abs/2301.10909.

Every value v has a gate g_v, 1/2 at first, and e_f = m(x_f) E[x_f] with m(v) = s(tau g_v) / s(1/2), s the sigmoid: all
is as without gates at first, and as tau rises over the epochs m becomes a step at 0. The loss is log-loss plus
lambda sum_v s(tau g_v) over the whole vocabulary. Then the weights go back to those of an early epoch, or to a fresh
start, and are trained again with the values whose gate is above 0.

Log-loss does not move the gate of a value that the data lack, only lambda does, with a gradient of about 1e-8: that it
is pruned is the doing of a dense Adam with eps = 1e-8, under which the drift does not depend on lambda but through eps.
So gates are dense here, and lambda, learning rate and number of steps act together.

Where this differs from the paper and its code:

* A pruned value is gone from all tables, first-order weights and second sets of fields included.
* The ids of padding, missing and unseen values have no gate: something has to be there for what train did not know.
* All towers are gated and hardened (in the code IPNN's gates stay soft), all weights rewound (in the code not DCN's
  biases), and what is reported as kept is what the final model keeps.
* Rows start as in the paper (`start_rows`), whatever the model's own start is. A rewound retraining goes on from there,
  with the constant 1 / s(1/2) of an open gate multiplied into the rows; a fresh one (`rewind=None`) starts from the
  model's own weights.
* L2 is on tables, not on the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ctrlib.data.loader import Loader
from ctrlib.embeddings.table import table_name
from ctrlib.errors import ArgumentError
from ctrlib.losses import add_auxiliary
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS, PADDING_ID, Schema
from ctrlib.search.gates import (
    GatedTables,
    prune,
    put_gates,
    rows_by_vocabulary,
    start_rows,
    with_other_weights,
    with_own_tables,
    without_gates,
)
from ctrlib.search.plan import Plan
from ctrlib.search.stages import identity_of, search_epochs
from ctrlib.training.exact import ExactEngine

INIT = 0.5
OPENED = 1 / torch.sigmoid(torch.tensor(INIT)).item()  # m of a gate that has become a step


@dataclass(frozen=True)
class OptFS:
    """How to search; the paper's ranges in brackets.

    Raises:
        ValueError: a value is out of its range.
    """

    penalty: float = 1e-6
    """lambda, of each open gate [1e-9 to 1e-8, with millions of values]: for fewer values or steps, more."""
    temperature: float = 5000.0
    """tau in the last epoch [100 to 10,000]; it rises from 1 by the same factor after each."""
    epochs: int = 5
    """Of the search [5 to 20]."""
    rewind: int | None = 1
    """The epoch, from 0, at whose start the weights are kept that the retraining starts from [0 to 4]; None: it starts
    from the model's own."""
    learning_rate: float = 1e-3
    """Adam's, of weights and gates."""
    embedding_l2: float = 0.0
    """L2 on whole tables, not on gates."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("penalty", self.penalty, 0),
            ("temperature", self.temperature, 1),
            ("epochs", self.epochs, 2),
            ("rewind", self.rewind or 0, 0),
            ("learning_rate", self.learning_rate, 0),
            ("embedding_l2", self.embedding_l2, 0),
        ):
            if not value >= least:
                raise ArgumentError(f"OptFS: {name} must be {least} or more, got {value}")
        if self.rewind is not None and self.rewind >= self.epochs:
            raise ArgumentError(
                f"OptFS: rewind={self.rewind} must be one of the epochs 0 to {self.epochs - 1}, whose weights there are"
            )


class ValueGates(nn.Module):
    """m(v) = s(tau g_v) / s(1/2), g_v = 1/2 at first, so that m = 1 with tau = 1; the reserved ids' m is always 1.

    `hard`: m(v) = 1[g_v > 0] / s(1/2) instead, without gradient.

    Shape: name of a vocabulary -> (rows,).

    >>> gates = ValueGates({"item": 6})
    >>> gates("item").tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, rows: dict[str, int]) -> None:
        super().__init__()
        self.temperature, self.hard, self.rows = 1.0, False, rows
        self.logits = nn.ParameterDict(
            {table_name(name): torch.full((count - NUM_RESERVED_IDS,), INIT) for name, count in rows.items()}
        )

    def forward(self, vocabulary: str) -> Tensor:
        """The gates of a vocabulary."""
        logits = self.logits[table_name(vocabulary)]
        opened = self.is_open(vocabulary).float() if self.hard else torch.sigmoid(self.temperature * logits)
        return torch.cat([logits.new_ones(NUM_RESERVED_IDS), opened / torch.sigmoid(torch.tensor(INIT))])

    def is_open(self, vocabulary: str) -> Tensor:
        """Of each value, but for the reserved ids: g_v > 0."""
        logits: Tensor = self.logits[table_name(vocabulary)]
        return logits.detach() > 0

    def total(self) -> Tensor:
        """sum_v s(tau g_v)."""
        return torch.stack([torch.sigmoid(self.temperature * logits).sum() for logits in self.logits.values()]).sum()


def temperature_at(epoch: int, settings: OptFS) -> float:
    """tau of an epoch, counted from 0: gamma^(epoch / (T - 1)).

    >>> [round(temperature_at(epoch, OptFS(temperature=200, epochs=15)), 4) for epoch in (0, 1, 2, 14)]
    [1.0, 1.46, 2.1317, 200.0]
    """
    return float(settings.temperature ** (epoch / (settings.epochs - 1)))


def search(
    model: Model,
    train: Loader,
    valid: Loader,
    *,
    settings: OptFS | None = None,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """The values to keep, with the weights to retrain from; what is pruned reads the zero vector.

    Args:
        model: freshly built, any tower; it is not changed.
        train: data of the search.
        valid: not used: lambda and the schedule decide.
        settings: the method's.
        seed: of the rows that the search starts from, and of dropout.
        out: folder where the search is kept after every epoch; started again there, it goes on.
        console: gets a line an epoch.

    Raises:
        NotImplementedError: there are several processes.
        ValueError: the model has no tables, or `out` holds another search.
    """
    settings, console = settings or OptFS(), console or Console(stderr=True)
    identity = identity_of(model, train, settings, seed)
    torch.manual_seed(seed)
    searched, gates = gated(model, train.schema, settings)
    first = next(part for part in searched.modules() if isinstance(part, GatedTables))
    start_rows(first.tables.parameters())
    rewound = {name: tensor.clone() for name, tensor in searched.state_dict().items() if ".gates." not in name}
    engine = ExactEngine(
        searched, learning_rate=settings.learning_rate, embedding_l2=settings.embedding_l2, max_grad_norm=None
    )
    if (reach := settings.learning_rate * settings.epochs * len(train)) < INIT:
        console.print(
            f"warning: gates begin at {INIT} and Adam moves them by {reach:.2f} at most in {settings.epochs} epochs of "
            f"{len(train)} steps, so that none will close: raise learning_rate or epochs, or take smaller batches"
        )

    def before(epoch: int) -> None:
        gates.temperature = temperature_at(epoch, settings)
        if epoch == settings.rewind:
            now = searched.state_dict()
            for name, tensor in rewound.items():
                tensor.copy_(now[name])

    def after(epoch: int) -> bool:
        num_open = sum(int((logits > 0).sum()) for logits in gates.logits.values())
        num_all = sum(len(logits) for logits in gates.logits.values())
        console.print(f"  temperature {gates.temperature:.1f}: {num_open:,} of {num_all:,} gates open", highlight=False)
        return False

    search_epochs(
        engine,
        train,
        settings.epochs,
        before=before,
        after=after,
        tensors=rewound,
        out=out,
        identity=identity,
        console=console,
    )
    if settings.rewind is None:
        return plan_of(model, gates, train.schema, factor=1.0)
    searched.load_state_dict(rewound, strict=False)
    return with_other_weights(plan_of(searched, gates, train.schema), without_gates(searched))


def gated(model: Model, schema: Schema, settings: OptFS) -> tuple[Model, ValueGates]:
    """A copy of the model that looks its tables up through gates, and adds lambda times their sum to the loss."""
    searched, collections, vocabularies = with_own_tables(model, schema)
    gates = ValueGates(rows_by_vocabulary(collections.values(), vocabularies))
    put_gates(searched, collections, gates, vocabularies)

    def penalise(module: nn.Module, *_: Any) -> None:
        if module.training:
            add_auxiliary(settings.penalty * gates.total())

    searched.register_forward_hook(penalise)
    return searched, gates


def plan_of(model: Model, gates: ValueGates, schema: Schema, *, factor: float = OPENED) -> Plan:
    """The gates as they are now, hardened, and the model's rows, times that factor."""
    reserved = torch.ones(NUM_RESERVED_IDS, dtype=torch.bool)
    kept = {name: torch.cat([reserved, gates.is_open(name)]) for name in gates.rows}
    return prune(without_gates(model), schema, kept, method="optfs", dropped_to=PADDING_ID, factor=factor)
