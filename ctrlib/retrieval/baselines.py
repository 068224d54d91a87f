"""What a method of retrieval is to be measured against: popularity, ItemCF, EASE and iALS.

* `Popularity`: an item's score is how many training users it has.
* `ItemCF`: the sum of an item's similarity to the items of the user, over the K nearest neighbours of each of those
  (Sarwar et al., WWW 2001, https://doi.org/10.1145/371920.372071).
* `EASE`: a linear autoencoder with a zero diagonal, in closed form (Steck, WWW 2019, https://arxiv.org/abs/1905.03375).
* `IALS`: weighted matrix factorisation by alternating least squares (Hu, Koren, Volinsky, ICDM 2008) with the weights
  and the scaled regularisation of Rendle et al., "Revisiting the performance of iALS on item recommendation
  benchmarks", RecSys 2022, https://arxiv.org/abs/2110.14037.

They are written here, and not taken from a library, because all of them are a few products of matrices, and the
libraries that have them fill up short lists with items that do not exist, or bring numpy 1 along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from scipy import linalg, sparse
from torch import Tensor

from ctrlib.errors import ArgumentError, check_number, check_whole
from ctrlib.retrieval.evaluate import entries
from ctrlib.retrieval.graph import ROWS, largest
from ctrlib.retrieval.interactions import Interactions
from ctrlib.retrieval.methods import Ints, Vectors, Watch, check_history, csr_of, csr_state, dense


class Popularity:
    """s_ui = d_i: the same list for everybody.

    >>> log = Interactions.of_matrix([[1, 1, 0], [0, 1, 0]])
    >>> Popularity().fit(log).scores(np.array([0])).tolist()
    [[1.0, 2.0, 0.0]]
    """

    needs_history = False  # of a user
    counts: Tensor

    def fit(self, log: Interactions, *, seed: int = 0, watch: Watch | None = None) -> Popularity:
        """Count the users of each item; nothing is drawn and there are no epochs."""
        self.counts = torch.from_numpy(np.bincount(log.matrix.indices, minlength=log.num_items)).float()
        return self

    def scores(self, users: Ints) -> Tensor:
        """Scores of all items for some of the users, (B,) -> (B, I)."""
        return self.counts.repeat(len(users), 1)

    def fold_in(self, histories: sparse.csr_matrix) -> Tensor:
        """The same scores, (B, I) ones -> (B, I)."""
        check_history(histories, len(self.counts))
        return self.counts.repeat(histories.shape[0], 1)

    def state(self) -> dict[str, Tensor]:
        """The counts."""
        return {"counts": self.counts}

    def load(self, state: Mapping[str, Tensor]) -> Popularity:
        """Put back what `state` gave."""
        self.counts = state["counts"]
        return self


class _FromHistory:
    """s_u = A_u B: scores are products of a user's row of ones and a square matrix of weights between items."""

    needs_history = True
    histories: sparse.csr_matrix
    weights: Any  # (I, I), sparse, or an array

    def scores(self, users: Ints) -> Tensor:
        """Scores of all items for some of the users, (B,) -> (B, I)."""
        return self.fold_in(self.histories[users])

    def fold_in(self, histories: sparse.csr_matrix) -> Tensor:
        """Scores of all items for users of whom only items are known, (B, I) ones -> (B, I)."""
        check_history(histories, self.weights.shape[0])
        scores = histories @ self.weights
        if not sparse.issparse(scores):
            return torch.from_numpy(np.asarray(scores, dtype=np.float32))
        found = dense(scores)
        return found.masked_fill_(found == 0, -torch.inf)  # neighbour of nothing that the user has

    def state(self) -> dict[str, Tensor]:
        """The weights between items, and the users' rows."""
        if sparse.issparse(self.weights):
            return {**csr_state("histories", self.histories), **csr_state("weights", self.weights)}
        return {**csr_state("histories", self.histories), "weights": torch.from_numpy(self.weights)}

    def load(self: Any, state: Mapping[str, Tensor]) -> Any:
        """Put back what `state` gave."""
        self.histories = csr_of("histories", state)
        self.weights = state["weights"].numpy() if "weights" in state else csr_of("weights", state)
        return self


