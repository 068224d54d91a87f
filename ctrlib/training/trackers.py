"""Where a training is followed: anything with three methods, and those of ctrlib: JSON lines, TensorBoard and MLflow.

A tracker of your own needs no base class:

    class Printed:
        def start(self, config): print("begins", config["model"])
        def log(self, values, step): print(step, values["valid_auc"])
        def finish(self, result): print("over" if result else "stopped")

    ctr.run(data, config, trackers=[Printed()])
"""

from __future__ import annotations

import functools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from ctrlib._json import to_json
from ctrlib.errors import ArgumentError, MissingPackageError, check_has
from ctrlib.making import remove, write_text

P = ParamSpec("P")
M = TypeVar("M")
R = TypeVar("R", bound=Mapping[str, Any])


class Tracker(Protocol):
    """What is told of a training; of several processes, the first one's."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Before the first step: the experiment, as plain data. A run that goes on after a kill starts again."""
        ...

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """After an epoch, counted from 1: a line of log.jsonl. A run that goes on logs all its epochs again first."""
        ...

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """In the end: the result, or None where the training was stopped or failed."""
        ...


class JsonLines:
    """A line of JSON for each epoch, in a file that is whole whenever it is looked at.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
    >>> tracker = JsonLines(path)
    >>> tracker.log({"epoch": 1, "valid_auc": 0.75}, 1)
    >>> path.read_text()
    '{"epoch": 1, "valid_auc": 0.75}\\n'
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def start(self, config: Mapping[str, Any]) -> None:
        """Another run's file stays until there is something to say."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """As `Tracker`."""
        self._lines.append(to_json(dict(values)) + "\n")
        write_text(self._path, "".join(self._lines))

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """As `Tracker`; the file is whole already."""


