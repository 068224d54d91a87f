"""README.md of a folder of `ctrlib retrieve train`, as `ctrlib.serving.card` makes that of a model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ctrlib.serving.markdown import code, escaped, interval, number, setting, table, versions, words
from ctrlib.training.record import KEY


def retrieval_card(config: Mapping[str, Any], record: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """README.md of a folder of `ctrlib retrieve train`.

    Args:
        config: the method with its settings.
        record: what the training says of itself.
        counts: of the log.
    """
    said = dict(record.get(KEY) or {})
    lines = [
        (one["split"], code(one["metric"]), number(one["value"]), interval(one["low"], one["high"]))
        for one in said.get("metrics", ())
    ]
    name = code(config["method"])
    parts = [
        f"---\nlibrary_name: ctrlib\ntags:\n- retrieval\n- {json.dumps(config['method'])}\n---",
        f"# {name}: items for users",
        "## How to load it\n\nIn this folder:\n\n```python\nfrom ctrlib.retrieval.folder import load\n\n"
        'trained = load(".")\nprint(trained.log.users.head(), trained.log.items.head())\n```\n\n'
        "Lists of items: `ctrlib retrieve recommend . --out lists.parquet`.",
        f"## Model\n\n{table(('setting', 'value'), ((code(one), setting(value)) for one, value in config.items()))}",
        f"## Data\n\n{table(('what', 'value'), ((escaped(one), setting(value)) for one, value in counts.items()))}",
        f"## Protocol\n\nChosen by {words(said.get('chosen_by', 'nothing'))}; seed {record.get('seed')}.",
    ]
    if lines:
        parts.append(f"## Metrics\n\n{table(('split', 'metric', 'value', '95 % interval'), lines)}")
        parts.append(
            f"Intervals are 1.96 standard errors to both sides, which take {said['independent']} as independent."
        )
    return "\n\n".join([*parts, versions()]) + "\n"
