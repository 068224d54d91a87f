"""What every search must do, whatever it searches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ctrlib.data.loader import Loader
from ctrlib.model import Model
from ctrlib.search.plan import Plan


class Killed(Exception):
    """The search's end."""


class Killing(Console):
    """Ends the search when it reports for the second time, in a line with this text."""

    def __init__(self, text: str) -> None:
        super().__init__(quiet=True)
        self.text, self.reports = text, 0

    def print(self, *objects: Any, **options: Any) -> None:
        self.reports += self.text in str(objects[0])
        if self.reports == 2:
            raise Killed


def check_a_killed_search_goes_on(
    search: Callable[..., Plan],
    model: Model,
    loaders: Callable[[], tuple[Loader, Loader]],
    *,
    settings: Any,
    others: Any,
    text: str,
    complaint: str,
    out: Path,
) -> None:
    """It ends with the plan of one that was not killed; the model is unchanged; other settings are refused there."""
    quiet = Console(quiet=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = search(model, *loaders(), settings=settings, console=quiet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(Killed):
        search(model, *loaders(), settings=settings, out=out, console=Killing(text))
    again = search(model, *loaders(), settings=settings, out=out, console=quiet)
    assert again.replaced == whole.replaced and again.summary == whole.summary
    assert whole.weights.keys() == again.weights.keys()
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in whole.weights.items())
    with pytest.raises(ValueError, match=complaint):
        search(model, *loaders(), settings=others, out=out, console=quiet)