class TensorBoard:
    """Event files in a folder, a scalar for each number of each epoch; needs the extra `ctrlib[tensorboard]`.

    Raises:
        MissingPackageError: it is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingPackageError(
                f"TensorBoard is not installed ({error}): pip install 'ctrlib[tensorboard]'"
            ) from error
        self._events = SummaryWriter(str(folder), purge_step=1)  # a run that goes on writes its epochs again

    def start(self, config: Mapping[str, Any]) -> None:
        """As `Tracker`."""

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """As `Tracker`."""
        for name, value in values.items():
            if value is not None:
                self._events.add_scalar(name, value, step)
        self._events.flush()  # for whoever watches

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """As `Tracker`."""
        self._events.close()


class Mlflow:
    """A run of an MLflow experiment: settings as parameters, epochs and results as metrics; needs `ctrlib[mlflow]`.

    MLflow stores an infinite number as 1.8e308 and refuses names such as `auc@10`. So what is not finite becomes a tag
    that says so, and `@` is spelt `_at_`. Only numbers, texts and truth values of the experiment are parameters; all of
    it is the artifact config.json. A training that goes on after a kill goes on in its run, and logs no epoch twice.

    Args:
        experiment: its name; made if it is new.
        name: of the run.
        uri: of the tracking server; by default what the environment variable MLFLOW_TRACKING_URI says.
        resume: file that holds the id of the run while it lasts.
        client: in the place of `mlflow.MlflowClient(uri)`.

    Raises:
        MissingPackageError: MLflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "ctrlib",
        *,
        name: str | None = None,
        uri: str | None = None,
        resume: str | Path | None = None,
        client: Any = None,
    ) -> None:
        if client is None:
            try:
                import mlflow
            except ImportError as error:
                raise MissingPackageError(f"MLflow is not installed ({error}): pip install 'ctrlib[mlflow]'") from error
            client = mlflow.MlflowClient(tracking_uri=uri)
        self._client, self._experiment, self._name = client, experiment, name
        self._resume = None if resume is None else Path(resume)
        self._run = ""
        self._logged = 0  # the last epoch that the run has

    def start(self, config: Mapping[str, Any]) -> None:
        """As `Tracker`."""
        if self._resume is not None and self._resume.is_file():
            self._run = self._resume.read_text(encoding="utf-8").strip()
            steps = [one.step for one in self._client.get_metric_history(self._run, "valid_auc")]
            self._logged = max(steps, default=0)
            self._client.set_terminated(self._run, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(self._experiment)
        number = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        self._run = self._client.create_run(number, run_name=self._name).info.run_id
        if self._resume is not None:
            write_text(self._resume, self._run + "\n")
        for key, value in _flat(config):
            self._client.log_param(self._run, _spelt(key), value)
        self._client.log_dict(self._run, dict(config), "config.json")

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """As `Tracker`."""
        if step <= self._logged:
            return
        for key, value in _flat({key: value for key, value in values.items() if key != "epoch"}):
            self._number(key, value, step)
        self._logged = step

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """As `Tracker`."""
        for key, value in _flat(result or {}):
            self._number(key, value, self._logged)
        self._client.set_terminated(self._run, status="KILLED" if result is None else "FINISHED")
        if result is not None and self._resume is not None:
            remove(self._resume)

    def _number(self, key: str, value: Any, step: int) -> None:
        if isinstance(value, str | bool):
            self._client.set_tag(self._run, _spelt(key), value)
        elif not math.isfinite(value):
            self._client.set_tag(self._run, f"{_spelt(key)}.not_finite", f"{value} in epoch {step}")
        else:
            self._client.log_metric(self._run, _spelt(key), float(value), timestamp=int(1000 * time.time()), step=step)


def _spelt(name: str) -> str:
    """A name as MLflow takes it.

    >>> _spelt("test_recall@20"), _spelt("crosses.user&item")
    ('test_recall_at_20', 'crosses.user_item')
    """
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers, texts and truth values, those of inner dictionaries by names with dots; lists and None are left out.

    >>> dict(_flat({"model": "fm", "training": {"seed": 1, "plan": None}, "hidden": [8, 8]}))
    {'model': 'fm', 'training.seed': 1}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif isinstance(value, str | bool | int | float):
            yield f"{before}{key}", value


def trackers_of(out: Path | None, tensorboard: bool) -> list[Tracker]:
    """Those that a folder for the log has by itself.

    Raises:
        ArgumentError: there is no folder for event files.
    """
    if tensorboard and out is None:
        raise ArgumentError("tensorboard=True needs out=, the folder for the event files")
    found: list[Tracker] = [] if out is None else [JsonLines(out / "log.jsonl")]
    return [*found, *([TensorBoard(out)] if tensorboard and out is not None else [])]


class _Followed:
    """A tracker, and whether it was started; what it cannot take later is a warning."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker, self._started = tracker, False

    def start(self, config: Mapping[str, Any]) -> None:
        self._tracker.start(config)
        self._started = True

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self._try("log", values, step)

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if self._started:
            self._try("finish", result)

    def _try(self, method: str, *arguments: Any) -> None:
        """A server that does not answer for a minute must not cost the work of hours, which log.jsonl has as well."""
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            said = f"warning: {type(self._tracker).__name__}.{method} failed ({type(error).__name__}: {error})"
            print(said, file=sys.stderr)


def finishing(when: Callable[[], bool]) -> Callable[[Callable[P, tuple[M, R]]], Callable[P, tuple[M, R]]]:
    """For a function that takes `trackers` and starts them: they are finished with its result, or with None.

    `when` says whether this process has trackers at all: of several, one has.
    """

    def wrap(function: Callable[P, tuple[M, R]]) -> Callable[P, tuple[M, R]]:
        @functools.wraps(function)
        def wrapped(*arguments: P.args, **named: P.kwargs) -> tuple[M, R]:
            given: Any = named.get("trackers", ())
            for tracker in given:
                check_has("a tracker", ("start", "log", "finish"), trackers=tracker)
            followed = [_Followed(tracker) for tracker in given] if when() else []
            named["trackers"] = followed
            result: R | None = None
            try:
                model, result = function(*arguments, **named)
            finally:
                for tracker in followed:
                    tracker.finish(result)
            return model, result

        return wrapped

    return wrap
