"""Facts as Markdown: tables, names and numbers of a model card (`ctrlib.serving.card`)."""

from __future__ import annotations

import html
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Sequence
from typing import Any

from ctrlib.errors import shown

LONGEST = 60  # characters of a setting
PACKAGES = ("ctrlib", "torch", "torchrec", "safetensors", "polars")


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table, whose cells are Markdown already.

    >>> print(table(("a", "b"), [("1", "2")]))
    | a | b |
    | --- | --- |
    | 1 | 2 |
    """
    rows = [list(heads), ["---"] * len(heads), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escaped(text: object) -> str:
    """A text of one line that means itself, also in a table and where HTML is shown.

    >>> escaped("a|b <script> c*")
    'a&#124;b &lt;script&gt; c&#42;'
    """
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"&#{ord(one)};" if one in "|*`[]\\~" else one for one in plain)


def code(text: object) -> str:
    """A name as code.

    >>> code("item"), code("a`b")
    ('`item`', '<code>a&#96;b</code>')
    """
    plain = " ".join(str(text).split())
    return f"`{plain}`" if plain and not set(plain) & set("`|\\<>&") else f"<code>{escaped(plain)}</code>"


def setting(value: Any) -> str:
    """A value of a config; of a long one the beginning.

    >>> setting([128, 64]), setting(None)
    ('`[128, 64]`', '`null`')
    """
    said = json.dumps(value)
    return code(said) if len(said) <= LONGEST else f"{escaped(shown(value)[:LONGEST])} ... (model.json)"


def number(value: Any) -> str:
    """Five digits after the point; an integer in groups of three.

    >>> number(0.699115), number(2.9e-11), number(4780), number(None), number(1.0)
    ('0.69912', '2.9e-11', '4,780', 'undefined', '1.00000')
    """
    if value is None or value != value:
        return "undefined"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5f}" if abs(value) >= 1e-4 or not value else f"{value:.1e}"


def interval(low: Any, high: Any) -> str:
    """From where to where, nothing if that is not known.

    >>> interval(0.25, 0.5), interval(None, None)
    ('0.25000 to 0.50000', '')
    """
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def share(value: Any) -> str:
    """Of one, in percent; nothing if it is not known.

    >>> share(0.0021), share(None)
    ('0.21 %', '')
    """
    return "" if value is None else f"{100 * value:.2f} %"


def words(text: object) -> str:
    """A key as words.

    >>> words("valid log_loss")
    'valid log-loss'
    """
    return escaped(str(text).replace("_", "-"))


def versions() -> str:
    """The packages that were there when this was written."""
    found = [("Python", platform.python_version())]
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:  # ctrlib, where it is not installed but on the path
            continue
    return f"## Versions\n\n{table(('package', 'version'), found)}"
