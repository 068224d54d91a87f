"""Random arguments of `prepare` for random tables, and what is damaged."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import input_tables as tables
import pyarrow as pa
from input_tables import KINDS, ROW_NUMBER, TEXT_FORMS, Column, Split, Table

from ctrlib.schema import Categorical, MultiValued, Numeric, RawId, Sequence

TRANSFORMS = ("none", "log", "log_squared", "minmax", "standard", "log_standard")
ROW_DAMAGES = ("too few cells", "too many cells", "stray quote", "NUL byte", "bad UTF-8", "blank line")
JSON_DAMAGES = ("no JSON object", "bad UTF-8", "blank line")


@dataclass
class Case:
    """A table, and the arguments with which it is prepared; `other_names` are columns that they name in vain."""

    table: Table
    options: dict[str, Any]
    other_names: list[str] = field(default_factory=list)


def draw_case(chance: random.Random, folder: Path) -> Case:
    """A case; its files lie in `folder`."""
    form = chance.choice((*tables.FILE_FORMS, "csv", "csv", "parquet", "csv", *tables.FRAMES))
    num_rows = chance.choice(
        (chance.randint(1, 12), chance.randint(10, 90), chance.randint(10, 90), chance.randint(80, 300))
    )
    table = Table(form, {})
    case = Case(table, {"on_bad_row": chance.choice(("raise", "skip"))})
    _draw_columns(case, chance, num_rows)
    _draw_reading(case, chance)
    _draw_features(case, chance)
    _draw_labels(case, chance, num_rows)
    names = list(table.columns)
    chance.shuffle(names)
    table.columns = {name: table.columns[name] for name in names}
    _draw_splits(case, chance, num_rows)
    cells = {name: tables.seen(column, table, chance) for name, column in table.columns.items()}
    for split in table.splits:
        split.cells = {name: values[split.rows.start : split.rows.stop] for name, values in cells.items()}
    damages, whole = _damage(case, chance)
    if form == "hive":
        table.columns["day"] = Column("key", [], pa.string())
        if chance.random() < 0.5:
            case.options.setdefault("ignore", []).append("day")
    for number, split in enumerate(table.splits):
        last = number == len(table.splits) - 1
        tables.write(table, split, folder, chance, damages if last else {}, whole if last else "")
    return case


def _draw_columns(case: Case, chance: random.Random, num_rows: int) -> None:
    table = case.table
    kinds = [kind for kind in KINDS if kind != "odd" or not (table.is_text or table.form == "jsonl")]
    if table.form == "pandas":  # which has no integers with missing cells, and few types of its own
        kinds = ["text", "float", "bool", "category", "datetime", "unique", "joined", "json", "leading zeros"]
    names = [
        name
        for name in tables.NAMES
        if (name and name == name.strip()) or table.form not in (*TEXT_FORMS, *tables.FRAMES)
    ]
    for name in chance.sample(names, chance.randint(1, 8)):
        table.columns[name] = tables.draw_column(chance, chance.choice(kinds), num_rows)
        if table.form == "pandas" and table.columns[name].kind == "bool":
            table.columns[name].cells = [bool(cell) for cell in table.columns[name].cells]
    if "" in table.columns:
        table.trouble.add("a column without name")
    if chance.random() < 0.9:
        table.columns[ROW_NUMBER] = Column("row", list(range(num_rows)), pa.int64())


def _draw_reading(case: Case, chance: random.Random) -> None:
    """How the file is to be read."""
    table, options = case.table, case.options
    table.tokens = chance.choice((("",), ("",), ("", "NA"), ("?", ""), ("NULL",)))
    if table.tokens != ("",):
        options["missing_values"] = table.tokens
    if table.is_text:
        if table.form == "txt" or chance.random() < 0.1:
            table.separator = chance.choice(";|\t,")
            if table.form != "txt" or chance.random() < 0.7:
                options["separator"] = table.separator
            else:
                table.trouble.add("a separator to be told")
        table.header = chance.random() < 0.9


def _draw_features(case: Case, chance: random.Random) -> None:
    """What columns are features of; the others are inferred."""
    table, options = case.table, case.options
    rare = {"min_count": chance.choice((1, 1, 2, 5)), "max_values": chance.choice((None, None, 1, 3))}
    if chance.random() < 0.3:
        options |= rare
    features: list[Any] = []
    for name, column in table.columns.items():
        if column.kind == "row":
            features.append(Numeric(name, "minmax"))  # small, and the number can be had from it
            continue
        roles = KINDS[column.kind][1].split()
        kind = column.type
        if table.is_text or table.form == "jsonl":
            roles = [role for role in roles if role != "raw" or column.kind != "float id"]
            if table.is_text and column.kind == "bool":
                roles = ["id"]
        if column.kind == "constant" and column.cells[0] == 2.5 and not table.is_text:
            roles = ["number"]
        if pa.types.is_list(kind) and column.kind == "null":
            roles = ["bag", "history"]
        if column.kind == "constant" and chance.random() < 0.5:
            roles = []
        role = chance.choice(roles) if roles and chance.random() < 0.6 else ""
        if chance.random() < 0.02 and column.kind not in ("odd",):
            role = chance.choice(("id", "number", "raw", "bag", "history"))
            table.trouble.add("another kind of feature")
        if role and column.kind == "number as text" and any(one in ("0x1", "1_0") for one in column.cells):
            table.trouble.add("no number")
        own = rare if chance.random() < 0.3 else {}
        listed = {
            "separator": column.separator,
            "max_length": chance.choice((1, 3, 50)),
            "padding": chance.choice((None, None, "a", "0", "")),
            **own,
        }
        if role == "id":
            features.append(Categorical(name, **own))
        elif role == "bucket":
            features.append(Categorical(name, bucket="log_squared", **own))
        elif role == "number":
            features.append(Numeric(name, chance.choice(TRANSFORMS)))
        elif role == "raw":
            features.append(RawId(name))
            if table.form == "jsonl" and column.kind == "uint64":
                table.trouble.add("integers of 64 bits")
        elif role == "bag":
            features.append(MultiValued(name, **listed))
        elif role == "history":
            shared = [
                f.name
                for f in features
                if type(f) is Categorical and not f.bucket and table.columns[f.name].kind in ("text", "category")
            ]
            vocabulary = None
            if shared and chance.random() < 0.3 and column.kind in ("text", "joined", "category"):
                vocabulary = chance.choice(shared)
                of = next(f for f in features if f.name == vocabulary)
                listed |= {"min_count": of.min_count, "max_values": of.max_values}
            features.append(Sequence(name, vocabulary=vocabulary, **listed))
        elif chance.random() < 0.05:
            options.setdefault("ignore", []).append(name)
    chance.shuffle(features)
    if features:
        options["features"] = features
    if not any(column.kind == "row" for column in table.columns.values()):
        table.trouble.add("perhaps no feature")


def _draw_labels(case: Case, chance: random.Random, num_rows: int) -> None:
    table, options = case.table, case.options
    labels = ["label"] if chance.random() < 0.8 else ["label", chance.choice(("bought", "y 2", "label present"))]
    if chance.random() < 0.1:
        labels = ["is it clicked?"]
    labels = [label for label in labels if label not in table.columns]
    for label in labels:
        values, dtype = chance.choice(
            (
                ((0, 1), pa.int64()),
                ((0, 1), pa.int8()),
                ((0.0, 1.0), pa.float64()),
                (("no", "yes"), pa.string()),
                ((False, True), pa.bool_()),
            )
        )
        if dtype == pa.bool_() and table.is_text:
            values, dtype = (0, 1), pa.int64()
        cells: list[Any] = [values[chance.random() < 0.4] for _ in range(num_rows)]
        if values[1] == "yes":
            options.setdefault("label_positive", {})[label] = "yes"
            table.trouble.add("perhaps no positive label")
        if chance.random() < 0.15 and not (table.form == "pandas" and dtype == pa.bool_()):
            cells = [None if chance.random() < 0.2 else cell for cell in cells]
            if None in cells:
                table.trouble.add("missing labels")
        table.columns[label] = Column("label", cells, dtype)
    options["labels"] = labels if len(labels) > 1 or chance.random() < 0.5 else labels[0]
    if "missing labels" in table.trouble or chance.random() < 0.1:
        options["missing_labels"] = chance.choice(("mask", "mask", "raise"))
    if chance.random() < 0.15:
        weights = [chance.choice((0.0, 1.0, 0.5, 2, 1e-3)) for _ in range(num_rows)]
        table.columns["w"] = Column("weight", [float(weight) for weight in weights], pa.float64())
        options["weight"] = "w"
    if chance.random() < 0.2:
        choices = [
            name
            for name, column in table.columns.items()
            if column.kind in ("text", "int", "unique", "float id", "date")
        ]
        if choices and chance.random() < 0.5:
            options["group"] = chance.choice(choices)
            table.trouble.add("perhaps a missing group")
        else:
            pool = chance.choice(([1, 2, 3, 2**40], ["u1", "u2", "ü"]))
            kind = pa.int64() if pool[0] == 1 else pa.string()
            table.columns["g"] = Column("group", [chance.choice(pool) for _ in range(num_rows)], kind)
            options["group"] = "g"


def _draw_splits(case: Case, chance: random.Random, num_rows: int) -> None:
    table, options = case.table, case.options
    if chance.random() < 0.55:
        cuts = sorted(chance.sample(range(1, num_rows), min(chance.choice((0, 1, 2)), num_rows - 1)))
        names = ("train", "valid", "test") if chance.random() < 0.9 else ("train", "test", "valid")
        bounds = zip([0, *cuts], [*cuts, num_rows])
        table.splits = [Split(name, range(start, stop)) for name, (start, stop) in zip(names, bounds)]
        if len(cuts):
            table.trouble.add("splits that may differ")
    else:
        table.splits = [Split("data", range(num_rows))]
        options["split"] = chance.choice(((8, 1, 1), (8, 1, 1), (1, 0, 0), (0.7, 0.3, 0), (1, 1, 1)))
        options["seed"] = chance.randrange(5)
        if options["split"] != (1, 0, 0):
            table.trouble.add("perhaps an empty split")
        how = chance.random()
        if how < 0.15:
            options["stratify"] = options["labels"] if isinstance(options["labels"], str) else options["labels"][0]
        elif how < 0.35:
            choices = [
                n
                for n, c in table.columns.items()
                if c.kind in ("row", "date", "datetime", "int", "float", "text", "time of day")
            ]
            if choices:
                options["split_by"] = chance.choice(choices)
                table.trouble.add("perhaps no time")
                if options["split_by"] in options.get("ignore", ()):
                    options["ignore"].remove(options["split_by"])
    used = {feature.name for feature in options.get("features", ())}
    group = options.get("group")
    if options.get("ignore"):
        options["ignore"] = [name for name in options["ignore"] if name not in used or name == group]


# -------------------------------------------------------------------------------------------------------------- damage


def _damage(case: Case, chance: random.Random) -> tuple[dict[int, str], str]:
    """What is done to lines of the last split, and to the whole of its last file."""
    table, options = case.table, case.options
    split = table.splits[-1]
    num_rows = len(split.rows)
    how = chance.random()
    if not table.header:
        options["columns"] = list(split.cells)
    if how < 0.55:
        return {}, ""
    if how < 0.68 and (table.is_text or table.form == "jsonl"):
        kinds = ROW_DAMAGES if table.is_text else JSON_DAMAGES
        rows = chance.sample(range(num_rows), min(num_rows, chance.choice((1, 1, 2, 5))))
        damages = {row: chance.choice(kinds) for row in rows}
        split.malformed = set(damages)
        table.trouble |= {f"malformed: {kind}" for kind in damages.values()}
        return damages, ""
    if how < 0.85:
        _damage_cells(case, chance, split)
        return {}, ""
    if how < 0.93:
        _damage_columns(case, chance, split)
        return {}, ""
    if table.form in tables.FRAMES:
        return {}, ""
    whole = chance.choice(("truncated", "truncated when packed"))
    table.trouble.add(whole)
    table.exact = False
    return {}, whole


def _damage_cells(case: Case, chance: random.Random, split: Split) -> None:
    table, options = case.table, case.options
    features = {feature.name: feature for feature in options.get("features", ())}
    for _ in range(chance.choice((1, 1, 3))):
        name = chance.choice(list(split.cells))
        column, feature = table.columns[name], features.get(name)
        row = chance.randrange(len(split.rows))
        anything = table.is_text
        floats = anything or table.form == "jsonl" or column.type in (pa.float64(), pa.float32())
        odd: list[Any] = []
        if column.kind == "label" and name not in options.get("label_positive", {}):
            odd = (
                ["2", "inf", "", "yes", "nan", "0.5", "-1"]
                if anything
                else [2.0, math.inf, None, math.nan]
                if floats
                else [None]
                if column.type == pa.bool_()
                else [2, None, -1]
            )
        elif column.kind == "weight":
            odd = ["-1", "", "x", "inf", "nan"] if anything else [-1.0, None, math.inf, math.nan]
        elif column.kind == "group":
            odd = ["", "nan"] if anything else [None]
        elif isinstance(feature, Numeric):
            odd = (
                ["abc", "inf", "-inf", "1e39", "1e400", "1,5", "--", "Infinity"]
                if anything
                else [math.inf, -math.inf, 1e39, 1e300]
                if floats
                else []
            )
            if column.kind == "tiny":
                odd += ["1e30", "1e-20"] if anything else [1e30, 1e-20]
            if column.type == pa.float32() and not anything and table.form != "jsonl":
                odd = [math.inf, -math.inf]
        elif isinstance(feature, MultiValued | Sequence) and (anything or column.type == pa.string()):
            odd = ["[1, 2", "[1, 2.5]", "['a']", '[["a"]]', "[1 2]", '["a"]', "[]", '{"a": 1}', "[null]", "[1e400]"]
        elif isinstance(feature, Categorical) and floats and column.kind == "float id":
            odd = ["1.5", "inf"] if anything else [1.5, math.inf, 1e300]
        elif feature is None and anything:
            odd = ["inf", "nan", "-", "1e400", "\x1f", "\u2028", " "]
        if not odd or (table.form == "pandas" and column.type == pa.bool_()):
            continue
        split.cells[name][row] = chance.choice(odd)
        table.trouble.add(f"an odd cell in {column.kind}")


def _damage_columns(case: Case, chance: random.Random, split: Split) -> None:
    """A column of the last split is missing, has another name or other values."""
    table = case.table
    name = chance.choice(list(split.cells))
    what = chance.choice(("missing", "renamed", "extra", "twice", "other type"))
    if what == "other type":
        ending = chance.choice((".0", "x", ""))
        split.cells[name] = [
            None if cell is None and not table.is_text else f"{cell}{ending}" for cell in split.cells[name]
        ]
        split.types[name] = pa.string()
    elif what == "missing":
        del split.cells[name]
    elif what == "extra":
        split.cells["surplus"] = list(split.cells[name])
        table.columns["surplus"] = table.columns[name]
    elif what == "renamed":
        split.cells["another"] = split.cells.pop(name)
        table.columns["another"] = table.columns[name]
    else:
        return
    case.other_names += ["surplus", "another"]
    table.trouble.add(f"a column {what}")
    table.exact = False
    if not table.header:
        case.options["columns"] = list(split.cells)
