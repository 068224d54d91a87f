"""What a client asks of a server, read strictly: bytes of JSON to encoded rows, and probabilities to JSON again.

Whatever is wrong is a `RefusedError`, or another error of ctrlib that names row and column within the request.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctrlib._lazy import instead
from ctrlib.data.columns import Columns
from ctrlib.errors import CtrlibError, check_whole, shown
from ctrlib.serving.candidates import Items, best, joined
from ctrlib.serving.predictor import Predictor, Probabilities

PLAIN = frozenset({str, int, float, bool, type(None)})


class RefusedError(CtrlibError):
    """A request that is not answered; `status` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Args:
        rows: of one request.
        body: bytes of one request.
        waiting: requests that wait for the model.
        held: bytes of all bodies that are being read or wait.
        seconds: that a client may take to send a body.

    Raises:
        ArgumentError, WrongTypeError: one is no whole number from 1 on.
    """

    rows: int = 10_000
    body: int = 16 << 20
    waiting: int = 128
    held: int = 256 << 20
    seconds: int = 10

    def __post_init__(self) -> None:
        check_whole(1, **{"max_rows": self.rows, "body": self.body, "waiting": self.waiting, "held": self.held})
        check_whole(1, seconds=self.seconds)


@dataclass(frozen=True)
class Asked:
    """A request that was understood: its rows, what to call them, and what makes an answer of their probabilities,
    (B, T)."""

    columns: Columns
    name: str
    answer: Callable[[Probabilities], dict[str, Any]]


def predict(predictor: Predictor, body: bytes, limits: Limits) -> Asked:
    """`{"rows": [{...}, ...]}` -> `{"predictions": {label: [...]}, "counts": {...}}`.

    Raises:
        CtrlibError: it is something else, or a row is; the message names it.
    """
    given = fields(parsed(body), needed=("rows",))
    check_rows(given["rows"], "rows", limits)
    columns, counts = predictor.encode(given["rows"], name="rows")
    labels = predictor.schema.labels
    return Asked(columns, "rows", lambda found: {"predictions": _by_label(labels, found), "counts": counts})


def rank(predictor: Predictor, body: bytes, limits: Limits, *, known: Items | None = None) -> Asked:
    """`{"context": {...}, "items": [{...}, ...], "k": 10, "by": label}` -> `{"rows": [...], "predictions": {...}}`.

    `known`: items of which a request may give the keys instead of rows.

    Raises:
        CtrlibError: as `predict`.
    """
    given = fields(parsed(body), needed=("context", "items"), others=("k", "by"))
    context, items, k, by = given["context"], given["items"], given.get("k"), given.get("by")
    check_rows([context], "context", limits)
    if known is not None and type(items) is list and set(map(type, items)) <= {str, int}:
        check_number(items, "items", limits)
        items = known[items]
    else:
        check_rows(items, "items", limits)
    if k is not None and (type(k) is not int or k < 1):
        raise RefusedError(f"k is {shown(k)}: expected a whole number from 1 on, or nothing for all")
    if by is not None and type(by) is not str:
        raise RefusedError(f"by is {shown(by)}: expected the name of a label")
    labels = predictor.schema.labels
    place = labels.index(predictor.label_named(by))

    def answer(found: Probabilities) -> dict[str, Any]:
        chosen = best(found[:, place], k)
        return {"rows": chosen.tolist(), "predictions": _by_label(labels, found[chosen])}

    return Asked(joined(predictor.encoder, context, items), "items", answer)


def _by_label(labels: Sequence[str], found: Probabilities) -> dict[str, list[float]]:
    return dict(zip(labels, found.T.tolist()))


def parsed(body: bytes) -> Any:
    """JSON as its standard has it, in UTF-8.

    Raises:
        RefusedError: it is something else.

    >>> parsed(b'{"rows": [NaN]}')
    Traceback (most recent call last):
        ...
    ctrlib.serving.requests.RefusedError: the body holds NaN, which JSON has not: give null for a missing number
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\u" in body:  # half a surrogate pair can be spelt only so, and is no text
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise RefusedError(f"the body is not UTF-8 (byte {error.start}): send JSON in UTF-8") from None
    except UnicodeEncodeError:
        raise RefusedError("the body holds half a surrogate pair (\\ud800 and the like), which is no text") from None
    except RecursionError:
        raise RefusedError("the body is nested too deeply: expected an object that holds rows of cells") from None
    except json.JSONDecodeError as error:
        raise RefusedError(f"the body is no JSON: {error}") from None
    except ValueError:
        raise RefusedError("the body holds a whole number of thousands of digits: expected 64 bits at most") from None
    return found


