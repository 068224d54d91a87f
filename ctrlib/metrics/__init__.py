"""How good are binary predictions: ranking (AUC, GAUC, PR-AUC) and probabilities (log-loss, calibration). numpy only.

Conventions, the same in every function:

* `labels` (B,) are 0 or 1 (numbers or booleans); scores, logits, probabilities and `weights` are (B,) and finite.
  Anything else is a ValueError that says what came. Shape legend: B examples.
* A row of weight 0 is padding: it is dropped first and neither its label nor its score is looked at.
* Ties count one half, so the order of the rows never matters: constant scores have AUC 0.5.
* A metric that the data do not define (AUC of one class only) is nan, not an error: a training loop must survive a
  batch or a group without positives.

Sources: DeLong et al., "Comparing the areas under two or more correlated ROC curves", Biometrics 1988; Sun & Xu, "Fast
implementation of DeLong's algorithm", IEEE Signal Processing Letters 2014 (https://doi.org/10.1109/LSP.2014.2337313);
Obuchowski, "Nonparametric analysis of clustered ROC curve data", Biometrics 1997 (https://doi.org/10.2307/2533958);
Zhou et al., "Deep Interest Network", KDD 2018 (GAUC; https://arxiv.org/abs/1706.06978); He et al., "Practical lessons
from predicting clicks on ads at Facebook", ADKDD 2014 (normalised entropy; https://doi.org/10.1145/2648584.2648589).

>>> labels, logits = [1, 0, 1, 0], [2.0, -1.0, 0.5, 0.5]
>>> auc(labels, logits)  # of four pairs three are in order, one is tied
0.875
>>> round(log_loss(labels, logits), 4)
0.4721
"""

from __future__ import annotations

from ctrlib.metrics.once import evaluate_scores
from ctrlib.metrics.probability import (
    Reliability,
    calibration,
    calibration_se,
    ece_by_chance,
    expected_calibration_error,
    log_loss,
    normalized_entropy,
    reliability,
)
from ctrlib.metrics.ranking import (
    DeLong,
    GroupAUC,
    PairedTest,
    auc,
    auc_delong,
    auc_paired_test,
    auc_paired_tests,
    average_precision,
    gauc,
)
from ctrlib.metrics.report import evaluate_binary
from ctrlib.metrics.streaming import StreamingAUC, StreamingMetrics

__all__ = [
    "DeLong",
    "GroupAUC",
    "PairedTest",
    "Reliability",
    "StreamingAUC",
    "StreamingMetrics",
    "auc",
    "auc_delong",
    "auc_paired_test",
    "auc_paired_tests",
    "average_precision",
    "calibration",
    "calibration_se",
    "ece_by_chance",
    "evaluate_binary",
    "evaluate_scores",
    "expected_calibration_error",
    "gauc",
    "log_loss",
    "normalized_entropy",
    "reliability",
]
