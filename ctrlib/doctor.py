"""What is wrong with this installation, and the command that repairs it: `ctrlib doctor`.

TorchRec works with exactly one fbgemm, and that fbgemm with exactly one minor version of torch; fbgemm comes as two
packages that write the same folder, one per build of torch. pip knows none of this. This module imports the standard
library only, so that it runs where torch, TorchRec or fbgemm do not.

>>> versions = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "tensordict": "0.15.3",
...             "torchmetrics": "1.0.3", "pyre-extensions": "0.0.32", "tqdm": "4.70.1", "numpy": "2.4.6"}
>>> for problem in diagnose(versions, pip="pip", probe=None).problems:
...     print(problem.what, problem.fix, sep="\\n")
fbgemm-gpu 1.8.0 does not go with the CPU build of torch: it needs fbgemm-gpu-cpu 1.8.0
pip uninstall -y fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path

TORCH_VERSION = "2.13.0"  # what ctrlib is tested with, and what `make setup` installs
# torch -> the TorchRec and the fbgemm that go with it. TorchRec and fbgemm share their numbers; any other
# pair fails at import, with an undefined symbol.
LADDER = {"2.9": "1.4.0", "2.10": "1.5.0", "2.11": "1.6.0", "2.12": "1.7.0", "2.13": "1.8.0", "2.14": "1.9.0"}
FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")  # both write the folder fbgemm_gpu, so there can be only one
# What TorchRec needs besides; listed because it is installed with --no-deps on a CPU machine.
LIGHT = {"tensordict": None, "torchmetrics": "1.0.3", "pyre-extensions": None, "tqdm": None, "numpy": None}
PYTHONS = ((3, 10), (3, 11), (3, 12))

# An operator of fbgemm and not only an import: a library that failed to load may show first when it is called. An
# error raised from another ("could not load this library") shows that one, which says why.
_PROBE = """
import sys, warnings
warnings.simplefilter("ignore")
try:
    import torch, torchrec
    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
except Exception as error:
    while error.__cause__:
        error = error.__cause__
    sys.exit(f"{type(error).__name__}: {error}")
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
"""
# What can be missing or broken below `import torchrec`, by import name.
_STACK = {"torch", "torchrec", "fbgemm_gpu", "tensordict", "torchmetrics", "pyre_extensions"}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and the command line that puts it right."""

    what: str
    fix: str


@dataclass(frozen=True)
class Diagnosis:
    """What is installed on which machine, and what is wrong with it; the first problem is the one to repair first.

    `device` is what torch computes on ("" where nobody looked, because the versions are wrong already).
    """

    python: str
    platform: str
    torch: str | None
    build: str
    torchrec: str | None
    fbgemm: tuple[str, ...]
    nvidia_driver: bool
    device: str
    problems: tuple[Problem, ...]


def installed_versions() -> dict[str, str | None]:
    """The version of each package that matters, or None. That of torch names its build: 2.13.0+cpu, 2.13.0+cu130."""
    versions: dict[str, str | None] = {}
    for name in ("torch", "torchrec", *FBGEMM, *LIGHT):
        found = list(importlib.metadata.distributions(name=name))
        versions[name] = found[0].version if found else None
    if versions["torch"] is not None:
        # The wheels on PyPI leave the build out of their metadata; torch/version.py has it, and can be read unimported.
        path = Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        versions["torch"] = _version_with_build(versions["torch"], text)
    return versions


def _version_with_build(version: str, version_py: str) -> str:
    found = dict(re.findall(r"^(cuda|hip)\b[^=]*= *'([^']+)'", version_py, re.MULTILINE))
    if "cuda" in found:
        build = "cu" + found["cuda"].replace(".", "")
    elif "hip" in found:
        build = "rocm" + found["hip"]
    else:
        build = "cpu"
    return f"{version.partition('+')[0]}+{build}"


def has_nvidia_driver() -> bool:
    """Whether libnvidia-ml.so.1 can be loaded: it comes with the driver, and fbgemm-gpu is linked to it.

    The environment variable CTRLIB_CUDA=1 or 0 overrides this, as it does in setup.py.
    """
    if os.environ.get("CTRLIB_CUDA", "") in ("0", "1"):
        return os.environ["CTRLIB_CUDA"] == "1"
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def fbgemm_for(torch: str, nvidia_driver: bool) -> str:
    """The fbgemm requirement that goes with a torch.

    A CUDA build of torch on a machine without a driver computes on the CPU, and only fbgemm's CPU build loads there.

    >>> fbgemm_for("2.13.0+cpu", nvidia_driver=True), fbgemm_for("2.13.0+cu130", nvidia_driver=True)
    ('fbgemm-gpu-cpu==1.8.0', 'fbgemm-gpu==1.8.0')
    """
    name = "fbgemm-gpu" if "+cu" in torch and nvidia_driver else "fbgemm-gpu-cpu"
    return f"{name}=={LADDER[_minor(torch)]}"


