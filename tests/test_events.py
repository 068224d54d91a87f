"""Histories and rates of a raw log: each row is told its past, by brute force the same, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ctrlib as ctr
from ctrlib.data import coded, derived
from ctrlib.data.coded import read_coded
from ctrlib.data.derived import derive
from ctrlib.data.event_state import State
from ctrlib.data.events import Events, History

Row = dict[str, Any]
MADE = Events(
    "ts",
    [History("item", by="user", max_length=3), History("shop", by="user", max_length=4, events="all")],
    ["item", "user", ("user", "shop")],
    delay=2,
    strength=5,
    label="click",
)


def by_hand(events: Events, log: list[Row], row: Row) -> Row:
    """What a row sees, the long way."""
    seen = [one for one in log if one["ts"] < row["ts"] - events.delay]
    known = [one["click"] for one in seen if one["click"] is not None]
    prior = (sum(known) + 0.5) / (len(known) + 1.0)
    found: Row = {}
    for h in events.histories:
        mine = [one for one in seen if row[h.by] is not None and one[h.by] == row[h.by] and one[h.item] is not None]
        mine = [one for one in mine if h.events == "all" or one["click"] == 1]
        found[h.name] = [o[h.item] for o in sorted(mine, key=lambda o: (o["ts"], o[h.item].encode()))][-h.max_length :]
    for key in events.keys:
        mine = [one for one in seen if all(row[k] is not None and one[k] == row[k] for k in key)]
        clicks = [one["click"] for one in mine if one["click"] is not None]
        name = "_".join(key)
        found[f"{name}_rate"] = (sum(clicks) + events.strength * prior) / (len(clicks) + events.strength)
        found[f"{name}_count"] = len(clicks)
    return found


def drawn(seed: int, rows: int, *, moments: int = 40, missing: float = 0.05) -> list[Row]:
    """A random log with many ties."""
    rng = np.random.default_rng(seed)

    def one(letter: str, number: int) -> str | None:
        return None if rng.random() < missing else f"{letter}{rng.integers(number)}"

    return [
        {
            "user": one("u", 8),
            "item": one("i", 12),
            "shop": one("s", 3),
            "ts": int(rng.integers(moments)),
            "click": None if rng.random() < missing else int(rng.random() < 0.4),
        }
        for _ in range(rows)
    ]


SCHEMA = {"user": pl.String, "item": pl.String, "shop": pl.String, "ts": pl.Int64, "click": pl.Int64}


def frame_of(log: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(log, schema=SCHEMA)


def made(log: list[Row] | pl.DataFrame, folder: Path, events: Events = MADE, before: State | None = None) -> Any:
    """The columns that are made of a log, and the state after it."""
    frame = log if isinstance(log, pl.DataFrame) else frame_of(log)
    tables, state = derive(
        {"data": read_coded(frame, folder / "raw")}, {"train": pl.lit(True)}, before or State.new(events), None, folder
    )
    return tables["data"].frame.select(events.names).collect(), state


def same_state(a: State, b: State, folder: Path) -> None:
    """Bit for bit, as it lies on the disk."""
    files = []
    for name, state in (("a", a), ("b", b)):
        (folder / name).mkdir()
        state.save(folder / name)
        files.append({path.name: path.read_bytes() for path in (folder / name / "events").iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_told_what_was_before_it(seed: int, tmp_path: Path) -> None:
    log = drawn(seed, 200)
    found, _ = made(log, tmp_path)
    assert found.to_dicts() == [by_hand(MADE, log, row) for row in log]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "user": st.sampled_from([None, "a", "b"]),
                "item": st.sampled_from([None, "x", "y", "ü"]),
                "shop": st.sampled_from(["s", "t"]),
                "ts": st.integers(0, 6),
                "click": st.sampled_from([None, 0, 1, 1]),
            }
        ),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from([0, 1, 2.5, 10]),
    st.data(),
)
def test_small_logs_with_ties_in_two_parts(
    tmp_path_factory: pytest.TempPathFactory, log: list[Row], delay: float, data: st.DataObject
) -> None:
    """Whole, as state and later part, and as rows to come, all the same."""
    folder = tmp_path_factory.mktemp("log")
    events = Events("ts", MADE.histories, MADE.rates, delay, 5, "click")
    expected = [by_hand(events, log, row) for row in log]
    found, whole = made(log, folder / "whole", events)
    assert found.to_dicts() == expected
    cut = data.draw(st.integers(-1, 6))
    parts = [[row for row in log if row["ts"] <= cut], [row for row in log if row["ts"] > cut]]
    if not all(parts):
        return
    _, state = made(parts[0], folder / "first", events)
    later, state_after = made(parts[1], folder / "second", events, state)
    assert later.to_dicts() == [by_hand(events, log, row) for row in parts[1]]
    same_state(state_after, whole, folder)
    (folder / "kept").mkdir()
    state.save(folder / "kept")
    schema = ctr.Schema((ctr.Numeric("x"),), ("click",), raw_format={"events": events.as_dict()})
    loaded = State.load(folder / "kept", schema)
    assert loaded is not None
    for row in parts[1]:  # each alone, as it comes
        table = read_coded(frame_of([row]).drop("click"), folder / f"row {id(row)}")
        told = loaded.add(table).frame.select(events.names).collect().to_dicts()
        assert told == [by_hand(events, parts[0], row)]


def test_the_order_of_rows_and_files_does_not_matter(tmp_path: Path) -> None:
    log = drawn(7, 300)
    found, state = made(log, tmp_path / "1")
    order = np.random.default_rng(0).permutation(len(log))
    shuffled, state_too = made(frame_of(log)[order], tmp_path / "2")
    assert shuffled.equals(found[order])
    same_state(state, state_too, tmp_path)
    for i, part in enumerate((frame_of(log)[order[:120]], frame_of(log)[order[120:]])):
        part.write_csv(tmp_path / f"{i}.csv")
    table = read_coded([tmp_path / "0.csv", tmp_path / "1.csv"], tmp_path / "3")
    tables, state_too = derive({"data": table}, {"train": pl.lit(True)}, State.new(MADE), None, tmp_path / "3")
    assert tables["data"].frame.select(MADE.names).collect().equals(shuffled)
    (tmp_path / "again").mkdir()
    same_state(state, state_too, tmp_path / "again")


def test_blocks_of_any_size_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large blocks are cut, of coded cells, of others, and of those whose codes lie apart."""
    log = frame_of(drawn(3, 230)).with_columns(price=pl.int_range(230) / 7, wide=pl.int_range(230).cast(pl.Int128))
    expected, _ = made(log, tmp_path / "1")
    table = read_coded(log, tmp_path / "2")
    monkeypatch.setattr(derived, "BLOCK_ROWS", 64)
    tables, _ = derive({"data": table}, {"train": pl.lit(True)}, State.new(MADE), None, tmp_path / "2")
    cut = tables["data"]
    assert isinstance(cut, coded.CodedTable)
    assert [(block.first_row, block.num_rows) for block in cut.blocks] == [(0, 64), (64, 64), (128, 64), (192, 38)]
    assert cut.frame.drop("__row__").collect().equals(log.hstack(expected))
    assert cut.frame.select("__row__").collect()["__row__"].to_list() == list(range(230))


