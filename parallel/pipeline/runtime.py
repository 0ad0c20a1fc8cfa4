"""Executes the list of one rank: forwards and backwards of an unmodified model's blocks in the order of a schedule."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

from meshwright.parallel.pipeline.actions import Action, Kind
from meshwright.parallel.pipeline.passes import Pass
from meshwright.parallel.pipeline.transfers import Transfers

__all__ = ["States", "execute"]


class States(Protocol):
    """What holds parameters and gradients, by stage."""

    module: nn.Module

    def open(self) -> None:
        """Starts making whole what stays whole for the pass."""
        ...

    def gather(self, stage: int) -> None:
        """Starts making parameters whole."""
        ...

    def need(self, stage: int) -> None:
        """Waits until they are."""
        ...

    def free(self, stage: int) -> None:
        """Gives their memory back."""
        ...

    def reduce(self, stage: int) -> None:
        """Starts summing gradients over data ranks."""
        ...

    def prepare(self, last: bool) -> None:
        """Says whether the next backward is the last one that adds to the gradients of its stage."""
        ...


def execute(
    actions: Sequence[Action],
    passes: Sequence[Pass],
    states: States,
    transfers: Transfers | None,
    *,
    forwarded: Callable[[], None],
    weight: Callable[[int], Tensor | None],
) -> None:
    """Runs the list of one rank.

    Args:
        actions: what to do.
        passes: micro-batch -> its pass.
        states: of the stages.
        transfers: to and from other ranks; None where one rank has all stages.
        forwarded: called once, after the last forward.
        weight: micro-batch -> what its loss counts (0-dim), None where another rank has it; asked before its first
            backward.
    """
    of_states = {Kind.GATHER: states.gather, Kind.FREE: states.free, Kind.REDUCE: states.reduce}
    last = {action.stage: action for action in actions if action.kind is Kind.BACKWARD}
    forwards = sum(action.kind is Kind.FORWARD for action in actions)
    seeded: set[int] = set()
    try:
        for action in actions:
            if action.microbatch is None:
                of_states[action.kind](action.stage)
                continue
            each = passes[action.microbatch]
            if action.kind is Kind.FORWARD:
                states.need(action.stage)
                each.forward(action.stage)
                forwards -= 1
                if not forwards:
                    forwarded()
                continue
            if action.kind in (Kind.BACKWARD, Kind.RECEIVE_GRADIENT) and action.microbatch not in seeded:
                seeded.add(action.microbatch)
                each.seed(weight(action.microbatch))
            if action.kind is Kind.BACKWARD:
                states.need(action.stage)
                states.prepare(action == last[action.stage])
                each.backward(action.stage)
            else:
                assert transfers is not None, action
                transfers.do(action, each)
    finally:
        for each in passes:
            each.flow.close()
