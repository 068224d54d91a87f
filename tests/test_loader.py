"""The loader: the same stream for any rank and worker count, exact resumption, bounded memory, and strict reading."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from ctrlib.batch import Batch
from ctrlib.data import columns as columns_module
from ctrlib.data import loader as loader_module
from ctrlib.data.loader import Loader
from ctrlib.schema import Categorical, MultiValued, Numeric, Schema, SchemaError, Sequence

# "row" is each row's own number, so that a batch tells which rows it holds.
FULL = Schema(
    (
        Categorical("row", num_embeddings=1000),
        Sequence("history", num_embeddings=50, max_length=4),
        Numeric("price"),
        Categorical("item", num_embeddings=50),
        MultiValued("genres", num_embeddings=7, max_length=3),
        Numeric("age"),
    ),
    ("click", "buy"),
    weight="importance",
    group="user",
)
PLAIN = Schema((Categorical("row", num_embeddings=1000), Numeric("price")), ("click",))


def make_columns(schema: Schema, num_rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(7)
    columns: dict[str, Any] = {}
    for feature in schema.features:
        if isinstance(feature, Numeric):
            columns[feature.name] = pa.array(rng.standard_normal(num_rows), pa.float32())
        elif feature.name == "row":
            columns["row"] = pa.array(np.arange(num_rows), pa.int32())
        elif isinstance(feature, Categorical):
            columns[feature.name] = pa.array(rng.integers(0, feature.num_embeddings, num_rows), pa.int32())
        else:
            lists = [
                rng.integers(0, feature.num_embeddings, rng.integers(0, feature.max_length + 1)).tolist()
                for _ in range(num_rows)
            ]
            columns[feature.name] = pa.array(lists, pa.list_(pa.int32()))
    for label in schema.labels:
        columns[label] = pa.array(rng.choice([0, 1, np.nan], num_rows), pa.float32())
    if schema.weight:
        columns[schema.weight] = pa.array(rng.random(num_rows) + 1, pa.float32())
    if schema.group:
        columns["__group__"] = pa.array(rng.integers(0, 2**40, num_rows), pa.int64())
    return columns


def write(
    folder: Path, schema: Schema, columns: dict[str, Any], *, row_group: int = 10, file: int = 30, **options: Any
) -> Path:
    """Writes train in files of `file` rows with row groups of `row_group` rows."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    schema.save(folder / "schema.json")
    table = pa.table(columns)
    for part, start in enumerate(range(0, table.num_rows, file)):
        path = folder / "train" / f"part-{part:03}.parquet"
        pq.write_table(table.slice(start, file), path, row_group_size=row_group, **options)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "full", FULL, make_columns(FULL, 103))


def plain(path: Path, num_rows: int, **options: Any) -> Path:
    return write(path, PLAIN, make_columns(PLAIN, num_rows), **options)


def rows_of(batch: Batch) -> list[int]:
    return list(batch.sparse["row"].values().tolist())


def real_rows(batch: Batch) -> list[int]:
    return list(batch.sparse["row"].values()[batch.weights > 0].tolist())


def same(a: Batch, b: Batch) -> bool:
    pairs = [
        (a.dense, b.dense),
        (a.labels, b.labels),
        (a.weights, b.weights),
        (a.sparse.values(), b.sparse.values()),
        (a.sparse.lengths(), b.sparse.lengths()),
        (a.sparse.offsets(), b.sparse.offsets()),
    ]
    if a.group is not None and b.group is not None:
        pairs.append((a.group, b.group))
    bits = all(x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes() for x, y in pairs)
    return bits and a.sparse.keys() == b.sparse.keys() and (a.group is None) == (b.group is None)


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    assert all(same(x, y) for x, y in zip(a, b))


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ctrlib")]


# --- what a batch holds


