"""A timeline as a trace for Perfetto (ui.perfetto.dev) and chrome://tracing.

One process for each rank. A rank's first thread computes and waits; the others hold its communication, as many as are
needed so that what is under way at the same time stands side by side. Arrows lead from sends to receives.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from meshwright.parallel.pipeline.actions import Action
from meshwright.parallel.pipeline.check import SENDS, other_end
from meshwright.parallel.pipeline.timeline import Span, Timeline

__all__ = ["lanes", "trace"]

Event = dict[str, Any]
_End = tuple[Span, int]
"""What is sent or received, and on which thread."""
_PAPER_UNIT_S = 1e-3


def trace(found: Timeline) -> str:
    """The JSON of Chrome's trace format; a unit of a timeline on paper is shown as a millisecond.

    >>> from meshwright.parallel.pipeline.orders import breadth_first
    >>> from meshwright.parallel.pipeline.timeline import timeline
    >>> [event["name"] for event in json.loads(trace(timeline(breadth_first([0], 1))))["traceEvents"][-2:]]
    ['0F0', '0B0']
    """
    unit_ns = (_PAPER_UNIT_S if found.unit_s is None else found.unit_s) * 1e9
    events: list[Event] = []
    ends: dict[Action, _End] = {}
    for rank in range(found.num_ranks):
        threads = lanes([span for span in found.communication if span.rank == rank])
        events += _names(rank, len(threads))
        for thread, spans in enumerate(threads, start=1):
            events += (_slice(span, thread, unit_ns) for span in spans)
            ends.update({span.action: (span, thread) for span in spans})
    for number, journey in enumerate(_journeys(ends)):
        events += _arrow(number, journey, unit_ns)
    events += (
        _event(f"wait: {each.cause}", "wait", where=(each.rank, 0), times_ns=_times(each.start, each.end, unit_ns))
        for each in found.waits
    )
    events += (_slice(span, 0, unit_ns) for span in found.spans)
    return json.dumps({"displayTimeUnit": "ms", "otherData": {"bubble": found.bubble}, "traceEvents": events})


def lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Deals spans to as few lanes as hold them without overlap.

    >>> one, other = (Span(0, Action.parse(f"{stage}UNSHARD"), stage, stage + 1.5) for stage in (0, 1))
    >>> [len(lane) for lane in lanes([one, other])]
    [1, 1]
    """
    found: list[list[Span]] = []
    for span in sorted(spans, key=lambda each: (each.start, each.end)):
        free = next((lane for lane in found if lane[-1].end <= span.start), None)
        if free is None:
            found.append([span])
        else:
            free.append(span)
    return found


def _names(rank: int, num_lanes: int) -> Iterator[Event]:
    yield {"name": "process_name", "ph": "M", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}}
    yield {"name": "process_sort_index", "ph": "M", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    for thread in range(num_lanes + 1):
        number = f" {thread}" if thread > 1 else ""
        name = f"communication{number}" if thread else "compute"
        yield {"name": "thread_name", "ph": "M", "pid": rank, "tid": thread, "args": {"name": name}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": rank, "tid": thread, "args": {"sort_index": thread}}


def _times(start: float, end: float, unit_ns: float) -> tuple[int, int]:
    return round(start * unit_ns), round(end * unit_ns)


def _slice(span: Span, thread: int, unit_ns: float) -> Event:
    action = span.action
    args = {"stage": action.stage, "microbatch": action.microbatch}
    times_ns = _times(span.start, span.end, unit_ns)
    return {**_event(str(action), action.kind.name.lower(), where=(span.rank, thread), times_ns=times_ns), "args": args}


def _event(name: str, category: str, *, where: tuple[int, int], times_ns: tuple[int, int]) -> Event:
    rank, thread = where
    start, end = times_ns
    times = {"ts": start / 1e3, "dur": (end - start) / 1e3}
    return {"name": name, "cat": category, "ph": "X", **times, "pid": rank, "tid": thread}


def _journeys(ends: dict[Action, _End]) -> Iterator[tuple[_End, _End]]:
    for action, end in ends.items():
        if action.kind in SENDS and other_end(action) in ends:
            yield end, ends[other_end(action)]


def _arrow(number: int, journey: tuple[_End, _End], unit_ns: float) -> Iterator[Event]:
    """The two ends of an arrow; each lies inside of its slice."""
    for phase, (span, thread) in zip("sf", journey, strict=True):
        start, end = _times(span.start, span.end, unit_ns)
        moment = start if phase == "s" else max(start, end - 1)
        event = {"name": "sent", "cat": "transfer", "ph": phase, "id": number, "ts": moment / 1e3}
        yield {**event, "pid": span.rank, "tid": thread, **({"bp": "e"} if phase == "f" else {})}
