"""Arguments that many published models share, said once: what `**mlp`, `**attention` and `**experts` may hold.

Each is a dictionary type whose keys a model takes as ordinary keyword arguments: `deepfm(inputs, hidden=(64, 64))`.
Their defaults are those of the part that they go to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

Widths = Sequence[int]


class Regularisation(TypedDict, total=False):
    """Of an MLP whose widths the model says itself."""

    batch_norm: bool
    dropout: float


class Deep(Regularisation, total=False):
    """An MLP (`ctrlib.MLP`)."""

    hidden: Widths


class Attention(TypedDict, total=False):
    """AutoInt's self-attention (`ctrlib.towers.AutoInt`)."""

    num_layers: int
    num_heads: int
    head_dim: int
    scale: bool
    identity: bool
    norm_before_relu: bool


class Experts(TypedDict, total=False):
    """Experts of several labels, and the network of each label behind them (`ctrlib.heads.MMoE`)."""

    expert_hidden: Widths
    tower_hidden: Widths
    dropout: float


# Whose constructor has the defaults.
PARTS = {"Regularisation": "towers.MLP", "Deep": "towers.MLP", "Attention": "towers.AutoInt", "Experts": "heads.MMoE"}
