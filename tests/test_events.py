"""Histories and rates of a raw log: each row is told its past, by brute force the same, and nothing else."""

from __future__ import annotations

import json
import shutil
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
from ctrlib.data.table import RawTable

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
        cells = {name: cell for name, cell in row.items() if name != "click"}
        assert loaded.add_to_cells([cells], frozenset([""])) == [{**cells, **told[0]}]


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


def auc_of(folder: Path, split: str, columns: list[str]) -> float:
    """Of a logistic regression, fitted on train, of the columns that are made."""
    from sklearn.linear_model import LogisticRegression

    train, rows = (pl.read_parquet(folder / name) for name in ("train", split))
    model = LogisticRegression(C=1e6, max_iter=1000).fit(train[columns].to_numpy(), train["click"].to_numpy())
    return ctr.metrics.auc(rows["click"].to_numpy(), model.decision_function(rows[columns].to_numpy()))


@pytest.mark.parametrize("time", ["ts", None])
def test_a_coin_is_not_foretold(time: str | None, tmp_path: Path) -> None:
    """Whose label was in the rate of its row would be told by it, since pairs come up about twice."""
    rng = np.random.default_rng(5)
    rows = 12_000
    log = pl.DataFrame(
        {
            "user": rng.integers(0, 800, rows),
            "item": rng.integers(0, 800, rows),
            "ts": rng.integers(0, 3000, rows),
            "click": rng.integers(0, 2, rows),
        }
    )
    events = Events(time, [History("item", "user")] if time else [], ["user", "item", ("user", "item")], strength=1)
    prepared(log, tmp_path / "p", events, split_by=time, ignore=[] if time else ["ts"], split=(2, 1, 1))
    names = [name for name in events.names if not name.endswith("_history")]
    for split in ("train", "valid", "test"):
        auc = auc_of(tmp_path / "p", split, names)
        number = pl.read_parquet(tmp_path / "p" / split).height
        assert abs(auc - 0.5) < 4 * np.sqrt(1 / (3 * number)), split  # the standard error of a coin's AUC
    # The test would see it: the rate of all rows, its own among them, tells the label.
    leaking = log.with_columns(rate=(pl.col("click").sum().over("user") + 0.5) / (pl.len().over("user") + 1))
    assert ctr.metrics.auc(log["click"].to_numpy(), leaking["rate"].to_numpy()) > 0.6


def test_without_times_rates_are_out_of_fold(tmp_path: Path) -> None:
    """A row of train sees the other nine folds, one of valid or test all of train."""
    log = frame_of(drawn(2, 300))
    events = Events(None, (), ["item", ("user", "shop")], strength=3, label="click")
    tables, state = derive(
        {name: read_coded(part, tmp_path / name) for name, part in (("train", log[:240]), ("valid", log[240:]))},
        {},
        State.new(events),
        None,
        tmp_path / "made",
    )
    rows = tables["train"].frame.with_columns(fold=derived.row_hash(pl.col("__row__"), 1 << 40) % 10).collect()
    folds = rows["fold"].to_list()
    assert set(folds) == set(range(10))
    train = [{**row, "ts": 0, "fold": fold} for row, fold in zip(log[:240].to_dicts(), folds)]
    for row, found in zip(train, rows.select(events.names).to_dicts()):
        others = [one for one in train if one["fold"] != row["fold"]]
        assert found == by_hand(events, others, {**row, "ts": 1})
    told = tables["valid"].frame.select(events.names).collect().to_dicts()
    assert told == [by_hand(events, train, {**row, "ts": 1}) for row in log[240:].to_dicts()]
    table = read_coded(log[240:].drop("click"), tmp_path / "new")
    assert state.add(table).frame.select(events.names).collect().to_dicts() == told
    # With newer events they stay the same whatever was before: sums that are settled are added to those of each fold.
    more, _ = derive({"train": read_coded(log[240:], tmp_path / "m")}, {}, state, None, tmp_path / "more")
    fold = more["train"].frame.select(derived.row_hash(pl.col("__row__"), 1 << 40) % 10).collect().to_series()
    newer = [{**row, "ts": 0, "fold": one} for row, one in zip(log[240:].to_dicts(), fold)]
    for row, found in zip(newer, more["train"].frame.select(events.names).collect().to_dicts()):
        seen = [*train, *(one for one in newer if one["fold"] != row["fold"])]
        assert found == by_hand(events, seen, {**row, "ts": 1})


