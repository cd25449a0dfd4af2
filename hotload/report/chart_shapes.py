"""Draws small charts as inline SVG: fluid in width, with text that keeps its size.

Horizontal positions are percentages, vertical ones pixels, so a chart fills whatever it is put in
and its letters are as large on a phone as on a desk. Curves are drawn in a stretched inner box with
strokes that do not stretch. Colours are classes of `templates/page.css`. Every text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

ROW_PX = 40
AXIS_PX = 22
LINES_PX, LAYERS_PX = 170, 190  # heights of the charts over policy versions
LARGEST = 1e300
"""Values are drawn within ± this, so that no difference of two overflows."""
DOTTED = 30
"""With at most so many versions a curve has a dot at each."""

Say = Callable[[float], str]
"""Writes a value beside an axis."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled bar from `start` to `end`, with its value in words and its colour."""

    label: str
    start: float
    end: float
    value: str
    tone: str = "main"


@dataclass(frozen=True, slots=True)
class Line:
    """One value per policy version, `None` where there is none; `spread` is half a band's width."""

    values: Sequence[float | None]
    tone: str
    spread: Sequence[float | None] = ()


@dataclass(frozen=True, slots=True)
class Dot:
    """The positive value of one policy version, with its text and colour."""

    value: float
    text: str
    tone: str


def nice_ticks(high: float, about: int = 5, *, low: float = 0, least: float = 0) -> list[float]:
    """Choose round numbers from `low` to `high`, about so many, 1, 2 or 5 times a power of ten
    apart.

    Args:
        least: the smallest step, itself a power of ten; 1 for counts.
    """
    span = high - low
    if not 0 < span < math.inf:
        return [low]
    raw = max(span / about, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def time_ticks(seconds: float, about: int = 5) -> list[float]:
    """Choose moments that are round in the unit they are said in: seconds, minutes or hours."""
    unit = 1 if seconds < 120 else 60 if seconds < 7200 else 3600
    return [unit * tick for tick in nice_ticks(seconds / unit, about)]


def timeline(bars: Sequence[Bar], seconds: float, say: Say) -> Markup:
    """Draw bars on a common axis of seconds, the label above each."""
    bottom = ROW_PX * len(bars)
    body = []
    for tick in time_ticks(seconds):
        x = 100 * tick / seconds if seconds else 0
        body += [_line(x, 0, x, bottom), _text(x, bottom + 15, say(tick), "tick", _anchor(x))]
    for i, bar in enumerate(bars):
        top = ROW_PX * i
        start = 100 * bar.start / seconds if seconds else 0
        width = max(100 * (bar.end - bar.start) / seconds if seconds else 0, 0.4)
        # A bar that begins far right has its label end where it ends.
        at, anchor = (start, "start") if start < 55 else (min(start + width, 100), "end")
        label = Markup(
            '<text x="{:.2f}%" y="{}" text-anchor="{}"><tspan class="name">{}</tspan>'
            '<tspan class="value" dx="6">{}</tspan></text>'
        )
        body.append(label.format(at, top + 14, anchor, bar.label, bar.value))
        body.append(_rectangle(start, top + 20, width, 12, bar.tone, bar.value))
    return _chart(bottom + AXIS_PX, "Stages on a time axis", body)


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    label: str,
    say: Say,
    *,
    marks: Sequence[tuple[float, str]] = (),
    height: int = 150,
) -> Markup:
    """Draw bins of samples between `edges`, one more than counts; `marks` are named positions on
    the same axis.
    """
    low, high = edges[0], edges[-1]
    span = (high - low) or 1
    top, bottom = 14 * len(marks) + 14, height - AXIS_PX
    highest = max(counts) or 1
    body, ticks = _levels(nice_ticks(highest, 2, least=1)[1:], 0, highest, top, bottom, _whole)
    for i, count in enumerate(counts):
        x = 100 * (edges[i] - low) / span
        width = 100 * (edges[i + 1] - edges[i]) / span
        tall = (bottom - top) * count / highest
        shown = f"{say(edges[i])} to {say(edges[i + 1])}: {count:,} samples"
        body.append(_rectangle(x, bottom - tall, width * 0.92, tall, "main", shown, 1))
    body.append(_line(0, bottom, 100, bottom, "axis"))
    for i, (value, name) in enumerate(marks):
        x = 100 * (value - low) / span
        y = 12 + 14 * i
        body.append(_line(x, y + 4, x, bottom, "mark"))
        shift, anchor = (5, "start") if x < 60 else (-5, "end")
        body.append(_text(x, y + 4, name, "value", anchor, shift))
    ticks += [
        _text(x, height - 6, say(value), "tick", _anchor(x))
        for x, value in ((0, low), (50, low + span / 2), (100, high))
    ]
    return _chart(height, label, [*body, *ticks])


