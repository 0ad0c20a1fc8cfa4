"""A forecast as a picture: where the time goes, what needs memory, and how the job grows."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.launch.paper.text import TIMES
from meshwright.parallel.plotting import pyplot_for

if TYPE_CHECKING:
    from meshwright.clusters.simulated.forecast import Forecast
    from meshwright.launch.predict import Prediction

__all__ = ["draw_forecast"]

# Okabe and Ito's colours, told apart by most who see few; grey is what nobody wants to pay for
_TIMES = {
    "compute_s": "#0072B2",
    "recompute_s": "#56B4E9",
    "head_s": "#5B8FB0",
    "tp_s": "#D55E00",
    "cp_s": "#E69F00",
    "ep_s": "#CC79A7",
    "pp_bubble_s": "#B0B0B0",
    "pp_transfer_s": "#8A8A8A",
    "offload_s": "#B07AA1",
    "dp_s": "#009E73",
    "optimizer_s": "#7A5195",
    "straggling_s": "#444444",
}
_MEMORY = {
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#7A5195",
    "gathered": "#009E73",
    "activations": "#D55E00",
    "working": "#E69F00",
    "fragmentation": "#B0B0B0",
    "overhead": "#8A8A8A",
}
_SHOWN = 0.04
"""Parts below this share of the longest bar are added up as others."""


def draw_forecast(prediction: "Prediction", path: Path) -> None:
    """Draws into a file, whose ending says the format (.png, .svg, .pdf).

    Args:
        prediction: with a forecast.
        path: of the picture.

    Raises:
        PlotError: where matplotlib is missing.
    """
    found = prediction.forecast
    assert found is not None, "a prediction of time and memory"
    pyplot = pyplot_for(path)
    scaled = len(prediction.scaling) > 1
    figure, axes = pyplot.subplots(1, 2 + scaled, figsize=(5.2 + 4.2 * (1 + scaled), 4.6), layout="constrained")
    cluster = found.paper.machine.cluster
    figure.suptitle(f"{prediction.mesh} on {cluster.num_gpus:,} {cluster.gpu.name}", fontsize=12, x=0.01, ha="left")
    _times(axes[0], found)
    _memory(axes[1], found)
    if scaled:
        _growth(axes[2], prediction.scaling, cluster.num_gpus)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _times(axis: Any, found: "Forecast") -> None:
    step = found.step
    unit, name = (1.0, "s") if step.total_s >= 1 else (1e3, "ms")
    parts = {cause: unit * value for cause, value in vars(step).items() if value > 0}
    parts = dict(sorted(parts.items(), key=lambda each: each[1]))
    axis.barh([TIMES[cause] for cause in parts], list(parts.values()), color=[_TIMES[cause] for cause in parts])
    for place, value in enumerate(parts.values()):
        axis.annotate(f" {value / unit / step.total_s:.0%}", (value, place), va="center", fontsize=9)
    axis.margins(x=0.14)
    axis.set_xlabel(f"{name} of a step")
    axis.set_title(
        f"A step takes {unit * step.total_s:.3g} {name}: {found.tokens_per_s:,.0f} tokens/s, MFU {found.mfu:.0%}",
        fontsize=10,
        loc="left",
    )


def _memory(axis: Any, found: "Forecast") -> None:
    parts = {name: value / 1e9 for name, value in found.memory.causes.items()}
    capacity, total = found.capacity_bytes / 1e9, found.memory.total_bytes / 1e9
    bottom = 0.0
    for name, value in _merged(parts, _SHOWN * max(total, capacity)).items():
        axis.bar([0], [value], bottom=bottom, width=0.5, color=_MEMORY.get(name, "#DDDDDD"), label=name)
        axis.annotate(f"{name}  {value:.3g} GB", (0.29, bottom + value / 2), va="center", fontsize=9)
        bottom += value
    axis.axhline(capacity, color="#CC0000", linewidth=1.4)
    gpu = found.paper.machine.cluster.gpu.name
    axis.annotate(f"{capacity:.0f} GB of {gpu}", (1.18, capacity), color="#CC0000", fontsize=9, ha="right", va="bottom")
    axis.set_xlim(-0.32, 1.2)
    axis.set_ylim(0, 1.1 * max(total, capacity))
    axis.set_xticks([])
    axis.set_ylabel("GB of the fullest rank")
    verdict = "It fits" if found.fits else f"It lacks {found.missing_bytes / 1e9:.3g} GB"
    axis.set_title(f"{verdict}: {total:.3g} GB", fontsize=10, loc="left")


def _merged(parts: Mapping[str, float], least: float) -> dict[str, float]:
    """Parts, the smallest added up as others."""
    shown = {name: value for name, value in parts.items() if value >= least}
    rest = sum(parts.values()) - sum(shown.values())
    return {**shown, "others": rest} if rest > 0 else shown


def _growth(axis: Any, points: tuple[tuple[int, float], ...], here: int) -> None:
    gpus, rates = zip(*points, strict=True)
    unit, name = (1e6, "million ") if max(rates) >= 1e6 else (1e3, "thousand ")
    ideal = [rates[0] * each / gpus[0] / unit for each in gpus]
    axis.plot(gpus, ideal, color="#B0B0B0", linestyle="--", label="in proportion")
    axis.plot(gpus, [each / unit for each in rates], color="#0072B2", marker="o", label="predicted")
    axis.plot([here], [rates[gpus.index(here)] / unit], color="#D55E00", marker="o", markersize=9, label="this job")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(gpus, [f"{each:,}" for each in gpus])
    axis.minorticks_off()
    ticks = [each / unit for each in rates]
    axis.set_yticks(ticks, [f"{each:.3g}" for each in ticks])
    axis.set_xlabel("GPUs, the batch of a step as it is")
    axis.set_ylabel(f"{name}tokens/s")
    axis.set_title("With more and fewer replicas", fontsize=10, loc="left")
    axis.legend(frameon=False, fontsize=9)
