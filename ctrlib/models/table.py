"""The one table of models: every function of interaction.py, sequence.py and multitask.py, as its docstring tells it.

The command line's choices, the tests, the docs and `ctrlib models` are made from it. Nothing here imports torch, but
for `PublishedModel.defaults` and `costs`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, WrongTypeError, shown
from ctrlib.models import arguments, interaction, multitask, sequence

if TYPE_CHECKING:
    from ctrlib.model import Model

KINDS = {"interaction": interaction, "sequence": sequence, "multitask": multitask}
# "TITLE (AUTHORS, VENUE YEAR, ADDRESS): WHAT IT COMPUTES."
_FIRST = re.compile(r"(?P<title>[^(]+) \((?P<paper>.+?), (?P<url>https://[^\s,]+)\): (?P<summary>.+)\.")


@dataclass(frozen=True)
class PublishedModel:
    """A published model: what makes it from `Inputs`, and what its docstring says of it."""

    name: str
    make: Callable[..., Model]
    kind: str
    """interaction, sequence or multitask: the file that it stands in. Or own: of the caller's."""
    title: str
    paper: str
    """Authors, venue and year."""
    url: str
    summary: str
    """What it computes, in a clause."""
    details: str
    """What else its docstring says."""

    @classmethod
    def of(cls, make: Callable[..., Model], kind: str) -> PublishedModel:
        """The entry of a function.

        Raises:
            ValueError: its docstring does not begin as that of a published model.
        """
        if make.__doc__ is None and sys.flags.optimize == 2:  # python -OO drops them
            return cls(make.__name__, _checked(make), kind, make.__name__, "", "", "", "")
        first, _, details = (inspect.getdoc(make) or "").partition("\n\n")
        found = _FIRST.fullmatch(" ".join(first.split()))
        if found is None:
            raise ArgumentError(
                f"the docstring of {make.__module__}.{make.__name__} begins with {first!r}, expected "
                "'TITLE (AUTHORS, VENUE YEAR, https://ADDRESS): WHAT IT COMPUTES.'"
            )
        return cls(make.__name__, _checked(make), kind, details=details, **found.groupdict())

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.make).parameters.values())[1:]  # the first is `inputs`

    def _shared(self) -> list[str]:
        """The dictionary types of `ctrlib.models.arguments` that it takes."""
        return [
            str(parameter.annotation).removeprefix("Unpack[").removesuffix("]")
            for parameter in self._parameters()
            if parameter.kind is inspect.Parameter.VAR_KEYWORD
        ]

    @property
    def arguments(self) -> list[str]:
        """What it takes besides `Inputs`.

        >>> MODELS["dcnv2"].arguments
        ['num_cross_layers', 'batch_norm', 'dropout', 'hidden']
        """
        own = [p.name for p in self._parameters() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        return own + [name for shared in self._shared() for name in getattr(arguments, shared).__annotations__]

    def defaults(self) -> dict[str, Any]:
        """Argument -> its default.

        >>> MODELS["dcnv2"].defaults()
        {'num_cross_layers': 3, 'batch_norm': False, 'dropout': 0.0, 'hidden': (400, 400, 400)}
        """
        found = {p.name: p.default for p in self._parameters() if p.kind is not inspect.Parameter.VAR_KEYWORD}
        for shared in self._shared():
            package, _, part = arguments.PARTS[shared].partition(".")
            takes = inspect.signature(getattr(importlib.import_module(f"ctrlib.{package}"), part)).parameters
            found |= {name: takes[name].default for name in getattr(arguments, shared).__annotations__}
        return found


def _checked(make: Callable[..., Model]) -> Callable[..., Model]:
    """The same function, which refuses what is no `Inputs`, more than that by position, and names that it has not."""

    @functools.wraps(make)
    def checked(*positional: Any, **named: Any) -> Model:
        from ctrlib.inputs import Inputs

        name = make.__name__
        given = [*positional, *([named.pop("inputs")] if "inputs" in named and not positional else [])]
        call = f"ctrlib.models.{name}(ctrlib.Inputs(schema, embedding_dim=16), ...)"
        if not given or not isinstance(given[0], Inputs):
            got = shown(given[0]) if given else "nothing"
            raise WrongTypeError(f"{name} takes ctrlib.Inputs first, got {got}: write {call}")
        if len(given) > 1:
            raise WrongTypeError(f"{name} takes ctrlib.Inputs by position and all else by name, got {shown(given[1])}")
        takes = MODELS[name].arguments
        if unknown := sorted(set(named) - set(takes)):
            raise WrongTypeError(f"{name} takes no {unknown}; {instead(unknown, takes) if takes else 'only inputs'}")
        return make(given[0], **named)

    return checked


MODELS: dict[str, PublishedModel] = {
    name: PublishedModel.of(make, kind)
    for kind, module in KINDS.items()
    for name, make in vars(module).items()
    if inspect.isfunction(make) and make.__module__ == module.__name__ and not name.startswith("_")
}
