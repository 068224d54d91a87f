"""Types of flags, with how --help shows them: what stands after the flag, and its default.

tyro asks typeguard, whose import takes a tenth of a second, whether a default is of its type; but not for plain classes
and for typing's unions up to the member that fits. So these are such unions, in which None stands before what is no
plain class, and several texts are a plain tuple.
"""
# ruff: noqa: UP007, UP045, RUF036

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, Union, get_args

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from ctrlib.errors import ArgumentError
from ctrlib.models.table import MODELS
from ctrlib.schema import NumericFields


def shown(metavar: str, help: str | None = None) -> Any:
    """How --help shows a flag that may be left out: what follows it, and its default unless that is nothing."""
    return arg(
        metavar=metavar,
        help=help,
        help_behavior_hint=lambda default: "" if default in ("None", "") else f"(default: {default})",
    )


OptionalInt = Annotated[Optional[int], shown("INT")]
OptionalInts = Annotated[Union[None, tuple[int, ...]], shown("INT ...")]
OptionalFloat = Annotated[Optional[float], shown("FLOAT")]
OptionalBool = Annotated[Optional[bool], shown("{True,False}")]
OptionalPath = Annotated[Optional[Path], shown("PATH")]
OptionalText = Annotated[Optional[str], shown("TEXT")]
OptionalName = Annotated[Optional[str], shown("NAME")]
Parts = Annotated[Union[None, tuple[float, float, float]], shown("FLOAT FLOAT FLOAT")]
Switch = Annotated[bool, arg(help_behavior_hint="")]
OptionalPrecision = Annotated[Optional[Literal["fp32", "bf16"]], shown("{fp32,bf16}")]
OptionalSelectBy = Annotated[Optional[Literal["auc", "log_loss", "gauc"]], shown("{auc,log_loss,gauc}")]
OptionalNumeric = Annotated[Optional[NumericFields], shown(f"{{{','.join(get_args(NumericFields))}}}")]
if TYPE_CHECKING:
    Model = str
    Texts = tuple[str, ...]
    OptionalTexts = Optional[tuple[str, ...]]
    Paths = tuple[Path, ...]
    OptionalPaths = Optional[tuple[Path, ...]]
else:
    Model = Literal[tuple(MODELS)]
    MANY = PrimitiveConstructorSpec(
        "*", "TEXT ...", tuple, lambda value: isinstance(value, tuple), lambda value: list(value or ())
    )
    Texts = Annotated[tuple, MANY, shown("TEXT ...")]
    OptionalTexts = Annotated[Optional[tuple], MANY, shown("TEXT ...")]

    def _paths(texts: list[str]) -> tuple[Path, ...]:
        if not texts:
            raise ArgumentError("expected one path or more")
        return tuple(map(Path, texts))

    MANY_PATHS = PrimitiveConstructorSpec(
        "*", "PATH ...", _paths, lambda value: isinstance(value, tuple), lambda value: list(map(str, value or ()))
    )
    Paths = Annotated[tuple, MANY_PATHS, shown("PATH ...")]
    OptionalPaths = Annotated[Optional[tuple], MANY_PATHS, shown("PATH ...")]
Settings = Annotated[Texts, shown("NAME=VALUE ...")]
Names = Annotated[Texts, shown("NAME ...")]
OptionalNames = Annotated[OptionalTexts, shown("NAME ...")]
ModelName = Annotated[Model, shown("NAME")]
OptionalModel = Annotated[Optional[Model], shown("[NAME]")]
