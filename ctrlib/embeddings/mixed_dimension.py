"""Mixed dimension: narrow rows for large vocabularies, whose ids are rare, and wide rows for small ones.

A. A. Ginart, M. Naumov, D. Mudigere, J. Yang & J. Zou, "Mixed Dimension Embeddings with Application to Memory-Efficient
Recommendation Systems", ISIT 2021, https://arxiv.org/abs/1909.11810.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from ctrlib.embeddings.compositional import FeatureIds, first_rows, keep_layout, make_config
from ctrlib.errors import ArgumentError
from ctrlib.schema import Feature, Numeric, vocabulary_of

__all__ = ["MixedDimensionTables", "mixed_dimensions"]


class MixedDimensionTables(nn.Module):
    """e_f = E_f[x_f] P_f with E_f d_f wide and P_f (d_f, D) learned; without P_f where d_f = D.

    `dimensions`: vocabulary -> d_f, as `mixed_dimensions` works out. Vocabularies of one width lie in one table, one
    below the other. Bags are pooled before they are projected, which is the same, and cheaper.

    Bytes: 4 * sum_f (n_f d_f + d_f D), the second term where d_f < D.

    A `RawId` is hashed to `hash_sizes[name]` numbers first, and so are other vocabularies named there. E_f starts as
    U(-init, init), P_f as in the authors' code Xavier-uniform.

    Shape: KeyedJaggedTensor -> KeyedTensor, (B, embedding_dim) for each of `names`, narrow vocabularies first.

    Raises:
        ValueError: an argument does not fit; as `FeatureIds` does for the features; or a state with another layout is
            loaded.

    >>> from ctrlib.schema import Categorical
    >>> features = [Categorical("item", num_embeddings=1000), Categorical("gender", num_embeddings=5)]
    >>> tables = MixedDimensionTables(features, dimensions={"item": 4, "gender": 8}, embedding_dim=8)
    >>> for name, parameter in tables.named_parameters():
    ...     print(name, tuple(parameter.shape))
    tables.embedding_bags.width_4.weight (1000, 4)
    tables.embedding_bags.width_8.weight (5, 8)
    projections.width_4 (1, 4, 8)
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        dimensions: Mapping[str, int],
        embedding_dim: int = 16,
        hash_sizes: Mapping[str, int] | None = None,
        init: float = 0.05,
        suffix: str = "",
    ) -> None:
        super().__init__()
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        vocabularies = {vocabulary_of(feature) for feature in sparse}
        fits = set(dimensions) == vocabularies and all(1 <= width <= embedding_dim for width in dimensions.values())
        if not fits or init <= 0:
            raise ArgumentError(
                f"dimensions={dict(dimensions)}: expected 1 to embedding_dim={embedding_dim} for each of the "
                f"vocabularies {sorted(vocabularies)}, and init={init} above 0"
            )
        sparse.sort(key=lambda feature: dimensions[vocabulary_of(feature)])
        self.ids = FeatureIds(sparse, hash_sizes=hash_sizes)
        self.names, self.embedding_dim = self.ids.names, embedding_dim
        # Width -> the features that have it; they lie side by side.
        widths = [dimensions[vocabulary] for vocabulary in self.ids.vocabularies]
        self.groups = {width: len(list(group)) for width, group in itertools.groupby(widths)}
        sizes = {
            width: {name: size for name, size in self.ids.num_ids.items() if dimensions[name] == width}
            for width in self.groups
        }
        self.first_ids = {name: row for of_width in sizes.values() for name, row in first_rows(of_width).items()}
        self.tables: Any = EmbeddingBagCollection(
            tables=[
                make_config(f"width_{width}{suffix}", sum(of_width.values()), width, [f"width_{width}"], init)
                for width, of_width in sizes.items()
            ]
        )
        self.projections = nn.ParameterDict()
        self.positions: dict[int, list[int]] = {}  # width -> which of its projections each of its features takes
        for width, of_width in sizes.items():
            names = [name for name in self.ids.vocabularies if name in of_width]
            self.positions[width] = [list(of_width).index(name) for name in names]
            if width < embedding_dim:
                bound = (6 / (width + embedding_dim)) ** 0.5
                weights = torch.empty(len(of_width), width, embedding_dim).uniform_(-bound, bound)
                self.projections[f"width_{width}"] = nn.Parameter(weights)
        layout = self.ids.layout(dimension=dimensions)
        self._printout = f"embedding_dim={embedding_dim}, layout={keep_layout(self, layout)}"

    def forward(self, sparse: KeyedJaggedTensor) -> KeyedTensor:
        """KeyedJaggedTensor of ids -> KeyedTensor, (B, embedding_dim) for each of `names`."""
        bags = self.ids.read(sparse)
        groups, most = list(self.groups.values()), max(self.groups.values())
        # TorchRec wants as many bags under every key: those of features that are not there are empty.
        lengths_FB = torch.split(bags.lengths.view(-1, bags.size), groups)
        lengths = [F.pad(part, (0, 0, 0, most - part.shape[0])).flatten() for part in lengths_FB]
        counts = iter(bags.counts)
        found = self.tables(
            KeyedJaggedTensor(
                [f"width_{width}" for width in self.groups],
                bags.values + bags.spread(self.first_ids),
                lengths=torch.cat(lengths),
                stride=most * bags.size,
                length_per_key=[sum(itertools.islice(counts, count)) for count in groups],
            )
        ).to_dict()
        fields = [
            self._project(found[f"width_{width}"].view(most, bags.size, width)[:count], width)
            for width, count in self.groups.items()
        ]
        return bags.keyed(torch.cat([field.flatten(0, 1) for field in fields]))

    def _project(self, rows_FBd: Tensor, width: int) -> Tensor:
        """(features of this width, B, width) -> (features, B, D)."""
        if width == self.embedding_dim:
            return rows_FBd
        return torch.bmm(rows_FBd, self.projections[f"width_{width}"][self.positions[width]])

    def extra_repr(self) -> str:
        """What is not to be seen from the tables."""
        return self._printout


