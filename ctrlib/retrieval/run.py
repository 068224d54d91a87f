"""From a log to a fitted method and numbers that can be trusted.

Two ways to choose the epoch (`selected_on` in every record):

* "valid": a share of each training log is held out at random, the method is fitted on the rest, and the best epoch by
  it is chosen; then the method is fitted anew on all pairs, for as many epochs. The test log is looked at once.
* "test": the way of the published numbers of UltraGCN and LightGCN, only where `select_on_test` says so: fitted on all
  pairs, and the epoch with the best test metric is reported. Such a number is better than what can be had in practice.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ctrlib.errors import ArgumentError, check_whole
from ctrlib.retrieval.evaluate import Of, Over, evaluate, evaluate_with_errors
from ctrlib.retrieval.folder import Trained
from ctrlib.retrieval.interactions import Aligned, Interactions
from ctrlib.retrieval.methods import Retriever
from ctrlib.retrieval.table import build
from ctrlib.training.record import KEY, line_of, record_of

Say = Callable[[str], None]


def train(
    log: Interactions,
    config: Mapping[str, Any],
    *,
    test: Aligned | None = None,
    select_on_test: bool = False,
    valid_share: float = 0.1,
    metric: str = "recall@20",
    ks: Sequence[int] = (20,),
    over: Over = "with_test",
    recall_of: Of = "relevant",
    map_of: Of = "relevant",
    every: int = 1,
    refit: bool = True,
    seed: int = 0,
    say: Say = lambda line: None,
) -> Trained:
    """Fit a method and measure it.

    Args:
        log: the training pairs.
        config: the method, as `ctrlib.retrieval.table.build` takes it.
        test: what to report on.
        select_on_test: choose the epoch on test; see the top of the module.
        valid_share: share of the pairs held out for validation; 0 for none, which fits once, for all epochs.
        metric: that the epoch is chosen by, such as recall@20 or ndcg@20.
        ks, over, recall_of, map_of: as in `ctrlib.retrieval.evaluate`.
        every: epochs from one look at the metric to the next; the last epoch is looked at in any case.
        refit: fit anew on all pairs.
        seed: number that all draws come from.
        say: gets a line for each look.

    Raises:
        ArgumentError: a setting is none; or test is to be selected on, and there is none.
    """
    check_whole(1, every=every)
    check_whole(0, seed=seed)
    if select_on_test and test is None:
        raise ArgumentError("select_on_test (--select-on-test) needs a test log (--test)")
    name, _, k = metric.rpartition("@")
    if not k.isdigit() or not name:
        raise ArgumentError(f"metric is {metric!r}, expected a name and a number of items, such as recall@20")
    wanted = sorted({*ks, int(k)})
    options: dict[str, Any] = {"ks": wanted, "over": over, "recall_of": recall_of, "map_of": map_of}
    record: dict[str, Any] = {"seed": seed, "metric": metric, "over": over, "recall_of": recall_of, "map_of": map_of}
    started = fit_started = time.perf_counter()
    if select_on_test or valid_share > 0:
        part, judge = (log, test) if select_on_test else log.split(valid_share, seed)
        assert judge is not None
        what = "test" if select_on_test else "valid"
        method = build(config)
        again = refit and not select_on_test
        best = _Best(method, part, judge, metric, options, every, not again, lambda line: say(f"{what} {line}"))
        method.fit(part, seed=seed, watch=best)
        best.finish()
        record |= {"selected_on": what, "best_epoch": best.epoch, "curve": best.curve}
        record |= {f"{what}_{key}": value for key, value in best.metrics.items()}
        record["judged_by"] = fingerprint(judge)
        if best.state is not None:
            method.load(best.state)
        if again:
            fit_started, chosen = time.perf_counter(), best.epoch
            del best, method  # of some methods they are gigabytes
            method = build(config).fit(log, seed=seed, watch=lambda epoch: epoch == chosen)
    else:
        part, method = log, build(config).fit(log, seed=seed)
        record |= {"selected_on": "nothing", "best_epoch": None}
    record["seconds"], record["fit_seconds"] = (time.perf_counter() - since for since in (started, fit_started))
    if test is not None and not select_on_test:
        found, errors = evaluate_with_errors(method.scores, log.matrix, test, **options)
        record |= {f"test_{key}": value for key, value in found.items()}
    record[KEY] = _recorded(config, record, log, test, {} if test is None or select_on_test else errors)
    record["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kept = log if refit or select_on_test else part
    return Trained(method, kept, dict(config), record)


def _recorded(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    log: Interactions,
    test: Aligned | None,
    errors: Mapping[str, float],
) -> dict[str, Any]:
    """The record of the run (`ctrlib.training.record`); without test, of what it was chosen by."""
    split = "valid" if test is None else "test"
    measured = [
        line_of(
            "relevant", key.removeprefix(f"{split}_"), value, errors.get(key.removeprefix(f"{split}_"), math.nan), split
        )
        for key, value in record.items()
        if key.startswith(f"{split}_") and "@" in key
    ]
    digest = hashlib.sha256(fingerprint(test).encode() if test is not None else b"")
    for part in (log.matrix.indptr, log.matrix.indices):
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    selected = record["selected_on"]
    return record_of(
        task="retrieval",
        model=str(config["method"]),
        engine="",
        seed=record["seed"],
        data="",
        schema_hash="",
        rows_hash=digest.hexdigest(),
        chosen_by="nothing" if selected == "nothing" else f"{selected} {record['metric']}",
        independent="users",
        measured=measured,
    )


class _Best:
    """Looks at a metric every so many epochs, and keeps what the best epoch has learnt if that is wanted."""

    def __init__(
        self,
        method: Retriever,
        log: Interactions,
        judge: Aligned,
        metric: str,
        options: dict[str, Any],
        every: int,
        keep: bool,
        say: Say,
    ) -> None:
        self.method, self.log, self.judge, self.metric = method, log, judge, metric
        self.options, self.every, self.keep, self.say = options, every, keep, say
        self.epoch, self._seen, self._last = 0, -1, 0
        self.metrics: dict[str, float] = {}
        self.curve: list[tuple[int, float]] = []
        self.state: dict[str, Tensor] | None = None

    def __call__(self, epoch: int) -> bool:
        self._last = epoch
        if epoch % self.every == 0:
            self._look(epoch)
        return False

    def finish(self) -> None:
        """The last epoch, or what has no epochs."""
        if self._seen != self._last:
            self._look(self._last)

    def _look(self, epoch: int) -> None:
        self._seen = epoch
        metrics = evaluate(self.method.scores, self.log.matrix, self.judge, **self.options)
        if self.metric not in metrics:
            raise ArgumentError(f"there is no metric {self.metric}; expected one of {', '.join(metrics)}")
        self.curve.append((epoch, metrics[self.metric]))
        self.say(f"epoch {epoch}: {self.metric} {metrics[self.metric]:.5f}")
        if not self.metrics or metrics[self.metric] > self.metrics[self.metric]:
            self.metrics, self.epoch = metrics, epoch
            if self.keep:
                self.state = {name: tensor.clone() for name, tensor in self.method.state().items()}


def fingerprint(judge: Aligned) -> str:
    """What a log to evaluate on is known by: the same for the same pairs."""
    digest = hashlib.sha256()
    for part in (judge.matrix.indptr, judge.matrix.indices, judge.unknown_items):
        digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def evaluate_trained(
    trained: Trained, test: Aligned, *, select_on_test: bool = False, **options: Any
) -> dict[str, Any]:
    """Metrics of a fitted method on a log.

    Args:
        trained: as `train` gives it, or `ctrlib.retrieval.folder.load`.
        test: what is relevant.
        select_on_test: accept a log that the epoch was selected on; the result says so.
        options: as in `ctrlib.retrieval.evaluate`.

    Raises:
        ArgumentError: the epoch was selected on this log, and that was not accepted.
    """
    chosen_here = trained.record.get("judged_by") == fingerprint(test)
    if chosen_here and not select_on_test:
        raise ArgumentError(
            "the epoch of this method was selected on this very log, so its metrics there are better than it is: "
            "evaluate on another log, or say select_on_test (--select-on-test) to have them marked so"
        )
    found: dict[str, Any] = evaluate(trained.method.scores, trained.log.matrix, test, **options)
    return {**found, "selected_on_this_log": chosen_here}
