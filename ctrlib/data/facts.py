"""What the defaults of a training depend on: a few counts of a prepared folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ctrlib.data.columns import find_row_groups
from ctrlib.manifest import load_schema
from ctrlib.schema import NUM_RESERVED_IDS, RawId, SchemaError


@dataclass(frozen=True)
class Facts:
    """Counts of the train split and its vocabularies.

    `rates`: of each label the share of positives among rows with that label, each by its weight. `positives`: rows of
    the rarer class, of several labels those of the label that has fewest.

    >>> Facts(rows=100, rates=(0.02,), positives=2, values=40, fields=3, numbers=1).values_per_field
    20.0
    """

    rows: int
    rates: tuple[float, ...]
    positives: int
    values: int
    """Values of all vocabularies, the reserved ids left out."""
    fields: int
    """Features, each of which becomes a field."""
    numbers: int
    """Those of them that are numbers."""

    @property
    def values_per_field(self) -> float:
        """Values of the vocabularies, for each feature that is no number."""
        return self.values / max(1, self.fields - self.numbers)


def facts_of(data: str | Path) -> Facts:
    """Count the train split of a prepared folder; of its files only labels and weights are read.

    Raises:
        SchemaError: it is no prepared folder with a train split, or a label has one class only.
    """
    folder = Path(data)
    schema = load_schema(folder)
    files = sorted({group.path for group in find_row_groups(folder, "train", schema)})
    weight = pl.lit(1.0) if schema.weight is None else pl.col(schema.weight).cast(pl.Float64)
    counts: dict[str, pl.Expr] = {"rows": pl.len()}
    for position, name in enumerate(schema.labels):
        label = pl.col(name)
        known = label.is_not_nan() & (weight > 0)
        counts[f"ones {position}"] = (known & (label == 1)).sum()
        counts[f"zeros {position}"] = (known & (label == 0)).sum()
        counts[f"weight {position}"] = pl.when(known).then(weight).otherwise(0.0).sum()
        counts[f"positive {position}"] = pl.when(known & (label == 1)).then(weight).otherwise(0.0).sum()
    found = pl.scan_parquet(files, glob=False).select(**counts).collect().row(0, named=True)
    rates, rarer = [], []
    for position, name in enumerate(schema.labels):
        rarer.append(min(found[f"ones {position}"], found[f"zeros {position}"]))
        if not rarer[-1]:
            raise SchemaError(
                f"{folder / 'train'}: label {name!r} has one class only among the rows that have one and weigh more "
                "than 0, so nothing is to be learnt: prepare more rows, or leave that label out"
            )
        rates.append(found[f"positive {position}"] / found[f"weight {position}"])
    vocabularies = {
        feature.vocabulary or feature.name: feature.num_embeddings or 0
        for feature in schema.sparse
        if not isinstance(feature, RawId)
    }
    return Facts(
        rows=found["rows"],
        rates=tuple(rates),
        positives=min(rarer),
        values=sum(max(0, rows - NUM_RESERVED_IDS) for rows in vocabularies.values()),
        fields=len(schema.features),
        numbers=len(schema.dense),
    )
