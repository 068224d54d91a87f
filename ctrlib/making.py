"""Files and folders in the making: they take their place when they are whole, so that a kill leaves the old or the new.

Whatever is not whole yet has a hidden name, beside the place that it is to take or, where a folder is replaced, inside
of it:

    .1f2e3d4c.partial.NAME    in the making; its writer holds a lock (`flock`) on it for as long as it lives
    .1f2e3d4c.deleted         on its way out: whoever finds it removes it
    .new                      inside a folder: whole, and about to replace what has the same names there
    .new-whole                likewise, but nothing that was there stays

A new file, or a folder where there was none, takes its place by one `rename`, and so does the folder `.new`: that is
the moment from which on the new counts. What follows, moving its entries into their places, may be stopped anywhere,
since whoever reads or writes the folder next finishes it (`settle`). Nothing is renamed across a mount, and no exchange
of folders, which few file systems have, is needed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ctrlib.errors import DiskError

LAST = "MANIFEST"  # of a folder's entries, moved when all others are in place
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NEW, _WHOLE, _INSIDE = ".new", ".new-whole", "folder"
Needed = Callable[[int], str]  # how many bytes were written -> "about 4,096 bytes are needed"


def _more(written: int) -> str:
    return f"more than {written:,} bytes are needed"


@contextlib.contextmanager
def new_file(out: str | Path, *, needed: Needed = _more) -> Iterator[Path]:
    """Where to write a file, which becomes `out` if all goes well, and is removed if not.

    Raises:
        DiskError: the disk is full; the message says how much room there is, and what `needed` says of how much it
            takes. `out` is as it was.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "scores.csv"
    >>> with new_file(out) as making:
    ...     _ = making.write_text("click")
    ...     print(out.exists(), making.suffix)
    False .csv
    >>> out.read_text(), len(list(out.parent.iterdir()))
    ('click', 1)
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent, out.name)
    making = _hidden(out.parent, f"partial.{out.name}")
    with contextlib.ExitStack() as stack:
        # Only if it failed: after the rename nothing is left to do, so that a kill then finds all done.
        stack.push(lambda kind, *_: making.unlink(missing_ok=True) if kind else None)
        with _naming_a_full_disk(out, making, needed):
            os.close(os.open(making, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            stack.enter_context(_locked(making))
            yield making
            making.replace(out)


def write_text(out: str | Path, text: str) -> None:
    """Write a small file, which is the old one or the new one whenever it is looked at."""
    with new_file(out) as making:
        making.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(out: str | Path, *, keep: bool = False, needed: Needed | int = _more) -> Iterator[Path]:
    """Where to fill a folder, which becomes `out` if all goes well, and is removed if not.

    If there is a folder `out`, its entries give way to the new ones; with `keep`, those of other names stay. Where it
    is known how many bytes are `needed`, it is looked before whether there is room for them.

    Raises:
        OSError: as `new_file`.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "model"
    >>> for name in ("a", "b"):
    ...     with new_folder(out) as making:
    ...         (making / name).mkdir()
    >>> [path.name for path in out.iterdir()]
    ['b']
    """
    out = Path(out)
    settle(out)
    inside = out.is_dir()
    place, name = (out, _INSIDE) if inside else (out.parent, out.name)
    place.mkdir(parents=True, exist_ok=True)
    sweep(place, name)
    making = _hidden(place, f"partial.{name}")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, making, ignore_errors=True)
        with _naming_a_full_disk(out, making, needed):
            making.mkdir()
            stack.enter_context(_locked(making))
            yield making
            if not inside:
                making.rename(out)
                return
            with _locked(out, wait=True):
                _settle(out)
                making.rename(out / (_NEW if keep else _WHOLE))
                _settle(out)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def settle(folder: str | Path) -> None:
    """Finish the replacement of a folder that somebody was stopped at, if there is one.

    Raises:
        DiskError: the folder cannot be written to.
    """
    folder = Path(folder)
    if not any((folder / name).is_dir() for name in (_NEW, _WHOLE)):
        return
    try:
        with _locked(folder, wait=True):
            _settle(folder)
    except OSError as error:
        raise DiskError(
            error.errno,
            f"{folder} was being replaced when that was stopped, and what is left to do, moving the new files into "
            f"their places, fails ({error.strerror}): open it once where it may be written to",
        ) from error


def remove(path: str | Path) -> None:
    """Delete a folder or file, if there is one, so that a kill leaves all of it or nothing under its name."""
    path = Path(path)
    if path.exists():
        _discard(path)


def sweep(place: Path, name: str) -> None:
    """Remove what dead writers of the entry `name` of a folder have left there."""
    for left in [*place.glob(f".*.partial.{glob.escape(name)}"), *place.glob(".*.deleted")]:
        with contextlib.suppress(OSError):  # somebody else may do the same; and where locks fail, it is left alone
            if left.name.endswith(".deleted"):
                _delete(left)
                continue
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _delete(left)
            finally:
                os.close(descriptor)


def _settle(folder: Path) -> None:
    """Every step may be the last one before a kill, and the first one after it."""
    whole, new = folder / _WHOLE, folder / _NEW
    if whole.is_dir():
        for entry in list(folder.iterdir()):
            if not entry.name.startswith("."):
                _discard(entry)
        whole.rename(new)
    if new.is_dir():
        for entry in sorted(new.iterdir(), key=lambda entry: entry.name == LAST):
            place = folder / entry.name
            if place.exists() and (place.is_dir() or entry.is_dir()):
                _discard(place)
            entry.replace(place)
        new.rmdir()
    sweep(folder, _INSIDE)


def _hidden(place: Path, what: str) -> Path:
    return place / f".{uuid.uuid4().hex[:8]}.{what}"


def _discard(path: Path) -> None:
    hidden = _hidden(path.parent, "deleted")
    path.rename(hidden)
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """A lock that ends with the process; none where the file system has no locks."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming_a_full_disk(out: Path, making: Path, needed: Needed | int) -> Iterator[None]:
    """Whoever wrote, polars, Arrow or safetensors: one error with the numbers that help."""

    def full(written: int) -> DiskError:
        free = shutil.disk_usage(making.parent).free + written
        need = f"{needed:,} bytes are needed" if isinstance(needed, int) else needed(written)
        stopped = f", {written:,} were written when the disk was full (or a limit on files was reached)"
        return DiskError(
            errno.ENOSPC,
            f"no room for {out}: {need}{stopped if written else ''}, and {free:,} are free without these; what was "
            "there is as it was. Make room, or give another place",
        )

    if isinstance(needed, int) and needed > shutil.disk_usage(making.parent).free:
        raise full(0)
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise full(size_of(making)) from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        texts = [os.strerror(number) for number in DISK_FULL] + [f"errno {number}" for number in DISK_FULL]
        if getattr(error, "errno", None) in DISK_FULL or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False
