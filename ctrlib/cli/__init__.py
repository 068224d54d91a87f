"""The command line, for people who write no Python: `ctrlib COMMAND`, a module here for each.

With --json the answer goes to stdout as one JSON object and nothing else does; progress always goes to stderr.

Nothing heavy is imported before the arguments are checked: whoever mistypes a flag or a folder waits for no torch. So
what needs torch, TorchRec, polars or rich is imported where a command runs, never at the top of a module.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from typing import Any

from ctrlib._lazy import instead

# Each is a module here, and in it the class of that name: what its fields say is what the command takes.
COMMANDS = (
    *("prepare", "rank", "train", "compare", "tune", "evaluate", "report", "predict", "update"),
    *("compress", "export", "serve", "search", "retrieve", "models", "doctor"),
)
HELP = ("-h", "--help")
PANIC = "PanicException"  # what polars raises of its own faults, which is no Exception

OVERVIEW = """\
usage: ctrlib COMMAND ...

Click-through-rate models from raw rows to an honest AUC.

commands:
{commands}

a first model, from a CSV file whose column `click` holds 0 or 1:
  ctrlib prepare clicks.csv --label click --out data/clicks
  ctrlib train data/clicks --out runs/clicks
  ctrlib predict runs/clicks today.csv --out scores.csv

ctrlib COMMAND --help   what a command does, and its flags
ctrlib --version        the versions of ctrlib, torch, TorchRec and fbgemm"""


def command_class(name: str) -> Any:
    """The dataclass of a command.

    >>> command_class("doctor").__name__
    'Doctor'
    """
    return getattr(importlib.import_module(f"{__name__}.{name}"), name.capitalize())


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `ctrlib` command; returns the exit status.

    0 done, 1 a clear refusal, 2 wrong usage, 130 stopped by Ctrl-C.
    """
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the answer has seen enough: `ctrlib models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _run(arguments: list[str]) -> int:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in ("", *HELP):
        print(_overview(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(_versions())
        return 0
    from ctrlib.cli import usage

    if name in usage.COMPLETIONS:
        return usage.complete({command: command_class(command) for command in COMMANDS}, arguments)
    debug = "--debug" in rest
    try:
        if name not in COMMANDS:
            known = ("--help", "--version") if name.startswith("-") else COMMANDS
            raise usage.WrongUsage(f"there is no command {name}; {instead([name], known)}", "ctrlib")
        with _local(rest) as arguments:
            command = usage.parse(command_class(name), f"ctrlib {name}", arguments)
            return 0 if command is None else int(command())  # None: its help was asked for, and shown
    except usage.WrongUsage as wrong:
        print(wrong, file=sys.stderr)
        return 2
    except (BrokenPipeError, SystemExit):
        raise
    except BaseException as error:
        if not (isinstance(error, Exception | KeyboardInterrupt) or type(error).__name__ == PANIC):
            raise
        from ctrlib.cli.refusals import explain

        if debug:
            traceback.print_exc()
        said, status = f"ctrlib: {explain(error)}", 130 if isinstance(error, KeyboardInterrupt) else 1
        print(usage.fill(said) if sys.stderr.isatty() else said, file=sys.stderr)
        return status


def _local(arguments: list[str]) -> contextlib.AbstractContextManager[list[str]]:
    """The arguments, with a path on this machine for each URL, as `ctrlib.remote.staged` says."""
    if not any("://" in argument for argument in arguments):
        return contextlib.nullcontext(arguments)
    from ctrlib.remote import staged

    return staged(arguments, log=lambda said: print(said, file=sys.stderr))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    first_sentences = {name: (inspect.getdoc(command_class(name)) or "").partition("\n")[0] for name in COMMANDS}
    lines = [f"  {name:<{width}}   {sentence}" for name, sentence in first_sentences.items()]
    return OVERVIEW.format(commands="\n".join(lines))


def _versions() -> str:
    from importlib.metadata import version

    from ctrlib.doctor import FBGEMM, installed_versions

    versions = installed_versions()
    others = [f"{name} {versions[name]}" for name in ("torch", "torchrec", *FBGEMM) if versions[name] is not None]
    return f"ctrlib {version('ctrlib')} ({', '.join(others) or 'without torch'})"
