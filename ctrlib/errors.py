"""What a user can cause and mend: the class of such errors, and the checks of arguments that come before any work."""

from __future__ import annotations

import math
import os
import reprlib
from numbers import Integral, Real
from types import UnionType


class CtrlibError(Exception):
    """Something that whoever called can mend: the message says where, what was expected, what came and what to do.

    The classes that derive from it stay what Python calls such a thing besides, a `ValueError` mostly.

    >>> from ctrlib.schema import Schema
    >>> try:
    ...     Schema.load("nowhere")
    ... except CtrlibError as error:
    ...     print(error)
    nowhere does not exist: not a prepared folder; make one with `ctrlib prepare`
    """


class ArgumentError(CtrlibError, ValueError):
    """An argument is out of range, or does not go with another."""


class WrongTypeError(CtrlibError, TypeError):
    """An argument is of another type than expected."""


class UnsupportedError(CtrlibError, NotImplementedError):
    """What was asked for is not there: on this device, in several processes, or with these versions."""


class MissingPackageError(CtrlibError, ImportError):
    """A package is not installed that only some of ctrlib needs; the message says how to have it."""


class UnknownNameError(CtrlibError, KeyError):
    """Nothing is called so."""

    __str__ = Exception.__str__  # that of a KeyError is the repr of its message


class DiskError(CtrlibError, OSError):
    """A disk is full, or a place cannot be written to: `errno` says which, as that of any `OSError`."""

    def __str__(self) -> str:  # without its number, which says nothing to most
        return self.strerror or Exception.__str__(self)


class TooLargeError(CtrlibError, MemoryError):
    """What was asked for does not fit into the memory; the message says how much there is."""


# Arguments whose flag on the command line is not their name.
FLAGS = {"max_epochs": "--epochs", "embedding_l2": "--l2", "num_bytes": "--bytes"}


def named(argument: str) -> str:
    """An argument as messages name it, for Python and for the command line.

    >>> named("max_epochs"), named("batch_size")
    ('max_epochs (--epochs)', 'batch_size (--batch-size)')
    """
    return f"{argument} ({FLAGS.get(argument, '--' + argument.replace('_', '-'))})"


def check_whole(least: int, /, **values: object) -> None:
    """Refuse what is no whole number from `least` on.

    Raises:
        WrongTypeError, ArgumentError: as said.

    >>> check_whole(1, batch_size=0)
    Traceback (most recent call last):
        ...
    ctrlib.errors.ArgumentError: batch_size (--batch-size) must be 1 or more, got 0
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise WrongTypeError(f"{named(name)} must be a whole number, got {shown(value)}")
        if value < least:
            raise ArgumentError(f"{named(name)} must be {least} or more, got {value}")


def check_number(least: float, /, *, above: bool = False, below: float = math.inf, **values: object) -> None:
    """Refuse what is no finite number from `least` on (`above`: beyond it) and below `below`.

    Raises:
        WrongTypeError, ArgumentError: as said.

    >>> check_number(1, above=True, ratio=float("nan"))
    Traceback (most recent call last):
        ...
    ctrlib.errors.ArgumentError: ratio (--ratio) must be a finite number above 1, got nan
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise WrongTypeError(f"{named(name)} must be a number, got {shown(value)}")
        number = float(value)
        if not math.isfinite(number) or number < least or (above and number == least) or number >= below:
            low = f"above {least:g}" if above else f"that is {least:g} or more"
            high = f" and below {below:g}" if below < math.inf else ""
            raise ArgumentError(f"{named(name)} must be a finite number {low}{high}, got {value}")


def check_type(expected: str, kinds: type | UnionType | tuple[type, ...], /, **values: object) -> None:
    """Refuse what is of none of the kinds; `expected` says in words what would be right.

    Raises:
        WrongTypeError: as said.

    >>> check_type("a dictionary", dict, config="dcnv2")
    Traceback (most recent call last):
        ...
    ctrlib.errors.WrongTypeError: config must be a dictionary, got str 'dcnv2'
    """
    for name, value in values.items():
        if not isinstance(value, kinds):
            raise WrongTypeError(f"{name} must be {expected}, got {shown(value)}")


def check_callable(expected: str, /, **values: object) -> None:
    """Refuse what cannot be called; `expected` says in words what would be right.

    Raises:
        WrongTypeError: as said.
    """
    for name, value in values.items():
        if not callable(value):
            raise WrongTypeError(f"{name} must be {expected}, got {shown(value)}")


def check_has(expected: str, names: tuple[str, ...], /, **values: object) -> None:
    """Refuse what has not all of these attributes; `expected` says in words what would be right.

    Raises:
        WrongTypeError: as said.

    >>> check_has("an engine", ("train", "model"), engine="exact")
    Traceback (most recent call last):
        ...
    ctrlib.errors.WrongTypeError: engine must be an engine, got str 'exact'
    """
    for name, value in values.items():
        if not all(hasattr(value, attribute) for attribute in names):
            raise WrongTypeError(f"{name} must be {expected}, got {shown(value)}")


def check_batches(names: tuple[str, ...] = ("__iter__",), /, **values: object) -> None:
    """Refuse what gives no batches, a path or a text among them.

    Raises:
        WrongTypeError: as said.
    """
    for name, value in values.items():
        fits = all(hasattr(value, attribute) for attribute in names)
        if not fits or isinstance(value, str | bytes | os.PathLike):
            raise WrongTypeError(f"{name} must be a ctrlib.Loader, or a list of batches, got {shown(value)}")


def check_path(expected: str, /, **values: object) -> None:
    """Refuse what is no path; `expected` says in words of what it should be.

    Raises:
        WrongTypeError: as said.

    >>> check_path("a prepared folder", data=3)
    Traceback (most recent call last):
        ...
    ctrlib.errors.WrongTypeError: data must be the path of a prepared folder, got int 3
    """
    check_type(f"the path of {expected}", (str, os.PathLike), **values)


def shown(value: object) -> str:
    """A value with its type, cut to what fits a message.

    >>> shown([1, 2, 3]), shown(None)
    ('list [1, 2, 3]', 'None')
    """
    return "None" if value is None else f"{type(value).__name__} {reprlib.repr(value)}"
