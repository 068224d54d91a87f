"""Trackers of a training: which are told what, what goes on after a kill, and what MLflow would not take."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest

import ctrlib as ctr
from ctrlib import cli
from ctrlib.analysis.runs import load_runs
from ctrlib.data.synthetic import Teacher, generate
from ctrlib.training import loop, trackers
from ctrlib.training.trackers import Mlflow, TensorBoard

CONFIG = {"model": "fm", "embedding_dim": 4, "training": {"batch_size": 256, "max_epochs": 3, "patience": 5}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers") / "data"
    ctr.prepare(generate(Teacher(1_500, cardinalities=(20, 10), seed=1))[0], folder, labels="label", log=None)
    return folder


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple] = []

    def start(self, config):
        self.said.append(("start", config))

    def log(self, values, step):
        self.said.append(("log", values, step))

    def finish(self, result):
        self.said.append(("finish", result))


def test_a_tracker_is_told_of_start_epochs_and_result(data, tmp_path):
    told = Told()
    _, result = ctr.run(data, CONFIG, out=tmp_path, trackers=[told])
    assert [call[0] for call in told.said] == ["start", "log", "log", "log", "finish"]
    assert told.said[0][1]["training"]["max_epochs"] == 3
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [call[1] for call in told.said[1:-1]] == lines
    assert [call[2] for call in told.said[1:-1]] == [1, 2, 3]
    assert told.said[-1][1] == result


def test_a_run_that_goes_on_tells_all_its_epochs(data, tmp_path, monkeypatch):
    first, second = Told(), Told()
    evaluate, calls = loop.evaluate, []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stopped")
        return evaluate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            ctr.run(data, CONFIG, out=tmp_path, trackers=[first])
    assert [call[0] for call in first.said] == ["start", "log", "finish"]
    assert first.said[-1] == ("finish", None)
    (unfinished,) = load_runs([tmp_path])  # which can be looked at meanwhile
    assert not unfinished.is_over
    assert [line["epoch"] for line in unfinished.epochs] == [1]
    ctr.run(data, CONFIG, out=tmp_path, trackers=[second])
    assert [call[2] for call in second.said[1:-1]] == [1, 2, 3]
    assert second.said[1] == first.said[1]


def test_what_a_tracker_cannot_take_is_a_warning_but_for_its_start(data, capsys):
    class Broken(Told):
        def log(self, values, step):
            raise ConnectionError("no answer")

    told = Broken()
    _, result = ctr.run(data, CONFIG, trackers=[told])
    assert capsys.readouterr().err.count("warning: Broken.log failed (ConnectionError: no answer)") == 3
    assert told.said[-1] == ("finish", result)

    class Refusing(Told):
        def start(self, config):
            raise ConnectionError("no server")

    told = Refusing()
    with pytest.raises(ConnectionError, match="no server"):
        ctr.run(data, CONFIG, trackers=[told])
    assert told.said == []  # what did not start is not finished
    with pytest.raises(TypeError, match="a tracker"):
        ctr.run(data, CONFIG, trackers=[print])


# ---------------------------------------------------------------------------------------------------------- MLflow


class Client:
    """`mlflow.MlflowClient` as far as it is used, with MLflow's own refusals."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, SimpleNamespace] = {}

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name):
        self.experiments[name] = str(len(self.experiments))
        return self.experiments[name]

    def create_run(self, experiment_id, run_name=None):
        made = SimpleNamespace(name=run_name, metrics=[], params={}, tags={}, artifacts={}, status="RUNNING")
        self.runs[f"run{len(self.runs)}"] = made
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{len(self.runs) - 1}"))

    def _check(self, key):
        assert all(char.isalnum() or char in "_-. :/" for char in key), f"Invalid name: {key}"

    def log_param(self, run_id, key, value):
        self._check(key)
        assert key not in self.runs[run_id].params, "MLflow refuses to change a parameter"
        self.runs[run_id].params[key] = value

    def log_metric(self, run_id, key, value, timestamp=None, step=None):
        self._check(key)
        assert math.isfinite(value), "MLflow would store 1.8e308"
        self.runs[run_id].metrics.append((key, value, step))

    def set_tag(self, run_id, key, value):
        self._check(key)
        self.runs[run_id].tags[key] = value

    def log_dict(self, run_id, dictionary, artifact_file):
        self.runs[run_id].artifacts[artifact_file] = dictionary

    def set_terminated(self, run_id, status=None):
        self.runs[run_id].status = status

    def get_metric_history(self, run_id, key):
        return [SimpleNamespace(step=step) for name, _, step in self.runs[run_id].metrics if name == key]


def test_mlflow_gets_settings_epochs_and_result(data, tmp_path):
    client = Client()
    _, result = ctr.run(data, CONFIG, out=tmp_path, trackers=[Mlflow("clicks", name="fm", client=client)])
    assert list(client.experiments) == ["clicks"]
    (run,) = client.runs.values()
    assert (run.name, run.status) == ("fm", "FINISHED")
    assert run.params["model"] == "fm"
    assert run.params["training.max_epochs"] == 3
    assert run.artifacts["config.json"]["training"]["max_epochs"] == 3
    of_epochs = [(value, step) for key, value, step in run.metrics if key == "valid_auc" and step < 4]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert of_epochs[:3] == [(line["valid_auc"], line["epoch"]) for line in lines]
    assert ("test_auc", result["test_auc"], 3) in run.metrics


