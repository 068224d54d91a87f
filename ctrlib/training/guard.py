"""What both engines do around the loss, so that nothing is ruined silently: over all processes, and finite or not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.distributed import all_rows, any_rank, rank, world_size
from ctrlib.embeddings.din import MiniBatchAwareL2
from ctrlib.embeddings.managed import ManagedEmbedding
from ctrlib.errors import ArgumentError, UnsupportedError
from ctrlib.losses import collect_auxiliary, total_auxiliary
from ctrlib.training.config import Precision

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits (B, T), labels (B, T), weights (B,)) -> scalar


def refuse_what_needs_one_process(model: nn.Module) -> None:
    """What would be wrong in several processes, unnoticed: copies of a map from ids to rows drift apart, and ids looked
    up in two processes count twice in a sum over different ids.

    Raises:
        NotImplementedError: there are several processes, and a part of the model is a `ManagedEmbedding`, or a
            `MiniBatchAwareL2` that does not count occurrences.
    """
    if world_size() == 1:
        return
    if any(isinstance(module, MiniBatchAwareL2) and not module.per_occurrence for module in model.modules()):
        raise UnsupportedError(
            f"MiniBatchAwareL2 knows the ids of its own process only, and {world_size()} were started: start one, or "
            "use MiniBatchAwareL2(..., per_occurrence=True)"
        )
    if any(isinstance(module, ManagedEmbedding) for module in model.modules()):
        raise UnsupportedError(
            f"the engines train a ManagedEmbedding in one process, and {world_size()} were started: start one, or "
            "shard it in a loop of your own with ctrlib.ManagedSharder"
        )


def guarded_loss(
    forward: Callable[[Batch], Tensor], batch: Batch, loss_function: Loss, buffers: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and the same with what its parts add (`add_auxiliary`): what to report and what to minimise.

    If the latter is not finite, `buffers` (running statistics) are put back. Of several processes, each gets the loss
    of all their batches together, and to minimise a value whose gradient, averaged over the processes, is that of the
    whole.

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
    if world_size() == 1:
        loss = loss_function(logits, batch.labels, batch.weights)
        total = loss + total_auxiliary(auxiliary, batch.weights) if auxiliary else loss
    else:
        loss, weight = _loss_of_all(logits, batch, loss_function)
        total = world_size() * loss
        if auxiliary:
            # Means of rows become those of all processes' rows, and scalars, sums over look-ups, their sum.
            auxiliary = [loss if loss.dim() else world_size() * loss for loss in auxiliary]
            total = total + total_auxiliary(auxiliary, batch.weights, weight / world_size())
            if any_rank(not bool(torch.isfinite(total)))[0]:
                total = total + torch.nan
    if not torch.isfinite(total):
        for buffer, kept in zip(buffers, before):
            buffer.copy_(kept)
    return loss.detach(), total


def _loss_of_all(logits: Tensor, batch: Batch, loss_function: Loss) -> tuple[Tensor, Tensor]:
    """The loss over the rows of all processes, with a gradient for this one's, and the weight of all those rows.

    Every process computes all of it, since a loss may be more than a mean of rows: per task over its known labels, say.
    """
    num_rows, num_tasks = logits.shape
    everything = all_rows(torch.cat([logits.float(), batch.labels, batch.weights.unsqueeze(1)], dim=1))
    own = rank() * num_rows
    all_logits = torch.cat([everything[:own, :num_tasks], logits, everything[own + num_rows :, :num_tasks]])
    weights = everything[:, -1].contiguous()
    return loss_function(all_logits, everything[:, num_tasks:-1], weights), weights.sum()


def arithmetic(device: torch.device, precision: Precision) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """What a forward pass is within: nothing for fp32, autocast for bf16.

    Raises:
        ArgumentError: the precision is unknown.

    >>> with arithmetic(torch.device("cpu"), "bf16")():
    ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
    torch.bfloat16
    """
    if precision not in get_args(Precision):
        raise ArgumentError(f"unknown precision {precision!r}, expected one of {get_args(Precision)}")
    if precision == "fp32":
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, torch.bfloat16)


def add_l2(parameters: Sequence[Tensor], factor: float) -> None:
    """Add the gradient of (factor / 2) sum ||W||^2: the graph of that sum would cost as much as the weights are large.

    >>> weight = torch.tensor([3.0], requires_grad=True)
    >>> weight.grad = torch.tensor([1.0])
    >>> add_l2([weight], 0.5)
    >>> weight.grad
    tensor([2.5000])
    """
    if factor == 0:
        return
    pairs = [(parameter.grad, parameter.detach()) for parameter in parameters if parameter.grad is not None]
    if pairs:  # none where all are frozen
        torch._foreach_add_(*zip(*pairs), alpha=factor)


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
