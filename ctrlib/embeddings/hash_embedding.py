"""Hash embedding: every id weighs a few rows of a common pool by importances of its own.

D. T. Svenstrup, J. Hansen & O. Winther, "Hash Embeddings for Efficient Word Representations", NeurIPS 2017,
https://arxiv.org/abs/1709.03933.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.compositional import FeatureIds, NumbersPerId, first_rows, keep_layout, make_config
from ctrlib.embeddings.hashing import MAX_ROWS, rows_of, seed_of
from ctrlib.errors import ArgumentError
from ctrlib.schema import Feature

SPACE = "ctrlib/hash_embedding/v1"  # another way to hash is another version


class HashEmbeddingTables(nn.Module):
    """e(x) = sum_j p_xj B[h_j(x)], j = 1 ... k: k rows of a pool B, each times an importance of the id.

    All vocabularies share the pool of `num_embeddings` rows; `num_hashes` is k. Two ids have one vector only if
    importances and all k rows are the same. The importances of an id are its own, or with `num_weights` those of a
    hash: this many lots of them for all ids together, which then makes the size independent of the number of ids.

    Bytes: 4 * (num_embeddings * embedding_dim + k n), where n counts the ids of all vocabularies, or is `num_weights`.
    With k = 2, the importances of two ids make a row of their table, which counts as a whole; the fused engine, whose
    rows have 4 columns or more, needs not a byte more than the exact one. Mind that importances of its own take k
    numbers for every id, an eighth of a plain table for k = 2 and embedding_dim = 16.

    A `RawId` is hashed to `hash_sizes[name]` numbers first, and so are other vocabularies named there. B starts as
    U(-init, init) and the importances as 1 (they are stored less 1, for regularisers to pull towards 1; the authors'
    start near 0). The paper may append importances to the vector, which is not done here.

    Shape: KeyedJaggedTensor -> KeyedTensor, (B, embedding_dim) for each of `names`.

    Raises:
        ValueError: an argument does not fit; as `FeatureIds` does for the features; or a state with another layout is
            loaded.

    >>> from ctrlib.schema import Categorical
    >>> tables = HashEmbeddingTables([Categorical("item", num_embeddings=1000)], num_embeddings=100, embedding_dim=8)
    >>> {name: tuple(bag.weight.shape) for name, bag in tables.tables.embedding_bags.items()}
    {'pool': (100, 8), 'importances': (500, 4)}
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([7, 107]), torch.tensor([1, 1]))
    >>> tables(kjt)["item"].shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        num_embeddings: int,
        num_hashes: int = 2,
        num_weights: int | None = None,
        embedding_dim: int = 16,
        hash_sizes: Mapping[str, int] | None = None,
        init: float = 0.05,
        suffix: str = "",
    ) -> None:
        super().__init__()
        sizes = (num_embeddings, 1 if num_weights is None else num_weights)
        if not all(1 <= size <= MAX_ROWS for size in sizes) or num_hashes < 1 or embedding_dim < 1 or init <= 0:
            raise ArgumentError(
                f"expected num_embeddings and num_weights of 1 to {MAX_ROWS} (or None), num_hashes and embedding_dim "
                f"of 1 or more and init above 0; got num_embeddings={num_embeddings}, num_weights={num_weights}, "
                f"num_hashes={num_hashes}, embedding_dim={embedding_dim} and init={init}"
            )
        self.ids = FeatureIds(features, hash_sizes=hash_sizes)
        self.names, self.embedding_dim = self.ids.names, embedding_dim
        self.num_embeddings, self.num_weights = num_embeddings, num_weights
        num_ids = self.ids.num_ids
        self.seeds = [{name: seed_of(SPACE, name, number) for name in num_ids} for number in range(num_hashes)]
        self.weight_seeds = {name: seed_of(SPACE + "/weights", name, 0) for name in num_ids}
        self.weights = NumbersPerId(sum(num_ids.values()) if num_weights is None else num_weights, num_hashes)
        self.first_ids = first_rows(num_ids)
        self.keys = [f"row_{number}" for number in range(num_hashes)]
        self.tables: Any = EmbeddingBagCollection(
            tables=[
                make_config("pool" + suffix, num_embeddings, embedding_dim, self.keys, init),
                make_config("importances" + suffix, self.weights.rows, self.weights.columns, ["weights"], 0.0),
            ]
        )
        seeds = {name: [of_names[name] for of_names in (*self.seeds, self.weight_seeds)] for name in num_ids}
        layout = {
            "num_embeddings": num_embeddings,
            "num_hashes": num_hashes,
            "num_weights": num_weights,
            **self.ids.layout(seeds=seeds),
        }
        self._printout = f"num_hashes={num_hashes}, num_weights={num_weights}, layout={keep_layout(self, layout)}"

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor of ids -> KeyedTensor, (B, embedding_dim) for each of `names`."""
        bags = self.ids.read(sparse)
        if self.num_weights is None:
            owners = bags.values + bags.spread(self.first_ids)
        else:
            owners = rows_of(bags.values, bags.spread(self.weight_seeds), self.num_weights)
        found = {
            key: rows_of(bags.values, bags.spread(seeds), self.num_embeddings)
            for key, seeds in zip(self.keys, self.seeds)
        }
        *rows, weights = bags.rows_by_id(self.tables, {**found, "weights": self.weights.read(owners)})
        importances = 1 + self.weights.pick(weights, owners)
        return bags.pool(torch.stack([row * importances[:, j : j + 1] for j, row in enumerate(rows)]).sum(0))

    def extra_repr(self) -> str:
        """What is not to be seen from the tables."""
        return self._printout
