"""Text that is read by compiled loops is what it is when pyarrow reads it, to the byte."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ctrlib as ctr
from ctrlib.data import coded, compiled
from ctrlib.data.coded import CodedTable, read_coded
from ctrlib.data.scan import DataError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def loops(monkeypatch):
    """Switches to one of the roads, with parts of a few lines and blocks of a few parts."""
    pytest.importorskip("numba")
    found = compiled.loops()
    assert found is not None
    monkeypatch.setattr(compiled, "loops", lambda: found)

    def switch(by_loops: bool, part_bytes: int = 200, most_cells: int = 60) -> None:
        monkeypatch.setattr(coded, "_FEWEST_BYTES", part_bytes)
        monkeypatch.setattr(coded, "BLOCK_BYTES", part_bytes)
        monkeypatch.setattr(compiled, "MOST_CELLS", most_cells)
        monkeypatch.setattr(coded, "are_worth", lambda _: by_loops)

    yield switch
    monkeypatch.undo()
    compiled.loops.cache_clear()  # other tests read text as they would without this one


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def described(path: Path, folder: Path, **options) -> object:
    """All that a coded table says of a file, or what is wrong with the file."""
    try:
        table = read_coded(path, folder, **options)
    except (DataError, ctr.SchemaError) as error:
        return str(error)
    rows = pl.concat([piece.collect() for piece in table.pieces])
    return rows.rows(), table.skipped, table.malformed.tolist(), table.first_line


ODD = ["", " ", " a", "a\t", "nan", "NaN", "1", "1.0", "é", "漢字漢字", "12345678", "123456789", "x" * 300, "1|2|3"]
ODD += ['"q"', '"a,b"', '"two\nlines"', '"', "[1, 2]", "\r", "\0", "?", "a" * 8, "a" * 9, "a" * 16, "a" * 17]
CELLS = st.one_of(st.sampled_from(ODD), st.integers(0, 40).map(str), st.text(st.characters(codec="utf-8"), max_size=12))
LINES = st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=40)
SPOILT = st.sampled_from([b"", b"only one\n", b"a,b,c\n", b"\n", b"\xff,1\n", b"1,\xc3\n", b"a,b\r\n", b'"a"x,1\n'])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(LINES, SPOILT), min_size=1, max_size=4), st.sampled_from(["raise", "skip"]), st.booleans())
@example([([["a", "b"]] * 30, b""), ([['"a"', "b"]], b"a,b\r\n"), ([["a", " b"]] * 30, b"\n")], "skip", False)
def test_any_text(loops, tmp_path_factory, parts, on_bad_row, ends_early):
    text = b"".join("\n".join(map(",".join, lines)).encode() + b"\n" + spoilt for lines, spoilt in parts)
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.csv").write_bytes(b"x,y\n" + (text[:-1] if ends_early else text))
    options = {"on_bad_row": on_bad_row, "missing_values": ("?", "é")}
    found = []
    for by_loops in (False, True):
        loops(by_loops)
        found.append(described(folder / "a.csv", folder / str(by_loops), **options))
    assert found[0] == found[1]


@pytest.mark.parametrize("lines", ["a\n\nb\n", "a\n \nb\n", "\na\n", "a\n\n\n"])
def test_one_column(loops, tmp_path, lines):
    (tmp_path / "a.csv").write_text("x\n" + lines)
    found = []
    for by_loops in (False, True):
        loops(by_loops)
        found.append(described(tmp_path / "a.csv", tmp_path / str(by_loops), separator=",", on_bad_row="skip"))
    assert found[0] == found[1]
    assert found[0][0][0] == (0, "a")


def write_rows(path: Path, num_rows: int, seed: int = 0) -> None:
    """Near-unique and frequent ids, numbers, a bag, a history, a group, a label; some cells missing or with blanks."""
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, 30, (num_rows, 3))
    frame = pl.DataFrame(
        {
            "label": rng.integers(0, 2, num_rows),
            "user": [f"user-{i}-with-a-long-name" for i in rng.integers(0, num_rows, num_rows)],
            "item": [f" {i}" if i % 7 == 0 else str(i) for i in picked[:, 0]],
            "price": rng.normal(size=num_rows).round(3),
            "count": [None if i % 5 == 0 else i for i in picked[:, 1].tolist()],
            "tags": ["|".join(map(str, row[: row[0] % 4])) for row in picked],
            "seen": [",".join(map(str, row[: row[1] % 4])) for row in picked],
            "day": rng.integers(0, 500, num_rows),
        }
    )
    frame.write_csv(path, separator="\t")


FEATURES = [
    ctr.Categorical("user", min_count=2),
    ctr.Categorical("item"),
    ctr.Numeric("price", "standard"),
    ctr.Numeric("count", "log"),
    ctr.MultiValued("tags"),
    ctr.Sequence("seen", vocabulary="item", separator=","),
]


@pytest.mark.parametrize(
    "options", [{}, {"split_by": "day", "ignore": "day"}, {"stratify": "label"}, {"group": "user", "weight": "day"}]
)
def test_prepared_folders(loops, tmp_path, options):
    write_rows(tmp_path / "a.tsv", 2_000)
    options = {"features": FEATURES, "log": None, "on_bad_row": "skip", **options}
    found = []
    for by_loops in (False, True):
        loops(by_loops, 30_000, 3_000)
        out = tmp_path / str(by_loops)
        ctr.prepare(tmp_path / "a.tsv", out, **options)
        ctr.prepare(tmp_path / "a.tsv", tmp_path / f"like {by_loops}", like=tmp_path / "False", extend=True, log=None)
        found.append((files(out), files(tmp_path / f"like {by_loops}")))
    assert found[0] == found[1]
    assert len(found[0][0]) > 8


def test_splits_in_files_of_their_own(loops, tmp_path):
    for seed, split in enumerate(("train", "valid", "test")):
        write_rows(tmp_path / f"{split}.tsv", 700, seed)
    found = []
    for by_loops in (False, True):
        loops(by_loops, 30_000, 3_000)
        data = {split: tmp_path / f"{split}.tsv" for split in ("train", "valid", "test")}
        ctr.prepare(data, tmp_path / str(by_loops), features=FEATURES, log=None)
        found.append(files(tmp_path / str(by_loops)))
    assert found[0] == found[1]


def test_blocks_are_as_large_as_memory_allows(loops, tmp_path):
    rows = [f"{i},{i % 3}" for i in range(600)]
    (tmp_path / "a.csv").write_text("\n".join(["x,y", *rows[:450], '"quoted",0', *rows[450:]]) + "\n")
    loops(True)
    table = read_coded(tmp_path / "a.csv", tmp_path / "some")
    assert isinstance(table, CodedTable)
    sizes = [block.num_rows for block in table.blocks if block.apart]
    assert sum(sizes) > 500
    assert len(sizes) > 3
    assert max(sizes) < 200
    loops(True, most_cells=1 << 20)
    sizes = [block.num_rows for block in read_coded(tmp_path / "a.csv", tmp_path / "one").blocks]
    assert len(sizes) == 3  # before the line with a quote, the part with it, after it
    assert sum(sizes) == 601


def test_numbers_of_many_cells():
    pytest.importorskip("numba")
    from ctrlib.data import distinct
    from ctrlib.data.distinct import Column, cell_ends, number_cells

    rng = np.random.default_rng(0)
    many = [f"{i:x}" * (1 + i % 4) for i in rng.integers(0, 60_000, 100_000).tolist()]
    few = [str(i) for i in rng.integers(0, 9, 100_000)]
    columns, found = [Column(2), Column(2)], [[], []]
    for start in range(0, 100_000, 30_000):
        lines = "".join(f"{a},{b}\n" for a, b in zip(many[start : start + 30_000], few[start:])).encode()
        ends = cell_ends(lines, ord(","), 2)
        for codes, made in zip(found, number_cells(columns, [0, 1], lines, ends, 2)):
            codes += made.tolist()
    for column, codes, cells in zip(columns, found, (many, few)):
        values = list(dict.fromkeys(cells))
        assert column.values().to_pylist() == values
        number = {cell: i for i, cell in enumerate(values)}
        assert codes == [number[cell] for cell in cells]
    # What is loaded is what is used: nobody waits for the compiler in the middle of a file.
    assert [len(one.signatures) for one in (distinct._cut, distinct._look_up, distinct._place)] == [1, 1, 1]


def test_a_cell_that_looks_like_the_hash_of_another():
    pytest.importorskip("numba")
    from ctrlib.data.distinct import Column, _key, cell_ends, number_cells

    for i in range(1000):
        long = b"a long cell %d" % i
        short = int(_key(np.frombuffer(long, np.uint8), np.uint64(0), np.uint64(len(long)))).to_bytes(8, "little")
        if not any(byte in short for byte in b"\0\n,"):
            break
    column, lines = Column(1), b"\n".join([long, short, long, short]) + b"\n"
    (codes,) = number_cells([column], [0], lines, cell_ends(lines, ord(","), 1), 1)
    assert codes.tolist() == [0, 1, 0, 1]
    column, lines = Column(1), b"\n".join([short, long, short]) + b"\n"
    (codes,) = number_cells([column], [0], lines, cell_ends(lines, ord(","), 1), 1)
    assert codes.tolist() == [0, 1, 0]


def test_small_files_do_not_load_numba(tmp_path):
    write_rows(tmp_path / "a.tsv", 50)
    code = (
        "import sys, ctrlib as ctr; ctr.prepare(sys.argv[1], sys.argv[2], ignore=['user', 'day'], log=None); "
        "assert 'numba' not in sys.modules"
    )
    run([code, str(tmp_path / "a.tsv"), str(tmp_path / "out")])


def test_without_numba(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiled, "WORTH_BYTES", 0)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "ctrlib.data.distinct", raising=False)
    monkeypatch.delattr("ctrlib.data.distinct", raising=False)
    compiled.loops.cache_clear()
    write_rows(tmp_path / "a.tsv", 50)
    with caplog.at_level(logging.WARNING):
        ctr.prepare(tmp_path / "a.tsv", tmp_path / "out", features=FEATURES, log=None)
    compiled.loops.cache_clear()
    assert "text is read by pyarrow, since numba, which is faster, cannot be used" in caplog.text
    assert (tmp_path / "out" / "schema.json").is_file()


def run(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


LOAD = "from ctrlib.data import compiled; print(compiled.loops() is not None)"


def test_two_processes_compile_at_once(tmp_path):
    pytest.importorskip("numba")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", LOAD], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(2)
    ]
    assert [one.communicate(timeout=300)[0] for one in both] == ["True\n", "True\n"]
    compiled_once = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert compiled_once
    assert run([LOAD], NUMBA_CACHE_DIR=str(tmp_path)) == "True\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == compiled_once


def test_an_installation_that_cannot_be_written(tmp_path):
    pytest.importorskip("numba")
    package = tmp_path / "site" / "ctrlib"
    for path in (ROOT / "ctrlib").rglob("*.py"):
        copy = package / path.relative_to(ROOT / "ctrlib")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (package / "data" / "__pycache__").write_text("in the way, whoever asks\n")
    site = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    place = "import os; os.chdir('/'); "
    assert run([place + LOAD], **site, HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path)) == "True\n"
    assert list(tmp_path.rglob("*.nbc"))
    nowhere = run([place + LOAD], **site, HOME="/proc/nowhere", XDG_CACHE_HOME="/proc/nowhere")
    assert "False\n" in nowhere
    assert "cannot be used" in nowhere
