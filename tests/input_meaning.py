"""What the cells of a generated table mean, in plain Python: written from docs/data.md, without the library's code."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import json
import math
import re
from typing import Any

import input_tables as tables
import polars as pl

from ctrlib.data.quick import BLANKS
from ctrlib.schema import Categorical, MultiValued, Numeric, RawId, Schema, Sequence

BAD = "bad"  # a cell that no feature of its kind can hold
MISSING, OOV = 1, 2
FLOAT32_MAX = 3.4028234e38
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SPECIAL = re.compile(r"([+-]?)(nan|inf|infinity)", re.IGNORECASE)


def same_number(one: float, other: Any) -> bool:
    """Whether a float32 is a number, but for rounding."""
    if other is ...:
        return True
    if other != other or one != one:
        return bool(one != one and other != other)
    return math.isfinite(one) and abs(one - other) <= 1e-5 * max(1e-30, abs(other), 1.0)


class Meaning:
    """Of the cells of one table under a fitted schema."""

    def __init__(self, schema: Schema, table: tables.Table, options: dict[str, Any]) -> None:
        self.schema, self.table = schema, table
        self.tokens = {"", *options.get("missing_values", ("",))}
        self.masks = options.get("missing_labels") == "mask"
        self.positive = options.get("label_positive") or {}

    # ---------------------------------------------------------------------------------------------------------- cells

    def present(self, cell: Any) -> Any:
        """The cell, stripped; None where it is missing."""
        if isinstance(cell, str):
            cell = cell.replace("\r\n", "\n").strip(" \t\r\n")
            return None if cell in self.tokens else cell
        return None if cell is None or cell != cell else cell

    def number(self, cell: Any) -> Any:
        """A float, None, or BAD."""
        cell = self.present(cell)
        if isinstance(cell, str):
            if special := _SPECIAL.fullmatch(cell):
                return None if special[2].lower() == "nan" else math.inf
            if not _NUMBER.fullmatch(cell):
                return BAD
        elif isinstance(cell, list | dict):
            return BAD
        return None if cell is None else float(cell)

    def scalar(self, cell: Any) -> Any:
        """The text of a cell that is there, or BAD."""
        if isinstance(cell, bool):
            return "true" if cell else "false"
        if isinstance(cell, float | decimal.Decimal):
            if not (math.isfinite(cell) and cell == int(cell)):
                return BAD
            return str(int(cell)) if abs(cell) < 2**63 else BAD
        if isinstance(cell, datetime.datetime):
            if cell.tzinfo is not None:
                cell = cell.astimezone(datetime.timezone.utc).replace(tzinfo=None)
            written = cell.isoformat(" ")
            written = written.rstrip("0") if "." in written else written
            return written.removesuffix(" 00:00:00")
        if isinstance(cell, datetime.time):
            written = cell.isoformat()
            return ...  # how polars writes it is not said
        return str(cell)

    def text(self, name: str, cell: Any) -> Any:
        """The text of an id, None where it is missing, or BAD."""
        cell = self.present(cell)
        return None if cell is None else self.scalar(cell)

    def events(self, feature: MultiValued | Sequence, cell: Any) -> Any:
        """The texts of a list, None for an event that is missing; or BAD."""
        cell = self.present(cell)
        if cell is None or cell == []:
            return []
        if isinstance(cell, list):
            texts = [None if one is None or one != one else self.scalar(one) for one in cell]
        elif isinstance(cell, str) and cell.startswith("[") and cell.endswith("]"):
            try:
                found = json.loads(cell)
            except ValueError:
                return BAD
            texts = [None if one is None else self.scalar(one) for one in found]
            if any(isinstance(one, list | dict) for one in found):
                return BAD
        else:
            whole = self.scalar(cell)
            if whole in (..., BAD):
                return whole
            texts = list(whole.split(feature.separator))
        if BAD in texts:
            return BAD
        texts = [(one or "").strip(BLANKS) for one in texts]
        texts = [one for one in texts if feature.padding is None or one != feature.padding]
        if isinstance(feature, MultiValued):
            return [one for one in texts if one][: feature.max_length]
        return [one or None for one in texts][-feature.max_length :]

    def label(self, name: str, cell: Any) -> Any:
        """0.0, 1.0, NaN where it is missing, or BAD."""
        value = self.number(cell)
        if value is None:
            return math.nan
        if name in self.positive:
            return float(self.scalar(self.present(cell)) == self.positive[name])
        return value if value in (0.0, 1.0) else BAD

    def encoded(self, feature: Any, cell: Any, ids: dict[str, int]) -> Any:
        """What the folder holds for a cell; ... where it is not said here."""
        if isinstance(feature, Numeric):
            return self._transformed(feature, self.number(cell))
        if isinstance(feature, RawId):
            text = self.text(feature.name, cell)
            if text is None:
                return -(2**63)
            if feature.form == "integer":
                return (int(text) + 2**63) % 2**64 - 2**63
            return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
        if isinstance(feature, Categorical):
            if feature.bucket:
                return ...
            text = self.text(feature.name, cell)
            return ... if text is ... else MISSING if text is None else ids.get(text, OOV)
        events = self.events(feature, cell)
        if events is ...:
            return ...
        found = [MISSING if one is None else ids.get(one, OOV) for one in events]
        return found or ([MISSING] if isinstance(feature, MultiValued) else [])

    def _transformed(self, feature: Numeric, x: Any) -> float:
        parameters = feature.parameters or {}
        if x is None:
            return parameters["fill"]
        if feature.transform in ("log", "log_standard"):
            x = math.copysign(math.log1p(abs(x)), x)
        elif feature.transform == "log_squared":
            x = math.log(x) ** 2 if x > 2 else x
        if feature.transform in ("standard", "log_standard"):
            return (x - parameters["mean"]) / parameters["sd"]
        if feature.transform == "minmax":
            return (x - parameters["min"]) / ((parameters["max"] - parameters["min"]) or 1.0)
        return float(x)

    # ----------------------------------------------------------------------------------------------------------- rows

    def is_bad(self, split: tables.Split, row: int, *, with_labels: bool) -> bool:
        """Whether a row cannot be taken."""
        for feature in self.schema.features:
            cell = split.cells[feature.name][row]
            if isinstance(feature, Numeric) or (isinstance(feature, Categorical) and feature.bucket):
                x = self.number(cell)
                if x == BAD or (x is not None and abs(x) > FLOAT32_MAX):
                    return True
                if isinstance(feature, Numeric) and not abs(self._transformed(feature, x)) <= FLOAT32_MAX:
                    return True
            elif isinstance(feature, MultiValued | Sequence) and self.events(feature, cell) == BAD:
                return True
        if not with_labels:
            return False
        for name in self.schema.labels:
            value = self.label(name, split.cells[name][row])
            if value == BAD or (value != value and not self.masks):
                return True
        if weight := self.schema.weight:
            x = self.number(split.cells[weight][row])
            if x is None or x == BAD or not 0 <= x <= FLOAT32_MAX:
                return True
        if group := self.schema.group:
            text = self.text(group, split.cells[group][row])
            return text is None or str(text).lower() == "nan"
        return False

    # ---------------------------------------------------------------------------------------------------------- forms

    def frame(self, split: tables.Split, rows: list[int]) -> pl.DataFrame:
        """Some rows as a frame, of the types that the file has."""
        cells = {name: [values[row] for row in rows] for name, values in split.cells.items()}
        if self.table.is_text:
            return pl.DataFrame(cells, schema=dict.fromkeys(cells, pl.String))
        if self.table.form == "jsonl":
            return pl.DataFrame([pl.Series(name, _of_json(values), strict=False) for name, values in cells.items()])
        types = {name: self.table.columns[name].type for name in cells}
        if self.table.form == "pandas":
            return pl.from_pandas(tables.arrow_of(split.cells, types).to_pandas())[rows]
        return pl.DataFrame(pl.from_arrow(tables.arrow_of(cells, types)))

    def dicts(self, split: tables.Split, rows: list[int]) -> list[dict[str, Any]]:
        """Some rows as dictionaries of what a prediction needs."""
        names = [feature.name for feature in self.schema.features]
        if self.table.form == "jsonl":
            cells = {name: _of_json(split.cells[name]) for name in names}
        else:
            cells = {name: split.cells[name] for name in names}
        return [{name: cells[name][row] for name in names} for row in rows]


def _of_json(values: list[Any]) -> list[Any]:
    """JSON has one kind of number: whole ones are integers, unless others, or some of more than 128 bits, are among
    them."""
    flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
    numbers = [one for one in flat if isinstance(one, int | float) and not isinstance(one, bool)]
    if not any(isinstance(one, float) for one in numbers):
        return values
    whole = all(one != one or (abs(one) < 2**127 and one == int(one)) for one in numbers)

    def made(one: Any) -> Any:
        if isinstance(one, list):
            return [made(each) for each in one]
        if one is None or isinstance(one, bool | str):
            return one
        return float(one) if not whole else None if one != one else int(one)

    return [made(value) for value in values]
