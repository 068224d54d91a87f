"""Reading a prepared split: which row groups there are, and row groups decoded, checked and laid out for gathering.

Everything here is strict, because nothing later is: fbgemm reads row 0 for an id outside its table, silently, and one
NaN in a numeric feature ruins every weight of a tower. What the metadata can tell (columns, types, row counts, and
mostly null counts and ranges) is checked before anything is read; the rest when a row group is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlib.data.scan import DataError
from ctrlib.errors import ArgumentError
from ctrlib.manifest import Manifest, manifest_of
from ctrlib.schema import (
    MISSING_ID,
    Categorical,
    MultiValued,
    RawId,
    Schema,
    SchemaError,
    SparseFeature,
    VocabularyFeature,
)

GROUP_COLUMN = "__group__"  # not the raw column's name: the group may be a feature as well
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RowGroup:
    """One row group: the unit that is read at once."""

    path: Path
    index: int
    first_row: int  # within the file, for messages
    num_rows: int
    num_bytes: int  # uncompressed
    manifest: Manifest | None = None  # with checksums of its bytes
    kept: Array | None = None  # the rows of it that are used, ascending; None for all

    @property
    def size(self) -> int:
        """How many rows of it are used."""
        return self.num_rows if self.kept is None else len(self.kept)


@dataclass(frozen=True)
class Ragged:
    """Lists of ids: row i holds values[offsets[i] : offsets[i + 1]]."""

    values: Array  # int32
    offsets: Array  # int64, one more than rows

    def take(self, rows: Array) -> Ragged:
        """The given rows, in that order.

        >>> lists = Ragged(np.array([1, 2, 3], dtype=np.int32), np.array([0, 2, 2, 3]))
        >>> lists.take(np.array([2, 0]))
        Ragged(values=array([3, 1, 2], dtype=int32), offsets=array([0, 1, 3]))
        """
        starts = self.offsets.take(rows)
        lengths = self.offsets.take(rows + 1) - starts
        offsets = offsets_of(lengths)
        # Element k of the result, in row i, comes from starts[i] + (k - offsets[i]).
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values.take(positions), offsets)


@dataclass(frozen=True)
class Shared(Ragged):
    """One list that all rows hold, written out for each of them; `one` is the list by itself.

    >>> lists = Shared.of(np.array([7, 8], np.int32), 2)
    >>> lists.values.tolist(), lists.offsets.tolist(), lists.one.tolist()
    ([7, 8, 7, 8], [0, 2, 4], [7, 8])
    """

    one: Array  # int32

    @classmethod
    def of(cls, one: Array, num_rows: int) -> Shared:
        """A list for so many rows."""
        return cls(np.tile(one, num_rows), np.arange(num_rows + 1) * len(one), one)


@dataclass(frozen=True)
class Columns:
    """N decoded rows. Single-valued columns lie side by side, so that gathering a row touches two cache lines, not 26.

    Shape:
        ids: (N, number of `Categorical` and `RawId` features) in the schema's order; int64 if there is a `RawId`, else
            int32.
        ragged: name -> `Ragged` of N rows, for the other sparse features.
        floats: (N, numeric features + labels + 1 if the schema has a weight) float32, in that order.
        group: (N,) int64, or None when it was not asked for.
    """

    ids: Array
    ragged: dict[str, Ragged]
    floats: Array
    group: Array | None

    def take(self, rows: Array) -> Columns:
        """The given rows, in that order. In numpy: torch would start a pool of threads for every worker."""
        return Columns(
            self.ids.take(rows, axis=0),
            {name: ragged.take(rows) for name, ragged in self.ragged.items()},
            self.floats.take(rows, axis=0),
            None if self.group is None else self.group.take(rows),
        )

    @staticmethod
    def concatenate(parts: Sequence[Columns]) -> Columns:
        """All rows of `parts`, one after another."""
        if len(parts) == 1:
            return parts[0]
        groups = [part.group for part in parts if part.group is not None]
        ragged = {}
        for name in parts[0].ragged:
            pieces = [part.ragged[name] for part in parts]
            lengths = np.concatenate([np.diff(piece.offsets) for piece in pieces])
            ragged[name] = Ragged(np.concatenate([piece.values for piece in pieces]), offsets_of(lengths))
        return Columns(
            np.concatenate([part.ids for part in parts]),
            ragged,
            np.concatenate([part.floats for part in parts]),
            np.concatenate(groups) if groups else None,
        )


def offsets_of(lengths: Array) -> Array:
    """[0, l0, l0 + l1, ...] as int64."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def lists_of(ids: Array, lengths: Array, feature: VocabularyFeature) -> Ragged:
    """Ids as lists of these lengths; a bag without values is that of the missing id.

    >>> lists = lists_of(np.array([7, 8], np.int32), np.array([2, 0]), MultiValued("tags"))
    >>> lists.values.tolist(), lists.offsets.tolist()
    ([7, 8, 1], [0, 2, 3])
    """
    if isinstance(feature, MultiValued) and (lengths == 0).any():
        present, lengths = lengths > 0, np.maximum(lengths, 1)
        filled = np.full(int(lengths.sum()), MISSING_ID, np.int32)
        filled[np.repeat(present, lengths)] = ids
        ids = filled
    return Ragged(ids, offsets_of(lengths))


