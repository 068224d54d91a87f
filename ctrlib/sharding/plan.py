"""Which process holds which rows of which table: making such a plan, showing it, and keeping it."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich import box
from rich.table import Table
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    data_parallel,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ModuleSharder
from torchrec.distributed.types import ShardingPlan as TorchRecPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ctrlib.errors import ArgumentError, TooLargeError
from ctrlib.making import write_text

# It tells users of its planner to describe their machines; the plans here need no more than numbers of processes.
logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)

TABLES = (EmbeddingBagCollection, EmbeddingCollection)
Sharding = Literal["table_wise", "row_wise", "column_wise", "data_parallel"]
TableOptimiser = Literal["rowwise_adagrad", "adagrad"]
COPIED_BYTES = 1 << 20  # of tables that an automatic plan copies: about a network's weights, and in the cache with them


@dataclass(frozen=True)
class TablePlacement:
    """How one table is spread.

    table_wise: all of it on one rank. row_wise: a run of rows on each of all ranks. column_wise: as many columns on
    each of `ranks`. data_parallel: a copy on every rank.
    """

    sharding: Sharding
    ranks: tuple[int, ...]


# By the name of the table's weight in the model.
ShardingPlan = dict[str, TablePlacement]


def tables_of(model: nn.Module) -> dict[str, tuple[str, nn.Module, Any]]:
    """Every table of a model: name of its weight -> (path of its collection, the collection, the table's config).

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> model = models.mlp(Inputs(example_schema(), embedding_dim=4), hidden=(8,))
    >>> list(tables_of(model))[0]
    'embedding.tables.embedding_bags.table_user.weight'
    """
    tables = {}
    for path, module in model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            for config in module.embedding_bag_configs():
                tables[f"{path}.embedding_bags.{config.name}.weight"] = (path, module, config)
        elif isinstance(module, EmbeddingCollection):
            for config in module.embedding_configs():
                tables[f"{path}.embeddings.{config.name}.weight"] = (path, module, config)
    return tables


def make_plan(
    model: nn.Module,
    *,
    world_size: int,
    sharding: Literal["auto"] | Sharding | Mapping[str, Sharding] = "auto",
    copy_small: bool = False,
    device_type: str = "cpu",
) -> ShardingPlan:
    """A plan for every table of the model.

    "auto" cuts a table of more than 1 / world_size of all bytes by rows, since no single process could hold it without
    doing more than its share; the others are given to processes as a whole, by TorchRec's planner. A way of sharding
    puts every table that way ("table_wise" by the planner, too), a dictionary (by the name of the weight) those it
    names, and leaves others to "auto".
    With `copy_small`, "auto" first makes the smallest tables data_parallel, 1 MiB of weights in all: `FusedEngine` does
    that, a loop of your own must then train them by `RowwiseAdagrad`. Whether the tables can be spread that way,
    `check_plan` says.

    Raises:
        ValueError: no such way of sharding, or no such table.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> model = models.mlp(Inputs(example_schema(), embedding_dim=8), hidden=(8,))
    >>> [placement.sharding for placement in make_plan(model, world_size=4).values()]
    ['row_wise', 'row_wise', 'table_wise']
    """
    tables = tables_of(model)
    wanted = dict(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(tables, sharding)
    unknown = sorted(set(wanted) - set(tables))
    if unknown:
        raise ArgumentError(f"no tables {unknown} to place, expected some of {sorted(tables)}")
    total = sum(config.num_embeddings * config.embedding_dim for _, _, config in tables.values())
    plan: ShardingPlan = {}
    free = [name for name in tables if wanted.get(name, "auto") == "auto"]
    copied = _small(model, free) if copy_small and world_size > 1 else set()
    for name, (_, _, config) in tables.items():
        way = wanted.get(name, "auto")
        if name in copied:
            way = "data_parallel"
        if way == "auto" and config.num_embeddings * config.embedding_dim * world_size > total:
            way = "row_wise"
        if way in ("auto", "table_wise"):
            continue  # as a whole
        if way not in get_args(Sharding):
            raise ArgumentError(f"unknown sharding {way!r}, expected 'auto' or one of {get_args(Sharding)}")
        plan[name] = TablePlacement(way, tuple(range(world_size)))  # type: ignore[arg-type]  # checked above
    rest = [name for name in tables if name not in plan]
    plan |= _plan_whole_tables(model, rest, world_size, device_type)
    return {name: plan[name] for name in tables}


def _small(model: nn.Module, names: list[str]) -> set[str]:
    """Those of the tables to copy: summing their gradients costs less than sending the rows of a batch around."""
    sizes = {
        name: 4 * config.num_embeddings * config.embedding_dim
        for name, (_, module, config) in tables_of(model).items()
        if name in names and isinstance(module, EmbeddingBagCollection)
    }
    small = sorted(sizes, key=sizes.__getitem__)
    totals = itertools.accumulate(sizes[name] for name in small)
    return {name for name, total in zip(small, totals) if total <= COPIED_BYTES}


def _plan_whole_tables(model: nn.Module, names: list[str], world_size: int, device_type: str) -> ShardingPlan:
    """One rank for each of `names`, by the planner's estimate of work and memory."""
    if world_size == 1:
        return {name: TablePlacement("table_wise", (0,)) for name in names}
    if not names:
        return {}
    tables = tables_of(model)
    # The kernel is named, since under the planner's favourite for small tables (data_parallel) TorchRec would silently
    # drop the in-backward optimiser.
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=world_size,
            compute_device=device_type,
            local_world_size=_local(world_size),
            **dict.fromkeys(("hbm_cap", "ddr_cap"), 1 << 60),  # what fits is for `check_memory` to say
        ),
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints={config.name: constraint for _, _, config in tables.values()},
        debug=False,
    )
    found = planner.plan(model, sharders())
    plan = {}
    for name in names:
        path, _, config = tables[name]
        plan[name] = TablePlacement("table_wise", tuple(found.plan[path][config.name].ranks))
    return plan


