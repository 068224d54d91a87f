"""Chosen pairs of features as crosses of a model, each pair of values that train holds with a row of its own.

Which pairs, somebody says: a ranking (`ctrlib.ranking`), a search (`ctrlib.search.optinter`), or one's own idea.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType

from ctrlib._lazy import instead
from ctrlib.batch import Batch
from ctrlib.data.loader import Loader
from ctrlib.embeddings.crosses import CrossTables, Pair, cross_codes, single_ids
from ctrlib.embeddings.narrow import NarrowTable, NarrowTables
from ctrlib.embeddings.table import table_name
from ctrlib.errors import ArgumentError
from ctrlib.model import Model
from ctrlib.schema import Categorical, Schema
from ctrlib.structure import put, with_plain_tables

PATH = "embedding.tables"
MERGE_AT = 1 << 24  # codes held before they are counted, 128 MB
BATCH = 1 << 16


def crossed(model: Model, data: str | Path, pairs: Iterable[Sequence[str]], *, min_count: int = 2) -> Model:
    """A copy of a model whose fields get the vectors of these pairs added, as `CrossTables` does.

    Crosses are counted on train: those that come up `min_count` times have a row of their own, all others of a pair
    share one. The model's tables are as they were.

    Args:
        model: on a `TableEmbedding` with plain tables, whatever its tower.
        data: the prepared folder that it is for.
        pairs: of categorical features.
        min_count: as said.

    Raises:
        ValueError: a pair is not of two categorical features of the folder, or comes twice; or the model has no such
            tables.
    """
    loader = Loader(data, "train", batch_size=BATCH)
    rows = rows_of(loader.schema)
    chosen = check_pairs(pairs, loader.schema)
    changed, base = with_base(model)
    codes = count_crosses(loader, chosen, rows, min_count=min_count)
    put(changed, PATH, cross_tables(base, codes, memorised=chosen))
    return changed


def check_pairs(pairs: Iterable[Sequence[str]], schema: Schema) -> list[Pair]:
    """The pairs, in their order.

    Raises:
        ValueError: as said in `crossed`.

    >>> check_pairs([["user", "item"]], Schema((Categorical("user"), Categorical("item")), ("click",)))
    [('user', 'item')]
    """
    able = [feature.name for feature in schema.sparse if isinstance(feature, Categorical)]
    chosen: dict[frozenset[str], Pair] = {}
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or pair[0] == pair[1]:
            raise ArgumentError(f"crosses: {pair!r} is no pair of two features, such as ['user', 'item']")
        if unknown := [name for name in pair if name not in able]:
            raise ArgumentError(
                f"crosses: {unknown[0]!r} is no categorical feature, with one id per row, of the prepared data; "
                f"{instead(unknown[:1], able)}"
            )
        if (names := frozenset(pair)) in chosen:
            raise ArgumentError(f"crosses: the pair {list(pair)} comes twice: say it once")
        chosen[names] = (pair[0], pair[1])
    return list(chosen.values())


def rows_of(schema: Schema) -> dict[str, int]:
    """Categorical feature -> the number of its ids; the schema is fitted."""
    categorical = [feature for feature in schema.sparse if isinstance(feature, Categorical)]
    return {feature.name: feature.num_embeddings for feature in categorical if feature.num_embeddings is not None}


def count_crosses(
    batches: Iterable[Batch], pairs: Sequence[Pair], rows: dict[str, int], *, min_count: int
) -> list[Tensor]:
    """The `cross_codes` of each pair that occur `min_count` times or more, ascending. Rows of weight 0 do not count.

    Memory: 16 bytes for each cross that occurs, and 128 MB.

    >>> from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
    >>> ids = KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([3, 3, 4, 5, 5, 6]), torch.ones(6).int())
    >>> batch = Batch(ids, torch.zeros(3, 0), torch.zeros(3, 1), torch.ones(3))
    >>> count_crosses([batch], [("a", "b")], {"a": 10, "b": 10}, min_count=2)
    [tensor([35])]
    """
    names = list(dict.fromkeys(itertools.chain(*pairs)))
    found: list[tuple[Tensor, Tensor]] = [(torch.empty(0, dtype=torch.int64),) * 2 for _ in pairs]
    waiting: list[Tensor] = []

    def merge() -> None:
        for place, codes in enumerate(torch.cat(waiting).unbind(1)):
            new, counts = torch.unique(codes, return_counts=True)
            merged, where = torch.unique(torch.cat([found[place][0], new]), return_inverse=True)
            totals = torch.zeros_like(merged).index_add(0, where, torch.cat([found[place][1], counts]))
            found[place] = merged, totals
        waiting.clear()

    for batch in batches:
        waiting.append(cross_codes(single_ids(batch.sparse, names), pairs, rows)[batch.weights != 0])
        if sum(codes.numel() for codes in waiting) >= MERGE_AT:
            merge()
    if waiting:
        merge()
    return [codes[counts >= min_count] for codes, counts in found]


def with_base(model: Model) -> tuple[Model, NarrowTables]:
    """A copy of the model with a table per vocabulary, and the same tables as a look-up that knows its vocabularies.

    Raises:
        ValueError: the embedding has no plain tables.
    """
    model, tables = with_plain_tables(model, "pairs are crossed beside")
    configs = tables.embedding_bag_configs()
    stored = [
        NarrowTable(
            config.name,
            tuple(config.feature_names),
            rows=config.num_embeddings,
            rank=config.embedding_dim,
            pooling="mean" if config.pooling == PoolingType.MEAN else "sum",
        )
        for config in configs
    ]
    base = NarrowTables(stored, embedding_dim=configs[0].embedding_dim)
    with torch.no_grad():
        for table in stored:
            weight = tables.embedding_bags[table.name].weight
            base.tables.embedding_bags[table_name(table.name)].weight.copy_(weight)
    return model, base


def cross_tables(
    base: NarrowTables,
    crosses: Sequence[Tensor],
    *,
    memorised: Sequence[Pair],
    factorised: Sequence[Pair] = (),
    cross_dim: int = 8,
) -> CrossTables:
    """Crosses beside these tables, which they take over with their weights; `crosses` are those of memorised pairs."""
    arguments = base.describe()
    del arguments["is_weighted"]
    lookup = CrossTables(
        **arguments,
        memorised=memorised,
        factorised=factorised,
        num_crosses=sum(map(len, crosses)),
        cross_dim=cross_dim,
    )
    lookup.vectors.set_crosses(crosses)
    lookup.base.load_state_dict(base.state_dict())
    return lookup
