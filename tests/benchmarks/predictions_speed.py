"""How long does `ctrlib evaluate` take for many predictions, in how much memory, and is its GAUC that of a loop?

python tests/benchmarks/predictions_speed.py --rows 10000000 --users 1000000
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import tyro


@dataclass(frozen=True)
class Arguments:
    """Predictions of a known model, a tenth of whose labels are 1."""

    rows: int = 10_000_000
    users: int = 1_000_000
    text: bool = False
    """Users are texts, not numbers."""
    shops: int = 15
    """Values of the column that --by tells apart; 0 for none."""


def loop_over_groups(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """GAUC, each user's AUC over all its pairs: nothing is shared with ctrlib but the definition."""
    order = np.argsort(users, kind="stable")
    ends = np.flatnonzero(np.diff(users[order], append=-1)) + 1
    total = used = 0.0
    start = 0
    for end in ends.tolist():
        mine = order[start:end]
        start = end
        p, n = scores[mine][labels[mine] == 1], scores[mine][labels[mine] == 0]
        if len(p) and len(n):
            won = (p[:, None] > n).sum() + 0.5 * (p[:, None] == n).sum()
            total += len(mine) * won / (len(p) * len(n))
            used += len(mine)
    return total / used if used else math.nan


def main(arguments: Arguments) -> None:
    """Print seconds, memory, and the difference of the two GAUCs."""
    draw = np.random.default_rng(0)
    logits = draw.normal(-2.6, 1, arguments.rows)
    p = 1 / (1 + np.exp(-logits))
    labels = (draw.random(arguments.rows) < p).astype(np.int8)
    scores = np.round(p, 3)  # so that there are ties
    users = draw.integers(0, arguments.users, arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.parquet"
        user = pl.Series("user", users)
        columns = {"click": labels, "p": p, "rounded": scores}
        frame = pl.DataFrame(columns).with_columns(user.cast(pl.String) if arguments.text else user)
        shop = draw.integers(0, max(1, arguments.shops), arguments.rows)
        frame.with_columns(pl.Series("shop", shop).cast(pl.String)).write_parquet(path)
        del frame, logits, shop
        by = ["--by", "shop"] if arguments.shops else []
        call = [
            sys.executable,
            "-m",
            "ctrlib.cli",
            "evaluate",
            str(path),
            "--label",
            "click",
            "--group",
            "user",
            "--json",
        ]
        found = {}
        for name, more in (("p", by), ("rounded", [])):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            process = subprocess.Popen([*call, "--score", name, *more], stdout=subprocess.PIPE)
            said = process.communicate()[0]
            seconds = time.perf_counter() - started
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            computed = after.ru_utime - before.ru_utime
            print(
                f"{name}{' by shop' if more else ''}: {seconds:.1f} s ({computed:.1f} s of computing on "
                f"{os.cpu_count()} cores), at most {after.ru_maxrss / 1024:,.0f} MiB"
            )
            found[name] = json.loads(said)["scores"][0]["gauc"]
    for name, values in (("p", p), ("rounded", scores)):
        expected = loop_over_groups(labels, values, users)
        print(f"GAUC of {name}: {found[name]:.12f}, by a loop over users {expected:.12f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
