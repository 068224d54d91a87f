"""Runs survive faults: a short version of `make faults`, in a process of its own, since it forks and kills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# How damage is found is in test_checkpoint.py, and here a run goes on after it; test_killed_calls.py kills runs of one
# process. Full disks, silent processes, and what torchrun starts again by itself are left to `make faults`, and so are
# checkpoints after each step.
SHORT = {
    **{"kills": 1, "terminations": 1, "flips": 1, "truncations": 0, "swaps": 0, "resumed": 3, "full-disks": 0},
    **{"last-steps": 1, "lost": 1, "stopped": 0, "torchruns": 0, "rank-changes": 1, "checkpoint-seconds": 0.1},
}


CARELESS = """
import sys
from dataclasses import replace
from pathlib import Path

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


trials = tyro.cli(faults.Trials)
status = faults.main(trials)
left = [path.name for path in Path(faults.tempfile.gettempdir()).iterdir()]
print("left:", *(name for name in left if not name.startswith("torch")))  # torch's own are torch's
Checkpoints.load = careless
print("careless")
none = dict.fromkeys(("kills", "terminations", "last_steps", "flips", "lost", "rank_changes"), 0)
sys.exit(10 * status + faults.main(replace(trials, **none, full_disks=1)))
"""


def test_every_fault_is_survived_and_a_resume_that_loses_the_last_bits_is_found_out(tmp_path: Path) -> None:
    flags = [text for name, count in SHORT.items() for text in (f"--{name}", str(count))]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-c", CARELESS, str(TESTS), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    survived, _, found_out = done.stdout.partition("left:")
    lines = [line.split("│") for line in survived.splitlines() if line.startswith("│")]
    counts = {cells[1].strip(): [int(cells[place]) for place in (2, 3, 4)] for cells in lines}
    kills = [numbers for fault, numbers in counts.items() if fault.startswith("kill -9: ")]
    assert [runs for runs, _, _ in kills] == [1]
    assert sum(injected for _, injected, _ in kills) >= 1
    assert len(counts) == 1 + 1 + 1 + 1 + 2
    assert all(survived == runs <= injected for runs, injected, survived in counts.values())
    left, careless, found_out = found_out.partition("careless\n")
    assert careless and not left.strip()
    assert "ended with other bits" in found_out
