"""Damaged raw data is refused with an error that names file, row and column, or skipped and counted exactly."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrlib.data.prepare import prepare
from ctrlib.data.raw import read_raw
from ctrlib.data.scan import DataError, RowScanner
from ctrlib.schema import Categorical, Numeric, SchemaError

FEATURES = [Categorical("item"), Numeric("price")]
GOOD = b"label,item,price\n1,a,2\n0,b,3\n"


def run(tmp_path: Path, data: Any, **options: Any) -> Any:
    options = {"features": FEATURES, "log": None, "overwrite": True, **options}
    return prepare(data if isinstance(data, dict) else {"train": data}, tmp_path / "out", **options)


def raw_file(tmp_path: Path, content: bytes, name: str = "raw.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("rows", "reason", "message"),
    [
        (b"1,a,2\n0,b\n1,c,3\n", "too few cells", r"row 2 \(line 3 of the file\) has 2 cells .*expected 3"),
        (b"1,a,2\n0,b,3,4\n1,c,3\n", "too many cells", r"row 2 \(line 3 of the file\) has 4 cells"),
        (b"1,a,2\n0,b\0,3\n1,c,3\n", "NUL byte", r"row 2 \(line 3 of the file\) has a NUL byte"),
        (b"1,a,2\n0,b\xff,3\n1,c,3\n", "bad UTF-8", r"row 2 \(line 3 of the file\) has bytes that are not UTF-8"),
        (b'1,a,2\n0,b"x,3\n1,c,3\n', "stray quote", r"row 2 \(line 3 of the file\) has a quote"),
        (b'1,a,2\n0,"b"x,3\n1,c,3\n', "stray quote", r"row 2 \(line 3 of the file\) has a quote"),
        (b'1,a,2\n1,c,3\n0,"b,3\n', "stray quote", r"row 3 \(line 4 of the file\) has a quote"),
        (b"1,a,2\n\n1,c,3\n", "blank line", r"row 2 \(line 3 of the file\) has nothing"),
        (b'1,"a\nb",2\n0,b\n1,c,3\n', "too few cells", r"row 2 \(line 4 of the file\)"),
        (b"1,a,2\n2,b,3\n1,c,3\n", "label: label is not 0 or 1", r"row 2 \(line 3 .*'label' holds '2'.*0 or 1"),
        (b"1,a,2\nnan,b,3\n1,c,3\n", "label: label is missing", "row 2 .*'label' holds 'nan'"),
        (b"1,a,2\n,b,3\n1,c,3\n", "label: label is missing", "row 2 .*'label' holds None.*missing_labels"),
        (b"1,a,2\ninf,b,3\n1,c,3\n", "label: label is not 0 or 1", "row 2 .*'label' holds 'inf'"),
        (b"1,a,2\nyes,b,3\n1,c,3\n", "label: label is not 0 or 1", "row 2 .*'label' holds 'yes'.*label_positive"),
        (b"1,a,2\n1,b,abc\n1,c,3\n", "price: not a finite number", "row 2 .*'price' holds 'abc'.*finite number"),
        (b"1,a,2\n1,b,-inf\n1,c,3\n", "price: not a finite number", "row 2 .*'price' holds '-inf'"),
        (b"1,a,2\n1,b,1e39\n1,c,3\n", "price: not a finite number", "row 2 .*'price' holds '1e39'"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_row_is_named_or_skipped(tmp_path, rows, reason, message, zipped):
    content = b"label,item,price\n" + rows
    path = raw_file(tmp_path, gzip.compress(content) if zipped else content, "raw.csv.gz" if zipped else "raw.csv")
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path, path)
    assert str(error.value).startswith(str(path))
    assert list(tmp_path.iterdir()) == [path]  # nothing half done

    messages: list[Any] = []
    run(tmp_path, path, on_bad_row="skip", log=messages.append)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == {"train": {reason: 1}}
    assert report["rows"] == {"train": 2}
    assert any(f"skipped 1 rows ({reason})" in str(message) for message in messages)
    prices = pl.read_parquet(tmp_path / "out" / "train")["price"]
    assert prices.to_list() == [-1.0, 1.0]  # statistics without the bad row


@pytest.mark.parametrize(("cell", "shown"), [("-1", "'-1'"), ("nan", "'nan'"), ("", "None"), ("much", "'much'")])
def test_bad_weights(tmp_path, cell, shown):
    path = raw_file(tmp_path, f"label,item,price,w\n1,a,2,1\n0,b,3,{cell}\n".encode())
    with pytest.raises(DataError, match=f"row 2 .*column 'w' holds {shown}; expected a finite weight"):
        run(tmp_path, path, weight="w")


def test_a_row_without_group(tmp_path):
    path = raw_file(tmp_path, b"label,item,price,g\n1,a,2,7\n0,b,3,\n")
    with pytest.raises(DataError, match=r"row 2 .*column 'g' holds None; expected a group in every row"):
        run(tmp_path, path, group="g")


def test_a_row_counts_once_under_its_first_reason(tmp_path):
    path = raw_file(tmp_path, b"label,item,price\n1,a,2\nx,b,abc\n0,\0\xff\n0,c,3\n")
    run(tmp_path, path, on_bad_row="skip")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == {"train": {"NUL byte": 1, "price: not a finite number": 1}}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", DataError, "is empty"),
        (b"\n\n", DataError, "is empty"),
        (b"label,item,price\n", DataError, "has no rows"),
        (b"label,item,price\n\n\n", DataError, "has no rows"),
        (b"label,item,item\n1,a,b\n", SchemaError, r"columns \['item'\] appear more than once"),
        (b"label,item,__row__\n1,a,b\n", SchemaError, r"columns \['__row__'\] have names that are kept"),
        (b"label,*,^b$\n1,a,b\n", SchemaError, r"columns \['\*', '\^b\$'\] have names that are kept"),
        (
            b"label,price\n1,2\n",
            SchemaError,
            r"no columns \['item'\], the closest are \['price', 'label'\], expected some of \['label', 'price'\]",
        ),
        (b"item,price\na,2\n", SchemaError, r"no columns \['label'\]"),
        (b"label;item;price\n1;a;2\n", SchemaError, "one column only, so say separator"),
        (b"label,it\xffem,price\n1,a,2\n", DataError, "line 1, the header, is not UTF-8"),
        (b'label,"item,price\n1,a,2\n', DataError, "line 1, the header, opens a quote"),
        (b"label,it\0em,price\n1,a,2\n", DataError, "line 1, the header, has a NUL byte"),
        (b"label,item,price\r1,a,2\r0,b,3\r", DataError, "lines end in CR only; convert them"),
        (b"label,it\rem,price\n1,a,2\n", DataError, "line 1, the header, cannot be read"),
    ],
)
def test_bad_files(tmp_path, content, error, message):
    path = raw_file(tmp_path, content)
    with pytest.raises(error, match=message) as caught:
        run(tmp_path, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "arrow", "jsonl", "columns"])
def test_a_column_without_name_is_refused(tmp_path, form):
    table = pa.table({"": ["a", "b"], "label": [0, 1]})
    path = tmp_path / f"raw.{form}"
    if form == "parquet":
        pq.write_table(table, path)
    elif form == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif form == "jsonl":
        path.write_text('{"": "a", "label": 0}\n{"": "b", "label": 1}\n')
    else:
        path.write_text("a,0\nb,1\n")
    columns = ["", "label"] if form == "columns" else None
    with pytest.raises(SchemaError, match=rf"raw.{form}: columns \[''\] have names that are kept"):
        run(tmp_path, path, features=None, columns=columns, separator=None if columns is None else ",")
    named = raw_file(tmp_path, b",label\na,0\nb,1\n", "named.csv")  # as pandas writes its index
    assert [f.name for f in run(tmp_path, named, features=None).features] == ["column_1"]


def test_skipped_rows_of_a_file_that_is_split_are_counted_once(tmp_path):
    lines = ["label,item,price"] + [f"{i % 2},i{i % 5},{i}" for i in range(200)]
    lines[7], lines[60], lines[150] = "1,a", "1,a,dear", "1,a,cheap"
    path = raw_file(tmp_path, "\n".join(lines).encode())
    prepare(path, tmp_path / "out", features=FEATURES, on_bad_row="skip", log=None)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["skipped"] == {"data": {"too few cells": 1, "price: not a finite number": 2}}
    assert sum(report["rows"].values()) == 197


def test_when_every_row_is_skipped(tmp_path):
    path = raw_file(tmp_path, b"label,item,price\n1,a\n0\n")
    with pytest.raises(DataError, match=r"has no rows but {'too few cells': 2}, which were skipped"):
        run(tmp_path, path, on_bad_row="skip")


def test_other_ways_to_be_wrong(tmp_path):
    good = raw_file(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"nowhere.csv does not exist"):
        run(tmp_path, tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="cannot be unpacked, it is truncated or damaged"):
        run(tmp_path, raw_file(tmp_path, gzip.compress(GOOD * 100)[:-20], "cut.csv.gz"))
    with pytest.raises(DataError, match="cannot tell what separates"):
        run(tmp_path, raw_file(tmp_path, b"a::b\n1::2\n", "raw.dat"))
    with pytest.raises(DataError, match="expected one byte"):
        run(tmp_path, good, separator="::")
    with pytest.raises(SchemaError, match='expected "train"'):
        run(tmp_path, {"valid": good})
    with pytest.raises(SchemaError, match=r"named in ignore and also as feature"):
        run(tmp_path, good, ignore="item")
    with pytest.raises(SchemaError, match=r"no columns \['nothing'\]"):
        run(tmp_path, good, ignore="nothing")
    with pytest.raises(TypeError, match=r"expected paths of files, or one frame"):
        run(tmp_path, [1, 2])
    with pytest.raises(SchemaError, match="expected three numbers"):
        prepare(good, tmp_path / "out", split=(8, 2), log=None)
    with pytest.raises(DataError, match=r"^\S+raw.csv: valid would have no rows"):
        prepare(good, tmp_path / "out", features=FEATURES, split=(1, 1e-9, 0), log=None)
    with pytest.raises(DataError, match="column 'item' holds 'a'; expected a number or a date"):
        prepare(good, tmp_path / "out", features=FEATURES, split_by="item", log=None)


def test_splits_must_have_the_same_columns(tmp_path):
    good = raw_file(tmp_path, GOOD)
    less = raw_file(tmp_path, b"label,item\n1,a\n", "less.csv")
    more = raw_file(tmp_path, b"label,item,price,more\n1,a,2,3\n", "more.csv")
    with pytest.raises(SchemaError, match=r"less.csv: columns \['price'\] are missing"):
        run(tmp_path, {"train": good, "test": less})
    with pytest.raises(SchemaError, match=r"more.csv: columns \['more'\] are in test but not in train"):
        run(tmp_path, {"train": good, "test": more})
    run(tmp_path, {"train": more, "test": good}, ignore="more")
    retyped = raw_file(tmp_path, b"label,item,price\n1,a,dear\n0,b,cheap\n", "retyped.csv")
    with pytest.raises(SchemaError, match=r"retyped.csv: row 1 .*'price' holds 'dear', and no other row is better"):
        run(tmp_path, {"train": good, "test": retyped}, on_bad_row="skip")
    ids = pl.DataFrame({"label": [1, 0], "item": [1.5, 2.0], "price": [1.0, 2.0]})
    with pytest.raises(SchemaError, match=r"test: row 1, column 'item' holds 1.5"):
        run(tmp_path, {"train": good, "test": ids})


def test_damaged_parquet(tmp_path):
    path = tmp_path / "raw.parquet"
    table = pa.table({"label": [0, 1] * 500, "item": ["a", "b"] * 500, "price": [float(i) for i in range(1000)]})
    pq.write_table(table, path, row_group_size=500)
    run(tmp_path, path)
    whole = path.read_bytes()
    for damaged in (whole[:-40], whole[: len(whole) // 2], b"PAR1", b"", b"label,item\n1,2\n"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"raw.parquet cannot be read, it may be truncated or damaged"):
            run(tmp_path, path)
    for start in range(4, 1500, 100):  # pages: an error that names the file, or values that are still numbers
        path.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
        try:
            run(tmp_path, path)
        except (DataError, SchemaError) as error:
            assert "raw.parquet" in str(error)
    with pq.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table.slice(0, 0), row_group_size=10)
        writer.write_table(table)
    numbers = [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(pq.ParquetFile(path).num_row_groups)]
    if 0 in numbers:
        with pytest.raises(DataError, match=r"raw.parquet: row group 1 has no rows"):
            run(tmp_path, path)
        run(tmp_path, path, on_bad_row="skip")
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["skipped"] == {"train": {"row group without rows": 1}}
        assert report["rows"] == {"train": 2000}
    pq.write_table(table.rename_columns(["label", "item", "item"]), path)
    with pytest.raises(SchemaError, match=r"raw.parquet: columns \['item'\] appear more than once"):
        run(tmp_path, path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(DataError, match="has no rows"):
        run(tmp_path, path)
    with pytest.raises(DataError, match="folder without parquet files"):
        (tmp_path / "empty").mkdir()
        run(tmp_path, tmp_path / "empty")


@pytest.mark.parametrize("form", ["polars", "lazy", "arrow", "pandas"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_frame_without_rows_is_refused_by_its_name(tmp_path, form, split):
    rows = pl.DataFrame({"item": ["a", "b"] * 20, "label": [0, 1] * 20})
    nothing = rows.clear()
    made = {"polars": nothing, "lazy": nothing.lazy(), "arrow": nothing.to_arrow(), "pandas": nothing.to_pandas()}
    data = {"train": rows, "valid": rows, "test": rows, split: made[form]}
    with pytest.raises(DataError, match=rf"^{split} has no rows: expected at least one$"):
        prepare(data, tmp_path / "out", labels="label", log=None)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------- fuzz

PLAIN = st.text(st.sampled_from("abc é0.-"), max_size=6)
QUOTABLE = st.text(st.sampled_from('ab",\n '), max_size=6)


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


@st.composite
def rows_of_known_kind(draw: Any) -> tuple[str | None, bytes, list[str]]:
    """(why the row is bad or None, its bytes, its cells)"""
    kind = draw(st.sampled_from([None, None, None, "few", "many", "nul", "utf8", "quote", "blank"]))
    if kind is None:
        cells = [draw(PLAIN), draw(QUOTABLE), draw(PLAIN)]
        return None, f"{cells[0]},{quoted(cells[1])},{cells[2]}".encode(), cells
    if kind == "blank":
        return "blank line", b"", []
    first, last = draw(PLAIN), draw(PLAIN)
    bad = {
        "few": ("too few cells", f"{first},{quoted(draw(QUOTABLE))}".encode()),
        "many": ("too many cells", f"{first},{last},,{first}".encode()),
        "nul": ("NUL byte", f"{first},{last}\0,{first}".encode()),
        "utf8": ("bad UTF-8", f"{first},".encode() + b"\xc3" + f",{last}".encode()),
        "quote": ("stray quote", f'{first}x"y,"",{last}'.encode()),
    }
    return (*bad[kind], [])


def scan(content: bytes, block_bytes: int, on_bad_row: Any = "skip") -> tuple[bytes, RowScanner]:
    scanner = RowScanner("fuzz.csv", b",", num_cells=3, on_bad_row=on_bad_row)
    return b"".join(scanner.blocks(io.BytesIO(content), block_bytes)), scanner


@settings(max_examples=300, deadline=None)
@given(
    st.lists(rows_of_known_kind(), max_size=12),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.sampled_from([1, 7, 64, 1 << 20]),
)
def test_fuzzed_rows_are_counted_exactly(rows, newline, last_newline, block_bytes):
    content = newline.join(row for _, row, _ in rows) + (newline if last_newline else b"")
    kept = list(rows)
    while kept and kept[-1][0] == "blank line":
        kept.pop()  # the end of the file
    expected = Counter(reason for reason, _, _ in kept if reason)
    good, scanner = scan(content, block_bytes)
    assert scanner.skipped == expected
    assert scanner.num_rows == len(kept) - sum(expected.values())
    cells = [row for reason, _, row in kept if not reason]
    assert list(csv.reader(io.StringIO(good.decode(), newline=""))) == cells
    if expected:
        number = next(i for i, row in enumerate(kept, start=1) if row[0])
        with pytest.raises(DataError, match=rf"^fuzz.csv: row {number} ") as error:
            scan(content, block_bytes, "raise")
        before = newline.join(row for _, row, _ in kept[: number - 1])
        line = before.count(b"\n") + (2 if number > 1 else 1)
        assert f"(line {line} of the file)" in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(st.sampled_from('a",\n\r\0é'), max_size=60).map(str.encode))
def test_fuzzed_bytes_leave_only_rows_that_any_reader_understands(content):
    good, scanner = scan(content, 1 << 20)
    again, in_pieces = scan(content, 5)
    assert good == again
    assert (scanner.skipped, scanner.num_rows) == (in_pieces.skipped, in_pieces.num_rows)
    read = list(csv.reader(io.StringIO(good.decode().replace("\r", "_"), newline=""), strict=True))
    assert len(read) == scanner.num_rows
    assert all(len(row) == 3 for row in read)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["0", "1", "2", "nan", "", "x"]),
            st.sampled_from(["a", "b", "", '"q,"']),
            st.sampled_from(["1", "-2.5e3", "", "nan", "abc", "inf", "1e999"]),
        ),
        min_size=1,
        max_size=10,
    )
)
def test_fuzzed_cells_prepare_or_say_why(tmp_path, rows):
    path = raw_file(tmp_path, ("label,item,price\n" + "".join(",".join(row) + "\n" for row in rows)).encode())
    bad = [row for row in rows if row[0] not in "01" or not row[0] or row[2] in ("abc", "inf", "1e999")]
    try:
        run(tmp_path, path, on_bad_row="skip")
    except (DataError, SchemaError):
        # Either nothing is left, or a whole column is wrong (which is more than bad rows).
        whole = any({row[i] for row in rows if row[i]} <= wrong for i, wrong in
                    ((0, {"2", "x", "nan"}), (2, {"abc", "inf", "1e999"})))  # fmt: skip
        assert len(bad) == len(rows) or whole
        return
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rows"]["train"] == len(rows) - len(bad)
    assert sum(report["skipped"].get("train", {}).values()) == len(bad)
    assert pl.read_parquet(tmp_path / "out" / "train")["price"].is_finite().all()


def test_many_stray_quotes_take_linear_time(tmp_path):
    path = raw_file(tmp_path, b"label,item,price\n1,a,2\n" + b'0,"b,3\n1,c"d,3\n' * 50_000 + b"0,e,3\n")
    table = read_raw(path, tmp_path / "t", on_bad_row="skip")
    assert table.skipped == {"stray quote": 100_000}
    assert table.frame.select("item").collect()["item"].to_list() == ["a", "e"]


def test_a_file_without_line_ends_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ctrlib.data.scan.MAX_ROW_BYTES", 1000)
    scanner = RowScanner("raw.csv", b",", num_cells=2)
    with pytest.raises(DataError, match="no end of line"):
        list(scanner.blocks(io.BytesIO(b"x" * 10_000), block_bytes=100))
