"""Say which schema is to be fitted: what the user named, and a guess, with its reason, for every other column."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ctrlib.data.cells import shortened
from ctrlib.data.infer import Guess, infer_features
from ctrlib.data.scan import check_on_bad_row
from ctrlib.data.table import RawTable
from ctrlib.errors import ArgumentError
from ctrlib.schema import (
    Categorical,
    Feature,
    MultiValued,
    Numeric,
    Schema,
    SchemaError,
    SparseFeature,
    vocabulary_of,
)


def check_arguments(
    features: tuple[Feature, ...],
    labels: tuple[str, ...],
    min_count: int | None,
    max_values: int | None,
    on_bad_row: str,
    missing_labels: str,
    label_positive: Mapping[str, str] | None,
) -> None:
    """Refuse at once what would otherwise be ignored, or show late.

    Raises:
        ValueError, SchemaError: as said.
    """
    check_on_bad_row(on_bad_row)
    if missing_labels not in ("raise", "mask"):
        raise ArgumentError(f"missing_labels is {missing_labels!r}, expected one of ('raise', 'mask')")
    unknown = [name for name in label_positive or {} if name not in labels]
    if unknown:
        raise SchemaError(f"label_positive names {unknown}, expected labels, which are {list(labels)}")
    limits = [("min_count", min_count), ("max_values", max_values)]
    for feature in features:
        named = {name: getattr(feature, name, None) for name in ("min_count", "max_values", "max_length")}
        limits += [(f"{name} of feature {feature.name!r}", limit) for name, limit in named.items()]
    for feature in features:
        fitted = "parameters" if isinstance(feature, Numeric) else "num_embeddings"
        if getattr(feature, fitted, None) is not None:
            raise SchemaError(
                f"feature {feature.name!r} has {fitted}={getattr(feature, fitted)!r}, which are fitted on train: leave "
                "them out"
            )
    for name, limit in limits:
        if limit is not None and limit < 1:
            raise ArgumentError(f"{name} is {limit}, expected at least 1")


def describe(
    table: RawTable,
    given: tuple[Feature, ...],
    labels: tuple[str, ...],
    weight: str | None,
    group: str | None,
    split_by: str | None,
    ignore: tuple[str, ...],
    rare: Mapping[str, Any],
) -> tuple[Schema, dict[str, str], dict[str, str]]:
    """The schema to fit; for every column of the table, which is that of train, why it is what it is; and, for those of
    which the guess is doubtful, a remark.

    Raises:
        SchemaError: columns or vocabularies are named that there are not, or columns twice.
    """
    names = [feature.name for feature in given]
    wanted: list[str] = [*names, *labels, *(name for name in (weight, group) if name is not None)]
    unknown = [name for name in dict.fromkeys([*wanted, *ignore]) if name not in table.dtypes]
    if unknown:
        hint = "; it has one column only, so say separator=... (--separator)" if len(table.dtypes) == 1 else ""
        if set(unknown) & set(labels):
            hint += "; labels=... (--label) names the column that holds the label"
        near = difflib.get_close_matches(unknown[0], table.dtypes, n=3, cutoff=0.0)
        raise SchemaError(
            f"{table.name} has no columns {unknown}, the closest are {near}, expected some of "
            f"{shortened(list(table.dtypes))}{hint}"
        )
    ignored_twice = sorted({*names, *labels, weight or ""} & set(ignore))
    if ignored_twice:
        raise SchemaError(f"columns {ignored_twice} are named in ignore and also as feature, label or weight")
    not_features = {**dict.fromkeys(labels, "label"), **dict.fromkeys(ignore, "ignored: as told")}
    if weight is not None:
        not_features[weight] = "weight"
    if split_by is not None and split_by not in names:
        not_features[split_by] = "ignored: the split goes by it"
    to_infer = [name for name in table.dtypes if name not in not_features and name not in names]
    sharers = _sharers(given, list(table.dtypes))
    inferred = infer_features(table, to_infer) if to_infer else []
    # What others share a vocabulary with has ids, whatever it looks like.
    inferred = [
        Guess(guess.name, Categorical(guess.name), f"{sharers[guess.name].name!r} shares its vocabulary")
        if guess.name in sharers and not isinstance(guess.feature, Categorical | MultiValued)
        else guess
        for guess in inferred
    ]
    reasons = {**dict.fromkeys(names, "as told"), **not_features, **{guess.name: guess.reason for guess in inferred}}
    found = []
    for name, feature, *_ in inferred:
        if feature is not None and not isinstance(feature, Numeric):
            # Features that share a vocabulary must agree.
            limits = {key: getattr(sharers[name], key) for key in rare} if name in sharers else rare
            feature = dataclasses.replace(feature, **limits)
        if feature is not None:
            found.append(feature)
    if not given and not found:
        why = "; ".join(f"{name!r} is {reason}" for name, reason in reasons.items()) or "there is none"
        raise SchemaError(f"{table.name}: no column can be a feature: {why}. Name columns that mean something")
    schema = Schema((*given, *found), labels, weight, group)
    doubts = {guess.name: guess.remark for guess in inferred if guess.remark}
    return schema, {name: reasons[name] for name in table.dtypes}, doubts


def _sharers(given: tuple[Feature, ...], columns: list[str]) -> dict[str, SparseFeature]:
    """Vocabulary -> a feature that shares it, for vocabularies of other features.

    Raises:
        SchemaError: nothing else has a vocabulary of that name, so it is misspelt.
    """
    sparse = [feature for feature in given if not isinstance(feature, Numeric)]
    users = Counter(vocabulary_of(feature) for feature in sparse)
    sharers = {}
    for feature in sparse:
        name = vocabulary_of(feature)
        if name == feature.name or users[name] > 1:
            continue
        numeric = any(other.name == name for other in given)
        if numeric or name not in columns:
            known = sorted({*columns, *users} - {name, feature.name})
            close = difflib.get_close_matches(name, known, n=3) or shortened(known)
            what = "is numeric and has no vocabulary" if numeric else "is neither a column nor another's vocabulary"
            raise SchemaError(f"feature {feature.name!r} has vocabulary={name!r}, which {what}: did you mean {close}?")
        sharers[name] = feature
    return sharers
