"""A raw file that has everything, and the options with which it is prepared, for tests of who prepares it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ctrlib.schema import Categorical, MultiValued, Numeric, RawId, Sequence

COLUMNS = [
    "label",
    "buy",
    "item",
    "seen",
    "tags",
    "none",
    "price",
    "age",
    "amount",
    "w",
    "user",
    "time",
    "shop",
    "score",
]
FEATURES = [
    Categorical("item", min_count=3),
    Sequence("seen", vocabulary="item", min_count=3, max_length=3, padding="0"),
    MultiValued("tags", max_values=6, max_length=2),
    Categorical("none"),
    Numeric("price", "log_standard"),
    Numeric("age", "minmax"),
    Categorical("amount", bucket="log_squared"),
    RawId("user"),  # text
    RawId("time"),  # integers
]
_COMMON: dict[str, Any] = {
    "features": FEATURES,
    "labels": ["label", "buy"],
    "label_positive": {"buy": "yes"},
    "missing_labels": "mask",
    "missing_values": ("", "?"),
    "columns": COLUMNS,
    "separator": "\t",
    "on_bad_row": "skip",
}
EVERY_KIND: dict[str, dict[str, Any]] = {
    "random": {**_COMMON, "group": "user", "weight": "w", "seed": 3},  # shop and score are inferred
    "by time": {**_COMMON, "split_by": "time", "split": (6, 0, 4), "ignore": ("score", "w"), "group": "amount"},
}


def every_kind(folder: Path, num_rows: int = 600) -> Path:
    """Write the file; a few of its rows are bad."""
    rng = np.random.default_rng(0)
    # Ties in count, letters that take one to four bytes, and those whose order differs in UTF-16.
    names = ["a", "b", "é", "Z", "zz", "\uff5e", "\U0001f600", "\U00010000x", "10", "9", *(f"i{i}" for i in range(60))]
    lines = []
    for row in range(num_rows):
        item = names[int(len(names) * rng.random() ** 2)]
        seen = "|".join(rng.choice(names, rng.integers(0, 6)).tolist())
        tags = "|".join(rng.choice(["x", "y", "z", " w ", "?", "\U0001f600", "ü"], rng.integers(0, 4)).tolist())
        price, age, amount = rng.lognormal(2, 3), rng.integers(18, 80), int(rng.lognormal(3, 2))
        cells = [
            str(row % 2),
            "yes" if rng.random() < 0.3 else "no",
            item,
            seen,
            tags,
            "",
            f"{price}",
            str(age),
            str(amount),
        ]
        cells += [
            f"{rng.random():.3f}",
            f"u{rng.integers(40)}",
            str(rng.integers(500)),
            f"s{row % 7}",
            f"{rng.normal()}",
        ]
        if row % 7 == 0:
            cells[3] = f"|0|{cells[3]}|{item}|"  # missing events and padding
        if row % 9 == 0:
            cells[4] = f'"[""{cells[4]}"", null, 7.0, true]"'
        if row % 11 == 0:
            cells[int(rng.integers(6, 8))] = "?"
        if row % 13 == 0:
            cells[0] = ""
        if row % 97 == 5:
            cells[6] = "dear"
        if row % 101 == 7:
            cells.pop()
        lines.append("\t".join(cells))
    path = folder / "raw.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
