"""How the features of a schema become the fields of a tower: what every published model takes first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, get_args

from torch import nn

from ctrlib._lazy import instead
from ctrlib.embeddings.bst import BST
from ctrlib.embeddings.din import DIN
from ctrlib.embeddings.hash_embedding import HashEmbeddingTables
from ctrlib.embeddings.memcom import MemComTables
from ctrlib.embeddings.mixed_dimension import MixedDimensionTables
from ctrlib.embeddings.numeric import AutoDis, Bucketised, Periodic, PiecewiseLinear
from ctrlib.embeddings.quotient_remainder import QuotientRemainderTables
from ctrlib.embeddings.sequence import MeanPooling, SequenceEmbedding, Unit
from ctrlib.embeddings.sim import SIM, TargetAttention
from ctrlib.embeddings.table import TableEmbedding, Wide
from ctrlib.embeddings.tim import InterestEmbedding
from ctrlib.embeddings.unified import UnifiedTables
from ctrlib.errors import ArgumentError, check_type
from ctrlib.heads.linear import LinearHead
from ctrlib.model import Model
from ctrlib.schema import BINNED, Categorical, NumericFields, Schema, SequenceFields, vocabulary_of
from ctrlib.schema import Sequence as HistoryFeature

# The one table of ways to look ids up: what `tables` may name.
LOOK_UPS: dict[str, Callable[..., nn.Module]] = {
    "unified": UnifiedTables,
    "quotient_remainder": QuotientRemainderTables,
    "hash_embedding": HashEmbeddingTables,
    "memcom": MemComTables,
    "mixed_dimension": MixedDimensionTables,
}


@dataclass(frozen=True)
class Inputs:
    """How the features become fields, whatever the tower: what every published model takes first.

    `embedding_dim`: width D of the fields. `numeric`: how numbers become fields; `bucketised` and `piecewise_linear`
    want `edges`, a list for each numeric feature (`ctrlib.quantile_edges`), `periodic` a `sigma`. `sequence`: how
    histories become fields; for all but `pooled` (mean or sum, as the feature says) histories are compared with the
    categorical features that share their vocabularies, in one unit (a second history of one thing in a second).
    `tim` reads the histories of one thing (the first history's; others are pooled) for each label and behaviour, and
    `tim_shared` for each behaviour only (`InterestEmbedding`): the former is for `dtrn`, and `mmoe` and `ple` that
    refine.
    `stacked`: see `TableEmbedding`. `tables`: {"kind": name, **arguments} looks ids up in another way than one row
    for each: one of `LOOK_UPS`, given its arguments; the wide part keeps rows of its own.
    `wide_columns`: see `Wide`.

    Raises:
        ValueError: there is no such `numeric` or `sequence`, edges are lacking, an argument would be idle, or a history
            has no target.

    >>> from ctrlib.testing import example_schema
    >>> from ctrlib import models
    >>> model = models.deepfm(Inputs(example_schema(), embedding_dim=8), hidden=(16,))
    >>> model.tower.in_shape
    (6, 8)
    """

    schema: Schema
    embedding_dim: int = 16
    numeric: NumericFields = "vector"
    edges: Sequence[Sequence[float]] | None = None
    sigma: float = 0.01
    sequence: SequenceFields = "pooled"
    stacked: int = 0
    tables: Mapping[str, Any] | None = None
    wide_columns: int = 1

    def __post_init__(self) -> None:
        check_type("a ctrlib.Schema, as ctrlib.prepare returns it or Schema.load reads it", Schema, schema=self.schema)
        check_type("a whole number", Integral, embedding_dim=self.embedding_dim)
        if self.tables is not None and self.tables.get("kind") not in LOOK_UPS:
            kind = str(self.tables.get("kind"))
            raise ArgumentError(f'tables={dict(self.tables)}: unknown "kind" {kind!r}; {instead([kind], LOOK_UPS)}')
        if self.tables is not None and self.sequence != "pooled":
            raise ArgumentError(
                f"tables of kind {self.tables['kind']!r} are for sequence='pooled', got {self.sequence!r}"
            )
        if self.numeric not in get_args(NumericFields):
            raise ArgumentError(f"unknown numeric {self.numeric!r}; {instead([self.numeric], get_args(NumericFields))}")
        if self.sequence not in get_args(SequenceFields):
            raise ArgumentError(
                f"unknown sequence {self.sequence!r}; {instead([self.sequence], get_args(SequenceFields))}"
            )
        if not self.schema.dense and self.numeric != "vector":
            raise ArgumentError(f"numeric={self.numeric!r} needs a numeric feature, and the schema has none")
        if self.sigma != 0.01 and self.numeric != "periodic":
            raise ArgumentError(f"sigma={self.sigma} is for numeric='periodic', got numeric={self.numeric!r}")
        if self.edges is not None and self.numeric not in BINNED:
            raise ArgumentError(f"edges are for bucketised and piecewise_linear numbers, got numeric={self.numeric!r}")
        wanted = len(self.schema.dense) if self.numeric in BINNED else 0
        if wanted and len(self.edges or ()) != wanted:
            raise ArgumentError(
                f"numeric={self.numeric!r} needs edges for {wanted} numeric features, got {len(self.edges or ())}: "
                "take ctrlib.quantile_edges(prepared_folder)"
            )

    def reading(self, sequence: SequenceFields) -> Inputs:
        """The same, with histories read in a model's own way.

        Raises:
            ValueError: another way is asked for.
        """
        if self.sequence not in ("pooled", sequence):
            raise ArgumentError(
                f"this model reads histories in its own way, {sequence!r}, got sequence={self.sequence!r}: leave it "
                "out, or take a model that reads them in any way, such as mlp"
            )
        return replace(self, sequence=sequence)

    def embedding(self, names: Sequence[str] | None = None, *, suffix: str = "", of_each_label: bool = False) -> Any:
        """Fields of all features, or of those named; a `suffix` keeps the tables apart from others of the model.

        A second set of fields has its histories pooled. `of_each_label`: the tower takes fields of each label's own.
        """
        if self.sequence in ("tim", "tim_shared") and names is None and not suffix:
            return self._interests(of_each_label)
        if self.sequence != "pooled" and names is None and not suffix:
            return SequenceEmbedding(
                self.schema.features,
                units=self._units(),
                embedding_dim=self.embedding_dim,
                stacked=self.stacked,
                numeric=self._numeric_fields(names),
            )
        return TableEmbedding(
            self.schema.features,
            only=names,
            embedding_dim=self.embedding_dim,
            stacked=0 if self.tables else self.stacked,
            suffix=suffix,
            numeric=self._numeric_fields(names),
            tables=self._look_up(names, suffix),
        )

    def _interests(self, of_each_label: bool) -> InterestEmbedding:
        if self.sequence == "tim" and not of_each_label:
            raise ArgumentError(
                "sequence='tim' makes fields of each label's own, which dtrn takes, and mmoe and ple with refine=True: "
                "choose one of them, or sequence='tim_shared'"
            )
        return InterestEmbedding(
            self.schema.features,
            target=self._target(self._histories()[0]),
            num_tasks=len(self.schema.labels) if self.sequence == "tim" else None,
            embedding_dim=self.embedding_dim,
            stacked=self.stacked,
            numeric=self._numeric_fields(None),
        )

    def _look_up(self, names: Sequence[str] | None, suffix: str) -> nn.Module | None:
        """The look-up that `tables` describes."""
        chosen = [f for f in self.schema.sparse if names is None or f.name in names]
        if self.tables is None or not chosen:
            return None
        arguments = dict(self.tables)
        kind = LOOK_UPS[arguments.pop("kind")]
        unknown = sorted(set(arguments) - set(inspect.signature(kind).parameters))
        if unknown:
            takes = [name for name in inspect.signature(kind).parameters if name not in ("features", "embedding_dim")]
            raise ArgumentError(f"{kind.__name__} takes no {unknown}; {instead(unknown, takes)}")
        return kind(chosen, embedding_dim=self.embedding_dim, suffix=suffix, **arguments)

    def _numeric_fields(self, names: Sequence[str] | None) -> nn.Module | None:
        chosen = [n for n, feature in enumerate(self.schema.dense) if names is None or feature.name in names]
        if not chosen or self.numeric == "vector":  # what TableEmbedding does by itself
            return None
        if self.numeric == "periodic":
            return Periodic(len(chosen), embedding_dim=self.embedding_dim, sigma=self.sigma)
        if self.numeric == "autodis":
            return AutoDis(len(chosen), embedding_dim=self.embedding_dim)
        encoder = Bucketised if self.numeric == "bucketised" else PiecewiseLinear
        return encoder([(self.edges or ())[n] for n in chosen], embedding_dim=self.embedding_dim)

    def _units(self) -> list[Unit]:
        """All histories beside the features whose vocabularies they share; a second one of a thing: a new unit."""
        pairs: list[dict[str, HistoryFeature]] = []  # a unit each: target -> history
        for history in self._histories():
            target = self._target(history)
            unit = next((unit for unit in pairs if target not in unit), None)
            if unit is None:
                pairs.append(unit := {})
            unit[target] = history
        return [
            Unit(tuple(unit), tuple(history.name for history in unit.values()), self._encoder(list(unit.values())))
            for unit in pairs
        ]

    def _histories(self) -> list[HistoryFeature]:
        histories = [feature for feature in self.schema.sparse if isinstance(feature, HistoryFeature)]
        if not histories:
            raise ArgumentError(f"sequence={self.sequence!r} needs a Sequence feature, and the schema has none")
        return histories

    def _target(self, history: HistoryFeature) -> str:
        """The feature that is compared with a history: the first that shares its vocabulary."""
        for feature in self.schema.sparse:
            if isinstance(feature, Categorical) and vocabulary_of(feature) == vocabulary_of(history):
                return feature.name
        raise ArgumentError(
            f"history {history.name!r} shares its vocabulary with no categorical feature, so there is nothing "
            "to compare it with: prepare it with Sequence(..., vocabulary=...), or use sequence='pooled'"
        )

    def _encoder(self, histories: list[HistoryFeature]) -> nn.Module:
        width = len(histories) * self.embedding_dim
        encoders: dict[str, Callable[[], nn.Module]] = {
            "mean": lambda: MeanPooling(width),
            "din": lambda: DIN(width, dice=True),
            "din_softmax": lambda: DIN(width, dice=True, softmax=True),
            "bst": lambda: BST(width, max_length=max(history.max_length for history in histories)),
            "sim": lambda: SIM(TargetAttention(width)),
        }
        return encoders[self.sequence]()

    def model(
        self,
        embedding: nn.Module,
        tower: Any,
        *,
        unweighted: int = 0,
        wide: bool = False,
        head: nn.Module | None = None,
    ) -> Model:
        """Embedding, tower and (if no head is given) a linear head; with `wide`, first-order weights too."""
        num_tasks = len(self.schema.labels)
        head = head or LinearHead(tower.out_shape, num_tasks=num_tasks, unweighted=unweighted)
        first_order = None
        if wide:
            first_order = Wide(
                self.schema.features, num_tasks=num_tasks, columns=self.wide_columns, stacked=self.stacked
            )
        return Model(embedding, tower, head, wide=first_order)
