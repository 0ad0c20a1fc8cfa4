"""Charts of what each node did, from the counters of nodes; many nodes are drawn as their spread. Pure.

Nodes count by the clock and charts have steps, so each reading lies between the steps that were logged around it.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from meshwright.launch.page.charts import Chart, Line
from meshwright.launch.page.machines import Counted
from meshwright.launch.page.read import Point
from meshwright.launch.page.units import BYTES, BYTES_PER_S, CELSIUS, SHARE, WATT, Unit
from meshwright.launch.page.values import finite

__all__ = ["node_charts"]

Records = Sequence[Mapping[str, Any]]
_MOST_LINES = 4
_STRETCHES = 120


@dataclass(frozen=True)
class _Panel:
    """One quantity.

    Args:
        title: that of rank 0's own chart, where this one takes its place.
        note: of the unit.
        keys: whose numbers are added.
        rate: whether they are of the time that was counted.
        alone: whether it is drawn of a run of one node, which rank 0's own charts tell enough of otherwise.
    """

    title: str
    note: str
    unit: Unit
    keys: tuple[str, ...]
    rate: bool = False
    alone: bool = True


_PANELS = (
    _Panel("Network", "sent, RDMA too", BYTES_PER_S, ("network_sent_bytes", "rdma_sent_bytes"), rate=True, alone=False),
    _Panel("Loopback", "inside each node", BYTES_PER_S, ("loopback_bytes",), rate=True, alone=False),
    _Panel(
        "Received",
        "over the network, RDMA too",
        BYTES_PER_S,
        ("network_received_bytes", "rdma_received_bytes"),
        rate=True,
        alone=False,
    ),
    _Panel("Processors", "share of all cores that is busy", SHARE, ("cpu_utilisation",)),
    _Panel("Memory of the host", "in use", BYTES, ("memory_used_bytes",)),
    _Panel("GPU utilisation", "mean of a node's GPUs", SHARE, ("gpu_utilisation",)),
    _Panel("GPU power", "watt, all GPUs of a node", WATT, ("gpu_power_w",)),
    _Panel("GPU temperature", "hottest GPU of a node", CELSIUS, ("gpu_temperature_c",)),
    _Panel("GPU memory", "fullest GPU of a node", BYTES, ("gpu_memory_used_bytes",)),
)


def node_charts(counted: Counted, records: Records) -> Iterator[Chart]:
    """One chart per quantity: a line per node, or highest, middle and lowest of more than four.

    Args:
        counted: counters of nodes.
        records: of metrics.jsonl, which say when steps were.
    """
    logged = sorted((time_s, step) for each in records for time_s, step in _moment(each))
    for panel in _PANELS if logged else ():
        found = {node: _points(panel, told, logged) for node, told in counted.items()}
        lines = {node: points for node, points in found.items() if points}
        worth = any(value for points in lines.values() for _, value in points)
        if worth and (panel.alone or len(lines) > 1):
            yield _chart(panel, lines)


def _moment(record: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    time_s, step = finite(record.get("time_unix_s")), finite(record.get("step"))
    if time_s is not None and step is not None and "event" not in record:
        yield time_s, step


def _points(panel: _Panel, told: Records, logged: Sequence[tuple[float, float]]) -> tuple[Point, ...]:
    """(step, value), while steps were logged; what was counted before or after that has no place on the axis."""
    found = []
    for record in told:
        time_s, values = finite(record.get("time_unix_s")), [finite(record.get(key)) for key in panel.keys]
        amounts = [value for value in values if value is not None]
        seconds = (finite(record.get("counted_s")) or 0.0) if panel.rate else 1.0
        if time_s is not None and amounts and seconds > 0 and logged[0][0] <= time_s <= logged[-1][0]:
            found.append((_step_at(time_s, logged), sum(amounts) / seconds))
    return tuple(sorted(found))


def _step_at(time_s: float, logged: Sequence[tuple[float, float]]) -> float:
    after = bisect_left(logged, (time_s, -math.inf))
    (end_s, last), (begin_s, first) = logged[after], logged[max(0, after - 1)]
    return round(last if end_s <= begin_s else first + (last - first) * (time_s - begin_s) / (end_s - begin_s), 3)


def _chart(panel: _Panel, found: Mapping[str, Sequence[Point]]) -> Chart:
    if len(found) <= _MOST_LINES:
        lines = [Line(node, tuple(points), color=1 + index) for index, (node, points) in enumerate(found.items())]
        note = f"{panel.note}: {lines[0].label}" if len(lines) == 1 else panel.note
        return Chart(panel.title, tuple(lines), panel.unit, note)
    means = {node: fmean(value for _, value in points) for node, points in found.items()}
    least, most = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    note = f"{panel.note}; {len(found)} nodes, on average most on {most}, least on {least}"
    return Chart(panel.title, tuple(_spread(found)), panel.unit, note)


def _spread(found: Mapping[str, Sequence[Point]]) -> Iterator[Line]:
    """Highest, middle and lowest of all nodes, stretch by stretch of the steps."""
    steps = [step for points in found.values() for step, _ in points]
    low, width = min(steps), (max(steps) - min(steps)) / _STRETCHES or 1.0
    stretches: dict[int, list[float]] = {}
    for points in found.values():
        own: dict[int, list[float]] = {}
        for step, value in points:
            own.setdefault(int((step - low) / width), []).append(value)
        for stretch, values in own.items():
            stretches.setdefault(stretch, []).append(fmean(values))
    picks: Mapping[str, Callable[[list[float]], float]] = {"highest": max, "median": median, "lowest": min}
    for color, (label, pick) in enumerate(picks.items(), start=1):
        picked = ((low + stretch * width, pick(values)) for stretch, values in sorted(stretches.items()))
        yield Line(label, tuple(picked), color=color)
