"""Memory that waits for what other ranks of a pipeline send: receives are posted before their values are there."""

from itertools import accumulate

from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.pipeline.actions import Action
from meshwright.parallel.pipeline.check import RECEIVES, SENDS
from meshwright.parallel.pipeline.posting import EARLY, receives_due

__all__ = ["Inbox"]


class Inbox:
    """One rank's, along its list.

    Args:
        paper: the job.
        rank: of its pipeline.
    """

    def __init__(self, paper: Paper, rank: int) -> None:
        rows = receives_due(paper.schedule)[rank] if any(map(paper.schedule.has, SENDS)) else ()
        due = [len([each for each in row if each is not None]) for row in rows]
        self._posted, self._last = [0, *accumulate(due)], len(due)  # number of messages done -> receives posted by then
        self._ahead = 1 + (EARLY if paper.machine.is_host else 0)  # NCCL connects late
        self._size_bytes = paper.border_bytes
        self._num_done = self._num_taken = 0

    @property
    def waiting_bytes(self) -> float:
        """Of receives that are posted and not done."""
        posted = self._posted[min(self._num_done + self._ahead, self._last)]
        return self._size_bytes * (posted - self._num_taken)

    def take(self, action: Action) -> None:
        """Goes on to behind an action."""
        self._num_done += action.kind in (*SENDS, *RECEIVES)
        self._num_taken += action.kind in RECEIVES
