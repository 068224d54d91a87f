"""MovieLens-1M with ids, Unified Embedding's protocol: one table for all features, against the hashing trick.

    python recipes/unified.py --model multiplexed_158k --seed 1 [--data DIR] [--record]

Published: B. Coleman et al., NeurIPS 2023, table 1; the numbers stand in results.py. DCN-V2 with one cross layer beside
an MLP of 192, width 30, batch 128, Adam 2e-4, tables from U(-0.05, 0.05), neither batch normalisation nor dropout. The
tables take 1.6 MB (what a row for every value takes), 791 kB or 158 kB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import tyro
from torch import nn
from tyro.conf import FlagCreatePairsOff

import ctrlib as ctr
from ctrlib.embeddings.unified import UnifiedTables, proportional_rows
from ctrlib.training.allocator import keep_freed_memory
from records import record

DATA = "movielens_1m_ids"
WIDTH, INIT = 30, 0.05
# Bytes of the tables, in float32; None: a row for every value.
BYTES = {"1600k": 1_580_000, "791k": 791_000, "158k": 158_000}
VARIANTS: dict[str, tuple[bool, int] | None] = {"collisionless": None}
VARIANTS |= {f"hashing_{size}": (False, total) for size, total in BYTES.items()}
VARIANTS |= {f"multiplexed_{size}": (True, total) for size, total in BYTES.items()}


@dataclass(frozen=True)
class Knobs:
    """Train one model on MovieLens-1M with ids and report its test AUC once."""

    model: Literal[tuple(VARIANTS)] = "multiplexed_158k"  # type: ignore[valid-type]
    """Which variant."""
    data: Path = Path(__file__).parent.parent / "data" / DATA
    """Prepared folder, as datasets/movielens_1m.py --protocol ids makes it."""
    seed: int = 1
    """Of initial weights and shuffle."""
    epochs: int = 100
    """Upper limit."""
    out: Path | None = None
    """Folder for the log, the curve and, while it trains, checkpoints."""
    record: bool = False
    """Append the result to results.csv."""


def unified(inputs: ctr.Inputs, *, variant: str) -> ctr.Model:
    """DCN-V2 on the variant's tables."""
    schema, tables = inputs.schema, cast(Any, None)
    if (chosen := VARIANTS[variant]) is not None:
        is_shared, num_bytes = chosen
        rows = num_bytes // (4 * WIDTH)
        shares = rows if is_shared else proportional_rows(schema.features, rows)
        tables = UnifiedTables(schema.features, num_embeddings=shares, embedding_dim=WIDTH, init=INIT)
    embedding = ctr.TableEmbedding(schema.features, embedding_dim=WIDTH, tables=tables)
    if tables is None:
        for weight in embedding.parameters():
            nn.init.uniform_(weight, -INIT, INIT)
    shape = embedding.out_shape
    tower = ctr.Parallel(ctr.CrossNetV2(shape, num_layers=1), ctr.MLP(shape, hidden=(192,)))
    return ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))


def main(knobs: Knobs) -> None:
    """Train, report and, if asked to, record."""
    keep_freed_memory()
    _, result = ctr.run(
        knobs.data,
        {
            "model": f"{__name__}.{unified.__name__}",
            "variant": knobs.model,
            "training": {
                "batch_size": 128,
                "learning_rate": 2e-4,
                "max_epochs": knobs.epochs,
                "seed": knobs.seed,
                "device": "cpu",
            },
        },
        modules=[__name__],
        out=knobs.out,
    )
    print(ctr.training.to_json({"data": DATA, "model": knobs.model, **result}))
    if knobs.record:
        record(result, Path(__file__).parent / "results.csv", data=DATA, model=knobs.model)


if __name__ == "__main__":
    main(tyro.cli(Knobs, config=(FlagCreatePairsOff,)))