def test_what_the_columns_are(tmp_path: Path) -> None:
    log = frame_of(drawn(4, 120, missing=0))
    given = [ctr.Categorical("item", vocabulary="things", min_count=3), ctr.Categorical("twin", vocabulary="things")]
    events = Events("ts", [History("item", "user", 7), History("shop", "user")], ["user"])
    log = log.with_columns(twin=pl.col("item"))
    schema = prepared(log, tmp_path / "p", events, features=[given[0], ctr.Categorical("twin", 3, None, "things")])
    assert [feature.name for feature in schema.features] == [
        *("item", "twin", "item_history", "shop_history", "user_rate", "user_count", "user", "shop")
    ]
    assert {name: {f.name for f in features} for name, features in schema.vocabularies.items()} == {
        "things": {"item", "twin", "item_history"},
        "shop": {"shop_history", "shop"},
        "user": {"user"},
    }
    history = schema["item_history"]
    assert isinstance(history, ctr.Sequence)
    assert (history.max_length, history.min_count) == (7, 3)
    left_out = ctr.prepare(
        log, tmp_path / "q", labels="click", events=events, ignore=["shop", "twin", "user_count"], log=None
    )
    shops = left_out["shop_history"]
    assert isinstance(shops, ctr.Sequence)
    assert shops.vocabulary is None  # one of its own, since the shop is no feature
    assert [feature.name for feature in left_out.dense] == ["user_rate"]
    row = {"user": "u1", "item": "i1", "shop": "s1", "ts": 99}
    assert ctr.Encoder.load(tmp_path / "q").transform(row)[1].ignored == []
    assert left_out.vocabularies.keys() == {"item", "shop_history", "user"}
    assert (schema.raw_format or {})["events"]["label"] == "click"
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    assert report["features"]["user_rate"]["reason"] == "made: smoothed rate of 'user' before the row"
    assert report["left_out"]["ts"] == "ignored: the time of the events"
    assert [
        one for one in report["remarks"] if one.startswith("rows see the events before them by 'ts', and are split at")
    ]
    parts = [ctr.fingerprint(tmp_path / name)["events"] for name in ("p", "q")]
    assert parts[0] == parts[1]  # the same log


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"time": "ts"}, "make nothing: name histories"),
    "no time": ({"histories": [History("item", "user")]}, "a history needs the times"),
    "negative delay": ({"time": "ts", "rates": ["item"], "delay": -1}, "delay is -1, expected 0 or more"),
    "no number": ({"time": "ts", "rates": ["item"], "delay": float("nan")}, "delay is nan"),
    "delay without time": ({"rates": ["item"], "delay": 3}, "a delay needs times"),
    "strength": ({"rates": ["item"], "strength": 0}, "strength is 0, expected more than 0"),
    "twice": ({"rates": ["item", ("item",)]}, r"columns \['item_count', 'item_rate'\] twice"),
    "two histories": (
        {"time": "ts", "histories": [History("item", "user"), History("item", "shop")]},
        r"columns \['item_history'\] twice",
    ),
    "same column": ({"rates": [("item", "item")]}, "a column, or several that differ"),
    "no column": ({"rates": [()]}, "a column, or several that differ"),
    "length": ({"time": "ts", "histories": [History("item", "user", 0)]}, "max_length is 0"),
    "events": ({"time": "ts", "histories": [History("item", "user", 5, "some")]}, "events is 'some'"),  # type: ignore[arg-type]
    "text": ({"rates": "item"}, r"write \['item'\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_events_that_cannot_be(name: str) -> None:
    arguments, said = BAD[name]
    with pytest.raises((ValueError, TypeError), match=said):
        Events(**arguments)


HISTORY = Events("ts", [History("item", "user")], ["shop"])
WRONG: dict[str, tuple[Any, Any, Any, str]] = {
    "no time column": (lambda f: f.drop("ts"), HISTORY, {}, "has no column 'ts', for time of events"),
    "no such key": (lambda f: f, Events("ts", (), ["shops"]), {}, r"has no column 'shops'.* closest are \['shop'"),
    "no such user": (lambda f: f, Events("ts", [History("item", "person")]), {}, "has no column 'person'"),
    "time is text": (
        lambda f: f.with_columns(ts=pl.lit("May")),
        HISTORY,
        {},
        "row 1, column 'ts' holds 'May'; expected a number or a date",
    ),
    "a time is missing": (
        lambda f: f.with_columns(ts=pl.when(pl.int_range(pl.len()) != 4).then("ts")),
        HISTORY,
        {"on_bad_row": "skip"},
        "row 5, column 'ts' holds None",
    ),
    "two units": (
        lambda f: f.with_columns(ts=pl.when(pl.col("ts") > 5).then(1.7e12).otherwise(1.7e9)),
        HISTORY,
        {},
        "times of two units",
    ),
    "clash": (lambda f: f.with_columns(shop_rate=1.0), HISTORY, {}, r"has columns \['shop_rate'\] already"),
    "lists": (lambda f: f.with_columns(shop=pl.concat_list("shop")), HISTORY, {}, "'shop' has type List.*one id a row"),
    "fractions": (lambda f: f.with_columns(shop=pl.lit(0.5)), HISTORY, {}, "'shop' holds 0.5; expected text or int"),
    "no label": (lambda f: f.drop("click"), HISTORY, {}, "has no column 'click', the label of events"),
    "another label": (lambda f: f, Events("ts", (), ["item"], label="buy"), {}, "are of label 'buy'"),
    "several labels": (
        lambda f: f.with_columns(buy=pl.col("click")),
        HISTORY,
        {"labels": ["click", "buy"]},
        r"one of the labels \['click', 'buy'\]: name it",
    ),
    "a number's history": (
        lambda f: f.with_columns(item=pl.int_range(pl.len())),
        HISTORY,
        {"features": [ctr.Numeric("item")]},
        "said to be numeric: make it a Categorical",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_logs_that_cannot_be(name: str, tmp_path: Path) -> None:
    change, events, options, said = WRONG[name]
    with pytest.raises((ctr.SchemaError, ctr.DataError), match=said):
        prepared(change(frame_of(drawn(1, 30, missing=0))), tmp_path / "p", events, **options)
    assert not (tmp_path / "p").exists()


def test_tables_of_many_machines_are_refused(tmp_path: Path) -> None:
    table = RawTable((frame_of(drawn(1, 5)).lazy(),), "of Spark")
    with pytest.raises(ValueError, match="made on one machine, in the order of time: prepare without Spark"):
        derive({"data": table}, {}, State.new(MADE), None, tmp_path)


def test_rows_that_are_left_out_have_happened(tmp_path: Path) -> None:
    """Two rows of three, since a price is no number; the click of that row is in the rate of the last."""
    rows = {"item": ["a"] * 3, "ts": [1, 2, 3], "click": [1, 1, 0], "price": ["1.5", "much", "2.5"]}
    events = Events("ts", (), ["item"], strength=1)
    options: dict[str, Any] = {"features": [ctr.Numeric("price"), ctr.Numeric("item_count", "none")]}
    prepared(pl.DataFrame(rows), tmp_path / "p", events, on_bad_row="skip", split=(1, 0, 0), **options)
    assert pl.read_parquet(tmp_path / "p" / "train")["item_count"].to_list() == [0, 2]


def test_dates_are_times_and_a_delay_is_in_seconds(tmp_path: Path) -> None:
    """Text in one file, typed times in another; the state knows that they are dates."""
    log = drawn(6, 150, moments=30)
    day = pl.datetime(2024, 5, 1) + pl.duration(hours=pl.col("ts"))
    typed = frame_of(log).with_columns(ts=day)
    written = typed.with_columns(ts=pl.col("ts").dt.strftime("%Y-%m-%dT%H:%M:%S"))
    events = Events("ts", MADE.histories, MADE.rates, 2 * 3600, 5, "click")
    hours = Events("ts", MADE.histories, MADE.rates, 2, 5, "click")
    expected = [by_hand(hours, log, row) for row in log]
    for name, frame in (("typed", typed), ("ms", typed.cast({"ts": pl.Datetime("ms")})), ("written", written)):
        found, state = made(frame, tmp_path / name, events)
        assert found.to_dicts() == expected
        assert (state.are_dates, state.last) == (True, 1714521600e6 + 29 * 3600e6)
    later = frame_of([{**log[0], "ts": 31}]).drop("click")
    for frame in (later.with_columns(ts=day), later.with_columns(ts=day.dt.strftime("%Y-%m-%d %H:%M"))):
        told = (
            state.add(read_coded(frame, tmp_path / f"later {frame['ts'].dtype}")).frame.select(events.names).collect()
        )
        assert told.to_dicts() == [by_hand(hours, log, {**log[0], "ts": 31})]
    with pytest.raises(ctr.SchemaError, match="'ts' holds numbers, and in the events before dates"):
        state.add(read_coded(later, tmp_path / "number"))
    early = later.with_columns(ts=pl.lit("2024-05-01"))
    with pytest.raises(
        ctr.DataError, match="holds '2024-05-01', before the last event that is known, of 2024-05-02 05:"
    ):
        state.add(read_coded(early, tmp_path / "early"))


def test_labels_may_be_text(tmp_path: Path) -> None:
    log = drawn(9, 80)
    words = {None: None, 0: "no", 1: "yes"}
    frame = pl.DataFrame([{**row, "click": words[row["click"]]} for row in log], {**SCHEMA, "click": pl.String})
    table = read_coded(frame, tmp_path / "raw")
    tables, _ = derive({"data": table}, {}, State.new(MADE), {"click": "yes"}, tmp_path)
    assert tables["data"].frame.select(MADE.names).collect().to_dicts() == [by_hand(MADE, log, row) for row in log]


# ------------------------------------------------------------------------------------------------- newer events, models


@pytest.fixture(scope="module")
def days() -> list[pl.DataFrame]:
    """Three days of a log of users with a taste: they click on one kind of items."""
    rng = np.random.default_rng(1)
    rows = 3000
    taste, kind = rng.integers(0, 4, 60), rng.integers(0, 4, 40)
    user, item = rng.integers(0, 60, rows), rng.integers(0, 40, rows)
    click = rng.random(rows) < np.where(taste[user] == kind[item], 0.8, 0.2)
    log = pl.DataFrame({"user": user, "item": item, "kind": kind[item], "click": click.astype(int)})
    log = log.with_columns(ts=pl.int_range(rows) // 3 * 3)
    return [log[:2001], log[2001:2601], log[2601:]]


@pytest.fixture(scope="module")
def trained(days: list[pl.DataFrame], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of the first day, and the prepared folder it was trained on."""
    home = tmp_path_factory.mktemp("trained")
    events = Events("ts", [History("item", "user", 5)], ["item", ("user", "kind")])
    prepared(days[0], home / "data", events, split_by="ts")
    config = {"model": "din", "embedding_dim": 4, "training": {"max_epochs": 1, "batch_size": 256}}
    model, _ = ctr.run(home / "data", config, out=home / "run")
    ctr.save_model(model, config, home / "data", home / "run")
    return home / "run", home / "data"


def copied(folder: Path, out: Path) -> Path:
    shutil.copytree(folder, out)
    return out


def test_a_model_goes_on_with_newer_events(
    days: list[pl.DataFrame], trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """To the bit what it is told of all events together; the weights stay."""
    run = copied(trained[0], tmp_path / "run")
    before, _ = ctr.Predictor.load(run).predict(days[2])
    days[1].write_csv(tmp_path / "second.csv")
    found = ctr.update(run, tmp_path / "second.csv")
    positives = int(days[1]["click"].sum())
    assert found == {"events": 600, "positives": positives, "last": 2598.0, "skipped": {}}
    after, counts = ctr.Predictor.load(run).predict(days[2].drop("click"))
    assert not after.equals(before)
    assert counts["ignored"] == []
    prepared(pl.concat(days[:2]), tmp_path / "both", ctr_events(trained[1]))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "both" / "events").iterdir()}
    assert {path.name: path.read_bytes() for path in (run / "events").iterdir()} == expected
    assert (run / "model.safetensors").read_bytes() == (trained[0] / "model.safetensors").read_bytes()
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in trained[0].iterdir())
    # Data for the next training, from what the model keeps.
    for name, like in (("third", run), ("third too", tmp_path / "both")):
        prepared({"train": days[2]}, tmp_path / name, like=like)
    rows = [pl.read_parquet(tmp_path / name / "train")["item_history"].list.len() for name in ("third", "third too")]
    assert rows[0].equals(rows[1])
    # Rows that came in between are too late, to be scored and to be added.
    with pytest.raises(ctr.DataError, match="row 1, column 'ts' holds 2001, before the last event"):
        ctr.Predictor.load(run).predict(days[1])
    with pytest.raises(ctr.DataError, match=r"row 1 \(line 2 of the file\).*not after the last event.*of 2598:"):
        ctr.update(run, tmp_path / "second.csv")
    assert {path.name: path.read_bytes() for path in (run / "events").iterdir()} == expected


def test_candidates_are_told_the_past_of_their_user(trained: tuple[Path, Path]) -> None:
    """`Predictor.rank` gives what `predict` gives, with rates of user and candidate together."""
    predictor, context = ctr.Predictor.load(trained[0]), {"user": 3, "ts": 5000}
    items = pl.DataFrame({"item": range(12), "kind": [0, 1, 2, 3] * 3})
    ranked = predictor.rank(context, items)
    whole, _ = predictor.predict(items.with_columns(**{name: pl.lit(cell) for name, cell in context.items()}))
    assert ranked["click"].to_list() == pytest.approx(whole["click"][ranked["row"].to_list()].to_list(), abs=1e-6)
    assert ranked["click"].is_sorted(descending=True)


def ctr_events(folder: Path) -> Events:
    return Events.of_dict((ctr.Schema.load(folder).raw_format or {})["events"])


def test_prepared_newer_rows_reach_back(days: list[pl.DataFrame], trained: tuple[Path, Path], tmp_path: Path) -> None:
    """`like`: a folder of the second day, from the first's state, and of both days, hold the same rows."""
    newer = prepared({"train": days[1]}, tmp_path / "second", like=trained[1])
    whole = prepared({"train": pl.concat(days[:2])}, tmp_path / "both", ctr_events(trained[1]))
    rows = pl.read_parquet(tmp_path / "second" / "train")
    every = decoded(tmp_path / "both", "train", whole, ctr_events(trained[1]))
    mine = decoded(tmp_path / "second", "train", newer, ctr_events(trained[1]))
    values = set(pl.read_parquet(trained[1] / "vocab" / "item.parquet")["value"])
    assert_told(mine, every[2001:], values)
    assert rows["item_history"].list.len().max() == 5
    states = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "events").iterdir()} for name in ("second", "both")
    ]
    assert states[0] == states[1]
    third = prepared({"train": days[2]}, tmp_path / "third", like=tmp_path / "second")
    assert third.hash == ctr.Schema.load(trained[1]).hash
    with pytest.raises(ctr.DataError, match=r"not after the last event that is known, of 2598:"):
        prepared({"train": days[1]}, tmp_path / "again", like=tmp_path / "second")
    other = Events("ts", (), ["item"])
    with pytest.raises(ctr.SchemaError, match=r"events is Events.* prepare without like"):
        ctr.prepare({"train": days[2]}, tmp_path / "other", like=trained[1], events=other, log=None)
    same = ctr_events(trained[1])
    ctr.prepare({"train": days[1]}, tmp_path / "same", like=trained[1], events=same, labels="click", log=None)
    assert ctr.fingerprint(tmp_path / "same") == ctr.fingerprint(tmp_path / "second")


def test_an_encoder_keeps_the_state(days: list[pl.DataFrame], trained: tuple[Path, Path], tmp_path: Path) -> None:
    fitted = ctr.Encoder.fit(days[0], labels="click", events=ctr_events(trained[1]))
    fitted.save(tmp_path / "saved")
    expected, _ = fitted.transform(days[2])
    again, _ = ctr.Encoder.load(tmp_path / "saved").transform(days[2].to_dicts())
    assert np.array_equal(again.floats, expected.floats, equal_nan=True)
    assert np.array_equal(again.ragged["item_history"].values, expected.ragged["item_history"].values)
    with pytest.raises(ctr.SchemaError, match="rows has no column 'ts'"):
        fitted.transform({"user": 1, "item": 2, "kind": 3})
    with pytest.raises(ctr.SchemaError, match=r"rows has columns \['item_rate'\] already"):
        fitted.transform({"user": 1, "item": 2, "kind": 3, "ts": 9999, "item_rate": 0.3})
    for cells in (
        {"user": 1.0, "item": 2, "kind": 3.0, "ts": "9999"},
        {"user": 1, "item": None, "kind": 3, "ts": 9999},
    ):
        usual, careful = (fitted.transform(rows)[0] for rows in (cells, pl.DataFrame([cells])))
        assert np.array_equal(usual.floats, careful.floats, equal_nan=True)
    unknown, _ = fitted.transform({"user": 999, "item": None, "kind": None, "ts": 9999})
    assert unknown.ragged["item_history"].values.tolist() == []
    schema = fitted.schema
    rate = schema["item_rate"]
    assert isinstance(rate, ctr.Numeric)
    assert rate.parameters is not None
    prior = (days[0]["click"].sum() + 0.5) / (len(days[0]) + 1)
    assert unknown.floats[0, 0] == pytest.approx((prior - rate.parameters["mean"]) / rate.parameters["sd"], rel=1e-5)


@pytest.mark.parametrize("name", ["state.json", "rate-1.parquet", "history-0.parquet", "pending.parquet"])
def test_damage_to_what_is_kept_is_named(name: str, trained: tuple[Path, Path], tmp_path: Path) -> None:
    run = copied(trained[0], tmp_path / "run")
    content = (run / "events" / name).read_bytes()
    (run / "events" / name).write_bytes(content[:-1])
    with pytest.raises(ctr.SchemaError, match=f"events/{name} is damaged"):
        ctr.Predictor.load(run).encoder  # noqa: B018  # which is read when it is first used
    (run / "events" / name).unlink()
    with pytest.raises(ctr.SchemaError, match=f"events/{name} is missing"):
        ctr.update(run, pl.DataFrame({"ts": [1]}))


def test_a_newer_kind_of_events_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    from ctrlib.manifest import write_manifest

    run = copied(trained[0], tmp_path / "run")
    schema = json.loads((run / "schema.json").read_text())
    schema["raw_format"]["events"]["decay"] = 0.5
    (run / "schema.json").write_text(json.dumps(schema))
    write_manifest(run)
    with pytest.raises(ctr.SchemaError, match=r"schema.json has events that this ctrlib does not know \(.*'decay'"):
        ctr.Encoder.load(run)


def test_updates_that_cannot_be(days: list[pl.DataFrame], trained: tuple[Path, Path], tmp_path: Path) -> None:
    run = copied(trained[0], tmp_path / "run")
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for change, said in (
        ({"click": pl.lit(2)}, "'click' holds 2, and no other row is better; expected 0 or 1"),
        ({"ts": pl.lit("noon")}, "'ts' holds 'noon'"),
    ):
        with pytest.raises((ctr.SchemaError, ctr.DataError), match=said):
            ctr.update(run, days[1].with_columns(**change))
    with pytest.raises(ctr.SchemaError, match="has no column 'click', the label"):
        ctr.update(run, days[1].drop("click"))
    with pytest.raises(ctr.SchemaError, match="has no column 'kind'"):
        ctr.update(run, days[1].drop("kind"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    odd = days[1].with_columns(click=pl.when(pl.col("ts") == 2001).then(3).otherwise("click"))
    with pytest.raises(ctr.DataError, match="row 1, column 'click' holds 3"):
        ctr.update(run, odd)
    found = ctr.update(run, odd, on_bad_row="skip")
    assert (found["events"], found["skipped"]) == (597, {"click: label is not 0 or 1": 3})


def test_a_model_without_events_has_nothing_to_update(days: list[pl.DataFrame], tmp_path: Path) -> None:
    ctr.prepare(days[0], tmp_path / "data", labels="click", log=None)
    config = {"model": "mlp", "embedding_dim": 4, "training": {"max_epochs": 1}}
    model, _ = ctr.run(tmp_path / "data", config)
    ctr.save_model(model, config, tmp_path / "data", tmp_path / "run")
    with pytest.raises(ctr.SchemaError, match="keeps no events"):
        ctr.update(tmp_path / "run", days[1])
    assert not (tmp_path / "run" / "events").exists()


def test_the_commands_from_end_to_end(
    days: list[pl.DataFrame], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ctrlib.cli import main

    for name, day in zip(("one", "two", "three"), days):
        day.write_csv(tmp_path / f"{name}.csv")
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    made_of = ["--time", "ts", "--history", "item:user:max_length=5", "--rate", "item", "user:kind"]
    assert (
        main(["prepare", str(tmp_path / "one.csv"), "--label", "click", "--split-by", "ts", *made_of, "--out", data])
        == 0
    )
    train = ["train", data, "--model", "din", "--dim", "4", "--epochs", "2", "--no-baselines", "--out", run]
    assert main(train) == 0
    assert main(["predict", run, str(tmp_path / "three.csv"), "--out", str(tmp_path / "before.csv")]) == 0
    capsys.readouterr()
    assert main(["update", run, str(tmp_path / "two.csv")]) == 0
    assert capsys.readouterr().out.startswith(f"600 events, {days[1]['click'].sum()} of them positive, added to ")
    assert main(["predict", run, str(tmp_path / "three.csv"), "--out", str(tmp_path / "after.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 399
    scores = [pl.read_csv(tmp_path / f"{name}.csv")["click"] for name in ("before", "after")]
    assert not scores[0].equals(scores[1])
    assert main(["evaluate", run, str(tmp_path / "three.csv"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["auc"] > 0.6  # of .5, had nobody a taste, and .8 at best
    assert main(["update", run, str(tmp_path / "two.csv")]) == 1
    assert "not after the last event that is known" in capsys.readouterr().err
    for flags, said in (
        (["--time", "ts"], "--time is for what is made of a log"),
        (["--history", "item"], "--history item: expected ITEM:USER"),
        (["--history", "item:user:size=3"], "unknown option 'size'"),
        (["--history", "item:user:max_length=0"], "max_length is '0'"),
        (["--history", "item:user"], "a history needs the times"),
        (["--rate", "item", "--delay", "3"], "a delay needs times"),
    ):
        wrong = ["prepare", str(tmp_path / "one.csv"), "--label", "click", *flags, "--out", str(tmp_path / "wrong")]
        assert main(wrong) == 1
        assert said in capsys.readouterr().err
