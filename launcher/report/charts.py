"""Line charts as plain data for an SVG: paths, ticks and legends. The template draws them.

Coordinates are in the chart's own units, `WIDTH` × `HEIGHT`; the page scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.metrics import Goal, format_value, goal_of

__all__ = [
    "BOTTOM",
    "COLOURS",
    "HEIGHT",
    "LEFT",
    "RIGHT",
    "TOP",
    "WIDTH",
    "Chart",
    "Curve",
    "Dot",
    "Line",
    "Tick",
    "draw",
]

WIDTH, HEIGHT = 460.0, 242.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 448.0, 10.0, 218.0
COLOURS = 8
"""Colours of the page's palette; curves beyond it are dashed as well."""

_MOST_POINTS = 400
_DOTS_UP_TO = 40
_SMOOTH_FROM = 120
_SMOOTH_PARTS = 40
"""The window of the running mean is a 40th of the curve."""
_LOG_DECADES = 1.7
"""A loss that spans more (a factor of 50) gets a logarithmic axis."""
_LARGEST = 1e150


@dataclass(frozen=True)
class Curve:
    """What to draw. points: (step, value) by step; a value that is not finite leaves a gap."""

    label: str
    colour: int
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A drawn curve. raw: path of the values where `path` is their running mean, else empty.

    last, best_value, best_step: as text; last may be NaN, no best where nothing is better. note: what went wrong.
    """

    label: str
    colour: int
    dashed: bool
    path: str
    raw: str
    dots: tuple[Dot, ...]
    end: Dot | None
    best: Dot | None
    last: str
    best_value: str
    best_step: str
    note: str


@dataclass(frozen=True)
class Chart:
    """One quantity. judged: it has better and worse values. description: the chart in words, for screen readers."""

    title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    log: bool
    judged: bool
    smooth: int
    description: str


@dataclass(frozen=True)
class _Axis:
    """Maps [low, high] to [start, end] of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        share = ((math.log10(value) if self.log else value) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def draw(title: str, curves: Sequence[Curve]) -> Chart | None:
    """The chart of one quantity, or None where no curve has two finite values to connect."""
    goal = goal_of(title)
    finite = [[(s, v) for s, v in curve.points if abs(v) < _LARGEST] for curve in curves]
    if not any(len(points) > 1 for points in finite):
        return None
    values = [value for points in finite for _, value in points]
    log = goal is Goal.LOW and _spans_decades(values)
    steps = [step for curve in curves for step, _ in curve.points]  # also of lost values: where a run broke must show
    x = _Axis(*_padded(_from_zero(min(steps), max(steps)), max(steps), share=0.0), LEFT, RIGHT)
    y = _value_axis(values, log)
    smooth = 0 if goal is Goal.NONE else max(_window(len(points)) for points in finite)
    lines = tuple(_line(c, p, x=x, y=y, goal=goal) for c, p in zip(curves, finite, strict=True) if p)
    return Chart(
        title=title,
        x_ticks=tuple(Tick(x.at(t), _compact(t)) for t in _linear_ticks(x.low, x.high, 8) if t == int(t)),
        y_ticks=tuple(_y_ticks(y)),
        lines=lines,
        log=log,
        judged=goal is not Goal.NONE,
        smooth=smooth,
        description="; ".join(_in_words(line.label, p) for line, p in zip(lines, filter(None, finite), strict=True)),
    )


def thin(points: Sequence[tuple[int, float]], most: int = _MOST_POINTS) -> list[tuple[int, float] | None]:
    """About `most` points: of each stretch the lowest and the highest, so that no spike is lost. None: a gap."""
    if len(points) <= most:
        return [point if abs(point[1]) < _LARGEST else None for point in points]
    stretch = math.ceil(2 * len(points) / most)
    kept: list[tuple[int, float] | None] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [point for point in part if abs(point[1]) < _LARGEST]
        if finite:
            ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
            ends |= {finite[0]} if start == 0 else set()
            ends |= {finite[-1]} if start + stretch >= len(points) else set()
            kept.extend(sorted(ends))
        if len(finite) < len(part):
            kept.append(None)
    return kept


def _line(curve: Curve, finite: Sequence[tuple[int, float]], *, x: _Axis, y: _Axis, goal: Goal) -> Line:
    def dot(point: tuple[int, float]) -> Dot:
        return Dot(x.at(point[0]), y.at(point[1]), f"{curve.label}: {format_value(point[1])} at step {point[0]}")

    raw = _path(thin(curve.points), x, y)
    window = 0 if goal is Goal.NONE else _window(len(finite))
    best = None if goal is Goal.NONE else _best(finite, goal)
    return Line(
        label=curve.label,
        colour=curve.colour % COLOURS,
        dashed=curve.colour >= COLOURS,
        path=_path(list(_running_mean(finite, window)), x, y) if window else raw,
        raw=raw if window else "",
        dots=tuple(map(dot, finite)) if len(finite) <= _DOTS_UP_TO else (),
        end=dot(finite[-1]),
        best=dot(best) if best and len(curve.points) > 2 else None,
        last=format_value(curve.points[-1][1]),
        best_value=format_value(best[1]) if best else "",
        best_step=_compact(best[0]) if best else "",
        note=_note(curve.points),
    )


def _note(points: Sequence[tuple[int, float]]) -> str:
    bad = [step for step, value in points if not abs(value) < _LARGEST]
    return f"{len(bad)} not finite, first at step {bad[0]}" if bad else ""


def _best(points: Sequence[tuple[int, float]], goal: Goal) -> tuple[int, float]:
    return min(points, key=lambda p: p[1] if goal is Goal.LOW else -p[1])


def _window(count: int) -> int:
    """Odd width of the running mean in points, 0 for a curve short enough to be read as it is."""
    return count // _SMOOTH_PARTS // 2 * 2 + 1 if count >= _SMOOTH_FROM else 0


def _running_mean(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float] | None]:
    """Centred; the window narrows towards the ends, so that first and last stay what they are."""
    last = len(points) - 1
    every = max(1, len(points) // (_MOST_POINTS // 2))
    kept: list[tuple[int, float] | None] = []
    for i in sorted({*range(0, len(points), every), last}):
        half = min(window // 2, i, last - i)
        part = points[i - half : i + half + 1]
        kept.append((points[i][0], sum(value for _, value in part) / len(part)))
    return kept


def _path(points: Sequence[tuple[int, float] | None], x: _Axis, y: _Axis) -> str:
    """SVG path. A lonely point gets a line of no length, which a round cap makes a dot."""
    parts: list[str] = []
    pen = "M"
    for i, point in enumerate(points):
        if point is None:
            pen = "M"
            continue
        lonely = pen == "M" and (i + 1 == len(points) or points[i + 1] is None)
        parts.append(f"{pen}{x.at(point[0]):g},{y.at(point[1]):g}" + ("h0" if lonely else ""))
        pen = "L"
    return "".join(parts)


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and math.log10(max(values)) - math.log10(min(values)) > _LOG_DECADES


def _value_axis(values: Sequence[float], log: bool) -> _Axis:
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** 0.04 if high / low < math.inf else 10.0
        return _Axis(max(low / margin, 5e-324), high * margin, BOTTOM, TOP, log=True)
    bottom, top = _padded(low, high, share=0.05)
    if low >= 0 and high <= 1:
        # Shares and probabilities: an axis that leaves [0, 1] would promise values that can't be.
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    elif low >= 0:
        bottom = max(bottom, 0.0)
    return _Axis(bottom, top, BOTTOM, TOP)


def _from_zero(low: float, high: float) -> float:
    """Where an axis of steps begins: at 0 if the first step is near it."""
    return 0 if 0 < low <= 0.15 * high else low


def _padded(low: float, high: float, *, share: float) -> tuple[float, float]:
    """With room on both sides, and never empty."""
    span = high - low
    largest = max(abs(low), abs(high))
    if span <= largest * 1e-9 + 1e-300:
        room = largest * 0.1 or 0.5
        return low - room, high + room
    return low - span * share, high + span * share


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 × a power of ten inside [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def _y_ticks(axis: _Axis) -> list[Tick]:
    if axis.log:
        return [Tick(axis.at(t), format_value(t)) for t in _log_ticks(axis.low, axis.high)]
    ticks = _linear_ticks(axis.low, axis.high, 5)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else axis.high - axis.low
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = places <= 5 and max(abs(axis.low), abs(axis.high)) < 1e6
    return [Tick(axis.at(t), f"{t:.{places}f}" if plain else f"{t:.3g}") for t in ticks]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 7))
    decades = math.log10(high) - math.log10(low)
    factors = (1, 2, 5) if decades <= 2 else (1, 3) if decades <= 3.5 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1, every) if -308 < e < 308 for f in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _compact(step: float) -> str:
    """`512`, `12.5k`, `3M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(step) >= size:
            return f"{step / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{step:.0f}"


def _in_words(label: str, points: Sequence[tuple[int, float]]) -> str:
    (first_step, first), (last_step, last) = points[0], points[-1]
    return (
        f"{label}: {len(points)} values from {format_value(first)} at step {first_step} "
        f"to {format_value(last)} at step {last_step}"
    )
