"""UltraGCN trained as its program trains it: batches of pairs with drawn negatives, on tables of TorchRec.

User and item vectors are two tables of one `EmbeddingCollection`. The *exact* engine updates both as a whole by Adam,
with L2 on whole tables in every step, as the program does. The *fused* engine hands them to TorchRec
(`ctrlib.sharding.shard`: row-wise Adagrad in the backward pass, spread over the processes that torchrun starts) and
decays only rows that a batch touches, so that a pass over all pairs adds up to the same L2
(`Objective.rowwise_l2`); these are two algorithms. Every process draws the same order and the same negatives, and takes
its part of each batch.

Negatives are drawn uniformly from all items: of each pair by itself, or shared by the batch, which has the same
expectation and a larger variance at a fraction of the cost; `sift` draws again what the user has in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.distributed import rank, total, world_size
from ctrlib.errors import ArgumentError
from ctrlib.retrieval.objective import Objective
from ctrlib.sharding.sharded import shard, whole_weights

Engine = Literal["exact", "fused"]
ROUNDS = 100  # of drawing again


@dataclass(frozen=True)
class Draws:
    """How negatives are drawn: `number` of them, of each pair or `shared` by a batch; `sift`: none of the user's."""

    number: int = 1500
    shared: bool = False
    sift: bool = False

    def draw(self, objective: Objective, users: Tensor, generator: torch.Generator) -> Tensor:
        """(B, number) of each user, or (number,) for all.

        Raises:
            ArgumentError: of a user, hardly any item is left to draw.
        """
        shape = (self.number,) if self.shared else (len(users), self.number)
        drawn = torch.randint(objective.num_items, shape, generator=generator)
        if not self.sift:
            return drawn
        rows = np.repeat(np.arange(objective.num_users), np.diff(objective.matrix.indptr))
        pairs = torch.from_numpy(rows * objective.num_items + objective.matrix.indices.astype(np.int64))
        for _ in range(ROUNDS):
            bad = torch.isin(users[:, None] * objective.num_items + drawn, pairs)
            if not bad.any():
                return drawn
            drawn[bad] = torch.randint(objective.num_items, (int(bad.sum()),), generator=generator)
        user = int(users[bad.any(1).nonzero()[0, 0]])
        raise ArgumentError(f"user number {user} has nearly every item: draw negatives without sift")


def make_tables(
    num_users: int, num_items: int, embedding_dim: int, *, init_std: float, seed: int
) -> EmbeddingCollection:
    """A table of users and one of items, N(0, init_std^2)."""
    generator = torch.Generator().manual_seed(seed)

    def fill(weight: Tensor) -> Tensor:
        return nn.init.normal_(weight, std=init_std, generator=generator)

    sizes = {"user": num_users, "item": num_items}
    configs = [
        EmbeddingConfig(name=name, num_embeddings=size, embedding_dim=embedding_dim, feature_names=[name], init_fn=fill)
        for name, size in sizes.items()
    ]
    return EmbeddingCollection(tables=configs)


