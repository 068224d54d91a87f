"""From arguments to a command: tyro parses and explains the flags; what is wrong about them is answered here."""

from __future__ import annotations

import contextlib
import inspect
import io
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, PositionalMetavarFromFieldName

from ctrlib._lazy import instead
from ctrlib.cli import HELP

CONFIG = (OmitArgPrefixes, FlagCreatePairsOff, PositionalMetavarFromFieldName)
COMPLETIONS = ("--tyro-print-completion", "--tyro-write-completion")


class WrongUsage(Exception):
    """The arguments make no command; the message says what is wrong, and what would be right."""

    def __init__(self, message: str, prog: str) -> None:
        super().__init__(fill(f"{prog}: {message}") + f"\n`{prog} --help` says more.")


def fill(text: str) -> str:
    """Paragraphs wrapped at the terminal's width; indented lines stay as they are."""
    width = shutil.get_terminal_size().columns
    return "\n".join(
        line if line.startswith(" ") else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def parse(command: type, prog: str, arguments: list[str]) -> Any:
    """An instance of the dataclass `command` with what the arguments say, or None if they ask for help, which is shown.

    Raises:
        WrongUsage: as it says.
    """
    if set(HELP) & set(arguments):
        explain(command, prog)
        return None
    if twice := _given_twice(command, arguments):
        raise WrongUsage(twice, prog)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            made: Any = tyro.cli(command, prog=prog, args=arguments, config=CONFIG)
    except SystemExit:
        # tyro answers with a box of all that it knows of a flag: that stays for what is not explained here.
        answer = "\n".join(_complaints(command, arguments)) or said.getvalue()
        raise WrongUsage(answer, prog) from None
    object.__setattr__(made, "given", frozenset(_names(arguments)))
    return made


def _names(arguments: list[str]) -> list[str]:
    """The flags among arguments, as --help spells them."""
    return [token.partition("=")[0].replace("_", "-") for token in arguments if _looks_like_flag(token)]


def explain(command: type, prog: str) -> None:
    """Print what a command is for, and its flags in their groups."""
    words = [prog]
    for flag in flags_of(command):
        if flag.positional:
            words.append(flag.name if flag.required else f"[{flag.name}]")
        elif flag.required:
            words.append(f"{flag.name} {flag.kind.__name__.upper()}")
    print(f"usage: {' '.join(words)} [flags]\n")
    print(fill(paragraphs(inspect.getdoc(command) or "")) + "\n")
    boxes = _Printed()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(boxes):
        tyro.cli(command, prog=prog, description="", args=["--help"], config=CONFIG)
    # Before the boxes is tyro's own line of usage, which names all flags and is not wrapped, and an empty line.
    print(boxes.getvalue().split("\n\n", 1)[-1], end="")


class _Printed(io.StringIO):
    """What goes to stdout a little later: tyro draws and colours it for the terminal that it will be seen on."""

    def __init__(self) -> None:
        super().__init__()
        self.stdout = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stdout.encoding.lower()  # tyro knows utf-8 in this spelling

    def isatty(self) -> bool:
        return self.stdout.isatty()


def complete(commands: dict[str, Callable[..., Any]], arguments: list[str]) -> int:
    """Print or write a script that makes a shell complete the arguments (`--tyro-print-completion bash`)."""
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="ctrlib", args=arguments, config=CONFIG)
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def paragraphs(docstring: str) -> str:
    """A docstring with each paragraph on a line of its own, but for those that are indented."""
    parts = docstring.split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else " ".join(part.split()) for part in parts)


@dataclass(frozen=True)
class Flag:
    """What a flag or a positional argument is called and takes."""

    name: str
    kind: Any
    """Type of a value."""
    count: int | None
    """How many values; None for any number."""
    positional: bool
    required: bool

    def complaint(self, value: str) -> str | None:
        """What is wrong with a value, if anything is."""
        if get_origin(self.kind) is Literal:
            choices = [str(choice) for choice in get_args(self.kind)]
            return None if value in choices else f"there is no {self.name} {value}; {instead([value], choices)}"
        if self.kind is bool:
            return None if value in ("True", "False") else f"{self.name} {value}: expected True or False"
        wanted = {int: "a whole number", float: "a number"}.get(self.kind)
        try:
            if wanted is not None:
                self.kind(value)
        except ValueError:
            return f"{self.name} {value}: expected {wanted}"
        return None


def flags_of(command: type) -> list[Flag]:
    """All that a command takes, those of its groups included.

    >>> from ctrlib.cli.evaluate import Evaluate
    >>> [flag.name for flag in flags_of(Evaluate)]
    ['--json', '--debug', 'MODEL', 'DATA', '--split', '--by', '--batch-size', '--on-bad-row', '--label', '--score', \
'--group', '--weight', '--scale']
    """
    return list(_flags(command))


