"""Raw rows a block at a time, in memory: for scoring files of any size."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from ctrlib.data.formats import format_of
from ctrlib.data.parts import alike, parts_of
from ctrlib.data.raw import (
    RawData,
    check_paths,
    json_table,
    open_json,
    open_text,
    paths_of,
    read_arrow,
    read_parquet,
    two_kinds,
)
from ctrlib.data.scan import DataError, OnBadRow
from ctrlib.data.table import ROW, RawTable, check_names, clean, naming, numbered, of_arrow

BLOCK_ROWS = 1 << 16
Item = TypeVar("Item")


def blocks(
    data: RawData,
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

    Of several files each table is called by its own, and has it, and those before, as its `sources`.

    Args:
        data: a file as `read_raw` takes it, a folder of parquet files, a list of those, or a polars frame.
        name: what to call a frame in messages.
        wanted: the columns that must be there: of parquet and Arrow files no others are read; by default all.
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
    if isinstance(data, list | tuple):
        check_paths(data, name)
        options = {"separator": separator, "columns": columns, "missing_values": missing_values}
        yield from _files(paths_of(data), wanted, **options, on_bad_row=on_bad_row, may_lack=may_lack)
        return
    path = Path(data)
    form = format_of(path)
    if form == "parquet":
        yield from _parquet(path, wanted, missing_values, on_bad_row)
        return
    if form == "arrow":
        yield from _arrow(path, wanted, missing_values)
        return
    if form == "json lines":
        yield from _json(path, wanted or (), missing_values, on_bad_row)
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


def _files(paths: Sequence[Path], wanted: Collection[str] | None, **options: Any) -> Iterator[RawTable]:
    """The blocks of files that follow each other; numbers of rows are those in the whole."""
    forms = [format_of(path) for path in paths]
    for path, form in zip(paths, forms):
        if (form == "text") != (forms[0] == "text"):
            raise two_kinds(str(path), str(paths[0]))
    if {*forms} <= {"parquet", "arrow"}:
        columns = _alike(paths, wanted, options["missing_values"], options["on_bad_row"])
    else:  # text has one type, and types of JSON lines are not known before they are read
        columns = [[pl.exclude(ROW)] for _ in paths]
    sources: list[tuple[int, RawTable]] = []
    skipped: Counter[str] = Counter()
    malformed = np.zeros(0, np.int64)
    num_rows = 0
    for path, selected in zip(paths, columns):
        first, table = num_rows, None
        for table in blocks(path, wanted=wanted, **options):
            pieces = tuple(piece.select(pl.col(ROW) + first, *selected) for piece in table.pieces)
            yield dataclasses.replace(
                table,
                pieces=pieces,
                skipped=skipped + table.skipped,
                malformed=np.concatenate([malformed, table.malformed + (first + len(malformed))]),
                sources=(*sources, (first, table)),
            )
            num_rows += table.count_rows()
        assert table is not None  # a file without rows is refused
        sources.append((first, table))
        skipped += table.skipped
        malformed = np.concatenate([malformed, table.malformed + (first + len(malformed))])


def _alike(
    paths: Sequence[Path], wanted: Collection[str] | None, missing_values: Sequence[str], on_bad_row: OnBadRow
) -> list[list[pl.Expr]]:
    """What to select of each file, such that types which differ and lose nothing are the same, as in preparation."""
    tables = [
        read_parquet(path, str(path), missing_values, on_bad_row, None, wanted)
        if format_of(path) == "parquet"
        else read_arrow(path, missing_values, None)
        for path in paths
    ]
    return alike([(table.name, table.frame.drop(ROW)) for table in tables], wanted)


def _parquet(
    path: Path, wanted: Collection[str] | None, missing_values: Sequence[str], on_bad_row: OnBadRow
) -> Iterator[RawTable]:
    parts, start = parts_of(path), 0
    with naming(str(parts[0].path)):
        wanted = _wanted(parts[0].scan().collect_schema().names(), wanted)
    table = read_parquet(path, str(path), missing_values, on_bad_row, None, wanted)  # by every file's metadata
    columns = alike([(str(part.path), part.scan()) for part in parts], wanted)
    for part, alike_columns in zip(parts, columns):
        with naming(str(part.path)), pq.ParquetFile(part.path) as reader:
            # Of no column Arrow would give no rows.
            names = [name for name in reader.schema_arrow.names if name in wanted] or reader.schema_arrow.names[:1]
            for batch in _batches(reader, names):
                frame = part.with_keys(of_arrow(batch).lazy()).select(alike_columns)
                piece = numbered(clean(frame, missing_values), start)
                yield RawTable((piece,), str(path), None, table.skipped, keys=table.keys)
                start += batch.num_rows


def _batches(reader: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of some columns. Lists of a dictionary are not joined by Arrow over row groups, which have one each."""
    kinds = [reader.schema_arrow.field(name).type for name in names]
    apart = any(pa.types.is_nested(kind) and "dictionary" in str(kind) for kind in kinds)
    for groups in [[number] for number in range(reader.num_row_groups)] if apart else [None]:
        yield from reader.iter_batches(BLOCK_ROWS, row_groups=groups, columns=names)


def _wanted(names: list[str], wanted: Collection[str] | None) -> list[str]:
    """The columns to read: those that are wanted, and all where some of these are missing, for the error to name."""
    return names if wanted is None or not set(wanted) <= set(names) else [name for name in names if name in wanted]


def _arrow(path: Path, wanted: Collection[str] | None, missing_values: Sequence[str]) -> Iterator[RawTable]:
    start = 0
    with naming(str(path)), pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        check_names(str(path), reader.schema.names)
        names = _wanted(reader.schema.names, wanted)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number).select(names)
            for offset in range(0, batch.num_rows, BLOCK_ROWS):
                frame = of_arrow(batch.slice(offset, BLOCK_ROWS))
                yield RawTable((numbered(clean(frame.lazy(), missing_values), start),), str(path))
                start += frame.height
    if not start:
        raise DataError(f"{path} has no rows: expected at least one")


def _json(
    path: Path, wanted: Collection[str], missing_values: Sequence[str], on_bad_row: OnBadRow
) -> Iterator[RawTable]:
    with open_json(path, on_bad_row) as lines:
        start = 0
        for rows in lines.frames(wanted):
            check_names(str(path), rows.columns)
            yield json_table(lines, [numbered(clean(rows.lazy(), missing_values), start)])
            start += rows.height
            num_bad = len(lines.bad_rows)
        if len(lines.bad_rows) > num_bad:  # those at the end count, too
            yield json_table(lines, [numbered(clean(rows.clear().lazy(), missing_values), start)])


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
