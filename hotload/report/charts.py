"""Small charts as inline SVG: fluid in width, with text that keeps its size.

Horizontal positions are percentages, vertical ones pixels, so a chart fills whatever it is put in
and its letters are as large on a phone as on a desk. Curves are drawn in a stretched inner box with
strokes that do not stretch. Colours are classes; the page's style sheet gives them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hotload.report.markup import safe

ROW_PX = 40
AXIS_PX = 22


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled bar from `start` to `end`; `tone` is a class of the style sheet."""

    label: str
    start: float
    end: float
    told: str
    tone: str = "main"


def nice_ticks(high: float, about: int = 5, *, least: float = 0) -> list[float]:
    """Round numbers from 0 to at most `high`, about so many, 1, 2 or 5 times a power of ten apart.

    Args:
        least: the smallest step, itself a power of ten; 1 for counts.
    """
    if not high > 0:
        return [0.0]
    raw = max(high / about, least)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [step * i for i in range(int(high / step + 1e-9) + 1)]


def chart(height: int, label: str, *body: str) -> str:
    """An SVG of the full width and `height` pixels; `label` is what it shows, in words."""
    return (
        f'<svg class="chart" width="100%" height="{height}" role="img" '
        f'aria-label="{safe(label)}">{"".join(body)}</svg>'
    )


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    """Text at `x` percent and `y` pixels."""
    return (
        f'<text x="{x:.2f}%" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{safe(said)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    """A line between two points, in percent and pixels."""
    return f'<line x1="{x1:.2f}%" y1="{y1:.1f}" x2="{x2:.2f}%" y2="{y2:.1f}" class="{kind}"/>'


def rectangle(
    x: float, y: float, width: float, height: float, kind: str, told: str = "", radius: int = 2
) -> str:
    """A rectangle, in percent and pixels; `told` shows when it is pointed at."""
    title = f"<title>{safe(told)}</title>" if told else ""
    return (
        f'<rect x="{x:.3f}%" y="{y:.1f}" width="{max(width, 0):.3f}%" height="{max(height, 0):.1f}"'
        f' rx="{radius}" class="{kind}">{title}</rect>'
    )


def _anchor(x: float) -> str:
    """Keeps text at `x` percent inside the picture."""
    return "start" if x < 4 else "end" if x > 96 else "middle"


def timeline(bars: Sequence[Bar], seconds: float, say: Callable[[float], str]) -> str:
    """Bars on a common axis of seconds, the label above each; `say` writes a tick."""
    bottom = ROW_PX * len(bars)
    body = []
    for tick in nice_ticks(seconds):
        x = 100 * tick / seconds if seconds else 0
        body.append(line(x, 0, x, bottom))
        body.append(text(x, bottom + 15, say(tick), "tick", _anchor(x)))
    for i, bar in enumerate(bars):
        top = ROW_PX * i
        start = 100 * bar.start / seconds if seconds else 0
        width = max(100 * (bar.end - bar.start) / seconds if seconds else 0, 0.4)
        # A bar that begins far right has its label end where it ends.
        at, anchor = (start, "start") if start < 55 else (min(start + width, 100), "end")
        label = (
            f'<text x="{at:.2f}%" y="{top + 14}" text-anchor="{anchor}">'
            f'<tspan class="name">{safe(bar.label)}</tspan>'
            f'<tspan class="value" dx="6">{safe(bar.told)}</tspan></text>'
        )
        body += [label, rectangle(start, top + 20, width, 12, bar.tone, bar.told)]
    return chart(bottom + AXIS_PX, "Stages on a time axis", *body)


def bars(rows: Sequence[Bar], label: str) -> str:
    """Horizontal bars on one scale from 0, each with its name at the left and its value right."""
    widest = max((row.end for row in rows), default=0) or 1
    body = []
    for i, row in enumerate(rows):
        top = ROW_PX * i
        body.append(text(0, top + 14, row.label, "name"))
        body.append(text(100, top + 14, row.told, "value", "end"))
        body.append(rectangle(0, top + 20, 100, 10, "track"))
        body.append(rectangle(0, top + 20, 100 * row.end / widest, 10, row.tone))
    return chart(ROW_PX * len(rows), label, *body)


def stack(parts: Sequence[Bar], label: str) -> str:
    """One bar of 100 %, cut into its parts, with a hair's breadth between them."""
    total = sum(part.end for part in parts) or 1
    body, at = [], 0.0
    for part in parts:
        width = 100 * part.end / total
        gap = 0.3 if len(parts) > 1 and width > 1 else 0
        told = f"{part.label}: {part.told}"
        body.append(rectangle(at, 0, width - gap, 18, part.tone, told))
        at += width
    return chart(18, label, *body)


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    label: str,
    say: Callable[[float], str],
    *,
    marks: Sequence[tuple[float, str]] = (),
    noun: str = "samples",
    height: int = 150,
) -> str:
    """Bins between `edges`, one more than counts; `marks` are named positions on the same axis."""
    low, high = edges[0], edges[-1]
    span = (high - low) or 1
    top, bottom = 14 * len(marks) + 14, height - AXIS_PX
    highest = max(counts) or 1
    body, ticks = [], []
    for value in nice_ticks(highest, 2, least=1)[1:]:
        y = bottom - (bottom - top) * value / highest
        body.append(line(0, y, 100, y))
        ticks.append(text(0, y - 4, f"{value:,.0f}", "tick"))
    for i, count in enumerate(counts):
        x = 100 * (edges[i] - low) / span
        width = 100 * (edges[i + 1] - edges[i]) / span
        tall = (bottom - top) * count / highest
        told = f"{say(edges[i])} to {say(edges[i + 1])}: {count:,} {noun}"
        body.append(rectangle(x, bottom - tall, width * 0.92, tall, "main", told, 1))
    body.append(line(0, bottom, 100, bottom, "axis"))
    for i, (value, name) in enumerate(marks):
        x = 100 * (value - low) / span
        y = 12 + 14 * i
        body.append(line(x, y + 4, x, bottom, "mark"))
        right = x < 60
        at = f'{x:.2f}%" dx="{5 if right else -5}'
        anchor = "start" if right else "end"
        body.append(
            f'<text x="{at}" y="{y + 4}" class="value" text-anchor="{anchor}">{safe(name)}</text>'
        )
    for x, value in ((0, low), (50, low + span / 2), (100, high)):
        ticks.append(text(x, height - 6, say(value), "tick", _anchor(x)))
    return chart(height, label, *body, *ticks)


