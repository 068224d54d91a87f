"""A saved model and raw rows that are not quite what it was trained on: said, counted or refused, never swallowed."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.data.scan import DataError
from ctrlib.manifest import write_manifest
from ctrlib.schema import Categorical, Numeric, SchemaError, Sequence
from ctrlib.search.floors import rounded_rows
from ctrlib.search.plan import materialise

CONFIG: dict[str, Any] = {"model": "fm", "embedding_dim": 4}


def rows(number: int = 60) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "item": [f"i{i % 12}" for i in range(number)],
            "member": [i % 3 == 0 for i in range(number)],
            "shop": [i % 20 for i in range(number)],
            "price": [float(i % 7) for i in range(number)],
            "history": ["" if i % 4 == 0 else "i1|i2" for i in range(number)],
            "label": [i % 2 for i in range(number)],
        }
    )


FEATURES = [
    Categorical("item"), Categorical("member"), Categorical("shop"), Numeric("price", "minmax"),
    Sequence("history", vocabulary="item"),
]  # fmt: skip


def model_of(data: Any, folder: Path, **options: Any) -> ctr.Predictor:
    """A model folder with fresh weights; how good it is does not matter here."""
    options = {"features": FEATURES, "log": None, **options}
    schema = ctr.prepare({"train": data}, folder / "p", **options)
    ctr.save_model(models.build(CONFIG, schema), CONFIG, folder / "p", folder / "m")
    return ctr.Predictor.load(folder / "m")


@pytest.fixture
def predictor(tmp_path: Path) -> ctr.Predictor:
    return model_of(rows(), tmp_path)


def test_reading_a_model_draws_no_random_number(predictor, tmp_path):
    scores = predictor.predict(rows())[0]
    before = torch.get_rng_state()
    again = ctr.Predictor.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)
    assert again.predict(rows())[0].equals(scores)


def csv_of(path: Path, frame: pl.DataFrame, **options: Any) -> Path:
    frame.write_csv(path, **options)
    return path


def test_evaluation_counts_as_prediction_does(predictor, tmp_path, capsys):
    odd = rows().with_columns(surplus=pl.lit(1), item=pl.Series(["new", None, *rows()["item"][2:]]))
    scores, counts = predictor.predict(odd)
    assert counts["unseen"] == {"item": 1, "member": 0, "shop": 0, "history": 0}
    assert counts["missing"] == {"item": 1, "member": 0, "shop": 0, "history": 0}
    assert counts["empty"] == {"history": 15}
    assert counts["ignored"] == ["surplus"]
    assert counts["rows"] == len(scores) == 60
    metrics = predictor.evaluate(odd)
    assert {key: metrics[key] for key in counts} == counts
    path = csv_of(tmp_path / "odd.csv", odd)
    assert cli.main(["evaluate", str(tmp_path / "m"), str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    shown = ("unseen", "missing", "empty", "ignored")
    assert {key: printed[key] for key in shown} == {key: counts[key] for key in shown}
    assert cli.main(["evaluate", str(tmp_path / "m"), str(path)]) == 0
    printed = capsys.readouterr().out
    assert "item: 1 unseen and 1 missing ids" in printed
    assert "ignored: surplus" in printed


def test_a_column_without_one_known_value_is_remarked_on_or_refused(predictor, tmp_path, capsys):
    # A batch of new items is normal, so it scores; but a person should look at it.
    shifted = rows().with_columns(item=pl.Series([f"x{i % 12}" for i in range(60)]))
    scores, counts = predictor.predict(shifted)
    assert scores["label"].is_between(0, 1).all()
    assert counts["unseen"]["item"] == 60
    assert re.search(r"'item' holds 60 values and train knew none.*'x0'.*such as \['i1'", counts["remarks"][0])
    assert predictor.evaluate(shifted)["remarks"] == counts["remarks"]
    path = csv_of(tmp_path / "shifted.csv", shifted)
    assert cli.main(["predict", str(tmp_path / "m"), str(path), "--out", str(tmp_path / "s.csv")]) == 0
    assert "train knew none" in capsys.readouterr().err
    assert predictor.predict(rows())[1]["remarks"] == []
    # Text where train has integers is no new item.
    retyped = csv_of(tmp_path / "b.csv", rows().with_columns(shop=pl.Series([f"s{i}" for i in range(60)])))
    with pytest.raises(SchemaError, match=r"b.csv: column 'shop' .*'s0'"):
        predictor.predict(retyped)
    flags = csv_of(tmp_path / "a.csv", rows().with_columns(member=pl.Series(["True", "False"] * 30)))
    with pytest.raises(SchemaError, match=r"a.csv: column 'member' .*'True'.*'false'"):
        predictor.predict(flags)
    # Few rows, or one new user with many, are no evidence.
    predictor.predict(shifted.head(9))
    _, counts = predictor.predict(rows().with_columns(item=pl.lit("new")))
    assert counts["unseen"]["item"] == 60


def test_a_column_of_another_type_is_refused(predictor, tmp_path):
    for retyped, kind in ((pl.col("member").cast(pl.Int8), "integer"), (pl.col("member").cast(pl.String), "text")):
        with pytest.raises(SchemaError, match=f"'member' holds values of kind {kind} .*were of kind boolean: cast"):
            predictor.predict(rows().with_columns(retyped))
    with pytest.raises(SchemaError, match=r"'shop' holds values of kind text .*integer"):
        predictor.predict(rows().with_columns(pl.col("shop").cast(pl.String)))
    expected = predictor.predict(rows())[0]
    assert predictor.predict(rows().with_columns(pl.col("shop").cast(pl.Float64)))[0].equals(expected)
    assert predictor.predict(csv_of(tmp_path / "a.csv", rows()))[0].equals(expected)
    # pandas makes floats of a column that has no value at all
    _, counts = predictor.predict(rows().with_columns(item=pl.lit(float("nan"))))
    assert counts["missing"]["item"] == 60
    parsed = model_of(tmp_path / "a.csv", tmp_path / "q")
    assert parsed.schema.raw_format["types"]["shop"] == "parsed"
    parsed.predict(rows())


def test_files_of_two_models_are_refused(predictor, tmp_path):
    other = model_of(rows().with_columns(price=pl.col("price") * 2), tmp_path / "other")
    shutil.copy(other.folder / "schema.json", predictor.folder / "schema.json")
    with pytest.raises(SchemaError, match=r"schema.json is damaged: .*: copy the folder again"):
        ctr.Predictor.load(predictor.folder)
    write_manifest(predictor.folder)  # whoever says that it is right so
    with pytest.raises(SchemaError, match=r"model.safetensors was trained with a schema of hash .*different models"):
        ctr.Predictor.load(predictor.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'does not name a "model"'),
        ('{"embedding_dim": 4}', 'does not name a "model"'),
        ('{"model": "dcnv9"}', "describes no model .*dcnv9"),
        ('{"model": "fm", "colour": 1}', "describes no model .*colour"),
        ('{"model": "fm", "embedding_dim": "4"}', "describes no model"),
        ('{"model": ["fm"]}', "describes no model"),
        ('{"model": "fm", "replaced": [1]}', "describes no model"),
        ('{"model": "fm", "tables": "abc"}', "describes no model"),
        ('{"model": "mlp", "hidden": [4, 1000000000000]}', "describes no model .*its sizes take more memory"),
    ],
)
def test_a_damaged_description_is_named(predictor, content, message):
    (predictor.folder / "model.json").write_text(content)
    write_manifest(predictor.folder)
    with pytest.raises(SchemaError, match=rf"model.json {message}"):
        ctr.Predictor.load(predictor.folder)


def test_missing_labels_are_masked_as_in_preparation(tmp_path):
    holes = rows().with_columns(label=pl.Series([None, *rows()["label"][1:]]))
    predictor = model_of(holes, tmp_path, missing_labels="mask")
    assert predictor.evaluate(holes)["rows"] == 59
    with pytest.raises(DataError, match="label"):
        model_of(rows(), tmp_path / "strict").evaluate(holes)


def test_bad_rows_can_be_skipped(predictor, tmp_path, capsys):
    lines = csv_of(tmp_path / "good.csv", rows()).read_text().splitlines()
    lines[3] = "one,cell,too,few"
    lines[10] = ""
    lines[20] = lines[20].replace(lines[20].split(",")[3], "dear")
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"row 3 .*on-bad-row skip"):
        predictor.predict(path)
    with pytest.raises(ValueError, match="on_bad_row is 'ignore'"):
        predictor.predict(path, on_bad_row="ignore")
    scores, counts = predictor.predict(path, on_bad_row="skip")
    assert counts["skipped"] == {"too few cells": 1, "blank line": 1, "price: not a finite number": 1}
    assert counts["skipped_rows"] == [3, 10, 20]
    assert counts["rows"] == len(scores) == 57
    good, _ = predictor.predict(rows())
    assert scores.equals(good[[i for i in range(60) if i + 1 not in (3, 10, 20)]])
    assert predictor.evaluate(path, on_bad_row="skip")["skipped_rows"] == [3, 10, 20]
    arguments = [str(tmp_path / "m"), str(path), "--on-bad-row", "skip"]
    assert cli.main(["predict", *arguments, "--out", str(tmp_path / "s.csv")]) == 0
    printed = capsys.readouterr().out
    assert "57 rows scored" in printed
    assert "3 bad rows were left out" in printed
    assert "rows 3, 10, 20" in printed
    assert cli.main(["evaluate", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == counts["skipped"]


def test_files_without_header_may_lack_the_labels(tmp_path):
    names = rows().columns
    frame = rows().with_columns(weight=pl.lit(1), group=pl.lit(1))
    frame = frame.select("label", "weight", "group", *names[:-1])
    path = csv_of(tmp_path / "train.csv", frame, include_header=False)
    predictor = model_of(path, tmp_path, columns=frame.columns, weight="weight", group="group")
    expected, _ = predictor.predict(path)
    for absent in (["label"], ["label", "weight", "group"]):
        less = csv_of(tmp_path / "less.csv", frame.drop(absent), include_header=False)
        assert predictor.predict(less)[0].equals(expected)
    with pytest.raises(DataError, match="has 7 cells"):
        predictor.evaluate(csv_of(tmp_path / "less.csv", frame.drop("label"), include_header=False))
    with pytest.raises(DataError, match="has 6 cells"):
        predictor.predict(csv_of(tmp_path / "less.csv", frame.drop("label", "price"), include_header=False))


def test_brackets_in_paths(tmp_path):
    folder = tmp_path / "d[1]*"
    folder.mkdir()
    frame = rows()
    frame.write_parquet(folder / "raw[1].parquet")
    csv_of(folder / "raw[1].csv", frame)
    for name in ("raw[1].parquet", "raw[1].csv"):
        predictor = model_of(folder / name, folder / f"[{name}]")
        found = predictor.predict(folder / name)[0]
        assert found.height == 60
        assert predictor.evaluate_prepared(folder / f"[{name}]" / "p", "train")["rows"] == 60
    (folder / "many").mkdir()
    frame.write_parquet(folder / "many" / "part[0].parquet")
    assert model_of(folder / "many", folder / "q").predict(folder / "many")[0].height == 60


def test_errors_name_the_file_of_the_user(predictor, tmp_path):
    path = tmp_path / "none.parquet"
    with pytest.raises(DataError, match="data has no rows"):
        predictor.predict(rows().head(0))
    rows().head(0).write_parquet(path)
    with pytest.raises(DataError, match=r"none.parquet has no rows"):
        predictor.predict(path)
    frame = rows().with_columns(price=pl.Series([1e-30 * (i % 7) for i in range(60)]))
    small = model_of(frame, tmp_path / "small")
    rows().with_columns(pl.col("price") * 1e20).write_parquet(path)
    with pytest.raises(DataError, match=r"none.parquet: row 2, column 'price' holds 1e\+20; expected .*'minmax'"):
        small.predict(path)
    assert small.predict(path, on_bad_row="skip")[1]["skipped"] == {"price: too large after its transform": 60 - 9}


class Fixed(nn.Module):
    """Gives the same logits to every batch of as many rows."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)[:, None]

    def forward(self, batch: Any) -> torch.Tensor:
        return self.logits[: len(batch.dense)]


