"""Files and folders in S3: fetched to this machine before they are read, published when they are whole.

A URL such as `s3://bucket/data/clicks` stands for a file or for all that lies below it. `fetch` copies it into a cache
on this machine, only what is new or has changed, and everything else here works on those files. `publish` copies the
other way. A folder's MANIFEST goes first away and comes last, so that whoever reads the URL meanwhile is told that the
folder is not whole, rather than getting half of an old and half of a new one.

Transfers are those of s3fs (the extra `ctrlib[s3]`), which takes credentials, region and endpoint as all programs for
S3 do: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL, ~/.aws. What fails for a
moment is tried again, some ten times in half a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctrlib._launcher import announced
from ctrlib.errors import ArgumentError, CtrlibError, MissingPackageError
from ctrlib.making import remove, write_text

SCHEME = "s3"
LAST = ("MANIFEST", "LATEST")  # what says that other files are whole
CHECKPOINTS = re.compile("(checkpoints|search)/")  # what a killed run goes on from
SECONDS = 20.0  # between two looks for new checkpoints
ATTEMPTS = 10
SETTINGS = "AWS_ENDPOINT_URL, AWS_PROFILE and the like"


class RemoteError(CtrlibError, OSError):
    """What a URL stands for could not be read or written; says which, and why."""


def is_remote(text: str) -> bool:
    """Whether a path is a URL that is to be fetched.

    >>> is_remote("s3://bucket/clicks.csv"), is_remote("data/s3/clicks.csv")
    (True, False)
    """
    return text.startswith(f"{SCHEME}://")


def fetch(url: str, *, cache: str | Path | None = None, log: Callable[[str], None] | None = None) -> Path:
    """Copy what a URL stands for to this machine, as far as it is not there already.

    Args:
        url: of a file, or of a folder: everything below it, such as a prepared folder or a model folder.
        cache: folder that holds copies; by default $CTRLIB_CACHE, or else ctrlib in the user's folder for caches.
        log: gets a sentence if something is copied.

    Returns:
        The copy. It is for reading: what is changed there is not what the URL has.

    Raises:
        RemoteError: there is nothing there, or it cannot be read.
        MissingPackageError: s3fs is not installed.
    """
    copy = _Copy.of(url, cache)
    if not copy.pull(log):
        raise RemoteError(f"{url}: there is nothing there (credentials and endpoint are those of {SETTINGS})")
    return copy.path


def publish(path: str | Path, url: str) -> None:
    """Copy a file or a folder to a URL: a folder's MANIFEST last.

    What lies below the URL and not in the folder is left alone, so give a URL where nothing is.

    Raises:
        RemoteError: it cannot be written.
        MissingPackageError: s3fs is not installed.
        ValueError: there is no such path.
    """
    path = Path(path)
    if not path.exists():
        raise ArgumentError(f"{path} does not exist: expected a file or a folder to copy to {url}")
    _Copy(url, path).push()


@contextlib.contextmanager
def staged(arguments: list[str], *, log: Callable[[str], None]) -> Iterator[list[str]]:
    """Arguments of a command, with a path on this machine for each URL: what is read is fetched, and what has been
    written is published in the end, however the command ends. Checkpoints are published while it runs.

    Raises:
        RemoteError, MissingPackageError: as `fetch`.
    """
    copies: dict[str, _Copy] = {}
    local, flag = [], ""
    for argument in arguments:
        name, equals, value = argument.partition("=") if argument.startswith("-") else (flag, "", argument)
        flag = argument if argument.startswith("-") and not equals else flag
        if not is_remote(value):
            local.append(argument)
            continue
        if announced()[1] > 1:
            raise ArgumentError(
                f"{value}: several processes do not fetch; copy it first (ctrlib.remote.fetch), and give the copy"
            )
        if value not in copies:
            copies[value] = _Copy.of(value, None)
            found = copies[value].pull(log, to_write=name == "--out")
            if not found and name != "--out":
                raise RemoteError(f"{value}: there is nothing there (endpoint and credentials are those of {SETTINGS})")
        local.append(f"{name}={copies[value].path}" if equals else str(copies[value].path))
    over = threading.Event()
    mirror = threading.Thread(target=_mirror, args=(list(copies.values()), over, log), daemon=True)
    if copies:
        mirror.start()
    try:
        yield local
    finally:
        over.set()
        if copies:
            mirror.join()
        for copy in copies.values():
            try:
                num_files = copy.push()
            except RemoteError as error:
                raise RemoteError(f"{error}; what was to be published is in {copy.path}") from error
            if num_files:
                log(f"{copy.url}: {_files(num_files)} written")


def _mirror(copies: list[_Copy], over: threading.Event, log: Callable[[str], None]) -> None:
    """Publish checkpoints every SECONDS. What fails is said once, and tried again by the next round."""
    said = False
    while not over.wait(SECONDS):
        for copy in copies:
            try:
                copy.push_checkpoints()
            except (CtrlibError, OSError) as error:
                if not said:
                    log(f"checkpoints are not in {copy.url} yet: {error}")
                said = True


@dataclass(frozen=True)
class _State:
    """A file as it was when both sides were the same: the store's mark, and this machine's."""

    mark: str
    size: int
    changed: int  # nanoseconds


class _Copy:
    """A URL, and the file or folder on this machine that is to hold the same."""

    def __init__(self, url: str, path: Path, record: Path | None = None) -> None:
        key = url.partition("://")[2]
        if not is_remote(url) or not key.strip("/").partition("/")[2]:
            raise ArgumentError(f"{url}: expected {SCHEME}://BUCKET/PATH")
        self.url, self.path, self._key = url, path, key.strip("/")
        self._record = record  # file in which what was the same is kept for the next process
        self._same: dict[str, _State] = {}
        self._pulling = False  # whether a process was killed while it fetched
        if record is not None and record.is_file():
            said = json.loads(record.read_text(encoding="utf-8"))
            self._pulling = said["pulling"]
            self._same = {name: _State(*state) for name, state in said["files"].items()}

    @staticmethod
    def of(url: str, cache: str | Path | None) -> _Copy:
        """With its place in the cache."""
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ctrlib"
        place = Path(cache or os.environ.get("CTRLIB_CACHE") or usual)
        key = url.partition("://")[2].strip("/")
        return _Copy(url, place / SCHEME / key, place / f"{SCHEME}.json" / f"{key.replace('/', '%')}.json")

    def pull(self, log: Callable[[str], None] | None, *, to_write: bool = False) -> bool:
        """Make the copy equal to what is there; whether anything is.

        What a killed command, or one that could not publish, has left in the copy `to_write` stays if nobody has
        written there since; anywhere else it is in the way.
        """
        there = self._listed()
        if not self._pulling and (left := self._changed(self._here())):
            unmoved = {name: state.mark for name, state in self._same.items()} == {
                n: _mark_of(i) for n, i in there.items()
            }
            if to_write and unmoved:
                return bool(there)
            raise RemoteError(
                f"{self.path}, the copy of {self.url}, holds what is not published, such as {sorted(left)[0] or 'it'}: "
                "move it away, or publish it (ctrlib.remote.publish), and remove it"
            )
        new = {name: info for name, info in there.items() if self._is_new(name, info)}
        if new and log is not None:
            size = sum(info["size"] for info in new.values())
            log(f"{self.url}: {_files(len(new))} ({size:,} bytes) fetched to {self.path}")
        self._pulling = True
        self._save()
        if ("" in there) == self.path.is_dir():
            remove(self.path)
        for name, info in new.items():
            path = self._local(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            self._try(self._store().get_file, self._remote(name), str(part))
            part.replace(path)
            self._same[name] = _State(_mark_of(info), info["size"], path.stat().st_mtime_ns)
        for name in self._here().keys() - there.keys():
            self._local(name).unlink()
        self._same = {name: state for name, state in self._same.items() if name in there}
        self._pulling = False
        self._save()
        return bool(there)

    def push(self) -> int:
        """Make what is there equal to the copy; the number of files written. What others have put there stays."""
        here = self._here()
        changed = self._changed(here)
        gone = self._same.keys() - here.keys()
        if changed | gone and "MANIFEST" in self._same:
            self._try(self._store().rm_file, self._remote("MANIFEST"))
            del self._same["MANIFEST"]
            changed |= here.keys() & {"MANIFEST"}
            gone -= {"MANIFEST"}
        for name in sorted(changed, key=_order):
            self._put(name, here[name])
        self._drop(gone)
        if changed | gone:
            self._mark()
        return len(changed)

    def push_checkpoints(self) -> None:
        """The same of checkpoints, while others are made and old ones removed: LATEST names one that is there.

        A checkpoint's folder is whole as soon as it has its name, and LATEST names one of those that were there when it
        was read.
        """
        latest = {path: path.read_bytes() for path in self.path.glob("*/LATEST")}
        here = {name: path for name, path in self._here().items() if CHECKPOINTS.match(name)}
        changed = self._changed(here)
        try:
            for name in sorted(changed, key=_order):
                if here[name] not in latest:
                    self._put(name, here[name])
        except FileNotFoundError:  # removed meanwhile: the next round finds newer ones
            return
        for path, content in latest.items():
            name = path.relative_to(self.path).as_posix()
            if name in changed:
                self._try(self._store().pipe_file, self._remote(name), content)
                self._same[name] = _State("", len(content), 0)  # the file itself may be another one by now
        self._drop({name for name in self._same if CHECKPOINTS.match(name)} - here.keys())
        if changed:
            self._mark()

    def _put(self, name: str, path: Path) -> None:
        stat = path.stat()  # before it is read: who changes it meanwhile has changed it since
        self._try(self._store().put_file, str(path), self._remote(name))
        self._same[name] = _State("", stat.st_size, stat.st_mtime_ns)

    def _drop(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=_order, reverse=True):
            self._try(self._store().rm_file, self._remote(name), missing=True)
            del self._same[name]

    def _mark(self) -> None:
        """Keep the marks that the store has given."""
        there = self._listed()
        self._same = {
            name: replace(state, mark=_mark_of(there[name])) for name, state in self._same.items() if name in there
        }
        self._save()

    def _changed(self, here: dict[str, Path]) -> set[str]:
        """Names of files of the copy that are not what was the same on both sides."""
        return {name for name, path in here.items() if self._differs(name, path)}

    def _differs(self, name: str, path: Path) -> bool:
        was, stat = self._same.get(name), path.stat()
        return was is None or (was.size, was.changed) != (stat.st_size, stat.st_mtime_ns)

    def _is_new(self, name: str, info: dict[str, Any]) -> bool:
        """Whether the copy lacks what is there under this name."""
        path = self._local(name)
        return not path.is_file() or self._differs(name, path) or self._same[name].mark != _mark_of(info)

    def _listed(self) -> dict[str, dict[str, Any]]:
        """Name below the URL -> what the store says of it; of a single file the name is empty."""
        store = self._store()
        store.invalidate_cache()
        found: dict[str, Any] = self._try(store.find, self._key, detail=True, missing=True) or {}
        listed = {}
        for key, info in found.items():
            name = key[len(self._key) :].lstrip("/")
            if key.endswith("/") or not (key == self._key or key.startswith(f"{self._key}/")):
                continue
            if ".." in name.split("/"):
                raise RemoteError(f"{self.url}: {name!r} would lie outside of the folder: nothing was fetched")
            listed[name] = info
        return listed

    def _here(self) -> dict[str, Path]:
        """Name -> file of the copy. Hidden ones (locks, what is being made) are this machine's own."""
        if self.path.is_file():
            return {"": self.path}
        found = {}
        for folder, inner, names in os.walk(self.path):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if not name.startswith(".") and path.is_file():
                    found[path.relative_to(self.path).as_posix()] = path
        return found

    def _local(self, name: str) -> Path:
        return self.path / name if name else self.path

    def _remote(self, name: str) -> str:
        return f"{self._key}/{name}" if name else self._key

    def _save(self) -> None:
        if self._record is not None:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            files = {name: [state.mark, state.size, state.changed] for name, state in self._same.items()}
            write_text(self._record, json.dumps({"pulling": self._pulling, "files": files}))

    def _store(self) -> Any:
        try:
            import s3fs
        except ImportError as error:
            raise MissingPackageError(
                f"{self.url}: s3fs is not installed ({error}): pip install 'ctrlib[s3]'"
            ) from error
        return s3fs.S3FileSystem(config_kwargs={"retries": {"max_attempts": ATTEMPTS, "mode": "standard"}})

    def _try(self, call: Callable[..., Any], *arguments: Any, missing: bool = False, **named: Any) -> Any:
        """The answer of the store; None if there is no such thing and `missing` allows it."""
        try:
            return call(*arguments, **named)
        except FileNotFoundError as error:
            if missing:
                return None
            if error.filename is not None and Path(error.filename).is_absolute():
                raise  # a file of this machine
            raise RemoteError(f"{self.url}: {error}: does the bucket exist?") from error
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise RemoteError(f"{self.url}: {said} (credentials and endpoint are those of {SETTINGS})") from error


def _mark_of(info: dict[str, Any]) -> str:
    """What changes when an object does."""
    return f"{info.get('ETag', '')} {info['size']}"


def _order(name: str) -> tuple[bool, int, str]:
    """What says that others are whole comes after them; of a folder in a folder before that of the outer one."""
    return (name.rpartition("/")[2] in LAST, -name.count("/"), name)


def _files(number: int) -> str:
    return f"{number:,} {'file' if number == 1 else 'files'}"
