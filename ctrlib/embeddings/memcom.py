"""MEmCom: ids share a few rows, and each has a number of its own by which the row is multiplied.

N. Pansare, J. Katukuri, A. Arora, F. Cipollone, R. Shaik, N. Tokgozoglu & C. Venkataraman, "Learning Compressed
Embeddings for On-Device Inference", MLSys 2022, https://arxiv.org/abs/2203.10135.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.compositional import (
    FeatureIds,
    NumbersPerId,
    Residues,
    check_num_embeddings,
    first_rows,
    keep_layout,
    make_config,
)
from ctrlib.errors import ArgumentError
from ctrlib.schema import Feature


class MemComTables(nn.Module):
    """e(x) = U[x mod m] * v_x (+ w_x): a shared row, times a number per id, plus another one with `bias`.

    `num_embeddings` are the rows of U: a mapping vocabulary -> m, as in the paper, or a number for all vocabularies,
    which share the rows, each from a place of its own on. On six vocabularies with Zipf's frequencies, at a tenth of
    the bytes, sharing has AUC .710 and a mapping .642.

    Bytes: 4 * (num_embeddings * embedding_dim + n), with `bias` 2 n, where n counts the ids of all vocabularies. The
    numbers of four ids, with `bias` of two, make a row of their table, which counts as a whole: that way the fused
    engine, whose rows have 4 columns or more, needs not a byte more than the exact one. Its optimiser keeps one sum
    for such a row, and so steps of a common size for four ids of about the same frequency.

    A `RawId` is hashed to `hash_sizes[name]` numbers first, and so are other vocabularies named there. U starts as
    U(-init, init), v as 1 (it is stored less 1, for regularisers to pull towards 1) and w as 0. In a bag, each id
    counts by its own number.

    Shape: KeyedJaggedTensor -> KeyedTensor, (B, embedding_dim) for each of `names`.

    Raises:
        ValueError: an argument does not fit; as `FeatureIds` does for the features; or a state with another layout is
            loaded.

    >>> import torch
    >>> from ctrlib.schema import Categorical
    >>> tables = MemComTables([Categorical("item", num_embeddings=1000)], num_embeddings=100, embedding_dim=8)
    >>> {name: tuple(bag.weight.shape) for name, bag in tables.tables.embedding_bags.items()}
    {'memcom': (100, 8), 'memcom_numbers': (250, 4)}
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([7, 107]), torch.tensor([1, 1]))
    >>> tables(kjt)["item"].shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        num_embeddings: int | Mapping[str, int],
        bias: bool = False,
        embedding_dim: int = 16,
        hash_sizes: Mapping[str, int] | None = None,
        init: float = 0.05,
        suffix: str = "",
    ) -> None:
        super().__init__()
        if embedding_dim < 1 or init <= 0:
            raise ArgumentError(
                f"expected an embedding_dim of 1 or more and init above 0, got {embedding_dim} and init={init}"
            )
        self.ids = FeatureIds(features, hash_sizes=hash_sizes)
        self.names, self.embedding_dim = self.ids.names, embedding_dim
        num_ids = self.ids.num_ids
        check_num_embeddings(num_embeddings, list(num_ids))
        self.shared = Residues.of(num_embeddings, list(num_ids))
        self.numbers = NumbersPerId(sum(num_ids.values()), 1 + bias)
        self.first_ids = first_rows(num_ids)
        self.tables: Any = EmbeddingBagCollection(
            tables=[
                make_config("memcom" + suffix, self.shared.total, embedding_dim, ["row"], init),
                make_config("memcom_numbers" + suffix, self.numbers.rows, self.numbers.columns, ["numbers"], 0.0),
            ]
        )
        layout = {"bias": bias, **self.ids.layout(**self.shared.layout)}
        self._printout = f"bias={bias}, layout={keep_layout(self, layout)}"

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor of ids -> KeyedTensor, (B, embedding_dim) for each of `names`."""
        bags = self.ids.read(sparse)
        ids = bags.values + bags.spread(self.first_ids)
        found = {"row": self.shared.read(bags), "numbers": self.numbers.read(ids)}
        row, numbers = bags.rows_by_id(self.tables, found)
        own = self.numbers.pick(numbers, ids)
        vectors = row * (1 + own[:, :1])
        return bags.pool(vectors + own[:, 1:] if self.numbers.width == 2 else vectors)

    def extra_repr(self) -> str:
        """What is not to be seen from the tables."""
        return self._printout
