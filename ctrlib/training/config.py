"""An experiment as one dictionary of plain data, and what of it may change when it goes on.

    {"model": "dcnv2", "embedding_dim": 16, "hidden": [64], "training": {"batch_size": 512, "seed": 1}}

Beside `training` stand the model's name, its arguments and those of `Inputs` (`ctrlib.models.build`). The command line
makes this dictionary, `ctrlib.run` takes it, model.json holds it, and checkpoints hold it to know their run again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args

from ctrlib._lazy import instead
from ctrlib.errors import ArgumentError, WrongTypeError, check_number, check_type, check_whole
from ctrlib.models.build import complete as complete_model
from ctrlib.models.build import plain

EngineName = Literal["exact", "fused"]
Precision = Literal["fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda"]
SelectBy = Literal["auc", "log_loss", "gauc"]
SHOWN = 100  # characters of a value in a message

# All that may differ when a run or a search goes on, beside the number of processes. They decide where it is computed
# and how long it lasts, not what is computed.
MAY_CHANGE = ("max_epochs", "workers", "device", "sharding", "plan", "checkpoint_seconds")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained: the entries of `training`, with their defaults.

    Raises:
        ValueError: a value is out of range.
        TypeError: a value is of another kind.

    >>> Training(seed=3).batch_size
    4096
    """

    engine: EngineName = "exact"
    """exact is dense Adam, fused row-wise Adagrad through TorchRec."""
    batch_size: int = 4096
    """Rows per step, over all processes."""
    learning_rate: float = 1e-3
    """Adam's step, per update of a weight."""
    embedding_l2: float = 0.0
    """Penalty on whole tables (exact engine)."""
    network_l2: float = 0.0
    """Penalty on all other weights, biases included."""
    average_weights: bool = False
    """Whether a moving average of the weights is scored and kept, rather than the last ones (exact engine)."""
    embedding_learning_rate: float = 0.02
    """Row-wise Adagrad's step (fused engine)."""
    precision: Precision = "fp32"
    """Arithmetic of tower and head."""
    patience: int = 2
    """Passes without a better validation score before training stops."""
    keep_negatives: float = 1.0
    """Share of train's rows without a click that is trained on; logits are those of all rows (one label)."""
    calibrate: bool = False
    """Whether slope and intercept of the logits are fitted on validation in the end."""
    select_by: SelectBy = "auc"
    """The validation score that chooses the epoch: AUC, log-loss, or GAUC (of several labels their mean)."""
    min_delta: float = 1e-6
    """Smallest improvement of that score that counts."""
    cut_factor: float = 0.1
    """Factor of the learning rates after a pass without a better score."""
    start_at_base_rate: bool = False
    """Whether the head's biases start at the labels' rates in train, rather than at a probability of one half."""
    seed: int = 0
    """Of initial weights, the order of rows and dropout."""
    warm_start: str | None = None
    """Model folder to start from."""
    max_epochs: int = 100
    """Passes over train at most."""
    workers: int = 1
    """Threads that prepare batches."""
    device: Device = "auto"
    """Where to compute; auto is a GPU if there is one."""
    sharding: str | Mapping[str, str] = "auto"
    """How the fused engine spreads tables over processes."""
    plan: str | None = None
    """File that says it instead."""
    checkpoint_seconds: float | None = 300.0
    """Seconds of work that a kill may cost; None for no checkpoints."""

    def __post_init__(self) -> None:
        check_whole(1, batch_size=self.batch_size)
        check_whole(0, seed=self.seed, workers=self.workers)
        check_number(0, learning_rate=self.learning_rate, embedding_learning_rate=self.embedding_learning_rate)
        check_number(0, embedding_l2=self.embedding_l2, network_l2=self.network_l2)
        check_number(0, keep_negatives=self.keep_negatives)
        if not 0 < self.keep_negatives <= 1:
            raise ArgumentError(
                f"keep_negatives must be above 0 and at most 1, got {self.keep_negatives}: 0.1 keeps one of ten"
            )
        check_type("True or False", bool, calibrate=self.calibrate, average_weights=self.average_weights)
        check_schedule(self.max_epochs, self.patience, self.select_by, self.min_delta, self.cut_factor)
        check_type("True or False", bool, start_at_base_rate=self.start_at_base_rate)
        if self.checkpoint_seconds is not None:
            check_number(0, checkpoint_seconds=self.checkpoint_seconds)
        check_type("a text", str, engine=self.engine, precision=self.precision, device=self.device)
        check_type("a text or None", (str, NoneType), warm_start=self.warm_start, plan=self.plan)
        check_type("a text, or one for each table", (str, Mapping), sharding=self.sharding)


