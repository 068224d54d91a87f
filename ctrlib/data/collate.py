"""Gathered rows to a `Batch`, with all that TorchRec would otherwise work out in the training thread."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.batch import Batch
from ctrlib.data.columns import Columns, offsets_of
from ctrlib.schema import Schema


def collate(columns: Columns, schema: Schema, num_real: int) -> Batch:
    """Tensors of all rows; those from `num_real` on are padding: weight 0, labels 0.

    >>> from ctrlib.schema import Categorical, Numeric
    >>> schema = Schema((Categorical("item"), Numeric("price")), ("click",))
    >>> floats = np.array([[0.5, 1], [0.25, 1]], dtype=np.float32)
    >>> batch = collate(Columns(np.array([[7], [8]], dtype=np.int32), {}, floats, None), schema, num_real=1)
    >>> batch.sparse.values().tolist(), batch.dense.tolist(), batch.labels.tolist(), batch.weights.tolist()
    ([7, 8], [[0.5], [0.25]], [[1.0], [0.0]], [1.0, 0.0])
    """
    num_dense, num_labels = len(schema.dense), len(schema.labels)
    labels = columns.floats[:, num_dense : num_dense + num_labels].copy()
    weights = columns.floats[:, -1].copy() if schema.weight else np.ones(len(labels), dtype=np.float32)
    labels[num_real:] = 0
    weights[num_real:] = 0
    return Batch(
        _sparse(columns, schema),
        torch.from_numpy(columns.floats[:, :num_dense].copy()),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        None if columns.group is None else torch.from_numpy(columns.group),
    )


def _sparse(columns: Columns, schema: Schema) -> KeyedJaggedTensor:
    """The ids, key by key in the schema's order, as int64."""
    size, num_single = columns.ids.shape
    single = np.empty((num_single, size), dtype=np.int64)
    single[...] = columns.ids.T
    if columns.ragged:
        rows = iter(single)
        lists = [columns.ragged.get(feature.name) for feature in schema.sparse]
        parts = [next(rows) if ragged is None else ragged.values for ragged in lists]
        counts = [np.ones(size, dtype=np.int64) if ragged is None else np.diff(ragged.offsets) for ragged in lists]
        values = torch.from_numpy(np.concatenate(parts, dtype=np.int64))
        lengths, offsets = _with_offsets(np.concatenate(counts))
        length_per_key = [len(part) for part in parts]
    else:
        values = torch.from_numpy(single.reshape(-1))
        lengths, offsets = _ones(num_single * size)
        length_per_key = [size] * num_single
    return KeyedJaggedTensor(
        [feature.name for feature in schema.sparse],
        values,
        lengths=lengths,
        offsets=offsets,
        stride=size,
        length_per_key=length_per_key,
        offset_per_key=offsets_of(np.array(length_per_key, dtype=np.int64)).tolist(),
    )


@lru_cache(maxsize=8)
def _ones(count: int) -> tuple[Tensor, Tensor]:
    """Lengths and offsets when every row has one id: shared by the batches of a size, so never written to."""
    return _with_offsets(np.ones(count, dtype=np.int64))


def _with_offsets(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(lengths), torch.from_numpy(offsets_of(lengths))