def test_logits_of_any_size_are_probabilities(predictor):
    fixed = ctr.Predictor(Fixed([-1e4, -710.0, -1.0, 0.0, 710.0, 3e38]), predictor.schema, predictor.folder)
    scores, _ = fixed.predict(rows(6))
    assert scores["label"].to_list() == [0.0, pytest.approx(0, abs=1e-300), pytest.approx(0.2689414), 0.5, 1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_none_names_file_and_row(predictor, tmp_path, bad):
    broken = ctr.Predictor(Fixed([0.0, bad, 0.0]), predictor.schema, predictor.folder)
    with pytest.raises(DataError, match=r"^data: row 2: the model gives \["):
        broken.predict(rows(3))
    lines = csv_of(tmp_path / "r.csv", rows(4)).read_text().splitlines()
    lines[1] = lines[1].replace(",0.0,", ",dear,")  # left out, so that row 3 is the second that is scored
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"^\S+r.csv: row 3 \(line 4 of the file\): the model gives .*'price'"):
        broken.predict(tmp_path / "r.csv", on_bad_row="skip")


def test_when_all_rows_are_left_out(predictor, tmp_path):
    bad = rows(2).with_columns(price=pl.lit("dear"))
    one = csv_of(tmp_path / "one.csv", bad.head(1))
    scores, counts = predictor.predict(one, on_bad_row="skip")
    assert scores.schema == {"label": pl.Float64}
    assert (len(scores), counts["rows"], counts["skipped_rows"]) == (0, 0, [1])
    assert predictor.predict_to(one, tmp_path / "s.csv", keep=["item"], on_bad_row="skip") == counts
    assert (tmp_path / "s.csv").read_text() == "item,label\n"
    with pytest.raises(SchemaError, match=r"two.csv: row 1 .*column 'price' holds 'dear', and no other row is better"):
        predictor.predict(csv_of(tmp_path / "two.csv", bad), on_bad_row="skip")


