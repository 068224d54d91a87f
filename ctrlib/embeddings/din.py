"""Deep interest network: G. Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
https://arxiv.org/abs/1706.06978."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.embeddings.sequence import softmax_events, sum_events, to_events
from ctrlib.errors import ArgumentError
from ctrlib.layers import Dice, Dropout, init_linear
from ctrlib.manifest import check_file
from ctrlib.schema import NUM_RESERVED_IDS


class DIN(nn.Module):
    """u = sum_j a(k_j, t) k_j  (eq. 3), with weights a = MLP([t; k_j; t - k_j; t * k_j]) of target t and event k_j.

    The weights are not normalised, so u also says how *much* of the history fits the target; `softmax` makes them sum
    to 1, which forgets that. The paper argues against it, its code does it (after dividing by the square root of the
    width), and two of BARS' four best settings do it. The paper's phi(t, k) is an outer product; its code, FuxiCTR's
    and this have difference and product. `hidden`, `dice` and `dropout` make the MLP as FuxiCTR does: Linear ->
    ReLU or Dice -> Dropout for each width, then one output. There, Dice sees padded positions too; here are none.

    The first layer costs less than it says: with W = [W1 W2 W3 W4], W [t; k; t - k; t * k] equals
    (W1 + W3) t + (W2 - W3) k + W4 (t * k), whose first term is worked out for a row and not for each of its events.

    Shape: target (B, C), values (N, C), offsets (B + 1) -> (B, C).

    >>> DIN(4, hidden=(8,), dice=True)(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3, 3]))[1].tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self, dim: int, *, hidden: Sequence[int] = (64,), dice: bool = False, softmax: bool = False, dropout: float = 0
    ) -> None:
        super().__init__()
        if not hidden or any(width < 1 for width in hidden):
            raise ArgumentError(f"hidden widths must be one or more positive integers, got {tuple(hidden)}")
        self.in_shape = self.out_shape = (dim,)
        self.softmax = softmax
        self.first = nn.Linear(4 * dim, hidden[0])
        layers: list[nn.Module] = []
        for width, following in zip(hidden, (*hidden[1:], 1)):
            layers.append(Dice(width) if dice else nn.ReLU(inplace=True))
            if dropout:
                layers.append(Dropout(dropout))
            layers.append(nn.Linear(width, following))
        self.layers = nn.Sequential(*layers)
        init_linear(self)

    def forward(self, target_BC: Tensor, values_NC: Tensor, offsets: Tensor) -> Tensor:
        """Histories -> (B, C)."""
        weights_N1 = self.layers(self._first_layer(target_BC, values_NC, offsets))
        if self.softmax:
            weights_N1 = softmax_events(weights_N1, offsets)
        return sum_events(weights_N1 * values_NC, offsets)

    def _first_layer(self, target_BC: Tensor, values_NC: Tensor, offsets: Tensor) -> Tensor:
        num_events = values_NC.shape[0]
        w_t, w_k, w_difference, w_product = self.first.weight.chunk(4, dim=1)
        of_row = F.linear(target_BC, w_t + w_difference, self.first.bias)
        product_NC = to_events(target_BC, offsets, num_events) * values_NC
        of_event = F.linear(
            torch.cat([values_NC, product_NC], dim=1), torch.cat([w_k - w_difference, w_product], dim=1)
        )
        return of_event + to_events(of_row, offsets, num_events)


class MiniBatchAwareL2(nn.Module):
    """lambda / 2 sum_j alpha_j / n_j ||w_j||^2, alpha_j = 1 if the batch looks up id j, n_j its count in train.

    The paper's mini-batch aware regularisation: only rows that a batch touches are decayed, rare ones most, which keeps
    fine-grained ids from overfitting. `per_occurrence` adds a row's term for each of its look-ups, the sum over samples
    that the paper starts from and then bounds by alpha. Being a function of the rows looked up, it reaches sharded
    tables too. `counts`: (num_embeddings,), see `read_counts`. The paper's lambda is 0.01; its code has no such term.

    Shape: rows (N, D), ids (N,) -> scalar, for `SequenceEmbedding(row_losses={vocabulary: ...})`.

    >>> loss = MiniBatchAwareL2(torch.tensor([1.0, 2.0]), strength=4.0)
    >>> loss(torch.ones(3, 1), torch.tensor([1, 1, 0])).item()  # 4 / 2 (1 / 2 + 1 / 1)
    3.0
    """

    scale: Tensor

    def __init__(self, counts: Tensor, *, strength: float = 0.01, per_occurrence: bool = False) -> None:
        super().__init__()
        if counts.dim() != 1 or not (counts > 0).all():
            raise ArgumentError(f"counts must be (num_embeddings,) and positive, got {tuple(counts.shape)}")
        self.per_occurrence = per_occurrence
        self.register_buffer("scale", 0.5 * strength / counts.float(), persistent=False)

    def forward(self, rows_ND: Tensor, ids_N: Tensor) -> Tensor:
        """The loss of a batch's look-ups."""
        scale_N = self.scale[ids_N]
        if not self.per_occurrence:
            _, inverse, occurrences = torch.unique(ids_N, return_inverse=True, return_counts=True)
            scale_N = scale_N / occurrences[inverse]  # c look-ups of 1 / c each
        return (scale_N * rows_ND.square().sum(1)).sum()


def read_counts(path: str | Path) -> Tensor:
    """How often each id occurs in train, from `vocab/<vocabulary>.parquet` of a prepared folder: (num_embeddings,).

    Where features share a vocabulary, occurrences in all of them count. Reserved ids are not counted there; they get
    infinity, so that they are not decayed: many different values hide behind the out-of-vocabulary id. So do values
    that do not occur, which the vocabulary has from an earlier preparation.
    """
    path = Path(path)
    check_file(path.parent.parent, f"{path.parent.name}/{path.name}")
    counts = pl.read_parquet(path, glob=False).sort("id")["count"].to_numpy(writable=True)
    found = torch.from_numpy(counts).float()
    return torch.cat([torch.full((NUM_RESERVED_IDS,), torch.inf), torch.where(found > 0, found, torch.inf)])