def _flags(command: Any) -> Iterator[Flag]:
    hints = get_type_hints(command, include_extras=True)
    for field in fields(command):
        kind, positional = hints[field.name], False
        if get_origin(kind) is Annotated:
            positional = Positional in kind.__metadata__
            kind = get_args(kind)[0]
        if is_dataclass(kind):
            yield from _flags(kind)
            continue
        is_switch = kind is bool
        if get_origin(kind) in (Union, types.UnionType):
            (kind,) = (part for part in get_args(kind) if part is not type(None))
        count: int | None = 0 if is_switch else 1
        if get_origin(kind) is tuple:
            of_any_number = get_args(kind)[-1] is ...
            count = None if of_any_number else len(get_args(kind))
            kind = get_args(kind)[0]
        elif kind is tuple:
            count, kind = None, str
        name = field.name.replace("_", "-")
        required = field.default is MISSING and field.default_factory is MISSING
        yield Flag(name.upper() if positional else f"--{name}", kind, count, positional, required)


def _complaints(command: type, arguments: list[str]) -> list[str]:
    """What is wrong with arguments that tyro refuses: wrong names alone, which make all else doubtful, or the rest."""
    flags = flags_of(command)
    by_name = {flag.name: flag for flag in flags if not flag.positional}
    places = [flag for flag in flags if flag.positional]
    unknown: list[str] = []
    wrong: list[str] = []
    seen: set[Flag] = set()
    tokens = [token for token in arguments if token != "--"]
    while tokens:
        attached = ""
        if _looks_like_flag(tokens[0]):
            name, attached, value = tokens.pop(0).partition("=")
            flag = by_name.get(name.replace("_", "-"))
            if flag is None:
                unknown.append(f"there is no flag {name}; {instead([name], by_name)}")
                while tokens and not _looks_like_flag(tokens[0]):  # which may be its values
                    tokens.pop(0)
                continue
            if attached and flag.count == 0:
                wrong.append(f"{name} takes no value, got {value}")
                attached = ""
        else:
            flag = next((place for place in places if place not in seen), None)
            if flag is None:
                expected = " ".join([*(place.name for place in places), "and flags" if places else "flags only"])
                wrong.append(f"{tokens.pop(0)} is one too many; expected {expected}")
                continue
        seen.add(flag)
        if attached:
            values = [value]
        else:
            needed = 0 if flag.positional else sum(place.required for place in places if place not in seen)
            values = _take(tokens, flag.count, needed)
        wrong += [complaint for value in values if (complaint := flag.complaint(value)) is not None]
        if flag.count is not None and len(values) < flag.count:
            wrong.append(f"{flag.name}: expected {flag.count} value{'s' * (flag.count > 1)}, got {len(values)}")
    missing = [flag.name for flag in flags if flag.required and flag not in seen]
    if not missing:
        return unknown or wrong
    greedy = [flag.name for flag in seen if flag.count is None]
    taken = f"; {greedy[0]} takes all that follows it, so {missing[0]} goes first" if greedy and places else ""
    return unknown or [*wrong, f"{' and '.join(missing)} must be given{taken}"]


def _given_twice(command: type, arguments: list[str]) -> str:
    """What to say of a flag that comes up again: tyro would take the last, and forget the others without a word."""
    flags = {flag.name: flag for flag in flags_of(command) if not flag.positional}
    names = _names(arguments)
    for name in dict.fromkeys(names):
        if name in flags and names.count(name) > 1:
            many = flags[name].count is None
            return f"{name} is given twice; expected it once{f', with all its values: {name} A B' if many else ''}"
    return ""


def _take(tokens: list[str], count: int | None, needed: int) -> list[str]:
    """Remove and return the values of a flag; where any number may follow, the last `needed` are left for places.

    >>> tokens = ["8", "4", "data"]
    >>> _take(tokens, None, 1), tokens
    (['8', '4'], ['data'])
    """
    values: list[str] = []
    while tokens and not _looks_like_flag(tokens[0]):
        if len(values) == count or (count is None and len(tokens) <= needed):
            break
        values.append(tokens.pop(0))
    return values


def _looks_like_flag(token: str) -> bool:
    """Whether it is no value: a negative number is one.

    >>> [_looks_like_flag(token) for token in ("--dim", "-m", "-1e-3", "data", "-")]
    [True, True, False, False, False]
    """
    return token.startswith("-") and token.lstrip("-")[:1].isalpha()
