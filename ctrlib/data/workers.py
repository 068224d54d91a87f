"""Who does the work of preparation: this machine, or many (`ctrlib.data.spark`).

What is done is defined elsewhere, once, as polars expressions; workers only decide where a piece of a table is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from ctrlib.data.encode import Totals, write_part
from ctrlib.data.raw import Plan, RawTable, naming, read_raw
from ctrlib.data.scan import OnBadRow
from ctrlib.data.vocabulary import count_here
from ctrlib.schema import Schema


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

    def count(self, tables: Sequence[RawTable], plans: Mapping[str, Plan]) -> Mapping[str, pl.LazyFrame]:
        """`ctrlib.data.vocabulary.count_here`."""

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


class ThisMachine:
    """Polars, on all cores of this machine."""

    read = staticmethod(read_raw)
    count = staticmethod(count_here)

    def write(
        self,
        tables: Mapping[str, RawTable],
        folder: Path,
        schema: Schema,
        known: Mapping[str, Path],
        label_positive: Mapping[str, str] | None,
    ) -> dict[str, Totals]:
        """As in `Workers`, a file for each split."""
        values = {name: pl.read_parquet(path, columns=["value", "id"], glob=False) for name, path in known.items()}
        totals = {}
        for split, table in tables.items():
            with naming(table.name):
                path = folder / split / "part-00000.parquet"
                totals[split] = write_part(table.frame, path, schema, values, label_positive)
        return totals
