"""Tables of a trained model in a few bytes a row, or narrower, for features whose events are looked up one by one.

What `PackedTables` and `NarrowTables` are to TorchRec's EmbeddingBagCollection, `PackedEvents` and `NarrowEvents` are
to its EmbeddingCollection: every id has its vector, and pooling is for an encoder to do (`ctrlib.embeddings.sequence`).
A target and its histories share one table, which is stored once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ctrlib.embeddings.narrow import NarrowTable, check_filling, tables_by_name
from ctrlib.embeddings.packed import PackedTables
from ctrlib.embeddings.table import init_rows, table_name
from ctrlib.errors import ArgumentError
from ctrlib.schema import PADDING_ID


class PackedEvents(PackedTables):
    """As `PackedTables`, one vector for each id: KeyedJaggedTensor -> {feature: JaggedTensor}.

    >>> from ctrlib.embeddings.packed import PackedTable
    >>> tables = PackedEvents([PackedTable("item", ("item", "clicks"), embedding_dim=2, rows=3, bits=((4, 4),))])
    >>> tables.fill("item", torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.eye(2), torch.zeros(2))
    >>> ids = KeyedJaggedTensor.from_lengths_sync(["item", "clicks"], torch.tensor([0, 2, 1]), torch.tensor([1, 2]))
    >>> {name: events.values().tolist() for name, events in tables(ids).items()}
    {'item': [[1.0, 2.0]], 'clicks': [[5.0, 6.0], [3.0, 4.0]]}
    """

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """KeyedJaggedTensor -> {feature: (N, D) with the feature's lengths}."""
        found = {}
        for group in self.parts():
            for place, name in enumerate(group.keys):
                jagged = ids[name]
                vectors = group.look_up(jagged.values()[None], slice(place, place + 1))[0]
                found[name] = JaggedTensor(vectors, lengths=jagged.lengths(), offsets=jagged.offsets())
        return found


class NarrowEvents(nn.Module):
    """e_v = U^T s_v + mu, s_v a row of R numbers, one vector for each id: KeyedJaggedTensor -> {feature: JaggedTensor}.

    Takes the place of a trained EmbeddingCollection. A table of rank D has neither U nor mu, one that is not centred no
    mu. All ids have a row (`kept="all"`). Rows live in an EmbeddingCollection of narrower tables, which engines train
    and shard as any other.

    Raises:
        ValueError: two tables have one name or feature, a rank is beyond `embedding_dim`, or a table is padded or does
            not keep all rows.

    >>> tables = NarrowEvents([NarrowTable("item", ("item", "clicks"), rows=9, rank=2)], embedding_dim=4)
    >>> ids = KeyedJaggedTensor.from_lengths_sync(["item", "clicks"], torch.tensor([3, 4, 3]), torch.tensor([1, 2]))
    >>> found = tables(ids)
    >>> found["clicks"].values().shape, bool((found["clicks"].values()[1] == found["item"].values()[0]).all())
    (torch.Size([2, 4]), True)
    """

    def __init__(
        self, tables: Sequence[NarrowTable | Mapping[str, Any]], *, embedding_dim: int = 16, init_std: float = 1e-4
    ) -> None:
        super().__init__()
        self.stored = tables_by_name(tables, embedding_dim)
        made = list(self.stored.values())
        if other := [table.name for table in made if table.kept != "all" or table.padded]:
            raise ArgumentError(f"tables {other} of events are padded or lack rows, expected kept='all', padded=False")
        self.embedding_dim = embedding_dim
        self.tables = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=table_name(table.name),
                    num_embeddings=table.rows,
                    embedding_dim=table.rank,
                    feature_names=list(table.feature_names),
                    init_fn=functools.partial(init_rows, std=init_std, copies=1, padding=[PADDING_ID]),
                )
                for table in made
            ]
        )
        self.decoders, self.means = nn.ParameterDict(), nn.ParameterDict()
        for table in made:
            if table.rank < embedding_dim:
                key = table_name(table.name)
                self.decoders[key] = nn.Parameter(nn.init.orthogonal_(torch.empty(table.rank, embedding_dim)))
                if table.centred:
                    self.means[key] = nn.Parameter(torch.zeros(embedding_dim))

    def describe(self) -> dict[str, Any]:
        """What the constructor takes to make this again, without its weights: plain data."""
        tables = [dataclasses.asdict(table) for table in self.stored.values()]
        return {"tables": tables, "embedding_dim": self.embedding_dim}

    @torch.no_grad()
    def fill(self, name: str, full: Tensor, *, mean: Tensor | None = None, decoder: Tensor | None = None) -> None:
        """Take a table's rows from one that has them D wide: s = (full - mean) decoder^T.

        Before sharding. `decoder`, where R < D, has orthonormal rows; `mean` goes with it where the table is centred.

        Shape: full (rows, D), mean (D,), decoder (R, D).

        Raises:
            ValueError: there is no such table; one of these is lacking, has no use, or has another shape.
        """
        if name not in self.stored:
            raise ArgumentError(f"no table {name!r}, expected one of {list(self.stored)}")
        table, dim, key = self.stored[name], self.embedding_dim, table_name(name)
        check_filling(table, dim, table.rank < dim, full=full, mean=mean, decoder=decoder)
        rows = full.double()
        if mean is not None:
            rows = rows - mean.double()
            self.means[key].copy_(mean)
        if decoder is not None:
            rows = rows @ decoder.double().T
            self.decoders[key].copy_(decoder)
        self.tables.embeddings[key].weight.copy_(rows)

    def forward(self, ids: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """KeyedJaggedTensor -> {feature: (N, D) with the feature's lengths}."""
        narrow = self.tables(ids)
        found = {}
        for table in self.stored.values():
            key = table_name(table.name)
            for name in table.feature_names:
                events = narrow[name]
                vectors = events.values()
                if key in self.means:
                    vectors = torch.addmm(self.means[key], vectors, self.decoders[key])
                elif key in self.decoders:
                    vectors = vectors @ self.decoders[key]
                found[name] = JaggedTensor(vectors, lengths=events.lengths(), offsets=events.offsets())
        return found
