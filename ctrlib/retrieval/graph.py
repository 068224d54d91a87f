"""What UltraGCN takes from the graph: weights of user-item edges, and the strongest neighbours of each item.

UltraGCN: Mao, Zhu, Xiao, Lu, Wang, He, CIKM 2021, https://arxiv.org/abs/2110.15114. With degrees d of a user-item
matrix A of ones, G = A^T A and g_i the sum of row i of G:

    beta_ui     = sqrt((d_u + 1) / (d_i + 1)) / d_u
    omega_ij    = G_ij / g_i * sqrt((g_i + 1) / (g_j + 1))        form "code": what the authors' program computes
    omega_ij    = G_ij / (g_i - G_ii) * sqrt(g_i / g_j), i != j   form "paper"

In the program's form the diagonal stays, and an item is mostly its own nearest neighbour. G is never held as a whole:
rows are made some at a time, and K entries of each kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from ctrlib.errors import ArgumentError, check_whole

Form = Literal["code", "paper"]
Floats = npt.NDArray[np.float64]
ROWS = 512  # of G at a time


def user_factor(matrix: sparse.csr_matrix) -> Floats:
    """sqrt(d_u + 1) / d_u of each user; 0 for one without items, whose edges have no weight as there are none.

    beta is this times `item_factor`, so of rank one.

    >>> matrix = sparse.csr_matrix([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    >>> np.outer(user_factor(matrix), item_factor(matrix))[0].round(4).tolist()
    [0.5, 0.433, 0.433, 0.6124]
    """
    degrees = np.diff(sparse.csr_matrix(matrix).indptr).astype(np.float64)
    return np.where(degrees > 0, np.sqrt(degrees + 1) / np.maximum(degrees, 1), 0.0)


def item_factor(matrix: sparse.csr_matrix) -> Floats:
    """1 / sqrt(d_i + 1) of each item."""
    degrees = np.bincount(sparse.csr_matrix(matrix).indices, minlength=matrix.shape[1])
    return 1 / np.sqrt(degrees + 1.0)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ItemGraph:
    """The K strongest neighbours of each item.

    `neighbours` (I, K) are items, strongest first, of equal weights the earlier; -1 where there are fewer. `weights`
    (I, K) are their omega, 0 where there is none.
    """

    neighbours: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]

    @classmethod
    def build(cls, matrix: Any, num_neighbours: int = 10, form: Form = "code") -> ItemGraph:
        """Of a (users, items) matrix of ones.

        Raises:
            ArgumentError: there is no such form, or no neighbour is asked for.

        >>> matrix = sparse.csr_matrix([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=np.float32)
        >>> ItemGraph.build(matrix, 2, "paper").neighbours[:3].tolist()
        [[1, 2], [0, 2], [1, 3]]
        """
        check_whole(1, num_neighbours=num_neighbours)
        if form not in ("code", "paper"):
            raise ArgumentError(f"form (--omega) is {form!r}, expected code or paper")
        users = sparse.csr_matrix(matrix, dtype=np.float64)
        items = sparse.csr_matrix(users.T)
        sums = np.asarray(items @ (users @ np.ones(users.shape[1]))).ravel()
        diagonal = np.diff(items.indptr)
        if form == "code":
            own = np.sqrt(sums + 1) / np.maximum(sums, 1)
            other = 1 / np.sqrt(sums + 1)
        else:
            own = np.sqrt(sums) / np.maximum(sums - diagonal, 1)
            other = 1 / np.sqrt(np.maximum(sums, 1))
        num_items = users.shape[1]
        neighbours = np.full((num_items, num_neighbours), -1, np.int64)
        weights = np.zeros((num_items, num_neighbours), np.float32)
        for start in range(0, num_items, ROWS):
            counts = sparse.csr_matrix(items[start : start + ROWS] @ users)
            counts.sort_indices()
            for row, item in enumerate(range(start, start + counts.shape[0])):
                part = slice(counts.indptr[row], counts.indptr[row + 1])
                columns = counts.indices[part]
                omega = counts.data[part] * own[item] * other[columns]
                if form == "paper":
                    columns, omega = columns[columns != item], omega[columns != item]
                best = largest(omega, num_neighbours)
                neighbours[item, : len(best)], weights[item, : len(best)] = columns[best], omega[best]
        return cls(neighbours, weights)

    def matrix(self) -> sparse.csr_matrix:
        """The same as a sparse (I, I) matrix."""
        there = self.neighbours >= 0
        rows = np.repeat(np.arange(len(there)), there.sum(axis=1))
        shape = (len(there), len(there))
        return sparse.csr_matrix((self.weights[there], (rows, self.neighbours[there])), shape=shape)


def largest(values: Floats, k: int) -> npt.NDArray[np.int64]:
    """The places of the k largest, largest first, of equal ones the earlier."""
    if len(values) > k:
        least = np.partition(values, -k)[-k]
        above = np.flatnonzero(values > least)
        places = np.concatenate([above, np.flatnonzero(values == least)[: k - len(above)]])
    else:
        places = np.arange(len(values))
    return places[np.lexsort((places, -values[places]))]
