"""Interaction logs: which user had to do with which item, from files as the field has them to a sparse matrix of ones.

Two forms are read (`read_log`): *pairs*, a table with a column of users and one of items (CSV, TSV, JSON lines,
parquet, packed or not), and *adjacency lists*, lines `user item item ...` of whole numbers, as the repositories of
NGCF, LightGCN and UltraGCN have them. What a log may hold, and what becomes of it:

* Ids are whole numbers or texts, with gaps as they come; users and items are numbered in the order of their ids.
* A pair that comes again counts once, two lines of one user are put together, and empty lines are passed over; all are
  counted.
* A user without items (a line of one id) is a user, who is counted, and gets a list from `Popularity` only.
* Of a log to evaluate on (`Interactions.aligned`), users whom training does not know are left out, items that it does
  not know stay relevant, though no method can find them, and pairs that training had are left out. All are counted.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy import sparse

from ctrlib.data.formats import unpacked
from ctrlib.data.raw import read_raw
from ctrlib.data.scan import DataError
from ctrlib.data.table import ROW
from ctrlib.errors import ArgumentError, check_number, check_path, check_whole
from ctrlib.schema import SchemaError

LogFormat = Literal["auto", "pairs", "lists"]
Ints = npt.NDArray[np.int64]
USER_NAMES, ITEM_NAMES = ("user_id", "user", "userId", "uid"), ("item_id", "item", "itemId", "iid")
_LISTS = re.compile(rb"(?:[ \t]*\d+(?:[ \t]+\d+)*[ \t]*\r?\n|[ \t]*\r?\n)*[ \t]*(?:\d+(?:[ \t]+\d+)*)?[ \t]*\r?\n?")
_MOST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Log:
    """Pairs as a file has them.

    `users` and `items` are two columns of equal length, of whole numbers (Int64) or texts; `lonely` the users without
    items. `counts` says what was passed over.
    """

    name: str
    users: pl.Series
    items: pl.Series
    lonely: pl.Series
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, users: Any, items: Any, name: str = "log") -> Log:
        """A log of pairs that are in memory: two lists, arrays or columns of whole numbers or texts.

        Raises:
            ArgumentError: they are not equally many, or none.
            DataError: an id is missing or neither a whole number nor a text.
        """
        columns = [pl.Series(what, values) for what, values in (("user", users), ("item", items))]
        if len(columns[0]) != len(columns[1]) or not len(columns[0]):
            raise ArgumentError(
                f"{name}: expected as many items as users, and at least one, got {len(columns[0])} users and "
                f"{len(columns[1])} items"
            )
        user, item = (_ids(column, column.name, lambda row: f"{name}: row {row + 1}") for column in columns)
        return cls(name, user, item, user.clear())


@dataclass(frozen=True)
class Aligned:
    """A log in the numbers of training: `matrix` (users, items) of ones; `unknown_items` (users,) counts the relevant
    items of each user that training does not know; `counts` says what was left out.
    """

    matrix: sparse.csr_matrix
    unknown_items: Ints
    counts: dict[str, int]


@dataclass(frozen=True)
class Interactions:
    """Who had to do with what: `matrix` (users, items) of ones, float32 and in CSR form with columns in order.

    `users` and `items` are the ids of its rows and columns. `counts` says how much there is and what was passed over.

    >>> log = Interactions.of(Log.of([7, 7, 3, 7], ["b", "a", "b", "b"]))
    >>> log.users.to_list(), log.items.to_list(), log.matrix.toarray().astype(int).tolist(), log.counts["duplicates"]
    ([3, 7], ['a', 'b'], [[0, 1], [1, 1]], 1)
    """

    matrix: sparse.csr_matrix
    users: pl.Series
    items: pl.Series
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, log: Log) -> Interactions:
        """The matrix of a log.

        Raises:
            DataError: there is no pair in it.
        """
        if not len(log.users):
            raise DataError(f"{log.name} has no pair of a user and an item: expected at least one")
        users = pl.concat([log.users, log.lonely]).unique().sort().rename("user")
        items = log.items.unique().sort().rename("item")
        matrix = _ones(_places(log.users, users), _places(log.items, items), (len(users), len(items)))
        counts = {
            "users": len(users),
            "items": len(items),
            "pairs": int(matrix.nnz),
            "duplicates": len(log.users) - int(matrix.nnz),
            "users_without_items": len(users) - int((np.diff(matrix.indptr) > 0).sum()),
            **log.counts,
        }
        return cls(matrix, users, items, counts)

    @classmethod
    def of_matrix(cls, matrix: Any) -> Interactions:
        """Of a (users, items) array or scipy matrix, whose entries other than 0 are interactions."""
        matrix = sparse.coo_matrix(matrix)
        rows, columns = matrix.nonzero()
        users, items = (pl.Series(name, np.arange(n)) for name, n in zip(("user", "item"), matrix.shape))
        ones = _ones(rows, columns, matrix.shape)
        return cls(ones, users, items, {"users": len(users), "items": len(items), "pairs": int(ones.nnz)})

    @property
    def num_users(self) -> int:
        """Rows of the matrix."""
        return int(self.matrix.shape[0])

    @property
    def num_items(self) -> int:
        """Columns of the matrix."""
        return int(self.matrix.shape[1])

    def aligned(self, log: Log) -> Aligned:
        """Another log in these numbers, to evaluate on: see the top of the module for what is left out."""
        users, items = _places(log.users, self.users), _places(log.items, self.items)
        known_user = users >= 0
        known = known_user & (items >= 0)
        matrix = _ones(users[known], items[known], self.matrix.shape)
        unseen = matrix - matrix.multiply(self.matrix)
        unseen.eliminate_zeros()
        foreign = known_user & (items < 0)
        strange = pl.DataFrame({"user": users[foreign], "item": log.items.filter(pl.Series(foreign))}).unique()
        per_user = np.bincount(strange["user"].to_numpy(), minlength=self.num_users)
        counts = {
            "pairs": int(unseen.nnz),
            "users": int(((np.diff(unseen.indptr) + per_user) > 0).sum()),
            "pairs_of_unknown_items": len(strange),
            "unknown_users": log.users.filter(pl.Series(~known_user)).n_unique(),
            "pairs_seen_in_training": int(matrix.nnz - unseen.nnz),
        }
        return Aligned(sparse.csr_matrix(unseen), per_user.astype(np.int64), counts)

    def histories(self, log: Log) -> tuple[pl.Series, sparse.csr_matrix, dict[str, int]]:
        """New users' items in these numbers: their ids, (B, I) ones, and how many items training does not know."""
        users = pl.concat([log.users, log.lonely]).unique().sort().rename("user")
        rows, columns = _places(log.users, users), _places(log.items, self.items)
        known = columns >= 0
        unknown = log.items.filter(pl.Series(~known)).n_unique()
        matrix = _ones(rows[known], columns[known], (len(users), self.num_items))
        return users, matrix, {"unknown_items": unknown}

    def split(self, share: float = 0.1, seed: int = 0) -> tuple[Interactions, Aligned]:
        """Training pairs and, held out of them at random, a share for validation; each user keeps one pair or more.

        Users and items keep their numbers.

        Raises:
            ArgumentError: `share` is not between 0 and 1, or nothing is left to validate on.
        """
        check_number(0, above=True, below=1, share=share)
        check_whole(0, seed=seed)
        matrix = self.matrix
        draws = np.random.default_rng(seed).random(matrix.nnz)
        held = draws < share
        rows = np.repeat(np.arange(self.num_users), np.diff(matrix.indptr))
        # Of a user all of whose pairs were drawn, the one with the largest draw stays.
        last = np.full(self.num_users, -1.0)
        np.maximum.at(last, rows, draws)
        held &= draws != last[rows]
        if not held.any():
            raise ArgumentError(
                f"no pair of {matrix.nnz} is held out for validation at a share of {share}: give a larger share"
            )
        parts = [_ones(rows[part], matrix.indices[part], matrix.shape) for part in (~held, held)]
        counts = {**self.counts, "pairs": int(parts[0].nnz)}
        valid = Aligned(
            parts[1],
            np.zeros(self.num_users, np.int64),
            {"pairs": int(parts[1].nnz), "users": int((np.diff(parts[1].indptr) > 0).sum())},
        )
        return Interactions(parts[0], self.users, self.items, counts), valid


