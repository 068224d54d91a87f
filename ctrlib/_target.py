"""One rule for what may be overwritten, which everything that writes a file or a folder asks before any work.

What is there is replaced only if that was said, if it is of the kind that is written, and if it is no input.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from ctrlib._launcher import announced
from ctrlib._lock import locked, refuse_held
from ctrlib.errors import CtrlibError, check_path
from ctrlib.making import settle

Kind = Literal[
    "file",
    "prepared",
    "model",
    "compressed",
    "search",
    "ranking",
    "retrieval",
    "export",
    "comparison",
    "tuning",
    "run",
    "other",
]
NAMES: dict[Kind, str] = {
    "file": "a file",
    "prepared": "a prepared folder",
    "model": "a model folder",
    "compressed": "a folder of `ctrlib compress`",
    "search": "a folder of `ctrlib search`",
    "ranking": "a folder of `ctrlib rank`",
    "retrieval": "a folder of `ctrlib retrieve train`",
    "export": "a folder of `ctrlib export`",
    "comparison": "a folder of `ctrlib compare`",
    "tuning": "a folder of `ctrlib tune`",
    "run": "the folder of a run",
    "other": "a folder with other files",
}
# By what each kind of folder is known, the more telling ones first: a search's folder is also a model folder, which has
# a schema as prepared folders do.
MARKERS: dict[Kind, tuple[str, ...]] = {
    "search": ("search.json", "plan.safetensors", "unfinished.json", "search"),
    "compressed": ("compression.json",),
    "ranking": ("ranking.json",),
    "retrieval": ("retrieval.json",),
    "export": ("export.json",),
    "comparison": ("comparison.json", "comparing.json"),
    "tuning": ("trials.json",),
    "model": ("model.json",),
    "run": ("metrics.json", "log.jsonl", "checkpoints", "plan.json", "non_finite_batch.pt"),
    "prepared": ("schema.json",),
}
RESULTS = (
    "model.json",
    "metrics.json",
    "search.json",
    "ranking.json",
    "retrieval.json",
    "export.json",
    "comparison.json",
    "best.json",
)
GOES_ON = ("checkpoints", "search")  # folders of checkpoints, which are gone when all is done
FINISHED = ".finished"  # there while what a run needed to go on is removed (`ctrlib.training.finished`)


class TargetError(CtrlibError, ValueError, FileExistsError):
    """Where a command is to write, there is something that it will not replace."""


def kind_of(path: Path) -> Kind | None:
    """What there is; None for nothing, or a folder with nothing in it that is not hidden.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "notes.txt").touch()
    >>> kind_of(folder), kind_of(folder / "notes.txt"), kind_of(folder / "nowhere")
    ('other', 'file', None)
    """
    if not path.is_dir():
        return "file" if path.exists() else None
    for kind, markers in MARKERS.items():
        if any(_holds(path, marker) for marker in markers):
            return kind
    return "other" if any(not part.name.startswith(".") for part in path.iterdir()) else None


def is_unfinished(folder: Path) -> bool:
    """Whether this is what a killed run, search or compression left: the same command goes on or begins anew there."""
    goes_on = any(_holds(folder, part) for part in GOES_ON)
    goes_on = goes_on or any((folder / name).is_file() for name in (FINISHED, "comparing.json"))
    return goes_on or not any((folder / result).exists() for result in RESULTS)


def _holds(folder: Path, marker: str) -> bool:
    """Whether a folder has that part; one that is called as a folder of checkpoints must be one, or empty."""
    part = folder / marker
    if marker not in GOES_ON:
        return part.exists()
    if not part.is_dir():
        return False
    names = [inner.name.lstrip(".") for depth in ("*", "*/*") for inner in part.glob(depth)]
    return not names or any(name.startswith(("step-", "LATEST")) for name in names)


def check_target(
    out: str | Path,
    kinds: Kind | tuple[Kind, ...],
    *,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    overwrite: bool = False,
) -> None:
    """Refuse to write where something would be lost.

    Args:
        out: the file or folder to write.
        kinds: what is written, and after it what else it may take the place of.
        inputs: what is read: `out` may be none of them, lie in none, and hold none, however they are spelt. None is
            skipped.
        overwrite: whether something of these kinds may be replaced. An unfinished run always may: it goes on.

    Raises:
        TargetError: as said; or nothing can be written there.
    """
    check_path("what is to be written", out=out)
    out, kinds = Path(out), (kinds,) if isinstance(kinds, str) else kinds
    wanted = "file" if kinds[0] == "file" else "folder"
    for path in map(Path, (one for one in inputs if one is not None)):
        if how := _overlap(out, path):
            raise TargetError(
                f"--out {out} {how} {path}, which is read: nothing is written over, into or around its own input, so "
                "give another --out"
            )
    if out.is_symlink() and not out.exists():
        raise TargetError(f"--out {out} is a link to {out.readlink()}, which does not exist: give another --out")
    if wanted == "folder":
        settle(out)  # what a killed command began to replace
    found = kind_of(out)
    if out.exists() and out.is_dir() == (wanted == "file"):
        what = "file" if wanted == "folder" else "folder"
        raise TargetError(f"--out {out}: that is a {what}, expected a {wanted}: give another --out")
    if found is not None and found not in kinds:
        what = NAMES[found]
        if found == "other":
            what += f" ({', '.join(sorted(part.name for part in out.iterdir())[:3])})"
        raise TargetError(
            f"{out} is {what}, and what is written is {NAMES[kinds[0]]}: nothing of another kind is replaced, so give "
            "another --out"
        )
    if found is not None and not overwrite and (found in ("file", "prepared") or not is_unfinished(out)):
        raise TargetError(
            f"{out} is {NAMES[found]} already: give another --out, or --overwrite (overwrite=True) to replace it"
        )
    place = next(place for place in ((out,) if out.is_dir() else out.parents) if place.exists())
    if not place.is_dir():
        raise TargetError(f"--out {out}: {place} is a file, so no {wanted} can be made in it: give another --out")
    if not os.access(place, os.W_OK):
        raise TargetError(
            f"--out {out}: {place} may not be written to (it is read-only, or somebody else's): give another --out, or "
            "ask for the right to write there"
        )


@contextlib.contextmanager
def target(
    out: str | Path,
    kinds: Kind | tuple[Kind, ...],
    *,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    overwrite: bool = False,
    shared: bool = False,
) -> Iterator[None]:
    """As `check_target`, and nobody else writes there for as long as this lasts.

    `shared`: several processes may be started for it, of which the first writes.

    Raises:
        TargetError: as `check_target`.
        LockedError: somebody else writes there; the message says who.
    """
    inputs = tuple(inputs)
    check_path("what is to be written", out=out)
    if shared and announced()[0]:  # the first holds it, perhaps by now
        check_target(out, kinds, inputs=inputs, overwrite=overwrite)
        yield
        return
    refuse_held(out)  # which says more than that there is something already
    check_target(out, kinds, inputs=inputs, overwrite=overwrite)
    with locked(out):
        check_target(out, kinds, inputs=inputs, overwrite=overwrite)  # what somebody else has finished meanwhile
        yield


def _overlap(out: Path, path: Path) -> str | None:
    """How a target and an input have files in common, if they have: links are followed."""
    if not path.exists():
        return None  # whoever reads it says so
    if out.exists() and out.samefile(path):
        return "is"
    if _lies_in(out, path):
        return "lies in"
    return "holds" if out.exists() and _lies_in(path, out) else None


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether one of the folders that a path lies in, once links are followed, is that one."""
    return folder.is_dir() and any(place.exists() and place.samefile(folder) for place in path.resolve().parents)