def steps(
    series: Sequence[tuple[Sequence[tuple[float, float]], str]],
    seconds: float,
    highest: float,
    label: str,
    say: Say,
    *,
    height: int = 170,
) -> Markup:
    """Draw step lines of counts over seconds from 0; each series is (points, class). A class that
    ends in ` area` is filled down to the axis.
    """
    top, bottom = 16, height - AXIS_PX
    seconds, highest = seconds or 1, highest or 1
    body, ticks = _levels(nice_ticks(highest, least=1)[1:], 0, highest, top, bottom, _whole)
    paths = []
    for points, kind in series:
        path = _step_path(points, seconds, highest, top, bottom)
        if kind.endswith(" area") and points:
            # Nothing is known before the first point.
            path = f"{path}V{bottom}H{path[1 : path.index(' ')]}Z"
        paths.append(_path(path, kind))
    body += [_stretched(height, paths), _line(0, bottom, 100, bottom, "axis")]
    for tick in time_ticks(seconds, 4):
        x = 100 * tick / seconds
        ticks.append(_text(x, height - 6, say(tick), "tick", _anchor(x)))
    return _chart(height, label, [*body, *ticks])


# Charts over the policy versions of a run: each version has a slot of the same width, so that all
# charts of a page can be read below each other.


def curves(
    versions: Sequence[int],
    lines: Sequence[Line],
    label: str,
    say: Say,
    *,
    low: float | None = None,
) -> Markup:
    """Draw lines over policy versions, broken where a value is missing.

    Args:
        versions: one per value of each line.
        low: where the vertical axis begins, unless a value lies below it; by default with the
            lowest value.
    """
    top, bottom = 16, LINES_PX - AXIS_PX
    runs = [(line, run) for line in lines for run in _unbroken(line)]
    reached = [end for _, run in runs for _, least, _, most in run for end in (least, most)]
    lowest, highest = min(reached, default=0.0), max(reached, default=0.0)
    lowest = lowest if low is None else min(low, lowest)
    if highest - lowest <= 1e-9 * max(abs(lowest), abs(highest)):  # one level alone
        margin = max(abs(lowest), 1.0) / 2
        lowest, highest = lowest - (0 if lowest == low else margin), highest + margin

    def place(i: int, value: float) -> tuple[float, float]:
        share = (value - lowest) / (highest - lowest)
        return _slot(i, len(versions)), bottom - (bottom - top) * share

    body, ticks = _levels(nice_ticks(highest, 4, low=lowest), lowest, highest, top, bottom, say)
    bands, paths, dots = [], [], []
    for line, run in runs:
        middle = [place(i, value) for i, _, value, _ in run]
        paths.append(_path(_polyline(middle), f"{line.tone} line"))
        if line.spread:
            around = [place(i, most) for i, _, _, most in run]
            around += [place(i, least) for i, least, _, _ in reversed(run)]
            bands.append(_path(f"{_polyline(around)}Z", "wash area line"))
        if len(run) == 1 or len(versions) <= DOTTED:
            dots += [_dot(x, y, line.tone) for x, y in middle]
    body += [_stretched(LINES_PX, [*bands, *paths]), *dots, _line(0, bottom, 100, bottom, "axis")]
    return _chart(LINES_PX, label, [*body, *ticks, *_version_ticks(versions, LINES_PX)])


def dots(
    versions: Sequence[int],
    values: Sequence[Dot | None],
    label: str,
    say: Say,
) -> Markup:
    """Draw a dot per policy version on a logarithmic axis."""
    top, bottom = 16, LINES_PX - AXIS_PX
    logs = [math.log10(min(dot.value, LARGEST)) if dot else None for dot in values]
    there = [log for log in logs if log is not None]
    low, high = math.floor(min(there, default=0)), math.ceil(max(there, default=1))
    high = max(high, low + 1)
    step = math.ceil((high - low) / 4)
    powers = range(low, high + 1, step)
    body, ticks = _levels(powers, low, high, top, bottom, lambda power: say(10.0**power))
    body.append(_line(0, bottom, 100, bottom, "axis"))
    for i, (dot, log) in enumerate(zip(values, logs, strict=True)):
        if dot and log is not None:
            y = bottom - (bottom - top) * (log - low) / (high - low)
            body.append(_dot(_slot(i, len(versions)), y, dot.tone, dot.text))
    return _chart(LINES_PX, label, [*body, *ticks, *_version_ticks(versions, LINES_PX)])


def layers(
    versions: Sequence[int],
    seconds_by_tone: Mapping[str, Sequence[float]],
    label: str,
    say: Say,
) -> Markup:
    """Draw seconds per version on top of each other, the first colour at the bottom."""
    top, bottom = 16, LAYERS_PX - AXIS_PX
    sums = [0.0] * len(versions)
    stacked = []
    for tone, values in seconds_by_tone.items():
        sums = [min(below + value, LARGEST) for below, value in zip(sums, values, strict=True)]
        stacked.append((tone, sums))
    highest = max(sums, default=0) or 1
    width = 1000 / max(len(versions), 1)
    paths = []
    for tone, heights in reversed(stacked):  # the lower ones are painted over the higher
        path = f"M0 {bottom}"
        for i, value in enumerate(heights):
            path += f"V{bottom - (bottom - top) * value / highest:.1f}H{(i + 1) * width:.1f}"
        paths.append(_path(f"{path}V{bottom}Z", f"{tone} area"))
    body, ticks = _levels(time_ticks(highest, 3)[1:], 0, highest, top, bottom, say)
    body = [_stretched(LAYERS_PX, paths), *body, _line(0, bottom, 100, bottom, "axis")]
    return _chart(LAYERS_PX, label, [*body, *ticks, *_version_ticks(versions, LAYERS_PX)])


