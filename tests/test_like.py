"""Newer data that keeps to an earlier preparation, with new values after the old ones or not; models go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ctrlib as ctr
from ctrlib import cli, models
from ctrlib.data.fingerprint import fingerprint
from ctrlib.embeddings.din import read_counts
from ctrlib.manifest import write_manifest
from ctrlib.search.compression import Head
from ctrlib.search.dnis import search as search_blocks
from ctrlib.search.floors import frequency_cut
from ctrlib.serving.model_folder import save_model
from ctrlib.serving.predictor import Predictor

FEATURES = [
    ctr.Categorical("item", min_count=2),
    ctr.Sequence("history", vocabulary="item", min_count=2),
    ctr.MultiValued("tags"),
    ctr.Numeric("price"),
    ctr.Numeric("age", "log"),
]
OPTIONS: dict[str, Any] = {"features": FEATURES, "labels": "click", "weight": "w", "group": "user", "ignore": "user"}


def day(number: int, num_rows: int = 120) -> pl.DataFrame:
    """Rows of a day: every day has items and tags of its own beside old ones, and other numbers."""
    rng = np.random.default_rng(number)
    items = np.array([f"i{item}" for item in (8 * number + rng.geometric(0.15, 4 * num_rows))]).reshape(num_rows, 4)
    return pl.DataFrame(
        {
            "user": [f"u{user}" for user in rng.integers(0, 9, num_rows)],
            "item": [None if row % 17 == 0 else item for row, item in enumerate(items[:, 0])],
            "history": ["|".join(row[1 : 1 + row_number % 4]) for row_number, row in enumerate(items)],
            "tags": [f"t{number + a}|t{number + b}" for a, b in rng.integers(0, 3, (num_rows, 2))],
            "price": rng.lognormal(number, 1, num_rows) * (rng.random(num_rows) < 0.5),
            "age": [None if row % 5 == 0 else float(age) for row, age in enumerate(rng.integers(1, 90, num_rows))],
            "w": rng.integers(1, 3, num_rows).astype(float),
            "click": rng.integers(0, 2, num_rows),
        }
    )


def splits(number: int) -> dict[str, pl.DataFrame]:
    rows = day(number)
    return {"train": rows[:80], "valid": rows[80:100], "test": rows[100:]}


def prepared(number: int, folder: Path, **options: Any) -> Path:
    ctr.prepare(splits(number), folder, log=None, **(options or OPTIONS))
    return folder


@pytest.fixture(scope="module")
def monday(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(0, tmp_path_factory.mktemp("like") / "monday")


def vocabulary(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(folder / "vocab" / f"{name}.parquet")


def counted(column: pl.Series) -> dict[str, int]:
    return dict(column.drop_nulls().value_counts().rows())


# What is kept.


def test_everything_is_kept_but_the_counts(monday: Path, tmp_path: Path) -> None:
    tuesday = prepared(1, tmp_path / "tuesday", like=monday)
    old, new = ctr.Schema.load(monday), ctr.Schema.load(tuesday)
    assert new == old
    assert new.hash == old.hash
    rows = splits(1)["train"]
    events = pl.concat([rows["item"], rows["history"].str.split("|").explode()]).replace("", None)
    counts = {"item": counted(events), "tags": counted(rows["tags"].str.split("|").explode())}
    for name, come in counts.items():
        before, after = vocabulary(monday, name), vocabulary(tuesday, name)
        assert after.select("value", "id").equals(before.select("value", "id"))
        assert after["count"].to_list() == [come.get(value, 0) for value in before["value"]]
        assert after["count"].to_list().count(0) > 0
        assert after.schema == before.schema
    ids = dict(vocabulary(monday, "item").select("value", "id").rows())
    encoded = pl.read_parquet(tuesday / "train")
    assert encoded["item"].to_list() == [1 if item is None else ids.get(item, 2) for item in rows["item"]]
    assert (encoded["item"] == 2).sum() > 5
    columns, _ = ctr.Encoder.load(monday).transform(rows)
    assert encoded["price"].to_list() == columns.floats[:, 0].tolist()
    assert encoded["age"].to_list() == columns.floats[:, 1].tolist()
    assert ctr.quantile_edges(tuesday, 16) == ctr.quantile_edges(monday, 16)
    assert {part for part, digits in fingerprint(monday).items() if fingerprint(tuesday)[part] == digits} >= {
        "schema",
        "numbers/price",
        "numbers/age",
    }
    report = json.loads((tuesday / "report.json").read_text())
    assert (report["like"], report["new_values"]) == (str(monday), {})
    assert report["features"]["item"]["reason"] == f"as in {monday}"
    assert report["left_out"] == {"user": "ignored: as told"}


def test_the_same_data_again_is_the_same_folder(monday: Path, tmp_path: Path) -> None:
    for name, extend in (("kept", False), ("extended", True)):
        prepared(0, tmp_path / name, like=monday, extend=extend)
        assert fingerprint(tmp_path / name) == fingerprint(monday)


def test_new_values_follow_the_old_ones(monday: Path, tmp_path: Path) -> None:
    tuesday = prepared(1, tmp_path / "tuesday", like=monday, extend=True)
    rows = splits(1)["train"]
    come = counted(pl.concat([rows["item"], rows["history"].str.split("|").explode()]).replace("", None))
    before, after = vocabulary(monday, "item"), vocabulary(tuesday, "item")
    known = set(before["value"])
    assert after["value"][: len(before)].to_list() == before["value"].to_list()
    new = sorted((-count, value) for value, count in come.items() if value not in known and count >= 2)
    assert after.rows()[len(before) :] == [
        (value, len(before) + 3 + place, -count) for place, (count, value) in enumerate(new)
    ]
    assert len(new) > 2
    assert any(count == 1 for value, count in come.items() if value not in known)  # too rare to be new
    assert after["id"].to_list() == list(range(3, len(after) + 3))
    schema = ctr.Schema.load(tuesday)
    assert schema["item"].num_embeddings == schema["history"].num_embeddings == len(after) + 3
    assert schema.dense == ctr.Schema.load(monday).dense
    report = json.loads((tuesday / "report.json").read_text())
    assert report["new_values"] == {"item": len(new), "tags": 1}
    encoder = ctr.Encoder.load(tuesday)
    assert encoder.transform([rows.row(1, named=True)])[0].ids.tolist() == [
        [pl.read_parquet(tuesday / "train")["item"][1]]
    ]
    wednesday = prepared(2, tmp_path / "wednesday", like=tuesday, extend=True)
    assert vocabulary(wednesday, "item")["value"][: len(after)].to_list() == after["value"].to_list()


def test_a_full_vocabulary_does_not_grow(tmp_path: Path) -> None:
    old = pl.DataFrame({"item": ["a", "b", "b"], "click": [0, 1, 1]})
    new = pl.DataFrame({"item": ["c", "c", "d", "e", "a"], "click": [0, 1, 1, 0, 1]})
    for limit, values, left_out in ((2, ["b", "a"], 3), (3, ["b", "a", "c"], 2), (5, ["b", "a", "c", "d", "e"], 0)):
        features = [ctr.Categorical("item", max_values=limit)]
        ctr.prepare({"train": old}, tmp_path / f"old{limit}", features=features, labels="click", log=None)
        said: list[Any] = []
        ctr.prepare(
            {"train": new}, tmp_path / f"new{limit}", like=tmp_path / f"old{limit}", extend=True, log=said.append
        )
        assert vocabulary(tmp_path / f"new{limit}", "item")["value"].to_list() == values
        lines = [line for line in said if isinstance(line, str)]
        remark = f"remark: vocabulary 'item' is full with max_values={limit}: {left_out} new values share"
        assert any(line.startswith(remark) for line in lines) == (left_out > 0)
        assert f"new values: item {len(values) - 2}" in lines


def test_a_model_folder_will_do(monday: Path, tmp_path: Path) -> None:
    config, model = trained(monday, numeric="piecewise_linear")
    save_model(model, config, monday, tmp_path / "model")
    for extend in (False, True):
        like_model = prepared(1, tmp_path / f"a{extend}", like=tmp_path / "model", extend=extend)
        assert fingerprint(like_model) == fingerprint(prepared(1, tmp_path / f"b{extend}", like=monday, extend=extend))
    shutil.rmtree(tmp_path / "model" / "numbers")
    with pytest.raises(ctr.SchemaError, match=r"numbers/.*.parquet is missing"):
        prepared(1, tmp_path / "c", like=tmp_path / "model")
    write_manifest(tmp_path / "model")  # as if it never had had them
    with pytest.raises(ctr.SchemaError, match=r"model has no folder `numbers`.*older ctrlib.*the prepared folder"):
        prepared(1, tmp_path / "c", like=tmp_path / "model")
    shutil.copytree(monday, tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "numbers")
    write_manifest(tmp_path / "old")
    older = prepared(1, tmp_path / "d", like=tmp_path / "old")
    assert ctr.quantile_edges(older) == ctr.quantile_edges(monday)
    save_model(model, config, tmp_path / "old", tmp_path / "model")
    assert not (tmp_path / "model" / "numbers").exists()


def test_values_stay_where_none_or_all_are_new(tmp_path: Path) -> None:
    old = pl.DataFrame({"item": [None, None], "click": [0, 1]}, schema_overrides={"item": pl.String})
    new = pl.DataFrame({"item": ["b", "a", "b"], "click": [0, 1, 1]})
    features = [ctr.Categorical("item")]
    ctr.prepare({"train": old}, tmp_path / "old", features=features, labels="click", log=None)
    ctr.prepare({"train": new}, tmp_path / "new", like=tmp_path / "old", extend=True, log=None)
    assert vocabulary(tmp_path / "new", "item").rows() == [("b", 3, 2), ("a", 4, 1)]
    ctr.prepare({"train": old}, tmp_path / "back", like=tmp_path / "new", extend=True, log=None)
    assert vocabulary(tmp_path / "back", "item").rows() == [("b", 3, 0), ("a", 4, 0)]
    assert pl.read_parquet(tmp_path / "back" / "train")["item"].to_list() == [1, 1]


def test_how_files_are_read_is_kept(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("item;tags;y\na;x|y;yes\n?;x;no\nb;?;\nb;y;yes\n")
    (tmp_path / "new.csv").write_text("item;tags;y\n?;x;no\nb;y;yes\n;?;\n")
    how: dict[str, Any] = {"missing_values": ["?"], "missing_labels": "mask", "label_positive": {"y": "yes"}}
    features = [ctr.Categorical("item"), ctr.MultiValued("tags")]
    ctr.prepare({"train": tmp_path / "old.csv"}, tmp_path / "old", features=features, labels="y", log=None,
                separator=";", **how)  # fmt: skip
    ctr.prepare({"train": tmp_path / "new.csv"}, tmp_path / "new", like=tmp_path / "old", log=None)
    assert ctr.Schema.load(tmp_path / "new").raw_format == ctr.Schema.load(tmp_path / "old").raw_format
    found = pl.read_parquet(tmp_path / "new" / "train")
    ids = dict(vocabulary(tmp_path / "old", "item").select("value", "id").rows())
    assert found["item"].to_list() == [1, ids["b"], 1]
    assert found["y"].fill_nan(None).to_list() == [0, 1, None]
    (tmp_path / "tabs.tsv").write_text((tmp_path / "new.csv").read_text().replace(";", "\t"))
    ctr.prepare({"train": tmp_path / "tabs.tsv"}, tmp_path / "tabs", like=tmp_path / "old", log=None, separator="\t",
                labels=["y"], **how)  # fmt: skip
    assert fingerprint(tmp_path / "tabs")["train"] == fingerprint(tmp_path / "new")["train"]
    for name, other in (("missing_values", ["-"]), ("missing_labels", "raise"), ("label_positive", {"y": "no"})):
        with pytest.raises(ctr.SchemaError, match=rf"^{name} is .*, in .*old it is "):
            ctr.prepare(
                {"train": tmp_path / "new.csv"}, tmp_path / "x", like=tmp_path / "old", log=None, **{name: other}
            )


# What does not agree.


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"labels": "buy"}, r"labels is \('buy',\), in .*monday it is \('click',\)"),
        ({"weight": "age"}, r"weight is 'age', in .*monday it is 'w'"),
        ({"group": "item"}, r"group is 'item', in .*monday it is 'user'"),
        ({"missing_values": ["", "?"]}, r"missing_values is \['', '\?'\], in .*monday it is \[''\]"),
        ({"missing_labels": "mask"}, "missing_labels is 'mask', in .*monday it is 'raise'"),
        ({"label_positive": {"click": "1"}}, r"label_positive is \{'click': '1'\}, in .*monday it is None"),
        ({"features": [ctr.Categorical("item")]}, "min_count of feature 'item' is 1, in .*monday it is 2"),
        ({"features": [ctr.Numeric("age")]}, "transform of feature 'age' is 'standard', in .*monday it is 'log'"),
        (
            {"features": [ctr.MultiValued("item")]},
            "kind of feature 'item' is 'multi_valued', in .* it is 'categorical'",
        ),
        (
            {"features": [ctr.Sequence("history", min_count=2)]},
            "vocabulary of feature 'history' is None, in .* it is 'item'",
        ),
        ({"features": [ctr.Categorical("user")]}, r"feature 'user' is none of .*monday, which has \['item', "),
        ({"min_count": 3}, "min_count of feature 'item' is 3, in .*monday it is 2"),
        ({"min_count": 2}, "min_count of feature 'tags' is 2, in .*monday it is 1"),
        ({"max_values": 9, "features": FEATURES[:2]}, "max_values of feature 'tags' is 9, in .*monday it is None"),
        ({"ignore": ["tags", "user"]}, r"columns \['tags'\] are named in ignore, and .*monday has them"),
        ({"ignore": "nothing"}, r"has no columns \['nothing'\]"),
    ],
)
def test_what_is_said_must_agree(monday: Path, tmp_path: Path, said: dict[str, Any], message: str) -> None:
    with pytest.raises(ctr.SchemaError, match=message):
        prepared(1, tmp_path / "tuesday", like=monday, **said)
    assert not (tmp_path / "tuesday").exists()


def test_what_agrees_may_be_said(monday: Path, tmp_path: Path) -> None:
    prepared(1, tmp_path / "a", like=monday)
    prepared(1, tmp_path / "b", like=monday, **OPTIONS, missing_values=[], missing_labels="raise")
    prepared(1, tmp_path / "c", like=monday, features=FEATURES[:2], min_count=1)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") == fingerprint(tmp_path / "c")
    with pytest.raises(ValueError, match=r"extend=True adds values to those of another folder: name it by like="):
        prepared(1, tmp_path / "d", **OPTIONS, extend=True)
    with pytest.raises(ctr.SchemaError, match=r"nowhere.* does not exist"):
        prepared(1, tmp_path / "d", like=tmp_path / "nowhere")


def test_columns_may_be_more_and_not_fewer(monday: Path, tmp_path: Path) -> None:
    more = {name: rows.with_columns(extra=pl.lit("x")) for name, rows in splits(1).items()}
    ctr.prepare(more, tmp_path / "more", like=monday, log=None)
    left_out = json.loads((tmp_path / "more" / "report.json").read_text())["left_out"]
    assert left_out["extra"] == f"ignored: {monday} does not know it"
    fewer = {name: rows.drop("price") for name, rows in splits(1).items()}
    with pytest.raises(ctr.SchemaError, match=r"has no columns \['price'\]"):
        ctr.prepare(fewer, tmp_path / "fewer", like=monday, log=None)


@pytest.mark.parametrize("extend", [False, True])
def test_train_written_otherwise_is_refused(tmp_path: Path, extend: bool) -> None:
    def one(values: Any) -> dict[str, pl.DataFrame]:
        return {"train": pl.DataFrame({"item": values, "click": [0, 1] * (len(values) // 2)})}

    features = [ctr.Categorical("item")]
    cases: list[tuple[Any, Any, str]] = [
        (["de", "us"] * 6, ["DE", "US"] * 6, "'de' for 'DE': write the column as in training"),
        (["1", "2"] * 6, ["1.0", "2.0"] * 6, "look like floats"),
        ([1, 2] * 6, [True, False] * 6, "holds values of kind boolean"),
        ([1, 2] * 6, ["x", "y"] * 6, "holds values of kind text"),
        (["1", "2"] * 6, [f"x{i}" for i in range(12)], "give the right column, written as in training"),
    ]
    for number, (old, new, message) in enumerate(cases):
        ctr.prepare(one(old), tmp_path / f"{number}", features=features, labels="click", log=None)
        with pytest.raises(ctr.SchemaError, match=message):
            ctr.prepare(one(new), tmp_path / "new", like=tmp_path / f"{number}", extend=extend, log=None)
    said: list[Any] = []
    ctr.prepare(
        one([f"u{i}" for i in range(12)]), tmp_path / "new", like=tmp_path / "0", extend=extend, log=said.append
    )
    assert any("train knew none of them" in line for line in said if isinstance(line, str))


def test_the_form_of_raw_ids_is_kept(tmp_path: Path) -> None:
    old, same, other = (
        {"train": pl.DataFrame({"user": users, "x": [1, 2], "click": [0, 1]})}
        for users in (["1", "22"], ["3", "1"], ["03", "1"])
    )
    features = [ctr.RawId("user"), ctr.Categorical("x")]
    ctr.prepare(old, tmp_path / "old", features=features, labels="click", log=None)
    ctr.prepare(same, tmp_path / "same", like=tmp_path / "old", features=features, log=None)
    assert pl.read_parquet(tmp_path / "same" / "train")["user"].to_list() == [3, 1]
    with pytest.raises(ctr.SchemaError, match=r"column 'user' holds '03' .* its raw ids have the form 'integer'"):
        ctr.prepare(other, tmp_path / "other", like=tmp_path / "old", extend=True, log=None)


def test_a_number_beyond_32_bits_in_the_old_scale_is_refused(tmp_path: Path) -> None:
    rows = pl.DataFrame({"x": [1.0, 1.0 + 1e-6], "click": [0, 1]})
    ctr.prepare({"train": rows}, tmp_path / "old", features=[ctr.Numeric("x")], labels="click", log=None)
    rows = pl.DataFrame({"x": [1.0, 1e38], "click": [0, 1]})
    with pytest.raises(
        ctr.DataError, match="row 2, column 'x' holds 1e\\+38; expected a number that fits into 32 bits"
    ):
        ctr.prepare({"train": rows}, tmp_path / "new", like=tmp_path / "old", log=None)


# A model goes on.


def trained(data: Path, steps: int = 3, **arguments: Any) -> tuple[dict[str, Any], Any]:
    """A model that has moved away from where it started, all rows and running statistics included."""
    config = {"model": "deepfm", "embedding_dim": 4, "hidden": [6], "batch_norm": True, **arguments}
    if config.get("numeric") in ("piecewise_linear", "bucketised"):
        config["edges"] = ctr.quantile_edges(data, 8)
    if config["model"] != "deepfm":
        config.pop("batch_norm")
    torch.manual_seed(1)
    model = models.build(config, ctr.Schema.load(data))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    engine = ctr.ExactEngine(model, learning_rate=0.05)
    for _, batch in zip(range(steps), ctr.Loader(data, "train", batch_size=16)):
        engine.step(batch)
    return config, model.eval()


def logits(model: Any, data: Path, split: str) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model.eval()(batch) for batch in ctr.Loader(data, split, batch_size=32)])


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "deepfm": {},
    "stacked": {"stacked": 2, "wide_columns": 4},
    "piecewise_linear": {"numeric": "piecewise_linear"},
    "bucketised": {"numeric": "bucketised"},
    "din": {"model": "din"},
}


@pytest.mark.parametrize("extend", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_scores_as_before(monday: Path, tmp_path: Path, architecture: str, extend: bool) -> None:
    config, model = trained(monday, **ARCHITECTURES[architecture])
    save_model(model, config, monday, tmp_path / "model")
    tuesday = prepared(1, tmp_path / "tuesday", like=tmp_path / "model", extend=extend)
    if "edges" in config:
        assert ctr.quantile_edges(tuesday, 8) == config["edges"]
    torch.manual_seed(2)
    new = models.build(config, ctr.Schema.load(tuesday))
    report = ctr.warm_start(new, tuesday, tmp_path / "model")
    sizes = {name: len(vocabulary(monday, name)) for name in ("item", "tags")}
    added = {name: len(vocabulary(tuesday, name)) - sizes[name] for name in sizes}
    assert {name: (one.carried, one.new, one.gone) for name, one in report.items()} == {
        name: (sizes[name], added[name], 0) for name in sizes
    }
    assert all(number > 0 for number in added.values()) == extend
    for split, rows in splits(1).items():
        raw = Predictor.load(tmp_path / "model").predict(rows)[0]["click"].to_numpy()
        now = logits(new, tuesday, split)[:, 0].double()
        np.testing.assert_allclose(torch.sigmoid(now).numpy(), raw, rtol=0, atol=1e-6)
        # The day-1 model reads the out-of-vocabulary row where the new one has a row that is its copy.
        same_ids = tuesday if not extend else prepared(1, tmp_path / f"kept {split}", like=monday)
        assert torch.equal(now, logits(model, same_ids, split)[:, 0].double())


def test_a_model_reads_newer_data_that_keeps_to_its_own(monday: Path, tmp_path: Path) -> None:
    config, model = trained(monday)
    save_model(model, config, monday, tmp_path / "model")
    predictor = Predictor.load(tmp_path / "model")
    kept = prepared(1, tmp_path / "kept", like=tmp_path / "model")
    by_split = predictor.evaluate_prepared(kept, "test")
    assert by_split["auc"] == predictor.evaluate(splits(1)["test"])["auc"]
    extended = prepared(1, tmp_path / "extended", like=tmp_path / "model", extend=True)
    with pytest.raises(ctr.SchemaError, match=r"prepared differently .* feature 'item': num_embeddings is"):
        predictor.evaluate_prepared(extended, "test")


def test_new_rows_then_go_their_own_ways(monday: Path, tmp_path: Path) -> None:
    config, model = trained(monday)
    save_model(model, config, monday, tmp_path / "model")
    tuesday = prepared(1, tmp_path / "tuesday", like=monday, extend=True)
    new = models.build(config, ctr.Schema.load(tuesday))
    ctr.warm_start(new, tuesday, tmp_path / "model")
    table = new.embedding.tables.embedding_bags["table_item"].weight
    size = len(vocabulary(monday, "item")) + 3
    assert torch.equal(table[size:], table[2].expand(len(table) - size, -1))
    engine = ctr.ExactEngine(new, learning_rate=0.05)
    for batch in ctr.Loader(tuesday, "train", batch_size=8):
        engine.step(batch)
    assert len(torch.unique(table[size:], dim=0)) == len(table) - size > 2


def test_another_scale_is_refused(monday: Path, tmp_path: Path) -> None:
    config, model = trained(monday)
    save_model(model, config, monday, tmp_path / "model")
    tuesday = prepared(1, tmp_path / "tuesday")
    with pytest.raises(
        ctr.SchemaError, match=r"parameters of 'price' is .* prepare the data with like='.*model' \(--like"
    ):
        ctr.warm_start(models.build(config, ctr.Schema.load(tuesday)), tuesday, tmp_path / "model")
    # Even if it is the fill of missing cells alone.
    features = [feature for feature in FEATURES if feature.name != "price"]
    options = {**OPTIONS, "features": features, "ignore": ["user", "price"]}
    days = [prepared(number, tmp_path / f"day {number}", **options) for number in (0, 1)]
    config, model = trained(days[0])
    save_model(model, config, days[0], tmp_path / "model")
    with pytest.raises(ctr.SchemaError, match=r"parameters of 'age' is \{'fill': "):
        ctr.warm_start(models.build(config, ctr.Schema.load(days[1])), days[1], tmp_path / "model")


@pytest.mark.parametrize(("name", "value"), [("pooling", "sum"), ("max_length", 2)])
def test_other_arguments_are_refused(monday: Path, tmp_path: Path, name: str, value: Any) -> None:
    config, model = trained(monday)
    save_model(model, config, monday, tmp_path / "model")
    features = [FEATURES[0], *(replace(feature, **{name: value}) for feature in FEATURES[1:3]), *FEATURES[3:]]
    other = prepared(0, tmp_path / "other", **{**OPTIONS, "features": features})
    with pytest.raises(ctr.SchemaError, match=f"{name} of 'history' is {value!r} in .*other, and .* prepare the data"):
        ctr.warm_start(models.build(config, ctr.Schema.load(other)), other, tmp_path / "model")


@pytest.mark.parametrize("numeric", ["piecewise_linear", "bucketised"])
def test_other_edges_are_refused(monday: Path, tmp_path: Path, numeric: str) -> None:
    config, model = trained(monday, numeric=numeric)
    save_model(model, config, monday, tmp_path / "model")
    tuesday = prepared(1, tmp_path / "tuesday", like=monday)
    moved = [[*edges[:-1], edges[-1] + 1] for edges in config["edges"]]
    for edges in (moved, ctr.quantile_edges(tuesday, 7)):
        other = models.build({**config, "edges": edges}, ctr.Schema.load(tuesday))
        with pytest.raises(ctr.SchemaError, match=r"bins of numbers \(embedding.numeric\) have other edges"):
            ctr.warm_start(other, tuesday, tmp_path / "model")


def test_other_features_are_refused(monday: Path, tmp_path: Path) -> None:
    config, model = trained(monday)
    save_model(model, config, monday, tmp_path / "model")
    for name, options, message in (
        ("order", {**OPTIONS, "features": [FEATURES[2], *FEATURES[:2], *FEATURES[3:]]}, "has the features"),
        ("label", {**OPTIONS, "labels": "buy", "ignore": ["user", "click"]}, "has the labels"),
    ):
        rows = splits(1)
        if name == "label":
            rows = {split: one.with_columns(buy=1 - pl.col("click")) for split, one in rows.items()}
        ctr.prepare(rows, tmp_path / name, log=None, **options)
        with pytest.raises(ctr.SchemaError, match=message):
            ctr.warm_start(models.build(config, ctr.Schema.load(tmp_path / name)), tmp_path / name, tmp_path / "model")


def test_tables_without_a_row_for_each_value_go_on_with_the_same_ids(monday: Path, tmp_path: Path) -> None:
    config, model = trained(monday, tables={"kind": "memcom", "num_embeddings": 7})
    save_model(model, config, monday, tmp_path / "model")
    kept = prepared(1, tmp_path / "kept", like=monday)
    new = models.build(config, ctr.Schema.load(kept))
    report = ctr.warm_start(new, kept, tmp_path / "model")
    assert (report["item"].carried, report["item"].new, report["item"].gone) == (len(vocabulary(monday, "item")), 0, 0)
    assert torch.equal(logits(new, kept, "test"), logits(model, kept, "test"))
    extended = prepared(1, tmp_path / "extended", like=monday, extend=True)
    with pytest.raises(ctr.SchemaError, match=r"no row for each value \(tables in model.json\).*do not extend it"):
        ctr.warm_start(models.build(config, ctr.Schema.load(extended)), extended, tmp_path / "model")


# What reads frequencies.


def test_what_needs_ids_in_order_of_frequency_refuses_others(monday: Path, tmp_path: Path) -> None:
    tuesday = prepared(1, tmp_path / "tuesday", like=monday, extend=True)
    _, model = trained(tuesday)
    train, valid = (ctr.Loader(tuesday, split, batch_size=16) for split in ("train", "valid"))
    message = r"needs ids in order of frequency, and in .*item.parquet they have the order of an earlier preparation"
    with pytest.raises(ctr.SchemaError, match=f"^a frequency cut {message}"):
        frequency_cut(model, train, num_bytes=1000)
    with pytest.raises(ctr.SchemaError, match=f"^a frequency cut {message}"):
        frequency_cut(model, Head(train, 10), num_bytes=1000)
    with pytest.raises(ctr.SchemaError, match=f"^DNIS {message}: prepare the data without like="):
        search_blocks(model, train, valid)
    _, model = trained(monday)
    assert frequency_cut(model, ctr.Loader(monday, "train", batch_size=16), num_bytes=1000).method == "frequency_cut"


def test_values_that_train_lacks_are_not_decayed(monday: Path, tmp_path: Path) -> None:
    tuesday = prepared(1, tmp_path / "tuesday", like=monday)
    counts = read_counts(tuesday / "vocab" / "item.parquet")
    expected = vocabulary(tuesday, "item")["count"].to_list()
    assert counts.tolist() == [torch.inf] * 3 + [count or torch.inf for count in expected]
    assert 0 in expected
    ctr.embeddings.MiniBatchAwareL2(counts)  # takes no zeros


# The command line.


def test_the_command_line_keeps_and_extends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 1):
        for split, rows in splits(number).items():
            rows.write_csv(tmp_path / f"{split}{number}.csv")

    def run(number: int, out: str, *flags: str) -> dict[str, Any]:
        files = [f"{tmp_path}/{split}{number}.csv" for split in ("train", "valid", "test")]
        arguments = [files[0], "--valid", files[1], "--test", files[2], "--out", str(tmp_path / out), "--json", *flags]
        status = cli.main(["prepare", *arguments])
        printed, said = capsys.readouterr()
        assert status == 0, said
        return dict(json.loads(printed))

    old = run(0, "old", "--label", "click", "--sequence", "history:item", "--categorical", "item", "--multi", "tags",
              "--numeric", "price", "age:log", "--min-count", "2", "--ignore", "user", "w")  # fmt: skip
    like = ("--like", str(tmp_path / "old"))
    assert run(1, "kept", *like)["hash"] == old["hash"]
    assert (
        run(1, "said", *like, "--label", "click", "--categorical", "item", "--numeric", "age:log")["hash"]
        == old["hash"]
    )
    extended = run(1, "extended", *like, "--extend", "--min-count", "2")
    assert extended["new_values"]["item"] > 2
    for flags, message in (
        (("--extend",), "--extend adds values to those of another folder: name it by --like FOLDER"),
        ((*like, "--min-count", "3"), "min_count of feature 'item' is 3, in"),
        ((*like, "--numeric", "age"), "transform of feature 'age' is 'standard', in"),
        ((*like, "--label", "w"), "labels is ('w',), in"),
        (("--like", str(tmp_path)), "schema.json does not exist"),
    ):
        arguments = [f"{tmp_path}/train1.csv", "--out", str(tmp_path / "x"), *flags]
        assert cli.main(["prepare", *arguments]) != 0
        assert message in " ".join(capsys.readouterr().err.split())
