"""Fit on train what the schema leaves open, vocabularies, forms of raw ids and parameters of numbers, and store it.

A vocabulary is an explicit table `vocab/<name>.parquet` with columns value, id and count: most frequent value first,
equal counts in the order of their text, ids counted up from 3 (`ctrlib.schema` reserves the others). Ids that were kept
from an earlier preparation (`ctrlib.data.like`) have the order of that one, and the counts of this one's train: what
depends on frequency reads the counts, or asks `check_order`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ctrlib.data.cells import holds, is_raw_integer, number, text, transformed
from ctrlib.data.moments import SMALLEST, moments
from ctrlib.data.table import Plan, RawTable
from ctrlib.manifest import check_file, refuse_pickle
from ctrlib.schema import (
    NUM_RESERVED_IDS,
    Categorical,
    Feature,
    Numeric,
    RawForm,
    RawId,
    Schema,
    SchemaError,
    VocabularyFeature,
    vocabulary_of,
)

Vocabularies = Mapping[str, tuple[VocabularyFeature, ...]]  # name -> the features whose values it has
# How often each value comes up in the tables: a name and a lazy frame of value and count, one vocabulary at a time.
Count = Callable[[Sequence[RawTable], Vocabularies], Iterable[tuple[str, pl.LazyFrame]]]


def counted(column: pl.LazyFrame) -> pl.LazyFrame:
    """Value and count of a column `value`."""
    return column.group_by("value").agg(count=pl.len().cast(pl.Int64))


def fit(train: RawTable, schema: Schema, folder: Path, count: Count) -> Schema:
    """The fitted copy of `schema`; writes the vocabularies into `folder`.

    Memory is bounded by the largest vocabulary: one vocabulary is counted at a time.

    Raises:
        SchemaError: features that share a vocabulary disagree on what goes into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes, hashes = {}, {}
    limits = {name: _limits(features) for name, features in schema.vocabularies.items()}
    with ThreadPoolExecutor(1) as thread:
        fitting = thread.submit(fit_numbers, train, schema.dense)
        for name, counts in count([train], schema.vocabularies):
            vocabulary = in_order(counts, *limits[name])
            vocabulary.write_parquet(vocabulary_path(folder, name))
            sizes[name] = len(vocabulary) + NUM_RESERVED_IDS
            hashes[name] = hash_values(vocabulary["value"])
        parameters = fitting.result()
    forms = raw_forms(train, [feature for feature in schema.sparse if isinstance(feature, RawId)])

    def fitted(feature: Feature) -> Feature:
        if isinstance(feature, Numeric):
            return dataclasses.replace(feature, parameters=parameters[feature.name])
        if isinstance(feature, RawId):
            return dataclasses.replace(feature, form=feature.form or forms[feature.name])
        return dataclasses.replace(feature, num_embeddings=sizes[vocabulary_of(feature)])

    features = tuple(fitted(feature) for feature in schema.features)
    return dataclasses.replace(schema, features=features, vocabulary_hashes=hashes)


def raw_forms(train: RawTable, features: Sequence[RawId]) -> dict[str, RawForm]:
    """Feature name -> form of its ids; a column without any value counts as integers.

    Raises:
        SchemaError: integers are written as floats, so that no id would be what it is elsewhere.
    """
    if not features:
        return {}
    dtypes = train.dtypes
    integer = [is_raw_integer(f.name, dtypes[f.name]).all().alias(f.name) for f in features]
    found = train.gather(lambda piece: piece.select(integer))
    forms: dict[str, RawForm] = {f.name: "integer" if found[f.name].all() else "text" for f in features}
    for name in [name for name, form in forms.items() if form == "text"]:
        if not holds(train, ~pl.col(name).str.contains(r"^-?\d+\.0$")):
            row, value = train.first(pl.col(name).is_not_null(), name)
            raise SchemaError(
                f"{train.place(row)}, column {name!r} holds {value!r}, and all its values look like floats; expected "
                "integers, or text, for raw ids: write the column as integers"
            )
    return forms


def values_of(features: tuple[VocabularyFeature, ...], dtypes: Mapping[str, pl.DataType]) -> Plan:
    """What makes of a piece all values of features that share a vocabulary, as one column `value`."""
    texts = [text(feature, dtypes[feature.name]) for feature in features]
    lists = [value if isinstance(f, Categorical) else value.explode() for f, value in zip(features, texts)]
    values = [value.alias("value") for value in lists]
    return lambda piece: pl.concat([piece.select(value) for value in values])


def _limits(features: tuple[VocabularyFeature, ...]) -> tuple[int, int | None]:
    rules = {feature.name: (feature.min_count, feature.max_values) for feature in features}
    if len(set(rules.values())) > 1:
        raise SchemaError(
            f"features that share vocabulary {vocabulary_of(features[0])!r} must agree on (min_count, max_values), "
            f"got {rules}"
        )
    return rules[features[0].name]


def in_order(counts: pl.LazyFrame, min_count: int, max_values: int | None) -> pl.DataFrame:
    """The vocabulary of counted values: value, id, count.

    >>> counts = pl.LazyFrame({"value": ["b", None, "c", "a"], "count": [1, 7, 2, 1]})
    >>> in_order(counts, 1, 2).rows()
    [('c', 3, 2), ('a', 4, 1)]
    """
    values = (
        counts.filter(pl.col("value").is_not_null() & (pl.col("count") >= min_count))
        .collect(engine="streaming")
        .sort("count", "value", descending=[True, False])
    )
    if max_values is not None:
        values = values.head(max_values)
    ids = pl.int_range(NUM_RESERVED_IDS, len(values) + NUM_RESERVED_IDS, dtype=pl.Int32, eager=True)
    return values.select("value", ids.alias("id"), "count")


