"""A model without TorchRec's collections and the calls of its modules, for scoring: the same numbers, sooner.

A KeyedJaggedTensor and an EmbeddingBagCollection cost half a millisecond for a single row, more than a whole network.
Here single ids of all features are one gather from one tensor, of which the tables are made views: nothing is stored
twice. Tables in a few bytes a row are one gather for each of their forms. Histories that attention reads, and look-ups
of other kinds, are computed as they are. Tower and head are one function (`ctrlib.serving.flat`).
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.data.collate import collate
from ctrlib.data.columns import Columns, Shared
from ctrlib.embeddings.packed import PackedTables
from ctrlib.embeddings.table import TableEmbedding, Wide
from ctrlib.layers import full_precision
from ctrlib.model import Model
from ctrlib.schema import Categorical, RawId, Schema
from ctrlib.serving.flat import flat
from ctrlib.structure import put

Ints = npt.NDArray[np.int64]


class Rows:
    """Encoded rows as a model reads a `Batch`; TorchRec's tensor of ids is made only where a part asks for it."""

    def __init__(self, columns: Columns, schema: Schema) -> None:
        self.columns, self.schema = columns, schema
        self.size = len(columns.ids)

    @functools.cached_property
    def dense(self) -> Tensor:
        """As in `Batch`."""
        return torch.from_numpy(np.ascontiguousarray(self.columns.floats[:, : len(self.schema.dense)]))

    @functools.cached_property
    def sparse(self) -> KeyedJaggedTensor:
        """As in `Batch`."""
        return collate(self.columns, self.schema, self.size).sparse

    def single(self, positions: list[int] | None, shifts: Ints) -> Tensor:
        """Ids of the features with one id a row, or of some of them, moved to where their tables begin: (B, S)."""
        ids = self.columns.ids if positions is None else self.columns.ids[:, positions]
        return torch.from_numpy(ids + shifts)

    def bag(self, name: str, shift: int) -> tuple[Tensor, Tensor]:
        """The ids of a bag or history, moved likewise, and its offsets: (N,), (B + 1,); or (N,) and (2,) where one list
        is that of all rows, which is read once."""
        ragged = self.columns.ragged[name]
        if isinstance(ragged, Shared):
            return torch.from_numpy(ragged.one.astype(np.int64) + shift), torch.tensor([0, len(ragged.one)])
        return torch.from_numpy(ragged.values.astype(np.int64) + shift), torch.from_numpy(ragged.offsets)