def check_schedule(max_epochs: int, patience: int, select_by: str, min_delta: float, cut_factor: float) -> None:
    """Refuse a schedule by which nothing would be trained, or no epoch be chosen.

    Raises:
        ArgumentError, WrongTypeError: as said.
    """
    check_whole(1, max_epochs=max_epochs, patience=patience)
    check_type("a text", str, select_by=select_by)
    if select_by not in get_args(SelectBy):
        raise ArgumentError(f"unknown select_by {select_by!r}; {instead([select_by], get_args(SelectBy))}")
    check_number(0, min_delta=min_delta, cut_factor=cut_factor)
    if cut_factor > 1:
        raise ArgumentError(f"cut_factor must be at most 1, got {cut_factor}: it makes learning rates smaller")


def training_of(config: Mapping[str, Any]) -> Training:
    """How an experiment is trained, what it leaves out at its default.

    Raises:
        ValueError: `training` has an entry that there is not, or a value of another kind.

    >>> training_of({"model": "fm", "training": {"seed": 1}}).seed
    1
    """
    given = config.get("training", {})
    names = [field.name for field in dataclasses.fields(Training)]
    if not isinstance(given, Mapping):
        raise WrongTypeError(f"training is {given!r}, expected a dictionary with some of {names}")
    if unknown := sorted(set(given) - set(names)):
        raise ArgumentError(f"training has no {unknown}; {instead(unknown, names)}")
    return Training(**given)


def complete(config: Mapping[str, Any], *, modules: Sequence[str] = ()) -> dict[str, Any]:
    """The experiment with every argument at its value: defaults are filled in, of the model and of the training.

    The calibrator of a run that was, which model.json holds, is left out: each run fits its own.

    Raises:
        ValueError: an entry is unknown or no plain data, or there is no such model.

    >>> complete({"model": "fm"})["training"]["patience"]
    2
    """
    training = dataclasses.asdict(training_of(config))
    without = {name: value for name, value in config.items() if name != "calibration"}
    return {**complete_model({**without, "training": {}}, modules=modules), "training": plain(training)}


def name_of(config: Mapping[str, Any]) -> str:
    """A short name of a config's model, for people and for folders.

    >>> name_of({"model": "dcnv2"}), name_of({"model": {"class": "ctrlib.Model"}})
    ('dcnv2', 'Model')
    """
    model = config["model"]
    return model if isinstance(model, str) else str(model.get("class")).rpartition(".")[2]


def counted_anew(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without what counting its crosses on some data has made of it: they are counted again.

    >>> counted_anew({"model": "fm", "crosses": [["user", "item"]], "replaced": {"embedding.tables": {}}})
    {'model': 'fm', 'crosses': [['user', 'item']]}
    """
    return {name: value for name, value in config.items() if name != "replaced" or not config.get("crosses")}


def identity_of(config: Mapping[str, Any], data: str, rows: str) -> dict[str, Any]:
    """What of a complete experiment must be the same where it goes on: all but `MAY_CHANGE`, and the data.

    A calibrator is what comes out of it.

    `data` is the hash of the schema, `rows` that of the rows (`Loader.data_hash`).
    """
    training = {name: value for name, value in config["training"].items() if name not in MAY_CHANGE}
    described = {name: value for name, value in config.items() if name != "calibration"}
    return {**described, "training": training, "data": data, "rows": rows}


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Which entries of two dictionaries differ, in words; entries of inner ones have a dot in their names.

    >>> differences({"num_heads": 2, "training": {"seed": 0}}, {"num_heads": 4, "training": {"seed": 0}})
    ['num_heads was 2, is now 4']
    """
    return list(_differences(saved, now, path))


def _differences(saved: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in {**saved, **now}:
            inner = f"{path}.{name}" if path else str(name)
            if name not in saved:
                yield f"{inner} was not said, is now {_shown(now[name])}"
            elif name not in now:
                yield f"{inner} was {_shown(saved[name])}, is now not said"
            else:
                yield from _differences(saved[name], now[name], inner)
    elif _same(saved, now):
        return
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now) and len(repr(saved)) > SHOWN:
        for place, (one, other) in enumerate(zip(saved, now, strict=True)):
            yield from _differences(one, other, f"{path}[{place}]")
    else:
        yield f"{path} was {_shown(saved)}, is now {_shown(now)}"


def _same(saved: Any, now: Any) -> bool:
    return bool(saved == now) or (saved != saved and now != now)  # NaN is NaN, here


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 4 :]}"


def refuse_another(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """Refuse to go on with what another experiment left.

    Args:
        saved: its identity.
        now: that of the experiment at hand.
        what: names what was left, and where: "the checkpoints in runs/a are of another run".

    Raises:
        ValueError: naming each setting that differs.
    """
    if differing := differences(plain(saved), plain(now)):
        may = f"{', '.join(MAY_CHANGE)} and the number of processes"
        raise ArgumentError(
            f"{what}: {'; '.join(differing)}. Start with the same settings to go on (only {may} may change), or give "
            "another folder (or delete this one) to start anew"
        )
