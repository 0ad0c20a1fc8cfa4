"""The ranks of the mesh axis `cp` as real processes: hops around a ring, and exchanges of uneven shares.

NCCL forms one line of the messages between two ranks, and whatever else the same group does; rings have a group of
their own there. Every rank goes through the same rounds, and a message belongs to one of them, so that no two ranks
can wait for each other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.axis import ProcessAxis
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.kinds import Kind, ulysses_degree
from meshwright.parallel.errors import WrapError
from meshwright.parallel.pending import Pending
from meshwright.parallel.progress import Call

__all__ = ["ContextAxis", "Message", "Round", "Shares", "context_axis"]


class Message(NamedTuple):
    """A tensor, contiguous, and the place of the other rank on the axis."""

    tensor: Tensor
    peer: int


class Shares(NamedTuple):
    """What one rank has for each of the others: 1-dim, in order of ranks, with so many elements each."""

    memory: Tensor
    sizes: list[int]


class Round:
    """Messages under way; nothing may be done with their tensors before `wait`."""

    def __init__(self, pending: Sequence[Pending] = (), held: Sequence[Message] = ()) -> None:
        self._pending = pending
        self._held = held

    def wait(self) -> None:
        """Blocks until all of them have come and gone."""
        for each in self._pending:
            each.wait()
        self._pending = self._held = ()


class _Names:
    """What waiting for some ranks is called: they need not wait as well.

    Args:
        axis: in words.
        ranks: of the axis, as numbers in the job.
    """

    def __init__(self, axis: str, ranks: Sequence[int]) -> None:
        self._axis = axis
        self._ranks = ranks
        self._calls: dict[frozenset[int], Call] = {}

    def of(self, peers: Iterable[int]) -> Call:
        """For ranks by their place on the axis."""
        others = frozenset(peers)
        if others not in self._calls:
            ranks = tuple(sorted(self._ranks[each] for each in others))
            self._calls[others] = Call(f"ring over {self._axis}", ranks, together=False)
        return self._calls[others]


@dataclass(frozen=True, eq=False)
class ContextAxis(ProcessAxis):
    """The ranks that one sequence is dealt over.

    Args:
        ring: the group for messages between two ranks.
        names: what waiting for messages is called, by the other ranks.
        split: for a number of consecutive ranks, the axis along these, and the axis across such groups.
    """

    ring: Any = None
    names: "_Names" = field(default_factory=lambda: _Names("", ()))
    split: dict[int, "tuple[ContextAxis, ContextAxis]"] = field(default_factory=dict)

    def parts(self, consecutive: int) -> "tuple[ContextAxis, ContextAxis]":
        """The axis along `consecutive` ranks, and the one across groups of as many.

        Raises:
            WrapError: where the axis was made without it.
        """
        alone = ContextAxis(None, 0, 1)
        if consecutive in (1, self.size):
            return (alone, self) if consecutive == 1 else (self, alone)
        if consecutive not in self.split:
            raise WrapError(
                f"cp={self.size} was made without groups of {consecutive} ranks; give context_axis() every kind that "
                "is to be used"
            )
        return self.split[consecutive]

    def start(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> Round:
        """Starts one round of messages, at most one to and one from each rank."""
        if not sends and not receives:
            return Round()
        call = self.names.of(each.peer for each in (*receives, *sends))
        pending = [Pending(work, call) for work in self._messages(sends, receives, tag)]
        return Round(pending, (*sends, *receives))

    def exchange(self, received: Shares, sent: Shares) -> None:
        """Fills `received` with what each rank has for this one."""
        Pending(self._all_to_all(received, sent), self.call).wait()

    def _messages(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> list[Any]:
        def wanted(call: Callable[..., Any], each: Message) -> Any:
            return dist.P2POp(call, each.tensor, group=self.ring, tag=tag, group_peer=each.peer)

        ops = [wanted(dist.isend, each) for each in sends] + [wanted(dist.irecv, each) for each in receives]
        return dist.batch_isend_irecv(ops)

    def _all_to_all(self, received: Shares, sent: Shares) -> Any:
        tensors, sizes = (received.memory, sent.memory), (received.sizes, sent.sizes)
        return dist.all_to_all_single(*tensors, *sizes, group=self.group, async_op=True)


def context_axis(groups: Groups, *kinds: Kind, name: str = "cp") -> ContextAxis:
    """The ranks along a mesh axis of degree above one; all ranks of the mesh must make it at once.

    Args:
        groups: of the mesh.
        kinds: of attention that will run on it.
        name: of the axis.

    Raises:
        WrapError: for kinds whose groups do not divide the axis.
    """
    ranks = [list(each) for each in groups.mesh.groups((name,))]
    size = len(ranks[0])
    split = {}
    for each in sorted({ulysses_degree(kind, size) for kind in kinds} - {1, size}):
        inner = [own[start : start + each] for own in ranks for start in range(0, size, each)]
        outer = [own[start::each] for own in ranks for start in range(each)]
        made = [dist.new_subgroups_by_enumeration(parts)[0] for parts in (inner, outer)]
        words = (f"{each} ranks of {name}", f"every {each}th rank of {name}")
        inside, across = (_made(groups, *of, words=own) for *of, own in zip((inner, outer), made, words, strict=True))
        split[each] = (inside, across)
    whole = _made(groups, ranks, groups.wide(name), words=name)
    return replace(whole, split=split)


def _made(groups: Groups, ranks: list[list[int]], group: Any, *, words: str) -> ContextAxis:
    own = next(each for each in ranks if groups.rank in each)
    call = Call(f"all_to_all over {words}", tuple(each for each in own if each != groups.rank))
    ring = group
    if groups.device_type == "cuda":
        ring = dist.new_subgroups_by_enumeration(ranks)[0]
        dist.all_reduce(torch.zeros(1, device="cuda"), group=ring)  # its first call must be everybody's
    return ContextAxis(group, own.index(groups.rank), len(own), call, ring=ring, names=_Names(words, own))
