"""What a process needs that forks many children: all that these would import, no threads, and nothing to clean up."""

from __future__ import annotations

import contextlib
import gc
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path

HARMLESS = ("jemalloc_bg", "polars-ooc")  # threads that free memory, of polars and Arrow, from the import on


def import_everything() -> None:
    """The modules of the package, so that children start at once."""
    import ctrlib as package

    for module in pkgutil.walk_packages(package.__path__, "ctrlib."):
        if not module.name.endswith(("__main__", ".spark")):
            importlib.import_module(module.name)


def import_all(names: Iterable[str]) -> None:
    """These modules, as `sys.modules` of a child has them; some are parts that packages make up."""
    for name in names:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def check_threads() -> None:
    """Refuse to fork where threads run, which children would lack.

    Raises:
        RuntimeError: as said.
    """
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    if others := [name for name in names[1:] if not name.startswith(HARMLESS)]:
        raise RuntimeError(f"threads run in the process that forks, expected none: {others}")


def be_ready() -> None:
    """The last thing before the first fork."""
    gc.collect()
    gc.freeze()  # or each child would touch all objects, and so copy them
    check_threads()
