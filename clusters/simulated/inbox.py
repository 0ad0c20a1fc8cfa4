"""Memory that waits for what other ranks of a pipeline send: receives are posted before their values are there."""

from collections.abc import Iterable

from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.pipeline.actions import Action, Kind
from meshwright.parallel.pipeline.check import RECEIVES, SENDS
from meshwright.parallel.pipeline.posting import EARLY, Posting, receives_due

__all__ = ["Inbox"]


class Inbox:
    """One rank's, along its list.

    Args:
        paper: the job.
        rank: of its pipeline.
    """

    def __init__(self, paper: Paper, rank: int) -> None:
        size_bytes = paper.border_bytes
        early = EARLY if paper.machine.is_host else 0  # NCCL connects late
        rows = receives_due(paper.schedule)[rank] if any(map(paper.schedule.has, SENDS)) else ()
        self._posting = Posting(rows, early=early, size_bytes=lambda _: size_bytes)
        self._num_forwards = paper.schedule.count(Kind.FORWARD, rank)
        _go_through(self._posting.begun())

    @property
    def waiting_bytes(self) -> float:
        """Of receives that are posted and not done."""
        return self._posting.waiting_bytes

    def take(self, action: Action) -> None:
        """Goes on to behind an action."""
        if action.kind in RECEIVES:
            _go_through(self._posting.waits())
            _go_through(self._posting.done(action))
        elif action.kind in SENDS:
            _go_through(self._posting.done())
        elif action.kind is Kind.FORWARD:
            self._num_forwards -= 1
            if not self._num_forwards:
                _go_through(self._posting.forwarded())


def _go_through(posted: Iterable[Action | None]) -> None:
    for _ in posted:
        pass
