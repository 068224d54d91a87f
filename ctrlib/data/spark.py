"""Preparation by many machines: Spark says which executor works on which piece of a table, polars does the work.

There is one definition of every transform, the polars expressions of `ctrlib.data`: an executor gets a piece of a table
as a lazy plan and runs it as one machine alone would. Spark itself does two things, and both are exact: it adds up
how often each value came up in the pieces, and looks up the ids of the values that a piece holds. So the prepared
folder is the same, bit for bit, as that of one machine (`ctrlib.data.fingerprint` compares them); only the number of
files, and so of row groups, differs.

What it needs:

* ctrlib, and the same version of polars, on driver and executors.
* Paths (`data`, `out`) that mean the same files on all of them: a shared file system. Data that lies elsewhere comes as
  a Spark DataFrame, which is written into the folder in the making once.
* The order of rows, by which a random split goes, is that of files by name and of rows within them, or that of the
  DataFrame. If nothing fixes the latter, fix it: `frame.orderBy(...)` by columns that tell all rows apart.

Where its bounds are:

* Executors: a task streams over a piece of 2^20 rows, or over a partition of a DataFrame, and holds the distinct values
  of one piece. Polars starts as many threads as there are cores, in every task: with several tasks to an executor, set
  `spark.executorEnv.POLARS_MAX_THREADS` to 1.
* Driver: the largest vocabulary (values that are frequent enough, and their counts) while it is put in order, or the
  texts of all groups if they are not integers, about 100 bytes a value; one column of numbers of train at a time, about
  12 bytes a row; numbers of bad rows, if they are skipped.
* A text file (CSV, TSV) is cut into rows and checked by the driver, since a quote may concern all rows after it; what
  follows is shared. Parquet and DataFrames are read by the executors.
"""

from __future__ import annotations

import pickle
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlib.data.columns import GROUP_COLUMN
from ctrlib.data.encode import Totals, write_part
from ctrlib.data.quantiles import write_points
from ctrlib.data.raw import check_paths, read_parquet, read_raw
from ctrlib.data.scan import DataError, OnBadRow
from ctrlib.data.table import RawTable, as_frame, check_names, naming, run_here
from ctrlib.data.vocabulary import Vocabularies, counted, values_of
from ctrlib.errors import UnsupportedError
from ctrlib.schema import Categorical, Schema, SchemaError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PIECE_ROWS = 1 << 20
_BATCH_ROWS = 1 << 16


