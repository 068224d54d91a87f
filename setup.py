"""The dependencies, and nothing else: all other metadata is in pyproject.toml.

They are computed because TorchRec cannot simply be listed: its wheel demands `fbgemm-gpu`, which links the NVIDIA
driver's libnvidia-ml.so.1 and so cannot even be imported on a machine without one, and package metadata has no marker
for a GPU. A machine with the driver gets TorchRec here; any other machine gets the CPU build from `make setup`, or by
pasting the command that `ctrlib doctor` prints. CTRLIB_CUDA=1 or 0 overrides the look (1: a container image built
for GPUs on a machine that has none).
"""

import ctypes
import os

from setuptools import setup


def nvidia_driver() -> bool:
    """Whether fbgemm-gpu can be loaded here (the same test as `ctrlib.doctor.has_nvidia_driver`)."""
    if os.environ.get("CTRLIB_CUDA", "") in ("0", "1"):
        return os.environ["CTRLIB_CUDA"] == "1"
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


setup(
    install_requires=[
        "torch==2.13.0",
        *(["torchrec==1.8.0", "fbgemm-gpu==1.8.0"] if nvidia_driver() else []),
        # What TorchRec itself asks for, listed because on a CPU machine it is installed with --no-deps.
        "tensordict",
        "torchmetrics==1.0.3",
        "pyre-extensions",
        "tqdm",
        # What ctrlib uses.
        "numpy>=1.26",
        "polars>=2.0",
        "pyarrow>=17",
        "pandas>=2.2",
        "numba>=0.64",  # for large text files only (ctrlib.data.compiled)
        "scikit-learn>=1.6",
        "scipy>=1.11",
        "safetensors>=0.5",
        "tyro>=1.0",
        "rich>=13.9",
        "matplotlib>=3.9",
        "pooch>=1.8",
    ]
)