def mixed_dimensions(
    num_embeddings: Mapping[str, int], embedding_dim: int, *, alpha: float = 0.3, multiple_of: int = 4
) -> dict[str, int]:
    """Vocabulary -> d_f = D (n_min / n_f)^alpha, rounded to a multiple of `multiple_of` from there to D.

    The paper's d_f = lambda p_f^alpha, lambda = D / max_f p_f^alpha, where p_f, how often an id of the vocabulary
    occurs on average, is 1 / n_f. alpha = 0 makes all as wide as `embedding_dim`, larger ones make large vocabularies
    narrower. The paper rounds to powers of 2; the fused engine needs multiples of 4.

    Raises:
        ValueError: there are no vocabularies or one is empty, alpha is negative, or `embedding_dim` is no multiple.

    >>> mixed_dimensions({"gender": 5, "item": 4_000, "user": 1_000_000}, 64)
    {'gender': 64, 'item': 8, 'user': 4}
    """
    sizes = num_embeddings.values()
    if not sizes or min(sizes) < 1 or alpha < 0 or multiple_of < 1 or embedding_dim % multiple_of or embedding_dim < 1:
        raise ArgumentError(
            f"expected vocabularies of 1 or more ids, alpha of 0 or more and an embedding_dim that is a multiple of "
            f"multiple_of, got {dict(num_embeddings)}, alpha={alpha}, embedding_dim={embedding_dim} and "
            f"multiple_of={multiple_of}"
        )
    wanted = {name: embedding_dim * (min(sizes) / size) ** alpha for name, size in num_embeddings.items()}
    return {name: max(1, round(width / multiple_of)) * multiple_of for name, width in wanted.items()}
