"""Which charts and figures a run's records give, by their keys; a key that is absent has no panel. Pure."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from meshwright.launch.page.charts import Chart, Line
from meshwright.launch.page.nodes import node_charts
from meshwright.launch.page.read import Point, RunView, points
from meshwright.launch.page.units import (
    BYTES,
    BYTES_PER_S,
    CELSIUS,
    COUNT,
    PLAIN,
    SECONDS,
    SHARE,
    STEP,
    WATT,
    Unit,
    duration,
)
from meshwright.launch.page.values import number

__all__ = ["charts", "figures"]

Records = Sequence[Mapping[str, Any]]

_FEW = 40
"""Up to so many points a line is drawn as it is; more are smoothed."""

_PANELS: tuple[tuple[str, str, Unit, tuple[tuple[str, str], ...]], ...] = (
    ("Throughput", "tokens per second, all ranks", COUNT, (("tokens_per_s", "tokens/s"),)),
    (
        "Model-FLOP utilisation",
        "share of the devices' peak",
        SHARE,
        (("mfu_full", "full"), ("mfu_causal", "causal")),
    ),
    ("Gradient norm", "before clipping", PLAIN, (("gradient_norm", "norm"),)),
    ("Learning rate", "", PLAIN, (("lr", "rate"),)),
    ("GPU utilisation", "share of time with a kernel running, rank 0", SHARE, (("gpu_utilisation", "busy"),)),
    ("GPU power", "watt, rank 0", WATT, (("gpu_power_w", "power"),)),
    ("GPU temperature", "rank 0", CELSIUS, (("gpu_temperature_c", "chip"),)),
    (
        "Memory",
        "rank 0",
        BYTES,
        (("peak_memory_bytes", "peak"), ("gpu_memory_used_bytes", "GPU"), ("resident_bytes", "process")),
    ),
    (
        "Load of experts",
        "the fullest over the mean",
        PLAIN,
        (("experts.worst_expert_ratio", "expert"), ("experts.worst_node_ratio", "node")),
    ),
    ("Dead experts", "without a token", COUNT, (("experts.dead_experts", "experts"),)),
    ("Ranks", "that train, as nodes go and come", COUNT, (("ranks", "ranks"),)),
    ("Bubble", "share of a step in which stages wait", SHARE, (("bubble", "bubble"),)),
    ("Exposed communication", "seconds per step", SECONDS, (("exposed_communication_s", "exposed"),)),
)
"""Title, note, unit, and (key, label) of each line."""

_WORTH: Mapping[str, Callable[[set[float]], bool]] = {"Dead experts": any, "Ranks": lambda found: len(found) > 1}
"""Title -> whether such values are worth a chart; others always are."""

_WORTH_A_CHART = 0.01
"""Of the network's bytes: what loopback has to carry to be more than talk of the system with itself."""

_TRAFFIC = (
    ("network_sent_bytes", "sent"),
    ("network_received_bytes", "received"),
    ("rdma_sent_bytes", "RDMA sent"),
    ("rdma_received_bytes", "RDMA received"),
)


def charts(view: RunView) -> list[Chart]:
    """The charts of a run, the loss first.

    Args:
        view: of the run.
    """
    found = [*_loss(view.records)]
    for title, note, unit, keys in _PANELS[:4]:
        found.extend(_panel(view.records, title, note=note, unit=unit, keys=keys))
    nodes = list(node_charts(view.machines.counted, view.records))
    ranks = [*_traffic(view.records)]
    for title, note, unit, keys in _PANELS[4:]:
        ranks.extend(_panel(view.records, title, note=note, unit=unit, keys=keys))
    told = {chart.title for chart in nodes}
    return [*found, *nodes, *(chart for chart in ranks if chart.title not in told)]


def _loss(records: Records) -> Iterator[Chart]:
    training, held_out = points(records, "loss"), points(records, "validation_loss")
    lines = []
    if training and len(training) <= _FEW:
        lines.append(Line("training", training))
    elif training:
        lines += [Line("each step", training, kind="faint"), Line("training, smoothed", _smoothed(training))]
    if held_out:
        lines.append(Line("validation", held_out, color=2, kind="dots"))
    if lines:
        yield Chart("Loss", tuple(lines), note="nats per token", from_zero=False, wide=True)


