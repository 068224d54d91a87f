"""Folders that are whole and true, or refused by name; and whatever is killed leaves the old or the new."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from damaged_folders import CONFIG, KINDS, judged, make, rows, try_one

import ctrlib as ctr
from ctrlib import making, manifest
from ctrlib.data.fingerprint import fingerprint
from ctrlib.making import new_file, new_folder, remove, settle, write_text
from ctrlib.manifest import check_folder, data_hash, manifest_of, write_manifest
from ctrlib.search.plan import Plan
from ctrlib.serving.model_folder import model_in_the_making

FEATURES = [ctr.Categorical("item"), ctr.MultiValued("tags"), ctr.Numeric("price")]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders with `data` and `model` each, of other rows."""
    pair = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    for seed, folder in enumerate(pair):
        make(folder, seed)
    return pair


@pytest.fixture
def data(sources: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(sources[0] / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def model(sources: tuple[Path, Path], tmp_path: Path) -> Path:
    shutil.copytree(sources[0] / "model", tmp_path / "model")
    return tmp_path / "model"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# -------------------------------------------------------------------------------------------------------------- damages


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_never_silent_and_always_named(sources: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    rng = random.Random(len(kind))
    bad = [tried for _ in range(40) if (tried := try_one(kind, sources, tmp_path, rng))[1] != "named"]
    assert bad == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_whole_is_read(sources: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    assert judged(shutil.copytree(sources[0] / kind, tmp_path / kind)) == "read as if nothing was"


def test_what_a_manifest_says(data: Path, model: Path) -> None:
    found = manifest_of(data)
    assert found is not None
    assert set(found.files) == {
        "schema.json", "report.json", "groups.parquet", "vocab/item.parquet", "vocab/tags.parquet",
        "numbers/price.parquet", *(f"{split}/part-00000.parquet" for split in ("train", "valid", "test")),
    }  # fmt: skip
    num_bytes, parts = found.files["train/part-00000.parquet"]
    path = data / "train" / "part-00000.parquet"
    assert num_bytes == path.stat().st_size
    # 239 rows in groups of 100: three of them and the footer, which begins where the last group ends.
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    assert len(parts) == 4
    assert parts[0][0] == 0
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little") + 8
    assert parts[3][0] <= num_bytes - footer
    written = manifest_of(model)
    assert written is not None
    assert (found.kind, written.kind) == ("prepared", "model")
    assert {"model.json", "model.safetensors", "numbers/price.parquet"} < set(written.files)


def test_every_row_group_is_checked_when_it_is_read_and_no_other(data: Path) -> None:
    found = manifest_of(data)
    assert found is not None
    (_, parts), path = found.files["train/part-00000.parquet"], data / "train" / "part-00000.parquet"
    flip(path, parts[1][0] + 5)  # in the second row group
    loader = ctr.Loader(data, "train", batch_size=50, workers=0, window_rows=100)
    batches = iter(loader)
    assert next(batches).size == next(batches).size == 50
    with pytest.raises(ctr.SchemaError, match=r"part-00000.parquet is damaged: .* in bytes \d+ to \d+\): copy"):
        next(batches)
    flip(path, parts[1][0] + 5)
    flip(path, parts[3][0] + 5)
    with pytest.raises(ctr.SchemaError, match=r"part-00000.parquet is damaged"):
        ctr.Loader(data, "train", batch_size=50)


def test_a_flipped_bit_of_the_weights_and_weights_of_another_seed(model: Path, sources: tuple[Path, Path]) -> None:
    weights = model / "model.safetensors"
    flip(weights, weights.stat().st_size - 3)
    cure = r"`ctrlib train ... --out .*model --overwrite`"
    with pytest.raises(ctr.SchemaError, match=rf"model.safetensors is damaged: .* sha256 .*: copy .* {cure}"):
        ctr.Predictor.load(model)
    torch.manual_seed(5)
    schema = ctr.Schema.load(model)
    config = json.loads((model / "model.json").read_text())
    stranger = model.with_name("stranger")
    ctr.save_model(ctr.models.build(config, schema), config, sources[0] / "data", stranger)
    shutil.copy(stranger / "model.safetensors", weights)
    with pytest.raises(ctr.SchemaError, match=r"model.safetensors is damaged"):
        ctr.Predictor.load(model)
    with pytest.raises(ctr.SchemaError, match=r"model.safetensors is damaged"):
        ctr.warm_start(ctr.models.build(config, schema), sources[0] / "data", model)


def test_files_that_are_lost_or_added(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "train" / "more.parquet").write_bytes((data / "valid" / "part-00000.parquet").read_bytes())
    with pytest.raises(ctr.SchemaError, match=r"train/more.parquet is not in .*MANIFEST"):
        ctr.Loader(data, "train", batch_size=50)
    (data / "train" / "more.parquet").rename(data / "more.parquet")
    (data / "extra").mkdir()
    (data / "more.parquet").rename(data / "extra" / "0.parquet")
    assert ctr.Loader(data, "extra", batch_size=50).num_rows == 33  # a split of one's own
    (data / "train" / "part-00000.parquet").unlink()
    with pytest.raises(ctr.SchemaError, match=r"train/part-00000.parquet is missing"):
        ctr.Loader(data, "train", batch_size=50)
    shutil.rmtree(data / "numbers")
    with pytest.raises(ctr.SchemaError, match=r"numbers/price.parquet is missing"):
        ctr.quantile_edges(data)
    assert caplog.text == ""


def test_a_folder_is_not_whole_without_its_manifest(data: Path, model: Path) -> None:
    for folder in (data, model):
        (folder / "MANIFEST").unlink()
    for use in (lambda: ctr.Loader(data, "train", batch_size=50), lambda: check_folder(data)):
        with pytest.raises(ctr.SchemaError, match=r"data/MANIFEST is missing, and it is written last"):
            use()
    with pytest.raises(ctr.SchemaError, match=r"model/MANIFEST is missing, and it is written last"):
        ctr.Predictor.load(model)


def test_a_folder_of_another_program_is_read_and_that_is_said(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    (data / "MANIFEST").unlink()
    ctr.Schema.load(data).save(data / "schema.json")
    before = data_hash(data)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ctr.Loader(data, "train", batch_size=50).num_rows == 239
    assert len(caplog.records) == 1
    assert f"{data} has no MANIFEST, so damage to its files would go unnoticed" in caplog.text
    path = data / "valid" / "part-00000.parquet"
    table = pl.read_parquet(path)
    table.with_columns(click=1 - pl.col("click")).write_parquet(path)
    assert data_hash(data) != before
    write_manifest(data)
    check_folder(data)
    flip(path, 40)
    with pytest.raises(ctr.SchemaError, match=r"valid/part-00000.parquet is damaged"):
        fingerprint(data)


@pytest.mark.parametrize("name", ["report.json", "vocab/item.parquet"])
def test_a_run_tells_before_it_trains(data: Path, name: str) -> None:
    flip(data / name, 30)
    with pytest.raises(ctr.SchemaError, match=f"{name} is damaged"):
        ctr.run(data, CONFIG, on_built=lambda model: pytest.fail("too late"))
    if name == "report.json":
        (data / name).write_text("[1]")
        write_manifest(data)
        with pytest.raises(ctr.SchemaError, match=r"report.json cannot be read"):
            ctr.run(data, CONFIG, on_built=lambda model: pytest.fail("too late"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [], "a schema is an object"),
        (lambda content: 7, "a schema is an object"),
        (lambda content: {name: value for name, value in content.items() if name != "features"}, "has no features"),
        (lambda content: {**content, "features": None}, "cannot be understood"),
        (lambda content: {**content, "features": [1]}, "cannot be understood"),
        (lambda content: {**content, "labels": 3}, "cannot be understood"),
        (lambda content: {**content, "features": [{"kind": "Complex"}]}, "unknown feature kind 'Complex'"),
        (lambda content: {**content, "features": [{"kind": ["Complex"]}]}, "cannot be understood"),
        (
            lambda content: {**content, "features": [{**content["features"][0], "colour": 1}]},
            "'item' has colour, which this ctrlib does not know: a newer one wrote it",
        ),
    ],
)
def test_a_schema_that_is_none_is_named(data: Path, change: Callable[[Any], Any], message: str) -> None:
    path = data / "schema.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    write_manifest(data)
    with pytest.raises(ctr.SchemaError, match=rf"schema.json: .*{message}"):
        ctr.Loader(data, "train", batch_size=50)


def test_other_rows_are_other_data(data: Path, tmp_path: Path) -> None:
    """All labels flipped between a kill and the next start."""

    class Killed(BaseException):
        pass

    def killed(model: ctr.Model) -> None:
        raise Killed

    def run(**options: Any) -> Any:
        training = {"max_epochs": 1, "batch_size": 100, "device": "cpu"}
        config = {"model": "mlp", "embedding_dim": 4, "hidden": [4], "training": training}
        return ctr.run(data, config, out=tmp_path / "out", **options)

    with pytest.raises(Killed):
        run(on_trained=killed)
    schema = ctr.Schema.load(data)
    for path in data.glob("t*/*.parquet"):
        table = pl.read_parquet(path)
        table.with_columns(click=1 - pl.col("click")).write_parquet(path)
    write_manifest(data)
    assert ctr.Schema.load(data).hash == schema.hash
    with pytest.raises(ValueError, match=r"of another run.*rows"):
        run()


def test_a_plan_is_checked(tmp_path: Path) -> None:
    plan = Plan("low_rank", {"tower": {"kind": "x"}}, {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(())}, {})
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    assert torch.equal(Plan.load(path).weights["a"], plan.weights["a"])
    assert Plan.load(path).replaced == plan.replaced
    write_text(tmp_path / "text", "")
    assert path.stat().st_mode == (tmp_path / "text").stat().st_mode
    flip(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"plan.safetensors is not a plan .*sha256 differs"):
        Plan.load(path)


def test_weights_may_be_read_by_whom_the_rest_may(model: Path) -> None:
    assert {path.stat().st_mode for path in model.iterdir() if path.is_file()} == {
        (model / "model.json").stat().st_mode
    }


# ---------------------------------------------------------------------------------------------------------------- kills

CALLS = ("mkdir", "open", "rename", "replace", "rmdir", "unlink")


class Killed(BaseException):
    """As if the process was no more: from then on, no call changes the disk."""


def counted(limit: int, die: Callable[[], None]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The calls that change the disk, of which the one after `limit` others and all later ones die."""
    done = 0

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if done >= limit:
                die()
            done += 1
            return call(*args, **kwargs)

        return wrapper

    for name in CALLS:
        yield name, wrapped(getattr(os, name))


def killed_everywhere(
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[], None],
    act: Callable[[], Any],
    state: Callable[[], Any],
    every: int = 1,
) -> int:
    """Kill `act` before its 1st, 2nd ... call that changes the disk; what is left must be the old or the new.

    `start` brings the old about, `state` is what a reader sees. After each kill (or `every` so many) `act` again must
    bring the new about. Returns how many kills there were.
    """
    start()
    old = state()
    act()
    new = state()
    assert old != new

    def die() -> None:
        raise Killed

    for limit in range(1000):
        start()
        with monkeypatch.context() as patch:
            for name, call in counted(limit, die):
                patch.setattr(os, name, call)
            try:
                act()
            except Killed:
                over = False
            else:
                over = True
        seen = state()
        assert seen in (old, new), limit
        if over or limit % every == 0:
            act()
            assert state() == new, limit
        if over:
            return limit
    raise AssertionError("it never ends")


def hidden(place: Path) -> list[str]:
    return [str(path) for path in place.rglob(".*")]


def test_a_folder_is_replaced_wholly_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def fill(folder: Path, what: str, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{what} {name}")

    def start() -> None:
        shutil.rmtree(tmp_path)
        out.mkdir(parents=True)
        fill(out, "old", "a", "b/c", "b/d", "gone", "MANIFEST")

    def act(keep: bool) -> None:
        with new_folder(out, keep=keep) as folder:
            fill(folder, "new", "a", "b/c", "e/f", "MANIFEST")

    def state() -> dict[str, str]:
        settle(out)
        return {
            path.relative_to(out).as_posix(): path.read_text()
            for path in out.rglob("*")
            if path.is_file() and "/." not in str(path)
        }

    assert killed_everywhere(monkeypatch, start, lambda: act(False), state) > 20
    assert set(state()) == {"a", "b/c", "e/f", "MANIFEST"}
    assert killed_everywhere(monkeypatch, start, lambda: act(True), state) == 20
    assert set(state()) == {"a", "b/c", "e/f", "MANIFEST", "gone"}
    assert set(state().values()) >= {"old gone", "new MANIFEST"}
    assert hidden(tmp_path) == []


def test_save_model_is_killed_for_good(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """By SIGKILL, in a process of its own; the weights of the old or of the new model load, and score."""
    out, data = tmp_path / "out", sources[0] / "data"
    built = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = {"model": "mlp", "embedding_dim": 4, "hidden": [8 * seed]}
        built.append((ctr.models.build(config, ctr.Schema.load(data)), config))
    some, scores = rows(9, 20), []
    for (one, config), name in zip(built, ("old", "new")):
        ctr.save_model(one, config, data, tmp_path / name)
        scores.append(ctr.Predictor.load(tmp_path / name).predict(some)[0].rows())

    def dies() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    limit, seen = 0, set()
    while True:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        (out / "log.jsonl").write_text("kept")
        child = os.fork()
        if child == 0:
            for name, call in counted(limit, dies):
                setattr(os, name, call)
            ctr.save_model(*built[1], data, out)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seen.add(scores.index(ctr.Predictor.load(out).predict(some)[0].rows()))
        if limit % 10 == 0:
            ctr.save_model(*built[1], data, out)
            assert hidden(out) == []
            assert ctr.Predictor.load(out).predict(some)[0].rows() == scores[1]
        assert (out / "log.jsonl").read_text() == "kept"
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        limit += 1
    assert limit > 20
    assert seen == {0, 1}


def test_prepare_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "p"
    frames = [rows(seed, 60).select("item", "click") for seed in (0, 1)]
    ctr.prepare({"train": frames[0]}, tmp_path / "old", labels="click", log=None)

    def start() -> None:
        shutil.rmtree(out, ignore_errors=True)
        for left in tmp_path.glob(".*"):
            making._delete(left)
        shutil.copytree(tmp_path / "old", out)

    def act() -> None:
        ctr.prepare({"train": frames[1]}, out, labels="click", overwrite=True, log=None)

    assert killed_everywhere(monkeypatch, start, act, lambda: fingerprint(out), every=5) > 15
    assert hidden(tmp_path) == []
    assert caplog.text == ""


def test_predict_is_killed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = ctr.Predictor.load(model)
    some = rows(9, 20)
    some.write_csv(tmp_path / "rows.csv")
    for name in ("scores.csv", "scores.parquet"):
        out = tmp_path / name

        def act(out: Path = out) -> None:
            predictor.predict_to(tmp_path / "rows.csv", out, overwrite=True)

        kills = killed_everywhere(
            monkeypatch,
            lambda out=out: out.write_text("old"),
            act,
            lambda out=out: out.read_bytes(),  # type: ignore[misc]
        )
        assert kills >= 3
    assert hidden(tmp_path) == []
    assert pl.read_csv(tmp_path / "scores.csv")["click"].to_list() == predictor.predict(some)[0]["click"].to_list()


def test_a_small_model_comes_with_its_report(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `compress` and `search` write beside the model is in place when the model is."""
    out, data = tmp_path / "out", sources[0] / "data"
    config = {"model": "mlp", "embedding_dim": 4, "hidden": [4]}
    built = ctr.models.build(config, ctr.Schema.load(data))

    def act(what: str) -> None:
        described = {**config, "dropout": 0.5 if what == "new" else 0.1}
        with model_in_the_making(built, described, data, out, "compress") as folder:
            (folder / "compression.json").write_text(json.dumps({"method": what}))

    def start() -> None:
        shutil.rmtree(out, ignore_errors=True)
        act("old")

    def state() -> tuple[str, str]:
        ctr.Predictor.load(out)
        return (out / "compression.json").read_text(), (out / "model.json").read_text()

    assert killed_everywhere(monkeypatch, start, lambda: act("new"), state) > 20
    flip(out / "compression.json", 0)
    found = manifest_of(out)
    assert found is not None
    with pytest.raises(ctr.SchemaError, match=r"compression.json is damaged"):
        found.check("compression.json")


def test_a_folder_is_removed_wholly_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the checkpoints of a run that is over: half of them would be no good checkpoint."""

    def start() -> None:
        shutil.rmtree(tmp_path)
        (tmp_path / "checkpoints" / "step").mkdir(parents=True)
        for name in ("LATEST", "step/MANIFEST", "step/tensors"):
            (tmp_path / "checkpoints" / name).write_text(name)

    def state() -> int:
        return len(list((tmp_path / "checkpoints").rglob("*")))

    def act() -> None:
        remove(tmp_path / "checkpoints")
        making.sweep(tmp_path, "checkpoints")  # the next command

    assert killed_everywhere(monkeypatch, start, act, state) > 5
    assert hidden(tmp_path) == []


def test_left_overs_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    (tmp_path / ".0123abcd.partial.scores.csv").write_text("of a dead one")
    (tmp_path / ".0123abcd.partial.other.csv").write_text("of somebody else")
    with new_file(out) as mine:
        mine.write_text("mine")
        with new_file(out) as yours:
            assert mine.exists()
            yours.write_text("yours")
        assert out.read_text() == "yours"
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".0123abcd.partial.other.csv", "scores.csv"]
    write_text(out, "text")
    assert out.read_text() == "text"
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "folder"):
        print(1 / 0)
    assert not (tmp_path / "folder").exists()
    assert len(list(tmp_path.iterdir())) == 2


# ---------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 4,000 bytes: as a full disk, the system refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


MANY = rows(3, 3000)
NEEDED = r"about [\d,]+ bytes are needed .*, [\d,]+ were written .*, and [\d,]+ are free"


def test_prepare_on_a_full_disk(data: Path, small_disk: None) -> None:
    before = fingerprint(data)
    for out in (data, data.with_name("new")):
        with pytest.raises(OSError, match=rf"no room for {out}: {NEEDED}"):
            ctr.prepare(MANY, out, features=FEATURES, labels="click", overwrite=True, log=None)
    assert fingerprint(data) == before
    assert [path.name for path in data.parent.iterdir()] == ["data"]
    assert hidden(data) == []


@pytest.mark.parametrize("name", ["scores.csv", "scores.parquet"])
def test_predict_on_a_full_disk(model: Path, tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    MANY.write_parquet(tmp_path / "rows.parquet")
    out = tmp_path / name
    out.write_text("old")
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match=rf"no room for {out}: {NEEDED}"):
        ctr.Predictor.load(model).predict_to(tmp_path / "rows.parquet", out, keep=["item"], overwrite=True)
    assert out.read_text() == "old"
    assert hidden(tmp_path) == []


def test_save_model_on_a_full_disk(model: Path, data: Path, request: pytest.FixtureRequest) -> None:
    before = ctr.Predictor.load(model).predict(rows(9, 20))[0]
    config = {**CONFIG, "numeric": "vector", "hidden": [400]}
    large = ctr.models.build(config, ctr.Schema.load(data))
    request.getfixturevalue("small_disk")
    needed = r"[\d,]+ bytes are needed, [\d,]+ were written .*, and [\d,]+ are free"
    with pytest.raises(OSError, match=rf"no room for {model}: {needed}"):
        ctr.save_model(large, config, data, model)
    assert ctr.Predictor.load(model).predict(rows(9, 20))[0].equals(before)
    assert hidden(model) == []
    assert math.isfinite(before["click"].sum())
    assert manifest.NAME == making.LAST
