"""How fast this machine is at the moment: a fixed piece of training, on every processor at once.

Machines that are shared change: others of the same host take memory bandwidth and clock for minutes. What was measured
at one time is compared with what was measured at another only where the machine was the same in between.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Generic, TypeVar

import torch
from torch import nn

from meshwright.parallel.ranks import RankPool

__all__ = ["Pace", "Paced", "nearest"]

T = TypeVar("T")
_SPAN_S, _WARM = 2.0, 2


@dataclass(frozen=True)
class Paced(Generic[T]):
    """Something that was measured, and the seconds of the fixed piece around it."""

    found: T
    pace_s: float


def _piece_s() -> float:
    """Median seconds of one forward and backward of two layers, for some seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = nn.Sequential(
        *(nn.TransformerEncoderLayer(256, 8, 768, 0.0, batch_first=True, norm_first=True) for _ in range(2))
    )
    values, taken = torch.randn(2, 256, 256), list[float]()
    end_s = time.monotonic() + _SPAN_S
    while time.monotonic() < end_s or len(taken) <= _WARM:
        start_s = time.perf_counter()
        layers(values).square().mean().backward()
        taken.append(time.perf_counter() - start_s)
    return median(taken[_WARM:])


class Pace:
    """Asks for it, now and again; the processes for that are kept, idle."""

    def __init__(self) -> None:
        self._pool, self._processors = RankPool(), len(os.sched_getaffinity(0))

    def now_s(self) -> float:
        """Seconds of the fixed piece now, the mean of all processors."""
        return fmean(self._pool.run(_piece_s, self._processors, (), timeout_s=60.0))

    def around(self, work: Callable[[], T]) -> Paced[T]:
        """Does something; the pace is that of before and after."""
        before_s = self.now_s()
        found = work()
        return Paced(found, (before_s + self.now_s()) / 2)


def nearest(several: Sequence[Paced[T]], pace_s: float, *, within: float) -> list[Paced[T]]:
    """Those measured at about a pace; the nearest one where none was.

    >>> [each.found for each in nearest([Paced("a", 1.0), Paced("b", 1.2), Paced("c", 1.03)], 1.01, within=0.05)]
    ['a', 'c']
    >>> [each.found for each in nearest([Paced("a", 1.0), Paced("b", 1.2)], 2.0, within=0.05)]
    ['b']
    """
    found = [each for each in several if abs(each.pace_s / pace_s - 1) <= within]
    return found or [min(several, key=lambda each: abs(each.pace_s / pace_s - 1))]
