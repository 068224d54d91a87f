"""Features in the order in which they are worth adding: by relevance alone, less redundancy, and with synergy.

3MR (maximum relevance, minimum redundancy, maximum relation), as in OutRank (B. Skrlj and B. Mramor, RecSys 2023,
https://arxiv.org/abs/2309.01552). The first release computes it; in the last one it is dead code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ctrlib.ranking.chosen import Order


def greedy(
    relevance: Mapping[str, float],
    pairs: Iterable[tuple[str, str, float, float]],
    *,
    redundancy_weight: float = 1.0,
    relation_weight: float = 1.0,
) -> list[str]:
    """S_1 = argmax R; then again and again argmax_f R_f - alpha median_s D_fs + beta median_s Q_fs, s in S.

    R, D and Q are scaled to [0, 1], each over its own set; pairs that are not given count as 0. With beta = 0 this is
    mRMR, with alpha = beta = 0 the order of relevance. Of equals the first given is taken.

    Args:
        relevance: feature -> R.
        pairs: both features, their redundancy D and their relation Q, which is what the two as one feature tell.
        redundancy_weight: alpha.
        relation_weight: beta.

    >>> greedy({"a": 1.0, "copy of a": 0.9, "b": 0.5}, [("a", "copy of a", 1.0, 1.0), ("a", "b", 0.0, 1.5)])
    ['a', 'b', 'copy of a']
    """
    names, pairs = list(relevance), list(pairs)
    place = {name: at for at, name in enumerate(names)}
    known = [(place[one], place[other], d, q) for one, other, d, q in pairs if one in place and other in place]
    relation, redundancy = np.zeros((2, len(names), len(names)))
    for scaled, weight, values in (
        (redundancy, -redundancy_weight, _scaled([pair[2] for pair in known])),
        (relation, relation_weight, _scaled([pair[3] for pair in known])),
    ):
        for (one, other, *_), value in zip(known, values):
            scaled[one, other] = scaled[other, one] = weight * value
    score, chosen = _scaled(list(relevance.values())), list[int]()
    left = np.ones(len(names), bool)
    for _ in names:
        total = score.copy()
        if chosen:
            total += np.median(redundancy[:, chosen], axis=1) + np.median(relation[:, chosen], axis=1)
        chosen.append(int(np.argmax(np.where(left, total, -np.inf))))
        left[chosen[-1]] = False
    return [names[at] for at in chosen]


def _scaled(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Smallest 0, largest 1; all 0 if they are equal."""
    found = np.array(values, np.float64)
    span = found.max() - found.min() if len(found) else 0.0
    return (found - found.min()) / span if span > 0 else np.zeros(len(found))


def orders(relevance: Mapping[str, float], pairs: Iterable[tuple[str, str, float, float]]) -> dict[Order, list[str]]:
    """All three."""
    pairs = list(pairs)
    return {
        "relevance": greedy(relevance, (), redundancy_weight=0.0, relation_weight=0.0),
        "mrmr": greedy(relevance, pairs, relation_weight=0.0),
        "3mr": greedy(relevance, pairs),
    }
