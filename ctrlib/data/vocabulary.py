"""Fit on train what the schema leaves open, vocabularies and the parameters of numbers, and store it.

A vocabulary is an explicit table `vocab/<name>.parquet` with columns value, id and count: most frequent value first,
equal counts in the order of their text, ids counted up from 3 (`ctrlib.schema` reserves the others).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import polars as pl

from ctrlib.data.cells import number, text, transformed
from ctrlib.schema import NUM_RESERVED_IDS, Categorical, Numeric, Schema, SchemaError, SparseFeature, vocabulary_of


def fit(train: pl.LazyFrame, schema: Schema, dtypes: Mapping[str, pl.DataType], folder: Path) -> Schema:
    """The fitted copy of `schema`; writes the vocabularies into `folder`.

    Memory is bounded by the largest vocabulary: one vocabulary is counted at a time, numbers in one streaming pass.

    Raises:
        SchemaError: features that share a vocabulary disagree on what goes into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes, hashes = {}, {}
    for name, features in schema.vocabularies.items():
        vocabulary = count_values(train, features, dtypes)
        vocabulary.write_parquet(vocabulary_path(folder, name))
        sizes[name] = len(vocabulary) + NUM_RESERVED_IDS
        hashes[name] = hash_values(vocabulary["value"])
    parameters = fit_numbers(train, schema.dense, dtypes)
    fitted = tuple(
        dataclasses.replace(feature, parameters=parameters[feature.name])
        if isinstance(feature, Numeric)
        else dataclasses.replace(feature, num_embeddings=sizes[vocabulary_of(feature)])
        for feature in schema.features
    )
    return dataclasses.replace(schema, features=fitted, vocabulary_hashes=hashes)


def count_values(
    train: pl.LazyFrame, features: tuple[SparseFeature, ...], dtypes: Mapping[str, pl.DataType]
) -> pl.DataFrame:
    """The vocabulary of features that share one: value, id, count."""
    rules = {feature.name: (feature.min_count, feature.max_values) for feature in features}
    if len(set(rules.values())) > 1:
        raise SchemaError(
            f"features that share vocabulary {vocabulary_of(features[0])!r} must agree on (min_count, max_values), "
            f"got {rules}"
        )
    columns = []
    for feature in features:
        value = text(feature, dtypes[feature.name])
        value = value if isinstance(feature, Categorical) else value.explode()
        columns.append(train.select(value.alias("value")))
    min_count, max_values = rules[features[0].name]
    values = (
        pl.concat(columns)
        .group_by("value")
        .agg(count=pl.len().cast(pl.Int64))
        .filter(pl.col("value").is_not_null() & (pl.col("count") >= min_count))
        .collect(engine="streaming")
        .sort("count", "value", descending=[True, False])
    )
    if max_values is not None:
        values = values.head(max_values)
    ids = pl.int_range(NUM_RESERVED_IDS, len(values) + NUM_RESERVED_IDS, dtype=pl.Int32, eager=True)
    return values.select("value", ids.alias("id"), "count")


def fit_numbers(
    train: pl.LazyFrame, features: tuple[Numeric, ...], dtypes: Mapping[str, pl.DataType]
) -> dict[str, dict[str, float]]:
    """Feature name -> parameters of its transform; a column without any number counts as all zeros."""
    if not features:
        return {}
    # Two selects, so that each cell is parsed once and not once for each statistic.
    columns = [transformed(number(f.name, dtypes[f.name]), f.transform).alias(f.name) for f in features]
    statistics = []
    for x in (pl.col(feature.name) for feature in features):
        statistics += [x.mean().name.suffix(" mean"), x.std(ddof=0).name.suffix(" sd")]
        statistics += [x.min().name.suffix(" min"), x.max().name.suffix(" max")]
    found = train.select(columns).select(statistics).collect(engine="streaming").row(0, named=True)
    fitted = {}
    for feature in features:
        mean, sd, low, high = (float(found[f"{feature.name} {what}"] or 0.0) for what in ("mean", "sd", "min", "max"))
        if feature.transform in ("standard", "log_standard"):
            # A constant column has no scale: 1 maps it to 0, and what differs from it in other splits stays finite.
            fitted[feature.name] = {"fill": 0.0, "mean": mean, "sd": sd if sd > 0 and math.isfinite(sd) else 1.0}
        elif feature.transform == "minmax":
            span = high - low
            fitted[feature.name] = {"fill": (mean - low) / span if span > 0 else 0.0, "min": low, "max": high}
        else:
            fitted[feature.name] = {"fill": mean}
    return fitted


def vocabulary_path(folder: Path, name: str) -> Path:
    """Where a vocabulary lies; characters that a file name cannot have are percent-encoded.

    >>> vocabulary_path(Path("vocab"), "item").as_posix(), vocabulary_path(Path("vocab"), "a/b").as_posix()
    ('vocab/item.parquet', 'vocab/a%2Fb.parquet')
    """
    return folder / f"{quote(name, safe=' !#$&()+,;=@[]^{}~')}.parquet"


def hash_values(values: pl.Series) -> str:
    """16 hexadecimal digits that say which values have which ids."""
    return hashlib.sha256(json.dumps(values.to_list(), ensure_ascii=False).encode()).hexdigest()[:16]


def load_vocabularies(folder: Path, schema: Schema) -> dict[str, pl.Series]:
    """Vocabulary name -> its values in the order of their ids.

    Raises:
        SchemaError: as in `load_vocabulary`.
    """
    return {name: load_vocabulary(folder, name, schema) for name in schema.vocabularies}


def load_vocabulary(folder: Path, name: str, schema: Schema) -> pl.Series:
    """The values of one vocabulary in the order of their ids.

    Raises:
        SchemaError: it is missing or is not the one that the schema was fitted with.
    """
    path = vocabulary_path(folder, name)
    if not path.is_file():
        raise SchemaError(f"{path} is missing, expected the vocabulary {name!r}: prepare the data again")
    try:
        values = pl.read_parquet(path, glob=False)["value"]
    except pl.exceptions.PolarsError as error:
        raise SchemaError(f"{path} cannot be read ({error}): copy it, or prepare the data, again") from error
    expected = (schema.vocabulary_hashes or {}).get(name)
    if hash_values(values) != expected:
        raise SchemaError(
            f"{path} has hash {hash_values(values)}, the schema expects {expected}: it belongs to other data or "
            "was changed; use the folder that the schema came with"
        )
    return values
