"""Checkpoints of a training in one or many processes that survive kills, full disks and damaged files.

Tensors may be cut into parts over the ranks in any way and are read back under any other cut, at any number of ranks:
torch's distributed checkpoint (`torch.distributed.checkpoint`) plans who writes which part and which stored parts make
up a wanted one. Its file formats are not used: it writes in place, notices no flipped bit, and reads `.metadata` with
pickle, which runs what code a stranger put there. What is written instead, with no pickle anywhere:

    LATEST                   names the newest checkpoint; moved when all else is on disk
    step-000000300/
      tensors-0.bin          bytes of the parts that rank 0 wrote, one after another, row by row
      tensors-1.bin          ... and rank 1
      tensors.json           dtype, size and parts of every tensor: offsets, shape, file, first byte
      state.json             the caller's state
      MANIFEST               step, which other checkpoint this one needs, and bytes and sha256 of each file above

MANIFEST and LATEST are JSON below a line with the sha256 of that JSON. A folder is written under a hidden name and
renamed when it is whole, so whatever is called `step-*` was complete once. All ranks see one file system; one training
writes to a folder at a time.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from ctrlib import distributed
from ctrlib.errors import check_path
from ctrlib.making import DISK_FULL
from ctrlib.manifest import Damage, damage_of, is_entry, read_sealed, write_new, write_sealed
from ctrlib.sharding.shards import Shards
from ctrlib.training import tensor_files
from ctrlib.training.tensor_files import CheckpointError, Index, Place, Written

T = TypeVar("T")
LOGGER = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True)
class _Manifest:
    """What MANIFEST says, where it lies, and the sha256 in its first line."""

    folder: Path
    seal: str
    step: int
    save: int  # counts saves: a training that went back to an older step saves lower steps later
    needs: str | None
    files: dict[str, tuple[int, str]]  # name -> bytes, sha256


@dataclass(frozen=True)
class _Job:
    """One save, planned: what this rank writes, and what rank 0 adds."""

    step: int
    needs: str | None
    folder: Path
    save: int
    state: bytes
    parts: dict[Place, Tensor]
    index: Index
    needed: int


class Checkpoints:
    """The checkpoints in one folder. All methods but `wait` are collective: every rank calls them, in the same order.

    Make it after `init_process_group`, if there is one; it talks over a gloo group of its own, in which a process that
    takes CTRLIB_TIMEOUT seconds longer than another one, to write or to read, is taken for lost.

    Args:
        folder: where the checkpoints are; made by the first `save`.
        keep_last: how many of the newest to keep, with what they need. If it is 2 or more, and all of these stand on
            one checkpoint, then also the newest that does not, so that no damage to one folder loses the training.
        asynchronous: `save` copies the tensors to the CPU's memory and returns; a thread writes them.
        log: called on rank 0 with a sentence for each damaged file that `load` met.

    Attributes:
        last: name of the checkpoint last saved, or found by `load` as the newest good one; None before.

    >>> import tempfile, torch
    >>> folder = tempfile.mkdtemp()
    >>> with Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(7, {"table": torch.arange(6.0).reshape(3, 2)}, {"epoch": 1})
    'step-000000007'
    >>> right_half = torch.zeros(3, 1)
    >>> Checkpoints(folder).load({"table": Shards((3, 2), (((0, 1), right_half),))})
    {'epoch': 1}
    >>> right_half.flatten().tolist()
    [1.0, 3.0, 5.0]
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        asynchronous: bool = False,
        log: Callable[[str], None] = LOGGER.warning,
    ) -> None:
        check_path("a folder for checkpoints", folder=folder)
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}: expected 1 or more")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.last: str | None = None
        self._log = log
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT)
        self._rank = dist.get_rank(self._group) if self._group else 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._rejected: set[str] = set()  # seals of those that `load` found damaged: they do not count as kept

    def save(
        self, step: int, tensors: Mapping[str, Tensor | Shards], state: dict[str, Any], *, needs: str | None = None
    ) -> str:
        """Write a checkpoint and return its name; then delete what `keep_last` does not keep.

        A save of a step that exists already is written beside it, as `step-000000300.2`, and is the newer one.

        Args:
            step: 0 or more.
            tensors: the same keys on every rank. A Tensor is the same on every rank; one of them writes it.
            state: what JSON can hold: numbers (NaN and infinities too), strings, lists and dictionaries with strings
                as keys. Rank 0's is written.
            needs: name of an earlier checkpoint without which this one is of no use, such as the one with the best
                weights so far. It is kept as long as this one is. What it needs itself does not matter: say so here if
                it does.

        Raises:
            CheckpointError: on every rank, with what went wrong on any: bad arguments, parts that overlap or leave
                gaps, a disk that is full. Earlier checkpoints are as they were. A failure of an asynchronous save
                is raised by the next `save`, `load`, `wait` or `close`.
        """
        self.wait()
        job = self._prepare(step, tensors, state, needs)
        if self._thread:
            copies = self._together(lambda: {place: part.to("cpu", copy=True) for place, part in job.parts.items()})
            self._pending = self._thread.submit(self._write, replace(job, parts=copies))
        else:
            self._write(job)
        self.last = job.folder.name
        return self.last

    def load(
        self,
        tensors: Mapping[str, Tensor | Shards],
        *,
        name: str | None = None,
        prefix: str = "",
        check: Callable[[dict[str, Any]], None] = lambda state: None,
    ) -> dict[str, Any] | None:
        """Copy the newest good checkpoint into `tensors` and return its state; None if none was ever saved.

        Good is one whose files, and those of the checkpoint that it needs, are what was written: all are verified
        before anything is copied. Damage is logged, and the next older checkpoint is taken.

        Args:
            tensors: their keys are those saved, or those of them that start with `prefix`.
            name: of the checkpoint to read: that one and no other, whether what it needs is sound or not.
            prefix: for a part of a checkpoint, such as a model without its optimiser.
            check: gets the state before any tensor is looked at, and raises if the checkpoint is not the caller's.

        Raises:
            CheckpointError: none is good; that of `name` is damaged or absent; keys, shapes or dtypes differ.
        """
        self.wait()
        wanted = self._together(lambda: tensor_files.all_shards(tensors))
        found = self._first(self._find)
        if name is not None:
            manifest = self._sound(name, *(found or ([], [])))
        elif found is None:
            return None
        else:
            manifest = self._newest_good(*found)
            self.last = manifest.folder.name
        path = manifest.folder / "state.json"
        state = self._first(lambda: cast("dict[str, Any]", json.loads(path.read_bytes())))
        check(state)
        saved = self._together(lambda: tensor_files.read_index(manifest.folder, wanted, prefix))
        self._together(lambda: tensor_files.read_tensors(manifest.folder, manifest.files, saved, wanted))
        return state

    def wait(self) -> None:
        """Wait until an asynchronous save is on disk.

        Raises:
            CheckpointError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        """`wait`, then end the thread and the process group."""
        try:
            self.wait()
        finally:
            if self._thread:
                self._thread.shutdown()
            if self._group and dist.is_initialized():
                dist.destroy_process_group(self._group)
            self._thread = self._group = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this rank; what fails on one rank is raised on all."""
        error = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        said = str(error) if isinstance(error, CheckpointError) else repr(error) if error else None
        failed = {rank: each for rank, each in enumerate(self._gather(said)) if each is not None}
        if failed:
            alone = self._group is None
            raise CheckpointError(
                "; ".join(each if alone else f"rank {rank}: {each}" for rank, each in failed.items())
            ) from error
        return result

    def _first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank."""
        mine = self._together(lambda: work() if self._rank == 0 else None)
        return cast(T, self._gather(mine)[0])

    def _report(self, complaints: list[str]) -> None:
        if self._rank == 0:
            for complaint in complaints:
                self._log(complaint)

    def _prepare(
        self, step: int, tensors: Mapping[str, Tensor | Shards], state: dict[str, Any], needs: str | None
    ) -> _Job:
        if self._group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise CheckpointError("the process group is younger than this object (or it is closed): make a new one")
        shards = self._together(lambda: tensor_files.all_shards(tensors))
        encoded = self._first(lambda: _encode_state(state))
        ranks = self._gather(((step, needs), tensor_files.wish(shards)))
        for rank, (told, _) in enumerate(ranks):
            if told != ranks[0][0]:
                raise CheckpointError(f"step and needs are {ranks[0][0]} on rank 0, but {told} on rank {rank}")
        parts, index = tensor_files.share_out([its_wish for _, its_wish in ranks], self._rank, shards)
        folder, save = self._first(lambda: self._begin(step, needs))
        needed = tensor_files.num_bytes_of(index) + len(encoded) + 4096  # MANIFEST and the folder
        free = min(self._gather(self._together(lambda: shutil.disk_usage(self.folder).free)))
        if needed > free:
            raise CheckpointError(_disk_full(self.folder, needed, free))
        return _Job(step, needs, folder, save, encoded, parts, index, needed)

    def _begin(self, step: int, needs: str | None) -> tuple[Path, int]:
        """Clear away what a killed save left; choose the folder and the number of the save."""
        if type(step) is not int or not 0 <= step < 10**9:
            raise CheckpointError(f"step is {step!r}: expected an int from 0 to 999999999")
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            _sync_folder(self.folder.parent)
        for left in [*self.folder.glob(".step-*"), *self.folder.glob(".LATEST*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        manifests, damages = self._scan()
        try:
            latest = self._latest()
        except Damage as damage:
            latest = None
            damages.append(str(damage))
        self._report([f"{damage}; it is left alone" for damage in damages])
        if needs is not None and needs not in (names := [manifest.folder.name for manifest in manifests]):
            raise CheckpointError(
                f"needs is {needs!r}, which is missing from {self.folder} or damaged: expected one of {sorted(names)}"
            )
        suffixes = itertools.chain([""], (f".{i}" for i in itertools.count(2)))
        folders = (self.folder / f"step-{step:09d}{suffix}" for suffix in suffixes)
        folder = next(each for each in folders if not each.exists())
        save = 1 + max([m.save for m in manifests] + ([latest["save"]] if latest else []), default=0)
        return folder, save

    def _write(self, job: _Job) -> None:
        hidden = job.folder.with_name(f".{job.folder.name}.partial")
        try:
            self._first(lambda: self._disk(job, hidden.mkdir))
            written = self._together(
                lambda: self._disk(job, lambda: tensor_files.write_tensors(hidden, self._rank, job.parts))
            )
            everything = self._gather(written)
            self._first(lambda: self._disk(job, lambda: self._commit(job, hidden, everything)))
        except CheckpointError:
            self._first(lambda: shutil.rmtree(hidden) if hidden.exists() else None)
            raise
        self._first(self._delete_old)

    def _disk(self, job: _Job, work: Callable[[], T]) -> T:
        """`work`, with the numbers that help when the disk is full."""
        try:
            return work()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            free = shutil.disk_usage(self.folder).free
            raise CheckpointError(f"{_disk_full(self.folder, job.needed, free)} ({error})") from error

    def _commit(self, job: _Job, hidden: Path, written: list[Written]) -> None:
        """Complete the folder, give it its name, and move LATEST."""
        files: dict[str, tuple[int, str]] = {}
        starts: dict[Place, tuple[str, int]] = {}
        for its_files, its_starts in written:
            files |= its_files
            starts |= its_starts
        files["tensors.json"] = write_new(hidden / "tensors.json", [tensor_files.encode_index(job.index, starts)])
        files["state.json"] = write_new(hidden / "state.json", [job.state])
        name = job.folder.name
        manifest = {"format": FORMAT, "folder": name, "step": job.step, "save": job.save, "needs": job.needs}
        seal = write_sealed(hidden / "MANIFEST", {**manifest, "files": files})
        _sync_folder(hidden)
        hidden.rename(job.folder)
        _sync_folder(self.folder)
        latest = {"format": FORMAT, "folder": name, "step": job.step, "save": job.save, "manifest": seal}
        unnamed = self.folder / ".LATEST.partial"
        write_sealed(unnamed, latest)
        unnamed.replace(self.folder / "LATEST")
        _sync_folder(self.folder)

    def _delete_old(self) -> None:
        manifests, _ = self._scan()
        good = [manifest for manifest in manifests if manifest.seal not in self._rejected]
        kept = good[: self.keep_last]
        oldest = kept[-1].save
        if self.keep_last > 1:  # these would be lost together
            shared, there = set.intersection(*map(_stands_on, kept)), {manifest.folder.name for manifest in good}
            kept += [each for each in good if not shared & _stands_on(each) and _stands_on(each) <= there][:1]
        names = set().union(*map(_stands_on, kept))
        for manifest in manifests:
            if manifest.save < oldest and manifest.folder.name not in names:
                hidden = manifest.folder.with_name(f".{manifest.folder.name}.deleted")
                manifest.folder.rename(hidden)  # so that a kill leaves no half of a step
                shutil.rmtree(hidden)

    def _scan(self) -> tuple[list[_Manifest], list[str]]:
        """The manifests, newest save first, and what is wrong with those that cannot be read."""
        manifests, damages = [], []
        for folder in sorted(self.folder.glob("step-*")):
            try:
                manifests.append(_read_manifest(folder))
            except Damage as damage:
                damages.append(str(damage))
        return sorted(manifests, key=lambda manifest: (manifest.save, manifest.step), reverse=True), damages

    def _latest(self) -> dict[str, Any] | None:
        """What LATEST says; None if there is none."""
        path = self.folder / "LATEST"
        if not path.exists():
            return None
        latest, _ = _read_sealed(path)
        if not {"folder", "save", "manifest"} <= latest.keys():
            raise Damage(f"{path.name}: not written by this version")
        if not is_entry(latest["folder"]):
            raise Damage(f"{path.name}: names {latest['folder']!r}, which does not lie in the folder")
        return latest

    def _find(self) -> tuple[list[_Manifest], list[str]] | None:
        """The checkpoints, newest first, and all that is wrong in the folder; None if nothing was ever saved."""
        manifests, complaints = self._scan()
        latest = None
        try:
            latest = self._latest()
            if latest is None:
                if not manifests and not complaints:
                    return None
                complaints.append("LATEST: missing")
        except Damage as damage:
            complaints.append(str(damage))
        if latest:
            named = self.folder / latest["folder"]
            if not named.exists():
                complaints.append(f"{named.name}: missing, though LATEST names it")
            for manifest in [m for m in manifests if m.folder == named and m.seal != latest["manifest"]]:
                complaints.append(f"{named.name}/MANIFEST: not the one that LATEST names, but of another checkpoint")
                manifests.remove(manifest)
            complaints += [
                f"LATEST: names {named.name}, but {manifest.folder.name} is newer (LATEST is old, or a save was killed)"
                for manifest in manifests
                if manifest.save > latest["save"]
            ]
        return manifests, complaints

    def _newest_good(self, manifests: list[_Manifest], complaints: list[str]) -> _Manifest:
        """The first that is sound and needs nothing that is not."""
        self._report(complaints)
        by_name = {manifest.folder.name: manifest for manifest in manifests}
        good: dict[str, bool] = {}

        def is_good(name: str) -> bool:
            if name not in good:
                damages = self._verify(by_name[name]) if name in by_name else [f"{name}: missing or damaged"]
                self._report(damages)
                complaints.extend(damages)
                good[name] = not damages
                if damages and name in by_name:
                    self._rejected.add(by_name[name].seal)
            return good[name]

        for manifest in manifests:
            if is_good(manifest.folder.name):
                if manifest.needs is None or is_good(manifest.needs):
                    return manifest
                complaints.append(f"{manifest.folder.name}: of no use without {manifest.needs}")
                self._report(complaints[-1:])
                self._rejected.add(manifest.seal)
        raise CheckpointError(
            f"no good checkpoint in {self.folder}: {'; '.join(complaints)}. Delete the folder to start anew"
        )

    def _sound(self, name: str, manifests: list[_Manifest], complaints: list[str]) -> _Manifest:
        """The one of that name."""
        for manifest in manifests:
            if manifest.folder.name == name:
                if damages := self._verify(manifest):
                    raise CheckpointError(f"{self.folder}/{name} is damaged: {'; '.join(damages)}")
                return manifest
        damages = [damage for damage in complaints if damage.startswith((f"{name}/", f"{name}:"))]
        why = "; ".join(damages) or f"there are {sorted(manifest.folder.name for manifest in manifests)}"
        raise CheckpointError(f"no checkpoint {name!r} in {self.folder}: {why}")

    def _verify(self, manifest: _Manifest) -> list[str]:
        """How files differ from the manifest: each rank looks at some, all are told."""
        ranks = dist.get_world_size(self._group) if self._group else 1
        names = sorted(manifest.files, key=lambda name: manifest.files[name])[self._rank :: ranks]
        checked = self._together(lambda: [_damage(manifest.folder / name, *manifest.files[name]) for name in names])
        return [damage for damage in itertools.chain(*self._gather(checked)) if damage]


def _damage(path: Path, num_bytes: int, sha256: str) -> str | None:
    """How a file differs from what was written; None if it does not."""
    damage = damage_of(path, num_bytes, ((0, sha256),))
    return damage and f"{path.parent.name}/{path.name}: {damage}"


def _read_sealed(path: Path) -> tuple[dict[str, Any], str]:
    return read_sealed(path, path.name if path.name == "LATEST" else f"{path.parent.name}/{path.name}", FORMAT)


def _read_manifest(folder: Path) -> _Manifest:
    value, seal = _read_sealed(folder / "MANIFEST")
    try:
        if value["folder"] != folder.name:
            raise Damage(f"{folder.name}/MANIFEST: that of {value['folder']}")
        files = {name: (num_bytes, sha256) for name, (num_bytes, sha256) in value["files"].items()}
        manifest = _Manifest(folder, seal, value["step"], value["save"], value["needs"], files)
    except (KeyError, TypeError, ValueError) as error:
        raise Damage(f"{folder.name}/MANIFEST: not written by this version: {error!r}") from error
    if not {"tensors.json", "state.json"} <= files.keys() or not all(map(is_entry, files)):
        raise Damage(f"{folder.name}/MANIFEST: not written by this version: it lists {sorted(files)}")
    for path in (folder, *(folder / name for name in files)):
        if path.is_symlink():  # of which nothing is followed, whoever made the folder
            raise Damage(
                f"{folder.name}/MANIFEST: {path.name} is a link, and none is written: copy the files themselves"
            )
    return manifest


def _stands_on(manifest: _Manifest) -> set[str]:
    """Itself and what it needs."""
    return {manifest.folder.name} | ({manifest.needs} if manifest.needs else set())


def _encode_state(state: object) -> bytes:
    _check_plain(state, "state")
    return json.dumps(state).encode()


def _check_plain(value: object, where: str) -> None:
    """Raise for what JSON would give back as something else, or not at all."""
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: expected strings as keys, got {key!r}")
            _check_plain(each, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for i, each in enumerate(value):
            _check_plain(each, f"{where}[{i}]")
    elif not isinstance(value, str | int | float | None):
        raise CheckpointError(
            f"{where}: expected numbers, strings, lists and dictionaries, got {type(value).__name__}; "
            "tensors go into `tensors`"
        )


def _disk_full(folder: Path, needed: int, free: int) -> str:
    return f"no room in {folder}: a checkpoint needs {needed} bytes, {free} are free; earlier ones are as they were"


def _sync_folder(folder: Path) -> None:
    """Make names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
