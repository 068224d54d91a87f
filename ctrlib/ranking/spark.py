"""Joint counts of a prepared folder by the executors of a Spark session: the same bits as those of one machine."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from ctrlib.errors import check_whole
from ctrlib.ranking.relevance import Counts, count
from ctrlib.ranking.source import Source

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def count_with_spark(
    spark: SparkSession, folder: str | Path, split: str = "train", *, num_bins: int = 32, num_parts: int | None = None
) -> Counts:
    """As `ctrlib.ranking.count`, each executor counting some of the row groups.

    An executor holds the distinct values of its part, the driver those of all, which it merges one after another.

    Args:
        spark: the session; its executors have ctrlib.
        folder: prepared, at a path that means the same files to driver and executors.
        split: of the folder.
        num_bins: quantile bins per number.
        num_parts: tasks; as many as the session runs at once by default.

    Raises:
        ValueError: `num_parts` or `num_bins` is below 1.
        SchemaError: the folder is damaged, or has no such split.
    """
    num_parts = spark.sparkContext.defaultParallelism if num_parts is None else num_parts
    check_whole(1, num_bins=num_bins, num_parts=num_parts)
    folder = Path(folder).absolute()
    Source(folder, num_bins=num_bins).num_rows(split)  # what is wrong is said here

    def each(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        source = Source(folder, num_bins=num_bins)
        for batch in batches:
            for part in batch.column(0).to_pylist():
                # In memory: files of an executor are no use to the driver.
                counts = count(source, split, shard=(part, num_parts), memory=sys.maxsize)
                yield pa.record_batch({"counts": pa.array([pickle.dumps(counts)], pa.binary())})

    answers = spark.range(0, num_parts, 1, num_parts).mapInArrow(each, "counts binary")
    merged: Counts | None = None
    for row in answers.toLocalIterator():
        counts: Counts = pickle.loads(row.counts)
        merged = counts if merged is None else Counts.merge([merged, counts])
    assert merged is not None  # there is one part or more
    return merged
