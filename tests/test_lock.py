"""Whoever comes second is told who writes there; what the environment says of other processes is told from noise."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import ctrlib as ctr
from ctrlib import _lock, distributed
from ctrlib._launcher import NAMES, LauncherError, announced
from ctrlib._lock import LockedError, holding, locked, refuse_held
from ctrlib._target import TargetError, target
from ctrlib.search.compression import compress
from ctrlib.search.run import search_and_retrain

CONFIG = {"model": "deepfm", "embedding_dim": 4, "hidden": [4]}


@contextlib.contextmanager
def another(out: Path, end: Callable[[int], None] = lambda process: os.kill(process, signal.SIGTERM)) -> Iterator[int]:
    """A process that holds `out` until the end of the block."""
    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        sys.argv = ["/usr/bin/ctrlib", "train", "my data", "--out", str(out)]
        with locked(out):
            os.write(writer, b"!")
            signal.pause()
        os._exit(0)
    os.read(reader, 1)
    try:
        yield process
    finally:
        end(process)
        os.waitpid(process, 0)
        os.close(reader)
        os.close(writer)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("there", [False, True])
def test_the_second_is_told_who_is_the_first(there: bool, tmp_path: Path) -> None:
    out, link = tmp_path / "runs" / "a", tmp_path / "link"
    if there:
        out.mkdir(parents=True)
    link.symlink_to(out)
    with another(out) as process:
        before = files(tmp_path)
        assert before == ["link", "runs", "runs/.a.lock", *(["runs/a", "runs/a/.lock"] if there else [])]
        for spelling in (out, link, tmp_path / "runs" / "b" / ".." / "a"):
            for ask in (lambda out: locked(out).__enter__(), refuse_held):
                with pytest.raises(LockedError) as caught:
                    ask(spelling)
                assert re.fullmatch(
                    rf"{spelling} is being written already, by process {process} on {socket.gethostname()} since "
                    rf"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC \(ctrlib train 'my data' --out {out}\): wait for it, end "
                    r"it, or give another --out; nothing was changed",
                    str(caught.value),
                )
        with locked(tmp_path / "runs" / "b"):  # that is another place
            pass
        assert files(tmp_path) == before
    refuse_held(out)
    with locked(out):
        pass
    assert files(tmp_path) == ["link", "runs", *(["runs/a"] if there else [])]  # it was made by one that is dead


def test_one_lock_is_enough(tmp_path: Path) -> None:
    """A folder that is mounted into two containers has only what lies inside in common; a new one what lies beside."""
    out = tmp_path / "a"
    out.mkdir()
    with another(out):
        (tmp_path / ".a.lock").unlink()
        with pytest.raises(LockedError, match="train 'my data'"), locked(out):
            pass
        assert files(tmp_path) == ["a", "a/.lock"]
    new = tmp_path / "b"
    with another(new):
        new.mkdir()  # as a training does some time after its start
        with pytest.raises(LockedError, match="train 'my data'"), locked(new):
            pass


def test_a_dead_holder_blocks_nobody(tmp_path: Path) -> None:
    out = tmp_path / "a"
    out.mkdir()
    with another(out, end=lambda process: os.kill(process, signal.SIGKILL)):
        pass
    assert files(tmp_path) == [".a.lock", "a", "a/.lock"]
    refuse_held(out)
    with locked(out):
        assert f"process {os.getpid()} on" in (tmp_path / ".a.lock").read_text()
        assert (out / ".lock").read_text() == (tmp_path / ".a.lock").read_text()
    assert files(tmp_path) == ["a"]


def test_a_forked_process_holds_nothing(tmp_path: Path) -> None:
    """It may live on when the holder is gone, as a worker does for a moment."""
    reader, writer = os.pipe()
    out = tmp_path / "a"
    with locked(out):
        child = os.fork()
        if not child:
            answer = b"free"
            try:
                refuse_held(out)
            except LockedError:
                answer = b"held"
            os.write(writer, answer)
            signal.pause()
        assert os.read(reader, 4) == b"held"  # by us
    with locked(out):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_thread_is_somebody_else_and_the_same_one_is_not(tmp_path: Path) -> None:
    out, found = tmp_path / "a", []

    def other() -> None:
        try:
            with locked(out):
                found.append("got it")
        except LockedError as error:
            found.append(str(error))

    with locked(out), locked(out / "deeper" / "file.csv"), locked(out):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert files(tmp_path) == [".a.lock"]
    other()
    assert f"by process {os.getpid()} on" in found[0]
    assert found[1] == "got it"


def test_where_there_are_no_locks_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "a"), locked(tmp_path / "a"):
        pass
    file = tmp_path / "file"
    file.touch()
    with locked(file / "below"):  # where no file can be: whoever writes says so
        pass


def test_a_look_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two look at the same moment, and the one that wants to write is not refused because the other looks."""
    out, path = tmp_path / "a", tmp_path / ".a.lock"
    path.touch()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    refuse_held(out)
    closing = threading.Timer(_lock._PAUSE / 2, os.close, [descriptor])
    closing.start()
    with locked(out):
        closing.join()


