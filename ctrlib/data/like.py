"""Keep to an earlier preparation, for newer data: its features, ids and scales, with new values after its own or not.

An id then means the same value in both folders, and a number the same number. How frequent a value is stands apart from
its id: the vocabulary's `count` is that of the new train, 0 for values that do not come up there.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ctrlib.data.cells import shortened
from ctrlib.data.describe import describe
from ctrlib.data.encode import judge_table
from ctrlib.data.event_state import State
from ctrlib.data.quantiles import has_points, points_path, write_points
from ctrlib.data.table import RawTable
from ctrlib.data.vocabulary import (
    Count,
    hash_values,
    in_order,
    load_vocabulary,
    values_in,
    vocabulary_path,
)
from ctrlib.manifest import check_file, load_schema
from ctrlib.schema import (
    NUM_RESERVED_IDS,
    Categorical,
    Feature,
    Numeric,
    RawId,
    Schema,
    SchemaError,
    kind_of,
    vocabulary_of,
)

# What schemas say about raw files, but for the types of columns.
RAW_FORMAT = ("separator", "columns", "missing_values", "missing_labels", "label_positive")


@dataclass(frozen=True)
class Earlier:
    """A prepared folder or a model folder that another preparation keeps to.

    `extend`: values that it does not have get ids after its own, if train holds them often enough. `state`: what it
    keeps of a log of events. `new` and `remarks` are for the report: vocabulary -> how many values were added, and
    sentences.
    """

    folder: Path
    schema: Schema
    extend: bool = False
    state: State | None = None
    new: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, folder: str | Path, *, extend: bool = False) -> Earlier:
        """Open it.

        Raises:
            SchemaError: it is no such folder, or keeps nothing to make edges of numbers from.
        """
        folder = Path(folder)
        schema = load_schema(folder)
        if not schema.is_fitted:
            raise SchemaError(f"{folder / 'schema.json'} is not fitted: give a folder that `ctrlib prepare` wrote")
        if schema.dense and not has_points(folder) and not (folder / "train").is_dir():
            raise SchemaError(
                f"{folder} has no folder `numbers`, which the edges of numbers are made from, since an older ctrlib "
                "wrote it: give the prepared folder that the model was trained on"
            )
        return cls(folder, schema, extend, State.load(folder, schema))

    # -------------------------------------------------------------------------------------------- what the user said

    def settle(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """Argument of `prepare` -> its value: the folder's, with which what was said (is not None) must agree.

        Separator and names of columns are a file's own, and may be others; so may be what the folder does not tell.

        Raises:
            SchemaError: it does not agree.
        """
        usual = {"missing_values": ("",), "missing_labels": "raise"}
        raw_format = self.schema.raw_format or {}
        was: dict[str, Any] = {name: raw_format.get(name, usual.get(name)) for name in RAW_FORMAT}
        was["events"] = None if self.state is None else self.state.events
        was |= {"labels": self.schema.labels, "weight": self.schema.weight, "group": self.schema.group}
        for name, value in said.items():
            if value is None:
                continue
            if name in ("separator", "columns") or (name in RAW_FORMAT and name not in raw_format):
                was[name] = value
            elif name == "events":
                if was[name] is None or value.settled(self.schema.labels) != was[name]:
                    raise self._differs(name, value, was[name])
            elif name == "missing_values":
                if {"", *value} != {"", *was[name]}:
                    raise self._differs(name, list(value), list(was[name]))
            elif value != was[name]:
                raise self._differs(name, value, was[name])
        return was

    def _differs(self, name: str, value: Any, was: Any) -> SchemaError:
        return SchemaError(
            f"{name} is {value!r}, in {self.folder} it is {was!r}: leave it out, or prepare without like=... (--like)"
        )

    def check_features(self, given: Iterable[Feature], min_count: int | None, max_values: int | None) -> None:
        """Refuse features, or limits of all others, that are not the folder's.

        Raises:
            SchemaError: as said.
        """
        mine = {feature.name: feature for feature in self.schema.features}
        named = set()
        for feature in given:
            if feature.name not in mine:
                raise SchemaError(
                    f"feature {feature.name!r} is none of {self.folder}, which has {shortened(list(mine))}: leave it "
                    "out, or prepare without like=... (--like)"
                )
            named.add(feature.name)
            was = mine[feature.name]
            if kind_of(feature) != kind_of(was):
                raise self._differs(f"the kind of feature {feature.name!r}", kind_of(feature), kind_of(was))
            for key, value in dataclasses.asdict(feature).items():
                fitted = key in ("num_embeddings", "parameters") or (key == "form" and value is None)
                if not fitted and value != getattr(was, key):
                    raise self._differs(f"{key} of feature {feature.name!r}", value, getattr(was, key))
        for key, limit in (("min_count", min_count), ("max_values", max_values)):
            for was in self.schema.features:
                others = was.name not in named and not isinstance(was, Numeric | RawId)
                if limit is not None and others and limit != getattr(was, key):
                    raise self._differs(f"{key} of feature {was.name!r}", limit, getattr(was, key))

    def describe(self, table: RawTable, split_by: str | None, ignore: Sequence[str]) -> tuple[Schema, dict[str, str]]:
        """The folder's schema, and column -> why it is what it is, as `ctrlib.data.describe.describe`.

        Raises:
            SchemaError: a column of the folder is missing, or is to be ignored.
        """
        schema = self.schema
        names = [feature.name for feature in schema.features]
        used = {*names, *schema.labels, *([schema.weight] if schema.weight else [])}
        if wanted := sorted(used & set(ignore)):
            raise SchemaError(
                f"columns {wanted} are named in ignore, and {self.folder} has them as feature, label or weight: leave "
                "them out there, or prepare without like=... (--like)"
            )
        others = [name for name in table.dtypes if name not in used and name != split_by]
        _, reasons, _ = describe(
            table,
            schema.features,
            schema.labels,
            schema.weight,
            schema.group,
            split_by,
            tuple(dict.fromkeys([*others, *ignore])),
            {},
        )
        reasons |= dict.fromkeys(names, f"as in {self.folder}")
        unknown = (name for name in others if name not in ignore and name != schema.group)
        reasons |= dict.fromkeys(unknown, f"ignored: {self.folder} does not know it")
        return schema, reasons

    # ------------------------------------------------------------------------------------------------ what is fitted

    def fit(self, train: RawTable, folder: Path, count: Count) -> Schema:
        """The folder's schema, with larger vocabularies if it is extended; writes the vocabularies into `folder`.

        Raises:
            SchemaError: one of its vocabularies is missing, or is not its schema's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        vocabularies = self.schema.vocabularies
        sizes, hashes = {}, {}
        for name, counts in count([train], vocabularies):
            known = load_vocabulary(self.folder / "vocab", name, self.schema)
            limits = (vocabularies[name][0].min_count, vocabularies[name][0].max_values)
            vocabulary, left_out = continued(known, counts, *(limits if self.extend else (None, None)))
            vocabulary.write_parquet(vocabulary_path(folder, name))
            sizes[name] = len(vocabulary) + NUM_RESERVED_IDS
            hashes[name] = hash_values(vocabulary["value"])
            if self.extend:
                self.new[name] = len(vocabulary) - len(known)
            if left_out:
                self.remarks.append(
                    f"vocabulary {name!r} is full with max_values={limits[1]:,}: {left_out:,} new values share the "
                    "out-of-vocabulary id"
                )
        features = tuple(
            feature
            if isinstance(feature, Numeric | RawId)
            else dataclasses.replace(feature, num_embeddings=sizes[vocabulary_of(feature)])
            for feature in self.schema.features
        )
        return dataclasses.replace(self.schema, features=features, vocabulary_hashes=hashes)

    def copy_points(self, out: Path) -> None:
        """Give the folder `out` what the edges of numbers are made from: that of this one."""
        if not has_points(self.folder):
            write_points(self.folder, self.schema, out)
            return
        (out / "numbers").mkdir()
        for feature in self.schema.dense:
            path = points_path(self.folder, feature.name)
            if not path.is_file():
                raise SchemaError(f"{path} is missing: copy the folder, or prepare the data, again")
            check_file(self.folder, path.relative_to(self.folder).as_posix())
            shutil.copyfile(path, points_path(out, feature.name))

    # ------------------------------------------------------------------------------------------- what to think of it

    def judge(self, train: RawTable, written: Path, ids: Mapping[str, Mapping[str, int]]) -> list[str]:
        """`ctrlib.data.unknown.judge` of train: to this folder it is as new as any other split.

        Args:
            train: the raw rows.
            written: the folder with the same rows, encoded.
            ids: of the same rows, `ctrlib.data.encode.count_ids`.

        Raises:
            SchemaError: as `judge`.
        """
        counts = {name: dict(some) for name, some in ids.items()}
        columns = []
        for feature in self.schema.sparse:
            if self.new.get(vocabulary_of(feature)):
                column = pl.col(feature.name)
                if not isinstance(feature, Categorical):
                    column = column.list.explode(empty_as_null=False, keep_nulls=False)
                columns.append((column >= feature.num_embeddings).sum().alias(feature.name))
        if columns:
            rows = pl.scan_parquet(sorted(written.glob("*.parquet")), glob=False)
            added: dict[str, int] = rows.select(columns).collect(engine="streaming").row(0, named=True)
            for name, number in added.items():
                counts[name]["unseen"] += int(number)

        return judge_table(train, counts, self.schema, values_in(self.folder / "vocab", self.schema))


