"""Attention on one GPU: which kernels are trusted, how exact blocks are, and time and peak memory against torch's.

torch computes what is whole or causal by its flash kernel, and what needs a mask by its memory-efficient one with a
mask in memory. Where its flash kernel itself takes the pattern (a window, packed documents as a batch without padding),
that is timed too, as the fastest there is. bfloat16; forward, and forward with backward.
`python -m benchmarks.gpu_attention [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_peers import Pattern, Peer, patterns, peers
from benchmarks.device import Device, compared, timed
from benchmarks.gpu_exact import costs, errors, text, trusted
from benchmarks.sections import Sections, aligned, asked
from meshwright.parallel.blockwise.attention import attend

__all__ = ["main", "measure", "table"]

_SHAPES = {"d=64": (16, 16, 64), "d=128, 4 kv heads": (16, 4, 128)}  # heads, key heads, width
_WAYS = ("forward", "forward and backward")
_BY_PATTERN = "flash by pattern"


def measure(sections: Sections) -> None:
    """All sections."""
    device = sections.device
    sections.run("kernels", lambda: trusted(device))
    sections.run("exactness", lambda: errors(device, length=96 if sections.tiny else 1000))
    sections.run("costs", lambda: costs(device, length=256 if sections.tiny else 8192))
    lengths = (256,) if sections.tiny else (4096, 16384, 65536)
    names = list(patterns(8))
    cells = [(length, *each) for length in lengths for each in product(_SHAPES, names, _WAYS)]
    for number, (length, shape, name, way) in enumerate(cells):
        limit_s = min(3.0, max(0.2, sections.left_s / (len(cells) - number)))
        cell = partial(_cell, device, patterns(length)[name], _SHAPES[shape], way=way, limit_s=limit_s)
        sections.run(f"{length} {shape} {name} {way}", cell, needs_s=0.0 if sections.tiny else 2.0)


def _cell(device: Device, pattern: Pattern, shape: tuple[int, int, int], *, way: str, limit_s: float) -> dict[str, Any]:
    """Ours and torch's ways on the same tensors."""
    heads, kv_heads, width = shape
    generator = torch.Generator(device=device.kind).manual_seed(0)
    given = [
        torch.randn(
            1, each, pattern.length, width, generator=generator, device=device.kind, dtype=torch.bfloat16
        ).requires_grad_()
        for each in (heads, kv_heads, kv_heads)
    ]
    calls: dict[str, Callable[..., Tensor]] = {"ours": partial(attend, mask=pattern.mask)}
    found: dict[str, Any] = {"missing": {}}
    for name, make in peers(device, pattern).items():
        _try(name, make, given, calls=calls, found=found)
    base = [*calls, "ours"][1]  # the first peer that runs
    steps = {name: _step(call, given, backward=way != "forward") for name, call in calls.items()}
    peaks = {name: device.peak_bytes(step) for name, step in steps.items()}
    times = timed(steps | {f"{base} again": steps[base]}, device, limit_s=limit_s)
    with torch.no_grad():
        found["largest_difference"] = float((calls["ours"](*given) - calls[base](*given)).abs().max())
    peaks["torch"] = peaks.get("torch", 0) + pattern.mask_bytes
    return found | compared(times, base) | {"base": base, "peak_bytes": peaks}


def _try(
    name: str, make: Peer, given: list[Tensor], *, calls: dict[str, Callable[..., Tensor]], found: dict[str, Any]
) -> None:
    """Takes a peer that runs, and notes why another does not."""
    try:
        call = make()
        with torch.no_grad():
            call(*given)
    except Exception as error:  # a kernel that this torch or GPU lacks
        found["missing"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        calls[name] = call


def _step(call: Callable[..., Tensor], given: list[Tensor], *, backward: bool) -> Callable[[], object]:
    if backward:
        ones = torch.ones_like(given[0])
        return lambda: torch.autograd.grad(call(*given), given, ones)

    def forward() -> None:
        with torch.no_grad():
            call(*given)

    return forward


def table(found: dict[str, Any]) -> str:
    """What was measured, as text."""
    sections = found["sections"]
    lines, skipped = [text(sections)], 0
    rows = [["", "ours ms", "torch", "flash", "to torch", "to flash", "+-", "noise", "MB", "torch", "flash", "differs"]]
    for name, each in sections.items():
        if name in ("kernels", "exactness", "costs"):
            continue
        if "median_s" not in each:
            lines += [f"{name}: {each}\n"] if "skipped" not in each else []
            skipped += "skipped" in each
            continue
        rows.append([name, *_numbers(each)])
        lines += [f"{name}, {peer}: {why}\n" for peer, why in each["missing"].items()]
    return aligned(rows) + "".join(lines) + (f"{skipped} left out for want of time\n" if skipped else "")


def _numbers(each: dict[str, Any]) -> list[str]:
    seconds, peaks, base = each["median_s"], each["peak_bytes"], each["base"]
    ours_s = seconds["ours"]
    found = [f"{seconds[name] * 1e3:.2f}" if name in seconds else "" for name in ("ours", "torch", _BY_PATTERN)]
    found += [f"{ours_s / seconds[name]:.3f}" if name in seconds else "" for name in ("torch", _BY_PATTERN)]
    found += [f"{each.get('half_width', {}).get('ours', 0):.3f}" if each["rounds"] > 1 else ""]
    found += [f"{each['noise']:.3f}" if "noise" in each else ""]
    found += [f"{peaks[name] / 1e6:.0f}" if name in peaks else "" for name in ("ours", "torch", _BY_PATTERN)]
    return [*found, f"{each['largest_difference']:.0e}" if base != "ours" else ""]


def main() -> None:
    """Measures and prints."""
    sections = asked(__doc__, seconds=90.0)
    measure(sections)
    sys.stdout.write(table(sections.found))


if __name__ == "__main__":
    main()
