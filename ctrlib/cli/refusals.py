"""What the command line says of an error, whosever it is: one message without a traceback."""

from __future__ import annotations

import errno
import shutil
from typing import Any

from ctrlib.errors import CtrlibError

# Packages whose errors come of files and of memory, by the module in which their classes are.
READERS = {"polars": "polars", "pyarrow": "Arrow", "safetensors_rust": "safetensors", "pyo3_runtime": "polars"}
WHERE = "--debug shows where it comes from"


def explain(error: BaseException) -> str:
    """What went wrong and what to do.

    >>> explain(FileNotFoundError(2, "No such file or directory", "x.csv"))
    'x.csv: No such file or directory'
    >>> explain(KeyError("item"))
    "KeyError: 'item'. That is a fault of ctrlib, or of a package that it uses: --debug shows where it comes from"
    """
    package = READERS.get(type(error).__module__.split(".")[0])
    if isinstance(error, CtrlibError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by hand"
    if isinstance(error, MemoryError):
        return f"there is not enough memory{_said(error)}: use a smaller --batch-size, or a machine with more; {WHERE}"
    if package is not None:
        return (
            f"{package} could not read or write a file, or hold it in memory{_said(error)}. Usual causes: the disk is "
            f"full, or a file was damaged or changed meanwhile; {WHERE}"
        )
    if isinstance(error, shutil.Error):
        return _copying(error)
    if isinstance(error, OSError):
        return _of_system(error) + _advice(error)
    if isinstance(error, ImportError):
        return str(error) + _advice(error)
    if isinstance(error, ValueError | RuntimeError) and str(error):
        return str(error)
    return f"{type(error).__name__}{_said(error)}. That is a fault of ctrlib, or of a package that it uses: {WHERE}"


def _said(error: BaseException) -> str:
    return f": {error}" if str(error) else ""


def _of_system(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    cure = {
        errno.ENOSPC: "; make room, or write elsewhere",
        errno.EDQUOT: "; make room, or write elsewhere",
        errno.EACCES: "; write elsewhere, or ask for the right to",
        errno.EROFS: "; write elsewhere",
    }.get(error.errno or 0, "")
    return f"{' -> '.join(names)}{': ' if names else ''}{error.strerror}{cure}"


def _copying(error: shutil.Error) -> str:
    """`shutil.Error` holds a list of (source, target, what was wrong), or a text."""
    found: Any = error.args[0] if error.args else ""
    if isinstance(found, str):
        return found
    lines = [f"{one[0]} could not be copied to {one[1]}: {one[2]}" for one in found if isinstance(one, tuple)]
    return "; ".join(lines) or "".join(map(str, found))


def _advice(error: Exception) -> str:
    """What to do about an error that is the installation's fault."""
    from ctrlib.doctor import hint

    return f". {advice}" if (advice := hint(error)) else ""
