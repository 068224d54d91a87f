"""Checksums of what lies in a folder, in one file that is written last: where it is, the folder is whole.

MANIFEST lies in prepared folders and model folders, and in each checkpoint (`ctrlib.training.checkpoint`). It is JSON
below a line with the sha256 of that JSON, its *seal*:

    {"format": 1, "kind": "prepared", "files": {"train/part-00000.parquet": [bytes, [[start, sha256], ...]], ...}}

A file is cut into parts, each with its first byte and its sha256: one part for the whole file, or, of parquet in a
split, one for each row group and the last for the footer, so that the loader checks what it reads when it reads it.
Two folders whose seals are equal hold the same bytes: a run is known by that of its data.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ctrlib.errors import check_path
from ctrlib.making import new_file, settle
from ctrlib.schema import Schema, SchemaError

LOGGER = logging.getLogger(__name__)
NAME = "MANIFEST"
CARD = "README.md"  # for people, who may write into it: no checksum is taken of it
FORMAT = 1
MISSING = "missing"
BLOCK = 1 << 24  # bytes hashed at a time
TAIL = 1 << 16  # last bytes of a file by which data without a manifest is known
# How what is damaged is made again.
MENDS = {
    "prepared": "ctrlib prepare ... --out {} --overwrite",
    "model": "ctrlib train ... --out {} --overwrite",
    "search": "ctrlib search ... --out {} --overwrite",
    "compress": "ctrlib compress ... --out {}",
    "retrieval": "ctrlib retrieve train ... --out {} --overwrite",
    "export": "ctrlib export ... --out {} --overwrite",
}

Parts = tuple[tuple[int, str], ...]  # first byte and sha256


ROWS = ("train", "valid", "test")  # parts of a prepared folder that may lie on another disk, behind a link


class Damage(Exception):
    """A file is not what was written: which, and how it differs."""


# ------------------------------------------------------------------------------------------------ files by themselves


def write_new(path: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file through to the disk; its bytes and sha256."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            num_bytes += len(block)
        file.flush()
        os.fsync(file.fileno())
    return num_bytes, digest.hexdigest()


def damage_of(path: Path, num_bytes: int, parts: Parts, wanted: Sequence[int] | None = None) -> str | None:
    """How a file differs from what was written; None if it does not. `wanted`: numbers of parts; all by default."""
    try:
        with path.open("rb", buffering=0) as file:
            if (found := os.fstat(file.fileno()).st_size) != num_bytes:
                return f"{found} bytes instead of {num_bytes}"
            for number in range(len(parts)) if wanted is None else wanted:
                number %= len(parts)
                start, expected = parts[number]
                stop = parts[number + 1][0] if number + 1 < len(parts) else num_bytes
                if _sha256(file, start, stop) != expected:
                    where = f" in bytes {start} to {stop}" if len(parts) > 1 else ""
                    return f"not what was written (its sha256 differs{where})"
    except OSError as error:
        return MISSING if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
    return None


def _sha256(file: BinaryIO | Any, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    file.seek(start)
    while start < stop and (block := file.read(min(BLOCK, stop - start))):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


def seal(value: dict[str, Any]) -> tuple[str, bytes]:
    """JSON below its sha256: the sha256, and all of it."""
    body = json.dumps(value, indent=1).encode()
    digest = hashlib.sha256(body).hexdigest()
    return digest, digest.encode() + b"\n" + body


def write_sealed(path: Path, value: dict[str, Any]) -> str:
    """Write JSON below its sha256, which is returned."""
    digest, content = seal(value)
    write_new(path, [content])
    return digest


def read_sealed(path: Path, name: str, version: int) -> tuple[dict[str, Any], str]:
    """What `write_sealed` wrote, and its sha256; `name` is what to call the file.

    Raises:
        Damage: it is missing, damaged, or of another version.
    """
    try:
        said, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise Damage(f"{name}: missing") from None
    except OSError as error:
        raise Damage(f"{name}: cannot be read: {error}") from error
    if hashlib.sha256(body).hexdigest().encode() != said:
        raise Damage(f"{name}: damaged (its first line is not the sha256 of the rest)")
    value: dict[str, Any] = json.loads(body)
    if value.get("format") != version:
        raise Damage(f"{name}: of format {value.get('format')}, this version reads {version}")
    return value, said.decode()


# ------------------------------------------------------------------------------------------- folders of somebody else


def inside(folder: str | Path, name: str) -> Path:
    """Where a file of a folder lies, which must be in it: a folder of somebody else's does not choose what is read.

    Raises:
        SchemaError: the name is absolute or leads up, or what has this name is a link that leads out.

    >>> inside("model", "vocab/item.parquet").as_posix()
    'model/vocab/item.parquet'
    >>> inside("model", "../x")
    Traceback (most recent call last):
        ...
    ctrlib.schema.SchemaError: model names '../x', which does not lie in it: whoever made it may not choose what is read
    """
    folder = Path(folder)
    if not _is_within(name):
        raise SchemaError(
            f"{folder} names {name!r}, which does not lie in it: whoever made it may not choose what is read"
        )
    path = folder / name
    if not (real := path.resolve()).is_relative_to(folder.resolve()):
        raise SchemaError(
            f"{path} is a link out of the folder, to {real}, and is not followed: if that is what you want, copy the "
            f"folder with the files themselves in it, such as by `cp -rL {folder} COPY`"
        )
    return path


def _is_within(name: object) -> bool:
    """Whether this names something in a folder, wherever that lies."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else [".."]
    return not {"", ".", ".."} & set(parts) and "\0" not in str(name)


