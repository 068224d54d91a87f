"""Rows follow their values into a vocabulary in which every id has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib import models
from ctrlib.schema import OOV_ID
from ctrlib.serving.model_folder import save_model
from ctrlib.serving.warm_start import Carried
from ctrlib.testing import example_batch

FEATURES = [
    ctr.Categorical("item"),
    ctr.Sequence("history", vocabulary="item", separator="|"),
    ctr.Categorical("city"),
    ctr.Numeric("price"),
]
MONDAY = pl.DataFrame(
    {
        "item": ["a", "b", "b", "c", "a", "a"],
        "history": ["a|b", "c", "", "a", "b", "c|c"],
        "city": ["X", "Y", "X", "X", "Z", "Z"],
        "price": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "click": [0, 1, 0, 1, 1, 0],
    }
)
# "d" is new and more frequent than "a", "b" the most frequent: every id moves. "c" is gone.
TUESDAY = MONDAY.with_columns(
    item=pl.Series(["b", "b", "b", "b", "a", "d"]), history=pl.Series(["d", "d|d", "", "b", "a", "b"])
)


def prepared(frame: pl.DataFrame, folder: Path) -> Path:
    ctr.prepare({"train": frame, "valid": frame, "test": frame}, folder, features=FEATURES, labels="click", log=None)
    return folder


def config(**arguments: Any) -> dict[str, Any]:
    return {"model": "deepfm", "embedding_dim": 4, "hidden": [6], "batch_norm": True, "wide_columns": 4, **arguments}


def ids(folder: Path, vocabulary: str) -> dict[str, int]:
    frame = pl.read_parquet(folder / "vocab" / f"{vocabulary}.parquet")
    return dict(zip(frame["value"], frame["id"]))


def trained(tmp_path: Path, **arguments: Any) -> tuple[Path, ctr.Model]:
    data = prepared(MONDAY, tmp_path / "monday")
    torch.manual_seed(1)
    model = models.build(config(**arguments), ctr.Schema.load(data))
    model.train()(example_batch(ctr.Schema.load(data), 8))  # moves the running statistics
    save_model(model, config(**arguments), data, tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize("stacked", [0, True])
def test_rows_follow_their_values(tmp_path: Path, stacked: int) -> None:
    folder, old = trained(tmp_path, stacked=stacked)
    data = prepared(TUESDAY, tmp_path / "tuesday")
    schema = ctr.Schema.load(data)
    torch.manual_seed(2)
    new = models.build(config(stacked=stacked), schema)
    report = ctr.warm_start(new, data, folder)
    assert (report["item"].carried, report["item"].new, report["item"].gone) == (2, 1, 1)
    assert (report["city"].carried, report["city"].new, report["city"].gone) == (3, 0, 0)
    before, after = ids(folder, "item"), ids(data, "item")
    assert all(before[value] != after[value] for value in ("a", "b"))
    sizes = [schema["item"].num_embeddings, ctr.Schema.load(folder)["item"].num_embeddings]
    for name, tensor in new.state_dict().items():
        was = old.state_dict()[name]
        if "embedding_bags" not in name:
            assert torch.equal(tensor, was), name
            continue
        if "item" in name or "stacked_mean" in name:  # the history pools by mean, and shares the items' table
            assert torch.equal(tensor[:3], was[:3])
            assert all(torch.equal(tensor[after[value]], was[before[value]]) for value in ("a", "b"))
            assert torch.equal(tensor[after["d"]], was[OOV_ID])  # which "d" has read up to now
        else:
            assert "city" in name or "stacked_sum" in name
            cities, were = ids(data, "city"), ids(folder, "city")
            assert all(torch.equal(tensor[cities[city]], was[were[city]]) for city in "XYZ")
    assert sizes == [6, 6]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 2), (1, 2), (True, 1)])
def test_rows_follow_their_values_into_another_stack(tmp_path: Path, before: int, after: int) -> None:
    columns = ["one", "two", "three"]
    was = {"one": range(20), "two": range(6), "three": range(5)}  # two stacks: one | two, three
    now = {"one": range(15, 22), "two": range(3, 30), "three": range(4)}  # two | one, three, and every id moves
    folders = []
    for name, values in (("monday", was), ("tuesday", now)):
        frame = pl.DataFrame({c: [f"{v[row % len(v)]}" for row in range(60)] for c, v in values.items()})
        frame = frame.with_columns(click=pl.Series([0, 1] * 30))
        folders.append(tmp_path / name)
        ctr.prepare(dict.fromkeys(("train", "valid", "test"), frame), folders[-1], labels="click", log=None,
                    features=[ctr.Categorical(c) for c in columns])  # fmt: skip
    old_schema, schema = map(ctr.Schema.load, folders)
    old = models.build(config(stacked=before), old_schema)
    save_model(old, config(stacked=before), folders[0], tmp_path / "model")
    new = models.build(config(stacked=after), schema)
    if before == after == 2:
        members = [
            [table.feature_names for table in model.embedding.tables.embedding_bag_configs()] for model in (old, new)
        ]
        assert members == [[["one"], ["two", "three"]], [["two"], ["one", "three"]]]
    report = ctr.warm_start(new, folders[1], tmp_path / "model")
    for column in columns:
        both = [f"{value}" for value in was[column] if value in now[column]]
        assert report[column] == Carried(len(both), len(now[column]) - len(both), len(was[column]) - len(both))
        rows = []
        for model, folder in ((old, folders[0]), (new, folders[1])):
            chosen = torch.tensor([0, 1, 2, *(ids(folder, column)[value] for value in both)])
            sparse = KeyedJaggedTensor.from_lengths_sync(
                columns,
                torch.cat([chosen if c == column else torch.zeros_like(chosen) for c in columns]),
                torch.ones(3 * len(chosen), dtype=torch.int64),
            )
            batch = ctr.Batch(sparse, torch.zeros(len(chosen), 0), torch.zeros(len(chosen), 1), torch.ones(len(chosen)))
            rows.append((model.embedding(batch)[:, columns.index(column)], model.wide(batch)))
        assert torch.equal(rows[0][0], rows[1][0])
        assert rows[0][0].abs().sum(1).count_nonzero() == len(both) + 2  # all but the padding row
        assert torch.equal(rows[0][1], rows[1][1])


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    folder, _ = trained(tmp_path)
    data = prepared(TUESDAY, tmp_path / "tuesday")
    for other in ({"hidden": [7]}, {"embedding_dim": 8}, {"batch_norm": False}):
        with pytest.raises(ctr.SchemaError, match="does not fit"):
            ctr.warm_start(models.build(config(**other), ctr.Schema.load(data)), data, folder)