class Sampler:
    """Passes over all pairs of training that update the tables.

    Args:
        objective: the loss; its weights say how many pairs a batch has.
        tables: as `make_tables` gives them.
        draws: how negatives are drawn.
        learning_rate: Adam's, or that of row-wise Adagrad.
        seed: number that order and negatives are drawn from.
        engine: see the top of the module; several processes want "fused".
        sharding: how the fused engine spreads the tables, as in `ctrlib.sharding.shard`.

    Raises:
        ArgumentError: negatives that a batch shares are to be sifted; or several processes are to train exactly.
    """

    def __init__(
        self,
        objective: Objective,
        tables: EmbeddingCollection,
        draws: Draws,
        *,
        learning_rate: float,
        seed: int,
        engine: Engine = "exact",
        sharding: Literal["table_wise", "row_wise"] = "table_wise",
    ) -> None:
        if draws.shared and draws.sift:
            raise ArgumentError("negatives shared by a batch cannot be sifted: what one user has, another has not")
        if engine == "exact" and world_size() > 1:
            raise ArgumentError('several processes train tables with engine="fused"')
        self.objective, self.draws = objective, draws
        self._generator = torch.Generator().manual_seed(seed)
        matrix = objective.matrix
        self._users = torch.from_numpy(np.repeat(np.arange(objective.num_users), np.diff(matrix.indptr)))
        self._items = torch.from_numpy(matrix.indices.astype(np.int64))
        self._adam: torch.optim.Adam | None = None
        self.tables: nn.Module = tables
        if engine == "exact":
            self._adam = torch.optim.Adam(tables.parameters(), lr=learning_rate, fused=True)
        else:
            self.tables = shard(
                tables, sharding=sharding, learning_rate=learning_rate, table_optimiser="rowwise_adagrad"
            )

    def epoch(self) -> float:
        """A pass over all pairs; the sum of its losses, L2 included."""
        return sum(self.step(*batch) for batch in self.batches())

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of a pass: numbers of users, of their items, and of negatives."""
        order = torch.randperm(len(self._users), generator=self._generator)
        for some in torch.split(order, self.objective.weights.batch_size):
            users = self._users[some]
            yield users, self._items[some], self.draws.draw(self.objective, users, self._generator)

    def step(self, users: Tensor, items: Tensor, negatives: Tensor) -> float:
        """One update by a batch, the same in all processes; the loss of all of it."""
        own = slice(rank() * len(users) // world_size(), (rank() + 1) * len(users) // world_size())
        users, items = users[own], items[own]
        negatives = negatives if self.draws.shared else negatives[own]
        loss = self.loss(users, items, negatives)
        if self._adam is None:
            # TorchRec divides gradients by the number of processes, for means over them; this is a sum.
            torch.autograd.backward(loss * world_size())
        else:
            self._adam.zero_grad()
            torch.autograd.backward(loss)
            self._adam.step()
        return total(float(loss.detach()))

    def loss(self, users: Tensor, items: Tensor, negatives: Tensor) -> Tensor:
        """The loss of this process's pairs."""
        graph, objective = self.objective.graph, self.objective
        around = None if graph is None else torch.from_numpy(graph.neighbours)[items].clamp(min=0)
        wanted = [items, negatives.flatten(), *([] if around is None else [around.flatten()])]
        ids, places = torch.unique(torch.cat(wanted), return_inverse=True)  # a row is looked up once
        user_ids, user_places = torch.unique(users, return_inverse=True)
        of_users, of_items = self._look_up(user_ids, ids)
        ends = np.cumsum([len(part) for part in wanted]).tolist()
        parts = [places[end - len(part) : end] for part, end in zip(wanted, ends)]
        user_vectors, item_vectors = of_users[user_places], of_items[parts[0]]
        loss = objective.sampled_loss(
            users,
            items,
            negatives,
            user_vectors,
            item_vectors,
            of_items[parts[1]].view(*negatives.shape, -1),
            None if around is None else of_items[parts[2]].view(*around.shape, -1),
        )
        if self._adam is None:
            return loss + objective.rowwise_l2(users, items, user_vectors, item_vectors)
        weights = [weight.square().sum() for weight in self.tables.parameters()]
        return loss + objective.weights.l2 / 2 * torch.stack(weights).sum()

    def _look_up(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        ids = KeyedJaggedTensor(
            keys=["user", "item"],
            values=torch.cat([users, items]),
            lengths=torch.tensor([len(users), len(items)], dtype=torch.int32),
        )
        found = self.tables(ids)
        return found["user"].values(), found["item"].values()

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Copies of the tables of users and items, on every process (of several, empty ones but on the first)."""
        if self._adam is None:
            weights = whole_weights(self.tables)
        else:
            weights = {name: weight.detach().clone() for name, weight in self.tables.named_parameters()}
        by_table = {name.split(".")[-2]: weight for name, weight in weights.items()}
        none = torch.empty(0, 0)
        return by_table.get("user", none), by_table.get("item", none)
