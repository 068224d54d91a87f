"""What `ctrlib train` does where nothing is said: settings that follow from a few counts of the data.

The rules were chosen on validation over data of several kinds; docs/defaults.md names them, and says what was reached.
`Training`, `Inputs` and the models in Python keep defaults of their own, which do not depend on data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrlib._lazy import instead
from ctrlib.data.facts import Facts, facts_of
from ctrlib.data.quantiles import quantile_edges
from ctrlib.errors import ArgumentError, WrongTypeError
from ctrlib.models.table import MODELS
from ctrlib.schema import BINNED

if TYPE_CHECKING:
    from ctrlib.training.config import Device

# Of L2 on tables, in rows, each counted by the standard deviation of its label: where fields are ids, and elsewhere.
# Where a field has few values each has many rows, and little is won by drawing them together.
PRIOR_OF_IDS = 8000.0
PRIOR = 2000.0
MANY_VALUES = 100  # per field, from which on its values are ids
BINS = 64  # per number


@dataclass(frozen=True)
class Settings:
    """What is chosen: arguments of `Inputs` and of models, which each takes as far as it has them; entries of
    `training`; and all of it with the reasons, in a line."""

    model: dict[str, Any]
    training: dict[str, Any]
    reason: str


def settings_for(facts: Facts, engine: str = "exact", device: Device = "auto") -> Settings:
    """The settings for data of these counts, on this machine.

    >>> facts = Facts(rows=40_000, rates=(0.24,), positives=9_600, values=100, fields=14, numbers=6)
    >>> settings = settings_for(facts)
    >>> settings.model["hidden"], settings.training["batch_size"], settings.training["embedding_l2"]
    ([128, 64], 512, 0.021)
    """
    dim = 16 if facts.values_per_field >= MANY_VALUES else 8
    hidden = hidden_for(facts.rows)
    batch = rows_per_step(facts.rows, steps=50, least=128)
    model: dict[str, Any] = {
        "embedding_dim": dim,
        "hidden": hidden,
        "dropout": 0.2,
        "num_cross_layers": 2,
        "batch_norm": True,
    }
    if facts.numbers:
        model["numeric"] = "piecewise_linear"
    training: dict[str, Any] = {
        "batch_size": batch,
        "learning_rate": 2e-3,
        "max_epochs": 30,
        "patience": 3,
        "select_by": "log_loss",
        "calibrate": True,
        "min_delta": min_delta_for(facts),
        "cut_factor": 0.5,
        "start_at_base_rate": True,
    }
    said = [
        f"{facts.rows:,} rows ({facts.positives:,} of the rarer class), so layers of {'-'.join(map(str, hidden))}, "
        f"batches of {batch:,}",
        f"{facts.values_per_field:,.0f} values per id field, so width {dim}",
    ]
    if engine == "exact":  # the fused one has neither, since it leaves untouched rows alone
        training["embedding_l2"] = l2_for(facts)
        training["average_weights"] = True
        said[0] += f", and L2 of {training['embedding_l2']:g}"
        said.append("the average of weights")
    elif _bfloat16_pays(device):
        training["precision"] = "bf16"
        said.append("bf16, which this processor multiplies itself")
    if facts.numbers:
        said.append(f"{facts.numbers} numbers, piecewise linear")
    said.append("calibrated, and the epoch by that log-loss")
    return Settings(model, training, f"settings by the data: {'; '.join(said)} (flags change them)")


def config_for(
    data: str | Path, model: str = "dcnv2", said: Mapping[str, Any] | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """An experiment for `ctr.run`, as `ctrlib train` makes it: what is not said is chosen by counts of the data.

    Args:
        data: a prepared folder.
        model: name of a published model.
        said: some arguments of the model, and entries of "training", which count more.
        seed: of the training.

    Raises:
        ValueError: there is no such model, or `said` names one, too.
        SchemaError: it is no prepared folder with a train split, or a label has one class only.
    """
    said = {} if said is None else said
    if not (isinstance(said, Mapping) and isinstance(said.get("training", {}), Mapping)):
        raise WrongTypeError(
            f'expected settings such as {{"hidden": [64], "training": {{"patience": 3}}}}, got {said!r}'
        )
    if not isinstance(model, str) or model not in MODELS:
        raise ArgumentError(
            f"unknown model {model!r}; {instead([str(model)], MODELS)} (`ctrlib models` says what each is)"
        )
    if "model" in said:
        raise ArgumentError(f"the settings name a model, {said['model']!r}, beside {model!r}: leave it out there")
    training: Mapping[str, Any] = said.get("training", {})
    settings = settings_for(facts_of(data), training.get("engine", "exact"), training.get("device", "auto"))
    takes = ("embedding_dim", "numeric", *MODELS[model].arguments)
    chosen = {name: value for name, value in settings.model.items() if name in takes}
    config = with_edges({"model": model, **chosen, **said}, data)
    return {**config, "training": {**settings.training, "seed": seed, **training}}


def _bfloat16_pays(device: Device) -> bool:
    """Whether one process computes on a CPU that has bfloat16: the machines of several may differ."""
    from ctrlib.distributed import world_size  # as the next, it needs torch
    from ctrlib.training.engines import choose_device, native_bfloat16

    return world_size() == 1 and native_bfloat16() and choose_device(device).type == "cpu"


def with_edges(config: Mapping[str, Any], data: str | Path, bins: int | None = None) -> dict[str, Any]:
    """The same arguments of a model, with edges of bins, by default `BINS`, where its numbers want some and have none.

    Raises:
        ValueError, SchemaError: as `quantile_edges`.
    """
    if config.get("numeric") not in BINNED or config.get("edges") is not None:
        return dict(config)
    return {**config, "edges": quantile_edges(data, BINS if bins is None else bins, missing_apart=True)}


def hidden_for(rows: int) -> list[int]:
    """Widths of the hidden layers for so many rows of train.

    >>> hidden_for(40_000), hidden_for(500_000), hidden_for(5_000_000)
    ([128, 64], [256, 128], [400, 200])
    """
    if rows < 250_000:
        return [128, 64]
    return [256, 128] if rows < 2_500_000 else [400, 200]


def l2_for(facts: Facts) -> float:
    """A number of rows (`PRIOR_OF_IDS` or `PRIOR`) times sqrt(rate (1 - rate)) by rows, of several labels their mean.

    The penalty stands beside a mean over rows, so that by rows it draws a row of a table to 0 as strongly whatever the
    data's size is. A row of a rare label tells less of a logit (its variance is rate (1 - rate)), and wants less.

    >>> l2_for(Facts(rows=40_000, rates=(0.5,), positives=20_000, values=100, fields=3, numbers=0))
    0.025
    >>> l2_for(Facts(rows=40_000, rates=(0.5,), positives=20_000, values=3_000, fields=3, numbers=0))
    0.1
    >>> l2_for(Facts(rows=40_000, rates=(0.005,), positives=200, values=100, fields=3, numbers=0))
    0.0035
    """
    deviation = sum(math.sqrt(rate * (1 - rate)) for rate in facts.rates) / len(facts.rates)
    prior = PRIOR_OF_IDS if facts.values_per_field >= MANY_VALUES else PRIOR
    return two_digits(prior * deviation / facts.rows)


def rows_per_step(rows: int, *, steps: int = 100, least: int = 64, most: int = 4096) -> int:
    """The largest power of two that gives a pass over so many rows `steps` steps or more, from `least` to `most`.

    >>> [rows_per_step(rows) for rows in (1_000, 40_000, 80_000, 10_000_000)]
    [64, 256, 512, 4096]
    """
    return max(least, min(most, 1 << max(0, (rows // steps).bit_length() - 1)))


def min_delta_for(facts: Facts) -> float:
    """The smallest improvement of log-loss that counts, in nats: 1 / 2,000 of what a constant has.

    >>> min_delta_for(Facts(rows=9, rates=(0.5,), positives=4, values=0, fields=1, numbers=1))
    0.00035
    """
    entropy = sum(-rate * math.log(rate) - (1 - rate) * math.log1p(-rate) for rate in facts.rates) / len(facts.rates)
    return two_digits(entropy / 2_000)


def two_digits(number: float) -> float:
    """Rounded to two digits, for people to read.

    >>> two_digits(0.0037512)
    0.0038
    """
    return float(f"{number:.2g}")
