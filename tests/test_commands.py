"""Two commands in one folder, and a read-only one: a short version of what `make faults` does, full disks too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "commands.py"


def test_commands_in_each_others_way() -> None:
    """In a process of its own, since it forks; its folder lies where somebody without rights finds it."""
    flags = ["--pairs", "2", "--full-disks", "0", "--only", "predict, parquet", "update"]
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)
    expected = "two at once: 2 of 2 as they must be\nread-only: 2 of 2 as they must be\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stdout + done.stderr