def read_log(path: str | Path, *, user: str | None = None, item: str | None = None, format: LogFormat = "auto") -> Log:
    """Read an interaction log.

    Args:
        path: the file, packed or not.
        user: column of users, of pairs; by default user_id, user, userId or uid.
        item: column of items; by default item_id, item, itemId or iid.
        format: "lists" are lines `user item item ...`; "auto" takes a file for these whose first lines are nothing but
            whole numbers and blanks.

    Raises:
        DataError: the file is damaged, or an id is missing or no id; the message names file and line or row.
        SchemaError: there is no such column.
    """
    check_path("an interaction log", path=path)
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist: expected pairs of users and items, or lines `user item item ...`")
    if format not in ("auto", "pairs", "lists"):
        raise ArgumentError(f"format is {format!r}, expected auto, pairs or lists")
    if format == "lists" or (format == "auto" and path.is_file() and _looks_like_lists(path)):
        if user is not None or item is not None:
            raise ArgumentError(f"{path} has lines `user item item ...` and so no columns: leave their names out")
        return _read_lists(path)
    return _read_pairs(path, user, item)


def _looks_like_lists(path: Path) -> bool:
    """Whether the lines at the beginning, the last of them maybe cut, hold whole numbers and blanks only."""
    with unpacked(path) as stream:
        head = stream.peek(1 << 16)[: 1 << 16]
    return bool(head.strip()) and _LISTS.fullmatch(head) is not None


