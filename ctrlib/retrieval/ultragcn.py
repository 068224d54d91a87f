"""UltraGCN: vectors of users and items whose products are logits, trained without message passing.

Mao, Zhu, Xiao, Lu, Wang, He, CIKM 2021, https://arxiv.org/abs/2110.15114; the authors' program is at
https://github.com/xue-pai/UltraGCN. `ctrlib.retrieval.objective` has the loss. What differs from the program:

* `negatives="all"` takes the expectation over its negatives, with Newton steps of all users and all items in turn
  (`ctrlib.retrieval.newton`); "per_pair" is the program's way, "shared" draws for a whole batch
  (`ctrlib.retrieval.sampled`), both with steps of Adam.
* `start="ials"` begins with vectors of `IALS`, scaled to be logits. From small random vectors, the program's way, the
  first hundreds of steps learn that most pairs are none, and only then who likes what.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ctrlib.errors import ArgumentError, check_number, check_whole
from ctrlib.retrieval.baselines import IALS
from ctrlib.retrieval.interactions import Interactions
from ctrlib.retrieval.methods import Vectors, Watch, check_history, dense
from ctrlib.retrieval.newton import Half
from ctrlib.retrieval.objective import Objective, Weights
from ctrlib.retrieval.sampled import Draws, Engine, Sampler, make_tables

Negatives = Literal["all", "per_pair", "shared"]
Start = Literal["ials", "normal"]
FOLD_STEPS = 10  # of Newton, for a new user


class UltraGCN(Vectors):
    """s_ui = e_u . v_i, trained on `ctrlib.retrieval.objective`.

    Args:
        weights: the settings of the loss.
        embedding_dim: D.
        negatives: "all" items in expectation; or so many draws "per_pair", or "shared" by a batch.
        num_negatives: how many are drawn.
        sift: draw again what a user has; of "per_pair".
        start: where the vectors begin: a solution of `ials`, or N(0, init_std^2).
        ials: settings of that solution, but for its width, which is D - 1 with one column for the constant.
        init_std: of a normal start.
        epochs: passes over all pairs where negatives are drawn, or Newton steps of both sides.
        step_share: how much of each Newton step is taken, up to 1.
        learning_rate: of Adam, where negatives are drawn.
        engine: of drawn negatives, as in `ctrlib.retrieval.sampled`.
        sharding: of the fused engine.

    Raises:
        ArgumentError: a setting is out of range, or does not go with another.
    """

    def __init__(
        self,
        weights: Weights | None = None,
        *,
        embedding_dim: int = 64,
        negatives: Negatives = "all",
        num_negatives: int = 1500,
        sift: bool = False,
        start: Start = "ials",
        ials: IALS | None = None,
        init_std: float = 1e-4,
        epochs: int = 20,
        step_share: float = 1.0,
        learning_rate: float = 1e-3,
        engine: Engine = "exact",
        sharding: Literal["table_wise", "row_wise"] = "table_wise",
    ) -> None:
        for name, value, known in (
            ("negatives", negatives, get_args(Negatives)),
            ("start", start, get_args(Start)),
            ("engine", engine, get_args(Engine)),
        ):
            if value not in known:
                raise ArgumentError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        check_whole(2, embedding_dim=embedding_dim)
        check_whole(1, num_negatives=num_negatives, epochs=epochs)
        check_number(0, above=True, init_std=init_std, learning_rate=learning_rate, step_share=step_share)
        if step_share > 1:
            raise ArgumentError(f"step_share is {step_share}, expected at most 1, a whole Newton step")
        if sift and negatives != "per_pair":
            raise ArgumentError('sift goes with negatives="per_pair" only')
        self.weights, self.embedding_dim, self.negatives = weights or Weights(), embedding_dim, negatives
        self.draws = Draws(num_negatives, negatives == "shared", sift)
        self.start, self.ials, self.init_std, self.epochs = start, ials or IALS(epochs=4), init_std, epochs
        self.step_share, self.learning_rate, self.engine, self.sharding = step_share, learning_rate, engine, sharding

    def fit(self, log: Interactions, *, seed: int = 0, watch: Watch | None = None) -> UltraGCN:
        """Train for `epochs`, or until `watch` says so."""
        self.prepare(log)
        users, items = self._first_vectors(log, seed)
        if self.negatives == "all":
            self.user_vectors, self.item_vectors = users, items
            of_users, of_items = Half.of_users(self._objective), Half.of_items(self._objective)
            generator = torch.Generator().manual_seed(seed)
            for epoch in range(1, self.epochs + 1):
                of_users.step(users, items, generator, self.step_share)
                of_items.step(items, users, generator, self.step_share)
                if watch is not None and watch(epoch):
                    break
            return self
        tables = make_tables(log.num_users, log.num_items, self.embedding_dim, init_std=self.init_std, seed=seed)
        for table, first in zip(tables.embeddings.values(), (users, items)):
            table.weight.data.copy_(first)
        sampler = Sampler(
            self._objective,
            tables,
            self.draws,
            learning_rate=self.learning_rate,
            seed=seed,
            engine=self.engine,
            sharding=self.sharding,
        )
        for epoch in range(1, self.epochs + 1):
            sampler.epoch()
            if watch is not None or epoch == self.epochs:
                self.user_vectors, self.item_vectors = sampler.vectors()
            if watch is not None and watch(epoch):
                break
        return self

    def prepare(self, log: Interactions) -> None:
        """Take the weights of the loss from training pairs: `fit` does; needed by `fold_in` of what was loaded."""
        self._objective = Objective(log.matrix, self.weights)

    def _first_vectors(self, log: Interactions, seed: int) -> tuple[Tensor, Tensor]:
        if self.start == "normal":
            generator = torch.Generator().manual_seed(seed)
            shapes = [(size, self.embedding_dim) for size in log.matrix.shape]
            users, items = (torch.randn(shape, generator=generator) * self.init_std for shape in shapes)
            return users, items
        settings = self.ials
        solution = IALS(
            embedding_dim=self.embedding_dim - 1,
            alpha=settings.alpha,
            l2=settings.l2,
            nu=settings.nu,
            epochs=settings.epochs,
            init_std=settings.init_std,
        ).fit(log, seed=seed)
        return as_logits(solution, self._objective, seed)

    def vectors_of(self, histories: sparse.csr_matrix) -> Tensor:
        """Vectors of users of whom only items are known: they minimise the loss of those, with L2, item vectors fixed.

        (B, I) ones -> (B, D). The problem is convex; from the mean of known users ten Newton steps are taken.
        """
        check_history(histories, len(self.item_vectors))
        half = Half.of_users(self._objective, histories)
        vectors = self.user_vectors.mean(0).repeat(histories.shape[0], 1)
        generator = torch.Generator().manual_seed(0)
        for _ in range(FOLD_STEPS):
            half.step(vectors, self.item_vectors, generator)
        return vectors


def as_logits(solution: IALS, objective: Objective, seed: int, num_users: int = 400) -> tuple[Tensor, Tensor]:
    """Vectors one wider than those of iALS, whose products are a s_ui + c, with the a and c of the least loss.

    a and c are found by Newton's method on some users' whole rows; with the last column of users equal to a constant,
    and that of items to another, c is a product of vectors too.
    """
    some = np.random.default_rng(seed).permutation(objective.num_users)[:num_users]
    scores = solution.scores(np.sort(some)).double()
    positive = torch.from_numpy(objective.positive_weights()[np.sort(some)].toarray())
    p, q = (part[torch.from_numpy(np.sort(some))][:, None] for part in objective.negative_weights())
    negative = p * objective.item_factor + q
    line = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(50):
        chances = (line[0] * scores + line[1]).sigmoid()
        slope = negative * chances - positive * (1 - chances)
        curve = (negative + positive) * chances * (1 - chances)
        gradient = torch.stack([(slope * scores).sum(), slope.sum()])
        mixed = (curve * scores).sum()
        hessian = torch.stack([(curve * scores * scores).sum(), mixed, mixed, curve.sum()]).view(2, 2)
        step = torch.linalg.solve(hessian + 1e-9 * torch.eye(2, dtype=torch.float64), gradient)
        line -= step * min(1.0, 2 / float(step.abs().max() + 1e-30))
    a, c = max(float(line[0]), 1e-3), float(line[1])
    users, items = solution.user_vectors, solution.item_vectors
    balance = float(items.square().mean().sqrt() / users.square().mean().sqrt().clamp(min=1e-12)) ** 0.5
    constant = math.sqrt(max(abs(c), 1e-6))
    return (
        torch.cat([users * (math.sqrt(a) * balance), torch.full((len(users), 1), constant)], 1).contiguous(),
        torch.cat([items * (math.sqrt(a) / balance), torch.full((len(items), 1), c / constant)], 1).contiguous(),
    )


def official(dataset: Literal["gowalla", "movielens_1m"]) -> UltraGCN:
    """The settings that the published numbers were made with, with the epochs to the best of them.

    >>> official("gowalla").weights.negative_weight
    300.0
    """
    if dataset == "gowalla":
        return UltraGCN(
            negatives="per_pair", num_negatives=1500, start="normal", init_std=1e-4, epochs=635, learning_rate=1e-4
        )
    weights = replace(Weights(), w1=1e-7, w3=1e-7, negative_weight=200.0, neighbour_weight=1e-3, batch_size=1024)
    return UltraGCN(
        weights,
        embedding_dim=128,
        negatives="per_pair",
        num_negatives=200,
        start="normal",
        init_std=1e-3,
        epochs=87,
        learning_rate=1e-3,
    )


__all__ = ["UltraGCN", "as_logits", "dense", "official"]
