"""A model composed by hand, as plain data: a tree of constructors, each with its import path and its arguments.

    {"class": "ctrlib.Model", "arguments": {
        "embedding": {"class": "ctrlib.TableEmbedding", "arguments": {"features": {"features_of_schema": "all"}}},
        "tower": {"class": "ctrlib.MLP", "arguments": {"in_shape": [6, 16], "hidden": [8]}},
        "head": {"class": "ctrlib.LinearHead", "arguments": {"in_shape": [8]}}}}

The tree is the description and the model is made from it, so that nothing has to be remembered about modules that were
made otherwise. Lists are tuples to the constructors; `{"features_of_schema": "all"}`, or a list of names, stands for
features with the sizes of the data at hand. Parts of a model are read from `PLACES`, and classes from modules that the
caller names: a tree of somebody else cannot choose what runs.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, shown

if TYPE_CHECKING:
    from ctrlib.schema import Schema

PLACES = ("ctrlib", "ctrlib.towers", "ctrlib.heads", "ctrlib.embeddings")
OF_SCHEMA = "features_of_schema"
KEYS = {"class", "arguments"}


def make_tree(tree: Any, schema: Schema, modules: Sequence[str] = (), place: str = "model") -> Any:
    """What a tree describes: a part of a model, or a plain value.

    Args:
        tree: plain data.
        schema: of the prepared data.
        modules: where classes of one's own may be imported from.
        place: the tree's own place, for messages.

    Raises:
        ArgumentError: naming the place in the tree, and what is wrong with it.

    >>> from ctrlib.testing import example_schema
    >>> make_tree({"class": "ctrlib.towers.FM", "arguments": {"in_shape": [3, 4]}}, example_schema()).in_shape
    (3, 4)
    """
    if isinstance(tree, list | tuple):
        return tuple(make_tree(value, schema, modules, f"{place}[{n}]") for n, value in enumerate(tree))
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {OF_SCHEMA}:
        return _features(tree[OF_SCHEMA], schema, f"{place}.{OF_SCHEMA}")
    if not _is_part(tree):
        return {name: make_tree(value, schema, modules, f"{place}.{name}") for name, value in tree.items()}
    kind, arguments = _checked(tree, modules, place)
    made = {n: make_tree(value, schema, modules, f"{place}.arguments.{n}") for n, value in arguments.items()}
    many = [name for name, one in _parameters(kind).items() if one.kind is one.VAR_POSITIONAL and name in made]
    positional = [value for name in many for value in made.pop(name)]
    try:
        return kind(*positional, **made)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise ArgumentError(
            f"{place}: {tree['class']} does not take these arguments ({type(error).__name__}: {error}): "
            f"{shown(dict(arguments))}"
        ) from error


def complete_tree(tree: Any, modules: Sequence[str] = (), place: str = "model") -> Any:
    """The same tree with the arguments that it leaves out at their defaults, where plain data hold these.

    Raises:
        ArgumentError: as `make_tree`, as far as names go.

    >>> complete_tree({"class": "ctrlib.towers.CIN", "arguments": {"in_shape": [3, 4]}})["arguments"]
    {'num_maps': [64, 64, 64], 'bias': True, 'in_shape': [3, 4]}
    """
    if isinstance(tree, list | tuple):
        return [complete_tree(value, modules, f"{place}[{n}]") for n, value in enumerate(tree)]
    if not isinstance(tree, Mapping):
        return tree
    if set(tree) == {OF_SCHEMA} or not _is_part(tree):
        return {name: complete_tree(value, modules, f"{place}.{name}") for name, value in tree.items()}
    kind, arguments = _checked(tree, modules, place)
    said = {n: complete_tree(value, modules, f"{place}.arguments.{n}") for n, value in arguments.items()}
    return {"class": tree["class"], "arguments": {**dict(_defaults(kind)), **said}}


def _is_part(tree: Mapping[str, Any]) -> bool:
    """Sizes by feature are dictionaries too, and a feature may be called "class"."""
    return isinstance(tree.get("class"), str) or set(tree) >= KEYS


def _checked(tree: Mapping[str, Any], modules: Sequence[str], place: str) -> tuple[Any, Mapping[str, Any]]:
    """Class and arguments of a part; refuses what its constructor has no name for."""
    if unknown := sorted(set(tree) - KEYS):
        raise ArgumentError(f'{place} has {unknown} beside "class" and "arguments": expected these two')
    arguments = tree.get("arguments", {})
    if not isinstance(arguments, Mapping):
        raise ArgumentError(f"{place}.arguments is {shown(arguments)}, expected a dictionary of them by name")
    kind = _class(tree["class"], modules, place)
    takes = _parameters(kind)
    takes_any = any(one.kind is one.VAR_KEYWORD for one in takes.values())
    if (unknown := sorted(set(arguments) - set(takes))) and not takes_any:
        raise ArgumentError(f"{place}: {tree['class']} takes no {unknown}; {instead(unknown, takes)}")
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [name for name, one in takes.items() if one.default is one.empty and one.kind not in many]
    if missing := [name for name in needed if name not in arguments]:
        raise ArgumentError(f"{place}: {tree['class']} cannot be made without {missing}: add them to its arguments")
    for name, one in takes.items():
        if one.kind is one.VAR_POSITIONAL and not isinstance(arguments.get(name, ()), list | tuple):
            raise ArgumentError(f"{place}.arguments.{name} is {shown(arguments[name])}, expected a list")
    return kind, arguments


def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def _defaults(kind: Any) -> Iterator[tuple[str, Any]]:
    for name, one in _parameters(kind).items():
        if one.default is one.empty:
            continue
        try:
            yield name, json.loads(json.dumps(one.default))
        except (TypeError, ValueError):  # a function, say: left to the constructor
            continue


def _class(path: Any, modules: Sequence[str], place: str) -> Any:
    """The class at an import path: a part of ctrlib's, or any class of a module that the caller names."""
    if not isinstance(path, str):
        raise ArgumentError(f"{place}.class is {shown(path)}, expected an import path such as 'ctrlib.towers.MLP'")
    module, _, name = path.rpartition(".")
    if module in PLACES:
        from torch import nn

        from ctrlib.embeddings.sequence import Unit

        public = importlib.import_module(module)
        found = getattr(public, name) if name in dir(public) else None
        if isinstance(found, type) and (issubclass(found, nn.Module) or found is Unit):
            return found
        names = [one for one in dir(public) if isinstance(getattr(public, one), type)]
        raise ArgumentError(f"{place}: {module} has no part {name!r}; {instead([name], names)}")
    if module not in modules:
        public_path = next((f"{one}.{name}" for one in PLACES if name in dir(importlib.import_module(one))), None)
        cure = f"if you trust it, pass modules=[{module!r}]"
        if path.startswith("ctrlib."):
            cure = f"write {public_path}" if public_path else f"expected a class of one of {', '.join(PLACES)}"
        raise ArgumentError(
            f"{place}: {path!r} is no public part of ctrlib, and {module!r} is not among the modules that classes may "
            f"come from, {list(modules)}: {cure}"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(f"{place}: {path} cannot be imported ({error}): is {module} where Python looks?") from error
    if not isinstance(found, type):
        raise ArgumentError(f"{place}: {path} is no class: name one that makes a part of the model")
    return found


def _features(names: Any, schema: Schema, place: str) -> tuple[Any, ...]:
    if names == "all":
        return schema.features
    known = {feature.name: feature for feature in schema.features}
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ArgumentError(f'{place} is {shown(names)}, expected "all" or a list of names of features')
    if unknown := [name for name in names if name not in known]:
        raise ArgumentError(f"{place}: the schema has no {unknown}; {instead(unknown, known)}")
    return tuple(known[name] for name in names)
