"""Raw ids without a vocabulary: a table of fixed size whose rows go to the ids that are in use.

TorchRec's managed collision, also called zero-collision hashing (ZCH): a sorted list of the ids that own a row, and a
policy (`LFU_EvictionPolicy`, `LRU_EvictionPolicy`, `DistanceLFU_EvictionPolicy` of `torchrec.modules.mc_modules`) that
takes rows from ids out of use and gives them to new ones. It suits streams where the popular ids change and
preparation cannot list them beforehand.

What works with torchrec 1.8 and fbgemm 1.8, on the CPU:

* plain autograd (`ExactEngine`) and fused kernels (`FusedEngine`), in one process;
* several processes under gloo, through TorchRec's `DistributedModelParallel` with `ManagedSharder`: row-wise, rows
  divisible by the number of processes (torchrec#1591);
* loading in one process what two have saved, tensors put together; in general, in a divisor of the number that saved.
  More processes are refused: an id's row would lie with one that never looks for it;
* `torch.export` of a model in evaluation.

What does not: ctrlib's engines in several processes and data-parallel replicas (each would have a map of its own),
sharding other than row-wise, and a GPU (untried), all of which are refused; TorchRec's newer MPZCH
(`HashZchManagedCollisionModule`, whose CPU kernel only reads), KVZCH (CUDA only) and ITEP. Untried: TorchRec's training
pipelines, its distributed checkpoints, ONNX, AOTInductor.

TorchRec's own classes, used directly, do the following on these versions; what this module does instead is at the
overrides:

* unsharded, an evicted row keeps its vector, so that a new id starts with that of a stranger (`evict` is a stub);
* sharded on a CPU with row-wise Adagrad, the first eviction raises NotImplementedError (`reset_weight_momentum` has
  CUDA kernels only), and with Adagrad the new id inherits the old one's sum of squares;
* sharded with several tables, one of them read by two features, the rows of another table are reset (torchrec#3030);
* raw ids are dealt to processes by size, so that small ids all end up with the first;
* row-wise, as soon as one bag is a mean, each bag is divided by its length plus 1e-6. This is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import ManagedCollisionCollection, MCHEvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from ctrlib.batch import Batch
from ctrlib.embeddings.table import TableEmbedding, by_vocabulary, init_rows, pooling_of, regroup, table_name
from ctrlib.errors import ArgumentError, UnsupportedError
from ctrlib.schema import Feature, Numeric, RawId, vocabulary_of

NO_ID = torch.iinfo(torch.int64).max  # TorchRec's mark of a row that belongs to nobody


Forget = Callable[[nn.Parameter, Tensor], None]


class ManagedEmbedding(nn.Module):
    """As `TableEmbedding`, but e_f = V[r(x_f)] for raw ids x_f, with r the map from ids in use to rows.

    `num_embeddings`: rows of the table of each `RawId`, by its name, and of other vocabularies whose features carry raw
    ids: any int64, as it comes from the logs. Features of other vocabularies, and numbers, are embedded as
    `TableEmbedding` does.

    While training, every `eviction_interval` steps the ids seen since and those that own a row compete for the rows by
    `eviction_policy`; a row that changes hands starts anew, its vector as N(0, init_std^2) and a fused optimiser's
    state at 0 (see `forget_evicted` for torch's optimisers). In evaluation the map stays as it is. Ids without a row
    share the table's last one, which is trained by all of them: a table of R rows holds R - 1 ids.

    Frequency alone (`LFU_EvictionPolicy`) never forgets: where popularity drifts it did worse than plain hashing into
    as many rows. `DistanceLFU_EvictionPolicy`, frequency over age, was the best or near it. `LRU_EvictionPolicy` lets
    ids that occur once push out others, and gained less where the ids in use outnumbered the rows.

    A decision sorts all rows: 0.01 s for 100,000 of them, 0.17 s for a million, so large tables want a larger interval,
    and an id then waits up to that many steps for its row. The map is in the `state_dict`; ids seen since the last
    decision are not, so that a run resumed between two decisions does not go on exactly as it would have.

    Ids are scrambled, 64 bits to 63, before anything else: row-wise sharding deals them to processes by size. Two ids
    in 2^63 pairs become one. `init_std`, `stacked` and `numeric` are as in `TableEmbedding`.

    Shape: Batch -> (B, F, D), fields in the schema's order.

    Raises:
        ValueError: `num_embeddings` names no vocabulary, an unknown one, or less than two rows, or lacks a `RawId`; the
            interval is not positive; or as `TableEmbedding` does for the rest.
        NotImplementedError: when called with a batch that is not on the CPU.
        RuntimeError: when called in training in one of several processes without `ManagedSharder`.

    >>> from ctrlib.schema import Categorical
    >>> from torchrec.modules.mc_modules import LRU_EvictionPolicy
    >>> embedding = ManagedEmbedding(
    ...     [Categorical("user")], num_embeddings={"user": 3}, eviction_policy=LRU_EvictionPolicy(), embedding_dim=4
    ... )
    >>> def batch(*ids):
    ...     kjt = KeyedJaggedTensor.from_lengths_sync(["user"], torch.tensor(ids), torch.ones(len(ids)).long())
    ...     return Batch(kjt, torch.zeros(len(ids), 0), torch.ones(len(ids), 1), torch.ones(len(ids)))
    >>> embedding(batch(10**18, -7)).shape
    torch.Size([2, 1, 4])
    >>> embedding.rows("user", torch.tensor([10**18, -7, 42])).tolist()
    [0, 1, -1]
    >>> _ = embedding(batch(-7, 42))
    >>> embedding.rows("user", torch.tensor([10**18, -7, 42])).tolist()
    [-1, 1, 0]
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        num_embeddings: Mapping[str, int],
        eviction_policy: MCHEvictionPolicy,
        eviction_interval: int = 1,
        embedding_dim: int = 16,
        init_std: float = 1e-4,
        stacked: int = 0,
        numeric: nn.Module | None = None,
    ) -> None:
        super().__init__()
        sparse = [feature for feature in features if not isinstance(feature, Numeric)]
        vocabularies = [vocabulary_of(feature) for feature in sparse]
        if not num_embeddings or not num_embeddings.keys() <= set(vocabularies):
            raise ArgumentError(
                f"num_embeddings is for {sorted(num_embeddings)}, expected one or more of the vocabularies "
                f"{sorted(set(vocabularies))}"
            )
        raw = [feature.name for feature in sparse if isinstance(feature, RawId)]
        without = [name for name in raw if name not in num_embeddings]
        if without:
            raise ArgumentError(
                f"num_embeddings is for {sorted(num_embeddings)}, but {without} have raw ids too: say how many rows "
                "their tables are to have"
            )
        small = {name: rows for name, rows in num_embeddings.items() if rows < 2}
        if small or eviction_interval < 1 or embedding_dim < 1:
            raise ArgumentError(
                "expected 2 or more rows in a table (one is shared by ids without a row), an eviction_interval and an "
                f"embedding_dim of 1 or more; got {small or 'enough rows'}, {eviction_interval} and {embedding_dim}"
            )
        managed = [feature for feature, name in zip(sparse, vocabularies) if name in num_embeddings]
        configs = [
            EmbeddingBagConfig(
                name=table_name(vocabulary_of(members[0])),
                num_embeddings=num_embeddings[vocabulary_of(members[0])],
                embedding_dim=embedding_dim,
                feature_names=[member.name for member in members],
                pooling=PoolingType.MEAN if pooling_of(members) == "mean" else PoolingType.SUM,
                init_fn=functools.partial(init_rows, std=init_std, copies=1, padding=[]),
            )
            for members in by_vocabulary(managed)
        ]
        self.tables = ManagedTables(configs, eviction_policy=eviction_policy, eviction_interval=eviction_interval)
        self.names = [feature.name for feature in managed]
        others = [feature.name for feature in features if feature.name not in self.names]
        self.others: nn.Module | None = None
        if others or numeric is not None:
            self.others = TableEmbedding(
                features, only=others, embedding_dim=embedding_dim, init_std=init_std, stacked=stacked, numeric=numeric
            )
        block = [*self.names, *others]
        self.order = [block.index(feature.name) for feature in features]
        self.out_shape = (len(features), embedding_dim)

    def forward(self, batch: Batch) -> Tensor:
        """Batch -> (B, F, D)."""
        device = batch.dense.device
        if device.type != "cpu":
            raise UnsupportedError(f"managed ids work on the CPU only in this version, got a batch on {device}")
        keys = batch.sparse.keys()
        pooled, _ = self.tables(batch.sparse.permute([keys.index(name) for name in self.names]))
        fields = regroup(pooled, self.names).view(batch.size, len(self.names), self.out_shape[1])
        if self.others is None:
            return fields
        return torch.cat([fields, self.others(batch)], dim=1)[:, self.order]

    def rows(self, vocabulary: str, ids: Tensor) -> Tensor:
        """The row that each raw id owns, -1 for those without: (N,) int64 -> (N,) int64. Not for sharded tables."""
        of_ids = self.tables.ids[table_name(vocabulary)]
        mapped = of_ids.remap({"": JaggedTensor(scramble(ids), lengths=torch.ones_like(ids))})
        found: Tensor = mapped[""].values()
        return torch.where(found == of_ids.output_size() - 1, -1, found)

    def forget_evicted(self, optimiser: torch.optim.Optimizer, forget: Forget | None = None) -> None:
        """From now on, before `optimiser` steps, zero its state in rows that changed hands since the last step.

        `forget` is called with each table that has such rows, and with them: for what else remembers a row.

        Otherwise a new id inherits the moments of the old one in optimisers of torch, which keep them where the
        embedding cannot see them. Dense Adam lets the first moment fade in tens of steps, the second in thousands.
        """
        self.tables.changed_hands = {}

        def zero_state(optimiser: torch.optim.Optimizer, *_: object) -> None:
            changed_hands, self.tables.changed_hands = self.tables.changed_hands or {}, {}
            for name, rows in changed_hands.items():
                weight = self.tables.embeddings.embedding_bags[name].weight
                for state in optimiser.state.get(weight, {}).values():
                    if isinstance(state, Tensor) and state.shape == weight.shape:
                        state[torch.cat(rows)] = 0
                if forget is not None:
                    forget(weight, torch.cat(rows))

        optimiser.register_step_pre_hook(zero_state)


