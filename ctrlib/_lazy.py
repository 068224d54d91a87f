"""Public names that are imported when they are first used, so that `import ctrlib` costs nothing and needs no torch."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Getter = Callable[[str], Any]
Lister = Callable[[], list[str]]


def closest(wrong: str, known: Iterable[str], *, number: int = 3) -> list[str]:
    """Those of the known names that look most like a wrong one, the most alike first.

    >>> closest("depfm", ["mlp", "deepfm", "xdeepfm", "dcn"])
    ['deepfm', 'xdeepfm', 'mlp']
    """
    import difflib  # here, as all that `import ctrlib` would have to wait for

    bare = {name.lower().lstrip("-"): name for name in known}  # that two are flags does not make them alike
    meant = wrong.lower().lstrip("-")
    # --lr is short for --learning-rate.
    initials = [name for name in bare if "".join(word[:1] for word in re.split("[-_]", name)) == meant]
    found = dict.fromkeys([*initials, *difflib.get_close_matches(meant, bare, number, cutoff=0.0)])
    return [bare[name] for name in found][:number]


MANY = 16  # names that are too many to be read in a message


def instead(wrong: Iterable[str], known: Iterable[str]) -> str:
    """How an error about wrong names ends: with the closest, and with all that are allowed there, if those are few.

    >>> instead(["depth"], ["width", "dropout"])
    'the closest are width, dropout; expected some of width, dropout'
    """
    known = list(known)
    near = dict.fromkeys(name for one in wrong for name in closest(one, known))
    said = f"the closest are {', '.join(near)}"
    return f"{said}; expected some of {', '.join(known)}" if len(known) <= MANY else said


def named(package: str, names: Mapping[str, Sequence[str]], modules: Sequence[str] = ()) -> tuple[Getter, Lister]:
    """`__getattr__` and `__dir__` of a package: its public names by the module that defines them, and its modules.

    An installation in which torch or TorchRec does not load is answered with what `ctrlib doctor` is for.
    """
    module_of = {name: module for module, those in names.items() for name in those}
    public = sorted((*module_of, *modules))

    def get(name: str) -> Any:
        if name not in module_of and name not in modules:
            if name.startswith("__"):  # which tools ask of every module, and nobody misspells
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            raise AttributeError(no_such(package, name, public))
        found = _import(f"{package}.{module_of.get(name, name)}")
        if name in module_of:
            found = getattr(found, name)
        setattr(sys.modules[package], name, found)
        return found

    return get, lambda: public


def parts(package: str) -> tuple[Getter, Lister]:
    """The same for a package of parts: every public class that its modules define, and what they list in `__all__`.

    No list is kept: a new file is a new part.
    """
    found: dict[str, Any] = {}

    def collect() -> dict[str, Any]:
        if not found:
            import pkgutil

            for info in pkgutil.iter_modules(sys.modules[package].__path__):
                module = _import(f"{package}.{info.name}")
                own = [
                    name
                    for name, value in vars(module).items()
                    if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_")
                ]
                found.update((name, getattr(module, name)) for name in getattr(module, "__all__", own))
        return found

    def get(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name not in collect():
            raise AttributeError(no_such(package, name, sorted(found)))
        return found[name]

    return get, lambda: sorted(collect())


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        from ctrlib.doctor import hint

        if advice := hint(error):
            raise ImportError(f"{error}. {advice}") from error
        raise


def no_such(package: str, name: str, public: Sequence[str]) -> str:
    """What is closest, and where the name stands if another package of ctrlib has it."""
    said = f"module {package!r} has no attribute {name!r}; the closest are {', '.join(closest(name, public))}"
    if name.startswith("_") or "torch" not in sys.modules:  # nobody waits for torch to be told that a name is wrong
        return said
    others = [
        other
        for other in ("ctrlib", *(f"ctrlib.{part}" for part in PACKAGES))
        if other != package and name in dir(importlib.import_module(other))
    ]
    return f"{said}. There is {' and '.join(f'{other}.{name}' for other in others)}" if others else said


PACKAGES = (
    "models",
    "towers",
    "heads",
    "embeddings",
    "search",
    "retrieval",
    "sharding",
    "training",
    "ranking",
    "analysis",
    "selection",
)
