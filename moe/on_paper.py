"""Experts of a model run on shapes, as their ranks run them: dealt by `swap`, with tokens on their way by a transport.

Nobody is at the other end: what would be sent is told, and where tokens go is assumed (see `assumed`).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from meshwright.moe.assumed import has_values
from meshwright.moe.axes import ExpertAxes, RowAxis
from meshwright.moe.errors import SwapError
from meshwright.moe.expert_pass import Experts
from meshwright.moe.recognise import find_experts
from meshwright.moe.swap import deal_experts
from meshwright.parallel.folding import Fold
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.tracing import RecordingAxis, Tracer

__all__ = ["deal_on_shapes"]


def deal_on_shapes(model: nn.Module, tracer: Tracer, mesh: Mesh, *, experts: Experts | None = None) -> bool:
    """Leaves the first rank of `ep` its experts, in place; says whether there are any.

    Args:
        model: without values, inside a fake mode.
        tracer: told of what travels.
        mesh: with `ep`, perhaps of 1, and `tp`, whose ranks each send a share of their tokens.
        experts: the option `moe` of the wrap.

    Raises:
        MeshwrightError: for experts that the mesh cannot share.
    """
    try:
        find_experts(model)
    except SwapError:
        return False
    chosen = Experts() if experts is None else experts
    alike = RecordingAxis(None, 0, mesh.tp, tracer=tracer, name="tp") if mesh.ep > 1 and mesh.tp > 1 else None
    slices = chosen.slices if mesh.ep > 1 else 1
    deal_experts(
        model, _axes(tracer, mesh), kind=chosen.chosen(mesh), alike=alike, slices=slices, overlap=chosen.overlap
    )
    return True


@dataclass(frozen=True, eq=False)
class _RecordingRows(RecordingAxis, RowAxis):
    """Ranks that are all as this one; what a rank counts and tells others has values."""

    def exchange(self, rows: Tensor, sent: object, received: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        """Tells of the rows, and makes those of others."""
        if self.size == 1:
            return rows
        self.tracer.send(self.name, "all_to_all", rows)
        return rows.new_empty(sum(received), *rows.shape[1:])

    def _all_gather(self, parts: Tensor, mine: Tensor) -> None:
        super()._all_gather(parts, mine)
        if has_values(mine):
            parts.copy_(mine.repeat(self.size, *[1] * (mine.dim() - 1)))


def _axes(tracer: Tracer, mesh: Mesh) -> ExpertAxes:
    def made(name: Fold, size: int) -> RowAxis:
        return _RecordingRows(None, 0, size, tracer=tracer, name=name)

    ep, alone = made("ep", mesh.ep), RowAxis(None, 0, 1)
    if mesh.ep_node == 1:
        return ExpertAxes(ep, alone, ep)
    if mesh.ep_local == 1:
        return ExpertAxes(ep, ep, alone)
    return ExpertAxes(ep, made("ep_node", mesh.ep_node), made("ep_local", mesh.ep_local))
