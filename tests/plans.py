"""Preparation by plans over rows, in pieces of any size: what `ctrlib.data.codes` does once for each distinct cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ctrlib.data.encode import Totals, write_part
from ctrlib.data.quantiles import write_points
from ctrlib.data.raw import read_raw
from ctrlib.data.table import RawTable, naming
from ctrlib.data.vocabulary import Vocabularies, counted, values_of
from ctrlib.schema import Schema


class Plans:
    """As `ctrlib.data.workers.Workers`."""

    def __init__(self, piece_rows: int | None = None) -> None:
        self.piece_rows = piece_rows

    def read(self, *args: Any, **options: Any) -> RawTable:
        return read_raw(*args, piece_rows=self.piece_rows, **options)

    def count(self, tables: Sequence[RawTable], vocabularies: Vocabularies) -> Iterator[tuple[str, pl.LazyFrame]]:
        for name, features in vocabularies.items():
            columns = [values_of(features, table.dtypes)(piece) for table in tables for piece in table.pieces]
            yield name, counted(pl.concat(columns))

    def points(self, train: RawTable, folder: Path, schema: Schema) -> None:
        write_points(folder, schema, folder)

    def write(
        self,
        tables: Mapping[str, RawTable],
        folder: Path,
        schema: Schema,
        known: Mapping[str, Path],
        label_positive: Mapping[str, str] | None,
    ) -> dict[str, Totals]:
        values = {name: pl.read_parquet(path, columns=["value", "id"], glob=False) for name, path in known.items()}
        totals = {}
        for split, table in tables.items():
            with naming(table.name):
                path = folder / split / "part-00000.parquet"
                totals[split] = write_part(table.frame, path, schema, values, label_positive)
        return totals
