"""What both engines refuse, so that nothing is ruined silently."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrlib.batch import Batch

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
) -> Tensor:
    """The loss of a batch; where it is not finite, `buffers` (running statistics) are put back as they were.

    >>> statistics = torch.zeros(1)
    >>> def forward(batch):
    ...     statistics.fill_(torch.nan)
    ...     return statistics
    >>> from ctrlib.testing import example_batch, example_schema
    >>> batch = example_batch(example_schema(), 2)
    >>> guarded_loss(forward, batch, lambda logits, labels, weights: logits.sum(), [statistics]), statistics
    (tensor(nan), tensor([0.]))
    """
    before = [buffer.clone() for buffer in buffers]
    loss = loss_function(forward(batch), batch.labels, batch.weights)
    if not torch.isfinite(loss):
        for buffer, kept in zip(buffers, before):
            buffer.copy_(kept)
    return loss
