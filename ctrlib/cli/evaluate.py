"""`ctrlib evaluate`: the metrics of a model on labelled rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from ctrlib.cli.flags import Command, ScoringFlags
from ctrlib.cli.kinds import OptionalName
from ctrlib.cli.paths import check_model, check_prepared, check_raw, holds_parquet
from ctrlib.cli.tables import print_counts, print_scores


@dataclass(frozen=True)
class Evaluate(Command):
    """Score labelled rows with a trained model; print the metrics.

    DATA is a prepared folder (with --split) or a raw file with the label columns.

    Examples:

        ctrlib evaluate runs/clicks data/clicks --split test
        ctrlib evaluate runs/clicks yesterday.csv
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Positional[Path]
    """Prepared folder, or raw file or folder of parquet files, as `ctrlib prepare` takes it."""
    split: OptionalName = None
    """Which split of a prepared folder; otherwise test."""
    scoring: ScoringFlags = field(default_factory=ScoringFlags)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        check_model(self.model)
        self.scoring.check()
        check_raw(self.data)
        is_prepared = (self.data / "schema.json").is_file()
        if is_prepared or (self.data.is_dir() and not holds_parquet(self.data)):
            check_prepared(self.data)
        elif self.split is not None:
            what = "has no schema.json" if self.data.is_dir() else "is a file"
            raise ValueError(f"--split {self.split}: {self.data} {what}, only prepared folders have splits")

        from ctrlib.serving.predictor import Predictor
        from ctrlib.training.loop import to_json

        predictor, size = Predictor.load(self.model), self.scoring.batch_size
        if is_prepared:
            name = self.split or "test"
            scores = predictor.evaluate_prepared(self.data, name, batch_size=size)
        else:
            name = "rows"
            scores = predictor.evaluate(self.data, batch_size=size, on_bad_row=self.scoring.on_bad_row)
        if self.json:
            print(to_json(scores))
        else:
            print_scores(scores, f"{self.model} on {self.data}, {name}")
            print_counts(scores)
        return 0
