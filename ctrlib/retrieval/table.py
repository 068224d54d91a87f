"""The methods by name, made from plain data: `{"method": "ials", "alpha": 0.1}`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError
from ctrlib.retrieval.baselines import EASE, IALS, ItemCF, Popularity
from ctrlib.retrieval.methods import Retriever
from ctrlib.retrieval.objective import Weights
from ctrlib.retrieval.ultragcn import UltraGCN

METHODS: dict[str, type] = {
    "ultragcn": UltraGCN,
    "ials": IALS,
    "ease": EASE,
    "itemcf": ItemCF,
    "popularity": Popularity,
}
_IALS = "ials_"  # before the settings of UltraGCN's start


def arguments_of(method: str) -> dict[str, Any]:
    """Names and defaults of what `build` takes for a method; UltraGCN's loss and its start included.

    >>> arguments_of("ease")
    {'l2': 500.0, 'double': None}
    """
    parameters = inspect.signature(METHODS[method]).parameters.values()
    found = {one.name: one.default for one in parameters}
    if method != "ultragcn":
        return found
    own = {name: default for name, default in found.items() if name not in ("weights", "ials")}
    loss = {one.name: one.default for one in dataclasses.fields(Weights)}
    start = {f"{_IALS}{name}": value for name, value in arguments_of("ials").items() if name != "embedding_dim"}
    return {**loss, **own, **start, f"{_IALS}epochs": 4}


def build(config: Mapping[str, Any]) -> Retriever:
    """A method that has learnt nothing yet.

    Raises:
        ArgumentError: there is no such method, or it has no such argument; or one is out of range.

    >>> build({"method": "ultragcn", "w3": 0, "epochs": 2, "ials_alpha": 0.1}).weights.w3
    0
    """
    name = config.get("method")
    if name not in METHODS:
        raise ArgumentError(f"there is no method {name!r}; {instead([str(name)], METHODS)}")
    given = {key: value for key, value in config.items() if key != "method"}
    known = arguments_of(name)
    if wrong := [key for key in given if key not in known]:
        raise ArgumentError(f"{name} has no {' or '.join(wrong)}; {instead(wrong, known)}")
    if name != "ultragcn":
        return METHODS[name](**given)  # type: ignore[no-any-return]
    loss = {one.name: given.pop(one.name) for one in dataclasses.fields(Weights) if one.name in given}
    start = {key.removeprefix(_IALS): given.pop(key) for key in list(given) if key.startswith(_IALS)}
    return UltraGCN(Weights(**loss), ials=IALS(**{"epochs": 4, **start}), **given)
