"""Training losses on logits. Knows nothing of the rest of ctrlib."""

from __future__ import annotations

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
