"""Tensors in files: how those that are cut into parts over the ranks are planned, written and read under another cut.

tensors-RANK.bin holds the parts that a rank wrote, one after another, row by row; tensors.json says of every tensor
what it is and where its parts are. `ctrlib.training.checkpoint` says which of these files belong together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ctrlib.errors import CtrlibError
from ctrlib.manifest import write_new
from ctrlib.sharding.shards import Shards

Place = tuple[str, tuple[int, ...]]  # key and offsets: names one part among all ranks'
Asked = dict[str, tuple[tuple[int, ...], torch.dtype | None]]  # what a rank takes each tensor for
Index = dict[str, TensorStorageMetadata]  # the parts of every tensor
Written = tuple[dict[str, tuple[int, str]], dict[Place, tuple[str, int]]]  # files, and where in them each part starts

BLOCK = 1 << 24  # bytes copied or read at a time: a table is never held twice


class CheckpointError(CtrlibError, RuntimeError):
    """A checkpoint could not be written, or none could be read; the message says why and what to do."""


def all_shards(tensors: Mapping[str, Tensor | Shards]) -> dict[str, Shards]:
    """Every tensor as parts: one that is whole, and the same on every rank, is one part."""
    return {key: _as_shards(key, value) for key, value in tensors.items()}


def _as_shards(key: str, value: Tensor | Shards) -> Shards:
    if not isinstance(key, str):
        raise CheckpointError(f"expected strings as keys, got {key!r}")
    if isinstance(value, Shards):
        return value
    if not isinstance(value, Tensor) or hasattr(value, "to_local") or hasattr(value, "local_shards"):
        raise CheckpointError(
            f"{key}: expected a Tensor, or Shards of the local parts of a distributed one, got {type(value).__name__}"
        )
    try:
        return Shards(tuple(value.shape), (((0,) * value.dim(), value),))
    except ValueError as error:
        raise CheckpointError(f"{key}: {error}") from error


def _is_kept(shards: Shards, part: Tensor) -> bool:
    """Parts with no elements are not written, since they share their offsets with their neighbour's; unless all are."""
    return part.numel() > 0 or math.prod(shards.size) == 0


def wish(shards: Mapping[str, Shards]) -> tuple[Asked, SavePlan]:
    """What this rank would write: every part that it holds."""
    items = [
        WriteItem(
            MetadataIndex(key, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size(offsets), part.shape),
                TensorProperties(dtype=part.dtype),
                torch.Size(each.size),
            ),
        )
        for key, each in shards.items()
        for offsets, part in each.parts
        if _is_kept(each, part)
    ]
    return {key: (tuple(each.size), each.dtype) for key, each in shards.items()}, SavePlan(items)


def share_out(
    wishes: Sequence[tuple[Asked, SavePlan]], rank: int, shards: Mapping[str, Shards]
) -> tuple[dict[Place, Tensor], Index]:
    """From what all ranks hold, what this one writes, and the parts of every tensor.

    Raises:
        CheckpointError: ranks ask for other tensors than rank 0, or parts overlap or leave gaps.
    """
    asked = wishes[0][0]
    for other, (its_asked, _) in enumerate(wishes):
        if odd := sorted(its_asked.keys() ^ asked.keys()):
            raise CheckpointError(f"ranks 0 and {other} save different keys: only one of them has {odd}")
        for key, (size, dtype) in its_asked.items():
            size_0, dtype_0 = asked[key]
            if size != size_0 or (dtype and dtype_0 and dtype != dtype_0):
                raise CheckpointError(f"{key} is {size_0} {dtype_0} on rank 0, but {size} {dtype} on rank {other}")
    try:
        planner = DefaultSavePlanner(flatten_state_dict=False)
        plans, metadata = planner.create_global_plan([plan for _, plan in wishes])
    except ValueError as error:
        raise CheckpointError(f"parts of one tensor overlap or leave gaps: {error}") from error
    index = cast("Index", metadata.state_dict_metadata)
    for key, (size, _) in asked.items():
        covered = sum(math.prod(chunk.sizes) for chunk in index[key].chunks) if key in index else None
        if covered != math.prod(size):  # the planner looks for gaps at two ranks and more
            raise CheckpointError(f"{key}: the parts hold {covered or 0} of {math.prod(size)} elements of {size}")
    mine = {(item.index.fqn, tuple(item.index.offset or ())) for item in plans[rank].items}
    parts = {
        (key, tuple(offsets)): part.detach()
        for key, each in shards.items()
        for offsets, part in each.parts
        if (key, tuple(offsets)) in mine and _is_kept(each, part)
    }
    return parts, index


def num_bytes_of(index: Index) -> int:
    """Of all tensors of all ranks, and about as many as tensors.json takes."""
    num_parts = sum(len(tensor.chunks) for tensor in index.values())
    return 256 * num_parts + sum(math.prod(tensor.size) * tensor.properties.dtype.itemsize for tensor in index.values())


