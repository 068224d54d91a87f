"""UltraGCN trained on all items: Newton steps of all users and of all items in turn, as alternating least squares does.

The sampled form of Gowalla draws 1,500 negatives for each of 810,128 pairs, 1.2e9 in an epoch. There are as many pairs
of any user with any item (29,858 x 40,981 = 1.2e9), so the expectation over the draws costs no more than the draws, and
has no variance. Given the vectors y_j of one side, each vector x of the other is the minimum of a convex function

    sum over j of n_j softplus(x . y_j) + sum over some j of w_j softplus(-x . y_j) + l2 / 2 |x|^2

whose negative weights are of rank one (or two, with w3), n_j = left * right_j. With S = X Y^T the gradients of a block
of rows are left * (T (right * Y)) with T = sigmoid(S) + (sigmoid(S) - 1) w / n: two products of matrices and a sigmoid
in between, over tiles that stay in the cache.

A Newton step needs each row's curvature, a D x D matrix. What positives add to it, and negatives whose chance is not
small, is worked out for each row. What all the others add has nearly the same shape for all rows, and is taken to be
one matrix, scaled for each row, both from a sample of columns. The near ones count with the curvature of the quadratic
that touches softplus from above (Jaakkola and Jordan, 2000), lest a step go too far where softplus is straight.

From vectors of iALS about ten steps of both sides are enough; Adam takes ten times as many passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import softplus

from ctrlib.retrieval.baselines import blocks_of_rows, padded_columns
from ctrlib.retrieval.objective import Objective

ROWS, TILE = 256, 2048  # a tile of float32 is 2 MB
SAMPLE = 2048  # columns that curvature is taken from
HOT = 0.1  # columns with a chance above it add to a row's curvature one by one
LIGHT = 0.01  # of the largest weight of a row: lighter positives add nothing to its curvature


class Half:
    """The loss as a function of the vectors of one side, users or items, given those of the other.

    Args:
        positive: (R, C) what softplus(-s) is multiplied by, sparse.
        left: one (R,) or several.
        right: as many (C,): softplus(s_rc) is multiplied by the sum of left_r right_c over them, above 0 where there is
            a positive.
        l2: the penalty, l2 / 2 for each squared number.
        tile: columns at a time.
    """

    def __init__(
        self, positive: sparse.csr_matrix, left: Sequence[Tensor], right: Sequence[Tensor], l2: float, tile: int = TILE
    ) -> None:
        self.num_rows, self.num_columns = positive.shape
        terms = [(one.float(), other.float()) for one, other in zip(left, right) if one.any() and other.any()]
        self.left, self.right = [one for one, _ in terms], [other for _, other in terms]
        self.l2, self.tile = l2, tile
        positive = sparse.csr_matrix(positive, dtype=np.float32)
        rows = np.repeat(np.arange(self.num_rows), np.diff(positive.indptr))
        ratio = positive.data / self._negative(torch.from_numpy(rows), torch.from_numpy(positive.indices)).numpy()
        ratios = sparse.csr_matrix((ratio, positive.indices, positive.indptr), positive.shape)
        self._ratios = [sparse.csr_matrix(ratios[:, at : at + tile]) for at in range(0, self.num_columns, tile)]
        largest = np.maximum(positive.max(axis=1).toarray()[:, 0], 0)
        heavy = positive.data >= LIGHT * np.repeat(largest, np.diff(positive.indptr))
        kept = np.concatenate([[0], np.cumsum(heavy)])[positive.indptr]
        self._heavy = sparse.csr_matrix((positive.data[heavy], positive.indices[heavy], kept), positive.shape)

    @classmethod
    def of_users(cls, objective: Objective, histories: sparse.csr_matrix | None = None, tile: int = TILE) -> Half:
        """Of the users of training, or of others with their histories."""
        l2 = objective.weights.l2 * objective.num_batches
        right = objective.item_factor, torch.ones(objective.num_items)
        return cls(objective.positive_weights(histories), objective.negative_weights(histories), right, l2, tile)

    @classmethod
    def of_items(cls, objective: Objective, tile: int = TILE) -> Half:
        """Of the items."""
        l2 = objective.weights.l2 * objective.num_batches
        left = objective.item_factor, torch.ones(objective.num_items)
        positive = sparse.csr_matrix(objective.positive_weights().T)
        return cls(positive, left, objective.negative_weights(), l2, tile)

    def gradient(self, vectors: Tensor, others: Tensor) -> Tensor:
        """By the vectors (R, D), with those of the columns (C, D): (R, D)."""
        return self._pass(vectors, others)[0]

    def _pass(self, vectors: Tensor, others: Tensor, hot: float = 1.0) -> tuple[Tensor, sparse.csr_matrix]:
        """The gradient; and where the chances are above `hot`, as a matrix of the weights of negatives."""
        width = vectors.shape[1]
        weighted = torch.cat([others * right[:, None] for right in self.right], 1)
        found = vectors * self.l2
        buffer = vectors.new_empty(ROWS * self.tile)
        places: list[Tensor] = []
        for start in range(0, self.num_rows, ROWS):
            rows = slice(start, min(start + ROWS, self.num_rows))
            block = vectors[rows]
            summed = block.new_zeros(len(block), weighted.shape[1])
            for number, ratios in enumerate(self._ratios):
                columns = slice(number * self.tile, number * self.tile + ratios.shape[1])
                chances = buffer[: len(block) * ratios.shape[1]].view(len(block), -1)
                torch.mm(block, others[columns].T, out=chances).sigmoid_()
                if hot < 1:
                    places.append((chances > hot).nonzero().add_(torch.tensor([start, columns.start])))
                _pull(chances, ratios[rows])
                summed.addmm_(chances, weighted[columns])
            for left, part in zip(self.left, torch.split(summed, width, dim=1)):
                found[rows].addcmul_(left[rows, None], part)
        if not places:
            return found, sparse.csr_matrix((self.num_rows, self.num_columns), dtype=np.float32)
        row, column = torch.cat(places).T
        parts = self._negative(row, column).numpy(), (row.numpy(), column.numpy())
        return found, sparse.csr_matrix(parts, self._heavy.shape)

    def _negative(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Weights of negatives at some places."""
        return torch.stack([left[rows] * right[columns] for left, right in zip(self.left, self.right)]).sum(0)

    def step(self, vectors: Tensor, others: Tensor, generator: torch.Generator, share: float = 1.0) -> None:
        """One Newton step of every row, or a share of it: `vectors` (R, D) change in place."""
        gradient, hot = self._pass(vectors, others, HOT)
        near = self._heavy + hot
        shape, sizes = self._far_curvature(vectors, others, generator)
        padded = torch.cat([others, others.new_zeros(1, others.shape[1])])
        for rows in blocks_of_rows(np.diff(near.indptr), others.shape[1]):
            chosen = torch.from_numpy(rows)
            table, weights = padded_columns(near, rows)
            seen = padded[table]
            scores = torch.bmm(seen, vectors[chosen][:, :, None])[:, :, 0]
            weights = weights * curvature(scores)
            system = torch.baddbmm(sizes[chosen][:, None, None] * shape, (seen * weights[:, :, None]).mT, seen)
            system.diagonal(dim1=1, dim2=2).add_(self.l2 + 1e-6)
            factor = torch.linalg.cholesky(system)
            vectors[chosen] -= share * torch.cholesky_solve(gradient[chosen][:, :, None], factor)[:, :, 0]

    def _far_curvature(self, vectors: Tensor, others: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the rest adds to the curvature, from a sample of columns: a matrix (D, D), and each row's multiple."""
        some = torch.randperm(self.num_columns, generator=generator)[:SAMPLE]
        sample, right = others[some], torch.stack([one[some] for one in self.right])
        left = torch.stack(self.left)
        shape, sizes = others.new_zeros(2 * [others.shape[1]]), []
        for start in range(0, self.num_rows, ROWS):
            chances = (vectors[start : start + ROWS] @ sample.T).sigmoid_()
            chances.masked_fill_(chances > HOT, 0)
            own = left[:, start : start + ROWS]
            sizes.append((own * (right @ chances.T)).sum(0))
            shape.addmm_((sample * (right * (own @ chances)).sum(0)[:, None]).T, sample)
        size = torch.cat(sizes)
        return shape / size.sum().clamp(min=1e-20), size * (self.num_columns / len(some))

    def loss(self, vectors: Tensor, others: Tensor) -> float:
        """Of these vectors, with their L2."""
        total = self.l2 / 2 * float(vectors.square().sum())
        for start in range(0, self.num_rows, ROWS):
            rows = slice(start, min(start + ROWS, self.num_rows))
            for number, ratios in enumerate(self._ratios):
                columns = slice(number * self.tile, number * self.tile + ratios.shape[1])
                scores = vectors[rows] @ others[columns].T
                negative = sum(torch.outer(one[rows], two[columns]) for one, two in zip(self.left, self.right))
                positive = negative * torch.from_numpy(ratios[rows].toarray())
                total += float((softplus(scores) * negative + softplus(-scores) * positive).sum())
        return total


def _pull(chances: Tensor, ratios: sparse.csr_matrix) -> None:
    """Add (chance - 1) w / n of the positives to a tile of chances."""
    rows = np.repeat(np.arange(len(chances)), np.diff(ratios.indptr))
    flat = torch.from_numpy(rows * chances.shape[1] + ratios.indices)
    chances.view(-1).index_add_(0, flat, (chances.view(-1)[flat] - 1).mul_(torch.from_numpy(ratios.data)))


def curvature(scores: Tensor) -> Tensor:
    """Of the quadratic that touches softplus at each score and at its negative, and is nowhere below it.

    >>> curvature(torch.tensor([0.0, 2.0, -2.0]))
    tensor([0.2500, 0.1904, 0.1904])
    """
    return torch.where(scores.abs() < 1e-3, 0.25, (scores.sigmoid() - 0.5) / scores)
