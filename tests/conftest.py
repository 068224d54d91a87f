"""Settings of the whole suite."""

from __future__ import annotations

import os

# The suite's tensors are small: a second thread gains nothing, and on a busy machine two OpenMP threads wait for each
# other twenty times longer than they compute. Set before torch is imported, and so for subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
