"""`ctrlib search`: from a prepared folder to a model that has only what is worth its bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ctrlib._target import target
from ctrlib.cli.experiment import Experiment, training_entries
from ctrlib.cli.flags import Command, ModelFlags, TrainingFlags, parse_option
from ctrlib.cli.kinds import OptionalPath, Settings, Switch
from ctrlib.cli.paths import check_prepared
from ctrlib.cli.tables import print_scores
from ctrlib.cli.usage import fill
from ctrlib.errors import ArgumentError
from ctrlib.search.methods import SEARCHES
from ctrlib.training.config import name_of

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(SEARCHES)]
CHOOSES = f"What is chosen. {'. '.join(f'{name}: {one.chooses}' for name, one in SEARCHES.items())}."


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: OptionalPath = None
    """Folder for the model, search.json and search.png; otherwise runs/NAME-MODEL-METHOD."""
    overwrite: Switch = False
    """Replace what an earlier search left in --out."""


@dataclass(frozen=True)
class SearchFlags:
    """How it is searched."""

    setting: Settings = ()
    """Settings of METHOD, with values in JSON: penalty=1e-5 epochs=10"""


@dataclass(frozen=True)
class Search(Command):
    """Let the data choose what of a model is worth its bytes.

    The choice is made in a search, then what was chosen is trained and its test split reported once. METHOD says what
    is chosen. The folder receives a model, search.json and search.png, which explain the choice. After a kill the same
    command goes on.

    Examples:

        ctrlib search optfs data/clicks --model deepfm --setting penalty=1e-5 \\
            --out runs/clicks_optfs
        ctrlib search optfs data/today --config runs/clicks_optfs/model.json
    """

    method: Annotated[Positional[Method], arg(help=CHOOSES)]
    data: Positional[Path]
    """Prepared folder, as `ctrlib prepare` writes it."""
    output: Output = field(default_factory=Output)
    search: SearchFlags = field(default_factory=SearchFlags)
    model: ModelFlags = field(default_factory=lambda: ModelFlags(model="deepfm"))
    training: TrainingFlags = field(default_factory=TrainingFlags)
    """How it is trained. Learning rate, L2, batch size and seed are those of search and retraining, epochs and patience
    those of the retraining: the search's own are settings."""
    experiment: Experiment = field(default_factory=Experiment)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        out, how = self.output.out, self.training
        self.model.config()
        how.check()
        settings = self._settings()
        check_prepared(self.data)
        said = self._read()
        name = name_of(said) if said else self.model.model
        if out is None:
            out = Path("runs") / f"{self.data.name}-{name}-{self.method}"
        if self.experiment.print_config:
            return self._search(out, said, settings)
        inputs = [self.data, self.experiment.config]
        with target(out, "search", inputs=inputs, overwrite=self.output.overwrite):
            return self._search(out, said, settings)

    def _search(self, out: Path, said: dict[str, Any] | None, settings: dict[str, Any]) -> int:
        how = self.training

        from ctrlib.data.loader import Loader
        from ctrlib.search.experiment import HEEDED, experiment_of, parts_of
        from ctrlib.training.defaults import rows_per_step

        if said is None:
            rows = Loader(self.data, "train", batch_size=1).num_rows
            said = {
                **self.model.fitted(self.data),
                "training": {"batch_size": rows_per_step(rows), **training_entries([how])},
                "search": {"method": self.method, **settings},
            }
        method, config, chosen, training = parts_of(said)
        if self.experiment.print_config:
            print(json.dumps(experiment_of(method, config, chosen, training), indent=1))
            return 0

        from ctrlib.search.run import search_and_retrain
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json

        keep_freed_memory()
        entries = {entry: getattr(training, entry) for entry in HEEDED}
        result = search_and_retrain(method, self.data, config, out, settings=chosen, **entries)
        if self.json:
            print(to_json(result))
            return 0
        print(fill("\n".join(result["summary"].get("words", ()))))
        print_scores(result, f"{self.method}, {name_of(config)} on {self.data}")
        ratio = result["ratio"]
        change = f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times as many"  # with crosses
        summary = (
            f"{out}: {result['embedding_bytes_before']:,} bytes of embeddings before, "
            f"{result['embedding_bytes']:,} after ({change}); see search.png"
        )
        print(fill(summary))
        return 0

    def _settings(self) -> dict[str, Any]:
        return dict(map(parse_option, self.search.setting))

    def _read(self) -> dict[str, Any] | None:
        """The experiment in --config, with what the flags change: --learning-rate and --l2 in search and retraining."""
        said = self.experiment.read(self.given)
        if said is None:
            return None
        changed = training_entries([self.training], given=self.given)
        search = {"method": self.method, **said.get("search", {})}
        if search["method"] != self.method:
            raise ArgumentError(
                f"--config {self.experiment.config} describes a search by {search['method']}, and METHOD is "
                f"{self.method}: say that method, or give the config of a model that was trained"
            )
        search |= {name: changed[name] for name in ("learning_rate", "embedding_l2") if name in changed}
        return {**said, "training": {**said["training"], **changed}, "search": {**search, **self._settings()}}