def test_a_text_file_that_compiled_loops_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    log = frame_of(drawn(3, 230))
    log.write_csv(tmp_path / "log.csv")
    monkeypatch.setattr(coded, "are_worth", lambda num_bytes: True)
    monkeypatch.setattr(derived, "BLOCK_ROWS", 100)
    table = read_coded(tmp_path / "log.csv", tmp_path / "raw")
    assert table.blocks[0].apart
    tables, _ = derive({"data": table}, {"train": pl.lit(True)}, State.new(MADE), None, tmp_path)
    rows = tables["data"].frame.collect()
    assert rows.select(MADE.names).to_dicts() == [by_hand(MADE, log.to_dicts(), row) for row in log.to_dicts()]
    assert rows["item"].to_list() == log["item"].to_list()


# ------------------------------------------------------------------------------------------- from end to end, in Python


def prepared(data: Any, out: Path, events: Events = MADE, **options: Any) -> ctr.Schema:
    said: dict[str, Any] = {"labels": "click", "missing_labels": "mask", "events": events, "log": None, **options}
    if options.get("like") is not None:
        said["events"] = None
    return ctr.prepare(data, out, **said)


def decoded(folder: Path, split: str, schema: ctr.Schema, events: Events = MADE) -> list[Row]:
    """The made columns of a split as they were before they were encoded."""
    rows = pl.read_parquet(folder / split)
    found: list[Row] = [{} for _ in range(rows.height)]
    for name in events.names:
        feature = schema[name]
        if isinstance(feature, ctr.Sequence):
            values = pl.read_parquet(folder / "vocab" / f"{feature.vocabulary}.parquet")
            text = {None: None, **dict(zip(values["id"], values["value"]))}
            column: list[Any] = [[text.get(one, "?") for one in cell] for cell in rows[name].to_list()]
        else:
            assert isinstance(feature, ctr.Numeric)
            assert feature.parameters is not None
            numbers = rows[name].cast(pl.Float64).to_numpy() * feature.parameters["sd"] + feature.parameters["mean"]
            column = (np.expm1(numbers) if name.endswith("_count") else numbers).tolist()
        for row, value in zip(found, column):
            row[name] = value
    return found


