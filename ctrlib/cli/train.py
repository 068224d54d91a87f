"""`ctrlib train`: from a prepared folder to a model folder."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from ctrlib._target import target
from ctrlib.cli.experiment import Experiment, training_entries
from ctrlib.cli.flags import Command, ModelFlags, TrainingFlags
from ctrlib.cli.kinds import (
    OptionalBool,
    OptionalFloat,
    OptionalName,
    OptionalPath,
    OptionalPrecision,
    OptionalSelectBy,
    Switch,
    Texts,
    shown,
)
from ctrlib.cli.paths import check_model, check_prepared
from ctrlib.cli.tables import print_beside, print_scores
from ctrlib.errors import ArgumentError, check_number, check_whole
from ctrlib.training.config import name_of

if TYPE_CHECKING:
    from ctrlib.model import Model
    from ctrlib.training.trackers import Tracker


@dataclass(frozen=True)
class Start(TrainingFlags):
    """How it is trained: Adam, until the validation score has stopped rising. What is not said here is chosen by the
    data: rows, rarer class, values; the log says how, and why."""

    keep_negatives: float = 1.0
    """Share of the training rows without a click to train on, such as 0.1; probabilities stay those of all rows."""
    calibrate: OptionalBool = None
    """Whether slope and intercept of the logits are fitted on validation in the end; they become part of the model."""
    select_by: OptionalSelectBy = None
    """Validation score that chooses the epoch; gauc needs the groups that `prepare --group` makes."""
    min_delta: OptionalFloat = None
    """Smallest improvement of that score that counts; log-loss counts in nats."""
    cut_factor: OptionalFloat = None
    """Factor of the learning rates after a pass without a better score, at most 1."""
    network_l2: OptionalFloat = None
    """Penalty on all weights that --l2 leaves alone, biases included: network_l2 / 2 per squared weight."""
    average_weights: OptionalBool = None
    """Whether a moving average of the weights is scored and kept, rather than the last ones (exact engine)."""
    warm_start: OptionalPath = None
    """Model folder to start from: its rows follow their values into the new vocabularies."""

    def check_schedule(self) -> None:
        """Refuse a score or a factor by which no epoch could be chosen.

        Raises:
            ArgumentError: as said.
        """
        if self.min_delta is not None:
            check_number(0, min_delta=self.min_delta)
        if self.cut_factor is not None:
            check_number(0, cut_factor=self.cut_factor)
            if self.cut_factor > 1:
                raise ArgumentError(f"--cut-factor {self.cut_factor}: expected at most 1; it makes the rates smaller")


@dataclass(frozen=True)
class Crossing:
    """What is crossed beside the model's own interactions."""

    crosses: Annotated[Texts, shown("NAME:NAME ...")] = ()
    """Pairs of categorical features; each pair of values that two training rows have gets a row of its own. `ranked`
    stands for the pairs that the ranking of `prepare --from-ranking` has found, `ranked:5` for the first five."""

    def pairs(self, data: Path) -> list[list[str]]:
        """What the flag means for a prepared folder.

        Raises:
            ArgumentError: it names no pair, or pairs that a ranking found where there is none.
        """
        from ctrlib.manifest import load_schema

        known = {feature.name for feature in load_schema(data).features}
        found: list[list[str]] = []
        for text in self.crosses:
            parts = text.split(":")
            cuts = [(":".join(parts[:at]), ":".join(parts[at:])) for at in range(1, len(parts))]
            fitting = [list(pair) for pair in cuts if {*pair} <= known]
            if fitting:
                found.append(fitting[0])
            elif parts[0] == "ranked" and len(parts) < 3:
                found += _ranked(data, text, parts[1:])
            elif len(parts) == 2:
                found.append(parts)  # and the names are looked at when they are counted
            else:
                raise ArgumentError(f"--crosses {text}: expected two features, such as user:item, or ranked")
        return found


def _ranked(data: Path, text: str, number: list[str]) -> list[list[str]]:
    """The pairs that report.json has, or the first of them."""
    report = data / "report.json"
    listed = json.loads(report.read_text(encoding="utf-8")).get("crosses", []) if report.is_file() else []
    if not listed:
        raise ArgumentError(
            f"--crosses {text}: {data} names none: prepare it with --from-ranking, from a ranking that has found some "
            "among the features that are taken, or name pairs, such as user:item"
        )
    if number and not (number[0].isdecimal() and 1 <= int(number[0]) <= len(listed)):
        raise ArgumentError(f"--crosses {text}: expected a number from 1 to {len(listed)}, the pairs of {data}")
    pairs: list[list[str]] = listed[: int(number[0])] if number else listed
    return pairs


