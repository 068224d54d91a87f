"""The tables of models, look-ups and searches in these pages and in README.md, made from what the library says of them.

    python docs/tables.py

rewrites what stands between `<!-- table: NAME -->` and `<!-- end of table -->`, for every name of `TABLES`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrlib.inputs import LOOK_UPS
from ctrlib.models import MODELS, PublishedModel
from ctrlib.search.methods import SEARCHES

HERE = Path(__file__).parent
END = "<!-- end of table -->"
HEADINGS = {
    "interaction": "How fields interact",
    "sequence": "What a user did before",
    "multitask": "Several labels",
}
OF_INPUTS = ("features", "embedding_dim", "suffix")  # what `Inputs` gives to a look-up by itself
OF_FLAGS = ("learning_rate", "embedding_l2")  # what `ctrlib search` gives to every search by flags of its own
# 'A. Author, B. Other & C. Third, "Title", VENUE YEAR, https://ADDRESS': the first author, the venue and the address.
_PAPER = re.compile(
    r'(?<!\w)[A-Z]\.(?:[- ]?[A-Z]\.)* (?P<author>[A-Z][\w-]+)(?P<others>[^"]*)"[^"]+",? (?P<venue>[^,"]+), '
    r"(?P<url>https://[^\s,]+?)[.;]?(?=\s|$)"
)


def models_table() -> str:
    """Every published model with its paper, what it computes and its arguments, a table for each kind."""
    parts = []
    for kind, heading in HEADINGS.items():
        found = [model for model in MODELS.values() if model.kind == kind]
        rows = [
            (
                f"`{model.name}`",
                f"{model.title}: [{model.paper}]({model.url})",
                _sentences(model.summary, model.details),
                _arguments(model.defaults()),
            )
            for model in found
        ]
        parts += [f"### {heading}", _table(("name", "paper", "what it computes", "arguments"), rows)]
    return "\n\n".join(parts)


def models_short_table() -> str:
    """A row for each kind of model: names, with venue and year."""
    rows = []
    for kind, heading in HEADINGS.items():
        papers: dict[str, list[PublishedModel]] = {}
        for model in MODELS.values():
            if model.kind == kind:
                papers.setdefault(model.url, []).append(model)
        names = [
            f"{', '.join(f'`{model.name}`' for model in found)} ({found[0].paper.partition(', ')[2]})"
            for found in papers.values()
        ]
        rows.append((heading, ", ".join(names)))
    return _table(("models", "`--model` (paper)"), rows)


def look_ups_table() -> str:
    """Every kind of look-up with its papers, the vector of an id, and its arguments.

    Raises:
        ValueError: the docstring of a look-up's module names no paper.
    """
    rows = []
    for kind, make in LOOK_UPS.items():
        papers = papers_of(make.__module__)
        if not papers:
            raise ValueError(
                f'{make.__module__} names no paper: expected A. AUTHOR, "TITLE", VENUE YEAR, https://ADDRESS'
            )
        takes = inspect.signature(make).parameters.values()
        arguments = {p.name: p.default for p in takes if p.name not in OF_INPUTS}
        first = first_sentence(inspect.getdoc(make) or "")
        rows.append((f"`{kind}`", ", ".join(papers), first, _arguments(arguments)))
    return _table(("kind", "paper", "vector of an id x, or of a field f", "arguments"), rows)


def searches_table() -> str:
    """Every search with its paper, what it decides, how the smaller model is trained, and its settings."""
    rows = []
    for name, search in SEARCHES.items():
        module = importlib.import_module(f"ctrlib.search.{name}")
        address = re.search(r"https://[^\s,()]+", module.__doc__ or "")
        paper = search.paper if address is None else f"[{search.paper}]({address[0].rstrip('.')})"
        fields = dataclasses.fields(getattr(module, search.settings))
        settings = {field.name: field.default for field in fields if field.name not in OF_FLAGS}
        rows.append((f"`{name}`", paper, search.chooses, search.then, _arguments(settings)))
    return _table(("method", "paper", "chooses", "how that is trained", "settings"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "models": models_table,
    "models_short": models_short_table,
    "look_ups": look_ups_table,
    "searches": searches_table,
}


def rewritten(text: str) -> str:
    """The text with every table between markers as it has to be.

    Raises:
        ValueError: a marker names no table, or its end is missing.

    >>> rewritten("before, no table")
    'before, no table'
    >>> rewritten("<!-- table: model -->")
    Traceback (most recent call last):
    ValueError: <!-- table: model -->: expected one of models, models_short, look_ups, searches
    """
    parts = re.split(r"(<!-- table: \w+ -->)", text)
    for number in range(1, len(parts), 2):
        marker, after = parts[number], parts[number + 1]
        name = marker.split()[2]
        if name not in TABLES:
            raise ValueError(f"{marker}: expected one of {', '.join(TABLES)}")
        if END not in after:
            raise ValueError(f"{marker}: expected {END} behind it")
        parts[number + 1] = f"\n\n{TABLES[name]()}\n\n{END}{after.partition(END)[2]}"
    return "".join(parts)


def papers_of(module: str) -> list[str]:
    """The papers that the docstring of a module names, as links.

    >>> papers_of("ctrlib.embeddings.memcom")
    ['[Pansare et al., MLSys 2022](https://arxiv.org/abs/2203.10135)']
    """
    text = " ".join((importlib.import_module(module).__doc__ or "").split())
    return [
        f"[{found['author']}{' et al.' if found['others'].strip(' ,') else ''}, {found['venue']}]({found['url']})"
        for found in _PAPER.finditer(text)
    ]


def first_sentence(docstring: str) -> str:
    """The first sentence, on one line.

    >>> first_sentence("y_j, j = 1 ... k: a sum.\\n\\nMore.")
    'y_j, j = 1 ... k: a sum.'
    """
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    end = re.search(r"(?<=[^.\s]\.) (?=[A-Z])", paragraph)
    return paragraph if end is None else paragraph[: end.start()]


def _sentences(summary: str, details: str) -> str:
    """A clause and what follows it, as sentences."""
    return f"{summary[0].upper()}{summary[1:]}. {' '.join(details.split())}".strip()


def _arguments(defaults: Mapping[str, Any]) -> str:
    """Arguments as Python writes them; those without a default by their names alone."""
    missing = (inspect.Parameter.empty, dataclasses.MISSING)
    named = (name if value in missing else f"{name}={value!r}" for name, value in defaults.items())
    return ", ".join(f"`{argument}`" for argument in named) or "none"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ("---",) * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main() -> None:
    """Rewrite the tables of all pages."""
    for path in (*sorted(HERE.glob("*.md")), HERE.parent / "README.md"):
        old = path.read_text(encoding="utf-8")
        new = rewritten(old)
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"rewrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