def check_plan(
    plan: ShardingPlan, model: nn.Module, *, world_size: int, optimiser: TableOptimiser = "rowwise_adagrad"
) -> None:
    """Refuse a plan that does not fit the model, or under which a table would be trained by another rule.

    Raises:
        ValueError: saying which table, why, and what to do.
    """
    tables = tables_of(model)
    if set(plan) != set(tables):
        raise ArgumentError(
            f"the plan does not fit the model: tables {sorted(set(plan) ^ set(tables))} are on one side only"
        )
    for name, placement in plan.items():
        config = tables[name][2]
        beyond = [rank for rank in placement.ranks if not 0 <= rank < world_size]
        if beyond or len(set(placement.ranks)) != len(placement.ranks) or not placement.ranks:
            raise ArgumentError(
                f"the plan puts {name} on ranks {list(placement.ranks)}, but there are {world_size} processes: make it "
                "for as many processes as you start, or leave it out to have one made"
            )
        everywhere = placement.sharding in ("row_wise", "data_parallel")
        expected = world_size if everywhere else 1
        if placement.sharding != "column_wise" and len(placement.ranks) != expected:
            raise ArgumentError(
                f"the plan puts {name} {placement.sharding} on {len(placement.ranks)} ranks, expected {expected}"
            )
        if placement.sharding == "column_wise":
            parts = len(placement.ranks)
            if config.embedding_dim % (4 * parts):
                raise ArgumentError(
                    f"{name} has {config.embedding_dim} columns, which do not divide into {parts} shards of a multiple "
                    f"of 4: use embedding_dim={math.ceil(config.embedding_dim / (4 * parts)) * 4 * parts}, or row_wise"
                )
            if parts > 1 and optimiser == "rowwise_adagrad":
                raise ArgumentError(
                    f"{name}: row-wise Adagrad keeps one number per row, which columns on {parts} ranks cannot share, "
                    "so that the plan would change how the table is trained: use table_optimiser='adagrad', or row_wise"
                )
        if placement.sharding == "data_parallel":
            if isinstance(tables[name][1], EmbeddingCollection):
                raise ArgumentError(
                    f"{name} holds a sequence's rows: TorchRec 1.8 computes data_parallel sequences wrongly, so use "
                    "row_wise or table_wise"
                )
            if optimiser != "rowwise_adagrad":
                raise ArgumentError(f"{name}: data_parallel tables are trained by row-wise Adagrad only, use row_wise")


def to_torchrec(plan: ShardingPlan, model: nn.Module, *, world_size: int, device_type: str) -> TorchRecPlan:
    """The same plan in TorchRec's form."""
    local_size = _local(world_size)
    collections: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, (path, module, config) in tables_of(model).items():
        placement = plan[name]
        if placement.sharding == "table_wise":
            way = table_wise(rank=placement.ranks[0], compute_kernel="fused")
        elif placement.sharding == "row_wise":
            way = row_wise(compute_kernel="fused")
        elif placement.sharding == "column_wise":
            way = column_wise(ranks=list(placement.ranks), compute_kernel="fused")
        else:
            way = data_parallel()
        collections.setdefault(path, (module, {}))[1][config.name] = way
    return TorchRecPlan(
        {
            path: construct_module_sharding_plan(
                module, ways, local_size=local_size, world_size=world_size, device_type=device_type
            )
            for path, (module, ways) in collections.items()
        }
    )


def _local(world_size: int) -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))


