"""`ctrlib predict`: a model's probabilities for new rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from ctrlib._target import target
from ctrlib.cli.flags import Command, ScoringFlags
from ctrlib.cli.kinds import Names, Paths, Switch, shown
from ctrlib.cli.paths import check_model, check_raw
from ctrlib.cli.tables import print_counts, progress_line
from ctrlib.errors import ArgumentError


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: Path
    """File to write: .csv or .parquet, with a column per label and a row per row of DATA."""
    keep: Names = ()
    """Columns of DATA to write before the probabilities, such as ids."""
    overwrite: Switch = False
    """Replace the file in --out if there is one."""


@dataclass(frozen=True)
class Predict(Command):
    """Score new rows with a trained model: a probability per label.

    Rows keep their order, and that of the files. Unseen and missing ids score normally and are counted. With
    --on-bad-row skip the file has fewer rows than DATA, and it is said which are left out.

    Example:

        ctrlib predict runs/clicks today.csv --out scores.csv
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it."""
    data: Annotated[Positional[Paths], shown("DATA ...")]
    """Raw file, as `ctrlib prepare` takes it, or a folder of parquet files, or several; labels are not needed."""
    output: Output
    scoring: ScoringFlags = field(default_factory=ScoringFlags)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        out = self.output.out
        if out.suffix not in (".csv", ".parquet"):
            raise ArgumentError(f"--out must end in .csv or .parquet, got {out.name!r}")
        check_model(self.model)
        for path in self.data:
            check_raw(path)
        self.scoring.check()
        with target(out, "file", inputs=[self.model, *self.data], overwrite=self.output.overwrite):
            return self._predict(out)

    def _predict(self, out: Path) -> int:
        from ctrlib.serving.predictor import Predictor

        predictor = Predictor.load(self.model)
        with progress_line("rows scored", quiet=self.json) as progress:
            counts = predictor.predict_to(
                self.data[0] if len(self.data) == 1 else self.data,
                out,
                keep=self.output.keep,
                batch_size=self.scoring.batch_size,
                on_bad_row=self.scoring.on_bad_row,
                overwrite=self.output.overwrite,
                progress=progress,
            )
        if self.json:
            print(json.dumps({"out": str(out), **counts}))
        else:
            print(f"{counts['rows']:,} rows scored into {out}")
            print_counts(counts)
        return 0
