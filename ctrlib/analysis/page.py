"""A report as one HTML file that needs nothing else: no network, no fonts, no scripts from elsewhere.

Parts are texts of HTML, made by the functions here from plain data, and put together by `page`. Each picture is an SVG
whose marks say their numbers when the mouse rests on them, and whose numbers stand in a table as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ctrlib.errors import ArgumentError

CELL = 18  # pixels of a square of a heat map
LEFT = 190  # pixels for names
WIDTH = 560  # pixels of a chart
COLOURS = ((255, 255, 255), (178, 24, 43))  # of 0 and of 1

# Light or dark as the reader's system is; colours of runs differ for the colour-blind too (Okabe and Ito's, by turns).
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --faint: #e3e3e3; --head: #f4f4f4; --guide: #888;
  --bar: #7aa6c2; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #b58900; --c5: #56758a; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181b; --faint: #34383d; --head: #23272b;
  --guide: #999; --bar: #4d7f9f; --c0: #4aa8e0; --c1: #f08a3c; --c2: #2fc59a; --c3: #e39cc4; --c4: #e0b53a;
  --c5: #9db9cb; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; } p { max-width: 60em; }
.wide { overflow-x: auto; margin-bottom: .8em; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 9px; text-align: right; border-bottom: 1px solid var(--faint); white-space: nowrap; }
th { cursor: pointer; background: var(--head); position: sticky; top: 0; white-space: normal; }
th.text, td.text { text-align: left; white-space: normal; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg .bar { fill: var(--bar); } svg .whisker { stroke: var(--ink); } svg .guide { stroke: var(--guide); }
figure { display: inline-block; margin: .5em 1.5em .5em 0; max-width: 100%; vertical-align: top; }
figure svg { max-width: 100%; height: auto; } figcaption { font-weight: 600; font-size: 13px; margin-bottom: 4px; }
svg .grid { stroke: var(--faint); } svg .band { stroke: var(--faint); stroke-width: 7; }
figure .guide, svg .dashed { stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 1.6; } figure .whisker { stroke-width: 1.6; }
details { margin: .4em 0 1em; } summary { cursor: pointer; font-size: 13px; }
.legend span { margin-right: 1.2em; white-space: nowrap; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .4em; }
"""
STYLE += "".join(
    f"svg circle.c{n} {{ fill: var(--c{n}); }} svg .line.c{n}, figure .whisker.c{n} {{ stroke: var(--c{n}); }} "
    f"i.c{n} {{ background: var(--c{n}); }}\n"
    for n in range(6)
)

# A click on a heading sorts by that column: largest first, then smallest first. Empty cells stay below.
SCRIPT = """
document.querySelectorAll("table.sortable th").forEach(head => head.addEventListener("click", () => {
  const table = head.closest("table"), column = head.cellIndex, body = table.tBodies[0];
  const down = head.dataset.order !== "down";
  table.querySelectorAll("th").forEach(other => delete other.dataset.order);
  head.dataset.order = down ? "down" : "up";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = !isNaN(x) && !isNaN(y);
    const order = numbers ? x - y : x.localeCompare(y);
    return down === numbers ? -order : order;
  };
  [...body.rows].sort(compare).forEach(row => body.appendChild(row));
}));
"""


def page(title: str, parts: Sequence[str], *, refresh: int = 0) -> str:
    """The whole file; with `refresh`, a browser reads it again after so many seconds.

    >>> page("a < b", [text("and c")]).count("a &lt; b")
    2
    """
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        + (f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else "")
        + f"<title>{escape(title)}</title>\n"
        f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</html>\n"
    )


def heading(words: str) -> str:
    """Of a section."""
    return f"<h2>{escape(words)}</h2>"


