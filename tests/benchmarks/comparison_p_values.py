"""Are the p-values of `ctr.compare` uniform where both models are one and the same, but for the seeds?

python tests/benchmarks/comparison_p_values.py --repeats 40

Every repeat trains the model with other seeds, and scores the same rows of test. Beside it stands what DeLong's test
makes of the first run of each "model", which takes no seed into account.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import ctrlib as ctr
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.selection.comparison import _scored


def prepared(folder: Path, rows: int) -> Path:
    """Ids with a signal, half of the rows to test on."""
    frame, _ = generate(Teacher(rows, cardinalities=(200, 100, 20), num_numeric=1, seed=5))
    ctr.prepare(frame, folder, split=(4, 1, 5), log=None)
    return folder


def by_delong(data: Path, first: Path, second: Path) -> float:
    """The p-value of DeLong's paired test of two runs."""
    a, b = (_scored(data, folder) for folder in (first, second))
    return ctr.metrics.auc_paired_test(a.labels[:, 0], a.logits[:, 0], b.logits[:, 0]).p_value


def main() -> None:
    """Print the p-values of every repeat, and a Kolmogorov-Smirnov test of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=6000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    training = {"max_epochs": 3, "batch_size": 256, "learning_rate": 5e-3, "patience": 3}
    config: dict[str, Any] = {"model": "mlp", "embedding_dim": 8, "hidden": [32], "training": training}
    found: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = prepared(Path(temporary) / "data", arguments.rows)
        for repeat in range(arguments.repeats):
            out = Path(temporary) / f"out{repeat}"
            first = 2 * arguments.seeds * repeat
            result = ctr.compare(data, {"a": config, "b": config}, out, seeds=arguments.seeds, seed=first)
            test = result["tests"][0]
            delong = by_delong(data, out / f"a-{first}", out / f"b-{first + arguments.seeds}")
            found.append((test["auc"]["p_value"], test["log_loss"]["p_value"], delong))
            said = dict(zip(("auc", "log_loss", "delong"), (round(p, 4) for p in found[-1])))
            print(json.dumps({"repeat": repeat, **said, "test_auc_sd": result["models"][0]["test_auc_sd"]}), flush=True)
    for name, values in zip(("AUC", "log-loss", "DeLong on one run of each"), np.array(found).T):
        ks = stats.kstest(values, "uniform")
        print(
            f"{name}: Kolmogorov-Smirnov distance {ks.statistic:.3f}, p {ks.pvalue:.3g}; "
            f"{np.mean(values < 0.05):.1%} below 0.05, {np.mean(values < 0.5):.1%} below 0.5"
        )


if __name__ == "__main__":
    main()
