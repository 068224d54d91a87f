"""Results as JSON."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: an undefined metric (NaN), which JSON cannot say, is null.

    >>> to_json({"auc": float("nan"), "rows": [1, 2.5]})
    '{"auc": null, "rows": [1, 2.5]}'
    """

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(part) for key, part in item.items()}
        if isinstance(item, list | tuple):
            return [plain(part) for part in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=indent, allow_nan=False)
