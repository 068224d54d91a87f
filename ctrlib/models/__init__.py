"""Published models, assembled from parts: what the command line and the recipes mean by a name.

`ctrlib.models.dcnv2(inputs, hidden=(64, 64))` makes one, `build({"model": "dcnv2", "hidden": [64, 64]}, schema)` the
same from plain data. `MODELS` is the table of all.
"""

from __future__ import annotations

from typing import Any

from ctrlib._lazy import no_such
from ctrlib.models.build import build, complete, for_engine
from ctrlib.models.table import MODELS, PublishedModel

__all__ = ["MODELS", "PublishedModel", "build", "complete", "for_engine"]


def __getattr__(name: str) -> Any:
    if name in MODELS:
        return MODELS[name].make
    raise AttributeError(no_such(__name__, name, __dir__()))


def __dir__() -> list[str]:
    return sorted((*__all__, *MODELS))
