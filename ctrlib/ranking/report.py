"""A ranking as one HTML page: what is wrong, what features tell with its interval, overlaps, and pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctrlib.analysis.page import bars, heading, heat_map, page, table, text
from ctrlib.ranking.label import LabelRanking
from ctrlib.ranking.pairs import PairScore
from ctrlib.ranking.quality import Finding
from ctrlib.ranking.relevance import Score

MOST = 40  # features of a heat map
UNIT = "thousandths of a nat"
EXPLAINED = (
    "Relevance is mutual information with the label, less what the same feature has on average when labels are "
    "permuted (chance), in thousandths of a nat. q is the share of false discoveries among all features that are as "
    "surely above chance. Once: share of the values that one row has. Share: of what can be told about the label. "
    "A click on a heading sorts."
)
PAIRS = (
    "Synergy is what two features tell together that neither tells alone, beyond chance: above 0, a cross is worth it. "
    "Overlap is what they tell about each other: 1 if one follows from the other. Gain is the smaller of what either "
    "tells when the other is known. Pairs without q were looked through, but not tested. Where q is not below 0.05, "
    "synergy may be what is wrong with chance: it is too large where a feature tells a lot and the other's values have "
    "few rows each. Gain, which is exact, is small then."
)


def report(
    data: str, split: str, labels: Sequence[LabelRanking], findings: Sequence[Finding], left_out: Mapping[str, str]
) -> str:
    """The page of a `Ranking`, from what that holds."""
    parts = [text(f"{data}, {split}.")]
    if findings:
        parts += [
            heading("What to look at"),
            table(
                ["column", "kind", "finding", "prepare with"],
                [[one.feature, one.kind.replace("_", " "), one.said, one.flag] for one in findings],
            ),
        ]
    if left_out:
        said = "; ".join(f"{name}, {why}" for name, why in left_out.items())
        parts.append(text(f"Not ranked, since preparation left them out: {said}."))
    for one in labels:
        parts += _of_label(one)
    return page(f"Which features are worth it: {data}", parts)


def _of_label(one: LabelRanking) -> list[str]:
    told = f"{one.rows:,} rows, {one.positive:.2%} positive, {1000 * one.entropy:.1f} {UNIT} to tell. "
    shown = [score for score in one.scores if not score.leak]
    parts = [heading(f"What features tell about {one.label}"), text(told + EXPLAINED)]
    if shown:
        parts.append(
            bars(
                [score.feature for score in shown],
                [1000 * score.relevance for score in shown],
                [(1000 * score.low, 1000 * score.high) for score in shown],
                UNIT,
            )
        )
    columns = ["feature", "kind", "values", "once", "missing", "relevance", "low", "high", "chance", "z", "q", "share"]
    places: dict[str, dict[str, int]] = {
        name: {feature: at for at, feature in enumerate(order, 1)} for name, order in one.orders.items()
    }
    rows = [_row(score, places) for score in one.scores]
    parts.append(table([*columns, *(f"order: {name}" for name in places)], rows))
    if one.pairs:
        names = [feature for feature in one.orders["relevance"] if _has_pairs(feature, one.pairs)][:MOST]
        parts += [
            heading(f"What features tell about each other, the {len(names)} most relevant"),
            _overlaps(names, one.pairs),
        ]
        large = one.screening.too_large if one.screening else ()
        said = f" In no pair, since their values do not fit into memory: {', '.join(large)}." if large else ""
        parts += [heading(f"What pairs tell about {one.label}"), text(PAIRS + said), _pairs(one.pairs)]
    return parts


def _row(score: Score, places: dict[str, dict[str, int]]) -> list[str | int | float | None]:
    return [
        f"{score.feature} (leak)" if score.leak else score.feature,
        score.kind,
        score.values,
        score.once / score.values,
        score.missing,
        1000 * score.relevance,
        1000 * score.low,
        1000 * score.high,
        1000 * score.expected,
        score.z,
        score.q,
        score.share,
        *(of.get(score.feature) for of in places.values()),
    ]


def _has_pairs(feature: str, pairs: Sequence[PairScore]) -> bool:
    return any(feature in (pair.first, pair.second) for pair in pairs)


def _overlaps(names: Sequence[str], pairs: Sequence[PairScore]) -> str:
    known = {frozenset((pair.first, pair.second)): pair.overlap for pair in pairs}
    return heat_map(
        names,
        [[1.0 if one == other else known[frozenset((one, other))] for other in names] for one in names],
        "overlap",
    )


def _pairs(pairs: Sequence[PairScore], most: int = 200) -> str:
    shown = {(pair.first, pair.second): pair for pair in pairs[:most]}
    shown |= {(pair.first, pair.second): pair for pair in sorted(pairs, key=lambda pair: -pair.overlap)[: most // 2]}
    return table(
        ["first", "second", "values", "once", "synergy", "relevance", "overlap", "gain", "q"],
        [
            [
                pair.first,
                pair.second,
                pair.values,
                pair.once / pair.values,
                1000 * pair.synergy,
                1000 * pair.relevance,
                pair.overlap,
                None if pair.gain is None else 1000 * pair.gain,
                pair.q,
            ]
            for pair in shown.values()
        ],
    )
