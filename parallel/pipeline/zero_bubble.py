"""Schedules that split backward: others wait for the gradient of the input, that of the weights fills gaps.

Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241) and "Pipeline Parallelism with Controllable Memory"
(arXiv 2405.15362). If the three parts take equal time, a step takes (P - 1) parts more than computing alone, which is
the time at which the last rank can begin.
"""

from collections.abc import Sequence
from dataclasses import replace

from meshwright.parallel.errors import ScheduleError
from meshwright.parallel.pipeline.actions import Action, Kind, Schedule
from meshwright.parallel.pipeline.check import needs_of

__all__ = ["zero_bubble_h1", "zero_bubble_v"]


def zero_bubble_h1(homes: Sequence[int], num_microbatches: int) -> Schedule:
    """ZB-H1: 1F1B whose rank r does the gradients of weights r micro-batches late; holds as much as rank 0 of 1F1B.

    Raises:
        ScheduleError: when a rank has more than one stage, or the ranks are not in order.

    >>> print(zero_bubble_h1([0, 1], 2).write(), end="")
    0F0,0F1,0I0,0W0,0I1,0W1
    1F0,1I0,1F1,1I1,1W0,1W1
    """
    num_ranks = len(homes)
    if list(homes) != list(range(num_ranks)):
        raise ScheduleError(f"ZB-H1 takes one stage for each rank in order, not homes {list(homes)}; use ZBV or 1F1B")
    ranks = []
    for rank in range(num_ranks):
        ahead = min(num_ranks - rank - 1, num_microbatches)
        row = [Action(rank, Kind.FORWARD, each) for each in range(ahead)]
        for each in range(num_microbatches):
            if ahead + each < num_microbatches:
                row.append(Action(rank, Kind.FORWARD, ahead + each))
            row.append(Action(rank, Kind.INPUT_GRADIENT, each))
            if each >= rank:
                row.append(Action(rank, Kind.WEIGHT_GRADIENT, each - rank))
        late = range(max(0, num_microbatches - rank), num_microbatches)
        ranks.append((*row, *(Action(rank, Kind.WEIGHT_GRADIENT, each) for each in late)))
    return Schedule("ZB-H1", tuple(homes), num_microbatches, tuple(ranks))


def zero_bubble_v(homes: Sequence[int], num_microbatches: int) -> Schedule:
    """ZBV: two stages for each rank, down and up; a rank prefers gradients of inputs, then forwards, then of weights.

    At most 2 P pairs of stage and micro-batch are held by a rank, as much as 1F1B's rank 0 holds.

    Raises:
        ScheduleError: when the stages are not dealt down and up again.
    """
    num_ranks = max(homes, default=-1) + 1
    if list(homes) != [*range(num_ranks), *reversed(range(num_ranks))]:
        raise ScheduleError(f"ZBV takes stages dealt down and up again (see v_shaped), not homes {list(homes)}")
    ranks = [_Rank(tuple(homes), num_microbatches, rank) for rank in range(num_ranks)]
    done: set[Action] = set()
    while any(rank.is_left for rank in ranks):
        done |= {action for rank in ranks if (action := rank.choose(done)) is not None}
    return Schedule("ZBV", tuple(homes), num_microbatches, tuple(tuple(rank.row) for rank in ranks))


class _Rank:
    """What a rank has done and what it does next, in units of equal time."""

    def __init__(self, homes: tuple[int, ...], num_microbatches: int, rank: int) -> None:
        self.row: list[Action] = []
        self._homes = homes
        self._num_microbatches = num_microbatches
        self._held = 0
        kinds = (Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT)
        stages = [stage for stage, home in enumerate(homes) if home == rank]
        self._next = [Action(stage, kind, 0) for stage in stages for kind in kinds]

    @property
    def is_left(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._next)

    def choose(self, done: set[Action]) -> Action | None:
        """Does one thing, if there is one whose inputs are done."""
        full = self._held >= len(self._homes)
        ready = [
            action
            for action in self._next
            if done.issuperset(needs_of(self._homes, action)) and not (full and action.kind is Kind.FORWARD)
        ]
        if not ready:
            return None
        action = min(ready, key=_preference)
        assert action.microbatch is not None, action
        self._held += {Kind.FORWARD: 1, Kind.WEIGHT_GRADIENT: -1}.get(action.kind, 0)
        self._next.remove(action)
        if action.microbatch + 1 < self._num_microbatches:
            self._next.append(replace(action, microbatch=action.microbatch + 1))
        self.row.append(action)
        return action


def _preference(action: Action) -> tuple[int, int, int]:
    assert action.microbatch is not None, action
    if action.kind is Kind.FORWARD:  # the way up first: it ends in gradients
        return 1, -action.stage, action.microbatch
    return 0 if action.kind is Kind.INPUT_GRADIENT else 2, action.microbatch, -action.stage