def test_what_is_finished_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the lock another run may have come to its end."""
    out = tmp_path / "a"

    @contextlib.contextmanager
    def late(place: Path) -> Iterator[None]:
        out.mkdir()
        (out / "model.json").touch()
        yield

    monkeypatch.setattr("ctrlib._target.locked", late)
    with pytest.raises(TargetError, match="is a model folder already"), target(out, "model"):
        raise AssertionError


def test_of_several_processes_the_first_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(NAMES, ("1", "2", "there", "1")):
        monkeypatch.setenv(name, value)
    with another(tmp_path / "a"):
        with target(tmp_path / "a", "model", shared=True):
            assert files(tmp_path) == [".a.lock"]
        with pytest.raises(LockedError), target(tmp_path / "a", "model"):
            raise AssertionError
    monkeypatch.setenv("RANK", "0")
    with another(tmp_path / "a"), pytest.raises(LockedError), target(tmp_path / "a", "model", shared=True):
        raise AssertionError


def test_a_function_holds_what_it_writes(tmp_path: Path) -> None:
    @holding()
    def write(data: str, out: Path | None = None) -> str:
        """Its words."""
        return " ".join([data, *files(tmp_path)])

    assert write.__doc__ == "Its words."
    assert write("x", tmp_path / "a") == "x .a.lock"
    assert write("x", out=tmp_path / "a") == "x .a.lock"
    assert write("x") == "x"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'data'"):
        write(out=tmp_path / "a")  # type: ignore[call-arg]
    assert holding(when=lambda: False)(lambda out: files(tmp_path))(tmp_path / "a") == []


# ------------------------------------------------------------------------------------------- every function that writes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({name: rng.integers(0, most, 300) for name, most in (("item", 9), ("user", 5), ("label", 2))})
    frame.write_csv(folder / "x.csv")
    features = [ctr.Categorical("item"), ctr.Categorical("user")]
    ctr.prepare(folder / "x.csv", folder / "data", labels="label", features=features, log=None)
    torch.manual_seed(0)
    model = ctr.models.build(CONFIG, ctr.Schema.load(folder / "data"))
    ctr.save_model(model, CONFIG, folder / "data", folder / "model")
    return folder


def load(home: Path) -> ctr.Predictor:
    return ctr.Predictor.load(home / "model")


def fit(home: Path, **arguments: Any) -> None:
    model = ctr.models.build(CONFIG, ctr.Schema.load(home / "data"))
    loaders = [ctr.Loader(home / "data", split, batch_size=64) for split in ("train", "valid")]
    ctr.fit(ctr.ExactEngine(model), *loaders, max_epochs=1, **arguments)


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "prepare": lambda home, out: ctr.prepare(home / "x.csv", out, labels="label", log=None),
    "run": lambda home, out: ctr.run(home / "data", CONFIG, out=out),
    "save_model": lambda home, out: ctr.save_model(
        ctr.Predictor.load(home / "model").model, CONFIG, home / "data", out
    ),
    "search_and_retrain": lambda home, out: search_and_retrain("optfs", home / "data", CONFIG, out),
    "compress": lambda home, out: compress(home / "model", home / "data", out, ratio=2),
    "predict_to": lambda home, out: load(home).predict_to(home / "x.csv", out),
    "Ranking.save": lambda home, out: ctr.rank(home / "data").save(out),
    "Encoder.save": lambda home, out: load(home).encoder.save(out),
    "fit": lambda home, out: fit(home, out=out),
    "fit with checkpoints": lambda home, out: fit(home, checkpoints=ctr.Checkpoints(out)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_function_that_writes_is_refused(name: str, home: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    with another(out) as process:
        with pytest.raises(LockedError, match=rf"{out} is being written already, by process {process} on "):
            WRITERS[name](home, out)
        assert files(tmp_path) == [".a.csv.lock"]


# ---------------------------------------------------------------------------------------- other processes, if there are


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("", (0, 1)),
        ("RANK=0", (0, 1)),
        ("WORLD_SIZE=1", (0, 1)),
        ("RANK=0 WORLD_SIZE=1", (0, 1)),
        ("MASTER_ADDR=there MASTER_PORT=1", (0, 1)),
        ("RANK=0 WORLD_SIZE=1 MASTER_ADDR=nowhere MASTER_PORT=1", (0, 1)),
        ("RANK=2 WORLD_SIZE=3 MASTER_ADDR=there MASTER_PORT=1", (2, 3)),
        ("RANK=1", "has RANK=1, as if this were one of several processes, but no WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ("RANK=gold", "has RANK=gold, as if this were one of several processes, but no WORLD_SIZE, MASTER_ADDR,"),
        (
            "WORLD_SIZE=8",
            "has WORLD_SIZE=8, as if this were one of several processes, but no RANK, MASTER_ADDR, MASTER",
        ),
        ("RANK=0 WORLD_SIZE=2", "has RANK=0, WORLD_SIZE=2, as if this were one of several processes, but no MASTER_A"),
        (
            "RANK=2 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1",
            "MASTER_PORT=1: expected numbers, RANK from 0 on and below",
        ),
        ("RANK=-1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "MASTER_PORT=1: expected numbers, RANK from 0 on and"),
        ("RANK=a WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "MASTER_PORT=1: expected numbers, RANK from 0 on and"),
    ],
)
def test_several_processes_are_announced_wholly_or_not(
    said: str, found: Any, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for one in said.split():
        monkeypatch.setenv(*one.split("="))
    if isinstance(found, tuple):
        assert announced() == found
        assert (distributed.rank(), distributed.world_size()) == found
        return
    for ask in (
        announced,
        distributed.rank,
        distributed.world_size,
        lambda: ctr.run(home / "data", CONFIG, out=tmp_path),
    ):
        with pytest.raises(LauncherError) as caught:
            ask()
        assert f"the environment {found}" in str(caught.value) or found in str(caught.value)
        assert str(caught.value).endswith("for one process, `unset RANK WORLD_SIZE`")
    assert files(tmp_path) == []
    scores = load(home).evaluate(home / "x.csv")  # which is done by one process always
    assert scores["rows"] == 300


def test_one_process_starts_no_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    """RANK and WORLD_SIZE of something else, and an address that does not exist."""
    joined: list[dict[str, Any]] = []
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: pytest.fail("a rendezvous"))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **group: joined.append(group))
    for said in ({}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        distributed.init_process_group(torch.device("cpu"))
    assert [(group["rank"], group["world_size"]) for group in joined] == [(0, 1)] * 3


def test_processes_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "TIMEOUT", distributed.datetime.timedelta(seconds=1))
    start = time.monotonic()
    with pytest.raises(LauncherError) as caught:
        distributed.init_process_group(torch.device("cpu"))
    assert time.monotonic() - start < 30
    assert str(caught.value).startswith(
        f"the environment announces 4 processes (RANK=1, WORLD_SIZE=4), and they did not meet at 127.0.0.1:{port} in 1 "
        "seconds: start all of them, with torchrun for instance; or, for one process, `unset RANK WORLD_SIZE`. What the"
    )


def test_a_dead_ones_lock_goes_where_nothing_is_done(tmp_path: Path) -> None:
    """As of a command that was killed when all was done: the same one is refused, and so takes no lock."""
    out = tmp_path / "out"
    out.mkdir()
    for path in (tmp_path / ".out.lock", out / ".lock"):
        path.write_text("a dead one")
    refuse_held(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]
    with locked(out):
        assert (tmp_path / ".out.lock").exists()
        refuse_held(out)
        assert (tmp_path / ".out.lock").exists()
