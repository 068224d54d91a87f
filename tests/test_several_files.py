"""Files that follow each other are scored as one table, as they are prepared."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.data import jsonlines, stream
from ctrlib.data.scan import DataError
from ctrlib.schema import Categorical, MultiValued, Numeric, SchemaError

N = 60
CONFIG: dict[str, Any] = {"model": "fm", "embedding_dim": 4}
FEATURES = [Categorical("item"), Categorical("user"), Numeric("price"), MultiValued("tags", separator="|")]


def rows(number: int = N) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item": [None if i == 5 else f"i{i % 7}" for i in range(number)],
            "user": [None if i == 3 else i % 11 for i in range(number)],
            "price": [None if i == 4 else i / 4 for i in range(number)],
            "tags": [["", "a", "a|b"][i % 3] for i in range(number)],
            "label": [i % 2 for i in range(number)],
        }
    )


def lists(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("tags").str.split("|").list.eval(pl.element().filter(pl.element() != "")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctr.Predictor:
    folder = tmp_path_factory.mktemp("model")
    schema = ctr.prepare({"train": rows()}, folder / "p", features=FEATURES, labels="label", log=None)
    torch.manual_seed(0)
    ctr.save_model(models.build(CONFIG, schema), CONFIG, folder / "p", folder / "m")
    return ctr.Predictor.load(folder / "m")


def file(folder: Path, name: str, frame: pl.DataFrame) -> Path:
    """Rows in the form that the name's ending says; a name without ending is a folder of two parquet files."""
    path = folder / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(frame.write_csv().encode()))
    elif name.endswith(".csv"):
        frame.write_csv(path)
    elif name.endswith(".tsv"):
        frame.write_csv(path, separator="\t")
    elif name.endswith(".jsonl"):
        frame.write_ndjson(path)
    elif name.endswith(".arrow"):
        lists(frame).write_ipc(path, record_batch_size=9)
    elif name.endswith(".parquet"):
        lists(frame).write_parquet(path, row_group_size=9)
    else:
        path.mkdir()
        lists(frame[:3]).write_parquet(path / "0.parquet")
        lists(frame[3:]).write_parquet(path / "1.parquet")
    return path


FORMS = {
    "one": ["a.csv"],
    "text": ["a.csv", "b.csv.gz", "c.tsv", "d.csv"],
    "parquet": ["a.parquet", "b.parquet", "c.parquet"],
    "arrow": ["a.arrow", "b.arrow"],
    "json": ["a.jsonl", "b.jsonl", "c.jsonl"],
    "files with types": ["a.parquet", "b.arrow", "c", "d.jsonl"],
    "columns": ["a", "b.parquet", "c.arrow"],
}


def parts(folder: Path, names: list[str]) -> list[Path]:
    """The rows in so many files, whose columns stand in different order."""
    ends = np.linspace(0, N, len(names) + 1).astype(int).tolist()
    columns = rows().columns
    return [
        file(folder, name, rows()[start:end].select(columns[turn % 5 :] + columns[: turn % 5]))
        for turn, (name, start, end) in enumerate(zip(names, ends, ends[1:]))
    ]


