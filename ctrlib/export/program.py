"""A model as a function of plain tensors, with a name for each: what is exported.

| input | shape | what it holds |
| --- | --- | --- |
| `ids` | (B, S) int64 | ids of the features with one id a row, in the schema's order |
| `NAME` | (N,) int64 | for each bag and history: the ids of all rows, one row after the other |
| `NAME.offsets` | (B + 1,) int64 | where each row begins in it, and at last N |
| `numbers` | (B, F) float32 | the numeric features, transformed as in training |

The output is `logits`, (B, T). Probabilities are for the caller to make, in float64: float32 has none for a logit
below -18 in some runtimes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.data.columns import Columns, offsets_of
from ctrlib.embeddings.packed import RoundedRows
from ctrlib.errors import UnsupportedError
from ctrlib.schema import MISSING_ID, Categorical, RawId, Schema
from ctrlib.serving.direct import direct

Arrays = dict[str, npt.NDArray[Any]]


class Signature:
    """The inputs of a schema's models, by name.

    >>> from ctrlib.testing import example_schema
    >>> Signature(example_schema()).names
    ['ids', 'genres', 'genres.offsets', 'history', 'history.offsets', 'numbers']
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.single = [feature.name for feature in schema.sparse if isinstance(feature, Categorical | RawId)]
        self.bags = [feature.name for feature in schema.sparse if feature.name not in self.single]
        self.numbers = [feature.name for feature in schema.dense]
        self.names = ["ids"] if self.single else []
        self.names += [name for bag in self.bags for name in (bag, f"{bag}.offsets")]
        self.names += ["numbers"] if self.numbers else []

    def arrays(self, columns: Columns) -> Arrays:
        """Encoded rows as inputs."""
        found: Arrays = {}
        if self.single:
            found["ids"] = columns.ids.astype(np.int64)
        for name in self.bags:
            ragged = columns.ragged[name]
            found[name], found[f"{name}.offsets"] = ragged.values.astype(np.int64), ragged.offsets
        if self.numbers:
            found["numbers"] = np.ascontiguousarray(columns.floats[:, : len(self.numbers)])
        return found

    def dynamic(self, fewest: int) -> tuple[dict[int, Any], ...]:
        """Which axes may have any size, for `torch.export`: rows, and the ids of each bag."""
        rows = torch.export.Dim("rows", min=fewest)
        shapes: list[dict[int, Any]] = [{0: rows}] if self.single else []
        for place, _ in enumerate(self.bags):
            shapes += [{0: torch.export.Dim(f"values_{place}", min=0)}, {0: rows + 1}]
        return tuple(shapes + ([{0: rows}] if self.numbers else []))

    def examples(self, size: int, seed: int = 0, *, longest: int = 5) -> Arrays:
        """Random rows; missing and unseen ids, and empty bags, are among them. `longest`: ids in a bag at most.

        >>> from ctrlib.testing import example_schema
        >>> {name: array.shape for name, array in Signature(example_schema()).examples(2).items()}["ids"]
        (2, 2)
        """
        random = np.random.default_rng(seed)
        found: Arrays = {}

        def ids(name: str, count: int) -> npt.NDArray[np.int64]:
            rows = self.schema[name].num_embeddings  # type: ignore[union-attr]
            return random.integers(MISSING_ID, rows, count) if rows else random.integers(-(2**63), 2**63 - 1, count)

        if self.single:
            found["ids"] = np.stack([ids(name, size) for name in self.single], axis=1)
        for name in self.bags:
            offsets = offsets_of(random.integers(0, longest + 1, size))
            found[name], found[f"{name}.offsets"] = ids(name, int(offsets[-1])), offsets
        if self.numbers:
            found["numbers"] = random.standard_normal((size, len(self.numbers))).astype(np.float32)
        return found


