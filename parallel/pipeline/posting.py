"""When receives are posted: before their values are there, in an order in which no rank waits in a ring."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import RECEIVES, SENDS, other_end
from meshwright.parallel.pipeline.timeline import in_order

__all__ = ["EARLY", "EARLY_BYTES", "Posting", "receives_due"]

EARLY = 4
"""How many messages before its time a receive is posted where ranks are connected at once, so that what travels finds
it; none where ranks connect late, since calls of a rank can hold each other there (see `connecting`). At one wait twice
as many rows are gone through at most, since what is waited for may have come meanwhile."""

EARLY_BYTES = 1 << 20
"""As long as receives that wait take less memory than this, more of them are posted: what a small message costs is the
transport's turn, which then comes while nobody waits for it."""

Message = TypeVar("Message")


class Posting(Generic[Message]):
    """Which receives are due as a rank goes along its messages; None stands for the end of all ranks' last forwards.

    Receives are posted before their time while the rank waits for another one anyway.

    Args:
        rows: number of messages done -> receives to be posted then, in order (see `receives_due`).
        early: see `EARLY`.
        size_bytes: of a message.

    Attributes:
        waiting_bytes: of receives that are posted and not done.

    >>> posting = Posting([["a"], [], ["b"], ["c"]], early=1, size_bytes=lambda message: 1 << 30)
    >>> list(posting.begun()), list(posting.waits()), list(posting.done("a")), list(posting.waits())
    (['a'], [], [], ['b'])
    """

    def __init__(
        self, rows: Sequence[Sequence[Message | None]], *, early: int, size_bytes: Callable[[Message], float]
    ) -> None:
        self._rows = iter(rows)
        self._early = early
        self._size_bytes = size_bytes
        self._ahead = 0  # rows that were gone through before their time
        self._due: deque[Message | None] = deque()
        self._all_forwarded = False
        self.waiting_bytes = 0.0

    def begun(self) -> Iterator[Message | None]:
        """Before the first message."""
        return self._next_row()

    def waits(self) -> Iterator[Message | None]:
        """Before this rank waits for a message; a few at a time."""
        for _ in range(2 * self._early):
            if self._due or (self._ahead >= self._early and self.waiting_bytes >= EARLY_BYTES):
                return
            self._ahead += 1
            yield from self._next_row()

    def done(self, received: Message | None = None) -> Iterator[Message | None]:
        """Behind a message: one that was received, or a send."""
        if received is not None:
            self.waiting_bytes -= self._size_bytes(received)
        if not self._ahead:
            return self._next_row()
        self._ahead -= 1
        return iter(())

    def forwarded(self) -> Iterator[Message | None]:
        """Behind the last forward of this rank."""
        self._all_forwarded = True
        return self._posted()

    def _next_row(self) -> Iterator[Message | None]:
        self._due.extend(next(self._rows, ()))
        return self._posted()

    def _posted(self) -> Iterator[Message | None]:
        """What comes behind a forward that is not done waits for it."""
        while self._due and (self._due[0] is not None or self._all_forwarded):
            message = self._due.popleft()
            if message is not None:
                self.waiting_bytes += self._size_bytes(message)
            yield message


@lru_cache(maxsize=4)
def receives_due(schedule: Schedule) -> tuple[tuple[tuple[Action | None, ...], ...], ...]:
    """When receives are posted, by rank: number of its messages done -> receives to be posted then, in order.

    A receive is posted when its value is sent, in one order of all messages in which the ranks can run. So no rank
    waits in a ring even where whatever it starts keeps what it starts later from running: on a GPU streams share
    queues, and a call of NCCL that waits for another rank holds what stands behind it in its queue. None stands where
    all ranks have done their last forward.
    """
    due: list[list[list[Action | None]]] = [[[]] for _ in schedule.ranks]
    unforwarded = sum(action.kind is Kind.FORWARD for actions in schedule.ranks for action in actions)
    for home, action in in_order(schedule):
        if action.kind is Kind.FORWARD:
            unforwarded -= 1
            for each in due if not unforwarded else ():
                each[-1].append(None)
        elif action.kind in SENDS:
            received = other_end(action)
            due[schedule.homes[received.stage]][-1].append(received)
        if action.kind in (*SENDS, *RECEIVES):
            due[home].append([])
    return tuple(tuple(map(tuple, each)) for each in due)
