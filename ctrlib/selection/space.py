"""What `ctr.tune` may change of an experiment, and how far: around what is chosen by the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctrlib.models.table import MODELS

# Where an entry stands in an experiment; what is not here is an argument of the model.
OF_TRAINING = ("learning_rate", "embedding_l2", "batch_size")
HIDDEN = ("64", "128-64", "256-128", "400-200", "400-400-400")
DIMS = (4, 8, 16, 32, 64)
LEAST_BATCH = 32

Range = tuple[Any, ...]
# An entry's range: ("float", low, high), ("log", low, high), ("whole", low, high), or ("one of", value, ...).


def space_of(config: Mapping[str, Any]) -> tuple[dict[str, Range], dict[str, Any]]:
    """The ranges for a model, and what `config`, which the data has chosen, has there: the first trial.

    >>> ranges, first = space_of(
    ...     {"model": "fm", "embedding_dim": 8, "training": {"learning_rate": 0.002, "batch_size": 128}}
    ... )
    >>> ranges["embedding_dim"], first
    (('one of', 4, 8, 16, 32, 64), {'learning_rate': 0.002, 'batch_size': 128, 'embedding_dim': 8})
    """
    training, takes = config["training"], MODELS[config["model"]].arguments
    rate, batch, dim = training["learning_rate"], training["batch_size"], config["embedding_dim"]
    ranges: dict[str, Range] = {"learning_rate": ("log", rate / 8, rate * 8)}
    first: dict[str, Any] = {"learning_rate": rate}
    if training.get("embedding_l2"):
        ranges["embedding_l2"] = ("log", training["embedding_l2"] / 30, training["embedding_l2"] * 10)
        first["embedding_l2"] = training["embedding_l2"]
    sizes = (size for size in (batch // 2, batch, 2 * batch, 4 * batch) if size == batch or size >= LEAST_BATCH)
    ranges["batch_size"] = ("one of", *sizes)
    ranges["embedding_dim"] = ("one of", *sorted({*DIMS, dim}))
    first |= {"batch_size": batch, "embedding_dim": dim}
    if "hidden" in takes and "hidden" in config:
        first["hidden"] = "-".join(map(str, config["hidden"]))
        ranges["hidden"] = ("one of", *dict.fromkeys((*HIDDEN, first["hidden"])))
    if "dropout" in takes and "dropout" in config:
        ranges["dropout"], first["dropout"] = ("float", 0.0, max(0.6, config["dropout"])), config["dropout"]
    if "num_cross_layers" in takes and "num_cross_layers" in config:
        layers = config["num_cross_layers"]
        ranges["num_cross_layers"], first["num_cross_layers"] = ("whole", 1, max(4, layers)), layers
    if "numeric" in config:
        ranges["numeric"] = ("one of", *dict.fromkeys(("vector", "piecewise_linear", config["numeric"])))
        first["numeric"] = config["numeric"]
    return ranges, first


def said_by(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, as `config_for` takes them, that a trial's parameters stand for.

    >>> said_by({"model": "mlp", "hidden": "128-64", "learning_rate": 0.01})
    {'hidden': [128, 64], 'training': {'learning_rate': 0.01}}
    """
    said = {name: value for name, value in parameters.items() if name not in (*OF_TRAINING, "model")}
    if "hidden" in said:
        said["hidden"] = [int(width) for width in said["hidden"].split("-")]
    return {**said, "training": {name: parameters[name] for name in OF_TRAINING if name in parameters}}
