"""What encoding finds in rows, beside their ids and numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

NUM_EXAMPLES = 10  # unseen values that are kept to be shown


@dataclass
class Counts:
    """What was found in rows: feature -> number of "ids" looked up, of those "unseen" in train, of "missing" ones;
    history -> number of "empty" ones.

    `examples`: a few of the unseen values of each feature. `ignored`: columns that the schema does not know. `skipped`:
    why how many rows were left out.
    """

    rows: int = 0
    ids: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, int] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)
    empty: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        """Count more rows."""
        self.rows += other.rows
        for what in ("ids", "unseen", "missing", "empty"):
            mine, theirs = getattr(self, what), getattr(other, what)
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count
        for name, values in other.examples.items():
            known = self.examples.setdefault(name, [])
            known += [value for value in values if value not in known][: NUM_EXAMPLES - len(known)]
        self.ignored = list(dict.fromkeys([*self.ignored, *other.ignored]))
        self.skipped += other.skipped
