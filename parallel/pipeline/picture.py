"""Timelines as a picture, one above the other: a lane for each rank, and a thin one below it for its communication."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from meshwright.parallel.pipeline.actions import Kind
from meshwright.parallel.pipeline.timeline import Span, Timeline
from meshwright.parallel.pipeline.trace import lanes
from meshwright.parallel.plotting import pyplot_for

__all__ = ["draw_picture"]

_INK, _QUIET, _IDLE = "#22262b", "#8a9099", "#f0f1f3"
_WORK = {
    "forward": ("#3b6fb6", "#6f9ad1"),
    "backward": ("#2f8f6b", "#63b795"),
    "weights": ("#d9a441", "#e6c07a"),
    "recompute": ("#8d79b8", "#b0a1d0"),
}
_COLOURS = {"gather": "#c2571a", "reduce": "#8f2d56", "send": "#5f6b7a", "wait": "#f0a58f"}
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRADIENT: "backward",
    Kind.WEIGHT_GRADIENT: "weights",
    Kind.RECOMPUTE: "recompute",
    Kind.GATHER: "gather",
    Kind.REDUCE: "reduce",
    Kind.SEND_ACTIVATION: "send",
    Kind.SEND_GRADIENT: "send",
}
_WIDTH_IN, _DPI = 13.0, 150
_COMPUTE = (0.06, 0.60)
_LANES = ((("gather", "reduce"), (0.69, 0.15), 1 / 400), (("send",), (0.86, 0.07), 1 / 900))
"""Top and height in the row of a rank, which is 1 high; for communication also what is in it, and its thinnest mark."""


def draw_picture(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Writes a PNG; timelines in the same unit have the same scale.

    Args:
        timelines: title -> what is drawn below it; the bubble is added to the title.
        path: of the file.

    Raises:
        PlotError: where matplotlib is missing.
    """
    plt = pyplot_for(path)
    heights = [_height_in(found.num_ranks) for found in timelines.values()]
    figure, every = plt.subplots(
        len(timelines),
        figsize=(_WIDTH_IN, sum(heights) + 0.5),
        dpi=_DPI,
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    used: dict[str, str] = {}
    for axes, (title, found) in zip(every[:, 0], timelines.items(), strict=True):
        axes.set_xlim(0, max(each.makespan for each in timelines.values() if each.unit_s == found.unit_s))
        _draw(axes, found)
        _dress(axes, title, found)
        used |= _used(found)
    _explain(figure, used)
    try:
        figure.savefig(path, format="png")
    finally:
        plt.close(figure)


def _height_in(num_ranks: int) -> float:
    return 0.95 + num_ranks * (0.62 if num_ranks <= 4 else 0.42 if num_ranks <= 16 else 0.24)


def _draw(axes: Any, found: Timeline) -> None:
    for rank in range(found.num_ranks):
        axes.broken_barh([(0, found.makespan)], (rank + _COMPUTE[0], _COMPUTE[1]), facecolor=_IDLE)
    _draw_work(axes, found)
    for rank in range(found.num_ranks):
        waits = [(each.start, each.end - each.start) for each in found.waits if each.rank == rank]
        axes.broken_barh(waits, (rank + _COMPUTE[0], _COMPUTE[1]), facecolor=_COLOURS["wait"])
    _draw_links(axes, found)
    _number(axes, found)


def _draw_work(axes: Any, found: Timeline) -> None:
    """Neighbouring stages of a rank have two tints, so that a stage can be told from the next."""
    turns = _turns(found)
    bars: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for span in found.spans:
        colour = _WORK[_NAMES[span.action.kind]][turns[span.rank, span.action.stage] % 2]
        bars[span.rank, colour].append((span.start, span.end - span.start))
    mean = sum(span.end - span.start for span in found.spans) / len(found.spans)
    edge = 0.4 if mean / axes.get_xlim()[1] * _WIDTH_IN * _DPI > 6 else 0.0
    for (rank, colour), spans in bars.items():
        axes.broken_barh(spans, (rank + _COMPUTE[0], _COMPUTE[1]), facecolor=colour, edgecolor="white", linewidth=edge)


def _turns(found: Timeline) -> dict[tuple[int, int], int]:
    """(rank, stage) -> which of the rank's stages it is."""
    pairs = sorted({(span.rank, span.action.stage) for span in found.spans})
    return {(rank, stage): sum(other < stage for each, other in pairs if each == rank) for rank, stage in pairs}


def _draw_links(axes: Any, found: Timeline) -> None:
    """What is under way at the same time shares the height of its lane; what takes no time is a thin mark."""
    for rank in range(found.num_ranks):
        for names, (top, height), share in _LANES:
            thinnest = axes.get_xlim()[1] * share
            shown = [
                Span(rank, span.action, span.start, max(span.end, span.start + thinnest))
                for span in found.communication
                if span.rank == rank and _NAMES.get(span.action.kind) in names
            ]
            stacked = lanes(shown)
            for number, lane in enumerate(stacked):
                each = height / len(stacked)
                for name, bars in _by_name(lane).items():
                    axes.broken_barh(bars, (rank + top + number * each, each), facecolor=_COLOURS[name])


def _by_name(spans: Iterable[Span]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for span in spans:
        found[_NAMES[span.action.kind]].append((span.start, span.end - span.start))
    return found


def _number(axes: Any, found: Timeline) -> None:
    """Micro-batches, where they fit."""
    size = 8 if found.num_ranks <= 4 else 6.5
    column = axes.get_xlim()[1] / (_WIDTH_IN * 0.93 * 72)  # a point of the page
    for span in found.spans:
        text = str(span.action.microbatch)
        if span.end - span.start > (0.62 * size * len(text) + 2) * column:
            middle = (span.start + span.end) / 2, span.rank + _COMPUTE[0] + _COMPUTE[1] / 2
            axes.text(*middle, text, fontsize=size, color="white", ha="center", va="center_baseline", clip_on=True)


def _dress(axes: Any, title: str, found: Timeline) -> None:
    axes.set_title(f"{title}: bubble {found.bubble:.1%}", loc="left", fontsize=11, color=_INK, pad=8)
    axes.set_ylim(found.num_ranks, 0)
    ranks = range(found.num_ranks)
    step = max(1, found.num_ranks // 32)
    axes.set_yticks([rank + 0.45 for rank in ranks][::step], [f"rank {rank}" for rank in ranks][::step])
    axes.tick_params(axis="y", length=0, labelcolor=_INK, labelsize=8.5)
    axes.tick_params(axis="x", colors=_QUIET, labelcolor=_INK, labelsize=8.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_QUIET)
    if found.unit_s is None:
        axes.set_xlabel("time (forwards of one block)", fontsize=8.5, color=_INK)
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * found.unit_s * 1e3:g}")
        axes.set_xlabel("time (ms)", fontsize=8.5, color=_INK)


def _used(found: Timeline) -> dict[str, str]:
    """Name -> colour of all that is drawn of a timeline."""
    names = {_NAMES[span.action.kind] for span in (*found.spans, *found.communication) if span.action.kind in _NAMES}
    colours = {name: both[0] for name, both in _WORK.items()} | _COLOURS
    if found.waits:
        names.add("wait")
    return {name: colour for name, colour in colours.items() if name in names}


def _explain(figure: Any, used: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    words = {"wait": "waits for communication", "weights": "gradients of weights", "reduce": "reduction"}
    order = [name for name in (*_WORK, *_COLOURS) if name in used]
    patches = [Patch(facecolor=used[name], label=words.get(name, name)) for name in order]
    patches.append(Patch(facecolor=_IDLE, edgecolor=_QUIET, linewidth=0.5, label="idle"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8.5)
