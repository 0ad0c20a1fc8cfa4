"""What keeps the parameters and gradients of a rank on paper, in a step.

These follow the data engines of the runtime, in the order in which they take memory and give it back: `Replicate` (and
buckets that stay), `Rotate` (units of a schedule) and `Shard` (torch's FSDP2).
"""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshwright.parallel.pipeline.actions import Action, Kind

if TYPE_CHECKING:
    from meshwright.clusters.simulated.alive import Walk

__all__ = ["AFTER", "BEFORE", "Keeper", "Share", "States", "keeper_of"]

BEFORE, AFTER = "<before>", "<after>"
"""What stands around blocks, on the first and on the last stage."""
_REST = -1  # a stage of what belongs to no block


@dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of parameters that are sharded together.

    Args:
        whole: gathered, padded as shards need it.
        trained: of their gradients before they are reduced.
        shard: of these afterwards.
    """

    whole: float
    trained: float
    shard: float


@dataclass(frozen=True, kw_only=True)
class States:
    """Bytes that a rank keeps between steps, and how parameters and gradients come and go within one.

    Args:
        parameters: kept.
        gradients: after a step.
        optimizer: AdamW's two moments.
        buckets: that gradients are sent from; they stay.
        alone: block -> gradients that are in no bucket, where there are any.
        shares: block -> what is sharded of it, "" for what belongs to none; empty where nothing is.
        follows: whether the schedule says when shards are gathered and reduced; else torch's FSDP2 does.
        zero_stage: 1, 2 or 3, of shards.
        num_buffers: sums under way at once.
    """

    parameters: float
    gradients: float
    optimizer: float
    buckets: float = 0.0
    alone: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[str, Share] = field(default_factory=dict)
    follows: bool = True
    zero_stage: int = 3
    num_buffers: int = 2


class Keeper:
    """Parameters are whole; gradients stay where they are made, or move into buckets with the last micro-batch."""

    def __init__(self, walk: "Walk") -> None:
        self._walk = walk
        self._states = walk.states

    def open(self) -> None:
        """Before the first action."""

    def need(self, stage: int) -> None:
        """Before a stage computes."""

    def act(self, action: Action) -> None:
        """An action that does not compute."""

    def close(self) -> None:
        """After the last action."""

    def enter(self, name: str, *, is_backward: bool) -> None:
        """Before a block computes."""

    def leave(self, name: str) -> None:
        """After its forward."""

    def grows(self, *, is_last: bool) -> bool:
        """Whether gradients pile up inside of the first backward of a block."""
        return not (self._states.buckets and is_last)

    def made(self, name: str, made: float, *, is_first: bool, is_last: bool) -> None:
        """After its backward."""
        self._walk.gradients += made if is_first else 0.0
        if self._states.buckets and is_last:
            self._walk.gradients -= max(0.0, made - self._states.alone.get(name, 0.0))


class _Units(Keeper):
    """Shards that a schedule gathers and reduces; a buffer and what is made of it are alive together for a moment."""

    def __init__(self, walk: "Walk") -> None:
        super().__init__(walk)
        self._flying = dict[int, float]()  # stage -> bytes on their way
        self._whole = set[int]()
        self._sums = deque[float]()

    def open(self) -> None:
        """The rest stays whole for a step; below stage 3 all does."""
        rest = self._states.shares.get("")
        if rest is not None:
            self._fly(_REST, rest.whole)
        for stage in self._walk.stages if self._states.zero_stage < 3 else ():
            self._fly(stage, self._share(stage).whole)

    def need(self, stage: int) -> None:
        """What was on its way is copied where it belongs."""
        for each in (_REST, stage):
            if each in self._flying:
                size = self._flying.pop(each)
                self._walk.gathered += size
                self._walk.moment()
                self._walk.gathered -= size

    def act(self, action: Action) -> None:
        """Gathers, frees, reduces."""
        stage, walk = action.stage, self._walk
        if action.kind is Kind.GATHER and stage not in self._whole:
            self._fly(stage, self._share(stage).whole)
        elif action.kind is Kind.FREE and stage in self._whole:
            self._whole.discard(stage)
            walk.gathered -= self._share(stage).whole
        elif action.kind is Kind.REDUCE:
            if len(self._sums) == self._states.num_buffers:
                walk.gathered -= self._sums.popleft()
            self._reduce(self._share(stage), walk.made_of(stage))

    def close(self) -> None:
        """The rest is reduced."""
        rest = self._states.shares.get("")
        if rest is not None:
            self._reduce(rest, min(rest.trained, self._walk.gradients))

    def grows(self, *, is_last: bool) -> bool:
        """They wait for the reduction."""
        return True

    def made(self, name: str, made: float, *, is_first: bool, is_last: bool) -> None:
        """Gradients stay until they are reduced."""
        self._walk.gradients += made if is_first else 0.0

    def _fly(self, stage: int, size: float) -> None:
        if stage not in self._whole:
            self._whole.add(stage)
            self._flying[stage] = size
            self._walk.gathered += size

    def _reduce(self, share: Share, made: float) -> None:
        walk = self._walk
        walk.gathered += share.trained
        walk.moment()
        walk.gradients += share.shard - made
        self._sums.append(share.trained)

    def _share(self, stage: int) -> Share:
        found = [self._states.shares[name] for name in self._walk.names(stage) if name in self._states.shares]
        return Share(
            whole=sum(each.whole for each in found),
            trained=sum(each.trained for each in found),
            shard=sum(each.shard for each in found),
        )


class _Modules(Keeper):
    """torch's FSDP2: blocks are whole while they compute, and the next one's buffer is there already in backward."""

    def __init__(self, walk: "Walk") -> None:
        super().__init__(walk)
        self._blocks = [name for stage in walk.stages for name in walk.names(stage) if name in self._states.shares]
        self._whole = set[str]()
        self._buffer = self._ahead = self._sum = 0.0
        self._coming = ""
        self._piles = Counter[str]()

    def enter(self, name: str, *, is_backward: bool) -> None:
        """Makes it whole."""
        unit = self._unit(name)
        share, walk = self._states.shares.get(unit), self._walk
        if share is None:
            return
        if not is_backward and unit not in self._whole:
            self._gather(unit, share.whole)
            self._buffer = share.whole
        if not is_backward:
            return
        self._drop()
        if unit not in self._whole and self._coming == unit:
            walk.gathered += share.whole
            walk.moment()
            walk.gathered -= self._ahead
            self._whole.add(unit)
            self._ahead, self._coming = 0.0, ""
        elif unit not in self._whole:
            self._gather(unit, share.whole)
            walk.gathered -= share.whole
        self._fetch(unit)

    def leave(self, name: str) -> None:
        """Shards remain of it; the last block and the rest stay."""
        unit = self._unit(name)
        if self._states.zero_stage == 3 and unit in self._whole and unit and unit != self._blocks[-1]:
            self._free(unit)
        if name == AFTER:
            self._drop()

    def grows(self, *, is_last: bool) -> bool:
        """They wait for the end of the block."""
        return True

    def made(self, name: str, made: float, *, is_first: bool, is_last: bool) -> None:
        """Gradients are reduced at the end of a block, those of the rest at the end of backward."""
        unit, sums = self._unit(name), self._states.zero_stage > 1
        if is_first or sums:  # else they are added to those that are there
            self._walk.gradients += made
            self._piles[unit] += int(made)
        if unit in self._states.shares and (unit or name == BEFORE):
            self._end(unit, is_last=is_last, is_first=is_first or not sums)

    def _end(self, unit: str, *, is_first: bool, is_last: bool) -> None:
        """Its last gradient was made."""
        if unit in self._whole and (is_last or self._states.zero_stage == 3):
            self._free(unit)
        if is_last or self._states.zero_stage > 1:
            self._reduce(unit, self._states.shares[unit], is_first=is_first)

    def _reduce(self, unit: str, share: Share, *, is_first: bool) -> None:
        walk = self._walk
        walk.gathered -= self._sum
        walk.gathered += share.trained
        walk.moment(0.0 if is_first else share.shard)
        walk.gradients -= self._piles.pop(unit, 0)
        if walk.shards_on_host:
            walk.moment(share.shard)  # until it is copied
        else:
            walk.gradients += share.shard if is_first else 0.0
        self._sum = share.trained
        if not unit:  # the end of backward
            walk.gathered -= self._sum
            self._sum = 0.0

    def _unit(self, name: str) -> str:
        return name if name in self._states.shares else ""

    def _gather(self, unit: str, size: float) -> None:
        walk = self._walk
        walk.gathered += size
        walk.moment(self._states.shares[unit].shard if walk.shards_on_host else 0.0)  # copied here to be sent
        self._drop()
        walk.gathered += size
        walk.moment()
        self._whole.add(unit)

    def _drop(self) -> None:
        self._walk.gathered -= self._buffer
        self._buffer = 0.0

    def _fetch(self, unit: str) -> None:
        """Starts gathering the block that goes back next."""
        if unit not in self._blocks:
            return
        place = self._blocks.index(unit)
        before = self._blocks[place - 1] if place else ""
        if before and before not in self._whole and not self._coming:
            self._coming, self._ahead = before, self._states.shares[before].whole
            self._walk.gathered += self._ahead

    def _free(self, unit: str) -> None:
        self._whole.discard(unit)
        self._walk.gathered -= self._states.shares[unit].whole


def keeper_of(walk: "Walk") -> Keeper:
    """The one that a rank's states ask for."""
    if not walk.states.shares:
        return Keeper(walk)
    return _Units(walk) if walk.states.follows else _Modules(walk)
