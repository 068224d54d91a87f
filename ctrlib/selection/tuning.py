"""A search over settings by Optuna (Akiba et al., KDD 2019, https://arxiv.org/abs/1907.10902), chosen by validation.

Each trial is proposed by its tree-structured Parzen estimator from the trials before, which are all that the proposal
depends on, beside a seed of the trial's own: number and seed of the search are what it is made of. A study that is
taken up with the seed that it was begun with would propose its first points again, and one in a database would hold the
trial that a kill has left at work. So trials.json has the trials that are over, nothing else is kept, and the study is
made of it anew for every trial: one that was killed ends as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console

from ctrlib._lazy import instead
from ctrlib._lock import holding
from ctrlib._target import check_target
from ctrlib.distributed import world_size
from ctrlib.errors import (
    ArgumentError,
    MissingPackageError,
    UnsupportedError,
    check_number,
    check_path,
    check_type,
    check_whole,
)
from ctrlib.making import remove, write_text
from ctrlib.manifest import check_folder, data_hash, load_schema
from ctrlib.models.build import plain
from ctrlib.selection.space import Range, said_by, space_of
from ctrlib.training.config import complete, refuse_another
from ctrlib.training.defaults import config_for
from ctrlib.training.loop import NonFiniteLossError, to_json
from ctrlib.training.progress import Epoch
from ctrlib.training.run import run

By = Literal["auc", "log_loss"]
TRIALS, BEST = "trials.json", "best.json"
ANEW = "trials_anew.json"  # trials of a search that takes the place of an older one when it is over
MINUTES = 10.0
STARTUP = 10  # trials at random, beside those of the defaults, before any is proposed by others
UNPRUNED = 5  # trials before any is stopped early


class _OutOfTimeError(Exception):
    """The minutes are over in the midst of a trial."""


@holding()
def tune(
    data: str | Path,
    models: Sequence[str] | str,
    out: str | Path,
    *,
    trials: int | None = None,
    minutes: float | None = None,
    by: By = "auc",
    seed: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Search the settings of one model or several that validation likes best; test is never looked at.

    The first trial of each model has the settings that the data chooses (docs/defaults.md). The others change learning
    rate, L2 on tables, batch size and width of the embeddings and, where the model has them, hidden layers, dropout,
    number of cross layers and how numbers become fields. A trial whose validation is, from its second epoch on, worse
    than the median of the others was at that epoch is stopped.

    Started again after a kill, it goes on; the trial that it was stopped in begins anew. With `trials` it ends with the
    same trials as if it had not been killed; with `minutes` it has what is left of them.

    The best of many trials looks better on validation than it is. Compare it with the defaults on test by
    `ctr.compare`.

    Args:
        data: a prepared folder with train and valid.
        models: names of published models.
        out: folder for trials.json, all trials, and best.json, the best experiment, as `ctr.run` and
            `ctrlib train --config` take it.
        trials: how many.
        minutes: none begins later, and the one at work is stopped after its epoch, except for the very first. 10, if
            `trials` is not said either.
        by: the validation metric that tells which trial is best. Which epoch of a trial counts, its own training says.
        seed: of the search, and of each training.
        overwrite: replace an older search, which stays until this one is over.
        log: is called with a line for each trial.

    Returns:
        "best", the best trial; "trials", each with number, model, parameters, state ("complete", "pruned",
        "out of time" or "failed"), value, epochs (the metric after each), and seconds; "config", the best experiment.

    Raises:
        ValueError: an argument does not fit, or `out` holds another search.
        TargetError: `out` is the data, or a folder of another kind.
        LockedError: somebody else writes into `out`; the message says who.
        MissingPackageError: Optuna is not installed.
    """
    check_path("a prepared folder", data=data)
    check_path("a folder", out=out)
    check_type("a name or a list of names", (str, Sequence), models=models)
    names = [models] if isinstance(models, str) else list(dict.fromkeys(models))
    if not names:
        raise ArgumentError("models is empty: expected a name such as 'dcnv2', or several")
    if trials is not None:
        check_whole(1, trials=trials)
    elif minutes is None:
        minutes = MINUTES
    if minutes is not None:
        check_number(0, above=True, minutes=minutes)
    check_whole(0, seed=seed)
    if by not in get_args(By):
        raise ArgumentError(f"unknown by {by!r}; {instead([str(by)], get_args(By))}")
    if world_size() > 1:
        raise UnsupportedError("a search trains one trial after the other in one process: start it without torchrun")
    _optuna()
    check_target(out, "tuning", inputs=[data], overwrite=overwrite)
    data, out = Path(data), Path(out)
    check_folder(data)
    starts = {name: config_for(data, name, seed=seed) for name in names}
    hashes = load_schema(data).hash, data_hash(data)
    identity = plain({"models": names, "by": by, "seed": seed, "data": hashes[0], "rows": hashes[1]})
    out.mkdir(parents=True, exist_ok=True)
    path = out / (ANEW if (out / BEST).is_file() else TRIALS)
    found = _begin(path, identity)
    search = _Search(data, starts, by, seed, found)
    while (trials is None or len(found) < trials) and (minutes is None or not found or search.spent() < 60 * minutes):
        line = search.next(None if minutes is None or not found else 60 * minutes - search.spent())
        found.append(line)
        write_text(path, to_json({"identity": identity, "trials": found}, indent=1) + "\n")
        if log is not None:
            log(search.told(line, trials, minutes))
    best = search.best()
    if best is None:
        raise ArgumentError(
            f"no trial of {out} came to an end with a number; {path.name} there says what each did: give it more time, "
            "or look whether the data can be trained on by `ctrlib train`"
        )
    config = search.config_of(best["parameters"], complete_it=True)
    write_text(out / BEST, json.dumps(config, indent=1) + "\n")
    if path.name == ANEW:  # killed before this, it finds all trials there, and comes by here again
        write_text(out / TRIALS, path.read_text(encoding="utf-8"))
        remove(path)
    return {"data": str(data), **identity, "best": best, "trials": found, "config": config}


