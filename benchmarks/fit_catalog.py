"""Fits `clusters/catalog/efficiency.yaml` to published curves and runs, and says how well it does on sources left out.

`python -m benchmarks.fit_catalog --write`. Three fits, each of few numbers that hold for all rows:

1. links within a node, from all-reduces of NCCL (`benchmarks/data/collective_curves.csv`), and kept from there on;
2. everything else about time, from dense runs on Ampere and Hopper, every eighth of vTrain's on one node among them:
   least absolute log errors by reweighted Gauss-Newton steps, drawn a little towards the start, each source weighted by
   its rows to the power 0.8;
3. memory held in reserve, from runs with measured memory, on a grid.

Cross-validation leaves out one source at a time, fits the others and predicts it.
"""

import argparse
import csv
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from itertools import product
from math import log, log2
from typing import Any

import numpy as np
import yaml

from benchmarks.published import Run
from benchmarks.simulate import DATA, GENERATIONS, RUNS, loaded, memory_error, step_error
from meshwright.clusters import simulated
from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated.efficiency import FILE, Compute, Efficiency, Links, Reserves

__all__ = ["BOUNDS", "cross_validated", "fit_links", "fit_reserves", "fit_runs"]

# name -> least, start, most
BOUNDS: Mapping[str, tuple[float, float, float]] = {
    "matmul": (0.5, 0.85, 1.1),
    "hopper": (0.5, 0.9, 1.1),
    "narrow": (0.5, 1.1, 1.6),
    "attention": (0.2, 0.6, 1.5),
    "softmax": (0.2, 2.0, 10.0),
    "memory": (0.3, 0.8, 1.0),
    "kernel_s": (1e-6, 8e-6, 5e-5),
    "host_s": (5e-5, 1e-3, 5e-3),
    "waiting_s": (5e-5, 1e-3, 5e-3),
    "unaligned": (1.0, 5.0, 30.0),
    "network": (0.3, 0.8, 0.95),
    "network_s": (1e-6, 1e-5, 1e-4),
    "exposed": (0.02, 0.3, 1.0),
    "tp_exposed": (0.02, 0.4, 1.0),
    "transfer": (0.1, 0.8, 2.0),
    "stage_s": (1e-6, 5e-4, 1e-2),
    "straggling": (1e-4, 5e-3, 5e-2),
}
_NAMES = tuple(BOUNDS)
_STEP = 0.02  # of a logarithm, for differences
_SMALL = 0.02  # errors below this weigh alike
_PRIOR = 0.01  # of a squared logarithm from the start, averaged over the numbers
_ITERATIONS = 10
_ONE_NODE = ", one node"

Array = np.ndarray[Any, np.dtype[np.float64]]


def fit_links() -> tuple[float, float, float]:
    """Share of NVLink's rate, latency for a doubling of ranks, mean error, from all-reduces of 1 MiB and more."""
    with (DATA / "collective_curves.csv").open(encoding="utf-8", newline="") as file:
        curves = [row for row in csv.DictReader(file) if float(row["size_bytes"]) >= 2**20]
    points = [(int(row["n_ranks"]), float(row["size_bytes"]), float(row["time_us"]) * 1e-6) for row in curves]
    link = gpu("A100").nvlink_bytes_per_s

    def error(share: float, latency_s: float) -> float:
        def took_s(ranks: int, size: float) -> float:
            return 2 * (latency_s * log2(2 * ranks) + (ranks - 1) / ranks * size / (link * share))

        return statistics.fmean(abs(log(took_s(ranks, size) / measured_s)) for ranks, size, measured_s in points)

    tried = product(np.linspace(0.6, 1.0, 81), np.geomspace(3e-6, 3e-5, 61))
    share, latency_s = min(tried, key=lambda each: error(*map(float, each)))
    return float(share), float(latency_s), error(float(share), float(latency_s))


def _efficiency(logs: Array, links: Mapping[str, float], reserves: Reserves) -> Efficiency:
    told = dict(links) | {name: float(np.exp(value)) for name, value in zip(_NAMES, logs, strict=True)}
    parts = [{each.name: told[each.name] for each in fields(kind) if each.name in told} for kind in (Compute, Links)]
    return Efficiency(Compute(**parts[0]), Links(**parts[1]), reserves)


