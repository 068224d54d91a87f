"""Search-based interest: Q. Pi et al., "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for
Click-Through Rate Prediction", CIKM 2020, https://arxiv.org/abs/2006.05639."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ctrlib.embeddings.sequence import keep_events, softmax_events, sum_events, to_events
from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear


class SIM(nn.Module):
    """u = attention(t, the `top_k` events j of largest r_j = <k_j, t>): search first, then attend to what it found.

    That is the soft search, exact. The hard one, r_j = 1 where event and target are of one category, is
    `Unit(same="category")`, with any encoder, this one included: of the events of that category, the closest ones.
    Kept events stay in their order; of equal scores the older event is kept.

    The paper's r_j are inner products after two learned projections, trained by an auxiliary click loss, with an
    approximate index in serving. Here the search compares the vectors that attention will compare, as later work does
    to keep the two stages consistent (TWIN, KDD 2023), and needs no training of its own. FuxiCTR's SIM takes padded
    events, whose score is 0, before real ones of negative score, and has a second attention over the recent events:
    make that a unit over a history of its own.

    Shape: target (B, C), values (N, C), offsets (B + 1) -> (B, C).

    >>> from ctrlib.embeddings.sequence import MeanPooling
    >>> events = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 9.0]])
    >>> SIM(MeanPooling(2), top_k=2)(torch.tensor([[1.0, 0.0]]), events, torch.tensor([0, 3])).tolist()
    [[2.5, 4.5]]
    """

    def __init__(self, attention: nn.Module, *, top_k: int = 50) -> None:
        super().__init__()
        if top_k < 1:
            raise ArgumentError(f"SIM attends to one or more events, got top_k={top_k}")
        self.attention, self.top_k = attention, top_k
        self.in_shape, self.out_shape = attention.in_shape, attention.out_shape

    def forward(self, target_BC: Tensor, values_NC: Tensor, offsets: Tensor) -> Tensor:
        """Histories -> (B, C)."""
        scores_N = (to_events(target_BC, offsets, values_NC.shape[0]) * values_NC).sum(1)
        encoded: Tensor = self.attention(
            target_BC, *keep_events(values_NC, offsets, top_events(scores_N, offsets, self.top_k))
        )
        return encoded


class TargetAttention(nn.Module):
    """u = W_O concat_h sum_j softmax_j(<W_Q^h t, W_K^h k_j> / sqrt(d)) W_V^h k_j: SIM's exact search unit.

    Values are projected and heads mixed as in FuxiCTR; the paper has neither. What is linear is moved from events to
    rows, which changes no result: <W_Q t, W_K k> = <W_K^T W_Q t, k>, and W_V goes behind the sum. No event passes
    through a matrix.

    Shape: target (B, C), values (N, C), offsets (B + 1) -> (B, C).

    >>> TargetAttention(4, num_heads=2)(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3, 3]))[1].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(self, dim: int, *, num_heads: int = 1, head_dim: int = 64) -> None:
        super().__init__()
        self.in_shape = self.out_shape = (dim,)
        self.num_heads, self.head_dim = num_heads, head_dim
        width = num_heads * head_dim
        self.query, self.key, self.value = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, dim, bias=False)
        init_linear(self)

    def forward(self, target_BC: Tensor, values_NC: Tensor, offsets: Tensor) -> Tensor:
        """Histories -> (B, C)."""
        num_events, (heads, dim) = values_NC.shape[0], (self.num_heads, self.in_shape[0])
        query_HBd = self.query(target_BC).view(-1, heads, self.head_dim).transpose(0, 1)
        query_BHC = (query_HBd @ self.key.weight.view(heads, self.head_dim, dim)).transpose(0, 1)
        scores_NH = (to_events(query_BHC, offsets, num_events) * values_NC.unsqueeze(1)).sum(2) / self.head_dim**0.5
        weights_NH = softmax_events(scores_NH, offsets)
        sums_B = sum_events((weights_NH.unsqueeze(2) * values_NC.unsqueeze(1)).flatten(1), offsets)
        sums_HBC = sums_B.view(-1, heads, dim).transpose(0, 1)
        heads_HBd = sums_HBC @ self.value.weight.view(heads, self.head_dim, dim).transpose(1, 2)
        out: Tensor = self.out(heads_HBd.transpose(0, 1).flatten(1))
        return out


def top_events(scores_N: Tensor, offsets: Tensor, k: int) -> Tensor:
    """Which events are among the k of largest score in their row: (N,) of bool.

    >>> top_events(torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.tensor([0, 3, 4]), 2).tolist()
    [False, True, True, True]
    """
    # Sorted by score, then stably by row: the rows come out as they were, and an event's place in its row is its rank.
    num_events = scores_N.shape[0]
    rows = to_events(torch.arange(offsets.shape[0] - 1, device=offsets.device), offsets, num_events)
    order = scores_N.detach().argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    rank = torch.arange(num_events, device=offsets.device) - offsets[rows]
    return torch.zeros_like(rank, dtype=torch.bool).scatter(0, order, rank < k)