@pytest.mark.parametrize("window_rows", [25, 1 << 20])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_the_columns(folder: Path, window_rows: int, shuffle: bool) -> None:
    columns = {name: column.to_pylist() for name, column in make_columns(FULL, 103).items()}
    loader = Loader(folder, "train", batch_size=16, shuffle=shuffle, window_rows=window_rows, with_group=True)
    seen = []
    for batch in loader:
        rows = rows_of(batch)
        seen += rows
        assert batch.sparse.keys() == ["row", "history", "item", "genres"]
        for name, jagged in batch.sparse.to_dict().items():
            expected = [columns[name][row] for row in rows]
            expected = [value if isinstance(value, list) else [value] for value in expected]
            assert [ids.tolist() for ids in jagged.to_dense()] == expected
        for position, name in enumerate(["price", "age"]):
            assert batch.dense[:, position].tolist() == [columns[name][row] for row in rows]
        labels = [[columns[name][row] for name in FULL.labels] for row in rows]
        np.testing.assert_array_equal(batch.labels.numpy(), np.array(labels, dtype=np.float32))
        assert batch.weights.tolist() == [columns["importance"][row] for row in rows]
        assert batch.group is not None and batch.group.dtype == torch.int64
        assert batch.group.tolist() == [columns["__group__"][row] for row in rows]
        assert batch.dense.dtype == batch.labels.dtype == batch.weights.dtype == torch.float32
    assert len(seen) == loader.num_rows == 103
    assert sorted(seen) == list(range(103))
    assert (seen == list(range(103))) is not shuffle


def test_the_keyed_jagged_tensor_is_complete(folder: Path) -> None:
    """What the loader computes ahead is what TorchRec would compute, and TorchRec's modules accept it."""
    tables = [
        EmbeddingBagConfig(name=f.name, embedding_dim=4, num_embeddings=f.num_embeddings or 0, feature_names=[f.name])
        for f in FULL.sparse
    ]
    bags = EmbeddingBagCollection(tables=tables)
    for batch in Loader(folder, "train", batch_size=20):
        kjt = batch.sparse
        assert kjt.stride() == batch.size and kjt.values().dtype == torch.int64
        per_key = kjt.lengths().view(4, -1).sum(1).tolist()
        assert kjt.length_per_key() == per_key and kjt.offset_per_key() == np.cumsum([0, *per_key]).tolist()
        assert kjt.offsets().tolist() == [0, *torch.cumsum(kjt.lengths(), 0).tolist()]
        assert bags(kjt).values().shape == (batch.size, 16)
        assert torch.equal(kjt.permute([2, 0]).values(), torch.cat([kjt["item"].values(), kjt["row"].values()]))
        assert same(batch.to(torch.device("cpu")), batch)


def test_numbers_only_and_lists_only(tmp_path: Path) -> None:
    numbers = Schema((Numeric("price"),), ("click",))
    batch = next(iter(Loader(write(tmp_path / "a", numbers, make_columns(numbers, 12)), "train", batch_size=8)))
    assert batch.dense.shape == (8, 1) and batch.sparse.keys() == [] and batch.weights.tolist() == [1.0] * 8
    lists = Schema((Sequence("history", num_embeddings=9),), ("click",))
    columns = make_columns(lists, 12)
    columns["history"] = pa.array([[]] * 11 + [[8]], pa.large_list(pa.int32()))  # polars writes large lists
    batches = list(Loader(write(tmp_path / "b", lists, columns), "train", batch_size=8))
    assert batches[0].sparse.values().tolist() == [] and batches[1].sparse.values().tolist() == [8]
    assert batches[0].dense.shape == (8, 0) and batches[1].size == 4


def test_column_order_changes_nothing(folder: Path, tmp_path: Path) -> None:
    columns = make_columns(FULL, 103)
    other = write(tmp_path / "turned", FULL, dict(reversed(columns.items())))
    assert_same(*(list(Loader(path, "train", batch_size=16, shuffle=True)) for path in (folder, other)))


def test_empty_row_groups_are_skipped(tmp_path: Path) -> None:
    path = plain(tmp_path, 20)
    empty = pa.table(make_columns(PLAIN, 20)).slice(0, 0)
    with pq.ParquetWriter(path / "train" / "part-000a.parquet", empty.schema) as writer:
        writer.write_batch(
            empty.to_batches()[0] if empty.to_batches() else pa.RecordBatch.from_pylist([], empty.schema)
        )
    pq.write_table(empty, path / "train" / "part-zzz.parquet")
    assert [row for batch in Loader(path, "train", batch_size=7) for row in rows_of(batch)] == list(range(20))


