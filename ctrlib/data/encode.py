"""Whole tables of raw rows with a fitted schema, lazily: what preparation writes, on one machine or many.

Rows in memory are for `ctrlib.data.encoder`; what a cell means is in `ctrlib.data.cells`, for both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ctrlib.data.cells import (
    fitted_number,
    holds,
    is_raw_integer,
    label,
    number,
    raw_id,
    text,
)
from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.table import RawTable, Total
from ctrlib.data.unknown import judge, knows_none
from ctrlib.data.vocabulary import (
    Count,
    values_of,
    vocabulary_path,
)
from ctrlib.schema import (
    MISSING_ID,
    MISSING_RAW_ID,
    OOV_ID,
    Categorical,
    MultiValued,
    Numeric,
    RawId,
    Schema,
    SchemaError,
    VocabularyFeature,
    vocabulary_of,
)

ROWS_PER_GROUP = 65_536


def encode_checked(
    rows: pl.LazyFrame,
    schema: Schema,
    known: Mapping[str, pl.DataFrame],
    *,
    with_labels: bool,
    label_positive: Mapping[str, str] | None = None,
) -> pl.LazyFrame:
    """The rows of a raw table without bad ones as the loader wants them, lazily and in their order.

    Columns are found by name: their order does not matter and columns that the schema does not name are left out.
    A value that train did not hold gets the out-of-vocabulary id, a cell without value the missing id.

    Args:
        rows: some or all rows of a table.
        schema: fitted.
        known: vocabulary name -> value and id, of all values that `rows` and the vocabulary share, in any order; and
            the same for groups that are not integers, under `GROUP_COLUMN`.
        with_labels: also give labels, weight and group.
        label_positive: label -> text of its positive class, for labels that are text.
    """
    dtypes = rows.collect_schema()
    columns = []
    for feature in schema.features:
        dtype = dtypes[feature.name]
        if isinstance(feature, Numeric):
            columns.append(fitted_number(feature, dtype).cast(pl.Float32).alias(feature.name))
        elif isinstance(feature, RawId):
            columns.append(raw_id(feature).fill_null(MISSING_RAW_ID).alias(feature.name))
        else:
            columns.append(_ids(feature, dtype, known[vocabulary_of(feature)]).alias(feature.name))
    if with_labels:
        for name in schema.labels:
            value = label(name, dtypes[name], (label_positive or {}).get(name))
            columns.append(value.fill_null(float("nan")).cast(pl.Float32).alias(name))
        if schema.weight is not None:
            columns.append(number(schema.weight, dtypes[schema.weight]).cast(pl.Float32).alias(schema.weight))
        if schema.group is not None:
            columns.append(_group(schema.group, dtypes[schema.group], known.get(GROUP_COLUMN)).alias(GROUP_COLUMN))
    return rows.select(columns)


def _ids(feature: VocabularyFeature, dtype: pl.DataType, known: pl.DataFrame) -> pl.Expr:
    raw_text = text(feature, dtype)
    if isinstance(feature, Categorical):
        return pl.when(raw_text.is_null()).then(pl.lit(MISSING_ID, pl.Int32)).otherwise(_id(raw_text, known, OOV_ID))
    empty = [MISSING_ID] if isinstance(feature, MultiValued) else []
    event = pl.element()
    ids = pl.when(event.is_null()).then(pl.lit(MISSING_ID, pl.Int32)).otherwise(_id(event, known, OOV_ID))
    return raw_text.list.eval(ids).fill_null(pl.lit(empty, pl.List(pl.Int32)))


def _id(value: pl.Expr, known: pl.DataFrame, default: int) -> pl.Expr:
    ids = known["id"]
    first = ids[0] if len(ids) else 0
    if ids.is_sorted() and first + len(ids) - 1 == (ids[-1] if len(ids) else -1):
        # A whole vocabulary: an enumeration is the smallest look-up, and positions in it are ids but for the first.
        position = value.cast(pl.Enum(known["value"]), strict=False).to_physical().cast(pl.Int32)
        return (position + first).fill_null(default)
    return value.replace_strict(known["value"], ids, default=default, return_dtype=pl.Int32)


def _group(name: str, dtype: pl.DataType, known: pl.DataFrame | None) -> pl.Expr:
    if known is None:
        return pl.col(name).cast(pl.Int64)
    return _id(text(Categorical(name), dtype), known, -1).cast(pl.Int64)


def fit_groups(tables: Sequence[RawTable], group: str | None, count: Count) -> pl.DataFrame | None:
    """None if all groups are integers; else their texts over all tables, sorted: value, id. Rows without group form
    one group.

    Unlike ids, groups are no input of a model, so those of valid and test may be looked at.
    """
    if group is None:
        return None
    value = pl.col("value")
    integer = (value.cast(pl.Int64, strict=False).cast(pl.String) == value).fill_null(False)
    texts = [table.map(values_of((Categorical(group),), table.dtypes)) for table in tables]
    if not any(holds(table, ~integer) for table in texts):
        return None
    ((_, counts),) = count(tables, {GROUP_COLUMN: (Categorical(group),)})
    values = counts.select("value").drop_nulls().collect(engine="streaming")
    return values.sort("value").with_columns(id=pl.int_range(pl.len(), dtype=pl.Int64))


def write_part(
    rows: pl.LazyFrame,
    path: Path,
    schema: Schema,
    known: Mapping[str, pl.DataFrame],
    label_positive: Mapping[str, str] | None,
) -> Totals:
    """Encode rows without bad ones into a file, and count what it holds; arguments as in `encode_checked`."""
    encoded = encode_checked(rows, schema, known, with_labels=True, label_positive=label_positive)
    encoded.sink_parquet(path, compression="snappy", row_group_size=ROWS_PER_GROUP)
    return totals_of(pl.scan_parquet(path, glob=False), schema)


def totals_of(encoded: pl.LazyFrame, schema: Schema) -> Totals:
    """Count what encoded rows hold."""
    labels = [(pl.col(name) == 1).sum().alias(f"{name} positive") for name in schema.labels]
    labels += [pl.col(name).is_not_nan().sum().alias(f"{name} present") for name in schema.labels]
    found = encoded.select(pl.len().alias("rows"), *labels).collect(engine="streaming").row(0, named=True)
    return Totals(
        int(found["rows"]),
        {name: {what: int(found[f"{name} {what}"]) for what in ("positive", "present")} for name in schema.labels},
        count_ids(encoded, schema),
    )


def totals_of_labels(raw: RawTable, schema: Schema, label_positive: Mapping[str, str] | None) -> Totals:
    """Count rows and labels of a raw table without bad rows, and no ids; arguments as in `encode_checked`."""
    wanted = {}
    for name in schema.labels:
        value = label(name, raw.dtypes[name], (label_positive or {}).get(name))
        wanted[f"{name} positive"] = Total(name, value, lambda x, rows: ((x == 1) * rows).sum())
        wanted[f"{name} present"] = Total(name, value, lambda _, rows: rows.sum())
    found = raw.totals(wanted).sum().row(0, named=True)
    return Totals(
        raw.count_rows(),
        {name: {what: int(found[f"{name} {what}"]) for what in ("positive", "present")} for name in schema.labels},
        {},
    )


def present_numbers(raw: RawTable, schema: Schema) -> dict[str, int]:
    """Number -> how many rows of a raw table without bad ones have one."""
    if not schema.dense:
        return {}
    dtypes = raw.dtypes
    present = {f.name: Total(f.name, number(f.name, dtypes[f.name]), lambda _, rows: rows.sum()) for f in schema.dense}
    return {name: int(rows or 0) for name, rows in raw.totals(present).sum().row(0, named=True).items()}


@dataclass(frozen=True)
class Totals:
    """What encoded rows hold: label -> number of "positive" ones and of those "present"; `ids` as in `count_ids`."""

    rows: int
    labels: dict[str, dict[str, int]]
    ids: dict[str, dict[str, int]]

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.rows + other.rows, _added(self.labels, other.labels), _added(self.ids, other.ids))


def _added(a: dict[str, dict[str, int]], b: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    return {name: {what: number + b[name][what] for what, number in numbers.items()} for name, numbers in a.items()}


def vocabularies_of_floats(schema: Schema, folder: Path) -> set[str]:
    """The vocabularies in a folder that have values such as "17.0" among the most frequent ones."""
    found = set()
    for name in schema.vocabularies:
        head = pl.scan_parquet(vocabulary_path(folder, name), glob=False).head(1000).collect()["value"]
        if head.str.ends_with(".0").any():
            found.add(name)
    return found


def refuse_other_spelling(raw: RawTable, schema: Schema, of_floats: Collection[str]) -> None:
    """Refuse columns whose ids are written otherwise than in train, so that all would be unknown, silently.

    Args:
        raw: the rows of a split.
        schema: fitted.
        of_floats: `vocabularies_of_floats` of the folder with train's vocabularies.

    Raises:
        SchemaError: as said.
    """
    _refuse_ids_as_floats(raw, schema, of_floats)
    refuse_retyped(raw, schema)
    refuse_other_form(raw, schema)


def _refuse_ids_as_floats(raw: RawTable, schema: Schema, of_floats: Collection[str]) -> None:
    """Text such as "17.0" for ids that were "17"."""
    dtypes = raw.dtypes
    suspects = [
        feature.name
        for feature in schema.sparse
        if isinstance(feature, Categorical)
        and not feature.bucket
        and dtypes[feature.name] == pl.String
        and vocabulary_of(feature) not in of_floats
    ]
    if not suspects:
        return
    like = {column: pl.col(column).str.contains(r"^-?\d+\.0$") for column in suspects}
    # The first rows acquit nearly every column; only what is left is read in full.
    first = raw.pieces[0].head(1000).select(one.all(ignore_nulls=True) for one in like.values())
    (alike,) = raw.run([first], raw.name)
    suspects = [column for column in suspects if alike[column][0]]
    wanted = {f"{column} like": Total(column, like[column], lambda x, rows: (x * rows).sum()) for column in suspects}
    wanted |= {f"{column} all": Total(column, like[column], lambda _, rows: rows.sum()) for column in suspects}
    found = raw.totals(wanted).sum().row(0, named=True) if suspects else {}
    for column in suspects:
        if 0 < found[f"{column} all"] == found[f"{column} like"]:
            raise SchemaError(
                f"{raw.name}: column {column!r} holds ids that look like floats (such as 17.0), expected the text that "
                "train has (such as 17): write the column as integers"
            )


def refuse_retyped(raw: RawTable, schema: Schema) -> None:
    """True for ids that were "1", or 2139 for a postcode that was "02139": unseen values that nobody meant."""
    expected, types = (schema.raw_format or {}).get("types", {}), raw.types
    for feature in schema.sparse:
        name = feature.name
        pair = {types[name], expected.get(name, types[name])}
        if not isinstance(feature, Categorical) or feature.bucket or len(pair) == 1 or pair & {"parsed", "null"}:
            continue
        present = text(feature, raw.dtypes[name]).is_not_null()
        if not holds(raw, present):  # pandas makes floats of a column without values
            continue
        raise SchemaError(
            f"{raw.name}: column {name!r} holds values of kind {types[name]} ({raw.dtypes[name]}), in training they "
            f"were of kind {expected[name]}: cast the column to what it was"
        )


def refuse_other_form(raw: RawTable, schema: Schema) -> None:
    """Raw ids that are text where train had integers, or the other way round."""
    dtypes = raw.dtypes
    for feature in schema.sparse:
        if not isinstance(feature, RawId):
            continue
        name, dtype = feature.name, dtypes[feature.name]
        if feature.form == "integer":
            other = ~is_raw_integer(name, dtype)
        else:
            other = pl.col(name).is_not_null() & pl.lit(dtype.is_integer())
        if holds(raw, other):
            row, value = raw.first(other, name)
            wanted = 'integers, such as 12 (no "012", no "12.0")' if feature.form == "integer" else "text"
            raise SchemaError(
                f"{raw.place(row)}, column {name!r} holds {value!r} ({dtype}); its raw ids have the form "
                f"{feature.form!r}, so expected {wanted}: write the column as in train, or prepare train again with "
                "`RawId(..., form=...)` as it is here"
            )


def judge_table(
    raw: RawTable, counts: Mapping[str, Mapping[str, int]], schema: Schema, known_of: Callable[[str], Collection[str]]
) -> list[str]:
    """`ctrlib.data.unknown.judge` of a table that was encoded.

    Args:
        raw: the rows.
        counts: of `count_ids`.
        schema: fitted.
        known_of: vocabulary -> its values.

    Raises:
        SchemaError: as `judge`.
    """
    ids, unseen, missing = (
        {name: some[what] for name, some in counts.items()} for what in ("ids", "unseen", "missing")
    )
    examples = {}
    for feature in schema.sparse:
        if isinstance(feature, RawId) or not knows_none(feature, ids, unseen, missing):
            continue
        plan = values_of((feature,), raw.dtypes)
        came = raw.gather(lambda piece, plan=plan: plan(piece).drop_nulls().unique(maintain_order=True).head(10))  # type: ignore[misc]
        examples[feature.name] = list(dict.fromkeys(came["value"]))[:10]
    return judge(schema, ids, unseen, missing, examples, known_of, raw.name)


def count_ids(encoded: pl.LazyFrame, schema: Schema) -> dict[str, dict[str, int]]:
    """Sparse feature -> numbers of "missing" ids, of "empty" histories, of "unseen" ids, and of all "ids"."""
    columns: list[pl.Expr] = []
    for feature in schema.sparse:
        column = pl.col(feature.name)
        if isinstance(feature, RawId):
            counts = {"missing": (column == MISSING_RAW_ID).sum(), "unseen": pl.lit(0), "ids": pl.len()}
            columns += [count.alias(f"{feature.name} {what}") for what, count in counts.items()]
            continue
        ids = column if isinstance(feature, Categorical) else column.list.explode(empty_as_null=False, keep_nulls=False)
        counts = {"missing": (ids == MISSING_ID).sum(), "unseen": (ids == OOV_ID).sum(), "ids": ids.len()}
        if not isinstance(feature, Categorical | MultiValued):
            counts["empty"] = (column.list.len() == 0).sum()
        columns += [count.alias(f"{feature.name} {what}") for what, count in counts.items()]
    found: dict[str, Any] = encoded.select(columns).collect(engine="streaming").row(0, named=True) if columns else {}
    whats = ("missing", "empty", "unseen", "ids")
    return {
        feature.name: {what: int(found[key] or 0) for what in whats if (key := f"{feature.name} {what}") in found}
        for feature in schema.sparse
    }
