"""Generated raw tables, whole and damaged, through `prepare` and `Predictor`: refused with file and place, or right.

    python tests/generated_inputs.py --help

A case is a small random table (`tests/input_tables.py`) in one of the forms that are read, and random arguments. What
must hold is said in plain Python, without the library:

* only errors of the library's own kinds come out, and each names the file (or the split) and a column or a row; what
  concerns a file as a whole, names it. A refusal needs a cause: what was generated without any is accepted;
* the rows that are kept and those that are skipped are all rows; those kept are in their order and hold the label,
  weight, group, numbers and texts that were written;
* every score is a finite number, the same from a file, a frame, a list of rows and a row; ids and numbers are those of
  the prepared folder, bit for bit; prepared twice, the folder has one fingerprint.

A case that breaks one of these makes the exit code 1, and is printed with the seed that makes it again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")

import input_tables as tables
import numpy as np
import polars as pl
import torch
import torchrec.modules.embedding_modules  # noqa: F401  what it warns of on import is its own
import tyro
from input_cases import Case, draw_case
from input_meaning import Meaning, same_number

import ctrlib as ctr
from ctrlib import models
from ctrlib.data.scan import DataError
from ctrlib.schema import Categorical, Numeric, RawId, SchemaError

PATIENCE = 30.0  # seconds: whoever takes longer hangs
OURS = (DataError, SchemaError, ValueError, TypeError, FileExistsError)


@dataclass(frozen=True)
class Trials:
    """How many cases."""

    number: int = 10_000
    """Cases to generate."""
    seed: int = 0
    """Of the cases."""
    first: int = 0
    """Number of the first case: to make one again."""
    seconds: float = math.inf
    """After so long no other case is begun."""


class BrokenError(Exception):
    """What did not hold."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise BrokenError(what)


# ------------------------------------------------------------------------------------------------------------ refusals

# What a refusal is about -> how it is worded, and what it has to name beside the file.
REASONS: dict[str, tuple[str, str]] = {
    "malformed row": (r": row \d+ \(line \d+ of the file\) has ", "row"),
    "row group without rows": (r": row group \d+ has no rows", "row"),
    "cell": (r"row \d+.*, column .* holds ", "row and column"),
    "columns missing": (
        r"columns \[.*\] are missing|has no columns|lacks columns|has columns .*, which .* lacks",
        "column",
    ),
    "other columns": (r"are in \w+ but not in train", "column"),
    "columns twice": (r"appear more than once", "column"),
    "name kept": (r"have names that are kept", "column"),
    "column type": (r"column .* has type|columns .* have type", "column"),
    "kind of values": (r"column .* holds values of kind", "column"),
    "ids as floats": (r"column .* holds ids that look like floats", "column"),
    "two spellings": (r"column .* holds values such as .*which shares its vocabulary", "column"),
    "all unknown": (r"column .* holds .* values and train knew none", "column"),
    "several types": (r"column .* holds cells of several types", "column"),
    "no time": (r"(split_by|stratify) names column|by which to split", "column"),
    "times of two units": (r"times of two units", "row and column"),
    "no feature": (r"no column can be a feature", "file"),
    "no rows": (r" has no rows| is empty", "file"),
    "empty split": (r"(train|valid|test) would have no rows", "file"),
    "no positive label": (r"label .* never holds .* in train", "column"),
    "damaged file": (r"cannot be read, it may be truncated|cannot be unpacked", "file"),
    "separator": (r"cannot tell what separates", "file"),
    "foreign": (r"looks like a .* file", "file"),
    "header": (r"line 1, the header", "file"),
    "no score": (r"row \d+: the model gives", "row"),
}


def reason_of(error: BaseException, sources: list[str], columns: list[str]) -> str:
    """What a refusal is about.

    Raises:
        BrokenError: it is none of the library's own, or does not say where.
    """
    text, kind = str(error), type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = type(error) in OURS and f"{os.sep}ctrlib{os.sep}" in frames[-1].filename
    at = next((frame for frame in reversed(frames) if f"{os.sep}ctrlib{os.sep}" in frame.filename), frames[-1])
    expect(own, f"uncaught {kind} at {Path(at.filename).name}:{at.lineno}: {text[:400]}")
    for reason, (wording, named) in REASONS.items():
        if not re.search(wording, text, re.DOTALL):
            continue
        expect(any(source in text for source in sources), f"{reason}: a refusal that names no file: {text[:400]}")
        if "column" in named:
            expect(
                any(repr(name) in text for name in columns), f"{reason}: a refusal that names no column: {text[:400]}"
            )
        return reason
    raise BrokenError(f"a refusal that nobody has judged, {kind}: {text[:400]}")


