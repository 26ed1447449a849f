"""Charts as inline SVG, in the colours of the page: nothing is loaded when it is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fulgurite.arithmetic import ceil_div

__all__ = ["Interval", "interval_chart", "line_chart"]

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 12, 34
_POINTS = 300  # of a line: more cannot be told apart at this width
_SERIES = 12  # colours in the style sheet


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Args:
        label: What it is of.
        mean: The mean.
        low: Lower end; NaN where there is no interval.
        high: Upper end; NaN where there is no interval.
        mark: Text behind it, such as ▲.
        reference: Whether it is what the others are compared with.
    """

    label: str
    mean: float
    low: float
    high: float
    mark: str = ""
    reference: bool = False


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str
) -> str:
    """Lines through points, with a legend below where there are several.

    Args:
        series: Points (x, y) by label; values that are not finite leave a gap.
        x_label: What the horizontal axis shows.
        y_label: What the vertical axis shows.
    """
    finite = [p for points in series.values() for p in points if all(map(math.isfinite, p))]
    if not finite:
        return ""
    whole = all(x == int(x) for x, _ in finite)
    x_ticks = _ticks(min(x for x, _ in finite), max(x for x, _ in finite), whole=whole)
    y_ticks = _ticks(min(y for _, y in finite), max(y for _, y in finite))
    x_low, x_high = min(x for x, _ in finite), max(x for x, _ in finite)
    y_low = min(y_ticks[0], min(y for _, y in finite))
    y_high = max(y_ticks[-1], max(y for _, y in finite))
    across, along = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + across * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5),
            _TOP + along * (1 - (y - y_low) / (y_high - y_low) if y_high > y_low else 0.5),
        )

    parts = [_open_svg(_WIDTH, _HEIGHT, f"{y_label} against {x_label}")]
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(_line("grid", (_LEFT, y), (_WIDTH - _RIGHT, y)))
        parts.append(_text(_LEFT - 6, y + 3.5, _number(tick), anchor="end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = at(tick, y_low)
            parts.append(_text(x, _HEIGHT - _BOTTOM + 15, _number(tick)))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 4, x_label, anchor="end"))
    for rank, (label, points) in enumerate(series.items()):
        drawn = [at(x, y) for x, y in _thin(points) if math.isfinite(x) and math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        name = f"s{rank % _SERIES}"
        title = f"<title>{escape(label)}</title>"
        if len(drawn) > 1:
            parts.append(f'<polyline class="line {name}" points="{path}">{title}</polyline>')
        if len(drawn) <= 40:
            parts += [
                f'<circle class="dot {name}" cx="{x:.1f}" cy="{y:.1f}" r="2.2">{title}</circle>'
                for x, y in drawn
            ]
    parts.append("</svg>")
    return "".join(parts)


def interval_chart(intervals: Sequence[Interval], x_label: str) -> str:
    """Means with their intervals, one below the other.

    Args:
        intervals: From top to bottom.
        x_label: What the horizontal axis shows.
    """
    ends = [value for i in intervals for value in (i.mean, i.low, i.high) if math.isfinite(value)]
    if not ends:
        return ""
    row, left, right = 36, 8, _WIDTH - 30
    height = row * len(intervals) + 40
    ticks = _ticks(min(ends), max(ends))
    low, high = min(ticks[0], min(ends)), max(ticks[-1], max(ends))

    def at(value: float) -> float:
        return left + (right - left) * ((value - low) / (high - low) if high > low else 0.5)

    parts = [_open_svg(_WIDTH, height, x_label)]
    for tick in ticks:
        parts.append(_line("grid", (at(tick), 4), (at(tick), height - 34)))
        anchor = "start" if tick == ticks[0] else "middle"
        parts.append(_text(at(tick), height - 20, _number(tick), anchor=anchor))
    for rank, interval in enumerate(intervals):
        y = 26 + row * rank
        kind = "label reference" if interval.reference else "label"
        parts.append(_text(left, y - 9, _cut(interval.label), anchor="start", kind=kind))
        if not math.isfinite(interval.mean):
            continue
        colour = f"s{rank % _SERIES}"
        if math.isfinite(interval.low) and math.isfinite(interval.high):
            parts.append(_line(f"line {colour}", (at(interval.low), y), (at(interval.high), y)))
        title = escape(f"{interval.label}: {interval.mean:.5g}")
        parts.append(
            f'<circle class="dot {colour}" cx="{at(interval.mean):.1f}" cy="{y}" r="4">'
            f"<title>{title}</title></circle>"
        )
        if interval.mark:
            parts.append(_text(_WIDTH - 12, y + 4, interval.mark))
    parts.append(_text(right, height - 4, x_label, anchor="end"))
    return "".join([*parts, "</svg>"])


def _open_svg(width: int, height: int, label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label, quote=True)}">'
    )


def _line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "tick") -> str:
    position = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {position}>{escape(text)}</text>'


def _cut(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:47]}…"


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    step = max(1, ceil_div(len(points), _POINTS))  # a run may lack a metric of another
    thinned = points[::step]
    return thinned if not points or thinned[-1] == points[-1] else [*thinned, points[-1]]


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Up to eight round numbers from below ``low`` to above ``high``; whole ones if asked for.

    >>> _ticks(0.31, 0.92)
    [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    >>> _ticks(3, 3), _ticks(0, 3, whole=True)
    ([3], [0.0, 1.0, 2.0, 3.0])
    """
    if not high > low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(math.log(s / rough)))
    step = max(step, 1.0) if whole else step
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def _number(value: float) -> str:
    """A short number.

    >>> _number(0.30000000000000004), _number(1500000.0), _number(20.0), _number(40000)
    ('0.3', '1.5 M', '20', '40 k')
    """
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
