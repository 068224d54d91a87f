"""Files and folders in S3: a server of its own on loopback, which fails now and then as real ones do."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ctrlib as ctr
from ctrlib import remote
from ctrlib.cli import main
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.errors import ArgumentError, MissingPackageError
from ctrlib.remote import RemoteError, fetch, publish
from ctrlib.training import loop

CLICKS = Teacher(1_200, cardinalities=(20, 8), num_numeric=1, seed=3)


class Store:
    """A server, and what was asked of it."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.requests: list[tuple[str, str]] = []
        self.broken: Callable[[str, str], bool] = lambda method, path: False
        app = DomainDispatcherApplication(create_backend_app)

        def answer(environment: dict[str, Any], start: Any) -> Any:
            method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
            self.requests.append((method, path))
            if self.broken(method, path):
                environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
            return app(environment, start)

        self.server = make_server("127.0.0.1", 0, answer, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def written(self) -> list[str]:
        """Keys that were written, in that order, with a minus those that were deleted."""
        marks = {"PUT": "", "DELETE": "-"}
        return [marks[method] + path.partition("/bucket/")[2] for method, path in self.requests if method in marks]


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    store = Store()
    yield store
    store.server.shutdown()


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """With an empty bucket, and a cache that is empty, too."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "CTRLIB_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    server.broken = lambda method, path: False
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    if files.exists("bucket"):
        files.rm("bucket", recursive=True)
    files.mkdir("bucket")
    server.requests.clear()
    return server


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("raw") / "clicks.csv"
    generate(CLICKS)[0].write_csv(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def test_raw_rows_to_scores_with_every_path_in_s3(
    store: Store, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same files as on a disk; then everything once more on a machine that has none of them."""
    publish(raw, "s3://bucket/raw/clicks.csv")
    settings = "--epochs 2 --hidden 4 --dim 4 --batch-size 256 --no-baselines".split()
    for name, data, out in (("s3", "s3://bucket/raw/clicks.csv", "s3://bucket/"), ("disk", str(raw), f"{tmp_path}/")):
        assert main(["prepare", data, "--label", "label", "--out", f"{out}data"]) == 0, name
        assert main(["train", f"{out}data", *settings, f"--out={out}runs/a"]) == 0, name
        assert main(["predict", f"{out}runs/a", data, "--out", f"{out}scores.csv"]) == 0, name
    said = capsys.readouterr().err
    assert re.search(r"s3://bucket/data: \d+ files written", said) and "s3://bucket/scores.csv: 1 file written" in said
    assert contents(fetch("s3://bucket/data", cache=tmp_path / "other")) == contents(tmp_path / "data")
    assert (
        fetch("s3://bucket/scores.csv", cache=tmp_path / "other").read_bytes() == (tmp_path / "scores.csv").read_bytes()
    )
    model = fetch("s3://bucket/runs/a", cache=tmp_path / "other")
    assert model.joinpath("model.safetensors").read_bytes() == (tmp_path / "runs/a/model.safetensors").read_bytes()
    ctr.Predictor.load(model)


def test_only_what_has_changed_is_copied(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("1")
    (folder / "deep/b.txt").write_text("2")
    (folder / "MANIFEST").write_text("whole")
    publish(folder, "s3://bucket/f")
    assert store.written() == ["f/deep/b.txt", "f/a.txt", "f/MANIFEST"]
    copy = fetch("s3://bucket/f")
    assert contents(copy) == contents(folder)
    store.requests.clear()
    assert fetch("s3://bucket/f") == copy and not any(path.startswith("/bucket/f/") for _, path in store.requests)
    (folder / "a.txt").write_text("3")  # as long as before
    publish(folder, "s3://bucket/f")
    said: list[str] = []
    assert contents(fetch("s3://bucket/f", log=said.append)) == contents(folder)
    assert len(said) == 1


def test_a_folder_that_is_written_again_is_never_half_of_each(
    store: Store, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its MANIFEST goes first and comes last, and a file that it has no more is deleted."""
    publish(raw, "s3://bucket/clicks.csv")
    prepare = ["prepare", "s3://bucket/clicks.csv", "--label", "label", "--out", "s3://bucket/data"]
    assert main(prepare) == 0
    assert main(prepare) == 1
    assert "is a prepared folder already" in capsys.readouterr().err
    store.requests.clear()
    assert main([*prepare, "--ignore", "C1", "--overwrite"]) == 0
    written = store.written()
    assert written[0] == "-data/MANIFEST" and "data/MANIFEST" in written
    assert written.index("data/MANIFEST") > max(
        written.index(name) for name in written if name.startswith("data/train")
    )
    gone = [name for name in written if name.startswith("-") and "C1" in name]
    assert gone and written.index(gone[0]) > written.index("data/MANIFEST")


def test_what_fails_for_a_moment_is_tried_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("here")
    failures = {("PUT", "/bucket/a.txt"): 2, ("GET", "/bucket/a.txt"): 2}

    def broken(method: str, path: str) -> bool:
        failures[method, path] = failures.get((method, path), 0) - 1
        return failures[method, path] >= 0

    store.broken = broken
    publish(path, "s3://bucket/a.txt")
    assert fetch("s3://bucket/a.txt").read_text() == "here"
    assert failures["PUT", "/bucket/a.txt"] == failures["GET", "/bucket/a.txt"] == -1


class Killed(BaseException):
    """As when the machine is gone: nothing is published after it."""


def test_a_killed_run_goes_on_from_the_checkpoints_in_s3(
    store: Store, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a machine that never saw the run: those that were published while it ran, since the kill left no time."""
    publish(raw, "s3://bucket/clicks.csv")
    assert main(["prepare", "s3://bucket/clicks.csv", "--label", "label", "--out", "s3://bucket/data"]) == 0
    train = "train s3://bucket/data --epochs 4 --patience 4 --hidden 4 --dim 4 --batch-size 256 --no-baselines".split()
    assert main([*train, "--out", "s3://bucket/whole"]) == 0
    expected = contents(fetch("s3://bucket/whole"))
    evaluate, epochs = loop.evaluate, []

    def killed_in_the_third(*arguments: Any, **named: Any) -> Any:
        epochs.append(1)
        if len(epochs) < 3:
            return evaluate(*arguments, **named)
        deadline = time.monotonic() + 60
        while "killed/checkpoints/LATEST" not in store.written():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        patch.setattr(remote._Copy, "push", lambda self: 0)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(remote, "SECONDS", 0.01)
        patch.setattr(loop, "evaluate", killed_in_the_third)
        main([*train, "--out", "s3://bucket/killed"])
    monkeypatch.setenv("CTRLIB_CACHE", str(tmp_path / "elsewhere"))
    capsys.readouterr()
    assert main([*train, "--out", "s3://bucket/killed"]) == 0
    assert "goes on after step" in capsys.readouterr().err
    again = contents(fetch("s3://bucket/killed"))
    assert again.keys() == expected.keys()
    assert again["model.safetensors"] == expected["model.safetensors"]


def test_latest_names_a_checkpoint_that_is_there(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a newer one is made, and an older one removed, while they are published."""
    folder = tmp_path / "run/checkpoints"
    for step in ("step-1", "step-2"):
        (folder / step).mkdir(parents=True)
        (folder / step / "MANIFEST").write_text(step)
        (folder / step / "tensors").write_text(step)
    (folder / "LATEST").write_text("step-2")
    copy = remote._Copy("s3://bucket/run", tmp_path / "run")
    put = remote._Copy._put

    def put_while_training(self: remote._Copy, name: str, path: Path) -> None:
        put(self, name, path)
        if name.endswith("step-1/MANIFEST"):
            (folder / "step-2").rename(folder / "step-3")
            (folder / "LATEST").write_text("step-3")

    with monkeypatch.context() as patch:
        patch.setattr(remote._Copy, "_put", put_while_training)
        copy.push_checkpoints()
    assert "run/checkpoints/LATEST" not in store.written()
    copy.push_checkpoints()
    found = contents(fetch("s3://bucket/run", cache=tmp_path / "other") / "checkpoints")
    assert found == contents(folder) and found["LATEST"] == b"step-3"


def test_what_was_not_published_is_neither_lost_nor_used(store: Store, raw: Path, tmp_path: Path) -> None:
    publish(raw, "s3://bucket/clicks.csv")
    copy = fetch("s3://bucket/clicks.csv")
    copy.write_text("label\n1\n")
    with pytest.raises(RemoteError, match=r"clicks\.csv.* holds what is not published.*move it away, or publish it"):
        fetch("s3://bucket/clicks.csv")
    assert copy.read_text() == "label\n1\n"
    copy.unlink()
    assert fetch("s3://bucket/clicks.csv").read_bytes() == raw.read_bytes()


def test_results_that_cannot_be_published_stay_and_are_published_by_the_next_command(
    store: Store, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(raw, "s3://bucket/clicks.csv")
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    store.broken = lambda method, path: method == "PUT"
    prepare = ["prepare", "s3://bucket/clicks.csv", "--label", "label", "--out", "s3://bucket/data"]
    assert main(prepare) == 1
    said = capsys.readouterr().err
    assert "s3://bucket/data: " in said and "what was to be published is in" in said
    store.broken = lambda method, path: False
    assert main(prepare) == 1  # for it is there already, on this machine
    assert "is a prepared folder already" in capsys.readouterr().err
    assert "data/MANIFEST" in store.written()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "s3://bucket/nothing", "--out", "x"], "s3://bucket/nothing: there is nothing there"),
        (["train", "s3://nowhere/data", "--out", "x"], "s3://nowhere/data: there is nothing there"),
        (["train", "s3://bucket", "--out", "x"], "s3://bucket: expected s3://BUCKET/PATH"),
        (["train", "s3:///data", "--out", "x"], "s3:///data: expected s3://BUCKET/PATH"),
        (["train", "gs://bucket/data", "--out", "x"], "gs:/bucket/data"),
    ],
)
def test_what_is_not_there_is_named(
    store: Store, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


def test_names_that_lead_out_of_the_folder_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of = remote._Copy._store

    def listing(self: remote._Copy) -> Any:
        files = store_of(self)
        monkeypatch.setattr(files, "find", lambda key, detail: {f"{key}/../../x": {"size": 1, "ETag": "1"}})
        return files

    monkeypatch.setattr(remote._Copy, "_store", listing)
    with pytest.raises(RemoteError, match=r"'\.\./\.\./x' would lie outside of the folder"):
        fetch("s3://bucket/folder")


def test_what_is_missing_here_is_named(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="nowhere does not exist: expected a file or a folder to copy"):
        publish(tmp_path / "nowhere", "s3://bucket/x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'ctrlib\[s3\]'"):
            fetch("s3://bucket/x")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ArgumentError, match="several processes do not fetch"),
        remote.staged(["s3://bucket/x"], log=print),
    ):
        raise AssertionError