# --- the stream


@pytest.mark.parametrize("window_rows", [25, 1 << 20])
def test_bits_do_not_depend_on_workers(folder: Path, window_rows: int) -> None:
    def epochs(workers: int) -> list[Batch]:
        loader = Loader(folder, "train", batch_size=7, shuffle=True, workers=workers, window_rows=window_rows)
        return [batch for _ in range(2) for batch in loader]

    expected = epochs(0)
    assert_same(epochs(1), expected)
    assert_same(epochs(4), expected)


def test_epochs_and_seeds_differ_and_repeat(tmp_path: Path) -> None:
    path = plain(tmp_path, 600, row_group=20, file=200)

    def epoch_rows(epoch: int, **arguments: Any) -> list[int]:
        loader = Loader(path, "train", batch_size=50, shuffle=True, **arguments)
        loader.set_epoch(epoch)
        return [row for batch in loader for row in rows_of(batch)]

    for window_rows in (100, 600):
        orders = [epoch_rows(e, seed=s, window_rows=window_rows) for e in (0, 1) for s in (0, 1)]
        assert len({tuple(order) for order in orders}) == 4
        assert all(sorted(order) == list(range(600)) for order in orders)
        assert orders[0] == epoch_rows(0, window_rows=window_rows)
    loader = Loader(path, "train", batch_size=50, shuffle=True)
    assert [[row for batch in loader for row in rows_of(batch)] for _ in (0, 1)] == [epoch_rows(0), epoch_rows(1)]
    assert loader.epoch == 2


