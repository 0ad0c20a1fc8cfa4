"""Tells this rank's progress what its schedule is at, and tells several watches."""

from collections.abc import Sequence
from time import monotonic

from meshwright.parallel.pipeline.actions import Action
from meshwright.parallel.pipeline.check import RECEIVES, other_end
from meshwright.parallel.pipeline.runtime import Phase, Watch
from meshwright.parallel.progress import Doing, Progress

__all__ = ["InSchedule", "both", "watch_progress"]


class InSchedule:
    """Actions of a schedule; a receive waits for the rank that sends.

    Args:
        homes: stage -> rank of the pipeline.
        ranks: rank of the pipeline -> rank.

    >>> from meshwright.parallel.pipeline.actions import Kind
    >>> InSchedule((0, 1), (0, 2)).tell((Action(1, Kind.RECEIVE_ACTIVATION, 0), Phase.WAITS))
    Doing(words='1RECV_F0 (receive activation, stage 1, micro-batch 0)', waits_for=(0,), call='')
    """

    def __init__(self, homes: Sequence[int], ranks: Sequence[int]) -> None:
        self._homes = homes
        self._ranks = ranks

    def tell(self, detail: tuple[Action, Phase]) -> Doing:
        """The action, and for whom it waits."""
        action, phase = detail
        kind = action.kind.name.lower().replace("_", " ")
        microbatch = "" if action.microbatch is None else f", micro-batch {action.microbatch}"
        done = "behind " if phase is Phase.DONE else ""
        words = f"{done}{action} ({kind}, stage {action.stage}{microbatch})"
        if action.kind in RECEIVES and phase is Phase.WAITS:
            return Doing(words, (self._ranks[self._homes[other_end(action).stage]],))
        return Doing(words)


def watch_progress(progress: Progress, homes: Sequence[int], ranks: Sequence[int]) -> Watch:
    """A watch that moves the progress of this process.

    Args:
        progress: of this process.
        homes: stage -> rank of the pipeline.
        ranks: rank of the pipeline -> rank.
    """
    what = InSchedule(homes, ranks)

    def watch(action: Action, phase: Phase) -> None:
        progress.at = (monotonic(), what, (action, phase), None)

    return watch


def both(one: Watch, other: Watch) -> Watch:
    """A watch that tells two."""

    def watch(action: Action, phase: Phase) -> None:
        one(action, phase)
        other(action, phase)

    return watch
