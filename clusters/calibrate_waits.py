"""How long ranks that meet while they compute wait for the slowest of them.

Ranks that do the same are never done at the same time: their processors are interrupted, and take turns where they are
fewer. If delays come one apart from the other, what ranks differ by grows with the root of the time between meetings,
so one number says how much: the seconds that a meeting costs after one second of computing. Measured by computing for
some milliseconds and meeting, again and again; what remains of a round beside its computing, in turns, and its meeting.
"""

import time
from typing import Any

__all__ = ["steadied", "unsteadiness"]

_ROUNDS, _SEGMENT_S, _WIDTH = 60, 4e-3, 256
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
    rounds, met, computed = [], [], []
    for _ in range(_ROUNDS):
        start_s, before_s = time.perf_counter(), time.thread_time()
        for _ in range(int(repeats)):
            torch.mm(matrix, matrix)
        computed.append(time.thread_time() - before_s)
        dist.all_reduce(flag, group=group)
        rounds.append(time.perf_counter() - start_s)
    for _ in range(_ROUNDS):
        start_s = time.perf_counter()
        dist.all_reduce(flag, group=group)
        met.append(time.perf_counter() - start_s)
    busy_s = turns * steadied(computed)
    found = torch.tensor(max(0.0, steadied(rounds) - busy_s - steadied(met)) / busy_s**0.5)
    dist.all_reduce(found, group=group)
    return float(found) / dist.get_world_size(group)


def _repeats(matrix: Any) -> int:
    """Products that take about a segment."""
    import torch

    start_s, count = time.thread_time(), 0
    while time.thread_time() - start_s < _SEGMENT_S:
        torch.mm(matrix, matrix)
        count += 1
    return count
