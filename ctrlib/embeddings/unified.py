"""One small table for all features: unified embeddings, the hashing trick, and block hashing, by the arguments.

* Unified Embedding, or feature multiplexing: B. Coleman et al., "Unified Embedding: Battle-Tested Feature
  Representations for Web-Scale ML Systems", NeurIPS 2023, https://arxiv.org/abs/2305.12102.
* The hashing trick, a share of the rows for each vocabulary: K. Weinberger et al., "Feature Hashing for Large Scale
  Multitask Learning", ICML 2009, https://arxiv.org/abs/0902.2206.
* ROBE-Z, blocks of Z numbers at hashed places of one array: A. Desai, L. Chou & A. Shrivastava, "Random Offset Block
  Embedding (ROBE) for compressed embedding tables in deep learning recommendation systems", MLSys 2022,
  https://arxiv.org/abs/2108.02191.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.hashing import Lookup, hash_bags, seed_of
from ctrlib.embeddings.table import by_vocabulary, make_tables, num_rows, regroup
from ctrlib.errors import ArgumentError
from ctrlib.schema import Categorical, Feature, Numeric, vocabulary_of

SPACE = "ctrlib/ue/v1"  # another way to hash would be another version

__all__ = ["UnifiedTables", "proportional_rows"]


class UnifiedTables(nn.Module):
    """e_f = [E[h_f1(x_f)], ..., E[h_fc(x_f)]]: c rows of one table E for every id, each by a hash function of its own.

    E has `num_embeddings` rows of `width` numbers, and that is all, however many ids and features there are: M * w
    weights. A feature makes c = embedding_dim / width look-ups, or fewer if `lookups`, feature -> number, says so; its
    field is then filled up with zeros. Two ids may share a row, but hardly all of several rows; where ids of two
    features share one, the network learns to tell them apart.

    `num_embeddings`: a number of rows, which all features share (multiplexing), or vocabulary -> rows of its own (the
    hashing trick; see `proportional_rows`), which at the same size does much worse.

    `block=n`: n look-ups in a row start from one hash and read neighbouring rows, the first after the last: ROBE-Z with
    Z = n * width, but for blocks that start at multiples of `width` (in the paper anywhere, as with width=1).

    `collisionless`: vocabularies of few values that keep a row for each, `embedding_dim` wide, in tables of their own.

    Seeds come from the names of vocabularies, so a history and its item read the same rows, and other features may come
    and go. Ids are hashed as they are in the batch: those of `ctrlib.RawId` mean the same in all data, others in the
    data of one preparation. Bags are pooled as the feature says; an empty one gives the zero vector. Rows start as
    U(-init, init), on which the paper's results depend. The fused engine needs widths that are multiples of 4.

    Shape: KeyedJaggedTensor -> KeyedTensor, (B, embedding_dim) for each of `names`.

    Raises:
        ValueError: an argument does not fit; when called: the batch lacks a feature; when a state is loaded: it has
            another number of rows, width, or set of look-ups.

    >>> from ctrlib.schema import Sequence as History
    >>> features = [Categorical("item", num_embeddings=10**6), History("history", vocabulary="item")]
    >>> tables = UnifiedTables(features, num_embeddings=1000, embedding_dim=8, width=4)
    >>> sum(parameter.numel() for parameter in tables.parameters())
    4000
    >>> ids, lengths = torch.tensor([5, 10**12, 5, 7, 8, 8]), torch.tensor([1, 1, 1, 3])
    >>> pooled = tables(KeyedJaggedTensor.from_lengths_sync(["item", "history"], ids, lengths))
    >>> pooled["history"].shape, torch.equal(pooled["item"][0], pooled["history"][0])
    (torch.Size([2, 8]), True)
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        num_embeddings: int | Mapping[str, int],
        embedding_dim: int = 16,
        width: int | None = None,
        lookups: Mapping[str, int] | None = None,
        block: int = 1,
        collisionless: Sequence[str] = (),
        init: float = 0.05,
        suffix: str = "",
    ) -> None:
        super().__init__()
        width = embedding_dim if width is None else width
        if embedding_dim < 1 or width < 1 or embedding_dim % width or block < 1 or init <= 0:
            raise ArgumentError(
                "expected an embedding_dim that is a multiple of width, a block of 1 or more and init above 0, got "
                f"embedding_dim={embedding_dim}, width={width}, block={block} and init={init}"
            )
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        vocabularies = list(dict.fromkeys(map(vocabulary_of, sparse)))
        if not set(collisionless) < set(vocabularies):
            raise ArgumentError(
                f"collisionless={list(collisionless)}: expected some, but not all, of the vocabularies {vocabularies}"
            )
        hashed = [feature for feature in sparse if vocabulary_of(feature) not in collisionless]
        counts = {feature.name: embedding_dim // width for feature in hashed}
        for name, count in (lookups or {}).items():
            if name not in counts or not 1 <= count <= embedding_dim // width:
                raise ArgumentError(
                    f"lookups={lookups}: expected 1 to embedding_dim / width = {embedding_dim // width} look-ups for "
                    f"some of {list(counts)}"
                )
            counts[name] = count
        segments = _segments(num_embeddings, [name for name in vocabularies if name not in collisionless])
        self.names = [feature.name for feature in sparse]
        self.embedding_dim, self.width = embedding_dim, width
        self.num_embeddings = sum(rows for rows, _ in set(segments.values()))
        self.lookups = []
        for feature in hashed:
            vocabulary = vocabulary_of(feature)
            for chunk in range(counts[feature.name]):
                rows, first_row = segments[vocabulary]
                seed = seed_of(SPACE, vocabulary, chunk // block)
                key = f"{feature.name}#{chunk}"
                self.lookups.append(Lookup(feature.name, key, seed, rows, first_row, step=chunk % block))
        self.widths = {name: count * width for name, count in counts.items()}
        self.means = {f.name for f in hashed if not isinstance(f, Categorical) and f.pooling == "mean"}
        config = EmbeddingBagConfig(
            name="unified" + suffix,
            num_embeddings=self.num_embeddings,
            embedding_dim=width,
            feature_names=[lookup.key for lookup in self.lookups],
            # Means are taken afterwards: a table has one way of pooling, and its features may have two.
            pooling=PoolingType.SUM,
            init_fn=functools.partial(nn.init.uniform_, a=-init, b=init),
        )
        self.tables: Any = EmbeddingBagCollection(tables=[config])
        own = [feature for feature in sparse if feature.name not in counts]
        self.collisionless = [feature.name for feature in own]
        # Of the same variance as U(-init, init).
        self.own = make_tables(own, embedding_dim=embedding_dim, init_std=init / math.sqrt(3), suffix="_own" + suffix)
        self.register_buffer("hashing", torch.tensor(self._hashing()))
        self.register_load_state_dict_pre_hook(_refuse_other_hashing)  # type: ignore[no-untyped-call]

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor of ids -> KeyedTensor, (B, embedding_dim) for each of `names`."""
        pooled = self._look_up(hash_bags(sparse, self.lookups))
        if self.means or self.own is not None or min(self.widths.values()) < self.embedding_dim:
            lengths = dict(zip(sparse.keys(), sparse.lengths().view(len(sparse.keys()), sparse.stride())))
            fields = dict(zip(self.widths, torch.split(pooled, list(self.widths.values()), dim=1)))
            fields |= {name: fields[name] / lengths[name].clamp(min=1)[:, None] for name in self.means}
            if self.own is not None:
                fields |= self.own(sparse).to_dict()
            missing = {name: self.embedding_dim - fields[name].shape[1] for name in self.names}
            pooled = torch.cat([nn.functional.pad(fields[name], (0, missing[name])) for name in self.names], dim=1)
        return KeyedTensor(self.names, [self.embedding_dim] * len(self.names), pooled)

    def _look_up(self, rows: KeyedJaggedTensor) -> Tensor:
        """The pooled rows of all look-ups, side by side."""
        keys = [lookup.key for lookup in self.lookups]
        if not isinstance(self.tables, EmbeddingBagCollection):  # sharded, quantised
            return regroup(self.tables(rows), keys)
        # TorchRec would look up key by key, each with a gradient as large as the table: with 26, twice the time.
        (bag,) = self.tables.embedding_bags.values()
        pooled: Tensor = bag(rows.values(), rows.offsets())
        return pooled.view(len(keys), rows.stride(), self.width).transpose(0, 1).flatten(1)

    def extra_repr(self) -> str:
        """The table, and a digest of what decides its rows: runs tell each other apart by what is printed."""
        digest = hashlib.blake2b(repr(self._hashing()).encode(), digest_size=4).hexdigest()
        return (
            f"num_embeddings={self.num_embeddings}, width={self.width}, {len(self.lookups)} look-ups, hashing={digest}"
        )

    def _hashing(self) -> list[list[int]]:
        """All that decides which numbers an id reads: the table's shape, then seed, step and rows of each look-up."""
        lookups = {(look.seed, look.step, look.num_embeddings, look.first_row) for look in self.lookups}
        return [[self.num_embeddings, self.width, 0, 0], *map(list, sorted(lookups))]


def proportional_rows(
    features: Sequence[Feature], num_embeddings: int, *, collisionless: Sequence[str] = ()
) -> dict[str, int]:
    """Vocabulary -> its share of `num_embeddings` rows, in proportion to the number of its ids, one row at least.

    What rounding leaves over goes to the largest. `collisionless` vocabularies get none of these rows.

    Raises:
        ValueError: a feature has not been fitted or has raw ids, or there are fewer rows than vocabularies.

    >>> features = [Categorical("item", num_embeddings=900), Categorical("gender", num_embeddings=5)]
    >>> proportional_rows(features, 100)
    {'item': 99, 'gender': 1}
    """
    sparse = [feature for feature in features if not isinstance(feature, Numeric)]
    hashed = [feature for feature in sparse if vocabulary_of(feature) not in collisionless]
    sizes = {vocabulary_of(members[0]): num_rows(members) for members in by_vocabulary(hashed)}
    spare = num_embeddings - len(sizes)
    if not sizes or spare < 0:
        raise ArgumentError(f"num_embeddings={num_embeddings}: expected a row or more for each of {list(sizes)}")
    rows = {name: 1 + spare * size // sum(sizes.values()) for name, size in sizes.items()}
    rows[max(sizes, key=sizes.__getitem__)] += num_embeddings - sum(rows.values())
    return rows


def _segments(num_embeddings: int | Mapping[str, int], vocabularies: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Vocabulary -> the number of rows that it may read, and the first of them."""
    if not isinstance(num_embeddings, Mapping):
        if num_embeddings < 1:
            raise ArgumentError(f"num_embeddings={num_embeddings}: expected 1 row or more")
        return dict.fromkeys(vocabularies, (num_embeddings, 0))
    if set(num_embeddings) != set(vocabularies) or min(num_embeddings.values()) < 1:
        raise ArgumentError(
            f"num_embeddings={dict(num_embeddings)}: expected 1 row or more for each of the hashed vocabularies, "
            f"{vocabularies}, and for nothing else"
        )
    names = sorted(vocabularies)  # rows must not depend on the order of the features
    ends = itertools.accumulate(num_embeddings[name] for name in names)
    return {name: (num_embeddings[name], end - num_embeddings[name]) for name, end in zip(names, ends)}


def _refuse_other_hashing(module: UnifiedTables, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Called before a state is loaded: a table is worth nothing to those who read other rows of it."""
    if prefix + "hashing" not in state:  # no state of such tables, as load_state_dict will say
        return
    (num_embeddings, width, *_), *lookups = state[prefix + "hashing"].tolist()
    theirs = {(seed, step): rows for seed, step, *rows in lookups}
    ours = {(look.seed, look.step) for look in module.lookups}
    lacking = [look.key for look in module.lookups if (look.seed, look.step) not in theirs]
    moved = [
        look.key
        for look in module.lookups
        if look.key not in lacking and theirs[look.seed, look.step] != [look.num_embeddings, look.first_row]
    ]
    differences = []
    if num_embeddings != module.num_embeddings:
        differences.append(f"num_embeddings is {num_embeddings}, expected {module.num_embeddings}")
    elif moved:
        differences.append(f"look-ups {moved} have other shares of the rows")
    if width != module.width:
        differences.append(f"width is {width}, expected {module.width}")
    if theirs.keys() != ours:
        surplus = len(theirs.keys() - ours)
        differences.append(f"its seed map lacks look-ups {lacking} and has {surplus} that are not expected")
    if differences:
        raise ArgumentError(
            f"the state is of tables that hash otherwise: {'; '.join(differences)}. Build the model with the "
            "features and arguments that it was trained with"
        )