def find_row_groups(folder: Path, split: str, schema: Schema) -> list[RowGroup]:
    """The row groups of a split that hold rows, files by name; only metadata is read, unless it shows a bad value.

    Raises:
        SchemaError: the schema is not fitted; there is no such split, no file or no row in it; a file cannot be read;
            columns are missing, extra or of another type; statistics show a null or an id out of range.
    """
    unfitted = [f.name for f in schema.sparse if not isinstance(f, RawId) and f.num_embeddings is None]
    if unfitted:
        raise SchemaError(f"{folder}: num_embeddings of {unfitted} is not set; `ctrlib prepare` writes a fitted schema")
    manifest = manifest_of(folder)
    paths = sorted((folder / split).glob("*.parquet"))
    manifest = _with_split(manifest, split, paths)
    if not paths:
        others = ("vocab", "numbers", "events")
        folders = (path for path in folder.iterdir() if path.is_dir() and path.name not in others)
        splits = sorted(path.name for path in folders if any(path.glob("*.parquet")))
        raise SchemaError(f"{folder / split} holds no *.parquet file; splits with data in this folder: {splits}")
    groups = []
    for path in paths:
        if manifest is not None:
            manifest.check(f"{split}/{path.name}", (-1,))  # the footer
        with _reader(path) as reader:
            _check_types(path, reader.schema_arrow, schema)
            first_row = 0
            for index in range(reader.metadata.num_row_groups):
                metadata = reader.metadata.row_group(index)
                group = RowGroup(path, index, first_row, metadata.num_rows, metadata.total_byte_size, manifest)
                first_row += metadata.num_rows
                if group.num_rows == 0:  # Spark writes such files; they hold nothing and mean nothing
                    continue
                groups.append(group)
                if _looks_bad(metadata, reader.schema_arrow.names, schema):
                    decode([group], schema, schema.group is not None)  # raises, naming column, row and value
    if not groups:
        raise SchemaError(f"{folder / split} holds {len(paths)} file(s) without a single row: prepare the data again")
    return groups


def _with_split(manifest: Manifest | None, split: str, paths: Sequence[Path]) -> Manifest | None:
    """The manifest, if it has the split; one that was added later, of whatever name, is read as it is.

    Raises:
        SchemaError: there are more or fewer files than were written.
    """
    if manifest is None or not manifest.under(split):
        return None
    for name in sorted({*manifest.under(split), *(f"{split}/{path.name}" for path in paths)}):
        manifest.check(name, ())  # there, and as long as it was
    return manifest


