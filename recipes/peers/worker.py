"""What the programs that `recipes/speed.py` compares share: a process that takes commands and times itself.

It runs in a peer's own environment, so it needs nothing but Python, and torch where the program has it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

CLOCK = os.environ.get("SPEED_CLOCK", "wall")


def now() -> float:
    """Seconds by the clock that measures: the wall's, or those of processors that this process and its children had.

    The wall's is the same in all processes of a machine.
    """
    return time.perf_counter() if CLOCK == "wall" else _own_seconds()


class Program:
    """What all programs are given, and what most do alike: `train` gives batches, `rows` has those in memory."""

    model: Any
    train: Any
    rows: Any

    def __init__(
        self,
        *,
        raw: str,
        work: str,
        ids: list[str],
        numbers: list[str],
        batch_size: int,
        embedding_dim: int,
        l2: float,
        seed: int,
        network_l2: float = 0.0,
    ) -> None:
        self.raw, self.work, self.ids, self.numbers = raw, work, ids, numbers
        self.batch_size, self.embedding_dim, self.l2, self.seed = batch_size, embedding_dim, l2, seed
        self.network_l2 = network_l2

    def load(self) -> None:
        """All batches of an epoch."""
        for _ in self.train:
            pass

    def first(self, rows: int) -> Any:
        """So many of the rows in memory, as the model takes them."""
        return {name: values[:rows] for name, values in self.rows.items()}

    def infer(self, rows: int, calls: int) -> None:
        """Forward passes."""
        import torch

        self.model.eval()
        batch = self.first(rows)
        with torch.no_grad():
            for _ in range(calls):
                self.model(batch)


def serve(program: type) -> None:
    """Answer lines of JSON on standard input, one by one, until it ends.

    Answers go to the open file whose number the environment says, since libraries print what they like, from their
    import on.

    The first line holds the arguments of `program`; each other one `{"do": METHOD, "with": {ARGUMENT: VALUE}}`. The
    answer is a line of JSON: what the method returned as "found", the "seconds" that it took, those since the process
    was started ("age"), the share of all processors that other processes had meanwhile ("others"), and this process's
    peak of memory so far ("peak_mib").
    """
    born = float(os.environ["SPEED_STARTED"]) if CLOCK == "wall" else 0.0
    answers = os.fdopen(int(os.environ["SPEED_ANSWERS"]), "w")
    instance = program(**json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        command = json.loads(line)
        method = getattr(instance, command["do"])
        before = _machine_seconds(), _own_seconds(), time.perf_counter(), now()
        found = method(**command["with"])
        after = _machine_seconds(), _own_seconds(), time.perf_counter(), now()
        machine, own, wall, seconds = (late - early for early, late in zip(before, after))
        answer = {
            "found": found,
            "seconds": seconds,
            "age": after[-1] - born,
            "others": min(1.0, max(0.0, (machine - own) / wall / (os.cpu_count() or 1))),  # the system counts in ticks
            "peak_mib": _peak_mib(),
        }
        print(json.dumps(answer), file=answers, flush=True)


def _machine_seconds() -> float:
    """Seconds in which a processor was not idle, summed over all of them, since the machine started."""
    ticks = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Seconds of processors that this process has had, and its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _peak_mib() -> float:
    """Of this process alone. The system's `ru_maxrss` would begin at what the parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
