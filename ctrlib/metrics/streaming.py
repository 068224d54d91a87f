"""The same over batches and ranks, in fixed memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.errors import ArgumentError
from ctrlib.metrics.inputs import Bools, Floats, checked
from ctrlib.metrics.probability import entropy_of_rate, row_losses, sigmoid
from ctrlib.metrics.ranking import auc_from_blocks, ordered_bits

# 18 of a float32's 32 bits: sign, exponent and 9 bits of mantissa. A bin is 0.2% wide relative to the score, and only
# the order *within* a bin is lost (it counts one half), a second-order error: ~1e-6 of AUC. 2 x 2 MiB of counts.
BIN_BITS = 18
NUM_BINS = 1 << BIN_BITS


class StreamingAUC:
    """AUC over batches and ranks in fixed memory: a histogram over the bits of the float32 score, 2 x 2^18 counts.

    The bits of a float, mapped so that unsigned order is the floats' order, make bins whose width is relative to the
    score: no range to choose, and as fine at logit -9 as at 0. Ties within a bin count one half. The difference to
    `auc` is about 1e-6 on smooth scores, at every base rate. Give it logits: probabilities close to 1 crowd into few
    bins.

    `merge` adds counts, so the result is bit-equal in any order of batches and ranks as long as weights are whole
    numbers (padding is 0 or 1); with fractional weights it is equal to rounding.

    Shape: update takes labels (B,), scores (B,), weights (B,) or None.

    >>> left, right = StreamingAUC(), StreamingAUC()
    >>> left.update([1, 0], [2.0, -1.0])
    >>> right.update([1, 0], [0.5, 0.5])
    >>> left.merge(right)
    >>> left.compute()
    0.875
    """

    def __init__(self) -> None:
        self.counts = np.zeros((2, NUM_BINS))  # [label, bin]; float64 is exact up to 2^53 rows

    def update(self, labels: npt.ArrayLike, scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Add a batch."""
        self._add(*checked(labels, scores, weights)[:3])

    def _add(self, positive: Bools, score: Floats, weight: Floats | None) -> None:
        counts = self.counts.reshape(-1)
        for start in range(0, len(score), 1 << 15):  # pieces whose intermediate arrays stay in the cache
            rows = slice(start, start + (1 << 15))
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf: the last bin, still in order
                bins = ordered_bits(score[rows].astype(np.float32, copy=False))
            bins >>= np.uint32(32 - BIN_BITS)
            bins |= positive[rows].astype(np.uint32) << np.uint32(BIN_BITS)
            np.add.at(counts, bins, 1.0 if weight is None else weight[rows])

    def merge(self, other: StreamingAUC) -> None:
        """Add the rows that another has seen, such as another rank's."""
        self.counts += other.counts

    def compute(self) -> float:
        """The AUC so far; nan while there is one class only."""
        occupied = np.flatnonzero(self.counts[0] + self.counts[1])  # logits use a few percent of the bins
        return auc_from_blocks(self.counts[1, occupied], self.counts[0, occupied])

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of the counts; sums of it over ranks are valid states."""
        return {"counts": self.counts.copy()}

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Replace the counts.

        Raises:
            ValueError: the state is not one of this class.
        """
        self.counts = _from_state(state, {"counts": self.counts.shape})["counts"]


def _from_state(
    state: dict[str, npt.NDArray[Any]], shapes: dict[str, tuple[int, ...] | None]
) -> dict[str, npt.NDArray[np.float64]]:
    if set(state) != set(shapes):
        raise ArgumentError(
            f"state must have keys {sorted(shapes)}, got {sorted(state)}: load what state_dict() returned"
        )
    arrays = {key: np.array(value, dtype=np.float64) for key, value in state.items()}
    for key, shape in shapes.items():
        if shape is not None and arrays[key].shape != shape:
            raise ArgumentError(
                f"state {key!r} must have shape {shape}, got {arrays[key].shape}: it is of another version of ctrlib"
            )
    return arrays


