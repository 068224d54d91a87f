"""What UltraGCN minimises, as its program has it, with everything named and the sum written out.

Of a (users, items) matrix of ones with degrees d_u, and beta and omega as in `ctrlib.retrieval.graph`:

    L = sum over pairs (u, i) [ (w1 + w2 beta_ui) softplus(-s_ui)
                                + N_w mean over negatives j of (w3 + w4 beta_uj) softplus(s_uj)
                                + lambda sum over neighbours j of i of omega_ij softplus(-s_uj) ]
        + gamma / 2 |all vectors|^2 for each batch of `batch_size` pairs

It is a SUM over pairs and never a mean: with a batch of half the size the gradient is half as large, and L2 acts twice
as often. Negatives are drawn uniformly from all items, so their expectation is a sum over all items j, for each user u

    N_w d_u / I  sum over j (w3 + w4 beta_uj) softplus(s_uj),

in which each user occurs once and the weights are of rank one (`exact_loss`; `ctrlib.retrieval.newton` computes it in
blocks, by matrix products). With free logits, lambda = gamma = 0, the minimum is `optimum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import softplus

from ctrlib.errors import ArgumentError, check_number, check_whole
from ctrlib.retrieval.graph import Form, ItemGraph, item_factor, user_factor
from ctrlib.retrieval.methods import Ints, dense


@dataclass(frozen=True)
class Weights:
    """The settings of the loss, under the program's names.

    `w1` to `w4` as above; `negative_weight` N_w, `neighbour_weight` lambda, `l2` gamma, which acts once for every
    `batch_size` pairs; `num_neighbours` K of `omega`, "code" or "paper". The defaults are those of Gowalla.
    """

    w1: float = 1e-6
    w2: float = 1.0
    w3: float = 1e-6
    w4: float = 1.0
    negative_weight: float = 300.0
    neighbour_weight: float = 5e-4
    l2: float = 1e-4
    batch_size: int = 512
    num_neighbours: int = 10
    omega: Form = "code"

    def __post_init__(self) -> None:
        check_number(0, w1=self.w1, w2=self.w2, w3=self.w3, w4=self.w4)
        check_number(0, neighbour_weight=self.neighbour_weight, l2=self.l2)
        check_number(0, above=True, negative_weight=self.negative_weight)
        check_whole(1, batch_size=self.batch_size, num_neighbours=self.num_neighbours)
        if self.w1 == self.w2 == 0 or self.w3 == self.w4 == 0:
            raise ArgumentError("w1 and w2, or w3 and w4, are both 0: nothing would be learnt of pairs, or of the rest")


class Objective:
    """The loss of one matrix: factors of beta, positive weights of pairs and their neighbours, and how they add up.

    Args:
        matrix: (users, items) ones.
        weights: the settings.

    `user_factor` (U,) and `item_factor` (I,) make beta; `graph` has the neighbours, or is None without lambda;
    `num_batches` is how often L2 acts in a pass over all pairs.
    """

    def __init__(self, matrix: sparse.csr_matrix, weights: Weights) -> None:
        self.matrix, self.weights = matrix, weights
        self.num_users, self.num_items = matrix.shape
        self.degrees = torch.from_numpy(np.diff(matrix.indptr).astype(np.float64))
        self.item_degrees = torch.from_numpy(np.bincount(matrix.indices, minlength=self.num_items).astype(np.float64))
        self.user_factor = torch.from_numpy(user_factor(matrix))
        self.item_factor = torch.from_numpy(item_factor(matrix))
        self.num_batches = math.ceil(matrix.nnz / weights.batch_size)
        self.graph = (
            ItemGraph.build(matrix, weights.num_neighbours, weights.omega) if weights.neighbour_weight > 0 else None
        )

    def beta(self, users: Tensor, items: Tensor) -> Tensor:
        """beta of pairs."""
        return self.user_factor[users] * self.item_factor[items]

    def positive_weights(self, histories: sparse.csr_matrix | None = None) -> sparse.csr_matrix:
        """What softplus(-s_ui) is multiplied by, of pairs and of neighbours of what a user has: sparse (users, items).

        `histories` are other users' rows, by default those of the matrix.
        """
        rows = self.matrix if histories is None else histories
        degrees = np.diff(rows.indptr)
        pairs = sparse.csr_matrix(rows, dtype=np.float64)
        beta = np.repeat(user_factor(rows), degrees) * self.item_factor.numpy()[rows.indices]
        pairs.data = self.weights.w1 + self.weights.w2 * beta
        if self.graph is not None:
            around = sparse.csr_matrix(rows, dtype=np.float64) @ self.graph.matrix().astype(np.float64)
            pairs = sparse.csr_matrix(pairs + self.weights.neighbour_weight * around)
        pairs.sort_indices()
        return pairs

    def negative_weights(self, histories: sparse.csr_matrix | None = None) -> tuple[Tensor, Tensor]:
        """p and q (users,) so that softplus(s_uj) is multiplied by p_u item_factor_j + q_u."""
        rows = self.matrix if histories is None else histories
        each = torch.from_numpy(np.diff(rows.indptr)) * (self.weights.negative_weight / self.num_items)
        return each * self.weights.w4 * torch.from_numpy(user_factor(rows)), each * self.weights.w3

    def exact_loss(self, scores: Tensor, users: Ints) -> Tensor:
        """The loss of some users' whole rows of scores, (B, I), without L2, its negatives in expectation."""
        p, q = self.negative_weights()
        negative = torch.outer(p[users], self.item_factor) + q[users][:, None]
        positive = torch.from_numpy(self.positive_weights()[users].toarray())
        return (positive * softplus(-scores)).sum() + (negative * softplus(scores)).sum()

    def optimum(self, users: Tensor, items: Tensor) -> Tensor:
        """The logit of observed pairs at the minimum over free logits, with lambda = gamma = 0:

        s_ui = log( (w1 + w2 beta_ui) I / (N_w (w3 + w4 beta_ui) d_u) ).
        """
        beta, w = self.beta(users, items), self.weights
        negative = w.negative_weight * (w.w3 + w.w4 * beta) * self.degrees[users]
        return torch.log((w.w1 + w.w2 * beta) * self.num_items / negative)

    def sampled_loss(
        self,
        users: Tensor,
        items: Tensor,
        negatives: Tensor,
        user_vectors: Tensor,
        item_vectors: Tensor,
        negative_vectors: Tensor,
        neighbour_vectors: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch of pairs with drawn negatives, without L2: a sum over the batch.

        Args:
            users: (B,)
            items: (B,) each user's item.
            negatives: (B, N) of each pair, or (N,) shared by the batch.
            user_vectors: (B, D)
            item_vectors: (B, D)
            negative_vectors: (B, N, D) or (N, D)
            neighbour_vectors: (B, K, D) of the items' neighbours; those that are -1 are not looked at.
        """
        w, kind = self.weights, user_vectors.dtype
        positive = (w.w1 + w.w2 * self.beta(users, items)).to(kind)
        loss = (positive * softplus(-(user_vectors * item_vectors).sum(1))).sum()
        factors = self.user_factor[users][:, None] * self.item_factor[negatives]
        if negatives.ndim == 1:
            scores = user_vectors @ negative_vectors.T
        else:
            scores = torch.bmm(negative_vectors, user_vectors[:, :, None])[:, :, 0]
        loss = loss + w.negative_weight * ((w.w3 + w.w4 * factors).to(kind) * softplus(scores)).mean(1).sum()
        if self.graph is not None:
            assert neighbour_vectors is not None
            omega = torch.from_numpy(self.graph.weights)[items].to(kind)
            scores = torch.bmm(neighbour_vectors, user_vectors[:, :, None])[:, :, 0]
            loss = loss + w.neighbour_weight * (omega * softplus(-scores)).sum()
        return loss

    def rowwise_l2(self, users: Tensor, items: Tensor, user_vectors: Tensor, item_vectors: Tensor) -> Tensor:
        """gamma / 2 for the rows of a batch's pairs only, such that a pass over all pairs adds up to the whole L2.

        Each pair bears the d_u-th part of its user's and the d_i-th part of its item's: sum over pairs of
        num_batches gamma / 2 (|e_u|^2 / d_u + |v_i|^2 / d_i).
        """
        share = self.weights.l2 * self.num_batches / 2
        of_users = user_vectors.square().sum(1) / self.degrees[users].to(user_vectors.dtype)
        of_items = item_vectors.square().sum(1) / self.item_degrees[items].to(item_vectors.dtype)
        total: Tensor = share * (of_users + of_items).sum()
        return total


def dense_scores_loss(objective: Objective, scores: Tensor) -> Tensor:
    """`exact_loss` of all users, (U, I)."""
    return objective.exact_loss(scores, np.arange(objective.num_users))


__all__ = ["Objective", "Weights", "dense", "dense_scores_loss"]