@pytest.mark.parametrize("name", ["din", "wide_deep", "wide_deep in 8 bits"])
def test_rank_is_predict_sorted(tmp_path: Path, name: str) -> None:
    """One user, many candidates: every feature on either side, histories and numbers too."""
    random = np.random.default_rng(0)
    rows = 300
    items = [f"i{n}" for n in range(20)]
    frame = pl.DataFrame(
        {
            "click": random.integers(0, 2, rows),
            "user": random.integers(0, 30, rows),
            "item": random.choice(items, rows),
            "history": ["|".join(random.choice(items, random.integers(0, 5))) for _ in range(rows)],
            "tags": ["|".join(random.choice(["a", "b", "c"], random.integers(1, 3))) for _ in range(rows)],
            "price": random.random(rows),
            "age": random.integers(10, 60, rows),
        }
    )
    features = [ctr.Sequence("history", vocabulary="item"), ctr.MultiValued("tags")]
    ctr.prepare(frame, tmp_path / "data", features=features, labels="click", group="user", log=None)
    config = {"model": name.split()[0], "embedding_dim": 4, "hidden": [8]}
    torch.manual_seed(0)
    model = ctr.models.build(config, ctr.Schema.load(tmp_path / "data"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    ctr.save_model(model, config, tmp_path / "data", tmp_path / "model")
    predictor = ctr.Predictor.load(tmp_path / "model")
    if name.endswith("bits"):
        smaller = materialise(predictor.model, rounded_rows(predictor.model, 8))
        predictor = ctr.Predictor(smaller.eval(), predictor.schema, predictor.folder)
    context = {"user": 7, "age": 33, "history": "i1|i2|unheard", "page": "front"}
    candidates = frame.select("item", "tags", "price").head(50).with_columns(note=pl.lit("x"))
    shared = pl.DataFrame({name: [cell] * 50 for name, cell in context.items()})
    expected = predictor.predict(candidates.hstack(shared))[0]["click"].to_numpy()
    found = predictor.rank(context, candidates)
    np.testing.assert_allclose(found["click"], expected[found["row"].to_numpy()], rtol=0, atol=1e-6)
    assert (np.diff(found["click"].to_numpy()) <= 0).all() and sorted(found["row"]) == list(range(50))
    assert predictor.rank(context, candidates, 5).equals(found.head(5))
    assert predictor.rank(context, candidates.to_dicts(), 5).equals(found.head(5))
    # Encoded once, and named by their keys; in a file, too.
    keyed = candidates.with_columns(key=pl.int_range(50) * 3)
    keyed.write_csv(tmp_path / "items.csv")
    for given in (keyed, keyed.to_arrow(), tmp_path / "items.csv"):
        known = predictor.items(given, "key")
        assert len(known) == 50 and len(known[[9, "0"]]) == 2
        assert predictor.rank(context, known, 5).equals(found.head(5))
        some = predictor.rank(context, known[[30, "3", 3]])
        assert some.equals(predictor.rank(context, candidates[[10, 1, 1]]))
    with pytest.raises(DataError, match="no item of key '1' among the 50"):
        known[[0, 1]]
    with pytest.raises(ctr.SchemaError, match=r"columns \['price'\] are in the context and in the items"):
        predictor.rank({**context, "price": 1.0}, known)
    for wrong_items, key, message in (
        (keyed, "sku", "there is no column 'sku' to name them by"),
        (keyed.select("key"), "key", "none of the columns that the model reads is there"),
        (keyed.with_columns(key=pl.lit(1)), "key", "'1' of column 'key' is there more than once"),
        (keyed.with_columns(key=pl.when(pl.col("key") > 0).then("key")), "key", "column 'key' is empty in row 1"),
    ):
        with pytest.raises((ctr.SchemaError, DataError), match=message):
            predictor.items(wrong_items, key)
    # The same candidate twice: the first comes first.
    twice = pl.concat([candidates.head(1), candidates.head(1)])
    assert predictor.rank(context, twice)["row"].to_list() == [0, 1]
    # All features on one side.
    whole = predictor.rank({}, candidates.hstack(shared), 3)
    np.testing.assert_allclose(whole["click"], found["click"].head(3), rtol=0, atol=1e-6)
    for wrong, there, message in (
        ({**context, "price": 1.0}, candidates, r"columns \['price'\] are in the context and in the items"),
        ({"user": 7}, candidates, r"columns \['history', 'age'\] are neither|columns \['age', 'history'\] are neither"),
        (context, candidates.head(0), "items has no rows"),
    ):
        with pytest.raises((ctr.SchemaError, ctr.DataError), match=message):
            predictor.rank(wrong, there)
    with pytest.raises(ctr.errors.ArgumentError, match="by='buy' is no label"):
        predictor.rank(context, candidates, by="buy")
    with pytest.raises(ctr.errors.ArgumentError, match="k=0"):
        predictor.rank(context, candidates, 0)
