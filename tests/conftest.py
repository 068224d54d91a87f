"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# The suite's tensors are small: a second thread gains nothing, and on a busy machine two OpenMP threads wait for each
# other twenty times longer than they compute. Set before torch is imported, and so for subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from ctrlib import plots

DRAWN = {name: getattr(plots, name) for name in ("learning_curve", "search_result", "compression")}


def _blank(*arguments: Any, **_: Any) -> None:
    Path(arguments[-1]).write_bytes(b"blank")


def pytest_collectstart() -> None:  # not in the process that only hands out tests, which never ends a collection
    gc.disable()


def pytest_collection_finish() -> None:
    """What was imported until now stays: to look through it for garbage is a sixth of the time that collection takes.

    Later it would be looked through whenever tests make much, and be copied by processes that they fork.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """What tests kill is processes, which lose nothing that was written; scripts in processes of their own do wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[None]:
    """The pictures of runs and searches stay blank: to draw one takes longer than to train a small model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWN:
            patch.setattr(plots, name, _blank)
        yield


@pytest.fixture(scope="module")
def drawn_pictures() -> Iterator[None]:
    """They are drawn in the rest of a file of tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, draw in DRAWN.items():
            patch.setattr(plots, name, draw)
        yield
