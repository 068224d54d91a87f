"""What quotient-remainder, hash embedding, MEmCom and mixed dimension share: ids become rows, and rows vectors.

Each of them works out which rows of which small tables an id reads, and combines those into its vector. Where the
combination is not linear (a product, a weighted sum) it comes before a bag is pooled, so rows are looked up id by id.

The ids of all features go to a table under one key, feature after feature: fbgemm's CPU kernels are fastest with one
table (see `TableEmbedding`), and autograd makes a gradient as large as the table for every key. Forward and backward of
26 x 4,096 ids into 200,000 rows of 16 took 33 ms under one key, under 26 keys 113 ms, from 26 tables 78 ms. Ids one by
one are an `EmbeddingBagCollection` with bags of one: the kernels behind TorchRec's `EmbeddingCollection` took ten times
as long in the backward pass, 334 ms in place of 31 for 213,000 ids.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.hashing import repeat_bags, rows_of, seed_of
from ctrlib.embeddings.sequence import sum_events
from ctrlib.embeddings.table import by_vocabulary, num_rows
from ctrlib.errors import ArgumentError
from ctrlib.schema import Categorical, Feature, Numeric, RawId, vocabulary_of


class FeatureIds:
    """Reads the ids of a batch as numbers from 0 on, in every vocabulary as many as `num_ids` says.

    The ids of a vocabulary are such numbers. Those of the vocabularies in `hash_sizes` are hashed to so many numbers,
    and ids that fall together are one from then on. A `RawId` needs this; all of its 64 bits count.

    Raises:
        ValueError: there is no sparse feature, one has not been fitted, or `hash_sizes` lacks a `RawId`, names an
            unknown vocabulary or is not in 1 ... 2^31 - 1.

    >>> ids = FeatureIds([RawId("user"), Categorical("item", num_embeddings=5)], hash_sizes={"user": 100})
    >>> ids.names, ids.num_ids
    (['user', 'item'], {'item': 5, 'user': 100})
    """

    def __init__(self, features: Sequence[Feature], *, hash_sizes: Mapping[str, int] | None = None) -> None:
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        if not sparse:
            raise ArgumentError(f"expected one or more features with ids, got {[feature.name for feature in features]}")
        sizes = dict(hash_sizes or {})
        self.names = [feature.name for feature in sparse]
        self.vocabularies = [vocabulary_of(feature) for feature in sparse]
        if not sizes.keys() <= set(self.vocabularies) or not all(1 <= size < 2**31 for size in sizes.values()):
            raise ArgumentError(
                f"hash_sizes={sizes}: expected numbers in 1 ... 2^31 - 1, for some of the vocabularies "
                f"{list(dict.fromkeys(self.vocabularies))}"
            )
        raw = [feature.name for feature in sparse if isinstance(feature, RawId) and feature.name not in sizes]
        if raw:
            raise ArgumentError(
                f"features {raw} have raw ids, and no vocabulary that says how many: add to hash_sizes to how many "
                f"numbers they are to be hashed, such as hash_sizes={dict.fromkeys(raw, 1_000_000)}"
            )
        rows = {vocabulary_of(m[0]): sizes.get(vocabulary_of(m[0])) or num_rows(m) for m in by_vocabulary(sparse)}
        self.num_ids = {vocabulary: rows[vocabulary] for vocabulary in sorted(rows)}
        self.seeds = {vocabulary: seed_of("ctrlib/ids/v1", vocabulary, 0) for vocabulary in sizes}
        self.means = [not isinstance(feature, Categorical | RawId) and feature.pooling == "mean" for feature in sparse]
        self.single = all(isinstance(feature, Categorical | RawId) for feature in sparse)

    def layout(self, **numbers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """For `keep_layout`, for each vocabulary: what decides the numbers of its ids, and its share of `numbers`."""
        return {
            f"vocabulary {name!r}": {
                "ids": size,
                "seed": self.seeds.get(name),
                **{key: of_names[name] for key, of_names in numbers.items()},
            }
            for name, size in self.num_ids.items()
        }

    def read(self, sparse: KeyedJaggedTensor) -> IdBags:
        """The ids of a batch.

        Raises:
            ValueError: a feature is missing, or single ids are not one in every row.
        """
        bags = repeat_bags(sparse, self.names, self.names)
        values, counts = bags.values(), bags.length_per_key()
        for part, vocabulary in zip(values.split(counts), self.vocabularies):
            if vocabulary in self.seeds:
                part.copy_(rows_of(part, self.seeds[vocabulary], self.num_ids[vocabulary]))
        if self.single:
            expected = len(self.names) * bags.stride()
            if torch.compiler.is_compiling():
                torch._check(values.shape[0] == expected)  # type: ignore[no-untyped-call]
            elif values.shape[0] != expected:
                raise ArgumentError(
                    f"features {self.names} have {values.shape[0]} ids in {bags.stride()} rows, expected one in each: "
                    "make those that have bags MultiValued or Sequence"
                )
        return IdBags(self, values, bags.lengths(), counts, bags.stride())


@dataclass(frozen=True)
class IdBags:
    """The ids of F features in B rows, feature after feature.

    Shape:
        values: (N,) int64, numbers as `FeatureIds` gives them.
        lengths: (F * B,), how many of them belong to each row; `counts`: to each feature.
    """

    ids: FeatureIds
    values: Tensor
    lengths: Tensor
    counts: list[int]
    size: int

    def spread(self, numbers: Mapping[str, int]) -> Tensor:
        """Vocabulary -> number becomes (N,): for each id, its vocabulary's."""
        per_feature = torch.tensor([numbers[name] for name in self.ids.vocabularies], device=self.values.device)
        if self.ids.single:
            return per_feature.repeat_interleave(self.size, output_size=self.values.shape[0])
        counts = self.lengths.view(-1, self.size).sum(1)
        return per_feature.repeat_interleave(counts, output_size=self.values.shape[0])

    def rows_by_id(self, tables: Any, rows: Mapping[str, Tensor]) -> list[Tensor]:
        """What every id reads under each key: `rows` (N,) each -> (N, width of the table) each."""
        if self.ids.single:
            return _look_up(tables, rows, self.lengths)
        num_ids = self.values.shape[0]
        lengths = F.pad(torch.ones_like(self.values), (0, _num_bags(tables, self.values) - num_ids))
        return [found[:num_ids] for found in _look_up(tables, rows, lengths)]

    def rows_by_bag(self, tables: Any, rows: Mapping[str, Tensor]) -> list[Tensor]:
        """The sum of what a bag reads under each key: `rows` (N,) each -> (F * B, width of the table) each."""
        return _look_up(tables, rows, self.lengths)

    def pool(self, vectors_ND: Tensor) -> KeyedTensor:
        """A vector for each id, pooled as the features say: (N, D) -> (B, D) for each feature."""
        if self.ids.single:
            return self.keyed(vectors_ND)
        return self.keyed(sum_events(vectors_ND, F.pad(self.lengths.cumsum(0), (1, 0))))

    def keyed(self, sums: Tensor) -> KeyedTensor:
        """Sums over bags, made means where the feature says so: (F * B, D) -> (B, D) for each feature."""
        names, dim = self.ids.names, sums.shape[1]
        fields_FBD = sums.view(len(names), self.size, dim)
        if any(self.ids.means):
            means = torch.tensor(self.ids.means, device=sums.device).unsqueeze(1)
            counts = self.lengths.view(len(names), self.size).clamp(min=1)
            fields_FBD = fields_FBD / torch.where(means, counts, 1).unsqueeze(2)
        return KeyedTensor(names, [dim] * len(names), fields_FBD.transpose(0, 1).flatten(1))


