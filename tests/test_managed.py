"""Raw ids: the map, what happens to rows that change hands, several processes, and what it is all worth."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from ranks import run_ranks
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

import ctrlib as ctr
from ctrlib.embeddings import managed
from ctrlib.embeddings.managed import ManagedEmbedding, ManagedIds, ManagedSharder, scramble
from ctrlib.embeddings.table import TableEmbedding
from ctrlib.metrics import auc
from ctrlib.schema import Categorical, MultiValued, Numeric
from ctrlib.testing import check_embedding, example_batch, example_schema

POLICIES = [LFU_EvictionPolicy, LRU_EvictionPolicy, DistanceLFU_EvictionPolicy]
EXTREMES = [-(2**63), -(2**31), -1, 0, 1, 2**31, 2**62, 2**63 - 1]


def make_embedding(rows: int = 4, policy: Any = None, init_std: float = 0.0, interval: int = 1) -> ManagedEmbedding:
    return ManagedEmbedding(
        [Categorical("item")],
        num_embeddings={"item": rows},
        eviction_policy=policy or LRU_EvictionPolicy(),
        eviction_interval=interval,
        embedding_dim=4,
        init_std=init_std,
    )


def make_batch(ids: list[int] | Tensor, labels: Tensor | None = None) -> ctr.Batch:
    ids = torch.as_tensor(ids, dtype=torch.int64)
    size = len(ids)
    kjt = KeyedJaggedTensor.from_lengths_sync(["item"], ids, torch.ones(size, dtype=torch.int64))
    labels = torch.ones(size, 1) if labels is None else labels[:, None]
    return ctr.Batch(kjt, torch.zeros(size, 0), labels, torch.ones(size))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("policy", POLICIES)
def test_keeps_the_contract_of_an_embedding(policy: Callable[[], Any]) -> None:
    sizes = {"item": 64, "genres": 16}
    check_embedding(
        lambda schema: ManagedEmbedding(
            schema.features, num_embeddings=sizes, eviction_policy=policy(), embedding_dim=4, init_std=1.0
        )
    )


def test_fields_are_in_the_schemas_order_and_pooled_as_the_features_say() -> None:
    schema = example_schema()
    embedding = ManagedEmbedding(
        schema.features,
        num_embeddings={"item": 64, "genres": 16},
        eviction_policy=LRU_EvictionPolicy(),
        embedding_dim=4,
        init_std=1.0,
    )
    assert isinstance(embedding.others, TableEmbedding)
    batch = example_batch(schema, 9)
    fields = embedding(batch)
    others = embedding.others(batch)
    assert torch.equal(fields[:, [0, 1, 5]], others)  # user, price and age
    weights = embedding.tables.embeddings.embedding_bags
    for position, (name, vocabulary) in {2: ("item", "item"), 3: ("genres", "genres"), 4: ("history", "item")}.items():
        for row, ids in enumerate(batch.sparse[name].to_dense()):
            vectors = weights[f"table_{vocabulary}"].weight[embedding.rows(vocabulary, ids)]
            want = vectors.mean(0) if len(ids) else torch.zeros(4)
            torch.testing.assert_close(fields[row, position], want)


@pytest.mark.parametrize("policy", POLICIES)
def test_any_int64_owns_a_row_and_ids_without_one_share_the_last(policy: Callable[[], Any]) -> None:
    embedding = make_embedding(len(EXTREMES) + 1, policy(), init_std=1.0)
    embedding(make_batch(EXTREMES))
    assert sorted(embedding.rows("item", torch.tensor(EXTREMES)).tolist()) == list(range(len(EXTREMES)))
    embedding.eval()
    weight = embedding.tables.embeddings.embedding_bags["table_item"].weight
    strangers = embedding(make_batch([7, 8, -9]))[:, 0]
    assert torch.equal(strangers, weight[-1].expand(3, 4))
    # Full: nobody new is more deserving than these, seen twice and now, so strangers stay strangers.
    embedding.train()
    embedding(make_batch([*EXTREMES, 7]))
    assert embedding.rows("item", torch.tensor([7])).tolist() == [-1]


def test_scrambled_ids_are_a_permutation_but_for_a_bit_and_spread_evenly() -> None:
    ids = torch.cat([torch.arange(-50_000, 50_000), torch.arange(1000) << 50, torch.tensor(EXTREMES)]).unique()
    scrambled = scramble(ids)
    assert len(scrambled.unique()) == len(ids)
    assert scrambled.min() >= 0
    assert scrambled.max() < 2**63 - 1
    counts = torch.bincount(scrambled >> 59, minlength=16)  # 16 processes' shares
    assert (counts - len(ids) / 16).abs().max() < 5 * math.sqrt(len(ids) / 16)


def test_evaluation_leaves_map_and_clock_alone() -> None:
    embedding = make_embedding()
    embedding(make_batch([1, 2]))
    before = state_of(embedding)
    embedding.eval()
    for _ in range(3):
        embedding(make_batch([3, 4, 5, 6]))
    assert_same_state(state_of(embedding), before)


def test_rows_go_to_the_ids_in_use() -> None:
    embedding = make_embedding(rows=4)
    for first in range(0, 30, 3):
        ids = [first, first + 1, first + 2]
        embedding(make_batch(ids))
        assert sorted(embedding.rows("item", torch.tensor(ids)).tolist()) == [0, 1, 2]
    assert embedding.rows("item", torch.arange(27)).tolist() == [-1] * 27


def test_by_frequency_old_favourites_stay_and_by_recency_they_go() -> None:
    kept = {}
    for policy in (LFU_EvictionPolicy, LRU_EvictionPolicy):
        embedding = make_embedding(rows=3, policy=policy())
        for _ in range(5):
            embedding(make_batch([1, 1, 2, 2]))
        for _ in range(2):
            embedding(make_batch([3, 4]))
        kept[policy] = embedding.rows("item", torch.tensor([1, 2, 3, 4])).tolist()
    assert kept == {LFU_EvictionPolicy: [0, 1, -1, -1], LRU_EvictionPolicy: [-1, -1, 0, 1]}


def test_new_id_starts_anew_under_torchs_optimisers() -> None:
    """Vector 0 by init_std=0, and Adam's first step on it that of a row without a past."""
    embedding = make_embedding(rows=3)
    optimiser = torch.optim.Adam(embedding.parameters(), lr=0.1)
    embedding.forget_evicted(optimiser)
    direction = torch.tensor([1.0, -2.0, 3.0, -4.0])

    def step(ids: list[int]) -> Tensor:
        fields: Tensor = embedding(make_batch(ids))[:, 0]
        optimiser.zero_grad()
        (fields * direction).sum().backward()
        optimiser.step()
        return fields.detach()

    for _ in range(10):
        trained = step([1, 2])
    assert (trained.abs() > 0.5).all()
    assert not step([3, 4]).any()
    # One step of Adam at its step 11 with moments of this step only; with those of ids 1 and 2 it were 0.1.
    size = 0.1 * (0.1 / (1 - 0.9**11)) / math.sqrt(0.001 / (1 - 0.999**11))
    torch.testing.assert_close(step([3, 4]), (-size * direction.sign()).expand(2, 4), rtol=1e-4, atol=1e-6)


