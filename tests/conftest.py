"""Settings of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The suite's tensors are small: a second thread gains nothing, and on a busy machine two OpenMP threads wait for each
# other twenty times longer than they compute. Set before torch is imported, and so for subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from ctrlib import plots

DRAWN = plots.learning_curve


def _blank(history: Any, path: str | Path, **_: Any) -> None:
    Path(path).write_bytes(b"blank")


@pytest.fixture(scope="session", autouse=True)
def blank_curves() -> Iterator[None]:
    """The curves of runs stay blank: to draw one takes longer than to train a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "learning_curve", _blank)
        yield


@pytest.fixture(scope="module")
def drawn_curves() -> Iterator[None]:
    """The curves of all runs of a file of tests are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "learning_curve", DRAWN)
        yield
