"""Score raw rows with the model of a model folder (`ctrlib.serving.model_folder`)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq
import torch
from torch import nn

from ctrlib._lazy import instead
from ctrlib._target import check_target, target
from ctrlib.batch import Batch
from ctrlib.data.collate import collate
from ctrlib.data.columns import Columns
from ctrlib.data.counts import Counts
from ctrlib.data.encoder import Encoder, Rows
from ctrlib.data.loader import Loader
from ctrlib.data.raw import check_paths, in_files, paths_of
from ctrlib.data.scan import DataError, OnBadRow, check_on_bad_row
from ctrlib.data.stream import ahead
from ctrlib.data.table import ROW, RawTable, as_frame, name_of
from ctrlib.errors import ArgumentError, check_path, check_type, check_whole
from ctrlib.making import new_file
from ctrlib.manifest import load_schema
from ctrlib.schema import Schema, SchemaError
from ctrlib.serving.candidates import Items, joined, ranked, read_items
from ctrlib.serving.direct import Rows as DirectRows
from ctrlib.serving.direct import direct
from ctrlib.serving.model_folder import load_model
from ctrlib.serving.slices import prepared_values, score_slices
from ctrlib.training.evaluate import Scores, predict
from ctrlib.training.evaluate import score as metrics_of

Probabilities: TypeAlias = npt.NDArray[np.float64]  # (B, T)
NOTHING = pl.DataFrame()  # made once: a frame costs a tenth of a millisecond


@dataclass(frozen=True)
class Predictor:
    """A loaded model folder: raw rows in, probabilities out.

    A model composed by hand works too: `Predictor(model.eval(), schema, folder)`, with the prepared folder it was
    trained on (all that is read there is `vocab`).
    """

    model: nn.Module
    schema: Schema
    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @classmethod
    def load(cls, folder: str | Path, *, modules: Sequence[str] = ()) -> Predictor:
        """Read a model folder.

        `modules`: where a model of your own may be imported from (`ctrlib.models.build`); model.json does not decide
        that, so that a folder of somebody else's runs nothing that you did not name.

        Raises:
            SchemaError: a file is missing, damaged, or of another model; the message names it.
        """
        return cls(*load_model(folder, modules=modules), Path(folder))

    def predict(
        self, data: Rows, *, batch_size: int = 8192, on_bad_row: OnBadRow = "raise"
    ) -> tuple[pl.DataFrame, dict[str, Any]]:
        """Probabilities for raw rows, a column per label, in the order of the rows; labels are not needed.

        Threads may share one predictor.

        Args:
            data: a row as a dictionary, a list of such rows, a polars or pandas frame, an Arrow table, or a file or a
                list of files as `ctr.prepare` takes them, with the raw feature columns in any order.
            batch_size: rows per step.
            on_bad_row: "raise" at the first damaged row, or "skip": such rows get no probability and are counted.

        Returns:
            The probabilities, and the counts: "rows", per id feature how many ids were "unseen" in train and how many
            "missing", per history how many were "empty" (all score normally), the columns "ignored" because the model
            does not know them, and how many rows were "skipped" for which reason and which they are ("skipped_rows",
            counted from 1), and "remarks" on columns of which train knew no value at all.

        Raises:
            SchemaError: a column is missing, or has another type than in training.
            DataError: a cell or row is damaged; the message names it.
        """
        report = Report(self.encoder)
        parts = [part for part, _ in self.stream(data, batch_size=batch_size, on_bad_row=on_bad_row, report=report)]
        frame = parts[0] if len(parts) == 1 else pl.concat(parts)
        return frame, report.as_dict()

    def rank(
        self, context: Mapping[str, Any], items: Any, k: int | None = None, *, by: str | None = None
    ) -> pl.DataFrame:
        """The best of many candidates for one user: what they share is encoded once.

        Args:
            context: the cells that all candidates share, such as those of the user and the page.
            items: the other cells of each candidate: a frame, or a list of dictionaries. Columns that the model does
                not know are left aside. Or what `items` gave, or some of it.
            k: how many to return; None for all.
            by: the label whose probability decides; by default the first.

        Returns:
            `row`, the place of a candidate in `items` from 0, and a probability for each label; best first, of equal
            ones the first in `items`. Probabilities are those of `predict` for whole rows, but for the last digits.

        Raises:
            SchemaError: a column that the model reads is in both, or in neither.
            DataError: there is no candidate, or a cell is damaged.
            ValueError: there is no such label, or `k` is below 1.
        """
        by = self.label_named(by)
        found = self._probabilities(joined(self.encoder, context, items), 8192, Report(self.encoder, "items"))
        return ranked(found, by, k)

    def items(self, items: Any, key: str) -> Items:
        """Items that many rankings choose from, encoded once: `rank(context, items[keys])` takes less than half as long
        as with their rows.

        Args:
            items: a table of them, or a file or several, with the columns of the model that depend on the item only.
            key: the column that names an item, each another; numbers as their decimal text.

        Raises:
            SchemaError: there is no such column, or none that the model reads.
            DataError: a key is missing or there twice, or a cell is damaged. Of `items[keys]`: there is no such item.
            ArgumentError: the model reads a log of events.
        """
        return read_items(self.encoder, items, key)

    def label_named(self, by: str | None) -> str:
        """The label of that name, or the first for None.

        Raises:
            ArgumentError: there is none.
        """
        by = self.schema.labels[0] if by is None else by
        if by not in self.schema.labels:
            raise ArgumentError(f"by={by!r} is no label; {instead([by], self.schema.labels)}")
        return by

    def encode(self, rows: Rows, *, name: str = "data") -> tuple[Columns, dict[str, Any]]:
        """Rows in memory as the model reads them, for `score_encoded`, and the counts that `predict` gives.

        Args:
            rows: as in `predict`, no file.
            name: what to call them in messages.

        Raises:
            SchemaError, DataError: as `predict`.
        """
        columns, counts = self.encoder.transform(rows, name=name)
        report = Report(self.encoder, name)
        report.add(counts)
        report.check()
        return columns, report.as_dict()

    def score_encoded(self, parts: Sequence[Columns], *, name: str = "data") -> list[Probabilities]:
        """Probabilities of several tables of encoded rows, (B, T) each, in one call of the model.

        Those of a single table are what `predict` gives, to the last bit; together, but for the last digits.

        Raises:
            DataError: the model gives no finite score for a row, whose number is counted over all parts.
        """
        found = self._scored(Columns.concatenate(parts), 8192, Report(self.encoder, name))
        ends = np.cumsum([len(part.ids) for part in parts]).tolist()
        return [found[start:end] for start, end in zip([0, *ends], ends)]

    def predict_to(
        self,
        data: str | Path | Sequence[str | Path],
        out: str | Path,
        *,
        keep: Sequence[str] = (),
        batch_size: int = 8192,
        on_bad_row: OnBadRow = "raise",
        overwrite: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Score a file into a file, in memory that does not grow with it; returns the counts that `predict` gives.

        The file appears when it is complete; until then, what was there stays as it was.

        Args:
            data: a file as `ctr.prepare` takes it, or a folder of parquet files, or a list of those.
            out: .csv or .parquet; gets the columns to keep, then a column per label.
            keep: raw columns to carry over, such as ids.
            batch_size: rows per step.
            on_bad_row: as in `predict`.
            overwrite: replace a file that is there.
            progress: is called with the number of rows scored so far.

        Raises:
            ValueError: `out` has another ending, or a column to keep has the name of a label.
            TargetError: `out` is there already, or it is the data, or lies in the model folder.
            LockedError: somebody else writes `out`; the message says who.
            SchemaError, DataError: as `predict`.
            OSError: the disk is full.
        """
        if isinstance(data, list | tuple):
            check_paths(data, "data")
        else:
            check_path("a raw file, or a list of paths", data=data)
        check_path("a .csv or .parquet file", out=out)
        check_whole(1, batch_size=batch_size)
        check_on_bad_row(on_bad_row)
        inputs = [*paths_of(data), self.folder]
        check_target(out, "file", inputs=inputs, overwrite=overwrite)
        out, report = Path(out), Report(self.encoder)
        if out.suffix not in (".csv", ".parquet"):
            raise ArgumentError(f"the file to write must end in .csv or .parquet, got {out.name!r}")
        check_type("a sequence of names of columns", Sequence, keep=keep)
        if clash := sorted(set(keep) & set(self.schema.labels)):
            raise ArgumentError(f"columns {clash} cannot be kept, the probabilities have these names: leave them out")
        size = 0

        def needed(written: int) -> str:
            rows = report.counts.rows
            return f"about {max(size, written):,} bytes are needed for the first {rows:,} rows" + (
                f", {size / rows:.1f} for each row" if size else ""
            )

        with contextlib.ExitStack() as stack:
            stack.enter_context(target(out, "file", inputs=inputs, overwrite=overwrite))
            partial = stack.enter_context(new_file(out, needed=needed))
            writer: Any = None
            for scores, kept in self.stream(
                data, batch_size=batch_size, on_bad_row=on_bad_row, keep=keep, report=report
            ):
                frame = kept.hstack(scores) if keep else scores
                if out.suffix == ".parquet":
                    table = frame.to_arrow()
                    size += table.nbytes
                    writer = writer or stack.enter_context(pq.ParquetWriter(partial, table.schema))
                    for field in table.schema:
                        if field.type != (before := writer.schema.field(field.name).type):
                            raise SchemaError(
                                f"{report.name}: column {field.name!r} to keep has type {field.type}, and {before} in "
                                "the rows before: give it one type, or write a .csv"
                            )
                    writer.write_table(table)
                else:
                    text = frame.write_csv(include_header=writer is None).encode()
                    size += len(text)
                    writer = writer or stack.enter_context(partial.open("wb"))
                    writer.write(text)
                if progress is not None:
                    progress(report.counts.rows)
            if writer is None:
                raise DataError(f"{data} has no rows: expected at least one")
        return report.as_dict()

    def stream(
        self,
        data: Rows,
        *,
        batch_size: int = 8192,
        on_bad_row: OnBadRow = "raise",
        keep: Sequence[str] = (),
        report: Report | None = None,
    ) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """As `predict`, some rows at a time, whatever the size of a file: probabilities, and the columns to `keep`.

        Args:
            data: as in `predict`.
            batch_size: rows per step.
            on_bad_row: as in `predict`.
            keep: raw columns to give back beside the probabilities, such as ids.
            report: collects what `predict` counts.

        Raises:
            SchemaError, DataError: as `predict`; also at the end, when whole columns turn out to be written otherwise
                than in training.
        """
        check_on_bad_row(on_bad_row)
        check_whole(1, batch_size=batch_size)
        report = report or Report(self.encoder)
        for columns, kept in self._encoded(data, on_bad_row, keep, report):
            yield self._probabilities(columns, batch_size, report), kept
        report.check()

    def _probabilities(self, columns: Columns, batch_size: int, report: Report) -> pl.DataFrame:
        if not len(columns.ids):  # all were left out
            return pl.DataFrame(schema=dict.fromkeys(self.schema.labels, pl.Float64))
        found = self._scored(columns, batch_size, report)
        series = [pl.Series(name, column) for name, column in zip(self.schema.labels, found.T)]
        # For a single row, the general constructor would take longer than the network.
        return series[0].to_frame() if len(series) == 1 else pl.DataFrame(series)

    def _scored(self, columns: Columns, batch_size: int, report: Report) -> Probabilities:
        logits = []
        score = self._direct  # made outside of inference mode, so that the model, whose tables it shares, can train on
        with torch.inference_mode():
            for start in range(0, len(columns.ids), batch_size):
                whole = len(columns.ids) <= batch_size
                part = columns if whole else columns.take(np.arange(start, min(start + batch_size, len(columns.ids))))
                logits.append(score(DirectRows(part, self.schema)).float().numpy())
        scores = logits[0] if len(logits) == 1 else np.concatenate(logits)
        if not np.isfinite(scores).all():
            row = int(np.flatnonzero(~np.isfinite(scores).all(1))[0])
            numbers = dict(zip((f.name for f in self.schema.dense), columns.floats[row].tolist()))
            raise DataError(
                f"{report.place(row)}: the model gives {scores[row].tolist()}, which is no score; its numbers, "
                f"transformed as in training, are {numbers}: is one of them far outside of what training had?"
            )
        with np.errstate(over="ignore"):  # of a logit below -709, whose probability is 0
            found: Probabilities = 1 / (1 + np.exp(-scores.astype(np.float64)))
        return found

    @functools.cached_property
    def encoder(self) -> Encoder:
        """Of the model's schema and vocabularies, which are read when it is first used."""
        return Encoder.of(self.schema, self.folder)

    @functools.cached_property
    def _direct(self) -> nn.Module:
        return direct(self.model, self.schema)

    def evaluate(
        self, data: Rows, *, batch_size: int = 8192, on_bad_row: OnBadRow = "raise", by: str | None = None
    ) -> dict[str, Any]:
        """Metrics on raw rows with labels, as `ctrlib.evaluate` gives them, and the counts that `predict` gives.

        `by` names a column: "by" then has metrics of the rows of each of its values (`ctrlib.serving.slices`).

        Raises:
            SchemaError, DataError: as in `predict`, labels included.
        """
        keep = () if by is None else (by,)
        scores, kept, counts = self.score(data, batch_size=batch_size, on_bad_row=on_bad_row, keep=keep)
        return {**counts, **self._metrics(scores, None if by is None else kept[by])}

    def score(
        self, data: Rows, *, batch_size: int = 8192, on_bad_row: OnBadRow = "raise", keep: Sequence[str] = ()
    ) -> tuple[Scores, pl.DataFrame, dict[str, Any]]:
        """Logits and labels of raw rows, the columns to `keep`, and the counts that `predict` gives.

        Raises:
            SchemaError, DataError: as in `predict`, labels included.
        """
        check_on_bad_row(on_bad_row)
        check_whole(1, batch_size=batch_size)
        groups: dict[str, int] = {}
        report = Report(self.encoder)
        values: list[pl.DataFrame] = []

        def batches() -> Iterator[Batch]:
            for columns, kept in self._encoded(data, on_bad_row, keep, report, groups=groups):
                values.append(kept)
                for start in range(0, len(columns.ids), batch_size):
                    part = columns.take(np.arange(start, min(start + batch_size, len(columns.ids))))
                    yield collate(part, self.schema, len(part.ids))
            report.check()

        scores = predict(self.model, batches())
        return scores, pl.concat(values) if keep else NOTHING, report.as_dict()

    def evaluate_prepared(
        self, folder: str | Path, split: str, *, batch_size: int = 8192, by: str | None = None
    ) -> dict[str, Any]:
        """Metrics on a split of a prepared folder; `by` as in `evaluate`, a feature with one id a row, or the group.

        Raises:
            SchemaError: the folder was prepared differently from what the model was trained on, or `by` is none of its
                columns of single ids.
        """
        schema = self.check_prepared(folder)
        values = None if by is None else prepared_values(Path(folder), split, schema, by)
        return self._metrics(predict(self.model, Loader(folder, split, batch_size=batch_size)), values)

    def _metrics(self, scores: Scores, values: pl.Series | None) -> dict[str, Any]:
        found = metrics_of(scores, labels=self.schema.labels)
        return found if values is None else {**found, "by": score_slices(scores, values, self.schema.labels)}

    def check_prepared(self, folder: str | Path) -> Schema:
        """The schema of a prepared folder, if the model can read it.

        Raises:
            SchemaError: the folder was prepared differently from what the model was trained on.
        """
        schema = load_schema(folder)
        if schema.hash != self.schema.hash:
            lines = "; ".join(self.schema.difference(schema)[:5])
            raise SchemaError(
                f"{folder} was prepared differently from the data of model {self.folder}: {lines}. "
                "Evaluate on the raw file instead, or on the folder that the model was trained on"
            )
        return schema

    def _encoded(
        self,
        data: Rows,
        on_bad_row: OnBadRow,
        keep: Sequence[str],
        report: Report,
        groups: dict[str, int] | None = None,
    ) -> Iterator[tuple[Columns, pl.DataFrame]]:
        """Rows as arrays, block by block, and the columns to keep; with `groups`, labels, weights and groups too."""
        with_labels = groups is not None
        if not in_files(data):
            if not (with_labels or keep or on_bad_row == "skip"):
                columns, counts = self.encoder.transform(data, name="data")
                report.add(counts)
                yield columns, NOTHING
                return
            data = as_frame(data, "data")
        for raw in ahead(
            self.encoder.read(data, name="data", keep=keep, with_labels=with_labels, on_bad_row=on_bad_row)
        ):
            if unknown := [name for name in keep if name not in raw.dtypes]:
                raise SchemaError(f"{raw.name} has no columns {unknown} to keep; {instead(unknown, raw.dtypes)}")
            columns, counts = self.encoder.transform_table(
                raw, with_labels=with_labels, on_bad_row=on_bad_row, groups=groups
            )
            report.add(counts, raw)
            kept = raw.frame.filter(~pl.col(ROW).is_in(raw.unfit)).select(keep).collect() if keep else NOTHING
            yield columns, kept