def test_new_id_starts_its_average_anew() -> None:
    """A row that changes hands has the average of its new id alone: here its first weights, since that is one step."""
    torch.manual_seed(0)
    embedding = make_embedding(rows=3)
    tower = ctr.MLP(embedding.out_shape, hidden=(8,))
    nn.init.ones_(tower.layers[0].bias)  # no gradient comes through a ReLU at 0
    engine = ctr.ExactEngine(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape)), average_weights=True)
    name = next(name for name, _ in engine.model.named_parameters() if name.endswith("table_item.weight"))
    for _ in range(40):
        engine.step(make_batch([1, 2]))
    old = engine.model.get_parameter(name)[:2].detach().clone()
    engine.step(make_batch([3, 4]))
    average, trained = engine.model.get_parameter(name)[:2], engine.state()[f"trained.{name}"][:2]
    assert (average - trained).abs().max() < 1e-3 < (old - trained).abs().max()


def test_new_id_starts_anew_under_the_fused_engine() -> None:
    torch.manual_seed(0)
    embedding = make_embedding(rows=3)
    tower = ctr.MLP(embedding.out_shape, hidden=(8,))
    nn.init.ones_(tower.layers[0].bias)  # no gradient comes through a ReLU at 0
    model = ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))
    engine = ctr.FusedEngine(model, embedding_learning_rate=0.1)
    for _ in range(5):
        engine.step(make_batch([1, 2, 5]))  # 5 has no row: the last one is for it
    (weight, (total,)) = next(managed._weights(embedding.tables.embeddings, "table_item"))
    assert (weight.abs().sum(1) > 0).all()
    assert (total > 0).all()
    kept = weight[2].clone(), total[2].clone()
    with torch.no_grad():
        fields = embedding(make_batch([3, 4]))
    assert not fields.any()
    assert not weight[:2].any()
    assert not total[:2].any()
    assert torch.equal(weight[2], kept[0])
    assert torch.equal(total[2], kept[1])


