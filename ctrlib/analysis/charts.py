"""Pictures of a page, drawn as SVG: no script, no font, no picture from elsewhere, and light or dark as the page is.

Each mark says its numbers when the mouse rests on it. What is drawn stands in a table as well: the page sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from ctrlib.errors import ArgumentError

WIDTH, HEIGHT = 370, 250  # pixels within the axes of a chart: two stand side by side
LEFT, BOTTOM, TOP, RIGHT = 62, 42, 12, 14  # around them
NAMES, DOTS = 170, 270  # for names at the left of dots, and for dots
ROW = 15  # a dot's height
NUM_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """Points (x, y) by one name; `low` and `high` may hold an interval of each y. What is not finite is left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    colour: int = 0
    points: bool = True
    marked: Sequence[int] = field(default=())
    """Places of points that are drawn larger."""


def legend(names: Sequence[str]) -> str:
    """Which colour is whose; nothing for one name."""
    if len(names) < 2:
        return ""
    keys = "".join(
        f'<span><i class="c{place % NUM_COLOURS}"></i>{escape(name)}</span>' for place, name in enumerate(names)
    )
    return f'<p class="legend">{keys}</p>'


def chart(
    title: str,
    series: Sequence[Series],
    x: str,
    y: str,
    *,
    log: bool = False,
    diagonal: bool = False,
    whole: bool = False,
) -> str:
    """Lines through points on common axes.

    Args:
        title: above it.
        series: what is drawn.
        x: what the horizontal axis shows, with its unit.
        y: what the vertical one shows.
        log: both axes are logarithmic; numbers of 0 and below are left out.
        diagonal: draw the line y = x, and both axes alike.
        whole: x are whole numbers.

    >>> drawn = chart("AUC", [Series("fm", [1, 2], [0.6, 0.7])], "epoch", "AUC", whole=True)
    >>> drawn.count("<circle"), "http" in drawn
    (2, False)
    """

    def fits(*numbers: float) -> bool:
        return all(math.isfinite(number) and (number > 0 or not log) for number in numbers)

    xs = [a for one in series for a, b in zip(one.x, one.y) if fits(a, b)]
    ys = [b for one in series for a, b in zip(one.x, one.y) if fits(a, b)]
    for one in series:
        ys += [number for ends in (one.low, one.high) for number in ends if fits(number)]
    if not xs:
        return ""
    if diagonal:
        xs = ys = [*xs, *ys]
    across, up = _Axis.over(xs, LEFT, LEFT + WIDTH, log, whole), _Axis.over(ys, TOP + HEIGHT, TOP, log)
    marks = [across.horizontal(x), up.vertical(y)]
    if diagonal:
        low, high = max(across.low, up.low), min(across.high, up.high)
        marks.append(
            f'<line class="guide" x1="{across(low):.1f}" y1="{up(low):.1f}" x2="{across(high):.1f}" '
            f'y2="{up(high):.1f}"/>'
        )

    def known(one: Series) -> list[int]:
        return [place for place, point in enumerate(zip(one.x, one.y)) if fits(*point)]

    for one in series:  # below all lines
        for place in known(one) if one.low else ():
            low, high = one.low[place], one.high[place]
            low = low if fits(low) else up.low
            at = f"{across(one.x[place]):.1f}"
            marks.append(f'<line class="band" x1="{at}" x2="{at}" y1="{up(low):.1f}" y2="{up(high):.1f}"/>')
    for one in series:
        colour, places = f"c{one.colour % NUM_COLOURS}", known(one)
        path = " ".join(f"{across(one.x[place]):.1f},{up(one.y[place]):.1f}" for place in places)
        marks.append(f'<polyline class="line {colour}{" dashed" if one.dashed else ""}" points="{path}"/>')
        for place in places if one.points else ():
            said = f"{one.name}: {x} {one.x[place]:.6g}, {y} {one.y[place]:.6g}"
            marks.append(
                f'<circle class="{colour}" cx="{across(one.x[place]):.1f}" cy="{up(one.y[place]):.1f}" '
                f'r="{5.5 if place in one.marked else 3}"><title>{escape(said)}</title></circle>'
            )
    return _figure(title, LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM, marks)


