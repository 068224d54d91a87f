"""Behaviour histories read for each task, in the style of DTRN's interest module: Q. Liu et al., "Deep Task-specific
Bottom Representation Network for Multi-Task Recommendation", CIKM 2023, https://arxiv.org/abs/2308.05996.

Its other half, the refinement of fields, is `ctrlib.towers.dtrn`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.embeddings.sequence import make_event_tables
from ctrlib.embeddings.table import TableEmbedding
from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear
from ctrlib.schema import Categorical, Feature, Sequence, vocabulary_of


class TaskInterests(nn.Module):
    """One transformer block for T tasks and J behaviours, its LayerNorms set by a hypernetwork for each pair (t, j).

    X = cLN_1(S_j + MHSA(S_j)),  X' = cLN_2(X + FFN(X)),  h_tj = sum_l softmax_l(<W_q v, X'_l> / sqrt(D)) X'_l with the
    target v; gamma and beta of both cLN come from W_2 relu(W_1 [t_t; b_j] + c_1) + c_2, with embeddings t of the task
    and b of the behaviour. MHSA knows neither, so it runs once for each behaviour. An empty history gives zero.

    One more task or behaviour costs `condition_dim` weights, and nothing in attention and FFN. W_2 starts at 0 and c_2
    at gamma = 1, beta = 0: at first every task reads as a plain transformer does.

    "Style", since there is no public code. Ours are: one block, LayerNorm after the residual, pooling by the target,
    events without positions, the start of the hypernetwork, and that h_tj is multiplied by a learned vector, which
    starts at `out_scale`.

    Shape: histories (J, B, L, D), mask (J, B, L), target (B, D) -> (T, B, J, D).

    Raises:
        ValueError: D is no multiple of `num_heads`, or there is no task or behaviour.

    >>> interests = TaskInterests(8, num_tasks=2, num_behaviours=3)
    >>> mask = torch.arange(4) < torch.tensor([[4, 0], [2, 1], [1, 3]]).unsqueeze(2)
    >>> out = interests(torch.randn(3, 2, 4, 8), mask, torch.randn(2, 8))
    >>> out.shape, out[:, 1, 0].count_nonzero().item()
    (torch.Size([2, 2, 3, 8]), 0)
    """

    def __init__(
        self,
        dim: int,
        *,
        num_tasks: int,
        num_behaviours: int,
        num_heads: int = 2,
        condition_dim: int = 8,
        hyper_hidden: int = 32,
        out_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(num_tasks, num_behaviours) < 1 or dim % num_heads:
            raise ArgumentError(
                f"TaskInterests needs tasks, behaviours and a width that is a multiple of num_heads, got "
                f"num_tasks={num_tasks}, num_behaviours={num_behaviours}, width {dim}, num_heads={num_heads}"
            )
        self.num_heads = num_heads
        self.tasks = nn.Parameter(torch.randn(num_tasks, condition_dim))
        self.behaviours = nn.Parameter(torch.randn(num_behaviours, condition_dim))
        norms = nn.Linear(hyper_hidden, 4 * dim)
        self.hyper = nn.Sequential(nn.Linear(2 * condition_dim, hyper_hidden), nn.ReLU(), norms)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.target_query = nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.full((dim,), out_scale))
        init_linear(self)
        with torch.no_grad():
            norms.weight.zero_()
            norms.bias.copy_(torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(dim))

    def forward(self, histories: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Histories (J, B, L, D), true where there is an event (J, B, L), target (B, D) -> (T, B, J, D)."""
        dim = target.shape[1]
        gamma_1, beta_1, gamma_2, beta_2 = self._norms().chunk(4, dim=-1)  # each (T, J, 1, 1, D)
        empty = ~mask.any(2, keepdim=True)
        seen = mask | empty  # a softmax over nothing is undefined; what it gives is zeroed at the end
        x_JBLD = F.layer_norm(histories + self._attend(histories, seen), (dim,))
        x = gamma_1 * x_JBLD + beta_1
        x = gamma_2 * F.layer_norm(x + self.feed_forward(x), (dim,)) + beta_2
        scores = torch.einsum("bd,tjbld->tjbl", self.target_query(target), x) / dim**0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(3)
        return self.scale * torch.einsum("tjbl,tjbld->tbjd", weights.masked_fill(empty, 0.0), x)

    def _norms(self) -> Tensor:
        num_tasks, num_behaviours = len(self.tasks), len(self.behaviours)
        tasks = self.tasks.unsqueeze(1).expand(-1, num_behaviours, -1)
        behaviours = self.behaviours.unsqueeze(0).expand(num_tasks, -1, -1)
        norms: Tensor = self.hyper(torch.cat([tasks, behaviours], dim=2))
        return norms[:, :, None, None]

    def _attend(self, histories: Tensor, seen: Tensor) -> Tensor:
        rows = self.query_key_value(histories).flatten(0, 1).unflatten(2, (3, self.num_heads, -1))
        query, key, value = rows.permute(2, 0, 3, 1, 4).unbind()  # each (J * B, heads, L, head width)
        mask = seen.flatten(0, 1)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out.view(histories.shape)


