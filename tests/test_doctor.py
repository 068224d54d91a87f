"""Every way in which an installation goes wrong, and the exact command that repairs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ctrlib import doctor
from ctrlib.doctor import diagnose

ROOT = Path(__file__).parent.parent
LIGHT = {"tensordict": "0.15.3", "torchmetrics": "1.0.3", "pyre-extensions": "0.0.32", "tqdm": "4.7", "numpy": "2.4.6"}
CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", **LIGHT}
CUDA = {"torch": "2.13.0+cu130", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", **LIGHT}
HERE = {"python": (3, 12), "system": "Linux", "machine": "x86_64", "pip": "pip"}


def problems(versions, *, driver=False, error="", **here):
    found = diagnose(versions, nvidia_driver=driver, probe=lambda: ("", error), **{**HERE, **here})
    return [(problem.what, problem.fix) for problem in found.problems]


@pytest.mark.parametrize(
    ("versions", "driver"),
    [
        (CPU, False),
        (CPU, True),  # a CPU build of torch where there is a driver: that is a choice
        (CUDA, True),
        ({**CPU, "torch": "2.13.0+cu130"}, False),  # PyPI's torch on a machine without a GPU
        ({**CUDA, "torch": "2.11.0+cu126", "torchrec": "1.6.0", "fbgemm-gpu": "1.6.0"}, True),
        ({**CUDA, "torch": "2.12.1+cu130", "torchrec": "1.7.0", "fbgemm-gpu": "1.7.0"}, True),
        ({**CPU, "torch": "2.14.0+cpu", "torchrec": "1.9.2", "fbgemm-gpu-cpu": "1.9.0"}, False),
    ],
)
def test_what_fits(versions, driver):
    assert problems(versions, driver=driver) == []


@pytest.mark.parametrize(
    ("versions", "driver", "what", "fix"),
    [
        pytest.param(
            {**CPU, "fbgemm-gpu": "1.8.0"},
            False,
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed, and they write the same folder",
            "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0",
            id="both, CPU",
        ),
        pytest.param(
            {**CUDA, "fbgemm-gpu-cpu": "1.8.0"},
            True,
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed, and they write the same folder",
            "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu==1.8.0",
            id="both, CUDA",
        ),
        pytest.param(
            {**CUDA, "torch": "2.13.0+cpu"},
            True,
            "fbgemm-gpu 1.8.0 does not go with the CPU build of torch: it needs fbgemm-gpu-cpu 1.8.0",
            "pip uninstall -y fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0",
            id="CUDA fbgemm on a CPU torch",
        ),
        pytest.param(
            {**CPU, "torch": "2.13.0+cu130"},
            True,
            "fbgemm-gpu-cpu 1.8.0 does not go with the CUDA build of torch and an NVIDIA driver: "
            "it needs fbgemm-gpu 1.8.0",
            "pip uninstall -y fbgemm-gpu-cpu && pip install --no-deps fbgemm-gpu==1.8.0",
            id="CPU fbgemm on a CUDA torch",
        ),
        pytest.param(
            CUDA,
            False,
            "fbgemm-gpu 1.8.0 does not go with the CUDA build of torch without an NVIDIA driver: "
            "it needs fbgemm-gpu-cpu 1.8.0",
            "pip uninstall -y fbgemm-gpu && pip install --no-deps fbgemm-gpu-cpu==1.8.0",
            id="CUDA fbgemm without a driver",
        ),
        pytest.param(
            {**CPU, "fbgemm-gpu-cpu": None},
            False,
            "fbgemm is not installed: the CPU build of torch needs fbgemm-gpu-cpu 1.8.0",
            "pip install --no-deps fbgemm-gpu-cpu==1.8.0",
            id="no fbgemm",
        ),
        pytest.param(
            {**CPU, "fbgemm-gpu-cpu": "1.9.0"},
            False,
            "fbgemm-gpu-cpu 1.9.0 does not go with torch 2.13.0+cpu: it needs 1.8.0",
            "pip install --no-deps fbgemm-gpu-cpu==1.8.0",
            id="wrong fbgemm",
        ),
        pytest.param(
            {**CPU, "torchrec": None},
            False,
            "TorchRec is not installed: torch 2.13.0+cpu needs torchrec 1.8.0",
            "pip install --no-deps torchrec==1.8.0",
            id="no TorchRec",
        ),
        pytest.param(
            {**CUDA, "torch": "2.11.0+cu126", "fbgemm-gpu": "1.6.0"},
            True,
            "torchrec 1.8.0 does not go with torch 2.11.0+cu126: it needs 1.6.0",
            "pip install --no-deps torchrec==1.6.0",
            id="wrong TorchRec",
        ),
        pytest.param(
            {**CPU, "tensordict": None, "pyre-extensions": None, "torchmetrics": "1.9.0"},
            False,
            "TorchRec needs tensordict, torchmetrics==1.0.3, pyre-extensions: not installed, or not in that version",
            "pip install tensordict torchmetrics==1.0.3 pyre-extensions",
            id="light dependencies",
        ),
        pytest.param(
            {},
            False,
            "torch is not installed",
            "pip install torch==2.13.0 && ctrlib doctor",
            id="nothing",
        ),
        pytest.param(
            {**CPU, "torch": "2.15.0+cpu"},
            False,
            "no TorchRec is known to work with torch 2.15.0+cpu: ctrlib is tested with torch 2.13.0",
            "pip install torch==2.13.0 && ctrlib doctor",
            id="torch too new",
        ),
        pytest.param(
            {**CPU, "torch": "2.13.0+rocm7.1"},
            False,
            "fbgemm has no wheel for the ROCm build of torch (2.13.0+rocm7.1)",
            "pip install --force-reinstall --no-deps torch==2.13.0 && ctrlib doctor",
            id="ROCm",
        ),
    ],
)
def test_wrong_versions(versions, driver, what, fix):
    assert problems(versions, driver=driver) == [(what, fix)]


@pytest.mark.parametrize(("minor", "version"), doctor.LADDER.items())
def test_ladder(minor, version):
    found = problems({"torch": f"{minor}.1+cu130", **LIGHT}, driver=True)
    assert [fix for _, fix in found] == [
        f"pip install --no-deps fbgemm-gpu=={version}",
        f"pip install --no-deps torchrec=={version}",
    ]


@pytest.mark.parametrize(
    ("here", "what", "fix"),
    [
        (
            {"python": (3, 13)},
            "Python 3.13 is not supported: ctrlib and fbgemm run on 3.10, 3.11 and 3.12",
            "make clean && make setup PYTHON=python3.12",
        ),
        (
            {"system": "Darwin", "machine": "arm64"},
            "fbgemm has wheels for Linux on x86_64 and aarch64 only, and this is Darwin on arm64",
            'docker run --rm -it -v "$PWD":/ctrlib -w /ctrlib python:3.12 make setup',
        ),
        (
            {"system": "Windows", "machine": "AMD64"},
            "fbgemm has wheels for Linux on x86_64 and aarch64 only, and this is Windows on AMD64",
            "wsl --install",
        ),
    ],
)
def test_wrong_machine(here, what, fix):
    # No package repairs this, so what is wrong with the packages is left out.
    assert problems({}, **here) == [(what, fix)]


def test_import_fails():
    error = "OSError: fbgemm_gpu_py.so: undefined symbol: _ZN5torch"
    assert problems(CPU, error=error) == [
        (
            f"the versions fit each other, but TorchRec does not run: {error}",
            "pip install --force-reinstall --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0",
        )
    ]
    # With wrong versions nobody tries: these explain the error.
    assert "does not run" not in str(problems({**CPU, "torchrec": None}, error=error))


def test_no_pip(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = problems({**CPU, "torchrec": None}, pip=".venv/bin/python -m pip")
    assert [fix for _, fix in found] == [
        ".venv/bin/python -m ensurepip",
        ".venv/bin/python -m pip install --no-deps torchrec==1.8.0",
    ]
    assert [fix for _, fix in problems({}, pip=".venv/bin/python -m pip")] == [
        ".venv/bin/python -m ensurepip",
        ".venv/bin/python -m pip install torch==2.13.0 && .venv/bin/python -m ctrlib.doctor",
    ]


def test_try_import(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE", "print('noise'); print('CPU')")
    assert doctor.try_import() == ("CPU", "")
    monkeypatch.setattr(doctor, "_PROBE", "import sys; raise OSError('libnvidia-ml.so.1: no such file')")
    assert doctor.try_import() == ("", "OSError: libnvidia-ml.so.1: no such file")
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    assert doctor.try_import() == ("", "the interpreter ended with code -6")
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    assert doctor.try_import(seconds=0.2) == ("", "nothing came within 0.2 seconds")


def test_try_import_shows_the_cause(tmp_path, monkeypatch):
    """fbgemm_gpu says that a library could not be loaded; the error behind that says why."""
    package = tmp_path / "fbgemm_gpu"
    package.mkdir()
    (package / "broken.so").write_text("not a library")
    (package / "__init__.py").write_text(
        "import torch, pathlib; torch.ops.load_library(pathlib.Path(__file__).parent / 'broken.so')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    device, error = doctor.try_import()
    assert device == ""
    assert error.startswith("OSError: ")
    assert "broken.so" in error
    assert doctor.hint(OSError(error.removeprefix("OSError: "))) != ""


@pytest.mark.parametrize(
    ("version", "text", "expected"),
    [
        ("2.13.0", "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "2.13.0+cu130"),
        ("2.13.0+cpu", "cuda: Optional[str] = None\nhip: Optional[str] = None\n", "2.13.0+cpu"),
        ("2.13.0", "cuda: Optional[str] = None\nhip: Optional[str] = None\n", "2.13.0+cpu"),
        ("2.13.0", "cuda: Optional[str] = None\nhip: Optional[str] = '7.1'\n", "2.13.0+rocm7.1"),
    ],
)
def test_build_of_torch(version, text, expected):
    assert doctor._version_with_build(version, text) == expected


def test_this_installation_is_well(capsys):
    assert doctor.main() == 0
    assert "TorchRec works here." in capsys.readouterr().out
    assert doctor.main(json=True, quick=True) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_report(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "installed_versions", lambda: {**CPU, "torch": "2.12.1+cpu"})
    monkeypatch.setattr(doctor, "pip_command", lambda: "pip")
    assert doctor.main(quick=True) == 1
    printed = capsys.readouterr().out
    assert "torch          2.12.1+cpu (ctrlib is tested with 2.13.0)" in printed
    assert "PROBLEM: torchrec 1.8.0 does not go with torch 2.12.1+cpu: it needs 1.7.0" in printed
    assert "\n    pip install --no-deps torchrec==1.7.0" in printed


def test_imports_the_standard_library_only():
    code = "import sys, ctrlib.doctor; sys.exit(bool({'torch', 'numpy', 'torchrec'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_same_versions_everywhere():
    """The doctor, the Makefile, setup.py and pyproject.toml each say them: none may be forgotten."""
    torch, torchrec = doctor.TORCH_VERSION, doctor.LADDER["2.13"]
    makefile, setup, pyproject = ((ROOT / name).read_text() for name in ("Makefile", "setup.py", "pyproject.toml"))
    assert f"TORCH := {torch}\n" in makefile
    assert f"TORCHREC := {torchrec}\n" in makefile
    assert re.findall(r'"((?:torch|torchrec|fbgemm-gpu|torchmetrics)==.*?)"', setup) == [
        f"torch=={torch}",
        f"torchrec=={torchrec}",
        f"fbgemm-gpu=={torchrec}",
        f"torchmetrics=={doctor.LIGHT['torchmetrics']}",
    ]
    assert f'cuda = ["torchrec=={torchrec}", "fbgemm-gpu=={torchrec}"]' in pyproject


@pytest.mark.parametrize("cuda", ["0", "1"])
def test_setup_asks_for_torchrec_only_with_a_driver(cuda, tmp_path):
    """With TorchRec among its dependencies, `pip install .` would bring fbgemm-gpu to a machine that cannot load it."""
    code = f"""
import runpy, setuptools
setuptools.setup = lambda install_requires: print(*install_requires, sep="\\n")
runpy.run_path({str(ROOT / "setup.py")!r})
"""
    environment = {**os.environ, "CTRLIB_CUDA": cuda}
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert ("torchrec==1.8.0" in printed, "fbgemm-gpu==1.8.0" in printed) == (cuda == "1", cuda == "1")
    assert "torch==2.13.0" in printed
