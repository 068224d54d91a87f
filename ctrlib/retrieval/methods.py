"""What every method of retrieval can do, and what methods of vectors share.

    method.fit(interactions)            learn, from training pairs only; gives the method back
    method.scores(users)                (B,) numbers of users -> (B, I) scores of all items, larger is better
    method.fold_in(histories)           (B, I) sparse ones -> (B, I) scores of users of whom only these items are known
    method.state(), method.load(...)    its tensors, by name, and back

`scores` gives a tensor of its own, which the caller may write to. What a user has seen already is for the caller to
leave out (`ctrlib.retrieval.recommend`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from ctrlib.errors import ArgumentError
from ctrlib.retrieval.interactions import Interactions

Ints = npt.NDArray[np.int64]
Self = TypeVar("Self", bound="Retriever")


class Retriever(Protocol):
    """A method; see the top of the module. `needs_history`: it knows nothing of a user without items."""

    @property
    def needs_history(self) -> bool:
        """Whether a user without items gets no list, since any order of items would be made up."""

    def fit(self: Self, log: Interactions, *, seed: int = 0, watch: Watch | None = None) -> Self:
        """Learn from training pairs.

        Args:
            log: the pairs.
            seed: number that all draws come from.
            watch: called after every epoch, of methods that have epochs, with its number; training stops where it says
                True.
        """

    def scores(self, users: Ints) -> Tensor:
        """Scores of all items for some of the users, (B,) -> (B, I)."""

    def fold_in(self, histories: sparse.csr_matrix) -> Tensor:
        """Scores of all items for users of whom only items are known, (B, I) ones -> (B, I)."""

    def state(self) -> dict[str, Tensor]:
        """What has been learnt."""

    def load(self: Self, state: Mapping[str, Tensor]) -> Self:
        """Put back what `state` gave."""


Watch = Callable[[int], bool]


class Vectors:
    """A method whose score is a product of vectors, s_ui = e_u . v_i.

    `user_vectors` (U, D) and `item_vectors` (I, D) are float32 and on the CPU.
    """

    needs_history = True
    user_vectors: Tensor
    item_vectors: Tensor

    def scores(self, users: Ints) -> Tensor:
        """Scores of all items for some of the users, (B,) -> (B, I)."""
        return self.user_vectors[torch.from_numpy(np.asarray(users))] @ self.item_vectors.T

    def vectors_of(self, histories: sparse.csr_matrix) -> Tensor:
        """Vectors of users of whom only items are known, (B, I) ones -> (B, D)."""
        raise NotImplementedError

    def fold_in(self, histories: sparse.csr_matrix) -> Tensor:
        """Scores of all items for users of whom only items are known, (B, I) ones -> (B, I)."""
        return self.vectors_of(histories) @ self.item_vectors.T

    def state(self) -> dict[str, Tensor]:
        """Both tables, by name."""
        return {"user_vectors": self.user_vectors, "item_vectors": self.item_vectors}

    def load(self: Any, state: Mapping[str, Tensor]) -> Any:
        """Put back what `state` gave."""
        self.user_vectors, self.item_vectors = state["user_vectors"], state["item_vectors"]
        return self


def dense(matrix: sparse.csr_matrix, rows: Ints | None = None) -> Tensor:
    """Some rows of a sparse matrix as a float32 tensor."""
    chosen = matrix if rows is None else matrix[rows]
    return torch.from_numpy(np.ascontiguousarray(chosen.toarray(), dtype=np.float32))


def csr_state(name: str, matrix: sparse.csr_matrix) -> dict[str, Tensor]:
    """A sparse matrix as tensors."""
    return {
        f"{name}.data": torch.from_numpy(matrix.data.astype(np.float32)),
        f"{name}.indices": torch.from_numpy(matrix.indices.astype(np.int64)),
        f"{name}.indptr": torch.from_numpy(matrix.indptr.astype(np.int64)),
        f"{name}.shape": torch.tensor(matrix.shape),
    }


def csr_of(name: str, state: Mapping[str, Tensor]) -> sparse.csr_matrix:
    """The sparse matrix that `csr_state` took apart."""
    parts = tuple(state[f"{name}.{part}"].numpy() for part in ("data", "indices", "indptr"))
    return sparse.csr_matrix(parts, shape=tuple(state[f"{name}.shape"].tolist()))


def check_history(histories: sparse.csr_matrix, num_items: int) -> None:
    """Refuse histories of other items.

    Raises:
        ArgumentError: as said.
    """
    if histories.shape[1] != num_items:
        raise ArgumentError(
            f"histories have {histories.shape[1]} items, the method knows {num_items}: number them as training does "
            "(`Interactions.aligned`)"
        )