@dataclass(frozen=True)
class EngineFlags:
    """What computes it."""

    engine: Literal["exact", "fused"] = "exact"
    """exact is dense Adam, as in the papers; fused is row-wise Adagrad through TorchRec, for large tables."""
    embedding_learning_rate: float = 0.02
    """Row-wise Adagrad's step (fused engine)."""
    precision: OptionalPrecision = None
    """Arithmetic of tower and head; bf16 is the default of the fused engine where a CPU has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto is a GPU if there is one."""
    workers: int = 1
    """Threads that prepare batches."""
    sharding: Literal["auto", "table_wise", "row_wise", "column_wise", "data_parallel"] = "auto"
    """How the fused engine spreads tables over the processes that torchrun starts."""
    plan: OptionalPath = None
    """The plan.json of an earlier run, to spread tables as that did."""


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: OptionalPath = None
    """Folder for the model; otherwise runs/NAME-MODEL."""
    overwrite: Switch = False
    """Replace the model in --out if there is one."""
    checkpoint_seconds: float = 300.0
    """Seconds of work that a kill may cost; the same command goes on from --out/checkpoints."""
    tensorboard: Switch = False
    """Also write TensorBoard events."""
    mlflow: OptionalName = None
    """Experiment of MLflow to log to as well; the environment variable MLFLOW_TRACKING_URI says where that is."""
    no_baselines: Switch = False
    """Leave out the constant, the logistic regression and the gradient boosting that stand beside the result."""