class ManagedIds(MCHManagedCollisionModule):  # type: ignore[misc]  # TorchRec is not typed
    """The map from ids to rows of one table, or of one process's share of its rows.

    TorchRec's module, except that loading a state does not leave the clock behind, and no batch is too large.
    """

    # TorchRec's, declared here since it is not typed.
    _current_iter: int
    _history_accumulator: Tensor

    def _init_buffers(self) -> None:
        super()._init_buffers()
        self._segments = self._output_segments_tensor.tolist()

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Count the ids of a training batch, and decide on rows when it is time."""
        if self.training:
            # Another state was loaded: its clock counts, and what was seen before concerns another map. TorchRec would
            # go on by a clock of its own, by which loaded entries are too old, or from the future.
            if self._current_iter != int(self._current_iter_tensor):
                self._current_iter, self._current_history_buffer_offset = -1, 0
            self._make_room(sum(feature.values().numel() for feature in features.values()))
        return super().profile(features)  # type: ignore[no-any-return]

    def _make_room(self, count: int) -> None:
        """Let the history hold `count` more ids: TorchRec drops what exceeds 1.25 times the first batch's number."""
        missing = self._current_history_buffer_offset + count - self._input_history_buffer_size
        if self._input_history_buffer_size < 0 or missing <= 0:
            return
        missing = max(missing, self._input_history_buffer_size)
        self._history_accumulator = nn.functional.pad(self._history_accumulator, (0, missing))
        for name, history in self._history_metadata.items():
            self._history_metadata[name] = nn.functional.pad(history, (0, missing))
        self._input_history_buffer_size += missing

    def validate_state(self) -> None:
        """Called after loading a state: refuse one that cannot become this share of the rows."""
        first, past = self._output_global_offset, self._output_global_offset + self._zch_size
        segments = [segment for segment in self._output_segments_tensor.tolist() if segment >= 0]
        if not {first, past} <= set(segments):
            raise ArgumentError(
                f"the map was saved by {len(segments) - 1} process(es), with rows split at {segments}: rows {first} to "
                f"{past} hold ids that other processes look for. Load it in as many processes, or in a divisor of that"
            )
        super().validate_state()
        # As TorchRec leaves it, one process that loads the state of two claims in its own saves that each half of the
        # rows holds one half of the ids, which ceases to be true with the next eviction.
        self._output_segments_tensor.copy_(torch.tensor(self._segments))
        # The last row of a share is for ids without a row and marked as never to be given away: free, if shares merge.
        for metadata in self._mch_metadata.values():
            metadata[:-1][self._mch_sorted_raw_ids[:-1] == NO_ID] = 0


