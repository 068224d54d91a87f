"""What `ctrlib train` does where nothing is said: settings that follow from a few counts of the data.

The rules were chosen on validation over data of several kinds (docs/defaults.md names them, with what was reached).
`Training`, `Inputs` and the models in Python keep defaults of their own, which do not depend on data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ctrlib.data.facts import Facts


@dataclass(frozen=True)
class Settings:
    """Arguments of `Inputs` and of the model, as far as it takes them; entries of `training`; and why, in a line."""

    model: dict[str, Any]
    training: dict[str, Any]
    reason: str


def rows_per_step(rows: int, least: int = 64, most: int = 4096) -> int:
    """The power of two, from `least` to `most`, that gives a pass over so many rows 100 steps or some more.

    >>> [rows_per_step(rows) for rows in (1_000, 40_000, 80_000, 10_000_000)]
    [64, 256, 512, 4096]
    """
    return max(least, min(most, 1 << max(0, (rows // 100).bit_length() - 1)))


def settings_for(facts: Facts, engine: str = "exact") -> Settings:
    l2 = 4.0 / facts.rows
    model = {"embedding_dim": 16, "hidden": [128, 64], "dropout": 0.1}
    if facts.numbers:
        model["numeric"] = "piecewise_linear"
    training = {"batch_size": rows_per_step(facts.rows), "learning_rate": 1e-3, "embedding_l2": l2}
    return Settings(model, training, "")
