"""The walk of a rank through its schedule, block by block, with what is alive in each moment."""

from collections import Counter
from dataclasses import dataclass

from meshwright.clusters.simulated.hosting import MOVES, moved_bytes, shards_away
from meshwright.clusters.simulated.inbox import Inbox
from meshwright.clusters.simulated.keeping import AFTER, BEFORE, States, keeper_of
from meshwright.clusters.simulated.paper import Paper
from meshwright.parallel.pipeline.actions import COMPUTE, Action, Kind
from meshwright.parallel.work import Passes, Work

__all__ = ["Moment", "Walk"]

_GOES_BACK = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
_MAKES = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes alive at once, besides what is kept between steps.

    Args:
        gradients: made so far, whole or sharded, and buckets.
        gathered: whole copies of what is sharded, and buffers that collectives and receives fill or empty.
        activations: kept for backward.
        working: at once inside of one block, beyond what it keeps.
    """

    gradients: float
    gathered: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """All together."""
        return self.gradients + self.gathered + self.activations + self.working


class Walk:
    """One rank on its way.

    Args:
        paper: the job.
        rank: of its pipeline.
        states: of the rank.
    """

    def __init__(self, paper: Paper, rank: int, states: States) -> None:
        self._paper, self._rank = paper, rank
        self.states = states
        self.kept = self.gathered = 0.0
        self.gradients = states.buckets
        self._found: list[Moment] = []
        self._remade = set[tuple[int, int | None]]()
        self._gone_back = Counter[str]()
        self._pieces = {stage: self._pieces_of(stage) for stage in paper.schedule.stages_of(rank)}
        self._engine = keeper_of(self)
        self._inbox = Inbox(paper, rank)

    def fullest(self) -> Moment:
        """The moment in which most is alive."""
        self.moment()
        self._engine.open()
        for action in self._paper.schedule.ranks[self._rank]:
            if action.kind in COMPUTE:
                self._engine.need(action.stage)
                self._compute(action)
            elif action.kind in MOVES:
                more, copied = moved_bytes(self._paper, action)
                self.kept += more
                self.moment(copied)
            else:
                self._engine.act(action)
            self._inbox.take(action)
        self._engine.close()
        self.moment()
        return max(self._found, key=lambda each: each.total)

    def moment(self, working: float = 0.0) -> None:
        """Notes what is alive now, and what is at work besides."""
        gathered = self.gathered + self._inbox.waiting_bytes
        self._found.append(Moment(gradients=self.gradients, gathered=gathered, activations=self.kept, working=working))

    def names(self, stage: int) -> list[str]:
        """Of the blocks of a stage, in order."""
        return list(self._paper.blocks(stage))

    @property
    def shards_on_host(self) -> bool:
        """Whether shards rest in a memory that is not the rank's."""
        return shards_away(self._paper)

    @property
    def stages(self) -> list[int]:
        """Of this rank."""
        return list(self._pieces)

    def made_of(self, stage: int) -> float:
        """Gradients of the blocks of a stage, whole."""
        return sum(each.made_bytes for each in self._paper.blocks(stage).values())

    def _pieces_of(self, stage: int) -> dict[str, Passes]:
        first, last = stage == 0, stage == self._paper.schedule.num_stages - 1
        return {
            **({BEFORE: self._paper.traced.before} if first else {}),
            **self._paper.blocks(stage),
            **({AFTER: self._paper.traced.after} if last else {}),
        }

    def _compute(self, action: Action) -> None:
        pieces = self._pieces[action.stage]
        if action.kind is Kind.FORWARD:
            for name, each in pieces.items():
                self._forward(name, each)
            return
        if action.kind is Kind.RECOMPUTE:
            self._again(action)
            return
        if action.kind is Kind.WEIGHT_GRADIENT:  # of all that a stage makes before any is added
            self.moment(sum(each.made_bytes for each in pieces.values()))
        for name, each in reversed(pieces.items()):
            self._backward(name, each, action)
            self.kept += _waiting(each, action.kind)
        if action.kind in _MAKES:
            self._remade.discard((action.stage, action.microbatch))

    def _at_once(self, name: str, stage: int) -> bool:
        """Whether the runtime makes all gradients of a block before it adds any: where some are others', too.

        What stands before a stage's first block goes back with that one, what stands behind the last with that.
        """
        blocks = list(self._paper.blocks(stage))
        with_it = {blocks[0]: BEFORE, blocks[-1]: AFTER} if blocks and self._paper.stage_of else {}
        pieces = self._pieces[stage]
        several = [pieces[each] for each in (name, with_it.get(name, name)) if each in pieces]
        return bool(with_it) and any(each.is_tied for each in several)

    def _forward(self, name: str, each: Passes) -> None:
        self._engine.enter(name, is_backward=False)
        self.moment(each.forward.working_bytes + each.forward.saved_bytes)
        self.kept += each.input_bytes if name in self._paper.recomputed else each.forward.saved_bytes
        self.kept += self._border(name)
        self._engine.leave(name)

    def _border(self, name: str) -> float:
        """What a stage hands to another rank, kept to go back from."""
        stage, homes = self._paper.stage_of.get(name, 0), self._paper.schedule.homes
        goes_on = stage + 1 < len(homes) and homes[stage + 1] != self._rank and name == self.names(stage)[-1]
        return self._paper.border_bytes if goes_on else 0.0

    def _again(self, action: Action) -> None:
        """Blocks of a stage run again, all before it goes back."""
        if (action.stage, action.microbatch) in self._remade:
            return
        self._remade.add((action.stage, action.microbatch))
        for name, each in self._pieces[action.stage].items():
            if name in self._paper.recomputed:
                self.moment(each.forward.working_bytes + _remade(each))
                self.kept += _remade(each)

    def _remake(self, name: str, each: Passes, key: tuple[int, int | None]) -> None:
        """A block runs again inside of its backward, where the schedule does not say when."""
        if name in self._paper.recomputed and not self._paper.schedule.has(Kind.RECOMPUTE):
            self.kept += _remade(each)
            self._remade.add(key)

    def _backward(self, name: str, each: Passes, action: Action) -> None:
        self._engine.enter(name, is_backward=True)
        recomputed, key = name in self._paper.recomputed, (action.stage, action.microbatch)
        if action.kind in _GOES_BACK:
            self._remake(name, each, key)
        makes = action.kind in _MAKES
        self._gone_back[name] += makes
        first, last = self._gone_back[name] == 1, self._gone_back[name] == self._paper.schedule.num_microbatches
        piles = (first and self._engine.grows(is_last=last)) or self._at_once(name, action.stage)
        if action.kind is not Kind.WEIGHT_GRADIENT:
            self.moment(_working(each.backward, grows=makes and piles, holds=recomputed))
        if makes:
            self.kept -= each.input_bytes if recomputed else each.forward.saved_bytes
            self.kept -= self._border(name) + (_remade(each) if recomputed and key in self._remade else 0.0)
            self._engine.made(name, each.made_bytes, is_first=first, is_last=last)


def _waiting(each: Passes, kind: Kind) -> float:
    """Gradients that the first half of a backward leaves to the second."""
    return {Kind.INPUT_GRADIENT: each.waiting_bytes, Kind.WEIGHT_GRADIENT: -each.waiting_bytes}.get(kind, 0.0)


def _working(work: Work, *, grows: bool, holds: bool) -> float:
    """At once inside of a backward: where gradients pile up, and where what was recomputed is held to the end."""
    piled = work.growing_bytes - work.working_bytes if grows else 0.0
    return piled + (work.holding_bytes if holds else work.working_bytes)


def _remade(each: Passes) -> float:
    """Kept by a second forward, besides inputs."""
    return each.forward.saved_bytes - each.reread_bytes
