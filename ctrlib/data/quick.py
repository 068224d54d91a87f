"""What single cells mean, in Python: the same as `ctrlib.data.cells` says of columns, for cells of usual types.

A loop over a few cells is sooner done than a query is planned. `Careful` is raised for what is not known at sight.
What depends on a feature only is settled before the first cell comes, by the functions that make functions.

A copy of this file goes with every exported model (`ctrlib.export.reader`), so it needs the standard library only.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctrlib.schema import MultiValued, Numeric, RawId, Sequence, VocabularyFeature

FLOAT32_MAX = 3.4028234e38
BLANKS = " \t\r\n"  # cut around a cell
MISSING_RAW_ID = -(2**63)  # as in `ctrlib.schema`
# Cut around a value inside a cell: Unicode's White_Space, as polars does. (Python's own strip cuts more.)
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Careful(Exception):
    """A cell that the quick road does not know at sight."""


def json_events(cell: str) -> list[str | None] | None:
    """The texts of what a JSON list holds, None for null; None in place of the list if it is none, or holds others
    than texts, whole numbers, booleans and nulls.

    >>> json_events('[7, "7.0", 7.0, true, null]'), json_events("[7.5]"), json_events("[7")
    (['7', '7.0', '7', 'true', None], None, None)
    """
    events: list[str | None] = []
    try:
        found = json.loads(cell)
        for one in found:
            if isinstance(one, str):
                one.encode()  # half a surrogate pair is no text
                events.append(one)
            elif isinstance(one, bool):
                events.append("true" if one else "false")
            elif isinstance(one, int):
                events.append(str(one))
            elif one is None or one != one:
                events.append(None)
            elif isinstance(one, float) and one.is_integer() and -(2.0**63) <= one < 2.0**63:
                events.append(str(int(one)))
            else:
                return None
    except (ValueError, TypeError, RecursionError):
        return None
    return events if isinstance(found, list) else None


def text_of_cell(feature: VocabularyFeature, fitted: str, missing: frozenset[str]) -> Callable[[Any], str | None]:
    """Cell -> canonical text, None where it is missing: `ctrlib.data.cells.text` of a cell of a usual type.

    `fitted` is the kind of values that train had (`ctrlib.data.table.family`).
    """
    texts, integers, booleans = (fitted in ("parsed", "null", kind) for kind in ("text", "integer", "boolean"))
    if getattr(feature, "bucket", None) is not None:
        number_of = functools.partial(number_in, missing)

        def bucket_of(cell: Any) -> str | None:
            x = number_of(cell)
            bucket = None if x is None else math.floor(math.pow(math.log(x), 2) if x > 2 else x)
            # Beyond 64 bits there is none, as in a column.
            return None if bucket is None or bucket < -(2**63) else str(bucket)

        return bucket_of

    def text_of(cell: Any) -> str | None:
        kind = type(cell)
        if kind is str:
            stripped: str = cell.strip(BLANKS)
            if stripped in missing:
                return None
            if texts:
                return stripped
        elif cell is None:
            return None
        elif kind is int:
            if integers:
                return str(cell)
        elif kind is bool:
            if booleans:
                return "true" if cell else "false"
        elif kind is float:
            if cell != cell:
                return None
            if integers and cell.is_integer() and -(2.0**63) <= cell < 2.0**63:
                return str(int(cell))
        raise Careful

    return text_of


def texts_of_column(
    feature: VocabularyFeature, fitted: str, missing: frozenset[str]
) -> Callable[[Collection[Any]], list[str | None]]:
    """Cells -> canonical texts, as `text_of_cell` gives them; cells of one usual type without a call for each."""
    text_of = text_of_cell(feature, fitted, missing)
    usual = getattr(feature, "bucket", None) is None
    texts, integers = (usual and fitted in ("parsed", "null", kind) for kind in ("text", "integer"))

    def texts_of(cells: Collection[Any]) -> list[str | None]:
        if len(cells) > 1:
            kinds = set(map(type, cells))
            if texts and kinds == {str}:
                return [None if (x := cell.strip(BLANKS)) in missing else x for cell in cells]
            if integers and kinds == {int}:
                return list(map(str, cells))
        return [text_of(cell) for cell in cells]

    return texts_of


def texts_of_cell(
    feature: MultiValued | Sequence, fitted: str, missing: frozenset[str], *, in_place: bool
) -> Callable[[Any], list[str | None]]:
    """Cell -> canonical texts of its values; of a history (`in_place`), None for each event that is missing."""
    text_of, separator, padding = text_of_cell(feature, fitted, missing), feature.separator, feature.padding
    kept = slice(-feature.max_length, None) if in_place else slice(feature.max_length)

    def texts_of(cell: Any) -> list[str | None]:
        parts: list[str | None]
        if type(cell) is list:
            # Missing tokens mean a cell, not a value inside of one.
            parts = [one if type(one) is str else text_of(one) for one in cell]
        elif (whole := text_of(cell)) is None or not whole.strip(SPACES):
            return []
        elif type(cell) is str and whole[0] == "[" and whole[-1] == "]":
            if (found := json_events(whole)) is None:
                raise Careful
            parts = found
        else:
            parts = list(whole.split(separator))
        texts = [part.strip(SPACES) if part else "" for part in parts]
        return [text or None for text in texts if text != padding and (text or in_place)][kept]

    return texts_of


def number_of_cell(feature: Numeric, missing: frozenset[str]) -> Callable[[Any], float]:
    """Cell -> number as the model sees it: `ctrlib.data.cells.fitted_number` of a cell of a usual type."""
    parameters, transform = feature.parameters or {}, feature.transform
    fill, mean, sd = parameters["fill"], parameters.get("mean", 0.0), parameters.get("sd", 1.0)
    low = parameters.get("min", 0.0)
    span = (parameters.get("max", 0.0) - low) or 1.0

    def number_of(cell: Any) -> float:
        x = number_in(missing, cell)
        if x is None:
            return fill
        if transform in ("log", "log_standard"):
            x = math.copysign(math.log1p(abs(x)), x)
        elif transform == "log_squared" and x > 2:
            x = math.pow(math.log(x), 2)
        if transform in ("standard", "log_standard"):
            x = (x - mean) / sd
        elif transform == "minmax":
            x = (x - low) / span
        if not abs(x) <= FLOAT32_MAX:
            raise Careful
        return x

    return number_of


def raw_id_of_cell(feature: RawId, cell: Any) -> int:
    """The id in a cell."""
    if cell is None:
        return MISSING_RAW_ID
    if type(cell) is int and feature.form == "integer" and -(2**63) <= cell < 2**63:
        return cell
    raise Careful


def number_in(missing: frozenset[str], cell: Any) -> float | None:
    """The number in a cell, None where it is missing."""
    kind = type(cell)
    if cell is None:
        return None
    if kind is float:
        if cell != cell:
            return None
        if abs(cell) <= FLOAT32_MAX:
            return float(cell)
    elif kind is int or kind is bool:
        if -(2**63) <= cell < 2**63:
            return float(cell)
    elif kind is str:
        stripped = cell.strip(BLANKS)
        if stripped in missing:
            return None
        if _NUMBER.fullmatch(stripped) and abs(x := float(stripped)) <= FLOAT32_MAX:
            return x
    raise Careful
