"""OptInter: how each pair of features should interact. F. Lyu et al., "Memorize, Factorize, or be Naive: Learning
Optimal Feature Interaction Methods for CTR Prediction", ICDE 2022, https://arxiv.org/abs/2108.01265.

A pair can be memorised, with a row for each pair of values that train holds, factorised, as the product of two vectors,
or left alone. The search has all three, z_p = a_m mem_p + a_f fac_p + a_n 0 with a = softmax(alpha_p / t) and a
temperature t that falls, and learns alpha along with the weights. Then the choice is made, and the model is trained
again from scratch, with no more than the crosses that were chosen.

Where this differs from the paper and its code:

* Joint search on train leans to memorising, since what is memorised fits train best. `bilevel` learns alpha on
  validation, as its own step after each one of the weights.
* The paper describes Gumbel noise, and the code has none: `gumbel` adds it, one draw a step for each pair.
* The temperature counts steps of training (in the code evaluation counts too). alpha starts at 0, without a bias.
* Crosses are counted on train, pair by pair, and each pair has a row of its own for all others. Vectors start at the
  scale 1 / sqrt(fields * d_2), which the code squares.
* z_p is brought into the fields by learned matrices (see `CrossTables`), so that any tower can read it.
* What is left alone is gone, in the network too, and only chosen crosses have rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.batch import Batch
from ctrlib.data.loader import Loader
from ctrlib.embeddings.crosses import Pair, PairVectors, add_crosses, projection
from ctrlib.embeddings.narrow import NarrowTables
from ctrlib.errors import ArgumentError
from ctrlib.model import Model
from ctrlib.schema import Categorical
from ctrlib.search.plan import Plan
from ctrlib.search.stages import identity_of, search_epochs, without_end
from ctrlib.sharding.shards import State
from ctrlib.structure import put
from ctrlib.training.crossing import PATH, count_crosses, cross_tables, rows_of, with_base
from ctrlib.training.exact import ExactEngine
from ctrlib.training.loop import NonFiniteLossError
from ctrlib.training.state import make_adam, optimiser_state

CHOICES = ("memorise", "factorise", "naive")


@dataclass(frozen=True)
class OptInter:
    """How to search; the paper's values for Criteo in brackets.

    Raises:
        ValueError: a value is out of its range.
    """

    cross_dim: int = 8
    """d_2, the width of memorised and factorised vectors [10]."""
    min_count: int = 1
    """A cross that train has less often has no row of its own [20]."""
    features: Sequence[str] | None = None
    """The categorical features whose pairs are searched; None: all."""
    epochs: int = 3
    """Of the search."""
    learning_rate: float = 1e-3
    """Adam's, of the weights [1e-4]."""
    alpha_learning_rate: float = 1e-2
    """Adam's, of alpha [1e-3]: in a few hundred steps less would not leave 0 behind."""
    bilevel: bool = True
    """alpha learns from validation, after each step of the weights; else from train, together with them, as in the
    code."""
    gumbel: bool = False
    """Gumbel noise on log softmax(alpha) in training."""
    temperature_step: float = 5e-5
    """What the temperature, 1 at first, falls by at each step of training [5e-5];"""
    temperature_floor: float = 0.01
    """as far as this [0.01]."""
    embedding_l2: float = 0.0
    """L2 on whole tables [3e-8, on those of crosses and factors only]."""

    def __post_init__(self) -> None:
        if self.features is not None:
            object.__setattr__(self, "features", tuple(self.features))
        for name, least in (
            ("cross_dim", 1),
            ("min_count", 1),
            ("epochs", 1),
            ("learning_rate", 0),
            ("alpha_learning_rate", 0),
            ("temperature_step", 0),
            ("embedding_l2", 0),
        ):
            if not getattr(self, name) >= least:
                raise ArgumentError(f"OptInter: {name} must be {least} or more, got {getattr(self, name)}")
        if not 0 < self.temperature_floor <= 1:
            raise ArgumentError(f"OptInter: temperature_floor must be in (0, 1], got {self.temperature_floor}")


def temperature_at(step: int, settings: OptInter) -> float:
    """t before the step of that number, from 0: 1 - step * temperature_step, and no less than the floor.

    >>> [temperature_at(step, OptInter()) for step in (0, 10_000, 19_800, 10**6)]
    [1.0, 0.5, 0.01, 0.01]
    """
    return max(settings.temperature_floor, 1 - settings.temperature_step * step)


