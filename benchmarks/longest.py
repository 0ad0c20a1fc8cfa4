"""The longest sequence whose training step fits into a memory: predicted from two short ones, then tried.

Lengths tried are 1, 1.25, 1.5 and 1.75 times powers of two, so what is found is within a quarter of what fits.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["Longest", "Peak", "longest", "place_of", "size_at"]

Peak: TypeAlias = Callable[[int], int | None]
"""Length to the most bytes in use in a step; None where they do not fit."""


def size_at(place: int) -> int:
    """The lengths tried, in order.

    >>> [size_at(place) for place in range(28, 34)]
    [512, 640, 768, 896, 1024, 1280]
    """
    return (4 + place % 4) * (1 << place // 4)


def place_of(length: float) -> int:
    """The place of the largest length that is not longer.

    >>> place_of(1100), size_at(place_of(1100))
    (32, 1024)
    """
    place = 0
    while size_at(place + 1) <= length:
        place += 1
    return place


@dataclass
class Longest:
    """What was found.

    Args:
        probes: length -> peak bytes of the short runs.
        predicted: length that should fit by them, before it is rounded down to one that is tried.
        tried: length -> peak bytes; None where they did not fit.
        why: the search ended early.
    """

    probes: dict[int, int] = field(default_factory=dict)
    predicted: float = 0.0
    tried: dict[int, int | None] = field(default_factory=dict)
    why: str | None = None

    @property
    def length(self) -> int:
        """The longest that ran; 0 where none did."""
        ran = [*self.probes, *(length for length, peak in self.tried.items() if peak is not None)]
        return max(ran, default=0)

    @property
    def verified(self) -> bool:
        """Whether the next longer one did not fit."""
        above = size_at(place_of(self.length) + 1)
        return bool(self.length) and above in self.tried and self.tried[above] is None


def longest(
    peak: Peak, budget_bytes: int, *, probes: tuple[int, int], power: int, may_try: Callable[[int], str | None]
) -> Longest:
    """Predicts and tries.

    Args:
        peak: runs a step.
        budget_bytes: that it has to fit into.
        probes: two lengths that surely fit, the shorter one first.
        power: of the length that the peak grows with.
        may_try: says why a length is not to be tried; None lets it.
    """
    found = Longest()
    for length in probes:
        bytes_ = peak(length)
        if bytes_ is None:
            found.why = f"{length} positions do not fit"
            return found
        found.probes[length] = bytes_
    short, long = probes
    slope = (found.probes[long] - found.probes[short]) / (long**power - short**power)
    room = (budget_bytes - found.probes[short]) / max(slope, 1e-9) + short**power
    found.predicted = max(room, 1.0) ** (1 / power)
    place = max(place_of(found.predicted), place_of(long) + 1)
    while not found.verified:
        found.why = may_try(size_at(place))
        if found.why is not None:
            break
        found.tried[size_at(place)] = peak(size_at(place))
        place += 1 if found.tried[size_at(place)] is not None else -1
        if size_at(place) in {*found.tried, *found.probes}:
            break
    return found