def is_entry(name: object) -> bool:
    """Whether this names something in a folder itself, neither in one of its folders nor elsewhere.

    >>> is_entry("tensors-0.bin"), is_entry(".."), is_entry("vocab/item.parquet"), is_entry(None)
    (True, False, False, False)
    """
    return _is_within(name) and not set(str(name)) & {"/", "\\"}


def refuse_pickle(path: Path) -> None:
    """Say of a file that could not be read that it is a pickle, alone or as `torch.save` packs it, if it is one.

    Nothing of it is executed.

    Raises:
        SchemaError: as said.
    """
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except OSError:  # which whoever reads it says better
        return
    if start == b"PK" or (len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5):
        raise SchemaError(
            f"{path} is a pickle, or an archive as those that hold some, which may run code when it is opened: it is "
            "not opened; copy the folder again, as ctrlib wrote it"
        )


# ------------------------------------------------------------------------------------------------------------ folders


@dataclass(frozen=True)
class Manifest:
    """What MANIFEST says of a folder: its seal, and name -> bytes and parts of the files."""

    folder: Path
    kind: str
    seal: str
    files: dict[str, tuple[int, Parts]]

    def check(self, name: str, parts: Sequence[int] | None = None) -> None:
        """Refuse a file, or some parts of it, that are not what was written.

        Raises:
            SchemaError: as said.
        """
        if name.partition("/")[0] not in ROWS:
            inside(self.folder, name)
        if name not in self.files:
            raise SchemaError(f"{self.folder / name} is not in {self.folder / NAME}: {self._cure()}")
        if damage := damage_of(self.folder / name, *self.files[name], parts):
            said = "is missing" if damage == MISSING else f"is damaged: {damage}"
            raise SchemaError(f"{self.folder / name} {said}: {self._cure()}")

    def under(self, part: str) -> list[str]:
        """The files of a subfolder, by name."""
        return sorted(name for name in self.files if name.startswith(f"{part}/"))

    def _cure(self) -> str:
        mend = MENDS.get(self.kind, MENDS["prepared"]).format(self.folder)
        return (
            f"copy the folder again, or make it again with `{mend}`. If it was changed on purpose, "
            f"`ctrlib.manifest.write_manifest({str(self.folder)!r})` takes it as it is"
        )


def manifest_of(folder: str | Path) -> Manifest | None:
    """The manifest of a prepared folder or a model folder; None if whoever wrote it wrote none, which is said once.

    Raises:
        SchemaError: it is damaged, or missing though the folder had one.
    """
    folder = Path(folder)
    settle(folder)
    try:
        value, digest = read_sealed(folder / NAME, NAME, FORMAT)
        files = {
            name: (num_bytes, tuple((start, sha256) for start, sha256 in parts))
            for name, (num_bytes, parts) in value["files"].items()
        }
        if outside := [name for name in files if not _is_within(name)]:
            raise Damage(f"it names {outside[0]!r}, which does not lie in the folder")
        return Manifest(folder, value["kind"], digest, files)
    except (Damage, KeyError, TypeError, ValueError, AttributeError) as error:
        if (folder / NAME).exists():
            kind = "model" if (folder / "model.json").exists() else "prepared"
            cure = Manifest(folder, kind, "", {})._cure()
            raise SchemaError(f"{folder / NAME} is of no use ({error!s}): {cure}") from error
    if _had_one(folder):
        kind = "model" if (folder / "model.json").exists() else "prepared"
        raise SchemaError(
            f"{folder / NAME} is missing, and it is written last: the folder is not whole, since its writer or a copy "
            f"was stopped; {Manifest(folder, kind, '', {})._cure()}"
        )
    if (folder / "schema.json").is_file():
        _say_once(str(folder))
    return None


@functools.cache
def _say_once(folder: str) -> None:
    LOGGER.warning(
        "%s has no %s, so damage to its files would go unnoticed; ctrlib.manifest.write_manifest(%r) writes one",
        folder,
        NAME,
        folder,
    )


def _had_one(folder: Path) -> bool:
    try:
        found = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and bool(found.get("manifest"))


