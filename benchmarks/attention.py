"""Blockwise attention against torch's own, which has a mask of all pairs where it is not causal.

(1, 8, 4096, 64) in float32: whole, causal, a window of 512 keys, 8 packed documents of equal and of unequal lengths, a
mask as a function; forward, and forward with backward, in turn in one process. `pairs` is what could be reached:
the share of pairs that attend. `python -m benchmarks.attention [--json] [--rounds N] [--length N]`
"""

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.masks import Mask, Uniform, causal, documents, function, window

__all__ = ["main", "measure"]

_HEADS, _WIDTH = 8, 64


def _masks(length: int) -> dict[str, Mask | None]:
    tokens = torch.arange(length)
    borders = torch.tensor([300, 900, 1000, 1900, 2500, 3333, 3900]) * length // 4096
    return {
        "whole": None,
        "causal": causal(),
        "window": causal() & window(511),
        "packed": causal() & documents(tokens * 8 // length),
        "packed unequal": causal() & documents(torch.bucketize(tokens, borders, right=True)),
        "function": function(lambda sample, head, query, key: (query >= key) & (query - key < 512)),
    }


def _torch_call(mask: Mask | None, length: int) -> tuple[Callable[..., Tensor], float]:
    """torch's fastest way to the same numbers, and the share of pairs that attend."""
    if mask is None:
        return functional.scaled_dot_product_attention, 1.0
    pairs = mask.block(range(length), range(length))
    assert not isinstance(pairs, Uniform), pairs
    share = float(pairs.double().mean())
    if mask == causal():
        return lambda *qkv: functional.scaled_dot_product_attention(*qkv, is_causal=True), share
    return lambda *qkv: functional.scaled_dot_product_attention(*qkv, attn_mask=pairs), share


def _steps(call: Callable[..., Tensor], given: list[Tensor], *, backward: bool) -> Callable[[], object]:
    if backward:
        ones = torch.ones_like(given[0])
        return lambda: torch.autograd.grad(call(*given), given, ones)

    def forward() -> None:
        with torch.no_grad():
            call(*given)

    return forward


def measure(mask: Mask | None, *, length: int, rounds: int, backward: bool) -> dict[str, Any]:
    """One comparison: medians in seconds, ours over theirs, theirs over theirs, the largest difference of outputs."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, length, _HEADS, _WIDTH)
    given = [torch.randn(*sizes, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]
    theirs, share = _torch_call(mask, length)

    def ours(*qkv: Tensor) -> Tensor:
        return attend(*qkv, mask=mask)

    with torch.no_grad():
        difference = float((ours(*given) - theirs(*given)).abs().max())
    calls = {"ours": ours, "torch": theirs, "torch again": theirs}
    contenders = {name: _steps(call, given, backward=backward) for name, call in calls.items()}
    times = alternate(contenders, rounds=rounds, steps=1, warmup=1)
    ratio = ratio_of(times["ours"], times["torch"])
    return {
        "median_s": {name: median(each) for name, each in times.items()},
        "ratio": ratio.median,
        "half_width": ratio.half_width,
        "noise": noise_of(times["torch again"], times["torch"]),
        "pairs": share,
        "largest_difference": difference,
    }


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--length", type=int, default=4096)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "rounds": arguments.rounds,
        "length": arguments.length,
        "threads": torch.get_num_threads(),
    }
    for way in ("forward", "forward and backward"):
        result[way] = {
            name: measure(mask, length=arguments.length, rounds=arguments.rounds, backward=way != "forward")
            for name, mask in _masks(arguments.length).items()
        }
    if arguments.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for way in ("forward", "forward and backward"):
        for name, found in result[way].items():
            ours, theirs = (found["median_s"][who] * 1e3 for who in ("ours", "torch"))
            sys.stdout.write(f"{way:<21} {name:<15} ours {ours:7.1f} ms   torch {theirs:7.1f} ms   ratio ")
            sys.stdout.write(f"{found['ratio']:.3f} +- {found['half_width']:.3f} (noise {found['noise']:.3f}, ")
            sys.stdout.write(f"pairs {found['pairs']:.3f}, differs by {found['largest_difference']:.0e})\n")


if __name__ == "__main__":
    main()