def direct(model: nn.Module, schema: Schema, *, flatten: bool = True) -> nn.Module:
    """The same model, sharing all weights, whose plain tables are read directly; it takes `Rows`.

    The tables' weights become views of one tensor for each width, in the model that is given too. `flatten`: tower and
    head become one function (`ctrlib.serving.flat`).

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> schema = example_schema()
    >>> model = models.deepfm(Inputs(schema, embedding_dim=4), hidden=(8,)).eval()
    >>> columns = Columns(np.array([[3, 4]], np.int32), {}, np.zeros((1, 3), np.float32), None)
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    quick = copy.deepcopy(model, shared)
    for path, part in list(quick.named_modules()):
        if isinstance(getattr(part, "tables", None), EmbeddingBagCollection | PackedTables):
            if type(part) is TableEmbedding:
                put(quick, path, _DirectEmbedding(part, schema))
            elif type(part) is Wide:
                put(quick, path, _DirectWide(part, schema))
    for path, part in list(quick.named_modules()):
        if type(part) is Model:
            if path:
                put(quick, path, _DirectModel(part, flatten))
            else:
                quick = _DirectModel(part, flatten)
    return quick


class _DirectModel(nn.Module):
    """As `Model`."""

    def __init__(self, model: Model, flatten: bool) -> None:
        super().__init__()
        self.embedding, self.wide = model.embedding, model.wide
        self.network = nn.Sequential(model.tower, model.head)
        self.network.training = model.training
        self.flat = flat(self.network) if flatten else None
        self.calibration = model.calibration

    def forward(self, rows: Rows) -> Tensor:
        with full_precision():
            fields = self.embedding(rows)
        network = self.network if self.flat is None or torch.is_autocast_enabled("cpu") else self.flat
        logits: Tensor = network(fields)
        if self.wide is not None:
            with full_precision():
                first_order: Tensor = self.wide(rows)
            logits = logits + first_order
        return logits if self.calibration is None else self.calibration(logits)


class _DirectTables:
    """Rows -> (B, features, width) of the tables of a collection, features in the given order."""

    def __init__(self, tables: EmbeddingBagCollection, first_rows: dict[str, int] | None, schema: Schema) -> None:
        weights, start = [], 0
        self.first: dict[str, int] = {}
        self.mode: dict[str, str] = {}
        for config in tables.embedding_bag_configs():
            weight = tables.embedding_bags[config.name].weight
            for name in config.feature_names:
                self.first[name] = start + (first_rows or {}).get(name, 0)
                self.mode[name] = "mean" if config.pooling is PoolingType.MEAN else "sum"
            weights.append(weight)
            start += len(weight)
        with torch.no_grad():
            self.weight = torch.cat([weight.detach() for weight in weights])
            start = 0
            for weight in weights:
                weight.data = self.weight[start : start + len(weight)]
                start += len(weight)
        single = [feature.name for feature in schema.sparse if isinstance(feature, Categorical | RawId)]
        self.names = [feature.name for feature in schema.sparse if feature.name in self.first]
        chosen = [name for name in self.names if name in single]
        self.positions = None if chosen == single else [single.index(name) for name in chosen]
        self.shifts = np.array([self.first[name] for name in chosen], np.int64)
        self.bags = [name for name in self.names if name not in single]
        # Where each feature stands among the single ones followed by the bags.
        place = {name: position for position, name in enumerate((*chosen, *self.bags))}
        self.order = [place[name] for name in self.names]
        self.in_order = self.order == sorted(self.order)

    def __call__(self, rows: Rows) -> Tensor:
        blocks = [torch.embedding(self.weight, rows.single(self.positions, self.shifts))]
        for name in self.bags:
            values, offsets = rows.bag(name, self.first[name])
            bag = F.embedding_bag(values, self.weight, offsets, mode=self.mode[name], include_last_offset=True)
            blocks.append(bag.expand(rows.size, -1).unsqueeze(1))
        fields = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        return fields if self.in_order else fields[:, self.order]


class _DirectPacked(nn.Module):
    """As `_DirectTables`, of tables in a few bytes a row."""

    def __init__(self, tables: PackedTables, schema: Schema) -> None:
        super().__init__()
        self.groups, self.parts = tables.groups, tables.parts()
        single = [feature.name for feature in schema.sparse if isinstance(feature, Categorical | RawId)]
        self.names = [feature.name for feature in schema.sparse if feature.name in tables.names]
        # Of each group: where its single features stand among its keys and among all single ones; its bags likewise.
        self.singles: list[tuple[list[str], list[int], list[int]]] = []
        self.bags: list[list[tuple[str, int]]] = []
        for group in tables.parts():
            names = [name for name in group.keys if name in single]
            self.singles.append((names, [group.keys.index(name) for name in names], [single.index(n) for n in names]))
            self.bags.append([(name, place) for place, name in enumerate(group.keys) if name not in single])

    def forward(self, rows: Rows) -> Tensor:
        fields: dict[str, Tensor] = {}
        for group, (names, places, positions), bags in zip(self.parts, self.singles, self.bags):
            if names:
                ids = rows.single(positions, np.zeros(len(positions), np.int64)).T
                fields |= zip(names, group.look_up(ids, places).unbind(0))
            for name, place in bags:
                fields[name] = group.pool(place, *rows.bag(name, 0)).expand(rows.size, -1)
        return torch.stack([fields[name] for name in self.names], dim=1)


def _read(part: Any, schema: Schema) -> Any:
    """What reads the tables of an embedding."""
    if isinstance(part.tables, PackedTables):
        return _DirectPacked(part.tables, schema)
    return _DirectTables(part.tables, part.first_rows, schema)


class _DirectEmbedding(nn.Module):
    """As `TableEmbedding`."""

    def __init__(self, part: TableEmbedding, schema: Schema) -> None:
        super().__init__()
        self.out_shape, self.runs, self.columns, self.numeric = part.out_shape, part.runs, part.columns, part.numeric
        self.tables = _read(part, schema)

    def forward(self, rows: Rows) -> Tensor:
        blocks: dict[bool, Tensor] = {False: self.tables(rows)}
        if len(self.runs) == 1:
            return blocks[False]
        if self.numeric is not None:
            blocks[True] = self.numeric(rows.dense if self.columns is None else rows.dense[:, self.columns])
        fields = [blocks[is_numeric][:, start:stop] for is_numeric, start, stop in self.runs]
        return fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)


class _DirectWide(nn.Module):
    """As `Wide`."""

    def __init__(self, part: Wide, schema: Schema) -> None:
        super().__init__()
        self.out_shape, self.num_tasks, self.num_columns = part.out_shape, part.num_tasks, part.columns
        self.numeric_weights = part.numeric_weights
        self.tables = _read(part, schema)

    def forward(self, rows: Rows) -> Tensor:
        weights = self.tables(rows)
        total: Tensor = weights.view(rows.size, -1, self.num_tasks, self.num_columns).sum(1).mean(2)
        return total if self.numeric_weights is None else total + rows.dense @ self.numeric_weights