@pytest.mark.parametrize("make_engine", [ctr.ExactEngine, ctr.FusedEngine])
def test_engines_put_back_an_earlier_map(make_engine: Callable[[ctr.Model], Any]) -> None:
    """Best weights are put back by copying; the clock then runs on from where it was saved."""
    embedding = make_embedding(rows=4, init_std=0.1)
    tower = ctr.MLP(embedding.out_shape, hidden=(8,))
    engine = make_engine(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape)))
    for step in range(4):
        engine.step(make_batch([step, step + 1]))
    best, owned = engine.weights(), embedding.rows("item", torch.arange(9))
    for step in range(20, 40):
        engine.step(make_batch([step, step + 1]))
    engine.load_weights(best)
    assert torch.equal(embedding.rows("item", torch.arange(9)), owned)
    engine.step(make_batch([8]))
    (ids,) = embedding.tables.ids.values()
    assert ids._current_iter == int(ids._current_iter_tensor) == 5
    assert embedding.rows("item", torch.tensor([8])).item() >= 0


@pytest.mark.parametrize("policy", POLICIES)
def test_resumed_training_is_the_uninterrupted_one(policy: Callable[[], Any], tmp_path: Path) -> None:
    def train(embedding: ManagedEmbedding, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            torch.manual_seed(step)
            optimiser = torch.optim.SGD(embedding.parameters(), lr=0.1)
            embedding(make_batch(torch.randint(step, step + 9, (16,), generator=generator))).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()

    whole = make_embedding(rows=8, policy=policy(), init_std=1.0)
    train(whole, 0, 10)
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = make_embedding(rows=8, policy=policy(), init_std=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_same_state(state_of(resumed), state_of(whole))
    used = make_embedding(rows=8, policy=policy(), init_std=1.0)
    train(used, 30, 50)
    used.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for embedding in (whole, resumed, used):
        train(embedding, 10, 20)
    assert_same_state(state_of(resumed), state_of(whole))
    assert_same_state(state_of(used), state_of(whole))


def test_no_batch_is_too_large_to_be_counted() -> None:
    """TorchRec makes room for 1.25 times the ids of the first batch, and forgets those that exceed it."""
    embedding = ManagedEmbedding(
        [MultiValued("items")],
        num_embeddings={"items": 64},
        eviction_policy=LRU_EvictionPolicy(),
        eviction_interval=3,
        embedding_dim=4,
    )
    for ids in ([], [1], list(range(2, 50))):
        kjt = KeyedJaggedTensor.from_lengths_sync(
            ["items"], torch.tensor(ids, dtype=torch.int64), torch.tensor([len(ids)])
        )
        embedding(ctr.Batch(kjt, torch.zeros(1, 0), torch.ones(1, 1), torch.ones(1)))
    rows = embedding.rows("items", torch.arange(1, 50)).tolist()
    assert len(set(rows) - {-1}) == 49


def test_exports_in_evaluation() -> None:
    class OfIds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = make_embedding(rows=5, init_std=1.0)

        def forward(self, ids: Tensor) -> Tensor:
            size = ids.shape[0]
            kjt = KeyedJaggedTensor(
                ["item"],
                ids,
                lengths=torch.ones_like(ids),
                stride=size,
                length_per_key=[size],
                offset_per_key=[0, size],
            )
            fields: Tensor = self.embedding(ctr.Batch(kjt, torch.zeros(size, 0), torch.ones(size, 1), torch.ones(size)))
            return fields

    model = OfIds()
    model(torch.tensor([3, 4, 5]))
    model.eval()
    exported = torch.export.export(
        model, (torch.tensor([3, 4, 6]),), dynamic_shapes=({0: torch.export.Dim("size", min=2, max=1000)},)
    ).module()
    ids = torch.tensor([5, 6, -(2**60), 4, 3])
    assert torch.equal(exported(ids), model(ids))


def test_wrong_arguments_are_refused() -> None:
    features = [Categorical("item"), Numeric("price")]
    make = functools.partial(ManagedEmbedding, features, eviction_policy=LRU_EvictionPolicy(), embedding_dim=4)
    with pytest.raises(ValueError, match=r"num_embeddings is for \['itm'\].*\['item'\]"):
        make(num_embeddings={"itm": 9})
    with pytest.raises(ValueError, match="one or more of the vocabularies"):
        make(num_embeddings={})
    with pytest.raises(ValueError, match="2 or more rows"):
        make(num_embeddings={"item": 1})
    with pytest.raises(ValueError, match="eviction_interval"):
        make(num_embeddings={"item": 9}, eviction_interval=0)
    embedding = ManagedEmbedding(
        [Categorical("item")], num_embeddings={"item": 9}, eviction_policy=LRU_EvictionPolicy()
    )
    with pytest.raises(NotImplementedError, match="CPU only"):
        embedding(make_batch([1]).to(torch.device("meta")))


# What TorchRec's own classes do on the pinned versions. Where one of these fails after an upgrade, an override may go.


def plain_torchrec(rows: int) -> tuple[list[EmbeddingBagConfig], ManagedCollisionEmbeddingBagCollection]:
    configs = [EmbeddingBagConfig(num_embeddings=rows, embedding_dim=4, name="t", feature_names=["item"])]
    ids = MCHManagedCollisionModule(
        zch_size=rows, device=torch.device("cpu"), eviction_policy=LRU_EvictionPolicy(), eviction_interval=1
    )
    tables = EmbeddingBagCollection(tables=configs)
    return configs, ManagedCollisionEmbeddingBagCollection(tables, ManagedCollisionCollection({"t": ids}, configs))


def test_torchrec_alone_lets_new_ids_inherit_vectors() -> None:
    _, tables = plain_torchrec(rows=3)
    of_old = tables(make_batch([1, 2]).sparse)[0].values()
    of_new = tables(make_batch([3, 4]).sparse)[0].values()
    assert torch.equal(of_old, of_new)


def test_fbgemm_cannot_reset_rows_on_a_cpu() -> None:
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("fbgemm::reset_weight_momentum", "CPU")


# Several processes.

SIZES = {"shared": 16, "genres": 16}
DIRECTION = torch.tensor([1.0, -2.0, 3.0, -4.0])


def make_several(rows: int = 16) -> ManagedEmbedding:
    """Two tables, one of them read by two features: where TorchRec would reset the wrong table's rows."""
    features = [Categorical("a", vocabulary="shared"), Categorical("b", vocabulary="shared"), MultiValued("genres")]
    return ManagedEmbedding(
        features,
        num_embeddings=dict.fromkeys(SIZES, rows),
        eviction_policy=LRU_EvictionPolicy(),
        embedding_dim=4,
        init_std=0.0,
    )


def several_batch(first: int) -> ctr.Batch:
    """Ids `first` and `first + 1` in every feature."""
    ids = torch.tensor([first, first + 1, first + 1, first, first, first + 1, first])
    kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b", "genres"], ids, torch.tensor([1, 1, 1, 1, 2, 1]))
    return ctr.Batch(kjt, torch.zeros(2, 0), torch.ones(2, 1), torch.ones(2))


def shard(embedding: ManagedEmbedding, way: Any) -> DistributedModelParallel:
    sharder = ManagedSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1, "eps": 1e-8}
    )
    plan = construct_module_sharding_plan(
        embedding.tables,
        {config.name: way for config in embedding.tables.embeddings.embedding_bag_configs()},
        sharder=ManagedSharder(),
        local_size=2,
        world_size=2,
        device_type="cpu",
    )
    sharded = DistributedModelParallel(
        embedding,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan}),
        sharders=[sharder],
        init_data_parallel=False,
    )
    with torch.no_grad():
        for name, tensor in sharded.state_dict().items():
            if name.endswith("weight"):
                tensor.local_tensor().zero_()
    return sharded


