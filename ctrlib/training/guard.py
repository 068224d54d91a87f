"""What both engines refuse, so that nothing is ruined silently."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.losses import collect_auxiliary, total_auxiliary

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits (B, T), labels (B, T), weights (B,)) -> scalar


def refuse_several_processes() -> None:
    """Replicas that do not talk to each other would drift apart unnoticed.

    Raises:
        RuntimeError: `torchrun` or another launcher started more than one process.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise RuntimeError(f"engines train in one process in this version, but WORLD_SIZE is {world_size}: start one")


def guarded_loss(
    forward: Callable[[Batch], Tensor], batch: Batch, loss_function: Loss, buffers: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the same with what its parts add (`add_auxiliary`): what to report and what to minimise.

    If the latter is not finite, `buffers` (running statistics) are put back.

    >>> statistics = torch.zeros(1)
    >>> def forward(batch):
    ...     statistics.fill_(torch.nan)
    ...     return statistics
    >>> from ctrlib.testing import example_batch, example_schema
    >>> batch = example_batch(example_schema(), 2)
    >>> guarded_loss(forward, batch, lambda logits, labels, weights: logits.sum(), [statistics]), statistics
    ((tensor(nan), tensor(nan)), tensor([0.]))
    """
    before = [buffer.clone() for buffer in buffers]
    with collect_auxiliary() as auxiliary:
        logits = forward(batch)
    loss = loss_function(logits, batch.labels, batch.weights)
    total = loss + total_auxiliary(auxiliary, batch.weights) if auxiliary else loss
    if not torch.isfinite(total):
        for buffer, kept in zip(buffers, before):
            buffer.copy_(kept)
    return loss.detach(), total


def clip_gradients(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Scale all gradients together to a global norm of at most `max_norm`, and touch none where that holds already.

    `nn.utils.clip_grad_norm_` multiplies by 1 then: a pass over every gradient.

    >>> weight = torch.zeros(2, requires_grad=True)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_gradients([weight], max_norm=1.0)
    >>> [round(value, 3) for value in weight.grad.tolist()]
    [0.6, 0.8]
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if norm > max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm, foreach=True)