def fit_runs(runs: Sequence[Run], links: Mapping[str, float], reserves: Reserves) -> Efficiency:
    """The efficiency that predicts step times of runs best."""
    low, start, high = (np.log([BOUNDS[name][each] for name in _NAMES]) for each in range(3))
    counts = Counter(run.source for run in runs)
    weights = np.array([counts[run.source] ** -0.2 for run in runs])
    weights /= weights.sum()

    def errors(logs: Array) -> Array:
        reached = _efficiency(logs, links, reserves)
        return np.array([log(1 + step_error(run, reached)) for run in runs])

    def loss(found: Array, logs: Array) -> float:
        return float((weights * np.abs(found)).sum() + _PRIOR * ((logs - start) ** 2).mean())

    logs, found, damping = start, errors(start), 1e-2
    for _ in range(_ITERATIONS):
        slopes = np.stack([(errors(logs + _STEP * one) - found) / _STEP for one in np.eye(len(logs))], axis=1)
        pulls = weights / np.maximum(np.abs(found), _SMALL)
        prior = 2 * _PRIOR / len(logs)
        normal = slopes.T @ (pulls[:, None] * slopes) + prior * np.eye(len(logs))
        gradient = slopes.T @ (pulls * found) + prior * (logs - start)
        for _ in range(6):
            move = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
            there = np.clip(logs + np.clip(move, -0.5, 0.5), low, high)
            then = errors(there)
            if loss(then, there) < loss(found, logs):
                logs, found, damping = there, then, damping / 4
                break
            damping *= 4
        else:
            break
    return _efficiency(logs, links, reserves)


def fit_reserves(runs: Sequence[Run], efficiency: Efficiency) -> Reserves:
    """Memory beyond tensors that leaves the least mean absolute error over measured runs."""
    measured = [run for run in runs if not run.only_tensors]
    tried = [Reserves(fragmentation=f / 20, overhead_bytes=o * 0.5e9) for f in range(13) for o in range(2, 17)]

    def error(reserves: Reserves) -> float:
        reached = replace(efficiency, reserves=reserves)
        return statistics.fmean(abs(memory_error(run, reached)) for run in measured)

    return min(tried, key=error)


def cross_validated(runs: Sequence[Run], links: Mapping[str, float], reserves: Reserves) -> dict[str, list[float]]:
    """Source -> errors of its rows, predicted by a fit to all other sources."""
    found = {}
    for source in sorted({run.source for run in runs}):
        others = fit_runs([run for run in runs if run.source != source], links, reserves)
        found[source] = [step_error(run, others) for run in runs if run.source == source]
        sys.stdout.write(f"  {source[:60]:<62}{len(found[source]):4d}{_mape(found[source]):8.1f} %\n")
        sys.stdout.flush()
    return found


def _left_out(found: Mapping[str, Sequence[float]], *, one_node: bool) -> float:
    """Mean error over rows of sources when they were left out: those on one node, or the others."""
    return round(_mape([each for name in found if name.endswith(_ONE_NODE) == one_node for each in found[name]]), 2)


def _mape(errors: Sequence[float]) -> float:
    return 100 * statistics.fmean(map(abs, errors))


def _fitted(part: Compute | Links | Reserves) -> dict[str, float]:
    """Without what is measured on machines alone, which has a default."""
    names = [each.name for each in fields(part) if each.default is MISSING and each.default_factory is MISSING]
    return {name: getattr(part, name) for name in names}


def _written(efficiency: Efficiency, said: Mapping[str, Any]) -> str:
    head = "# Written by `python -m benchmarks.fit_catalog --write`; explained in clusters/simulated/efficiency.py.\n"
    parts = {name: _fitted(getattr(efficiency, name)) for name in ("compute", "links", "reserves")}
    rounded = {name: {key: float(f"{value:.4g}") for key, value in part.items()} for name, part in parts.items()}
    return head + yaml.safe_dump({"fit": dict(said)} | rounded, sort_keys=False, width=120)


def main() -> None:
    """Fits, cross-validates, and writes the catalog if told so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the catalog")
    arguments = parser.parse_args()
    small = [replace(run, source=f"{run.source}{_ONE_NODE}") for run in loaded(DATA / "single_node_runs.csv")[0]]
    runs = [run for run in (*loaded(RUNS)[0], *small) if run.training.cluster.gpu.generation in GENERATIONS]
    timed = [run for run in runs if run.measured_s is not None and not run.training.model.experts]
    share, latency_s, curve_error = fit_links()
    links = {"nvlink": share, "nvlink_s": latency_s}
    reserves = simulated.fitted().reserves
    best = fit_runs(timed, links, reserves)
    kept = [run for run in runs if run.memory_bytes is not None]
    best = replace(best, reserves=fit_reserves(kept, best))
    sys.stdout.write("each source predicted by a fit to the others\n")
    left = cross_validated(timed, links, reserves)
    amounts = [abs(memory_error(run, best)) for run in kept]
    said = {
        "rows": f"{len(timed)} dense runs on Ampere and Hopper, {len(small)} on one node; {len(kept)} with memory",
        "step_time_mape_percent": round(_mape([step_error(run, best) for run in timed]), 2),
        "cross_validated_by_source_mape_percent": _left_out(left, one_node=False),
        "cross_validated_one_node_mape_percent": _left_out(left, one_node=True),
        "memory_median_error_percent": round(100 * statistics.median(amounts), 2),
        "nvlink_curves_mean_error_percent": round(100 * curve_error, 2),
    }
    text = _written(best, said)
    sys.stdout.write(text)
    if arguments.write:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
