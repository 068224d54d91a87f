"""What is wrong, or suspicious, about columns: each finding with its numbers, and the flag that acts on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ctrlib.ranking.chosen import LEVEL
from ctrlib.ranking.counts import Cells, JointCounts
from ctrlib.ranking.null import null_table
from ctrlib.ranking.pairs import PairScore
from ctrlib.ranking.relevance import Score, benjamini_hochberg
from ctrlib.ranking.source import missing_key
from ctrlib.ranking.spill import AnyCounts, side_by_side
from ctrlib.schema import MISSING_ID, OOV_ID, Categorical, Feature, MultiValued, Numeric, Schema
from ctrlib.schema import Sequence as History

Array = npt.NDArray[Any]
Kind = Literal["leak", "constant", "near_unique", "many_new_values", "duplicate", "drift", "missing"]
NEAR_UNIQUE = 0.5  # share of the rows whose value no other row has
NEW_VALUES = 0.2  # share of the ids of a later split that train does not have
DUPLICATE = 0.98  # overlap, both ways round
RARE = 10  # rows of train and the later split, below which values are one in the test of drift
DRIFT = 1e-3  # nats, from which on a significant drift is worth a word
MISSING = 0.05  # share of missing cells that may tell something
SHARE = 0.5  # of what a feature tells that its missing cells tell alone


@dataclass(frozen=True)
class Finding:
    """One thing about one column (or two), with the numbers that show it, and what to do, or what could be done."""

    kind: Kind
    feature: str
    said: str
    evidence: dict[str, Any]
    flag: str


def findings(
    schema: Schema,
    found: Mapping[str, Sequence[Score]],
    pairs: Sequence[PairScore],
    joints: Mapping[str, Mapping[str, AnyCounts]],
    drifts: Sequence[Finding] = (),
) -> list[Finding]:
    """All of them, the gravest kind first.

    Args:
        schema: of the data.
        found: label -> the scores of features.
        pairs: of one label, for what features tell about each other.
        joints: label -> feature -> counts.
        drifts: from `drift`.
    """
    features = {feature.name: feature for feature in schema.features}
    all_scores = [(label, score) for label, scores in found.items() for score in scores]
    first = {score.feature: score for _, score in reversed(all_scores)}
    listed = [_leak(label, score) for label, score in all_scores if score.leak]
    listed += [_constant(score) for score in first.values() if score.values == 1]
    listed += [
        _near_unique(score)
        for score in first.values()
        if score.values > 1
        and score.once / score.rows >= NEAR_UNIQUE
        and not isinstance(features[score.feature], Numeric)
    ]
    listed += _duplicates(pairs, first)
    listed += drifts
    listed += _missing(all_scores, joints, features)
    return listed


def _leak(label: str, score: Score) -> Finding:
    return Finding(
        "leak",
        score.feature,
        f"tells {score.share:.1%} of what can be told about {label}: is it known before the label is?",
        {"label": label, "share": score.share, "relevance": score.relevance, "values": score.values},
        f"--ignore {score.feature}",
    )


def _constant(score: Score) -> Finding:
    what = "has no value in any row" if score.missing == 1 else "has the same value in all rows"
    return Finding("constant", score.feature, what, {"rows": score.rows}, f"--ignore {score.feature}")


def _near_unique(score: Score) -> Finding:
    share = score.once / score.rows
    return Finding(
        "near_unique",
        score.feature,
        f"{share:.0%} of the rows have a value that no other row has ({score.values:,} values in {score.rows:,} rows)",
        {"once": score.once, "values": score.values, "rows": score.rows},
        f"--ignore {score.feature}" if score.once == score.values else "--min-count 2",
    )


def _duplicates(pairs: Sequence[PairScore], scores: Mapping[str, Score]) -> list[Finding]:
    """Features that each follow from the other; the one with fewer values missing, then with more of them, stays."""
    listed: list[Finding] = []
    gone: set[str] = set()
    for pair in sorted(pairs, key=lambda pair: -pair.overlap):
        one, other = scores[pair.first], scores[pair.second]
        most, least = max(one.entropy, other.entropy), min(one.entropy, other.entropy)
        # One follows from the other where the overlap is 1; both do if they are as uncertain.
        if pair.overlap < DUPLICATE or least < DUPLICATE * most or {pair.first, pair.second} & gone:
            continue
        stays, goes = (one, other) if one.entropy >= other.entropy else (other, one)
        gone.add(goes.feature)
        listed.append(
            Finding(
                "duplicate",
                goes.feature,
                f"follows from {stays.feature}, and that from it (overlap {pair.overlap:.3f})",
                {"of": stays.feature, "overlap": pair.overlap, "entropies": [goes.entropy, stays.entropy]},
                f"--ignore {goes.feature}",
            )
        )
    return listed


def _missing(
    scores: Sequence[tuple[str, Score]],
    joints: Mapping[str, Mapping[str, AnyCounts]],
    features: Mapping[str, Feature],
) -> list[Finding]:
    """Columns whose missing cells tell at least half of what the column tells: that may be how the data was joined."""
    found = []
    for label, score in scores:
        if not MISSING <= score.missing <= 1 - MISSING or score.drawn:
            continue
        joint = joints[label][score.feature]
        gone = joint.of_key(missing_key(features[score.feature]))
        both = np.stack([joint.total() - gone, gone])
        cells = Cells.of(both.sum(axis=1), both[:, 1])
        null = cells.null(null_table(cells.num_rows, cells.num_positives))
        told = cells.information - null.mean
        p = null.p_value(cells.information)
        if p < LEVEL / len(scores) and told >= SHARE * score.relevance:
            with_value, without = (int(positives) / int(rows) for rows, positives in zip(both.sum(axis=1), both[:, 1]))
            found.append(
                Finding(
                    "missing",
                    score.feature,
                    f"is missing in {score.missing:.0%} of the rows, of which {without:.2%} have {label}, and "
                    f"{with_value:.2%} of the others: that alone tells {told / score.relevance:.0%} of what it tells",
                    {
                        "label": label,
                        "missing": score.missing,
                        "positive_if_missing": without,
                        "positive_otherwise": with_value,
                        "relevance_of_missing": told,
                        "p": p,
                    },
                    f"--ignore {score.feature}, if cells will be missing for other reasons later",
                )
            )
    return found


def drift(
    before: Mapping[str, AnyCounts], after: Mapping[str, AnyCounts], features: Sequence[Feature], later: str
) -> list[Finding]:
    """How features are distributed otherwise in a later split, by the null that labels have.

    The split that a row is in takes the place of the label. Values with fewer than `RARE` rows in both, and those that
    train does not have, are one value: which of them are in the vocabulary depends on the split.

    Args:
        before: feature -> its counts in the split that is ranked.
        after: the same of the later one.
        features: those with one value per row are looked at.
        later: name of the later split.
    """
    found, p_values, new = [], [], []
    for feature in features:
        if isinstance(feature, MultiValued | History):
            continue
        kept, fresh = _beside(before[feature.name], after[feature.name], feature)
        rows, later_rows = kept[:, 0].sum(), kept[:, 1].sum()
        share = float(fresh[1] / later_rows) if not isinstance(feature, Numeric) else 0.0
        if share >= NEW_VALUES and share > 2 * fresh[0] / rows:
            new.append(_new_values(feature.name, later, share))
        cells = Cells.of(kept.sum(axis=1), kept[:, 1])
        null = cells.null(null_table(cells.num_rows, cells.num_positives))
        p_values.append(null.p_value(cells.information))
        told = cells.information - null.mean
        found.append(
            Finding(
                "drift",
                feature.name,
                f"is distributed otherwise in {later}: {1000 * told:.2f} thousandths of a nat tell the splits apart "
                f"(z {null.z(cells.information):.0f})",
                {"split": later, "relevance": told, "z": null.z(cells.information), "p": p_values[-1]},
                f"--ignore {feature.name}",
            )
        )
    drifted = [
        dataclasses.replace(one, evidence={**one.evidence, "q": q})
        for one, q in zip(found, benjamini_hochberg(p_values))
        if q < LEVEL and one.evidence["relevance"] >= DRIFT
    ]
    return [*sorted(drifted, key=lambda one: -one.evidence["relevance"]), *new]


def _beside(before: AnyCounts, after: AnyCounts, feature: Feature) -> tuple[Array, Array]:
    """Rows of each value in both splits, (V, 2), those that are one in the test of drift as one; and of new values."""
    kept, together, fresh = [], np.zeros(2, np.int64), np.zeros(2, np.int64)
    for some, others in side_by_side(before, after):
        joint = JointCounts.merge(
            JointCounts(one.keys, np.stack([rows * (side == 0), rows * (side == 1)], axis=1))
            for side, one in enumerate((some, others))
            for rows in [one.counts[:, 0] + one.counts[:, 1]]
        )
        counts = joint.counts
        is_new = (joint.keys == OOV_ID) if isinstance(feature, Categorical) else counts[:, 0] == 0
        rare = (counts.sum(axis=1) < RARE) & (joint.keys != MISSING_ID)
        if not isinstance(feature, Numeric):
            rare |= is_new
        kept.append(counts[~rare])
        together += counts[rare].sum(axis=0)
        fresh += counts[is_new].sum(axis=0)
    return np.concatenate([*kept, together[None]]), fresh


def _new_values(name: str, later: str, share: float) -> Finding:
    return Finding(
        "many_new_values",
        name,
        f"{share:.0%} of the rows of {later} have values that train does not have: values keep coming",
        {"split": later, "share": share},
        "--min-count 2",
    )