def test_shuffle_reaches_across_the_window(tmp_path: Path) -> None:
    path = plain(tmp_path, 900, row_group=30, file=300)
    rows = np.arange(900)
    order = np.array([row for batch in Loader(path, "train", batch_size=64, shuffle=True) for row in rows_of(batch)])
    # Two independent uniform positions are 1/3 apart on average; its standard error here is 0.008.
    assert np.abs(order - rows).mean() / 900 == pytest.approx(1 / 3, abs=0.04)
    # Windows of 3 of the 30 row groups: each holds rows from all over the data, not three neighbours.
    loader = Loader(path, "train", batch_size=90, shuffle=True, window_rows=90)
    groups = [{row // 30 for row in rows_of(batch)} for batch in loader]
    assert all(len(found) == 3 for found in groups)
    assert np.mean([max(found) - min(found) for found in groups]) > 8


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("window_rows", [25, 1 << 20])
def test_ranks_share_the_stream(folder: Path, world_size: int, shuffle: bool, window_rows: int) -> None:
    arguments = {"shuffle": shuffle, "window_rows": window_rows}
    one = list(Loader(folder, "train", batch_size=6 * world_size, **arguments))
    ranks = [
        list(Loader(folder, "train", batch_size=6, rank=rank, world_size=world_size, **arguments))
        for rank in range(world_size)
    ]
    for expected, *parts in zip(one, *ranks, strict=True):
        assert len({part.size for part in parts}) == 1
        assert [row for part in parts for row in real_rows(part)] == rows_of(expected)
    for part in (ranks[-1][0], ranks[-1][-1]):
        padding = part.weights == 0
        assert (part.labels[padding] == 0).all()
    assert sum(len(real_rows(batch)) for rank in ranks for batch in rank) == 103


@pytest.mark.parametrize(
    ("num_rows", "world_size", "shuffle", "sizes", "reals"),
    [
        (21, 1, True, [10, 11], [[10], [11]]),  # a single row joins the batch before it
        (21, 1, False, [10, 10, 1], [[10], [10], [1]]),  # evaluation has no batch normalisation to protect
        (1, 1, True, [1], [[1]]),  # nothing to join
        (21, 2, True, [5, 6], [[5, 5], [6, 5]]),
        (21, 2, False, [5, 5, 1], [[5, 5], [5, 5], [1, 0]]),
        (22, 2, True, [5, 5, 2], [[5, 5], [5, 5], [2, 0]]),
        (22, 2, False, [5, 5, 1], [[5, 5], [5, 5], [1, 1]]),
        (27, 4, False, [5, 2], [[5, 5, 5, 5], [2, 2, 2, 1]]),
        (3, 4, False, [1], [[1, 1, 1, 0]]),
    ],
)
def test_last_batch(
    tmp_path: Path, num_rows: int, world_size: int, shuffle: bool, sizes: list[int], reals: list[list[int]]
) -> None:
    path = plain(tmp_path, num_rows)
    batch_size = 10 // min(world_size, 2)
    loaders = [
        Loader(path, "train", batch_size=batch_size, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    epoch = list(zip(*loaders, strict=True))
    assert [len(loader) for loader in loaders] == [len(sizes)] * world_size
    assert [[batch.size for batch in batches] for batches in epoch] == [[size] * world_size for size in sizes]
    assert [[len(real_rows(batch)) for batch in batches] for batches in epoch] == reals
    assert sorted(r for batches in epoch for batch in batches for r in real_rows(batch)) == list(range(num_rows))


def test_drop_last(tmp_path: Path) -> None:
    path = plain(tmp_path, 21)
    for shuffle in (False, True):
        batches = list(Loader(path, "train", batch_size=4, shuffle=shuffle, drop_last=True))
        assert [batch.size for batch in batches] == [4] * 5
    with pytest.raises(ValueError, match="21 rows do not fill a batch of 22"):
        Loader(path, "train", batch_size=22, drop_last=True)


@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    row_group=st.integers(1, 20),
    batch_size=st.integers(1, 15),
    world_size=st.integers(1, 3),
    window_rows=st.integers(1, 70),
    shuffle=st.booleans(),
)
def test_every_row_once_whatever_the_sizes(
    tmp_path_factory: pytest.TempPathFactory,
    num_rows: int,
    row_group: int,
    batch_size: int,
    world_size: int,
    window_rows: int,
    shuffle: bool,
) -> None:
    path = plain(tmp_path_factory.mktemp("any"), num_rows, row_group=row_group)
    arguments = {"batch_size": batch_size, "shuffle": shuffle, "window_rows": window_rows, "world_size": world_size}
    loaders = [Loader(path, "train", rank=rank, workers=rank % 3, **arguments) for rank in range(world_size)]
    epoch = list(zip(*loaders, strict=True))
    assert all(len({batch.size for batch in batches}) == 1 for batches in epoch)
    assert sorted(r for batches in epoch for batch in batches for r in real_rows(batch)) == list(range(num_rows))
    assert len(epoch) == len(loaders[0])


# --- resuming


@pytest.mark.parametrize("window_rows", [25, 1 << 20])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_every_batch(folder: Path, window_rows: int, workers: int) -> None:
    arguments = {"batch_size": 17, "shuffle": True, "workers": workers, "window_rows": window_rows, "seed": 3}
    loader = Loader(folder, "train", **arguments)
    states, batches = [loader.state_dict()], []
    for _ in range(2):
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
    assert states[len(loader)] == {**states[0], "epoch": 1, "batch": 0}  # the end of an epoch is the start of the next
    for consumed, state in enumerate(states[:-1]):
        resumed = Loader(folder, "train", **arguments)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(state["epoch"])  # naming the epoch that is resumed keeps the position
        rest = list(resumed)
        if resumed.epoch < 2:
            rest += list(resumed)
        assert_same(rest, batches[consumed:])


def test_state_of_a_prefetching_pipeline(folder: Path) -> None:
    loader = Loader(folder, "train", batch_size=17, shuffle=True)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(4)]
    state = loader.state_dict(in_flight=2)
    assert state["batch"] == 2
    resumed = Loader(folder, "train", batch_size=17, shuffle=True)
    resumed.load_state_dict(state)
    assert_same(list(resumed)[:2], batches[2:])
    assert [batch.size for batch in iterator] == [17, 18]
    # The epoch is over, but its last batch is not trained on yet.
    assert loader.state_dict(in_flight=1) == {**state, "batch": 5}
    for wrong in (-1, 7):
        with pytest.raises(ValueError, match=r"in_flight must be in \[0, 6\]"):
            loader.state_dict(in_flight=wrong)


def test_resume_with_other_ranks(folder: Path) -> None:
    one = Loader(folder, "train", batch_size=24, shuffle=True)
    expected = [rows_of(batch) for batch in one]
    iterator = iter(one := Loader(folder, "train", batch_size=24, shuffle=True))
    next(iterator), next(iterator)
    parts = []
    for rank in range(3):
        loader = Loader(folder, "train", batch_size=8, shuffle=True, rank=rank, world_size=3)
        loader.load_state_dict(one.state_dict())
        parts.append([real_rows(batch) for batch in loader])
    assert [[row for part in batch for row in part] for batch in zip(*parts)] == expected[2:]


def test_resume_reads_no_skipped_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain(tmp_path, 100)
    opened: list[int] = []
    monkeypatch.setattr(loader_module, "decode_kept", recording(opened))
    loader = Loader(path, "train", batch_size=10, shuffle=True, window_rows=20)
    for count, _ in enumerate(loader, 1):
        if count == 8:
            break
    state = loader.state_dict()
    resumed = Loader(path, "train", batch_size=10, shuffle=True, window_rows=20)
    resumed.load_state_dict(state)
    opened.clear()
    assert len(list(resumed)) == 2
    assert opened == [20]


def recording(opened: list[int]) -> Any:
    def decode(groups: Any, *arguments: Any) -> Any:
        opened.append(sum(group.num_rows for group in groups))
        return columns_module.decode_kept(groups, *arguments)

    return decode


def test_state_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"batch_size": 10, "shuffle": True}
    state = Loader(folder, "train", **arguments).state_dict()
    for change, named in [
        ({"seed": 1}, "seed is 0, this loader's is 1"),
        ({"batch_size": 5}, r"batch_size \* world_size is 10 \* 1, this loader's is 5 \* 1"),
        ({"shuffle": False}, "shuffle is True"),
        ({"window_rows": 50}, "window_rows is 1048576"),
    ]:
        with pytest.raises(ValueError, match=f"cannot resume: {named}"):
            Loader(folder, "train", **{**arguments, **change}).load_state_dict(state)
    other_rows = write(tmp_path / "rows", FULL, make_columns(FULL, 104))
    with pytest.raises(ValueError, match="num_rows is 103, this loader's is 104"):
        Loader(other_rows, "train", **arguments).load_state_dict(state)
    other_files = write(tmp_path / "files", FULL, make_columns(FULL, 103), row_group=9)
    with pytest.raises(ValueError, match="layout_hash"):
        Loader(other_files, "train", **arguments).load_state_dict(state)
    other_schema = plain(tmp_path / "schema", 103)
    with pytest.raises(ValueError, match="schema_hash"):
        Loader(other_schema, "train", **arguments).load_state_dict(state)
    loader = Loader(folder, "train", **arguments)
    with pytest.raises(ValueError, match="epoch 0, batch 12 is outside epochs of 11 batches"):
        loader.load_state_dict({**state, "batch": 12})
    with pytest.raises(ValueError, match=r"lacks \['batch', 'seed'\]"):
        loader.load_state_dict({key: value for key, value in state.items() if key not in ("batch", "seed")})


def test_breaking_off_starts_the_epoch_again(folder: Path) -> None:
    loader = Loader(folder, "train", batch_size=10, shuffle=True)
    first = next(iter(loader))
    assert loader.state_dict()["batch"] == 1
    assert_same(list(loader)[:1], [first])
    loader.set_epoch(5)
    assert loader.state_dict()["epoch"] == 5 and loader.state_dict()["batch"] == 0
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        loader.set_epoch(-1)


# --- threads and memory


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_two_windows_at_most(folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def decode(*arguments: Any) -> Any:
        nonlocal most
        time.sleep(0.005)  # a builder thread drops its reference just after it hands over the batch
        most = max(most, 1 + sum(reference() is not None for reference in alive))
        columns = columns_module.decode_kept(*arguments)
        alive.append(weakref.ref(columns))
        return columns

    monkeypatch.setattr(loader_module, "decode_kept", decode)
    loader = Loader(folder, "train", batch_size=4, shuffle=True, workers=workers, window_rows=10)
    for batch in loader:
        time.sleep(0.001 * (rows_of(batch)[0] % 3))
    assert len(alive) == 11
    assert most == 2  # a batch of 4 may lie in two windows of 10


def test_one_window_is_decoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    monkeypatch.setattr(loader_module, "decode_kept", recording(opened))
    loader = Loader(folder, "train", batch_size=10, shuffle=True, window_rows=103)
    assert [len(list(loader)) for _ in range(3)] == [11] * 3
    assert opened == [103]


@pytest.mark.parametrize("window_rows", [20, 1 << 20])
def test_no_thread_is_left(folder: Path, window_rows: int) -> None:
    def abandoned() -> Iterator[Batch]:
        return iter(Loader(folder, "train", batch_size=3, workers=4, window_rows=window_rows))

    iterator = abandoned()
    next(iterator)
    assert loader_threads()
    del iterator
    assert not loader_threads()
    for _ in abandoned():
        break
    assert not loader_threads()
    with pytest.raises(KeyError):
        for _ in abandoned():
            raise KeyError
    assert len(list(abandoned())) == 35
    abandoned()  # never started
    assert not loader_threads()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_workers_error_reaches_the_consumer(tmp_path: Path, workers: int) -> None:
    columns = make_columns(PLAIN, 100)
    price = columns["price"].to_numpy().copy()
    price[73] = np.nan
    path = write(tmp_path, PLAIN, {**columns, "price": pa.array(price)})
    loader = Loader(path, "train", batch_size=5, workers=workers, window_rows=20)
    seen = []
    with pytest.raises(SchemaError, match=r"part-002.parquet, column 'price', row 13 is nan, expected a finite number"):
        for batch in loader:
            seen += rows_of(batch)
    assert seen == list(range(60))  # the windows before it are intact
    assert not loader_threads()


# --- strict reading


def set_cell(column: Any, row: int, value: Any) -> Any:
    cells = column.to_pylist()
    cells[row] = value
    return pa.array(cells, column.type)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("item", 50, r"id 50 is outside \[0, 50\)"),
        ("item", -1, r"id -1 is outside \[0, 50\)"),
        ("item", None, "is null, expected a value"),
        ("history", [1, 50], r"id 50 is outside \[0, 50\)"),
        ("history", None, "is null, expected a list"),
        ("history", [1, None], "holds a null in its list"),
        ("genres", [1, 2, 3, 4], "has 4 ids, the schema's max_length is 3"),
        ("price", np.nan, "is nan, expected a finite number"),
        ("price", -np.inf, "is -inf, expected a finite number"),
        ("price", None, "is null"),
        ("click", 0.5, "is 0.5, expected 0, 1 or NaN"),
        ("click", np.inf, "is inf, expected 0, 1 or NaN"),
        ("importance", -1.0, "is -1.0, expected a finite weight"),
        ("importance", np.nan, "is nan, expected a finite weight"),
        ("__group__", None, "is null"),
    ],
)
@pytest.mark.parametrize("statistics", [False, True])
def test_bad_values_are_named(tmp_path: Path, column: str, value: Any, message: str, statistics: bool) -> None:
    columns = make_columns(FULL, 103)
    columns[column] = set_cell(columns[column], 47, value)  # in part-001, its row 17, in its row group 1
    path = write(tmp_path, FULL, columns, write_statistics=statistics)
    expected = rf"part-001\.parquet, column '{column}', row 17\W.*{message}"
    with pytest.raises(SchemaError, match=expected):
        loader = Loader(path, "train", batch_size=10, window_rows=20, with_group=True)
        if statistics and isinstance(value, int | None) and column != "history":
            pytest.fail("the statistics tell, so this must be found before anything is read")
        loader.check()
    with pytest.raises(SchemaError, match=expected):
        next(iter(Loader(path, "train", batch_size=10, with_group=True)))


