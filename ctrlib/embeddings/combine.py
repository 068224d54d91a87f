"""Embeddings made of embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.errors import ArgumentError


class ConcatFields(nn.Module):
    """The fields of several embeddings behind each other: one feature in several tables, or tables beside sequences.

    FinalMLP's contexts and FGCNN's second set of tables are fields of their own this way.

    Shape: Batch -> (B, sum of the embeddings' F, D).

    Raises:
        ValueError: no embedding is given, or their widths differ.

    >>> from ctrlib.embeddings.table import TableEmbedding
    >>> from ctrlib.testing import example_schema
    >>> features = example_schema().features
    >>> tables, user = TableEmbedding(features), TableEmbedding(features, only=["user"], suffix="_context")
    >>> ConcatFields(tables, user).out_shape
    (7, 16)
    """

    def __init__(self, *embeddings: Any) -> None:
        super().__init__()
        shapes = [embedding.out_shape for embedding in embeddings]
        if not shapes or len({width for _, width in shapes}) > 1:
            raise ArgumentError(f"ConcatFields needs embeddings of one width, got output shapes {shapes}")
        self.embeddings = nn.ModuleList(embeddings)
        self.out_shape = (sum(num_fields for num_fields, _ in shapes), shapes[0][1])

    @property
    def encoders(self) -> list[nn.Module]:
        """Those of all parts: see `Model.network`."""
        parts: list[Any] = list(self.embeddings)
        return [encoder for part in parts for encoder in getattr(part, "encoders", ())]

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, F, D)."""
        return torch.cat([embedding(batch) for embedding in self.embeddings], dim=1)
