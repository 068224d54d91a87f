"""How often each id is looked up: all that frequency cuts and weighted compression need to know of the data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ctrlib.batch import Batch
from ctrlib.distributed import world_size
from ctrlib.errors import ArgumentError
from ctrlib.schema import Schema


def count_reads(schema: Schema, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Vocabulary -> how often each of its ids occurs in `batches`, in all features that share it: (rows,) int64.

    Rows of weight 0, which only pad a batch, do not count; raw ids have no vocabulary and are left out. Of several
    processes, each counts its own batches, and all get the sum.

    Raises:
        ValueError: the schema has not been fitted, or an id is beyond its vocabulary.

    >>> from ctrlib.testing import example_batch, example_schema
    >>> schema = example_schema()
    >>> counts = count_reads(schema, [example_batch(schema, 50), example_batch(schema, 50, seed=1)])
    >>> counts["user"].shape, int(counts["user"].sum())
    (torch.Size([20]), 100)
    """
    counts = {}
    for vocabulary, features in schema.vocabularies.items():
        rows = features[0].num_embeddings
        if rows is None:
            raise ArgumentError(
                f"vocabulary {vocabulary!r} has no size yet: take the schema that `ctrlib.prepare` returns"
            )
        counts[vocabulary] = torch.zeros(rows, dtype=torch.int64)
    for batch in batches:
        padded = batch.weights == 0
        jagged = batch.sparse.to_dict()
        for vocabulary, features in schema.vocabularies.items():
            for feature in features:
                ids = jagged[feature.name].values()
                if bool(padded.any()):
                    ids = ids[~padded.repeat_interleave(jagged[feature.name].lengths())]
                found = torch.bincount(ids, minlength=len(counts[vocabulary])).cpu()
                if len(found) > len(counts[vocabulary]):
                    raise ArgumentError(
                        f"feature {feature.name!r} has id {len(found) - 1}, but its vocabulary has "
                        f"{len(counts[vocabulary])}: take batches and schema of one prepared folder"
                    )
                counts[vocabulary] += found
    if world_size() > 1:
        for count in counts.values():
            dist.all_reduce(count)
    return counts
