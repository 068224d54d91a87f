"""An experiment as JSON: what --config reads and --print-config writes, for every command that trains."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrlib.cli.flags import ModelFlags
from ctrlib.cli.kinds import OptionalPath, Switch
from ctrlib.errors import ArgumentError, WrongTypeError

# Entry of `training` in an experiment -> the field that says it on the command line. All others are called the same.
FIELD_OF = {"embedding_l2": "l2", "max_epochs": "epochs"}


@dataclass(frozen=True)
class Experiment:
    """All of it at once."""

    config: OptionalPath = None
    """The experiment as JSON: a model.json, or what --print-config wrote; flags may change how it is trained."""
    print_config: Switch = False
    """Print the experiment as JSON, every default filled in, and do nothing else."""

    def read(
        self, given: frozenset[str], others: tuple[str, ...] = (), *, crosses: bool = False
    ) -> dict[str, Any] | None:
        """What --config holds; None if there is none.

        Args:
            given: the flags that were said. Those that say what the model is do not go with --config,
            others: and neither do these.
            crosses: whether those of a model are counted anew by who reads this.

        Raises:
            ArgumentError, WrongTypeError: as said, or the file is none or holds no experiment.
        """
        path = self.config
        if path is None:
            return None
        if both := sorted(given & {*(flag_of(one.name) for one in dataclasses.fields(ModelFlags)), *others}):
            raise ArgumentError(
                f"{', '.join(both)}: --config {path} says what the model is: change it there, or leave it out"
            )
        if not path.is_file():
            raise ArgumentError(f"--config {path}: there is no such file")
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArgumentError(
                f"--config {path} is not JSON ({error}): expected what --print-config writes"
            ) from error
        if not isinstance(said, dict) or not isinstance(said.get("model"), str | dict):
            raise ArgumentError(
                f'--config {path} is no experiment: expected {{"model": NAME, ...}}, as --print-config writes'
            )
        for name in ("training", "search"):
            if not isinstance(said.get(name, {}), dict):
                raise WrongTypeError(f"--config {path}: {name} is {said[name]!r}, expected a dictionary")
        if "replaced" in said and "search" not in said and not (crosses and said.get("crosses")):
            raise ArgumentError(
                f"--config {path} describes a model that was made smaller (replaced): take the model.json of the one "
                "that it came from"
            )
        return {"training": {}, **said}


def flag_of(name: str) -> str:
    """The flag of a field.

    >>> flag_of("warm_start")
    '--warm-start'
    """
    return f"--{name.replace('_', '-')}"


def training_entries(
    groups: Iterable[Any], *, leave_out: tuple[str, ...] = (), given: frozenset[str] | None = None
) -> dict[str, Any]:
    """The entries of `training` that groups of flags say: all that have a value, or those of the flags given."""
    said: dict[str, Any] = {}
    entries = {name: entry for entry, name in FIELD_OF.items()}
    for group in groups:
        for one in dataclasses.fields(group):
            if one.name in leave_out or (given is not None and flag_of(one.name) not in given):
                continue
            value = getattr(group, one.name)
            if value is not None:
                said[entries.get(one.name, one.name)] = str(value) if isinstance(value, Path) else value
    return said