def decode(groups: Sequence[RowGroup], schema: Schema, with_group: bool = False) -> Columns:
    """Read, check and lay out row groups, one at a time so that the peak is the result plus one row group.

    Raises:
        SchemaError: a file cannot be read or was replaced; a null; an id outside its table; a list longer than the
            feature's max_length; a number that is not finite; a label other than 0, 1 or NaN; a weight that is negative
            or not finite. The message names file, column, row, value and limit.
    """
    single = [feature for feature in schema.sparse if isinstance(feature, Categorical | RawId)]
    lists = [feature for feature in schema.sparse if not isinstance(feature, Categorical | RawId)]
    raw = any(isinstance(feature, RawId) for feature in single)
    numbers = (
        [feature.name for feature in schema.dense] + list(schema.labels) + ([schema.weight] if schema.weight else [])
    )
    names = [feature.name for feature in schema.sparse] + numbers + ([GROUP_COLUMN] if with_group else [])
    num_rows = sum(group.num_rows for group in groups)
    ids = np.empty((num_rows, len(single)), dtype=np.int64 if raw else np.int32)
    floats = np.empty((num_rows, len(numbers)), dtype=np.float32)
    group_column = np.empty(num_rows, dtype=np.int64) if with_group else None
    pieces: dict[str, list[Ragged]] = {feature.name: [] for feature in lists}
    start = 0
    for group in groups:
        stop = start + group.num_rows
        table = _read(group, names)
        for feature in lists:
            pieces[feature.name].append(_ragged(table[feature.name], feature, group))
        columns = [_plain(table[feature.name], feature.name, group) for feature in single]
        for position, column in enumerate(columns):
            _check_ids(column, single[position], group)
        _transpose(columns, ids[start:stop])
        columns = [_plain(table[name], name, group) for name in numbers]
        for name, column in zip(numbers, columns):
            _check_numbers(column, name, schema, group)
        _transpose(columns, floats[start:stop])
        if group_column is not None:
            group_column[start:stop] = _plain(table[GROUP_COLUMN], GROUP_COLUMN, group)
        start = stop
    ragged = {}
    for name in list(pieces):
        parts = pieces.pop(name)  # freed feature by feature
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        ragged[name] = Ragged(np.concatenate([part.values for part in parts]), offsets_of(lengths))
    return Columns(ids, ragged, floats, group_column)


def decode_kept(groups: Sequence[RowGroup], schema: Schema, with_group: bool = False) -> Columns:
    """As `decode`, of the rows that are used; errors as there."""
    if all(group.kept is None for group in groups):
        return decode(groups, schema, with_group)
    parts = [(decode([group], schema, with_group), group.kept) for group in groups]
    return Columns.concatenate([part if kept is None else part.take(kept) for part, kept in parts])


def keep_some_negatives(groups: Sequence[RowGroup], schema: Schema, share: float, seed: int) -> list[RowGroup]:
    """Row groups of which about that share of the rows with label 0 is used, and every other row.

    Which, depends on the seed and on where a row stands. Row groups of which no row is left are left out.

    Raises:
        ArgumentError: there are several labels, so that a row may be a negative of one and a positive of another.
        DataError: no row with label 0 is left.
    """
    if len(schema.labels) > 1:
        raise ArgumentError(
            f"keep_negatives={share} goes with one label, and there are {list(schema.labels)}: a row without a click "
            "of one may be a click of another; leave it out (--keep-negatives 1)"
        )
    found, num_kept = [], 0
    for place, group in enumerate(groups):
        labels = _plain(_read(group, list(schema.labels))[schema.labels[0]], schema.labels[0], group)
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, place, len(groups)))))
        negative = labels == 0
        drawn = draw.random(len(labels)) < share
        num_kept += int((negative & drawn).sum())
        kept = np.flatnonzero(~negative | drawn)
        if len(kept):
            found.append(replace(group, kept=kept))
    if not num_kept:
        raise DataError(
            f"{groups[0].path.parent}: keep_negatives={share} leaves no row with label 0 of {schema.labels[0]!r}: "
            "expected some to learn from; keep more (--keep-negatives)"
        )
    return found


