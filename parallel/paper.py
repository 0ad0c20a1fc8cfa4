"""The first rank of a mesh whose other ranks are not there, for runs on tensors without values."""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.collectives import PaperAxis, Pending
from meshwright.parallel.mesh import Mesh

__all__ = ["PaperGroups"]


@dataclass(frozen=True)
class PaperGroups:
    """What `collectives.Groups` tells an engine, without a process group."""

    mesh: Mesh
    device_type: str = "cpu"
    rank: int = 0

    def group(self, *axes: str) -> object | None:
        """Something where a real mesh has a process group along `axes`, else None."""
        return self if any(self.mesh.degree(axis) > 1 for axis in axes) else None

    def axis(self, name: str) -> PaperAxis:
        """The ranks along one axis."""
        return PaperAxis(None, 0, self.mesh.degree(name))

    def all_reduce(self, tensor: Tensor, *axes: str) -> Pending:
        """A sum that is there at once."""
        del tensor, axes
        return Pending(None)

    def all_gather(self, tensor: Tensor, *axes: str) -> list[Tensor]:
        """As many tensors as there are ranks along `axes`."""
        return [torch.empty_like(tensor) for _ in self.mesh.group(self.rank, axes)]