class ItemCF(_FromHistory):
    """s_ui = sum over items j of the user that have i among their K nearest of G_ij / (d_i^a d_j^(1-a) + shrinkage).

    G counts the users of both. With a = 1/2 and no shrinkage the similarity is the cosine. An item is no neighbour of
    its own, and one that is a neighbour of nothing that the user has is no candidate: its score is -inf.

    Args:
        num_neighbours: K.
        exponent: a, how much popular items lose.
        shrinkage: added below the line, so that few common users count less.

    >>> log = Interactions.of_matrix([[1, 1, 0], [1, 1, 0], [0, 1, 1]])
    >>> ItemCF().fit(log).scores(np.array([2])).numpy().round(2)
    array([[0.82, 0.58, 0.58]], dtype=float32)
    """

    def __init__(self, *, num_neighbours: int = 100, exponent: float = 0.5, shrinkage: float = 0.0) -> None:
        check_whole(1, num_neighbours=num_neighbours)
        check_number(0, exponent=exponent, shrinkage=shrinkage)
        self.num_neighbours, self.exponent, self.shrinkage = num_neighbours, exponent, shrinkage

    def fit(self, log: Interactions, *, seed: int = 0, watch: Watch | None = None) -> ItemCF:
        """Find the neighbours of each item; nothing is drawn and there are no epochs."""
        users = sparse.csr_matrix(log.matrix, dtype=np.float64)
        items = sparse.csr_matrix(users.T)
        degrees = np.maximum(np.diff(items.indptr), 1).astype(np.float64)
        own, other = degrees ** (1 - self.exponent), degrees**self.exponent
        data, indices, lengths = [], [], []
        for start in range(0, log.num_items, ROWS):
            counts = sparse.csr_matrix(items[start : start + ROWS] @ users)
            counts.sort_indices()
            for row, item in enumerate(range(start, start + counts.shape[0])):
                part = slice(counts.indptr[row], counts.indptr[row + 1])
                columns, common = counts.indices[part], counts.data[part]
                similar = common / (own[item] * other[columns] + self.shrinkage)
                columns, similar = columns[columns != item], similar[columns != item]
                best = np.sort(largest(similar, self.num_neighbours))
                data.append(similar[best].astype(np.float32))
                indices.append(columns[best])
                lengths.append(len(best))
        parts = (np.concatenate(data), np.concatenate(indices), np.concatenate([[0], np.cumsum(lengths)]))
        self.weights = sparse.csr_matrix(parts, shape=(log.num_items, log.num_items))
        self.histories = log.matrix
        return self


class EASE(_FromHistory):
    """s_u = A_u B with B = argmin |A - A B|^2 + l2 |B|^2 and diag B = 0: with P = (A^T A + l2)^-1, B_ij = -P_ij / P_jj.

    Where there are fewer users than items, P is never made: since A P = M A with M = (A A^T + l2)^-1, a matrix between
    users tells all scores. Either inverse takes n^3 multiplications and one n x n matrix, with n the smaller of the
    numbers of users and items: n = 30,000 is 3.6 GB in float32.

    Args:
        l2: the penalty.
        double: compute in float64; by default where n is below 10,000.

    >>> log = Interactions.of_matrix([[1, 1], [0, 1]])
    >>> EASE(l2=1.0).fit(log).scores(np.array([1])).numpy().round(2)  # P is [[3, -1], [-1, 2]] / 5
    array([[0.33, 0.  ]], dtype=float32)
    """

    between_users: Tensor | None = None  # M, (U, U)
    diagonal: Tensor  # of P, (I,); only beside M

    def __init__(self, *, l2: float = 500.0, double: bool | None = None) -> None:
        check_number(0, above=True, l2=l2)
        self.l2, self.double = l2, double

    def fit(self, log: Interactions, *, seed: int = 0, watch: Watch | None = None) -> EASE:
        """Invert the matrix; nothing is drawn and there are no epochs."""
        smaller = min(log.num_users, log.num_items)
        double = smaller < 10_000 if self.double is None else self.double
        users = sparse.csr_matrix(log.matrix, dtype=np.float64 if double else np.float32)
        items = sparse.csr_matrix(users.T)
        self.histories, self.between_users = log.matrix, None
        if log.num_users < log.num_items:
            inverse = _penalised_inverse(users, self.l2)
            explained = np.empty(log.num_items, users.dtype)  # a_j^T M a_j of each item
            for start in range(0, log.num_items, ROWS):
                some = items[start : start + ROWS]
                explained[start : start + ROWS] = some.multiply(some @ inverse).sum(axis=1).A1
            self.diagonal = torch.from_numpy((1 - explained) / self.l2).float()
            self.between_users = torch.from_numpy(inverse.astype(np.float32, copy=False))
            return self
        inverse = _penalised_inverse(items, self.l2)
        diagonal = inverse.diagonal().copy()
        inverse /= -diagonal
        inverse[np.diag_indices(log.num_items)] = 0
        self.weights = inverse.astype(np.float32, copy=False)
        return self

    def scores(self, users: Ints) -> Tensor:
        """Scores of all items for some of the users, (B,) -> (B, I)."""
        if self.between_users is None:
            return super().scores(users)
        rows = self.between_users[torch.from_numpy(np.asarray(users))].numpy()
        return self._less(dense(self.histories, users), torch.from_numpy((self.histories.T @ rows.T).T))

    def fold_in(self, histories: sparse.csr_matrix) -> Tensor:
        """Scores of all items for users of whom only items are known, (B, I) ones -> (B, I)."""
        if self.between_users is None:
            return super().fold_in(histories)
        check_history(histories, self.histories.shape[1])
        common = histories @ self.histories.T  # items that they share with users of training
        known = (self.histories.T @ (common @ self.between_users.numpy()).T).T
        own = dense(histories)
        return self._less(own, (own - torch.from_numpy(known)) / self.l2)

    def _less(self, histories: Tensor, product: Tensor) -> Tensor:
        """H B = H - H P / diag P, given H P."""
        return histories - product / self.diagonal

    def state(self) -> dict[str, Tensor]:
        """The users' rows, and the weights between items, or what stands for them where users are fewer."""
        if self.between_users is None:
            return super().state()
        parts = {"between_users": self.between_users, "diagonal": self.diagonal}
        return {**csr_state("histories", self.histories), **parts}

    def load(self, state: Mapping[str, Tensor]) -> EASE:
        """Put back what `state` gave."""
        self.between_users = state.get("between_users")
        if self.between_users is not None:
            self.histories, self.diagonal = csr_of("histories", state), state["diagonal"]
        else:
            super().load(state)
        return self


