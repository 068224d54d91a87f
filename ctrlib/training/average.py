"""A moving average of the weights: what is scored and kept, beside the weights that are trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ctrlib.sharding.shards import State

SHARPNESS = 9  # eta of the paper: the last tenth of the steps is what counts


class WeightAverage:
    """The polynomial-decay average of weights over training, which a model holds whenever it is not in a step.

    After step t, average += 10 / (t + 9) (weights - average): about the last tenth of all steps so far, so that early
    ones are forgotten and no horizon has to be set. An average lies nearer to the optimum than the last weights, which
    jump about it by their learning rate, most where a penalty on tables pulls rows between their rare visits.

    Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization: Convergence Results and Optimal
    Averaging Schemes", ICML 2013, https://arxiv.org/abs/1212.1824 (polynomial-decay averaging), with eta = 9.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> average = WeightAverage({"w": weight})
    >>> for value in (11.0, 0.0):
    ...     with average.trained():
    ...         _ = weight.data.fill_(value)  # as a step would
    ...     average.update()
    >>> round(weight.item(), 6)  # 10 / 11 of the way from 11 to 0
    1.0
    >>> average.state()["trained.w"].item()
    0.0
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        self._named = named
        self._other = {name: parameter.detach().clone() for name, parameter in named.items()}
        self._steps = torch.zeros((), dtype=torch.int64)

    @contextlib.contextmanager
    def trained(self) -> Iterator[None]:
        """Within it, the model holds the weights that are trained."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._named.items():
            parameter.data, self._other[name] = self._other[name], parameter.data

    def update(self) -> None:
        """After a step, outside `trained`."""
        self._steps += 1
        share = (SHARPNESS + 1) / (self._steps.item() + SHARPNESS)
        torch._foreach_lerp_([parameter.data for parameter in self._named.values()], list(self._other.values()), share)

    def start_anew(self) -> None:
        """Train from what the model holds: it has got other weights."""
        for name, parameter in self._named.items():
            self._other[name].copy_(parameter.data)
        self._steps.zero_()

    def forget(self, weight: nn.Parameter, rows: Tensor) -> None:
        """Within `trained`: rows of this table have started anew, and so do their averages."""
        for name, parameter in self._named.items():
            if parameter is weight:
                self._other[name][rows] = weight.data[rows]

    def state(self) -> State:
        """What the next step depends on beside the model's own weights, not copies: trained.NAME, average.steps."""
        return {**{f"trained.{name}": tensor for name, tensor in self._other.items()}, "average.steps": self._steps}
