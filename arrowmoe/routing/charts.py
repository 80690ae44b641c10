"""Figures as inline SVG: bars, lines and a heat map, each with a title, a description and its numbers as a table.

Colours are the page's: class `s0` … `s5` is a series, `heat` takes its strength from opacity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final
from xml.etree.ElementTree import Element

from arrowmoe.routing.markup import el, table

SERIES: Final = 6
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 14, 46
NAMED_CELLS: Final = 30
TABLE_ROWS: Final = 12

Format = Callable[[float], str]


def percent(value: float) -> str:
    """0.1234 → 12.3 %."""
    return f"{100 * value:.1f} %"


def number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A labelled axis from `low` to `high`."""

    label: str
    low: float = 0.0
    high: float = 1.0
    form: Format = percent

    def ticks(self) -> list[float]:
        """About five round values within the axis."""
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(at * step, 12) + 0.0 for at in range(first, last + 1)]

    def part(self, value: float) -> float:
        """Where `value` is, as a share of the axis."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line through points (x, y), with the colour of its `slot` and, if it needs one, a name."""

    slot: int
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Words:
    """What a figure is called, what it shows, and how to read it."""

    key: str
    title: str
    description: str


def axis_over(label: str, values: Sequence[float], form: Format, *, zero: bool = True) -> Axis:
    """An axis that holds `values`, with room above them, and 0 if `zero`."""
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    room = (high - low) or abs(high) or 1.0
    return Axis(label=label, low=low, high=high + 0.05 * room, form=form)


def lines(
    words: Words, series: Sequence[Series], x: Axis, y: Axis, *, diagonal: bool = False, dots: bool = False
) -> Element:
    """Lines over two axes, with a diagonal where x = y is the ideal."""
    marks = [_path(f"{_kind(one.slot)} line", one.points, x, y) for one in series]
    if diagonal:
        marks.insert(0, _path("ideal", [(0, 0), (1, 1)], x, y))
    if dots:
        marks += [_dot(f"{_kind(one.slot)} dot", px, py, x, y) for one in series for px, py in one.points]
    rows = [[one.name, x.form(px), y.form(py)] for one in series for px, py in _thinned(one.points)]
    legend = [(one.slot, one.name) for one in series if one.name]
    return _figure(words, [*_axes(x, y), *marks], ["", x.label, y.label], rows, legend=legend)


def bars(words: Words, edges: Sequence[float], groups: Sequence[tuple[str, Sequence[float]]], x_label: str) -> Element:
    """Overlaid histograms: `groups` of heights between common `edges`."""
    x = Axis(label=x_label, low=edges[0], high=edges[-1], form=number)
    y = axis_over("share of prompts", [height for _, heights in groups for height in heights] + [0.0], percent)
    marks = [
        _bar(f"s{at} bar", edges[index], edges[index + 1], height, x, y)
        for at, (_, heights) in enumerate(groups)
        for index, height in enumerate(heights)
        if height > 0
    ]
    spans = [f"{number(low)} to {number(high)}" for low, high in pairwise(edges)]
    rows = [[span, *(percent(heights[at]) for _, heights in groups)] for at, span in enumerate(spans)]
    names = [name for name, _ in groups]
    return _figure(words, [*_axes(x, y), *marks], [x_label, *names], rows, legend=list(enumerate(names)))


def heat(words: Words, rows: Sequence[str], columns: Sequence[str], counts: Sequence[Sequence[int]]) -> Element:
    """A heat map of `counts`, each row against its own total; its table has the largest cells off the diagonal."""
    named = max(len(rows), len(columns)) <= NAMED_CELLS
    left, top, side = (130, 96, max(16, 390 / len(columns))) if named else (4, 4, 510 / len(columns))
    filled = [
        (down, across, count, count / sum(line))
        for down, line in enumerate(counts)
        for across, count in enumerate(line)
        if count
    ]
    cells = [
        _cell(left + side * across, top + side * down, side, share, count, f"{rows[down]} → {columns[across]}")
        for down, across, count, share in filled
    ]
    width, height = side * len(columns), side * len(rows)
    ground = el("rect", x=left, y=top, width=width, height=height, class_="cell")
    frame = [*_gaps(left, top, side, width, height), *_cell_names(rows, columns, left, top, side)] if named else []
    wrong = sorted((-count, rows[down], columns[across]) for down, across, count, _ in filled if down != across)
    listed = [[row, column, str(-count)] for count, row, column in wrong[:TABLE_ROWS]]
    size = (left + width + (66 if named else 4), top + height + 4)
    return _figure(words, [ground, *cells, *frame], ["label", "routed to", "prompts"], listed, size=size)


