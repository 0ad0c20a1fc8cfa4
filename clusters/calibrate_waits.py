"""How long ranks that meet while they compute wait for the slowest of them.

Ranks that do the same are never done at the same time: their processors are interrupted, and take turns where they are
fewer. If delays come one apart from the other, what ranks differ by grows with the root of the time between meetings,
so one number says how much: the seconds that a meeting costs after one second of computing. Measured by computing for
some milliseconds and meeting, again and again; what remains of a round beside its computing, in turns, and its meeting.
Spans of several lengths are tried: where ranks take turns, what they differ by depends on whether a span ends with a
turn.
"""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["steadied", "unsteadiness"]

_ROUNDS, _SEGMENT_S, _WIDTH = 40, 4e-3, 256
_SPANS = (1, 3, 5)  # segments between meetings
_KEPT = 0.9  # of rounds: the longest are other programs'


def steadied(seconds: list[float]) -> float:
    """The mean, without the longest.

    >>> steadied([1.0] * 9 + [100.0])
    1.0
    """
    kept = sorted(seconds)[: max(1, round(_KEPT * len(seconds)))]
    return sum(kept) / len(kept)


def unsteadiness(group: Any, *, turns: float) -> float:
    """Seconds that ranks wait after a second of computing; every rank of the group must ask.

    Args:
        group: of all ranks that compute at once.
        turns: ranks for each that can compute at the same time.
    """
    import torch
    import torch.distributed as dist

    matrix, flag = torch.zeros(_WIDTH, _WIDTH), torch.zeros(1)
    repeats = torch.tensor(float(_repeats(matrix)))
    dist.broadcast(repeats, 0, group=group)
    met_s = steadied([_round_s(matrix, flag, group, repeats=0)[1] for _ in range(_ROUNDS)])
    waited_s = roots = 0.0
    for span in _SPANS:
        rounds = [_round_s(matrix, flag, group, repeats=span * int(repeats)) for _ in range(_ROUNDS)]
        busy_s = turns * steadied([computed_s for computed_s, _ in rounds])
        waited_s += steadied([took_s for _, took_s in rounds]) - busy_s - met_s
        roots += busy_s**0.5
    found = torch.tensor(max(0.0, waited_s) / roots)
    dist.all_reduce(found, group=group)
    return float(found) / dist.get_world_size(group)


def _round_s(matrix: "torch.Tensor", flag: "torch.Tensor", group: Any, *, repeats: int) -> tuple[float, float]:
    """Own seconds of so many products, and all seconds until ranks have met after them."""
    import torch
    import torch.distributed as dist

    start_s, before_s = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        torch.mm(matrix, matrix)
    computed_s = time.thread_time() - before_s
    dist.all_reduce(flag, group=group)
    return computed_s, time.perf_counter() - start_s


def _repeats(matrix: Any) -> int:
    """Products that take about a segment."""
    import torch

    start_s, count = time.thread_time(), 0
    while time.thread_time() - start_s < _SEGMENT_S:
        torch.mm(matrix, matrix)
        count += 1
    return count
