"""loss.png: training and validation loss over steps, with tokens on a second axis."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["plot_losses", "smooth"]

_INK, _QUIET, _TRAIN, _HELD_OUT = "#22262b", "#8a9099", "#3b6fb6", "#d1603d"


def plot_losses(records: Iterable[Mapping[str, Any]], path: Path, *, title: str) -> str | None:
    """Draws the loss curve of metrics records.

    Returns:
        Why nothing was drawn, or None.
    """
    training = [each for each in records if "loss" in each]
    held_out = [each for each in records if "validation_loss" in each]
    if not training:
        return "no step was logged"
    try:
        import matplotlib as mpl
    except ImportError:
        return "matplotlib is not installed; `pip install 'meshwright[plots]'` draws the next one"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    _draw_training(axes, training)
    if held_out:
        _draw_validation(axes, held_out)
    _dress(axes, title)
    _add_token_axis(axes, training)
    figure.savefig(path)
    plt.close(figure)
    return None


def smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential mean without the bias of its start.

    >>> smooth([4.0, 4.0, 4.0])
    [4.0, 4.0, 4.0]
    """
    found: list[float] = []
    total, norm = 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        found.append(round(total / norm, 9))
    return found


def _draw_training(axes: Any, records: list[Mapping[str, Any]]) -> None:
    steps = [each["step"] for each in records]
    losses = [each["loss"] for each in records]
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=1.0)
    axes.plot(steps, smooth(losses, 0.8), color=_TRAIN, linewidth=1.8, label="training (smoothed)")


def _draw_validation(axes: Any, records: list[Mapping[str, Any]]) -> None:
    steps = [each["step"] for each in records]
    losses = [each["validation_loss"] for each in records]
    axes.plot(steps, losses, color=_HELD_OUT, linewidth=1.4, marker="o", markersize=4, label="validation (held-out)")
    axes.annotate(
        f"{losses[-1]:.3f}",
        (steps[-1], losses[-1]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right",
        color=_HELD_OUT,
        fontsize=9,
    )


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=10)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss (nats per token)", color=_INK)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)
    axes.tick_params(colors=_QUIET, labelcolor=_INK)
    axes.legend(frameon=False, loc="upper right")


def _add_token_axis(axes: Any, records: list[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import EngFormatter

    last = records[-1]
    per_step = last["tokens"] / last["step"] if last.get("tokens") and last["step"] else 1.0
    upper = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda tokens: tokens / per_step))
    upper.set_xlabel("tokens read", color=_INK)
    upper.xaxis.set_major_formatter(EngFormatter(sep=""))
    upper.spines["top"].set_color(_QUIET)
    upper.tick_params(colors=_QUIET, labelcolor=_INK)
