"""Engines, the training loop, and what keeps a run alive: the parts of `ctrlib.fit` and `ctrlib.run`."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "config": ("MAY_CHANGE", "Training", "complete", "differences"),
        "engines": ("choose_device", "make_engine"),
        "keeper": ("Engine", "Terminated"),
        "loop": ("History", "LostProcessError", "NonFiniteLossError", "to_json"),
        "evaluate": ("Scores", "score"),
        "allocator": ("keep_freed_memory",),
        "batch_norm": ("synchronise_batch_norm",),
        "progress": ("random_state", "set_random_state"),
        "rowwise_adagrad": ("RowwiseAdagrad",),
        "state": ("make_adam", "optimiser_state"),
    },
)
