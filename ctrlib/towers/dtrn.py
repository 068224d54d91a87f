"""Task-specific refinement of fields, in the style of DTRN: Q. Liu et al., "Deep Task-specific Bottom Representation
Network for Multi-Task Recommendation", CIKM 2023, https://arxiv.org/abs/2308.05996.

Its other half, the task-specific reading of behaviour histories, is `ctrlib.embeddings.tim`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ctrlib.errors import ArgumentError


class TaskRefinement(nn.Module):
    """Each task's own importance of every field: s^t = 2 sigmoid(A_t relu(C_t x^t + c_t) + a_t),  y^t_f = s^t_f x^t_f.

    The module that the paper calls TRM, in front of any head: tasks that share a bottom or experts share their weights,
    and no longer their input. x^t are the concatenated fields; those of task t, if they are task-specific already
    (T, B, F, D).

    "Style", since the paper gives the idea (field embeddings -> MLP -> importance -> product) and there is no public
    code. Ours are: the squeeze reads all field values rather than their means, the factor 2 (importance is about 1 at
    the start), one hidden layer of max(8, F D / 4) units, and one importance for a field rather than for each of its
    elements (`per_element` is the other way).

    `shared_stream` adds the fields as they came (their mean over tasks, if they are task-specific) as a last stream:
    what shared experts (PLE, STEM) read.

    The gate sees all fields, so a field of importance 0 may still speak through the gates of others: these are no
    feature importances.

    Shape: (B, F, D) or (T, B, F, D) -> (T, B, F * D), or (T + 1, B, F * D) with the shared stream.

    Raises:
        ValueError: there is no task, or the fields are specific to another number of them.

    >>> tower = TaskRefinement((3, 4), num_tasks=2, shared_stream=True)
    >>> x = torch.randn(5, 3, 4)
    >>> tower.out_shape, tower(x).shape, tower.gate_weights(x).shape
    ((3, 12), torch.Size([3, 5, 12]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        *,
        num_tasks: int,
        hidden: int | None = None,
        per_element: bool = False,
        shared_stream: bool = False,
    ) -> None:
        super().__init__()
        *tasks, num_fields, dim = in_shape
        if num_tasks < 1 or tasks not in ([], [num_tasks]):
            raise ArgumentError(
                f"TaskRefinement of {num_tasks} tasks expects fields (F, D) or ({num_tasks}, F, D), got "
                f"{tuple(in_shape)}"
            )
        width = num_fields * dim
        hidden = max(8, width // 4) if hidden is None else hidden
        num_gates = width if per_element else num_fields
        self.gate_shape = (num_fields, num_gates // num_fields)
        self.in_shape, self.out_shape = tuple(in_shape), (num_tasks + shared_stream, width)
        self.num_tasks, self.shared_stream = num_tasks, shared_stream
        self.squeeze = nn.Parameter(torch.empty(num_tasks, width, hidden))
        self.squeeze_bias = nn.Parameter(torch.zeros(num_tasks, 1, hidden))
        self.excite = nn.Parameter(torch.empty(num_tasks, hidden, num_gates))
        self.excite_bias = nn.Parameter(torch.zeros(num_tasks, 1, num_gates))
        for weight in (self.squeeze, self.excite):
            nn.init.normal_(weight, std=math.sqrt(2 / sum(weight.shape[1:])))  # Xavier, task by task

    def gate_weights(self, x: Tensor) -> Tensor:
        """The importance of every field (or element) for every task, from 0 to 2: -> (T, B, F)."""
        x_TBH = x.flatten(-2).expand(self.num_tasks, -1, -1)
        hidden = torch.baddbmm(self.squeeze_bias, x_TBH, self.squeeze).relu()
        return 2 * torch.baddbmm(self.excite_bias, hidden, self.excite).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, D) or (T, B, F, D) -> (T, B, F * D), or one stream more."""
        gates = self.gate_weights(x).view(self.num_tasks, -1, *self.gate_shape)
        refined = gates * x
        if self.shared_stream:
            shared = x if len(self.in_shape) == 2 else x.mean(0)
            refined = torch.cat([refined, shared.unsqueeze(0)])
        return refined.flatten(2)
