"""What `parallelize` is given to deal experts over the axis `ep` of a mesh."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from meshwright.moe.axes import expert_axes
from meshwright.moe.errors import DispatchError
from meshwright.moe.swap import deal_experts, plan_experts
from meshwright.moe.transports import TransportKind
from meshwright.parallel.collectives import Groups
from meshwright.parallel.errors import nearest
from meshwright.parallel.experts import ExpertPlan
from meshwright.parallel.mesh import Mesh

__all__ = ["Experts"]


@dataclass(frozen=True)
class Experts:
    """Deals the experts of a model over `ep`; the option `moe` of `parallelize`.

    Args:
        transport: how tokens get to experts and back (see `meshwright.moe.transport`). "auto" sends each token once to
            every node where `ep` spans several of several ranks, and in one hop otherwise.
        slices: ranks of `ep` that share the hidden features of each expert (expert tensor parallel).
        overlap: tokens travel in two halves: while experts compute one, the other is on its way, there or back.

    Raises:
        DispatchError: for a transport that does not exist.

    >>> Experts().chosen(Mesh(dp=8, ep=8, ep_node=2)), Experts().chosen(Mesh(dp=8, ep=8))
    ('once', 'one_hop')
    """

    transport: TransportKind | Literal["auto"] = "auto"
    slices: int = 1
    overlap: bool = False

    def __post_init__(self) -> None:
        kinds = ("auto", *get_args(TransportKind))
        if self.transport not in kinds:
            raise DispatchError(f"no transport is called {self.transport!r}; {nearest(str(self.transport), kinds)}")

    def chosen(self, mesh: Mesh) -> TransportKind:
        """The transport on a mesh."""
        if self.transport != "auto":
            return self.transport
        return "once" if 1 < mesh.ep_node < mesh.ep else "one_hop"

    def plan(self, model: nn.Module, mesh: Mesh) -> ExpertPlan:
        """See `ExpertPass`."""
        return plan_experts(model, ranks=mesh.ep, kind=self.chosen(mesh), slices=self.slices)

    def deal(self, model: nn.Module, plan: ExpertPlan, groups: Groups) -> None:
        """See `ExpertPass`."""
        del plan
        alike = groups.axis("tp") if groups.mesh.tp > 1 else None
        kind, axes = self.chosen(groups.mesh), expert_axes(groups)
        deal_experts(model, axes, kind=kind, alike=alike, slices=self.slices, overlap=self.overlap)
