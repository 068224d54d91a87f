"""What a compressed model saves: file, resident memory and time, beside the model that it came from.

    python tests/benchmarks/compressed_inference.py runs/clicks runs/clicks_small data/clicks

Each model is loaded and scores the test split in processes of its own, in turn. Memory is what the process holds with
the model loaded, less what the same process holds after importing everything. Compare ratios.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Arguments:
    """Compare two model folders."""

    before: Positional[Path]
    """The original."""
    after: Positional[Path]
    """The compressed one."""
    data: Positional[Path]
    """Prepared folder."""
    repeats: int = 3
    """Processes of each."""
    batch_size: int = 4096
    """Rows per step."""


def resident() -> int:
    """Bytes that this process holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, data: Path, batch_size: int, answer: Any) -> None:
    """Load a model and score the test split."""
    import ctrlib as ctr
    from ctrlib.training.allocator import keep_freed_memory

    keep_freed_memory()
    batches = list(ctr.Loader(data, "test", batch_size=batch_size))
    predictor_of = ctr.Predictor.load
    before = resident()
    model = predictor_of(folder).model
    loaded = resident()
    seconds = []
    with torch.no_grad():
        for _ in range(5):
            started = time.perf_counter()
            for batch in batches:
                model(batch)
            seconds.append(time.perf_counter() - started)
    rows = sum(batch.size for batch in batches)
    answer.put({"resident": loaded - before, "samples_per_second": rows / min(seconds)})


def main(arguments: Arguments) -> None:
    """Print one JSON object."""
    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.repeats):
        for name, folder in (("before", arguments.before), ("after", arguments.after)):
            answer: Any = context.Queue()
            process = context.Process(target=measure, args=(folder, arguments.data, arguments.batch_size, answer))
            process.start()
            found[name].append(answer.get())
            process.join()
    result: dict[str, Any] = {}
    for name, folder in (("before", arguments.before), ("after", arguments.after)):
        result[name] = {
            "file_bytes": (folder / "model.safetensors").stat().st_size,
            "resident_bytes": statistics.median(one["resident"] for one in found[name]),
            "samples_per_second": [round(one["samples_per_second"]) for one in found[name]],
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
