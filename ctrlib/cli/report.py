"""`ctrlib report`: one page to look at, of runs or of anybody's predictions."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional

from ctrlib._target import target
from ctrlib.cli.evaluate import PredictionFlags, are_predictions
from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import Names, OptionalInt, OptionalName, OptionalPath, OptionalPaths, Paths, Switch, Texts, shown
from ctrlib.cli.paths import check_prepared, check_raw, holds_parquet, named
from ctrlib.cli.usage import fill
from ctrlib.errors import ArgumentError, check_whole

if TYPE_CHECKING:
    from ctrlib.analysis.predictions import Predictions
    from ctrlib.analysis.report import Content


@dataclass(frozen=True)
class Rows:
    """Which labelled rows the runs are scored on, and how these are told apart."""

    data: OptionalPaths = None
    """Prepared folder, or raw files with labels; otherwise only what the runs reported is shown."""
    split: OptionalName = None
    """Which split of a prepared folder; otherwise test."""
    by: Names = ()
    """Columns by whose values the rows are told apart."""
    together: Annotated[Texts, shown("NAME:NAME ...")] = ()
    """Features that permutation importance permutes together, besides alone."""
    rows: int = 20_000
    """Rows of a prepared split that permutation importance is of, at most; 0 leaves it out."""


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: Path = Path("report.html")
    """File to write: one HTML page that needs no network."""
    scores: OptionalPath = None
    """Also write the rows' labels and each run's probabilities, as .parquet or .csv, for `ctrlib evaluate`."""
    overwrite: Switch = False
    """Replace what is there."""
    watch: OptionalInt = None
    """Write the page again after so many seconds, until all runs are over; a browser that shows it follows."""


@dataclass(frozen=True)
class Report(Command):
    """Write one HTML page about runs, or about anybody's predictions.

    It shows metrics with intervals, which run ranks better, reliability, slices, permutation importance, simple models
    beside, learning curves and costs; each picture with its numbers as a table. RUN is a folder that `ctrlib train`,
    `search` or `compress` has written; of several, all are scored on the same rows of --data. Or it is a file of
    predictions, as `ctrlib evaluate` takes it.

    Examples:

        ctrlib report runs/clicks runs/fm --data data/clicks --by shop
        ctrlib report runs/clicks --data yesterday.csv --scores scores.parquet
        ctrlib report scores.parquet --label click --score p --group user
    """

    run: Annotated[Positional[Paths], shown("RUN ...")]
    """Folder of a run, or several; or files of predictions."""
    rows: Rows = field(default_factory=Rows)
    output: Output = field(default_factory=Output)
    predictions: PredictionFlags = field(default_factory=PredictionFlags)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        rows, output = self.rows, self.output
        check_whole(0, rows=rows.rows)
        if output.scores is not None and output.scores.suffix not in (".csv", ".parquet"):
            raise ArgumentError(f"--scores must end in .csv or .parquet, got {output.scores.name!r}")
        if output.watch is not None:
            check_whole(1, watch=output.watch)
        of_predictions = are_predictions(self.run[0], self.predictions, self.given)
        if of_predictions:
            self.predictions.check()
            for path in self.run:
                check_raw(path)
            if idle := sorted(self.given & {"--data", "--split", "--together", "--rows", "--scores", "--watch"}):
                raise ArgumentError(f"{named(self.run)} holds predictions, so {', '.join(idle)} cannot be said")
        else:
            self._check_rows()
        inputs = [*self.run, *(rows.data or ())]
        with target(output.out, "file", inputs=inputs, overwrite=output.overwrite):
            if output.scores is None:
                return self._write(of_predictions)
            with target(output.scores, "file", inputs=inputs, overwrite=output.overwrite):
                return self._write(of_predictions)

    def _check_rows(self) -> None:
        rows = self.rows
        if rows.data is None:
            needs = {"--split", "--by", "--together", "--rows", "--scores"}
            if idle := sorted(self.given & needs):
                raise ArgumentError(f"{', '.join(idle)}: say which rows with --data, a prepared folder or raw files")
            return
        if self.output.watch is not None:
            raise ArgumentError("--watch follows what runs report while they train: leave out --data")
        for path in rows.data:
            check_raw(path)
        if self._is_prepared():
            check_prepared(rows.data[0])
        elif idle := sorted(self.given & {"--split", "--together", "--rows"}):
            raise ArgumentError(f"{named(rows.data)} is raw data, and {', '.join(idle)} is for prepared folders")

    def _is_prepared(self) -> bool:
        data = self.rows.data
        if data is None or len(data) != 1:
            return False
        return (data[0] / "schema.json").is_file() or (data[0].is_dir() and not holds_parquet(data[0]))

    def _write(self, of_predictions: bool) -> int:
        if self.output.out.suffix not in (".html", ".htm"):
            raise ArgumentError(f"--out must end in .html, got {self.output.out.name!r}")

        from ctrlib._json import to_json
        from ctrlib.analysis.report import Content, report
        from ctrlib.making import write_text

        if of_predictions:
            from ctrlib.analysis.predictions import as_plain, evaluate_predictions

            one = self.predictions.read(self.run, self.rows.by)
            content = Content(f"Predictions: {one.name}", evaluated=[evaluate_predictions(one)])
        else:
            content = self._of_runs()
            while self.output.watch is not None and not all(run.is_over for run in content.runs):
                write_text(self.output.out, report(dataclasses.replace(content, refresh=self.output.watch)))
                time.sleep(self.output.watch)
                content = self._of_runs()
        write_text(self.output.out, report(content))
        if self.json:
            from ctrlib.analysis.predictions import as_plain

            found: dict[str, Any] = {"out": str(self.output.out)}
            found["runs"] = {run.name: run.result for run in content.runs}
            found["evaluated"] = [as_plain(dict(one)) for one in content.evaluated]
            found["importance"] = dict(content.importance)
            print(to_json(found))
            return 0
        print(f"{self.output.out}: open it in a browser")
        if self.output.scores is not None:
            print(fill(f"{self.output.scores}: labels and probabilities, for `ctrlib evaluate --label --score`"))
        return 0

    def _of_runs(self) -> Content:
        from ctrlib.analysis.importance import permutation_importance
        from ctrlib.analysis.predictions import evaluate_predictions
        from ctrlib.analysis.report import Content
        from ctrlib.analysis.runs import load_runs, score_runs
        from ctrlib.serving.predictor import Predictor

        rows, runs = self.rows, load_runs(self.run)
        title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
        if rows.data is None:
            said = "Made without --data: reliability, slices, importance and paired tests need rows to be scored."
            return Content(title, runs, remarks=[said])
        prepared = self._is_prepared()
        split = (rows.split or "test") if prepared else None
        data: Any = rows.data[0] if len(rows.data) == 1 else list(rows.data)
        saved = self.output.scores is not None
        evaluated = score_runs(runs, data, split=split, by=rows.by, with_groups=saved)
        if self.output.scores is not None:
            self._save(evaluated)
        remarks = [f"Rows: {named(rows.data)}" + (f", split {split}." if split else ".")]
        importance = {}
        if split is not None and rows.rows:
            together = [text.split(":") for text in rows.together]
            for run in runs:
                importance[run.name] = permutation_importance(
                    Predictor.load(run.folder), data, split, together=together, num_rows=rows.rows
                )
        elif split is None:
            remarks.append("Permutation importance is made for splits of prepared folders.")
        return Content(title, runs, list(map(evaluate_predictions, evaluated)), importance, remarks)

    def _save(self, evaluated: list[Predictions]) -> None:
        from ctrlib.analysis.runs import scores_frame
        from ctrlib.making import new_file

        assert self.output.scores is not None
        frame = scores_frame(evaluated)
        with new_file(self.output.scores) as making:
            (frame.write_csv if self.output.scores.suffix == ".csv" else frame.write_parquet)(making)
