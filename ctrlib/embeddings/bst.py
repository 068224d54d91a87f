"""Behavior sequence transformer: Q. Chen et al., "Behavior Sequence Transformer for E-commerce Recommendation in
Alibaba", DLP-KDD 2019, https://arxiv.org/abs/1905.06874."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctrlib.embeddings.sequence import sum_events, to_events
from ctrlib.errors import ArgumentError
from ctrlib.layers import Dropout, LayerNorm, init_linear


class BST(nn.Module):
    """u = mean over target and history of x, after `num_layers` transformer blocks on x = [t; k_L; ...; k_1] + p.

    A block is S' = LayerNorm(x + MultiHead(x)), x = LayerNorm(S' + FFN(S')), the FFN of two linear layers
    of width C with LeakyReLU in between. Positions count back from the target (0), the newest event is 1, so that the
    same recency has the same vector in any history. Only the last `max_length` events count; use the feature's.

    `target_only`: the target's own output instead of the mean (FuxiCTR has both, and the mean by default; the paper
    concatenates all outputs, for histories of one length). Paper and FuxiCTR concatenate positions to the events, the
    paper's made of the time that has passed; here p is learned and added, which keeps the width C. The output for an
    empty history is zero, though a lone target could be transformed.

    Linear layers and norms see target and events only, as jagged rows; only the attention itself is padded.

    Shape: target (B, C), values (N, C), offsets (B + 1) -> (B, C).

    Raises:
        ValueError: the width does not divide into heads.

    >>> BST(4, max_length=3, num_heads=2)(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3, 3]))[1].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        dim: int,
        *,
        max_length: int,
        num_heads: int = 2,
        num_layers: int = 1,
        dropout: float = 0.0,
        target_only: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads or max_length < 1:
            raise ArgumentError(
                f"BST needs a width that is a multiple of num_heads and max_length of 1 or more, got width {dim}, "
                f"num_heads={num_heads}, max_length={max_length}"
            )
        self.in_shape = self.out_shape = (dim,)
        self.max_length, self.target_only = max_length, target_only
        # As small as the rows of the tables at the start, or they would drown them.
        self.positions = nn.Parameter(torch.randn(max_length + 1, dim) * 1e-4)
        self.blocks = nn.ModuleList(_Block(dim, num_heads=num_heads, dropout=dropout) for _ in range(num_layers))

    def forward(self, target_BC: Tensor, values_NC: Tensor, offsets: Tensor) -> Tensor:
        """Histories -> (B, C)."""
        num_rows, num_events, size = target_BC.shape[0], values_NC.shape[0], self.max_length + 1
        device, end_B1 = offsets.device, offsets[1:].unsqueeze(1)
        rows_B = torch.arange(num_rows, device=device)
        rows_N = to_events(rows_B, offsets, num_events)
        distance_N = offsets[1:][rows_N] - torch.arange(num_events, device=device)
        counts_N = distance_N < size

        # Jagged: all events, then all targets. Padded: (row, distance from the target). Each knows where the other is;
        # -1 where it has no counterpart.
        cells_B = rows_B * size
        cell_of_event = torch.where(counts_N, rows_N * size + distance_N, -1)
        jagged_to_padded = torch.cat([cell_of_event, cells_B])
        back = torch.arange(1, size, device=device)
        events_BL = torch.where(back <= offsets.diff().unsqueeze(1), end_B1 - back, -1)
        padded_to_jagged = torch.cat([num_events + rows_B.unsqueeze(1), events_BL], dim=1)

        x = torch.cat(
            [
                values_NC + F.embedding(distance_N.clamp(max=size - 1), self.positions),
                target_BC + self.positions[0],
            ]
        )
        for block in self.blocks:
            x = block(x, padded_to_jagged, jagged_to_padded)
        outputs_NC, target_BC = x.split_with_sizes([num_events, num_rows])
        counted_B1 = offsets.diff().clamp(max=self.max_length).unsqueeze(1)
        if not self.target_only:
            target_BC = (target_BC + sum_events(outputs_NC * counts_N.unsqueeze(1), offsets)) / (counted_B1 + 1)
        return torch.where(counted_B1 > 0, target_BC, 0.0)


class _Block(nn.Module):
    """Self-attention and feed-forward network, both with residual and norm, on jagged rows."""

    def __init__(self, dim: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(), nn.Linear(dim, dim))
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in range(2))
        self.dropout = Dropout(dropout)
        init_linear(self)

    def forward(self, x: Tensor, padded_to_jagged: Tensor, jagged_to_padded: Tensor) -> Tensor:
        size, dim = padded_to_jagged.shape[1], x.shape[1]
        cells = padded_to_jagged.flatten()
        padded = take(self.query_key_value(x), cells, jagged_to_padded).view(
            -1, size, 3, self.num_heads, dim // self.num_heads
        )
        query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, size, head width)
        mask = (padded_to_jagged >= 0).unsqueeze(1).unsqueeze(2)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        attended = take(attended.transpose(1, 2).reshape(-1, dim), jagged_to_padded, cells)
        x = self.norms[0](x + self.dropout(self.out(attended)))
        out: Tensor = self.norms[1](x + self.dropout(self.feed_forward(x)))
        return out


def take(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """x[index], zero where the index is -1. `inverse[index[i]] = i` and the other way round, -1 where there is none.

    >>> take(torch.tensor([[5.0], [6.0]]), torch.tensor([1, -1, 0]), torch.tensor([2, 0])).tolist()
    [[6.0], [0.0], [5.0]]
    """
    taken: Tensor = _Take.apply(x, index, inverse)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """With the inverse at hand the gradient is a look-up too, where autograd would add up rows one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return F.pad(x, (0, 0, 0, 1)).index_select(0, index % (x.shape[0] + 1))  # -1 is the row of zeros at the end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return F.pad(grad, (0, 0, 0, 1)).index_select(0, inverse % (grad.shape[0] + 1)), None, None
