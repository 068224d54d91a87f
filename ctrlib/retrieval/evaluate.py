"""How good lists of items are: recall, precision, F1, hit rate, NDCG and MAP at several k, in blocks of users.

What is counted, and by what it is divided, has a name and is never guessed (`docs/retrieval.md` says where libraries
differ). With `hits` of a user's first k items and `relevant` items in all, binary and without repetition:

    precision@k   hits / k
    recall@k      hits / relevant (`recall_of="relevant"`), or hits / min(k, relevant) (`recall_of="reachable"`)
    f1@k          2 precision recall / (precision + recall) of each user
    f1_of_means@k the same of the means over users, as UltraGCN's code has it
    hit_rate@k    1 if there is a hit
    ndcg@k        sum over hits of 1 / log2(rank + 1), divided by that of min(k, relevant) hits at the top; ranks from 1
    map@k         sum over hits of the precision at their rank, divided by `relevant` (`map_of="relevant"`), or by
                  min(k, relevant) (`map_of="reachable"`)

Means are over users with relevant items (`over="with_test"`), or over all users of training (`over="all"`), where those
without relevant items count 0, as in the code of UltraGCN and LightGCN. Items of training are left out of the lists;
equal scores are ordered by item, the earlier first (`ctrlib.retrieval.topk`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from ctrlib.errors import ArgumentError, check_whole
from ctrlib.retrieval.interactions import Aligned
from ctrlib.retrieval.topk import top_k

Over = Literal["with_test", "all"]
Of = Literal["relevant", "reachable"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
NAMES = ("recall", "precision", "f1", "hit_rate", "ndcg", "map")
BLOCK = 256  # users whose scores are held at once


def list_metrics(
    hits: npt.NDArray[np.bool_],
    num_relevant: Ints,
    k: int,
    *,
    recall_of: Of = "relevant",
    map_of: Of = "relevant",
) -> dict[str, Floats]:
    """Each user's metrics at k.

    Args:
        hits: (B, >= k), whether the item at each rank is relevant.
        num_relevant: (B,), how many relevant items a user has.
        k: how many ranks count.
        recall_of: what recall is divided by.
        map_of: what average precision is divided by.

    >>> found = list_metrics(np.array([[True, False, True]]), np.array([4]), 3)
    >>> {name: round(float(values[0]), 4) for name, values in found.items()}
    {'recall': 0.5, 'precision': 0.6667, 'f1': 0.5714, 'hit_rate': 1.0, 'ndcg': 0.7039, 'map': 0.4167}
    """
    top = hits[:, :k].astype(np.float64)
    found = top.sum(axis=1)
    reachable = np.minimum(num_relevant, k)
    recall = found / np.maximum(num_relevant if recall_of == "relevant" else reachable, 1)
    precision = found / k
    gains = 1 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate([[1.0], np.cumsum(gains)])  # of 0 relevant items nothing is divided by nothing
    ranks = np.arange(1, k + 1)
    sum_of_precisions = (top * np.cumsum(top, axis=1) / ranks[: top.shape[1]]).sum(axis=1)
    return {
        "recall": recall,
        "precision": precision,
        "f1": 2 * precision * recall / np.maximum(precision + recall, 1e-300),
        "hit_rate": (found > 0).astype(np.float64),
        "ndcg": top @ gains[: top.shape[1]] / ideal[reachable],
        "map": sum_of_precisions / np.maximum(num_relevant if map_of == "relevant" else reachable, 1),
    }


def evaluate_lists(
    lists: Any,
    test: Aligned,
    *,
    users: Any = None,
    ks: Sequence[int] = (20,),
    over: Over = "with_test",
    recall_of: Of = "relevant",
    map_of: Of = "relevant",
) -> dict[str, float]:
    """Metrics of lists that anybody made.

    Args:
        lists: (B, n) item numbers, best first, -1 in places left empty; all users' lists, or those of `users`.
        test: what is relevant.
        users: the users whose lists these are; by default all.
        ks: how many ranks count.
        over: users whose mean is taken; of all there are, also those without a list.
        recall_of: what recall is divided by.
        map_of: what average precision is divided by.

    Raises:
        ArgumentError: a setting is none, or nobody has a relevant item.
    """
    sums = _Sums(test, ks, over, recall_of, map_of)
    chosen = np.arange(test.matrix.shape[0]) if users is None else np.asarray(users)
    sums.add(chosen, torch.as_tensor(np.asarray(lists)))
    return sums.means()


def evaluate(
    scores: Callable[[Ints], Tensor],
    train: sparse.csr_matrix,
    test: Aligned,
    *,
    ks: Sequence[int] = (20,),
    over: Over = "with_test",
    recall_of: Of = "relevant",
    map_of: Of = "relevant",
    block: int = BLOCK,
) -> dict[str, float]:
    """Metrics of a method's scores, a block of users at a time; the items of training are left out.

    Args:
        scores: from the numbers of some users to their scores of all items, (B,) -> (B, I). They are written to.
        train: (users, items), what is left out of the lists.
        test: what is relevant.
        ks, over, recall_of, map_of: as in `evaluate_lists`.
        block: users at a time.

    Raises:
        ArgumentError: as `evaluate_lists`.

    >>> from ctrlib.retrieval.interactions import Interactions, Log
    >>> log = Interactions.of(Log.of([1, 1, 2], [10, 20, 30]))
    >>> test = log.aligned(Log.of([1, 2], [30, 10]))
    >>> popularity = torch.tensor([3.0, 1.0, 2.0])
    >>> evaluate(lambda users: popularity.repeat(len(users), 1), log.matrix, test, ks=(1,))["recall@1"]
    1.0
    """
    options: dict[str, Any] = {"ks": ks, "over": over, "recall_of": recall_of, "map_of": map_of, "block": block}
    return evaluate_with_errors(scores, train, test, **options)[0]


def evaluate_with_errors(
    scores: Callable[[Ints], Tensor],
    train: sparse.csr_matrix,
    test: Aligned,
    *,
    ks: Sequence[int] = (20,),
    over: Over = "with_test",
    recall_of: Of = "relevant",
    map_of: Of = "relevant",
    block: int = BLOCK,
) -> tuple[dict[str, float], dict[str, float]]:
    """As `evaluate`, and the standard error of each mean over users, who are independent; nan for a single one.

    What is no mean (`f1_of_means`) has none.
    """
    sums = _Sums(test, ks, over, recall_of, map_of)
    check_whole(1, block=block)
    users = np.flatnonzero(sums.num_relevant)  # of the others nothing has to be known
    for start in range(0, len(users), block):
        chosen = users[start : start + block]
        some = scores(chosen)
        mask_items(some, train, chosen)
        sums.add(chosen, top_k(some, max(ks))[0])
    return sums.means(), sums.errors()


def mask_items(scores: Tensor, seen: sparse.csr_matrix, users: Ints) -> None:
    """Set the scores (B, I) of what each of the users has seen to -inf, in place."""
    rows, columns = entries(seen, users)
    scores[torch.from_numpy(rows), torch.from_numpy(columns)] = -torch.inf


def entries(matrix: sparse.csr_matrix, rows: Ints) -> tuple[Ints, Ints]:
    """Where the entries of some rows of a matrix are: the place of the row among them, and the column."""
    starts, stops = matrix.indptr[rows], matrix.indptr[rows + 1]
    lengths = (stops - starts).astype(np.int64)
    shift = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    places = np.arange(lengths.sum()) + shift
    return np.repeat(np.arange(len(rows)), lengths), matrix.indices[places].astype(np.int64)


class _Sums:
    """Sums of metrics over users."""

    def __init__(self, test: Aligned, ks: Sequence[int], over: Over, recall_of: Of, map_of: Of) -> None:
        if not ks:
            raise ArgumentError("ks (--k) is empty: expected one number of items or more")
        for k in ks:
            check_whole(1, k=k)
        for name, value, known in (
            ("over", over, ("with_test", "all")),
            ("recall_of", recall_of, ("relevant", "reachable")),
            ("map_of", map_of, ("relevant", "reachable")),
        ):
            if value not in known:
                raise ArgumentError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.test, self.ks, self.recall_of, self.map_of = test, ks, recall_of, map_of
        self.num_relevant = np.diff(test.matrix.indptr).astype(np.int64) + test.unknown_items
        self.num_users = len(self.num_relevant) if over == "all" else int((self.num_relevant > 0).sum())
        if not self.num_relevant.any():
            raise ArgumentError("no user has a relevant item: is this log of the same users and items as training?")
        self.sums: dict[str, float] = {f"{name}@{k}": 0.0 for k in ks for name in NAMES}
        self.squares = dict(self.sums)

    def add(self, users: Ints, items: Tensor) -> None:
        rows, columns = entries(self.test.matrix, users)
        num_items = self.test.matrix.shape[1]
        known = np.append(rows * num_items + columns, len(users) * num_items)  # ascending, and one above all
        found = items.cpu().numpy()
        asked = np.arange(len(users))[:, None] * num_items + found
        hits = (known[np.searchsorted(known, asked)] == asked) & (found >= 0)
        for k in self.ks:
            for name, values in list_metrics(
                hits, self.num_relevant[users], k, recall_of=self.recall_of, map_of=self.map_of
            ).items():
                values = values[self.num_relevant[users] > 0]
                self.sums[f"{name}@{k}"] += float(values.sum())
                self.squares[f"{name}@{k}"] += float(values @ values)

    def means(self) -> dict[str, float]:
        means = {name: value / self.num_users for name, value in self.sums.items()}
        for k in self.ks:
            both = means[f"precision@{k}"], means[f"recall@{k}"]
            means[f"f1_of_means@{k}"] = 2 * both[0] * both[1] / max(sum(both), 1e-300)
        return {**means, "users": self.num_users}

    def errors(self) -> dict[str, float]:
        n = self.num_users
        if n < 2:
            return dict.fromkeys(self.sums, math.nan)
        apart = {name: max(0.0, square - self.sums[name] ** 2 / n) for name, square in self.squares.items()}
        return {name: math.sqrt(value / (n - 1) / n) for name, value in apart.items()}
