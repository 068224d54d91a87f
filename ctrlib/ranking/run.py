"""Which features are worth it: `rank`, and what it gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ctrlib._lazy import instead
from ctrlib._target import target
from ctrlib.data.prepare import prepare
from ctrlib.data.raw import RawData
from ctrlib.errors import ArgumentError, UnknownNameError, check_whole
from ctrlib.making import new_folder
from ctrlib.ranking.chosen import LEVEL, VERSION, Order, choose
from ctrlib.ranking.label import LabelRanking
from ctrlib.ranking.order import orders
from ctrlib.ranking.pairs import PairScore, find_pairs
from ctrlib.ranking.quality import Finding, drift, findings
from ctrlib.ranking.relevance import Score, count, entropy_of, scores
from ctrlib.ranking.report import report
from ctrlib.ranking.source import Source
from ctrlib.schema import MultiValued
from ctrlib.schema import Sequence as History


@dataclass(frozen=True)
class Ranking:
    """What `rank` found, for each label, and what it has to say about the data; `left_out`: columns that preparation
    left out, and why, so that they are not ranked.
    """

    data: str
    split: str
    labels: list[LabelRanking]
    findings: list[Finding]
    left_out: dict[str, str]

    def __getitem__(self, label: str) -> LabelRanking:
        for one in self.labels:
            if one.label == label:
                return one
        raise UnknownNameError(f"no label {label!r}; there are {[one.label for one in self.labels]}")

    def choose(self, number: int, order: Order = "3mr") -> list[str]:
        """The first features of an order; of several labels, those that come first for any of them."""
        return choose([one.orders[order] for one in self.labels], number)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ranking.json has it."""
        return {"version": VERSION, **dataclasses.asdict(self)}

    def pair_frame(self) -> pl.DataFrame:
        """A row for each label and pair, in the order of synergy, as pairs.parquet has it."""
        rows = [{"label": one.label, **dataclasses.asdict(pair)} for one in self.labels for pair in one.pairs]
        return pl.DataFrame(rows, infer_schema_length=None)

    def frame(self) -> pl.DataFrame:
        """A row for each label and feature, in the order of relevance, as ranking.parquet has it."""
        rows = [
            {"label": one.label, "rank": place, **dataclasses.asdict(score)}
            for one in self.labels
            for place, score in enumerate(one.scores, 1)
        ]
        return pl.DataFrame(rows, infer_schema_length=None)

    def save(self, out: str | Path) -> None:
        """Write ranking.html, .json and .parquet, and pairs.parquet, into a folder, made or replaced as a whole.

        Raises:
            TargetError: `out` is something else than a folder of an earlier ranking.
            LockedError: somebody else writes into it; the message says who.
            OSError: the disk is full.
        """
        with target(out, "ranking", overwrite=True), new_folder(out) as folder:
            page = report(self.data, self.split, self.labels, self.findings, self.left_out)
            (folder / "ranking.html").write_text(page, encoding="utf-8")
            self.frame().write_parquet(folder / "ranking.parquet")
            if any(one.pairs for one in self.labels):
                self.pair_frame().write_parquet(folder / "pairs.parquet")
            (folder / "ranking.json").write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def rank(
    data: RawData,
    *,
    labels: Sequence[str] | str | None = None,
    split: str = "train",
    num_bins: int = 32,
    pairs: bool = True,
    memory: int = 1 << 30,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Ranking:
    """Rank the features of a data set by what they tell about its labels beyond chance.

    Args:
        data: a prepared folder; or raw data as `prepare` takes it, which is prepared into a temporary folder.
        labels: to be explained; all labels of a prepared folder, or `label` of raw data, by default.
        split: which split of a prepared folder.
        num_bins: quantile bins of each number.
        pairs: whether pairs are ranked, too; those of features with one value per row.
        memory: bytes that counting may take; what does not fit lies in temporary files, or is counted in several
            passes. Features of which single values do not fit are not combined in pairs, which the ranking says.
        threads: that count pairs at the same time; as many as the process may use by default.
        progress: is called with the number of pairs that are done.
        options: of `prepare`, for raw data, such as `features`, `ignore`, `missing_values`.

    Raises:
        SchemaError, DataError: the data does not fit or is damaged, or a label has one class; as `prepare`.
        ArgumentError: an argument is out of range, or there is no such label or split.

    >>> import numpy as np
    >>> from ctrlib.schema import Categorical
    >>> rng = np.random.default_rng(1)
    >>> click, noise = rng.integers(0, 2, (2, 4000))
    >>> item = np.where(rng.random(4000) < 0.2, click, rng.integers(0, 50, 4000))
    >>> frame = pl.DataFrame({"noise": noise, "item": item, "row": np.arange(4000).astype(str), "click": click})
    >>> ranking = rank(frame, labels="click", features=[Categorical(name) for name in ("noise", "item", "row")])
    >>> [(score.feature, score.values, round(score.relevance, 3)) for score in ranking["click"].scores]
    [('item', 50, 0.099), ('row', 4000, 0.0), ('noise', 2, -0.0)]
    """
    check_whole(1, num_bins=num_bins, memory=memory)
    threads = threads or len(os.sched_getaffinity(0))
    with _prepared(data, labels, options) as (folder, name):
        source = Source(folder, num_bins=num_bins)
        if split not in source.splits():
            raise ArgumentError(f"split {split!r}: {name} has {source.splits()}; name one of these")
        wanted = _labels(source, labels, name)
        counts = count(source, split, memory=memory)
        found = []
        for label in wanted:
            ordered = scores(counts, source.schema.features, label)
            crosses: list[PairScore] = []
            screening = None
            spilled = counts.spilled(label)
            names = [
                f.name
                for f in source.schema.features
                if not isinstance(f, MultiValued | History) and f.name not in spilled
            ]
            if pairs and len(names) > 1:
                crosses, screening = find_pairs(
                    source, split, counts, label, names, memory=memory, threads=threads, progress=progress
                )
                screening = dataclasses.replace(screening, too_large=spilled)
            negatives, positives = counts.rows[label]
            share = positives / (negatives + positives)
            found.append(
                LabelRanking(
                    label,
                    negatives + positives,
                    share,
                    entropy_of(share),
                    ordered,
                    crosses,
                    screening,
                    _orders(ordered, crosses),
                )
            )
        by_label = {one.label: one.scores for one in found}
        drifted = []
        for later in source.splits()[source.splits().index(split) + 1 :]:
            after = count(source, later, memory=memory)
            drifted += drift(counts.by_label[wanted[0]], after.by_label[wanted[0]], source.schema.features, later)
        said = findings(source.schema, by_label, found[0].pairs, counts.by_label, drifted)
        return Ranking(name, split, found, said, _left_out(folder))


def _left_out(folder: Path) -> dict[str, str]:
    """What report.json says of it; a folder that somebody else wrote has none."""
    path = folder / "report.json"
    if not path.is_file():
        return {}
    left_out: dict[str, str] = json.loads(path.read_text(encoding="utf-8")).get("left_out", {})
    return left_out


def _orders(found: Sequence[Score], crosses: Sequence[PairScore]) -> dict[Order, list[str]]:
    """What is within chance counts as nothing; among equals come first those with most synergy, then as ranked.

    In the two orders that look at pairs, features that tell nothing, neither alone nor in a pair, come after all
    others: to a formula that only weighs relevance against overlap, noise is better than what is told already.
    """
    synergy: dict[str, float] = {}
    for pair in crosses:
        for name in (pair.first, pair.second) if pair.found else ():
            synergy[name] = max(synergy.get(name, 0.0), pair.synergy)
    told = {one.feature: one.relevance if one.q < LEVEL else 0.0 for one in found if not one.leak}
    relevance = {name: told[name] for name in sorted(told, key=lambda name: -synergy.get(name, 0.0))}
    relations = [
        (
            pair.first,
            pair.second,
            pair.overlap,
            relevance.get(pair.first, 0.0)
            + relevance.get(pair.second, 0.0)
            + (pair.synergy if pair.found or pair.synergy < 0 else 0.0),
        )
        for pair in crosses
    ]
    telling = {name: told for name, told in relevance.items() if told > 0 or name in synergy}
    silent = [name for name in told if name not in telling]
    by_pairs = {order: [*names, *silent] for order, names in orders(telling, relations).items()}
    return {**by_pairs, "relevance": list(told)}


@contextlib.contextmanager
def _prepared(data: Any, labels: Sequence[str] | str | None, options: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """A prepared folder, and what to call the data."""
    is_path = isinstance(data, str | os.PathLike)
    name = str(data) if is_path else "rows"
    if is_path and (Path(data) / "schema.json").is_file():
        if options:
            raise ArgumentError(f"{data} is prepared already, so {', '.join(options)} cannot be said: leave it out")
        yield Path(data), name
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "prepared"
        prepare({"train": data}, folder, labels=labels, **{"log": None, **options})
        yield folder, name


def _labels(source: Source, labels: Sequence[str] | str | None, name: str) -> list[str]:
    known = list(source.schema.labels)
    wanted = known if labels is None else [labels] if isinstance(labels, str) else list(dict.fromkeys(labels))
    if unknown := [label for label in wanted if label not in known]:
        raise ArgumentError(f"{name} has no label {unknown[0]!r}; {instead(unknown, known)}")
    return wanted
