"""What is found of one label."""

from __future__ import annotations

from dataclasses import dataclass

from ctrlib.ranking.chosen import Order
from ctrlib.ranking.pairs import PairScore, Screening
from ctrlib.ranking.relevance import Score


@dataclass(frozen=True)
class LabelRanking:
    """What the features tell about one label.

    `entropy`, in nats, is all that there is to tell; `scores` in order of relevance, `pairs` in that of synergy, and
    how they were `screening`ed. `orders`: features in the order in which they are worth adding, without copies of the
    label.
    """

    label: str
    rows: int
    positive: float
    entropy: float
    scores: list[Score]
    pairs: list[PairScore]
    screening: Screening | None
    orders: dict[Order, list[str]]

    @property
    def features(self) -> list[str]:
        """Names, most relevant first; copies of the label are not among them."""
        return self.orders["relevance"]
