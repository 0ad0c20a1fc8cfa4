"""Fits `clusters/catalog/exchanges.yaml` to published all-to-alls: `python -m benchmarks.fit_exchanges --write`.

For each fabric three numbers, not negative: seconds until anything moves, seconds of a message, share of the rate (see
`clusters/simulated/congestion.py`), by reweighted least squares of relative errors, which approximates least absolute
ones. Only messages to other nodes count where there are several nodes. A message's cost is that of one NIC: where a
GPU has several, each takes a part of the messages.
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from benchmarks.simulate import DATA
from meshwright.clusters.simulated.congestion import FILE

__all__ = ["FABRICS", "fit", "points"]

FABRICS: Mapping[str, str] = {
    "efa": "chang-ning aws-gpu-communication-benchmark (CC BY 4.0)",
    "rdma": "SimAI ata_ratio",
    "nvlink": "Galvatron profile",
}
_SMALL = 0.02  # relative errors below this weigh alike
_ROUNDS = 60


def points(source: str) -> list[tuple[float, float, float, float]]:
    """(messages of a rank, seconds of its bytes at the promised rate, seconds measured, NICs of a rank) of a source."""
    found = []
    with (DATA / "exchange_curves.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] != source:
                continue
            ranks, per_node = int(row["n_ranks"]), int(row["gpus_per_node"])
            messages = ranks - per_node if ranks > per_node else ranks - 1
            wire_s = float(row["size_bytes"]) * messages / ranks / (float(row["link_GBps"]) * 1e9)
            took_s = float(row["time_us"]) * 1e-6 if row["time_us"] else wire_s / float(row["efficiency"])
            found.append((float(messages), wire_s, took_s, float(row["nics_per_gpu"])))
    return found


def fit(source: str) -> dict[str, Any]:
    """The numbers of a fabric from one source's curves."""
    messages, wire_s, took_s, nics = (np.array(each) for each in zip(*points(source), strict=True))
    columns = np.stack([np.ones_like(wire_s), messages / nics, wire_s], axis=1)
    weights = 1 / took_s
    for _ in range(_ROUNDS):
        found, *_ = np.linalg.lstsq(columns * weights[:, None], took_s * weights, rcond=None)
        found = np.maximum(found, 0.0)
        errors = columns @ found / took_s - 1
        weights = 1 / took_s / np.sqrt(np.maximum(np.abs(errors), _SMALL))
    latency_s, message_s, slower = map(float, found)
    return {
        "share": float(f"{1 / slower:.4g}"),
        "latency_s": float(f"{latency_s:.4g}"),
        "message_s": float(f"{message_s:.4g}"),
        "source": f"{len(took_s)} all-to-alls of {source}, benchmarks/data/exchange_curves.csv",
        "mean_error_percent": round(100 * statistics.fmean(np.abs(errors).tolist()), 2),
    }


def main() -> None:
    """Fits, and writes the catalog if told so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the catalog")
    arguments = parser.parse_args()
    head = (
        "# Written by `python -m benchmarks.fit_exchanges --write`; explained in clusters/simulated/congestion.py.\n"
        "# efa: AWS p5.48xlarge, four NICs of 100 Gb/s a GPU, 2 to 32 nodes, 32 MiB to 2 GiB. rdma: lossless,\n"
        "# a cluster that its source does not describe, one NIC a GPU assumed, 16 to 128 ranks.\n"
        "# nvlink: one node of A100s.\n"
    )
    text = head + yaml.safe_dump({name: fit(source) for name, source in FABRICS.items()}, sort_keys=False, width=120)
    sys.stdout.write(text)
    if arguments.write:
        FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
