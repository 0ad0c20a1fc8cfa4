"""The ranks that share experts as real processes: uneven exchanges of rows that wait under their own name.

Process groups are described as "ep", "ep_node" and "ep_local", which is what the ledger and reports of hangs call them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.axis import ProcessAxis
from meshwright.parallel.collectives import Groups
from meshwright.parallel.folding import Fold
from meshwright.parallel.progress import Waiting

__all__ = ["ExpertAxes", "RowAxis", "expert_axes"]


class RowAxis(ProcessAxis):
    """Ranks that exchange rows; one rank alone sends nothing."""

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows for each rank of the axis, in order, for those from each rank.

        Args:
            rows: [sum of sent, ...]
            sent: rows for each rank.
            received: rows from each rank.

        Returns:
            [sum of received, ...], by the rank they come from.
        """
        if self.size == 1:
            return rows
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        with Waiting(self.call, self.call.begun()):
            dist.all_to_all_single(arrived, rows.contiguous(), list(received), list(sent), group=self.group)
        return arrived

    def gather_each(self, own: Tensor) -> Tensor:
        """[ranks, ...]: the tensors of all ranks, which have one shape."""
        return own[None] if self.size == 1 else self.gather(own[None], [1] * self.size, 0)


@dataclass(frozen=True, eq=False)
class ExpertAxes:
    """The ranks of `ep` as this rank sees them.

    Args:
        ep: all that together hold every expert once.
        node: those with the same place on each node.
        local: those on this node.
    """

    ep: RowAxis
    node: RowAxis
    local: RowAxis

    @property
    def num_nodes(self) -> int:
        """Nodes that the experts are spread over."""
        return self.node.size

    @property
    def inside(self) -> "ExpertAxes":
        """The ranks of this node, as if there were no others."""
        return replace(self, ep=self.local, node=_alone())

    def named(self, axis: Fold) -> RowAxis:
        """The axis that a hop goes along."""
        return {"ep": self.ep, "ep_node": self.node, "ep_local": self.local}[axis]


def expert_axes(groups: Groups) -> ExpertAxes:
    """The ranks of `ep` on a mesh; all ranks of the mesh must make them at once.

    Args:
        groups: of the mesh, whose degrees `ep` and `ep_node` say how experts are folded over ranks.

    >>> from meshwright.parallel.mesh import Mesh
    >>> expert_axes(Groups(Mesh())).ep.size
    1
    """
    mesh = groups.mesh
    ep = _made(groups, "ep")
    if mesh.ep_node == 1:
        return ExpertAxes(ep, _alone(), ep)
    if mesh.ep_local == 1:
        return ExpertAxes(ep, ep, _alone())
    return ExpertAxes(ep, _made(groups, "ep_node"), _made(groups, "ep_local"))


def _made(groups: Groups, fold: Fold) -> RowAxis:
    own = groups.ranks(fold)
    if len(own) == 1:
        return _alone()
    return RowAxis(groups.group(fold), own.index(groups.rank), len(own), groups.call("an exchange", fold))


def _alone() -> RowAxis:
    return RowAxis(None, 0, 1)
