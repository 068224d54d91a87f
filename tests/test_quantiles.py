"""Where the bins of numbers come from: quantiles of train, and values that are more frequent than a bin."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from ctrlib.data import quantiles
from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.prepare import prepare
from ctrlib.data.quantiles import edges_of, points_of, quantile_edges
from ctrlib.embeddings.numeric import Bucketised, PiecewiseLinear
from ctrlib.manifest import write_manifest
from ctrlib.schema import Categorical, Feature, Numeric, Schema, SchemaError


def by_definition(values: Iterable[float], num_bins: int) -> list[float]:
    """The edges as the docstring of `quantile_edges` says, row by row."""
    rest, alone = sorted(values), set[float]()
    while more := {value for value, count in Counter(rest).items() if count * (num_bins - len(alone)) >= len(rest)}:
        alone |= more
        rest = [value for value in rest if value not in more]
    if not rest:
        return sorted(alone)
    bins = num_bins - len(alone)
    ranks = [max(math.ceil(Fraction(t * len(rest), bins)), 1) for t in range(bins + 1)]
    return sorted(alone | {rest[rank - 1] for rank in ranks})


COLUMNS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "no ties": lambda rng: rng.normal(size=997),
    "90 % zero": lambda rng: np.where(rng.random(1000) < 0.9, 0, rng.lognormal(size=1000)),
    "99.9 % zero": lambda rng: np.where(np.arange(3000) % 1000, 0, rng.normal(size=3000)),
    "zero in the middle": lambda rng: np.where(rng.random(1000) < 0.4, 0, rng.normal(size=1000)),
    "the largest": lambda rng: np.minimum(rng.normal(size=1000), 0.1),
    "both ends": lambda rng: rng.normal(size=1000).clip(-0.5, 0.5),
    "geometric": lambda rng: rng.geometric(0.6, 1000) - 1.0,
    "whole numbers": lambda rng: rng.poisson(20, 1000).astype(float),
    "two values": lambda rng: rng.integers(0, 2, 50).astype(float),
    "a rare second value": lambda rng: np.array([0.0] * 999 + [1]),
    "one row": lambda rng: np.array([3.0]),
    "few rows": lambda rng: np.array([1.0, 2, 2, 5]),
    "as many values as bins": lambda rng: np.repeat(np.arange(8.0), 3),
}


@pytest.mark.parametrize("num_bins", [1, 2, 3, 7, 8, 31, 64, 100])
@pytest.mark.parametrize("column", COLUMNS)
def test_edges_are_those_of_the_definition(column: str, num_bins: int) -> None:
    values = COLUMNS[column](np.random.default_rng(7)).astype(np.float32)
    edges, expected = edges_of(points_of(values), num_bins), by_definition(values.tolist(), num_bins)
    assert edges == (expected if len(expected) > 1 else [expected[0], expected[0] + max(1.0, abs(expected[0]))])
    shuffled = np.random.default_rng(8).permutation(values)
    assert edges_of(points_of(shuffled), num_bins) == edges
    assert len(edges) == max(2, min(num_bins + 1, len(set(values.tolist()))))


def test_a_frequent_value_costs_one_edge() -> None:
    rng = np.random.default_rng(3)
    others = rng.lognormal(size=1000).astype(np.float32)
    values = np.concatenate([np.zeros(9000, np.float32), others])
    edges = edges_of(points_of(values), 64)  # with Q(t / 64) of all rows there were 8
    assert len(edges) == 65
    assert edges[0] == 0
    assert edges[1:] == np.quantile(others, np.linspace(0, 1, 64), method="inverted_cdf").tolist()
    held = np.histogram(values, bins=np.array([*edges[:-1], math.inf]))[0]
    assert held[0] == 9000
    assert set(held[1:-1].tolist()) <= {15, 16}  # 1000 / 63 = 15.9
    assert held[1:].sum() == 1000


def test_one_value_after_another_is_frequent_among_what_is_left() -> None:
    values = np.repeat(np.array([0, 1, 2, 3, 4, 5], np.float32), [900, 60, 20, 10, 5, 5])
    assert edges_of(points_of(values), 1) == [0, 5]
    assert edges_of(points_of(values), 2) == [0, 1, 5]
    assert edges_of(points_of(values), 3) == [0, 1, 2, 5]
    assert edges_of(points_of(values), 5) == [0, 1, 2, 3, 4, 5]
    assert edges_of(points_of(values), 100) == [0, 1, 2, 3, 4, 5]


def test_minus_zero_is_zero() -> None:
    points = points_of(np.array([0.0, -0.0, -1.0, -0.0], np.float32))
    assert points.rows() == [(-1.0, 1), (0.0, 3)]
    assert math.copysign(1, points["value"][1]) == 1


# Columns with more values than points.


def test_all_values_are_kept_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "NUM_POINTS", 8)
    for number, kept in ((8, 8), (9, 9), (10, 9)):
        points = points_of(np.arange(number, dtype=np.float32))
        assert len(points) == kept
        assert points["count"].sum() == number
        assert points["value"].to_list()[:: len(points) - 1] == [0, number - 1]


@pytest.mark.parametrize("num_bins", [1, 2, 4, 8, 16, 32])
def test_edges_without_ties_are_exact_where_bins_divide_points(num_bins: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "NUM_POINTS", 64)
    for number in (66, 100, 997, 1024):
        values = np.random.default_rng(number).normal(size=number).astype(np.float32)
        points = points_of(values)
        assert len(points) == 65
        assert edges_of(points, num_bins) == by_definition(values.tolist(), num_bins)


@pytest.mark.parametrize("column", ["no ties", "90 % zero", "99.9 % zero", "zero in the middle", "both ends"])
def test_edges_are_off_by_less_than_a_point(column: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "NUM_POINTS", 64)
    values = np.sort(COLUMNS[column](np.random.default_rng(5)).astype(np.float32))
    points = points_of(values)
    counts = Counter(values.tolist())
    assert points["count"].sum() == len(values)
    alone = {value for value, count in counts.items() if count * 64 >= len(values)}
    others = [value for value in values.tolist() if value not in alone]
    for num_bins in range(1, 33):
        edges, expected = edges_of(points, num_bins), by_definition(values.tolist(), num_bins)
        assert len(edges) == len(expected)
        assert set(edges) <= set(values.tolist())
        for edge, exact in zip(edges, expected):
            assert edge >= exact
            assert sum(exact < value <= edge for value in others) <= math.ceil(len(others) / (64 - len(alone)))


# Of prepared folders.


def frame(num_rows: int = 1001, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "item": rng.integers(0, 5, num_rows),
            "price": rng.lognormal(0, 1, num_rows),
            "count": rng.geometric(0.6, num_rows) - 1.0,
            "flag": rng.integers(0, 2, num_rows).astype(float),
            "same": np.full(num_rows, 20_240_100.0),
            "label": rng.integers(0, 2, num_rows),
        }
    )


FEATURES: list[Feature] = [Numeric("price", "log"), Categorical("item")]
FEATURES += [Numeric(name, "none") for name in ("count", "flag", "same")]


def prepared(folder: Path, **splits: pl.DataFrame) -> Path:
    prepare(splits, folder, features=FEATURES, overwrite=True, log=None)
    return folder


@pytest.mark.parametrize("num_bins", [1, 3, 7, 31])
def test_edges_are_of_the_numbers_of_train(tmp_path: Path, num_bins: int) -> None:
    folder = prepared(tmp_path / "p", train=frame(), valid=frame(50, seed=1))
    edges = quantile_edges(folder, num_bins)
    train = pl.read_parquet(folder / "train")
    shares = np.linspace(0, 1, num_bins + 1)
    assert edges[0] == np.quantile(train["price"].to_numpy(), shares, method="inverted_cdf").tolist()
    assert edges[1] == by_definition(train["count"].to_list(), num_bins)
    assert edges[2] == [0.0, 1.0]
    assert edges[3] == [20_240_100.0, 40_480_200.0]  # c and c + max(1, |c|), of float32
    PiecewiseLinear(edges)
    Bucketised(edges)


def test_the_folder_keeps_points_that_give_what_train_gives(tmp_path: Path) -> None:
    price = np.random.default_rng(2).permutation(9000)
    folder = prepared(tmp_path / "p", train=frame(9000).with_columns(price=price))
    kept = {num_bins: quantile_edges(folder, num_bins) for num_bins in (1, 7, 32, 64)}
    assert sorted(path.name for path in (folder / "numbers").iterdir()) == [
        "count.parquet",
        "flag.parquet",
        "price.parquet",
        "same.parquet",
    ]
    price = pl.read_parquet(folder / "numbers" / "price.parquet")
    assert price.schema == {"value": pl.Float32, "count": pl.Int64}
    assert len(price) == 6401
    assert price["count"].sum() == 9000
    assert kept[32][0] == by_definition(pl.read_parquet(folder / "train")["price"].to_list(), 32)
    shutil.rmtree(folder / "numbers")  # as older folders are
    write_manifest(folder)
    assert {num_bins: quantile_edges(folder, num_bins) for num_bins in kept} == kept


def test_points_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    digits = fingerprint(prepared(tmp_path / "p", train=frame()))
    assert [part for part in digits if part.startswith("numbers/")] == [
        "numbers/price",
        "numbers/count",
        "numbers/flag",
        "numbers/same",
    ]
    assert fingerprint(prepared(tmp_path / "q", train=frame())) == digits
    others = fingerprint(prepared(tmp_path / "q", train=frame().reverse()))
    assert {part for part in digits if digits[part] != others[part]} == {"train"}


@pytest.mark.parametrize("transform", ["none", "standard", "log_standard"])
def test_missing_numbers_stand_apart(tmp_path: Path, transform: Any) -> None:
    rng = np.random.default_rng(5)
    price = pl.Series(rng.lognormal(size=1000))
    often = price.to_frame("price").with_columns(
        pl.when(pl.Series(rng.random(1000) < 0.3)).then(None).otherwise("price").alias("often"),
        pl.when(pl.Series(rng.random(1000) < 0.01)).then(None).otherwise("price").alias("seldom"),
        label=pl.Series(rng.integers(0, 2, 1000)),
    )
    features = [Numeric(name, transform) for name in ("often", "price", "seldom")]
    schema = prepare({"train": often}, tmp_path / "p", features=features, labels="label", log=None)
    plain, apart = (quantile_edges(tmp_path / "p", 16, missing_apart=one) for one in (False, True))
    assert apart[1:] == plain[1:]  # nothing is missing, or in fewer rows than a bin has
    assert schema.dense[0].parameters is not None
    fill = np.float32(schema.dense[0].parameters["fill"])
    numbers = np.unique(pl.read_parquet(tmp_path / "p" / "train")["often"].to_numpy())
    place = int(np.searchsorted(numbers, fill))
    assert numbers[place] == fill
    assert apart[0] == sorted({*plain[0], *numbers[place - 1 : place + 2].tolist()})
    # What is learnt of the missing ones alone changes no other number.
    encoder = PiecewiseLinear(apart[:1], embedding_dim=1)
    position = apart[0].index(float(fill))
    before = encoder(torch.from_numpy(numbers)[:, None])
    with torch.no_grad():
        encoder.weight[0, position - 1] += 1
        encoder.weight[0, position] -= 1
    moved = (encoder(torch.from_numpy(numbers)[:, None]) - before).abs().flatten() > 1e-4
    assert moved.nonzero().flatten().tolist() == [place]


def test_no_bin_is_empty(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "p", train=frame(200))
    train = pl.read_parquet(folder / "train")
    for name, own in zip(("price", "count", "flag", "same"), quantile_edges(folder, 64)):
        held = np.histogram(train[name].to_numpy(), bins=np.array([*own[:-1], math.inf]))[0]
        assert (held > 0).all()


def test_edges_do_not_look_at_valid_and_test(tmp_path: Path) -> None:
    first = quantile_edges(prepared(tmp_path / "p", train=frame(), valid=frame(seed=1), test=frame(seed=2)))
    other = frame(seed=3).with_columns(pl.col("price", "count") * 1000)
    assert quantile_edges(prepared(tmp_path / "q", train=frame(), valid=other, test=other)) == first
    assert quantile_edges(str(prepared(tmp_path / "r", train=other, valid=frame(), test=frame()))) != first


def test_edges_do_not_depend_on_order_or_files(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "p", train=frame())
    expected = quantile_edges(folder)
    shutil.rmtree(folder / "numbers")
    train = pl.read_parquet(folder / "train").sample(fraction=1, shuffle=True, seed=5)
    for path in (folder / "train").iterdir():
        path.unlink()
    train[:300].write_parquet(folder / "train" / "a.parquet")
    train[300:].write_parquet(folder / "train" / "b[1].parquet")
    train[:0].write_parquet(folder / "train" / "c.parquet")
    write_manifest(folder)
    assert quantile_edges(folder) == expected


@pytest.mark.parametrize("constant", [0.0, 0.5, -3.0, 1e-30, 3e8])
def test_a_constant_gets_one_bin(tmp_path: Path, constant: float) -> None:
    same = pl.lit(constant).alias("same")
    (edges,) = quantile_edges(prepared(tmp_path / "p", train=frame(20).with_columns(same)))[3:]
    stored = float(np.float32(constant))
    assert edges == [stored, stored + max(1.0, abs(stored))]
    fields = PiecewiseLinear([edges], embedding_dim=3)
    torch.testing.assert_close(fields(torch.tensor([[constant]]))[0], fields.bias[0])


def test_wrong_data_says_how_to_fix_it(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "p", train=frame())
    for wrong in (0, 3201):
        with pytest.raises(ValueError, match=f"num_bins must be at least 1 and at most 3,200, got {wrong}"):
            quantile_edges(folder, wrong)
    with pytest.raises(SchemaError, match="not a prepared folder"):
        quantile_edges(tmp_path / "nowhere")
    prepare({"train": frame()}, tmp_path / "q", features=[Categorical("item")], ignore=frame().columns[1:5], log=None)
    assert not (tmp_path / "q" / "numbers").exists()
    with pytest.raises(ValueError, match=r"no numeric feature .* Numeric\(\.\.\.\)"):
        quantile_edges(tmp_path / "q")
    kept = folder / "numbers" / "price.parquet"
    points = pl.read_parquet(kept)
    for damaged in (points.reverse(), points[:0], points.with_columns(count=0), points.with_columns(value=math.nan)):
        damaged.write_parquet(kept)
        write_manifest(folder)
        with pytest.raises(SchemaError, match=r"price.parquet does not hold finite values that increase"):
            quantile_edges(folder)
    kept.unlink()
    with pytest.raises(SchemaError, match=r"price.parquet is missing: copy the folder"):
        quantile_edges(folder)


def test_wrong_numbers_of_an_older_folder_are_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "p", train=frame())
    shutil.rmtree(folder / "numbers")
    train = pl.read_parquet(folder / "train")
    path = next((folder / "train").iterdir())
    for bad in (math.nan, math.inf, -math.inf):
        train.with_columns(pl.col("price").replace(train["price"][7], bad)).write_parquet(path)
        write_manifest(folder)
        with pytest.raises(SchemaError, match=f"column 'price' holds {bad}, expected finite numbers"):
            quantile_edges(folder)
    assert Schema.load(folder).dense[0].name == "price"
    for path in (folder / "train").iterdir():
        path.unlink()
    write_manifest(folder)
    with pytest.raises(SchemaError, match=r"holds no \*.parquet file"):
        quantile_edges(folder)
