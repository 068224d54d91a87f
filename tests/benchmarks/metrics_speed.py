"""How fast are the AUCs beside scikit-learn, and how close is the histogram to the exact one?

python tests/benchmarks/metrics_speed.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from ctrlib.metrics import StreamingAUC, StreamingMetrics, auc, auc_delong, evaluate_binary, gauc


def planted(num_rows: int, base_rate: float, seed: int = 0) -> tuple[Any, Any]:
    """Labels drawn from normal logits whose mean gives the base rate."""
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=num_rows)
    low, high = -20.0, 10.0
    for _ in range(40):
        bias = (low + high) / 2
        too_many = (1 / (1 + np.exp(-signal - bias))).mean() > base_rate
        low, high = (low, bias) if too_many else (bias, high)
    logits = signal + low
    return (rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.float32), logits.astype(np.float32)


def streamed(labels: Any, scores: Any, batch: int) -> float:
    """AUC by `StreamingAUC` in batches."""
    metric = StreamingAUC()
    for start in range(0, len(labels), batch):
        metric.update(labels[start : start + batch], scores[start : start + batch])
    return metric.compute()


def all_streamed(labels: Any, scores: Any, batch: int) -> dict[str, float]:
    """Every streaming metric, in batches."""
    metrics = StreamingMetrics()
    for start in range(0, len(labels), batch):
        metrics.update(labels[start : start + batch], scores[start : start + batch])
    return metrics.compute()


def best_ms(function: Callable[[], Any], repeats: int = 5) -> float:
    """The fastest of some calls, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def main() -> None:
    """Print both tables."""
    num_rows = 1_000_000
    labels, scores = planted(num_rows, 0.25)
    users = np.random.default_rng(1).integers(0, num_rows // 20, num_rows)
    reference = best_ms(lambda: roc_auc_score(labels, scores), repeats=3)
    print(f"{num_rows} rows, float32, best of 5\n{'sklearn roc_auc_score':34} {reference:8.1f} ms")
    for name, function in (
        ("StreamingAUC, one batch", lambda: streamed(labels, scores, num_rows)),
        ("StreamingAUC, batches of 4096", lambda: streamed(labels, scores, 4096)),
        ("StreamingMetrics, batches of 4096", lambda: all_streamed(labels, scores, 4096)),
        ("auc, float32", lambda: auc(labels, scores)),
        ("auc, float32, 1000 distinct scores", lambda: auc(labels, np.round(scores, 2))),
        ("auc, float64", lambda: auc(labels, scores.astype(np.float64))),
        ("auc_delong", lambda: auc_delong(labels, scores)),
        ("gauc, 50 000 users", lambda: gauc(labels, scores, users)),
        ("evaluate_binary with groups", lambda: evaluate_binary(labels, scores, groups=users)),
    ):
        ms = best_ms(function)
        print(f"{name:34} {ms:8.1f} ms {reference / ms:6.1f}x")
    print("\nhistogram minus exact, 2M rows, largest of 3 seeds")
    for base_rate in (0.3, 0.01, 0.0015):
        gaps: dict[str, list[float]] = {"logits": [], "probabilities": []}
        for seed in range(3):
            labels, scores = planted(2_000_000, base_rate, seed)
            for name, values in (("logits", scores), ("probabilities", 1 / (1 + np.exp(-scores)))):
                gaps[name].append(abs(streamed(labels, values, 65536) - auc(labels, values)))
        print(f"base rate {base_rate:<7}" + "".join(f" {name} {max(gap):.1e}" for name, gap in gaps.items()))


if __name__ == "__main__":
    main()
