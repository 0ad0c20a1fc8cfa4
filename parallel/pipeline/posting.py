"""When receives are posted: before their values are there, in an order in which no rank waits in a ring."""

from functools import lru_cache

from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import RECEIVES, SENDS, other_end
from meshwright.parallel.pipeline.timeline import in_order

__all__ = ["EARLY", "receives_due"]

EARLY = 4
"""How many messages before its time a receive is posted where ranks are connected at once, so that what travels finds
it; none where they connect late, since calls of a rank can hold each other there (see `connecting`)."""


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
