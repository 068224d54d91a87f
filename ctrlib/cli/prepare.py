"""`ctrlib prepare`: from raw files to a prepared folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, cast, get_args

from tyro.conf import Positional

from ctrlib._lazy import instead
from ctrlib._target import target
from ctrlib.cli.flags import Command
from ctrlib.cli.kinds import (
    Names,
    OptionalFloat,
    OptionalInt,
    OptionalName,
    OptionalNames,
    OptionalPath,
    OptionalPaths,
    OptionalText,
    OptionalTexts,
    Parts,
    Paths,
    Switch,
    Texts,
    shown,
)
from ctrlib.cli.paths import check_raw
from ctrlib.cli.usage import fill
from ctrlib.errors import ArgumentError
from ctrlib.schema import Categorical, Feature, MultiValued, Numeric, NumericTransform, Schema, Sequence

if TYPE_CHECKING:
    from ctrlib.data.events import Events, History

LIMITS = ("min_count", "max_values")
MissingLabels = Annotated[Optional[Literal["raise", "mask"]], shown("{raise,mask}")]  # noqa: UP045  # see `kinds`
NUMERIC = (
    "Columns with one number per row; a transform may follow, as in price:log, and is standard otherwise: one of "
    f"{', '.join(get_args(NumericTransform))}."
)


@dataclass(frozen=True)
class Output:
    """What is written."""

    out: Path
    """Prepared folder to write."""
    overwrite: Switch = False
    """Replace the prepared folder in --out if there is one."""


@dataclass(frozen=True)
class Files:
    """How the files are read."""

    valid: OptionalPaths = None
    """Files with the validation rows; otherwise they are split off DATA."""
    test: OptionalPaths = None
    """Files with the test rows; goes together with --valid."""
    separator: OptionalText = None
    """Character between the fields of text files; otherwise told from the file's name, or its first lines."""
    columns: Names = ()
    """Column names, for text files without a header line."""
    missing: OptionalTexts = None
    """Texts that mean a missing cell, such as NA or ?; otherwise an empty one does."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """What to do about damaged rows: stop and name the first, or leave them out and count them."""


@dataclass(frozen=True)
class Columns:
    """What the columns are. Those that are not named here are inferred, and shown."""

    label: OptionalNames = None
    """Columns that hold a label each, 0 or 1; otherwise the column `label`."""
    positive: Texts = ()
    """The text of the positive class of a label that is text, as LABEL=TEXT: 'income=>50K'"""
    missing_labels: MissingLabels = None
    """What to do about rows without a label: stop (raise), or leave that label out of the loss; otherwise stop."""
    weight: OptionalName = None
    """Column that holds the weight of each row."""
    group: OptionalName = None
    """Column whose values make the groups of GAUC, such as the user; it may be a feature too."""
    categorical: Names = ()
    """Columns with one id per row."""
    numeric: Annotated[Texts, shown("NAME ...", NUMERIC)] = ()
    multi: Names = ()
    """Columns with several ids per row; the separator may follow, and options: 'genres:,:max_length=9:padding=0'"""
    sequence: Names = ()
    """Columns with a history of ids; whose vocabulary they share may follow, and options: 'seen:item:separator=,'"""
    ignore: Names = ()
    """Columns to leave out."""
    from_ranking: OptionalPath = None
    """What `ctrlib rank --out` wrote: columns that are not among its best --top are left out."""
    top: OptionalInt = None
    """Number of features to take from the ranking."""


@dataclass(frozen=True)
class Log:
    """What to make of the rows as a log of events. A row is told what happened before it, never its own label."""

    time: OptionalName = None
    """Column with the times of the rows, numbers or dates; without it rates are out of fold, and no histories."""
    history: Names = ()
    """Histories to make, as ITEM:USER; options may follow: 'item_id:user_id:max_length=20:events=all'"""
    rate: Names = ()
    """Columns whose smoothed rates and counts to make; of several together, as user_id:category"""
    delay: OptionalFloat = None
    """How long after a row its label is known, in the unit of --time; seconds where it holds dates; otherwise 0."""
    strength: OptionalFloat = None
    """How many events the rate of all rows counts for in that of a value; otherwise 10."""
    event_label: OptionalName = None
    """The label, where there are several."""

    def events(self) -> Events | None:
        """What these flags ask for; None if nothing.

        Raises:
            ValueError: a flag says what cannot be, or goes with others that are not there.
        """
        from ctrlib.data.events import Events

        if not self.history and not self.rate:
            said = {"--time": self.time, "--delay": self.delay, "--strength": self.strength}
            said["--event-label"] = self.event_label
            alone = [flag for flag, value in said.items() if value is not None]
            if alone:
                raise ArgumentError(f"{alone[0]} is for what is made of a log: add --history ITEM:USER or --rate ITEM")
            return None
        rates = [tuple(text.split(":")) for text in self.rate]
        said = {"delay": self.delay, "strength": self.strength, "label": self.event_label}
        given: Any = {name: value for name, value in said.items() if value is not None}
        return Events(self.time, tuple(map(_history, self.history)), tuple(rates), **given)


@dataclass(frozen=True)
class Vocabulary:
    """Which values of the training rows get a row of their own in the tables."""

    min_count: OptionalInt = None
    """Rows that a value must be in, otherwise 1; rarer ones share the out-of-vocabulary row."""
    max_values: OptionalInt = None
    """Most frequent values to keep per vocabulary; otherwise all."""


@dataclass(frozen=True)
class Kept:
    """An earlier preparation to keep to, for newer data."""

    like: OptionalPath = None
    """Prepared folder or model folder whose features, ids, scales and edges of numbers are kept."""
    extend: Switch = False
    """Give values that it does not have ids after its own, if --min-count of them are in the training rows."""


@dataclass(frozen=True)
class Split:
    """How DATA is split, without --valid and --test."""

    split: Parts = None
    """Parts of train, valid and test, in any unit; otherwise 8 1 1."""
    split_by: OptionalName = None
    """Column (a time) in whose order rows go to train, then valid, then test; otherwise they go at random."""
    stratify: OptionalName = None
    """Label of whose classes each split shall hold its share, to the row; for the random split."""
    seed: int = 0
    """Number that the random split is drawn from."""


@dataclass(frozen=True)
class Prepare(Command):
    """Turn raw files into a prepared folder of ids and numbers.

    Column types are inferred and shown; name columns to say otherwise. Everything that is fitted (vocabularies, scales)
    is fitted on the training rows only. The folder holds schema.json, the vocabularies and three splits.

    Files are CSV, TSV or JSON lines, packed (.gz, .zst) or not, parquet or Arrow. Several follow each other.

    Examples:

        ctrlib prepare clicks.csv --out data/clicks --label click \\
            --group user_id --numeric price:log
        ctrlib prepare today.csv --out data/today --like data/clicks --extend
        ctrlib prepare log.csv --out data/log --label click --split-by ts \\
            --time ts --history item_id:user_id --rate item_id user_id
    """

    data: Annotated[Positional[Paths], shown("DATA ...")]
    """Files, or a folder of parquet files, of all rows, or of the training rows with --valid and --test."""
    output: Output
    file: Files = field(default_factory=Files)
    column: Columns = field(default_factory=Columns)
    log: Log = field(default_factory=Log)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    kept: Kept = field(default_factory=Kept)
    split: Split = field(default_factory=Split)

    def features(self) -> list[Feature]:
        """The features that the flags name.

        Raises:
            ValueError: a transform or an option is none.
            SchemaError: the folder of --like is no prepared folder or model folder.
        """
        said = {"min_count": self.vocabulary.min_count, "max_values": self.vocabulary.max_values}
        said = {name: limit for name, limit in said.items() if limit is not None}
        was = {} if self.kept.like is None else {f.name: f for f in Schema.load(self.kept.like).features}

        def rare(name: str) -> dict[str, Any]:
            """What is said of all vocabularies, else what the earlier folder has."""
            feature = was.get(name)
            return {limit: getattr(feature, limit) for limit in LIMITS if hasattr(feature, limit)} | said

        features: list[Feature] = [Categorical(name, **rare(name)) for name in self.column.categorical]
        for text in self.column.numeric:
            name, _, transform = text.partition(":")
            known = get_args(NumericTransform)
            if transform and transform not in known:
                raise ArgumentError(f"--numeric {text}: unknown transform {transform!r}; {instead([transform], known)}")
            features.append(Numeric(name, transform=cast(NumericTransform, transform or "standard")))
        for text in self.column.multi:
            name, options = _listed("--multi", text, "separator")
            features.append(MultiValued(name, **options, **rare(name)))
        for text in self.column.sequence:
            name, options = _listed("--sequence", text, "vocabulary")
            features.append(Sequence(name, **options, **rare(name)))
        return features

    def _ignored(self) -> tuple[str, ...]:
        """Columns to leave out: those that were named, and those that a ranking does not choose.

        Raises:
            ValueError: --from-ranking and --top do not go together, or it is no ranking.
        """
        column = self.column
        if (column.from_ranking is None) != (column.top is None):
            raise ArgumentError("--from-ranking and --top go together: name a ranking and how many features to take")
        if column.from_ranking is None or column.top is None:
            return tuple(column.ignore)
        from ctrlib.ranking.chosen import not_chosen

        given = {feature.name for feature in self.features()}
        others = [name for name in not_chosen(column.from_ranking, column.top) if name not in given]
        return tuple(dict.fromkeys([*column.ignore, *others]))

    def _crosses(self, ignored: Collection[str]) -> list[tuple[str, str]]:
        """Pairs that the ranking has found, of features that are taken and not said to be of another kind."""
        if self.column.from_ranking is None:
            return []
        from ctrlib.ranking.chosen import crosses

        others = {feature.name for feature in self.features() if not isinstance(feature, Categorical)}
        return [pair for pair in crosses(self.column.from_ranking) if not {*pair} & {*ignored, *others}]

    def prepare(self, log: Callable[[Any], None] | None) -> Schema:
        """Write the folder, as the flags say.

        Raises:
            ValueError, CtrlibError: what is said of files, columns or output does not hold.
        """
        files, column, out = self.file, self.column, self.output.out
        if self.kept.extend and self.kept.like is None:
            raise ArgumentError("--extend adds values to those of another folder: name it by --like FOLDER")
        features, events = self.features(), self.log.events()
        unclear = [text for text in column.positive if "=" not in text]
        if unclear:
            raise ArgumentError(f"--positive {unclear[0]}: expected LABEL=TEXT, such as income=>50K")
        given = {"train": self.data}
        if files.valid is not None and files.test is not None:
            given |= {"valid": files.valid, "test": files.test}
        elif files.valid is not None or files.test is not None:
            raise ArgumentError("--valid and --test go together: give both, or neither to split DATA")
        for paths in given.values():
            for path in paths:
                check_raw(path)
        read = [*(path for paths in given.values() for path in paths), self.kept.like, column.from_ranking]
        with target(out, "prepared", inputs=read, overwrite=self.output.overwrite):
            return self._prepare(given, features, events, log)

    def _prepare(
        self,
        given: dict[str, tuple[Path, ...]],
        features: list[Feature],
        events: Events | None,
        log: Callable[[Any], None] | None,
    ) -> Schema:
        files, column, out = self.file, self.column, self.output.out

        from ctrlib.data.prepare import prepare

        ignored = self._ignored()
        splits: Any = {name: paths[0] if len(paths) == 1 else list(paths) for name, paths in given.items()}
        return prepare(
            splits if len(splits) > 1 else splits["train"],
            out,
            features=features,
            labels=column.label,
            weight=column.weight,
            group=column.group,
            min_count=self.vocabulary.min_count,
            max_values=self.vocabulary.max_values,
            split=self.split.split or (8, 1, 1),
            split_by=self.split.split_by,
            stratify=self.split.stratify,
            seed=self.split.seed,
            ignore=ignored,
            separator=files.separator,
            columns=files.columns or None,
            missing_values=files.missing,
            missing_labels=column.missing_labels,
            label_positive=dict(text.split("=", 1) for text in column.positive),
            events=events,
            on_bad_row=files.on_bad_row,
            like=self.kept.like,
            extend=self.kept.extend,
            crosses=self._crosses(ignored),
            overwrite=self.output.overwrite,
            log=log,
        )

    def __call__(self) -> int:
        """Run the command; the exit status."""
        out, schema = self.output.out, self.prepare(_say)
        if self.json:
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            print(json.dumps({"out": str(out), "hash": schema.hash, **report}))
        else:
            print(f"prepared {out}; train with: ctrlib train {out}")
            report = json.loads((out / "report.json").read_text(encoding="utf-8"))
            if crosses := report.get("crosses"):
                print(fill(f"--crosses ranked crosses {', '.join(map(':'.join, crosses))}"))
        return 0


def _say(message: Any) -> None:
    """Print to stderr; what that needs is imported when there is something to say."""
    from rich.console import Console

    Console(stderr=True).print(message)


def _history(text: str) -> History:
    """A history to make, ITEM:BY[:OPTION=VALUE]...

    Raises:
        ValueError: it is not of that form.

    >>> _history("item_id:user_id:max_length=20")
    History(item='item_id', by='user_id', max_length=20, events='positive')
    """
    from ctrlib.data.events import History

    names: list[str] = []
    options: dict[str, str] = {}
    for part in text.split(":"):
        option, is_option, value = part.partition("=")
        if not is_option:
            names.append(part)
        elif option not in MADE:
            raise ArgumentError(f"--history {text}: unknown option {option!r}; {instead([option], MADE)}")
        elif option in options:
            raise ArgumentError(f"--history {text}: {option} is given twice")
        else:
            options[option] = value
    if len(names) != 2 or not all(names):
        raise ArgumentError(f"--history {text}: expected ITEM:USER, whose items and by whom, such as item_id:user_id")
    length = options.get("max_length", "50")
    if not re.fullmatch(r"[1-9][0-9]*", length):
        raise ArgumentError(f"--history {text}: max_length is {length!r}, expected 1 or more")
    item, by = names
    return History(item, by, max_length=int(length), events=cast(Any, options.get("events", "positive")))


MADE = ("max_length", "events")
LISTED = ("separator", "max_length", "padding", "vocabulary")


def _listed(flag: str, text: str, short: str) -> tuple[str, dict[str, Any]]:
    """A bag or history, NAME[:SHORT][:OPTION=VALUE]...: its name, and its arguments.

    A value goes on to the next ":OPTION=", so it may hold colons.

    Raises:
        ValueError: there is no such option, it is given twice, or it is no number where it has to be one.

    >>> _listed("--sequence", "seen:item:separator=,:max_length=20", "vocabulary")
    ('seen', {'vocabulary': 'item', 'separator': ',', 'max_length': 20})
    """
    for option in re.findall(r":([A-Za-z_]+)=", text):
        if option not in LISTED:
            raise ArgumentError(f"{flag} {text}: unknown option {option!r}; {instead([option], LISTED)}")
    head, *rest = re.split(rf":(?=(?:{'|'.join(LISTED)})=)", text)
    name, _, value = head.partition(":")
    options: dict[str, Any] = {short: value} if value else {}
    for option, _, value in (one.partition("=") for one in rest):
        if option in options:
            raise ArgumentError(f"{flag} {text}: {option} is given twice")
        options[option] = value
    if "max_length" in options:
        if not re.fullmatch(r"[1-9][0-9]*", options["max_length"]):
            raise ArgumentError(f"{flag} {text}: max_length is {options['max_length']!r}, expected 1 or more")
        options["max_length"] = int(options["max_length"])
    return name, options
