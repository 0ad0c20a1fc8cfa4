"""A forecast as people read it: does it fit, how fast, where does the time go, what needs memory."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshwright.clusters.simulated.forecast import Forecast

__all__ = ["TIMES", "bytes_line", "forecast_lines"]

TIMES: Mapping[str, str] = {
    "compute_s": "forward and backward",
    "recompute_s": "recomputing",
    "head_s": "embedding, head, loss",
    "tp_s": "tp collectives",
    "cp_s": "keys of other ranks (cp)",
    "ep_s": "tokens to experts (ep)",
    "pp_bubble_s": "pipeline bubble",
    "pp_transfer_s": "between stages",
    "dp_s": "gradients and gathers",
    "optimizer_s": "optimizer",
    "straggling_s": "slowest node",
    "offload_s": "to the host and back",
}
"""Causes of `Step`, in words."""

_WIDTH = 28


def bytes_line(kept: Mapping[str, int]) -> str:
    """Exact bytes between steps.

    >>> bytes_line({"parameters": 4})
    '  bytes kept by one rank                    4  (parameters 4)'
    """
    shown = ", ".join(f"{name} {value:,}" for name, value in kept.items())
    return f"  bytes kept by one rank   {sum(kept.values()):>18,}  ({shown})"


def forecast_lines(found: "Forecast") -> Iterator[str]:
    """Lines of a table."""
    from meshwright.clusters.simulated.forecast import FLOPS

    cluster, memory = found.paper.machine.cluster, found.memory
    nodes = f"{cluster.num_gpus:,} x {cluster.gpu.name}, {min(cluster.gpus_per_node, cluster.num_gpus)} a node"
    links = f", {8 * cluster.network / 1e9:g} Gb/s per GPU between nodes" if cluster.nodes > 1 else ""
    yield f"on {nodes}{links}"
    needs = f"{memory.total_bytes / 1e9:.1f} GB of {found.capacity_bytes / 1e9:.0f} GB on the fullest rank"
    yield f"  fits                     {f'yes, {needs}' if found.fits else f'no: {needs}'}"
    if not found.fits:
        yield f"    lacks {found.missing_bytes / 1e9:.1f} GB; {found.advice}"
    yield f"  step                     {_seconds(found.step.total_s)}"
    yield f"  tokens per second        {found.tokens_per_s:,.0f}"
    yield f"  MFU                      {found.mfu:.1%} of the 16-bit peak ({FLOPS})"
    yield "  where the time goes"
    yield from _bars({TIMES[name]: value for name, value in vars(found.step).items()}, _seconds)
    yield "  what needs memory"
    yield from _bars(memory.causes, _gigabytes)
    if memory.host:
        yield f"  in the host's memory     {_gigabytes(memory.host)} of each rank"


def _bars(parts: Mapping[str, float], shown: Callable[[float], str]) -> Iterator[str]:
    whole = sum(parts.values())
    for name, value in sorted(parts.items(), key=lambda each: -each[1]):
        if value > 0:
            bar = "█" * round(_WIDTH * value / whole)
            yield f"    {name:<24} {shown(value):>10} {value / whole:>5.0%} {bar}".rstrip()


def _seconds(value: float) -> str:
    """Three digits or so.

    >>> _seconds(12.345), _seconds(0.0123)
    ('12.3 s', '12.3 ms')
    """
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e7 else f"{value / 1e6:.2f} MB"
