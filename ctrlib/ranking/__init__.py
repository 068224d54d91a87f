"""Which features, and pairs of them, are worth it: relevance beyond chance, redundancy, synergy, quality."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "chosen": ("RankingError", "crosses", "not_chosen"),
        "counts": ("Cells", "JointCounts"),
        "null": ("Null", "NullTable", "conditional_null"),
        "order": ("greedy",),
        "overlap": ("chance_information", "chance_within"),
        "pairs": ("PairScore", "Screening", "find_pairs"),
        "run": ("Ranking", "rank"),
        "relevance": (
            *("Counts", "Score", "benjamini_hochberg"),
            *("count", "score_column", "score_columns", "scores", "shift_null"),
        ),
        "source": ("Source",),
        "spark": ("count_with_spark",),
        "spill": ("SpilledCounts",),
    },
)
