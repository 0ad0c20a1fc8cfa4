"""Numbers as SVG: lines over steps, with axes, restarts, and what a pointer shows. Pure; needs no package."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from meshwright.launch.page.read import Mark, Point
from meshwright.launch.page.units import PLAIN, STEP, Unit, ticks

__all__ = ["Chart", "Line", "draw", "thin"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 30
_MOST_POINTS = 600
_MOST_HOVERS = 300


@dataclass(frozen=True)
class Line:
    """One quantity over steps.

    Args:
        label: in the legend.
        points: (step, value), in order of steps; a value that is no number makes a gap and a mark at the upper edge.
        color: 1 to 4.
        kind: "line", "faint" (drawn weakly behind the others) or "dots" (few points, each drawn).
    """

    label: str
    points: tuple[Point, ...]
    color: int = 1
    kind: str = "line"


@dataclass(frozen=True)
class Chart:
    """Lines of one unit.

    Args:
        title: what it is about.
        lines: at least one with a point.
        unit: of the values.
        note: of the unit, in words.
        from_zero: whether the axis begins at 0.
        wide: whether it takes the whole width of the page.
    """

    title: str
    lines: tuple[Line, ...]
    unit: Unit = PLAIN
    note: str = ""
    from_zero: bool = True
    wide: bool = False


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie on the picture, in its own pixels."""

    width: int
    height: int
    x_ticks: list[float]
    x_span: tuple[float, float]
    y_ticks: list[float]

    def x(self, step: float) -> float:
        low, high = self.x_span
        return round(_LEFT + (step - low) / (high - low) * (self.width - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.height - _BOTTOM - (value - low) / (high - low) * (self.height - _TOP - _BOTTOM), 1)


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about so many points that look the same: the lowest and the highest of each stretch, in order.

    >>> thin([(0, 5.0), (1, 1.0), (2, 9.0), (3, 4.0), (4, 4.0), (5, 4.0)], most=4)
    [(1, 1.0), (2, 9.0), (3, 4.0)]
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        lost = [point for point in part if not math.isfinite(point[1])][:1]
        part = [point for point in part if math.isfinite(point[1])] or part
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]), *lost}
        kept.extend(sorted(ends, key=lambda point: point[0]))
    return kept


def draw(chart: Chart, marks: Sequence[Mark] = (), *, steps: float | None = None) -> str:
    """The chart as one `<svg>` element.

    Args:
        chart: what is drawn.
        marks: restarts, as vertical lines.
        steps: of the whole training: where the axis ends; None ends it with the last point.
    """
    frame = _frame(chart, steps)
    parts = [*_axes(chart, frame), *_marks(marks, frame)]
    for line in sorted(chart.lines, key=lambda line: line.kind != "faint"):
        parts.extend(_line(line, frame))
    hovers = escape(json.dumps(_hovers(chart, frame), separators=(",", ":"), ensure_ascii=False))
    area = f'data-top="{_TOP}" data-bottom="{frame.height - _BOTTOM}"'
    return (
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(chart.title)}" '
        f'{area} data-hovers="{hovers}">{"".join(parts)}</svg>'
    )


def _frame(chart: Chart, steps: float | None) -> _Frame:
    points = [point for line in chart.lines for point in line.points]
    values = [value for _, value in points if math.isfinite(value)] or [0.0, 1.0]
    zero = [0.0] if chart.from_zero else []
    first, last = _span([step for step, _ in points], steps or 0.0)
    width, height = (1080, 320) if chart.wide else (520, 220)
    inside = [each for each in ticks(first, last, 11 if chart.wide else 6) if first <= each <= last]
    y_ticks = ticks(min(values + zero), max(values + zero))
    return _Frame(width, height, [each for each in inside if each == round(each)], (first, last), y_ticks)


def _span(found: Sequence[float], steps: float) -> tuple[float, float]:
    """From the first to the last step, from 0 where that is not far."""
    first, last = min(found), max(*found, steps)
    if first <= 0.1 * last:
        first = min(first, 0.0)
    return (first, last) if last > first else (first - 1.0, last + 1.0)


def _axes(chart: Chart, frame: _Frame) -> Iterator[str]:
    right, bottom = frame.width - _RIGHT, frame.height - _BOTTOM
    for place, text in zip(frame.y_ticks, chart.unit.labels(frame.y_ticks), strict=True):
        y = frame.y(place)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text class="end" x="{_LEFT - 8}" y="{y + 4}">{escape(text)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    for place, text in zip(frame.x_ticks, STEP.labels(frame.x_ticks), strict=True):
        x = frame.x(place)
        yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text class="mid" x="{x}" y="{bottom + 18}">{escape(text)}</text>'


def _marks(marks: Sequence[Mark], frame: _Frame) -> Iterator[str]:
    low, high = frame.x_span
    for count, mark in enumerate(marks, start=1):
        if low <= mark.step <= high:
            x, bottom = frame.x(mark.step), frame.height - _BOTTOM
            yield f'<g class="restart"><title>{escape(_said(count, mark))}</title>'
            yield f'<line x1="{x}" x2="{x}" y1="{_TOP}" y2="{bottom}"/>'
            yield f'<path d="M{x - 4} {_TOP - 8}h8l-4 7z"/></g>'


def _said(count: int, mark: Mark) -> str:
    return f"restart {count} from step {STEP.text(mark.step)}: {mark.text}"


def _line(line: Line, frame: _Frame) -> Iterator[str]:
    kept = thin(line.points)
    path, drawing = [], False
    for step, value in kept:
        if not math.isfinite(value):
            drawing = False
            continue
        path.append(f"{'L' if drawing else 'M'}{frame.x(step)} {frame.y(value)}")
        drawing = True
    if path:
        yield f'<path class="line c{line.color} {line.kind}" d="{"".join(path)}"/>'
    lonely = len(path) == 1
    for step, value in kept:
        if not math.isfinite(value):
            yield f'<path class="lost" d="M{frame.x(step) - 3} {_TOP}l6 6m0 -6l-6 6"><title>no number</title></path>'
        elif line.kind == "dots" or lonely:
            yield f'<circle class="dot c{line.color}" cx="{frame.x(step)}" cy="{frame.y(value)}" r="3"/>'


def _hovers(chart: Chart, frame: _Frame) -> list[list[object]]:
    """[x, text] for steps at which a pointer shows values: some of all, and each of a line that has few."""
    steps = sorted({step for line in chart.lines for step, _ in line.points})
    shown = set(steps[:: math.ceil(len(steps) / _MOST_HOVERS)])
    shown |= {step for line in chart.lines if len(line.points) <= _MOST_HOVERS // 4 for step, _ in line.points}
    told: dict[float, list[str]] = {step: [f"step {STEP.text(step)}"] for step in sorted(shown)}
    for line in chart.lines:
        for step, value in line.points:
            if step in shown:
                told[step].append(f"{line.label} {chart.unit.text(value)}")
    return [[frame.x(step), "\n".join(texts)] for step, texts in told.items()]