def _look_up(tables: Any, rows: Mapping[str, Tensor], lengths: Tensor) -> list[Tensor]:
    """Bags of these lengths under every key: (bags, width of the table) each."""
    bags = KeyedJaggedTensor(
        list(rows),
        torch.cat(list(rows.values())),
        lengths=lengths.repeat(len(rows)),
        stride=lengths.shape[0],
        length_per_key=[of_key.shape[0] for of_key in rows.values()],
    )
    found = tables(bags).to_dict()
    return [found[key] for key in rows]


def _num_bags(tables: Any, ids: Tensor) -> int:
    """How many bags to look up ids one by one: TorchRec wants one or more, and by gloo as many in every process."""
    if not isinstance(tables, ShardedModule) or dist.get_world_size() == 1:
        return torch.sym_max(ids.shape[0], 1)  # type: ignore[no-any-return, no-untyped-call]
    most = torch.tensor(max(ids.shape[0], 1), device=ids.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def first_rows(sizes: Mapping[str, int]) -> dict[str, int]:
    """Where each vocabulary begins in a table that holds them one below the other.

    >>> first_rows({"a": 3, "b": 4, "c": 1})
    {'a': 0, 'b': 3, 'c': 7}
    """
    return dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0)))


@dataclass(frozen=True)
class Residues:
    """Id x of vocabulary v reads row first_v + (x + start_v) mod m_v.

    Where all vocabularies share M rows, first_v = 0, m_v = M and start_v comes from the vocabulary's name; where each
    has rows of its own, start_v = 0. Since the ids of a vocabulary are sorted by frequency, the most frequent m_v of
    them never meet each other, which hash functions do not see to. (Where ids were kept from earlier data, that is true
    of the values that were the most frequent ones then.)

    >>> Residues.of({"item": 10, "user": 5}, ["item", "user"])
    Residues(rows={'item': 10, 'user': 5}, starts={'item': 0, 'user': 0}, firsts={'item': 0, 'user': 10}, total=15)
    >>> Residues.of(10, ["item", "user"]).starts
    {'item': 3, 'user': 4}
    """

    rows: dict[str, int]
    starts: dict[str, int]
    firsts: dict[str, int]
    total: int

    @property
    def layout(self) -> dict[str, dict[str, int]]:
        """For `FeatureIds.layout`."""
        return {"rows": self.rows, "start": self.starts, "first": self.firsts}

    @classmethod
    def of(cls, num_embeddings: int | Mapping[str, int], vocabularies: Sequence[str]) -> Residues:
        """Rows shared by all `vocabularies`, or rows for each."""
        if isinstance(num_embeddings, int):
            starts = {name: seed_of("ctrlib/residues/v1", name, 0) % num_embeddings for name in vocabularies}
            shared = dict.fromkeys(vocabularies, num_embeddings)
            return cls(shared, starts, dict.fromkeys(vocabularies, 0), num_embeddings)
        rows = {name: num_embeddings[name] for name in vocabularies}
        return cls(rows, dict.fromkeys(rows, 0), first_rows(rows), sum(rows.values()))

    def read(self, bags: IdBags) -> Tensor:
        """The row of every id: (N,)."""
        rows = (bags.values + bags.spread(self.starts)) % bags.spread(self.rows)
        return rows + bags.spread(self.firsts)