class SoftCrosses(nn.Module):
    """e'_f = e_f + sum_p P_pf z_p with z_p = a_m mem_p + a_f fac_p, a = softmax(alpha_p / t): what the search looks up.

    `alpha` (pairs, 3), memorise, factorise and naive, and the number of `steps` are buffers: no engine trains them.
    With `gumbel` and in training, a = softmax((log softmax(alpha_p) + G) / t).

    Shape: KeyedJaggedTensor -> KeyedTensor, the keys and widths of `base`.
    """

    alpha: Tensor
    steps: Tensor

    def __init__(self, base: NarrowTables, vectors: PairVectors, settings: OptInter) -> None:
        super().__init__()
        self.base, self.vectors, self.settings = base, vectors, settings
        self.names, self.embedding_dim = base.names, base.embedding_dim
        self.projection = projection(len(vectors.memorised), vectors.cross_dim, base)
        self.register_buffer("alpha", torch.zeros(len(vectors.memorised), len(CHOICES)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def mixture(self) -> Tensor:
        """a: (pairs, 3)."""
        logits = self.alpha
        if self.settings.gumbel and self.training:
            logits = logits.log_softmax(1) - torch.empty_like(self.alpha).exponential_().log()
        return (logits / temperature_at(int(self.steps), self.settings)).softmax(1)

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        fields = self.base(kjt)
        memorised, factorised = self.vectors(kjt).chunk(2, dim=1)
        mixture = self.mixture()
        z_BPC = mixture[:, 0, None] * memorised + mixture[:, 1, None] * factorised
        return add_crosses(fields, self.names, self.projection(z_BPC.flatten(1)))


class JointEngine(ExactEngine):
    """The exact engine with a second Adam, for alpha: on the same gradient, or on validation after each step.

    A step on validation takes the gradient with respect to alpha alone, at the weights as they now are and in
    evaluation mode: it trains no weight, and moves no running statistics.
    """

    def __init__(self, model: Model, lookup: SoftCrosses, valid: Loader, settings: OptInter) -> None:
        super().__init__(
            model, learning_rate=settings.learning_rate, embedding_l2=settings.embedding_l2, max_grad_norm=None
        )
        self._lookup, self._bilevel = lookup, settings.bilevel
        self._held_out = functools.partial(without_end, valid)
        self._alpha_optimiser = make_adam({"alpha": lookup.alpha}, settings.alpha_learning_rate)

    def state(self) -> State:
        """The exact engine's, and alpha's moments; alpha is in the model."""
        return {**super().state(), **optimiser_state(self._alpha_optimiser, {"alpha": self._lookup.alpha})}

    def train(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """A step of the weights and one of alpha for every batch."""
        held_out = self._held_out()
        alpha = self._lookup.alpha
        try:
            for batch in batches:
                alpha.requires_grad_(not self._bilevel)
                loss = self.step(batch)
                if torch.isfinite(loss):
                    if self._bilevel:
                        alpha.grad = self.gradient(next(held_out))
                    self._step_alpha()
                yield batch, loss
        finally:
            alpha.requires_grad_(False)

    def gradient(self, batch: Batch) -> Tensor:
        """d loss / d alpha, (pairs, 3)."""
        alpha = self._lookup.alpha.requires_grad_()
        self.model.eval()
        self._lookup.train()  # for the noise
        try:
            loss = self.loss(self.model(batch), batch.labels, batch.weights)
            (gradient,) = torch.autograd.grad(loss, alpha)
        finally:
            self.model.train()
            alpha.requires_grad_(False)
        return gradient

    def _step_alpha(self) -> None:
        alpha = self._lookup.alpha
        if alpha.grad is None or not torch.isfinite(alpha.grad).all():
            raise NonFiniteLossError(
                "the gradient of alpha is NaN or infinite: check validation's numbers, or lower the learning rate"
            )
        self._alpha_optimiser.step()
        self._alpha_optimiser.zero_grad()
        self._lookup.steps += 1


def search(
    model: Model,
    train: Loader,
    valid: Loader,
    *,
    settings: OptInter | None = None,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Plan:
    """How each pair is to interact, and fresh tables for that, to train from scratch.

    Args:
        model: freshly built, any tower, on a `TableEmbedding` with plain tables; it is not changed. Retraining starts
            from its weights.
        train: trains the weights; crosses are counted on it.
        valid: trains alpha, if `bilevel`.
        settings: the method's.
        seed: of the new tables, of noise and dropout.
        out: folder where the search is kept after every epoch; started again there, it goes on.
        console: gets a line an epoch.

    Raises:
        NotImplementedError: there are several processes.
        NonFiniteLossError: a loss, or the gradient of alpha, is NaN or infinite.
        ValueError: the model has no such tables, there are no two features to cross, or `out` holds another search.
    """
    settings, console = settings or OptInter(), console or Console(stderr=True)
    identity = identity_of(model, train, settings, seed)
    features = _features(train, settings)
    pairs = list(itertools.combinations(features, 2))
    train.set_epoch(0)
    crosses = count_crosses(train, pairs, rows_of(train.schema), min_count=settings.min_count)
    torch.manual_seed(seed)
    searched, lookup = soft_model(model, pairs, crosses, settings)
    engine = JointEngine(searched, lookup, valid, settings)

    def after(epoch: int) -> bool:
        chosen = lookup.alpha.argmax(dim=1)
        counts = ", ".join(f"{int((chosen == place).sum())} {choice}" for place, choice in enumerate(CHOICES))
        console.print(f"  temperature {temperature_at(int(lookup.steps), settings):.3f}: {counts}", highlight=False)
        return False

    search_epochs(engine, train, settings.epochs, after=after, out=out, identity=identity, console=console)
    choice = [CHOICES[place] for place in lookup.alpha.argmax(dim=1).tolist()]
    return plan_of(model, pairs, crosses, choice, cross_dim=settings.cross_dim, seed=seed, alpha=lookup.alpha)


def _features(train: Loader, settings: OptInter) -> list[str]:
    """Those to cross."""
    able = [feature.name for feature in train.schema.sparse if isinstance(feature, Categorical)]
    chosen = able if settings.features is None else list(settings.features)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen) or set(chosen) - set(able):
        raise ArgumentError(f"OptInter: expected two or more of the categorical features {able} to cross, got {chosen}")
    return chosen


def soft_model(
    model: Model, pairs: Sequence[Pair], crosses: Sequence[Tensor], settings: OptInter
) -> tuple[Model, SoftCrosses]:
    """A copy of the model that looks up through `SoftCrosses`, and these.

    Raises:
        ValueError: the embedding has no plain tables.
    """
    searched, base = with_base(model)
    owners = {name: table for table in base.stored.values() for name in table.feature_names}
    vectors = PairVectors(
        {name: table.rows for name, table in owners.items()},
        {name: table.name for name, table in owners.items()},
        memorised=pairs,
        factorised=pairs,
        num_crosses=sum(map(len, crosses)),
        cross_dim=settings.cross_dim,
    )
    vectors.set_crosses(crosses)
    lookup = SoftCrosses(base, vectors, settings)
    put(searched, PATH, lookup)
    return searched, lookup


def plan_of(
    model: Model,
    pairs: Sequence[Pair],
    crosses: Sequence[Tensor],
    choice: Sequence[str],
    *,
    cross_dim: int,
    seed: int = 0,
    alpha: Tensor | None = None,
) -> Plan:
    """The plan of a choice among `CHOICES` for each pair: the model's tables, and new ones for what is chosen.

    `crosses`: those of each pair that have a row if it is memorised, as `count_crosses` gives them. Random search, or
    one's own idea of what interacts, becomes a model this way.

    Raises:
        ValueError: there is not one known choice for each pair.
    """
    if len(choice) != len(pairs) or set(choice) - set(CHOICES):
        raise ArgumentError(f"expected one of {CHOICES} for each of {len(pairs)} pairs, got {list(choice)}")
    summary = _summary(pairs, choice, crosses, alpha)
    if set(choice) == {"naive"}:
        return Plan("optinter", {}, {}, summary)
    torch.manual_seed(seed)
    lookup = cross_tables(
        with_base(model)[1],
        [found for found, kind in zip(crosses, choice) if kind == "memorise"],
        memorised=[pair for pair, kind in zip(pairs, choice) if kind == "memorise"],
        factorised=[pair for pair, kind in zip(pairs, choice) if kind == "factorise"],
        cross_dim=cross_dim,
    )
    weights = {f"{PATH}.{name}": tensor for name, tensor in lookup.state_dict().items()}
    return Plan("optinter", {PATH: {"kind": "crosses", **lookup.describe()}}, weights, summary)


def _summary(
    pairs: Sequence[Pair], choice: Sequence[str], crosses: Sequence[Tensor], alpha: Tensor | None
) -> dict[str, Any]:
    """What is to be said and drawn."""
    fields = list(dict.fromkeys(itertools.chain(*pairs)))
    matrix: list[list[str | None]] = [[None] * len(fields) for _ in fields]
    for (first, second), kind in zip(pairs, choice):
        i, j = fields.index(first), fields.index(second)
        matrix[i][j] = matrix[j][i] = kind
    number = {kind: [len(found) for found, chosen in zip(crosses, choice) if chosen == kind] for kind in CHOICES}
    words = [
        f"Of {len(pairs)} pairs of features, {len(number['memorise'])} are memorised ({sum(number['memorise']):,} of "
        f"{sum(map(len, crosses)):,} crosses), {len(number['factorise'])} factorised and {len(number['naive'])} left "
        "alone."
    ]
    memorised = [" x ".join(pair) for pair, kind in zip(pairs, choice) if kind == "memorise"]
    if memorised:
        more = f" and {len(memorised) - 12} more" if len(memorised) > 12 else ""
        words.append(f"Memorised: {', '.join(memorised[:12])}{more}.")
    summary: dict[str, Any] = {"words": words, "pairs": {"fields": fields, "choice": matrix}}
    if alpha is not None:
        summary["alpha"] = {"*".join(pair): [round(a, 4) for a in row] for pair, row in zip(pairs, alpha.tolist())}
    return summary
