"""Flags that several commands take, in the groups in which --help shows them.

What stands below a field is its help: on one line, since tyro keeps the line breaks of longer ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ctrlib._lazy import closest, instead
from ctrlib.cli.kinds import (
    ModelName,
    OptionalBool,
    OptionalFloat,
    OptionalInt,
    OptionalInts,
    OptionalNumeric,
    Settings,
    Switch,
)
from ctrlib.errors import ArgumentError, check_number, check_whole
from ctrlib.models.build import for_engine
from ctrlib.models.table import MODELS
from ctrlib.schema import BINNED, SequenceFields

# Flag of `ModelFlags` -> argument of a model, for those that only some models have.
ARGUMENT_OF = {
    "dim": "embedding_dim",
    "hidden": "hidden",
    "cross_layers": "num_cross_layers",
    "dropout": "dropout",
    "batch_norm": "batch_norm",
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """What every command takes."""

    json: Switch = False
    """Print the answer as one JSON object, and nothing else, to stdout."""
    debug: Switch = False
    """Show where in the program an error comes from, with the error."""
    given: ClassVar[frozenset[str]] = frozenset()  # flags that were said, such as --dim; set by `usage.parse`


@dataclass(frozen=True)
class ModelFlags:
    """Which model. What is not said, `train` chooses by the data, and a search takes as `ctrlib models NAME` has it."""

    model: ModelName = "dcnv2"
    """Name of a published model, such as dcnv2, deepfm, din or mmoe; `ctrlib models` lists all."""
    dim: OptionalInt = None
    """Width of the embeddings, in numbers per field. The fused engine wants a multiple of 4."""
    hidden: OptionalInts = None
    """Widths of the hidden layers of the MLP, in units."""
    cross_layers: OptionalInt = None
    """Number of cross layers of dcn, dcnv2, dcnv2_mix and gdcn."""
    dropout: OptionalFloat = None
    """Share of the units of each hidden layer that a training step drops."""
    batch_norm: OptionalBool = None
    """Whether the MLP has batch normalisation."""
    numeric: OptionalNumeric = None
    """How numbers become fields: vector is value times vector; the next two use quantiles of the training rows."""
    bins: OptionalInt = None
    """Quantile bins per number, for bucketised and piecewise_linear; otherwise 64."""
    sequence: SequenceFields = "pooled"
    """How histories become fields: as their mean (pooled), or compared with the features that share their ids."""
    option: Settings = ()
    """Other arguments of the model, with values in JSON: num_heads=5 hidden_1=[400,400]"""

    def config(self, engine: str = "exact") -> dict[str, Any]:
        """What the flags say of what `models.build` needs to make this model, but for what `fitted` adds.

        Raises:
            ValueError: the model has no such argument, or something is said twice.
        """
        takes = ["embedding_dim", *MODELS[self.model].arguments]
        # What is not asked for is the model's to say: its defaults are the paper's.
        changed = {name: getattr(self, name) for name in ARGUMENT_OF if getattr(self, name) is not None}
        if idle := [self._idle(name, ARGUMENT_OF[name], takes) for name in changed if ARGUMENT_OF[name] not in takes]:
            raise ArgumentError("\n".join(idle))
        config: dict[str, Any] = {"model": self.model, **{ARGUMENT_OF[name]: value for name, value in changed.items()}}
        config |= {} if self.numeric is None else {"numeric": self.numeric}
        config["sequence"] = self.sequence
        if self.bins is not None:
            if self.numeric not in (None, *BINNED):
                raise ArgumentError(f"--bins {self.bins}: there are no bins in --numeric {self.numeric}")
            check_whole(1, bins=self.bins)
        for name, value in (("dim", self.dim), ("cross_layers", self.cross_layers)):
            if value is not None:
                check_whole(1, **{name: value})
        for width in self.hidden or ():
            check_whole(1, hidden=width)
        if self.dropout is not None:
            check_number(0, below=1, dropout=self.dropout)
        config = for_engine(config, engine)
        said = {**config, "edges": "quantiles of the training rows"} if self.numeric in BINNED else config
        for name, value in map(parse_option, self.option):
            if name in said:
                raise ArgumentError(
                    f"--option {name}: that is said already, by a flag or for the engine, as {said[name]!r}"
                )
            config[name] = value
        return config

    def fitted(self, data: Path, engine: str = "exact", chosen: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`config` with the edges of bins, which are quantiles of the training rows of a prepared folder.

        Args:
            data: the folder.
            engine: that will train it.
            chosen: what holds where the flags say nothing, as far as the model takes it.

        Raises:
            ValueError: as `config`; or there are --bins and no number, or nothing that has bins.
        """
        config = self.config(engine)
        of_numbers = ["numeric", "edges", "sigma"] if self.numeric is None and self.bins is None else []
        takes = ["embedding_dim", "numeric", "tables", *of_numbers, *MODELS[self.model].arguments]
        config = {name: value for name, value in (chosen or {}).items() if name in takes} | config
        numeric = config.get("numeric", "vector")
        if self.bins is not None and numeric not in BINNED:
            raise ArgumentError(f"--bins {self.bins}: there are no bins in --numeric {numeric}")
        from ctrlib.training.defaults import with_edges

        return with_edges(config, data, self.bins)

    def _idle(self, flag: str, argument: str, takes: list[str]) -> str:
        """What to say of a flag that the model has no argument for."""
        value = json.dumps(getattr(self, flag), separators=(",", ":"))
        similar = [name for name in closest(argument, takes, number=len(takes)) if argument in name]
        remedy = f"say --option {similar[0]}={value}" if similar else "leave it out, or choose another --model"
        return f"--{flag.replace('_', '-')}: {self.model} has no {argument}; {instead([argument], takes)}: {remedy}"