@dataclass(frozen=True)
class Train(Command):
    """Train a model on a prepared folder; report its test split once.

    The epoch is chosen by validation. The model's folder receives the weights, the schema, the vocabularies,
    metrics.json, log.jsonl and the learning curve as a picture. Beside the result stand simple models of the same rows.

    Examples:

        ctrlib train data/clicks --model dcnv2 --dim 16 --out runs/clicks
        ctrlib train data/clicks --model mmoe --option num_experts=4
        ctrlib train data/best --crosses ranked:3 left:right
        ctrlib train data/today --config runs/clicks/model.json
    """

    data: Positional[Path]
    """Prepared folder, as `ctrlib prepare` writes it."""
    model: ModelFlags = field(default_factory=ModelFlags)
    training: Start = field(default_factory=Start)
    engine: EngineFlags = field(default_factory=EngineFlags)
    crossing: Crossing = field(default_factory=Crossing)
    experiment: Experiment = field(default_factory=Experiment)
    output: Output = field(default_factory=Output)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        how, engine = self.training, self.engine
        self.model.config(engine.engine)
        how.check()
        check_number(0, embedding_learning_rate=engine.embedding_learning_rate)
        how.check_schedule()
        check_number(0, checkpoint_seconds=self.output.checkpoint_seconds)
        check_whole(0, workers=engine.workers)
        check_prepared(self.data)
        said = self._read()
        out = self.output.out or Path("runs") / f"{self.data.name}-{name_of(said) if said else self.model.model}"
        if self.experiment.print_config:
            return self._train(said, out)
        inputs = [self.data, how.warm_start, engine.plan, self.experiment.config]
        with target(out, ("model", "run"), inputs=inputs, overwrite=self.output.overwrite, shared=True):
            return self._train(said, out)

    def _train(self, said: dict[str, Any] | None, out: Path) -> int:
        how, engine = self.training, self.engine
        if how.warm_start is not None:
            check_model(how.warm_start)
        if engine.plan is not None and not engine.plan.is_file():
            raise ArgumentError(f"--plan {engine.plan}: there is no such file")

        from ctrlib.training.config import complete, counted_anew

        reason = ""
        if said is None:
            said, reason = self._chosen()
        if self.crossing.crosses:
            said = {**said, "crosses": self.crossing.pairs(self.data)}
        config = counted_anew(complete(said))
        if self.experiment.print_config:
            print(json.dumps(config, indent=1))
            return 0

        from ctrlib.distributed import rank

        if reason and rank() == 0:
            print(reason, file=sys.stderr)

        from ctrlib.serving.model_folder import model_in_the_making
        from ctrlib.serving.warm_start import warm_start
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json
        from ctrlib.training.run import run

        keep_freed_memory()

        def carry_over(model: Model) -> None:
            if (folder := config["training"]["warm_start"]) is not None:
                carried = warm_start(model, self.data, folder)
                for vocabulary, rows in carried.items() if rank() == 0 else ():
                    counts = f"{rows.carried:,} values carried over, {rows.new:,} new, {rows.gone:,} gone"
                    print(f"warm start: {vocabulary}: {counts}", file=sys.stderr)

        result = self._finished(config, out)
        if result is None:
            _, result = run(
                self.data,
                config,
                out=out,
                tensorboard=self.output.tensorboard,
                trackers=self._trackers(out),
                baselines=not self.output.no_baselines,
                on_built=carry_over,
                saving=lambda model: model_in_the_making(model, config, self.data, out),
            )
        if rank() > 0:
            return 0
        if self.json:
            print(to_json({"out": str(out), **result}))
        else:
            print_scores(result, f"{name_of(config)} on {self.data}")
            print_beside(result)
            print(f"model, schema, metrics.json, log.jsonl and curve.png are in {out}/")
        return 0

    def _trackers(self, out: Path) -> list[Tracker]:
        from ctrlib.distributed import rank
        from ctrlib.training.trackers import Mlflow

        if self.output.mlflow is None or rank() > 0:
            return []
        return [Mlflow(self.output.mlflow, name=out.name, resume=out / ".mlflow-run")]

    def _finished(self, config: dict[str, Any], out: Path) -> dict[str, Any] | None:
        """The result of this very run, if it was stopped in its last clean-up, which is done now; otherwise None.

        Raises:
            ValueError: another run was.
        """
        from ctrlib.distributed import gather, init_process_group, rank, world_size
        from ctrlib.manifest import data_hash, load_schema
        from ctrlib.training.config import counted_anew, identity_of
        from ctrlib.training.engines import choose_device
        from ctrlib.training.finished import clean_up, finished

        hashes = load_schema(self.data).hash, data_hash(self.data)
        identity = identity_of(config, *hashes)
        result = finished(out, identity)
        if result is None or not (out / "model.json").is_file():
            return None
        saved = {"training": {}, **json.loads((out / "model.json").read_text(encoding="utf-8"))}
        if identity_of(counted_anew(saved), *hashes) != identity:
            return None  # somebody saved another model there
        if world_size() > 1:
            init_process_group(choose_device(config["training"]["device"]))
            gather(None)  # all have looked
        if rank() == 0:
            clean_up(out)
            print(f"the run in {out} was over; what was left of its clean-up is done", file=sys.stderr)
        return result

    def _chosen(self) -> tuple[dict[str, Any], str]:
        """The experiment that the flags say, with what they leave open as it suits the data; and why, in a line."""
        from ctrlib.data.facts import facts_of
        from ctrlib.training.defaults import settings_for

        engine = self.engine.engine
        settings = settings_for(facts_of(self.data), engine, self.engine.device)
        chosen = settings.model if self.training.warm_start is None else self._model_of(self.training.warm_start)
        config = self.model.fitted(self.data, engine, chosen)
        return {**config, "training": {**settings.training, **self._training()}}, settings.reason

    def _model_of(self, folder: Path) -> dict[str, Any]:
        """The arguments of the model to start from, which must stay as they are: none if it is another model."""
        saved: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        return saved if saved.get("model") == self.model.model else {}

    def _training(self, given: frozenset[str] | None = None) -> dict[str, Any]:
        groups = (self.training, self.engine, self.output)
        return training_entries(
            groups, leave_out=("out", "overwrite", "tensorboard", "mlflow", "no_baselines"), given=given
        )

    def _read(self) -> dict[str, Any] | None:
        """The experiment in --config, with what the flags change."""
        said = self.experiment.read(self.given, ("--engine",), crosses=True)
        if said is None:
            return None
        if "search" in said:
            raise ArgumentError(
                f"--config {self.experiment.config} describes a search: use `ctrlib search`, or take the model.json of "
                "a model that was trained"
            )
        return {**said, "training": {**said["training"], **self._training(self.given)}}