def continued(
    known: pl.Series, counts: pl.LazyFrame, min_count: int | None, max_values: int | None
) -> tuple[pl.DataFrame, int]:
    """A vocabulary that keeps its ids: value, id, and count in new data.

    Args:
        known: its values in the order of their ids.
        counts: value and count in the new data.
        min_count: counts that make other values new ones, with ids after the old ones, the most frequent first; None
            for no new values.
        max_values: old and new values together, at most; None for any number.

    Returns:
        The vocabulary, and how many values were left out for `max_values`.

    >>> counts = pl.LazyFrame({"value": ["b", None, "d", "c", "e"], "count": [1, 7, 2, 3, 1]})
    >>> continued(pl.Series(["a", "b"]), counts, 2, None)[0].rows()
    [('a', 3, 0), ('b', 4, 1), ('c', 5, 3), ('d', 6, 2)]
    """
    ids = pl.int_range(NUM_RESERVED_IDS, len(known) + NUM_RESERVED_IDS, dtype=pl.Int32, eager=True)
    old = pl.DataFrame({"value": known.cast(pl.String), "id": ids})
    is_old = pl.col("id").is_not_null()
    wanted = is_old if min_count is None else is_old | (pl.col("count") >= min_count)
    found = (
        counts.filter(pl.col("value").is_not_null())
        .join(old.lazy(), on="value", how="left")
        .filter(wanted)
        .collect(engine="streaming")
    )
    kept = old.join(found.filter(is_old).select("value", "count"), on="value", how="left", maintain_order="left")
    kept = kept.with_columns(pl.col("count").fill_null(0))
    room = None if max_values is None else max(0, max_values - len(old))
    others = found.filter(~is_old)
    new = in_order(others.lazy().select("value", "count"), 1, room)
    vocabulary = pl.concat([kept, new.with_columns(pl.col("id") + len(old))])
    return vocabulary, len(others) - len(new)
