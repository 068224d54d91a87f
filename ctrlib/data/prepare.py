"""Make a prepared folder from raw data: types, splits, vocabularies, numbers, ids."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal

import polars as pl
import rich

from ctrlib._target import check_target, target
from ctrlib.data import remarks
from ctrlib.data.cells import TOO_LARGE, check_columns, checks, without_bad_rows
from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.derived import derive
from ctrlib.data.describe import check_arguments, describe
from ctrlib.data.encode import (
    fit_groups,
    judge_table,
    present_numbers,
    refuse_other_spelling,
    totals_of_labels,
    vocabularies_of_floats,
)
from ctrlib.data.event_state import State
from ctrlib.data.events import Events
from ctrlib.data.infer import HOURS, NO_CELLS
from ctrlib.data.like import RAW_FORMAT, Earlier
from ctrlib.data.raw import RawData
from ctrlib.data.report import Log, Report
from ctrlib.data.scan import OnBadRow
from ctrlib.data.split import SPLITS, check_ratio, split_table
from ctrlib.data.table import RawTable, naming
from ctrlib.data.unknown import refuse_two_spellings
from ctrlib.data.vocabulary import fit, values_in, vocabulary_path
from ctrlib.data.workers import ThisMachine, Workers
from ctrlib.errors import ArgumentError, check_callable, check_path, check_type
from ctrlib.making import new_folder, size_of
from ctrlib.manifest import write_manifest
from ctrlib.schema import Feature, Schema, SchemaError, kind_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame as SparkFrame
    from pyspark.sql import SparkSession


def prepare(
    data: RawData | SparkFrame | Mapping[str, RawData | SparkFrame],
    out: str | Path,
    *,
    features: Iterable[Feature] | None = None,
    labels: Sequence[str] | str | None = None,
    weight: str | None = None,
    group: str | None = None,
    split: Sequence[float] = (8, 1, 1),
    split_by: str | None = None,
    stratify: str | None = None,
    seed: int = 0,
    ignore: Sequence[str] | str = (),
    min_count: int | None = None,
    max_values: int | None = None,
    separator: str | None = None,
    columns: Sequence[str] | None = None,
    missing_values: Sequence[str] | None = None,
    on_bad_row: OnBadRow = "raise",
    missing_labels: Literal["raise", "mask"] | None = None,
    label_positive: Mapping[str, str] | None = None,
    events: Events | None = None,
    like: str | Path | None = None,
    extend: bool = False,
    crosses: Sequence[Sequence[str]] = (),
    note: str = "",
    overwrite: bool = False,
    spark: SparkSession | None = None,
    log: Log | None = rich.print,
    _fit_only: bool = False,  # of `Encoder.fit`: write no rows, if nothing else needs them
) -> Schema:
    """Prepare raw data for training and return the fitted schema.

    Vocabularies and the parameters of numbers come from train only. The folder appears when it is complete: a crash
    leaves none. Memory is bounded by the largest vocabulary, not by the number of rows.

    Args:
        data: a file (CSV, TSV, JSON lines, parquet, Arrow), a folder of parquet files, a list of files that follow each
            other, a polars or pandas frame, an Arrow table, or a Spark DataFrame, which is then split; or a dictionary
            of those with keys "train" and, if there are any, "valid" and "test".
        out: the folder to make.
        features: what columns mean; the type of every other column is inferred and shown. Fields keep this order, with
            the inferred ones after them in the order of the file.
        labels: columns that hold 0 or 1; by default "label".
        weight: column with the weight of each row in the loss.
        group: column whose value groups rows for GAUC, often the user; it may be a feature as well.
        split: sizes of train, valid and test relative to each other; 0 for none.
        split_by: column with the time; the oldest rows train and the newest test. By default rows are drawn at random.
        stratify: label of whose classes each split of a random split gets its share, to the row.
        seed: of the random split.
        ignore: columns that are not features; the group may be one of them.
        min_count: of the vocabularies of inferred features: rarer values share the out-of-vocabulary id; by default 1.
        max_values: of the vocabularies of inferred features: at most so many values, the most frequent ones.
        separator: of a text file; by default told from the name or the first lines.
        columns: names for text files without header.
        missing_values: what cells without value hold, such as ("", "?"); an empty cell is always one.
        on_bad_row: "raise" at the first bad row, or "skip" them and say how many there were of which kind.
        missing_labels: "raise", the default, or "mask" to keep such rows with NaN, which the loss leaves out.
        label_positive: for labels that are text, label -> text of the positive class, such as {"income": ">50K"}.
        events: histories and rates to make of the rows as a log, point in time (`ctrlib.data.events.Events`); what
            prediction and newer data need of the log is kept in the folder. Memory then grows with the rows.
        like: a prepared folder or model folder to keep to: features, ids, scales, edges of numbers, labels, weight and
            group are those of that folder, and so is what a cell means. What is said beside must agree. Nothing is
            fitted but the counts of the vocabularies.
        extend: values that `like` does not have, and that come up `min_count` times in train, get ids after its own.
        crosses: pairs of categorical features that are worth a cross, as a ranking finds them; kept in report.json, for
            `ctrlib train --crosses ranked`. Nothing is crossed here.
        note: kept in report.json and beside every number that `run` makes from this data.
        overwrite: replace an older prepared folder.
        spark: a Spark session whose executors do the work, with the same result bit for bit (`ctrlib.data.spark` says
            what they need). A Spark DataFrame as `data` brings its session along.
        log: is called with each message or table (`rich.print`); None for silence.

    Raises:
        SchemaError: names or types of columns do not fit.
        DataError: the data is damaged; the message names file, row and column.
        ValueError: an argument is out of range, or `extend` comes without `like`.
        TargetError: `out` is there already, is something else than a prepared folder, or is what is read.
        LockedError: somebody else writes into `out`; the message says who.
        TypeError: an argument is of another type.

    >>> import tempfile
    >>> import polars as pl
    >>> from ctrlib.schema import Categorical
    >>> frame = pl.DataFrame({"item": ["a", "b", "a", None], "price": [1.0, 2.5, 4.0, 2.5], "click": [1, 0, 0, 1]})
    >>> folder = Path(tempfile.mkdtemp()) / "prepared"
    >>> schema = prepare({"train": frame}, folder, features=[Categorical("item")], labels="click", log=None)
    >>> schema["item"].num_embeddings, schema["price"].parameters["mean"]
    (5, 2.5)
    >>> pl.read_parquet(folder / "train")["item"].to_list()
    [3, 4, 3, 1]
    >>> newer = pl.DataFrame({"item": ["c", "b"], "price": [2.5, 9.0], "click": [0, 1]})
    >>> schema = prepare({"train": newer}, folder.with_name("newer"), like=folder, extend=True, log=None)
    >>> schema["item"].num_embeddings, schema["price"].parameters["mean"]
    (6, 2.5)
    >>> pl.read_parquet(folder.with_name("newer") / "train")["item"].to_list()
    [5, 4]
    """
    files = [one for part in _parts(data).values() for one in (part if isinstance(part, list | tuple) else [part])]
    read = [one for one in (*files, like) if isinstance(one, str | os.PathLike)]
    check_target(out, "prepared", inputs=read, overwrite=overwrite)
    check_ratio(split)
    check_type("a whole number", int, seed=seed)
    check_type("the name of a column, or several", (str, Sequence, NoneType), labels=labels)
    check_type("a dictionary from label to text", (Mapping, NoneType), label_positive=label_positive)
    check_type("a sequence of texts", (Sequence, NoneType), missing_values=missing_values, columns=columns)
    check_type("a whole number, or None", (int, NoneType), min_count=min_count, max_values=max_values)
    check_type("a ctr.Events(...), or None", (Events, NoneType), events=events)
    if like is not None:
        check_path("a prepared folder or model folder", like=like)
    if log is not None:
        check_callable("a function that is called with each message, or None", log=log)
    out = Path(out)
    given = tuple(features or ())
    for feature in given:
        check_type("features such as ctr.Categorical(name) or ctr.Numeric(name)", Feature, feature=feature)
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    earlier = None if like is None else Earlier.load(like, extend=extend)
    said = _settled(
        {
            "labels": (labels,) if isinstance(labels, str) else labels if labels is None else tuple(labels),
            "weight": weight,
            "group": group,
            "separator": separator,
            "columns": list(columns) if columns else None,
            "missing_values": missing_values,
            "missing_labels": missing_labels,
            "label_positive": dict(label_positive) if label_positive else None,
            "events": events,
        },
        earlier,
        extend,
    )
    check_arguments(
        given, said["labels"], min_count, max_values, on_bad_row, said["missing_labels"], said["label_positive"]
    )
    _check_stratify(stratify, said["labels"], split_by, isinstance(data, Mapping))
    if earlier is not None:
        earlier.check_features(given, min_count, max_values)
    parts = _parts(data)

    def needed(written: int) -> str:
        about = 2 * max(written, sum(map(_bytes_of, files)))
        return (
            f"about {about:,} bytes are needed (an estimate: twice the size of what is read or, where that is more, of "
            "what was written)"
        )

    with (
        target(out, "prepared", inputs=read, overwrite=overwrite),
        new_folder(out, needed=needed) as folder,
    ):
        making = _Preparation(folder, _workers(parts, spark, folder), said, earlier, on_bad_row)
        making.read(parts)
        if not isinstance(data, Mapping):
            making.split(split, split_by=split_by, seed=seed, stratify=stratify)
        making.look_back()
        rare = {"min_count": 1 if min_count is None else min_count, "max_values": max_values}
        making.describe(given, split_by, ignore, rare)
        _check_crosses(crosses, making.schema)
        making.leave_out_bad_rows()
        making.fit()
        making.leave_out_numbers_too_large()
        making.begin_report()
        making.refuse_other_spellings()
        if _fit_only and earlier is None and log is None and isinstance(making.workers, ThisMachine):
            making.check_train()
            making.write_points()
            return making.schema
        making.write()
        making.remark(split_by)
        making.write_points()
        making.complete(note, crosses)
    if log is not None:
        making.report.show(out, log)
    return making.schema


class _Preparation:
    """What `prepare` does once all that was said is settled, step by step, each of which needs those before it."""

    schema: Schema
    reasons: dict[str, str]  # column -> why it is what it is
    report: Report

    def __init__(
        self, folder: Path, workers: Workers, said: Mapping[str, Any], earlier: Earlier | None, on_bad_row: OnBadRow
    ) -> None:
        self.folder, self.workers, self.said, self.earlier = folder, workers, said, earlier
        self.on_bad_row: OnBadRow = on_bad_row
        self.label_positive: Mapping[str, str] | None = said["label_positive"]
        self.events: Events | None = None if said["events"] is None else said["events"].settled(tuple(said["labels"]))
        self.rows_of: dict[str, pl.Expr] = {}  # split -> its rows, where one table is to be split
        self.doubts: dict[str, str] = {}  # feature -> what is doubtful about the guess

    def read(self, parts: Mapping[str, Any]) -> None:
        """A table for each split, or one with all rows, "data"."""
        how: dict[str, Any] = {name: self.said[name] for name in ("separator", "columns", "missing_values")}
        self.tables = {
            name: self.workers.read(part, self.folder / "raw" / name, name=name, on_bad_row=self.on_bad_row, **how)
            for name, part in parts.items()
        }

    def split(self, ratio: Sequence[float], *, split_by: str | None, seed: int, stratify: str | None) -> None:
        """Before anything is looked at: types, too, are inferred from train alone."""
        positive = (self.label_positive or {}).get(stratify or "")
        self.rows_of = split_table(
            self.tables["data"], ratio, split_by=split_by, seed=seed, stratify=stratify, positive=positive
        )

    def look_back(self) -> None:
        """Make the columns that are of the past of each row, and keep what later rows need of it."""
        if self.events is not None:
            before = State.new(self.events) if self.earlier is None else self.earlier.state
            assert before is not None
            self.tables, state = derive(
                self.tables, self.rows_of, before, self.label_positive, self.folder / "raw" / "events"
            )
            state.save(self.folder)

    def describe(
        self, given: tuple[Feature, ...], split_by: str | None, ignore: tuple[str, ...], rare: Mapping[str, Any]
    ) -> None:
        """The schema to fit, or that of the earlier folder, to which all splits must keep."""
        train = self.tables["data"].only(self.rows_of["train"]) if self.rows_of else self.tables["train"]
        if self.earlier is None:
            labels, weight, group = (self.said[name] for name in ("labels", "weight", "group"))
            if self.events is not None:
                given = (*given, *self.events.features(given, ignore, rare))
                time, taken = self.events.time, (*(f.name for f in given), *ignore, *labels, weight, group, split_by)
                ignore = ignore if time is None or time in taken else (*ignore, time)
            self.schema, self.reasons, self.doubts = describe(
                train, given, labels, weight, group, split_by, ignore, rare
            )
        else:
            self.schema, self.reasons = self.earlier.describe(train, split_by, ignore)
        if self.events is not None:
            features = {feature.name for feature in self.schema.features}
            self.reasons |= {name: why for name, why in self.events.reasons().items() if name in features}
            if self.reasons.get(self.events.time or "") == "ignored: as told":
                self.reasons[self.events.time or ""] = "ignored: the time of the events"
        _refuse_other_columns(self.tables, self.reasons)

    def leave_out_bad_rows(self) -> None:
        """Or refuse the first; from here on there is a table for each split."""
        how: dict[str, Any] = {name: self.said[name] for name in ("missing_labels", "label_positive")}
        for name, table in self.tables.items():
            check_columns(table, self.schema, with_labels=True)
            found = checks(self.schema, table.dtypes, with_labels=True, **how)
            self.tables[name] = without_bad_rows(table, found, self.on_bad_row)
        self.sources = self.tables  # which count what is left out of their splits, too
        if self.rows_of:
            self.tables = {name: self.tables["data"].only(rows) for name, rows in self.rows_of.items()}

    def fit(self) -> None:
        """Vocabularies and the parameters of numbers, by train, and the ids of groups, by all splits."""
        train, vocab, earlier = self.tables["train"], self.folder / "vocab", self.earlier
        raw_format = {name: self.said[name] for name in RAW_FORMAT}
        raw_format["missing_values"] = list(raw_format["missing_values"])
        with naming(train.name):
            types = train.types
            raw_format["types"] = {feature.name: types[feature.name] for feature in self.schema.sparse}
            if self.events is not None:
                raw_format["events"] = self.events.as_dict()
            if earlier is None:
                schema = fit(train, self.schema, vocab, self.workers.count)
            else:
                raw_format["types"] = (self.schema.raw_format or raw_format).get("types", raw_format["types"])
                schema = earlier.fit(train, vocab, self.workers.count)
            refuse_two_spellings(train, schema, vocab)
            self.schema = dataclasses.replace(schema, raw_format=raw_format)
            self.known = {name: vocabulary_path(vocab, name) for name in schema.vocabularies}
            groups = fit_groups(list(self.tables.values()), self.said["group"], self.workers.count)
            if groups is not None:
                self.known[GROUP_COLUMN] = self.folder / "groups.parquet"
                groups.write_parquet(self.known[GROUP_COLUMN])

    def leave_out_numbers_too_large(self) -> None:
        """For the scales, which are those of train, or were known before."""
        for name, table in self.tables.items():
            if name != "train" and self.earlier is None:
                found = [one for one in checks(self.schema, table.dtypes, with_labels=False) if one.reason == TOO_LARGE]
                self.tables[name] = without_bad_rows(table, found, self.on_bad_row)

    def begin_report(self) -> None:
        """With what is known before the rows are written."""
        skipped = {name: dict(table.skipped) for name, table in self.sources.items() if table.skipped}
        self.report = Report(self.schema, self.reasons, skipped, self.earlier)
        reasons = self.reasons.items()
        self.report.remarks += [f"column {name!r} holds {reason}" for name, reason in reasons if reason == HOURS]
        self.report.remarks += [f"column {name!r} is {why}" for name, why in reasons if why.startswith(NO_CELLS)]

    def refuse_other_spellings(self) -> None:
        """Values that are written otherwise than in the vocabularies, all over a split."""
        vocab = (self.folder if self.earlier is None else self.earlier.folder) / "vocab"
        of_floats = vocabularies_of_floats(self.schema, vocab)
        for table in self.tables.values():
            refuse_other_spelling(table, self.schema, of_floats)

    def check_train(self) -> None:
        """As `write` would, where it is not written."""
        train = self.tables["train"]
        totals = totals_of_labels(train, self.schema, self.label_positive)
        self.report.add("train", totals, {}, self.label_positive, train.name)

    def write(self) -> None:
        """The rows of each split, and what comes to light by that."""
        for name in self.tables:
            (self.folder / name).mkdir()
        self.written = self.workers.write(self.tables, self.folder, self.schema, self.known, self.label_positive)
        self.present: dict[str, dict[str, int]] = {}
        for name, totals in self.written.items():
            table = self.tables[name]
            self.present[name] = present_numbers(table, self.schema)
            self.report.add(name, totals, self.present[name], self.label_positive, table.name)
            if name != "train":
                values = values_in(self.folder / "vocab", self.schema)
                self.report.remarks += judge_table(table, totals.ids, self.schema, values)
            elif self.earlier is not None:
                self.report.remarks += self.earlier.judge(table, self.folder / name, totals.ids)

    def remark(self, split_by: str | None) -> None:
        """What somebody should look at."""
        train, found = self.tables["train"], self.report.remarks
        guessed = [name for name, why in self.reasons.items() if why != "as told" and name not in self.doubts]
        found += self.doubts.values()
        found += remarks.on_unseen(self.written, self.schema, guessed if self.earlier is None else ())
        rows = {name: totals.rows for name, totals in self.written.items()}
        found += remarks.on_missing_numbers(self.present, rows)
        found += remarks.on_lists(train, self.schema)
        found += remarks.on_lengths(train, self.schema, self.folder / "train")
        if self.rows_of and self.events is not None and self.events.time is not None:
            found += remarks.on_time(self.events.time, split_by)
        found += remarks.on_labels(self.written, self.schema, bool(self.rows_of) and split_by is None)

    def write_points(self) -> None:
        """What the edges of numbers are made from."""
        if self.earlier is None:
            self.workers.points(self.tables["train"], self.folder, self.schema)
        else:
            self.earlier.copy_points(self.folder)

    def complete(self, note: str, crosses: Sequence[Sequence[str]]) -> None:
        """Schema, report and, with which the folder is whole, the manifest."""
        self.schema.save(self.folder / "schema.json", manifest=True)
        for temporary in ("raw", "spark"):
            shutil.rmtree(self.folder / temporary, ignore_errors=True)
        content = {**self.report.content, "note": note}
        if crosses:
            content["crosses"] = [list(pair) for pair in crosses]
        (self.folder / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        write_manifest(self.folder, "prepared")


def _settled(said: dict[str, Any], earlier: Earlier | None, extend: bool) -> dict[str, Any]:
    """Argument of `prepare` -> its value: the earlier folder's, with which what was said must agree, or a default."""
    if earlier is not None:
        return earlier.settle(said)
    if extend:
        raise ArgumentError("extend=True adds values to those of another folder: name it by like=FOLDER (--like)")
    usual = {"labels": ("label",), "missing_values": ("",), "missing_labels": "raise"}
    return said | {name: value for name, value in usual.items() if said[name] is None}


