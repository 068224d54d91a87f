"""Pairs of features beside single ones: memorised, with a row for each pair of values, or factorised, as a product.

Which pairs, and how, is for a search to say: F. Lyu et al., "Memorize, Factorize, or be Naive: Learning Optimal Feature
Interaction Methods for CTR Prediction", ICDE 2022, https://arxiv.org/abs/2108.01265 (`ctrlib.search.optinter`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.narrow import NarrowTable, NarrowTables
from ctrlib.embeddings.table import init_rows, regroup, table_name
from ctrlib.errors import ArgumentError
from ctrlib.layers import init_linear

Pair = tuple[str, str]


def cross_codes(ids: Mapping[str, Tensor], pairs: Sequence[Pair], rows: Mapping[str, int]) -> Tensor:
    """A number for each pair of values, x_i rows_j + x_j: (B, pairs).

    Shape: ids (B,) of each feature; `rows` are the sizes of the features' vocabularies.

    >>> ids = {"a": torch.tensor([3, 4]), "b": torch.tensor([5, 0])}
    >>> cross_codes(ids, [("a", "b")], {"a": 5, "b": 10}).tolist()
    [[35], [40]]
    """
    return torch.stack([ids[first] * rows[second] + ids[second] for first, second in pairs], dim=1)


def single_ids(kjt: KeyedJaggedTensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Feature -> its ids: (B,).

    Raises:
        ValueError: a feature has not one id in every row.
    """
    jagged, ids = kjt.to_dict(), {}
    for name in names:
        ids[name] = jagged[name].values()
        if len(ids[name]) != kjt.stride():
            raise ArgumentError(
                f"feature {name!r} has {len(ids[name])} ids in {kjt.stride()} rows: only categorical features, with "
                "one id in every row, can be crossed"
            )
    return ids


