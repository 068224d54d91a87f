"""Training losses on logits. Knows nothing of the rest of ctrlib."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean binary cross-entropy in nats, averaged per task over its known labels and summed over tasks.

    sum_t [ sum_b w_b m_bt l_bt / sum_b w_b m_bt ],  l = softplus(z) - y z,  m = 0 where the label is NaN (missing).
    Rows of weight 0 (padding) count for nothing; a task without any known label in the batch contributes 0.

    Shape: logits (B, T), labels (B, T), weights (B,) -> scalar.

    >>> loss = binary_cross_entropy(torch.zeros(2, 1), torch.tensor([[1.0], [float("nan")]]), torch.ones(2))
    >>> round(loss.item(), 6)  # log 2, of the one known label
    0.693147
    """
    known = ~torch.isnan(labels)
    weight = weights.unsqueeze(1) * known
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), labels.where(known, labels.new_zeros(())), reduction="none"
    )
    # The guard only matters for a task whose total weight is 0: its numerator is 0 too.
    return ((losses * weight).sum(0) / weight.sum(0).clamp(min=torch.finfo(torch.float32).tiny)).sum()


_collected: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)


def add_auxiliary(losses: Tensor) -> None:
    """Add a part's own loss to the training loss: self-distillation, a regulariser of the rows looked up, and the like.

    Called in `forward`, in training only. Losses of rows are averaged with the batch's weights, a scalar is added as it
    is (of several processes: the sum of theirs). Where no engine collects (evaluation, your own loop), nothing happens.

    Shape: (B,) or ().

    >>> with collect_auxiliary() as losses:
    ...     add_auxiliary(torch.tensor([1.0, 3.0]))
    >>> total_auxiliary(losses, weights=torch.tensor([1.0, 0.0])).item()
    1.0
    """
    collected = _collected.get()
    if collected is not None:
        collected.append(losses)


@contextlib.contextmanager
def collect_auxiliary() -> Iterator[list[Tensor]]:
    """The list that `add_auxiliary` fills inside the block: what an engine opens around the forward pass."""
    losses: list[Tensor] = []
    token = _collected.set(losses)
    try:
        yield losses
    finally:
        _collected.reset(token)


def total_auxiliary(losses: list[Tensor], weights: Tensor, total_weight: Tensor | None = None) -> Tensor:
    """Sum of what was collected; losses of rows become their weighted mean, over `total_weight` (that of the rows).

    Shape: weights (B,) -> scalar.
    """
    total = weights.new_zeros(())
    for loss in losses:
        if loss.dim():
            divisor = weights.sum() if total_weight is None else total_weight
            loss = (loss * weights).sum() / divisor.clamp(min=torch.finfo(torch.float32).tiny)
        total = total + loss
    return total
