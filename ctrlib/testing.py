"""The contract that embeddings, towers and heads keep, as checks: for our parts and for yours.

Each check builds the part, tries it and raises AssertionError with a sentence about what is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.batch import Batch
from ctrlib.schema import NUM_RESERVED_IDS, Categorical, MultiValued, Numeric, RawId, Schema, Sequence


def example_schema(num_tasks: int = 1) -> Schema:
    """A small fitted schema with one feature of each kind, numeric ones in between.

    >>> example_schema().is_fitted
    True
    """
    return Schema(
        features=(
            Categorical("user", num_embeddings=20),
            Numeric("price", parameters={}),
            Categorical("item", num_embeddings=30),
            MultiValued("genres", num_embeddings=10),
            Sequence("history", vocabulary="item", num_embeddings=30),
            Numeric("age", parameters={}),
        ),
        labels=tuple(f"label_{task}" for task in range(num_tasks)),
    )


def example_batch(schema: Schema, size: int, seed: int = 0) -> Batch:
    """Random rows that fit a fitted schema; bags and histories hold 0 to 4 ids, raw ids are any of 64 bits.

    >>> example_batch(example_schema(), 3).labels.shape
    torch.Size([3, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    lengths, values = [], []
    for feature in schema.sparse:
        if isinstance(feature, RawId):
            lengths.append(torch.ones(size, dtype=torch.int64))
            values.append(torch.randint(-(2**63), 2**63 - 1, (size,), generator=generator))
            continue
        assert feature.num_embeddings is not None, "the schema must be fitted"
        length = torch.ones(size, dtype=torch.int64)
        if not isinstance(feature, Categorical):
            length = torch.randint(0, 5, (size,), generator=generator)
        lengths.append(length)
        count = int(length.sum())
        values.append(torch.randint(NUM_RESERVED_IDS, feature.num_embeddings, (count,), generator=generator))
    return Batch(
        KeyedJaggedTensor.from_lengths_sync(
            [feature.name for feature in schema.sparse], torch.cat(values), torch.cat(lengths)
        ),
        torch.randn(size, len(schema.dense), generator=generator),
        torch.randint(0, 2, (size, len(schema.labels)), generator=generator).float(),
        torch.ones(size),
    )


def check_embedding(make: Callable[[Schema], nn.Module], *, schema: Schema | None = None) -> None:
    """Assert that `make(schema)` is an embedding: Batch -> (B, F, D) as published, rows independent of each other.

    >>> from ctrlib.embeddings.table import TableEmbedding
    >>> check_embedding(lambda schema: TableEmbedding(schema.features, embedding_dim=4))
    """
    schema = schema or example_schema()
    embedding = make(schema)
    batch = example_batch(schema, 7)
    out_shape = _published(embedding, "out_shape", 2)
    _assert_shape(embedding, embedding(batch), (7, *out_shape))
    embedding.eval()
    whole = embedding(batch)
    _assert_same(embedding, whole, embedding(batch), "the same batch gave two results in evaluation")
    for row in range(7):
        alone = embedding(_row(batch, schema, row))
        _assert_same(embedding, alone, whole[row : row + 1], f"row {row} changes with the rows beside it")
    embedding.train()
    _assert_trains(embedding, embedding(batch))


def check_tower(make: Callable[[tuple[int, int]], nn.Module], *, in_shape: tuple[int, int] = (5, 8)) -> None:
    """Assert that `make(in_shape)` is a tower: (B, F, D) -> (B, H) as published, rows independent in evaluation.

    >>> from ctrlib.towers.mlp import MLP
    >>> check_tower(lambda shape: MLP(shape, hidden=(6,), batch_norm=True, dropout=0.5))
    """
    tower = make(in_shape)
    if _published(tower, "in_shape", 2) != in_shape:
        raise AssertionError(f"{type(tower).__name__}.in_shape is {tower.in_shape}, was built for {in_shape}")
    _check_dense(tower, in_shape, _published(tower, "out_shape", 1))


def check_head(make: Callable[[tuple[int]], nn.Module], *, in_shape: tuple[int] = (6,)) -> None:
    """Assert that `make(in_shape)` is a head: (B, H) -> (B, T) logits, finite for extreme inputs.

    >>> from ctrlib.heads.linear import LinearHead
    >>> check_head(lambda shape: LinearHead(shape, num_tasks=2))
    """
    head = make(in_shape)
    out_shape = _published(head, "out_shape", 1)
    _check_dense(head, in_shape, out_shape)
    extreme = head.eval()(torch.full((2, *in_shape), 1e4))
    if not torch.isfinite(extreme).all():
        raise AssertionError(f"{type(head).__name__} gives {extreme} for inputs of 1e4: logits must stay finite")


def _check_dense(part: nn.Module, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, *in_shape, generator=generator, requires_grad=True)
    part.eval()
    whole = part(x)
    _assert_shape(part, whole, (7, *out_shape))
    _assert_same(part, whole, part(x), "the same input gave two results in evaluation")
    _assert_same(part, whole.flip(0), part(x.flip(0)), "the result depends on the order of the rows")
    _assert_same(part, part(x[:1]), whole[:1], "a row changes with the rows beside it, or a batch of one fails")
    other = make_copy(part)
    _assert_same(part, whole, other(x), "a copy through state_dict gives another result: some state is not in it")
    part.train()
    _assert_trains(part, part(x))
    if x.grad is None or not x.grad.abs().sum() > 0:
        raise AssertionError(f"{type(part).__name__}: no gradient reaches the input")


def make_copy(part: nn.Module) -> nn.Module:
    """A deep copy whose weights were first destroyed and then read back from `part.state_dict()`.

    >>> make_copy(nn.Linear(1, 1)).training
    True
    """
    other = copy.deepcopy(part)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(part.state_dict())
    return other


def _published(part: nn.Module, name: str, length: int) -> tuple[int, ...]:
    shape = getattr(part, name, None)
    if not isinstance(shape, tuple) or len(shape) != length or not all(isinstance(n, int) for n in shape):
        raise AssertionError(f"{type(part).__name__}.{name} must be a tuple of {length} integers, got {shape!r}")
    return shape


def _assert_shape(part: nn.Module, out: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(out.shape) != expected or out.dtype != torch.float32:
        raise AssertionError(
            f"{type(part).__name__} gives {tuple(out.shape)} {out.dtype}, its out_shape promises {expected} float32"
        )


def _assert_same(part: nn.Module, got: Tensor, expected: Tensor, complaint: str) -> None:
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-6):
        gap = (got - expected).abs().max().item()
        raise AssertionError(f"{type(part).__name__}: {complaint} (largest difference {gap:.2g})")


def _assert_trains(part: nn.Module, out: Tensor) -> None:
    # A random projection: a plain sum can have zero gradient by symmetry.
    projection = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward((out * projection).sum())
    for name, parameter in part.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise AssertionError(f"{type(part).__name__}: parameter {name} gets no gradient, so it is never trained")
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            raise AssertionError(f"{type(part).__name__}: the gradient of {name} is not finite")


def _row(batch: Batch, schema: Schema, row: int) -> Batch:
    lengths = batch.sparse.lengths().view(len(schema.sparse), -1)
    jagged = batch.sparse.to_dict()
    values = [jagged[feature.name].to_dense()[row] for feature in schema.sparse]
    sparse = KeyedJaggedTensor.from_lengths_sync(
        [f.name for f in schema.sparse], torch.cat(values), lengths[:, row].contiguous()
    )
    part = slice(row, row + 1)
    return Batch(sparse, batch.dense[part], batch.labels[part], batch.weights[part])
