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
from rich.console import Console
from scipy import stats

import ctrlib as ctr
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.selection.comparison import value_of
from ctrlib.selection.significance import auc_influence, difference_of_means, log_loss_influence
from ctrlib.training import Scores


def prepared(folder: Path, rows: int) -> Path:
    """Ids with a signal, half of the rows to test on."""
    frame, _ = generate(Teacher(rows, cardinalities=(200, 100, 20), num_numeric=1, seed=5))
    ctr.prepare(frame, folder, split=(4, 1, 5), log=None)
    return folder


def trained(data: Path, config: dict[str, Any], seed: int) -> Scores:
    """The rows of test as a run scores them; what `ctr.compare` does but for the folders."""
    how = {**config, "training": {**config["training"], "seed": seed, "checkpoint_seconds": None}}
    model, _ = ctr.run(data, how, score_test=False, console=Console(quiet=True))
    return ctr.predict(model, ctr.Loader(data, "test", batch_size=8192))


def tested(runs: list[Scores], influence: Any) -> tuple[float, float]:
    """The p-value of the first half of the runs against the second, and the spread of the first half."""
    pairs = [value_of(scores, influence) for scores in runs]
    values, rows = np.array([value for value, _ in pairs]), np.stack([rows for _, rows in pairs])
    half = len(runs) // 2
    return difference_of_means(values[:half], values[half:], rows @ rows.T).p_value, float(values[:half].std(ddof=1))


def main() -> None:
    """Print the p-values of every repeat, and a Kolmogorov-Smirnov test of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Trained well enough for seeds to differ about normally, which the t distribution takes for granted: where a run in
    # three fails to learn at all, three seeds tell little.
    training = {"max_epochs": 5, "patience": 5, "batch_size": 128, "learning_rate": 1e-2}
    config: dict[str, Any] = {"model": "fm", "embedding_dim": 4, "training": training}
    found: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        data = prepared(Path(temporary) / "data", arguments.rows)
        for repeat in range(arguments.repeats):
            first = 2 * arguments.seeds * repeat
            runs = [trained(data, config, first + number) for number in range(2 * arguments.seeds)]
            a, b = runs[0], runs[arguments.seeds]
            delong = ctr.metrics.auc_paired_test(a.labels[:, 0], a.logits[:, 0], b.logits[:, 0]).p_value
            (auc, spread), (loss, _) = tested(runs, auc_influence), tested(runs, log_loss_influence)
            found.append((auc, loss, delong))
            said = dict(zip(("auc", "log_loss", "delong"), (round(p, 4) for p in found[-1])))
            print(json.dumps({"repeat": repeat, **said, "test_auc_sd": round(spread, 5)}), flush=True)
    for name, values in zip(("AUC", "log-loss", "DeLong on one run of each"), np.array(found).T):
        ks = stats.kstest(values, "uniform")
        print(
            f"{name}: Kolmogorov-Smirnov distance {ks.statistic:.3f}, p {ks.pvalue:.3g}; "
            f"{np.mean(values < 0.05):.1%} below 0.05, {np.mean(values < 0.5):.1%} below 0.5"
        )


if __name__ == "__main__":
    main()