def check_classes(groups: Sequence[RowGroup], schema: Schema) -> None:
    """Read labels and weights, row group by row group, until every label has shown both classes among rows with weight.

    Raises:
        DataError: one has not, or no row has weight; the message names folder, column and what is there.
    """
    folder, num_rows = groups[0].path.parent, sum(group.num_rows for group in groups)
    seen: dict[str, set[float]] = {name: set() for name in schema.labels}
    weighs = schema.weight is None
    for group in groups:
        if weighs and all(len(classes) == 2 for classes in seen.values()):
            return
        table = _read(group, [*schema.labels, *([schema.weight] if schema.weight else [])])
        kept = slice(None) if schema.weight is None else _plain(table[schema.weight], schema.weight, group) > 0
        for name, classes in seen.items():
            labels = _plain(table[name], name, group)[kept]
            classes.update(np.unique(labels[~np.isnan(labels)]).tolist())
            weighs |= len(labels) > 0
    if not weighs:
        raise DataError(
            f"{folder}: the weight, column {schema.weight!r}, is 0 in all {num_rows:,} rows, so none of them counts: "
            "expected weights above 0; prepare the data without --weight, or with one that is larger"
        )
    rows = "rows" if schema.weight is None else "rows with weight"
    for name, classes in seen.items():
        if len(classes) < 2:
            found = f"it is {classes.pop():g} in all of them that have one" if classes else "none of them has one"
            raise DataError(
                f"{folder}: label {name!r} has one class only among the {rows} ({found}, {num_rows:,} rows): expected "
                "both 0 and 1, or nothing is learnt and no AUC is defined; prepare more rows, split them otherwise "
                "(--stratify), or leave that label out"
            )


def _reader(path: Path) -> Any:
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)  # a no-op for files written without checksums
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{path} cannot be read as parquet ({error}): copy or prepare it again") from error