def _minor(version: str) -> str:
    return ".".join(version.partition("+")[0].split(".")[:2])


def try_import(seconds: float = 300) -> tuple[str, str]:
    """(device, "") if TorchRec and an fbgemm operator run in a new interpreter, else ("", the error's last line)."""
    try:
        run = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"nothing came within {seconds:g} seconds"
    if run.returncode == 0:
        return run.stdout.strip().splitlines()[-1], ""
    lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
    return "", lines[-1] if lines else f"the interpreter ended with code {run.returncode}"


def hint(error: Exception) -> str:
    """The sentence to show with an error of an import, if this is an installation's fault; "" if it is not.

    >>> hint(ModuleNotFoundError("No module named 'torchrec'", name="torchrec"))
    'TorchRec does not work in this environment: `ctrlib doctor` says why, and which command repairs it.'
    >>> hint(ModuleNotFoundError("No module named 'ctrlib.tower'", name="ctrlib.tower"))
    ''
    """
    # A shared library of another build is an OSError without a name.
    missing = (error.name or "").split(".")[0] in _STACK if isinstance(error, ImportError) else False
    if missing or (isinstance(error, OSError) and ".so" in str(error)):
        return "TorchRec does not work in this environment: `ctrlib doctor` says why, and which command repairs it."
    return ""


def pip_command() -> str:
    """How to call pip for the interpreter that runs this, as a person would type it."""
    here, executable = Path.cwd(), Path(sys.executable)
    python = str(executable.relative_to(here)) if here in executable.parents else str(executable)
    return f"{shlex.quote(python)} -m pip"


def diagnose(
    versions: Mapping[str, str | None] | None = None,
    *,
    python: tuple[int, int] = sys.version_info[:2],
    system: str = platform.system(),
    machine: str = platform.machine(),
    nvidia_driver: bool = False,
    pip: str | None = None,
    probe: Callable[[], tuple[str, str]] | None = try_import,
) -> Diagnosis:
    """Look at the versions and, if these fit each other, at whether TorchRec runs (`probe`; None leaves that out).

    Without `versions` this looks at the installation it runs in; a test passes what it likes, and then the driver is
    as it says too.
    """
    if versions is None:
        versions, nvidia_driver = installed_versions(), has_nvidia_driver()
    pip = pip or pip_command()
    torch, torchrec = versions.get("torch"), versions.get("torchrec")
    problems = _machine_problems(python, system, machine)
    if not problems:
        problems = _version_problems(versions, nvidia_driver, pip)
        if problems and pip.endswith(" -m pip") and importlib.util.find_spec("pip") is None:
            what = "this environment has no pip, which the other commands need"
            problems.insert(0, Problem(what, f"{pip.removesuffix(' -m pip')} -m ensurepip"))
    device = ""
    if not problems and probe is not None:
        device, error = probe()
        if error and torch is not None:
            again = f"{pip} install --force-reinstall --no-deps torchrec=={LADDER[_minor(torch)]}"
            problems = [
                Problem(
                    f"the versions fit each other, but TorchRec does not run: {error}",
                    f"{again} {fbgemm_for(torch, nvidia_driver)}",
                )
            ]
    return Diagnosis(
        python=".".join(map(str, python)),
        platform=f"{system} {machine}",
        torch=torch,
        build="" if torch is None else _build(torch),
        torchrec=torchrec,
        fbgemm=tuple(f"{name} {versions[name]}" for name in FBGEMM if versions.get(name)),
        nvidia_driver=nvidia_driver,
        device=device,
        problems=tuple(problems),
    )


def _build(torch: str) -> str:
    return "CUDA" if "+cu" in torch else "ROCm" if "+rocm" in torch else "CPU"


def _machine_problems(python: tuple[int, int], system: str, machine: str) -> list[Problem]:
    """What no package can repair: another machine or another interpreter is needed, so nothing else is looked at."""
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        what = f"fbgemm has wheels for Linux on x86_64 and aarch64 only, and this is {system} on {machine}"
        container = 'docker run --rm -it -v "$PWD":/ctrlib -w /ctrlib python:3.12 make setup'
        return [Problem(what, "wsl --install" if system == "Windows" else container)]
    if python not in PYTHONS:
        what = f"Python {python[0]}.{python[1]} is not supported: ctrlib and fbgemm run on 3.10, 3.11 and 3.12"
        return [Problem(what, "make clean && make setup PYTHON=python3.12")]
    return []


