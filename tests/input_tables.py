"""Random small raw tables, whole or damaged, in every form that is read: what `tests/generated_inputs.py` prepares.

A `Table` keeps its cells as a reader is to see them (text in text files, typed elsewhere), so that what they mean can
be said in plain Python, without the library.
"""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

TEXT_FORMS = ("csv", "tsv", "txt")
FILE_FORMS = (*TEXT_FORMS, "jsonl", "parquet", "parts", "hive", "arrow")
FRAMES = ("polars", "lazy", "pandas", "arrow table")
ROW_NUMBER = "n"  # a column that says which row is which
KEYS, KEY_CELLS = ("1", "2%2F3", "__HIVE_DEFAULT_PARTITION__"), ("1", "2/3", None)
WORDS = (
    "a",
    "b",
    "c",
    "drama",
    "é",
    "x y",
    "ünï",
    "Zürich",
    "NA",
    "?",
    "0",
    "-1",
    "true",
    "日本",
    "a/b",
    "it's",
    "%41",
)
AWKWARD = (
    'say "hi"',
    "a,b",
    "a\tb",
    "two\nlines",
    "a;b",
    "a|b",
    '"',
    "[",
    "]",
    "null",
    "None",
    "nan",
    " pad ",
    "''",
    "\\",
)
NAMES = (
    *("item", "user_id", "price", "age", "c1", "C 2", "é", "a/b", "a.b", "label label", "a present", "value", "count"),
    *(
        "time",
        "rows",
        "weight ",
        "group ",
        "cells 0",
        "0",
        "x:y",
        "a|b",
        'say "x"',
        "b,c",
        "verdict",
        "holds",
        "id",
        "%20",
    ),
    *(
        "low",
        "high",
        "bin",
        "len",
        "literal",
        "item low",
        "it's",
        "$x",
        "(y)",
        "[z]",
        "{w}",
        "~",
        "train",
        "all",
        "element",
    ),
    *("long" * 70, "日本語" * 12, "", ".", "..", "arrow", "g.group", "parquet", "000000"),
)


@dataclass
class Column:
    """Cells before a file is made of them: None is missing; `type` is that of a typed file."""

    kind: str
    cells: list[Any]
    type: pa.DataType
    separator: str = "|"


@dataclass
class Split:
    """Some rows of a table as written: `cells` of every column, `malformed` the rows that no reader can cut."""

    name: str
    rows: range
    data: Any = None
    cells: dict[str, list[Any]] = field(default_factory=dict)
    malformed: set[int] = field(default_factory=set)
    sources: list[str] = field(default_factory=list)  # what messages may call it
    types: dict[str, pa.DataType] = field(default_factory=dict)  # of columns that have another than in the table
    files: list[tuple[Path, int, int]] = field(default_factory=list)  # of several, with the rows that each has

    def part(self, chance: random.Random) -> Split:
        """One of its files, where there are several."""
        if not isinstance(self.data, list):
            return self
        path, start, stop = chance.choice(self.files)
        rows = range(self.rows.start + start, self.rows.start + stop)
        cells = {name: values[start:stop] for name, values in self.cells.items()}
        malformed = {row - start for row in self.malformed if start <= row < stop}
        return Split(self.name, rows, path, cells, malformed, self.sources, self.types)


@dataclass
class Table:
    """A generated input. `trouble` are reasons for which it may be refused; `exact` says that no damage makes it
    uncertain which rows are whole."""

    form: str
    columns: dict[str, Column]
    splits: list[Split] = field(default_factory=list)
    trouble: set[str] = field(default_factory=set)
    exact: bool = True
    tokens: tuple[str, ...] = ("",)
    separator: str | None = None  # to be named
    header: bool = True

    @property
    def is_text(self) -> bool:
        """Whether all cells are text."""
        return self.form in TEXT_FORMS


# ------------------------------------------------------------------------------------------------------------- columns

Draw = Callable[[random.Random, int], tuple[list[Any], pa.DataType]]


def _pool(chance: random.Random, num_rows: int, values: list[Any]) -> list[Any]:
    """Few of the values, some of them often, or nearly all."""
    few = chance.sample(values, min(len(values), chance.choice((1, 2, 4, 9, len(values)))))
    return [
        few[min(int(chance.expovariate(1.5)), len(few) - 1)] if chance.random() < 0.5 else chance.choice(few)
        for _ in range(num_rows)
    ]


