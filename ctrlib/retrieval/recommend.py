"""The k best items of every user, exactly, in blocks of users and tiles of items: no matrix of all scores is held.

What a user has seen is left out. Where fewer than k items are left, the row is shorter: nothing is filled up. A user
without any item gets no list but from `Popularity`, since whatever another method said of them would be made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import torch
from scipy import sparse
from torch import Tensor

from ctrlib.errors import check_whole
from ctrlib.making import new_file
from ctrlib.retrieval.evaluate import entries, mask_items
from ctrlib.retrieval.interactions import Interactions
from ctrlib.retrieval.methods import Ints, Retriever, Vectors
from ctrlib.retrieval.topk import NOTHING, merge_top_k, top_k

SCORES = 1 << 24  # numbers in a tile of scores, 64 MB of float32
BLOCK = 256  # users


def recommend(
    method: Retriever,
    log: Interactions,
    k: int,
    *,
    users: Ints | None = None,
    exclude_seen: bool = True,
    block: int = BLOCK,
) -> Iterator[tuple[Ints, Tensor, Tensor]]:
    """Blocks of (users, items, scores) of the k best, best first; (B,), (B, k), (B, k).

    A place without item holds -1 at -inf. Of equal scores the earlier item comes first.

    Args:
        method: a fitted one.
        log: the pairs it was fitted on.
        k: items per user.
        users: numbers of some users; by default all.
        exclude_seen: leave out what the user has in `log`.
        block: users at a time.
    """
    check_whole(1, k=k, block=block)
    chosen = np.arange(log.num_users) if users is None else np.asarray(users)
    for start in range(0, len(chosen), block):
        some = chosen[start : start + block]
        if isinstance(method, Vectors):
            vectors = method.user_vectors[torch.from_numpy(some)]
            items, scores = search(vectors, method.item_vectors, k, log.matrix[some] if exclude_seen else None)
        else:
            every = method.scores(some)
            if exclude_seen:
                mask_items(every, log.matrix, some)
            items, scores = top_k(every, k)
        yield _known(method, log.matrix[some], some, items, scores)


def _known(
    method: Retriever, histories: sparse.csr_matrix, users: Ints, items: Tensor, scores: Tensor
) -> tuple[Ints, Tensor, Tensor]:
    """The same lists, but none for users without items."""
    if method.needs_history:
        unknown = torch.from_numpy(np.diff(histories.indptr) == 0)
        items[unknown], scores[unknown] = NOTHING, -torch.inf
    return users, items, scores


def recommend_new(
    method: Retriever, histories: sparse.csr_matrix, k: int, *, exclude_seen: bool = True, block: int = BLOCK
) -> Iterator[tuple[Ints, Tensor, Tensor]]:
    """As `recommend`, of users of whom only items are known: (B, I) sparse ones."""
    check_whole(1, k=k, block=block)
    for start in range(0, histories.shape[0], block):
        some = np.arange(start, min(start + block, histories.shape[0]))
        scores = method.fold_in(sparse.csr_matrix(histories[some]))
        if exclude_seen:
            mask_items(scores, histories, some)
        yield _known(method, sparse.csr_matrix(histories[some]), some, *top_k(scores, k))


def search(
    user_vectors: Tensor, item_vectors: Tensor, k: int, seen: sparse.csr_matrix | None = None
) -> tuple[Tensor, Tensor]:
    """Items with the k largest products, without those seen: exact, items a tile at a time.

    Shape: (B, D), (I, D), (B, I) sparse -> (B, k), (B, k).

    >>> items, scores = search(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 1)
    >>> items.tolist(), scores.tolist()
    ([[1]], [[2.0]])
    """
    num_users, num_items = len(user_vectors), len(item_vectors)
    tile = max(SCORES // max(num_users, 1), 4 * k, 1)
    if seen is None or seen.nnz == 0:
        rows = columns = np.zeros(0, np.int64)
    else:
        rows, columns = entries(seen, np.arange(num_users))
    found: tuple[Tensor, Tensor] | None = None
    for start in range(0, num_items, tile):
        stop = min(start + tile, num_items)
        scores = user_vectors @ item_vectors[start:stop].T
        inside = (columns >= start) & (columns < stop)
        scores[torch.from_numpy(rows[inside]), torch.from_numpy(columns[inside] - start)] = -torch.inf
        items, values = top_k(scores, k)
        items = torch.where(items == NOTHING, items, items + start)
        found = (items, values) if found is None else merge_top_k(*found, items, values)
    assert found is not None
    return found


def as_frame(users: Ints, items: Tensor, scores: Tensor, user_ids: pl.Series, item_ids: pl.Series) -> pl.DataFrame:
    """Columns user, item, rank (from 1) and score, a row for each item: places left empty are none."""
    there = (items != NOTHING).numpy()
    rows, ranks = np.nonzero(there)
    return pl.DataFrame(
        {
            "user": user_ids.gather(users[rows]),
            "item": item_ids.gather(items.numpy()[there]),
            "rank": (ranks + 1).astype(np.int32),
            "score": scores.numpy()[there].astype(np.float32),
        }
    )


def write(
    blocks: Iterator[tuple[Ints, Tensor, Tensor]], user_ids: pl.Series, item_ids: pl.Series, out: Path
) -> dict[str, int]:
    """Write lists to a parquet file as they come; how many users, rows, and users with fewer than k items."""
    counts = {"users": 0, "rows": 0, "short_lists": 0}
    with new_file(out) as making:
        writer: Any = None
        try:
            for users, items, scores in blocks:
                table = as_frame(users, items, scores, user_ids, item_ids).to_arrow()
                writer = writer or pq.ParquetWriter(making, table.schema)
                writer.write_table(table)
                counts["users"] += len(users)
                counts["rows"] += table.num_rows
                counts["short_lists"] += int((items == NOTHING).any(dim=1).sum())
        finally:
            if writer is not None:
                writer.close()
    return counts
