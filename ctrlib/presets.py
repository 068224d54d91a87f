"""Published models, assembled from parts: what the command line and the recipes mean by a name.

Each function reads like the paper's figure. Build your own the same way; nothing here is special.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ctrlib.embeddings.table import TableEmbedding, Wide
from ctrlib.heads.linear import LinearHead
from ctrlib.model import Model
from ctrlib.schema import Schema
from ctrlib.towers.combine import Parallel
from ctrlib.towers.crossnet import CrossNetV2
from ctrlib.towers.fm import FM
from ctrlib.towers.mlp import MLP


def fm(schema: Schema, *, embedding_dim: int = 16, wide_columns: int = 1, stacked: bool = False) -> Model:
    """Factorization machine (Rendle, ICDM 2010): bias + first order + pairwise inner products."""
    embedding = TableEmbedding(schema.features, embedding_dim=embedding_dim, stacked=stacked)
    tower = FM(embedding.out_shape)
    num_tasks = len(schema.labels)
    head = LinearHead(tower.out_shape, num_tasks=num_tasks, unweighted=1)
    wide = Wide(schema.features, num_tasks=num_tasks, columns=wide_columns, stacked=stacked)
    return Model(embedding, tower, head, wide=wide)


def mlp(
    schema: Schema,
    *,
    embedding_dim: int = 16,
    hidden: Sequence[int] = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
    stacked: bool = False,
) -> Model:
    """Multi-layer perceptron on the concatenated embeddings (BARS calls it DNN)."""
    embedding = TableEmbedding(schema.features, embedding_dim=embedding_dim, stacked=stacked)
    tower = MLP(embedding.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout)
    return Model(embedding, tower, LinearHead(tower.out_shape, num_tasks=len(schema.labels)))


def deepfm(
    schema: Schema,
    *,
    embedding_dim: int = 16,
    hidden: Sequence[int] = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
    wide_columns: int = 1,
    stacked: bool = False,
) -> Model:
    """DeepFM (Guo et al., IJCAI 2017): factorization machine and MLP over the same embeddings, logits added."""
    embedding = TableEmbedding(schema.features, embedding_dim=embedding_dim, stacked=stacked)
    shape = embedding.out_shape
    tower = Parallel(FM(shape), MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout))
    num_tasks = len(schema.labels)
    head = LinearHead(tower.out_shape, num_tasks=num_tasks, unweighted=1)
    wide = Wide(schema.features, num_tasks=num_tasks, columns=wide_columns, stacked=stacked)
    return Model(embedding, tower, head, wide=wide)


def dcnv2(
    schema: Schema,
    *,
    embedding_dim: int = 16,
    num_cross_layers: int = 3,
    hidden: Sequence[int] = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
    stacked: bool = False,
) -> Model:
    """DCN V2, parallel and full rank (Wang et al., WWW 2021)."""
    embedding = TableEmbedding(schema.features, embedding_dim=embedding_dim, stacked=stacked)
    shape = embedding.out_shape
    tower = Parallel(
        CrossNetV2(shape, num_layers=num_cross_layers),
        MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
    )
    return Model(embedding, tower, LinearHead(tower.out_shape, num_tasks=len(schema.labels)))


# The names of the command line, in snake case.
PRESETS: dict[str, Callable[..., Model]] = {"mlp": mlp, "fm": fm, "deepfm": deepfm, "dcnv2": dcnv2}


def for_engine(config: dict[str, Any], engine: str) -> dict[str, Any]:
    """The config with what an engine's kernels want: in the fused engine stacked tables, multiples of 4 wide.

    >>> for_engine({"preset": "deepfm"}, "fused")
    {'preset': 'deepfm', 'stacked': True, 'wide_columns': 4}
    >>> for_engine({"preset": "mlp"}, "fused"), for_engine({"preset": "mlp"}, "exact")
    ({'preset': 'mlp', 'stacked': True}, {'preset': 'mlp'})
    """
    if engine != "fused":
        return config
    takes = inspect.signature(PRESETS[config["preset"]]).parameters
    return {**config, "stacked": True, **({"wide_columns": 4} if "wide_columns" in takes else {})}


def build(config: dict[str, Any], schema: Schema) -> Model:
    """The model that a saved `{"preset": name, **arguments}` describes.

    Raises:
        ValueError: there is no preset of that name.
    """
    arguments = dict(config)
    name = arguments.pop("preset")
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}, expected one of {sorted(PRESETS)}")
    return PRESETS[name](schema, **arguments)
