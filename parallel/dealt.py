"""States of a model dealt over `tp` or `ep`: gradients that are sums, norms, whole tensors, parts for a checkpoint."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.collectives import Groups
from meshwright.parallel.folding import ranks_along
from meshwright.parallel.layout import Range, Split
from meshwright.parallel.part import Chunk, Part
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["DealtStates", "check_duplicates", "rows_of", "summed_elements"]

Local = Mapping[str, tuple[nn.Parameter, Tensor | None]]


class _Deal(Protocol):
    """What there is to know of a plan: its degree, how parameters are dealt, and whose gradients are partial."""

    @property
    def degree(self) -> int:
        """Number of ranks."""
        ...

    @property
    def splits(self) -> Mapping[str, Split]:
        """Parameter or buffer -> how it is dealt."""
        ...

    @property
    def partial(self) -> frozenset[str]:
        """Parameters that each rank holds and has a part of the gradients of."""
        ...


class DealtStates:
    """What an axis adds to the states of a data engine that deals dims of parameters.

    Args:
        plan: how parameters are dealt; a plan of degree 1 adds nothing.
        groups: process groups of the mesh.
        axis: "tp" or "ep".
    """

    def __init__(self, plan: _Deal, groups: Groups, axis: str = "tp") -> None:
        self._plan = plan
        self._groups = groups
        self._axis = axis
        self._rank = ranks_along(groups.mesh, groups.rank, axis).index(groups.rank)

    def is_dealt(self, name: str) -> bool:
        """Whether ranks hold different parts of a parameter or buffer."""
        return self._plan.degree > 1 and name in self._plan.splits

    def sum_gradients(self, local: Local) -> None:
        """Sums gradients over the axis that are partial on each rank, and those of rows that several ranks hold."""
        if self._plan.degree == 1:
            return
        summed = [each for name, held in local.items() for each in self._summed(name, *held)]
        for dtype in dict.fromkeys(piece.dtype for piece, _, _ in summed):
            mine = [each for each in summed if each[0].dtype is dtype]
            flat = torch.cat([_placed(*each) for each in mine])
            self._groups.all_reduce(flat, self._axis).wait()
            parts = flat.split([piece.numel() * number for piece, _, number in mine])
            for (piece, slot, number), part in zip(mine, parts, strict=True):
                piece.copy_(part.view(number, -1)[slot].view_as(piece))

    def counted(self, local: Local) -> list[Tensor]:
        """The pieces of gradients that this rank counts in a norm: every element is counted by one rank."""
        return [piece for name, held in local.items() for piece in self._counted(name, *held)]

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The full tensor behind this rank's part of parameter `name`; every rank must ask."""
        if not self.is_dealt(name):
            return tensor
        split = self._plan.splits[name]
        shapes = [torch.Size(split.local_shape(tensor.shape, rank)) for rank in range(split.degree)]
        mine = tensor.new_zeros(max(shape.numel() for shape in shapes))
        mine[: tensor.numel()] = tensor.reshape(-1)
        parts = self._groups.all_gather(mine, self._axis)
        return split.join([part[: shape.numel()].view(shape) for part, shape in zip(parts, shapes, strict=True)])

    def part(self, name: str, parameter: Tensor, values: Tensor) -> Tensor:
        """How `values` are written to a checkpoint.

        Args:
            name: of a parameter that is dealt.
            parameter: as the module holds it now; sharded further by FSDP2 where it is a DTensor.
            values: this rank's values of it, or of an optimizer state of that shape.
        """
        split = self._plan.splits[name]
        shape = list(parameter.shape)
        shape[split.dim] = split.size
        rows = rows_of(parameter)
        chunks = list(_boxes(split, self._rank, values, rows))
        return Part.of(torch.Size(shape), values, chunks)

    def _summed(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Iterator[tuple[Tensor, int, int]]:
        """Pieces to be summed, each with its slot among how many: ranks that share a slot hold the same elements."""
        if gradient is None:
            return
        split = self._plan.splits.get(name)
        if split is None:
            if name in self._plan.partial:
                yield gradient, 0, 1
            return
        if not split.duplicated:
            return
        shared = [(span, holders) for span, holders in split.intervals if len(holders) > 1]
        for offset in dict.fromkeys(split.local_start(holders[0], span[0]) for span, holders in shared):
            here = [each for each in shared if split.local_start(each[1][0], each[0][0]) == offset]
            slot = next(number for number, (_, holders) in enumerate(here) if self._rank in holders)
            size = here[0][0][1] - here[0][0][0]
            piece = _clipped(split, gradient, offset, size, rows_of(parameter))
            if piece is not None:
                yield piece, slot, len(here)

    def _counted(self, name: str, parameter: Tensor, gradient: Tensor | None) -> Iterator[Tensor]:
        if gradient is None:
            return
        split = self._plan.splits.get(name) if self._plan.degree > 1 else None
        if split is None:
            if self._rank == 0:
                yield gradient
            return
        if not split.duplicated:
            yield gradient
            return
        for (start, stop), holders in split.intervals:
            if holders[0] == self._rank:
                offset = split.local_start(self._rank, start)
                piece = _clipped(split, gradient, offset, stop - start, rows_of(parameter))
                if piece is not None:
                    yield piece


def check_duplicates(plan: TensorPlan) -> str | None:
    """Why rows that several ranks hold cannot be summed under `fsdp`, or None where they can."""
    for name, split in plan.splits.items():
        for (start, _), holders in split.intervals:
            if len({split.local_start(rank, start) for rank in holders}) > 1:
                return f"{name}: ranks hold the same rows at different places"
    return None


def summed_elements(plan: TensorPlan, shapes: Mapping[str, tuple[int, ...]], fsdp: int) -> int:
    """Elements of the sum over `tp` that ends a step, on the first rank, when every parameter has a gradient.

    Args:
        plan: of the model.
        shapes: trained parameter -> shape of the first rank's part.
        fsdp: over how many ranks rows (dim 0) are sharded further.
    """
    total = 0
    for name, shape in shapes.items():
        split = plan.splits.get(name)
        rows = -(-shape[0] // fsdp) if shape else 1
        rest = torch.Size(shape[1:]).numel()
        if split is None:
            total += rows * rest if name in plan.partial else 0
            continue
        shared = [(span, holders) for span, holders in split.intervals if len(holders) > 1]
        for (start, stop), holders in shared:
            offset = split.local_start(holders[0], start)
            if split.dim == 0:
                total += max(min(offset + stop - start, rows) - offset, 0) * rest
            else:
                total += rows * rest // shape[split.dim] * (stop - start)
    return total


def _placed(piece: Tensor, slot: int, number: int) -> Tensor:
    placed = piece.new_zeros(number, piece.numel())
    placed[slot] = piece.reshape(-1)
    return placed.view(-1)


def _clipped(split: Split, local: Tensor, offset: int, size: int, rows: Range | None) -> Tensor | None:
    """The view of `size` entries at `offset` of the dealt dim, as far as this rank's rows reach."""
    if split.dim != 0 or rows is None:
        return local.narrow(split.dim, offset, size)
    low, high = max(offset, rows[0]), min(offset + size, rows[1])
    return local[low - rows[0] : high - rows[0]] if low < high else None


def _boxes(split: Split, rank: int, values: Tensor, rows: Range | None) -> Iterator[Chunk]:
    first, last = rows if rows is not None else (0, values.shape[0])
    offset = 0
    for start, stop in split.held[rank]:
        if split.dim == 0:
            low, high = max(offset, first), min(offset + stop - start, last)
            if low < high:
                where = (start + low - offset, *([0] * (values.dim() - 1)))
                yield Chunk(where, values[low - first : high - first])
        elif last > first:
            where = (first, *(start if dim == split.dim else 0 for dim in range(1, values.dim())))
            yield Chunk(where, values.narrow(split.dim, offset, stop - start))
        offset += stop - start


def rows_of(parameter: Tensor) -> Range | None:
    """Which rows of its tensor a parameter sharded by FSDP2 holds here; None where it is not sharded."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    (sharded,) = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    each = -(-parameter.shape[0] // mesh.size(sharded))
    start = min(mesh.get_local_rank(sharded) * each, parameter.shape[0])
    return start, min(start + each, parameter.shape[0])