def _read_lists(path: Path) -> Log:
    lengths: list[int] = []
    numbers: list[int] = []
    empty = 0
    with unpacked(path) as stream:
        for place, line in enumerate(stream, start=1):
            words = line.split()
            if not words:
                empty += 1
                continue
            for word in words:
                if not word.isdigit() or (len(word) > 18 and int(word) > _MOST):
                    raise DataError(
                        f"{path}: line {place} has {word.decode(errors='replace')!r}, expected whole numbers below "
                        "2^63, the user's and then the items', with blanks between them: mend the line, or give a "
                        "table of pairs"
                    )
            lengths.append(len(words))
            numbers += map(int, words)
    if not lengths:
        raise DataError(f"{path} has no line with a user: expected lines `user item item ...`")
    sizes, ids = np.array(lengths), np.array(numbers, np.int64)
    starts = np.cumsum(sizes) - sizes
    is_item = np.ones(len(ids), bool)
    is_item[starts] = False
    users = ids[starts]
    return Log(
        str(path),
        pl.Series("user", np.repeat(users, sizes - 1)),
        pl.Series("item", ids[is_item]),
        pl.Series("user", users[sizes == 1]),
        {"empty_lines": empty},
    )


def _read_pairs(path: Path, user: str | None, item: str | None) -> Log:
    with tempfile.TemporaryDirectory() as folder:
        table = read_raw(path, Path(folder) / "raw")
        names = list(table.dtypes)
        chosen = [_column(path, names, *one) for one in (("user", user, USER_NAMES), ("item", item, ITEM_NAMES))]
        if chosen[0] == chosen[1]:
            raise SchemaError(f"{path}: column {chosen[0]!r} cannot be both user and item: name two columns")
        frame = table.gather(lambda piece: piece.select(ROW, *chosen))
        places = frame[ROW]
        users, items = (_ids(frame[name], name, lambda row: table.place(int(places[row]))) for name in chosen)
    return Log(str(path), users.rename("user"), items.rename("item"), users.clear().rename("user"))


def _column(path: Path, names: list[str], what: str, asked: str | None, usual: tuple[str, ...]) -> str:
    if asked is not None:
        if asked not in names:
            raise SchemaError(
                f"{path} has no column {asked!r} of {what}s, it has {', '.join(names)}: name one of these"
            )
        return asked
    found = [name for name in usual if name in names]
    if len(found) != 1:
        said = f"has {' and '.join(found)}" if found else f"has none of {', '.join(usual)}"
        raise SchemaError(
            f"{path}: which column holds the {what}s? It {said}; its columns are {', '.join(names)}: name one with "
            f"{what}=NAME (--{what} NAME)"
        )
    return found[0]


def _ids(column: pl.Series, name: str, place: Callable[[int], str]) -> pl.Series:
    """A column as whole numbers, if each cell is one as it would be written, otherwise as texts."""
    if column.dtype.is_float():
        # pandas makes numbers with a fraction of whole ones where one is missing.
        bad = column.is_null() | column.is_nan() | (column != column.floor()) | (column.abs() > 2**53)
        if bad.any():
            row = int(bad.arg_true()[0])
            raise DataError(f"{place(row)}, column {name!r}: expected a whole number or a text, got {column[row]}")
        return column.cast(pl.Int64)
    if not (column.dtype.is_integer() or column.dtype in (pl.String, pl.Categorical, pl.Enum)):
        raise DataError(f"{place(0)}, column {name!r}: expected whole numbers or texts, got type {column.dtype}")
    if column.null_count():
        row = int(column.is_null().arg_true()[0])
        raise DataError(f"{place(row)}, column {name!r}: the id is missing: give it a value, or leave the row out")
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count() == 0 and (column.dtype.is_integer() or bool((numbers.cast(pl.String) == column).all())):
        return numbers
    return column.cast(pl.String)


def _places(ids: pl.Series, known: pl.Series) -> Ints:
    """The place of each id among the known ones, -1 where it is none of them."""
    if ids.dtype != known.dtype:
        ids, known = ids.cast(pl.String), known.cast(pl.String)
    table = pl.DataFrame({"id": known, "place": np.arange(len(known), dtype=np.int64)})
    found = pl.DataFrame({"id": ids}).join(table, on="id", how="left", maintain_order="left")["place"]
    return found.fill_null(-1).to_numpy()


def _ones(rows: Any, columns: Any, shape: tuple[int, int]) -> sparse.csr_matrix:
    """A matrix of ones in CSR form, each pair once, columns in order."""
    matrix = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