def _penalised_inverse(rows: sparse.csr_matrix, l2: float) -> Any:
    """(R R^T + l2)^-1 of a sparse matrix R, (n, m) -> (n, n), in its own type and in the memory of the result."""
    size, columns = rows.shape[0], sparse.csr_matrix(rows.T)
    gram = np.empty((size, size), rows.dtype, order="F")
    for start in range(0, size, ROWS):  # columns, which are rows as well
        gram[:, start : start + ROWS] = (rows[start : start + ROWS] @ columns).toarray().T
    gram[np.diag_indices(size)] += l2
    factorise, invert = linalg.get_lapack_funcs(("potrf", "potri"), (gram,))
    factor, failed = factorise(gram, lower=True, overwrite_a=True, clean=False)
    if failed:
        raise ArgumentError(f"A^T A + {l2} has no Cholesky factor in {rows.dtype}: give a larger l2")
    inverse, _ = invert(factor, lower=True, overwrite_c=True)
    for start in range(0, size, ROWS):  # only the lower triangle was filled
        stop = min(start + ROWS, size)
        corner = inverse[start:stop, start:stop]
        corner[:] = np.tril(corner) + np.tril(corner, -1).T
        inverse[start:stop, stop:] = inverse[stop:, start:stop].T
    return inverse.T  # the same, with rows in one piece, which products with sparse matrices would copy it for


