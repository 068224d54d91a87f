"""Bags and histories: what their cells mean on every road, how the command line names them, what prepare remarks on."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import ctrlib as ctr
from ctrlib import cli
from ctrlib.cli.prepare import Columns, Output, Prepare
from ctrlib.data.columns import Columns as Encoded
from ctrlib.data.encoder import FEW_CELLS, Encoder
from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.infer import infer_features
from ctrlib.data.split import split_table
from ctrlib.data.stream import blocks
from ctrlib.data.table import RawTable
from ctrlib.schema import Categorical, MultiValued, Schema, SchemaError, Sequence

_ = None  # an event that is missing
# Cell -> events of a history with padding "0", and values of a bag with the same, of at most three; None: an error.
CELLS: dict[str, tuple[list[str | None], list[str]] | None] = {
    "a|b": (["a", "b"], ["a", "b"]),
    "a||c": (["a", _, "c"], ["a", "c"]),
    "x|y|": (["x", "y", _], ["x", "y"]),
    "||a": ([_, _, "a"], ["a"]),
    " a | b ": (["a", "b"], ["a", "b"]),
    "|": ([_, _], []),
    "": ([], []),
    "NA": ([], []),
    "\u2003": ([], []),
    "a|NA": (["a", "NA"], ["a", "NA"]),
    "1|2|3|4": (["2", "3", "4"], ["1", "2", "3"]),
    "1|0|2|0|0": (["1", "2"], ["1", "2"]),
    "0|0|0|1": (["1"], ["1"]),
    "0": ([], []),
    "0||0": ([_], []),
    "00|0.0": (["00", "0.0"], ["00", "0.0"]),
    "3,1": (["3,1"], ["3,1"]),
    "[1, 2]": (["1", "2"], ["1", "2"]),
    " [1,2] ": (["1", "2"], ["1", "2"]),
    '["a", " b", ""]': (["a", "b", _], ["a", "b"]),
    '[1, 2.0, "2.0", true, null]': (["2.0", "true", _], ["1", "2", "2.0"]),
    '["a|b", "c,d"]': (["a|b", "c,d"], ["a|b", "c,d"]),
    "[0, 0, 7, 0]": (["7"], ["7"]),
    "[0]": ([], []),
    "[]": ([], []),
    "[null]": ([_], []),
    "[a": (["[a"], ["[a"]),
    "[1.5]": None,
    "['a']": None,
    "[a, b]": None,
    "[1]|[2]": None,
    "[[1]]": None,
    '[{"a": 1}]': None,
    "[1, 2,]": None,
    "[1e400]": None,
    '["\\ud800"]': None,
    "[" * 40_000 + "]": None,
}
GOOD = {cell: events for cell, events in CELLS.items() if events is not None}
HISTORY = Sequence("history", padding="0", max_length=3)
BAG = MultiValued("bag", padding="0", max_length=3)


def table_of(cells: list[Any]) -> pl.DataFrame:
    columns = {"history": cells, "bag": cells, "label": [n % 2 for n in range(len(cells))]}
    return pl.DataFrame(columns, strict=False)


def events_of(columns: Encoded, encoder: Encoder, name: str) -> list[list[str | None]]:
    """What stands behind the ids, with None for the missing id."""
    values = {one: value for value, one in encoder.known[name].items()}
    ragged = columns.ragged[name]
    parts = np.split(ragged.values, ragged.offsets[1:-1])
    return [[_ if one == 1 else values.get(one, "?") for one in part.tolist()] for part in parts]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.DataFrame, Path]:
    frame = table_of(list(GOOD))
    folder = tmp_path_factory.mktemp("lists")
    options: dict[str, Any] = {"missing_values": ("NA",), "log": None}
    ctr.prepare({"train": frame, "valid": frame}, folder / "p", features=[HISTORY, BAG], **options)
    return frame, folder


def test_a_cell_means_the_same_on_every_road(prepared: tuple[pl.DataFrame, Path]) -> None:
    frame, folder = prepared
    encoder = Encoder.load(folder / "p")
    expected = {
        "history": [history for history, _bag in GOOD.values()],
        "bag": [bag or [_] for _history, bag in GOOD.values()],
    }
    for name, events in expected.items():
        values = {one: value for value, one in encoder.known[name].items()}
        for split in ("train", "valid"):
            ids = pl.read_parquet(folder / "p" / split)[name].to_list()
            assert [[values.get(one) for one in row] for row in ids] == events
            assert 2 not in {one for row in ids for one in row}
    many = pl.concat([frame] * (FEW_CELLS // frame.height + 1))
    frame.write_csv(folder / "rows.csv")
    (text,) = blocks(folder / "rows.csv", missing_values=("NA",))
    rows = frame.to_dicts()
    for found in (
        encoder.transform(rows)[0],
        encoder.transform(frame)[0],
        encoder.transform(many)[0],
        encoder.transform_table(text)[0],
        Encoded.concatenate([encoder.transform(row)[0] for row in rows]),
    ):
        for name, events in expected.items():
            assert events_of(found, encoder, name)[: len(rows)] == events
    # Neither road does the other's work here.
    cells = {name: frame[name].to_list() for name in ("history", "bag")}
    assert events_of(encoder._quick(cells, cells)[0], encoder, "history") == expected["history"]


@pytest.mark.parametrize("cells", [[[1, 2], [], None, [3, None, 0]], [["1", " 2"], [], None, ["3", "", "0"]]])
def test_typed_lists_are_what_their_text_is(prepared: tuple[pl.DataFrame, Path], cells: list[Any]) -> None:
    encoder = Encoder.load(prepared[1] / "p")
    as_text = [None if cell is None else json.dumps(cell) for cell in cells]
    found = [encoder.transform(rows)[0] for rows in (table_of(cells), table_of(as_text), table_of(cells).to_dicts())]
    found.append(encoder.transform(pl.concat([table_of(cells)] * FEW_CELLS))[0])
    for columns in found:
        assert events_of(columns, encoder, "history")[:4] == [["1", "2"], [], [], ["3", _]]
        assert events_of(columns, encoder, "bag")[:4] == [["1", "2"], [_], [_], ["3"]]


@pytest.mark.parametrize("cell", [cell for cell, events in CELLS.items() if events is None])
def test_damaged_json_is_refused_with_row_and_column(prepared: tuple[pl.DataFrame, Path], cell: str) -> None:
    encoder = Encoder.load(prepared[1] / "p")
    message = r"row 2, column 'history' holds .*; expected a JSON list of texts \(in double quotes\)"
    for rows in (table_of(["a", cell]), table_of(["a", cell]).to_dicts()):
        with pytest.raises(ctr.DataError, match=message):
            encoder.transform(rows)


def test_damaged_json_in_a_file_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "raw.csv"
    path.write_text('label,history\n1,"[1, 2]"\n0,"[1, 2"\n1,"[1; 2]"\n0,[3]\n')
    options: dict[str, Any] = {"features": [Sequence("history")], "log": None}
    with pytest.raises(
        ctr.DataError, match=r"raw.csv: row 3 \(line 4 of the file\), column 'history' holds '\[1; 2\]'"
    ):
        ctr.prepare({"train": path}, tmp_path / "p", **options)
    ctr.prepare({"train": path}, tmp_path / "p", on_bad_row="skip", **options)
    report = json.loads((tmp_path / "p" / "report.json").read_text())
    assert report["skipped"] == {"train": {"history: not a JSON list": 1}}
    path.write_text(
        "label,history\n1,['a']\n0,\n1,['b']\n"
    )  # Python's way of writing lists is a column of another type
    with pytest.raises(SchemaError, match=r"row 1 .*holds \"\['a'\]\", and no other row is better; expected a JSON"):
        ctr.prepare({"train": path}, tmp_path / "p", on_bad_row="skip", overwrite=True, **options)


def test_events_keep_their_places_beside_each_other(tmp_path: Path) -> None:
    rows = {"item": ["a", "c"], "kind": ["x", "y"], "items": ["a||c", "c"], "kinds": ["x|y|", "y"], "label": [0, 1]}
    features = [Categorical("item"), Categorical("kind"), Sequence("items", vocabulary="item")]
    features.append(Sequence("kinds", vocabulary="kind"))
    ctr.prepare({"train": pl.DataFrame(rows)}, tmp_path / "p", features=features, log=None)
    found = pl.read_parquet(tmp_path / "p" / "train")
    (a, c), (x, y) = found["item"], found["kind"]
    assert list(zip(found["items"][0], found["kinds"][0])) == [(a, x), (1, y), (c, 1)]


def test_padding_without_a_name_of_its_own(tmp_path: Path) -> None:
    """Empty events: those of text, and the nulls of lists."""
    cells = [["a", "b", None], ["", "c", None], [None, None, None]]
    for padding, expected in ((None, [3, 3, 3]), ("", [2, 1, 0])):
        history = Sequence("history", padding=padding)
        for column in (cells, ["a|b|", "|c|", "||"]):
            frame = pl.DataFrame({"history": column, "label": [0, 1, 1]})
            ctr.prepare({"train": frame}, tmp_path / "p", features=[history], log=None, overwrite=True)
            assert pl.read_parquet(tmp_path / "p" / "train")["history"].list.len().to_list() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"separator": ""}, "separator is '', expected a text"),
        ({"padding": 0}, "padding is 0, expected the text of an event"),
        ({"padding": " 0"}, "padding is ' 0', expected the text of an event, without blanks"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any], message: str) -> None:
    for kind in (MultiValued, Sequence):
        with pytest.raises(SchemaError, match=message):
            Schema((kind("x", **arguments),), ("label",))


def test_padding_is_part_of_the_hash_and_none_leaves_older_hashes() -> None:
    schema = Schema((Categorical("item"), Sequence("seen", vocabulary="item"), MultiValued("tags")), ("click",))
    assert schema.hash == "0de4649556cd79ab"  # before there was a padding
    assert "padding" not in json.dumps(schema.to_dict())
    padded = Schema((Categorical("item"), Sequence("seen", vocabulary="item", padding="0")), ("click",))
    assert Schema.from_dict(padded.to_dict()) == padded
    plain = Schema((Categorical("item"), Sequence("seen", vocabulary="item")), ("click",))
    assert padded.hash != plain.hash
    assert plain.difference(padded) == ["feature 'seen': padding is '0', expected None"]


def test_an_empty_history_is_no_missing_id(prepared: tuple[pl.DataFrame, Path], tmp_path: Path, capsys: Any) -> None:
    frame, folder = prepared
    num_rows = frame.height
    empty = sum(not history for history, _bag in GOOD.values())
    missing = sum(history.count(_) for history, _bag in GOOD.values())
    num_events = sum(len(history) for history, _bag in GOOD.values())
    bags = sum(not bag for _history, bag in GOOD.values())
    report = json.loads((folder / "p" / "report.json").read_text())["features"]
    assert report["history"]["empty"]["train"] == empty / num_rows
    assert report["history"]["missing"]["train"] == missing / num_events
    assert report["bag"]["missing"]["train"] == bags / num_rows
    schema = Schema.load(folder / "p")
    config = {"model": "mlp", "embedding_dim": 4, "hidden": [4]}
    ctr.save_model(ctr.models.build(config, schema), config, folder / "p", tmp_path / "m")
    for rows in (frame, frame.to_dicts(), pl.concat([frame] * 100)):
        times = len(rows) // num_rows
        found = ctr.Predictor.load(tmp_path / "m").predict(rows)[1]
        assert found["empty"] == {"history": empty * times}
        assert found["missing"] == {"history": missing * times, "bag": bags * times}
    frame.write_csv(tmp_path / "rows.csv")
    assert cli.main(["predict", str(tmp_path / "m"), str(tmp_path / "rows.csv"), "--out", str(tmp_path / "s.csv")]) == 0
    assert f"history: 0 unseen and {missing} missing ids, {empty} empty histories" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ from the command line


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("multi", "x", MultiValued("x")),
        ("multi", "x:,", MultiValued("x", separator=",")),
        ("multi", "x:::", MultiValued("x", separator="::")),
        ("multi", "x:=", MultiValued("x", separator="=")),
        ("multi", "x:padding=0:max_length=3", MultiValued("x", padding="0", max_length=3)),
        ("multi", "x:;:vocabulary=y", MultiValued("x", separator=";", vocabulary="y")),
        ("sequence", "x", Sequence("x")),
        ("sequence", "x:y", Sequence("x", vocabulary="y")),
        ("sequence", "x:separator=:", Sequence("x", separator=":")),
        ("sequence", "x:separator= :padding=", Sequence("x", separator=" ", padding="")),
        (
            "sequence",
            "x:y:max_length=20:separator=,:padding=0",
            Sequence("x", vocabulary="y", max_length=20, separator=",", padding="0"),
        ),
    ],
)
def test_options_of_lists(flag: str, text: str, expected: Any) -> None:
    columns = Columns(multi=(text,)) if flag == "multi" else Columns(sequence=(text,))
    assert Prepare(Path("x.csv"), Output(Path("p")), column=columns).features() == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:y:max_lenght=3", r"--sequence x:y:max_lenght=3: unknown option 'max_lenght'; .*max_length"),
        ("x:max_lenght=3", "unknown option 'max_lenght'"),
        ("x:separator=,:max_lenght=3", "unknown option 'max_lenght'"),
        ("x:max_length=0", "max_length is '0', expected 1 or more"),
        ("x:max_length=many", "max_length is 'many'"),
        ("x:y:vocabulary=z", "vocabulary is given twice"),
        ("x:padding=0:padding=1", "padding is given twice"),
    ],
)
def test_options_that_lists_do_not_have(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prepare(Path("x.csv"), Output(Path("p")), column=Columns(sequence=(text,))).features()


def test_a_file_of_padded_histories_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    lines = [f'{n % 2},{n % 5 + 1},"{n % 5 + 1},{n % 3 + 1},0,0","[{n % 4}, 9]"' for n in range(60)]
    (tmp_path / "raw.csv").write_text("\n".join(["click,item,seen,tags", *lines]))
    command = ["prepare", str(tmp_path / "raw.csv"), "--out", str(tmp_path / "p"), "--label", "click"]
    options = [
        "--sequence",
        "seen:item:max_length=1:separator=,:padding=0",
        "--multi",
        "tags:,",
        "--categorical",
        "item",
    ]
    assert cli.main([*command, *options, "--stratify", "click"]) == 0
    schema = Schema.load(tmp_path / "p")
    vocabularies = {path.stem: set(pl.read_parquet(path)["value"]) for path in (tmp_path / "p" / "vocab").iterdir()}
    assert vocabularies == {"item": set("12345"), "tags": set("01239")}
    assert schema["seen"] == Sequence("seen", ",", 1, "mean", 1, None, "item", "0", 8)
    capsys.readouterr()


# -------------------------------------------------------------------------------------------------------------- remarks


def remarks_of(tmp_path: Path, columns: dict[str, Any], features: Any = (), **options: Any) -> list[str]:
    """All but those on labels, unless they are asked for."""
    said: list[str] = []
    frame = columns if "train" in columns else {"train": pl.DataFrame(columns)}
    ctr.prepare(frame, tmp_path / "p", features=features, overwrite=True, log=lambda x: said.append(str(x)), **options)
    found = json.loads((tmp_path / "p" / "report.json").read_text())["remarks"]
    assert [line.replace("\\[", "[") for line in said if line.startswith("remark: ")] == [
        f"remark: {one}" for one in found
    ]
    return [one for one in found if "label 'label'" not in one]


NUM_ROWS = 300
LABEL = [n % 2 for n in range(NUM_ROWS)]
RNG = np.random.default_rng(0)
ITEMS = [RNG.integers(1, 30, 1 + n % 5).tolist() for n in range(NUM_ROWS)]


@pytest.mark.parametrize("separator", [",", ";", " ", ", "])
def test_text_that_looks_like_lists_is_remarked_on(tmp_path: Path, separator: str) -> None:
    cells = [separator.join(map(str, items)) for items in ITEMS]
    (remark,) = remarks_of(tmp_path, {"seen": cells, "label": LABEL})
    mark = separator.strip() or " "
    assert remark.startswith("every cell of 'seen' was taken for one id")
    assert f"--sequence 'seen:separator={mark}'" in remark
    # A history that is told so, but not by what it is separated.
    (remark,) = remarks_of(tmp_path, {"seen": cells, "label": LABEL}, [Sequence("seen")])
    assert remark.startswith("no cell of 'seen' holds the separator '|', so that each is one event")
    assert f"separator={mark!r} (on the command line --sequence seen:separator={mark})" in remark
    assert remarks_of(tmp_path, {"seen": cells, "label": LABEL}, [Sequence("seen", separator=mark)]) == []


def test_names_of_columns_do_not_matter(tmp_path: Path) -> None:
    names = ["x", "x events", "x missing", "cells 0", "lists 1", "time", "value"]
    columns = {name: ["a|b", "b", "|a"] for name in names}
    features = [Sequence(name) if n % 2 else MultiValued(name) for n, name in enumerate(names)]
    assert remarks_of(tmp_path, {**columns, "label": [0, 1, 1]}, features) == []
    assert pl.read_parquet(tmp_path / "p" / "train")["x"].to_list() == [[3, 4], [4], [3]]


def test_json_that_is_not_named_is_remarked_on(tmp_path: Path) -> None:
    columns = {"seen": [json.dumps(items) for items in ITEMS], "label": LABEL}
    (remark,) = remarks_of(tmp_path, columns)
    assert "cells look like lists in JSON: name it as a bag (--multi seen) or a history (--sequence seen)" in remark
    assert remarks_of(tmp_path, columns, [Sequence("seen", separator=",")]) == []


def test_text_that_is_no_list_is_not_remarked_on(tmp_path: Path) -> None:
    cities = ["New York", "Los Angeles", "San Francisco", "Rio de Janeiro", "Frankfurt, Oder"] * 60
    codes = [f"c{n % 40}" for n in range(NUM_ROWS)]
    assert remarks_of(tmp_path, {"city": cities, "code": codes, "label": LABEL}) == []


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", [Sequence, MultiValued])
def test_cells_filled_up_to_one_length_are_remarked_on(tmp_path: Path, kind: Any, left: bool) -> None:
    zeros = [[0] * (5 - len(items)) + items if left else items + [0] * (5 - len(items)) for items in ITEMS]
    texts = ["|".join(map(str, items)) for items in zeros]
    for cells in (zeros, texts):
        (remark,) = remarks_of(tmp_path, {"seen": cells, "label": LABEL}, [kind("seen")])
        assert remark.startswith("every cell of 'seen' has 5 values, and '0' is the most frequent of them")
        assert "padding='0' (on the command line" in remark
        assert remarks_of(tmp_path, {"seen": cells, "label": LABEL}, [kind("seen", padding="0")]) == []
        assert "0" not in pl.read_parquet(tmp_path / "p" / "vocab" / "seen.parquet")["value"].to_list()
    holes = [cell.replace("0|", "|") if left else cell.replace("|0", "|") for cell in texts]
    found = remarks_of(tmp_path, {"seen": holes, "label": LABEL}, [kind("seen")])
    assert len(found) == (kind is Sequence)  # a bag drops empty values anyway
    # Zeros in cells of different lengths are an item.
    mixed = [[0, *items] for items in ITEMS]
    assert remarks_of(tmp_path, {"seen": mixed, "label": LABEL}, [kind("seen")]) == []


@pytest.mark.parametrize(("share", "is_remarked"), [(1.0, True), (0.5, True), (0.2, False), (0.1, False)])
@pytest.mark.parametrize("as_file", [False, True])
def test_missing_numbers_are_counted_and_a_split_that_lacks_more_is_remarked_on(
    tmp_path: Path, share: float, is_remarked: bool, as_file: bool
) -> None:
    def rows(missing: int) -> pl.DataFrame:
        x = pl.Series("x", [None if n < missing else n / 7 for n in range(1000)], dtype=pl.Float64)
        return pl.DataFrame({"x": x, "y": [n / 3 for n in range(1000)], "label": [n % 2 for n in range(1000)]})

    given: dict[str, Any] = {"train": rows(100), "test": rows(round(1000 * share))}
    if as_file:
        for name, frame in given.items():
            frame.write_csv(tmp_path / f"{name}.csv")
        given = {name: tmp_path / f"{name}.csv" for name in given}
    ctr.prepare(given, tmp_path / "p", labels="label", log=None)
    report = json.loads((tmp_path / "p" / "report.json").read_text())
    assert report["features"]["x"]["missing"] == {"train": 0.1, "test": share}
    assert report["features"]["y"]["missing"] == {"train": 0.0, "test": 0.0}
    found = [remark for remark in report["remarks"] if remark.startswith("numbers of 'x' are missing in 10%")]
    assert len(found) == is_remarked
    assert all(f"in {share:.0%} of those of test" in remark for remark in found)


@pytest.mark.parametrize(
    ("write", "shown"),
    [
        (lambda n: f"{n % 50}%", "0%"),
        (lambda n: f"${1000 + n % 70:,}.50", "$1,000.50"),
        (lambda n: f"{n % 40} €", "0 €"),
        (lambda n: f"{n % 90 * 37:,}", "1,036"),  # of which some have no comma
        (lambda n: f"({n % 30})", "(0)"),  # negative, in books
    ],
    ids=["percent", "dollars", "euros", "thousands", "brackets"],
)
def test_numbers_with_other_signs_are_remarked_on(tmp_path: Path, write: Any, shown: str) -> None:
    cells = [write(n) for n in range(NUM_ROWS)]
    (remark,) = remarks_of(tmp_path, {"x": cells, "label": LABEL})
    assert remark.startswith(f"column 'x' was taken for ids, but holds numbers with other signs, such as {shown!r}")
    each = pl.LazyFrame({"x": [f"${n:,}.10" for n in range(NUM_ROWS)]})
    (guess,) = infer_features(RawTable((each,), "demo"))
    assert guess.feature is None
    assert guess.remark.startswith("column 'x' was left out, since every row has another, but holds numbers with")


@pytest.mark.parametrize(
    "write",
    [
        lambda n: f"{101 + n % 7},{201 + n % 5}",  # a list of ids, which has a remark of its own
        lambda n: f"s{n % 9}%",
        lambda n: f"{n % 9}-{n % 7}",
        lambda n: f"{n % 50}",
    ],
    ids=["list", "letter", "range", "plain"],
)
def test_other_text_is_not_taken_for_numbers_with_signs(tmp_path: Path, write: Any) -> None:
    found = remarks_of(tmp_path, {"x": [write(n) for n in range(NUM_ROWS)], "label": LABEL})
    assert not any("other signs" in remark for remark in found)


def test_times_and_near_unique_text_are_remarked_on(tmp_path: Path) -> None:
    start = datetime.datetime(2024, 3, 5, 8, 15, 30)
    times = [(start + datetime.timedelta(minutes=7 * (n // 2))).isoformat() + "Z" for n in range(NUM_ROWS)]
    (remark,) = remarks_of(tmp_path, {"at": times, "label": LABEL})
    assert remark.startswith("column 'at' holds times, such as '2024-03-05T08:15:30Z', and was taken for ids")
    days = [(start + datetime.timedelta(days=n // 2)).date().isoformat() for n in range(NUM_ROWS)]
    (remark,) = remarks_of(tmp_path, {"day": days, "label": LABEL})
    assert remark.startswith("column 'day' holds times, such as '2024-03-05', and was taken for ids")
    assert remarks_of(tmp_path, {"day": [f"{day} (x)" for day in days], "label": LABEL}) == []
    each = [(start + datetime.timedelta(minutes=7 * n)).isoformat() for n in range(NUM_ROWS)]
    (guess,) = infer_features(RawTable((pl.LazyFrame({"at": each}),), "demo"))
    assert (guess.feature, guess.reason) == (None, "ignored: every row has another time; --split-by splits by it")
    trains = pl.DataFrame({"who": [f"u{n}" for n in range(NUM_ROWS - 1)] + ["u0"], "label": LABEL})
    valid = pl.DataFrame({"who": [f"u{n}" for n in range(290, 320)], "label": LABEL[:30]})
    (remark,) = remarks_of(tmp_path, {"train": trains, "valid": valid})
    assert remark.startswith("column 'who' was taken for a categorical feature, and 70% of its values in valid are not")
    assert remarks_of(tmp_path, {"train": trains, "valid": valid}, [Categorical("who")]) == []  # as told


def test_histories_that_go_together_and_differ_in_length_are_remarked_on(tmp_path: Path) -> None:
    columns = {"item": ["a"] * 3, "kind": ["x"] * 3, "items": ["a", "a|a", ""], "label": [0, 1, 1]}
    features = [Categorical("item"), Categorical("kind"), Sequence("items", vocabulary="item")]
    for kinds, expected in ((["x", "x|", ""], 0), (["x", "x", "x"], 2)):
        both = [*features, Sequence("kinds", vocabulary="kind")]
        found = [one for one in remarks_of(tmp_path, {**columns, "kinds": kinds}, both) if "separator" not in one]
        assert len(found) == (expected > 0)
    assert found[0].startswith(
        "train: row 2, column 'kinds' holds 'x', which has another number of events than 'items' (2 rows of train)"
    )


def test_few_positives_and_base_rates(tmp_path: Path) -> None:
    item = [f"i{n % 7}" for n in range(4000)]
    frames = {
        split: pl.DataFrame({"item": item, "label": [int(n % 100 < share) for n in range(4000)]})
        for split, share in (("train", 50), ("valid", 51), ("test", 2))
    }
    ctr.prepare(frames, tmp_path / "p", log=None)
    assert json.loads((tmp_path / "p" / "report.json").read_text())["remarks"] == [
        "label 'label' has few rows of one class, 80 in test with label = 1: an AUC of 80 has a standard error of "
        "about 0.03",
        "label 'label' has mean 0.5000 in train and 0.0200 in test, which differ by more than chance (p < 0.001): "
        "metrics of the two cannot be compared",
    ]


# ----------------------------------------------------------------------------------------------- splits within classes


def test_a_stratified_split_is_exact_within_each_class(tmp_path: Path) -> None:
    labels = ["yes" if n % 10 == 0 else "no" if n % 10 < 8 else None for n in range(1000)]
    frame = pl.DataFrame({"row": range(1000), "label": labels})
    options: dict[str, Any] = {"stratify": "label", "label_positive": {"label": "yes"}, "missing_labels": "mask"}
    options |= {"features": [ctr.RawId("row")], "log": None}
    found = []
    for number, seed in enumerate((0, 0, 1)):
        ctr.prepare(frame, tmp_path / str(number), seed=seed, **options)
        found.append({split: pl.read_parquet(tmp_path / str(number) / split) for split in ("train", "valid", "test")})
    for splits in found:
        counts = {split: rows["label"].fill_nan(None).value_counts().rows() for split, rows in splits.items()}
        assert {split: dict(pairs) for split, pairs in counts.items()} == {
            "train": {1.0: 80, 0.0: 560, None: 160},
            "valid": {1.0: 10, 0.0: 70, None: 20},
            "test": {1.0: 10, 0.0: 70, None: 20},
        }
        assert sorted(one for rows in splits.values() for one in rows["row"]) == list(range(1000))
    assert found[0]["test"].equals(found[1]["test"])
    assert not found[0]["test"]["row"].equals(found[2]["test"]["row"])


def test_a_stratified_split_does_not_depend_on_where_pieces_end() -> None:
    frame = pl.DataFrame({"__row__": range(500), "label": [n % 3 == 0 for n in range(500)]})
    whole = RawTable((frame.lazy(),), "whole")
    pieces = RawTable((frame[:7].lazy(), frame[7:7].lazy(), frame[7:].lazy()), "pieces")
    found = []
    for table in (whole, pieces):
        parts = split_table(table, (8, 1, 1), split_by=None, seed=5, stratify="label")
        found.append([frame.filter(rows)["__row__"].to_list() for rows in parts.values()])
    assert found[0] == found[1]
    assert sum(map(len, found[0])) == 500


def test_a_split_at_random_is_what_it_was(tmp_path: Path) -> None:
    rows = {"item": [str(i % 7) for i in range(50)], "label": [i % 2 for i in range(50)]}
    ctr.prepare(pl.DataFrame(rows), tmp_path / "p", log=None)
    found = fingerprint(tmp_path / "p")
    assert (found["train"], found["test"]) == ("d27d4ed017d27a9b", "52a2310e30253c1c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stratify": "item"}, r"stratify is 'item', expected a label, one of \['label'\]"),
        ({"stratify": "label", "split_by": "item"}, "is for a random split, but split_by='item' says"),
    ],
)
def test_a_split_that_cannot_be_stratified(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    frame = pl.DataFrame({"item": [1, 2, 3], "label": [0, 1, 1]})
    with pytest.raises(SchemaError, match=message):
        ctr.prepare(frame, tmp_path / "p", log=None, **options)
    with pytest.raises(SchemaError, match="the data is split already"):
        ctr.prepare({"train": frame}, tmp_path / "p", log=None, stratify="label")


# --------------------------------------------------------------------------------------------------- two spellings


@pytest.mark.parametrize("way", ["bag", "history"])
@pytest.mark.parametrize("text", [True, False])
def test_lists_of_floats_for_lists_of_integers_are_refused(tmp_path: Path, way: str, text: bool) -> None:
    feature = (MultiValued if way == "bag" else Sequence)("x")
    cells = ["1|2|3", "1", "2"]
    floats = ["1.0|2.0|3.0", "1.0", "2.0"]
    frames = {
        split: pl.DataFrame({"x": column if text else [cell.split("|") for cell in column], "label": [0, 1, 1]})
        for split, column in (("train", cells), ("valid", floats))
    }
    with pytest.raises(SchemaError, match=r"valid: column 'x' holds 5 values .* '1' for '1.0': write the column as"):
        ctr.prepare(frames, tmp_path / "p", features=[feature], log=None)


@pytest.mark.parametrize("item", [[5.0, 6.0, 7.0], [5, 6, 7], ["5", "6", "7"]])
def test_a_history_joined_from_floats_is_refused_beside_its_items(tmp_path: Path, item: list[Any]) -> None:
    features = [Categorical("item"), Sequence("seen", vocabulary="item")]
    frame = pl.DataFrame({"item": item, "seen": ["5.0|6.0", "7.0", None], "label": [0, 1, 1]})
    with pytest.raises(
        SchemaError, match=r"'seen' holds values such as '[567]\.0' and 'item', which shares its vocabulary"
    ):
        ctr.prepare({"train": frame}, tmp_path / "p", features=features, log=None)
    # Typed lists of floats are whole numbers; text that has both spellings itself keeps both.
    frame = frame.with_columns(seen=pl.Series([[5.0, 6.0], [7.0], []]))
    ctr.prepare({"train": frame}, tmp_path / "p", features=features, log=None)
    assert sorted(pl.read_parquet(tmp_path / "p" / "vocab" / "item.parquet")["value"]) == ["5", "6", "7"]
    sizes = pl.DataFrame({"item": ["5", "5.0", "6"], "seen": ["5.0|6", "5", "6.0"], "label": [0, 1, 1]})
    ctr.prepare({"train": sizes}, tmp_path / "p", features=features, log=None, overwrite=True)


def test_categories_in_lists_lose_their_blanks(tmp_path: Path) -> None:
    frames = {
        split: pl.DataFrame({"x": pl.Series(cells, dtype=pl.List(dtype)), "label": [0, 1]})
        for split, cells, dtype in (
            ("train", [["b", "a"], ["b"]], pl.String),
            ("valid", [[" b", "a"], ["b "]], pl.Categorical),
        )
    }
    ctr.prepare(frames, tmp_path / "p", features=[Sequence("x")], log=None)
    assert pl.read_parquet(tmp_path / "p" / "valid")["x"].to_list() == [[3, 4], [3]]