@pytest.mark.parametrize(
    ("name", "value", "metric", "tag"),
    [
        ("test_recall@20", 0.25, ("test_recall_at_20", 0.25), None),
        ("a&b", 1, ("a_b", 1.0), None),
        ("train_loss", math.inf, None, ("train_loss.not_finite", "inf in epoch 1")),
        ("x", -math.inf, None, ("x.not_finite", "-inf in epoch 1")),
        ("auc@10", math.nan, None, ("auc_at_10.not_finite", "nan in epoch 1")),
        ("note", "some words", None, ("note", "some words")),
        ("valid_gauc", None, None, None),
        ("tasks", [1, 2], None, None),
        ("record", {"seed": 2}, ("record.seed", 2.0), None),
    ],
)
def test_mlflow_gets_what_it_takes(name, value, metric, tag):
    client = Client()
    tracker = Mlflow(client=client)
    tracker.start({"model": "fm"})
    tracker.log({"epoch": 1}, 1)
    tracker.finish({name: value})
    (run,) = client.runs.values()
    assert [found[:2] for found in run.metrics] == ([] if metric is None else [metric])
    assert run.tags == ({} if tag is None else dict([tag]))


def test_mlflow_goes_on_in_its_run_and_gets_no_epoch_twice(tmp_path):
    client, keep = Client(), tmp_path / ".mlflow-run"
    tracker = Mlflow(client=client, resume=keep)
    tracker.start({"model": "fm"})
    tracker.log({"epoch": 1, "valid_auc": 0.6}, 1)
    tracker.finish(None)
    assert client.runs["run0"].status == "KILLED"
    again = Mlflow(client=client, resume=keep)
    again.start({"model": "fm"})
    assert client.runs["run0"].status == "RUNNING"
    for step in (1, 2):
        again.log({"epoch": step, "valid_auc": 0.5 + step / 10}, step)
    again.finish({"test_auc": 0.7})
    assert list(client.runs) == ["run0"]
    assert client.runs["run0"].metrics == [("valid_auc", 0.6, 1), ("valid_auc", 0.7, 2), ("test_auc", 0.7, 2)]
    assert client.runs["run0"].status == "FINISHED"
    assert not keep.exists()
    Mlflow(client=client, resume=keep).start({"model": "fm"})
    assert list(client.runs) == ["run0", "run1"]


def test_the_command_logs_to_mlflow(data, tmp_path, monkeypatch, capsys):
    client = Client()
    made = trackers.Mlflow
    monkeypatch.setattr(trackers, "Mlflow", lambda *names, **named: made(*names, client=client, **named))
    call = ["train", str(data), "--model", "fm", "--epochs", "1", "--no-baselines", "--out", str(tmp_path / "m")]
    assert cli.main([*call, "--mlflow", "clicks"]) == 0
    assert [run.name for run in client.runs.values()] == ["m"]
    assert not (tmp_path / "m" / ".mlflow-run").exists()
    assert "mlflow" not in json.loads((tmp_path / "m" / "model.json").read_text())["training"]


# ------------------------------------------------------------------------------------------------------ TensorBoard


def shown_by_tensorboard(folder):
    """What TensorBoard itself reads: name of a scalar -> steps and values; without what it has dropped."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    found = {name: [(one.step, one.value) for one in read.Scalars(name)] for name in read.Tags()["scalars"]}
    return {name: values for name, values in found.items() if values}


def test_tensorboard_shows_the_lines_of_the_log(data, tmp_path):
    pytest.importorskip("tensorboard")
    ctr.run(data, CONFIG, out=tmp_path, tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    found = shown_by_tensorboard(tmp_path)
    assert set(found) == {name for name, value in lines[0].items() if value is not None}
    for name, values in found.items():
        assert values == [(line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines]


def test_tensorboard_shows_no_epoch_twice_when_a_run_goes_on(data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    evaluate, calls = loop.evaluate, []

    def stopped(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stopped")
        return evaluate(*arguments, **named)

    # Event files are read in the order of their names, which have the second and, as text, a number.
    clock = SimpleNamespace(time=itertools.count(1_800_000_000).__next__)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopped)
        with pytest.raises(RuntimeError, match="stopped"):
            ctr.run(data, CONFIG, out=tmp_path, tensorboard=True)
    assert [step for step, _ in shown_by_tensorboard(tmp_path)["valid_auc"]] == [1, 2]
    ctr.run(data, CONFIG, out=tmp_path, tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    expected = [(line["epoch"], pytest.approx(line["valid_auc"], rel=1e-6)) for line in lines]
    assert shown_by_tensorboard(tmp_path)["valid_auc"] == expected
    ctr.run(data, CONFIG, out=tmp_path / "one", tensorboard=True)
    one_epoch = {**CONFIG, "training": {**CONFIG["training"], "max_epochs": 1}}
    ctr.run(data, one_epoch, out=tmp_path / "one", tensorboard=True)  # another run there: nothing is left of the old
    assert [step for step, _ in shown_by_tensorboard(tmp_path / "one")["valid_auc"]] == [1]


def test_tensorboard_takes_what_is_not_finite_and_any_name(tmp_path):
    pytest.importorskip("tensorboard")
    tracker = TensorBoard(tmp_path)
    tracker.start({"model": "fm"})
    said = {"a": math.inf, "b": -math.inf, "c": math.nan, "recall@20": 0.25, "of user&item": 1, "valid_gauc": None}
    tracker.log(said, 1)
    tracker.finish(None)
    found = shown_by_tensorboard(tmp_path)
    assert math.isnan(found.pop("c")[0][1])
    assert found == {name: [(1, value)] for name, value in said.items() if name not in ("c", "valid_gauc")}


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"MLflow is not installed .* pip install 'ctrlib\[mlflow\]'"):
        Mlflow()
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoard is not installed .* pip install 'ctrlib\[tensorboard\]'"):
        TensorBoard(tmp_path)
