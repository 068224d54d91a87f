"""Columns that are made of a log's events, beside those of the raw files."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from ctrlib.data.coded import BLOCK_ROWS, Block, CodedTable, coded_table, write_column
from ctrlib.data.event_state import State
from ctrlib.data.past import NUM_FOLDS, Ints, Log
from ctrlib.data.split import row_hash
from ctrlib.data.table import ROW, RawTable
from ctrlib.errors import ArgumentError

_SEED = 1 << 40  # of folds: another one than splits are drawn from


def derive(
    tables: Mapping[str, RawTable],
    rows_of: Mapping[str, pl.Expr],
    state: State,
    label_positive: Mapping[str, str] | None,
    folder: Path,
) -> tuple[dict[str, RawTable], State]:
    """The tables with the columns that are made of all their rows, and the state when these have happened.

    Args:
        tables: of each split, or "data" with all rows.
        rows_of: split -> its rows, where one table is to be split.
        state: what happened before.
        label_positive: label -> text of its positive class, for labels that are text.
        folder: for temporary files, which stay as long as the tables.

    Raises:
        SchemaError, DataError: as `State.read`.
        ArgumentError: the tables are not on this machine.
    """
    logs, folds = {}, {}
    for name, table in tables.items():
        if not isinstance(table, CodedTable):
            raise ArgumentError(
                "histories and rates are made on one machine, in the order of time: prepare without Spark, or make "
                "them in Spark, and give them as columns"
            )
        state, logs[name] = state.read(table, label_positive)
        if state.events.time is None:
            folds[name] = _folds(table, name, rows_of)
            labels = np.where(folds[name] < NUM_FOLDS, logs[name].labels, np.int8(-1))
            logs[name] = dataclasses.replace(logs[name], labels=labels)  # what is not in train is no event
    log = Log.joined(list(logs.values()))
    past = state.past_of(log, np.concatenate(list(folds.values())) if folds else None)
    made: dict[str, RawTable] = {}
    first = len(state.pending)
    for name, table in tables.items():
        assert isinstance(table, CodedTable)
        times = state.seen_by(logs[name].times)
        answers = past.of_log(slice(first, first + len(logs[name])), times, folds.get(name))
        made[name] = _widened(table, answers.columns, folder / name)
        first += len(logs[name])
    return made, state.after(log)


def _folds(table: RawTable, name: str, rows_of: Mapping[str, pl.Expr]) -> Ints:
    """The fold of each row of train, by its number; `NUM_FOLDS` for others."""
    in_train = rows_of["train"].fill_null(False) if name == "data" else pl.lit(name == "train")
    fold = pl.when(in_train).then(row_hash(pl.col(ROW), _SEED) % NUM_FOLDS).otherwise(NUM_FOLDS)
    return table.gather(lambda piece: piece.select(fold=fold.cast(pl.Int64)))["fold"].to_numpy()


def _widened(table: CodedTable, columns: Callable[[slice], dict[str, pa.Array]], folder: Path) -> CodedTable:
    """The table with more columns: what `columns` gives of some rows. Blocks become small enough for lists."""
    assert not table.where, f"{table.name} has lost rows already"
    blocks: list[Block] = []
    for block in table.blocks:
        is_small = block.num_rows <= BLOCK_ROWS and not block.apart
        for rows in block.slices(BLOCK_ROWS):
            start, stop = block.first_row + rows.start, block.first_row + rows.stop
            part = block if is_small else block.cut_out(rows, folder / f"{len(blocks):06}")
            made = columns(slice(start, stop))
            wider = dataclasses.replace(part, names=(*part.names, *made))
            for name, column in made.items():
                write_column(column, wider.path(name))
            blocks.append(wider)
        if not is_small:
            shutil.rmtree(block.folder)
    return coded_table(table, tuple(blocks))
