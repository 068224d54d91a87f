"""Set attention with a pattern for each task, in the style of APEM: X. Tao et al., "Adaptive Pattern Extraction
Multi-Task Learning for Multi-Step Conversion Estimations", https://arxiv.org/abs/2301.02494.

The set attention is that of J. Lee et al., "Set Transformer", ICML 2019, https://arxiv.org/abs/1810.00825.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError
from ctrlib.layers import LayerNorm, init_linear


class APEM(nn.Module):
    """Fields -> groups -> patterns, of which each task selects its own:  r_t = [sum_p alpha_tp P_p ; W_0 flat(X)].

    Every block X <- X + a * X' reads the fields through m learned groups (`SetAttention`) and weighs them by
    squeeze and excitation, a = sigmoid(W_2 relu(W_1 mean_d X')). Patterns P are the last block's groups and the mean
    field. Task t's indicator u_t(x) = u_t + M_t mean_f X selects with
    alpha_t = softmax_p(<W_q u_t(x), W_k P_p> / (temperature sqrt(D))).

    In front of `ctrlib.heads.ESMM`, whose chain of steps is the paper's setting, or of any other head.

    "Style", since the paper gives the idea and there is no public code. Ours are: groups as inducing points (not heads
    or hard assignments), the residual around squeeze and excitation (ratio 4), the mean field as one more pattern
    (unless `mean_pattern` is false), the sum in u_t(x), soft selection, and the path W_0 of width `skip_dim` beside the
    patterns (0: none). Nothing keeps tasks from selecting the same pattern: look at `gate_weights`.

    The order of fields matters (to squeeze and excitation, and W_0): it is the schema's.

    Shape: (B, F, D) -> (T, B, D + skip_dim).

    Raises:
        ValueError: D is no multiple of `num_heads`, or a number is below 1.

    >>> tower = APEM((5, 8), num_tasks=2, num_groups=3, skip_dim=4)
    >>> x = torch.randn(6, 5, 8)
    >>> tower.out_shape, tower(x).shape, tower.gate_weights(x).shape
    ((2, 12), torch.Size([2, 6, 12]), torch.Size([2, 6, 4]))
    """

    def __init__(
        self,
        in_shape: tuple[int, int],
        *,
        num_tasks: int,
        num_groups: int = 8,
        num_blocks: int = 1,
        num_heads: int = 2,
        temperature: float = 1.0,
        skip_dim: int = 64,
        mean_pattern: bool = True,
    ) -> None:
        super().__init__()
        num_fields, dim = in_shape
        if min(num_tasks, num_groups, num_blocks) < 1 or skip_dim < 0 or temperature <= 0:
            raise ArgumentError(
                "APEM needs one or more tasks, groups and blocks, a positive temperature and skip_dim of 0 or more, "
                f"got {num_tasks}, {num_groups}, {num_blocks}, {temperature} and {skip_dim}"
            )
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks, dim + skip_dim)
        self.mean_pattern = mean_pattern
        self.scale = 1 / (temperature * math.sqrt(dim))
        self.blocks = nn.ModuleList(
            _Block(num_fields, dim, num_groups=num_groups, num_heads=num_heads) for _ in range(num_blocks)
        )
        self.indicators = nn.Parameter(torch.randn(num_tasks, 1, dim))
        self.adapt = nn.Parameter(torch.randn(num_tasks, dim, dim) / math.sqrt(dim))
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.skip = nn.Linear(num_fields * dim, skip_dim) if skip_dim else None
        init_linear(self)

    def patterns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, D) -> what tasks select from, (B, m + 1, D), and the fields after all blocks, (B, F, D)."""
        for block in self.blocks:
            x, groups = block(x)
        return torch.cat([groups, x.mean(1, keepdim=True)], dim=1) if self.mean_pattern else groups, x

    def gate_weights(self, x: Tensor) -> Tensor:
        """The weight of every pattern for every task: (B, F, D) -> (T, B, m + 1), sums are 1."""
        return self._select(*self.patterns(x))

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) -> (T, B, D + skip_dim)."""
        patterns_BPD, x = self.patterns(x)
        chosen_TBD = torch.einsum("bpd,tbp->tbd", patterns_BPD, self._select(patterns_BPD, x))
        if self.skip is None:
            return chosen_TBD
        return torch.cat([chosen_TBD, self.skip(x.flatten(1)).expand(self.out_shape[0], -1, -1)], dim=2)

    def _select(self, patterns_BPD: Tensor, x: Tensor) -> Tensor:
        indicators_TBD = self.indicators + torch.einsum("bd,tde->tbe", x.mean(1), self.adapt)
        scores = torch.einsum("tbd,bpd->tbp", self.query(indicators_TBD), self.key(patterns_BPD))
        return (scores.float() * self.scale).softmax(2)


class SetAttention(nn.Module):
    """Fields read through m groups: G = MAB(I, X), X' = MAB(X, G), at a cost of F m D instead of F^2 D.

    MAB(Q, Y) = LN(H + FFN(H)), H = LN(Q + MultiHead(Q, Y, Y)); I are m learned inducing points. The same for any order
    of the fields.

    Shape: (B, F, D) -> X' (B, F, D), G (B, m, D).

    >>> fields, groups = SetAttention(8, num_groups=3)(torch.randn(6, 5, 8))
    >>> fields.shape, groups.shape
    (torch.Size([6, 5, 8]), torch.Size([6, 3, 8]))
    """

    def __init__(self, dim: int, *, num_groups: int, num_heads: int = 2) -> None:
        super().__init__()
        if dim % num_heads:
            raise ArgumentError(f"fields of width {dim} do not divide into {num_heads} heads: change one of the two")
        self.points = nn.Parameter(torch.randn(num_groups, dim))
        self.gather = _AttentionBlock(dim, num_heads)
        self.scatter = _AttentionBlock(dim, num_heads)

    def attention(self, x: Tensor) -> Tensor:
        """How much each group reads of each field, mean over heads: (B, F, D) -> (B, m, F), sums over F are 1."""
        weights_BFHM = self.gather.attention.gather_weights(self.points, x)
        return weights_BFHM.mean(2).mT

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, D) -> (B, F, D), (B, m, D)."""
        groups = self.gather.finish(self.points, self.gather.attention.gather(self.points, x))
        return self.scatter.finish(x, self.scatter.attention.scatter(x, groups)), groups


class _FoldedAttention(nn.Module):
    """Multi-head attention between F fields and m groups, with m much smaller than F.

    With <W_Q q, W_K k> = q (W_Q' W_K) k', and values that are read first and projected then, nothing is computed for
    each field but its product with the groups: half the time of projecting the fields. Projections have no bias.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        shape = (num_heads, dim // num_heads, dim)
        self.query, self.key, self.value, self.out = (
            nn.Parameter(torch.randn(shape) / math.sqrt(dim)) for _ in range(4)
        )
        self.bias = nn.Parameter(torch.zeros(dim))

    def gather_weights(self, points: Tensor, x: Tensor) -> Tensor:
        """Of every group's attention to the fields: points (m, D), x (B, F, D) -> (B, F, H, m), sums over F are 1."""
        queries_HMD = torch.einsum("md,hdf->hmf", points, self._query_key())
        scores = x @ queries_HMD.flatten(0, 1).T
        return scores.float().softmax(1).to(x.dtype).view(x.shape[0], x.shape[1], self.num_heads, -1)

    def gather(self, points: Tensor, x: Tensor) -> Tensor:
        """What points read of the fields: -> (B, m, D)."""
        weights_BFHM = self.gather_weights(points, x)
        read_BHMD = (weights_BFHM.flatten(2).mT @ x).view(x.shape[0], self.num_heads, -1, x.shape[2])
        out: Tensor = torch.einsum("bhmd,hdf->bmf", read_BHMD, self._value_out()) + self.bias
        return out

    def scatter(self, x: Tensor, groups: Tensor) -> Tensor:
        """What fields read of the groups: x (B, F, D), groups (B, m, D) -> (B, F, D)."""
        keys_BHMD = torch.einsum("hdf,bmf->bhmd", self._query_key(), groups)
        values_BHMD = torch.einsum("bmd,hdf->bhmf", groups, self._value_out())
        scores_BFHM = (x @ keys_BHMD.flatten(1, 2).mT).view(x.shape[0], x.shape[1], self.num_heads, -1)
        weights = scores_BFHM.float().softmax(3).to(x.dtype).flatten(2)
        out: Tensor = weights @ values_BHMD.flatten(1, 2) + self.bias
        return out

    def _query_key(self) -> Tensor:
        """W_Q' W_K of every head, for scores in units of sqrt(d): (H, D, D)."""
        return torch.einsum("hed,hef->hdf", self.query, self.key) / math.sqrt(self.query.shape[1])

    def _value_out(self) -> Tensor:
        return torch.einsum("hed,hef->hdf", self.value, self.out)


class _AttentionBlock(nn.Module):
    """The attention of a MAB and what follows it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = _FoldedAttention(dim, num_heads)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in range(2))

    def finish(self, query: Tensor, read: Tensor) -> Tensor:
        """LN(H + FFN(H)), H = LN(Q + read)."""
        hidden = self.norms[0](query + read)
        out: Tensor = self.norms[1](hidden + self.feed_forward(hidden))
        return out


class _Block(nn.Module):
    """Set attention, then squeeze and excitation: X + a * X'."""

    def __init__(self, num_fields: int, dim: int, *, num_groups: int, num_heads: int) -> None:
        super().__init__()
        self.attention = SetAttention(dim, num_groups=num_groups, num_heads=num_heads)
        reduced = max(1, num_fields // 4)
        self.excite = nn.Sequential(nn.Linear(num_fields, reduced), nn.ReLU(), nn.Linear(reduced, num_fields))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        read, groups = self.attention(x)
        gates_BF = self.excite(read.mean(2)).sigmoid()
        return x + gates_BF.unsqueeze(2) * read, groups
