"""From a config of plain data to a model, and back through a model folder: `{"model": name, **arguments}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, check_type, shown
from ctrlib.models.table import MODELS

if TYPE_CHECKING:
    from ctrlib.model import Model
    from ctrlib.schema import Schema


def for_engine(config: dict[str, Any], engine: str) -> dict[str, Any]:
    """The config with what an engine's kernels want: in the fused engine four stacks of tables, multiples of 4 wide.

    >>> for_engine({"model": "deepfm"}, "fused"), for_engine({"model": "deepfm"}, "exact")
    ({'model': 'deepfm', 'stacked': 4, 'wide_columns': 4}, {'model': 'deepfm'})
    """
    return {**config, "stacked": 4, "wide_columns": 4} if engine == "fused" else config


def build(config: dict[str, Any], schema: Schema) -> Model:
    """The model that a saved `{"model": name, **arguments}` describes: arguments of `Inputs` and of the model.

    `replaced` says which parts of a compressed model are not the published model's (`ctrlib.structure`).

    Raises:
        ValueError: there is no model of that name, or it does not take one of the arguments or its value.
    """
    from ctrlib.schema import Schema

    check_type('a dictionary {"model": name, **arguments}', Mapping, config=config)
    check_type("a ctrlib.Schema, as ctrlib.prepare returns it or Schema.load reads it", Schema, schema=schema)
    if "model" not in config:
        raise ArgumentError(f'config names no "model": expected {{"model": name, **arguments}}, got {shown(config)}')
    from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

    from ctrlib.structure import restructure

    arguments = dict(config)
    if replaced := arguments.pop("replaced", None):
        # Tables that are to give way need not be made in full first; if some stay, all are made again as they are.
        model = restructure(_build(arguments, _with_few_rows(schema)), replaced)
        if not any(isinstance(part, EmbeddingBagCollection | EmbeddingCollection) for part in model.modules()):
            return model
        return restructure(_build(arguments, schema), replaced)
    return _build(arguments, schema)


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


def _build(config: dict[str, Any], schema: Schema) -> Model:
    from ctrlib.inputs import Inputs

    arguments = dict(config)
    name = arguments.pop("model")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; {instead([str(name)], MODELS)} (`ctrlib models` says what each is)")
    of_inputs = [field.name for field in fields(Inputs) if field.name != "schema"]
    inputs = Inputs(schema, **{key: arguments.pop(key) for key in of_inputs if key in arguments})
    allowed = [*MODELS[name].arguments, *of_inputs]
    if unknown := sorted(set(arguments) - set(allowed)):
        raise ValueError(f"{name} takes no {unknown}; {instead(unknown, allowed)}")
    try:
        return MODELS[name].make(inputs, **arguments)
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"{name} does not take these arguments, one is of the wrong kind: {config} ({error})"
        ) from error
