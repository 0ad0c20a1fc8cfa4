"""Mixtures of experts against DeepSpeed's and transformers' layers, dense networks and flat routing.

  network    a layer on four nodes of two ranks, see `moe_network`; slow links need root and iproute2
  single     a layer on one process, see `moe_single`
  training   the loss of a small model under flat and bi-level routing, see `moe_training`

`python -m benchmarks.moe [--json] [--only PART] [--rounds N] [--rate MBIT_PER_S] [--delay MS] [--picture PATH]`
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import moe_compared, moe_network, moe_single, moe_training

__all__ = ["main"]

_PARTS = ("network", "single", "training")


def main() -> None:
    """Runs the parts and prints what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--only", choices=_PARTS, action="append", help="parts to run; all by default")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rate", type=float, default=50.0, help="of each node's link, in Mbit/s; 0: not slowed down")
    parser.add_argument("--delay", type=float, default=20.0, help="ms of a message between nodes, where it has one")
    parser.add_argument("--picture", type=Path, default=None, help="of the training runs")
    parser.add_argument("--rank", type=int, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        moe_network.serve_rank(given.rank, given.rounds, given.delay / 1e3)
        return
    result: dict[str, Any] = {"rounds": given.rounds}
    for part in given.only or _PARTS:
        found, words = _run(part, given)
        result |= found
        if not given.json:
            sys.stdout.write(words + "\n")
            sys.stdout.flush()
    if given.json:
        sys.stdout.write(json.dumps(result) + "\n")


def _run(part: str, given: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if part == "network":
        found = moe_compared.compare(given.rate, given.rounds, given.delay / 1e3)
        return found, moe_compared.text(found)
    if part == "single":
        found = moe_single.compare(given.rounds)
        return found, moe_single.text(found)
    found = moe_training.compare(given.picture)
    return found, moe_training.text(found)


if __name__ == "__main__":
    main()