def _text(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    words = list(WORDS) if chance.random() < 0.5 else [*WORDS, *AWKWARD]
    return _pool(chance, n, words), chance.choice((pa.string(), pa.large_string()))


def _int(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    kind, low, high = chance.choice(
        ((pa.int8(), -128, 127), (pa.int16(), -300, 300), (pa.int32(), 0, 10**6), (pa.int64(), -(2**62), 2**62),
         (pa.int64(), 0, 40), (pa.uint8(), 0, 255), (pa.uint32(), 0, 2**32 - 1))
    )  # fmt: skip
    values = [low, high, *(chance.randint(low, high) for _ in range(30))]
    return _pool(chance, n, values), kind


def _uint64(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return _pool(chance, n, [0, 1, 2**63, 2**64 - 1, *(chance.getrandbits(64) for _ in range(9))]), pa.uint64()


def _float_id(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    cells = _pool(chance, n, [0.0, -0.0, 1.0, 5.0, 16777216.0, -3.0, *(float(i) for i in range(20, 30))])
    cells = [math.nan if chance.random() < 0.05 else cell for cell in cells]
    return cells, chance.choice((pa.float64(), pa.float32()))


def _bool(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return _pool(chance, n, [True, False]), pa.bool_()


def _date(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    days = [datetime.date(1970, 1, 1) + datetime.timedelta(chance.randint(-9000, 40000)) for _ in range(20)]
    return _pool(chance, n, days), pa.date32()


def _datetime(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    unit, grain = chance.choice((("s", 10**6), ("ms", 1000), ("us", 1), ("ns", 1)))
    zone = chance.choice((None, None, "UTC", "Europe/Berlin"))
    start = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc if zone else None)
    span = chance.choice((10**8, 10**15))
    steps = [chance.randint(-span, span) // grain * grain for _ in range(20)] + [0, 86_400 * 10**6]
    return _pool(chance, n, [start + datetime.timedelta(microseconds=step) for step in steps]), pa.timestamp(unit, zone)


def _time(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    times = [datetime.time(chance.randrange(24), chance.randrange(60), chance.randrange(60)) for _ in range(12)]
    return _pool(chance, n, times), pa.time64("us")


def _decimal_id(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    values = [decimal.Decimal(chance.randint(-99, 9999)) for _ in range(12)]
    return _pool(chance, n, values), pa.decimal128(12, chance.choice((0, 2)))


def _decimal(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return [decimal.Decimal(chance.randint(-9999, 9999)) / 100 for _ in range(n)], pa.decimal128(12, 2)


def _category(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return _pool(chance, n, [*WORDS, " b"]), pa.dictionary(chance.choice((pa.int8(), pa.int32())), pa.string())


def _zeros(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return _pool(chance, n, [f"{chance.randint(0, 99999):05}" for _ in range(20)]), pa.string()


def _float(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    scale = chance.choice((1.0, 1.0, 1000.0, 1e-6, 1e30))
    cells = [chance.gauss(0, 1) * scale for _ in range(n)]
    odd = [math.nan, -0.0, 5e-324, -1e-310, 3.4e38, 1e-45, 0.1, float(2**53)]
    if chance.random() < 0.4:
        cells = [chance.choice(odd) if chance.random() < 0.1 else cell for cell in cells]
    return cells, pa.float64()


def _float32(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return [float(pa.scalar(chance.expovariate(0.01), pa.float32()).as_py()) for _ in range(n)], pa.float32()


def _tiny(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    """Numbers that hardly differ, so that scales are tiny."""
    base, step = chance.choice(((0.0, 5e-324), (0.0, 1e-310), (1.0, 2**-52), (1e30, 1e14), (0.0, 1e-40)))
    return [base + step * chance.randrange(3) for _ in range(n)], pa.float64()


def _number_text(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    odd = ["nan", "NaN", "1e3", "+5", "-.5", "7.", "0x1", "1_0"][: chance.choice((0, 6, 6, 6, 8))]
    cells = [
        chance.choice(odd) if odd and chance.random() < 0.2 else repr(round(chance.gauss(0, 9), 2)) for _ in range(n)
    ]
    return cells, pa.string()


def _constant(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    value, kind = chance.choice((("same", pa.string()), (7, pa.int64()), (2.5, pa.float64()), (True, pa.bool_())))
    return [value] * n, kind


def _null(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return [None] * n, chance.choice((pa.null(), pa.string(), pa.int64(), pa.float64(), pa.list_(pa.string())))


def _unique(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return [f"u{chance.getrandbits(40):x}" for _ in range(n)], pa.string()


def _events(chance: random.Random, values: list[Any], empty: Any) -> list[Any]:
    return [
        empty if chance.random() < 0.1 else chance.choice(values) for _ in range(min(9, int(chance.expovariate(0.5))))
    ]


def _joined(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    return [[str(one) for one in _events(chance, [*"abcdefg", 5, 17, " b"], "")] for _ in range(n)], pa.string()


def _json(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    values: list[Any] = chance.choice(([1, 2, 3, 40], ["a", "b", 'c"d', "e,f", "é"], [1, "1", True, 2.0]))
    ascii = chance.random() < 0.5
    return [json.dumps(_events(chance, values, None), ensure_ascii=ascii) for _ in range(n)], pa.string()


def _list(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    inner, values = chance.choice(
        ((pa.string(), [*list("abc"), " b", "x y"]), (pa.int64(), [1, 5, 17, 2**40]), (pa.int32(), [1, 5, 17]),
         (pa.float64(), [1.0, 5.0, 17.0]), (pa.bool_(), [True, False]), (pa.date32(), [datetime.date(2024, 3, 5)]),
         (pa.dictionary(pa.int32(), pa.string()), ["a", " b", "c"]), (pa.decimal128(9, 1), [decimal.Decimal(5)]))
    )  # fmt: skip
    shape = chance.choice(("list", "large", "fixed"))
    if shape == "fixed":
        return [[chance.choice(values) for _ in range(3)] for _ in range(n)], pa.list_(inner, 3)
    cells = [_events(chance, values, None) for _ in range(n)]
    return cells, pa.list_(inner) if shape == "list" else pa.large_list(inner)


def _odd(chance: random.Random, n: int) -> tuple[list[Any], pa.DataType]:
    value, kind = chance.choice(
        ((datetime.timedelta(1), pa.duration("us")), ({"a": 1}, pa.struct([("a", pa.int64())])),
         (b"\xff\0", pa.binary()), ([["a"]], pa.list_(pa.list_(pa.string()))),
         ([("a", 1)], pa.map_(pa.string(), pa.int64())))
    )  # fmt: skip
    return [value] * n, kind


# Kind of column -> how it is drawn, and what it can be a feature of.
KINDS: dict[str, tuple[Draw, str]] = {
    "text": (_text, "id raw bag history"),
    "int": (_int, "id number raw bag bucket"),
    "uint64": (_uint64, "id raw number"),
    "float id": (_float_id, "id number bag history"),
    "bool": (_bool, "id number bag"),
    "date": (_date, "id"),
    "datetime": (_datetime, "id"),
    "time of day": (_time, "id"),
    "decimal id": (_decimal_id, "id number"),
    "decimal": (_decimal, "number"),
    "category": (_category, "id bag history"),
    "leading zeros": (_zeros, "id raw"),
    "float": (_float, "number"),
    "float32": (_float32, "number bucket"),
    "tiny": (_tiny, "number"),
    "number as text": (_number_text, "number"),
    "constant": (_constant, "id"),
    "null": (_null, "id number bag history"),
    "unique": (_unique, "id raw"),
    "joined": (_joined, "bag history"),
    "json": (_json, "bag history"),
    "list": (_list, "bag history"),
    "odd": (_odd, ""),
}
LISTS = ("list", "joined")


def draw_column(chance: random.Random, kind: str, num_rows: int) -> Column:
    """Cells of a kind, some of them missing."""
    cells, dtype = KINDS[kind][0](chance, num_rows)
    share = chance.choice((0.0, 0.0, 0.05, 0.4))
    if kind != "constant":
        cells = [None if chance.random() < share else cell for cell in cells]
    return Column(kind, cells, dtype, chance.choice("||,; ") if kind == "joined" else "|")


# ------------------------------------------------------------------------------------------------- as a reader sees it


def seen(column: Column, table: Table, chance: random.Random) -> list[Any]:
    """The cells in the form of the table."""
    if column.kind == "joined":
        column = Column("text", [None if c is None else column.separator.join(c) for c in column.cells], pa.string())
    if table.is_text:
        style = chance.choice((str.lower, str.capitalize)), chance.choice(" T")
        return [_as_text(cell, style, chance, table.tokens) for cell in column.cells]
    if table.form == "jsonl":
        return [_as_json(cell) for cell in column.cells]
    return list(column.cells)


def _as_text(cell: Any, style: Any, chance: random.Random, tokens: tuple[str, ...]) -> str:
    if cell is None:
        return chance.choice(tokens)
    if isinstance(cell, bool):
        return str(style[0](str(cell)))
    if isinstance(cell, list):
        return "|".join("" if one is None else _as_text(one, style, chance, tokens) for one in cell)
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(style[1])
    return str(cell)


def _as_json(cell: Any) -> Any:
    if isinstance(cell, list):
        return [_as_json(one) for one in cell]
    if isinstance(cell, decimal.Decimal):
        return float(cell)
    return cell.isoformat() if isinstance(cell, datetime.date | datetime.time) else cell


# ------------------------------------------------------------------------------------------------------------- writing


def write(table: Table, split: Split, folder: Path, chance: random.Random, damages: dict[int, str], whole: str) -> None:
    """Make the file (or files, or frame) of a split.

    Args:
        table: of which it is.
        split: with its cells as a reader is to see them; gets `data` and `sources`.
        folder: where to write.
        chance: how.
        damages: row of the split -> what is done to its line.
        whole: what is done to the whole file, "" for nothing.
    """
    num_rows = len(split.rows)
    if table.form in FRAMES:
        split.data, split.sources = _frame(table, split), [split.name]
        return
    num_parts = chance.choice((2, 3)) if num_rows > 3 and chance.random() < 0.3 else 1
    num_parts = num_parts if table.form not in ("parts", "hive") else chance.choice((1, 2, 3))
    cuts = sorted(chance.sample(range(1, num_rows), min(num_parts - 1, num_rows - 1)))
    bounds = list(zip([0, *cuts], [*cuts, num_rows]))
    base = folder / f"{split.name} é" if chance.random() < 0.2 else folder / split.name
    paths = []
    for number, (start, stop) in enumerate(bounds):
        own = {row - start: damage for row, damage in damages.items() if start <= row < stop}
        cells = {name: values[start:stop] for name, values in split.cells.items() if name != "day"}
        if table.is_text:
            content, suffix = _lines(table, cells, chance, own), f".{table.form}"
        elif table.form == "jsonl":
            content, suffix = _json_lines(cells, chance, own), ".jsonl"
        else:
            types = {name: split.types.get(name, table.columns[name].type) for name in cells}
            content, suffix = _typed(table, cells, types, chance, vary=number > 0), ".parquet"
            suffix = ".arrow" if table.form == "arrow" else suffix
        if whole == "truncated" and number == num_parts - 1:
            content = content[: chance.randrange(len(content))]
        if suffix not in (".parquet", ".arrow") and chance.random() < 0.25:
            ending, pack = chance.choice(list(_PACKERS.items()))
            suffix, content = suffix + ending, pack(content)
            if whole == "truncated when packed" and number == 0:
                content = content[: max(6, chance.randrange(len(content)))]
        elif whole == "truncated when packed" and number == 0:
            table.trouble.discard(whole)
        if table.form in ("parts", "hive"):
            base.mkdir(exist_ok=True)
            path = base / f"part-{number:05}{suffix}"
            if table.form == "hive":
                key = KEYS[number]
                split.cells.setdefault("day", []).extend([KEY_CELLS[number]] * (stop - start))
                path = base / f"day={key}" / path.name
                path.parent.mkdir(exist_ok=True)
        else:
            path = base.with_name(f"{base.name}{number if num_parts > 1 else ''}{suffix}")
        path.write_bytes(content)
        paths.append(path)
        split.files.append((path, start, stop))
    split.sources = [str(base), *map(str, paths)]
    split.data = base if table.form in ("parts", "hive") else paths if len(paths) > 1 else paths[0]
    if not isinstance(split.data, list) and chance.random() < 0.3:
        split.data = str(split.data)


def _zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstd,
}


def _lines(table: Table, cells: dict[str, list[str]], chance: random.Random, damages: dict[int, str]) -> bytes:
    separator = {"csv": ",", "tsv": "\t"}.get(table.form) if table.separator is None else table.separator
    mark = separator or ";"
    quoting, newline = chance.choice(("few", "few", "all", "some")), chance.choice((b"\n", b"\n", b"\r\n"))
    pad = chance.random() < 0.1 and quoting == "few" and mark != "\t"

    def quoted(cell: str) -> str:
        must = any(one in cell for one in (mark, '"', "\n", "\r"))
        if must or quoting == "all" or (quoting == "some" and chance.random() < 0.3):
            return '"' + cell.replace('"', '""') + '"'
        return f" {cell}  " if pad else cell

    lines = [mark.join(map(quoted, cells)).encode()] if table.header else []
    for row, values in enumerate(zip(*cells.values())):
        written = [quoted(cell) for cell in values]
        damage = damages.get(row)
        if damage == "too few cells":
            written = written[:-1]
        elif damage == "too many cells":
            written.append("x")
        elif damage == "stray quote":
            written[-1] = 'x"y'
        elif damage == "blank line":  # at the end of a file it would be none
            written = [] if row + 1 < len(next(iter(cells.values()))) else written[:-1]
        line = mark.join(written).encode()
        if damage == "NUL byte":
            line += b"\0"
        elif damage == "bad UTF-8":
            line += b"\xff"
        lines.append(line)
    content = newline.join(lines)
    content += chance.choice((newline, newline, b"", newline * 3))
    return b"\xef\xbb\xbf" * (chance.random() < 0.15) + content


def _json_lines(cells: dict[str, list[Any]], chance: random.Random, damages: dict[int, str]) -> bytes:
    lacking, ascii = chance.random() < 0.3, chance.random() < 0.5
    lines = []
    for row, values in enumerate(zip(*cells.values())):
        pairs = {name: value for name, value in zip(cells, values) if not (lacking and value is None and row)}
        line = json.dumps(pairs, ensure_ascii=ascii).encode()
        blank = b"" if row + 1 < len(next(iter(cells.values()))) else b"[1]"
        damaged = {"blank line": blank, "bad UTF-8": b'{"a": "\xff"}', "no JSON object": b"[1]"}
        lines.append(damaged.get(damages.get(row, ""), line))
    return b"\n".join(lines) + chance.choice((b"\n", b"", b"\n\n"))


def arrow_of(cells: dict[str, list[Any]], types: dict[str, pa.DataType]) -> pa.Table:
    """Cells with the types of a typed file."""
    return pa.table({name: _array(values, types[name]) for name, values in cells.items()})


def _array(values: list[Any], dtype: pa.DataType) -> pa.Array:
    if pa.types.is_nested(dtype) and "dictionary" in str(dtype):  # which Arrow does not make of lists
        plain = pa.array(values, pa.list_(pa.string()))
        return pa.ListArray.from_arrays(plain.offsets, plain.flatten().dictionary_encode(), mask=plain.is_null())
    return pa.array(values, dtype)


def _typed(
    table: Table, cells: dict[str, list[Any]], types: dict[str, pa.DataType], chance: random.Random, *, vary: bool
) -> bytes:
    rows = arrow_of(cells, types)
    if vary and table.form in ("parts", "hive", "parquet"):
        for position, name in enumerate(rows.column_names):
            other = _other_type(rows.column(name), chance)
            if other is not None:
                rows = rows.set_column(position, name, rows.column(name).cast(other))
    if chance.random() < 0.2:
        names = rows.column_names
        rows = rows.select(chance.sample(names, len(names))) if vary else rows
    sink = pa.BufferOutputStream()
    if table.form == "arrow":
        compression = chance.choice((None, "lz4", "zstd"))
        with pa.ipc.new_file(sink, rows.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(rows, max_chunksize=chance.choice((1, 7, 1000)))
    else:
        plain = chance.random() < 0.1 and not any(pa.types.is_duration(kind) for kind in types.values())
        pq.write_table(
            rows, sink, row_group_size=chance.choice((1, 7, 50, 1000)), use_dictionary=chance.random() < 0.5,
            compression=chance.choice(("none", "snappy", "zstd", "gzip")), store_schema=not plain,
            data_page_version=chance.choice(("1.0", "2.0")), write_statistics=chance.random() < 0.5,
        )  # fmt: skip
    return bytes(sink.getvalue())


def _other_type(column: pa.ChunkedArray, chance: random.Random) -> pa.DataType | None:
    """Another type that loses nothing of these cells."""
    kind, present = column.type, column.drop_null().to_pylist()
    if chance.random() < 0.5 or not present:
        return None
    if pa.types.is_signed_integer(kind):
        return pa.int32() if all(abs(cell) < 2**31 for cell in present) else pa.int64()
    if pa.types.is_string(kind):
        return chance.choice((pa.large_string(), pa.dictionary(pa.int32(), pa.string())))
    if kind == pa.float64() and all(abs(cell) < 2**31 and cell == int(cell) for cell in present):
        return pa.int64()
    if pa.types.is_timestamp(kind) and kind.unit in ("s", "ms"):
        return pa.timestamp("us", kind.tz)
    return pa.large_list(pa.string()) if kind == pa.list_(pa.string()) else None


def _frame(table: Table, split: Split) -> Any:
    rows = arrow_of(split.cells, {name: split.types.get(name, table.columns[name].type) for name in split.cells})
    if table.form == "arrow table":
        return rows
    if table.form == "pandas":
        return rows.to_pandas()
    frame = pl.DataFrame(pl.from_arrow(rows))
    return frame.lazy() if table.form == "lazy" else frame
