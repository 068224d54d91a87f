"""Fields as one vector, or as several: what a head of experts reads."""

from __future__ import annotations

from torch import Tensor, nn

from ctrlib.errors import ArgumentError


class Flatten(nn.Module):
    """The fields behind each other, and nothing else: for heads that bring networks of their own.

    Shape: (B, F, D) -> (B, F * D).

    >>> import torch
    >>> Flatten((2, 3))(torch.zeros(4, 2, 3)).shape
    torch.Size([4, 6])
    """

    def __init__(self, in_shape: tuple[int, int]) -> None:
        super().__init__()
        self.in_shape = tuple(in_shape)
        self.out_shape = (in_shape[0] * in_shape[1],)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (B, F * D)."""
        return x.flatten(1)


class Streams(nn.Module):
    """Wide fields cut into S streams of fields: tables of several tasks that are one table (see `ctrlib.heads.STEM`).

    Stream s holds columns s D to (s + 1) D of every field.

    Shape: (B, F, S * D) -> (S, B, F * D).

    Raises:
        ValueError: the width is no multiple of S.

    >>> import torch
    >>> tower = Streams((2, 6), num_streams=3)
    >>> tower.out_shape, tower(torch.arange(12.0).view(1, 2, 6))[1].tolist()
    ((3, 4), [[2.0, 3.0, 8.0, 9.0]])
    """

    def __init__(self, in_shape: tuple[int, int], *, num_streams: int) -> None:
        super().__init__()
        num_fields, width = in_shape
        if num_streams < 1 or width % num_streams:
            raise ArgumentError(
                f"fields of width {width} do not divide into {num_streams} streams: give the embedding a multiple of "
                f"{num_streams} as embedding_dim"
            )
        self.dim = width // num_streams
        self.in_shape = tuple(in_shape)
        self.out_shape = (num_streams, num_fields * width // num_streams)

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, S * D) -> (S, B, F * D)."""
        return x.view(-1, self.in_shape[0], self.out_shape[0], self.dim).permute(2, 0, 1, 3).flatten(2)
