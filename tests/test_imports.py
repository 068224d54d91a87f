"""Imports point one way, so that any layer can be read, tested and replaced knowing only those below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Bottom to top. A part (a module or a folder of ctrlib) imports from lower layers and from itself.
LAYERS = [
    {"doctor"},
    {"errors"},
    {"making", "_launcher", "_lock", "_json"},
    {"_lazy", "_target", "remote"},  # an installation that does not load is explained by `doctor`
    {"joined"},
    {"schema", "batch", "layers", "metrics", "plots", "distributed"},
    {"losses", "manifest", "calibration"},
    {"data", "embeddings", "towers", "heads"},
    {"model", "testing"},
    {"structure", "inputs"},
    {"models"},
    {"sharding"},
    {"training", "search", "retrieval", "ranking", "serving", "analysis", "export", "selection"},
    {"estimator"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# Parts of one layer that may use each other, as long as no circle comes of it (serving evaluates as training does).
FRIENDS = LAYERS[LEVEL["training"]]
# Stricter than the layer: the only other parts of ctrlib, and the only packages, that these may import.
STRICT = {
    "doctor": (set(), set()),  # runs where nothing else does
    "errors": (set(), set()),
    "_launcher": ({"errors"}, set()),
    "_lock": ({"errors"}, set()),
    # Nobody waits for torch to be told that a folder is taken.
    "_target": ({"errors", "making", "_launcher", "_lock"}, set()),
    "remote": ({"errors", "making", "_launcher"}, {"s3fs"}),
    "_lazy": ({"doctor"}, set()),
    "metrics": ({"errors"}, {"numpy"}),  # an offline AUC needs no torch
    "joined": (set(), {"torch"}),
    "layers": ({"errors", "joined"}, {"torch"}),
    "losses": ({"errors", "layers"}, {"torch"}),
    "calibration": ({"errors"}, {"torch", "numpy"}),
    "towers": ({"errors", "joined", "layers", "_lazy"}, {"torch"}),
    "heads": ({"errors", "layers", "losses", "_lazy"}, {"torch"}),
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "ctrlib").rglob("*.py"))
}
SCRIPTS = sorted(path for folder in ("datasets", "recipes") for path in (ROOT / folder).rglob("*.py"))


def imported(source: str, module: str, is_package: bool) -> set[str]:
    """The dotted names that a module imports, wherever in the file, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: None if is_package else -1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, base] if base else package)
            # `from ctrlib import metrics` may name a module: keep both readings, the longer one says which part.
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "ctrlib" else {base}
    return names


def part_of(name: str) -> str:
    return name.partition(".")[2].partition(".")[0]


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    part, names = part_of(module), imported(source, module, is_package)
    if part not in LEVEL:
        return [f"{module}: say in LAYERS where {part!r} stands"]
    allowed_parts, allowed_packages = STRICT.get(part, (None, None))
    found = []
    for name in sorted(names):
        package, other = name.split(".")[0], part_of(name)
        if package == "ctrlib":
            if other == part:
                continue
            if other not in LEVEL:
                found.append(f"{module} imports {name}: import it from the module that defines it")
            elif allowed_parts is not None and other not in allowed_parts:
                found.append(f"{module} imports {name}, but {part} uses {sorted(allowed_parts) or 'nothing'} of ctrlib")
            elif LEVEL[other] >= LEVEL[part] and not {part, other} <= FRIENDS:
                found.append(f"{module} imports {name}, which is not below it")
        elif (
            allowed_packages is not None and package not in allowed_packages and package not in sys.stdlib_module_names
        ):
            found.append(f"{module} imports {name}, but {part} imports {sorted(allowed_packages) or 'nothing'}")
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "ctrlib"])
def test_imports_point_down(module):
    path = MODULES[module]
    assert faults(module, path.read_text(encoding="utf-8"), is_package=path.name == "__init__.py") == []


def test_init_imports_nothing_until_asked():
    """`import ctrlib` is lazy, so the names at its top are the standard library's, and that of what makes it so."""
    top = [
        node
        for node in ast.parse(MODULES["ctrlib"].read_text(encoding="utf-8")).body
        if "Import" in type(node).__name__
    ]
    names = imported("\n".join(map(ast.unparse, top)), "ctrlib", is_package=True)
    assert {name.split(".")[0] for name in names - {"ctrlib._lazy"}} <= sys.stdlib_module_names


def test_no_circle_among_friends():
    uses: dict[str, set[str]] = {part: set() for part in FRIENDS}
    for module, path in MODULES.items():
        if part_of(module) in FRIENDS:
            names = imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
            uses[part_of(module)] |= {part_of(name) for name in names if name.startswith("ctrlib.")} & FRIENDS
    remaining = {part: others - {part} for part, others in uses.items()}
    while free := {part for part, others in remaining.items() if not others & remaining.keys()}:
        remaining = {part: others for part, others in remaining.items() if part not in free}
    assert not remaining, f"these import each other: {remaining}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ctrlib.metrics", "import torch"),
        ("ctrlib.batch", "from ctrlib.schema import Schema"),
        ("ctrlib.towers.fm", "from ctrlib.schema import Schema"),
        ("ctrlib.towers.fm", "import torchrec"),
        ("ctrlib.towers.fm", "from ..heads.linear import LinearHead"),
        ("ctrlib.embeddings.table", "def late():\n    import ctrlib.towers.fm"),
        ("ctrlib.model", "from ctrlib import training"),
        ("ctrlib.model", "from ctrlib import models"),
        ("ctrlib.training.loop", "import ctrlib.cli"),
        ("ctrlib.data.loader", "from ctrlib import Batch"),
        ("ctrlib.doctor", "import numpy"),
        ("ctrlib.unheard_of", ""),
    ],
)
def test_the_rules_bite(module, source):
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ctrlib.towers.combine", "from .fm import FM\nfrom ctrlib.layers import Hidden\nimport math, torch"),
        ("ctrlib.losses", "from ctrlib.layers import Hidden"),
        ("ctrlib.training.loop", "from ctrlib import metrics\nimport numpy, rich"),
        ("ctrlib.serving.predictor", "from ctrlib import models\nfrom ctrlib.training.loop import predict"),
    ],
)
def test_the_rules_let_pass(module, source):
    assert faults(module, source) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_stand_alone(path):
    """One file is read by itself: it uses ctrlib, other packages and what recipes share, never another script."""
    names = imported(path.read_text(encoding="utf-8"), path.stem, is_package=False)
    shared = {"harness", "records", "programs", "worker", "din", "fuxictr_shims"}
    neighbours = {"datasets", "recipes", "tests", *(script.stem for script in SCRIPTS)} - shared
    assert {name for name in names if not name or name.split(".")[0] in neighbours} == set()


def test_scripts_are_no_packages():
    # A package called `datasets` exists elsewhere; with an __init__.py here, one would hide the other.
    assert [path for path in SCRIPTS if path.name == "__init__.py"] == []


def test_metrics_need_no_torch():
    code = """
import sys
import ctrlib
import ctrlib.schema
ctrlib.metrics
sys.exit(str(heavy) if (heavy := {"torch", "torchrec", "fbgemm_gpu", "polars", "pandas"} & set(sys.modules)) else 0)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