class IALS(Vectors):
    """s_ui = e_u . v_i, the minimum of

        sum over pairs (s_ui - 1)^2 + alpha sum over all u, i s_ui^2
        + l2 (sum_u (d_u + alpha I)^nu |e_u|^2 + sum_i (d_i + alpha U)^nu |v_i|^2)

    found by solving for all users and all items in turn.

    Args:
        embedding_dim: D.
        alpha: weight of what was not observed.
        l2: the penalty.
        nu: how much the penalty grows with the number of terms that a vector is in.
        epochs: how often both sides are solved for.
        init_std: standard deviation of the first item vectors, times sqrt(D).
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 64,
        alpha: float = 0.3,
        l2: float = 0.003,
        nu: float = 1.0,
        epochs: int = 16,
        init_std: float = 0.1,
    ) -> None:
        check_whole(1, embedding_dim=embedding_dim, epochs=epochs)
        check_number(0, above=True, alpha=alpha, l2=l2, init_std=init_std)
        check_number(0, nu=nu)
        self.embedding_dim, self.alpha, self.l2, self.nu = embedding_dim, alpha, l2, nu
        self.epochs, self.init_std = epochs, init_std

    def fit(self, log: Interactions, *, seed: int = 0, watch: Watch | None = None) -> IALS:
        """Solve for users and items in turn, `epochs` times or until `watch` says so."""
        generator = torch.Generator().manual_seed(seed)
        shape = (log.num_items, self.embedding_dim)
        self.item_vectors = torch.randn(shape, generator=generator) * (self.init_std / self.embedding_dim**0.5)
        items = sparse.csr_matrix(log.matrix.T)
        items.sort_indices()
        for epoch in range(1, self.epochs + 1):
            self.user_vectors = self._solved(log.matrix, self.item_vectors)
            self.item_vectors = self._solved(items, self.user_vectors)
            if watch is not None and watch(epoch):
                break
        return self

    def loss(self, log: Interactions) -> float:
        """What is minimised, in float64; holds the matrix of all scores."""
        users, items = self.user_vectors.double(), self.item_vectors.double()
        scores, pairs = users @ items.T, dense(log.matrix).double()
        degrees = [pairs.sum(dim) + self.alpha * pairs.shape[dim] for dim in (1, 0)]
        penalty = sum((n**self.nu * v.square().sum(1)).sum() for n, v in zip(degrees, (users, items)))
        fits = (pairs * (scores - 1).square()).sum() + self.alpha * scores.square().sum()
        return float(fits + self.l2 * penalty)

    def vectors_of(self, histories: sparse.csr_matrix) -> Tensor:
        """Vectors of users of whom only items are known, solved for as in training, (B, I) ones -> (B, D)."""
        check_history(histories, len(self.item_vectors))
        return self._solved(histories, self.item_vectors)

    def _solved(self, matrix: sparse.csr_matrix, others: Tensor) -> Tensor:
        """The best vectors of the rows of a matrix, given those of its columns.

        A row with the vectors S (L, D) of its entries has (C + s + S^T S)^-1 S^T 1, with C of all columns and its own
        penalty s. Where L < D the smaller system is solved: with C = Q diag(c) Q^T and T = S Q it is
        Q E T^T (1 + T E T^T)^-1 1, with the diagonal E = 1 / (c + s).
        """
        num_rows, num_columns = matrix.shape
        degrees, dim = np.diff(matrix.indptr), others.shape[1]
        common = self.alpha * (others.T @ others)
        scale = torch.from_numpy((degrees + self.alpha * num_columns) ** self.nu * self.l2).to(others.dtype)
        spectrum, basis = (part.to(others.dtype) for part in torch.linalg.eigh(common.double()))
        padded = torch.cat([others, others.new_zeros(1, dim)])
        spectrum, turned = spectrum.clamp(min=0), padded @ basis
        found = torch.empty(num_rows, dim, dtype=others.dtype)
        for rows in blocks_of_rows(degrees, dim):
            table, _ = padded_columns(matrix, rows)
            chosen = torch.from_numpy(rows)
            if table.shape[1] < dim:
                seen = turned[table]
                divided = seen / (spectrum + scale[chosen][:, None])[:, None]
                system = torch.bmm(divided, seen.mT)
                system.diagonal(dim1=1, dim2=2).add_(1)
                ones = system.new_ones(len(rows), table.shape[1], 1)
                shares = torch.cholesky_solve(ones, torch.linalg.cholesky(system))
                found[chosen] = (divided.mT @ shares)[:, :, 0] @ basis.T
            else:
                seen = padded[table]
                system = torch.baddbmm(common.expand(len(rows), -1, -1), seen.mT, seen)
                system.diagonal(dim1=1, dim2=2).add_(scale[chosen][:, None])
                solution = torch.cholesky_solve(seen.sum(1)[:, :, None], torch.linalg.cholesky(system))
                found[chosen] = solution[:, :, 0]
        return found


def padded_columns(matrix: sparse.csr_matrix, rows: Ints) -> tuple[Tensor, Tensor]:
    """The columns of the entries of some rows and their values, both (B, L) with L the longest row's.

    Places left empty are one above the last column, and 0.

    >>> columns, values = padded_columns(sparse.csr_matrix([[0, 2, 0], [3, 0, 4]]), np.array([0, 1]))
    >>> columns.tolist(), values.tolist()
    ([[1, 3], [0, 2]], [[2.0, 0.0], [3.0, 4.0]])
    """
    places, columns = entries(matrix, rows)
    starts, degrees = matrix.indptr[rows].astype(np.int64), np.diff(matrix.indptr)[rows]
    first = np.concatenate([[0], np.cumsum(degrees)[:-1]])
    ranks = np.arange(len(places)) - first[places]
    shape = len(rows), max(int(degrees.max()), 1)
    table, values = np.full(shape, matrix.shape[1]), np.zeros(shape, np.float32)
    table[places, ranks] = columns
    values[places, ranks] = matrix.data[starts[places] + ranks]
    return torch.from_numpy(table), torch.from_numpy(values)


def blocks_of_rows(degrees: Ints, width: int, budget: int = 1 << 22) -> Iterator[Ints]:
    """Rows of about equal length together, so many that their padded vectors and systems are `budget` numbers."""
    order = np.argsort(degrees, kind="stable")
    start = 0
    while start < len(order):
        stop = min(start + max(1, budget // (width * width)), len(order))
        while stop - start > 1 and (stop - start) * int(degrees[order[stop - 1]]) * width > budget:
            stop = start + max(1, (stop - start) // 2)
        yield order[start:stop]
        start = stop
