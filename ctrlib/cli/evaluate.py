"""`ctrlib evaluate`: the metrics of a model on labelled rows, or of predictions that anybody made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from ctrlib._target import kind_of
from ctrlib.cli.flags import Command, ScoringFlags
from ctrlib.cli.kinds import Names, OptionalName, Paths, shown
from ctrlib.cli.paths import check_model, check_prepared, check_raw, holds_parquet, named
from ctrlib.cli.tables import new_table, print_counts, print_scores, print_slices, show
from ctrlib.cli.usage import fill, flags_of
from ctrlib.errors import ArgumentError

if TYPE_CHECKING:
    from ctrlib.analysis.predictions import Predictions


@dataclass(frozen=True)
class PredictionFlags:
    """Of a file of predictions: which columns hold what."""

    label: OptionalName = None
    """Column of 0 and 1."""
    score: Names = ()
    """Column of scores; of several, one for each model, differences are tested on the same rows."""
    group: OptionalName = None
    """Column of users, for GAUC and for standard errors where rows of one user are not independent."""
    weight: OptionalName = None
    """Column of weights."""
    scale: Literal["probability", "logit", "order"] = "probability"
    """What scores are; of order, only their order counts, and there is no log-loss and no calibration."""

    def check(self) -> None:
        """Refuse what names no columns.

        Raises:
            ArgumentError: as said.
        """
        if self.label is None or not self.score:
            raise ArgumentError("predictions need --label and --score: the columns of labels and of scores")
        if twice := sorted({name for name in self.score if self.score.count(name) > 1}):
            raise ArgumentError(f"--score names {', '.join(twice)} twice: name each column once")

    def read(self, paths: tuple[Path, ...], by: tuple[str, ...]) -> Predictions:
        """The predictions in files."""
        from ctrlib.analysis.predictions import read_predictions

        assert self.label is not None
        return read_predictions(
            paths[0] if len(paths) == 1 else list(paths),
            label=self.label,
            scores=self.score,
            group=self.group,
            weight=self.weight,
            by=by,
            scale=self.scale,
        )


def are_predictions(first: Path, flags: PredictionFlags, given: frozenset[str]) -> bool:
    """Whether a command's first argument is predictions rather than a model folder: by what it is, and by the flags.

    Raises:
        ArgumentError: it is the one, and flags are said for the other.
    """
    said = sorted(given & {flag.name for flag in flags_of(PredictionFlags)})
    if (first / "model.json").is_file():
        if said:
            raise ArgumentError(f"{first} is a model folder: leave out {', '.join(said)}, of files of predictions")
        return False
    if said:
        return True
    if kind_of(first) in ("file", "other") and (first.is_file() or holds_parquet(first)):
        flags.check()
    return False


@dataclass(frozen=True)
class Evaluate(Command):
    """Metrics of a model on labelled rows, or of anybody's predictions.

    MODEL is a model folder. DATA is then a prepared folder (with --split) or a raw file, or several, with the label
    columns. Or the first argument is a file with labels and scores, of which --label and --score name the columns.

    Examples:

        ctrlib evaluate runs/clicks data/clicks --split test
        ctrlib evaluate runs/clicks yesterday.csv --by shop
        ctrlib evaluate scores.parquet --label click --score p --group user
    """

    model: Positional[Path]
    """Model folder, as `ctrlib train` writes it; or a file of predictions."""
    data: Annotated[Positional[Paths], shown("[DATA] ...")] = ()
    """Prepared folder, or raw files or folders of parquet files, as `ctrlib prepare` takes them."""
    split: OptionalName = None
    """Which split of a prepared folder; otherwise test."""
    by: OptionalName = None
    """Column by whose values the rows are told apart too: where the model ranks badly, or promises too much."""
    scoring: ScoringFlags = field(default_factory=ScoringFlags)
    predictions: PredictionFlags = field(default_factory=PredictionFlags)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        if are_predictions(self.model, self.predictions, self.given):
            return self._predictions()
        check_model(self.model)
        if not self.data:
            raise ArgumentError(f"{self.model} is a model folder: say which DATA to evaluate it on after it")
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

        from ctrlib._json import to_json
        from ctrlib.serving.predictor import Predictor

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

    def _predictions(self) -> int:
        self.predictions.check()
        paths = (self.model, *self.data)
        for path in paths:
            check_raw(path)
        if idle := sorted(self.given & {"--split", *(flag.name for flag in flags_of(ScoringFlags))}):
            raise ArgumentError(f"{named(paths)} holds predictions, so {', '.join(idle)} cannot be said: leave it out")

        from ctrlib._json import to_json
        from ctrlib.analysis.predictions import as_plain, evaluate_predictions

        one = self.predictions.read(paths, () if self.by is None else (self.by,))
        found = evaluate_predictions(one)
        if self.json:
            print(to_json(as_plain(found)))
        else:
            _print(found, self.predictions.group, self.by)
        return 0


def _print(found: dict[str, Any], group: str | None, by: str | None) -> None:
    """Metrics of each score, their differences, and slices."""
    for line in found["scores"]:
        print_scores(line, f"{line['score']} on {found['data']}, label {found['label']}")
        if line.get("refuted"):
            print(fill(f"{line['refuted']:,.0f} rows have a probability of 0 or 1 and the other label: log-loss inf"))
    if found["paired"]:
        rows = "rows" if group is None else f"values of {group}"
        print(fill(f"AUC of the one minus AUC of the other, on the same rows; {rows} are independent"))
        table = new_table("score", "other", "difference", "SE", "p", numbers=3)
        for line in found["paired"]:
            numbers = f"{line['difference']:+.5f}", f"{line['standard_error']:.5f}", f"{line['p_value']:.2g}"
            table.add_row(line["score"], line["other"], *numbers)
        show(table)
    if by is not None:
        print_slices(found["by"], by)