def whole(tensor: Any) -> Tensor:
    if not hasattr(tensor, "local_tensor"):
        return tensor.clone()  # type: ignore[no-any-return]
    mine = tensor.local_tensor()
    parts = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)


def work_in_two_processes() -> dict[str, Any]:
    warnings.simplefilter("ignore", FutureWarning)  # TorchRec 1.8.0 calls what torch 2.13 deprecates
    rank = dist.get_rank()
    found: dict[str, Any] = {"refused": []}
    attempts: list[Callable[[], object]] = [
        lambda: shard(make_several(rows=15), row_wise(compute_kernel="fused")),
        lambda: shard(make_several(), table_wise(rank=0, compute_kernel="fused")),
        lambda: make_several()(several_batch(0)),
    ]
    for attempt in attempts:
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            found["refused"].append(str(error))
    model = shard(make_several(), row_wise(compute_kernel="fused"))
    # Blocks of four ids, two for each process, each block seen three times; the first comes back at the end.
    found["fields"] = []
    for block in [*range(10), 0]:
        for _ in range(3):
            fields = model(several_batch(4 * block + 2 * rank))
            (fields * DIRECTION).sum().backward()
            found["fields"].append(fields.detach())
    model.eval()
    found["evaluated"] = model(several_batch(0)).detach()
    found["state"] = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def two_processes() -> list[dict[str, Any]]:
    return run_ranks(2, work_in_two_processes)