# ------------------------------------------------------------------------------------------------------------ one case


class Trial:
    """A case on its way through the library."""

    def __init__(self, case: Case, folder: Path, chance: random.Random) -> None:
        self.case, self.folder, self.chance = case, folder, chance
        self.table = case.table
        self.sources = [source for split in self.table.splits for source in split.sources]
        self.sources += [split.name for split in self.table.splits if self.table.form in tables.FRAMES]
        self.columns = [*self.table.columns, *case.other_names]
        self.starts = {split.name: split.rows.start for split in self.table.splits}

    def run(self) -> str:
        """Prepare and predict; returns "accepted", or what the refusal is about.

        Raises:
            BrokenError: something does not hold.
        """
        out = self.folder / "prepared"
        try:
            self.schema = self._prepare(out)
        except Exception as error:
            reason = reason_of(error, self.sources, self.columns)
            expect(self.table.trouble, f"refused without a cause: {str(error)[:400]}")
            if reason == "damaged file":
                expect(
                    "truncated" in " ".join(self.table.trouble), f"said to be damaged and is not: {str(error)[:400]}"
                )
            expect(sorted(path.name for path in self.folder.glob(".*")) == [], "leaves something half done")
            return reason
        self.meaning = Meaning(self.schema, self.table, self.case.options)
        self.prepared = self._read_prepared(out)
        if self.table.exact:
            self._check_rows(out)
        if self.chance.random() < 0.15:
            self._prepare(self.folder / "again")
            expect(ctr.fingerprint(out) == ctr.fingerprint(self.folder / "again"), "prepared twice, two fingerprints")
        numbers = [frame[f.name].abs().max() for frame in self.prepared.values() for f in self.schema.dense]
        self.largest = max(numbers, default=0.0)
        self._check_predictions(out)
        return "accepted"

    def _prepare(self, out: Path) -> ctr.Schema:
        splits = {split.name: split.data for split in self.table.splits}
        data = splits.get("data", splits)
        return ctr.prepare(data, out, log=None, **self.case.options)

    def _read_prepared(self, out: Path) -> dict[str, pl.DataFrame]:
        names = [name for name in ("train", "valid", "test") if (out / name).is_dir()]
        return {name: pl.read_parquet(sorted((out / name).glob("*.parquet")), glob=False) for name in names}

    # ------------------------------------------------------------------------------------------------ what is prepared

    def _check_rows(self, out: Path) -> None:
        """The rows of the folder are those written."""
        report = json.loads((out / "report.json").read_text())
        skips = self.case.options.get("on_bad_row") == "skip"
        self.rows: dict[str, list[int]] = {}  # split of the folder -> rows of the table
        for split in self.table.splits:
            bad = set(split.malformed)
            bad |= {row for row in range(len(split.rows)) if self.meaning.is_bad(split, row, with_labels=True)}
            expect(skips or not bad, f"{split.name}: rows {sorted(bad)[:5]} (from 0) are bad, and were taken")
            kept = [row for row in range(len(split.rows)) if row not in bad]
            parts = ("train", "valid", "test") if split.name == "data" else (split.name,)
            found = {name: self.prepared[name].height for name in parts if name in self.prepared}
            said = sum(report["skipped"].get(split.name, {}).values())
            expect(
                sum(found.values()) == len(kept) and said == len(bad),
                f"{split.name}: {found} rows are there and {said} were skipped, expected {len(kept)} and {len(bad)}",
            )
            self._place(split, kept, found)
        for split in self.table.splits:
            for name, rows in self.rows.items():
                if split.name in ("data", name):
                    self._check_cells(split, name, rows)

    def _place(self, split: tables.Split, kept: list[int], found: dict[str, int]) -> None:
        """Which rows each split of the folder has: by the row number that the table carries, if it does."""
        if tables.ROW_NUMBER not in self.table.columns:
            if len(found) == 1:
                self.rows[next(iter(found))] = kept
            return
        first = split.rows.start
        for name in found:
            numbers = self.prepared[name][tables.ROW_NUMBER].to_numpy().astype(np.float64)
            scale = self.schema[tables.ROW_NUMBER].parameters
            numbers = np.rint(numbers * ((scale["max"] - scale["min"]) or 1.0) + scale["min"])
            self.rows[name] = [int(number) - first for number in numbers]
            expect(self.rows[name] == sorted(self.rows[name]), f"{name}: rows have lost their order: {numbers[:20]}")
        everything = sorted(row for name in found for row in self.rows[name])
        expect(everything == kept, f"{split.name}: rows {everything[:20]}... are there, expected {kept[:20]}...")

    def _check_cells(self, split: tables.Split, name: str, rows: list[int]) -> None:
        """Labels, weight, group, numbers and ids of a split of the folder."""
        prepared, meaning = self.prepared[name], self.meaning
        for label in self.schema.labels:
            for row, value in zip(rows, prepared[label]):
                wanted = meaning.label(label, split.cells[label][row])
                expect(same_number(value, wanted), f"{name}, row {row}: label {label!r} is {value}, expected {wanted}")
        if weight := self.schema.weight:
            for row, value in zip(rows, prepared[weight]):
                wanted = np.float32(meaning.number(split.cells[weight][row]))
                expect(value == wanted, f"{name}, row {row}: weight is {value}, expected {wanted}")
        if group := self.schema.group:
            pairs = {
                (meaning.text(group, split.cells[group][row]), value) for row, value in zip(rows, prepared["__group__"])
            }
            expect(
                len(pairs) == len({text for text, _ in pairs}) == len({value for _, value in pairs}), f"groups: {pairs}"
            )
        for feature in self.schema.features:
            cells = split.cells[feature.name]
            for row, value in zip(rows, prepared[feature.name].to_list()):
                wanted = meaning.encoded(feature, cells[row], self._values(feature))
                same = same_number(value, wanted) if isinstance(feature, Numeric) else value == wanted
                kind = type(feature).__name__
                expect(
                    same or wanted is ...,
                    f"{name}, row {row}: {feature.name!r} ({kind}) holds {cells[row]!r}, is {value}, expected {wanted}",
                )

    def _values(self, feature: Any) -> dict[str, int]:
        """Value -> id, of the feature's vocabulary."""
        if isinstance(feature, Numeric | RawId):
            return {}
        self.__dict__.setdefault("vocabularies", {})
        name = feature.vocabulary or feature.name
        if name not in self.vocabularies:
            path = ctr.data.vocabulary.vocabulary_path(self.folder / "prepared" / "vocab", name)
            frame = pl.read_parquet(path, glob=False)
            self.vocabularies[name] = dict(zip(frame["value"], frame["id"]))
        return self.vocabularies[name]

    # ----------------------------------------------------------------------------------------------------- predictions

    def _check_predictions(self, out: Path) -> None:
        split = self.chance.choice(self.table.splits).part(self.chance)
        bad = set(split.malformed)
        bad |= {row for row in range(len(split.rows)) if self.meaning.is_bad(split, row, with_labels=False)}
        kept = [row for row in range(len(split.rows)) if row not in bad]
        encoder = ctr.Encoder.load(out)
        frame = self.meaning.frame(split, kept) if kept and self.table.exact else None
        if frame is not None:
            self._check_encoder(encoder, split, frame, kept)
        if any(isinstance(feature, RawId) for feature in self.schema.features):
            return  # whose tables need to be made by hand
        config = {"model": "mlp", "embedding_dim": 2, "hidden": [4]}
        torch.manual_seed(0)
        model = models.build(config, self.schema)
        if self.chance.random() < 0.1:
            ctr.save_model(model, config, out, self.folder / "model")
            predictor = ctr.Predictor.load(self.folder / "model")
        else:
            predictor = ctr.Predictor(model.eval(), self.schema, out)
        skip = bool(bad) and self.chance.random() < 0.8
        on_bad_row = "skip" if skip or not self.table.exact else self.chance.choice(("raise", "raise", "skip"))
        try:
            scores, counts = predictor.predict(split.data, on_bad_row=on_bad_row)
        except Exception as error:
            reason = reason_of(error, [*split.sources, "data"], self.columns)
            huge = reason == "no score"
            expect(
                huge or (bad and not skip) or not kept or not self.table.exact,
                f"prepared, but in prediction: {str(error)[:400]}",
            )
            return
        expect(np.isfinite(scores.to_numpy()).all(), "a score is no number")
        if not self.table.exact:
            return
        expect(not bad or on_bad_row == "skip", f"rows {sorted(bad)[:5]} (from 0) are bad, and were scored")
        expect(len(scores) == len(kept) == counts["rows"], f"{len(scores)} scores for {len(kept)} rows")
        wanted = [row + 1 for row in sorted(bad)]
        expect(counts["skipped_rows"] == wanted, f"skipped rows {counts['skipped_rows']}, expected {wanted}")
        if frame is None:
            return
        as_dicts = self.meaning.dicts(split, kept)
        forms = {"a frame": frame, "a list of rows": as_dicts}
        for what, rows in forms.items():
            self._check_same(scores, self._accepted(predictor, rows, what), what)
        for position in self.chance.sample(range(len(kept)), min(2, len(kept))):
            other = self._accepted(predictor, as_dicts[position], "a row")
            if other is not None:
                self._check_same(scores[position], other, f"row {kept[position]} alone")
        self._check_odd_rows(predictor, as_dicts)

    def _accepted(self, predictor: ctr.Predictor, rows: Any, what: str) -> Any:
        """Scores of rows that were scored from the file, too."""
        try:
            return predictor.predict(rows)[0]
        except Exception as error:
            if reason_of(error, ["data"], self.columns) == "all unknown" and isinstance(rows, dict):
                return None  # its only value may be written otherwise; in the file others are known
            raise BrokenError(f"scored from the file, refused as {what}: {str(error)[:400]}") from error

    def _check_same(self, scores: pl.DataFrame, others: pl.DataFrame, what: str) -> None:
        one, other = scores.to_numpy(), others.to_numpy()
        expect(one.shape == other.shape, f"{what}: {other.shape} scores, expected {one.shape}")
        logits = [np.log(p.clip(1e-300)) - np.log1p(-p.clip(max=1 - 1e-16)) for p in (one, other)]
        # Sums of larger numbers round more.
        close = np.abs(logits[0] - logits[1]) <= 1e-6 * np.maximum(max(1, self.largest), np.abs(logits[0]))
        saturated = (np.abs(logits[0]) > 20) & (np.abs(one - other) < 1e-8)
        expect((close | saturated).all(), f"{what}: scores {other[~close][:3]}, from the file {one[~close][:3]}")

    def _check_encoder(self, encoder: ctr.Encoder, split: tables.Split, frame: pl.DataFrame, kept: list[int]) -> None:
        """Ids and numbers are those of the folder, bit for bit."""
        try:
            columns, _ = encoder.transform(frame)
        except Exception as error:
            reason_of(error, ["rows"], self.columns)
            raise BrokenError(f"prepared, but refused by the encoder: {str(error)[:400]}") from error
        single = [f for f in self.schema.sparse if isinstance(f, Categorical | RawId)]
        for name, rows in self.rows.items():
            if split.name not in ("data", name):
                continue
            shift = self.starts[split.name] - split.rows.start
            place = {row: position for position, row in enumerate(kept)}
            places = [place[row + shift] for row in rows if row + shift in place]
            present = [row + shift in place for row in rows]
            for position, feature in enumerate(single):
                wanted = self.prepared[name][feature.name].to_numpy()[present]
                expect(
                    (columns.ids[places, position] == wanted).all(), f"{feature.name!r}: other ids than the folder's"
                )
            for position, feature in enumerate(self.schema.dense):
                wanted = self.prepared[name][feature.name].to_numpy()[present]
                same = columns.floats[places, position].view(np.int32) == wanted.view(np.int32)
                expect(same.all(), f"{feature.name!r}: other numbers than the folder's")
            for feature in self.schema.sparse:
                if feature in single:
                    continue
                ragged = columns.ragged[feature.name]
                found = [ragged.values[ragged.offsets[i] : ragged.offsets[i + 1]].tolist() for i in places]
                wanted = self.prepared[name][feature.name].filter(present).to_list()
                expect(found == wanted, f"{feature.name!r}: other ids in lists")

    def _check_odd_rows(self, predictor: ctr.Predictor, rows: list[dict[str, Any]]) -> None:
        """A cell that nobody expects: scored, or refused by name; the same alone and among others."""
        odd: list[Any] = [
            None,
            "abc",
            math.inf,
            math.nan,
            1e39,
            -1,
            2**70,
            True,
            "",
            " ",
            [],
            ["a"],
            [None],
            {},
            b"x",
            0.5,
        ]
        for _ in range(2):
            row = dict(self.chance.choice(rows))
            name = self.chance.choice(list(row))
            value = self.chance.choice(odd)
            row[name] = value
            if self.chance.random() < 0.1:
                del row[name]
            for form in (row, [row], pl.DataFrame([row]) if value not in ({}, 2**70) else row):
                try:
                    scores, _ = predictor.predict(form)
                except Exception as error:
                    if not isinstance(form, pl.DataFrame) or "at least" not in str(error):
                        reason_of(error, ["data"], self.columns)
                    continue
                expect(np.isfinite(scores.to_numpy()).all(), f"{name!r} holds {value!r}: a score is no number")


