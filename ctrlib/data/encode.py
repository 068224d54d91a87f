"""Encode raw rows with a fitted schema: the one function that preparation and prediction on raw rows share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import polars as pl

from ctrlib.data.cells import check_columns, checks, fitted_number, label, number, text, without_bad_rows
from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.raw import RawTable, naming
from ctrlib.data.scan import OnBadRow
from ctrlib.data.vocabulary import load_vocabularies, load_vocabulary
from ctrlib.schema import (
    MISSING_ID,
    NUM_RESERVED_IDS,
    OOV_ID,
    Categorical,
    MultiValued,
    Numeric,
    Schema,
    SchemaError,
    SparseFeature,
    vocabulary_of,
)

MIN_UNSEEN = 10  # cells that have to be unseen, all of them, before a column is taken for a wrong one


def encode(
    raw: RawTable,
    schema: Schema,
    vocab_folder: Path,
    *,
    require_labels: bool = False,
    missing_labels: Literal["raise", "mask"] = "raise",
    label_positive: Mapping[str, str] | None = None,
    on_bad_row: OnBadRow = "raise",
) -> pl.LazyFrame:
    """The rows of a raw table as the loader wants them, lazily and in their order.

    Columns are found by name: their order does not matter and columns that the schema does not name are left out.
    A value that train did not hold gets the out-of-vocabulary id, a cell without value the missing id.

    Args:
        raw: from `read_raw`.
        schema: fitted.
        vocab_folder: the `vocab` folder that lies beside the schema.
        require_labels: also check and give labels, weight and group; otherwise only the features.
        missing_labels: "mask" gives NaN where a label is missing.
        label_positive: label -> text of its positive class, for labels that are text.
        on_bad_row: "skip" leaves bad rows out and counts them in `raw.skipped`.

    Raises:
        SchemaError: a column is missing or has another type than before.
        DataError: a cell is bad; the message names row and column.
    """
    check_columns(raw, schema, with_labels=require_labels)
    options: dict[str, Any] = {"missing_labels": missing_labels, "label_positive": label_positive}
    found = checks(schema, raw.dtypes, with_labels=require_labels, **options)
    frame = without_bad_rows(raw, found, on_bad_row)
    checked = dataclasses.replace(raw, frame=frame)
    groups = fit_groups([checked], schema.group) if require_labels else None
    return encode_checked(
        checked, schema, vocab_folder, with_labels=require_labels, label_positive=label_positive, groups=groups
    )


def encode_checked(
    raw: RawTable,
    schema: Schema,
    vocab_folder: Path,
    *,
    with_labels: bool,
    label_positive: Mapping[str, str] | None = None,
    groups: pl.Series | None = None,
) -> pl.LazyFrame:
    """`encode` for a table without bad rows. `groups`: the sorted texts of groups that are not integers."""
    if not schema.is_fitted:
        raise SchemaError("the schema is not fitted: use the one that `prepare` returns or stores in schema.json")
    dtypes = raw.dtypes
    vocabularies = load_vocabularies(vocab_folder, schema)
    _refuse_ids_as_floats(raw, schema, vocabularies)
    _refuse_retyped(raw, schema)
    enums = {name: pl.Enum(values) for name, values in vocabularies.items()}
    columns = []
    for feature in schema.features:
        dtype = dtypes[feature.name]
        if isinstance(feature, Numeric):
            columns.append(fitted_number(feature, dtype).cast(pl.Float32).alias(feature.name))
        else:
            columns.append(_ids(feature, dtype, enums[vocabulary_of(feature)]).alias(feature.name))
    if with_labels:
        for name in schema.labels:
            value = label(name, dtypes[name], (label_positive or {}).get(name))
            columns.append(value.fill_null(float("nan")).cast(pl.Float32).alias(name))
        if schema.weight is not None:
            columns.append(number(schema.weight, dtypes[schema.weight]).cast(pl.Float32).alias(schema.weight))
        if schema.group is not None:
            columns.append(_group(schema.group, dtypes[schema.group], groups).alias(GROUP_COLUMN))
    return raw.frame.select(columns)


def _ids(feature: SparseFeature, dtype: pl.DataType, values: pl.Enum) -> pl.Expr:
    raw_text = text(feature, dtype)
    if isinstance(feature, Categorical):
        return pl.when(raw_text.is_null()).then(pl.lit(MISSING_ID, pl.Int32)).otherwise(_id(raw_text, values))
    empty = [MISSING_ID] if isinstance(feature, MultiValued) else []
    return raw_text.list.eval(_id(pl.element(), values)).fill_null(pl.lit(empty, pl.List(pl.Int32)))


def _id(value: pl.Expr, values: pl.Enum) -> pl.Expr:
    # A cast to an enumeration of the vocabulary is a hash look-up that keeps the order of rows; unknown text is null.
    position = value.cast(values, strict=False).to_physical().cast(pl.Int32)
    return (position + NUM_RESERVED_IDS).fill_null(OOV_ID)


def _group(name: str, dtype: pl.DataType, groups: pl.Series | None) -> pl.Expr:
    if groups is None:
        return pl.col(name).cast(pl.Int64)
    return text(Categorical(name), dtype).cast(pl.Enum(groups)).to_physical().cast(pl.Int64).fill_null(-1)


def fit_groups(tables: Iterable[RawTable], group: str | None) -> pl.Series | None:
    """None if all groups are integers; else their texts over all tables, sorted. Rows without group form one group.

    Unlike ids, groups are no input of a model, so those of valid and test may be looked at.
    """
    if group is None:
        return None
    columns = [table.frame.select(text(Categorical(group), table.dtypes[group]).alias("value")) for table in tables]
    integer = (pl.col("value").cast(pl.Int64, strict=False).cast(pl.String) == pl.col("value")).fill_null(False)
    if all(column.select(integer.all()).collect(engine="streaming").item() for column in columns):
        return None
    return pl.concat(columns).unique().collect(engine="streaming")["value"].drop_nulls().sort()


def _refuse_ids_as_floats(raw: RawTable, schema: Schema, vocabularies: Mapping[str, pl.Series]) -> None:
    """Text such as "17.0" for ids that were "17": every value would be out of vocabulary, silently."""
    dtypes = raw.dtypes
    suspects = [
        feature.name
        for feature in schema.sparse
        if isinstance(feature, Categorical)
        and not feature.bucket
        and dtypes[feature.name] == pl.String
        and not vocabularies[vocabulary_of(feature)].head(1000).str.ends_with(".0").any()
    ]

    def like_floats(rows: pl.LazyFrame, columns: list[str]) -> list[str]:
        verdicts = [
            pl.col(column).str.contains(r"^-?\d+\.0$").all(ignore_nulls=True) & (pl.col(column).count() > 0)
            for column in columns
        ]
        if not verdicts:
            return []
        with naming(raw.name):
            found = rows.select(verdicts).collect(engine="streaming")
        return [column for column in columns if found[column][0]]

    # The first rows acquit nearly every column; only what is left is read in full.
    for column in like_floats(raw.frame, like_floats(raw.frame.head(1000), suspects)):
        raise SchemaError(
            f"{raw.name}: column {column!r} holds ids that look like floats (such as 17.0), expected the text that "
            "train has (such as 17): write the column as integers"
        )


def _refuse_retyped(raw: RawTable, schema: Schema) -> None:
    """True for ids that were "1", or 2139 for a postcode that was "02139": unseen values that nobody meant."""
    expected, types = (schema.raw_format or {}).get("types", {}), raw.types
    for feature in schema.sparse:
        name = feature.name
        pair = {types[name], expected.get(name, types[name])}
        if not isinstance(feature, Categorical) or feature.bucket or len(pair) == 1 or pair & {"parsed", "null"}:
            continue
        present = text(feature, raw.dtypes[name]).is_not_null().any()  # pandas makes floats of a column without values
        with naming(raw.name):
            if not raw.frame.select(present).collect(engine="streaming").item():
                continue
        raise SchemaError(
            f"{raw.name}: column {name!r} holds values of kind {types[name]} ({raw.dtypes[name]}), in training they "
            f"were of kind {expected[name]}: cast the column to what it was"
        )


def check_unknown(
    raw: RawTable, counts: Mapping[str, Mapping[str, int]], schema: Schema, vocab_folder: Path
) -> list[str]:
    """Look at single-valued columns of which no value at all is known to the vocabulary.

    New users or items are normal and score; but where all values of train are integers and none of these is, or all
    are "true" and "false" and none of these is, the column is another one, or is written otherwise.

    Args:
        raw: the rows.
        counts: of `count_ids`.
        schema: fitted.
        vocab_folder: the `vocab` folder that lies beside the schema.

    Returns:
        A sentence for each such column that may be right, for a person to judge.

    Raises:
        SchemaError: a column cannot be right; the message shows values that came and values that were expected.
    """
    remarks = []
    for feature in schema.sparse:
        found = counts[feature.name]
        if not isinstance(feature, Categorical) or found["unseen"] < max(MIN_UNSEEN, found["ids"] - found["missing"]):
            continue
        known = load_vocabulary(vocab_folder, vocabulary_of(feature), schema)
        value = text(feature, raw.dtypes[feature.name]).alias("value")
        came = raw.frame.select(value.drop_nulls()).unique(maintain_order=True).head(MIN_UNSEEN).collect()["value"]
        remark = (
            f"{raw.name}: column {feature.name!r} holds {found['unseen']:,} values and train knew none of them: "
            f"it has {came.head(3).to_list()}, train has values such as {known.head(3).to_list()}"
        )
        for form in (r"^-?\d+$", r"^(true|false)$"):
            if len(known) and known.str.contains(form).all() and not came.str.contains(form).any():
                raise SchemaError(f"{remark}: give the right column, written as in training")
        remarks.append(f"{remark}; is it the right column, written as in training?")
    return remarks


def count_ids(encoded: pl.LazyFrame, schema: Schema) -> dict[str, dict[str, int]]:
    """Sparse feature -> numbers of "missing" cells (empty lists too), of "unseen" ids, and of all "ids"."""
    columns: list[pl.Expr] = []
    for feature in schema.sparse:
        column = pl.col(feature.name)
        ids = column if isinstance(feature, Categorical) else column.list.explode(empty_as_null=False, keep_nulls=False)
        if isinstance(feature, Categorical | MultiValued):
            first = column if isinstance(feature, Categorical) else column.list.first()
            missing = (first == MISSING_ID).sum()
        else:
            missing = (column.list.len() == 0).sum()
        counts = {"missing": missing, "unseen": (ids == OOV_ID).sum(), "ids": ids.len()}
        columns += [count.alias(f"{feature.name} {what}") for what, count in counts.items()]
    found: dict[str, Any] = encoded.select(columns).collect(engine="streaming").row(0, named=True) if columns else {}
    return {
        feature.name: {what: int(found[f"{feature.name} {what}"] or 0) for what in ("missing", "unseen", "ids")}
        for feature in schema.sparse
    }