def test_two_processes_train_as_the_rule_says_and_new_ids_start_anew(two_processes: list[dict[str, Any]]) -> None:
    """Row-wise Adagrad on a constant gradient c: w_n = -0.1 c / rms(c) (1 + 1/sqrt(2) + ... + 1/sqrt(n))."""
    step = -0.1 * DIRECTION / DIRECTION.square().mean().sqrt()
    for found in two_processes:
        for position, fields in enumerate(found["fields"]):
            seen = position % 3  # times in this block; of the first block's first visit nothing is left at the end
            want = step * sum(1 / math.sqrt(n) for n in range(1, seen + 1))
            torch.testing.assert_close(fields, want.expand(2, 3, 4), rtol=1e-5, atol=1e-7)


def test_one_process_takes_over_from_two(two_processes: list[dict[str, Any]]) -> None:
    one = make_several()
    one.load_state_dict(two_processes[0]["state"])
    one.eval()
    for found, first in zip(two_processes, (0, 2)):
        # Row-wise, as soon as one bag is a mean, TorchRec divides each bag by its length (here 1 or 2) plus 1e-6.
        torch.testing.assert_close(one(several_batch(first)) / (1 + 1e-6), found["evaluated"], rtol=6e-7, atol=0)
    # The row that ids of the first process without one shared is free now: 15 new ids find room.
    one.train()
    ids = torch.arange(1000, 1015)
    for _ in range(2):
        lengths = torch.ones(45, dtype=torch.int64)
        kjt = KeyedJaggedTensor.from_lengths_sync(["a", "b", "genres"], ids.repeat(3), lengths)
        one(ctr.Batch(kjt, torch.zeros(15, 0), torch.ones(15, 1), torch.ones(15)))
    assert sorted(one.rows("shared", ids).tolist()) == list(range(15))


@pytest.mark.parametrize("policy", POLICIES)
def test_merged_shares_leave_no_row_unused(policy: Callable[[], Any]) -> None:
    """The last row of the first share was for ids without one, and counted as the most deserving of all."""

    def look_up(ids: ManagedIds, raw: Tensor) -> Tensor:
        mapped = ids({"": JaggedTensor(raw, lengths=torch.ones_like(raw))})
        return mapped[""].values()  # type: ignore[no-any-return]

    whole = make_embedding(rows=8, policy=policy()).tables.ids["table_item"]
    shares = [whole.rebuild_with_output_id_range((first, first + 4), [0, 4, 8]) for first in (0, 4)]
    for first, share in enumerate(shares):
        look_up(share, torch.arange(3) + 10 * first)
    states = [share.state_dict() for share in shares]
    joined = {name: torch.cat([states[0][name], states[1][name]]) for name in states[0] if len(states[0][name]) == 4}
    whole.load_state_dict(states[0] | joined)
    for _ in range(3):
        rows = look_up(whole, torch.arange(100, 107).repeat(5))
    assert sorted(rows[:7].tolist()) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("origin", ["one", "two merged"])
