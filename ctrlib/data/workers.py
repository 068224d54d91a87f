"""Who does the work of preparation: this machine, or many (`ctrlib.data.spark`).

What is done is defined elsewhere, once, as polars expressions; workers only decide where a piece of a table is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from ctrlib.data.coded import NUM_THREADS, CodedTable, read_coded
from ctrlib.data.codes import count_numbers, count_values, write_coded
from ctrlib.data.encode import Totals
from ctrlib.data.quantiles import points_of, points_path
from ctrlib.data.scan import OnBadRow
from ctrlib.data.stream import ahead
from ctrlib.data.table import RawTable
from ctrlib.data.vocabulary import Vocabularies
from ctrlib.schema import Numeric, Schema


class Workers(Protocol):
    """What preparation asks of them."""

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
        """`ctrlib.data.raw.read_raw`."""

    def count(self, tables: Sequence[RawTable], vocabularies: Vocabularies) -> Iterable[tuple[str, pl.LazyFrame]]:
        """`ctrlib.data.vocabulary.Count`."""

    def write(
        self,
        tables: Mapping[str, RawTable],
        folder: Path,
        schema: Schema,
        known: Mapping[str, Path],
        label_positive: Mapping[str, str] | None,
    ) -> dict[str, Totals]:
        """Encode each split into files part-*.parquet, in order, of the folder of its name, which is there.

        `tables` hold no bad rows; `known` are parquet files with value and id of all that `encode_checked` looks up.
        """

    def points(self, train: RawTable, folder: Path, schema: Schema) -> None:
        """`ctrlib.data.quantiles.write_points` of a folder whose splits are written, and the table of its train."""


class ThisMachine:
    """This machine's cores, which touch every text once (`ctrlib.data.coded`)."""

    read = staticmethod(read_coded)

    def count(self, tables: Sequence[RawTable], vocabularies: Vocabularies) -> Iterator[tuple[str, pl.LazyFrame]]:
        """As `ctrlib.data.vocabulary.Count`; the next vocabulary is counted meanwhile."""
        return ahead((name, count_values(_coded(tables), features)) for name, features in vocabularies.items())

    def write(
        self,
        tables: Mapping[str, RawTable],
        folder: Path,
        schema: Schema,
        known: Mapping[str, Path],
        label_positive: Mapping[str, str] | None,
    ) -> dict[str, Totals]:
        """As in `Workers`, a file for each split."""
        return write_coded(dict(zip(tables, _coded(tables.values()))), folder, schema, known, label_positive)

    def points(self, train: RawTable, folder: Path, schema: Schema) -> None:
        """As in `Workers`."""
        (table,) = _coded([train])

        def write(feature: Numeric) -> None:
            points_of(*count_numbers(table, feature)).write_parquet(points_path(folder, feature.name))

        if schema.dense:
            points_path(folder, "").parent.mkdir()
            with ThreadPoolExecutor(NUM_THREADS) as threads:
                list(threads.map(write, schema.dense))


def _coded(tables: Iterable[RawTable]) -> list[CodedTable]:
    """The tables that `read` gave, with rows left out or not; none is left out silently."""
    coded = []
    for table in tables:
        assert isinstance(table, CodedTable), f"{table.name} is not coded: it was changed by `map`, not by `only`"
        coded.append(table)
    return coded
