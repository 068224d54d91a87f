"""From a model to a smaller one: what a search or a compression decides is a `Plan`, and `materialise` makes it so."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "plan": ("Plan", "materialise"),
        "methods": ("SEARCHES",),
        "experiment": ("experiment_of", "parts_of", "settings_of"),
        "run": ("search_and_retrain",),
        "optfs": ("OptFS",),
        "optembed": ("OptEmbed",),
        "dnis": ("DNIS",),
        "optinter": ("OptInter",),
        "evolution": ("Evolution", "evolve"),
        "bytes": ("Bytes", "bytes_of"),
        "compression": ("compress",),
        "coding": ("transform_coding",),
        "mimicking": ("apply_low_rank", "low_rank"),
        "ranks": ("Goal",),
        "folding": ("fold_decoders",),
        "distillation": ("distil",),
        "floors": ("frequency_cut", "keep_rows", "rounded_rows", "row_norms"),
        "counting": ("count_reads",),
    },
)
