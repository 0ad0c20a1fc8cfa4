"""Executes the list of one rank: forwards and backwards of an unmodified model's blocks in the order of a schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from torch import Tensor, nn

from meshwright.parallel.attributes import Attributes
from meshwright.parallel.pipeline.actions import Action, Kind
from meshwright.parallel.pipeline.check import RECEIVES, SENDS
from meshwright.parallel.pipeline.passes import Pass, Passes
from meshwright.parallel.pipeline.transfers import Transfers
from meshwright.parallel.recompute import Frame

__all__ = ["Phase", "States", "Watch", "Work", "execute", "unwatched"]


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


class Phase(Enum):
    """How far an action is."""

    WAITS = "waits"
    RUNS = "runs"
    DONE = "done"


Watch = Callable[[Action, Phase], None]
"""Told what a rank is at: an action waits (for parameters, or another rank), runs, is done."""


_GOING_BACK = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
_DONE_WITH = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
_TRAVELS = frozenset((*SENDS, *RECEIVES))


def unwatched(action: Action, phase: Phase) -> None:
    """Nobody is told."""
    del action, phase


@dataclass(frozen=True, eq=False)
class Work:
    """What the actions of one rank are done with.

    Args:
        passes: micro-batch -> its pass.
        states: of the stages.
        transfers: to and from other ranks; None where one rank has all stages.
        forwarded: called once, after the last forward of this rank and, as the schedule has it, of all others.
        weight: what the loss of a pass counts (0-dim), None where another rank has it; asked before its first
            backward.
        watch: told of every action.
        attributes: looked at in the first step of a model.
    """

    passes: Passes
    states: States
    transfers: Transfers | None
    forwarded: Callable[[], None]
    weight: Callable[[Pass], Tensor | None]
    watch: Watch = unwatched
    attributes: Attributes | None = None


def execute(actions: Sequence[Action], work: Work) -> None:
    """Runs the list of one rank."""
    run = _Run(actions, work)
    try:
        for action in actions:
            run.do(action)
    finally:
        work.passes.close()


class _Run:
    """A list on its way."""

    def __init__(self, actions: Sequence[Action], work: Work) -> None:
        self._work = work
        self._watch = work.watch
        self._forwards = sum(action.kind is Kind.FORWARD for action in actions)
        self._seeded: set[int] = set()

    def do(self, action: Action) -> None:
        """Does one action."""
        kind = action.kind
        if action.microbatch is None:
            self._watch(action, Phase.RUNS)
            _OF_STAGE[kind](self._work.states, action.stage)
        elif kind in _TRAVELS:
            self._transfer(action, action.microbatch)
        else:
            each = self._work.passes[action.microbatch]
            if kind in _GOING_BACK:
                self._seed(each, action.microbatch)
            self._watch(action, Phase.WAITS)
            self._work.states.need(action.stage)
            self._watch(action, Phase.RUNS)
            self._compute(kind, action.stage, each)
        self._watch(action, Phase.DONE)

    def _compute(self, kind: Kind, stage: int, each: Pass) -> None:
        if kind is Kind.FORWARD:
            self._forward(each, stage)
            return
        if each.flow.frames and kind in _GOING_BACK:
            beyond = each.back.goes_beyond(stage)
            _all(each.frames(stage, beyond=beyond), Frame.recompute)  # where no action of its own said so
        _OF_PASS[kind](each, stage)
        if kind in _DONE_WITH:
            _all(each.frames(stage), Frame.forget)
            each.flow.detach()
            if each.back.is_done:
                each.flow.forget()

    def _forward(self, each: Pass, stage: int) -> None:
        attributes = self._work.attributes
        if attributes is None:
            each.forward(stage)
        else:
            attributes.note()
            each.forward(stage)
            attributes.check(self._work.passes.index(each))
        self._forwards -= 1
        if not self._forwards:
            self._tell()

    def _transfer(self, action: Action, microbatch: int) -> None:
        assert self._work.transfers is not None, action
        each = self._work.passes[microbatch]
        if action.kind is Kind.RECEIVE_GRADIENT:
            self._seed(each, microbatch)
        self._watch(action, Phase.WAITS)
        if action.kind in RECEIVES:
            self._work.passes.make()
        self._work.transfers.do(action, each)

    def _tell(self) -> None:
        if self._work.transfers is None:
            self._work.forwarded()
        else:
            self._work.transfers.forwarded(self._work.forwarded)

    def _seed(self, each: Pass, microbatch: int) -> None:
        if microbatch not in self._seeded:
            self._seeded.add(microbatch)
            each.seed(self._work.weight(each))


def _all(frames: list[Frame], work: Callable[[Frame], None]) -> None:
    for frame in frames:
        work(frame)


_OF_STAGE: Mapping[Kind, Callable[[States, int], None]] = {
    Kind.GATHER: lambda states, stage: states.gather(stage),
    Kind.FREE: lambda states, stage: states.free(stage),
    Kind.REDUCE: lambda states, stage: states.reduce(stage),
}
_OF_PASS: Mapping[Kind, Callable[[Pass, int], None]] = {
    Kind.RECOMPUTE: lambda each, stage: _all(each.frames(stage), Frame.recompute),
    Kind.OFFLOAD: lambda each, stage: _all(each.frames(stage), Frame.offload),
    Kind.FETCH: lambda each, stage: _all(each.frames(stage), Frame.fetch),
    Kind.BACKWARD: lambda each, stage: each.flow.within(each.back.whole, stage),
    Kind.INPUT_GRADIENT: lambda each, stage: each.flow.within(each.back.inputs, stage),
    Kind.WEIGHT_GRADIENT: lambda each, stage: each.flow.within(each.back.weights, stage),
}
