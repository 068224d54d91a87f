"""Raw ids, end to end: as they are in the log, through preparation and loader, into an embedding that manages them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from torch import Tensor
from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy

import ctrlib as ctr
from ctrlib.data.encode import count_ids
from ctrlib.data.encoder import Encoder
from ctrlib.data.fingerprint import fingerprint
from ctrlib.data.raw import read_raw
from ctrlib.schema import Categorical, MultiValued, Numeric, RawId, Schema, SchemaError, Sequence
from ctrlib.testing import check_embedding, example_batch, example_schema

MISSING = -(2**63)
SIGNED = [12, -7, 2**53 + 1, 2**31, -(2**31) - 1, 0, 2**63 - 1, 1 - 2**63]
UNSIGNED = [12, 2**53 + 1, 2**64 - 1, 2**63 + 5, 2**31, 1, 2, 3]
TEXTS = ["alice", "zoë", "012", "12.0", "😀", "12", "a b", "-0"]


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


FRAME = pl.DataFrame(
    {
        "signed": pl.Series([*SIGNED, None], dtype=pl.Int64),
        "unsigned": pl.Series([*UNSIGNED, None], dtype=pl.UInt64),
        "small": pl.Series([-3, 0, 1, 2, 3, 4, 5, 127, None], dtype=pl.Int8),
        "text": [*TEXTS, None],
        "label": [0, 1] * 4 + [0],
    }
)
WANTED = {
    "signed": [*SIGNED, MISSING],
    "unsigned": [*map(wrapped, UNSIGNED), MISSING],
    "small": [-3, 0, 1, 2, 3, 4, 5, 127, MISSING],
    "text": [*map(hashed, TEXTS), MISSING],
}
FORMS = {"signed": "integer", "unsigned": "integer", "small": "integer", "text": "text"}
FEATURES = [RawId(name) for name in WANTED]


def written(frame: pl.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "prepared"
    ctr.prepare({"train": FRAME}, folder, features=FEATURES, log=None)
    return folder


def new_rows(frame: pl.DataFrame, folder: Path, tmp_path: Path, kind: str = "frame") -> dict[str, list[int]]:
    """As the predictor encodes them."""
    data = frame if kind == "frame" else written(frame, tmp_path / f"new.{kind}")
    raw = read_raw(data, tmp_path / f"raw_{kind}", name="new rows")
    encoder = Encoder.load(folder)
    columns, _ = encoder.transform_table(raw)
    return {feature.name: columns.ids[:, n].tolist() for n, feature in enumerate(encoder.schema.sparse)}


# --------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize("kind", ["frame", "csv", "parquet"])
def test_batches_hold_the_ids_of_the_log(tmp_path: Path, kind: str) -> None:
    data = FRAME if kind == "frame" else written(FRAME, tmp_path / f"log.{kind}")
    schema = ctr.prepare({"train": data}, tmp_path / "out", features=FEATURES, log=None)
    assert {feature.name: feature.form for feature in schema.sparse} == FORMS
    assert Schema.load(tmp_path / "out") == schema
    assert schema.is_fitted
    assert not schema.vocabularies
    assert not list((tmp_path / "out" / "vocab").iterdir())
    (batch,) = ctr.Loader(tmp_path / "out", "train", batch_size=9)
    assert {name: batch.sparse[name].values().tolist() for name in WANTED} == WANTED
    assert batch.sparse.keys() == list(WANTED)
    assert batch.sparse.lengths().tolist() == [1] * 36
    report = json.loads((tmp_path / "out" / "report.json").read_text())["features"]["text"]
    assert report == {
        "kind": "raw_id",
        "reason": "as told",
        "form": "text",
        "missing": {"train": pytest.approx(1 / 9)},
        "oov": {"train": 0.0},
    }


def test_hash_of_text_is_pinned() -> None:
    assert hashed("a") == 3405396810240292928
    frame = pl.DataFrame({"x": ["a"] * 70_000 + ["b"], "label": [0, 1] * 35_000 + [1]})
    encoded = frame.lazy().select(ctr.data.cells.raw_id(RawId("x", form="text"))).collect(engine="streaming")["x"]
    assert encoded.unique(maintain_order=True).to_list() == [3405396810240292928, hashed("b")]


def test_other_kinds_beside_it_stay_as_they_are(tmp_path: Path) -> None:
    """Ids of a table beside 64-bit ones, a bag between them, shuffled, padded and through a window of rows."""
    count = 200
    users = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, count)
    frame = pl.DataFrame(
        {
            "item": [f"i{n % 7}" for n in range(count)],
            "tags": ["|".join(["x", "y", "z"][: n % 3 + 1]) for n in range(count)],
            "user": users,
            "price": np.arange(count) / 7,
            "label": np.arange(count) % 2,
        }
    )
    features: list[ctr.Feature] = [Categorical("item"), RawId("user"), MultiValued("tags"), Numeric("price", "none")]
    ctr.prepare({"train": frame}, tmp_path / "with", features=features, log=None)
    without = [feature for feature in features if feature.name != "user"]
    ctr.prepare({"train": frame.drop("user")}, tmp_path / "without", features=without, log=None)
    load = functools.partial(ctr.Loader, split="train", batch_size=64, shuffle=True, seed=3, window_rows=100)
    rows = []
    for batch, plain in zip(load(tmp_path / "with"), load(tmp_path / "without"), strict=True):
        for name in ("item", "tags"):
            assert torch.equal(batch.sparse[name].values(), plain.sparse[name].values())
            assert torch.equal(batch.sparse[name].lengths(), plain.sparse[name].lengths())
        assert torch.equal(batch.dense, plain.dense)
        real = batch.weights > 0
        rows += list(
            zip((batch.dense[real, 0] * 7).round().long().tolist(), batch.sparse["user"].values()[real].tolist())
        )
    assert sorted(rows) == list(enumerate(users.tolist()))


def test_two_preparations_agree(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    hashes = {ctr.prepare({"train": FRAME}, folder, features=FEATURES, log=None).hash for folder in folders}
    assert len(hashes) == 1
    assert fingerprint(folders[0]) == fingerprint(folders[1])


def test_schemas_without_raw_ids_hash_as_before() -> None:
    schema = Schema(
        (
            Categorical("item", num_embeddings=9),
            MultiValued("tags", num_embeddings=7),
            Sequence("seen", vocabulary="item", num_embeddings=9),
            Numeric("price", parameters={"fill": 0.0}),
        ),
        ("click",),
        vocabulary_hashes={"item": "x", "tags": "y"},
    )
    assert schema.hash == "63623526bd658b35"


def test_the_form_is_part_of_the_hash_and_checked() -> None:
    schemas = [Schema((RawId("user", form=form),), ("click",)) for form in (None, "integer", "text")]
    assert len({schema.hash for schema in schemas}) == 3
    assert [schema.is_fitted for schema in schemas] == [False, True, True]
    assert schemas[1].difference(schemas[2]) == ["feature 'user': form is 'text', expected 'integer'"]
    assert Schema.from_dict(schemas[2].to_dict()) == schemas[2]
    with pytest.raises(SchemaError, match="form is 'hex', expected one of"):
        Schema((RawId("user", form="hex"),), ("click",))  # type: ignore[arg-type]


def test_nobody_shares_the_vocabulary_that_it_lacks(tmp_path: Path) -> None:
    features = (RawId("user"), Sequence("friends", vocabulary="user"))
    with pytest.raises(SchemaError, match=r"\['friends'\] have vocabulary='user', but 'user' is a RawId"):
        Schema(features, ("click",))
    frame = pl.DataFrame({"user": [1, 2], "friends": ["1|2", "2"], "click": [0, 1]})
    with pytest.raises(SchemaError, match="'user' is a RawId, without vocabulary"):
        ctr.prepare({"train": frame}, tmp_path / "out", features=features, labels="click", log=None)


@pytest.mark.parametrize(
    "values",
    [pl.Series([1.0, 2.0]), pl.Series([True, False]), pl.Series([[1], [2]]), pl.Series([1, 2], dtype=pl.Int128)],
    ids=str,
)
def test_what_is_no_integer_or_text_is_refused(tmp_path: Path, values: pl.Series) -> None:
    frame = pl.DataFrame({"x": values, "label": [0, 1]})
    with pytest.raises(SchemaError, match="expected integers of up to 64 bits, or text, for a raw_id feature: cast"):
        ctr.prepare({"train": frame}, tmp_path / "out", features=[RawId("x")], log=None)
    assert not (tmp_path / "out").exists()


def test_integers_written_as_floats_are_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": [None, "17.0", "-18.0"], "label": [0, 1, 1]})
    with pytest.raises(SchemaError, match=r"row 2, column 'x' holds '17\.0'.*look like floats.*as integers"):
        ctr.prepare({"train": frame}, tmp_path / "out", features=[RawId("x")], log=None)


@pytest.mark.parametrize("odd", ["012", "+5", "12.0", "-0", "1e3", str(2**64), str(-(2**63) - 1), "x"])
def test_one_value_that_is_no_printed_integer_makes_text_of_all(tmp_path: Path, odd: str) -> None:
    frame = pl.DataFrame({"x": ["12", odd, "12"], "label": [0, 1, 1]})
    schema = ctr.prepare({"train": frame}, tmp_path / "out", features=[RawId("x")], log=None)
    assert schema["x"] == RawId("x", form="text")
    ids = pl.read_parquet(tmp_path / "out" / "train")["x"]
    assert ids.to_list() == [hashed("12"), hashed(odd), hashed("12")]


def test_a_form_that_was_given_is_kept_and_checked(tmp_path: Path) -> None:
    frame = pl.DataFrame({"x": ["12", "13"], "label": [0, 1]})
    schema = ctr.prepare({"train": frame}, tmp_path / "out", features=[RawId("x", form="text")], log=None)
    assert schema["x"] == RawId("x", form="text")
    assert pl.read_parquet(tmp_path / "out" / "train")["x"].to_list() == [hashed("12"), hashed("13")]
    with pytest.raises(SchemaError, match=r"row 1, column 'x' holds 12 \(Int64\).*'text', so expected text"):
        ctr.prepare({"train": frame.cast(pl.Int64)}, tmp_path / "other", features=[RawId("x", form="text")], log=None)


def test_valid_and_test_must_have_the_form_of_train(tmp_path: Path) -> None:
    train, test = ({"x": values, "label": [0, 1]} for values in (["1", "2"], ["3", "03"]))
    with pytest.raises(SchemaError, match=r"row 2, column 'x' holds '03' \(String\).*'integer', so expected integers"):
        ctr.prepare(
            {"train": pl.DataFrame(train), "test": pl.DataFrame(test)},
            tmp_path / "out",
            features=[RawId("x")],
            on_bad_row="skip",  # it is no bad row: the column is another one
            log=None,
        )


# ------------------------------------------------------------------------------------------------------------ new rows


@pytest.mark.parametrize("kind", ["frame", "csv", "parquet"])
def test_new_rows_get_the_same_ids(prepared: Path, tmp_path: Path, kind: str) -> None:
    rows = FRAME.drop("label").reverse()
    assert new_rows(rows, prepared, tmp_path, kind) == {name: ids[::-1] for name, ids in WANTED.items()}
    # Integers of another width, or as text, are the same integers; texts that are all digits stay texts.
    others = pl.DataFrame(
        {"signed": ["-7"], "unsigned": [2**31], "small": pl.Series([2**63 + 5], dtype=pl.UInt64), "text": ["12"]}
    )
    assert new_rows(others, prepared, tmp_path / "others", "frame") == {
        "signed": [-7],
        "unsigned": [2**31],
        "small": [wrapped(2**63 + 5)],
        "text": [hashed("12")],
    }


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("signed", ["12", "bob"], r"row 2, column 'signed' holds 'bob' \(String\).*'integer'.*expected integers"),
        ("small", ["1.0", "2.0"], r"row 1, column 'small' holds '1\.0' \(String\).*'integer'.*expected integers"),
        ("text", [12, 13], r"row 1, column 'text' holds 12 \(Int64\).*'text', so expected text"),
        ("signed", [1.0, 2.0], "type Float64, expected integers of up to 64 bits, or text"),
    ],
)
def test_new_rows_of_another_form_are_refused(
    prepared: Path, tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    rows = FRAME.drop("label").head(2).with_columns(pl.Series(column, values))
    with pytest.raises(SchemaError, match=message):
        new_rows(rows, prepared, tmp_path)


def test_columns_without_any_value_pass(prepared: Path, tmp_path: Path) -> None:
    empty = pl.DataFrame({"signed": [None], "unsigned": [None], "small": [None], "text": [None]})
    wanted = {name: [MISSING] for name in WANTED}
    assert new_rows(empty, prepared, tmp_path) == wanted
    assert new_rows(empty.cast(pl.String), prepared, tmp_path) == wanted
    assert new_rows(empty.cast(pl.Int64), prepared, tmp_path) == wanted


def test_missing_cells_are_counted(prepared: Path) -> None:
    counts = count_ids(pl.scan_parquet(prepared / "train" / "*.parquet"), Schema.load(prepared))
    assert counts == {name: {"missing": 1, "unseen": 0, "ids": 9} for name in WANTED}


def test_a_schema_without_forms_encodes_nothing(prepared: Path, tmp_path: Path) -> None:
    schema = dataclasses.replace(Schema.load(prepared), features=tuple(FEATURES))
    with pytest.raises(SchemaError, match="not fitted"):
        Encoder.of(schema, prepared)


# -------------------------------------------------------------------------------------------------------------- loader


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2], pa.int32()), "'user' is int32, expected int64"),
        (pa.array([[1], [2]], pa.list_(pa.int64())), "'user' is list<int64>, expected int64"),
        (pa.array([1, None], pa.int64()), "column 'user', row 1 is null"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, column: Any, message: str) -> None:
    Schema((RawId("user"),), ("click",)).save(tmp_path / "schema.json")
    (tmp_path / "train").mkdir()
    table = pa.table({"user": column, "click": pa.array([0, 1], pa.float32())})
    pq.write_table(table, tmp_path / "train" / "0.parquet")
    with pytest.raises(SchemaError, match=message):
        ctr.Loader(tmp_path, "train", batch_size=2)


def test_folders_of_others_need_no_form(tmp_path: Path) -> None:
    Schema((RawId("user"),), ("click",)).save(tmp_path / "schema.json")
    (tmp_path / "train").mkdir()
    table = pa.table({"user": pa.array([MISSING, 2**63 - 1], pa.int64()), "click": pa.array([0, 1], pa.float32())})
    pq.write_table(table, tmp_path / "train" / "0.parquet")
    (batch,) = ctr.Loader(tmp_path, "train", batch_size=2)
    assert batch.sparse["user"].values().tolist() == [MISSING, 2**63 - 1]


# ---------------------------------------------------------------------------------------------------------- embeddings


def test_plain_tables_refuse_it() -> None:
    features = (RawId("user", form="text"), Categorical("item", num_embeddings=5))
    schema = Schema(features, ("click",))
    makes: list[Callable[[], Any]] = [
        lambda: ctr.TableEmbedding(features),
        lambda: ctr.TableEmbedding(features, stacked=2),
        lambda: ctr.Wide(features),
        lambda: ctr.models.mlp(ctr.Inputs(schema)),
    ]
    for make in makes:
        with pytest.raises(ValueError, match="feature 'user' has"):
            make()


def test_managed_embedding_reads_a_row_for_each_raw_id() -> None:
    base = example_schema()
    schema = Schema((RawId("session"), *base.features, RawId("device")), base.labels)

    def make(schema: Schema) -> ctr.embeddings.ManagedEmbedding:
        return ctr.embeddings.ManagedEmbedding(
            schema.features,
            num_embeddings={"session": 32, "device": 64, "item": 64},
            eviction_policy=DistanceLFU_EvictionPolicy(),
            embedding_dim=4,
            init_std=1.0,
        )

    check_embedding(make, schema=schema)
    embedding, batch = make(schema), example_batch(schema, 9)
    fields = embedding(batch)
    for name, position in (("session", 0), ("device", 7)):
        rows = embedding.rows(name, batch.sparse[name].values())
        assert len(set(rows.tolist())) == 9
        assert rows.min() >= 0
        weight = embedding.tables.embeddings.embedding_bags[f"table_{name}"].weight
        assert torch.equal(fields[:, position], weight[rows])


def test_predictor_scores_rows_of_the_log_as_prepared_ones(prepared: Path) -> None:
    schema = Schema.load(prepared)
    embedding = ctr.embeddings.ManagedEmbedding(
        schema.features,
        num_embeddings=dict.fromkeys(WANTED, 32),
        eviction_policy=DistanceLFU_EvictionPolicy(),
        embedding_dim=4,
        init_std=1.0,
    )
    tower = ctr.MLP(embedding.out_shape, hidden=(8,))
    model = ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape))
    loader = ctr.Loader(prepared, "train", batch_size=9)
    for batch in loader:
        model.train()(batch)  # every id gets a row of its own
    wanted = torch.from_numpy(ctr.predict(model.eval(), loader).logits).double().sigmoid()[:, 0]
    assert len(set(wanted.tolist())) == 9
    scores, counts = ctr.Predictor(model, schema, prepared).predict(FRAME.drop("label"))
    assert scores["label"].to_numpy() == pytest.approx(wanted.numpy(), rel=1e-6)
    assert counts["missing"] == dict.fromkeys(WANTED, 1)
    assert counts["unseen"] == dict.fromkeys(WANTED, 0)
    assert counts["remarks"] == []


def test_managed_embedding_wants_rows_for_every_raw_id() -> None:
    with pytest.raises(ValueError, match=r"num_embeddings is for \['user'\], but \['device'\] have raw ids too"):
        ctr.embeddings.ManagedEmbedding(
            [RawId("user"), RawId("device")],
            num_embeddings={"user": 8},
            eviction_policy=DistanceLFU_EvictionPolicy(),
        )


# ---------------------------------------------------------------------------------------------------------- end to end

USERS_IN_USE, STEP, ROWS = 30, 80, 48


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 users are in use; every 80 rows one of them gives way to a new one. Their planted logits are N(0, 2^2)."""
    rng = np.random.default_rng(0)
    num_rows = 4800
    time = np.arange(num_rows)
    number = time // STEP + rng.integers(0, USERS_IN_USE, num_rows)
    raw = rng.integers(-(2**63), 2**63 - 1, number.max() + 1)
    logit = rng.normal(0, 2, len(raw))
    frame = pl.DataFrame(
        {
            "time": time,
            "user": raw[number],
            "device": [f"d{n}" for n in number % 9],
            "shop": [f"s{n}" for n in rng.integers(0, 5, num_rows)],
            "click": (rng.random(num_rows) < 1 / (1 + np.exp(-logit[number]))).astype(np.int8),
        }
    )
    folder = tmp_path_factory.mktemp("stream") / "prepared"
    features = [RawId("user"), RawId("device"), Categorical("shop")]
    path = written(frame.sample(fraction=1.0, shuffle=True, seed=0), folder.parent / "log.csv")
    ctr.prepare(path, folder, features=features, labels="click", split_by="time", log=None)
    assert Schema.load(folder)["user"] == RawId("user", form="integer")
    return folder


