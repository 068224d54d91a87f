"""`ctrlib search`: from a prepared folder to a model that has only what is worth its bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ctrlib._target import check_target
from ctrlib.cli.flags import Command, ModelFlags, TrainingFlags, parse_option
from ctrlib.cli.kinds import Settings, Switch
from ctrlib.cli.paths import check_prepared
from ctrlib.cli.tables import print_scores
from ctrlib.cli.usage import fill
from ctrlib.search.methods import SEARCHES

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(SEARCHES)]
CHOOSES = f"What is chosen. {'. '.join(f'{name}: {one.chooses}' for name, one in SEARCHES.items())}."


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: Path
    """Folder for the model, search.json and search.png."""
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

    Example:

        ctrlib search optfs data/clicks --model deepfm --setting penalty=1e-5 \\
            --out runs/clicks_optfs
    """

    method: Annotated[Positional[Method], arg(help=CHOOSES)]
    data: Positional[Path]
    """Prepared folder, as `ctrlib prepare` writes it."""
    output: Output
    search: SearchFlags = field(default_factory=SearchFlags)
    model: ModelFlags = field(default_factory=lambda: ModelFlags(model="deepfm"))
    training: TrainingFlags = field(default_factory=TrainingFlags)
    """How it is trained. Learning rate, L2, batch size and seed are those of search and retraining, epochs and patience
    those of the retraining: the search's own are settings."""

    def __call__(self) -> int:
        """Run the command; the exit status."""
        out, how = self.output.out, self.training
        self.model.config()
        how.check()
        values = {"learning_rate": how.learning_rate, "embedding_l2": how.l2}
        values |= dict(map(parse_option, self.search.setting))
        check_prepared(self.data)
        check_target(out, "search", inputs=[self.data], overwrite=self.output.overwrite)

        from ctrlib.search.run import search_and_retrain, settings_of
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json

        keep_freed_memory()
        result = search_and_retrain(
            self.method,
            self.data,
            self.model.fitted(self.data),
            out,
            settings=settings_of(self.method, values),
            batch_size=how.rows_per_step(self.data),
            learning_rate=how.learning_rate,
            embedding_l2=how.l2,
            max_epochs=how.epochs,
            patience=how.patience,
            seed=how.seed,
        )
        if self.json:
            print(to_json(result))
            return 0
        print(fill("\n".join(result["summary"].get("words", ()))))
        print_scores(result, f"{self.method}, {self.model.model} on {self.data}")
        ratio = result["ratio"]
        change = f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times as many"  # with crosses
        said = (
            f"{out}: {result['embedding_bytes_before']:,} bytes of embeddings before, "
            f"{result['embedding_bytes']:,} after ({change}); see search.png"
        )
        print(fill(said))
        return 0