def _refuse_constant(constant: str) -> None:
    raise RefusedError(f"the body holds {constant}, which JSON has not: give null for a missing number")


def fields(given: Any, *, needed: Iterable[str], others: Iterable[str] = ()) -> dict[str, Any]:
    """The object, if it has what is needed and nothing that is not known.

    Raises:
        RefusedError: as said.

    >>> fields({"row": []}, needed=["rows"])
    Traceback (most recent call last):
        ...
    ctrlib.serving.requests.RefusedError: the body lacks 'rows': expected an object with rows
    """
    needed, others = list(needed), list(others)
    expected = f"expected an object with {' and '.join(needed)}{', and perhaps ' if others else ''}{', '.join(others)}"
    if not isinstance(given, dict):
        raise RefusedError(f"the body is {shown(given)}: {expected}")
    if lacking := [name for name in needed if name not in given]:
        raise RefusedError(f"the body lacks {lacking[0]!r}: {expected}")
    if unknown := [name for name in given if name not in (*needed, *others)]:
        raise RefusedError(f"the body has {unknown[0]!r}, which is not known: {instead(unknown[:1], needed + others)}")
    return given


def check_rows(rows: Any, name: str, limits: Limits) -> None:
    """Refuse what is no list of objects of cells: texts, numbers, true, false, null, and lists of these.

    Raises:
        RefusedError: as said, with row and column; or there are too many rows (413).
    """
    if type(rows) is not list:
        raise RefusedError(f"{name} is {shown(rows)}: expected a list of objects, each a row of cells")
    check_number(rows, name, limits)
    if set(map(type, rows)) <= {dict} and _are_plain(list(itertools.chain.from_iterable(map(dict.values, rows)))):
        return
    for number, row in enumerate(rows, 1):
        if type(row) is not dict:
            place = name if name == "context" else f"{name}: row {number}"
            raise RefusedError(f"{place} is {shown(row)}: expected an object of cells, by the names of columns")
        for column, cell in row.items():
            if type(cell) is list:
                for one in cell:
                    if (wrong := _wrong(one)) or type(one) is list:
                        raise RefusedError(_at(name, number, column, wrong or "a list within a list"))
            elif wrong := _wrong(cell):
                raise RefusedError(_at(name, number, column, wrong))


def check_number(rows: list[Any], name: str, limits: Limits) -> None:
    """Refuse too many rows (413).

    Raises:
        RefusedError: as said.
    """
    if len(rows) > limits.rows:
        raise RefusedError(
            f"{name} has {len(rows):,} rows, and this server takes {limits.rows:,} a request: send them in several",
            413,
        )


def _are_plain(cells: list[Any]) -> bool:
    """Whether there is nothing to look at closer: texts, and numbers far from what 64 bits hold."""
    kinds = set(map(type, cells))
    if not kinds <= PLAIN:
        return False
    if not kinds & {int, float}:
        return True
    if not kinds <= {int, float, bool}:
        cells = [cell for cell in cells if type(cell) is not str and cell is not None]
    return bool(max(cells) < 2**63 and min(cells) >= -(2**63))


def _wrong(cell: Any) -> str | None:
    """What is wrong about a value, if anything is."""
    kind = type(cell)
    if kind is float and not math.isfinite(cell):  # JSON has such numbers, as 1e400, and floats have none
        return "a number that is too large: expected one below 1.8e308"
    if kind is int and not -(2**63) <= cell < 2**63:
        return "a whole number beyond 64 bits: give ids of that size as text, as train had them"
    return "an object: expected a text, a number, true, false, null, or a list of these" if kind is dict else None


def _at(name: str, number: int, column: str, wrong: str) -> str:
    place = name if name == "context" else f"{name}: row {number}"
    return f"{place}, column {column!r} holds {wrong}"


def described(predictor: Predictor, limits: Limits) -> dict[str, Any]:
    """What a client may want to know of a model: labels, columns that rows must have, the hash of its schema."""
    from ctrlib.schema import kind_of

    kinds: Mapping[str, str] = {feature.name: kind_of(feature) for feature in predictor.schema.features}
    # A column of which only histories and rates are made has no kind of its own.
    columns = [{"name": name, "kind": kinds.get(name, "event")} for name in predictor.encoder.inputs]
    return {
        "labels": list(predictor.schema.labels),
        "columns": columns,
        "schema_hash": predictor.schema.hash,
        "max_rows": limits.rows,
    }