# --------------------------------------------------------------------------------------------------------------- cases


@dataclass
class Summary:
    """What was generated and what came of it."""

    cases: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        accepted = self.results["accepted"]
        refused = {reason: count for reason, count in self.results.most_common() if reason != "accepted"}
        reasons = ", ".join(f"{reason} {count}" for reason, count in refused.items())
        forms = ", ".join(f"{form} {count}" for form, count in self.forms.most_common())
        return (
            f"{self.cases} inputs in {self.seconds:.0f} s ({forms}): {accepted} accepted, {sum(refused.values())} "
            f"refused ({reasons}), {len(self.failures)} failures"
        )


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Whoever takes longer is told so; whoever does not hear it ends the process, with what it was doing."""

    def ring(*_: object) -> None:
        raise BrokenError(f"takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_case(number: int, seed: int, folder: Path, summary: Summary) -> None:
    """Generate a case, and count what comes of it."""
    chance = random.Random(f"{seed} {number}")
    folder.mkdir()
    case = None
    try:
        case = draw_case(chance, folder)
        with patience(PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("error")
            result = Trial(case, folder, chance).run()
        summary.results[result] += 1
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of polars is no Exception
        if case is None or not isinstance(error, BrokenError):
            traceback.print_exc()
        what = str(error) if isinstance(error, BrokenError) else f"{type(error).__name__}: {error}"
        form = "" if case is None else f" [{case.table.form}, {', '.join(sorted(case.table.trouble)) or 'no trouble'}]"
        summary.failures.append(f"--seed {seed} --first {number} --number 1{form}: {what}")
        print(summary.failures[-1], flush=True)
        summary.results["failed"] += 1
    if case is not None:
        summary.forms[case.table.form] += 1
    summary.cases += 1
    shutil.rmtree(folder)


def run(trials: Trials, folder: Path) -> Summary:
    """All cases, one after another."""
    summary, start = Summary(), time.monotonic()
    for number in range(trials.first, trials.first + trials.number):
        if time.monotonic() - start > trials.seconds:
            break
        run_case(number, trials.seed, folder / f"case-{number}", summary)
        if summary.cases % 500 == 0:
            print(f"{summary.cases} cases, {len(summary.failures)} failures", file=sys.stderr, flush=True)
    summary.seconds = time.monotonic() - start
    return summary


def main(trials: Trials) -> int:
    folder = Path(tempfile.mkdtemp(prefix="ctrlib-inputs-"))
    summary = run(trials, folder)
    print(summary)
    shutil.rmtree(folder, ignore_errors=True)
    return bool(summary.failures)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Trials, description=__doc__)))