class PairVectors(nn.Module):
    """C[id_ij(x_i, x_j)] for memorised pairs of features, A[x_i] * A[x_j] for factorised ones.

    The crosses of all memorised pairs are rows of one table; each pair has a row of its own for those that are not
    among its crosses. `set_crosses` says which these are. Which row a cross has is data: the sorted buffer `codes`,
    8 bytes for each, which is saved with the weights. Features that share a vocabulary share A.

    Rows of A start uniform, with the variance 1 / (features * cross_dim), those of C as N(0, init_std^2), and a pair's
    row for other crosses at 0.

    `rows`: features -> the number of their ids, `vocabularies`: features -> the name of their vocabulary.

    Shape: KeyedJaggedTensor -> (B, memorised + factorised pairs, cross_dim).
    """

    codes: Tensor
    first_codes: Tensor

    def __init__(
        self,
        rows: Mapping[str, int],
        vocabularies: Mapping[str, str],
        *,
        memorised: Sequence[Sequence[str]] = (),
        factorised: Sequence[Sequence[str]] = (),
        num_crosses: int = 0,
        cross_dim: int = 8,
        init_std: float = 1e-4,
    ) -> None:
        super().__init__()
        self.memorised: list[Pair] = [(first, second) for first, second in memorised]
        self.factorised: list[Pair] = [(first, second) for first, second in factorised]
        for pair in (*self.memorised, *self.factorised):
            if not {*pair} <= set(rows) or pair[0] == pair[1]:
                raise ArgumentError(f"pair {pair}: expected two features of {sorted(rows)}")
        if cross_dim < 1 or num_crosses < 0 or not (self.memorised or self.factorised):
            raise ArgumentError(
                f"expected one pair or more, cross_dim of 1 or more and num_crosses of 0 or more, got {memorised}, "
                f"{factorised}, {cross_dim} and {num_crosses}"
            )
        self.rows, self.cross_dim, self.num_crosses = dict(rows), cross_dim, num_crosses
        self.names = list(dict.fromkeys(itertools.chain(*self.memorised)))
        sizes = [rows[first] * rows[second] for first, second in self.memorised]
        if sum(sizes) >= 2**63:
            raise ArgumentError(f"the memorised pairs have {sum(sizes)} pairs of values, beyond 64 bits: cross fewer")
        self.crosses: Any = None
        if self.memorised:
            count = len(self.memorised)
            self.register_buffer("codes", torch.arange(num_crosses))
            first_codes = [sum(sizes[:place]) for place in range(count)]
            self.register_buffer("first_codes", torch.tensor(first_codes), persistent=False)
            self.cross_keys = ["*".join(pair) for pair in self.memorised]
            config = EmbeddingBagConfig(
                name="crosses",
                num_embeddings=count + num_crosses,
                embedding_dim=cross_dim,
                feature_names=self.cross_keys,
                init_fn=functools.partial(init_rows, std=init_std, copies=1, padding=list(range(count))),
            )
            self.crosses = EmbeddingBagCollection(tables=[config])
        self.factors: Any = None
        if self.factorised:
            self.factor_keys = list(dict.fromkeys(itertools.chain(*self.factorised)))
            bound = math.sqrt(3 / (len(self.factor_keys) * cross_dim))
            members: dict[str, list[str]] = {}
            for name in self.factor_keys:
                members.setdefault(vocabularies[name], []).append(name)
            self.factors = EmbeddingBagCollection(
                tables=[
                    EmbeddingBagConfig(
                        name=table_name(vocabulary),
                        num_embeddings=rows[names[0]],
                        embedding_dim=cross_dim,
                        feature_names=names,
                        init_fn=functools.partial(nn.init.uniform_, a=-bound, b=bound),
                    )
                    for vocabulary, names in members.items()
                ]
            )
            self._sides = [[self.factor_keys.index(pair[side]) for pair in self.factorised] for side in (0, 1)]

    def set_crosses(self, crosses: Sequence[Tensor]) -> None:
        """Say which crosses of each memorised pair have a row, by their `cross_codes`, ascending.

        Raises:
            ValueError: they are not as many as the table has rows for, or not ascending codes of their pairs.
        """
        if len(crosses) != len(self.memorised) or sum(map(len, crosses)) != self.num_crosses:
            raise ArgumentError(
                f"expected {self.num_crosses} crosses of {len(self.memorised)} pairs, got {[len(c) for c in crosses]}"
            )
        for pair, codes in zip(self.memorised, crosses):
            beyond = self.rows[pair[0]] * self.rows[pair[1]]
            if len(codes) and (codes[0] < 0 or codes[-1] >= beyond or bool((codes.diff() <= 0).any())):
                raise ArgumentError(
                    f"crosses of {pair} must be ascending codes below {beyond}, got {codes[:3].tolist()}..."
                )
        if self.memorised:
            self.codes.copy_(torch.cat([codes + first for codes, first in zip(crosses, self.first_codes)]))

    def cross_rows(self, kjt: KeyedJaggedTensor) -> Tensor:
        """The row of the table of crosses that each memorised pair reads: (B, memorised pairs)."""
        codes = cross_codes(single_ids(kjt, self.names), self.memorised, self.rows) + self.first_codes
        others = torch.arange(len(self.memorised), device=codes.device).expand_as(codes)
        if not self.num_crosses:
            return others
        place = torch.searchsorted(self.codes, codes).clamp(max=self.num_crosses - 1)
        return torch.where(self.codes[place] == codes, len(self.memorised) + place, others)

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        """KeyedJaggedTensor -> (B, memorised + factorised pairs, cross_dim)."""
        parts = []
        if self.crosses is not None:
            rows = self.cross_rows(kjt)
            if isinstance(self.crosses, EmbeddingBagCollection):
                # TorchRec would look up key by key, each with a gradient as large as the table.
                parts.append(nn.functional.embedding(rows, self.crosses.embedding_bags["crosses"].weight))
            else:
                ones = torch.ones(rows.numel(), dtype=torch.int32, device=rows.device)
                pooled = self.crosses(KeyedJaggedTensor(self.cross_keys, rows.T.flatten(), lengths=ones))
                parts.append(regroup(pooled, self.cross_keys).view(len(rows), -1, self.cross_dim))
        if self.factors is not None:
            single_ids(kjt, self.factor_keys)
            factors = regroup(self.factors(kjt), self.factor_keys).view(kjt.stride(), -1, self.cross_dim)
            parts.append(factors[:, self._sides[0]] * factors[:, self._sides[1]])
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class CrossTables(nn.Module):
    """e'_f = e_f + sum_p P_pf z_p: the fields, and the vectors z_p of crossed pairs, brought into them by matrices P_pf
    (cross_dim, D) that are learned.

    A look-up for `TableEmbedding(..., tables=CrossTables(...))`, and a drop-in for its tables. In the paper the z_p are
    concatenated to the fields, for an MLP: its first layer W_e e + W_z z is W_e (e + P z) with W_z = W_e P. This way
    there are as many fields as before, every tower can read them, and cross_dim need not be D.

    `tables`: all rows of the fields (`NarrowTable`, which may also be narrow). `memorised` and `factorised`: pairs of
    categorical features; see `PairVectors`.

    Shape: KeyedJaggedTensor -> KeyedTensor, a key for each of `names`, D wide.

    Raises:
        ValueError: as `NarrowTables`; a pair is not of two of the features, or there is none; when called: a crossed
            feature has not one id in every row.

    >>> tables = [NarrowTable(name, (name,), rows=9, rank=4) for name in "ab"]
    >>> lookup = CrossTables(tables, embedding_dim=4, memorised=[("a", "b")], num_crosses=2)
    >>> lookup.vectors.set_crosses([torch.tensor([3 * 9 + 5, 8 * 9 + 4])])
    >>> kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([3, 5, 5, 3]), torch.ones(4).int())
    >>> lookup.vectors.cross_rows(kjt).tolist(), lookup(kjt).values().shape  # (5, 3) reads the row of all others
    ([[1], [0]], torch.Size([2, 8]))
    """

    def __init__(
        self,
        tables: Sequence[NarrowTable | Mapping[str, Any]],
        *,
        memorised: Sequence[Sequence[str]] = (),
        factorised: Sequence[Sequence[str]] = (),
        num_crosses: int = 0,
        cross_dim: int = 8,
        embedding_dim: int = 16,
        names: Sequence[str] | None = None,
        init_std: float = 1e-4,
    ) -> None:
        super().__init__()
        self.base = NarrowTables(tables, embedding_dim=embedding_dim, names=names, init_std=init_std)
        self.names, self.embedding_dim = self.base.names, embedding_dim
        owners = {name: table for table in self.base.stored.values() for name in table.feature_names}
        self.vectors = PairVectors(
            {name: table.rows for name, table in owners.items()},
            {name: table.name for name, table in owners.items()},
            memorised=memorised,
            factorised=factorised,
            num_crosses=num_crosses,
            cross_dim=cross_dim,
            init_std=init_std,
        )
        self.projection = projection(len(memorised) + len(factorised), self.vectors.cross_dim, self.base)

    def describe(self) -> dict[str, Any]:
        """What the constructor takes to make this again, without its weights and crosses: plain data.

        >>> tables = [NarrowTable(name, (name,), rows=9, rank=4) for name in "ab"]
        >>> lookup = CrossTables(tables, embedding_dim=4, factorised=[("a", "b")])
        >>> CrossTables(**lookup.describe()).describe() == lookup.describe()
        True
        """
        return {
            **{name: value for name, value in self.base.describe().items() if name != "is_weighted"},
            "memorised": [list(pair) for pair in self.vectors.memorised],
            "factorised": [list(pair) for pair in self.vectors.factorised],
            "num_crosses": self.vectors.num_crosses,
            "cross_dim": self.vectors.cross_dim,
        }

    def forward(self, kjt: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor -> KeyedTensor."""
        return add_crosses(self.base(kjt), self.names, self.projection(self.vectors(kjt).flatten(1)))


def projection(num_pairs: int, cross_dim: int, base: NarrowTables) -> nn.Linear:
    """The matrices P of all pairs and fields, Xavier-normal."""
    layer = nn.Linear(num_pairs * cross_dim, len(base.names) * base.embedding_dim, bias=False)
    init_linear(layer)
    return layer


def add_crosses(pooled: KeyedTensor, names: Sequence[str], crosses: Tensor) -> KeyedTensor:
    """The fields in the order of `names`, plus what the crosses bring into them.

    Shape: crosses (B, F * D).
    """
    values = regroup(pooled, names) + crosses
    return KeyedTensor(list(names), [values.shape[1] // len(names)] * len(names), values)