def _unbroken(line: Line) -> Iterable[list[tuple[int, float, float, float]]]:
    """Yield neighbours that all have a value: position, lower end of the band, value, upper end."""
    run: list[tuple[int, float, float, float]] = []
    for i, value in enumerate(line.values):
        if value is None:
            if run:
                yield run
            run = []
            continue
        value = max(-LARGEST, min(value, LARGEST))
        half = min((line.spread[i] if line.spread else None) or 0.0, LARGEST)
        run.append((i, value - half, value, value + half))
    if run:
        yield run


def _slot(i: int, count: int) -> float:
    return 100 * (i + 0.5) / count


def _version_ticks(versions: Sequence[int], height: int) -> list[Markup]:
    last = len(versions) - 1
    shown = sorted({round(last * i / 4) for i in range(5)}) if versions else []
    ticks = []
    for i in shown:
        x = _slot(i, len(versions))
        ticks.append(_text(x, height - 6, f"{versions[i]}", "tick", _anchor(x)))
    return ticks


def _levels(
    values: Iterable[float], low: float, high: float, top: float, bottom: float, say: Say
) -> tuple[list[Markup], list[Markup]]:
    """Draw a level line for every value, and its text above."""
    lines, texts = [], []
    for value in values:
        y = bottom - (bottom - top) * (value - low) / (high - low)
        lines.append(_line(0, y, 100, y))
        texts.append(_text(0, y - 4, say(value), "tick"))
    return lines, texts


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _chart(height: int, label: str, body: Iterable[Markup]) -> Markup:
    """An SVG of the full width and `height` pixels; `label` is what it shows, in words."""
    svg = Markup('<svg class="chart" width="100%" height="{}" role="img" aria-label="{}">{}</svg>')
    return svg.format(height, label, Markup("").join(body))


def _text(
    x: float, y: float, said: str, kind: str, anchor: str = "start", shift: int = 0
) -> Markup:
    return Markup(
        '<text x="{:.2f}%" y="{:.1f}" dx="{}" class="{}" text-anchor="{}">{}</text>'
    ).format(x, y, shift, kind, anchor, said)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> Markup:
    return Markup('<line x1="{:.2f}%" y1="{:.1f}" x2="{:.2f}%" y2="{:.1f}" class="{}"/>').format(
        x1, y1, x2, y2, kind
    )


def _rectangle(
    x: float, y: float, width: float, height: float, kind: str, shown: str = "", radius: int = 2
) -> Markup:
    """A rectangle; `shown` appears when it is pointed at."""
    rectangle = Markup(
        '<rect x="{:.3f}%" y="{:.1f}" width="{:.3f}%" height="{:.1f}" rx="{}" class="{}">{}</rect>'
    )
    return rectangle.format(x, y, max(width, 0), max(height, 0), radius, kind, _title(shown))


def _dot(x: float, y: float, kind: str, shown: str = "") -> Markup:
    return Markup('<circle cx="{:.2f}%" cy="{:.1f}" r="2.5" class="{}">{}</circle>').format(
        x, y, kind, _title(shown)
    )


def _title(shown: str) -> Markup:
    return Markup("<title>{}</title>").format(shown) if shown else Markup()


def _stretched(height: int, paths: Iterable[Markup]) -> Markup:
    """A box of 1000 units in width, stretched to that of the chart."""
    box = Markup(
        '<svg x="0" y="0" width="100%" height="{0}" viewBox="0 0 1000 {0}" '
        'preserveAspectRatio="none">{1}</svg>'
    )
    return box.format(height, Markup("").join(paths))


def _path(path: str, kind: str) -> Markup:
    return Markup('<path d="{}" class="{}" vector-effect="non-scaling-stroke"/>').format(path, kind)


def _polyline(points: Iterable[tuple[float, float]]) -> str:
    """A path through points in percent and pixels, for the stretched box."""
    return "M" + "L".join(f"{10 * x:.1f} {y:.1f}" for x, y in points)


def _step_path(
    points: Sequence[tuple[float, float]], seconds: float, highest: float, top: float, bottom: float
) -> str:
    def x(at: float) -> str:
        return f"{1000 * min(max(at / seconds, 0), 1):.1f}"

    def y(value: float) -> str:
        return f"{bottom - (bottom - top) * min(value / highest, 1):.1f}"

    if not points:
        return f"M0 {bottom:.1f}"
    path = [f"M{x(points[0][0])} {y(points[0][1])}"]
    path += [f"H{x(at)}V{y(value)}" for at, value in points[1:]]
    return "".join([*path, "H1000"])


def _anchor(x: float) -> str:
    """Keep text at `x` percent inside the picture."""
    return "start" if x < 4 else "end" if x > 96 else "middle"
