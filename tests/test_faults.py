"""Runs survive faults: a short version of `make faults`, in a process of its own, since it forks and kills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
NONE = {
    **dict.fromkeys(("kills", "terminations", "flips", "truncations", "swaps", "resumed", "full-disks"), 0),
    **dict.fromkeys(("lost", "stopped", "torchruns", "rank-changes"), 0),
}
# How damage is found is in test_checkpoint.py, and here a run goes on after it; test_killed_calls.py kills runs of one
# process. Full disks, silent processes, and what torchrun starts again by itself are left to `make faults`, and so are
# checkpoints after each step.
SHORT = {
    **{"kills": 1, "terminations": 1, "flips": 1, "truncations": 0, "swaps": 0, "resumed": 3, "full-disks": 0},
    **{"lost": 1, "stopped": 0, "torchruns": 0, "rank-changes": 1, "checkpoint-seconds": 0.1},
}


def run(folder: Path, trials: dict[str, float], command: list[str]) -> subprocess.CompletedProcess[str]:
    flags = [text for name, count in trials.items() for text in (f"--{name}", str(count))]
    environment = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *command, *flags], capture_output=True, text=True, env=environment)


def test_every_fault_is_survived(tmp_path: Path) -> None:
    assert set(NONE) <= set(SHORT)
    done = run(tmp_path, SHORT, [str(TESTS / "faults.py")])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("│") for line in done.stdout.splitlines() if line.startswith("│")]
    counts = {cells[1].strip(): [int(cells[place]) for place in (2, 3, 4)] for cells in lines}
    kills = [numbers for fault, numbers in counts.items() if fault.startswith("kill -9: ")]
    assert [runs for runs, _, _ in kills] == [1]
    assert sum(injected for _, injected, _ in kills) >= 1
    assert len(counts) == 1 + 1 + 1 + 2
    assert all(survived == runs <= injected for runs, injected, survived in counts.values())
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("torch")]  # torch's own are torch's
    assert not left


CARELESS = """
import sys

sys.path.insert(0, sys.argv.pop(1))
import faults
import tyro
from ctrlib.training.checkpoint import Checkpoints

load = Checkpoints.load


def careless(self, tensors, **options):
    state = load(self, tensors, **options)
    if state is not None and "name" not in options:  # going on, not putting back the best weights
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-6)
    return state


Checkpoints.load = careless
sys.exit(faults.main(tyro.cli(faults.Trials)))
"""


def test_a_resume_that_loses_the_last_bits_is_found_out(tmp_path: Path) -> None:
    done = run(tmp_path, {**NONE, "full-disks": 1}, ["-c", CARELESS, str(TESTS)])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ended with other bits" in done.stdout