@pytest.mark.parametrize("form", FORMS)
def test_several_files_are_scored_as_one_table(
    tmp_path: Path, model: ctr.Predictor, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK_ROWS", 7)
    monkeypatch.setattr(jsonlines, "BLOCK_BYTES", 700)
    files = parts(tmp_path, FORMS[form])
    expected, counts = model.predict(rows())
    for data in (files, tuple(map(str, files))):
        found, said = model.predict(data)
        np.testing.assert_allclose(found["label"], expected["label"], rtol=0, atol=1e-6)
        assert {**said, "ignored": []} == {**counts, "ignored": []}
    assert len(set(expected["label"].to_list())) == N  # so that their order shows

    columns, _ = model.encoder.transform(files)
    whole, _ = model.encoder.transform(rows())
    assert np.array_equal(columns.ids, whole.ids)
    assert np.array_equal(columns.floats, whole.floats, equal_nan=True)
    assert np.array_equal(columns.ragged["tags"].values, whole.ragged["tags"].values)
    found, scored = model.evaluate(files), model.evaluate(rows())
    assert found["auc"] == pytest.approx(scored["auc"])
    assert found["log_loss"] == pytest.approx(scored["log_loss"])

    seen: list[int] = []
    model.predict_to(files, tmp_path / "out.parquet", keep=["user", "item"], progress=seen.append)
    read = pl.read_parquet(tmp_path / "out.parquet")
    assert read["item"].to_list() == rows()["item"].to_list()
    assert read["user"].cast(pl.Int64).to_list() == rows()["user"].to_list()
    assert seen == sorted(seen)
    assert seen[-1] == N
    assert len(seen) >= len(files)


def test_files_are_scored_as_they_are_prepared(tmp_path: Path, model: ctr.Predictor) -> None:
    """Integers, and floats for integers where one is missing; fractions would be refused in both."""
    (tmp_path / "0").mkdir()
    first = rows()[10:].with_columns(pl.col("user").cast(pl.Int8), pl.col("price").cast(pl.Float32))
    second = rows()[:10].with_columns(pl.col("user").cast(pl.Float64), pl.col("item").cast(pl.Categorical))
    files = [file(tmp_path, "0.parquet", first), file(tmp_path, "1.arrow", second)]
    frame = pl.concat([rows()[10:], rows()[:10]])
    for name, data in (("many", files), ("one", frame)):
        ctr.prepare({"train": data}, tmp_path / name, features=FEATURES, labels="label", log=None)
    assert pl.read_parquet(tmp_path / "many" / "train").equals(pl.read_parquet(tmp_path / "one" / "train"))
    np.testing.assert_allclose(model.predict(files)[0]["label"], model.predict(frame)[0]["label"], rtol=0, atol=1e-6)
    model.predict_to(files, tmp_path / "out.parquet", keep=["user", "item"])
    read = pl.read_parquet(tmp_path / "out.parquet")
    assert read.select("user", "item").rows() == frame.select("user", "item").rows()
    assert read["user"].dtype == pl.Int64

    halves = file(tmp_path, "half.parquet", second.with_columns(user=pl.lit(0.5)))
    for refused in (lambda: model.predict([files[0], halves]), lambda: prepared([files[0], halves], tmp_path)):
        with pytest.raises(SchemaError, match=r"half.parquet: row 1, column 'user' holds 0.5"):
            refused()
    texts = file(tmp_path, "text.parquet", second.with_columns(user=pl.lit("u")))
    for refused in (lambda: model.predict([files[0], texts]), lambda: prepared([files[0], texts], tmp_path)):
        with pytest.raises(SchemaError, match=r"text.parquet: column 'user' has type String, in .*0.parquet it has"):
            refused()


def prepared(data: Any, folder: Path, **options: Any) -> ctr.Schema:
    options = {"features": FEATURES, "labels": "label", "log": None, "overwrite": True, **options}
    return ctr.prepare({"train": data}, folder / "again", **options)


def test_errors_name_the_file_and_its_row(tmp_path: Path, model: ctr.Predictor) -> None:
    good = file(tmp_path, "good.csv", rows())
    header = "item,user,price,tags,label\n"
    (tmp_path / "cell.csv").write_text(header + "i1,1,2,,1\ni1,1,dear,,0\n")
    (tmp_path / "short.csv").write_text(header + "i1,1,2,,1\ni1,1\n")
    (tmp_path / "lacks.csv").write_text("item,user,price,label\ni1,1,2,1\n")
    (tmp_path / "empty.csv").write_text(header)
    for name, message in (
        ("cell.csv", r"cell.csv: row 2 \(line 3 of the file\), column 'price' holds 'dear'"),
        ("short.csv", r"short.csv: row 2 \(line 3 of the file\) has 2 cells"),
        ("empty.csv", r"empty.csv has no rows"),
        ("nowhere.csv", r"nowhere.csv does not exist"),
    ):
        for data in ([good, tmp_path / name], [tmp_path / name, good], [good, tmp_path / name, good]):
            with pytest.raises(DataError, match=message):
                model.predict(data)
            with pytest.raises(DataError, match=message):
                prepared(data, tmp_path)
    with pytest.raises(SchemaError, match=r"lacks.csv: columns \['tags'\] are missing"):
        model.predict([good, tmp_path / "lacks.csv"])
    part = file(tmp_path, "part.parquet", rows())
    for data in ([good, part], [part, good]):
        for read in (lambda data: model.predict(data), lambda data: prepared(data, tmp_path)):
            with pytest.raises(SchemaError, match=f"{data[1].name} and .*{data[0].name} are of two kinds"):
                read(data)
    lacks = file(tmp_path, "lacks.parquet", rows().drop("price", "label"))
    with pytest.raises(SchemaError, match=r"lacks.parquet lacks columns \['price'\], which .*part.parquet has"):
        model.predict([part, lacks])  # labels are not needed
    file(tmp_path, "without.parquet", rows().drop("label"))
    assert len(model.predict([part, tmp_path / "without.parquet"])[0]) == 2 * N


@pytest.mark.parametrize(
    "wrong", [[Path("a.csv"), {"item": "a"}], [{"item": "a"}, "a.csv"], [["a.csv"]], ["a.csv", None]]
)
def test_lists_of_paths_and_rows_are_refused(model: ctr.Predictor, wrong: Any) -> None:
    for read in (model.predict, model.evaluate, model.encoder.transform):
        with pytest.raises(TypeError, match=r"expected paths of files, or one frame|expected a dictionary of cells"):
            read(wrong)


def test_an_empty_list_has_no_rows(tmp_path: Path, model: ctr.Predictor) -> None:
    with pytest.raises(DataError, match="data has no rows"):
        model.predict([])
    with pytest.raises(TypeError, match="expected paths of files"):
        model.predict_to([], tmp_path / "out.csv")
    with pytest.raises(TypeError, match="expected paths of files"):
        model.predict_to([rows()], tmp_path / "out.csv")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_that_are_left_out_are_numbered_in_the_whole(tmp_path: Path, model: ctr.Predictor, form: str) -> None:
    """Rows 2 and 3 of the first file, 5 and 9 of the second and the last of the third, of 12 each."""
    lines: list[str] = []
    for row in rows(36).rows(named=True):
        cells = ["" if cell is None else str(cell) for cell in row.values()]
        lines.append(",".join(cells) if form == "csv" else json.dumps(row))
    for bad, cell in ((1, "price"), (2, None), (16, None), (20, "price"), (35, None)):
        values = ["i1", "1", "dear", "", "1"]
        as_json = json.dumps({**dict(zip(rows().columns, values)), "user": 1, "label": 1, "price": 1e39})
        lines[bad] = "i1,1" if form == "csv" else "{"
        if cell is not None:
            lines[bad] = ",".join(values) if form == "csv" else as_json
    header = ",".join(rows().columns) + "\n" if form == "csv" else ""
    files = []
    for name, start in (("a", 0), ("b", 12), ("c", 24), ("all", 0)):
        path = tmp_path / f"{name}.{form}"
        path.write_text(header + "".join(f"{line}\n" for line in lines[start : 36 if name == "all" else start + 12]))
        files.append(path)
    *several, whole = files
    expected, counts = model.predict(whole, on_bad_row="skip")
    assert counts["skipped_rows"] == [2, 3, 17, 21, 36]
    found, said = model.predict(several, on_bad_row="skip")
    assert said == counts
    np.testing.assert_allclose(found["label"], expected["label"], rtol=0, atol=1e-6)
    assert sum(said["skipped"].values()) == 5
    model.predict_to(several, tmp_path / "out.csv", keep=["item"], on_bad_row="skip")
    kept = pl.read_csv(tmp_path / "out.csv")["item"].to_list()
    assert kept == [item for row, item in enumerate(rows(36)["item"]) if row + 1 not in counts["skipped_rows"]]
    for order in ([several[1], several[0]], [several[2], several[1]]):
        with pytest.raises(DataError, match=re.escape(f"{order[0]}: row ")):
            model.predict(order)


class Fixed(nn.Module):
    """NaN for a price of 9 after its transform."""

    def __init__(self, price: float) -> None:
        super().__init__()
        self.price = price

    def forward(self, batch: Any) -> torch.Tensor:
        return torch.where((batch.dense - self.price).abs() < 1e-4, math.nan, batch.dense)[:, :1]


def test_a_score_that_is_none_names_the_file(tmp_path: Path, model: ctr.Predictor) -> None:
    columns, _ = model.encoder.transform(rows())
    broken = ctr.Predictor(Fixed(float(columns.floats[42, 0])), model.schema, model.folder)
    files = parts(tmp_path, ["a.csv", "b.csv", "c.csv"])  # of 20 rows
    with pytest.raises(DataError, match=r"c.csv: row 3 \(line 4 of the file\): the model gives \[nan\]"):
        broken.predict(files)


def test_a_column_is_judged_over_all_files(tmp_path: Path, model: ctr.Predictor) -> None:
    files = [
        file(tmp_path, f"{i}.csv", rows().with_columns(item=pl.format(f"x{i}{{}}", pl.int_range(pl.len()) % 5)))
        for i in range(3)
    ]
    _, counts = model.predict(files)
    assert re.match(r".*0.csv and 2 more: column 'item' holds \d+ values and train knew none", counts["remarks"][0])
    assert model.predict([*files, file(tmp_path, "known.csv", rows())])[1]["remarks"] == []


def test_a_kept_column_has_one_type(tmp_path: Path, model: ctr.Predictor) -> None:
    files = []
    for name, shop in (("a", 1), ("b", "s1")):
        files.append(file(tmp_path, f"{name}.jsonl", rows().with_columns(shop=pl.lit(shop))))
    message = r"b.jsonl: column 'shop' to keep has type .*string, and int64 in the rows before: give it one type"
    with pytest.raises(SchemaError, match=message):
        model.predict_to(files, tmp_path / "out.parquet", keep=["shop"])
    assert not (tmp_path / "out.parquet").exists()
    model.predict_to(files, tmp_path / "out.csv", keep=["shop"])
    assert pl.read_csv(tmp_path / "out.csv")["shop"].to_list() == ["1"] * N + ["s1"] * N


def test_several_files_from_the_command_line(
    tmp_path: Path, model: ctr.Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(path) for path in parts(tmp_path, ["a.csv", "b.csv", "c.tsv"])]
    where, out = str(model.folder), str(tmp_path / "out.parquet")
    expected = model.predict(rows())[0]["label"]
    for arguments in ([where, *files, "--out", out], [where, "--keep", "item", "--out", out, "--overwrite", *files]):
        assert cli.main(["predict", *arguments]) == 0
        np.testing.assert_allclose(pl.read_parquet(out)["label"], expected, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert cli.main(["evaluate", where, *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == N
    assert cli.main(["evaluate", where, *files]) == 0
    assert "a.csv and 2 more, rows" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["evaluate", where, *files, "--split", "test"]) == 1
    assert "a.csv and 2 more are files, only prepared folders have splits" in capsys.readouterr().err
    assert cli.main(["predict", where, *files, "--out", files[1], "--overwrite"]) == 1
    assert "b.csv, which is read: nothing is written over" in capsys.readouterr().err
    assert cli.main(["predict", where, files[0], str(tmp_path / "nowhere.csv"), "--out", out, "--overwrite"]) == 1
    assert "nowhere.csv does not exist" in capsys.readouterr().err
    assert cli.main(["predict", where, "--out", out, "--overwrite"]) == 2
    assert "DATA must be given" in capsys.readouterr().err
