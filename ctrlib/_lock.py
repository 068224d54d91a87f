"""One writer at a time: whoever writes a file or a folder holds a lock, and who comes second is told who that is.

The lock is a `flock` on a small hidden file, so it ends with its holder, however that dies. For `runs/a` there are two
such files, `runs/.a.lock` and, if the folder is there already, `runs/a/.lock`: the first cannot be made where nobody
may write beside the folder, and is another one where the folder is mounted into several containers. The file says who
holds it; it is gone when they are done, and a killed one's is taken over by the next.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import inspect
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from ctrlib.errors import CtrlibError

P = ParamSpec("P")
T = TypeVar("T")
_HELD: dict[Path, tuple[int, list[tuple[Path, int]]]] = {}  # by this process: the thread, and files with descriptors
_GUARD = threading.Lock()  # of the above
_PAUSE = 0.05  # seconds


class LockedError(CtrlibError, RuntimeError):
    """Somebody else writes there; the message says who."""


@contextlib.contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """Nobody else writes `out`, nor a folder that it lies in, for as long as this lasts; the same thread may ask again.

    Folders that it lies in are made if missing, and removed if they are empty in the end. Where a file system has no
    locks, or nothing can be written, there is none: then whatever is to be written says so.

    Raises:
        LockedError: another process, or another thread, holds it.

    >>> import tempfile
    >>> out = Path(tempfile.mkdtemp()) / "new" / "scores.csv"
    >>> with locked(out), locked(out):
    ...     print(*(path.name for path in out.parent.iterdir()))
    .scores.csv.lock
    >>> out.parent.exists()
    False
    """
    place = Path(out).resolve()
    if _is_mine(place):
        yield
        return
    made = [parent for parent in place.parents if not parent.exists()]
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
    held: list[tuple[Path, int]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        for path in _files(place):
            with contextlib.suppress(OSError):
                held.append((path, _take(path, out)))
                stack.callback(_give_back, *held[-1])
        with _GUARD:
            _HELD[place] = (threading.get_ident(), held)
        stack.callback(_HELD.pop, place, None)
        yield


def refuse_held(out: str | Path) -> None:
    """Look whether somebody else writes there, and leave everything as it is, but for the lock of a killed one.

    That is a file of no use, and who is refused for other reasons takes no lock that would replace it.

    Raises:
        LockedError: as said.
    """
    place = Path(out).resolve()
    for path in [] if _is_mine(place) else _files(place):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                _ask(descriptor)
                with contextlib.suppress(BlockingIOError):  # somebody else asks
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(path, descriptor):
                        path.unlink()  # a killed one's
            except BlockingIOError:
                raise _refusal(out, descriptor) from None
            finally:
                os.close(descriptor)


def _ask(descriptor: int) -> None:
    """Raise BlockingIOError if somebody holds the lock, and not just for a moment as who removes a dead one's does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_PAUSE)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def holding(*, when: Callable[[], bool] = lambda: True) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: the function runs while its argument `out`, if it is a path, is `locked`, where `when` says so."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def holds(*args: P.args, **kwargs: P.kwargs) -> T:
            out = signature.bind_partial(*args, **kwargs).arguments.get("out")
            with locked(out) if isinstance(out, str | Path) and when() else contextlib.nullcontext():
                return function(*args, **kwargs)

        return holds

    return decorate


def _files(place: Path) -> list[Path]:
    return [place.with_name(f".{place.name}.lock"), *([place / ".lock"] if place.is_dir() else [])]


def _is_mine(place: Path) -> bool:
    """Whether this thread holds it, or a folder that it lies in."""
    with _GUARD:
        return any(_HELD[one][0] == threading.get_ident() for one in (place, *place.parents) if one in _HELD)


def _refusal(out: str | Path, descriptor: int) -> LockedError:
    time.sleep(_PAUSE)  # whoever has just got it says so now
    who = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process, which could not say more"
    return LockedError(
        f"{out} is being written already, by {who}: wait for it, end it, or give another --out; nothing was changed"
    )


def _take(path: Path, out: str | Path) -> int:
    """The descriptor of a file that is there, locked, and says who we are.

    Raises:
        LockedError: somebody else has it.
        OSError: it cannot be made or locked.
    """
    patient = True
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            descriptor = os.open(path, os.O_RDONLY)  # somebody else's
        keep = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            keep = _is_at(path, descriptor)  # or its holder has removed it between our two calls
            if keep:
                with contextlib.suppress(OSError):  # the disk is full, or the file somebody else's
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, _who().encode())
                return descriptor
        except BlockingIOError:
            if not patient:
                raise _refusal(out, descriptor) from None
            patient = False  # `refuse_held` has it for a moment, too
            time.sleep(_PAUSE)
        finally:
            if not keep:
                os.close(descriptor)


def _give_back(path: Path, descriptor: int) -> None:
    try:
        with contextlib.suppress(OSError):
            if _is_at(path, descriptor):
                path.unlink()
    finally:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # the first that is not empty
        for folder in folders:
            folder.rmdir()


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _who() -> str:
    """This process, in words of one line."""
    command = " ".join(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).split())
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"process {os.getpid()} on {socket.gethostname()} since {now:%Y-%m-%d %H:%M:%S} UTC ({command[:300]})"


def _forget() -> None:
    """In a forked process, which holds nothing: while it has a descriptor, a lock would not end with its holder."""
    global _GUARD
    _GUARD = threading.Lock()
    for _, held in _HELD.values():
        for _, descriptor in held:
            with contextlib.suppress(OSError):
                os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
