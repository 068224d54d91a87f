"""Tables by frequency: frequent ids are stored wide, rare ones narrow or not at all.

How wide is for a search to say (`ctrlib.search.dnis`). The ids of all vocabularies share one table per block, so that
there are as many tables as widths, whatever the number of features. W. Cheng, Y. Shen and L. Huang, "Differentiable
Neural Input Search for Recommender Systems", 2020, https://arxiv.org/abs/2006.04466, search such blocks; that whole
columns of a block are kept or dropped, so that no index is stored for every number, is an addition.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.table import init_rows, regroup
from ctrlib.errors import ArgumentError
from ctrlib.schema import NUM_RESERVED_IDS, Pooling


@dataclass(frozen=True)
class BlockedVocabulary:
    """Which block each id of a vocabulary is in: plain data, which JSON can hold.

    `feature_names`: the features that share the ids, all pooled alike. `ends`: of each block, the id before which it
    ends; the last one is the number of ids. Where ids are in order of frequency, so are blocks; a block may hold none
    of this vocabulary. The reserved ids are in the first block.

    Raises:
        ValueError: `ends` descend, or split the reserved ids; there is no feature, or no such pooling.

    >>> BlockedVocabulary("item", ("item",), ends=(5, 5, 9)).sizes
    [5, 0, 4]
    """

    name: str
    feature_names: tuple[str, ...]
    ends: tuple[int, ...]
    pooling: Pooling = "sum"

    def __post_init__(self) -> None:
        object.__setattr__(self, "feature_names", tuple(self.feature_names))
        object.__setattr__(self, "ends", tuple(self.ends))
        if not self.feature_names or self.pooling not in get_args(Pooling):
            raise ArgumentError(
                f"vocabulary {self.name!r} has features {self.feature_names} and pooling={self.pooling!r}: expected "
                f"one feature or more, and one of {get_args(Pooling)}"
            )
        if not self.ends or self.ends[0] < NUM_RESERVED_IDS or min(self.sizes) < 0:
            raise ArgumentError(
                f"vocabulary {self.name!r}: ends={self.ends}, expected them to ascend from {NUM_RESERVED_IDS} (the "
                "reserved ids) or more to the number of ids"
            )

    @property
    def sizes(self) -> list[int]:
        """How many ids each block has."""
        return [end - start for start, end in itertools.pairwise((0, *self.ends))]


class BlockTables(nn.Module):
    """e_f = sum_j S_b E_b[x_fj] over the bag x_f, or its mean: b the block of an id, S_b what puts the r_b stored
    numbers of a row into b's columns of D, and 0 into the others.

    A look-up for `TableEmbedding(..., tables=BlockTables(...))`, and a drop-in for its tables. `columns`: those that
    each block stores; a block without any has no table, and its ids read the zero vector. Tables are TorchRec's, which
    any plan can shard (fbgemm's fused kernels want numbers of columns that are multiples of 4). `fill` takes rows from
    a full table; until then they are N(0, init_std^2), padding 0. `names`: the order of the keys.

    Shape: KeyedJaggedTensor -> KeyedTensor, a key for each of `names`, D wide.

    Raises:
        ValueError: names, features or numbers of blocks do not agree, no column is stored, or columns are not distinct
            ones of D in ascending order.

    >>> lookup = BlockTables([BlockedVocabulary("item", ("item",), ends=(4, 6))], columns=[[0, 2], []], embedding_dim=3)
    >>> lookup.fill("item", torch.arange(1.0, 19).view(6, 3))
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["item"], torch.tensor([3, 4]), torch.tensor([1, 1]))
    >>> lookup(kjt)["item"].tolist()
    [[10.0, 0.0, 12.0], [0.0, 0.0, 0.0]]
    """

    ends: Tensor
    shifts: Tensor

    def __init__(
        self,
        vocabularies: Sequence[BlockedVocabulary | Mapping[str, Any]],
        *,
        columns: Sequence[Sequence[int]],
        embedding_dim: int = 16,
        names: Sequence[str] | None = None,
        init_std: float = 1e-4,
    ) -> None:
        super().__init__()
        made = [v if isinstance(v, BlockedVocabulary) else BlockedVocabulary(**v) for v in vocabularies]
        self.vocabularies = {vocabulary.name: vocabulary for vocabulary in made}
        held = [name for vocabulary in made for name in vocabulary.feature_names]
        if not made or len(self.vocabularies) < len(made) or len(set(held)) < len(held):
            raise ArgumentError(
                "expected one or more vocabularies, of different names and features, got "
                f"{[(vocabulary.name, vocabulary.feature_names) for vocabulary in made]}"
            )
        self.names = held if names is None else list(names)
        if sorted(self.names) != sorted(held):
            raise ArgumentError(f"names={self.names}, but the vocabularies are those of {sorted(held)}")
        self.columns = [list(block) for block in columns]
        if any(len(vocabulary.ends) != len(self.columns) for vocabulary in made):
            raise ArgumentError(
                f"columns are of {len(self.columns)} blocks, but the vocabularies have "
                f"{ {vocabulary.name: len(vocabulary.ends) for vocabulary in made} }: give each an end for every block"
            )
        if not any(self.columns) or any(block != sorted({*block} & {*range(embedding_dim)}) for block in self.columns):
            raise ArgumentError(
                f"columns={self.columns}, expected ascending ones of 0 to {embedding_dim - 1} for each block, and some"
            )
        self.embedding_dim = embedding_dim
        sizes = torch.tensor([vocabulary.sizes for vocabulary in made])  # (V, blocks)
        self.register_buffer("ends", torch.tensor([vocabulary.ends for vocabulary in made]), persistent=False)
        first_rows, first_ids = sizes.cumsum(0) - sizes, sizes.cumsum(1) - sizes
        self.register_buffer("shifts", first_rows - first_ids, persistent=False)
        # Python's numbers, since a model may be built on the meta device, for its shapes alone.
        num_rows = [sum(vocabulary.sizes[block] for vocabulary in made) for block in range(len(self.columns))]
        padding = [sum(vocabulary.sizes[0] for vocabulary in made[:place]) for place in range(len(made))]
        self.blocks = [block for block, kept in enumerate(self.columns) if kept and num_rows[block]]
        if not self.blocks:
            raise ArgumentError(
                f"columns={self.columns} are of blocks without ids, expected some of a block that has one"
            )
        for block in self.blocks:
            self.register_buffer(f"columns_{block}", torch.tensor(self.columns[block]), persistent=False)
        self.tables: Any = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"block_{block}",
                    num_embeddings=num_rows[block],
                    embedding_dim=len(self.columns[block]),
                    feature_names=[f"{name}#{block}" for name in self.names],
                    pooling=PoolingType.SUM,  # a bag may be spread over blocks: means are taken of their sum
                    init_fn=functools.partial(init_rows, std=init_std, copies=1, padding=[] if block else padding),
                )
                for block in self.blocks
            ]
        )
        self._owners = {name: place for place, vocabulary in enumerate(made) for name in vocabulary.feature_names}
        is_mean = [made[self._owners[name]].pooling == "mean" for name in self.names]
        self._means = [place for place, mean in enumerate(is_mean) if mean]

    def describe(self) -> dict[str, Any]:
        """What the constructor takes to make this again, without its weights: plain data.

        >>> lookup = BlockTables([BlockedVocabulary("a", ("a",), ends=(4, 6))], columns=[[0], []], embedding_dim=2)
        >>> BlockTables(**lookup.describe()).vocabularies == lookup.vocabularies
        True
        """
        return {
            "vocabularies": [dataclasses.asdict(vocabulary) for vocabulary in self.vocabularies.values()],
            "columns": self.columns,
            "embedding_dim": self.embedding_dim,
            "names": self.names,
        }

    @torch.no_grad()
    def fill(self, name: str, full: Tensor) -> None:
        """Take a vocabulary's rows from a table that has all of them, D wide. Before sharding.

        Shape: full (rows, D).

        Raises:
            ValueError: there is no such vocabulary, or its table has another shape.
        """
        if name not in self.vocabularies:
            raise ArgumentError(f"no vocabulary {name!r}, expected one of {list(self.vocabularies)}")
        ends = self.vocabularies[name].ends
        if full.shape != (ends[-1], self.embedding_dim):
            raise ArgumentError(f"full has shape {tuple(full.shape)}, expected {(ends[-1], self.embedding_dim)}")
        shifts = self.shifts[list(self.vocabularies).index(name)].tolist()
        for block in self.blocks:
            start, end = (0, *ends)[block], ends[block]
            rows = self.tables.embedding_bags[f"block_{block}"].weight[start + shifts[block] : end + shifts[block]]
            rows.copy_(full[start:end, self.columns[block]])

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        if kjt.keys() != self.names:
            kjt = kjt.permute([kjt.keys().index(name) for name in self.names])
        ids, stride = kjt.values(), kjt.stride()
        lengths_FB = kjt.lengths().view(len(self.names), stride)
        owners = torch.tensor([self._owners[name] for name in self.names], device=ids.device)
        owner = owners.repeat_interleave(lengths_FB.sum(1), output_size=ids.shape[0])
        block = (ids.unsqueeze(1) >= self.ends[owner]).sum(1)
        # An id beyond its vocabulary is beyond all blocks. It goes, as it is, to the end of the last table, whose
        # kernel refuses it.
        is_beyond = block == len(self.columns)
        block = torch.where(is_beyond, self.blocks[-1], block)
        last = sum(vocabulary.sizes[self.blocks[-1]] for vocabulary in self.vocabularies.values())
        row = torch.where(is_beyond, ids + last, ids + self.shifts[owner, block])
        pooled = self._look_up(row, block, kjt.offsets(), stride)
        out = pooled[0].new_zeros(lengths_FB.numel(), self.embedding_dim)
        for number, x in zip(self.blocks, pooled):
            out = out.index_add(1, self.get_buffer(f"columns_{number}"), x)
        out_FBD = out.view(len(self.names), stride, self.embedding_dim)
        if self._means:
            divisor_FB = torch.ones_like(lengths_FB)
            divisor_FB[self._means] = lengths_FB[self._means].clamp(min=1)
            out_FBD = out_FBD / divisor_FB.unsqueeze(2)
        values = out_FBD.transpose(0, 1).flatten(1)
        return KeyedTensor(self.names, [self.embedding_dim] * len(self.names), values)

    def _look_up(self, row: Tensor, block: Tensor, offsets: Tensor, stride: int) -> list[Tensor]:
        """What each table gives for all bags, field by field: (F * B, its columns)."""
        parts = [block == number for number in self.blocks]
        # How many of a block's ids come before each bag: the bags' offsets among them.
        ends = [torch.cat([part.new_zeros(1, dtype=torch.int64), part.cumsum(0)])[offsets] for part in parts]
        rows = [row[part] for part in parts]
        if isinstance(self.tables, EmbeddingBagCollection):
            # TorchRec would look up key by key, each with a gradient as large as the table.
            bags = self.tables.embedding_bags.values()
            return [bag(chosen, end) for bag, chosen, end in zip(bags, rows, ends)]
        keys = [f"{name}#{number}" for number in self.blocks for name in self.names]
        lengths = torch.cat([end.diff() for end in ends])
        pooled = self.tables(KeyedJaggedTensor(keys, torch.cat(rows), lengths=lengths, stride=stride))
        values = regroup(pooled, keys)
        widths = [len(self.columns[number]) for number in self.blocks for _ in self.names]
        fields = torch.split(values, widths, dim=1)
        count = len(self.names)
        return [torch.cat(fields[first : first + count]) for first in range(0, len(fields), count)]
