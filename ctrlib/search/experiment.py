"""A search as one dictionary of plain data: the experiment's (`ctrlib.training.config`), and beside it `search`.

    {"model": "deepfm", "search": {"method": "optfs", "penalty": 1e-5}, "training": {"batch_size": 512, "seed": 1}}

`training` is that of the retraining; batch size and seed are those of the search, too.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ctrlib import models
from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, WrongTypeError, check_type, shown
from ctrlib.models.build import BESIDE
from ctrlib.search.methods import SEARCHES
from ctrlib.training.config import Training, training_of

# The entries of `training` that a search and its retraining go by: they run in one process, on the exact engine.
HEEDED = ("batch_size", "learning_rate", "embedding_l2", "max_epochs", "patience", "seed")


def settings_of(method: str, values: dict[str, Any]) -> Any:
    """The settings of a method, with some values of one's own.

    Raises:
        ValueError: there is no such method, or it has no such setting.

    >>> settings_of("optfs", {"penalty": 1e-5}).penalty
    1e-05
    """
    check_type("the name of a method", str, method=method)
    check_type("a dictionary of settings", dict, values=values)
    if method not in SEARCHES:
        raise ArgumentError(f"unknown method {method!r}; {instead([method], SEARCHES)}")
    settings = getattr(importlib.import_module(f"ctrlib.search.{method}"), SEARCHES[method].settings)
    names = [field.name for field in dataclasses.fields(settings)]
    if unknown := sorted(set(values) - set(names)):
        raise ArgumentError(f"{method} has no setting {unknown}; {instead(unknown, names)}")
    try:
        return settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except TypeError as error:
        said = f"{method} does not take these settings, one is of the wrong kind: {values} ({error})"
        raise ArgumentError(said) from error


def experiment_of(
    method: str, config: Mapping[str, Any], settings: Any, training: Training, *, modules: Sequence[str] = ()
) -> dict[str, Any]:
    """The dictionary of a search, every default filled in: what identifies it, and what its model.json holds.

    Args:
        method: one of `SEARCHES`.
        config: of the model, as `models.build` takes it.
        settings: the method's.
        training: of the retraining.
        modules: where a model of your own may be imported from.

    Raises:
        ValueError: as `models.complete`, or `config` says something of the training or of a search itself.

    >>> experiment_of("optfs", {"model": "fm"}, settings_of("optfs", {}), Training(seed=1))["search"]["method"]
    'optfs'
    """
    if beside := sorted({"training", "search", "replaced"} & set(config)):
        raise ArgumentError(
            f"config holds {beside}: expected the model alone; take a whole experiment apart with "
            "ctrlib.search.parts_of(experiment)"
        )
    described = {
        "search": {"method": method, **dataclasses.asdict(settings)},
        "training": dataclasses.asdict(training),
    }
    return models.complete({**config, **described}, modules=modules)


def parts_of(experiment: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any, Training]:
    """Method, config of the model, settings and training of a search's dictionary; the other way of `experiment_of`.

    What `search` does not say is at the method's default, but for learning rate and L2, which are then those of
    `training`. `replaced`, what an earlier search came to, is of no concern here.

    Raises:
        ValueError: an entry is missing, unknown or of another kind, or `training` says what no search goes by.

    >>> parts_of({"model": "fm", "search": {"method": "optfs", "epochs": 2}, "training": {"learning_rate": 0.01}})[2]
    OptFS(penalty=1e-06, temperature=5000.0, epochs=2, rewind=1, learning_rate=0.01, embedding_l2=0.0)
    """
    check_type('a dictionary {"model": name, "search": {...}, **arguments}', Mapping, experiment=experiment)
    said = experiment.get("search")
    if not isinstance(said, Mapping) or not isinstance(said.get("method"), str):
        raise WrongTypeError(f'search is {shown(said)}, expected a dictionary {{"method": name, **settings}}')
    if experiment.get("crosses"):
        raise ArgumentError(
            f"crosses {experiment['crosses']}: a search has plain tables and no crosses beside them, so they would be "
            "dropped; leave them out, or search by optinter, which chooses crosses itself"
        )
    training = training_of(experiment)
    defaults = dataclasses.asdict(Training(device="cpu"))  # which is where a search runs
    idle = {
        name: value
        for name, value in dataclasses.asdict(training).items()
        if name not in HEEDED and value != defaults[name] and (name, value) != ("device", "auto")
    }
    if idle:
        raise ArgumentError(
            f"training says {idle}, which no search goes by: it runs in one process on the CPU, on the exact engine. "
            f"Leave it out; a search takes {', '.join(HEEDED)}"
        )
    settings = {"learning_rate": training.learning_rate, "embedding_l2": training.embedding_l2, **said}
    method = settings.pop("method")
    config = {name: value for name, value in experiment.items() if name not in BESIDE}
    return method, config, settings_of(method, settings), training
