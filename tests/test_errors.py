"""What a user can cause is a `CtrlibError`: no module of ctrlib raises a class of Python, but where that is said."""

from __future__ import annotations

import ast
import builtins
import inspect
from pathlib import Path

import pytest

from ctrlib import errors
from ctrlib.errors import CtrlibError

ROOT = Path(__file__).parent.parent
BUILTIN = {
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
}
ALLOWED = {
    # What Python's own machinery asks for by these classes: hasattr, import, the end of a process.
    ("_lazy.py", "AttributeError"),
    ("_lazy.py", "ImportError"),
    ("models/__init__.py", "AttributeError"),
    ("__main__.py", "SystemExit"),
    ("cli/__main__.py", "SystemExit"),
    ("training/keeper.py", "KeyboardInterrupt"),
    # A file that goes with exports, and knows nothing of ctrlib there.
    ("export/reader.py", "ValueError"),
    # Checks of a contract, for the tests of whoever writes a part.
    ("testing.py", "AssertionError"),
    # Methods that a class below has, and what only a fault of ours or of TorchRec's can cause.
    ("embeddings/packed.py", "NotImplementedError"),
    ("retrieval/methods.py", "NotImplementedError"),
    ("training/fused.py", "RuntimeError"),
}


def raised(source: str) -> list[tuple[int, str]]:
    """Line and name of each raise of a class of Python's own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(kind, ast.Name) and kind.id in BUILTIN:
                found.append((node.lineno, kind.id))
    return found


FILES = {str(path.relative_to(ROOT / "ctrlib")): path for path in sorted((ROOT / "ctrlib").rglob("*.py"))}


def test_errors_are_ours() -> None:
    found = {
        f"{name}:{line} raises {kind}"
        for name, path in FILES.items()
        for line, kind in raised(path.read_text(encoding="utf-8"))
        if (name, kind) not in ALLOWED
    }
    assert found == set(), "raise a class of ctrlib.errors that is one of these besides, such as ArgumentError"


def test_the_lists_have_nothing_idle() -> None:
    everywhere = {(name, kind) for name, path in FILES.items() for _, kind in raised(path.read_text(encoding="utf-8"))}
    assert everywhere >= ALLOWED


def test_the_walk_finds_them() -> None:
    assert raised("def f():\n    raise ValueError('x')\nraise KeyError\nraise error\nraise ArgumentError(1)") == [
        (3, "KeyError"),
        (2, "ValueError"),
    ]


KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_says_its_message_and_is_what_python_calls_it(kind: type[CtrlibError]) -> None:
    error = kind("d: no such thing: make one")
    assert isinstance(error, CtrlibError) and str(error) == "d: no such thing: make one"
    bases = {base for base in kind.__mro__ if base.__module__ == "builtins"}
    expected = {"ArgumentError": ValueError, "WrongTypeError": TypeError, "UnsupportedError": NotImplementedError}
    expected |= {"UnknownNameError": KeyError, "TooLargeError": MemoryError, "CtrlibError": Exception}
    expected |= {"DiskError": OSError, "MissingPackageError": ImportError}
    assert expected[kind.__name__] in bases