def assert_told(found: list[Row], expected: list[Row], known: set[str]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        for name, value in theirs.items():
            if isinstance(value, list):
                assert mine[name] == [one if one in known else "?" for one in value]
            else:
                assert mine[name] == pytest.approx(value, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("form", ["csv", "parquet", "frame"])
def test_prepare_and_predict_tell_the_same(form: str, tmp_path: Path) -> None:
    """The last day is told what a log of all days would tell it, if labels come a day late."""
    log = [{**row, "ts": row["ts"] // 10 * 10 + 3, "price": 1.5} for row in drawn(11, 400)]
    days = [[row for row in log if row["ts"] < 30], [row for row in log if row["ts"] >= 30]]
    frames = [pl.DataFrame(rows, schema={**SCHEMA, "price": pl.Float64}) for rows in days]
    events = Events("ts", MADE.histories, MADE.rates, delay=9, strength=5)
    whole: Any = pl.concat(frames)
    if form != "frame":
        whole = tmp_path / f"log.{form}"
        getattr(pl.concat(frames), f"write_{form}")(whole)
    schema = prepared(whole, tmp_path / "p", events, split=(4, 3, 3), split_by="ts")
    settled = events.settled(("click",))
    values = set(pl.read_parquet(tmp_path / "p" / "vocab" / "item.parquet")["value"])
    values |= set(pl.read_parquet(tmp_path / "p" / "vocab" / "shop.parquet")["value"])
    in_order = {"train": [], "valid": [], "test": []}
    for row in log:
        in_order["train" if row["ts"] <= 13 else "valid" if row["ts"] <= 23 else "test"].append(row)
    sizes = {name: pl.read_parquet(tmp_path / "p" / name).height for name in in_order}
    assert sizes == {name: len(rows) for name, rows in in_order.items()}, "the split is another than this test's"
    for name, rows in in_order.items():
        found = decoded(tmp_path / "p", name, schema, settled)
        assert_told(found, [by_hand(settled, log, row) for row in rows], values)
    first = frames[0]
    schema = prepared(first, tmp_path / "first", events, split=(1, 0, 0))
    encoder = ctr.Encoder.load(tmp_path / "first")
    columns, counts = encoder.transform(frames[1].drop("click"))
    assert "ts" not in counts.ignored
    single = [encoder.transform(row)[0] for row in frames[1].drop("click").to_dicts()]
    assert np.array_equal(np.concatenate([one.floats for one in single]), columns.floats, equal_nan=True)
    frames[1].drop("click").write_parquet(tmp_path / "second.parquet")
    from_file, _ = encoder.transform(tmp_path / "second.parquet")
    assert np.array_equal(from_file.floats, columns.floats, equal_nan=True)
    newer = prepared({"train": frames[1]}, tmp_path / "second", like=tmp_path / "first")
    assert newer.hash == schema.hash
    rows = ctr.Loader(tmp_path / "second", "train", batch_size=1000)
    batch = next(iter(rows))
    assert np.array_equal(batch.dense.numpy(), columns.floats[:, : len(schema.dense)])
    for name in ("item_history", "shop_history"):
        listed = pl.read_parquet(tmp_path / "second" / "train")[name].to_list()
        ragged = columns.ragged[name]
        assert [ragged.values[a:b].tolist() for a, b in zip(ragged.offsets, ragged.offsets[1:])] == listed