def _figure(
    words: Words,
    marks: Sequence[Element],
    header: list[str],
    rows: list[list[str]],
    *,
    legend: Sequence[tuple[int, str]] = (),
    size: tuple[float, float] = (WIDTH, HEIGHT),
) -> Element:
    picture = el(
        "svg",
        el("title", words.title, id=f"{words.key}-title"),
        el("desc", words.description, id=f"{words.key}-desc"),
        *marks,
        viewBox=f"0 0 {size[0]:.4g} {size[1]:.4g}",
        role="img",
        aria_labelledby=f"{words.key}-title {words.key}-desc",
    )
    keys = [el("li", el("i", class_=_kind(slot)), name) for slot, name in legend]
    return el(
        "figure",
        el("figcaption", el("h3", words.title), el("p", words.description)),
        el("ul", *keys, class_="legend") if keys else None,
        picture,
        el("details", el("summary", "Numbers"), el("div", table(words.title, header, rows), class_="scroll")),
    )


def _kind(slot: int) -> str:
    """The class of a series' colour; colours come again dashed."""
    return f"s{slot % SERIES} dashed" if slot >= SERIES else f"s{slot}"


def _at(x: Axis, y: Axis, px: float, py: float) -> tuple[float, float]:
    across = LEFT + (WIDTH - LEFT - RIGHT) * x.part(px)
    return across, TOP + (HEIGHT - TOP - BOTTOM) * (1 - y.part(py))


def _axes(x: Axis, y: Axis) -> list[Element]:
    parts = []
    for tick in y.ticks():
        _, at = _at(x, y, x.low, tick)
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(el("text", _round(y, tick), x=LEFT - 8, y=at + 4, class_="tick end"))
    for tick in x.ticks():
        at, _ = _at(x, y, tick, y.low)
        parts.append(el("text", _round(x, tick), x=at, y=HEIGHT - BOTTOM + 18, class_="tick middle"))
    parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="base"))
    parts.append(el("text", x.label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="label middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f"rotate(-90 13 {middle:.4g})"
    return [*parts, el("text", y.label, x=13, y=middle, transform=turned, class_="label middle")]


def _round(axis: Axis, tick: float) -> str:
    """A tick without decimals that say nothing."""
    return axis.form(tick).replace(".0 %", " %")


def _path(kind: str, points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> Element:
    places = [_at(x, y, px, py) for px, py in points]
    return el("polyline", points=" ".join(f"{across:.2f},{down:.2f}" for across, down in places), class_=kind)


def _dot(kind: str, px: float, py: float, x: Axis, y: Axis) -> Element:
    across, down = _at(x, y, px, py)
    return el("circle", el("title", f"{x.form(px)}, {y.form(py)}"), cx=across, cy=down, r=3.5, class_=kind)


def _bar(kind: str, low: float, high: float, height: float, x: Axis, y: Axis) -> Element:
    (left, top), (right, bottom) = _at(x, y, low, height), _at(x, y, high, 0.0)
    tip = el("title", f"{number(low)} to {number(high)}: {percent(height)}")
    return el("rect", tip, x=left + 0.5, y=top, width=max(0.5, right - left - 1), height=bottom - top, class_=kind)


def _cell(left: float, top: float, side: float, share: float, count: int, what: str) -> Element:
    tip = el("title", f"{what}: {count} ({percent(share)})")
    box = el("rect", x=left, y=top, width=side, height=side, fill_opacity=share, class_="heat")
    kind = "count middle strong" if share > 0.5 else "count middle"
    text = el("text", str(count), x=left + side / 2, y=top + side / 2 + 4, class_=kind) if side >= 24 else None
    return el("g", tip, box, text)


def _gaps(left: float, top: float, side: float, width: float, height: float) -> list[Element]:
    """Lines between cells."""
    across = [left + side * at for at in range(1, round(width / side))]
    down = [top + side * at for at in range(1, round(height / side))]
    return [
        *(el("line", x1=at, x2=at, y1=top, y2=top + height, class_="gap") for at in across),
        *(el("line", x1=left, x2=left + width, y1=at, y2=at, class_="gap") for at in down),
    ]


def _cell_names(rows: Sequence[str], columns: Sequence[str], left: float, top: float, side: float) -> list[Element]:
    down = [
        el("text", _short(name), x=left - 8, y=top + side * (at + 0.5) + 4, class_="tick end")
        for at, name in enumerate(rows)
    ]
    starts = [(left + side * (at + 0.5), name) for at, name in enumerate(columns)]
    return down + [
        el("text", _short(name), x=at, y=top - 6, transform=f"rotate(-45 {at:.5g} {top - 6})", class_="tick")
        for at, name in starts
    ]


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about `TABLE_ROWS` of the points, the last among them."""
    step = max(1, math.ceil(len(points) / TABLE_ROWS))
    return list(points)[::-1][::step][::-1]
