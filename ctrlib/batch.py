"""The one thing that flows from loader to model: a `Batch` of tensors that TorchRec's pipelines can move."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

# Splitting a KeyedJaggedTensor makes torch remark, once a process, on how TorchRec asks whether it is being traced.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


@dataclass
class Batch(Pipelineable):  # type: ignore[misc]  # TorchRec is not typed
    """B examples.

    Shape:
        sparse: KeyedJaggedTensor with one key per categorical, multi-valued or sequence feature, in the schema's order.
        dense: (B, N) float32, the numeric features in the schema's order (N may be 0).
        labels: (B, T) float32 in {0, 1}; NaN marks a missing label, which the loss leaves out.
        weights: (B,) float32; 0 marks a row that only pads a batch.
        group: (B,) int64 or None, the group (often the user) that GAUC averages over.

    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 4]), torch.tensor([1, 1]))
    >>> batch = Batch(kjt, torch.zeros(2, 0), torch.ones(2, 1), torch.ones(2))
    >>> batch.size
    2
    """

    sparse: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    group: Tensor | None = None

    @property
    def size(self) -> int:
        """Number of rows, padding included."""
        return self.dense.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """A copy of the batch on `device` (the batch itself if it is there already)."""
        return Batch(
            self.sparse.to(device, non_blocking=non_blocking),
            *(tensor.to(device, non_blocking=non_blocking) for tensor in (self.dense, self.labels, self.weights)),
            group=None if self.group is None else self.group.to(device, non_blocking=non_blocking),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell CUDA's allocator that `stream` uses these tensors."""
        self.sparse.record_stream(stream)
        for tensor in (self.dense, self.labels, self.weights, self.group):
            if tensor is not None:
                tensor.record_stream(stream)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, for asynchronous transfer to a GPU."""
        return Batch(
            self.sparse.pin_memory(),
            *(tensor.pin_memory() for tensor in (self.dense, self.labels, self.weights)),
            group=None if self.group is None else self.group.pin_memory(),
        )
