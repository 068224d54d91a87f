"""Evolutionary search over lists of small whole numbers, such as the width of each field.

As OptEmbed means it (F. Lyu et al., CIKM 2022, https://arxiv.org/abs/2208.04482): each generation mutates and crosses
the best candidates so far. In its code the recorded score is that of another candidate, parents are changed in place,
nothing keeps the best, and 1 is never drawn; on a known fitness it does no better than as many random candidates.
Here candidates are tuples, each is scored once, parents are the best of all that were ever scored, and a limit on the
size holds for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ctrlib.errors import ArgumentError

Genes = tuple[int, ...]


@dataclass(frozen=True)
class Evolution:
    """How many candidates: at most parents + generations * (mutations + crossovers) are scored.

    Raises:
        ValueError: a value is out of its range.
    """

    generations: int = 30
    """Without any, the search is random."""
    parents: int = 15
    """The best so many breed; as many random candidates are the first generation."""
    mutations: int = 10
    """New candidates of a generation with some genes drawn anew."""
    crossovers: int = 10
    """And with their first genes from one parent, the others from another."""
    mutation_rate: float = 0.1
    """Of each gene; one of them at least is drawn."""

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("generations", self.generations, 0, float("inf")),
            ("parents", self.parents, 1, float("inf")),
            ("mutations", self.mutations, 0, float("inf")),
            ("crossovers", self.crossovers, 0, float("inf")),
            ("mutation_rate", self.mutation_rate, 0, 1),
        ):
            if not least <= value <= most:
                raise ArgumentError(f"Evolution: {name} must be between {least} and {most}, got {value}")

    @property
    def num_evaluations(self) -> int:
        """How many candidates are scored at most."""
        return self.parents + self.generations * (self.mutations + self.crossovers)


@dataclass(frozen=True)
class Found:
    """`best` has the highest fitness of all in `scored`, candidate -> fitness in the order of scoring; the first of
    equals. `curve`: the highest so far after each generation, the first, random one included."""

    best: Genes
    fitness: float
    scored: dict[Genes, float]
    curve: list[float]


def evolve(
    fitness: Callable[[Genes], float],
    *,
    length: int,
    largest: int,
    size: Callable[[Genes], float] = lambda genes: 0.0,
    budget: float = float("inf"),
    first: Sequence[Genes] = (),
    settings: Evolution | None = None,
    seed: int = 0,
) -> Found:
    """The fittest list of `length` numbers from 1 to `largest` whose size is within the budget, as far as is seen.

    A candidate beyond the budget has random genes lowered until it is within: where small ones are rare, to draw again
    would take for ever.

    Args:
        fitness: called once for each candidate; more is better.
        length: genes of a candidate.
        largest: of a gene; the smallest is 1.
        size: must not rise where a gene falls.
        budget: no candidate has a larger size.
        first: candidates of the first generation, filled up with random ones.
        settings: how many.
        seed: of all draws.

    Raises:
        ValueError: even the smallest candidate is beyond the budget, or a first one has other genes.

    >>> found = evolve(lambda genes: -abs(sum(genes) - 11), length=4, largest=8, size=sum, budget=10)
    >>> sum(found.best), found.fitness, found.scored[found.best]
    (10, -1.0, -1.0)
    """
    settings, rng = settings or Evolution(), np.random.default_rng(seed)
    if length < 1 or largest < 1:
        raise ArgumentError(
            f"expected one gene or more, from 1 to 1 or more, got length={length} and largest={largest}"
        )
    if size((1,) * length) > budget:
        raise ArgumentError(
            f"the budget of {budget:,} is below the smallest size, {size((1,) * length):,}: ask for more"
        )
    for genes in first:
        if len(genes) != length or not all(1 <= gene <= largest for gene in genes):
            raise ArgumentError(f"first candidate {genes}: expected {length} numbers from 1 to {largest}")
    scored: dict[Genes, float] = {}
    curve: list[float] = []

    def fit(genes: list[int]) -> Genes:
        while size(tuple(genes)) > budget:
            place = rng.choice([place for place, gene in enumerate(genes) if gene > 1])
            genes[place] = int(rng.integers(1, genes[place]))
        return tuple(genes)

    def drawn() -> list[int]:
        return [int(gene) for gene in rng.integers(1, largest + 1, length)]

    def mutated() -> list[int]:
        genes = list(parents[rng.integers(len(parents))])
        chosen = rng.random(length) < settings.mutation_rate
        chosen[rng.integers(length)] = True
        return [int(rng.integers(1, largest + 1)) if draw else gene for gene, draw in zip(genes, chosen)]

    def crossed() -> list[int]:
        one, other = (parents[place] for place in rng.integers(len(parents), size=2))
        cut = int(rng.integers(1, max(2, length)))
        return [*one[:cut], *other[cut:]]

    def score(make: Callable[[], list[int]], number: int) -> None:
        """New candidates only; of a small space there may be none left."""
        for _ in range(number):
            for _ in range(20):
                if (genes := fit(make())) not in scored:
                    scored[genes] = float(fitness(genes))
                    break

    for genes in first[: settings.parents]:
        score(lambda genes=genes: list(genes), 1)  # type: ignore[misc]
    score(drawn, settings.parents - len(scored))
    for generation in range(settings.generations + 1):
        if generation:
            score(mutated, settings.mutations)
            score(crossed, settings.crossovers)
        # Sorting is stable: of equals, the first that was scored.
        parents = sorted(scored, key=lambda genes: -scored[genes])[: settings.parents]
        curve.append(scored[parents[0]])
    return Found(parents[0], scored[parents[0]], scored, curve)
