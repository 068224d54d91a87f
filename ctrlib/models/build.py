"""From a config of plain data to a model, and back through a model folder: `{"model": name, **arguments}`.

The name is that of a published model, or the import path of a function or class of one's own that takes `Inputs` first
and plain arguments by keyword. The latter is imported only from modules that the caller names: a model folder of
somebody else cannot choose what runs. Or a tree of constructors stands in its place, `{"model": {"class": ...}}`
(`ctrlib.models.tree`): then the tree says all, and there are no arguments beside it.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, check_type, shown
from ctrlib.models.table import MODELS, PublishedModel
from ctrlib.models.tree import complete_tree, make_tree

# What a config may hold beside the arguments: parts of a compressed model, pairs of features that are crossed, how it
# was trained, how it was searched, and the calibrator that was fitted when it was trained.
BESIDE = ("replaced", "crosses", "training", "search", "calibration")

if TYPE_CHECKING:
    from ctrlib.model import Model
    from ctrlib.schema import Schema


def for_engine(config: dict[str, Any], engine: str) -> dict[str, Any]:
    """The config with what an engine's kernels want: in the fused engine four stacks of tables, multiples of 4 wide.

    >>> for_engine({"model": "deepfm"}, "fused"), for_engine({"model": "deepfm"}, "exact")
    ({'model': 'deepfm', 'stacked': 4, 'wide_columns': 4}, {'model': 'deepfm'})
    """
    return {**config, "stacked": 4, "wide_columns": 4} if engine == "fused" else config


def build(config: Mapping[str, Any], schema: Schema, *, modules: Sequence[str] = ()) -> Model:
    """The model that a saved `{"model": name, **arguments}` describes: arguments of `Inputs` and of the model.

    `replaced` says which parts of a compressed model are not the published model's (`ctrlib.structure`), `calibration`
    what is done to its logits (`ctrlib.calibration`). `training` and `search`, which say how it came about
    (`ctrlib.run`), are of no concern here. Of `crosses`, which are counted on the data, `replaced` has what is to be
    built.

    Args:
        config: plain data; in the place of the name, it may have a tree of constructors (`ctrlib.models.tree`).
        schema: of the prepared data.
        modules: where models of one's own may be imported from, such as "shop.models".

    Raises:
        ValueError: there is no model of that name, or it does not take one of the arguments or its value; or pairs are
            to be crossed that were not counted yet.
    """
    from ctrlib.schema import Schema

    check_type('a dictionary {"model": name, **arguments}', Mapping, config=config)
    check_type("a ctrlib.Schema, as ctrlib.prepare returns it or Schema.load reads it", Schema, schema=schema)
    from ctrlib.calibration import Calibration

    model = _assembled(config, schema, modules)
    if (described := config.get("calibration")) is not None:
        check_calibratable(model)
        model.calibration = Calibration.of(described, len(schema.labels))
    return model


def check_calibratable(model: Model) -> None:
    """Refuse a model that has no use for `Model.calibration`.

    Raises:
        ValueError: the model computes its logits in a way of its own, which would pass a calibrator over.
    """
    from ctrlib.model import Model

    if type(model).forward is not Model.forward:
        raise ArgumentError(
            f"{type(model).__name__} has a forward of its own, which applies no calibrator: leave calibrate out, or "
            "compose it from ctrlib.Model's parts"
        )


def _assembled(config: Mapping[str, Any], schema: Schema, modules: Sequence[str]) -> Model:
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    from ctrlib.structure import restructure

    arguments = {name: value for name, value in config.items() if name not in BESIDE}
    if config.get("crosses") and not config.get("replaced"):
        raise ArgumentError(
            f"crosses {config['crosses']} are counted on the data before there is a model: train it with `ctr.run`, or "
            "build the model without them and take `ctrlib.training.crossing.crossed(model, data, pairs)`"
        )
    if replaced := config.get("replaced"):
        # Tables that are to give way need not be made in full first; if some stay, all are made again as they are.
        model = restructure(_build(arguments, _with_few_rows(schema), modules), replaced)
        if not any(isinstance(part, EmbeddingBagCollection | EmbeddingCollection) for part in model.modules()):
            return model
        return restructure(_build(arguments, schema, modules), replaced)
    return _build(arguments, schema, modules)


def complete(config: Mapping[str, Any], *, modules: Sequence[str] = ()) -> dict[str, Any]:
    """The same config with every argument at its value: those left out at their defaults, as JSON holds them.

    So two configs describe one model if these are equal, and a saved one stays true when a default changes.

    Raises:
        ValueError: as `build`, as far as the names go; or a value is not what JSON holds.

    >>> complete({"model": "fm", "embedding_dim": 8})["numeric"]
    'vector'
    """
    from ctrlib.inputs import Inputs

    check_type('a dictionary {"model": name, **arguments}', Mapping, config=config)
    arguments = {name: value for name, value in config.items() if name not in BESIDE}
    beside = {name: config[name] for name in BESIDE if name in config}
    if isinstance(arguments.get("model"), Mapping):
        plain(arguments)  # before it is looked at: a part itself is none
        return plain({"model": complete_tree(_tree(arguments), modules), **beside})
    model, of_inputs = _checked(arguments, modules)
    defaults = {field.name: field.default for field in fields(Inputs) if field.name in of_inputs}
    defaults |= {name: value for name, value in model.defaults().items() if value is not inspect.Parameter.empty}
    return plain({"model": arguments["model"], **defaults, **arguments, **beside})


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON gives it back: tuples are lists.

    Raises:
        ValueError: naming what JSON cannot hold.
    """
    made: dict[str, Any] = {}
    for name, value in values.items():
        try:
            made[str(name)] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"{name}={value!r} is not plain data ({error}): expected numbers, texts, true, false, null, and lists "
                "and dictionaries of them"
            ) from error
    return made


