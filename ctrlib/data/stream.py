"""Raw rows a block at a time, in memory: for scoring files of any size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any, TypeVar

import polars as pl
import pyarrow.parquet as pq

from ctrlib.data.raw import RawTable, clean, naming, numbered, open_text, read_parquet
from ctrlib.data.scan import DataError, OnBadRow

BLOCK_ROWS = 1 << 16
Item = TypeVar("Item")


def blocks(
    data: str | Path | pl.DataFrame,
    *,
    name: str = "rows",
    wanted: Collection[str] | None = None,
    separator: str | None = None,
    columns: Sequence[str] | None = None,
    missing_values: Sequence[str] = ("",),
    on_bad_row: OnBadRow = "raise",
    may_lack: Sequence[Sequence[str]] = (),
) -> Iterator[RawTable]:
    """Tables of some rows each, in order; rows keep their numbers in the whole.

    Args:
        data: a CSV, TSV or parquet file, a folder of parquet files, or a frame.
        name: what to call a frame in messages.
        wanted: of parquet, the columns to read; by default all.
        separator, columns, missing_values, on_bad_row, may_lack: as in `ctrlib.data.raw.read_raw`.

    Raises:
        DataError, SchemaError: as `read_raw`.
    """
    if isinstance(data, pl.DataFrame):
        if not data.height:
            raise DataError(f"{name} has no rows: expected at least one")
        for start in range(0, data.height, BLOCK_ROWS):
            piece = data.slice(start, BLOCK_ROWS)
            yield RawTable((numbered(clean(piece.lazy(), missing_values), start),), name)
        return
    path = Path(data)
    if not path.exists():
        raise DataError(f"{path} does not exist: expected a CSV, TSV or parquet file")
    if path.is_dir() or path.suffix in (".parquet", ".pq"):
        yield from _parquet(path, wanted, missing_values, on_bad_row)
        return
    with open_text(path, separator, columns, missing_values, on_bad_row, may_lack) as text:
        start = 0
        for block in text.blocks():
            rows = text.parse(block)
            yield text.table([numbered(rows.lazy(), start)])
            start += rows.height
            num_bad = len(text.scanner.bad_rows)
        if len(text.scanner.bad_rows) > num_bad:  # those at the end count, too
            yield text.table([numbered(rows.clear().lazy(), start)])


def _parquet(
    path: Path, wanted: Collection[str] | None, missing_values: Sequence[str], on_bad_row: OnBadRow
) -> Iterator[RawTable]:
    skipped = read_parquet(path, str(path), missing_values, on_bad_row, None).skipped  # by every file's metadata
    start = 0
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        with naming(str(file)), pq.ParquetFile(file) as reader:
            names = [name for name in reader.schema_arrow.names if wanted is None or name in wanted]
            for batch in reader.iter_batches(BLOCK_ROWS, columns=names):
                frame = pl.DataFrame(pl.from_arrow(batch))
                yield RawTable((numbered(clean(frame.lazy(), missing_values), start),), str(path), None, skipped)
                start += frame.height


def ahead(items: Iterator[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made up to `depth` ahead by a thread; its errors come up where its items would.

    >>> list(ahead(iter(range(3))))
    [0, 1, 2]
    """
    queue: Queue[tuple[bool, Any]] = Queue(depth)
    stopped = Event()

    def work() -> None:
        try:
            for item in items:
                queue.put((True, item))
                if stopped.is_set():
                    return
            queue.put((False, None))
        except BaseException as error:
            queue.put((False, error))

    thread = Thread(target=work, name="ctrlib-ahead", daemon=True)
    thread.start()
    try:
        while True:
            is_item, value = queue.get()
            if is_item:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room
            if not queue.empty():
                queue.get()
            thread.join(0.01)
