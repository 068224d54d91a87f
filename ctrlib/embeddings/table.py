"""One table per vocabulary: the plain embedding layer of every CTR model, as TorchRec collections."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from ctrlib.batch import Batch
from ctrlib.embeddings.numeric import ValueTimesVector
from ctrlib.errors import ArgumentError
from ctrlib.joined import ScaledFields, has_hooks, may_join
from ctrlib.schema import PADDING_ID, Categorical, Feature, Numeric, RawId, SparseFeature, vocabulary_of


class TableEmbedding(nn.Module):
    """e_f = V_f[x_f] for ids, the mean (or sum) of rows for bags and histories, and x_f v_f for numbers.

    Features of one vocabulary share one table. Rows start as N(0, init_std^2), the padding row at 0; numeric vectors
    v_f as in `ValueTimesVector`. An empty bag gives the zero vector.

    Shape: Batch -> (B, F, D), fields in the schema's order.

    `stacked=K` lays the tables one below the other in K stacks, or fewer (for each kind of pooling), with ids shifted
    accordingly: the same vectors, but fbgemm's CPU kernels update one large table on all cores, and many small ones
    one after the other (26 tables of 4,096 look-ups: 23 ms on two cores, in one stack 6 ms). Several stacks can be
    spread over as many processes as a whole, which takes a fraction of the traffic that cutting one by rows does.
    0, for none: tables can be sharded one by one, and a wrong id does not end up in another feature's rows.

    `features` are all of the schema's, since they tell what the batch holds; `only` names those to embed, where not all
    are wanted, and `suffix` keeps these tables' names apart from those of another embedding in the same model.
    `numeric`: a module (B, N) -> (B, N, D) that makes fields of the numbers in another way
    (`ctrlib.embeddings.PiecewiseLinear` and its like), N the numeric features embedded here. `tables`: a module
    KeyedJaggedTensor -> KeyedTensor that looks ids up in another way than one row for each
    (`ctrlib.embeddings.UnifiedTables` and its like), with the features as keys, each `embedding_dim` wide, which it
    publishes as `names` and `embedding_dim`.

    Raises:
        ValueError: a feature has not been fitted, features of one vocabulary want different pooling, `only` names none
            or an unknown one, `stacked` is negative, or `numeric` or `tables` does not fit.

    >>> embedding = TableEmbedding([Categorical("item", num_embeddings=5), Numeric("price")], embedding_dim=4)
    >>> embedding.out_shape
    (2, 4)
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 4]), torch.tensor([1, 1]))
    >>> embedding(Batch(kjt, torch.ones(2, 1), torch.ones(2, 1), torch.ones(2))).shape
    torch.Size([2, 2, 4])
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        only: Sequence[str] | None = None,
        embedding_dim: int = 16,
        init_std: float = 1e-4,
        stacked: int = 0,
        suffix: str = "",
        numeric: nn.Module | None = None,
        tables: Any = None,
    ) -> None:
        super().__init__()
        dense_names = [feature.name for feature in features if isinstance(feature, Numeric)]
        if only is not None:
            unknown = sorted(set(only) - {feature.name for feature in features})
            if unknown:
                names = [feature.name for feature in features]
                raise ArgumentError(f"only={list(only)}: no features {unknown}, expected some of {names}")
            features = [feature for feature in features if feature.name in only]
        if not features or embedding_dim < 1:
            raise ArgumentError(
                f"an embedding needs one or more features and embedding_dim of 1 or more, got {len(features)} features "
                f"and embedding_dim={embedding_dim}"
            )
        self.out_shape = (len(features), embedding_dim)
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        self.names = [feature.name for feature in sparse]
        if tables is None:
            tables = make_tables(sparse, embedding_dim=embedding_dim, init_std=init_std, suffix=suffix, stacked=stacked)
        elif stacked or set(self.names) - set(tables.names) or tables.embedding_dim != embedding_dim:
            raise ArgumentError(
                f"{type(tables).__name__} looks up {tables.names}, {tables.embedding_dim} wide, but the embedding "
                f"needs {self.names}, {embedding_dim} wide (and stacked=0, got {stacked}): build both for the same "
                "features"
            )
        self.tables = tables
        self.first_rows = first_rows(sparse, stacked) if stacked else None
        columns = [dense_names.index(feature.name) for feature in features if isinstance(feature, Numeric)]
        self.columns = columns if len(columns) < len(dense_names) else None
        if numeric is None and columns:
            numeric = ValueTimesVector(len(columns), embedding_dim=embedding_dim)
        expected = (len(columns), embedding_dim)
        if numeric is not None and getattr(numeric, "out_shape", None) != expected:
            raise ArgumentError(
                f"{type(numeric).__name__} gives {getattr(numeric, 'out_shape', None)}, but {len(columns)} numeric "
                f"features become fields {embedding_dim} wide: build it for {expected}"
            )
        self.numeric = numeric
        # Looked-up and numeric fields come in two blocks. The schema's order takes runs of fields from either: (is the
        # run numeric, its first field in the block, its last + 1). Copying runs is cheaper than permuting fields.
        self.runs: list[tuple[bool, int, int]] = []
        for is_numeric, run in itertools.groupby(features, key=lambda feature: isinstance(feature, Numeric)):
            start = sum(stop - first for kind, first, stop in self.runs if kind == is_numeric)
            self.runs.append((is_numeric, start, start + len(list(run))))

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, F, D)."""
        blocks: dict[bool, Tensor] = {}
        if self.tables is not None:
            blocks[False] = look_up(self.tables, shift_ids(batch.sparse, self.first_rows), self.names)
        if self.numeric is not None:
            dense = batch.dense if self.columns is None else batch.dense[:, self.columns]
            blocks[True] = self.numeric(dense)
        fields = [blocks[is_numeric][:, start:stop] for is_numeric, start, stop in self.runs]
        return fields[0] if len(fields) == 1 else torch.cat(fields, dim=1)

    def scaled_fields(self, batch: Batch) -> ScaledFields | None:
        """The same fields, with x_f v_f not written out; None where there are none, or not on one side of the others.

        None also where somebody waits for this module to be called.

        >>> features = [Numeric("price"), Categorical("item", num_embeddings=5)]
        >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 4]), torch.tensor([1, 1]))
        >>> batch = Batch(kjt, torch.ones(2, 1), torch.ones(2, 1), torch.ones(2))
        >>> embedding = TableEmbedding(features, embedding_dim=4)
        >>> bool((embedding.scaled_fields(batch).written_out() == embedding(batch)).all())
        True
        """
        if self.tables is None or type(self.numeric) is not ValueTimesVector or len(self.runs) != 2:
            return None
        if has_hooks(self, self.numeric):
            return None
        numbers = batch.dense if self.columns is None else batch.dense[:, self.columns]
        if numbers.device.type != "cpu" or numbers.dtype != self.numeric.vectors.dtype:
            return None
        looked_up = look_up(self.tables, shift_ids(batch.sparse, self.first_rows), self.names)
        return ScaledFields(looked_up, numbers, self.numeric.vectors, numbers_first=self.runs[0][0])


class Wide(nn.Module):
    """First-order term sum_f w_f[x_f] (+ sum_f w_f x_f for numbers): the linear part of FM, DeepFM and Wide & Deep.

    Bags and histories contribute their pooled weight. All weights start at N(0, init_std^2).

    `columns`: fbgemm's fused kernels need widths that are multiples of 4, so the fused engine wants 4; the weight is
    then the mean of 4 equal columns, which row-wise Adagrad moves exactly as it moves one column: each gets gradient
    g / 4, the mean square over the row is (g / 4)^2, and the quarter cancels. `stacked` is as in `TableEmbedding`.

    Shape: Batch -> (B, T), T = `num_tasks`.

    >>> wide = Wide([Categorical("item", num_embeddings=5), Numeric("price")], num_tasks=2)
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 4]), torch.tensor([1, 1]))
    >>> wide(Batch(kjt, torch.ones(2, 1), torch.ones(2, 2), torch.ones(2))).shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        num_tasks: int = 1,
        columns: int = 1,
        init_std: float = 1e-4,
        stacked: int = 0,
    ) -> None:
        super().__init__()
        self.num_tasks, self.columns = num_tasks, columns
        self.out_shape = (num_tasks,)
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        num_dense = len(features) - len(sparse)
        self.tables = make_tables(
            sparse,
            embedding_dim=num_tasks * columns,
            init_std=init_std,
            copies=columns,
            suffix="_wide",
            stacked=stacked,
        )
        self.first_rows = first_rows(sparse, stacked) if stacked else None
        self.numeric_weights = nn.Parameter(torch.empty(num_dense, num_tasks)) if num_dense else None
        if self.numeric_weights is not None:
            nn.init.normal_(self.numeric_weights, std=init_std)

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, T)."""
        total = batch.dense.new_zeros(batch.size, self.num_tasks)
        if self.tables is not None:
            # The sum over fields does not care about their order.
            pooled = look_up(self.tables, shift_ids(batch.sparse, self.first_rows))
            total = total + pooled.view(batch.size, -1, self.num_tasks, self.columns).sum(1).mean(2)
        if self.numeric_weights is not None:
            total = total + batch.dense @ self.numeric_weights
        return total


def make_tables(
    features: Sequence[SparseFeature],
    *,
    embedding_dim: int,
    init_std: float,
    copies: int = 1,
    suffix: str = "",
    stacked: int = 0,
) -> EmbeddingBagCollection | None:
    """The tables of `tables_by_name`, with `suffix` after their names; None without features.

    Each run of `copies` columns starts equal.

    Raises:
        ValueError: as `tables_by_name`.
    """
    configs = []
    for name, vocabularies in tables_by_name(features, stacked).items():
        rows = [num_rows(members) for members in vocabularies]
        padding = [sum(rows[:position]) + PADDING_ID for position in range(len(rows))]
        configs.append(
            EmbeddingBagConfig(
                name=name + suffix,
                num_embeddings=sum(rows),
                embedding_dim=embedding_dim,
                feature_names=[member.name for members in vocabularies for member in members],
                pooling=PoolingType.MEAN if pooling_of(vocabularies[0]) == "mean" else PoolingType.SUM,
                init_fn=functools.partial(init_rows, std=init_std, copies=copies, padding=padding),
            )
        )
    return EmbeddingBagCollection(tables=configs) if configs else None


def tables_by_name(features: Sequence[SparseFeature], stacked: int) -> dict[str, list[list[SparseFeature]]]:
    """Name of each table -> the vocabularies in it, in the order of their rows, each as the features that share it.

    Not `stacked`: a table per vocabulary. Else at most `stacked` tables for each kind of pooling, with about the same
    number of rows and of look-ups in each. Saved weights are read by this order.

    Raises:
        ValueError: `stacked` is negative, a feature has not been fitted, or features of one vocabulary want different
            pooling.

    >>> features = [Categorical(name, num_embeddings=rows) for name, rows in (("a", 9), ("b", 5), ("c", 4))]
    >>> tables = tables_by_name(features, stacked=2)
    >>> {name: [members[0].name for members in vocabularies] for name, vocabularies in tables.items()}
    {'stacked_sum_0': ['a'], 'stacked_sum_1': ['b', 'c']}
    """
    if stacked < 0:
        raise ArgumentError(f"stacked={stacked}: expected a number of stacks, or 0 for a table per vocabulary")
    vocabularies = by_vocabulary(features)
    if not stacked:
        return {table_name(vocabulary_of(members[0])): [members] for members in vocabularies}
    tables: dict[str, list[list[SparseFeature]]] = {}
    for pooling in dict.fromkeys(map(pooling_of, vocabularies)):
        alike = [members for members in vocabularies if pooling_of(members) == pooling]
        rows, lookups = sum(map(num_rows, alike)), sum(map(len, alike))
        # Of all rows plus of all look-ups, times rows * lookups: whole numbers, since fractions would be rounded.
        shares = [num_rows(members) * lookups + len(members) * rows for members in alike]
        stacks = balanced(shares, min(stacked, len(alike)))
        for number, stack in enumerate(stacks):
            name = f"stacked_{pooling}_{number}" if len(stacks) > 1 else f"stacked_{pooling}"
            tables[name] = [alike[position] for position in stack]
    return tables


def balanced(shares: Sequence[int], parts: int) -> list[list[int]]:
    """Positions of `shares` in parts of about the same sum: the largest share first, each to the lightest part.

    >>> balanced([1, 5, 4, 3], parts=2)
    [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    for position in sorted(range(len(shares)), key=lambda position: -shares[position]):
        min(found, key=lambda part: sum(shares[other] for other in part)).append(position)
    return [sorted(part) for part in found]


def first_rows(features: Sequence[SparseFeature], stacked: int) -> dict[str, int]:
    """Feature -> where its vocabulary begins in the stacked table that it belongs to.

    >>> first_rows([Categorical("a", num_embeddings=5), Categorical("b", num_embeddings=7)], stacked=1)
    {'a': 0, 'b': 5}
    """
    first: dict[str, int] = {}
    for vocabularies in tables_by_name(features, stacked).values():
        used = 0
        for members in vocabularies:
            first |= {member.name: used for member in members}
            used += num_rows(members)
    return first


def shift_ids(sparse: KeyedJaggedTensor, shifts: dict[str, int] | None) -> KeyedJaggedTensor:
    """The same bags with `shifts[key]` added to every id of a key that has one; None leaves them as they are.

    Whoever gets the bags can ask `before_shift` what they were.
    """
    if shifts is None:
        return sparse
    keys, lengths = sparse.keys(), sparse.length_per_key()
    # What is made while torch.export looks on is of its own kind, and must not be kept.
    shift_of = _shift.__wrapped__ if torch.compiler.is_compiling() else _shift
    shift = shift_of(tuple(shifts.get(key, 0) for key in keys), tuple(lengths), sparse.values().device)
    shifted = KeyedJaggedTensor(
        keys,
        sparse.values() + shift,
        lengths=sparse.lengths(),
        offsets=sparse.offsets(),
        stride=sparse.stride(),
        length_per_key=lengths,
        offset_per_key=sparse.offset_per_key(),
    )
    if not torch.compiler.is_compiling():
        shifted._ctrlib_before = sparse, shifts
    return shifted


def before_shift(ids: KeyedJaggedTensor) -> tuple[KeyedJaggedTensor, dict[str, int] | None]:
    """The bags that `shift_ids` made these from, and by which shifts; others as they are, and None."""
    found: tuple[KeyedJaggedTensor, dict[str, int] | None] = getattr(ids, "_ctrlib_before", (ids, None))
    return found


@functools.lru_cache(maxsize=4)
def _shift(shifts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Each shift as often as its length says; kept, since batches of single ids all have the same lengths."""
    counts = torch.tensor(lengths, device=device)
    return torch.tensor(shifts, device=device).repeat_interleave(counts, output_size=sum(lengths))


def by_vocabulary(features: Sequence[SparseFeature]) -> list[list[SparseFeature]]:
    """The features that share each vocabulary, in the order of first use."""
    groups: dict[str, list[SparseFeature]] = {}
    for feature in features:
        groups.setdefault(vocabulary_of(feature), []).append(feature)
    return list(groups.values())


def num_rows(members: Sequence[SparseFeature]) -> int:
    """Rows of the table of features that share a vocabulary.

    Raises:
        ValueError: they have not been fitted, or have raw ids.
    """
    if isinstance(members[0], RawId):
        raise ArgumentError(
            f"feature {members[0].name!r} has raw ids, without vocabulary or rows of a table: embed it by "
            "`ManagedEmbedding`, leave it out by only=[...], or prepare it as a Categorical"
        )
    rows = members[0].num_embeddings
    if rows is None:
        raise ArgumentError(
            f"feature {members[0].name!r} has no num_embeddings yet: take the schema that `ctrlib.prepare` returns"
        )
    return rows


def pooling_of(members: Sequence[SparseFeature]) -> str:
    """How features of one vocabulary are pooled: one id per row is its own mean and its own sum, so only bags and
    histories have a say."""
    pooling = {member.pooling for member in members if not isinstance(member, Categorical)} or {"sum"}
    if len(pooling) > 1:
        raise ArgumentError(
            f"features {[m.name for m in members]} share table {vocabulary_of(members[0])!r} and must have the same "
            f"pooling, got {sorted(pooling)}"
        )
    return str(next(iter(pooling)))


def table_name(vocabulary: str) -> str:
    """A name that torch accepts for a module: without dots, and not that of one of its own attributes.

    >>> table_name("type"), table_name("user.id")
    ('table_type', 'table_user%2Eid')
    """
    return "table_" + vocabulary.replace("%", "%25").replace(".", "%2E")


def look_up(tables: Any, sparse: KeyedJaggedTensor, names: Sequence[str] | None = None) -> Tensor:
    """The pooled rows of each feature, (B, F, D), in the order of `names`, or in any: that spares sharded tables work.

    On a CPU, plain tables are read here and not by TorchRec: a bag of one id is its row, and reading rows costs half
    of pooling bags of one, above all in the backward pass. Where hooks wait for what TorchRec is asked, it is asked.
    """
    plain = type(tables) is EmbeddingBagCollection and sparse.device().type == "cpu"
    if plain and not torch.compiler.is_compiling() and not has_hooks(*tables.modules()):
        return _read(tables, sparse, names)
    found = tables(sparse)
    names = list(found.keys()) if names is None else names
    pooled = regroup(found, names)
    return pooled.view(pooled.shape[0], len(names), pooled.shape[1] // len(names))


def _read(tables: EmbeddingBagCollection, sparse: KeyedJaggedTensor, names: Sequence[str] | None) -> Tensor:
    table_of = {name: config.name for config in tables.embedding_bag_configs() for name in config.feature_names}
    names = list(table_of if names is None else names)
    keys, starts, offsets, size = sparse.keys(), sparse.offset_per_key(), sparse.offsets(), sparse.stride()
    places = {name: place for place, name in enumerate(keys)}
    single = (sparse.lengths().view(len(keys), size) == 1).all(1).tolist()
    rows = [name for name in names if single[places[name]]]

    def ids_of(name: str) -> Tensor:
        ids: Tensor = sparse.values()[starts[places[name]] : starts[places[name] + 1]]
        return ids

    fields: dict[str, Tensor] = {}
    if rows:
        weights = {table_of[name]: tables.embedding_bags[table_of[name]].weight for name in rows}
        numbers = {table: number for number, table in enumerate(weights)}
        # Most often all keys in their order: then nothing is copied.
        ids_FB = sparse.values().view(len(keys), size) if rows == keys else torch.stack([ids_of(one) for one in rows])
        read = _Rows.apply if may_join() else _rows
        found: Tensor = read(ids_FB, [numbers[table_of[name]] for name in rows], *weights.values())
        if rows == names:
            return found
        fields = dict(zip(rows, found.unbind(1)))
    for name in names:
        if name not in fields:
            place = places[name]
            bags = offsets[place * size : (place + 1) * size + 1] - starts[place]
            fields[name] = tables.embedding_bags[table_of[name]](ids_of(name), bags)
    return torch.stack([fields[name] for name in names], dim=1)


def _rows(ids_FB: Tensor, tables: list[int], *weights: Tensor) -> Tensor:
    return torch.stack([F.embedding(ids, weights[table]) for ids, table in zip(ids_FB, tables)], dim=1)


class _Rows(torch.autograd.Function):
    """weights[tables[f]][ids_FB[f]] for each field f, (B, F, D), with the gradients of all tables made at once.

    On a CPU the gradient of `F.embedding` takes 60 ns for each row, however short it is. Numbers by themselves are
    added at 1 ns each, and rows of 16 and more by a kernel of torch that sorts their ids.
    """

    @staticmethod
    def forward(ctx: Any, ids_FB: Tensor, tables: list[int], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(ids_FB)
        ctx.tables, ctx.rows = tables, [weight.shape[0] for weight in weights]
        return _rows(ids_FB, tables, *weights)

    @staticmethod
    def backward(ctx: Any, grad_BFD: Tensor) -> tuple[Tensor | None, ...]:
        (ids_FB,), width = ctx.saved_tensors, grad_BFD.shape[2]
        trained = ctx.needs_input_grad[2:]
        fields = [field for field, table in enumerate(ctx.tables) if trained[table]]
        if len(fields) < len(ctx.tables):  # what is frozen may be large
            ids_FB, grad_BFD = ids_FB[fields], grad_BFD[:, fields]
        rows = [count if is_trained else 0 for count, is_trained in zip(ctx.rows, trained)]
        first = list(itertools.accumulate(rows, initial=0))
        rows_BF = (ids_FB + torch.tensor([first[ctx.tables[field]] for field in fields]).unsqueeze(1)).t()
        if width < 16:
            places = (rows_BF.mul(width).unsqueeze(2) + torch.arange(width)).flatten()
            grad = grad_BFD.new_zeros(first[-1] * width).scatter_add_(0, places, grad_BFD.flatten())
        else:
            grad = grad_BFD.new_zeros(first[-1], width).index_add_(0, rows_BF.flatten(), grad_BFD.flatten(0, 1))
        parts = torch.split(grad.view(-1, width), rows)
        return None, None, *(part if is_trained else None for part, is_trained in zip(parts, trained))


def regroup(pooled: Any, names: Sequence[str]) -> Tensor:
    """The columns of a KeyedTensor in the order of `names`: (B, F * D).

    TorchRec orders keys by the sharding plan, so this is the one place where the schema's order is restored.
    """
    if list(pooled.keys()) == list(names):
        values: Tensor = pooled.values()
        return values
    by_name = pooled.to_dict()
    return torch.cat([by_name[name] for name in names], dim=1)


def init_rows(weight: Tensor, *, std: float, copies: int, padding: list[int]) -> Tensor:
    """Fill a table with N(0, std^2), each run of `copies` columns equal, and its `padding` rows with 0."""
    with torch.no_grad():
        rows = torch.randn(weight.shape[0], weight.shape[1] // copies, device=weight.device) * std
        weight.copy_(rows.repeat_interleave(copies, dim=1))
        weight[padding] = 0
    return weight
