"""All of them of one set of predictions."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ctrlib.metrics.inputs import checked
from ctrlib.metrics.probability import calibration, calibration_se, log_loss, normalized_entropy, reliability, sigmoid
from ctrlib.metrics.ranking import auc, auc_delong, average_precision, gauc


def evaluate_binary(
    labels: npt.ArrayLike,
    logits: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
) -> dict[str, float]:
    """Every metric of this module for a final report, exact.

    Keys: auc, auc_se (DeLong; nan if weights are not all 0 or 1), log_loss, normalized_entropy, calibration,
    calibration_se, ece, ece_by_chance, pr_auc, rows, positives (rows of weight 0 not counted); with groups also gauc,
    gauc_groups, gauc_groups_dropped and gauc_rows_dropped.

    Shape: labels (B,), logits (B,), groups (B,) or None, weights (B,) or None.

    >>> report = evaluate_binary([1, 0, 1, 0], [2.0, -1.0, 0.5, 0.5], groups=[7, 7, 8, 8])
    >>> report["auc"], report["gauc"], report["rows"], report["positives"]
    (0.875, 0.75, 4.0, 2.0)
    """
    positive, z, weight, group = checked(labels, logits, weights, name="logits", groups=groups)
    probabilities = sigmoid(z)
    bins = reliability(positive, probabilities, weight)
    report = {
        "auc": auc(positive, z, weight),
        "auc_se": auc_delong(positive, z).standard_error if weight is None else math.nan,
        "log_loss": log_loss(positive, z, weight),
        "normalized_entropy": normalized_entropy(positive, z, weight),
        "calibration": calibration(positive, probabilities, weight),
        "calibration_se": calibration_se(positive, probabilities, weight),
        "ece": bins.error,
        "ece_by_chance": bins.error_by_chance,
        "pr_auc": average_precision(positive, z, weight),
        "rows": float(len(z)),
        "positives": float(np.count_nonzero(positive)),
    }
    if group is not None:
        result = gauc(positive, z, group, weight)
        report["gauc"] = result.value
        report["gauc_groups"] = float(result.groups_used)
        report["gauc_groups_dropped"] = float(result.groups_dropped)
        report["gauc_rows_dropped"] = float(result.rows_dropped)
    return report
