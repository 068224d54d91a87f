"""Tables that a trained model's tables become when they are made small: fewer rows, and narrower ones.

Which rows to keep, and how wide, is for `ctrlib.search` to say. The low-rank form is that of H. Yu et al., "Unified
Low-rank Compression Framework for Click-through Rate Prediction", KDD 2024, https://arxiv.org/abs/2405.18146; a mean
that knows how many ids a bag has, and the map of kept ids, are additions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.table import init_rows, table_name
from ctrlib.errors import ArgumentError
from ctrlib.schema import NUM_RESERVED_IDS, OOV_ID, PADDING_ID, Pooling

Kept = Literal["all", "first", "some"]


@dataclass(frozen=True)
class NarrowTable:
    """How the rows of one vocabulary are stored: plain data, which JSON can hold.

    `feature_names`: the features that share the rows, all pooled alike. `rows`: ids of the vocabulary. `rank`: width of
    a stored row; if it is the embedding's own, rows are as they are.

    `kept`: which ids have a row. "all"; "first": those below `num_kept`, which are the most frequent ones where
    vocabularies are ordered so; "some": any `num_kept` ids, marked in a bitmap, which takes 12 bytes for every 64 ids.
    The reserved ids are always among them. `dropped_to`: the id whose row all others read, OOV_ID, or PADDING_ID for
    the zero vector. `centred`: whether a mean is added to what a narrow row decodes to. `padded`: a narrow row is the
    first numbers of the embedding and the others are zero, instead of being decoded.

    Raises:
        ValueError: a value is out of its range, `num_kept` does not go with `kept`, or `centred` with `padded`.

    >>> NarrowTable("item", ("item",), rows=1000, rank=4, kept="some", num_kept=100).num_bytes(embedding_dim=16)
    {'weights': 1600, 'remap': 192, 'decoder': 320}
    """

    name: str
    feature_names: tuple[str, ...]
    rows: int
    rank: int
    pooling: Pooling = "sum"
    kept: Kept = "all"
    num_kept: int | None = None
    dropped_to: int = OOV_ID
    centred: bool = True
    padded: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_names", tuple(self.feature_names))
        for name, value, choices in (
            ("pooling", self.pooling, get_args(Pooling)),
            ("kept", self.kept, get_args(Kept)),
            ("dropped_to", self.dropped_to, (OOV_ID, PADDING_ID)),
        ):
            if value not in choices:
                raise ArgumentError(f"table {self.name!r}: {name}={value!r}, expected one of {choices}")
        if not self.feature_names or self.rows < NUM_RESERVED_IDS or self.rank < 1:
            raise ArgumentError(
                f"table {self.name!r} has features {self.feature_names}, {self.rows} rows and rank {self.rank}: "
                f"expected one feature or more, {NUM_RESERVED_IDS} rows (for the reserved ids) or more, and rank 1 or "
                "more"
            )
        if self.padded and self.centred:
            raise ArgumentError(
                f"table {self.name!r}: padded rows have no mean, expected centred=False with padded=True"
            )
        if (self.kept == "all") != (self.num_kept is None):
            raise ArgumentError(
                f"table {self.name!r}: num_kept={self.num_kept} with kept={self.kept!r}, expected it with 'first' and "
                "'some' only"
            )
        if self.num_kept is not None and not NUM_RESERVED_IDS <= self.num_kept <= self.rows:
            raise ArgumentError(
                f"table {self.name!r}: num_kept={self.num_kept}, expected {NUM_RESERVED_IDS} (the reserved ids) to "
                f"{self.rows}"
            )

    @property
    def num_stored(self) -> int:
        """Rows of the stored table."""
        return self.rows if self.num_kept is None else self.num_kept

    @property
    def num_words(self) -> int:
        """64-bit words of the bitmap; 0 where none is needed."""
        return -(-self.rows // 64) if self.kept == "some" else 0

    @property
    def drops_to_zero(self) -> bool:
        """Whether ids without a row read the zero vector."""
        return self.kept != "all" and self.dropped_to == PADDING_ID

    def num_bytes(self, embedding_dim: int) -> dict[str, int]:
        """Bytes of the stored rows, of the map from ids to them, and of the decoder."""
        decoder = (self.rank + self.centred) * embedding_dim if self.rank < embedding_dim and not self.padded else 0
        return {"weights": 4 * self.num_stored * self.rank, "remap": 12 * self.num_words, "decoder": 4 * decoder}


class _Group(NamedTuple):
    """Tables of one rank, all with a mean or all without, or all padded: one batched product decodes them."""

    key: str
    tables: list[NarrowTable]
    names: list[str]  # of their features
    order: list[int]  # where these are among all features
    owners: list[int] | slice  # the position of each one's table


def tables_by_name(tables: Sequence[NarrowTable | Mapping[str, Any]], embedding_dim: int) -> dict[str, NarrowTable]:
    """Name -> table, in their order.

    Raises:
        ArgumentError: there is none, two have one name or feature, or a rank is beyond `embedding_dim`.
    """
    made = [table if isinstance(table, NarrowTable) else NarrowTable(**table) for table in tables]
    found = {table.name: table for table in made}
    held = [name for table in made for name in table.feature_names]
    if not made or len(found) < len(made) or len(set(held)) < len(held):
        raise ArgumentError(
            "expected one or more tables, of different names and features, got "
            f"{[(table.name, table.feature_names) for table in made]}"
        )
    if beyond := {table.name: table.rank for table in made if table.rank > embedding_dim}:
        raise ArgumentError(f"tables {beyond} have a rank beyond embedding_dim={embedding_dim}")
    return found


def check_filling(
    table: NarrowTable,
    dim: int,
    is_narrow: bool,
    *,
    full: Tensor,
    kept: Tensor | None = None,
    mean: Tensor | None,
    decoder: Tensor | None,
) -> None:
    """Refuse what a table cannot be filled from; `is_narrow`: it has a decoder.

    Raises:
        ArgumentError: one of these is lacking, has no use, or has another shape.
    """
    for what, tensor, shape in (
        ("full", full, (table.rows, dim)),
        ("kept", kept, (table.num_stored,) if table.kept == "some" else None),
        ("mean", mean, (dim,) if is_narrow and table.centred else None),
        ("decoder", decoder, (table.rank, dim) if is_narrow else None),
    ):
        got = None if tensor is None else tuple(tensor.shape)
        if got != shape:
            raise ArgumentError(f"{what} has shape {got}, expected {shape} for an embedding of {dim} and {table}")


class NarrowTables(nn.Module):
    """e_f = sum_j (E_f[m(x_fj)] U_f + mu_f) over the bag x_f, or its mean: rows stored R wide, decoded to D.

    A look-up for `TableEmbedding(..., tables=NarrowTables(...))`, and a drop-in for its tables. Each `NarrowTable` says
    which row m(x) an id reads. Rows are pooled before they are decoded, and the mean is added as often as the bag has
    ids: the vector is that of decoded rows, pooled, and an empty bag's is zero. Features that share a table share its
    decoder. With R = D there is no decoder, and rows are as they are.

    Rows, decoders and means are trained; rows are in TorchRec's tables, which any plan can shard. `fill` takes them
    from a full table. Until then rows are N(0, init_std^2), decoders orthonormal, means 0, and "some" ids the first.

    `names`: the order of the keys, by default that of the tables. `is_weighted`: ids come with weights in the
    KeyedJaggedTensor, which multiply their terms; the mean of a bag still divides by the number of its ids.

    Tables that are `padded` have no decoder either: U_f is the identity's first R rows, as OptEmbed's masks of columns
    are (F. Lyu et al., CIKM 2022, https://arxiv.org/abs/2208.04482).

    Shape: KeyedJaggedTensor -> KeyedTensor, a key for each of `names`, D wide.

    Raises:
        ValueError: there is no table, two have one name or feature, a rank is beyond `embedding_dim`, or `names` are
            not the tables' features; when called: weights are there, or lacking, against `is_weighted`.

    >>> table = NarrowTable("item", ("item",), rows=9, rank=2, kept="first", num_kept=5)
    >>> lookup = NarrowTables([table], embedding_dim=4)
    >>> out = lookup(KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([2, 7]), torch.tensor([1, 1])))["item"]
    >>> out.shape, bool((out[1] == out[0]).all())  # id 7 has no row, and reads that of OOV_ID, 2
    (torch.Size([2, 4]), True)
    """

    kept_bits: Tensor | None
    kept_before: Tensor | None

    def __init__(
        self,
        tables: Sequence[NarrowTable | Mapping[str, Any]],
        *,
        embedding_dim: int = 16,
        names: Sequence[str] | None = None,
        init_std: float = 1e-4,
        is_weighted: bool = False,
    ) -> None:
        super().__init__()
        self.stored = tables_by_name(tables, embedding_dim)
        made = list(self.stored.values())
        held = [name for table in made for name in table.feature_names]
        self.names = held if names is None else list(names)
        if sorted(self.names) != sorted(held):
            raise ArgumentError(f"names={self.names}, but the tables are those of {sorted(held)}")
        self.embedding_dim, self.is_weighted = embedding_dim, is_weighted
        self._owner = {name: table for table in made for name in table.feature_names}
        # Ids that read zero get weight 0, and so neither train a row nor bring the mean along.
        self._weighs = is_weighted or any(table.drops_to_zero for table in made)
        self.tables = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=table_name(table.name),
                    num_embeddings=table.num_stored,
                    embedding_dim=table.rank,
                    feature_names=list(table.feature_names),
                    pooling=PoolingType.SUM,  # means are divided after: TorchRec's are inexact where rows are sharded
                    init_fn=functools.partial(init_rows, std=init_std, copies=1, padding=[PADDING_ID]),
                )
                for table in made
            ],
            is_weighted=self._weighs,
        )
        self._groups = self._make_groups()
        self.decoders, self.means = nn.ParameterDict(), nn.ParameterDict()
        for group in self._groups:
            first, count = group.tables[0], len(group.tables)
            if first.rank < embedding_dim and not first.padded:
                matrices = [nn.init.orthogonal_(torch.empty(first.rank, embedding_dim)) for _ in range(count)]
                self.decoders[group.key] = nn.Parameter(torch.stack(matrices))
                if first.centred:
                    self.means[group.key] = nn.Parameter(torch.zeros(count, embedding_dim))
        self._is_plain = all(table.rank == embedding_dim and table.pooling == "sum" for table in made)
        # The bitmaps of all tables in a row, and for each word how many ids of its table are marked before it.
        words = [table.num_words for table in made]
        self._first_word = {table.name: sum(words[:place]) for place, table in enumerate(made)}
        self.register_buffer("kept_bits", torch.zeros(sum(words), dtype=torch.int64) if any(words) else None)
        self.register_buffer("kept_before", torch.zeros(sum(words), dtype=torch.int32) if any(words) else None)
        for table in made:
            if table.kept == "some":
                self._mark(table, torch.arange(table.num_stored))

    def _make_groups(self) -> list[_Group]:
        members: dict[str, list[NarrowTable]] = {}
        for table in self.stored.values():
            has_mean = table.centred and table.rank < self.embedding_dim
            is_padded = table.padded and table.rank < self.embedding_dim
            key = f"rank_{table.rank}" + "_centred" * has_mean + "_padded" * is_padded
            members.setdefault(key, []).append(table)
        groups = []
        for key, tables in members.items():
            names = [name for table in tables for name in table.feature_names]
            owners = [place for place, table in enumerate(tables) for _ in table.feature_names]
            order = [self.names.index(name) for name in names]
            groups.append(_Group(key, tables, names, order, slice(None) if len(owners) == len(tables) else owners))
        return groups

    def _mark(self, table: NarrowTable, kept: Tensor) -> None:
        """Write a table's bitmap."""
        assert self.kept_bits is not None and self.kept_before is not None
        words = torch.zeros(64 * table.num_words, dtype=torch.int64).index_fill_(0, kept, 1).view(-1, 64)
        first = self._first_word[table.name]
        own = slice(first, first + table.num_words)
        self.kept_bits[own] = (words << torch.arange(64)).sum(1)
        self.kept_before[own] = words.sum(1).cumsum(0) - words.sum(1)

    def describe(self) -> dict[str, Any]:
        """What the constructor takes to make this again, without its weights: plain data.

        >>> table = NarrowTable("item", ("item",), rows=9, rank=4)
        >>> NarrowTables(**NarrowTables([table], embedding_dim=8).describe()).stored["item"] == table
        True
        """
        return {
            "tables": [dataclasses.asdict(table) for table in self.stored.values()],
            "embedding_dim": self.embedding_dim,
            "names": self.names,
            "is_weighted": self.is_weighted,
        }

    def decoder(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """U (R, D) and mu (D,) of a table, the model's own and not copies; None for what it does without."""
        group, place = self._place(name)
        decoders, means = self.decoders.get(group.key), self.means.get(group.key)
        return None if decoders is None else decoders[place], None if means is None else means[place]

    def _place(self, name: str) -> tuple[_Group, int]:
        """The group of a table, and where it is in there."""
        if name not in self.stored:
            raise ArgumentError(f"no table {name!r}, expected one of {list(self.stored)}")
        table = self.stored[name]
        group = next(group for group in self._groups if table in group.tables)
        return group, group.tables.index(table)

    @torch.no_grad()
    def fill(
        self,
        name: str,
        full: Tensor,
        *,
        kept: Tensor | None = None,
        mean: Tensor | None = None,
        decoder: Tensor | None = None,
    ) -> None:
        """Take a table's rows from one that has all of them, D wide: E = (full[kept] - mean) decoder^T.

        Before sharding. `kept`: the ids that get a row, ascending, if these are "some". `decoder`, where R < D, has
        orthonormal rows; `mean` goes with it where the table is centred.

        Shape: full (rows, D), kept (num_kept,), mean (D,), decoder (R, D).

        Raises:
            ValueError: there is no such table; one of these is lacking, has no use, or has another shape; `kept` lacks
                a reserved id, or does not ascend.
        """
        group, place = self._place(name)
        table, dim = self.stored[name], self.embedding_dim
        is_narrow = table.rank < dim and not table.padded
        check_filling(table, dim, is_narrow, full=full, kept=kept, mean=mean, decoder=decoder)
        if kept is None:
            kept = torch.arange(table.num_stored)
        else:
            reserved = torch.arange(NUM_RESERVED_IDS)
            if not torch.equal(kept[:NUM_RESERVED_IDS], reserved) or (kept.diff() <= 0).any() or kept[-1] >= table.rows:
                raise ArgumentError(
                    f"kept ids of table {name!r} must ascend from the reserved ids {reserved.tolist()} to "
                    f"{table.rows - 1} at most, got {kept[:4].tolist()} ... {kept[-2:].tolist()}"
                )
            self._mark(table, kept)
        rows = full[kept, : table.rank if table.padded else dim].double()
        if mean is not None:
            rows = rows - mean.double()
            self.means[group.key][place] = mean
        if decoder is not None:
            rows = rows @ decoder.double().T
            self.decoders[group.key][place] = decoder
        self.tables.embedding_bags[table_name(name)].weight.copy_(rows)

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        if (kjt.weights_or_none() is not None) != self.is_weighted:
            raise ArgumentError(
                f"the ids come {'without' if self.is_weighted else 'with'} weights, but NarrowTables was built with "
                f"is_weighted={self.is_weighted}: build it with the other"
            )
        keys = kjt.keys()
        rows = self._to_rows(kjt)
        pooled = self.tables(rows)
        if self._is_plain and list(pooled.keys()) == self.names:
            return pooled
        order = [keys.index(name) for name in self.names]
        length_FB = kjt.lengths().view(len(keys), -1)[order].float()
        # How often a bag's mean is added: once for each id, times its weight.
        count_FB = length_FB if rows.weights_or_none() is None else _sum_weights(rows)[order]
        fields: dict[str, Tensor] = pooled.to_dict()
        for group in self._groups:
            is_mean = [self._owner[name].pooling == "mean" for name in group.names]
            lacking = self.embedding_dim - group.tables[0].rank if group.key not in self.decoders else 0
            if group.key not in self.decoders and not lacking and not any(is_mean):
                continue  # as they are
            x_FBR = torch.stack([fields[name] for name in group.names])
            if group.key in self.means:  # one more column, with the count, and one more row of the decoder
                x_FBR = torch.cat([x_FBR, count_FB[group.order].unsqueeze(2)], dim=2)
            if any(is_mean):
                is_mean_F1 = torch.tensor(is_mean, device=x_FBR.device).unsqueeze(1)
                divisor_FB = torch.where(is_mean_F1, length_FB[group.order].clamp(min=1), 1.0)
                x_FBR = x_FBR / divisor_FB.unsqueeze(2)
            if group.key in self.decoders:
                x_FBR = torch.bmm(x_FBR, self._matrices(group)[group.owners])
            elif lacking:
                x_FBR = F.pad(x_FBR, (0, lacking))
            fields |= zip(group.names, x_FBR.unbind())
        values = torch.cat([fields[name] for name in self.names], dim=1)
        return KeyedTensor(keys=self.names, length_per_key=[self.embedding_dim] * len(self.names), values=values)

    def _matrices(self, group: _Group) -> Tensor:
        """The decoder of each table, with the mean as its last row if there is one."""
        decoders: Tensor = self.decoders[group.key]
        if group.key not in self.means:
            return decoders
        return torch.cat([decoders, self.means[group.key].unsqueeze(1)], dim=1)

    def _to_rows(self, kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """The same bags with the rows that the ids read, and weight 0 for those that read zero.

        An id beyond its vocabulary stays as it is, and so beyond the table, whose kernels refuse it.
        """
        if all(table.kept == "all" for table in self.stored.values()):
            return kjt
        keys, ids, lengths = kjt.keys(), kjt.values(), kjt.lengths()
        key_of_bag = torch.arange(len(keys), device=ids.device).repeat_interleave(kjt.stride())
        key_of_id = key_of_bag.repeat_interleave(lengths, output_size=ids.shape[0])
        rules = torch.tensor([self._rule(key) for key in keys], device=ids.device)
        num_ids, cutoff, dropped_to, first_word = rules.T[:, key_of_id].unbind()
        is_id = (ids >= 0) & (ids < num_ids)
        is_kept, rows = ids < cutoff, ids
        if self.kept_bits is not None and self.kept_before is not None:
            in_bitmap = is_id & (first_word >= 0)
            place = torch.where(in_bitmap, ids, 0)
            word, bit = first_word.clamp(min=0) + (place >> 6), place & 63
            bits = self.kept_bits[word]
            rank = self.kept_before[word] + count_bits(bits & ~(-1 << bit))
            rows = torch.where(in_bitmap, rank, ids)
            is_kept = is_kept & (~in_bitmap | (bits >> bit & 1).bool())
        rows = torch.where(is_kept | ~is_id, rows, dropped_to)
        weights = kjt.weights_or_none()
        if self._weighs:
            reads = ((rows != PADDING_ID) | (dropped_to != PADDING_ID)).float()
            weights = reads if weights is None else weights * reads
        return KeyedJaggedTensor(
            keys,
            rows,
            weights=weights,
            lengths=lengths,
            offsets=kjt.offsets(),
            stride=kjt.stride(),
            length_per_key=kjt.length_per_key_or_none(),
            offset_per_key=kjt.offset_per_key_or_none(),
        )

    def _rule(self, key: str) -> tuple[int, int, int, int]:
        """Of a key: its number of ids, from which one on they have no row, the row that those read instead, and the
        first word of its bitmap, or -1. Reserved ids are their own rows, since all are kept."""
        table, no_limit = self._owner.get(key), torch.iinfo(torch.int64).max
        if table is None or table.kept == "all":
            return no_limit, no_limit, OOV_ID, -1
        if table.kept == "first":
            return table.rows, table.num_stored, table.dropped_to, -1
        return table.rows, table.rows, table.dropped_to, self._first_word[table.name]


def count_bits(words: Tensor) -> Tensor:
    """How many bits of each 64-bit word are set.

    >>> count_bits(torch.tensor([0, 5, -1])).tolist()
    [0, 2, 64]
    """
    twos = words - (words >> 1 & 0x5555555555555555)
    fours = (twos & 0x3333333333333333) + (twos >> 2 & 0x3333333333333333)
    eights = (fours + (fours >> 4)) & 0x0F0F0F0F0F0F0F0F
    return eights * 0x0101010101010101 >> 56


def _sum_weights(kjt: KeyedJaggedTensor) -> Tensor:
    """The sum of the weights in each bag: (keys, B)."""
    weights = kjt.weights()
    every = torch.arange(weights.shape[0], device=weights.device)
    sums = F.embedding_bag(every, weights.unsqueeze(1), kjt.offsets(), mode="sum", include_last_offset=True)
    return sums.view(len(kjt.keys()), -1)