def parse_option(text: str) -> tuple[str, Any]:
    """One NAME=VALUE of --option or --setting.

    Raises:
        ValueError: there is no "=", or the value is not JSON.

    >>> parse_option("hidden_1=[400, 400]")
    ('hidden_1', [400, 400])
    """
    name, _, value = text.partition("=")
    try:
        return name.strip().replace("-", "_"), json.loads(value)
    except ValueError:
        raise ArgumentError(
            f"--option {text}: expected NAME=VALUE with a JSON value, such as num_heads=5, zero_context=true or "
            "hidden_1=[400,400]"
        ) from None


@dataclass(frozen=True)
class TrainingFlags:
    """How it is trained: Adam, until validation AUC has stopped rising."""

    learning_rate: OptionalFloat = None
    """Adam's step, per update of a weight."""
    l2: OptionalFloat = None
    """Penalty on whole tables and what makes fields of numbers: l2 / 2 per squared weight (exact engine)."""
    batch_size: OptionalInt = None
    """Rows per step."""
    epochs: OptionalInt = None
    """Passes over train at most."""
    patience: OptionalInt = None
    """Passes without a better validation score before training stops."""
    seed: int = 0
    """Number that initial weights, the order of rows, dropout and searches are drawn from."""

    def check(self) -> None:
        """Refuse numbers with which nothing could be trained.

        Raises:
            ArgumentError: as said.
        """
        whole = {"max_epochs": self.epochs, "patience": self.patience, "batch_size": self.batch_size}
        check_whole(1, **{name: value for name, value in whole.items() if value is not None})
        check_whole(0, seed=self.seed)
        if self.learning_rate is not None:
            check_number(0, learning_rate=self.learning_rate)
        if self.l2 is not None:
            check_number(0, embedding_l2=self.l2)


@dataclass(frozen=True)
class ScoringFlags:
    """How rows are scored."""

    batch_size: int = 8192
    """Rows per step."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What to do about damaged rows of a raw file: stop and name the first, or leave them out and count them."""

    def check(self) -> None:
        """Refuse numbers of rows that are none.

        Raises:
            ArgumentError: as said.
        """
        check_whole(1, batch_size=self.batch_size)