def _version_problems(versions: Mapping[str, str | None], nvidia_driver: bool, pip: str) -> list[Problem]:
    torch, torchrec = versions.get("torch"), versions.get("torchrec")
    present = [name for name in FBGEMM if versions.get(name)]
    doctor = f"{pip.removesuffix(' -m pip')} -m ctrlib.doctor" if pip.endswith(" -m pip") else "ctrlib doctor"
    install_torch = f"{pip} install torch=={TORCH_VERSION} && {doctor}"
    if torch is None:
        return [Problem("torch is not installed", install_torch)]
    if _minor(torch) not in LADDER:
        what = f"no TorchRec is known to work with torch {torch}: ctrlib is tested with torch {TORCH_VERSION}"
        return [Problem(what, install_torch)]
    if "+rocm" in torch:
        what = f"fbgemm has no wheel for the ROCm build of torch ({torch})"
        return [Problem(what, f"{pip} install --force-reinstall --no-deps torch=={TORCH_VERSION} && {doctor}")]

    problems = []
    want, build = LADDER[_minor(torch)], _build(torch)
    right, _, _ = fbgemm_for(torch, nvidia_driver).partition("==")
    install = f"{pip} install --no-deps {right}=={want}"
    if len(present) == 2:
        what = "fbgemm-gpu and fbgemm-gpu-cpu are both installed, and they write the same folder"
        problems.append(Problem(what, f"{pip} uninstall -y {' '.join(FBGEMM)} && {install}"))
    elif not present:
        problems.append(Problem(f"fbgemm is not installed: the {build} build of torch needs {right} {want}", install))
    elif present != [right]:
        where = f"the {build} build of torch"
        if build == "CUDA":
            where += " and an NVIDIA driver" if nvidia_driver else " without an NVIDIA driver"
        what = f"{present[0]} {versions[present[0]]} does not go with {where}: it needs {right} {want}"
        problems.append(Problem(what, f"{pip} uninstall -y {present[0]} && {install}"))
    elif _minor(str(versions[right])) != _minor(want):
        problems.append(Problem(f"{right} {versions[right]} does not go with torch {torch}: it needs {want}", install))

    install = f"{pip} install --no-deps torchrec=={want}"
    if torchrec is None:
        problems.append(Problem(f"TorchRec is not installed: torch {torch} needs torchrec {want}", install))
    elif _minor(torchrec) != _minor(want):
        problems.append(Problem(f"torchrec {torchrec} does not go with torch {torch}: it needs {want}", install))

    wrong = [
        name if pin is None else f"{name}=={pin}"
        for name, pin in LIGHT.items()
        if versions.get(name) is None or pin not in (None, versions.get(name))
    ]
    if wrong:
        what = f"TorchRec needs {', '.join(wrong)}: not installed, or not in that version"
        problems.append(Problem(what, f"{pip} install {' '.join(wrong)}"))
    return problems


def report(diagnosis: Diagnosis) -> str:
    """The diagnosis as text for a person."""
    torch = diagnosis.torch or "not installed"
    if diagnosis.torch and diagnosis.torch.partition("+")[0] != TORCH_VERSION:
        torch += f" (ctrlib is tested with {TORCH_VERSION})"
    rows = {
        "Python": f"{diagnosis.python} on {diagnosis.platform}",
        "torch": torch,
        "torchrec": diagnosis.torchrec or "not installed",
        "fbgemm": ", ".join(diagnosis.fbgemm) or "not installed",
        "NVIDIA driver": "yes" if diagnosis.nvidia_driver else "no",
        "runs on": diagnosis.device or "not tried",
    }
    lines = [f"{name:<14} {value}" for name, value in rows.items()]
    for problem in diagnosis.problems:
        lines += ["", f"PROBLEM: {problem.what}", "repair it with:", f"    {problem.fix}"]
    if not diagnosis.problems:
        lines += ["", "TorchRec works here." if diagnosis.device else "The versions fit each other."]
    return "\n".join(lines)


def main(json: bool = False, quick: bool = False) -> int:
    """Print the diagnosis (`json`: for a program) and return 0 if all is well, 1 if not.

    `quick` compares versions only, in a tenth of a second; otherwise TorchRec is imported too, which takes seconds.
    """
    diagnosis = diagnose(probe=None if quick else try_import)
    print(dumps(asdict(diagnosis), indent=2) if json else report(diagnosis))
    return 1 if diagnosis.problems else 0


if __name__ == "__main__":
    if "--fbgemm" in sys.argv:  # for the Makefile: the fbgemm that goes with the torch it has just installed
        print(fbgemm_for(installed_versions()["torch"] or TORCH_VERSION, has_nvidia_driver()))
    else:
        sys.exit(main(json="--json" in sys.argv, quick="--quick" in sys.argv))