def _begin(path: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials of this very search that are over."""
    if not path.is_file():
        return []
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        saved, found = dict(said["identity"]), list(said["trials"])
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"{path} is damaged ({error}): delete {path.parent} to begin anew") from error
    refuse_another(saved, identity, f"{path.parent} holds an unfinished search, and that is another one")
    return found


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingPackageError(f"Optuna is not installed ({error}): pip install 'ctrlib[tune]'") from error
    return optuna


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


class _Search:
    """Trials one after the other: each is proposed by those before, and by nothing else."""

    def __init__(
        self, data: Path, starts: Mapping[str, dict[str, Any]], by: By, seed: int, found: list[dict[str, Any]]
    ) -> None:
        self.data, self.by, self.seed, self.found = data, by, seed, found
        self.optuna = _optuna()
        self.names = list(starts)
        spaces = {name: space_of(config) for name, config in starts.items()}
        self.ranges = {name: ranges for name, (ranges, _) in spaces.items()}
        self.first = {name: first for name, (_, first) in spaces.items()}

    def spent(self) -> float:
        """Seconds in all trials."""
        return sum(float(line["seconds"]) for line in self.found)

    def next(self, seconds: float | None) -> dict[str, Any]:
        """Propose a trial and train it, for so many seconds."""
        started = time.perf_counter()
        number = len(self.found)
        with _quiet(self.optuna):
            study = self._study()
            if number < len(self.names):
                name = self.names[number]
                study.enqueue_trial({"model": name, **self.first[name]})
            trial = study.ask()
            parameters = self._proposed(trial)
        epochs: dict[str, float] = {}

        def on_epoch(line: Epoch) -> None:
            value = line.valid_auc if self.by == "auc" else line.valid_log_loss
            epochs[str(line.epoch)] = value
            trial.report(value, line.epoch)
            if seconds is not None and time.perf_counter() - started > seconds:
                raise _OutOfTimeError
            if trial.should_prune():
                raise self.optuna.TrialPruned

        said: dict[str, Any] = {"number": number, "model": parameters["model"], "parameters": parameters}
        try:
            config = self.config_of(parameters)
            _, result = run(self.data, config, score_test=False, on_epoch=on_epoch, console=Console(quiet=True))
            value = result["valid_auc" if self.by == "auc" else "valid_logloss"]
            if not np.isfinite(value):
                raise NonFiniteLossError(f"validation gives {value}")
            said |= {"state": "complete", "value": value, "best_epoch": result["best_epoch"]}
        except self.optuna.TrialPruned:
            said |= {"state": "pruned", "value": None}
        except _OutOfTimeError:
            said |= {"state": "out of time", "value": None}
        except (NonFiniteLossError, ArgumentError) as error:  # the latter: settings that do not go together
            if number < len(self.names):
                raise
            said |= {"state": "failed", "value": None, "why": str(error)}
        return {**said, "epochs": epochs, "seconds": round(time.perf_counter() - started, 2)}

    def config_of(self, parameters: Mapping[str, Any], *, complete_it: bool = False) -> dict[str, Any]:
        """The experiment of a trial; a killed trial begins anew, so that it needs no checkpoints while it is tried."""
        said = said_by(parameters)
        if complete_it:
            return complete(config_for(self.data, parameters["model"], said, seed=self.seed))
        said["training"]["checkpoint_seconds"] = None
        return config_for(self.data, parameters["model"], said, seed=self.seed)

    def best(self) -> dict[str, Any] | None:
        """The best trial that was trained to its end; of equal ones the first."""
        whole = [line for line in self.found if line["state"] == "complete" and line["value"] is not None]
        sign = -1 if self.by == "auc" else 1
        return min(whole, key=lambda line: sign * float(line["value"])) if whole else None

    def told(self, line: Mapping[str, Any], trials: int | None, minutes: float | None) -> str:
        """A line for people."""
        metric = "AUC" if self.by == "auc" else "log-loss"
        best = self.best()
        what = line["state"] if line["value"] is None else f"validation {metric} {line['value']:.5f}"
        so_far = "" if best is None else f"; best {best['value']:.5f} (trial {best['number']})"
        of = "" if trials is None else f" of {trials}"
        spent = f"{self.spent() / 60:.1f}" + ("" if minutes is None else f" of {minutes:g}") + " min"
        shown = ", ".join(
            f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in line["parameters"].items()
            if name != "model"
        )
        return f"trial {line['number']}{of}, {line['model']}: {what}{so_far}; {spent}; {shown}"

    def _study(self) -> Any:
        """All trials so far, and a sampler that is this trial's own."""
        optuna, number = self.optuna, len(self.found)
        own = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        study = optuna.create_study(
            direction="maximize" if self.by == "auc" else "minimize",
            sampler=optuna.samplers.TPESampler(seed=own, n_startup_trials=STARTUP + len(self.names)),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=2),
        )
        states = optuna.trial.TrialState
        for line in self.found:
            epochs = {int(epoch): value for epoch, value in line["epochs"].items() if value is not None}
            state = {"complete": states.COMPLETE, "failed": states.FAIL}.get(line["state"], states.PRUNED)
            ranges = self._ranges_of(line["model"])
            study.add_trial(
                optuna.trial.create_trial(
                    state=state,
                    value=line["value"] if state == states.COMPLETE else None,
                    params={name: line["parameters"][name] for name in ranges},
                    distributions={name: self._distribution(one) for name, one in ranges.items()},
                    intermediate_values=epochs,
                )
            )
        return study

    def _ranges_of(self, name: str) -> dict[str, Range]:
        return {"model": ("one of", *self.names), **self.ranges[name]}

    def _proposed(self, trial: Any) -> dict[str, Any]:
        name = trial.suggest_categorical("model", self.names)
        found = {"model": name}
        for entry, one in self.ranges[name].items():
            kind, *limits = one
            if kind == "one of":
                found[entry] = trial.suggest_categorical(entry, limits)
            elif kind == "whole":
                found[entry] = trial.suggest_int(entry, *limits)
            else:
                found[entry] = trial.suggest_float(entry, *limits, log=kind == "log")
        return found

    def _distribution(self, one: Range) -> Any:
        kind, *limits = one
        distributions = self.optuna.distributions
        if kind == "one of":
            return distributions.CategoricalDistribution(limits)
        if kind == "whole":
            return distributions.IntDistribution(*limits)
        return distributions.FloatDistribution(*limits, log=kind == "log")
