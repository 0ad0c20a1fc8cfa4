"""One device under measurement: when it is done, what a step takes at most, how often it is repeated in a time."""

import gc
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.memory import measured_peak_bytes
from benchmarks.timing import alternate, noise_of, ratio_of

__all__ = ["Device", "compared", "timed"]

_SHORTEST_S = 0.02  # a turn takes at least so long
Step = Callable[[], object]


@dataclass(frozen=True)
class Device:
    """A GPU, or the CPU to try a program on.

    Args:
        kind: "cuda" or "cpu".
    """

    kind: str

    @property
    def is_gpu(self) -> bool:
        """Whether there is a GPU to wait for and to ask."""
        return self.kind == "cuda"

    @property
    def described(self) -> dict[str, Any]:
        """Names and versions that numbers depend on."""
        found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "cpu"}
        if self.is_gpu:
            properties = torch.cuda.get_device_properties(0)
            found |= {"device": properties.name, "device_bytes": properties.total_memory, "cuda": torch.version.cuda}
        else:
            found |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
        return found

    def sync(self) -> None:
        """Waits until everything asked for is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Gives back what nothing holds."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()

    def peak_bytes(self, step: Step) -> int:
        """The most that is in use during a step above what was before; on a CPU the step runs twice."""
        if not self.is_gpu:
            return measured_peak_bytes(nn.Identity(), step)
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before_bytes = torch.cuda.memory_allocated()
        step()
        self.sync()
        return torch.cuda.max_memory_allocated() - before_bytes

    def seconds(self, step: Step) -> float:
        """Of one step, once."""
        self.sync()
        start_s = time.perf_counter()
        step()
        self.sync()
        return time.perf_counter() - start_s


def timed(
    contenders: Mapping[str, Step], device: Device, *, limit_s: float, most: int = 12, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round; as many rounds as fit into `limit_s`, at least one.

    Args:
        contenders: name -> one step.
        device: that is waited for around each turn.
        limit_s: for all rounds together.
        most: rounds.
        warm: run each once before anything is measured.
    """
    if warm:
        for step in contenders.values():
            step()
    once = {name: device.seconds(step) for name, step in contenders.items()}
    steps = max(1, min(20, int(_SHORTEST_S / max(once.values()))))
    rounds = min(most, int(limit_s / (sum(once.values()) * steps)))
    if rounds < 2:
        return {name: [each] for name, each in once.items()}
    return alternate(contenders, rounds=rounds, steps=steps, warmup=0, sync=device.sync)


def compared(times: Mapping[str, list[float]], base: str) -> dict[str, Any]:
    """Medians, ratios to `base`, and the noise: `base` against "`base` again" where that ran too."""
    rounds = len(times[base])
    ratios = {name: ratio_of(each, times[base]) for name, each in times.items() if name != base}
    found: dict[str, Any] = {
        "rounds": rounds,
        "median_s": {name: median(each) for name, each in times.items()},
        "ratio": {name: each.median for name, each in ratios.items()},
    }
    if rounds > 1:
        found["half_width"] = {name: each.half_width for name, each in ratios.items()}
        if f"{base} again" in times:
            found["noise"] = noise_of(times[f"{base} again"], times[base])
    return found
