"""Bin edges for numeric features, as in Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep
Learning", NeurIPS 2022, section 3.2.1, https://arxiv.org/abs/2203.05556, where no value is more frequent than a bin.

A prepared folder keeps what edges are made of: `numbers/NAME.parquet` for each numeric feature, with columns value (as
the model sees it, ascending) and count, in train. Up to 6,401 distinct values are all there. Of more, those that are
edges of 6,400 bins are, and each other row of train is counted at the next of them that is not smaller.
"""

from __future__ import annotations

from numbers import Integral
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from ctrlib.data.columns import find_row_groups
from ctrlib.data.vocabulary import vocabulary_path
from ctrlib.errors import ArgumentError, check_path, check_type
from ctrlib.manifest import check_file, load_schema, manifest_of, refuse_pickle
from ctrlib.schema import Schema, SchemaError

# Of columns with more values: a multiple of 2, 4, ... 256, of 5, 10, ... 100 and of 200, whose edges so are exact.
NUM_POINTS = 6400
MAX_BINS = NUM_POINTS // 2  # up to here no point holds more rows than a bin, unless they are equal


def quantile_edges(data: str | Path, num_bins: int = 32, *, missing_apart: bool = False) -> list[list[float]]:
    """b_0 < ... < b_T of every numeric feature in the schema's order, of the train split of a folder.

    Where every value is that of less than 1 / T of the rows, b_t = Q(t / T), t = 0, ..., T, with the empirical quantile
    function, Q(p) = min {x : share of values <= x is p or more}. A more frequent value would be several of these. It is
    one edge, and the bins so freed go to the other rows: of n rows in T bins, each value of n / T rows or more is an
    edge by itself. The n' rows that are left share the bins that are left, T' = T less one for each such value; among
    them more values may be those of n' / T' rows or more, and are edges as well, and so on until there is none. The
    other edges are Q'(t / T'), t = 0, ..., T', of the rows that are left.

    So every edge is a value of the data, and a bin [b_t, b_{t+1}) always holds the rows that equal b_t. (The authors'
    package interpolates between values, which leaves bins empty where numbers repeat.) A feature with few distinct
    values has fewer bins; a constant c gets one, from c to c + max(1, |c|).

    A missing number is given the mean of train, among the numbers near it. Where n / T rows or more have that value,
    `missing_apart` makes edges of the next smaller and the next larger one, too: no other number is then between these,
    so that what a piecewise-linear encoder learns of the mean is of the missing ones alone.

    Edges do not depend on the order of rows, and are exact for up to 6,401 distinct values. Of more values, the points
    that the folder keeps stand for them: b_t is exact where every value is that of less than 1 / 6,400 of the rows and
    T divides 6,400, as 16, 32, 64, 100 and 128 do; else less than a bin of 6,400 lies between Q' and what is taken.

    A folder that was prepared like another one has the points, and so the edges, of that one; a model folder has those
    of the data it was trained on. Of a folder without such points, which an older ctrlib wrote, they are made from the
    train split, one column at a time.

    Raises:
        ValueError: `num_bins` is below 1 or above 3,200, or there is no numeric feature.
        SchemaError: it is not a prepared folder with a train split, or a number is missing or not finite.

    >>> import tempfile
    >>> from ctrlib.schema import Numeric
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "train").mkdir()
    >>> Schema((Numeric("price", parameters={}),), ("click",)).save(folder / "schema.json")
    >>> frame = pl.DataFrame({"price": [0, 0, 0, 0, 2, 3, 5, 9], "click": [0, 1] * 4})
    >>> frame.cast(pl.Float32).write_parquet(folder / "train" / "0.parquet")
    >>> quantile_edges(folder, num_bins=4)  # 0 holds half of the rows, and 3 bins are left for 2, 3, 5 and 9
    [[0.0, 2.0, 3.0, 5.0, 9.0]]
    """
    check_path("a prepared folder", data=data)
    check_type("a whole number", Integral, num_bins=num_bins)
    if not 1 <= num_bins <= MAX_BINS:
        raise ArgumentError(f"num_bins must be at least 1 and at most {MAX_BINS:,}, got {num_bins}")
    folder = Path(data)
    schema = load_schema(folder)
    if not schema.dense:
        raise ArgumentError(
            f"{folder} has no numeric feature to find bins for: leave the encoder of numbers out, or name columns as "
            "Numeric(...) in the features to prepare"
        )
    if has_points(folder):
        points = (read_points(folder, feature.name) for feature in schema.dense)
    else:
        files = sorted({group.path for group in find_row_groups(folder, "train", schema)})
        points = (_points_in(files, feature.name) for feature in schema.dense)
    fills = [(feature.parameters or {}).get("fill") if missing_apart else None for feature in schema.dense]
    return [edges_of(of_one, num_bins, apart=fill) for of_one, fill in zip(points, fills)]


def has_points(folder: Path) -> bool:
    """Whether a prepared folder or model folder keeps what edges are made of."""
    if (folder / "numbers").is_dir():
        return True
    manifest = manifest_of(folder)
    return manifest is not None and bool(manifest.under("numbers"))  # they are gone, which `read_points` tells


def points_path(folder: Path, name: str) -> Path:
    """Where the points of a numeric feature lie in a prepared folder or model folder."""
    return vocabulary_path(folder / "numbers", name)