def test_check_passes_good_data(folder: Path) -> None:
    Loader(folder, "train", batch_size=10, with_group=True).check()


def test_wrong_columns(tmp_path: Path) -> None:
    columns = make_columns(FULL, 40)
    for name, broken, message in [
        ("missing", {k: v for k, v in columns.items() if k != "age"}, "'age' is missing"),
        ("no-group", {k: v for k, v in columns.items() if k != "__group__"}, "'__group__' is missing"),
        ("extra", {**columns, "note": columns["price"]}, "'note' is not in the schema"),
        ("retyped", {**columns, "item": columns["item"].cast("int64")}, "'item' is int64, expected int32"),
        ("double", {**columns, "price": columns["price"].cast("float64")}, "'price' is double, expected float"),
        ("flat", {**columns, "history": columns["item"]}, "'history' is int32, expected list<int32>"),
    ]:
        path = write(tmp_path / name, FULL, columns)
        pq.write_table(pa.table(broken), path / "train" / "part-001.parquet")  # only the second file is wrong
        with pytest.raises(SchemaError, match=f"part-001.parquet does not fit schema.json: {message}"):
            Loader(path, "train", batch_size=10)


def test_broken_files(tmp_path: Path) -> None:
    path = plain(tmp_path / "cut", 100)
    target = path / "train" / "part-002.parquet"
    content = target.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"not parquet at all"):
        target.write_bytes(broken)
        with pytest.raises(SchemaError, match=r"part-002.parquet cannot be read as parquet"):
            Loader(path, "train", batch_size=10)
    target.unlink()
    target.mkdir()
    with pytest.raises(SchemaError, match=r"part-002.parquet cannot be read as parquet"):
        Loader(path, "train", batch_size=10)

    path = plain(tmp_path / "flipped", 100, write_page_checksum=True, compression="none", use_dictionary=False)
    target = path / "train" / "part-001.parquet"
    content = bytearray(target.read_bytes())
    content[content.index(np.arange(40, 50, dtype=np.int32).tobytes())] ^= 1
    target.write_bytes(content)
    with pytest.raises(SchemaError, match=r"part-001.parquet, row group 1 cannot be decoded .*checksum"):
        list(Loader(path, "train", batch_size=10))


