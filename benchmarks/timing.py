"""How comparisons are timed: contenders in turn, ratios pair by pair, the noise of one thing against itself."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Ratio", "alternate", "noise_of", "ratio_of"]


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and the half-width of its 95 % interval (the notch of a box plot, 1.57 IQR / sqrt n)."""

    median: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.median:.3f} +- {self.half_width:.3f}"


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    steps: int,
    warmup: int = 3,
    sync: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round; the order rotates from round to round.

    Args:
        contenders: name -> one step.
        rounds: pairs to be had.
        steps: steps of one contender in one round.
        warmup: steps of each before the first round.
        sync: called before and after each turn, such as a barrier of all ranks.
        clock: tells seconds.
    """
    names = list(contenders)
    for name in names:
        for _ in range(warmup):
            contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sync()
            start_s = clock()
            for _ in range(steps):
                contenders[name]()
            sync()
            times[name].append((clock() - start_s) / steps)
    return times


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Paired ratios of two contenders' rounds.

    >>> ratio_of([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    Ratio(median=0.5, half_width=0.0)
    """
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], float("inf"))
    quarters = statistics.quantiles(ratios, n=4)
    return Ratio(statistics.median(ratios), 1.57 * (quarters[2] - quarters[0]) / len(ratios) ** 0.5)


def noise_of(one: Sequence[float], same: Sequence[float]) -> float:
    """How far the same thing against itself may be from 1 here: the bias of its median plus the half-width."""
    ratio = ratio_of(one, same)
    return abs(ratio.median - 1.0) + ratio.half_width