def _bytes_of(data: Any) -> int:
    """As it lies on disk, or in memory; 0 where that is not known."""
    if isinstance(data, str | os.PathLike):
        return size_of(Path(data))
    return int(data.estimated_size()) if isinstance(data, pl.DataFrame) else 0


def _check_crosses(crosses: Sequence[Sequence[str]], schema: Schema) -> None:
    """Refuse pairs that no model could cross.

    Raises:
        SchemaError: as said.
    """
    kinds = {feature.name: kind_of(feature) for feature in schema.features}
    for name in itertools.chain.from_iterable(crosses):
        if kinds.get(name) != "categorical":
            raise SchemaError(
                f"crosses: {name!r} is {kinds.get(name, 'no feature')}, expected a categorical feature, with one id "
                "per row: declare it so (--categorical), or leave its pairs out"
            )


def _check_stratify(stratify: str | None, labels: Sequence[str], split_by: str | None, is_split: bool) -> None:
    """Refuse what a stratified split cannot be.

    Raises:
        SchemaError: as said.
    """
    if stratify is None:
        return
    if stratify not in labels:
        raise SchemaError(f"stratify is {stratify!r}, expected a label, one of {list(labels)}")
    if split_by is not None or is_split:
        other = "the data is split already" if is_split else f"split_by={split_by!r} says which rows go where"
        raise SchemaError(f"stratify={stratify!r} is for a random split, but {other}: leave one of them out")


def _workers(parts: Mapping[str, Any], spark: SparkSession | None, folder: Path) -> Workers:
    sessions = [part.sparkSession for part in parts.values() if hasattr(part, "sparkSession")]
    if spark is None and not sessions:
        return ThisMachine()
    from ctrlib.data.spark import SparkWorkers  # pyspark is needed by those only who have it

    return SparkWorkers(spark or sessions[0], folder / "spark")


def _parts(data: RawData | SparkFrame | Mapping[str, RawData | SparkFrame]) -> dict[str, RawData | SparkFrame]:
    if not isinstance(data, Mapping):
        return {"data": data}
    unknown = [name for name in data if name not in SPLITS]
    if unknown or "train" not in data:
        raise SchemaError(
            f'the dictionary of splits has keys {list(data)}, expected "train", and any of "valid", "test"'
        )
    return {name: data[name] for name in SPLITS if name in data}


def _refuse_other_columns(tables: Mapping[str, RawTable], reasons: Mapping[str, str]) -> None:
    for name, table in tables.items():
        extra = [column for column in table.dtypes if column not in reasons]
        if extra:
            raise SchemaError(
                f"{table.name}: columns {extra} are in {name} but not in train: give all splits the same columns"
            )