class ManagedTables(ManagedCollisionEmbeddingBagCollection):  # type: ignore[misc]
    """Maps and tables together, a KeyedJaggedTensor of raw ids to (KeyedTensor, None): what `ManagedSharder` shards."""

    def __init__(
        self, configs: list[EmbeddingBagConfig], *, eviction_policy: MCHEvictionPolicy, eviction_interval: int
    ) -> None:
        ids = {
            config.name: ManagedIds(
                zch_size=config.num_embeddings,
                device=torch.device("cpu"),
                eviction_policy=eviction_policy,
                eviction_interval=eviction_interval,
                input_hash_size=NO_ID,
                input_hash_func=scramble,
            )
            for config in configs
        }
        super().__init__(EmbeddingBagCollection(tables=configs), ManagedCollisionCollection(ids, configs))
        self.changed_hands: dict[str, list[Tensor]] | None = None  # table -> rows, while somebody wants to know
        # Kept apart: engines that copy weights into sharded tables replace the configurations' own by one that does
        # nothing.
        self.init_fns = {config.name: config.init_fn for config in configs}

    @property
    def ids(self) -> Any:
        """Table -> its `ManagedIds`."""
        return self._managed_collision_collection._managed_collision_modules

    @property
    def embeddings(self) -> Any:
        """The EmbeddingBagCollection, in whatever form an engine has given it."""
        return self._embedding_module

    def forward(self, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True) -> tuple[Any, None]:
        """Map, renew the rows that changed hands (which TorchRec leaves as they are), look up."""
        if self.training and dist.is_initialized() and dist.get_world_size() > 1:
            raise UnsupportedError(
                f"each of {dist.get_world_size()} processes would keep a map of its own: shard the model row-wise with "
                "TorchRec's DistributedModelParallel and ManagedSharder, or train in one process"
            )
        mapped = self._managed_collision_collection(features)
        evicted = self._managed_collision_collection.evict()
        renew_rows(self, evicted)
        if self.changed_hands is not None:
            for name, rows in evicted.items():
                if rows is not None:
                    self.changed_hands.setdefault(name, []).append(rows)
        return self._embedding_module(mapped), None


