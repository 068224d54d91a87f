"""Columns of a prepared folder as whole numbers, block by block: ids as they are, numbers as bins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.data.columns import Ragged, decode, find_row_groups
from ctrlib.data.quantiles import quantile_edges
from ctrlib.manifest import load_schema
from ctrlib.schema import MISSING_ID, MISSING_RAW_ID, Categorical, Feature, Numeric, RawId, Schema

Array = npt.NDArray[Any]
MISSING_NUMBER = 0  # code of the number that stands in missing cells


@dataclass(frozen=True)
class Block:
    """Some rows, and a name that tells them from other rows of the folder.

    Shape: codes: feature -> (B,) whole numbers; lists: feature -> B lists of them; labels (B, T), NaN where missing;
    weights (B,), or None.
    """

    name: str
    codes: dict[str, Array]
    lists: dict[str, Ragged]
    labels: Array
    weights: Array | None


class Source:
    """The splits of a prepared folder, to be read as often as needed, a row group at a time.

    A number's code is that of its bin among `num_bins` quantile bins of train, from 1 on, or 0 if it is the one that
    preparation puts into missing cells: a missing number is a value by itself.

    Args:
        folder: prepared.
        num_bins: of each number.

    Raises:
        SchemaError: it is no prepared folder, or damaged.
    """

    def __init__(self, folder: str | Path, *, num_bins: int = 32) -> None:
        self.folder = Path(folder)
        self.schema: Schema = load_schema(folder)
        edges = quantile_edges(folder, num_bins) if self.schema.dense else []
        self._inner = {feature.name: np.array(one[1:-1], np.float32) for feature, one in zip(self.schema.dense, edges)}
        self._fill = {f.name: np.float32((f.parameters or {}).get("fill", np.nan)) for f in self.schema.dense}
        self._single = [f.name for f in self.schema.sparse if isinstance(f, Categorical | RawId)]

    def size(self, feature: Feature) -> int | None:
        """Codes of a feature are in [0, size); None for raw ids."""
        if isinstance(feature, RawId):
            return None
        return len(self._inner[feature.name]) + 2 if isinstance(feature, Numeric) else feature.num_embeddings

    def splits(self) -> list[str]:
        """Those of train, valid and test that are there."""
        return [name for name in ("train", "valid", "test") if any((self.folder / name).glob("*.parquet"))]

    def num_rows(self, split: str) -> int:
        """Of a split."""
        return sum(group.num_rows for group in find_row_groups(self.folder, split, self.schema))

    def blocks(self, split: str, shard: tuple[int, int] = (0, 1)) -> Iterator[Block]:
        """A split, or the row groups i, i + n, i + 2 n, ... of it, for shard (i, n)."""
        schema = self.schema
        first_label = len(schema.dense)
        for group in find_row_groups(self.folder, split, schema)[shard[0] :: shard[1]]:
            columns = decode([group], schema)
            codes = {name: np.ascontiguousarray(columns.ids[:, at]) for at, name in enumerate(self._single)}
            for at, feature in enumerate(schema.dense):
                codes[feature.name] = self._bins(feature.name, np.ascontiguousarray(columns.floats[:, at]))
            labels = columns.floats[:, first_label : first_label + len(schema.labels)]
            weights = columns.floats[:, first_label + len(schema.labels)] if schema.weight else None
            yield Block(f"{split}/{group.path.name}/{group.index}", codes, columns.ragged, labels, weights)

    def _bins(self, name: str, values: Array) -> Array:
        inner = self._inner[name]
        bins = np.searchsorted(inner, values, side="right").astype(np.int16) + np.int16(1)
        bins[values == self._fill[name]] = MISSING_NUMBER
        return bins


def missing_key(feature: Feature) -> int:
    """The code of a missing value."""
    if isinstance(feature, Numeric):
        return MISSING_NUMBER
    return MISSING_RAW_ID if isinstance(feature, RawId) else MISSING_ID


def labelled(block: Block, label: int) -> tuple[Array | slice, Array]:
    """Which rows have the label, and a weight above 0, and their labels as 0 and 1."""
    labels = block.labels[:, label]
    has = ~np.isnan(labels)
    if block.weights is not None:
        has &= block.weights > 0
    return (slice(None), labels.astype(np.int8)) if has.all() else (has, labels[has].astype(np.int8))
