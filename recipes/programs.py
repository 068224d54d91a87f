"""What recipes share that run other libraries: each is a process of its own, by the python that has it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

HERE = Path(__file__).parent
SPLITS = ("train", "valid", "test")


class Program:
    """A process that `peers/worker.py` serves.

    Args:
        name: of the script `peers/NAME_speed.py`.
        python: what runs it.
        settings: the arguments of its class.
        work: folder for its log; made if it is not there.
        clock: what its seconds are of.
        threads: of torch and others in it.
    """

    def __init__(
        self,
        name: str,
        python: Path,
        settings: dict[str, Any],
        *,
        work: Path,
        clock: Literal["wall", "cpu"] = "wall",
        threads: int,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, work / "log.txt"
        counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS")}
        read, write = os.pipe()
        told = {"SPEED_CLOCK": clock, "SPEED_STARTED": str(time.perf_counter()), "SPEED_ANSWERS": str(write)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(python), str(HERE / "peers" / f"{name}_speed.py")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                pass_fds=[write],
                env={**os.environ, **counts, **told},
            )
        os.close(write)
        self.answers = os.fdopen(read)
        self._send(settings)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self.answers, self.process, contextlib.suppress(BrokenPipeError):  # it may have ended before
            assert self.process.stdin is not None
            self.process.stdin.close()

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        print(json.dumps(value), file=self.process.stdin, flush=True)

    def do(self, method: str, **arguments: Any) -> dict[str, Any]:
        """What the method found, seconds, share of others, peak of memory.

        Raises:
            RuntimeError: the program ended instead.
        """
        self._send({"do": method, "with": arguments})
        if not (line := self.answers.readline()):
            raise RuntimeError(f"{self.name} ended in {method}; the end of {self.log}:\n{self.log.read_text()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def unpack(raw: Path, folder: Path) -> None:
    """Put train.csv, valid.csv and test.csv of a folder, which may be .csv.gz there, into a new one."""
    folder.mkdir(parents=True)
    for split in SPLITS:
        path = raw / f"{split}.csv"
        content = path.read_bytes() if path.exists() else gzip.decompress((raw / f"{split}.csv.gz").read_bytes())
        (folder / f"{split}.csv").write_bytes(content)


def installed(python: Path, distribution: str) -> str:
    """Name and version of what an environment has."""
    code = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return f"{distribution} {done.stdout.strip()}"