def _smoothed(values: Sequence[Point]) -> tuple[Point, ...]:
    """Means of as many points before each as behind it, so that a falling curve is not drawn too high."""
    kept = [(step, value) for step, value in values if math.isfinite(value)]
    sums = [0.0, *accumulate(value for _, value in kept)]
    most, found = max(2, min(50, len(kept) // 50)), []
    for index, (step, _) in enumerate(kept):
        side = min(most, index, len(kept) - 1 - index)
        found.append((step, (sums[index + side + 1] - sums[index - side]) / (2 * side + 1)))
    return tuple(found)


def _panel(records: Records, title: str, *, note: str, unit: Unit, keys: Sequence[tuple[str, str]]) -> Iterator[Chart]:
    named = [(label, points(records, key)) for key, label in keys]
    lines = [Line(label, found, color=1 + index) for index, (label, found) in enumerate(named) if found]
    if lines and _WORTH.get(title, bool)({value for _, value in lines[0].points}):
        yield Chart(title, tuple(lines), unit, note)


def _traffic(records: Records) -> Iterator[Chart]:
    """Bytes per second, of the time that each record counts; loopback has its own chart, for it is no network."""
    outside = [(label, _per_second(records, key)) for key, label in _TRAFFIC]
    moved = [(label, found) for label, found in outside if any(value for _, value in found)]
    lines = tuple(Line(label, found, color=1 + index) for index, (label, found) in enumerate(moved))
    if lines:
        yield Chart("Network", lines, BYTES_PER_S, "rank 0's host")
    inside = _per_second(records, "loopback_bytes")
    if sum(value for _, value in inside) > _WORTH_A_CHART * sum(value for line in lines for _, value in line.points):
        yield Chart("Loopback", (Line("sent", inside),), BYTES_PER_S, "between processes of rank 0's host")


def _per_second(records: Records, key: str) -> tuple[Point, ...]:
    shared = [
        each for each in records if number(each.get(key)) is not None and (number(each.get("counted_s")) or 0) > 0
    ]
    seconds = points(shared, "counted_s")
    return tuple((step, value / s) for (step, value), (_, s) in zip(points(shared, key), seconds, strict=True))


def figures(view: RunView) -> list[tuple[str, str, str]]:
    """(name, value, what stands below) of the numbers on top of a page.

    Args:
        view: of the run.
    """
    found = [_last(view.records, key, name, unit=unit) for key, name, unit in _LAST]
    told = [(name, value, below) for name, value, below in found if value]
    return [*_progress(view), *told, *_time(view)]


_LAST = (
    ("loss", "Training loss", PLAIN),
    ("validation_loss", "Validation loss", PLAIN),
    ("tokens_per_s", "Tokens/s", COUNT),
    ("mfu_full", "MFU", SHARE),
    ("peak_memory_bytes", "Peak memory", BYTES),
)


def _last(records: Records, key: str, name: str, *, unit: Unit) -> tuple[str, str, str]:
    found = points(records, key)
    if not found:
        return name, "", ""
    finite = sorted(value for _, value in found if math.isfinite(value))
    below = "no number"
    if finite and key.endswith("loss"):
        below = f"lowest {unit.text(finite[0])}"
    elif finite:
        below = f"median {unit.text(finite[len(finite) // 2])}"
    return name, unit.text(found[-1][1]), "rank 0" if key == "peak_memory_bytes" else below


def _progress(view: RunView) -> Iterator[tuple[str, str, str]]:
    steps, tokens = points(view.records, "step"), points(view.records, "tokens")
    if steps:
        yield "Step", STEP.text(steps[-1][1]), f"of {STEP.text(view.steps)}" if view.steps else ""
    if tokens:
        yield "Tokens", COUNT.text(tokens[-1][1]), "all ranks"


def _time(view: RunView) -> Iterator[tuple[str, str, str]]:
    if view.started_unix_s is not None and view.ended_unix_s is not None:
        count = len(view.marks)
        below = f"{count} restart{'s' if count > 1 else ''}" if count else "no restart"
        yield "Duration", duration(max(0.0, view.ended_unix_s - view.started_unix_s)), below
