"""Entire space multi-task model: X. Ma et al., "Entire Space Multi-Task Model: An Effective Approach for Estimating
Post-Click Conversion Rate", SIGIR 2018, https://doi.org/10.1145/3209978.3210104."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ctrlib.heads.stacked import TaskTowers


class ESMM(nn.Module):
    """p_t = q_1 q_2 ... q_t over a chain of steps, each step only after the one before: click, then conversion.

    q_t = sigmoid(a_t) is the probability of step t given step t - 1 (CTR, CVR), from task t's own tower; p_t that of
    all steps up to t (CTR, CTCVR). Labels are those of p_t, known in every row: a conversion label is 0 where there
    was no click. So every row teaches the conditional towers, and none learns from clicked rows alone. The paper's two
    steps, and any number.

    The logit of p_t is computed from logits, exactly and without overflow (`logit_of_both`); the paper multiplies
    probabilities.

    Shape: (B, H) or (T, B, H) -> (B, T) logits.

    Raises:
        ValueError: the input has neither one stream nor T.

    >>> head = ESMM((6,), hidden=(4,))
    >>> click, both = head(torch.randn(1, 6)).sigmoid()[0]
    >>> bool(both < click)
    True
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int = 2,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.towers = TaskTowers(in_shape, num_tasks=num_tasks, hidden=hidden, dropout=dropout)
        self.in_shape, self.out_shape = self.towers.in_shape, self.towers.out_shape

    def start_at(self, rates: Tensor) -> None:
        """Set the biases of the steps such that h_t = 0 gives the labels' rates, (T,), each step's the quotient of two.

        A label that is no rarer than the one before is no later step of a chain: its step then starts at .999.
        """
        steps = torch.cat([rates[:1], (rates[1:] / rates[:-1]).clamp(max=0.999)])
        self.towers.start_at(steps)

    def conditional_logits(self, x: Tensor) -> Tensor:
        """The logit of each step given the one before (CTR, CVR): (B, H) or (T, B, H) -> (B, T)."""
        logits: Tensor = self.towers(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """(B, H) or (T, B, H) -> (B, T) logits of all steps up to each."""
        steps = self.conditional_logits(x)
        chain = [steps[:, 0]]
        for step in range(1, self.out_shape[0]):
            chain.append(logit_of_both(chain[-1], steps[:, step]))
        return torch.stack(chain, dim=1)


def logit_of_both(a: Tensor, b: Tensor) -> Tensor:
    """The logit of sigmoid(a) sigmoid(b), finite for any finite logits.

    1 / p - 1 = (1 + e^-a) (1 + e^-b) - 1 = e^-a + e^-b + e^-(a + b).

    Shape: any, the same -> the same.

    >>> logit_of_both(torch.zeros(()), torch.zeros(())).sigmoid()
    tensor(0.2500)
    >>> logit_of_both(torch.tensor([1e4, 1e4]), torch.tensor([1e4, -1e4])).tolist()
    [9999.306640625, -10000.0]
    """
    return -torch.stack([-a, -b, -a - b]).logsumexp(0)
