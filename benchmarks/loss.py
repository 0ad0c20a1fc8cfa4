"""A head and its loss: whole scores, blocks of rows, and torch's own `F.linear_cross_entropy`; seconds and peak bytes.

Every contender has the same rows and weight; a quarter of the targets is ignored. Peaks are without rows and weights,
with their gradients.
`python -m benchmarks.loss [--json] [--rounds N] [--rows N] [--hidden N] [--vocabulary N] [--block N]`
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.memory import measured_peak_bytes
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.blockwise.loss import tile_loss

__all__ = ["main", "measure"]

Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def measure(sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of forward and backward of each contender."""
    steps, peaks = {}, {}
    for name, (loss, settings) in _contenders(sizes["block"]).items():
        torch.manual_seed(0)
        head = nn.Linear(sizes["hidden"], sizes["vocabulary"], bias=False)
        if settings is not None:
            tile_loss(head, sizes["block"], heads=[""], **settings)
        rows = torch.randn(sizes["rows"], sizes["hidden"]).requires_grad_()
        target = torch.randint(0, sizes["vocabulary"], (sizes["rows"],))
        target[::4] = -100
        steps[name] = _step(head, rows, target, loss=loss)
        peaks[name] = measured_peak_bytes(head, steps[name])  # with the weight, without the gradient of rows
        peaks[name] += 4 * (rows.numel() - head.weight.numel())
    times = alternate(steps, rounds=rounds, steps=1, warmup=1)
    return {"times": times, "peak_bytes": peaks}


def _contenders(block: int) -> dict[str, tuple[Loss, dict[str, Any] | None]]:
    """Name -> how the loss is had, and settings of a tiled head."""

    def whole(head: nn.Linear, rows: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(head(rows).float(), target)

    def torchs(head: nn.Linear, rows: Tensor, target: Tensor) -> Tensor:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=block)
        loss: Tensor = functional.linear_cross_entropy(rows, head.weight, target, options=options)
        return loss

    found: dict[str, tuple[Loss, dict[str, Any] | None]] = {
        "whole scores": (whole, None),
        "blocks": (whole, {}),
        "blocks, in advance": (whole, {"in_advance": True}),
        "blocks, in advance, again": (whole, {"in_advance": True}),
    }
    if hasattr(functional, "linear_cross_entropy"):
        found["torch, in advance"] = (torchs, None)
    return found


def _step(head: nn.Linear, rows: Tensor, target: Tensor, *, loss: Loss) -> Callable[[], None]:
    def step() -> None:
        head.weight.grad = rows.grad = None
        loss(head, rows, target).backward()

    return step


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    for name, default in (("rows", 2048), ("hidden", 256), ("vocabulary", 32000), ("block", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) for name in ("rows", "hidden", "vocabulary", "block")}
    found = measure(sizes, arguments.rounds)
    times, peaks = found["times"], found["peak_bytes"]
    ours = times["blocks, in advance"]
    result = {
        **sizes,
        "median_s": {name: median(each) for name, each in times.items()},
        "ratio_to": {name: ratio_of(ours, each).median for name, each in times.items() if "advance, again" not in name},
        "noise": noise_of(ours, times["blocks, in advance, again"]),
        "peak_bytes": peaks,
        "peak_of_whole": peaks["whole scores"] / peaks["blocks, in advance"],
    }
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _text(result))


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{name:<26} {seconds * 1e3:8.1f} ms  {result['peak_bytes'][name] / 1e6:8.1f} MB at most"
        for name, seconds in result["median_s"].items()
    ]
    lines += [f"blocks, in advance / {name:<20} {ratio:.3f}" for name, ratio in result["ratio_to"].items()]
    return "\n".join([*lines, f"noise {result['noise']:.3f}"]) + "\n"


if __name__ == "__main__":
    main()
