"""Towers made of towers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.joined import ScaledFields, own


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    shape = getattr(module, name, None)
    if not isinstance(shape, tuple):
        raise ArgumentError(
            f"{type(module).__name__} publishes no {name}: a tower must set it to a tuple in its constructor"
        )
    return shape


class Parallel(nn.Module):
    """Every tower sees the same fields; the outputs are concatenated in the order given.

    Shape: (B, F, D) -> (B, sum of the towers' H).

    Raises:
        ValueError: no tower is given, or the towers expect different shapes.

    >>> from ctrlib.towers.crossnet import CrossNetV2
    >>> from ctrlib.towers.mlp import MLP
    >>> Parallel(CrossNetV2((3, 4)), MLP((3, 4), hidden=(5,))).out_shape
    (17,)
    """

    reads_scaled_fields = True

    def __init__(self, *towers: nn.Module) -> None:
        super().__init__()
        shapes = [_shape(tower, "in_shape") for tower in towers]
        if not shapes or len(set(shapes)) > 1:
            raise ArgumentError(f"Parallel needs one or more towers of one input shape, got input shapes {shapes}")
        self.towers = nn.ModuleList(towers)
        self.in_shape = shapes[0]
        self.out_shape = (sum(_shape(tower, "out_shape")[0] for tower in towers),)

    def forward(self, x: Tensor | ScaledFields) -> Tensor:
        """(B, F, D) -> (B, H)."""
        return torch.cat(self.forward_parts(x), dim=1)

    def forward_parts(self, x: Tensor | ScaledFields) -> list[Tensor]:
        """What `forward` concatenates, for a head that can do without (`LinearHead.of_parts`)."""
        if not isinstance(x, ScaledFields):
            return [tower(x) for tower in self.towers]
        reads = [own(tower, "reads_scaled_fields") for tower in self.towers]
        written_out = None if all(reads) else x.written_out()
        return [tower(x if scaled else written_out) for tower, scaled in zip(self.towers, reads)]


class Stack(nn.Module):
    """Each tower reads the one before it.

    Shape: the first tower's input -> the last tower's output.

    Raises:
        ValueError: no tower is given, or a tower does not fit the one before it.

    >>> from ctrlib.towers.crossnet import CrossNetV2
    >>> from ctrlib.towers.mlp import MLP
    >>> Stack(CrossNetV2((3, 4)), MLP((12,), hidden=(5,))).out_shape
    (5,)
    """

    def __init__(self, *towers: nn.Module) -> None:
        super().__init__()
        if not towers:
            raise ArgumentError("Stack needs one or more towers, got none")
        for before, after in itertools.pairwise(towers):
            out_shape, in_shape = _shape(before, "out_shape"), _shape(after, "in_shape")
            if out_shape != in_shape:
                raise ArgumentError(
                    f"{type(after).__name__} expects input {in_shape}, but {type(before).__name__} before it gives "
                    f"{out_shape}: build it with in_shape={out_shape}"
                )
        self.towers = nn.ModuleList(towers)
        self.in_shape = _shape(towers[0], "in_shape")
        self.out_shape = _shape(towers[-1], "out_shape")

    def forward(self, x: Tensor) -> Tensor:
        """The first tower's input -> the last tower's output."""
        for tower in self.towers:
            x = tower(x)
        return x
