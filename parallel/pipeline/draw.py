"""A timeline as text for a terminal: one row for each rank, one column for a slice of time."""

from bisect import bisect_right
from itertools import groupby
from statistics import median

from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.timeline import Span, Timeline, Wait

__all__ = ["drawn"]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBERED = "digits: forward of a micro-batch, capitals: its backward (A is 0), w: weights, r: recompute, dots: idle"
_BY_KIND = "-: forward, #: backward, w: weights, r: recompute, dots: idle"
_WAITS = ", ~: waits for communication"
_KINDS = {Kind.FORWARD: "-", Kind.WEIGHT_GRADIENT: "w", Kind.RECOMPUTE: "r"}
_COLOURS = {".": 90, "~": 31, "w": 33, "r": 36, "-": 34, "#": 32}
_MOST_ROWS, _LAST_ROWS = 40, 8


def drawn(found: Timeline, *, width: int = 100, colour: bool = False) -> str:
    """One row for each rank, as many as people read, and a legend.

    Micro-batches have names where most actions are a column wide and the letters suffice; else columns tell what a rank
    does for most of their time.

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
    numbered = _can_be_numbered(found, columns)
    label = len(str(found.num_ranks - 1))
    rows = {
        rank: _sampled(found, rank, columns) if numbered else _filled(found, rank, columns)
        for rank in _shown_ranks(found.num_ranks)
    }
    lines = []
    for rank, text in rows.items():
        lines.append(f"rank {rank:<{label}}  {_painted(text) if colour else text}")
        if rank + 1 not in rows and rank + 1 < found.num_ranks:
            lines.append(f"({found.num_ranks - len(rows)} more ranks)")
    length = "" if found.unit_s is None else f"step {found.makespan * found.unit_s * 1e3:,.1f} ms, "
    legend = (_NUMBERED if numbered else _BY_KIND) + (_WAITS if any("~" in text for text in rows.values()) else "")
    return "\n".join([*lines, f"{length}bubble {found.bubble:.1%}; {legend}"])


def _can_be_numbered(found: Timeline, columns: int) -> bool:
    column = found.makespan / columns
    most = max(span.action.microbatch or 0 for span in found.spans)
    return most < len(_CAPITALS) and median(span.end - span.start for span in found.spans) >= column


def _shown_ranks(number: int) -> list[int]:
    if number <= _MOST_ROWS:
        return list(range(number))
    return [*range(_MOST_ROWS - _LAST_ROWS), *range(number - _LAST_ROWS, number)]


def _of_rank(found: Timeline, rank: int) -> list[Span | Wait]:
    every: list[Span | Wait] = [*found.spans, *found.waits]
    return sorted((each for each in every if each.rank == rank), key=lambda each: each.start)


def _sampled(found: Timeline, rank: int, columns: int) -> str:
    """What a rank does in the middle of each column."""
    mine = _of_rank(found, rank)
    starts = [each.start for each in mine]
    text = []
    for column in range(columns):
        moment = (column + 0.5) * found.makespan / columns
        place = bisect_right(starts, moment) - 1
        text.append(_letter(mine[place]) if place >= 0 and moment < mine[place].end else ".")
    return "".join(text)


def _filled(found: Timeline, rank: int, columns: int) -> str:
    """What a rank does for most of each column."""
    each_column = found.makespan / columns
    spent: list[dict[str, float]] = [{".": 0.0} for _ in range(columns)]
    edges = [column * each_column for column in range(columns + 1)]
    for each in _of_rank(found, rank):
        kind = "~" if isinstance(each, Wait) else _KINDS.get(each.action.kind, "#")
        first = min(columns - 1, int(each.start / each_column))
        last = min(columns - 1, int(each.end / each_column))
        for column in range(first, last + 1):
            inside = min(each.end, edges[column + 1]) - max(each.start, edges[column])
            spent[column][kind] = spent[column].get(kind, 0.0) + inside
    for times in spent:
        times["."] = each_column - sum(times.values())
    return "".join(max(times, key=lambda kind: (times[kind], kind)) for times in spent)


def _letter(each: Span | Wait) -> str:
    if isinstance(each, Wait):
        return "~"
    assert each.action.microbatch is not None, each
    if each.action.kind is Kind.FORWARD:
        return _DIGITS[each.action.microbatch]
    return _KINDS.get(each.action.kind, _CAPITALS[each.action.microbatch])


def _painted(text: str) -> str:
    def colour(letter: str) -> int:
        return 32 if letter in _CAPITALS else _COLOURS.get(letter, 34)

    return "".join(f"\x1b[{code}m{''.join(run)}\x1b[0m" for code, run in groupby(text, key=colour))