class ShardedManagedTables(ShardedManagedCollisionEmbeddingBagCollection):  # type: ignore[misc]
    """`ManagedTables` of which each process holds some rows, and the map to them."""

    def __init__(self, module: ManagedTables, *arguments: Any) -> None:
        super().__init__(module, *arguments)
        self.init_fns = module.init_fns

    def _evict(self, evictions_per_table: dict[str, Tensor | None]) -> None:
        # TorchRec's own resets by a kernel that exists on CUDA only, and takes a table's number for a feature's.
        renew_rows(self, evictions_per_table)


class ManagedSharder(ManagedCollisionEmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Give this to `DistributedModelParallel` beside the other sharders, to train managed ids in several processes.

    `fused_params` as for TorchRec's sharders. The plan has to be row-wise with fused kernels, and the last row of each
    process's share is for its ids without a row.

    >>> from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    >>> from torchrec.modules.mc_modules import LRU_EvictionPolicy
    >>> config = EmbeddingBagConfig(num_embeddings=8, embedding_dim=4, name="user", feature_names=["user"])
    >>> plan = construct_module_sharding_plan(
    ...     ManagedTables([config], eviction_policy=LRU_EvictionPolicy(), eviction_interval=1),
    ...     {"user": row_wise(compute_kernel="fused")},
    ...     sharder=ManagedSharder(),
    ...     local_size=2,
    ...     world_size=2,
    ...     device_type="cpu",
    ... )

    Raises:
        ValueError: in `shard`: the plan is another one, or rows do not divide by the number of processes.
        NotImplementedError: in `shard`: the device is not the CPU.
    """

    def shard(
        self,
        module: ManagedTables,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedManagedTables:
        """Called by `DistributedModelParallel`."""
        if device is not None and device.type != "cpu":
            raise UnsupportedError(f"managed ids work on the CPU only in this version, got device {device}")
        for config in module.embeddings.embedding_bag_configs():
            plan = params[config.name]
            if (plan.sharding_type, plan.compute_kernel) != ("row_wise", "fused"):
                raise ArgumentError(
                    f"managed table {config.name!r} is planned as {plan.sharding_type} with {plan.compute_kernel} "
                    'kernels, expected row_wise(compute_kernel="fused"): maps are dealt out as rows are'
                )
            if config.num_embeddings % env.world_size or config.num_embeddings < 2 * env.world_size:
                rows = max(-(-config.num_embeddings // env.world_size), 2) * env.world_size
                raise ArgumentError(
                    f"managed table {config.name!r} has {config.num_embeddings} rows for {env.world_size} processes, "
                    f"expected 2 or more for each and the same number: use num_embeddings={rows}"
                )
        return ShardedManagedTables(module, params, self._e_sharder, self._mc_sharder, env, torch.device("cpu"))

    @property
    def module_type(self) -> type[ManagedTables]:
        """What this sharder shards."""
        return ManagedTables


def renew_rows(tables: ManagedTables | ShardedManagedTables, evicted: Mapping[str, Tensor | None]) -> None:
    """Start rows anew: vectors as at first, and the state of a fused optimiser at 0."""
    for name, rows in evicted.items():
        if rows is None or not len(rows):
            continue
        for weight, states in _weights(tables._embedding_module, name):
            weight[rows] = tables.init_fns[name](weight.new_empty(len(rows), weight.shape[1]))
            for state in states:
                state[rows] = 0


def _weights(embeddings: Any, table: str) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """The table's weights in this process, each with its fused optimiser's state, if it has one."""
    if isinstance(embeddings, EmbeddingBagCollection):
        yield embeddings.embedding_bags[table].weight.detach(), ()
        return
    for lookup in embeddings._lookups:
        for group in lookup._emb_modules:
            kernel = group._emb_module
            for position, config in enumerate(group._config.embedding_tables):
                if config.name == table:
                    states = kernel.split_optimizer_states()  # [] for SGD
                    yield kernel.split_embedding_weights()[position].detach(), states[position] if states else ()


def scramble(ids: Tensor, size: int = NO_ID) -> Tensor:
    """Any int64 to [0, size), spread evenly: the finaliser of splitmix64, less a bit.

    David Stafford's mix 13, as in Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014,
    https://doi.org/10.1145/2660193.2660195. The last value is left out, being TorchRec's mark of a free row.

    >>> scramble(torch.tensor([1, 2, -1])).tolist()
    [3119036373970289394, 7919892530791287365, 6514504133438201533]
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        ids = (ids ^ _shift_right(ids, shift)) * (factor - 2**64)
    return torch.clamp(_shift_right(ids ^ _shift_right(ids, 31), 1), max=size - 1)


def _shift_right(bits: Tensor, shift: int) -> Tensor:
    """Without copies of the sign, which torch's >> brings in."""
    return bits.bitwise_right_shift(shift).bitwise_and(2 ** (64 - shift) - 1)
