"""`ctrlib evaluate`: the metrics of a model on labelled rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from ctrlib.cli.flags import Command, ScoringFlags
from ctrlib.cli.kinds import OptionalName, Paths, shown
from ctrlib.cli.paths import check_model, check_prepared, check_raw, holds_parquet, named
from ctrlib.cli.tables import print_counts, print_scores, print_slices
from ctrlib.errors import ArgumentError


@dataclass(frozen=True)
class Evaluate(Command):
    """Score labelled rows with a trained model; print the metrics.

    DATA is a prepared folder (with --split) or a raw file, or several, with the label columns.

    Examples:

        ctrlib evaluate runs/clicks data/clicks --split test
        ctrlib evaluate runs/clicks yesterday.csv --by shop
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Annotated[Positional[Paths], shown("DATA ...")]
    """Prepared folder, or raw files or folders of parquet files, as `ctrlib prepare` takes them."""
    split: OptionalName = None
    """Which split of a prepared folder; otherwise test."""
    by: OptionalName = None
    """Column by whose values the rows are told apart too: where the model ranks badly, or promises too much."""
    scoring: ScoringFlags = field(default_factory=ScoringFlags)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        check_model(self.model)
        self.scoring.check()
        for path in self.data:
            check_raw(path)
        data, one = self.data[0], len(self.data) == 1
        is_prepared = one and (data / "schema.json").is_file()
        if is_prepared or (one and data.is_dir() and not holds_parquet(data)):
            check_prepared(data)
        elif self.split is not None:
            what = "are files" if not one else "has no schema.json" if data.is_dir() else "is a file"
            raise ArgumentError(f"--split {self.split}: {named(self.data)} {what}, only prepared folders have splits")

        from ctrlib.serving.predictor import Predictor
        from ctrlib.training.loop import to_json

        predictor, size = Predictor.load(self.model), self.scoring.batch_size
        if is_prepared:
            name = self.split or "test"
            scores = predictor.evaluate_prepared(data, name, batch_size=size, by=self.by)
        else:
            name = "rows"
            rows, skip = data if one else self.data, self.scoring.on_bad_row
            scores = predictor.evaluate(rows, batch_size=size, on_bad_row=skip, by=self.by)
        if self.json:
            print(to_json(scores))
        else:
            print_scores(scores, f"{self.model} on {named(self.data)}, {name}")
            if self.by is not None:
                print_slices(scores["by"], self.by)
            print_counts(scores)
        return 0
