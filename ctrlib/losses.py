"""Training losses on logits. Knows nothing of the rest of ctrlib."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ctrlib.errors import ArgumentError


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, weights: Tensor, *, task_weights: Sequence[float] | None = None
) -> Tensor:
    """Weighted mean binary cross-entropy in nats, averaged per task over its known labels and summed over tasks.

    sum_t v_t [ sum_b w_b m_bt l_bt / sum_b w_b m_bt ],  l = softplus(z) - y z,  m = 0 where the label is NaN (missing).
    Rows of weight 0 (padding) count for nothing; a task without any known label in the batch contributes 0. The v_t are
    `task_weights`, by default 1: a sum over tasks, so that each trains as it would alone with the same learning rate.

    Shape: logits (B, T), labels (B, T), weights (B,) -> scalar.

    Raises:
        ValueError: there are not as many `task_weights` as tasks.

    >>> loss = binary_cross_entropy(torch.zeros(2, 1), torch.tensor([[1.0], [float("nan")]]), torch.ones(2))
    >>> round(loss.item(), 6)  # log 2, of the one known label
    0.693147
    """
    losses = _losses_of_tasks(logits, labels, weights)
    if task_weights is None:
        return losses.sum()
    if len(task_weights) != losses.shape[0]:
        raise ArgumentError(f"expected a weight for each of {losses.shape[0]} tasks, got task_weights={task_weights}")
    return losses @ losses.new_tensor(task_weights)


def after_sampling(logits: Tensor, labels: Tensor, weights: Tensor, *, keep_negatives: float) -> Tensor:
    """`binary_cross_entropy` of one label on rows of which only that share of the negatives was kept.

    Among those, the odds of a click are 1 / keep_negatives times what they are among all rows, so the loss is taken at
    z - log(keep_negatives). The z that is learnt, and so what the model predicts, is that of all rows.

    Shape: logits (B, 1), labels (B, 1), weights (B,) -> scalar.

    >>> labels = torch.tensor([[1.0], [0.0], [0.0]])  # of 1 click and 20 negatives, 2 of which were kept
    >>> logits = torch.full((3, 1), math.log(1 / 20), requires_grad=True)
    >>> after_sampling(logits, labels, torch.ones(3), keep_negatives=0.1).backward()
    >>> bool(logits.grad.sum().abs() < 1e-6)  # the base rate of all rows is the best constant
    True
    """
    return binary_cross_entropy(logits - math.log(keep_negatives), labels, weights)


def uncertainty_weighted(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Tasks weighted by their own uncertainty: sum_t [ L_t / s_t^2 + log s_t ] at its best s_t, which is s_t^2 = 2 L_t.

    So a task's gradient is divided by twice its loss, and a rare label counts as much as a frequent one. L_t is the
    mean over task t's known labels, as in `binary_cross_entropy`; the sum is 1/2 sum_t (1 + log 2 L_t), L_t at least
    1e-6. A. Kendall et al., CVPR 2018 (https://arxiv.org/abs/1705.07115) learn s_t by gradient descent; the closed form
    needs no weight of its own, and holds for each batch.

    Shape: logits (B, T), labels (B, T), weights (B,) -> scalar.

    >>> logits = torch.zeros(1, 2, requires_grad=True)
    >>> uncertainty_weighted(logits, torch.tensor([[1.0, float("nan")]]), torch.ones(1)).backward()
    >>> [round(value, 4) for value in logits.grad[0].tolist()]  # -1/2 / (2 log 2), and none for what is not known
    [-0.3607, 0.0]
    """
    losses = _losses_of_tasks(logits, labels, weights)
    known = (~torch.isnan(labels) & (weights > 0).unsqueeze(1)).any(0)
    bounded = losses.where(known, 0.5).clamp(min=1e-6)  # log(2 * 0.5) = 0
    return 0.5 * (known + (2 * bounded).log()).sum()


def given_previous(labels: Tensor) -> Tensor:
    """Labels of steps, each known only where the one before it happened: conversion after a click, NaN without one.

    What a model of conversions that is trained or scored on clicked rows alone learns from.

    Shape: (B, T) -> (B, T).

    >>> given_previous(torch.tensor([[1.0, 0.0], [0.0, 0.0]])).tolist()
    [[1.0, 0.0], [0.0, nan]]
    """
    return torch.cat([labels[:, :1], labels[:, 1:].where(labels[:, :-1] == 1, torch.nan)], dim=1)


def _losses_of_tasks(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The mean over each task's known labels: -> (T,)."""
    known = ~torch.isnan(labels)
    weight = weights.unsqueeze(1) * known
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), labels.where(known, labels.new_zeros(())), reduction="none"
    )
    # The guard only matters for a task whose total weight is 0: its numerator is 0 too.
    return (losses * weight).sum(0) / weight.sum(0).clamp(min=torch.finfo(torch.float32).tiny)


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