def sharders(fused_params: dict[str, Any] | None = None) -> list[ModuleSharder[Any]]:
    """TorchRec's sharders of our kinds of tables, given the kernels' arguments."""
    return [EmbeddingBagCollectionSharder(fused_params), EmbeddingCollectionSharder(fused_params)]


def plan_bytes(
    plan: ShardingPlan, model: nn.Module, *, world_size: int, optimiser: TableOptimiser = "rowwise_adagrad"
) -> dict[str, list[int]]:
    """Table -> bytes on each rank: float32 weights and the optimiser's state, and a copied table's gradient.

    >>> from ctrlib import models
    >>> from ctrlib.inputs import Inputs
    >>> from ctrlib.testing import example_schema
    >>> model = models.mlp(Inputs(example_schema(), embedding_dim=4), hidden=(8,))
    >>> plan = make_plan(model, world_size=2, sharding="row_wise")
    >>> plan_bytes(plan, model, world_size=2)["embedding.tables.embedding_bags.table_user.weight"]
    [200, 200]
    """
    found = {}
    for name, (_, _, config) in tables_of(model).items():
        placement, rows, columns = plan[name], config.num_embeddings, config.embedding_dim
        state = 1 if optimiser == "rowwise_adagrad" else columns
        per_rank = [0] * world_size
        if placement.sharding == "row_wise":
            block = -(-rows // world_size)  # TorchRec's: the last ranks may hold fewer rows, or none
            for rank in range(world_size):
                per_rank[rank] = 4 * max(0, min(block, rows - rank * block)) * (columns + state)
        elif placement.sharding == "data_parallel":
            per_rank = [4 * rows * (2 * columns + state)] * world_size
        else:
            for rank in placement.ranks:
                per_rank[rank] = 4 * rows * (columns + state) // len(placement.ranks)
        found[name] = per_rank
    return found


def show_plan(
    plan: ShardingPlan, model: nn.Module, *, world_size: int, optimiser: TableOptimiser = "rowwise_adagrad"
) -> Table:
    """The plan as a table to print: rows, width, way of sharding, and bytes on every rank."""
    found = plan_bytes(plan, model, world_size=world_size, optimiser=optimiser)
    ranks = [f"rank {rank}" for rank in range(world_size)]
    table = Table("table", "rows", "dim", "sharding", *ranks, box=box.SIMPLE_HEAD, pad_edge=False)
    for name, (_, _, config) in tables_of(model).items():
        sizes = [_in_words(size) for size in found[name]]
        table.add_row(config.name, f"{config.num_embeddings:,}", str(config.embedding_dim), plan[name].sharding, *sizes)
    totals = [_in_words(sum(sizes[rank] for sizes in found.values())) for rank in range(world_size)]
    table.add_row("all tables, with optimiser", "", "", "", *totals, style="bold")
    return table


def check_memory(needed: int, available: int) -> None:
    """Refuse before the first step what will not fit.

    Raises:
        MemoryError: saying how much a process needs, and how much there is.

    >>> check_memory(2 << 30, 1 << 30)
    Traceback (most recent call last):
    ctrlib.errors.TooLargeError: the tables need 2.0 GiB in this process, and 1.0 GiB is free: ...
    """
    if needed > available:
        raise TooLargeError(
            f"the tables need {_in_words(needed)} in this process, and {_in_words(available)} is free: start more "
            "processes, or machines, shard large tables row_wise, or make embeddings smaller"
        )


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take: its share of what the machine, or its container, has free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        values = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(values["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        # Files that were read count as used, but make room.
        parts = dict(line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        free = min(free, int(limit.read_text()) - int(used.read_text()) + int(parts.get("inactive_file", 0)))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def save_plan(plan: ShardingPlan, path: str | Path) -> None:
    """Write a plan as JSON, to pin it with `load_plan`."""
    content = {name: {"sharding": p.sharding, "ranks": list(p.ranks)} for name, p in plan.items()}
    write_text(path, json.dumps(content, indent=1) + "\n")


def load_plan(path: str | Path) -> ShardingPlan:
    """Read what `save_plan` wrote.

    Raises:
        ValueError: it is not a plan.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        plan = {name: TablePlacement(entry["sharding"], tuple(entry["ranks"])) for name, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{path} is not a sharding plan ({error!r}): expected JSON as `save_plan` writes it"
        ) from error
    wrong = sorted({p.sharding for p in plan.values()} - set(get_args(Sharding)))
    if wrong:
        raise ArgumentError(f"{path} has unknown shardings {wrong}, expected some of {get_args(Sharding)}")
    return plan


def _in_words(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size} B" if unit == "B" else f"{size:.1f} {unit}"
        size = size / 1024  # type: ignore[assignment]
    return f"{size:.1f} GiB"
