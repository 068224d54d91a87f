"""UltraGCN trained on all items: each user's whole row of scores, in blocks, by products of matrices.

The sampled form of Gowalla draws 1,500 negatives for each of 810,128 pairs, 1.2e9 in an epoch. There are as many pairs
of any user with any item (29,858 x 40,981 = 1.2e9), so the expectation over the draws costs no more than the draws, and
has no variance: with the scores S = E V^T of a block of users, the gradient of the loss by S is

    T = (p b^T + q) * sigmoid(S) + W * (sigmoid(S) - 1)

with the weights p, q, b of the negatives (`Objective.negative_weights`) and the sparse W of the positives, and that by
the vectors is T V and T^T E: three products of matrices, 6 U I D operations a sweep (4.7e11 for Gowalla at D = 64). S
and T live in one buffer, which is a tile of some users and some items.

Adam steps follow each block of users: on all item vectors, and on the vectors of the block, whose rows see one step a
sweep. L2 is gamma times the number of batches of the sampled form, spread over the steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import softplus

from ctrlib.retrieval.evaluate import entries
from ctrlib.retrieval.methods import Ints
from ctrlib.retrieval.objective import Objective

TILE = 4096  # items at a time: with 256 users a tile of float32 is 4 MB, which stays in the cache
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Rows:
    """What the loss says of some users: their positive weights, cut into tiles of items, and p and q of negatives."""

    tiles: tuple[sparse.csr_matrix, ...]
    p: Tensor
    q: Tensor
    simple: bool  # whether q is 0

    @classmethod
    def of(cls, objective: Objective, histories: sparse.csr_matrix | None = None, tile: int = TILE) -> Rows:
        """Of the users of training, or of others with their histories."""
        positive = sparse.csr_matrix(objective.positive_weights(histories), dtype=np.float32)
        starts = range(0, objective.num_items, tile)
        tiles = tuple(sparse.csr_matrix(positive[:, start : start + tile]) for start in starts)
        p, q = objective.negative_weights(histories)
        return cls(tiles, p.float(), q.float(), not q.any())


def gradients(
    rows: Rows, factor: Tensor, users: Ints, user_vectors: Tensor, item_vectors: Tensor, item_gradient: Tensor | None
) -> Tensor:
    """The gradient of the loss of some users, without L2, by their vectors; that by the items' is added up.

    Args:
        rows: what the loss says of all users.
        factor: (I,) b.
        users: (B,) which of them.
        user_vectors: (B, D) of those.
        item_vectors: (I, D)
        item_gradient: (I, D) to add to, or None.
    """
    found = torch.zeros_like(user_vectors)
    chosen = torch.from_numpy(users)
    p, q = rows.p[chosen][:, None], rows.q[chosen][:, None]
    start = 0
    for positive in rows.tiles:
        stop = start + positive.shape[1]
        items = item_vectors[start:stop]
        tile = torch.mm(user_vectors, items.T).sigmoid_()
        places, columns = entries(positive, users)
        weights = torch.from_numpy(_values(positive, users))
        flat = torch.from_numpy(places * positive.shape[1] + columns)
        pull = tile.view(-1)[flat].sub_(1).mul_(weights)
        if rows.simple:
            tile.mul_(p).mul_(factor[start:stop])
        else:
            tile.mul_(torch.addcmul(q, p, factor[start:stop]))
        tile.view(-1).index_add_(0, flat, pull)
        found.addmm_(tile, items)
        if item_gradient is not None:
            item_gradient[start:stop].addmm_(tile.T, user_vectors)
        start = stop
    return found


def loss_of(rows: Rows, factor: Tensor, users: Ints, user_vectors: Tensor, item_vectors: Tensor) -> float:
    """The loss of some users, without L2."""
    total, start = 0.0, 0
    chosen = torch.from_numpy(users)
    p, q = rows.p[chosen][:, None], rows.q[chosen][:, None]
    for positive in rows.tiles:
        stop = start + positive.shape[1]
        scores = user_vectors @ item_vectors[start:stop].T
        places, columns = entries(positive, users)
        seen = scores[torch.from_numpy(places), torch.from_numpy(columns)]
        total += float((torch.from_numpy(_values(positive, users)) * softplus(-seen)).sum())
        total += float((softplus(scores) * torch.addcmul(q, p, factor[start:stop])).sum())
        start = stop
    return total


class Adam:
    """Adam on the rows of one table; `step` updates some of them, or all."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)

    def step(self, gradient: Tensor, number: int, rate: float, rows: Tensor | None = None) -> None:
        """The `number`-th update, from 1, of all rows, or of those given."""
        mean = self.mean if rows is None else self.mean[rows]
        square = self.square if rows is None else self.square[rows]
        mean.mul_(BETAS[0]).add_(gradient, alpha=1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        rate, scale = rate / (1 - BETAS[0] ** number), math.sqrt(1 - BETAS[1] ** number)
        step = mean / (square.sqrt().div_(scale).add_(EPS))
        if rows is None:
            self.table.sub_(step, alpha=rate)
        else:
            self.mean[rows], self.square[rows] = mean, square
            self.table.index_add_(0, rows, step, alpha=-rate)


class Sweeper:
    """Sweeps over all users and items that update two tables in place.

    Args:
        objective: the loss.
        user_vectors: (U, D), which change.
        item_vectors: (I, D), which change.
        users_per_step: users in a block, after each of which there is a step.
        seed: number that the order of users is drawn from.
    """

    def __init__(
        self, objective: Objective, user_vectors: Tensor, item_vectors: Tensor, *, users_per_step: int, seed: int
    ) -> None:
        self.objective, self.users_per_step = objective, users_per_step
        self.rows = Rows.of(objective)
        self.factor = objective.item_factor.float()
        self.user_vectors, self.item_vectors = user_vectors, item_vectors
        self._of_users, self._of_items = Adam(user_vectors), Adam(item_vectors)
        self._order = np.random.default_rng(seed)
        self._sweeps = self._steps = 0

    def sweep(self, user_rate: float, item_rate: float) -> None:
        """One pass over all users, in an order drawn anew."""
        self._sweeps += 1
        num_users = self.objective.num_users
        l2 = self.objective.weights.l2 * self.objective.num_batches
        order = self._order.permutation(num_users)
        for start in range(0, num_users, self.users_per_step):
            self._steps += 1
            users = np.sort(order[start : start + self.users_per_step])
            chosen = torch.from_numpy(users)
            vectors = self.user_vectors[chosen]
            of_items = self.item_vectors * (l2 * len(users) / num_users)
            of_users = gradients(self.rows, self.factor, users, vectors, self.item_vectors, of_items)
            of_users.add_(vectors, alpha=l2)
            self._of_users.step(of_users, self._sweeps, user_rate, chosen)
            self._of_items.step(of_items, self._steps, item_rate)

    def loss(self) -> float:
        """L of all users, L2 included."""
        l2 = self.objective.weights.l2 * self.objective.num_batches / 2
        total: float = l2 * float(self.user_vectors.square().sum() + self.item_vectors.square().sum())
        for start in range(0, self.objective.num_users, self.users_per_step):
            users = np.arange(start, min(start + self.users_per_step, self.objective.num_users))
            vectors = self.user_vectors[torch.from_numpy(users)]
            total += loss_of(self.rows, self.factor, users, vectors, self.item_vectors)
        return total


def _values(matrix: sparse.csr_matrix, rows: Ints) -> npt.NDArray[np.float32]:
    """The values of the entries of some rows, in the order of `entries`."""
    starts = matrix.indptr[rows].astype(np.int64)
    lengths = matrix.indptr[rows + 1] - starts
    shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    values: npt.NDArray[np.float32] = matrix.data[np.arange(lengths.sum()) + shift]
    return values
