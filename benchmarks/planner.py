"""How well layouts are chosen, how fast, and what the 2021 paper's analysis comes to in the whole simulator.

`python -m benchmarks.planner [--json] [--quick]`:

- groups of alternative layouts of one job in `benchmarks/data/published_runs.csv`: share of pairs in the right order,
  and by how much the chosen layout is slower than the best one that was measured
- searches for 1,024 GPUs: legal layouts, how many were priced, seconds
- X_160 of Lamy-Poirier (arXiv 2106.02679) on at most 40,000 A100 in steps of at most the critical batch: the best
  modular layout with layered accumulation against the best contiguous one and against schedules of later years, over
  InfiniBand and Ethernet, at peak and with the catalog's efficiencies. `--quick` leaves it out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.simulate import RUNS, report
from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Transformer
from meshwright.clusters.simulated.candidates import RUNNABLE, Question, Space
from meshwright.clusters.simulated.family import CONTIGUOUS, MODULAR, Family, fastest
from meshwright.clusters.simulated.search import search

__all__ = ["MODELS", "report_of"]

LLAMA_70B = Transformer(
    layers=80, hidden=8192, heads=64, kv_heads=8, ffn=28672, vocab=128256, sequence=8192, gated=True
)
MODELS = {
    "llama 8B": replace(LLAMA_70B, layers=32, hidden=4096, heads=32, ffn=14336),
    "llama 70B": LLAMA_70B,
    "llama 405B": replace(LLAMA_70B, layers=126, hidden=16384, heads=128, ffn=53248),
    "gpt 175B": Transformer(
        layers=96, hidden=12288, heads=96, kv_heads=96, ffn=49152, vocab=51200, sequence=2048, tied=True
    ),
    "mixtral 8x7B": Transformer(
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        ffn=14336,
        vocab=32000,
        sequence=4096,
        gated=True,
        experts=8,
        top_k=2,
    ),
}
_NETWORKS = {"InfiniBand 200 Gb/s": 25e9, "Ethernet 25 Gb/s": 25e9 / 8}
_SPACES = {
    "modular": MODULAR,
    "contiguous": CONTIGUOUS,
    "interleaved": replace(MODULAR, schedules=("1f1b",)),
    "zero-bubble": replace(MODULAR, schedules=("zero-bubble",)),
}
_GPUS, _BATCH = 1024, 1024
_STEPS, _DAY_S = 1e5, 86400.0


def _searches() -> Iterator[dict[str, Any]]:
    for name, model in MODELS.items():
        for space, words in ((Space(), "all"), (RUNNABLE, "runnable")):
            cluster = Cluster(gpu=gpu("H100"), num_gpus=_GPUS)
            start_s = time.perf_counter()
            found = search(Question(model=model, cluster=cluster, global_batch=_BATCH, space=space))
            yield {
                "model": name,
                "space": words,
                "layouts": found.seen,
                "pruned": found.pruned,
                "too_large": found.too_large,
                "priced": found.priced,
                "search_s": round(time.perf_counter() - start_s, 2),
                "step_s": round(found.best[0].step.total_s, 3),
                "mfu_percent": round(100 * found.best[0].mfu, 1),
                "layout": str(found.best[0].layout),
            }


def _x_160() -> Iterator[dict[str, Any]]:
    family = Family(160)
    for peak in (True, False):
        for network, rate in _NETWORKS.items():
            for name, space in _SPACES.items():
                best = fastest(family, gpu("A100"), space, network_bytes_per_s=rate, peak=peak)
                yield {
                    "hardware": "peak" if peak else "catalog",
                    "network": network,
                    "schedule": name,
                    "days": round(best.sequence_s * family.critical_sequences * _STEPS / _DAY_S, 2),
                    "gpus": best.layout.num_ranks,
                    "memory_gb": round(best.memory_bytes / 1e9, 1),
                    "layout": str(best.layout),
                }


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    days = {(row["hardware"], row["network"], row["schedule"]): row["days"] for row in rows}
    fast, slow = _NETWORKS
    found = {}
    for hardware in ("peak", "catalog"):
        modular, contiguous = days[hardware, fast, "modular"], days[hardware, fast, "contiguous"]
        found[f"x_160_ratio_{hardware}"] = round(modular / contiguous, 3)
        found[f"x_160_ratio_to_interleaved_{hardware}"] = round(modular / days[hardware, fast, "interleaved"], 3)
        found[f"x_160_ethernet_over_infiniband_{hardware}"] = round(days[hardware, slow, "modular"] / modular, 3)
        found[f"x_160_ethernet_over_contiguous_on_infiniband_{hardware}"] = round(
            days[hardware, slow, "modular"] / contiguous, 3
        )
    return found


def report_of(*, quick: bool = False) -> dict[str, Any]:
    """All numbers.

    Args:
        quick: without X_160.
    """
    choices = report(RUNS)
    found: dict[str, Any] = {name: choices[name] for name in ("pairwise_order", "mean_regret_percent", "groups")}
    found["searches"] = [*_searches()]
    found["slowest_search_s"] = max(row["search_s"] for row in found["searches"])
    if not quick:
        found["x_160"] = [*_x_160()]
        found |= _ratios(found["x_160"])
    return found


def _text(found: dict[str, Any]) -> str:
    lines = []
    for name, value in found.items():
        if isinstance(value, list):
            columns = [each for each in value[0] if each != "layout"]
            lines += ["", name, "  ".join(f"{each:>14}" for each in columns)]
            lines += ["  ".join(f"{row[each]!s:>14}" for each in columns) + f"  {row['layout']}" for row in value]
        else:
            lines.append(f"{name} {value}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="leave X_160 out, which takes minutes")
    arguments = parser.parse_args()
    found = report_of(quick=arguments.quick)
    sys.stdout.write(json.dumps(found) + "\n" if arguments.json else _text(found))


if __name__ == "__main__":
    main()