def write_points(written: Path, schema: Schema, out: Path) -> None:
    """Write `numbers` into the folder `out`, of the train split of the prepared folder `written`.

    Reads one column at a time, which takes about 12 bytes a row.

    Raises:
        SchemaError: a number is missing or not finite.
    """
    if not schema.dense:
        return
    files = sorted((written / "train").glob("*.parquet"))
    (out / "numbers").mkdir()
    for feature in schema.dense:
        _points_in(files, feature.name).write_parquet(points_path(out, feature.name))


def points_of(values: NDArray[np.float32], counts: NDArray[np.int64] | None = None) -> pl.DataFrame:
    """What is kept of a column: value and count, ascending, for the edges of any number of bins.

    Shape: values (rows,), one or more, finite and in any order; counts (rows,), how often each is there, 1 by default.

    >>> points_of(np.array([2, 0, 3, 0, 2, 0], np.float32)).rows()
    [(0.0, 3), (2.0, 2), (3.0, 1)]
    """
    if counts is None:
        ordered = np.sort(values)
    else:
        order = np.argsort(values, kind="stable")
        ordered, counts = values[order], counts[order]
    ordered = ordered + np.float32(0)  # -0 is 0: which of them came first would else be seen
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    distinct = ordered[starts]
    counts = np.diff(np.append(starts, len(ordered))) if counts is None else np.add.reduceat(counts, starts)
    if len(distinct) > NUM_POINTS + 1:
        chosen, frequent = _edges(counts, NUM_POINTS)
        # All but the frequent values are counted at the next point among themselves.
        ranks = np.where(frequent, 0, counts).cumsum()
        points = np.flatnonzero(chosen & ~frequent)
        counts[points] = np.diff(ranks[points], prepend=0)
        distinct, counts = distinct[chosen], counts[chosen]
    return pl.DataFrame({"value": distinct.astype(np.float32), "count": counts.astype(np.int64)})


def edges_of(points: pl.DataFrame, num_bins: int, *, apart: float | None = None) -> list[float]:
    """The edges of a column of which `points` are kept, as `quantile_edges` says; `apart` is what missing ones have.

    >>> edges_of(pl.DataFrame({"value": [0.0, 1.0, 2.0, 3.0], "count": [97, 1, 1, 1]}), num_bins=2)
    [0.0, 1.0, 3.0]
    >>> points = pl.DataFrame({"value": [-9.0, -5.0, -1.0, 0.0, 2.0, 6.0], "count": [8, 8, 8, 60, 8, 8]})
    >>> edges_of(points, num_bins=2), edges_of(points, num_bins=2, apart=0.0)
    ([-9.0, 0.0, 6.0], [-9.0, -1.0, 0.0, 2.0, 6.0])
    """
    values, counts = points["value"].to_numpy(), points["count"].to_numpy()
    chosen, frequent = _edges(counts, num_bins)
    if apart is not None:
        found = np.flatnonzero(frequent & (values == np.float32(apart)))
        chosen[np.concatenate([found - 1, found + 1]).clip(0, len(values) - 1)] = True
    edges: list[float] = values[chosen].tolist()
    return edges if len(edges) > 1 else [edges[0], edges[0] + max(1.0, abs(edges[0]))]


def _edges(counts: NDArray[np.int64], num_bins: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of the values in ascending order, each with so many rows, are edges; which are so by themselves."""
    frequent, others = np.zeros(len(counts), np.bool_), counts.copy()
    while num_rows := int(others.sum()):
        bins = num_bins - int(frequent.sum())  # 1 or more: frequent values that took all bins would leave no row
        more = others >= -(-num_rows // bins)
        if not more.any():
            break
        frequent |= more
        others[more] = 0
    chosen = frequent.copy()
    if num_rows:
        # ceil(t n / T) rows are at or below Q(t / T): whole numbers, so no rounding decides.
        ranks = np.maximum(-(-np.arange(bins + 1) * num_rows // bins), 1)
        chosen[np.searchsorted(others.cumsum(), ranks)] = True
    return chosen, frequent


def _points_in(files: list[Path], name: str) -> pl.DataFrame:
    values = pl.scan_parquet(files, glob=False).select(name).collect()[name].cast(pl.Float32)
    wrong = values.filter(~values.is_finite().fill_null(False)).head(1).to_list()
    if wrong:
        raise SchemaError(
            f"{files[0].parent}, column {name!r} holds {wrong[0]}, expected finite numbers: prepare again"
        )
    return points_of(values.to_numpy())


def read_points(folder: Path, name: str) -> pl.DataFrame:
    """What edges of a numeric feature are made of: value and count, as `write_points` wrote them.

    Raises:
        SchemaError: it is missing or damaged.
    """
    path = points_path(folder, name)
    check_file(folder, path.relative_to(folder).as_posix())
    try:
        points = pl.read_parquet(path, glob=False).select("value", "count")
    except (pl.exceptions.PolarsError, OSError) as error:
        refuse_pickle(path)
        raise SchemaError(f"{path} cannot be read ({error}): copy the folder, or prepare the data, again") from error
    value, count = points["value"], points["count"]
    if not (len(points) and value.is_finite().all() and (value.diff().drop_nulls() > 0).all() and (count > 0).all()):
        raise SchemaError(
            f"{path} does not hold finite values that increase, with counts above 0: copy the folder, or prepare the "
            "data, again"
        )
    return points
