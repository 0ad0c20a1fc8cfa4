"""Loads of layers as a heat map: a row for each layer, a column for each expert, as a picture or as text.

The scale is the same in every picture, so that steps and runs can be laid side by side: even loads are pale, red is up
to 4 times the mean, blue down to a quarter of it, black nothing. In text, each step of a block is a factor of sqrt(2),
half a block is even, and a dot is nothing.
"""

from collections.abc import Mapping
from math import ceil, log2, nan
from pathlib import Path
from typing import Any

from meshwright.moe.errors import MetricsError
from meshwright.moe.load import Load
from meshwright.parallel.plotting import pyplot_for

__all__ = ["draw_heat_map", "heat_text"]

_INK, _QUIET = "#22262b", "#8a9099"
_COLOURS = ("#1f4e8c", "#6f9ad1", "#f6f6f4", "#e58a63", "#9c2f17")
_BLOCKS, _EVEN, _NONE = "▁▂▃▄▅▆▇█", 3, "·"
_DPI, _CELL_IN, _LETTER_IN = 150, 0.36, 0.08
_BESIDE_IN, _HEADER_IN, _BAR_IN = 3.0, 1.9, 0.16  # worst ratios and scale; title and axis; the scale alone
_MAP_IN = (3.0, 20.0)  # narrowest and widest
_NUMBERS_IN = 0.27  # the narrowest cell that a number fits
_MOST = 2.0  # log2 of the ratio at the ends of the scale
_DARK = 1.25  # beyond, numbers are white


def heat_text(loads: Mapping[str, Load]) -> str:
    """A line for each layer, for terminals: a block for each expert, and spaces between nodes.

    Args:
        loads: name of the layer -> its load; as many experts and nodes in each.

    Raises:
        MetricsError: for no layer, or layers of other sizes.

    >>> print(heat_text({"layer 0": Load((5, 5, 5, 5), num_nodes=2), "layer 11": Load((10, 5, 0, 5), num_nodes=2)}))
    layer 0   ▄▄ ▄▄  worst expert 0: 1.00x, worst node 1.00x
    layer 11  ▆▄ ·▄  worst expert 0: 2.00x, worst node 1.50x, 1 dead
    """
    _check(loads)
    wide = max(map(len, loads))
    return "\n".join(f"{name:<{wide}}  {_blocks(load)}  {_worst(load)}" for name, load in loads.items())


def draw_heat_map(loads: Mapping[str, Load], path: Path, *, title: str = "load of experts") -> None:
    """Writes a PNG. Numbers are the rows of an expert over the mean of its layer, where they fit.

    Args:
        loads: name of the layer -> its load; as many experts and nodes in each.
        path: of the file.
        title: begins the title, which goes on with the worst ratio and where it is.

    Raises:
        MetricsError: for no layer, or layers of other sizes.
        PlotError: where matplotlib is missing.
    """
    _check(loads)
    plt = pyplot_for(path)
    cell_in = _cell_in(loads)
    names_in = max(map(len, loads)) * _LETTER_IN
    width_in = names_in + cell_in * next(iter(loads.values())).num_experts + _BESIDE_IN
    size = width_in, len(loads) * _CELL_IN + _HEADER_IN
    figure, axes = plt.subplots(figsize=size, dpi=_DPI, layout="constrained")
    image = _draw(axes, list(loads.values()), gap_points=min(5.0, 30 * cell_in))
    if cell_in >= _NUMBERS_IN:
        _number(axes, list(loads.values()))
    _dress(axes, loads, cell_in=cell_in)
    axes.set_title(f"{title}: {_headline(loads)}", loc="left", fontsize=11, color=_INK, pad=26)
    _explain(figure, axes, image, size_in=size)
    try:
        figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.12)
    finally:
        plt.close(figure)


def _cell_in(loads: Mapping[str, Load]) -> float:
    experts = next(iter(loads.values())).num_experts
    return min(max(experts * _CELL_IN, _MAP_IN[0]), _MAP_IN[1]) / experts


def _check(loads: Mapping[str, Load]) -> None:
    sizes = {name: (load.num_experts, load.num_nodes) for name, load in loads.items()}
    if len(set(sizes.values())) != 1:
        shown = ", ".join(f"{name}: {experts} on {nodes}" for name, (experts, nodes) in list(sizes.items())[:4])
        raise MetricsError(
            f"experts and nodes of layers ({shown or 'none'}) make no map; give one layer or more, of one size"
        )


def _level(ratio: float) -> float:
    """Position on the scale: log2, cut at its ends."""
    return min(max(log2(ratio), -_MOST), _MOST)


def _blocks(load: Load) -> str:
    each = load.num_experts // load.num_nodes
    line = [_block(ratio) for ratio in load.ratios]
    return " ".join("".join(line[start : start + each]) for start in range(0, load.num_experts, each))


