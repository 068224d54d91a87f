"""A moving average of the weights: what is scored and kept, beside the weights that are trained."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.layers import Dice, Dropout
from ctrlib.sharding.shards import State

SHARPNESS = 9  # eta of the paper: the last tenth of the steps is what counts
BATCHES = 20  # by which statistics of averaged weights are taken


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


def renew_statistics(model: nn.Module, batches: Iterable[Batch], *, device: str | torch.device = "cpu") -> None:
    """Give batch normalisation the statistics of the weights that a model has, by the first `BATCHES` batches.

    Those of training are of other weights than their average, and mix the weights of some ten steps. Dropout is as in
    training, and everything else as in evaluation. `fit` does so before it validates; who takes steps by hand with
    `average_weights` does so before the model is scored. Of several processes, every one must call it.

    >>> from ctrlib.testing import example_batch, example_schema
    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> model = models.mlp(Inputs(example_schema(), embedding_dim=4), hidden=(8,), batch_norm=True)
    >>> renew_statistics(model, [example_batch(example_schema(), 32, seed=seed) for seed in range(3)])
    """
    normalised = [part for part in model.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm | Dice)]
    if not normalised:
        return
    momenta = [part.momentum for part in normalised]
    was_training = model.training
    model.eval()
    for part in [*normalised, *(part for part in model.modules() if isinstance(part, Dropout | nn.Dropout))]:
        part.train()
    with torch.no_grad():
        for number, batch in enumerate(itertools.islice(batches, BATCHES), 1):
            for part in normalised:
                part.momentum = 1 / number  # so that each batch weighs the same
            model(batch.to(torch.device(device)))
    for part, momentum in zip(normalised, momenta):
        part.momentum = momentum
    model.train(was_training)