class Killed(Exception):
    pass


def train(stream: Path, make_engine: Callable[[ctr.Model], Any], out: Path) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    embedding = ctr.embeddings.ManagedEmbedding(
        Schema.load(stream).features,
        num_embeddings={"user": ROWS, "device": 12},
        eviction_policy=DistanceLFU_EvictionPolicy(),
        eviction_interval=1,
        embedding_dim=8,
        init_std=0.1,
    )
    tower = ctr.MLP(embedding.out_shape, hidden=(16,), dropout=0.1)
    engine = make_engine(ctr.Model(embedding, tower, ctr.LinearHead(tower.out_shape)))
    with ctr.Checkpoints(out) as checkpoints:
        history = ctr.fit(
            engine,
            ctr.Loader(stream, "train", batch_size=64),
            ctr.Loader(stream, "valid", batch_size=256),
            max_epochs=1,
            checkpoints=checkpoints,
            checkpoint_seconds=0.0,
            console=Console(quiet=True),
        )
    return history.epochs[0].valid_auc, engine.weights()


@pytest.mark.parametrize(
    "make_engine",
    [
        functools.partial(ctr.ExactEngine, learning_rate=0.02),
        functools.partial(ctr.FusedEngine, learning_rate=0.02, embedding_learning_rate=0.2),
    ],
    ids=["exact", "fused"],
)
def test_a_stream_is_learnt_and_a_stopped_run_goes_on_to_the_same_bits(
    stream: Path, make_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auc, state = train(stream, make_engine, tmp_path / "whole")
    assert auc > 0.65  # exact 0.698, fused 0.755; 0.5 without the user, give or take 0.03
    assert pl.read_parquet(stream / "train")["user"].n_unique() > 1.5 * ROWS  # so many of them were evicted
    with monkeypatch.context() as patch:
        step, allowed = make_engine.func.step, iter(range(41))

        def limited(engine: Any, batch: ctr.Batch) -> Tensor:
            if next(allowed, None) is None:
                raise Killed
            return step(engine, batch)  # type: ignore[no-any-return]

        patch.setattr(make_engine.func, "step", limited)
        with pytest.raises(Killed):
            train(stream, make_engine, tmp_path / "stopped")
    resumed_auc, resumed = train(stream, make_engine, tmp_path / "stopped")
    assert resumed_auc == auc
    assert resumed.keys() == state.keys()
    assert any("_mch_sorted_raw_ids" in name for name in state)
    assert [name for name in state if not torch.equal(state[name], resumed[name])] == []
