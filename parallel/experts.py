"""Experts dealt over `ep`, as a plan and as states: each rank keeps its own, and ranks of `edp` keep the same ones.

A rank's gradients of its experts hold the tokens of all ranks of `ep`, so they are summed over `edp` alone, whatever
attention does with these ranks (dp, fsdp, cp or tp).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.collectives import Groups
from meshwright.parallel.dealt import DealtStates, rows_of
from meshwright.parallel.folding import ranks_along
from meshwright.parallel.layout import Split
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.part import Part
from meshwright.parallel.shared import Local
from meshwright.parallel.tiles import Tiles

__all__ = ["ExpertPass", "ExpertPlan", "ExpertStates", "square_of"]

T = TypeVar("T", bound=Tensor | None)


@dataclass(frozen=True)
class ExpertPlan:
    """Which rank of `ep` keeps which experts.

    Args:
        degree: of `ep`.
        splits: parameters of which several ranks keep a part each -> how they are dealt.
        tiles: those of many experts of which ranks keep a part of each expert too.
        homes: parameters of one expert -> the ranks of `ep` that keep them, whole or as `splits` says.
        paths: of the modules that hold experts.
        summary: what a report says of it.
        notes: what differs from the plain run.
    """

    degree: int = 1
    splits: Mapping[str, Split] = field(default_factory=dict)
    tiles: Mapping[str, Tiles] = field(default_factory=dict)
    homes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    paths: tuple[str, ...] = ()
    summary: str = ""
    notes: tuple[str, ...] = ()
    partial: frozenset[str] = frozenset()

    def holds(self, name: str) -> bool:
        """Whether a parameter is of experts that are dealt."""
        return name in self.splits or name in self.homes

    def local_shape(self, name: str, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of what a rank of `ep` keeps of a parameter; no elements where another rank keeps it."""
        dealt = self.tiles.get(name) or self.splits.get(name)
        if dealt is not None:
            return dealt.local_shape(shape, rank)
        return tuple(shape) if rank in self.homes.get(name, (rank,)) else (0, *shape[1:])


class ExpertPass(Protocol):
    """What deals experts: it finds them, and lets tokens travel to them."""

    def plan(self, model: nn.Module, mesh: Mesh) -> ExpertPlan:
        """What will be kept where; changes nothing.

        Raises:
            MeshwrightError: for a model or a mesh that does not allow it.
        """
        ...

    def deal(self, model: nn.Module, plan: ExpertPlan, groups: Groups) -> None:
        """Drops what other ranks keep, in place; every rank must call it."""
        ...


class ExpertStates:
    """What `ep` adds to the states of a data engine.

    Args:
        plan: one of degree 1 adds nothing.
        groups: process groups of the mesh.
    """

    def __init__(self, plan: ExpertPlan, groups: Groups) -> None:
        self.plan = plan
        self._groups = groups
        self._dealt = DealtStates(plan, groups, axis="ep")
        self._rank = ranks_along(groups.mesh, groups.rank, "ep").index(groups.rank)

    def holds(self, name: str) -> bool:
        """Whether this parameter is of experts that are dealt."""
        return self.plan.degree > 1 and self.plan.holds(name)

    def is_dealt(self, name: str) -> bool:
        """Whether ranks of `ep` hold different parts of a parameter."""
        return self._dealt.is_dealt(name)

    def part(self, name: str, parameter: Tensor, values: Tensor) -> Tensor:
        """How `values` of a parameter that is dealt are written to a checkpoint."""
        tiles = self.plan.tiles.get(name)
        if tiles is None:
            return self._dealt.part(name, parameter, values)
        shape = list(parameter.shape)
        shape[0], shape[tiles.columns.dim] = tiles.rows.size, tiles.columns.size
        return Part.of(torch.Size(shape), values, list(tiles.boxes(self._rank, values, rows_of(parameter))))

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The full tensor behind this rank's part of a parameter; every rank that holds one must ask.

        Of a single expert it stays a part, which `told` and `gathered` join: not all ranks hold one.
        """
        if name in self.plan.homes:
            return tensor
        tiles = self.plan.tiles.get(name)
        if tiles is None or not self.is_dealt(name):
            return self._dealt.whole(name, tensor)
        shapes = [torch.Size(tiles.local_shape(tensor.shape, rank)) for rank in range(tiles.degree)]
        mine = tensor.new_zeros(max(shape.numel() for shape in shapes))
        mine[: tensor.numel()] = tensor.reshape(-1)
        parts = self._groups.all_gather(mine, "ep")
        return tiles.join([part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)])

    def told(self, name: str, tensor: Tensor | None) -> Tensor:
        """A full tensor that this rank or, of a single expert, others have; every rank of `ep` must ask."""
        if self.holds(name) and name in self.plan.homes:
            homes = self.plan.homes[name]
            tensor = self._joined(
                name, {home: self._groups.tell(tensor if home == self._rank else None, "ep", home) for home in homes}
            )
        assert tensor is not None, name
        return tensor

    def gathered(self, mine: Mapping[str, T]) -> dict[str, T]:
        """With what other ranks have of single experts; every rank of `ep` must ask."""
        parts: dict[str, dict[int, Tensor | None]] = {}
        for rank in range(self.plan.degree) if self.plan.homes and self.plan.degree > 1 else ():
            own = {name: each for name, each in mine.items() if rank in self.plan.homes.get(name, ())}
            for name, each in self._groups.tell(own, "ep", rank).items():
                parts.setdefault(name, {})[rank] = each
        joined: dict[str, Any] = {name: self._joined(name, each) for name, each in parts.items()}
        return {**mine, **joined}

    def _joined(self, name: str, parts: Mapping[int, Tensor | None]) -> Tensor | None:
        """A tensor of one expert from what its ranks have of it; none where none has one."""
        given = {rank: each for rank, each in parts.items() if each is not None}
        split, first = self.plan.splits.get(name), next(iter(given.values()), None)
        if split is None or first is None:
            return first
        shapes = [split.local_shape(first.shape, rank) for rank in range(split.degree)]
        return split.join([given.get(rank, first.new_zeros(shape)) for rank, shape in enumerate(shapes)])

    def parted(self, local: Local) -> tuple[Local, Local]:
        """Dense parameters, and those of experts."""
        dense = {name: held for name, held in local.items() if not self.holds(name)}
        return dense, {name: held for name, held in local.items() if name not in dense}

    def square(self, experts: Local) -> Tensor:
        """Sum of squares (0-dim, float64) of the gradients of all experts of this stage; every rank must ask.

        Args:
            experts: of this rank; ranks of `edp` hold different parts of those that are DTensors.
        """
        device_type = self._groups.device_type
        held = [(isinstance(each, DTensor), gradient) for each, gradient in experts.values() if gradient is not None]
        square = square_of([gradient for is_sharded, gradient in held if is_sharded], device_type)
        self._groups.all_reduce(square, "edp").wait()
        square += square_of([gradient for is_sharded, gradient in held if not is_sharded], device_type)
        self._groups.all_reduce(square, "ep").wait()
        return square


def square_of(gradients: list[Tensor], device_type: str) -> Tensor:
    """Sum of squares (0-dim, float64).

    >>> square_of([torch.tensor([3.0, 4.0])], "cpu").item()
    25.0
    """
    norms = torch._foreach_norm(gradients) if gradients else [torch.zeros((), device=device_type)]
    return torch.stack([norm.double() for norm in norms]).square().sum()