def encode_index(index: Index, starts: Mapping[Place, tuple[str, int]]) -> bytes:
    """tensors.json; `starts` says in which file each part is, and where."""
    content = {}
    for key, tensor in index.items():
        parts = [
            {"offsets": list(chunk.offsets), "shape": list(chunk.sizes), "file": file, "start": start}
            for chunk in tensor.chunks
            for file, start in [starts[key, tuple(chunk.offsets)]]
        ]
        content[key] = {"dtype": _name(tensor.properties.dtype), "size": list(tensor.size), "parts": parts}
    return json.dumps(content).encode()


def read_index(folder: Path, wanted: Mapping[str, Shards], prefix: str) -> dict[str, Any]:
    """tensors.json, which must be about the wanted tensors.

    Raises:
        CheckpointError: of those whose keys start with `prefix`, it has others, or of other sizes or dtypes.
    """
    saved: dict[str, Any] = json.loads((folder / "tensors.json").read_bytes())
    keys = {key for key in saved if key.startswith(prefix)}
    problems = [f"{key} is saved, but not asked for" for key in sorted(keys - wanted.keys())]
    problems += [f"{key} is asked for, but not saved" for key in sorted(wanted.keys() - keys)]
    for key in sorted(keys & wanted.keys()):
        size, dtype = tuple(saved[key]["size"]), saved[key]["dtype"]
        if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise CheckpointError(f"{folder}: {key} is saved as {dtype!r}, which is no kind of number")
        each = wanted[key]
        if tuple(each.size) != size:
            problems.append(f"{key} is saved as {size}, but asked for as {tuple(each.size)}")
        if each.dtype not in (None, getattr(torch, dtype)):
            problems.append(f"{key} is saved as {dtype}, but asked for as {_name(each.dtype)}")
    if problems:
        raise CheckpointError(f"{folder} is of another model: {'; '.join(problems)}")
    return saved


def read_tensors(folder: Path, files: Container[str], saved: Mapping[str, Any], wanted: Mapping[str, Shards]) -> None:
    """Copy what is wanted out of the files, which must be among those that were verified.

    Raises:
        CheckpointError: a file is not, or it ends too early.
    """
    for key, shards in wanted.items():
        parts = saved[key]["parts"]
        local = [(offsets, part.detach()) for offsets, part in shards.parts if part.numel()]
        for item in create_read_items_for_chunk_list(
            key,
            TensorStorageMetadata(
                TensorProperties(dtype=getattr(torch, saved[key]["dtype"])),
                torch.Size(shards.size),
                [ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["shape"])) for part in parts],
            ),
            [ChunkStorageMetadata(torch.Size(offsets), part.shape) for offsets, part in local],
        ):
            part = parts[item.storage_index.index]
            if part["file"] not in files:
                raise CheckpointError(f"{folder}: {key} lies in {part['file']}, which is not in MANIFEST")
            _, target = local[cast(int, item.dest_index.index)]
            for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths)):
                target = target.narrow(dim, offset, length)
            _read_part(folder / part["file"], part["start"], part["shape"], item.storage_offsets, target)


def write_tensors(folder: Path, rank: int, parts: Mapping[Place, Tensor]) -> Written:
    """Write what this rank has to."""
    name = f"tensors-{rank}.bin"
    starts, start = {}, 0
    for place, part in parts.items():
        starts[place] = (name, start)
        start += part.nbytes
    blocks = (block for part in parts.values() for block in _blocks(part))
    return ({name: write_new(folder / name, blocks)} if parts else {}), starts


def _blocks(part: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, some rows at a time: only those are copied, off a GPU or out of a slice of columns."""
    rows = part if part.dim() else part.unsqueeze(0)
    row_bytes = rows.nbytes // max(1, len(rows))
    step = max(1, BLOCK // max(1, row_bytes))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        yield block.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _read_part(path: Path, start: int, shape: list[int], offsets: Iterable[int], target: Tensor) -> None:
    """Copy the box at `offsets` of a stored part, of the shape of `target`, into `target`."""
    if not shape:
        shape, offsets, target = [1], [0], target.unsqueeze(0)
    first, *others = offsets
    columns = tuple(slice(offset, offset + length) for offset, length in zip(others, target.shape[1:]))
    row_bytes = math.prod(shape[1:]) * target.dtype.itemsize
    with path.open("rb") as file:
        file.seek(start + first * row_bytes)
        step = max(1, BLOCK // row_bytes)
        for row in range(0, len(target), step):
            block = target[row : row + step]
            data = torch.empty(len(block) * row_bytes, dtype=torch.uint8)
            if file.readinto(data.numpy().data) != len(data):
                raise CheckpointError(f"{path} became shorter while it was read: the tensors are overwritten in part")
            block.copy_(data.view(target.dtype).view(len(block), *shape[1:])[(slice(None), *columns)])


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
