"""The ranks of the mesh axis `cp` as real processes, which exchange uneven shares: also what a ring sends.

A hop is an exchange in which a rank has something for the next one only. So every message belongs to a round that all
ranks come to, in one order, and no two can wait for each other; NCCL sends nothing where a share is empty.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.axis import ProcessAxis
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.kinds import Kind, ulysses_degree
from meshwright.parallel.errors import WrapError
from meshwright.parallel.pending import Pending
from meshwright.parallel.progress import Call

__all__ = ["ContextAxis", "Shares", "context_axis"]


class Shares(NamedTuple):
    """What one rank has for each of the others.

    Attributes:
        memory: 1-dim, contiguous, in order of ranks.
        sizes: elements for each rank.
    """

    memory: Tensor
    sizes: list[int]

    @classmethod
    def empty(cls, like: Tensor, sizes: list[int]) -> "Shares":
        """Room for so many elements."""
        return cls(like.new_empty(sum(sizes)), sizes)

    @classmethod
    def for_some(cls, like: Tensor, sizes: Mapping[int, int], degree: int) -> "Shares":
        """Room for some ranks of so many."""
        return cls.empty(like, [sizes.get(rank, 0) for rank in range(degree)])

    def of(self, rank: int) -> Tensor:
        """The share for one rank."""
        return self.memory.narrow(0, sum(self.sizes[:rank]), self.sizes[rank])


@dataclass(frozen=True, eq=False)
class ContextAxis(ProcessAxis):
    """The ranks that one sequence is dealt over.

    Args:
        split: for a number of consecutive ranks, the axis along these, and the axis across such groups.
    """

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

    def exchange(self, received: Shares, sent: Shares) -> Pending:
        """Starts filling `received` with what each rank has for this one; neither may be touched before it is there."""
        return Pending(self._all_to_all(received, sent), self.call)

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
        split[each] = (
            _made(groups, inner, f"{each} ranks of {name}"),
            _made(groups, outer, f"{name} ranks {each} apart"),
        )
    here = groups.mesh.coordinates(groups.rank)[name]
    return ContextAxis(groups.wide(name), here, size, groups.call("all_to_all", name), split=split)


def _made(groups: Groups, ranks: list[list[int]], words: str) -> ContextAxis:
    group = dist.new_subgroups_by_enumeration(ranks)[0]
    own = next(each for each in ranks if groups.rank in each)
    call = Call(f"all_to_all over {words}", tuple(each for each in own if each != groups.rank))
    return ContextAxis(group, own.index(groups.rank), len(own), call)
