"""The last clean-up of a run: what is left when that is stopped is a run that is over, and known as such.

When all that a run or a search leaves is in place, a hidden file says so: whose it is, and with what result. Then what
it needed to go on is removed, and that file last. So the same command, started again, has nothing to compute.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrlib._target import FINISHED
from ctrlib.errors import ArgumentError
from ctrlib.making import remove, sweep, write_text
from ctrlib.manifest import is_entry
from ctrlib.training.config import refuse_another


def finish(out: Path, identity: dict[str, Any], result: dict[str, Any], needless: Sequence[str]) -> None:
    """Say that the run in `out` is over, and remove what it needed to go on; a kill leaves something for `finished`.

    Args:
        out: the folder of the run.
        identity: of the run.
        result: plain data.
        needless: files and folders of `out` to remove.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp())
    >>> (out / "checkpoints").mkdir()
    >>> finish(out, {"seed": 1}, {"test_auc": 0.75}, ["checkpoints"])
    >>> list(out.iterdir()), finished(out, {"seed": 1})
    ([], None)
    """
    write_text(out / FINISHED, json.dumps({"identity": identity, "result": result, "needless": list(needless)}))
    clean_up(out)


def finished(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The result of the run in `out`, if it is over but for its clean-up; None if it is not, or if that is done, too.

    Raises:
        ValueError: it is another run than that of `identity`, and each setting that differs is named; or the file that
            says so is damaged.
    """
    try:
        said = _said(out)
    except FileNotFoundError:
        return None
    refuse_another(said["identity"], identity, f"{out} holds a run that is over but for its clean-up, and is another")
    result: dict[str, Any] = said["result"]
    return result


def clean_up(out: Path) -> None:
    """Remove what a run that is over needed to go on; the file that says so goes last."""
    for name in _said(out)["needless"]:
        remove(out / name)
    sweep(out, FINISHED)
    (out / FINISHED).unlink()


def _said(out: Path) -> dict[str, Any]:
    path = out / FINISHED
    try:
        said: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
        for name in said["needless"]:  # is removed: nothing but what lies in the folder itself
            if not is_entry(name):
                raise ArgumentError(f"it asks to remove {name!r}, which does not lie in the folder")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is damaged ({error}): the run in {out} is over; delete that file") from error
    return said
