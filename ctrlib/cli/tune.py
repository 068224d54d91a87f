"""`ctrlib tune`: the settings that validation likes best, by Optuna."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from ctrlib._lazy import instead
from ctrlib._target import target
from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import OptionalFloat, OptionalInt, OptionalPath, Switch, Texts, shown
from ctrlib.cli.paths import check_prepared
from ctrlib.cli.tables import new_table, show
from ctrlib.cli.usage import fill
from ctrlib.errors import ArgumentError, check_number, check_whole
from ctrlib.models.table import MODELS

SHOWN = 10  # trials


@dataclass(frozen=True)
class Searched:
    """What is searched, and for how long."""

    models: Annotated[Texts, shown("NAME ...")] = ("dcnv2",)
    """Published models, whose settings are searched together; blanks or commas stand between them."""
    trials: OptionalInt = None
    """How many trainings."""
    minutes: OptionalFloat = None
    """Minutes for all of them together; 10, if --trials is not said either."""
    by: Literal["auc", "log_loss"] = "auc"
    """Validation metric that tells which trial is best."""
    seed: int = 0
    """Number that trials and trainings are drawn from."""

    def names(self) -> list[str]:
        """What stands between commas or blanks.

        Raises:
            ArgumentError: there is none, or no such model.
        """
        found = [name for text in self.models for name in text.split(",") if name]
        if not found:
            raise ArgumentError("--models: expected a name or several, such as dcnv2,mlp")
        if unknown := [name for name in found if name not in MODELS]:
            raise ArgumentError(f"--models: there is no model {unknown[0]}; {instead(unknown, MODELS)}")
        return found

    def check(self) -> None:
        """Refuse a budget in which nothing could be tried.

        Raises:
            ArgumentError: as said.
        """
        if self.trials is not None:
            check_whole(1, trials=self.trials)
        if self.minutes is not None:
            check_number(0, above=True, minutes=self.minutes)
        check_whole(0, seed=self.seed)


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: OptionalPath = None
    """Folder for best.json and trials.json; otherwise runs/NAME-tune."""
    overwrite: Switch = False
    """Replace the search in --out if there is one."""


@dataclass(frozen=True)
class Tune(Command):
    """Search the settings that validation likes best, by Optuna.

    It begins with the settings that `ctrlib train` would choose, and never looks at test. The folder receives
    best.json, which --config of `ctrlib train` takes, and trials.json. After a kill the same command goes on. It needs
    Optuna: pip install 'ctrlib[tune]'.

    Examples:

        ctrlib tune data/clicks --models dcnv2 --minutes 30 --out runs/tuned
        ctrlib train data/clicks --config runs/tuned/best.json --out runs/best
    """

    data: Positional[Path]
    """Prepared folder, as `ctrlib prepare` writes it."""
    searched: Searched = field(default_factory=Searched)
    output: Output = field(default_factory=Output)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        names = self.searched.names()
        self.searched.check()
        check_prepared(self.data)
        out = self.output.out or Path("runs") / f"{self.data.name}-tune"
        with target(out, "tuning", inputs=[self.data], overwrite=self.output.overwrite):
            return self._tune(names, out)

    def _tune(self, names: list[str], out: Path) -> int:
        from ctrlib.selection.tuning import tune
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json

        keep_freed_memory()
        result = tune(
            self.data,
            names,
            out,
            trials=self.searched.trials,
            minutes=self.searched.minutes,
            by=self.searched.by,
            seed=self.searched.seed,
            overwrite=self.output.overwrite,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if self.json:
            print(to_json({"out": str(out), **result}))
            return 0
        print_trials(result)
        print(fill(f"{out}/best.json is the best, for `ctrlib train {self.data} --config {out}/best.json`"))
        return 0


def print_trials(result: dict[str, Any]) -> None:
    """The best trials, what came of the others, and the first, which had the settings that the data chooses."""
    trials, best = result["trials"], result["best"]
    metric, sign = ("AUC", -1) if result["by"] == "auc" else ("log-loss", 1)
    states = Counter(one["state"] for one in trials)
    print(fill(f"{len(trials)} trials on {result['data']}: {', '.join(f'{n} {state}' for state, n in states.items())}"))
    whole = sorted((one for one in trials if one["value"] is not None), key=lambda one: sign * float(one["value"]))
    shown = whole[:SHOWN]
    table = new_table("trial", "model", "settings", f"valid {metric}", "seconds", numbers=2)
    for one in shown + [one for one in whole[SHOWN:] if one["number"] == 0]:
        settings = ", ".join(
            f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in one["parameters"].items()
            if name != "model"
        )
        table.add_row(
            f"{one['number']}{' (defaults)' if one['number'] < len(result['models']) else ''}",
            one["model"],
            settings,
            f"{one['value']:.5f}",
            f"{one['seconds']:.1f}",
            style="bold" if one is best else None,
        )
    show(table)
