"""A plan as a picture: where the time of the best layouts goes, and what memory each needs."""

from pathlib import Path
from typing import Any

from meshwright.clusters.simulated.memory import memory
from meshwright.clusters.simulated.search import Priced
from meshwright.launch.plan_report import Plan, axes_of
from meshwright.launch.planning import job_keys
from meshwright.parallel.errors import PlotError
from meshwright.parallel.plotting import pyplot_for

__all__ = ["draw_plan"]

_INK, _QUIET = "#22262b", "#8a9099"
_CAUSES = {
    "compute_s": ("computing", "#3b6fb6"),
    "recompute_s": ("recomputing", "#8d79b8"),
    "head_s": ("head and loss", "#6f9ad1"),
    "tp_s": ("tp", "#c2571a"),
    "cp_s": ("cp", "#e08a4a"),
    "ep_s": ("ep", "#8f2d56"),
    "pp_bubble_s": ("bubble", "#c9ccd1"),
    "pp_transfer_s": ("transfers", "#5f6b7a"),
    "dp_s": ("gradients and gathers", "#2f8f6b"),
    "optimizer_s": ("optimizer", "#63b795"),
    "straggling_s": ("stragglers", "#f0a58f"),
}
_KINDS = {
    "weights_bytes": ("weights", "#3b6fb6"),
    "gradients_bytes": ("gradients", "#2f8f6b"),
    "optimizer_bytes": ("optimizer", "#63b795"),
    "activations_bytes": ("activations", "#d9a441"),
    "working_bytes": ("block at work", "#e6c07a"),
    "logits_bytes": ("logits", "#8d79b8"),
    "fragmentation_bytes": ("fragmentation", "#c9ccd1"),
    "overhead_bytes": ("driver, framework", "#8a9099"),
}
_WIDTH_IN, _ROW_IN, _REST_IN, _DPI = 13.0, 0.52, 2.3, 150


def draw_plan(plan: Plan, path: Path) -> None:
    """Writes a PNG.

    Args:
        plan: with layouts that fit, or the nearest one that does not.
        path: of the file.

    Raises:
        PlotError: where matplotlib is missing, nothing can be drawn, or the file cannot be written.
    """
    shown = [*plan.found.best] or [each for each in (plan.found.nearest,) if each]
    if not shown:
        raise PlotError(f"{path} cannot be drawn: no layout is legal for {plan.found.question.cluster.num_gpus} GPUs")
    plt = pyplot_for(path)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(_WIDTH_IN, _REST_IN + _ROW_IN * len(shown)), dpi=_DPI, layout="constrained", width_ratios=(3, 2)
    )
    scale = shown[0].layout.global_batch
    times = [{name: getattr(each.step, name) * scale / each.layout.global_batch for name in _CAUSES} for each in shown]
    _bars(left, times, _CAUSES)
    left.set_yticks(range(len(shown)), [*map(_label, shown)], fontsize=8, color=_INK)
    left.set_xlabel(f"seconds of a step of {scale} sequences", color=_INK)
    _bars(right, [_kinds(each) for each in shown], _KINDS)
    right.set_yticks([])
    right.set_xlabel("GB of the fullest GPU", color=_INK)
    cluster = plan.found.question.cluster
    right.axvline(cluster.gpu.memory_bytes / 1e9, color="#b3261e", linewidth=1.2)
    figure.suptitle(f"{plan.name} on {cluster.num_gpus} x {cluster.gpu.name}", color=_INK, x=0.01, ha="left")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise PlotError(f"{path} cannot be written: {error.strerror}; choose another path") from error
    finally:
        plt.close(figure)


def _kinds(priced: Priced) -> dict[str, float]:
    """Memory by kind in GB; what of the states ranks of cp keep besides counts as optimizer."""
    found = {name: getattr(memory(priced.training), name) for name in _KINDS}
    found["optimizer_bytes"] += priced.memory_bytes - sum(found.values())
    return {name: value / 1e9 for name, value in found.items()}


def _bars(axes: Any, rows: list[dict[str, float]], looks: dict[str, tuple[str, str]]) -> None:
    starts = [0.0] * len(rows)
    for name, (label, colour) in looks.items():
        widths = [row[name] for row in rows]
        if max(widths) > 0:
            axes.barh(range(len(rows)), widths, left=starts, height=0.62, color=colour, label=label)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.invert_yaxis()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=_QUIET)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False, fontsize=8, handlelength=1, labelcolor=_INK
    )


def _label(priced: Priced) -> str:
    told = job_keys(priced.layout)["parallel"]
    again = ", recompute" if priced.layout.recompute == "full" else ""
    zero = f", ZeRO {priced.layout.zero_stage}" if priced.layout.zero_stage else ""
    loops = f" x {told['num_loops']}" if "num_loops" in told else ""
    return f"{axes_of(priced)}\n{told['schedule']}{loops}{zero}{again}"
