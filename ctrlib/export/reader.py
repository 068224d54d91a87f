"""Raw cells to the inputs of an exported model, with numpy alone: this file goes with every export.

Where the export is used, `reader.py` and `quick.py` of its folder are all that is needed beside a runtime:

    from reader import Reader

    reader = Reader("FOLDER")
    logits = session.run(None, reader.arrays([{"user": "u7", "item": "i9", "price": "12.5"}]))[0]
    probabilities = reader.probabilities(logits)

`encoder.json` says what each feature is, and `vocab.json` which texts each vocabulary knows, in the order of their
ids, which begin at 3: 0 pads, 1 is a missing cell, and 2 any other text. A few thousand rows a call are meant; for
files there is `ctrlib predict`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ctrlib.data.quick import Careful, number_of_cell, raw_id_of_cell, texts_of_cell, texts_of_column

MISSING_ID, OOV_ID, FIRST_ID = 1, 2, 3
VERSION = 1


class Reader:
    """What encodes rows for one exported model.

    Args:
        folder: an export's folder.

    Raises:
        ValueError: the folder was written by another version, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        described, values = (self._json(folder / name) for name in ("encoder.json", "vocab.json"))
        if described.get("version") != VERSION:
            raise ValueError(f"{folder} has encoder.json of version {described.get('version')}, expected {VERSION}")
        self.labels: list[str] = described["labels"]
        self.features = [SimpleNamespace(**feature) for feature in described["features"]]
        self.known = {name: dict(zip(texts, range(FIRST_ID, FIRST_ID + len(texts)))) for name, texts in values.items()}
        missing, types = frozenset(described["missing_values"]), described["types"]
        self._single = [f for f in self.features if f.kind in ("categorical", "raw_id")]
        self._lists = [f for f in self.features if f.kind in ("multi_valued", "sequence")]
        self._numbers = [f for f in self.features if f.kind == "numeric"]
        self._texts: dict[str, Any] = {}
        for feature in self.features:
            fitted = types.get(feature.name, "parsed")
            if feature.kind == "categorical":
                self._texts[feature.name] = texts_of_column(feature, fitted, missing)  # type: ignore[arg-type]
            elif feature.kind in ("multi_valued", "sequence"):
                in_place = feature.kind == "sequence"
                self._texts[feature.name] = texts_of_cell(feature, fitted, missing, in_place=in_place)  # type: ignore[arg-type]
        self._number_of = {f.name: number_of_cell(f, missing) for f in self._numbers}  # type: ignore[arg-type]

    def arrays(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The inputs of the model for some rows, each a mapping from column to cell; other columns are not looked at.

        Raises:
            ValueError: a column is missing, or holds what cannot be read; the message names row and column.
        """
        found: dict[str, Any] = {}
        if self._single:
            columns = [self._column(feature, rows) for feature in self._single]
            found["ids"] = np.ascontiguousarray(np.array(columns, np.int64).reshape(len(columns), len(rows)).T)
        for feature in self._lists:
            get = self.known[feature.vocabulary or feature.name].get
            empty = [MISSING_ID] if feature.kind == "multi_valued" else []
            lists = self._each(feature, rows, self._texts[feature.name])
            ids = [[MISSING_ID if one is None else get(one, OOV_ID) for one in texts] or empty for texts in lists]
            found[feature.name] = np.array([one for row in ids for one in row], np.int64)
            found[f"{feature.name}.offsets"] = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        if self._numbers:
            numbers = [self._each(feature, rows, self._number_of[feature.name]) for feature in self._numbers]
            found["numbers"] = np.ascontiguousarray(np.array(numbers, np.float32).reshape(len(numbers), len(rows)).T)
        return found

    @staticmethod
    def probabilities(logits: Any) -> Any:
        """Logits (B, T) -> probabilities in float64, exact where float32 would have none."""
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-np.asarray(logits, np.float64)))

    @staticmethod
    def _json(path: Path) -> dict[str, Any]:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy the folder again") from None

    def _column(self, feature: SimpleNamespace, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        if feature.kind == "raw_id":
            return self._each(feature, rows, lambda cell: raw_id_of_cell(feature, cell))  # type: ignore[arg-type]
        texts_of, get = self._texts[feature.name], self.known[feature.vocabulary or feature.name].get
        texts = [one for (one,) in self._each(feature, rows, lambda cell: texts_of([cell]))]
        return [MISSING_ID if one is None else get(one, OOV_ID) for one in texts]

    @staticmethod
    def _each(feature: SimpleNamespace, rows: Sequence[Mapping[str, Any]], read: Any) -> list[Any]:
        """What each cell of a column becomes."""
        found = []
        for number, row in enumerate(rows, start=1):
            if feature.name not in row:
                raise ValueError(f"row {number} has no column {feature.name!r}: give a cell for every feature")
            try:
                found.append(read(row[feature.name]))
            except Careful:
                cell = row[feature.name]
                raise ValueError(
                    f"row {number}, column {feature.name!r} holds {cell!r} ({type(cell).__name__}), which is not "
                    f"what a {feature.kind} column of this model holds: give text, a whole number, or a number"
                ) from None
        return found
