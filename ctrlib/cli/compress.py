"""`ctrlib compress`: from a model folder to a smaller one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from ctrlib._target import target
from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import OptionalFloat, OptionalText, Switch, Texts, shown
from ctrlib.cli.paths import check_model, check_prepared
from ctrlib.cli.tables import new_table, show
from ctrlib.cli.usage import fill
from ctrlib.search.settings import check_settings, parse_bytes


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: Path
    """Folder for the smaller model, compression.json and compression.png."""
    overwrite: Switch = False
    """Replace the compressed model in --out if there is one."""


@dataclass(frozen=True)
class Budget:
    """How small it shall be: give --bytes or --ratio."""

    bytes: OptionalText = None
    """Bytes for tables, decoders, remaps and wide part, as a number or as 5MB, 800kB, 2MiB."""
    ratio: OptionalFloat = None
    """How many times fewer bytes than now, above 1."""
    layer_ratio: OptionalFloat = None
    """How many times fewer weights the linear layers shall have, by low rank; otherwise they stay."""


@dataclass(frozen=True)
class FineTuning:
    """How the smaller model is trained towards the outputs of the original."""

    epochs: int = 1
    """Passes over train; 0 for none."""
    learning_rate: float = 1e-4
    """Adam's step, per update of a weight."""
    teachers: Annotated[Texts, shown("PATH ...")] = ()
    """More model folders of the same data, such as other seeds: the mean logit of all is what is learnt."""
    batch_size: int = 8192
    """Rows per step."""
    seed: int = 0
    """Number that the order of the rows is drawn from."""


@dataclass(frozen=True)
class Compress(Command):
    """Fit a trained model's embeddings into a budget of bytes.

    Tables are coded in a few bytes a row, rounded, or cut; what validation likes best of that which fits is fine-tuned
    towards the original. The folder receives a model, compression.json with all that was tried, and compression.png.

    Example:

        ctrlib compress runs/clicks data/clicks --ratio 20 --out runs/clicks_small
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Positional[Path]
    """The prepared folder that it was trained on."""
    output: Output
    budget: Budget = field(default_factory=Budget)
    tuning: FineTuning = field(default_factory=FineTuning)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        budget, tuning = self.budget, self.tuning
        num_bytes = None if budget.bytes is None else parse_bytes(budget.bytes)
        check_settings(
            num_bytes,
            budget.ratio,
            budget.layer_ratio,
            tuning.epochs,
            tuning.learning_rate,
            tuning.batch_size,
            tuning.seed,
        )
        for folder in (self.model, *map(Path, self.tuning.teachers)):
            check_model(folder)
        check_prepared(self.data)
        inputs: list[str | Path] = [self.model, self.data, *self.tuning.teachers]
        with target(self.output.out, "compressed", inputs=inputs, overwrite=self.output.overwrite):
            return self._compress(num_bytes)

    def _compress(self, num_bytes: int | None) -> int:
        budget, tuning = self.budget, self.tuning

        from ctrlib.search.compression import compress
        from ctrlib.training.allocator import keep_freed_memory
        from ctrlib.training.loop import to_json

        keep_freed_memory()
        result = compress(
            self.model,
            self.data,
            self.output.out,
            num_bytes=num_bytes,
            ratio=budget.ratio,
            layer_ratio=budget.layer_ratio,
            epochs=tuning.epochs,
            learning_rate=tuning.learning_rate,
            teachers=tuning.teachers,
            batch_size=tuning.batch_size,
            seed=tuning.seed,
        )
        if self.json:
            print(to_json(result))
            return 0
        print(
            fill(
                f"{self.model} on {self.data}: bytes of embeddings, how many times fewer, validation AUC, "
                "and the largest relative error of a row"
            )
        )
        print_tried(result["tried"])
        if "test_tasks_before" in result:
            print_labels(result["test_tasks_before"], result["test_tasks_after"])
        said = (
            f"{self.output.out}: {result['ratio']:.1f} times fewer bytes of embeddings by {result['method']}, "
            f"{result['total_ratio']:.1f} times fewer in all; test AUC "
            f"{result['test_auc_before']:.5f} before, {result['test_auc_after']:.5f} after"
        )
        print(fill(said))
        return 0


def print_tried(tried: list[dict[str, Any]]) -> None:
    """The models that were tried, first the original, last the one that is kept."""
    first, last = tried[0], tried[-1]
    table = new_table("method", "bytes", "ratio", "valid AUC", "change", "row error", numbers=5)
    for one in tried:
        table.add_row(
            one["method"],
            f"{one['embedding_bytes']:,}",
            f"{first['embedding_bytes'] / one['embedding_bytes']:.1f}",
            f"{one['valid_auc']:.5f}",
            f"{one['valid_auc'] - first['valid_auc']:+.5f}",
            f"{one['row_error']:.1e}",
            style="bold" if one is last else None,
        )
    show(table)


def print_labels(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """The test metrics of each label."""
    table = new_table("label", "test AUC before", "after", "log-loss before", "after", numbers=4)
    for old, new in zip(before, after):
        scores = (one[name] for name in ("auc", "log_loss") for one in (old, new))
        table.add_row(old["label"], *(f"{value:.5f}" for value in scores))
    show(table)