def fit_numbers(train: RawTable, features: tuple[Numeric, ...]) -> dict[str, dict[str, float]]:
    """Feature name -> parameters of its transform; a column without any number counts as all zeros."""
    if not features:
        return {}
    dtypes = train.dtypes
    found = moments(train, {f.name: transformed(number(f.name, dtypes[f.name]), f.transform) for f in features})
    fitted = {}
    for feature in features:
        mean, sd, low, high = found[feature.name]
        if feature.transform in ("standard", "log_standard"):
            # A constant column has no scale: 1 maps it to 0, and what differs from it in other splits stays finite.
            fitted[feature.name] = {"fill": 0.0, "mean": mean, "sd": sd if sd > 0 else 1.0}
        elif feature.transform == "minmax":
            high = high if high - low >= 2.0**SMALLEST else low
            span = high - low
            fitted[feature.name] = {"fill": (mean - low) / span if span > 0 else 0.0, "min": low, "max": high}
        else:
            fitted[feature.name] = {"fill": mean}
    return fitted


def vocabulary_path(folder: Path, name: str) -> Path:
    """Where a vocabulary lies.

    >>> vocabulary_path(Path("vocab"), "item").as_posix()
    'vocab/item.parquet'
    """
    return folder / f"{file_name(name)}.parquet"


def file_name(column: str) -> str:
    """What to call a file after a column: characters that a file name cannot have are percent-encoded, and of what
    would be too long there is the beginning, with a hash.

    >>> file_name("item"), file_name("a/b"), file_name("long" * 99)[150:]
    ('item', 'a%2Fb', 'nglonglong~e01511c2de29f1ca')
    """
    encoded = quote(column, safe=" !#$&()+,;=@[]^{}~")
    if len(encoded) <= MAX_FILE_NAME:
        return encoded
    return f"{encoded[:160]}~{hashlib.sha256(column.encode()).hexdigest()[:16]}"


def hash_values(values: pl.Series) -> str:
    """16 hexadecimal digits that say which values have which ids: of their JSON, made slice by slice.

    >>> hash_values(pl.Series(["a", "b"])) == hashlib.sha256(b'["a", "b"]').hexdigest()[:16]
    True
    """
    digest = hashlib.sha256(b"[")
    for start in range(0, len(values), _SLICE):
        digest.update(((", " if start else "") + _json(values[start : start + _SLICE])).encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]


_SLICE = 1 << 20
MAX_FILE_NAME = 200  # file systems take 255 bytes; what is put before and after needs some
_ESCAPED = r'["\\\x00-\x1f]'


def _json(values: pl.Series) -> str:
    """Values as `json.dumps` writes a list, without its brackets; most have nothing to escape, and are joined."""
    if values.dtype != pl.String or values.null_count() or values.str.contains(_ESCAPED).any():
        return json.dumps(values.to_list(), ensure_ascii=False)[1:-1]
    joined: str = values.str.join('", "').item()
    return f'"{joined}"'


def check_order(folder: str | Path, schema: Schema, what: str) -> None:
    """Refuse a prepared folder whose ids are not in order of frequency, for `what` relies on it.

    Vocabularies that are not there, or without counts, as other programs may leave them, tell nothing.

    Raises:
        SchemaError: as said.
    """
    for name in schema.vocabularies:
        path = vocabulary_path(Path(folder) / "vocab", name)
        if path.is_file():
            check_file(folder, f"vocab/{path.name}")
        vocabulary = pl.scan_parquet(path, glob=False) if path.is_file() else pl.LazyFrame()
        if "count" not in vocabulary.collect_schema():
            continue
        if not vocabulary.select("count").collect()["count"].is_sorted(descending=True):
            raise SchemaError(
                f"{what} needs ids in order of frequency, and in {path} they have the order of an earlier preparation: "
                "prepare the data without like=... (--like)"
            )


def values_in(folder: Path, schema: Schema) -> Callable[[str], dict[str, None]]:
    """What gives the values of a vocabulary in the order of their ids; each is read once, when it is asked for."""

    @functools.cache
    def values_of_vocabulary(name: str) -> dict[str, None]:
        return dict.fromkeys(load_vocabulary(folder, name, schema).to_list())

    return values_of_vocabulary


def load_counts(folder: Path, name: str) -> NDArray[np.int64] | None:
    """How often train held each value of a vocabulary, in the order of their ids; None if its writer did not say."""
    path = _checked(folder, name)
    table = pl.scan_parquet(path, glob=False)
    if "count" not in table.collect_schema():
        return None
    return table.select(pl.col("count").cast(pl.Int64)).collect()["count"].to_numpy()


def _checked(folder: Path, name: str) -> Path:
    """Where a vocabulary lies, which is what was written."""
    path = vocabulary_path(folder, name)
    check_file(folder.parent, f"{folder.name}/{path.name}")
    return path


def load_vocabulary(folder: Path, name: str, schema: Schema) -> pl.Series:
    """The values of one vocabulary in the order of their ids.

    Raises:
        SchemaError: it is missing or is not the one that the schema was fitted with.
    """
    path = _checked(folder, name)
    if not path.is_file():
        raise SchemaError(f"{path} is missing, expected the vocabulary {name!r}: prepare the data again")
    try:
        values = pl.read_parquet(path, columns=["value"], glob=False)["value"]
    except pl.exceptions.PolarsError as error:
        refuse_pickle(path)
        raise SchemaError(f"{path} cannot be read ({error}): copy it, or prepare the data, again") from error
    expected = (schema.vocabulary_hashes or {}).get(name)
    if hash_values(values) != expected:
        raise SchemaError(
            f"{path} has hash {hash_values(values)}, the schema expects {expected}: it belongs to other data or "
            "was changed; use the folder that the schema came with"
        )
    return values