def write_manifest(folder: str | Path, kind: str | None = None) -> str:
    """Write the MANIFEST of all that lies in a folder, but for README.md and what is hidden, and return its seal.

    For folders that other programs write, or that were changed on purpose. `kind` is one of `MENDS`; by default
    "model" where there is a model.json, else "prepared".

    Raises:
        SchemaError: a parquet file cannot be read.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "model.json").write_text("{}")
    >>> seal = write_manifest(folder)
    >>> _ = (folder / "model.json").write_text("[]")
    >>> try: check_file(folder, "model.json")
    ... except SchemaError as error: print(str(error).partition("model.json ")[2][:70])
    is damaged: not what was written (its sha256 differs): copy the folder
    """
    folder = Path(folder)
    kind = kind or ("model" if (folder / "model.json").exists() else "prepared")
    files = {name: _parts_of(folder / name, name) for name in _names(folder)}
    digest, content = seal({"format": FORMAT, "kind": kind, "files": files})
    with new_file(folder / NAME) as making:
        making.write_bytes(content)
    return digest


def write_changed(folder: Path, making: Path) -> None:
    """Write, into `making`, the MANIFEST of a folder whose entries give way to those of `making`; none if it has none.

    Raises:
        SchemaError: that of the folder is damaged.
    """
    if (manifest := manifest_of(folder)) is None:
        return
    changed = {path.name for path in making.iterdir()}
    files = {name: entry for name, entry in manifest.files.items() if name.partition("/")[0] not in changed}
    files |= {name: _parts_of(making / name, name) for name in _names(making)}  # type: ignore[misc]
    _, content = seal({"format": FORMAT, "kind": manifest.kind, "files": dict(sorted(files.items()))})
    write_new(making / NAME, [content])


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        *folders, name = path.relative_to(folder).parts
        # Files of columns are called as these are, which may begin with a dot.
        may_be_hidden = [*folders, *([] if folders[:1] in (["vocab"], ["numbers"], ["events"]) else [name])]
        is_left_out = [*folders, name] in ([NAME], [CARD]) or any(part.startswith(".") for part in may_be_hidden)
        if path.is_file() and not is_left_out:
            yield "/".join([*folders, name])


def _parts_of(path: Path, name: str) -> tuple[int, list[tuple[int, str]]]:
    """Bytes and parts of a file as it is."""
    starts = [0]
    split = name.partition("/")[0]
    if path.suffix == ".parquet" and name.count("/") == 1 and split not in ("vocab", "numbers", "events"):
        starts = _row_groups(path)
    num_bytes = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        return num_bytes, [(start, _sha256(file, start, stop)) for start, stop in zip(starts, [*starts[1:], num_bytes])]


def _row_groups(path: Path) -> list[int]:
    """Where row groups begin, the first with what is before it, and the footer; just 0 if they are not in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata = file.metadata
            ends = [0]
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                starts, stop = [], 0
                for number in range(group.num_columns):
                    column = group.column(number)
                    start = column.data_page_offset
                    if column.has_dictionary_page:
                        start = min(start, column.dictionary_page_offset)
                    starts.append(start)
                    stop = max(stop, start + column.total_compressed_size)
                if not starts or min(starts) < ends[-1]:
                    raise SchemaError(f"{path}: row group {index} does not follow the one before it: write it again")
                ends.append(stop)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{path} cannot be read as parquet ({error}): copy or prepare it again") from error
    return ends


def check_file(folder: str | Path, name: str) -> None:
    """Refuse a file that lies outside of its folder, or is not what was written as far as a manifest says.

    Raises:
        SchemaError: as said.
    """
    inside(folder, name)
    manifest = manifest_of(folder)
    if manifest is not None:
        manifest.check(name)


def load_schema(folder: str | Path) -> Schema:
    """The schema of a prepared folder or a model folder, of which schema.json is what was written.

    Raises:
        SchemaError: there is none, or it is damaged.
    """
    check_path("a prepared folder", folder=folder)
    folder = Path(folder)
    if folder.is_dir():
        check_file(folder, "schema.json")
    return Schema.load(folder)


def check_folder(folder: str | Path) -> None:
    """Check all of a prepared folder but the rows of its splits, which the loader checks when it reads them.

    Raises:
        SchemaError: a file is damaged or missing.
    """
    if (manifest := manifest_of(folder)) is not None:
        for name, (_, parts) in manifest.files.items():
            manifest.check(name, None if len(parts) == 1 else (-1,))


def data_hash(folder: str | Path) -> str:
    """What the data of a prepared folder is known by: other rows have another one.

    That is the seal of its manifest. Of a folder without one it is made of the names, sizes and last bytes of its
    parquet files, which a change inside of a long one may leave as they are.

    Raises:
        SchemaError: the manifest is damaged.
    """
    folder = Path(folder)
    if (manifest := manifest_of(folder)) is not None:
        return manifest.seal
    digest = hashlib.sha256()
    for path in (path for path in sorted(folder.glob("*/*.parquet")) if path.is_file()):
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            digest.update(f"{path.relative_to(folder).as_posix()} {size} ".encode() + file.read())
    return digest.hexdigest()
