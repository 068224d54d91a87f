"""What the environment says of the processes that train together, read without torch."""

from __future__ import annotations

import os

from ctrlib.errors import CtrlibError

# What `torchrun` sets, and other launchers that torch can join by.
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LauncherError(CtrlibError, ValueError):
    """The environment may announce several processes, but not so that they could find each other."""


def announced() -> tuple[int, int]:
    """This process's number and how many there are, (0, 1) where nobody announces several.

    All of `NAMES` must be there for several. RANK and WORLD_SIZE are names that others use, too: where they alone are
    set, and mean more than one process, it is not known whether several were meant, and one of them must not go on by
    itself as if there were no others.

    Raises:
        LauncherError: as said; or a number is none.

    >>> announced()
    (0, 1)
    """
    said = {name: os.environ[name] for name in NAMES if name in os.environ}
    number, size = said.get("RANK", "0"), said.get("WORLD_SIZE", "1")
    if (number, size) == ("0", "1"):
        return 0, 1
    given = ", ".join(f"{name}={value}" for name, value in said.items())
    cure = "start with torchrun, which sets them all; or, for one process, `unset RANK WORLD_SIZE`"
    if missing := [name for name in NAMES if name not in said]:
        raise LauncherError(
            f"the environment has {given}, as if this were one of several processes, but no {', '.join(missing)}: "
            f"{cure}"
        )
    if not (number.isdecimal() and size.isdecimal() and int(number) < int(size)):
        raise LauncherError(
            f"the environment has {given}: expected numbers, RANK from 0 on and below WORLD_SIZE; {cure}"
        )
    return int(number), int(size)