def _read(group: RowGroup, names: list[str]) -> Any:
    if group.manifest is not None:
        group.manifest.check(f"{group.path.parent.name}/{group.path.name}", (group.index,))
    with _reader(group.path) as reader:
        try:
            table = reader.read_row_group(group.index, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise SchemaError(
                f"{group.path}, row group {group.index} cannot be decoded ({error}): copy or prepare the file again"
            ) from error
    if table.num_rows != group.num_rows:
        raise SchemaError(
            f"{group.path}, row group {group.index} has {table.num_rows} rows, had {group.num_rows} when the loader "
            "was made: the file was replaced meanwhile; make the loader again"
        )
    return table


def _check_types(path: Path, found: Any, schema: Schema) -> None:
    kinds = {Categorical: "int32", RawId: "int64"}
    expected = {feature.name: kinds.get(type(feature), "list<int32>") for feature in schema.sparse}
    expected |= dict.fromkeys([f.name for f in schema.dense] + list(schema.labels), "float")
    expected |= {schema.weight: "float"} if schema.weight else {}
    expected |= {GROUP_COLUMN: "int64"} if schema.group else {}
    types = {}
    for field in found:
        is_list = pa.types.is_list(field.type) or pa.types.is_large_list(field.type)
        types[field.name] = f"list<{field.type.value_type}>" if is_list else str(field.type)
    wrong = [f"{name!r} is missing" for name in expected if name not in types]
    wrong += [f"{name!r} is not in the schema" for name in types if name not in expected]
    wrong += [
        f"{name!r} is {types[name]}, expected {kind}"
        for name, kind in expected.items()
        if types.get(name, kind) != kind
    ]
    if wrong or len(types) != len(found):
        listed = "; ".join(wrong) or "a column occurs twice"
        raise SchemaError(f"{path} does not fit schema.json: {listed}. Prepare the data again")


def _looks_bad(metadata: Any, names: list[str], schema: Schema) -> bool:
    """Whether the statistics of a row group show a null or an id out of range: known before the first step."""
    limits = {f.name: f.num_embeddings or 0 for f in schema.sparse if not isinstance(f, RawId)}
    for position, name in enumerate(names):  # one leaf per column: `_check_types` has seen to that
        statistics = metadata.column(position).statistics
        if statistics is None:
            continue
        # An empty list counts as a null leaf: only flat columns can be judged by their nulls.
        flat = name not in limits or isinstance(schema[name], Categorical)
        if flat and statistics.has_null_count and statistics.null_count:
            return True
        if name in limits and statistics.has_min_max and not 0 <= statistics.min <= statistics.max < limits[name]:
            return True
    return False


def _where(group: RowGroup, column: str, row: int) -> str:
    return f"{group.path}, column {column!r}, row {group.first_row + row}"


def _plain(column: Any, name: str, group: RowGroup) -> Array:
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise SchemaError(f"{_where(group, name, row)} is null, expected a value: fill missing cells when preparing")
    # Arrow's own `to_numpy` imports pandas, if that is installed, which takes longer than reading a million numbers.
    chunks = [np.from_dlpack(chunk) for chunk in column.chunks]
    array: Array = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return array


def _ragged(column: Any, feature: VocabularyFeature, group: RowGroup) -> Ragged:
    column = column.combine_chunks()
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise SchemaError(f"{_where(group, feature.name, row)} is null, expected a list: write an empty list instead")
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    offsets -= offsets[0]
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise SchemaError(f"{_where(group, feature.name, _row_of(offsets, at))} holds a null in its list, expected ids")
    ragged = Ragged(values.to_numpy(), offsets)
    _check_ids(ragged.values, feature, group, offsets)
    lengths = np.diff(offsets)
    longest = int(lengths.argmax())
    if not isinstance(feature, Categorical) and lengths[longest] > feature.max_length:
        raise SchemaError(
            f"{_where(group, feature.name, longest)} has {lengths[longest]} ids, the schema's max_length is "
            f"{feature.max_length}: cut it when preparing"
        )
    return ragged


def _row_of(offsets: Array, position: int) -> int:
    return int(np.searchsorted(offsets, position, side="right")) - 1


def _check_ids(ids: Array, feature: SparseFeature, group: RowGroup, offsets: Array | None = None) -> None:
    limit = feature.num_embeddings or 0
    if isinstance(feature, RawId) or len(ids) == 0 or (ids.min() >= 0 and ids.max() < limit):
        return
    position = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
    row = position if offsets is None else _row_of(offsets, position)
    raise SchemaError(
        f"{_where(group, feature.name, row)}: id {ids[position]} is outside [0, {limit}), the rows of its table: "
        "the data and schema.json come from different preparations; prepare the data again"
    )


def _check_numbers(numbers: Array, name: str, schema: Schema, group: RowGroup) -> None:
    if name in schema.labels:
        good, expected = (numbers == 0) | (numbers == 1) | np.isnan(numbers), "0, 1 or NaN (missing)"
    elif name == schema.weight:
        good, expected = np.isfinite(numbers) & (numbers >= 0), "a finite weight of at least 0"
    elif np.isfinite(numbers.min()) and np.isfinite(numbers.max()):  # NaN and infinity both show; no temporary array
        return
    else:
        good, expected = np.isfinite(numbers), "a finite number"
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise SchemaError(f"{_where(group, name, row)} is {numbers[row]}, expected {expected}: mend it when preparing")


def _transpose(columns: Sequence[Array], out: Array) -> None:
    """Columns into the rows of `out`, in blocks that stay in cache (several times faster than column by column)."""
    if not columns:
        return
    for start in range(0, len(out), 2048):
        out[start : start + 2048] = np.stack([column[start : start + 2048] for column in columns], axis=1)