def _block(ratio: float) -> str:
    if not ratio:
        return _NONE
    return _BLOCKS[min(max(round(_EVEN + 2 * log2(ratio)), 0), len(_BLOCKS) - 1)]


def _worst(load: Load) -> str:
    if not load.num_rows:
        return "no rows"
    node = f", worst node {load.worst_node_ratio:.2f}x" if load.num_nodes > 1 else ""
    return f"worst expert {load.busiest}: {load.worst_ratio:.2f}x{node}{_dead(load)}"


def _dead(load: Load) -> str:
    return f", {len(load.dead)} dead" if load.dead else ""


def _headline(loads: Mapping[str, Load]) -> str:
    name, load = max(loads.items(), key=lambda item: item[1].worst_ratio)
    if not load.num_rows:
        return "no rows"
    text = f"worst {load.worst_ratio:.2f}x the mean ({name}, expert {load.busiest})"
    if load.num_nodes == 1:
        return text
    name, load = max(loads.items(), key=lambda item: item[1].worst_node_ratio)
    return f"{text}, worst node {load.worst_node_ratio:.2f}x ({name})"


def _draw(axes: Any, loads: list[Load], *, gap_points: float) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    image = axes.imshow(
        [[_level(ratio) if ratio else nan for ratio in load.ratios] for load in loads],
        cmap=LinearSegmentedColormap.from_list("load", _COLOURS, N=257).with_extremes(bad=_INK),
        vmin=-_MOST,
        vmax=_MOST,
        aspect="auto",
        interpolation="nearest",
    )
    for row in range(1, len(loads)):
        axes.axhline(row - 0.5, color="white", linewidth=1.0)
    each = loads[0].num_experts // loads[0].num_nodes
    for start in range(each, loads[0].num_experts, each):
        axes.axvline(start - 0.5, color="white", linewidth=gap_points)
        axes.axvline(start - 0.5, color=_INK, linewidth=gap_points / 4)
    return image


def _number(axes: Any, loads: list[Load]) -> None:
    for row, load in enumerate(loads):
        for expert, ratio in enumerate(load.ratios):
            colour = _INK if ratio and abs(_level(ratio)) <= _DARK else "white"
            axes.text(expert, row, _short(ratio), fontsize=7.5, color=colour, ha="center", va="center_baseline")


def _short(ratio: float) -> str:
    return "0" if not ratio else f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


def _dress(axes: Any, loads: Mapping[str, Load], *, cell_in: float) -> None:
    rows = list(loads.values())
    axes.set_yticks(range(len(rows)), list(loads))
    step = 2 ** max(0, ceil(log2(_NUMBERS_IN / cell_in)))
    axes.set_xticks(range(0, rows[0].num_experts, step))
    axes.set_xlabel("expert", fontsize=8.5, color=_INK)
    axes.tick_params(length=0, labelcolor=_INK, labelsize=8)
    axes.spines[:].set_visible(False)
    beside = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "fontsize": 8}
    for row, load in enumerate(rows):
        axes.annotate(_beside(load), (1, row), (6, 0), va="center", color=_INK, **beside)
    axes.annotate("worst expert", (1, -0.5), (6, 5), color=_QUIET, **beside)
    if rows[0].num_nodes > 1:
        _name_nodes(axes, rows, cell_in)


def _beside(load: Load) -> str:
    if not load.num_rows:
        return "no rows"
    return f"{load.busiest}: {load.worst_ratio:.2f}x{_dead(load)}"


def _name_nodes(axes: Any, rows: list[Load], cell_in: float) -> None:
    nodes = rows[0].num_nodes
    each = rows[0].num_experts // nodes
    place = {"textcoords": "offset points", "fontsize": 8, "color": _INK}
    for node in range(nodes):
        worst = max(load.node_shares[node] * nodes for load in rows)
        texts = f"{node}: up to {worst:.2f}x", f"{node}: {worst:.2f}x", f"{node}"
        text = next((text for text in texts if len(text) * _LETTER_IN < each * cell_in), "")
        axes.annotate(text, ((node + 0.5) * each - 0.5, -0.5), (0, 5), ha="center", **place)
    axes.annotate("node", (-0.5, -0.5), (-5, 5), ha="right", **place)


def _explain(figure: Any, axes: Any, image: Any, *, size_in: tuple[float, float]) -> None:
    long_in = min(2.2, 0.8 * (size_in[1] - _HEADER_IN) + 0.4)
    bar = figure.colorbar(
        image,
        ax=axes,
        extend="both",
        pad=1.3 / size_in[0],
        fraction=0.5 / size_in[0],
        shrink=min(1.0, long_in / (size_in[1] - 1.2)),
        aspect=long_in / _BAR_IN,
    )
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "even", "2x", "4x"])
    bar.ax.tick_params(length=0, labelcolor=_INK, labelsize=8)
    bar.ax.set_title("black: none", fontsize=8, color=_INK, pad=8)
    bar.outline.set_visible(False)
