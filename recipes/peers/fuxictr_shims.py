"""Lets FuxiCTR 2.3.7 run beside newer libraries: import it before anything of FuxiCTR's is used."""

from __future__ import annotations

import fuxictr.metrics
import numpy as np
import sklearn.metrics

# What NumPy and scikit-learn had when it was written.
np.Inf = np.inf  # type: ignore[attr-defined]  # noqa: NPY201
fuxictr.metrics.log_loss = lambda y, p, eps: sklearn.metrics.log_loss(y, np.clip(p, eps, 1 - eps))
