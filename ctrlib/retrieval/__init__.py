"""Candidates: from a log of who had to do with what to the best items of every user."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "interactions": ("Aligned", "Interactions", "Log", "read_log"),
        "topk": ("top_k",),
        "evaluate": ("evaluate_lists", "list_metrics"),  # and `evaluate`, which is this module's name
        "graph": ("ItemGraph",),
        "methods": ("Retriever", "Vectors"),
        "baselines": ("EASE", "IALS", "ItemCF", "Popularity"),
        "objective": ("Objective", "Weights"),
        "ultragcn": ("UltraGCN",),
        "recommend": ("recommend_new", "search"),
        "table": ("METHODS", "build"),
        "run": ("evaluate_trained", "train"),
        "folder": ("Trained", "load", "save"),
    },
)
