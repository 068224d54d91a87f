"""`ctrlib compare`: several models over seeds, with tests and costs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from ctrlib._target import target
from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import OptionalPath, Switch, Texts, shown
from ctrlib.cli.paths import check_prepared
from ctrlib.cli.tables import new_table, show
from ctrlib.cli.usage import fill
from ctrlib.errors import ArgumentError, check_whole


@dataclass(frozen=True)
class Compared:
    """What is compared, and how often each is trained."""

    models: Annotated[Texts, shown("NAME ...")] = ("mlp", "dcnv2", "finalmlp")
    """Published models with the settings that `train` chooses, or files that --config of `train` would take, such as
    best.json of `ctrlib tune`; blanks or commas stand between them."""
    seeds: int = 3
    """Runs of each model, 2 or more."""
    seed: int = 0
    """The first seed; each run has the next one."""

    def names(self) -> list[str]:
        """What stands between commas or blanks.

        Raises:
            ArgumentError: there are fewer than two.
        """
        found = [name for text in self.models for name in text.split(",") if name]
        if len(found) < 2:
            raise ArgumentError(f"--models {' '.join(self.models)}: expected two or more to compare")
        return found


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: OptionalPath = None
    """Folder for the runs and comparison.json; otherwise runs/NAME-compare."""
    overwrite: Switch = False
    """Replace the comparison in --out if there is one."""


@dataclass(frozen=True)
class Compare(Command):
    """Compare models over seeds, with tests and costs.

    The best by validation is chosen, and each other one tested against it on test. The p-value allows for other seeds
    and other rows of test. After a kill the same command goes on.

    Examples:

        ctrlib compare data/clicks --models mlp,dcnv2,finalmlp --seeds 3
        ctrlib compare data/clicks --models dcnv2 runs/tuned/best.json
    """

    data: Positional[Path]
    """Prepared folder, as `ctrlib prepare` writes it."""
    compared: Compared = field(default_factory=Compared)
    output: Output = field(default_factory=Output)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        names = self.compared.names()
        check_whole(2, seeds=self.compared.seeds)
        check_whole(0, seed=self.compared.seed)
        check_prepared(self.data)
        files = [Path(name) for name in names if _is_file(name)]
        out = self.output.out or Path("runs") / f"{self.data.name}-compare"
        with target(out, "comparison", inputs=[self.data, *files], overwrite=self.output.overwrite):
            return self._compare(names, out)

    def _compare(self, names: list[str], out: Path) -> int:
        experiments: dict[str, Any] = {}
        for name in names:
            if (short := Path(name).stem if _is_file(name) else name) in experiments:
                raise ArgumentError(f"--models has {short} twice: give a copy of the file another name to compare them")
            experiments[short] = _read(Path(name)) if _is_file(name) else None

        from ctrlib.selection.comparison import compare
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.defaults import config_for
        from ctrlib.training.loop import to_json

        keep_freed_memory()
        result = compare(
            self.data,
            {name: said or config_for(self.data, name) for name, said in experiments.items()},
            out,
            seeds=self.compared.seeds,
            seed=self.compared.seed,
            overwrite=self.output.overwrite,
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
        if self.json:
            print(to_json({"out": str(out), **result}))
            return 0
        print_comparison(result)
        print(fill(f"the runs, and comparison.json with all numbers, are in {out}/"))
        return 0


def _is_file(name: str) -> bool:
    return name.endswith(".json") or "/" in name


def _read(path: Path) -> dict[str, Any]:
    try:
        said: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ArgumentError(f"--models {path}: there is no such file") from error
    except (ValueError, TypeError) as error:
        raise ArgumentError(
            f"--models {path} is no experiment ({error}): expected what --print-config writes"
        ) from error
    return said


def print_comparison(result: dict[str, Any]) -> None:
    """The scores of all models, the tests, and what they cost."""
    seeds, chosen = result["seeds"], result["chosen"]
    print(f"mean and standard deviation over {seeds} seeds on {result['data']}")
    table = new_table("model", "valid AUC", "+-", "test AUC", "+-", "log-loss", "+-", numbers=6)
    costs = new_table("model", "parameters", "table bytes", "seconds", numbers=3)
    for line in sorted(result["models"], key=lambda line: -float(line["valid_auc"])):
        style = "bold" if line["name"] == chosen else None
        scores = [line[f"{name}{sd}"] for name in ("valid_auc", "test_auc", "test_logloss") for sd in ("", "_sd")]
        table.add_row(line["name"], *(format(score, ".5f") for score in scores), style=style)
        costs.add_row(
            line["name"],
            f"{line['parameters']:,}",
            f"{line['embedding_bytes']:,}",
            f"{line['seconds']:.1f}",
            style=style,
        )
    show(table)
    print(f"on test, against {chosen}, the best by validation")
    tests = new_table("model", "", "difference", "+-", "p", "p (Holm)", numbers=4)
    for one in result["tests"]:
        for name, measure in (("AUC", "auc"), ("log-loss", "log_loss")):
            numbers = one[measure]
            tests.add_row(
                one["name"] if name == "AUC" else "",
                name,
                f"{numbers['difference']:+.5f}",
                f"{numbers['standard_error']:.5f}",
                f"{numbers['p_value']:.2g}",
                f"{numbers['p_holm']:.2g}",
            )
    show(tests)
    print("what they cost, a run")
    show(costs)
