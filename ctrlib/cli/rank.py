"""`ctrlib rank`: which features are worth it, before anything is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from ctrlib._target import target
from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import OptionalInt, OptionalName, OptionalPath, Paths, Switch, shown
from ctrlib.cli.paths import check_prepared, check_raw, holds_parquet
from ctrlib.cli.prepare import Columns, Files, Prepare, Split, Vocabulary
from ctrlib.cli.prepare import Output as Prepared
from ctrlib.cli.tables import new_table, progress_line, show
from ctrlib.cli.usage import fill, flags_of
from ctrlib.errors import ArgumentError, check_whole

if TYPE_CHECKING:
    from rich.table import Table

    from ctrlib.ranking.label import LabelRanking
    from ctrlib.ranking.pairs import Screening
    from ctrlib.ranking.run import Ranking

SHOWN = 10  # pairs of a kind
OVERLAP = 0.95


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: OptionalPath = None
    """Folder for ranking.html, ranking.json and tables in parquet; otherwise none is written."""
    overwrite: Switch = False
    """Replace what an earlier ranking left in --out."""


@dataclass(frozen=True)
class How:
    """What is ranked, and how."""

    split: OptionalName = None
    """Which split of a prepared folder; otherwise train."""
    bins: int = 32
    """Quantile bins per number."""
    budget: OptionalInt = None
    """Number of features to choose, by 3MR: as relevant as possible, not redundant, and with synergy."""
    singles: Switch = False
    """Rank features only, and no pairs: what those tell together, and about each other."""
    memory: int = 1024
    """Mebibytes that counting may take; what does not fit lies in temporary files, or is counted in several passes."""


@dataclass(frozen=True)
class Rank(Command):
    """Rank features by what they tell about the label beyond chance.

    DATA is a prepared folder, or raw files, which are prepared into a temporary folder. The relevance of a feature is
    its mutual information with the label, in thousandths of a nat, less what the same feature has on average if the
    labels are permuted; z and q say how surely there is more than chance, q being the share of false discoveries.

    Examples:

        ctrlib rank data/clicks --out runs/ranking
        ctrlib rank clicks.csv --label click --ignore row_id
    """

    data: Annotated[Positional[Paths], shown("DATA ...")]
    """Prepared folder, or raw files or a folder of parquet files, as `ctrlib prepare` takes them."""
    output: Output = field(default_factory=Output)
    how: How = field(default_factory=How)
    file: Files = field(default_factory=Files)
    column: Columns = field(default_factory=Columns)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def __call__(self) -> int:
        """Run the command; the exit status."""
        check_whole(1, bins=self.how.bins, memory=self.how.memory)
        if self.how.budget is not None:
            check_whole(1, budget=self.how.budget)
        out = self.output.out
        for path in self.data:
            check_raw(path)
        if out is None:
            return self._rank()
        inputs = [*self.data, *(self.file.valid or ()), *(self.file.test or ()), self.column.from_ranking]
        with target(out, "ranking", inputs=inputs, overwrite=self.output.overwrite):
            return self._rank()

    def _rank(self) -> int:
        out = self.output.out
        with self._prepared() as folder:
            from ctrlib.ranking.run import rank

            labels = None if self.column.label is None else list(self.column.label)
            with progress_line("pairs", quiet=self.json) as progress:
                ranking = rank(
                    folder,
                    split=self.how.split or "train",
                    num_bins=self.how.bins,
                    labels=labels,
                    pairs=not self.how.singles,
                    memory=self.how.memory << 20,
                    progress=progress,
                )
        ranking = dataclasses.replace(ranking, data=" ".join(map(str, self.data)))
        if out is not None:
            ranking.save(out)
        if self.json:
            chosen = {} if self.how.budget is None else {"chosen": ranking.choose(self.how.budget)}
            print(json.dumps({**ranking.to_dict(), **chosen}, allow_nan=False))
        else:
            print_ranking(ranking)
            if self.how.budget is not None:
                print(fill(f"the best {self.how.budget}: {', '.join(ranking.choose(self.how.budget))}"))
            if out is not None:
                print(fill(f"{out}: see ranking.html; `ctrlib prepare --from-ranking {out} --top K` takes the best K"))
        return 0

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[Path]:
        """A prepared folder of the data, and its name.

        Raises:
            ValueError: flags are said that are for raw data, or for prepared folders.
        """
        first = self.data[0]
        if (first / "schema.json").is_file() or (first.is_dir() and not holds_parquet(first)):
            check_prepared(first)
            if len(self.data) > 1:
                raise ArgumentError(f"{first} is a prepared folder, which is ranked alone; leave out {self.data[1]}")
            if idle := sorted(self.given & raw_flags()):
                raise ArgumentError(f"{first} is prepared already, so {', '.join(idle)} cannot be said: leave it out")
            yield first
            return
        if self.how.split is not None:
            raise ArgumentError(f"--split {self.how.split}: {first} is raw data, only prepared folders have splits")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "prepared"
            command = Prepare(
                data=self.data,
                output=Prepared(folder),
                file=self.file,
                column=self.column,
                vocabulary=self.vocabulary,
                split=Split(split=(1, 0, 0)),
            )
            command.prepare(None)
            yield folder


def raw_flags() -> set[str]:
    """Flags that say how raw files are read, which a prepared folder knows by itself."""
    return {flag.name for group in (Files, Columns, Vocabulary) for flag in flags_of(group)} - {"--label"}


def print_ranking(ranking: Ranking) -> None:
    """A table for each label."""
    for one in ranking.labels:
        said = (
            f"label {one.label}: {one.rows:,} rows of {ranking.data}, {ranking.split}, {one.positive:.2%} positive, "
            f"{1000 * one.entropy:.1f} thousandths of a nat to tell"
        )
        print(fill(said))
        show(_table(one))
        if one.screening is not None:
            _print_pairs(one, one.screening)
    _print_findings(ranking)
    if ranking.left_out:
        print(fill("not ranked: " + "; ".join(f"{name}, {why}" for name, why in ranking.left_out.items())))


def _print_findings(ranking: Ranking) -> None:
    if not ranking.findings:
        return
    table = new_table("column", "finding", "prepare with")
    for one in ranking.findings:
        table.add_row(one.feature, f"{one.kind.replace('_', ' ')}: {one.said}", one.flag)
    show(table)


def _print_pairs(one: LabelRanking, screening: Screening) -> None:
    found = [pair for pair in one.pairs if pair.found]
    said = f"{len(found)} of {screening.pairs:,} pairs tell more together than both alone (q < 0.05)"
    if screening.sampled < screening.rows:
        said += (
            f"; they were looked for in {screening.sampled:,} rows, and {screening.kept} of them counted in all: a "
            f"synergy of {1000 * (screening.detectable or 0.0):.3f} is missed once in 20 times"
        )
    if screening.too_large:
        said += f"; in no pair is {', '.join(screening.too_large)}, of more values than --memory has room for"
    print(fill(said))
    if found:
        table = new_table("pair", "values", "once", "synergy", "relevance", "overlap", "q", numbers=6)
        for pair in found[:SHOWN]:
            table.add_row(
                f"{pair.first} x {pair.second}",
                f"{pair.values:,}",
                f"{pair.once / pair.values:.0%}",
                f"{1000 * pair.synergy:.3f}",
                f"{1000 * pair.relevance:.3f}",
                f"{pair.overlap:.2f}",
                f"{pair.q:.1g}",
            )
        show(table)
    close = sorted((pair for pair in one.pairs if pair.overlap > OVERLAP), key=lambda pair: -pair.overlap)
    if close:
        print("one nearly follows from the other (overlap):")
        print(fill("  " + ", ".join(f"{pair.first} and {pair.second} ({pair.overlap:.2f})" for pair in close[:SHOWN])))
    if one.screening is not None:
        print(fill(f"in the order of 3MR: {', '.join(one.orders['3mr'])}"))


def _table(one: LabelRanking) -> Table:
    table = new_table("feature", "values", "once", "relevance", "+-", "chance", "z", "q", numbers=7)
    for score in one.scores:
        table.add_row(
            f"{score.feature} (leak)" if score.leak else score.feature,
            f"{score.values:,}",
            f"{score.once / score.values:.0%}",
            f"{1000 * score.relevance:.3f}",
            f"{500 * (score.high - score.low):.3f}",
            f"{1000 * score.expected:.3f}",
            f"{score.z:.1f}",
            "1" if score.q > 0.995 else f"{score.q:.1g}",
        )
    return table