def dots(
    title: str,
    names: Sequence[str],
    series: Sequence[Series],
    unit: str,
    *,
    guide: float | None = None,
    overlaid: bool = False,
) -> str:
    """For each name a row with a dot of each series and its interval; `y` of a series has a number for each name.

    With `guide`, there is a line at that number; `overlaid` series share one line of each row.

    Raises:
        ValueError: a series has not a number for each name.

    >>> drawn = dots("AUC", ["a", "b"], [Series("fm", [], [0.6, 0.7], [0.5, 0.6], [0.7, 0.8])], "AUC", guide=0.5)
    >>> drawn.count("<circle")
    2
    """
    if any(len(one.y) != len(names) for one in series):
        raise ArgumentError(f"expected {len(names)} numbers in each series, one for each name")
    finite = [
        number for one in series for ends in (one.y, one.low, one.high) for number in ends if math.isfinite(number)
    ]
    if not finite:
        return ""
    axis = _Axis.over([*finite, *([guide] if guide is not None else [])], NAMES, NAMES + DOTS, False)
    step = ROW * (1 if overlaid else len(series)) + 8
    height = step * len(names)
    marks = [axis.horizontal(unit, top=0, bottom=height)]
    if guide is not None:
        marks.append(f'<line class="guide" x1="{axis(guide):.1f}" x2="{axis(guide):.1f}" y1="0" y2="{height}"/>')
    for row, name in enumerate(names):
        middle = row * step + step / 2
        marks.append(f'<text x="{NAMES - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(shortened(name))}</text>')
        for place, one in enumerate(series):
            if not math.isfinite(value := one.y[row]):
                continue
            y = row * step + 4 + ROW * ((0 if overlaid else place) + 0.5)
            colour = f"c{one.colour % NUM_COLOURS}"
            said = f"{name}{f', {one.name}' if one.name != name else ''}: {value:.5g}"
            if one.low and math.isfinite(one.low[row]):
                said += f", 95 % interval {one.low[row]:.5g} to {one.high[row]:.5g}"
                marks.append(
                    f'<line class="whisker {colour}" x1="{axis(one.low[row]):.1f}" x2="{axis(one.high[row]):.1f}" '
                    f'y1="{y:.1f}" y2="{y:.1f}"/>'
                )
            marks.append(
                f'<circle class="{colour}" cx="{axis(value):.1f}" cy="{y:.1f}" r="4"><title>{escape(said)}</title>'
                "</circle>"
            )
    return _figure(title, NAMES + DOTS + 20, height + BOTTOM, marks)


def shortened(name: str) -> str:
    """A name that fits at the left of a picture.

    >>> shortened("a" * 40)
    'aaaaaaaaaaaaaaaaaaaaaaaaa…'
    """
    return name if len(name) <= 26 else name[:25] + "…"


def _figure(title: str, width: float, height: float, marks: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg></figure>'
    )


@dataclass(frozen=True)
class _Axis:
    """From numbers to pixels."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, numbers: Sequence[float], start: float, stop: float, log: bool, whole: bool = False) -> _Axis:
        """One that has room for all of them."""
        low, high = min(numbers), max(numbers)
        if log:
            low, high = low / 1.15, high * 1.15
            ticks = _log_ticks(low, high)
        else:
            room = 0.06 * (high - low) or max(0.05 * abs(high), 1e-6)
            low, high = low - room, high + room
            ticks = _ticks(low, high, whole)
        return cls(low, high, start, stop, log, tuple(ticks))

    def __call__(self, number: float) -> float:
        number = min(max(number, self.low), self.high)
        if self.log:
            share = math.log(number / self.low) / math.log(self.high / self.low)
        else:
            share = (number - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def horizontal(self, said: str, top: float = TOP, bottom: float = TOP + HEIGHT) -> str:
        marks = [
            f'<line class="grid" x1="{self(tick):.1f}" x2="{self(tick):.1f}" y1="{top}" y2="{bottom}"/>'
            f'<text x="{self(tick):.1f}" y="{bottom + 15}" text-anchor="middle">{tick:.6g}</text>'
            for tick in self.ticks
        ]
        middle = (self.start + self.stop) / 2
        return "".join(marks) + f'<text x="{middle}" y="{bottom + 33}" text-anchor="middle">{escape(said)}</text>'

    def vertical(self, said: str) -> str:
        marks = [
            f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{self(tick):.1f}" y2="{self(tick):.1f}"/>'
            f'<text x="{LEFT - 6}" y="{self(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
            for tick in self.ticks
        ]
        at = TOP + HEIGHT / 2
        return (
            "".join(marks)
            + f'<text x="12" y="{at}" transform="rotate(-90 12 {at})" text-anchor="middle">{escape(said)}</text>'
        )


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Round numbers, about five of them.

    >>> _ticks(0.61, 0.74, False), _ticks(0.9, 3.1, True)
    ([0.62, 0.64, 0.66, 0.68, 0.7, 0.72, 0.74], [1.0, 2.0, 3.0])
    """
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * 0.75)
    if whole:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; of more than two powers, those alone.

    >>> _log_ticks(0.008, 0.13)
    [0.01, 0.02, 0.05, 0.1]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 300 else (1,)
    return [
        round(digit * 10.0**power, 15) for power in powers for digit in digits if low <= digit * 10.0**power <= high
    ]
