"""The k best of many items, exactly and by a stated rule: the higher score first, of equal scores the earlier item.

`torch.topk` says nothing about ties, and its order of equal scores changes with the number of columns; libraries of
search fill up rows that have too few items. Here an item at -inf is none, and rows end where items do: a place that is
left empty holds item -1 at -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrlib.errors import ArgumentError

GROUP = 64  # items whose maximum stands for them in the first pass
NOTHING = -1


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Items and scores of the k best of each row, best first.

    One pass takes the maximum of each group of 64 items. The k best lie in the k groups with the largest maxima, since
    an item of any other group has k maxima that are no smaller above it; so only these groups are searched. Where a
    group that was left out has items that tie with the k-th, the row is sorted as a whole.

    Shape: (B, I) -> (B, k), (B, k); with fewer than k items above -inf the rest is item -1 at -inf.

    Raises:
        ValueError: a score is nan.

    >>> items, values = top_k(torch.tensor([[0.5, 2.0, 0.5, -torch.inf]]), 4)
    >>> items.tolist(), values.tolist()
    ([[1, 0, 2, -1]], [[2.0, 0.5, 0.5, -inf]])
    """
    num_items = scores.shape[1]
    taken = min(k, num_items)
    whole = num_items // GROUP * GROUP
    if whole // GROUP <= 2 * taken + 2:  # there is little to leave out
        items, values = _sorted(scores, taken)
    else:
        grouped = scores[:, :whole].reshape(len(scores), -1, GROUP)
        maxima, groups = grouped.amax(dim=2).topk(taken + 1, dim=1)
        best = groups[:, :taken].sort(dim=1).values  # in the order of their items, so that ties fall to the earlier
        found = grouped.gather(1, best[:, :, None].expand(-1, -1, GROUP)).flatten(1)
        found = torch.cat([found, scores[:, whole:]], dim=1)
        columns, values = _sorted(found, taken)
        inside = columns < taken * GROUP
        place = columns.clamp(max=taken * GROUP - 1)
        items = torch.where(
            inside, best.gather(1, place // GROUP) * GROUP + place % GROUP, columns - taken * GROUP + whole
        )
        unsure = (maxima[:, -1] >= values[:, -1]).nonzero()[:, 0]
        if len(unsure):
            items[unsure], values[unsure] = _sorted(scores[unsure], taken)
    if values.isnan().any():
        row = int(values.isnan().any(dim=1).nonzero()[0])
        raise ArgumentError(
            f"the scores of row {row} are not numbers (nan): the training diverged; lower its learning rate"
        )
    items = items.masked_fill(values == -torch.inf, NOTHING)
    if taken < k:
        items = torch.nn.functional.pad(items, (0, k - taken), value=NOTHING)
        values = torch.nn.functional.pad(values, (0, k - taken), value=-torch.inf)
    return items, values


def _sorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row in the stated order, and their scores."""
    if scores.shape[1] == k:
        values, columns = scores.sort(dim=1, descending=True, stable=True)
        return columns, values
    values, columns = scores.topk(k + 1, dim=1)
    tied = (values[:, -2] == values[:, -1]).nonzero()[:, 0]  # more than k deserve to be here: which, torch has not said
    columns = columns[:, :k].sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if len(tied):
        again, places = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = again[:, :k], places[:, :k]
    return columns, values


def merge_top_k(items: Tensor, scores: Tensor, more: Tensor, more_scores: Tensor) -> tuple[Tensor, Tensor]:
    """The k best of two such lists, the items of the second all later than those of the first.

    Shape: (B, k) four times -> (B, k), (B, k).
    """
    k = items.shape[1]
    values, order = torch.cat([scores, more_scores], dim=1).sort(dim=1, descending=True, stable=True)
    return torch.cat([items, more], dim=1).gather(1, order)[:, :k], values[:, :k]
