"""A timeline as text for a terminal, and as a trace for chrome://tracing and Perfetto."""

import json

from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.timeline import Span, Timeline

__all__ = ["drawn", "trace"]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_COLOURS = {Kind.FORWARD: 34, Kind.WEIGHT_GRADIENT: 90, Kind.RECOMPUTE: 36}
_LEGEND = "digits: forward of a micro-batch, capitals: its backward (A is 0), w: weights, r: recompute, dots: idle"


def drawn(found: Timeline, *, width: int = 100, colour: bool = False) -> str:
    """One row for each rank, one column for a slice of time.

    Args:
        found: what to draw.
        width: columns for the whole step.
        colour: with ANSI colours.

    >>> from meshwright.parallel.pipeline.orders import breadth_first
    >>> from meshwright.parallel.pipeline.timeline import timeline
    >>> print(drawn(timeline(breadth_first([0, 1], 2)), width=9).splitlines()[0])
    rank 0  01...AABB
    """
    columns = max(1, width)
    rows = []
    for rank in range(len(found.busy)):
        mine = [span for span in found.spans if span.rank == rank]
        cells = [_cell(mine, (column + 0.5) * found.makespan / columns, colour) for column in range(columns)]
        rows.append(f"rank {rank:<{len(str(len(found.busy) - 1))}}  {''.join(cells)}")
    return "\n".join([*rows, f"bubble {found.bubble:.1%}; {_LEGEND}"])


def trace(found: Timeline, *, unit_s: float = 1e-3) -> str:
    """The JSON of Chrome's trace format; `unit_s` is how many seconds a unit of the timeline stands for."""
    events = [
        {
            "name": str(span.action),
            "cat": span.action.kind.name.lower(),
            "ph": "X",
            "ts": span.start * unit_s * 1e6,
            "dur": (span.end - span.start) * unit_s * 1e6,
            "pid": 0,
            "tid": span.rank,
            "args": {"stage": span.action.stage, "microbatch": span.action.microbatch},
        }
        for span in found.spans
    ]
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in range(len(found.busy))
    ]
    return json.dumps({"traceEvents": [*names, *events]})


def _cell(spans: list[Span], moment: float, colour: bool) -> str:
    for span in spans:
        if span.start <= moment < span.end:
            text = _letter(span)
            return f"\x1b[{_COLOURS.get(span.action.kind, 32)}m{text}\x1b[0m" if colour else text
    return "."


def _letter(span: Span) -> str:
    assert span.action.microbatch is not None, span
    number = span.action.microbatch % len(_DIGITS)
    if span.action.kind is Kind.FORWARD:
        return _DIGITS[number]
    if span.action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
        return chr(ord("A") + number % 26)
    return "w" if span.action.kind is Kind.WEIGHT_GRADIENT else "r"