class Report:
    """What was found in the rows that a predictor scored, for `Predictor.stream` to fill."""

    def __init__(self, encoder: Encoder, name: str = "data") -> None:
        self._encoder = encoder
        self.counts = Counts()
        self.remarks: list[str] = []
        self.name = name  # of the rows that were counted last
        self._raw: RawTable | None = None
        self._unfit: list[Any] = []

    def add(self, counts: Counts, raw: RawTable | None = None) -> None:
        """Count rows; those of a table may be numbered."""
        self.counts.add(counts)
        if raw is not None:
            self._raw, self.name = raw, raw.name
            self._unfit.append(raw.unfit)

    def place(self, position: int) -> str:
        """How to speak of one of the rows that were counted last."""
        if self._raw is None:
            return f"{self.name}: row {position + 1}"
        scored = self._raw.frame.select(ROW).filter(~pl.col(ROW).is_in(self._raw.unfit)).collect()
        return self._raw.place(int(scored[ROW][position]))

    def check(self) -> None:
        """All rows have been seen.

        Raises:
            SchemaError: a column holds no value that train knew, and cannot be right.
        """
        whole = name_of(self._raw.sources) if self._raw is not None and self._raw.sources else self.name
        self.remarks = self._encoder.judge(self.counts, whole)

    def as_dict(self) -> dict[str, Any]:
        """What `Predictor.predict` returns beside the probabilities."""
        skipped_rows: list[int] = []
        if self._raw is not None:
            skipped_rows = dataclasses.replace(self._raw, unfit=np.concatenate(self._unfit)).skipped_rows
        names = [feature.name for feature in self._encoder.schema.sparse]
        return {
            "rows": self.counts.rows,
            "unseen": {name: self.counts.unseen.get(name, 0) for name in names},
            "missing": {name: self.counts.missing.get(name, 0) for name in names},
            "empty": self.counts.empty,
            "ignored": self.counts.ignored,
            "skipped": dict(self.counts.skipped + (self._raw.skipped if self._raw is not None else Counter())),
            "skipped_rows": skipped_rows,
            "remarks": self.remarks,
        }
