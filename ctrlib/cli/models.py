"""`ctrlib models`: the table of published models, and what one of them is and costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from tyro.conf import Positional

from ctrlib.cli.flags import ARGUMENT_OF, Command
from ctrlib.cli.kinds import OptionalModel
from ctrlib.cli.tables import new_table, show
from ctrlib.cli.usage import fill, paragraphs
from ctrlib.models.table import KINDS, MODELS, PublishedModel
from ctrlib.schema import Categorical, Schema, Sequence

FLOOR = "mlp"  # what a model's costs stand beside
# What a kind of model is about, as the heading of its table.
HEADINGS = {
    "interaction": "How fields interact",
    "sequence": "What a user did before",
    "multitask": "Several labels",
}


@dataclass(frozen=True)
class Models(Command):
    """List the published models, or say what one is and costs.

    Examples:

        ctrlib models
        ctrlib models finalmlp
    """

    name: Positional[OptionalModel] = None
    """Model to describe: its paper, its arguments with their defaults, its weights and multiply-adds."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        if self.name is None:
            if self.json:
                print(json.dumps([summary_of(model) for model in MODELS.values()]))
            else:
                print_all()
            return 0
        described = describe(MODELS[self.name])
        if self.json:
            print(json.dumps(described))
        else:
            print_one(described)
        return 0


def summary_of(model: PublishedModel) -> dict[str, Any]:
    """What the table says of a model, as plain data."""
    names = ("name", "kind", "title", "paper", "url", "summary")
    return {**{name: getattr(model, name) for name in names}, "arguments": model.arguments}


def describe(model: PublishedModel) -> dict[str, Any]:
    """All that is known of a model, as plain data; this needs torch."""
    from ctrlib.inputs import Inputs
    from ctrlib.models.costs import costs, usual_schema

    schema = usual_schema(model.name)
    inputs = {field.name: field.default for field in fields(Inputs) if field.default is not MISSING}
    return {
        **summary_of(model),
        "details": model.details,
        "arguments": model.defaults(),
        "inputs": inputs,
        "costs": {name: asdict(costs(name, schema=schema)) for name in dict.fromkeys((model.name, FLOOR))},
        "costs_for": in_words(schema, inputs["embedding_dim"]),
    }


def in_words(schema: Schema, embedding_dim: int) -> str:
    """The features and labels of a schema.

    >>> in_words(Schema((Categorical("item"), Sequence("clicks", max_length=20)), ("click", "buy")), 16)
    '1 categorical field of width 16, a history of 20 events, 2 labels'
    """

    def count(things: tuple[object, ...], name: str) -> str:
        return f"{len(things)} {name}{'s' * (len(things) > 1)}"

    categorical = tuple(feature for feature in schema.sparse if isinstance(feature, Categorical))
    histories = [feature for feature in schema.sparse if isinstance(feature, Sequence)]
    words = [f"{count(categorical, 'categorical field')} of width {embedding_dim}"]
    words += [f"a history of {history.max_length} events" for history in histories]
    return ", ".join([*words, count(schema.labels, "label")])


def print_all() -> None:
    """A table for each kind: name, venue and year, and what it computes."""
    for kind in KINDS:
        print(f"{HEADINGS[kind]} ({kind})")
        table = new_table("name", "paper", "what it computes")
        table.columns[0].no_wrap = True
        for model in MODELS.values():
            if model.kind == kind:
                table.add_row(model.name, venue_of(model), model.summary)
        show(table)
    print(fill("`ctrlib models NAME` says more of one, `ctrlib train DATA --model NAME` trains it."))


def venue_of(model: PublishedModel) -> str:
    """Where and when the paper came out.

    >>> venue_of(MODELS["dcnv2"]), venue_of(MODELS["dlrm"])
    ('WWW 2021', '2019')
    """
    return model.paper.partition(", ")[2]


def print_one(described: Mapping[str, Any]) -> None:
    """What `describe` found."""
    print(fill(f"{described['title']}: {described['summary']}."))
    print(fill(f"{described['paper']}, {described['url']}"))
    if described["details"]:
        print("\n" + fill(paragraphs(described["details"])))
    print_arguments("Arguments of its own:", described["arguments"])
    print_arguments("Arguments of every model (docs/models.md says what they mean):", described["inputs"])
    print("\n" + fill("One with a flag behind it is said by that; all others by --option NAME=VALUE, in JSON."))
    print("\n" + fill(f"Costs with these arguments, for {described['costs_for']}:"))
    table = new_table("", "weights of the network", "multiply-adds per row", numbers=2)
    for name, cost in described["costs"].items():
        table.add_row(name, f"{cost['network_parameters']:,}", f"{cost['multiply_adds']:,}")
    show(table)
    print(fill("Tables are not counted, nor look-ups and products by elements."))


def print_arguments(heading: str, defaults: Mapping[str, Any]) -> None:
    """Names and defaults; nothing if there are none."""
    if defaults:
        print("\n" + fill(heading))
        width = max(map(len, defaults))
        flags = {argument: flag for flag, argument in ARGUMENT_OF.items()} | {
            "numeric": "numeric",
            "sequence": "sequence",
        }
        for name, value in defaults.items():
            flag = f"  --{flags[name].replace('_', '-')}" if name in flags else ""
            print(f"  {name:<{width}}  {json.dumps(value)}{flag}")