def test_a_file_replaced_behind_the_loaders_back(tmp_path: Path) -> None:
    path = plain(tmp_path, 100)
    loader = Loader(path, "train", batch_size=10)
    pq.write_table(pa.table(make_columns(PLAIN, 30)), path / "train" / "part-001.parquet", row_group_size=15)
    with pytest.raises(SchemaError, match=r"part-001.parquet, row group 0 has 15 rows, had 10"):
        list(loader)


def test_wrong_folders_and_arguments(tmp_path: Path) -> None:
    path = plain(tmp_path / "data", 40)
    with pytest.raises(SchemaError, match=r"no \*.parquet file; splits with data in this folder: \['train'\]"):
        Loader(path, "valid", batch_size=10)
    with pytest.raises(SchemaError, match="not a prepared folder"):
        Loader(tmp_path / "nowhere", "train", batch_size=10)
    (path / "test").mkdir()
    pq.write_table(pa.table(make_columns(PLAIN, 4)).slice(0, 0), path / "test" / "0.parquet")
    with pytest.raises(SchemaError, match="without a single row"):
        Loader(path, "test", batch_size=10)
    for arguments, message in [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size\) = \[0, 2\), got 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"window_rows": 0}, "window_rows must be at least 1"),
        ({"with_group": True}, "names no group"),
    ]:
        with pytest.raises(ValueError, match=message):
            Loader(path, "train", **{"batch_size": 10, **arguments})
    Schema((Categorical("row"), Numeric("price")), ("click",)).save(path / "schema.json")
    with pytest.raises(SchemaError, match=r"num_embeddings of \['row'\] is not set"):
        Loader(path, "train", batch_size=10)
