"""What a trained model and its tasks do, and why."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "importance": ("permutation_importance",),
        "predictions": ("Predictions", "evaluate_predictions", "read_predictions"),
        "transfer": ("compare_tasks", "gate_usage", "gradient_cosines", "step_scores"),
    },
)