class StreamingMetrics:
    """AUC, log-loss, normalised entropy and calibration over batches and ranks, in fixed memory.

    Sums over batches are exact (Shewchuk's non-overlapping partial sums, as in `math.fsum`), so merging is bit-equal in
    any order of batches and ranks; for AUC with fractional weights see `StreamingAUC`.

    Shape: update takes labels (B,), logits (B,), weights (B,) or None.

    >>> metrics = StreamingMetrics()
    >>> metrics.update([1, 0], [2.0, -1.0])
    >>> metrics.update([1, 0], [0.5, 0.5], weights=[1, 0])  # the last row is padding
    >>> result = metrics.compute()
    >>> result["auc"], result["rows"], round(result["log_loss"], 4)
    (1.0, 3.0, 0.3048)
    """

    def __init__(self) -> None:
        self._auc = StreamingAUC()
        self._sums: dict[str, list[float]] = {name: [] for name in ("log_loss", "predicted", "positive", "total")}
        self._rows = 0
        self._positives = 0

    def update(self, labels: npt.ArrayLike, logits: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> None:
        """Add a batch."""
        positive, z, weight, _ = checked(labels, logits, weights, name="logits")
        self._auc._add(positive, z, weight)
        columns = {
            "log_loss": row_losses(positive, z),
            "predicted": sigmoid(z),
            "positive": positive.astype(np.float64),
            "total": np.ones(len(z)),
        }
        for name, column in columns.items():
            _add_exactly(self._sums[name], float(column.sum() if weight is None else column @ weight))
        self._rows += len(z)
        self._positives += int(np.count_nonzero(positive))

    def merge(self, other: StreamingMetrics) -> None:
        """Add the rows that another has seen, such as another rank's."""
        self._auc.merge(other._auc)
        for name, partials in other._sums.items():
            for value in tuple(partials):
                _add_exactly(self._sums[name], value)
        self._rows += other._rows
        self._positives += other._positives

    def compute(self) -> dict[str, float]:
        """auc, log_loss, normalized_entropy, calibration, rows and positives so far; nan where undefined."""
        sums = {name: math.fsum(partials) for name, partials in self._sums.items()}
        loss = sums["log_loss"] / sums["total"] if sums["total"] else math.nan
        entropy = entropy_of_rate(sums["positive"] / sums["total"]) if sums["total"] else 0.0
        return {
            "auc": self._auc.compute(),
            "log_loss": loss,
            "normalized_entropy": loss / entropy if entropy else math.nan,
            "calibration": sums["predicted"] / sums["positive"] if sums["positive"] else math.nan,
            "rows": float(self._rows),
            "positives": float(self._positives),
        }

    def state_dict(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as numpy arrays, for a checkpoint or for another rank to load and merge (lengths of sums vary)."""
        state: dict[str, npt.NDArray[Any]] = {name: np.array(partials) for name, partials in self._sums.items()}
        return {**self._auc.state_dict(), **state, "rows": np.array([self._rows, self._positives], dtype=np.int64)}

    def load_state_dict(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Replace everything.

        Raises:
            ValueError: the state is not one of this class.
        """
        arrays = _from_state(state, {"counts": self._auc.counts.shape, "rows": (2,), **dict.fromkeys(self._sums)})
        self._auc.counts = arrays["counts"]
        self._sums = {name: arrays[name].tolist() for name in self._sums}
        self._rows, self._positives = (int(count) for count in arrays["rows"])


def _add_exactly(partials: list[float], value: float) -> None:
    """Add to a sum held as floats of growing size that do not overlap, without any rounding (Shewchuk 1997)."""
    kept = 0
    for partial in partials:
        big, small = (value, partial) if abs(value) >= abs(partial) else (partial, value)
        value = big + small
        rest = small - (value - big)
        if rest:
            partials[kept] = rest
            kept += 1
    partials[kept:] = [value]
