"""Charts as data, and as SVG that is read at the width of a phone as well as on a desk.

One size for both: a chart is as wide as a phone's page, and a desk shows several side by side, so that no text shrinks.
Colours are custom properties of CSS, so that they follow the reader's light or dark scheme.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from html import escape

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 36
COLOURS = 6
"""How many runs have a colour of their own."""
_MOST_POINTS = 300
COLD, HOT = (0xEA, 0xF2, 0xFB), (0x08, 0x4A, 0x91)
"""Ends of the scale of a heat map, where there is no style sheet."""


@dataclasses.dataclass(frozen=True)
class Series:
    """One line, or one set of dots."""

    name: str
    points: list[tuple[float, float]]
    colour: int | None = None
    """From 0 to `COLOURS` - 1; None for what stays in the background."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """Values against values. ``kind`` is "line" or "dots"."""

    key: str
    """Fit for the name of a file."""
    title: str
    x: str
    y: str
    series: list[Series]
    kind: str = "line"
    log_x: bool = False
    log_y: bool = False
    smooth: bool = False
    """Draw a moving mean over the values."""
    categories: tuple[str, ...] = ()
    """Names of the values of x, where these are indices."""
    note: str = ""
    from_zero: bool = False

    @property
    def alt(self) -> str:
        """The chart in words."""
        parts = []
        for one in [s for s in self.series if s.points][:COLOURS]:
            if self.kind == "line":
                parts.append(f"{one.name} goes from {number(one.points[0][1])} to {number(one.points[-1][1])}")
            else:
                at = ", ".join(f"{number(y)} at {self.place(x)}" for x, y in one.points[:6])
                parts.append(f"{one.name}: {at}")
        more = len([s for s in self.series if s.points]) - COLOURS
        return f"{self.y} against {self.x}. " + "; ".join(parts) + (f"; {more} more" if more > 0 else "") + "."

    def place(self, x: float) -> str:
        """A value of x in words."""
        return self.categories[int(x)] if self.categories else number(x)


@dataclasses.dataclass(frozen=True)
class Heat:
    """Values on a grid; None where there is none."""

    key: str
    title: str
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    """By row."""
    x: str = "block"
    note: str = ""

    @property
    def alt(self) -> str:
        """The picture in words."""
        cells = [(v, r, c) for r, line in enumerate(self.values) for c, v in enumerate(line) if v is not None]
        if not cells:
            return f"{self.title}: no values."
        low, high = min(cells), max(cells)

        def said(cell: tuple[float, int, int]) -> str:
            return f"{number(cell[0])} in {self.rows[cell[1]]} of {self.x} {self.columns[cell[2]]}"

        return f"{self.title} by layer and {self.x}: from {said(low)} to {said(high)}."


def number(value: float) -> str:
    """A number as a reader wants it: four digits, thousands apart."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 0.001:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _short(value: float) -> str:
    """A number for an axis."""
    size = abs(value)
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if letter == "k" else limit
            return f"{value / scale:g}{letter}"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:g}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover ``low`` to ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, dense: bool = False) -> list[float]:
    """Powers of ten, and steps between them where there are few."""
    powers = range(math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 or dense else (1,)
    found = [m * 10.0**p for p in powers for m in steps]
    inside = [t for t in found if low * 0.999 <= t <= high * 1.001]
    if len(inside) > 6:
        inside = [t for t in inside if math.isclose(math.log10(t), round(math.log10(t)), abs_tol=1e-9)] or inside
        inside = inside[:: math.ceil(len(inside) / 6)]
    return inside if len(inside) >= 2 else [low, high]


def thin(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most about ``most`` points of a line, of which each stretch keeps its lowest and its highest."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = []
    for i in range(0, len(points), size):
        part = points[i : i + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The moving mean over a tenth of the points, to both sides."""
    reach = max(1, len(points) // 20)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - reach), min(len(points), i + reach + 1)
        found.append((x, (sums[high] - sums[low]) / (high - low)))
    return found


@dataclasses.dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    log: bool
    start: float
    end: float

    def __call__(self, value: float) -> float:
        if self.log:
            share = (math.log(value) - math.log(self.low)) / ((math.log(self.high) - math.log(self.low)) or 1.0)
        else:
            share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)


def axes(chart: Chart) -> tuple[_Axis, list[float], _Axis, list[float]]:
    """The axes of a chart with their ticks: x, its ticks, y, its ticks."""
    points = [p for s in chart.series for p in s.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    log_x, log_y = chart.log_x and min(xs) > 0, chart.log_y and min(ys) > 0
    if chart.categories:
        x_ticks = [float(i) for i in range(len(chart.categories))]
        x = _Axis(-0.5, len(chart.categories) - 0.5, False, LEFT, WIDTH - RIGHT)
    elif log_x:
        low, high = min(xs), max(xs)
        pad = (high / low) ** 0.06 if high > low else 2.0
        distinct = sorted(set(xs))
        x_ticks = distinct if len(distinct) <= 6 else log_ticks(low, high, True)
        x = _Axis(low / pad, high * pad, True, LEFT, WIDTH - RIGHT)
    else:
        low, high = min(xs), max(xs)
        x = _Axis(low, high if high > low else low + 1, False, LEFT, WIDTH - RIGHT)
        x_ticks = [t for t in ticks(low, x.high) if low <= t <= x.high]
    if log_y:
        y = _Axis(min(ys) / 1.1, max(ys) * 1.1, True, HEIGHT - BOTTOM, TOP)
        y_ticks = log_ticks(y.low, y.high)
    else:
        low, high = (min(0.0, *ys) if chart.from_zero else min(ys)), max(ys)
        y_ticks = ticks(low, high)
        y = _Axis(y_ticks[0], y_ticks[-1], False, HEIGHT - BOTTOM, TOP)
    return x, x_ticks, y, y_ticks


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _class(colour: int | None) -> str:
    return "rest" if colour is None else f"c{colour}"


def _path(points: Iterable[tuple[float, float]], x: _Axis, y: _Axis) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)


def svg(chart: Chart | Heat, *, style: str = "") -> str:
    """The chart as an ``svg`` element. ``style``: CSS to put in, for a picture that stands alone."""
    return _heat(chart, style) if isinstance(chart, Heat) else _chart(chart, style)


def _open(key: str, alt: str, height: float, style: str, extra: str = "") -> str:
    size = f'viewBox="0 0 {WIDTH} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(alt)}" class="chart"{extra}>'
    if not style:
        return head
    paper = f'<rect class="paper" width="{WIDTH}" height="{height:g}"/>'
    return f"{head}<title>{escape(alt)}</title><style>{style}</style>{paper}"


def _dot(at: tuple[float, float], size: float, kind: str, hint: str = "") -> str:
    inner = f"<title>{escape(hint)}</title>" if hint else ""
    return f'<circle class="dot {kind}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{size:g}">{inner}</circle>'


def _chart(chart: Chart, style: str) -> str:
    x, x_ticks, y, y_ticks = axes(chart)
    out = [_open(chart.key, chart.alt, HEIGHT, style, _data(chart, x) if chart.kind == "line" and not style else "")]
    for t in y_ticks:
        out.append(f'<path class="rule" d="M{LEFT} {y(t):.1f}H{WIDTH - RIGHT}"/>')
        out.append(_text(LEFT - 6, y(t) + 4, _short(t), anchor="end"))
    last_end = -math.inf
    for t in x_ticks:
        label = chart.categories[int(t)] if chart.categories else _short(t)
        half = 3.2 * len(label)
        middle = min(max(x(t), half), WIDTH - half - 1)
        if middle - half < last_end + 4:
            continue
        last_end = middle + half
        out.append(_text(middle, HEIGHT - BOTTOM + 16, label))
    out.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    out.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, chart.x, "label"))
    # What stays in the background is drawn first.
    for one in sorted((s for s in chart.series if s.points), key=lambda s: (s.colour is not None, -(s.colour or 0))):
        kind = _class(one.colour)
        if chart.kind == "dots":
            for a, b in one.points:
                out.append(_dot((x(a), y(b)), 5, kind, f"{one.name}: {number(b)} at {chart.place(a)}"))
            continue
        if len(one.points) == 1:
            a, b = one.points[0]
            out.append(_dot((x(a), y(b)), 3.5, kind))
            continue
        points = one.points
        if chart.smooth and len(points) >= 20:
            out.append(f'<path class="line raw {kind}" d="{_path(thin(points), x, y)}"/>')
            points = mean(points)
        out.append(f'<path class="line {kind}" d="{_path(thin(points), x, y)}"/>')
        if len(one.points) <= 12:
            out += [_dot((x(a), y(b)), 3, kind) for a, b in one.points]
    return "".join(out) + "</svg>"


def _data(chart: Chart, x: _Axis) -> str:
    """What a pointer over the chart reads: attributes of the element."""
    series = [
        {"n": s.name, "p": [[a, float(f"{b:.5g}")] for a, b in thin(s.points)]}
        for s in chart.series
        if s.points and s.colour is not None
    ]
    text = json.dumps({"x": [x.low, x.high, x.start, x.end], "s": series}, separators=(",", ":"))
    return f' data-values="{escape(text)}"'


def _heat(heat: Heat, style: str) -> str:
    shown = [name if len(name) <= 20 else "…" + name[-19:] for name in heat.rows]
    left = min(130.0, 10 + 6.3 * max(map(len, shown), default=0))
    width = (WIDTH - left - 4) / max(1, len(heat.columns))
    row_height = 26 if len(heat.rows) <= 8 else 20
    bottom = TOP + row_height * len(heat.rows)
    values = [v for line in heat.values for v in line if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    out = [_open(heat.key, heat.alt, bottom + 62, style)]
    for r, line in enumerate(heat.values):
        top = TOP + r * row_height
        out.append(_text(left - 6, top + row_height / 2 + 4, shown[r], anchor="end"))
        for c, value in enumerate(line):
            if value is None:
                continue
            share = (value - low) / (high - low) if high > low else 0.5
            hint = f"{heat.rows[r]}, {heat.x} {heat.columns[c]}: {number(value)}"
            out.append(_cell(share, left + c * width, top, width, row_height, hint))
            if width >= 34:
                kind = "value on-dark" if share > 0.5 else "value"
                out.append(_text(left + (c + 0.5) * width, top + row_height / 2 + 4, f"{value:.3g}", kind))
    every = max(1, math.ceil(len(heat.columns) * 22 / (WIDTH - left)))
    for c in range(0, len(heat.columns), every):
        out.append(_text(left + (c + 0.5) * width, bottom + 15, heat.columns[c]))
    out.append(_text((left + WIDTH) / 2, bottom + 30, heat.x, "label"))
    size, steps = 120.0, 12
    start = (left + WIDTH - size) / 2
    for i in range(steps):
        out.append(_cell(i / (steps - 1), start + i * size / steps, bottom + 40, size / steps + 0.3, 9))
    out.append(_text(start - 6, bottom + 48, number(low), anchor="end"))
    out.append(_text(start + size + 6, bottom + 48, number(high), anchor="start"))
    return "".join(out) + "</svg>"


def _cell(share: float, x: float, y: float, width: float, height: float, hint: str = "") -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:g}"'
    inner = f"<title>{escape(hint)}</title>" if hint else ""
    # The attribute is for viewers without custom properties; a style sheet wins over it.
    fill = "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(COLD, HOT, strict=True))
    return f'<rect class="cell" style="--s:{share:.3f}" fill="{fill}" {place}>{inner}</rect>'