def test_more_processes_than_saved_are_refused(origin: str, two_processes: list[dict[str, Any]]) -> None:
    one = make_several()
    if origin == "two merged":
        one.load_state_dict(two_processes[0]["state"])
    one(several_batch(0))
    ids = one.tables.ids["table_shared"]
    assert isinstance(ids, ManagedIds)
    half = ids.rebuild_with_output_id_range((0, 8), [0, 8, 16])
    state = {name: tensor[:8] if len(tensor) == 16 else tensor for name, tensor in ids.state_dict().items()}
    with pytest.raises(ValueError, match=r"saved by 1 process\(es\).*rows 0 to 8"):
        half.load_state_dict(state)


def test_two_processes_are_told_what_does_not_work(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        uneven, whole_tables, unsharded = found["refused"]
        assert "has 15 rows for 2 processes" in uneven
        assert "use num_embeddings=16" in uneven
        assert 'expected row_wise(compute_kernel="fused")' in whole_tables
        assert "each of 2 processes would keep a map of its own" in unsharded


# What it is worth: a stream whose popular ids change.

ROWS, STEPS, SIZE, ACTIVE = 256, 240, 256, 200


def drifting_stream(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """200 ids are in use, with popularity rank^-0.5 and planted logits N(0, 1.5^2); every step two of them give way to
    new ones. A tenth of the ids occur once, with logit 0."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(-(2**63), 2**63 - 1, 2 * STEPS + ACTIVE)
    logit = rng.normal(0, 1.5, len(raw))
    popularity = rng.permutation(np.arange(1, ACTIVE + 1) ** -0.5)
    popularity /= popularity.sum()
    for step in range(STEPS):
        active = np.arange(2 * step, 2 * step + ACTIVE)
        chosen = rng.choice(active, SIZE, p=popularity[active % ACTIVE])  # the same as long as an id is in use
        once = rng.random(SIZE) < 0.1
        ids = np.where(once, rng.integers(-(2**63), 2**63 - 1, SIZE), raw[chosen])
        click = rng.random(SIZE) < 1 / (1 + np.exp(-np.where(once, 0, logit[chosen])))
        yield torch.from_numpy(ids), torch.from_numpy(click.astype(np.float32))


def auc_of_last_third(embedding: nn.Module, seed: int, to_id: Callable[[Tensor], Tensor] = lambda ids: ids) -> float:
    """Each batch is scored before it is learnt from; the logit is the sum of the vector."""
    optimiser = torch.optim.Adam(embedding.parameters(), lr=0.05)
    if isinstance(embedding, ManagedEmbedding):
        embedding.forget_evicted(optimiser)
    scores, clicks = [], []
    for step, (ids, click) in enumerate(drifting_stream(seed)):
        batch = make_batch(to_id(ids), click)
        if step >= STEPS * 2 // 3:
            embedding.eval()
            with torch.no_grad():
                scores.append(embedding(batch).sum((1, 2)))
            clicks.append(click)
            embedding.train()
        logits = embedding(batch).sum((1, 2))
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, click).backward()
        optimiser.step()
    return float(auc(torch.cat(clicks).numpy(), torch.cat(scores).numpy()))


class FirstCome:
    """A row for each of the first ids, for good; the others share one."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        for raw in ids.tolist():
            if len(self.rows) < ROWS - 1:
                self.rows.setdefault(raw, len(self.rows))
        return torch.tensor([self.rows.get(raw, ROWS - 1) for raw in ids.tolist()])


def test_eviction_pays_where_popularity_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    """AUC over three seeds, of which this is the first: managed 0.736 to 0.752, hashed 0.712 to 0.718, first come 0.50
    to 0.51, and managed as TorchRec leaves it, with inherited vectors and moments, 0.687 to 0.703."""
    seed = 0
    torch.manual_seed(seed)
    managed_embedding = make_embedding(ROWS, init_std=0.01)
    inheriting = copy.deepcopy(managed_embedding)
    plain = TableEmbedding([Categorical("item", num_embeddings=ROWS)], embedding_dim=4, init_std=0.01)
    evicting = auc_of_last_third(managed_embedding, seed)
    hashed = auc_of_last_third(copy.deepcopy(plain), seed, lambda ids: scramble(ids) % ROWS)
    first_come = auc_of_last_third(plain, seed, FirstCome())
    monkeypatch.setattr(managed, "renew_rows", lambda *_: None)
    monkeypatch.setattr(ManagedEmbedding, "forget_evicted", lambda *_: None)
    inherited = auc_of_last_third(inheriting, seed)
    assert evicting > 0.72
    assert evicting > hashed + 0.01
    assert evicting > first_come + 0.15
    assert evicting > inherited + 0.02