def columns(rows: Sequence[Bar], label: str, *, height: int = 150) -> str:
    """A column per value, for few distinct ones; each says its count above and its value below."""
    top, bottom = 20, height - AXIS_PX
    highest = max((row.end for row in rows), default=0) or 1
    pitch = 100 / max(len(rows), 1)
    width = min(pitch * 0.6, 14)
    body = [line(0, bottom, 100, bottom, "axis")]
    for i, row in enumerate(rows):
        middle = pitch * (i + 0.5)
        tall = (bottom - top) * row.end / highest
        body.append(rectangle(middle - width / 2, bottom - tall, width, tall, row.tone))
        body.append(text(middle, bottom - tall - 5, row.told, "value", "middle"))
        body.append(text(middle, height - 6, row.label, "tick", "middle"))
    return chart(height, label, *body)


def steps(
    series: Sequence[tuple[Sequence[tuple[float, float]], str]],
    seconds: float,
    highest: float,
    label: str,
    say: Callable[[float], str],
    *,
    height: int = 170,
) -> str:
    """Step lines of counts over seconds from 0; each series is (points, class). A class that ends
    in `-area` is filled down to the axis.
    """
    top, bottom = 16, height - AXIS_PX
    seconds, highest = seconds or 1, highest or 1
    body, ticks = [], []
    for value in nice_ticks(highest, least=1)[1:]:
        y = bottom - (bottom - top) * value / highest
        body.append(line(0, y, 100, y))
        ticks.append(text(0, y - 4, f"{value:,.0f}", "tick"))
    paths = []
    for points, kind in series:
        path = _step_path(points, seconds, highest, top, bottom)
        if kind.endswith("-area") and points:
            # Nothing is known before the first point.
            path = f"{path}V{bottom}H{path[1 : path.index(' ')]}Z"
        paths.append(f'<path d="{path}" class="{kind}" vector-effect="non-scaling-stroke"/>')
    body.append(
        f'<svg x="0" y="0" width="100%" height="{height}" viewBox="0 0 1000 {height}" '
        f'preserveAspectRatio="none">{"".join(paths)}</svg>'
    )
    body.append(line(0, bottom, 100, bottom, "axis"))
    for tick in nice_ticks(seconds, 4):
        x = 100 * tick / seconds
        ticks.append(text(x, height - 6, say(tick), "tick", _anchor(x)))
    return chart(height, label, *body, *ticks)


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
