"""The fitted object that knows how a raw value becomes an id or a number, in memory.

There are two roads and one meaning. A few rows, whatever they come as, go cell by cell through Python, which is sooner
done than a query is planned; many rows go column by column, each distinct value looked up once. Both give the same
bits, and those of `prepare`. What the quick road does not know at sight it leaves to the other, whose messages say what
is wrong, if anything is.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from ctrlib._lock import locked
from ctrlib._target import TargetError
from ctrlib.data.cells import check_columns, checks, fitted_number, label, number, raw_id, text, without_bad_rows
from ctrlib.data.columns import Columns, Ragged, lists_of, offsets_of
from ctrlib.data.counts import NUM_EXAMPLES, Counts
from ctrlib.data.encode import refuse_other_form, refuse_retyped
from ctrlib.data.event_state import State, has_events
from ctrlib.data.quantiles import has_points, points_path, read_points
from ctrlib.data.quick import Careful, number_of_cell, raw_id_of_cell, texts_of_cell, texts_of_column
from ctrlib.data.raw import RawData, in_files
from ctrlib.data.rows import cells_of, columns_of, frame_of
from ctrlib.data.scan import DataError, OnBadRow
from ctrlib.data.stream import ahead, blocks
from ctrlib.data.table import ROW, RawTable, as_frame, clean, naming, numbered
from ctrlib.data.unknown import judge
from ctrlib.data.vocabulary import load_counts, load_vocabulary, vocabulary_path
from ctrlib.data.whole_numbers import WholeColumns
from ctrlib.making import new_folder
from ctrlib.manifest import load_schema, write_manifest
from ctrlib.schema import (
    MISSING_ID,
    MISSING_RAW_ID,
    NUM_RESERVED_IDS,
    OOV_ID,
    Categorical,
    Feature,
    MultiValued,
    Numeric,
    RawId,
    Schema,
    SchemaError,
    VocabularyFeature,
    vocabulary_of,
)
from ctrlib.schema import Sequence as History

# A row as a dictionary, a list of them, a polars or pandas frame, an Arrow table, or the path of a file, or several.
Rows: TypeAlias = Any
FEW_CELLS = 4096  # go cell by cell
FEW_CELLS_OF_ROWS = 4 * FEW_CELLS  # of rows as dictionaries, from which a frame would have to be made first
FEW_NUMBERS = 16 * FEW_CELLS  # of frames: cells of which some need no Python
MOST_PARTS = 32  # encoders of some features that are kept


class Encoder:
    """Raw rows to ids and numbers, as they were fitted on train.

    Threads may share one: what it keeps for the next rows changes nothing that it gives.

    Args:
        schema: fitted.
        vocabularies: vocabulary name -> its values in the order of their ids.
        counts: vocabulary name -> how often train held each of its values, to be saved.
        points: numeric feature -> what edges of bins are made of (`ctrlib.data.quantiles`), to be saved.
        state: what is kept of a log of events, if columns are made of one.

    Raises:
        SchemaError: the schema is not fitted, or a vocabulary is missing or of another size.

    >>> schema = Schema(
    ...     (Categorical("item", num_embeddings=5), Numeric("price", "log", {"fill": 0.5})), labels=("click",)
    ... )
    >>> encoder = Encoder(schema, {"item": ["a", "b"]})
    >>> columns, counts = encoder.transform([{"item": "b", "price": 0}, {"item": "c", "price": None}])
    >>> columns.ids.tolist(), columns.floats[:, 0].tolist(), counts.unseen, counts.examples
    ([[4], [2]], [0.0, 0.5], {'item': 1}, {'item': ['c']})
    """

    def __init__(
        self,
        schema: Schema,
        vocabularies: Mapping[str, Sequence[str]],
        *,
        counts: Mapping[str, Sequence[int] | npt.NDArray[np.int64]] | None = None,
        points: Mapping[str, pl.DataFrame] | None = None,
        state: State | None = None,
    ) -> None:
        if not schema.is_fitted:
            raise SchemaError("the schema is not fitted: use the one that `prepare` returns or stores in schema.json")
        self.schema = schema
        if state is None and has_events(schema):
            raise SchemaError("histories and rates are made of a log of events: give the state that is kept of it")
        self._value_counts, self._points, self._state = dict(counts or {}), dict(points or {}), state
        self.known: dict[str, dict[str, int]] = {}  # vocabulary -> text -> id
        for name, features in schema.vocabularies.items():
            values, rows = vocabularies.get(name, ()), features[0].num_embeddings or 0
            if len(values) != rows - NUM_RESERVED_IDS:
                raise SchemaError(
                    f"vocabulary {name!r} has {len(values)} values, the schema says {rows - NUM_RESERVED_IDS}: take "
                    "both from one prepared folder or model folder"
                )
            self.known[name] = dict(zip(values, range(NUM_RESERVED_IDS, rows)))
        raw_format = schema.raw_format or {}
        self._missing = tuple(dict.fromkeys(["", *raw_format.get("missing_values", ())]))
        self._single = [f for f in schema.sparse if isinstance(f, Categorical | RawId)]
        self._lists = [f for f in schema.sparse if isinstance(f, MultiValued | History)]
        self._id_type = np.int64 if any(isinstance(f, RawId) for f in schema.sparse) else np.int32
        # Columns that rows may have and a prediction does not need.
        self._not_inputs = {*schema.labels, *(name for name in (schema.weight, schema.group) if name)}
        missing = frozenset(self._missing)
        kinds: dict[str, str] = raw_format.get("types", {})
        self._names = [f.name for f in schema.features]
        self.inputs = list(self._names)  # the columns that rows must have
        if state is not None:
            made = state.events.names
            self.inputs = list(dict.fromkeys([*(one for one in self._names if one not in made), *state.events.inputs]))
            self._not_inputs |= {*made, *state.events.inputs}  # of which some may be no features
        self._texts_of_column = {
            f.name: texts_of_column(f, kinds.get(f.name, "parsed"), missing)
            for f in self._single
            if isinstance(f, Categorical)
        }
        self._texts_of = {
            f.name: texts_of_cell(f, kinds.get(f.name, "parsed"), missing, in_place=isinstance(f, History))
            for f in self._lists
        }
        self._number_of = {f.name: number_of_cell(f, missing) for f in schema.dense}
        self._whole = WholeColumns(schema, self.known, kinds)
        # What `only` gave, which takes longer than to encode a few rows.
        self._parts: dict[frozenset[str], Encoder] = {}

    @property
    def single_names(self) -> list[str]:
        """Features with one id a row, in the order of `Columns.ids`."""
        return [feature.name for feature in self._single]

    @property
    def has_past(self) -> bool:
        """Whether columns are made of a log of events."""
        return self._state is not None

    def only(self, names: Collection[str]) -> Encoder:
        """An encoder of some of the features, which shares all that is known with this one.

        >>> schema = Schema((Categorical("item", num_embeddings=4), Numeric("price", parameters={"fill": 0})), ("y",))
        >>> Encoder(schema, {"item": ["a"]}).only(["item"]).transform({"item": "a"})[0].ids.tolist()
        [[3]]
        """
        key = frozenset(names)
        if (known := self._parts.get(key)) is not None:
            return known
        part = copy.copy(self)
        part._parts = {}
        features = tuple(feature for feature in self.schema.features if feature.name in names)
        part.schema = dataclasses.replace(self.schema, features=features, group=None)
        part._names = part.inputs = [feature.name for feature in features]
        part._single = [feature for feature in self._single if feature.name in names]
        part._lists = [feature for feature in self._lists if feature.name in names]
        part._number_of = {name: number for name, number in self._number_of.items() if name in names}
        if len(self._parts) == MOST_PARTS:  # whoever asks may choose the names
            self._parts.clear()
        self._parts[key] = part
        return part

    @classmethod
    def fit(cls, train: RawData, **options: Any) -> Encoder:
        """What `prepare({"train": train}, ...)` fits.

        Args:
            train: a file, a folder of parquet files, or a frame.
            options: of `prepare`, but for those about splits and output, such as `features`, `labels`, `ignore`,
                `min_count`, `missing_values`, `on_bad_row`, `like`.

        Raises:
            SchemaError, DataError: as `prepare`.

        >>> frame = pl.DataFrame({"item": ["a", "b", "a", "c"], "click": [1, 0, 0, 1]})
        >>> encoder = Encoder.fit(frame, labels="click", features=[Categorical("item", min_count=2)])
        >>> encoder.transform({"item": "a"})[0].ids.tolist(), encoder.schema["item"].num_embeddings
        ([[3]], 4)
        """
        from ctrlib.data.prepare import prepare

        with tempfile.TemporaryDirectory() as folder:
            schema = prepare({"train": train}, Path(folder) / "prepared", **{"log": None, **options}, _fit_only=True)
            return cls.of(schema, Path(folder) / "prepared")

    def save(self, folder: str | Path) -> None:
        """Write schema.json, vocab/, numbers/ and MANIFEST into a new folder, for `load` and for `prepare(like=...)`.

        Raises:
            FileExistsError: it is there already, and not empty.
            LockedError: somebody else writes into it; the message says who.
        """
        out = Path(folder)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TargetError(f"{out} exists and is not empty: give another folder")
        with locked(out), new_folder(out) as making:
            self._write(making)

    def _write(self, folder: Path) -> None:
        for name, known in self.known.items():
            path = vocabulary_path(folder / "vocab", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pl.DataFrame({"value": list(known), "id": pl.Series(list(known.values()), dtype=pl.Int32)})
            if (counts := self._value_counts.get(name)) is not None:
                table = table.with_columns(count=pl.Series(counts, dtype=pl.Int64))
            table.write_parquet(path)
        for name, points in self._points.items():
            path = points_path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            points.write_parquet(path)
        if self._state is not None:
            self._state.save(folder)
        self.schema.save(folder / "schema.json", manifest=True)
        write_manifest(folder, "prepared")

    @classmethod
    def load(cls, folder: str | Path) -> Encoder:
        """Of a prepared folder or a model folder.

        Raises:
            SchemaError: a file is missing, damaged, or of other data.
        """
        return cls.of(load_schema(folder), Path(folder))

    @classmethod
    def of(cls, schema: Schema, folder: str | Path) -> Encoder:
        """Of a schema, with the vocabularies that lie in the folder.

        Raises:
            SchemaError: as `load`.
        """
        folder = Path(folder)
        vocab = folder / "vocab"
        return cls(
            schema,
            {name: load_vocabulary(vocab, name, schema).to_list() for name in schema.vocabularies},
            counts={name: found for name in schema.vocabularies if (found := load_counts(vocab, name)) is not None},
            points={feature.name: read_points(folder, feature.name) for feature in schema.dense}
            if has_points(folder)
            else None,
            state=State.load(folder, schema),
        )

    def transform(self, rows: Rows, *, name: str = "rows") -> tuple[Columns, Counts]:
        """Ids and numbers of the features, in the order of the rows, and what was found on the way.

        Args:
            rows: one row as a dictionary of cells, a list of such rows, a polars or pandas frame, an Arrow table, or
                the path of a file whose rows fit into memory, or a list of paths, with the raw feature columns in any
                order. None is a missing cell. Lists are taken as they are for bags and histories.
            name: what to call the rows in messages; a file is called by its path.

        Returns:
            `Columns` as the loader makes them, labels NaN and weights 1; and `Counts`.

        Raises:
            SchemaError: a column is missing, or has another type than in training.
            DataError: a cell is damaged; the message names row and column.
            TypeError: the rows are of another kind.
        """
        names = self._names
        if in_files(rows):
            parts, counts = [], Counts()
            for raw in ahead(self.read(rows)):
                part, found = self.transform_table(raw)
                parts.append(part)
                counts.add(found)
            return Columns.concatenate(parts), counts
        if isinstance(rows, Mapping):
            rows = [rows]
        if self._state is not None:
            rows = self._with_past(self._state, rows, name)
        if isinstance(rows, list | tuple):
            if 0 < len(rows) * len(names) <= FEW_CELLS_OF_ROWS:
                with contextlib.suppress(Careful, KeyError, TypeError):
                    return self._quick(columns_of(rows, names), rows[0])
            frame = frame_of(rows, name)
        else:
            frame = as_frame(rows, name)
            columns = dict(zip(frame.columns, frame.get_columns()))
            if 0 < frame.height * len(names) <= FEW_NUMBERS and columns.keys() >= set(names):
                # Whole numbers are taken as polars has them; the others go cell by cell.
                cells: dict[str, Any] = {
                    one: numbers for one in names if (numbers := self._whole.of_frame(one, columns[one])) is not None
                }
                if frame.height * (len(names) - len(cells)) <= FEW_CELLS:
                    with contextlib.suppress(Careful):
                        cells |= {name: cells_of(columns[name]) for name in names if name not in cells}
                        return self._quick(cells, columns)
        return self.transform_table(self._table(frame, name))

    def make_ready(self) -> None:
        """Make what is otherwise made when the first rows come."""
        self._whole.make_ready()

    def _table(self, frame: pl.DataFrame, name: str) -> RawTable:
        if not frame.height:
            raise DataError(f"{name} has no rows: expected at least one")
        with naming(name):
            return RawTable((numbered(clean(frame.lazy(), self._missing)),), name)

    def _with_past(self, state: State, rows: Rows, name: str) -> Rows:
        """Rows in memory with the columns that are made of their past."""
        if isinstance(rows, list | tuple) and 0 < len(rows) * len(self._names) <= FEW_CELLS:
            with contextlib.suppress(Careful, KeyError, TypeError, AttributeError):
                return state.add_to_cells(rows, frozenset(self._missing))
        frame = frame_of(rows, name) if isinstance(rows, list | tuple) else as_frame(rows, name)
        return state.add(self._table(frame, name)).frame.drop(ROW).collect()

    def judge(self, counts: Counts, name: str) -> list[str]:
        """`ctrlib.data.unknown.judge` of rows that were encoded."""
        return judge(
            self.schema, counts.ids, counts.unseen, counts.missing, counts.examples, self.known.__getitem__, name
        )

    # --------------------------------------------------------------------------------------------- column by column

    def read(
        self,
        data: RawData,
        *,
        name: str = "rows",
        keep: Sequence[str] = (),
        with_labels: bool = False,
        on_bad_row: OnBadRow = "raise",
    ) -> Iterator[RawTable]:
        """Raw rows block by block, for `transform_table`, read as the data was that this was fitted on.

        Args:
            data: the path of a file, or several, or a polars frame.
            name: what to call a frame in messages.
            keep: columns that are wanted beside the features.
            with_labels: labels, weight and group are wanted, too. A file without header may lack them otherwise.
            on_bad_row: "skip" leaves out rows that are not well-formed.

        Raises:
            DataError, SchemaError: as `ctrlib.data.stream.blocks`.
        """
        schema, raw_format = self.schema, self.schema.raw_format or {}
        reading = {name: raw_format[name] for name in ("separator", "columns", "missing_values") if name in raw_format}
        others = [one for one in (*schema.labels, schema.weight, schema.group) if one and one not in self.inputs]
        found = blocks(
            data,
            name=name,
            wanted={*self.inputs, *keep, *(others if with_labels else ())},
            on_bad_row=on_bad_row,
            may_lack=() if with_labels else (schema.labels, others),
            **reading,
        )
        return found if self._state is None else map(self._state.add, found)

    def transform_table(
        self,
        raw: RawTable,
        *,
        with_labels: bool = False,
        on_bad_row: OnBadRow = "raise",
        groups: dict[str, int] | None = None,
    ) -> tuple[Columns, Counts]:
        """The same of rows as `ctrlib.data.raw` gives them; of a table that fits into memory.

        Args:
            raw: the rows; "skip" leaves the numbers of those with a bad cell in `raw.unfit`.
            with_labels: also labels, weights and groups.
            on_bad_row: "skip" leaves out rows with a bad cell.
            groups: group -> its number, for groups that are not integers; new ones are added.

        Raises:
            SchemaError, DataError: as `transform`, labels included.
        """
        schema, dtypes = self.schema, raw.dtypes
        raw_format = schema.raw_format or {}
        options: dict[str, Any] = {
            "missing_labels": raw_format.get("missing_labels", "raise"),
            "label_positive": raw_format.get("label_positive"),
        }
        check_columns(raw, schema, with_labels=with_labels)
        judged = dataclasses.replace(raw, skipped=Counter())  # what its file's scanner skips is counted there
        checked = without_bad_rows(judged, checks(schema, dtypes, with_labels=with_labels, **options), on_bad_row)
        raw.unfit = judged.unfit
        refuse_retyped(checked, schema)
        refuse_other_form(checked, schema)
        expressions = [_expression(feature, dtypes[feature.name]) for feature in schema.features]
        if with_labels:
            for name in schema.labels:
                value = label(name, dtypes[name], (options["label_positive"] or {}).get(name))
                expressions.append(value.fill_null(float("nan")).cast(pl.Float32).alias(f"label {name}"))
            if schema.weight is not None:
                expressions.append(number(schema.weight, dtypes[schema.weight]).cast(pl.Float32).alias("weight "))
            if schema.group is not None:
                expressions.append(text(Categorical(schema.group), dtypes[schema.group]).alias("group "))
        with naming(raw.name):
            cells = checked.frame.select(expressions).collect()
        known = {feature.name for feature in schema.features}
        counts = Counts(cells.height, skipped=judged.skipped)
        counts.ignored = [name for name in dtypes if name not in known | self._not_inputs]
        ids = np.empty((cells.height, len(self._single)), self._id_type)
        for position, feature in enumerate(self._single):
            column = cells[feature.name]
            if isinstance(feature, RawId):
                ids[:, position] = column.to_numpy()
            else:
                ids[:, position] = self._look_up(column, feature, MISSING_ID, counts)
            self._count(counts, feature, ids[:, position])
        ragged = {}
        for listed in self._lists:
            ragged[listed.name] = found = self._look_up_lists(cells[listed.name], listed, counts)
            self._count(counts, listed, found.values, np.diff(found.offsets))
        floats = self.empty_floats(cells.height)
        for position, dense in enumerate(schema.dense):
            floats[:, position] = cells[dense.name].to_numpy()
        group = self._groups(cells.height)
        if with_labels:
            for position, name in enumerate(schema.labels, start=len(schema.dense)):
                floats[:, position] = cells[f"label {name}"].to_numpy()
            if schema.weight is not None:
                floats[:, -1] = cells["weight "].to_numpy()
            if group is not None:
                numbers = groups if groups is not None else {}
                group[:] = [numbers.setdefault(value, len(numbers)) for value in cells["group "].to_list()]
        return Columns(ids, ragged, floats, group), counts

    def _look_up(
        self, texts: pl.Series, feature: VocabularyFeature, null: int, counts: Counts
    ) -> npt.NDArray[np.int32]:
        """The id of each text, each distinct one looked up once; `null` for nulls."""
        encoded = texts.to_arrow().dictionary_encode()
        get = self.known[vocabulary_of(feature)].get
        distinct = encoded.dictionary.to_pylist()
        ids = np.fromiter((get(value, OOV_ID) for value in distinct), np.int32, len(distinct))
        unseen = np.flatnonzero(ids == OOV_ID)[:NUM_EXAMPLES]
        if len(unseen):
            counts.examples[feature.name] = [distinct[position] for position in unseen]
        codes = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
        found: npt.NDArray[np.int32] = np.append(ids, np.int32(null)).take(codes)
        return found

    def _look_up_lists(self, lists: pl.Series, feature: VocabularyFeature, counts: Counts) -> Ragged:
        lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
        values = self._look_up(lists.drop_nulls().explode(), feature, MISSING_ID, counts)
        return lists_of(values, lengths, feature)

    # ------------------------------------------------------------------------------------------------- cell by cell

    def _quick(self, cells: Mapping[str, Sequence[Any]], given: Iterable[str]) -> tuple[Columns, Counts]:
        num_rows = len(next(iter(cells.values())))
        counts = Counts(num_rows)
        counts.ignored = [name for name in given if name not in cells and name not in self._not_inputs]
        ids = np.empty((num_rows, len(self._single)), self._id_type)
        of_whole = self._whole.singles(cells, self.single_names, ids, counts)
        for position, feature in enumerate(self._single):
            name = feature.name
            if name in of_whole:
                continue
            if isinstance(feature, RawId):
                found = [raw_id_of_cell(feature, cell) for cell in cells[name]]
                unseen, missing = 0, found.count(MISSING_RAW_ID)
            else:
                texts, get = self._texts_of_column[name](cells[name]), self.known[vocabulary_of(feature)].get
                if None in texts:
                    found = [MISSING_ID if one is None else get(one, OOV_ID) for one in texts]
                else:  # a loop that Python does not see
                    found = list(map(get, cast("list[str]", texts), itertools.repeat(OOV_ID)))
                unseen, missing = found.count(OOV_ID), found.count(MISSING_ID)
                if unseen:
                    self._note(counts, feature, texts)
            counts.ids[name], counts.unseen[name], counts.missing[name] = num_rows, unseen, missing
            ids[:, position] = found
        ragged = {}
        for listed in self._lists:
            name = listed.name
            if (whole := self._whole.lists(listed, cells[name], counts)) is not None:
                ragged[name] = whole
                continue
            texts_of, get = self._texts_of[name], self.known[vocabulary_of(listed)].get
            lists = [texts_of(cell) for cell in cells[name]]
            empty = [MISSING_ID] if isinstance(listed, MultiValued) else []
            of_rows = [[MISSING_ID if one is None else get(one, OOV_ID) for one in texts] or empty for texts in lists]
            values = [one for row in of_rows for one in row]
            lengths = np.array([len(row) for row in of_rows], np.int64)
            ragged[name] = Ragged(np.array(values, np.int32), offsets_of(lengths))
            counts.ids[name], counts.unseen[name] = len(values), values.count(OOV_ID)
            counts.missing[name] = values.count(MISSING_ID)
            if isinstance(listed, History):
                counts.empty[name] = sum(not row for row in of_rows)
            if counts.unseen[name]:
                self._note(counts, listed, [one for texts in lists for one in texts])
        floats = self.empty_floats(num_rows)
        for position, (name, number_of) in enumerate(self._number_of.items()):
            floats[:, position] = [number_of(cell) for cell in cells[name]]
        return Columns(ids, ragged, floats, self._groups(num_rows)), counts

    def _note(self, counts: Counts, feature: VocabularyFeature, texts: list[str | None]) -> None:
        """Keep some of the unseen values."""
        known = self.known[vocabulary_of(feature)]
        unseen = dict.fromkeys(one for one in texts if one is not None and one not in known)
        counts.examples[feature.name] = list(unseen)[:NUM_EXAMPLES]

    # ------------------------------------------------------------------------------------------------------- common

    def _count(
        self, counts: Counts, feature: Feature, ids: npt.NDArray[Any], lengths: npt.NDArray[np.int64] | None = None
    ) -> None:
        missing, unseen = (MISSING_RAW_ID, None) if isinstance(feature, RawId) else (MISSING_ID, OOV_ID)
        counts.ids[feature.name] = len(ids)
        counts.unseen[feature.name] = 0 if unseen is None else int((ids == unseen).sum())
        counts.missing[feature.name] = int((ids == missing).sum())
        if isinstance(feature, History) and lengths is not None:
            counts.empty[feature.name] = int((lengths == 0).sum())

    def empty_floats(self, num_rows: int) -> npt.NDArray[np.float32]:
        """Room for numbers, labels that are not known, and weights of 1."""
        schema = self.schema
        floats = np.full(
            (num_rows, len(schema.dense) + len(schema.labels) + (schema.weight is not None)), np.nan, np.float32
        )
        if schema.weight is not None:
            floats[:, -1] = 1
        return floats

    def empty(self, num_rows: int) -> Columns:
        """Room for so many rows, as `transform` gives them."""
        ids = np.empty((num_rows, len(self._single)), self._id_type)
        return Columns(ids, {}, self.empty_floats(num_rows), self._groups(num_rows))

    def _groups(self, num_rows: int) -> npt.NDArray[np.int64] | None:
        return np.zeros(num_rows, np.int64) if self.schema.group is not None else None


def _expression(feature: Feature, dtype: pl.DataType) -> pl.Expr:
    """Canonical texts of what is looked up, numbers of what is not."""
    if isinstance(feature, Numeric):
        return fitted_number(feature, dtype).cast(pl.Float32).alias(feature.name)
    if isinstance(feature, RawId):
        return raw_id(feature).fill_null(MISSING_RAW_ID).alias(feature.name)
    return text(feature, dtype).alias(feature.name)
