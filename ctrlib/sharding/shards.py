"""Tensors that are divided among processes: the parts that one of them holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrlib.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class Shards:
    """The parts of one global tensor that this rank holds: maybe all of it, maybe none.

    Args:
        size: shape of the global tensor.
        parts: (offsets, tensor) each, with an offset per dimension of `size`; views are fine, on any device. Parts
            with no elements are fine too.

    Raises:
        ValueError: a part lies outside of `size`, or dtypes differ.

    >>> table = torch.arange(12.0).reshape(3, 4)
    >>> Shards((3, 4), (((0, 0), table[:, :2]), ((0, 2), table[:, 2:]))).dtype
    torch.float32
    >>> Shards((3, 4), (((2, 0), table[:2]),))
    Traceback (most recent call last):
    ctrlib.errors.ArgumentError: a part of shape (2, 4) at (2, 0) lies outside of a tensor of (3, 4)
    """

    size: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Tensor], ...]

    def __post_init__(self) -> None:
        for offsets, part in self.parts:
            inside = len(offsets) == part.dim() == len(self.size) and all(
                0 <= offset <= offset + length <= limit for offset, length, limit in zip(offsets, part.shape, self.size)
            )
            if not inside:
                raise ArgumentError(
                    f"a part of shape {tuple(part.shape)} at {tuple(offsets)} lies outside of a tensor of "
                    f"{tuple(self.size)}"
                )
            if part.layout != torch.strided or part.is_meta or part.is_quantized:
                raise ArgumentError(f"expected a dense tensor that holds data, got {part.layout} on {part.device}")
        if len(dtypes := {part.dtype for _, part in self.parts}) > 1:
            raise ArgumentError(f"the parts of one tensor have several dtypes: {sorted(map(str, dtypes))}")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the parts; None where this rank has none."""
        return self.parts[0][1].dtype if self.parts else None


# What a model, or an engine, remembers: named tensors, whole or divided.
State = dict[str, Tensor | Shards]
