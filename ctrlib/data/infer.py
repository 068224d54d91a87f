"""Say what the columns of an unknown table probably mean, and why; every guess is shown and can be overridden.

Integers are the hard case: 1993 may be a year, a price or the id of a shop. A name or a shape that speaks for a
measurement makes a column numeric, otherwise integers that come up again and again are ids, which costs least when it
is wrong: a number treated as ids is bucketed by its values.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import polars as pl

from ctrlib.data.table import RawTable, is_cell
from ctrlib.schema import Categorical, Feature, MultiValued, Numeric

SAMPLE_ROWS = 200_000
FEW_VALUES = 20  # integers with no more distinct values than this are ids, whatever their name
MIN_ROWS_FOR_IDENTIFIER = 100  # among fewer rows all values being distinct is no evidence
SKEWED = 2.0  # skewness from which on a logarithm helps
LOOK_AT = 10_000  # cells that are looked at for separators

_ID_NAME = re.compile(r"(^|[_\s.-])ids?$|^ID$|[a-z0-9_]I[dD]s?$|^id[_\s.-]")
_MEASURE_NAME = re.compile(
    r"(^|[_\s.-])(age|amount|amt|count|cnt|num|number|price|cost|hours?|minutes?|seconds?|weeks?|days|time|timestamp|"
    r"year|income|wage|salary|gains?|loss(es)?|rate|score|rating|duration|total|sum|avg|mean|weight|height|width|"
    r"length|size|distance|quantity|qty|dividends|balance|clicks|views|impressions)($|[_\s.-])",
    re.IGNORECASE,
)


_TIME = r"^\d{4}[-/]\d{1,2}[-/]\d{1,2}([T ]\d{1,2}:\d{2}|$)"
# Numbers as people write them, which are text until the marks are gone: $1,234.50, 83 %, 1,200.
_MARKED = r"^[-+(]?[$€£¥]?\s?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?\s?[%€£¥]?\)?$"
_TIME_NAME = re.compile(r"hour|time|date|day", re.IGNORECASE)
HOURS = "hours as YYMMDDHH: make hour of day and weekday of them (docs/data.md, Splits and times)"

NO_CELLS = "ignored: values of type"


class Guess(NamedTuple):
    """What a column is taken for (None: left out), the reason to show, and a remark if the guess is doubtful."""

    name: str
    feature: Feature | None
    reason: str
    remark: str = ""


def infer_features(table: RawTable, names: list[str] | None = None) -> list[Guess]:
    """Guess what columns mean, from about 200,000 rows spread over the whole table.

    Args:
        table: with or without the `__row__` column of `read_raw`.
        names: the columns to look at, by default all.

    >>> ages = [20 + i % 60 for i in range(200)]
    >>> frame = pl.LazyFrame({"age": ages, "price": [i / 7 for i in ages], "shop": [f"s{i}" for i in ages]})
    >>> for guess in infer_features(RawTable((frame,), "demo")): print(guess.feature, "|", guess.reason)
    Numeric(name='age', transform='standard', parameters=None) | integers, the name of a measurement
    Numeric(name='price', transform='standard', parameters=None) | numbers with fractions
    Categorical(name='shop', min_count=1, max_values=None, vocabulary=None, bucket=None, num_embeddings=None) | text
    """
    names = list(table.dtypes) if names is None else names
    ends = np.cumsum(table.gather(lambda piece: piece.select(pl.len()))["len"].to_numpy().astype(np.int64))
    num_rows = int(ends[-1])
    step = max(1, num_rows // SAMPLE_ROWS)
    # Every so manieth row of the whole, wherever a piece begins.
    offsets = [-int(start) % step for start in (0, *ends[:-1])]
    plans = [piece.select(names).gather_every(step, offset) for piece, offset in zip(table.pieces, offsets)]
    sample = pl.concat(table.run(plans, table.name))
    with ThreadPoolExecutor() as threads:
        guesses = list(threads.map(_guess, sample.get_columns()))
    if step > 1:
        guesses = [_confirmed(guess, table, num_rows) for guess in guesses]
    return guesses


def _guess(values: pl.Series) -> Guess:
    name, dtype = values.name, values.dtype
    present = values.drop_nulls()
    if dtype.is_float():
        present = present.drop_nans()
    if present.is_empty():
        return Guess(name, None, "ignored: no values")
    if isinstance(dtype, pl.List | pl.Array) and is_cell(dtype.inner):  # type: ignore[arg-type]
        return Guess(name, MultiValued(name), "lists")
    if not is_cell(dtype):
        return Guess(name, None, f"{NO_CELLS} {dtype}, neither text nor numbers nor times; cast them to use them")
    if dtype == pl.Boolean or dtype.is_temporal():
        present = present.cast(pl.String)
    distinct = present.unique()
    numbers = distinct.cast(pl.Float64, strict=False)
    if numbers.is_nan().any() and numbers.is_not_nan().any():
        # Among numbers, the text "nan" is a missing cell.
        present, distinct = (
            column.filter(~column.cast(pl.Float64, strict=False).is_nan().fill_null(False))
            for column in (present, distinct)
        )
        numbers = distinct.cast(pl.Float64, strict=False)
    num_distinct = len(distinct)
    if num_distinct == 1 and len(present) == len(values):
        return Guess(name, None, f"ignored: always {present[0]!r}")
    if num_texts := numbers.null_count():
        only = num_texts == num_distinct
        share = 0.0 if only else 1 - present.cast(pl.Float64, strict=False).null_count() / len(present)
        return _guess_text(name, present, distinct, share)
    numbers = present.cast(pl.Float64)
    if numbers.is_infinite().any():  # which the checks refuse, naming the row
        return Guess(name, Numeric(name), "numbers, of which some are infinite")
    if dtype == pl.String and distinct.str.contains(r"^[+-]?0\d").any():
        return Guess(name, Categorical(name), "text: digits with leading zeros")
    if (numbers != numbers.floor()).any():
        return _numeric(name, numbers, "numbers with fractions")
    if dtype.is_float() and (numbers.abs() >= 2.0**63).any():
        return _numeric(name, numbers, "floats beyond the integers of 64 bits")
    return _guess_integers(name, numbers, num_distinct)


def _guess_text(name: str, present: pl.Series, distinct: pl.Series, share_of_numbers: float) -> Guess:
    num_distinct, bar = len(distinct), "|"
    some = present.gather_every(max(1, len(present) // LOOK_AT))
    divided = distinct.str.contains(bar, literal=True).any() and present.str.contains(bar, literal=True).mean() > 0.1  # type: ignore[operator]
    if divided and (tokens := present.str.split("|").explode()).n_unique() < 0.5 * len(tokens):
        return Guess(name, MultiValued(name), "text: values repeat between '|'")
    if num_distinct == len(present) >= MIN_ROWS_FOR_IDENTIFIER:
        times = some.str.contains(_TIME).all()
        why = f"ignored: every row has another {'time; --split-by splits by it' if times else 'text'}"
        return Guess(name, None, why, _marks(name, some, "was left out, since every row has another"))
    if share_of_numbers > 0.5:
        other = present.filter(present.cast(pl.Float64, strict=False).is_null()).mode()[0]
        reason = f"text: {share_of_numbers:.0%} numbers, but also {other!r} (missing_values?)"
        return Guess(name, Categorical(name), reason, _marks(name, some, "was taken for ids"))
    return Guess(name, Categorical(name), "text", _doubt(name, some))


def _doubt(name: str, some: pl.Series) -> str:
    """What to remark on text that is taken for ids, if anything."""
    if some.str.contains(_TIME).all():
        return (
            f"column {name!r} holds times, such as {some[0]!r}, and was taken for ids, which later times are not "
            f"among: split by it (--split-by {name}), make parts of it that come again, such as the hour, or leave it "
            f"out (--ignore {name})"
        )
    if marks := _marks(name, some, "was taken for ids"):
        return marks
    taken = f"every cell of {name!r} was taken for one id, such as {some[0]!r}, but cells look like lists"
    if (some.str.starts_with("[") & some.str.ends_with("]")).mean() > 0.5:  # type: ignore[operator]
        return f"{taken} in JSON: name it as a bag (--multi {name}) or a history (--sequence {name})"
    separator = separator_in(some)
    if separator is not None:
        return (
            f"{taken} with {separator!r} between values: name it as a bag (--multi '{name}:separator={separator}') or "
            f"a history (--sequence '{name}:separator={separator}')"
        )
    return ""


def _marks(name: str, some: pl.Series, taken: str) -> str:
    """A remark on numbers that are text because of a currency, `%` or separators of thousands."""
    if not some.str.contains(_MARKED).all() or not some.str.contains(r"[^\d.+-]").any():
        return ""
    if some.str.contains(r"[%$€£¥]").mean() <= 0.5 and separator_in(some) is not None:  # type: ignore[operator]
        return ""  # 101,205 are two ids if 101 and 205 come again
    marked = some.filter(some.str.contains(r"[^\d.+-]"))
    return (
        f"column {name!r} {taken}, but holds numbers with other signs, such as {marked[0]!r}: write them as plain "
        "numbers, such as 1234.5, to have it numeric"
    )


def separator_in(texts: pl.Series) -> str | None:
    """What seems to separate values inside cells of text: it divides most of them, into few values that come again.

    >>> separator_in(pl.Series(["3,1,4", "1,5", "3,4,5", "5,4", "4,1", "1,3", "5", "4,5,1", "1,4,5"]))
    ','
    """
    num_distinct = texts.n_unique()
    for separator in ("|", ",", ";", " "):
        if texts.str.contains(separator, literal=True).mean() <= 0.5:  # type: ignore[operator]
            continue
        values = texts.str.split(separator).explode().str.strip_chars()
        values = values.filter(values != "")
        if values.n_unique() < 0.5 * min(num_distinct, len(values)):
            return separator
    return None


def _guess_integers(name: str, numbers: pl.Series, num_distinct: int) -> Guess:
    if _ID_NAME.search(name):
        if num_distinct == len(numbers) >= MIN_ROWS_FOR_IDENTIFIER:
            return Guess(name, None, "ignored: every row has another integer")
        return Guess(name, Categorical(name), "integers, the name of an id")
    if (num_distinct > FEW_VALUES or _TIME_NAME.search(name)) and _are_hours(numbers):
        return Guess(name, Categorical(name), HOURS)
    if num_distinct <= FEW_VALUES:
        return Guess(name, Categorical(name), f"integers, only {num_distinct} distinct")
    if _MEASURE_NAME.search(name):
        return _numeric(name, numbers, "integers, the name of a measurement")
    if num_distinct == len(numbers) >= MIN_ROWS_FOR_IDENTIFIER:
        return Guess(name, None, "ignored: every row has another integer")
    if _skewness(numbers) > SKEWED and float(numbers.median() or 0) <= num_distinct:  # type: ignore[arg-type]
        return _numeric(name, numbers, "integers, mostly small, some large")
    if num_distinct > 0.5 * len(numbers) and len(numbers) >= MIN_ROWS_FOR_IDENTIFIER:
        return _numeric(name, numbers, "integers that hardly repeat")
    return Guess(name, Categorical(name), f"integers that repeat, {num_distinct:,} distinct")


def _are_hours(numbers: pl.Series) -> bool:
    """Whether all are hours of 2010 to 2039 in the form YYMMDDHH (Avazu's): of other integers, one in 100 looks so."""
    year, month, day, hour = (numbers // 10**digits % 100 for digits in (6, 4, 2, 0))
    fits = (numbers < 10**8) & year.is_between(10, 39) & month.is_between(1, 12) & day.is_between(1, 31) & (hour < 24)
    return bool(fits.all())


def _numeric(name: str, numbers: pl.Series, why: str) -> Guess:
    # The logarithm is defined for negatives as well (with their sign), so a few small ones do not forbid it.
    if _skewness(numbers) > SKEWED and float(numbers.quantile(0.05) or 0) >= -10:
        return Guess(name, Numeric(name, transform="log_standard"), f"{why}; skewed")
    return Guess(name, Numeric(name), why)


def _skewness(numbers: pl.Series) -> float:
    return float(numbers.skew() or 0.0)


def _confirmed(guess: Guess, table: RawTable, num_rows: int) -> Guess:
    """A column that is constant, or never repeats, in the sample only is a feature after all."""
    name = guess.name
    if guess.feature is not None or guess.reason.startswith(NO_CELLS):
        return guess
    value = pl.col(name).cast(pl.String).hash().alias(name)
    if guess.reason.startswith(("ignored: always", "ignored: no values")):
        bounds = table.gather(lambda piece: piece.select(low=value.min(), high=value.max()))
        same = bounds["low"].min() == bounds["high"].max()
        return guess if same else Guess(name, Categorical(name), "more than one value, though few rows have another")
    # How many distinct values there are is told from those whose hash is small: about SAMPLE_ROWS, if none repeats.
    share = min(1.0, SAMPLE_ROWS / num_rows)
    small = table.gather(lambda piece: piece.select(value).filter(pl.col(name) < int(share * 2**64)).unique())
    distinct = small[name].n_unique() > 0.9 * share * num_rows
    return guess if distinct else Guess(name, Categorical(name), "values that repeat")