class InterestEmbedding(nn.Module):
    """As `TableEmbedding`, but each history becomes a field of every task's own, by `TaskInterests`.

    Histories share the vocabulary, and the table, of `target`: the thing that is to be clicked, liked or bought. All
    other fields are the same for all tasks. `ctrlib.towers.TaskRefinement` reads this, alone or in front of any head.

    With None for `num_tasks` histories are read alike for all tasks: one transformer, told the behaviour only, whose
    fields any tower reads. `stacked` and `numeric` are for the other features, as in `TableEmbedding`.

    Shape: Batch -> (T, B, F, D), or (B, F, D) without tasks; fields in the schema's order.

    Raises:
        ValueError: `target` is no categorical feature, or no history shares its vocabulary.

    >>> from ctrlib.schema import Numeric
    >>> item = Categorical("item", num_embeddings=9)
    >>> clicks, buys = (Sequence(name, vocabulary="item", num_embeddings=9) for name in ("clicks", "buys"))
    >>> InterestEmbedding([item, clicks, Numeric("price"), buys], target="item", num_tasks=2, embedding_dim=4).out_shape
    (2, 4, 4)
    >>> InterestEmbedding([item, clicks, buys], target="item", num_tasks=None, embedding_dim=4).out_shape
    (3, 4)
    """

    def __init__(
        self,
        features: Iterable[Feature],
        *,
        target: str,
        num_tasks: int | None,
        embedding_dim: int = 16,
        init_std: float = 1e-4,
        num_heads: int = 2,
        stacked: int = 0,
        numeric: nn.Module | None = None,
    ) -> None:
        super().__init__()
        features = tuple(features)
        thing = next((f for f in features if f.name == target), None)
        if not isinstance(thing, Categorical):
            raise ArgumentError(
                f"target {target!r} must be a categorical feature, expected one of "
                f"{[f.name for f in features if isinstance(f, Categorical)]}"
            )
        histories = [f for f in features if isinstance(f, Sequence) and vocabulary_of(f) == vocabulary_of(thing)]
        if not histories:
            raise ArgumentError(
                f"no history shares the vocabulary of target {target!r}: prepare one with Sequence(..., "
                f"vocabulary={vocabulary_of(thing)!r}), or use TableEmbedding"
            )
        fields = (len(features), embedding_dim)
        self.out_shape = fields if num_tasks is None else (num_tasks, *fields)
        self.target, self.histories = target, [history.name for history in histories]
        self.max_length = max(history.max_length for history in histories)
        self.tables = make_event_tables([thing, *histories], embedding_dim=embedding_dim, init_std=init_std)
        self.interests = TaskInterests(
            embedding_dim,
            num_tasks=1 if num_tasks is None else num_tasks,
            num_behaviours=len(histories),
            num_heads=num_heads,
            # What a LayerNorm gives has length sqrt(D): it would drown the other fields until these have grown.
            out_scale=init_std,
        )
        rest = [feature.name for feature in features if feature not in (thing, *histories)]
        self.rest: TableEmbedding | None = None
        if rest:
            self.rest = TableEmbedding(
                features, only=rest, embedding_dim=embedding_dim, init_std=init_std, stacked=stacked, numeric=numeric
            )
        made = [target, *rest, *self.histories]
        self.order = [made.index(feature.name) for feature in features]

    @property
    def encoders(self) -> list[nn.Module]:
        """What depends on more than single ids: see `Model.network`."""
        return [self.interests]

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (T, B, F, D), or (B, F, D) without tasks."""
        looked_up = self.tables(batch.sparse)
        jagged = [looked_up[name] for name in self.histories]
        lengths_JB = torch.stack([history.lengths() for history in jagged])
        # torch.export does not know how long the longest one is going to be.
        longest = self.max_length if torch.compiler.is_exporting() else max(1, int(lengths_JB.max()))
        histories = torch.stack([history.to_padded_dense(longest) for history in jagged])
        mask = torch.arange(longest, device=lengths_JB.device) < lengths_JB.unsqueeze(2)
        target_BD = looked_up[self.target].values()
        plain = target_BD.unsqueeze(1)
        if self.rest is not None:
            plain = torch.cat([plain, self.rest(batch)], dim=1)
        interests = self.interests(histories, mask, target_BD)
        fields = torch.cat([plain.expand(len(interests), -1, -1, -1), interests], dim=2)[:, :, self.order]
        return fields if len(self.out_shape) == 3 else fields[0]
