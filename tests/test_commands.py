"""Two commands in one folder, a full disk, a read-only folder: a short version of what `make faults` does to all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "commands.py"


def test_commands_in_each_others_way() -> None:
    """In a process of its own, since it forks; its folder lies where somebody without rights finds it."""
    flags = ["--pairs", "2", "--full-disks", "1", "--only", "predict, parquet"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (
        0,
        "two at once: 2 of 2 as they must be\nfull disk: 2 of 2 as they must be\nread-only: 1 of 1 as they must be\n",
    ), done.stdout + done.stderr