def details(words: str, inside: str) -> str:
    """What is shown at a click on the words, and is there for everybody to search and to print.

    >>> details("numbers", text("1"))
    '<details><summary>numbers</summary><p>1</p></details>'
    """
    return f"<details><summary>{escape(words)}</summary>{inside}</details>"


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{escape(words)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float | None]], digits: int = 4) -> str:
    """A table that a click on a heading sorts, by the numbers themselves and not as they are shown.

    Raises:
        ValueError: a row has not a cell for each column.

    >>> table(["item", "z"], [["a", 1.23456], ["b", None]]).count("<td")
    4
    """
    if any(len(row) != len(columns) for row in rows):
        raise ArgumentError(f"expected {len(columns)} cells in each row of the table, for {list(columns)}")
    texts = [any(isinstance(row[at], str) for row in rows) for at in range(len(columns))]
    kinds = [' class="text"' if is_text else "" for is_text in texts]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, columns))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{kind}{_value(cell)}>{_shown(cell, digits)}</td>" for kind, cell in zip(kinds, row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def bars(names: Sequence[str], values: Sequence[float], intervals: Sequence[tuple[float, float]], unit: str) -> str:
    """A bar for each value, from 0, with its interval, one below the other."""
    low = min([0.0, *(one for one, _ in intervals)])
    high = max([0.0, *(one for _, one in intervals)]) or 1.0
    scale = WIDTH / (high - low)

    def x(value: float) -> float:
        return LEFT + (value - low) * scale

    marks = []
    for at, (name, value, (least, most)) in enumerate(zip(names, values, intervals)):
        y = at * CELL + 4
        said = f"{name}: {value:.4g} {unit}, 95 % interval {least:.4g} to {most:.4g}"
        marks.append(
            f"<g><title>{escape(said)}</title>"
            f'<text x="{LEFT - 6}" y="{y + 10}" text-anchor="end">{escape(_short(name))}</text>'
            f'<rect x="{min(x(0), x(value)):.1f}" y="{y}" width="{abs(x(value) - x(0)):.1f}" height="12" class="bar"/>'
            f'<line x1="{x(least):.1f}" x2="{x(most):.1f}" y1="{y + 6}" y2="{y + 6}" class="whisker"/></g>'
        )
    height = len(names) * CELL + 24
    axis = f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="0" y2="{height - 20}" class="guide"/>'
    ends = f'<text x="{x(0):.1f}" y="{height - 6}">0</text>' + (
        f'<text x="{x(high):.1f}" y="{height - 6}" text-anchor="end">{high:.4g} {escape(unit)}</text>'
    )
    return _svg(LEFT + WIDTH + 10, height, "".join(marks) + axis + ends)


def heat_map(names: Sequence[str], values: Sequence[Sequence[float]], unit: str) -> str:
    """A square for each pair, white for 0 or less and red for 1.

    Raises:
        ValueError: `values` is not square, a row for each name.
    """
    if len(values) != len(names) or any(len(row) != len(names) for row in values):
        raise ArgumentError(f"expected {len(names)} rows of as many values, one for each name")
    squares = []
    top = LEFT - 60
    for row, (name, line) in enumerate(zip(names, values)):
        y = top + row * CELL
        squares.append(f'<text x="{LEFT - 6}" y="{y + 13}" text-anchor="end">{escape(_short(name))}</text>')
        x = LEFT + row * CELL + 13
        squares.append(
            f'<text x="{x}" y="{top - 6}" transform="rotate(-60 {x} {top - 6})">{escape(_short(name))}</text>'
        )
        for column, value in enumerate(line):
            said = escape(f"{name} and {names[column]}: {unit} {value:.3f}")
            squares.append(
                f'<rect x="{LEFT + column * CELL}" y="{y}" width="{CELL}" height="{CELL}" fill="{_colour(value)}" '
                f'stroke="#eee"><title>{said}</title></rect>'
            )
    return _svg(LEFT + len(names) * CELL + 120, top + len(names) * CELL + 10, "".join(squares))


def _svg(width: int, height: int, inside: str) -> str:
    return f'<div class="wide"><svg width="{width}" height="{height}" role="img">{inside}</svg></div>'


def _colour(value: float) -> str:
    share = min(1.0, max(0.0, value))
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(*COLOURS))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def _value(cell: str | int | float | None) -> str:
    return "" if cell is None or isinstance(cell, str) else f' data-value="{cell!r}"'


def _shown(cell: str | int | float | None, digits: int) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return escape(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.{digits}g}"
