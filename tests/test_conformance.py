"""Every tower, head and embedding of the library, as its constructor makes it; a new one is found without a line here.

Encoders of numbers and of histories have contracts of their own: tests/test_numeric.py and tests/test_sequence.py.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from conformance import CHECKS, HEAD_SHAPE, TOWER_SHAPE, inputs
from torch import nn
from torchrec.modules.mc_modules import LRU_EvictionPolicy

import ctrlib.embeddings
import ctrlib.heads
import ctrlib.towers
from ctrlib.embeddings.sequence import MeanPooling, Unit
from ctrlib.testing import check_embedding

# What constructors must be told beside the shape of their input, or beside the features, by the argument's name.
ARGUMENTS: dict[str, Any] = {"num_tasks": 2, "num_streams": 2, "widths": (4, 2)}
EMBEDDING_ARGUMENTS: dict[str, Any] = {
    "target": "item",
    "num_tasks": None,
    "units": [Unit(("item",), ("history",), MeanPooling(16))],
    "num_embeddings": {"item": 64, "genres": 16},
    "eviction_policy": LRU_EvictionPolicy(),
}
NO_EMBEDDINGS = {"Wide"}  # its shape is that of logits


def parts(package: ModuleType) -> Iterator[type[nn.Module]]:
    """The public classes of a package that publish the shape of what they give, but those made of other parts."""
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for name, part in vars(importlib.import_module(found.name)).items():
            if isinstance(part, type) and part.__module__ == found.name and not name.startswith("_"):
                first, *_ = inspect.signature(part).parameters.values()
                if publishes(part, "out_shape") and first.kind is not first.VAR_POSITIONAL:
                    yield part


def publishes(part: type, name: str) -> bool:
    ours = [base for base in part.__mro__ if base.__module__.startswith("ctrlib.")]
    return any(f"self.{name}" in inspect.getsource(base) for base in ours)


def make(part: type[nn.Module], given: Any, arguments: dict[str, Any]) -> nn.Module:
    _, *others = inspect.signature(part).parameters.values()
    needed = [p.name for p in others if p.default is p.empty]
    unknown = [name for name in needed if name not in arguments]
    assert not unknown, (
        f"{part.__module__}.{part.__name__} cannot be made without {unknown}: give what is reasonable as the default, "
        "or add the line '\"NAME\": VALUE,' to (EMBEDDING_)ARGUMENTS in tests/test_conformance.py"
    )
    return part(given, **{name: arguments[name] for name in needed})


def shapes(head: type[nn.Module]) -> list[tuple[int, ...]]:
    """Of the inputs that a head of two tasks may take: one stream, one a task, and one more that is shared."""

    def takes(shape: tuple[int, ...]) -> bool:
        try:
            make(head, shape, ARGUMENTS)
        except (ValueError, AssertionError):
            return False
        return True

    return [shape for shape in (HEAD_SHAPE, (2, *HEAD_SHAPE), (3, *HEAD_SHAPE)) if takes(shape)] or [HEAD_SHAPE]


TOWERS = {part.__name__: part for part in parts(ctrlib.towers)}
HEADS = {f"{part.__name__}-{'x'.join(map(str, s))}": (part, s) for part in parts(ctrlib.heads) for s in shapes(part)}
EMBEDDINGS = {
    part.__name__: part
    for part in parts(ctrlib.embeddings)
    if not publishes(part, "in_shape") and part.__name__ not in NO_EMBEDDINGS
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", TOWERS)
def test_towers(name: str, check: str) -> None:
    torch.manual_seed(0)
    CHECKS[check](lambda shape: make(TOWERS[name], shape, ARGUMENTS), TOWER_SHAPE, False)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, check: str) -> None:
    torch.manual_seed(0)
    head, in_shape = HEADS[name]
    CHECKS[check](lambda shape: make(head, shape, ARGUMENTS), in_shape, True)


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_float32_under_autocast(name: str) -> None:
    head, in_shape = HEADS[name]
    with torch.autocast("cpu", torch.bfloat16):
        logits = make(head, in_shape, ARGUMENTS)(inputs(in_shape, 4, head=True)[0])
    assert logits.dtype == torch.float32, "two rows whose scores differ by less than 2^-8 of them would be ties"


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings(name: str) -> None:
    torch.manual_seed(0)
    check_embedding(lambda schema: make(EMBEDDINGS[name], schema.features, EMBEDDING_ARGUMENTS))


OF_NO_PAPER = {"mlp", "streams", "combine", "linear", "stacked"}


@pytest.mark.parametrize("package", [ctrlib.towers, ctrlib.heads], ids=lambda package: package.__name__)
def test_every_file_publishes_a_part_and_says_what_it_is(package: ModuleType) -> None:
    of_files: dict[str, list[type[nn.Module]]] = {}
    for part in parts(package):
        of_files.setdefault(part.__module__, []).append(part)
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = found.name.rpartition(".")[2]
        if name != "combine":  # which makes towers of towers
            assert found.name in of_files, f"{found.name}: no public class sets self.in_shape and self.out_shape"
        document = importlib.import_module(found.name).__doc__ or ""
        assert "https://" in document or name in OF_NO_PAPER, f"the docstring of {found.name} has no paper's address"
    for part in (part for some in of_files.values() for part in some):
        document = part.__doc__ or ""
        for what in ("Shape:", ">>>"):
            assert what in document, f"the docstring of {part.__module__}.{part.__name__} has no {what}"


def test_the_search_for_parts_finds_them() -> None:
    assert {"MLP", "FM", "CrossNet", "CrossNetV2", "APEM"} <= TOWERS.keys() and "InteractingLayer" not in TOWERS
    assert {"LinearHead", "TaskTowers", "STEM"} <= {part.__name__ for part, _ in HEADS.values()}
    assert {"TableEmbedding", "SequenceEmbedding"} <= EMBEDDINGS.keys() and "DIN" not in EMBEDDINGS
