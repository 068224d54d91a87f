"""Which model, and with which settings: comparisons over seeds with tests, and searches over settings."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "comparison": ("compare",),
        "tuning": ("tune",),
        "significance": ("Difference", "auc_influence", "difference_of_means", "log_loss_influence"),
    },
)
