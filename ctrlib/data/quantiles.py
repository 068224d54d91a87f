"""Bin edges for numeric features, as in Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep
Learning", NeurIPS 2022, section 3.2.1, https://arxiv.org/abs/2203.05556."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl

from ctrlib.data.columns import find_row_groups
from ctrlib.schema import Schema, SchemaError


def quantile_edges(data: str | Path, num_bins: int = 32) -> list[list[float]]:
    """b_t = Q(t / T), t = 0, ..., T, of every numeric feature in the schema's order, in the train split of a folder.

    Q is the empirical quantile function, Q(p) = min {x : share of values <= x is p or more}: every edge is a value of
    the data, and equal ones are dropped, so that a bin [b_t, b_{t+1}) always holds the rows that equal b_t. (The
    authors' package interpolates between values, which leaves bins empty where numbers repeat.) A feature with few
    distinct values has fewer bins; a constant c gets one, from c to c + max(1, |c|).

    Reads one column at a time.

    Raises:
        ValueError: `num_bins` is below 1, or there is no numeric feature.
        SchemaError: it is not a prepared folder with a train split, or a number is missing or not finite.

    >>> import tempfile
    >>> from ctrlib.schema import Numeric
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "train").mkdir()
    >>> Schema((Numeric("price", parameters={}),), ("click",)).save(folder / "schema.json")
    >>> frame = pl.DataFrame({"price": [0, 0, 0, 0, 2, 3, 5, 9], "click": [0, 1] * 4})
    >>> frame.cast(pl.Float32).write_parquet(folder / "train" / "0.parquet")
    >>> quantile_edges(folder, num_bins=4)
    [[0.0, 3.0, 9.0]]
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    folder = Path(data)
    schema = Schema.load(folder)
    if not schema.dense:
        raise ValueError(
            f"{folder} has no numeric feature to find bins for: leave the encoder of numbers out, or name columns as "
            "Numeric(...) in the features to prepare"
        )
    groups = find_row_groups(folder, "train", schema)
    num_rows = sum(group.num_rows for group in groups)
    # ceil(t n / T) values are at or below Q(t / T): whole numbers, so no rounding decides.
    ranks = [max(-(-position * num_rows // num_bins) - 1, 0) for position in range(num_bins + 1)]
    frame = pl.scan_parquet(sorted({group.path for group in groups}), glob=False)
    return [_edges(frame, feature.name, ranks, folder) for feature in schema.dense]


def _edges(frame: pl.LazyFrame, name: str, ranks: list[int], folder: Path) -> list[float]:
    ordered = frame.select(name).sort(name).select(pl.col(name).gather(ranks))
    values = ordered.collect(engine="streaming")[name].to_list()
    # Nulls and -infinity sort first, infinity and NaN last: the two ends tell of all.
    for value in (values[0], values[-1]):
        if value is None or not math.isfinite(value):
            raise SchemaError(
                f"{folder / 'train'}, column {name!r} holds {value}, expected finite numbers: prepare again"
            )
    edges = sorted(set(values))
    return edges if len(edges) > 1 else [edges[0], edges[0] + max(1.0, abs(edges[0]))]
