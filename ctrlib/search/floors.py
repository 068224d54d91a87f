"""What any method of compression must beat at equal bytes: rounded rows, and fewer of them.

`keep_rows` is for searches, whose models are retrained: a frequency cut or magnitude pruning that is so too. Another
floor, a smaller `embedding_dim` trained from scratch, is a training run and needs nothing here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ctrlib.batch import Batch
from ctrlib.data.loader import Loader
from ctrlib.data.vocabulary import check_order
from ctrlib.embeddings.packed import PackedTable
from ctrlib.errors import ArgumentError
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS, OOV_ID, Schema
from ctrlib.search.bytes import bytes_of
from ctrlib.search.coding import TableConfig, packed, pooling_in, usage
from ctrlib.search.gates import prune, vocabularies_of, with_own_tables
from ctrlib.search.plan import Plan, materialise
from ctrlib.sharding.plan import tables_of
from ctrlib.structure import unstack


def rounded_rows(model: Model, bits: Literal[2, 4, 8, 16]) -> Plan:
    """All rows in float16, or as integers with a scale and an offset for each row (H. Guan et al., "Post-Training 4-bit
    Quantization on Embedding Tables", 2019, https://arxiv.org/abs/1911.02079)."""
    rowwise = 0 if bits == 16 else bits
    return _plan(f"int{bits}" if rowwise else "float16", model, lambda _, config: (config.num_embeddings, rowwise))


def frequency_cut(model: Model, batches: Iterable[Batch], *, num_bytes: int, bits: Literal[4, 8, 16] = 16) -> Plan:
    """Rows of the ids that train reads most often, in as many bytes; all other ids read the out-of-vocabulary row.

    One number of reads decides for all tables. Rows are in order of frequency in every vocabulary, so that a table is
    cut after its last row. `batches` of a `Loader`, or the first ones of one, are asked whether that is so.

    Raises:
        ValueError: the budget does not even hold the reserved rows.
        SchemaError: ids are not in order of frequency, since the data was prepared like other data.
    """
    source = getattr(batches, "loader", batches)
    if isinstance(source, Loader):
        check_order(source.folder, source.schema, "a frequency cut")
    model = copy.deepcopy(model)
    unstack(model)
    used = usage(model, batches, gradient_batches=1)
    rowwise = 0 if bits == 16 else bits

    def cut(limit: float) -> Plan:
        def kept(name: str, config: TableConfig) -> tuple[int, int]:
            reads = used[name].reads[NUM_RESERVED_IDS:]
            return NUM_RESERVED_IDS + int((reads >= limit).sum()), rowwise

        return _plan("frequency_cut", model, kept)

    limits = torch.unique(torch.cat([table.reads[NUM_RESERVED_IDS:] for table in used.values()])).tolist()
    low, high = 0, len(limits)  # the first limit that is high enough
    while low < high:
        middle = (low + high) // 2
        if bytes_of(materialise(model, cut(limits[middle]))).embedding > num_bytes:
            low = middle + 1
        else:
            high = middle
    if low == len(limits):
        raise ArgumentError(f"{num_bytes:,} bytes do not hold any row of an id beside the reserved ones: ask for more")
    return cut(limits[low])


def _plan(method: str, model: Model, rows_of: Callable[[str, TableConfig], tuple[int, int]]) -> Plan:
    """Every table's first rows, how many and in what form `rows_of` says."""
    model = copy.deepcopy(model)
    unstack(model)
    replaced: dict[str, dict[str, Any]] = {}
    weights: dict[str, Tensor] = {}
    full = dict(model.named_parameters())
    collections: dict[str, dict[str, PackedTable]] = {}
    for name, (path, _, config) in tables_of(model).items():
        rows, rowwise = rows_of(name, config)
        collections.setdefault(path, {})[name] = PackedTable(
            config.name,
            tuple(config.feature_names),
            config.embedding_dim,
            rows=rows,
            rowwise=rowwise,  # type: ignore[arg-type]  # one of its choices
            pooling=pooling_in(config),
            dropped_to=OOV_ID if rows < config.num_embeddings else 0,
        )
    for path, tables in collections.items():
        kind, made = packed(model.get_submodule(path), list(tables.values()))
        for name, table in tables.items():
            made.fill(table.name, full[name].detach()[: table.rows])
        replaced[path] = {"kind": kind, **made.describe()}
        weights |= {f"{path}.{name}": tensor for name, tensor in made.state_dict().items()}
    return Plan(method, replaced, weights)


def keep_rows(
    model: Model,
    schema: Schema,
    scores: Mapping[str, Tensor],
    *,
    num_bytes: int,
    method: str,
    dropped_to: int = OOV_ID,
) -> Plan:
    """The rows of highest score, over all tables, in as many bytes.

    In float32 and trainable, to be retrained as what a search finds is: by `count_reads` a frequency cut, by
    `row_norms` magnitude pruning, by random numbers the floor below both. The reserved rows stay.

    Args:
        model: gives the rows.
        schema: of its features.
        scores: vocabulary -> (rows,).
        num_bytes: for tables, first-order weights, maps of ids and vectors of numbers together.
        method: the plan's.
        dropped_to: what all other values read: the row of OOV_ID, or PADDING_ID for the zero vector.

    Raises:
        ValueError: the budget does not even hold the reserved rows.
    """
    values = torch.cat([score[NUM_RESERVED_IDS:] for score in scores.values()])
    order = values.argsort(descending=True, stable=True)

    def cut(number: int) -> Plan:
        chosen = torch.zeros(len(values), dtype=torch.bool).index_fill_(0, order[:number], True)
        parts = torch.split(chosen, [len(score) - NUM_RESERVED_IDS for score in scores.values()])
        reserved = torch.ones(NUM_RESERVED_IDS, dtype=torch.bool)
        kept = {name: torch.cat([reserved, part]) for name, part in zip(scores, parts)}
        return prune(model, schema, kept, method=method, dropped_to=dropped_to)

    def size(number: int) -> int:
        return bytes_of(materialise(model, cut(number))).embedding

    if size(0) > num_bytes:
        raise ArgumentError(
            f"{num_bytes:,} bytes do not even hold the reserved rows, which take {size(0):,}: ask for more"
        )
    low, high = 0, len(values)  # the most rows that fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= num_bytes else (low, middle - 1)
    return cut(low)


def row_norms(model: Model, schema: Schema) -> dict[str, Tensor]:
    """The L2 norm of each value's row in the embedding's first tables: vocabulary -> (rows,)."""
    _, collections, vocabularies = with_own_tables(model, schema)
    tables = next(iter(collections.values()))
    return {
        vocabulary: tables.embedding_bags[name].weight.detach().norm(dim=1)
        for name, vocabulary in vocabularies_of(tables, vocabularies).items()
    }