def check_num_embeddings(num_embeddings: int | Mapping[str, int], vocabularies: Sequence[str]) -> None:
    """Raise ValueError unless there is a row or more, for all vocabularies together or for each of them."""
    if isinstance(num_embeddings, int):
        fits = num_embeddings >= 1
    else:
        fits = set(num_embeddings) == set(vocabularies) and min(num_embeddings.values()) >= 1
    if not fits:
        raise ArgumentError(
            f"num_embeddings={num_embeddings}: expected 1 row or more for all vocabularies together, or a mapping that "
            f"gives 1 or more to each of {list(vocabularies)} and to nothing else"
        )


@dataclass(frozen=True)
class NumbersPerId:
    """A few numbers for each of `num_ids` ids, in a table without waste.

    fbgemm's kernels want rows of 4, 8, 12 ... numbers, so that the ids of one row are 4 / gcd(width, 4), neighbours
    in frequency: one number for each of a million ids is 250,000 rows of 4, in every engine. Row-wise Adagrad keeps one
    sum for such a row.

    >>> numbers = NumbersPerId(num_ids=10, width=2)
    >>> numbers.rows, numbers.columns
    (5, 4)
    >>> table, ids = torch.arange(20.0).view(5, 4), torch.tensor([0, 3, 9])
    >>> numbers.pick(table[numbers.read(ids)], ids).tolist()
    [[0.0, 1.0], [6.0, 7.0], [18.0, 19.0]]
    """

    num_ids: int
    width: int

    @property
    def ids_per_row(self) -> int:
        """How many ids share a row."""
        return 4 // math.gcd(self.width, 4)

    @property
    def columns(self) -> int:
        """Width of the table."""
        return self.width * self.ids_per_row

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return -(-self.num_ids // self.ids_per_row)

    def read(self, ids: Tensor) -> Tensor:
        """The row of every id: (N,)."""
        return ids // self.ids_per_row

    def pick(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The id's share of its row: (N, columns) -> (N, width)."""
        first = (ids % self.ids_per_row * self.width).unsqueeze(1)
        return rows.gather(1, first + torch.arange(self.width, device=ids.device))


def make_config(name: str, rows: int, columns: int, keys: Sequence[str], init: float) -> EmbeddingBagConfig:
    """A table whose rows are summed, and start as U(-init, init)."""
    init_fn = functools.partial(nn.init.uniform_, a=-init, b=init) if init else nn.init.zeros_
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=columns,
        feature_names=list(keys),
        pooling=PoolingType.SUM,
        init_fn=init_fn,
    )


def keep_layout(module: Any, layout: Mapping[str, Any]) -> str:
    """Put what decides which numbers an id reads into the module's state, and refuse states where it is another.

    It is a buffer of the bytes of JSON. Returns a digest, for the module's printout: runs are told apart by it.

    >>> module, other = nn.Module(), nn.Module()
    >>> keep_layout(module, {"combine": "product", "rows": [9, 3]})
    '5074f057'
    >>> _ = keep_layout(other, {"combine": "product", "rows": [9, 4]})
    >>> module.load_state_dict(other.state_dict())
    Traceback (most recent call last):
    ctrlib.errors.ArgumentError: the state is of tables that are laid out in another way: rows is [9, 4], ...
    """
    text = json.dumps(layout, sort_keys=True).encode()
    module.layout_bytes = text
    module.register_buffer("layout", torch.tensor(list(text), dtype=torch.uint8))
    module.register_load_state_dict_pre_hook(_refuse_another_layout)
    return hashlib.blake2b(text, digest_size=4).hexdigest()


def _refuse_another_layout(module: Any, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    if prefix + "layout" not in state:  # no state of such tables, as load_state_dict will say
        return
    ours, theirs = json.loads(module.layout_bytes), json.loads(bytes(state[prefix + "layout"].tolist()))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        differences = "; ".join(f"{name} is {theirs.get(name)}, expected {ours.get(name)}" for name in names)
        raise ArgumentError(
            f"the state is of tables that are laid out in another way: {differences}. Build the model with the "
            "features and arguments that it was trained with"
        )