class SparkWorkers:
    """The executors of a Spark session; as `ctrlib.data.workers.Workers`."""

    def __init__(self, spark: SparkSession, temporary: Path) -> None:
        self._spark, self._temporary = spark, temporary.absolute()

    def read(
        self,
        data: Any,
        temporary: Path,
        *,
        name: str,
        separator: str | None,
        columns: Sequence[str] | None,
        missing_values: Sequence[str],
        on_bad_row: OnBadRow,
    ) -> RawTable:
        """As `ctrlib.data.raw.read_raw`, and Spark DataFrames too."""
        temporary = temporary.absolute()
        if not isinstance(data, str | Path | list | tuple | pl.LazyFrame) and not hasattr(data, "sparkSession"):
            data = as_frame(data, name)
        if isinstance(data, pl.DataFrame | pl.LazyFrame):
            temporary.mkdir(parents=True)
            with naming(name):
                check_names(name, data.lazy().collect_schema().names())
                data.lazy().sink_parquet(temporary / "0.parquet")
            table = read_parquet(temporary, name, missing_values, on_bad_row, PIECE_ROWS)
        elif hasattr(data, "sparkSession"):
            check_names(name, data.columns)
            _refuse_months(data, name)
            temporary.mkdir(parents=True)
            if not _write_partitions(data, temporary, name):
                raise DataError(f"{name} has no rows: expected at least one")
            table = read_parquet(temporary, name, missing_values, on_bad_row, PIECE_ROWS)
        else:
            # Absolute, for the executors.
            if not isinstance(data, str | Path):
                check_paths(data, name)
            data = Path(data).absolute() if isinstance(data, str | Path) else [Path(one).absolute() for one in data]
            table = read_raw(data, temporary, name=name, separator=separator, columns=columns,
                             missing_values=missing_values, on_bad_row=on_bad_row, piece_rows=PIECE_ROWS)  # fmt: skip
        table.run = self._run
        return table

    def count(self, tables: Sequence[RawTable], vocabularies: Vocabularies) -> list[tuple[str, pl.LazyFrame]]:
        """As `ctrlib.data.vocabulary.Count`; Spark adds up what was counted in the pieces."""
        folder = self._temporary / f"counts-{uuid.uuid4().hex}"
        folder.mkdir(parents=True)

        plans = [[values_of(features, table.dtypes) for features in vocabularies.values()] for table in tables]

        def count(_: int, task: tuple[int, pl.LazyFrame]) -> Iterator[pl.DataFrame]:
            table, piece = task
            for number, plan in enumerate(plans[table]):
                counts = counted(plan(piece)).collect(engine="streaming")
                yield counts.select(pl.lit(number).alias("vocabulary"), "value", "count")

        tasks = [(number, piece) for number, table in enumerate(tables) for piece in table.pieces]
        pieces = self._each(tasks, count, "vocabulary long, value string, count long")
        counts = pieces.groupBy("vocabulary", "value").sum("count").withColumnRenamed("sum(count)", "count")
        # Sorted, so that each vocabulary lies in a few row groups.
        _write_partitions(counts.sortWithinPartitions("vocabulary"), folder, "counts")
        files = sorted(folder.glob("*.parquet"))
        if not files:
            return [(name, pl.LazyFrame(schema={"value": pl.String, "count": pl.Int64})) for name in vocabularies]
        found = pl.scan_parquet(files, glob=False)
        return [
            (name, found.filter(pl.col("vocabulary") == number).select("value", "count"))
            for number, name in enumerate(vocabularies)
        ]

    def write(
        self,
        tables: Mapping[str, RawTable],
        folder: Path,
        schema: Schema,
        known: Mapping[str, Path],
        label_positive: Mapping[str, str] | None,
    ) -> dict[str, Totals]:
        """As in `ctrlib.data.workers.Workers`, a file for each piece that has rows."""
        features = {**schema.vocabularies, GROUP_COLUMN: (Categorical(schema.group or ""),)}
        plans, pieces = {}, []
        for split, table in tables.items():
            dtypes = table.dtypes
            plans[split] = [values_of(features[name], dtypes) for name in known]
            for number, rows in enumerate(table.pieces):
                pieces.append((split, table.name, rows, folder.absolute() / split / f"part-{number:05}.parquet"))

        packed = [pickle.dumps(piece) for piece in pieces]

        def distinct(number: int, piece: tuple[str, str, pl.LazyFrame, Path]) -> Iterator[pl.DataFrame]:
            # A first row for the piece itself: it may hold no value at all.
            yield pl.DataFrame({"piece": [number], "vocabulary": [-1], "value": [None]})
            split, _, rows, _ = piece
            for vocabulary, plan in enumerate(plans[split]):
                values = plan(rows).unique().drop_nulls().collect(engine="streaming")
                yield values.select(pl.lit(number).alias("piece"), pl.lit(vocabulary).alias("vocabulary"), "value")

        def entries(_: int, groups: list[tuple[int, Path, int]]) -> Iterator[pl.DataFrame]:
            for number, path, index in groups:
                values = pl.DataFrame(pq.ParquetFile(path).read_row_group(index, columns=["value", "id"]))
                yield values.select(pl.lit(number).alias("vocabulary"), "value", "id")

        def write(key: tuple[pa.Scalar, ...], ids: pa.Table) -> pa.Table:
            number = key[0].as_py()
            _, name, rows, path = pickle.loads(packed[number])
            found = pl.DataFrame(ids).drop_nulls("id")
            of_piece = {
                vocabulary: found.filter(pl.col("vocabulary") == position).select("value", "id")
                for position, vocabulary in enumerate(known)
            }
            answer = _answer(number, lambda: _write_piece(rows, name, path, schema, of_piece, label_positive))
            return pa.Table.from_batches(_batches(answer, _ANSWER))

        values = self._each(pieces, distinct, "piece long, vocabulary long, value string")
        known_ids = self._each(_row_groups(known.values()), entries, "vocabulary long, value string, id long")
        ids = values.join(known_ids, ["vocabulary", "value"], "left")
        # So many partitions that few hold more than one piece, by the number they hash to.
        by_piece = ids.repartition(2 * len(pieces), "piece").groupBy("piece")
        totals: dict[str, Totals] = {}
        for (split, *_), found in zip(pieces, _results(by_piece.applyInArrow(write, _ANSWER))):
            totals[split] = totals[split] + found if split in totals else found
        return totals

    def points(self, train: RawTable, folder: Path, schema: Schema) -> None:
        """As in `ctrlib.data.workers.Workers`, by the driver."""
        write_points(folder, schema, folder)

    def _run(self, plans: Sequence[pl.LazyFrame], name: str) -> list[pl.DataFrame]:
        """As `ctrlib.data.table.run_here`."""

        def run(number: int, plan: pl.LazyFrame) -> Iterator[pl.DataFrame]:
            yield _answer(number, lambda: run_here([plan], name)[0])

        return _results(self._each(plans, run, _ANSWER))

    def _each(
        self, tasks: Sequence[_Task], work: Callable[[int, _Task], Iterator[pl.DataFrame]], columns: str
    ) -> DataFrame:
        """All that `work` makes of every task and its number; each is a task of Spark's, too."""
        version, packed = pl.__version__, [pickle.dumps(task) for task in tasks]  # so each unpacks its own only

        def each(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            if pl.__version__ != version:  # plans are not understood by other versions
                raise UnsupportedError(f"polars is {pl.__version__} here and {version} on the driver: install the same")
            for batch in batches:
                for number in batch.column(0).to_pylist():
                    for frame in work(number, pickle.loads(packed[number])):
                        yield from _batches(frame, columns)

        return self._spark.range(0, len(tasks), 1, len(tasks)).mapInArrow(each, columns)


_Task = TypeVar("_Task")
_ANSWER = "task long, answer binary"
_ARROW = {"long": pa.int64(), "string": pa.string(), "binary": pa.binary()}


def _answer(task: int, work: Callable[[], Any]) -> pl.DataFrame:
    """What comes of it; an error about the data is an answer, too, so that it reaches the driver as it is."""
    try:
        answer = work()
    except (DataError, SchemaError) as error:
        answer = error
    return pl.DataFrame({"task": [task], "answer": [pickle.dumps(answer)]})


def _results(answers: DataFrame) -> list[Any]:
    """What the tasks have answered, in their order; the first error is raised."""
    found = [pickle.loads(row.answer) for row in sorted(answers.collect(), key=lambda row: row.task)]
    for error in found:
        if isinstance(error, Exception):
            raise error
    return found


def _batches(frame: pl.DataFrame, columns: str) -> Iterator[pa.RecordBatch]:
    """A frame as Spark reads it, in batches of bounded size; `columns` as in "task long, answer binary"."""
    kinds = dict(column.split(" ") for column in columns.split(", "))
    schema = pa.schema([(name, _ARROW[kind]) for name, kind in kinds.items()])
    table = frame.select(list(kinds)).to_arrow(compat_level=pl.CompatLevel.oldest())
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        yield batch.cast(schema)


def _row_groups(paths: Iterable[Path]) -> list[list[tuple[int, Path, int]]]:
    """The row groups of files, as (number of the file, path, index): one list of them for each million rows."""
    groups, num_rows = [], 0
    for number, path in enumerate(paths):
        metadata = pq.ParquetFile(path).metadata
        groups += [(number, path.absolute(), index) for index in range(metadata.num_row_groups)]
        num_rows += metadata.num_rows
    num_lists = num_rows // PIECE_ROWS + 1
    return [groups[start::num_lists] for start in range(num_lists)]


def _refuse_months(frame: DataFrame, name: str) -> None:
    """Refuse intervals of months, which are no fixed time, and which neither Arrow in Python nor parquet has.

    Raises:
        SchemaError: as said.
    """
    for column, dtype in frame.dtypes:
        if re.search(r"\binterval\b(?!:| (day|hour|minute|second))", dtype):
            raise SchemaError(
                f"{name}: column {column!r} has Spark's type {dtype}, which parquet cannot hold: cast it to a number "
                "of months, or leave it out"
            )


def _write_partitions(frame: DataFrame, folder: Path, name: str) -> int:
    """Write a DataFrame as one parquet file for each partition that has rows, in their order; the number of rows.

    Raises:
        DataError: the executors do not write into the folder that is seen here.
    """

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        context = TaskContext.get()
        assert context is not None
        path = folder / f"{context.partitionId():06}.parquet"
        num_rows, writer, making = 0, None, _making(path)
        for batch in batches:
            if batch.num_rows:
                writer = writer or pq.ParquetWriter(making, batch.schema)
                writer.write_batch(batch)
                num_rows += batch.num_rows
        if writer is not None:
            writer.close()
            making.replace(path)
        yield pa.record_batch({"rows": pa.array([num_rows], pa.int64())})

    num_rows: int = sum(row.rows for row in frame.mapInArrow(write, "rows long").collect())
    num_seen = sum(pq.ParquetFile(file).metadata.num_rows for file in folder.glob("*.parquet"))
    if num_seen != num_rows:
        raise DataError(
            f"{name}: the executors have written {num_rows:,} rows into {folder} and the driver sees {num_seen:,} "
            "there: give an output folder on a file system that they share"
        )
    return num_rows


def _write_piece(
    rows: pl.LazyFrame,
    name: str,
    path: Path,
    schema: Schema,
    known: Mapping[str, pl.DataFrame],
    label_positive: Mapping[str, str] | None,
) -> Totals:
    """`write_part`, but no file if the piece has no row."""
    making = _making(path)
    with naming(name):
        totals = write_part(rows, making, schema, known, label_positive)
    if totals.rows:
        making.replace(path)
    else:
        making.unlink()
    return totals


def _making(path: Path) -> Path:
    """A name of its own for every attempt: Spark may start a task twice."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