def _with_few_rows(schema: Schema) -> Schema:
    """The same features, each with a table of the reserved rows and one more."""
    from ctrlib.schema import NUM_RESERVED_IDS, Numeric, RawId

    few = NUM_RESERVED_IDS + 1
    return replace(
        schema,
        features=tuple(
            feature if isinstance(feature, Numeric | RawId) else replace(feature, num_embeddings=few)
            for feature in schema.features
        ),
    )


def _build(arguments: dict[str, Any], schema: Schema, modules: Sequence[str]) -> Model:
    from ctrlib.inputs import Inputs
    from ctrlib.model import Model

    if isinstance(arguments.get("model"), Mapping):
        whole = make_tree(_tree(arguments), schema, modules)
        check_type("a tree whose class is ctrlib.Model or made of one", Model, model=whole)
        return cast("Model", whole)
    config = arguments
    model, of_inputs = _checked(arguments, modules)
    arguments = {name: value for name, value in arguments.items() if name != "model"}
    inputs = Inputs(schema, **{key: arguments.pop(key) for key in of_inputs if key in arguments})
    try:
        made = model.make(inputs, **arguments)
    except (TypeError, IndexError) as error:
        raise ArgumentError(
            f"{model.name} does not take these arguments, one is of the wrong kind: {config} ({error})"
        ) from error
    check_type("a function that returns a ctrlib.Model", Model, model=made)
    return made


def _tree(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree of a config; refuses arguments beside it, which nothing would read."""
    if beside := sorted(set(arguments) - {"model"}):
        raise ArgumentError(f"config has {beside} beside a tree of constructors: the tree says all, put them there")
    tree: Mapping[str, Any] = arguments["model"]
    if "class" not in tree:
        raise ArgumentError(f'model is {shown(tree)}, expected a name or {{"class": path, "arguments": {{...}}}}')
    return tree


def _checked(config: dict[str, Any], modules: Sequence[str]) -> tuple[PublishedModel, list[str]]:
    """The model that a config names, and the arguments of `Inputs`; refuses arguments that neither takes."""
    from ctrlib.inputs import Inputs

    if "model" not in config:
        raise ArgumentError(f'config names no "model": expected {{"model": name, **arguments}}, got {shown(config)}')
    name = config["model"]
    if isinstance(name, str) and name in MODELS:
        model = MODELS[name]
    elif isinstance(name, str) and "." in name:
        model = _own(name, modules)
    else:
        raise ArgumentError(
            f"unknown model {name!r}; {instead([str(name)], MODELS)} (`ctrlib models` says what each is)"
        )
    of_inputs = [field.name for field in fields(Inputs) if field.name != "schema"]
    allowed = [*model.arguments, *of_inputs]
    if unknown := sorted(set(config) - {"model", *allowed}):
        raise ArgumentError(f"{name} takes no {unknown}; {instead(unknown, allowed)}")
    return model, of_inputs


def _own(path: str, modules: Sequence[str]) -> PublishedModel:
    """A function or class outside of ctrlib, by its import path."""
    module, _, name = path.rpartition(".")
    if module not in modules:
        raise ArgumentError(
            f"the model {path} is no published one, and {module} is not among the modules that models may come from, "
            f"{list(modules)}: if you trust it, pass modules=[{module!r}]"
        )
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            f"the model {path} cannot be imported ({error}): is {module} where Python looks?"
        ) from error
    if not callable(make) or getattr(make, "__module__", None) != module:
        raise ArgumentError(f"the model {path} is no function or class that {module} defines")
    model = PublishedModel(path, make, "own", path, "", "", "", "")
    try:
        model.defaults()
    except (AttributeError, KeyError, ValueError) as error:
        raise ArgumentError(
            f"the arguments of {path} are not all named ({error}): expected Inputs first, then keyword arguments"
        ) from error
    return model