class _Rows:
    """Tensors of a `Signature` as a model reads a `Batch`; see `ctrlib.serving.direct.Rows`."""

    def __init__(self, signature: Signature, tensors: dict[str, Tensor]) -> None:
        self.signature, self.tensors = signature, tensors
        self.ids = tensors.get("ids")

    @functools.cached_property
    def size(self) -> int:
        name = self.signature.names[0]
        return self.tensors[name].shape[0] if name in ("ids", "numbers") else self._offsets(name).shape[0] - 1

    @functools.cached_property
    def dense(self) -> Tensor:
        return self.tensors["numbers"] if self.signature.numbers else torch.zeros(self.size, 0)

    @functools.cached_property
    def sparse(self) -> KeyedJaggedTensor:
        size, schema = self.size, self.signature.schema
        values, lengths = [], []
        for feature in schema.sparse:
            if feature.name in self.signature.single:
                assert self.ids is not None
                values.append(self.ids[:, self.signature.single.index(feature.name)])
                lengths.append(torch.ones(size, dtype=torch.int64))
            else:
                values.append(self.tensors[feature.name])
                lengths.append(self._offsets(feature.name).diff())
        counts = [part.shape[0] for part in values]
        return KeyedJaggedTensor(
            [feature.name for feature in schema.sparse],
            torch.cat(values),
            lengths=torch.cat(lengths),
            stride=size,
            length_per_key=counts,
            offset_per_key=[sum(counts[:place]) for place in range(len(counts) + 1)],
        )

    def single(self, positions: list[int] | None, shifts: npt.NDArray[np.int64]) -> Tensor:
        assert self.ids is not None
        ids = self.ids if positions is None else self.ids[:, positions]
        return ids + torch.from_numpy(shifts)

    def bag(self, name: str, shift: int) -> tuple[Tensor, Tensor]:
        return self.tensors[name] + shift, self._offsets(name)

    def _offsets(self, name: str) -> Tensor:
        return self.tensors[f"{name}.offsets"]


class Program(nn.Module):
    """A copy of a model, in evaluation, that takes the tensors of a `Signature` in their order.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> schema = example_schema()
    >>> program = Program(models.mlp(Inputs(schema, embedding_dim=4), hidden=(8,)), schema)
    """

    def __init__(self, model: nn.Module, schema: Schema) -> None:
        super().__init__()
        self.signature = Signature(schema)
        self.model = direct(copy.deepcopy(model).eval(), schema, flatten=False)
        for group in self.model.modules():
            if isinstance(group, RoundedRows):
                group.split()
        self.one_more = False

    def forward(self, *tensors: Tensor) -> Tensor:
        """The inputs, by their order -> (B, T) logits."""
        inputs = dict(zip(self.signature.names, tensors))
        if self.one_more:
            inputs = {name: self._longer(name, tensor) for name, tensor in inputs.items()}
        logits: Tensor = self.model(_Rows(self.signature, inputs))
        return logits[:-1] if self.one_more else logits

    def run(self, arrays: Arrays) -> npt.NDArray[np.float32]:
        """Logits of a `Signature`'s arrays."""
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = self(*map(torch.from_numpy, self._ordered(arrays))).numpy()
        return found

    def export(self) -> torch.export.ExportedProgram:
        """The operations that it does, for any number of rows.

        Raises:
            UnsupportedError: they depend on the values of ids in a way that cannot be recorded.
        """
        # torch.export takes it that a size is not 1 where an operation would do something else then, and the program
        # would refuse single rows. Most such places ask in a way that can be told not to mind. Products that torch's
        # einsum makes cannot: their programs compute one row more than there are.
        for self.one_more in (False, True):
            try:
                return self._recorded()
            except Exception as error:  # whatever tracing stumbles over
                stumbled = error
            if not any(sign in str(stumbled) for sign in ("Constraints violated", "Guard failed")):
                break
        lines = [line.strip() for line in str(stumbled).splitlines() if line.strip()]
        raise UnsupportedError(
            "this model cannot be exported, since torch.export cannot record what it computes: "
            f"{type(stumbled).__name__}: {lines[0] if lines else ''}"
        ) from stumbled

    def _recorded(self) -> torch.export.ExportedProgram:
        tensors = tuple(map(torch.from_numpy, self._ordered(self.signature.examples(5))))
        shapes = self.signature.dynamic(fewest=1 if self.one_more else 0)
        with torch.fx.experimental._config.patch(backed_size_oblivious=True), quiet():  # type: ignore[attr-defined]
            found = torch.export.export(self, tensors, dynamic_shapes=(shapes,), strict=False)
            module = found.module()
        for size, longest in ((1, 0), (1, 1), (5, 0)):  # which its guards may refuse
            module(*map(torch.from_numpy, self._ordered(self.signature.examples(size, longest=longest))))
        return found

    def _ordered(self, arrays: Arrays) -> list[npt.NDArray[Any]]:
        return [arrays[name] for name in self.signature.names]

    def _longer(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.signature.bags:
            return tensor
        return torch.cat([tensor, tensor[-1:]])  # a row like the last, with empty bags


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch and TorchRec remark on while they export is not for the user, who cannot change it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
