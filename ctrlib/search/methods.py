"""The one table of searches: the command line's choices, the tests and the docs are made from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """A search: its name is that of its module in ctrlib.search, which has its settings and its `search`."""

    settings: str
    """Name of the class of its settings."""
    paper: str
    chooses: str
    """What it decides."""
    then: str
    """How the smaller model is trained."""


SEARCHES = {
    "optfs": Search(
        "OptFS",
        "Lyu et al., WWW 2023",
        "which values of the features exist, by a gate for each that hardens",
        "back to the weights of an early epoch, or from scratch (`rewind=None`)",
    ),
    "optembed": Search(
        "OptEmbed",
        "Lyu et al., CIKM 2022",
        "which rows exist, by thresholds, and how wide each field is, by evolution",
        "from scratch, or on from the supernet's weights (`inherit`)",
    ),
    "dnis": Search(
        "DNIS",
        "Cheng et al., 2020",
        "which columns the values of each block of frequency have, on validation",
        "from the search's weights",
    ),
    "optinter": Search(
        "OptInter",
        "Lyu et al., ICDE 2022",
        "for each pair of features: memorise, factorise, or nothing",
        "from scratch",
    ),
}
