"""Gradients of parameters that several ranks of one axis hold and each have a part of."""

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.folding import ranks_along
from meshwright.parallel.mesh import DATA_AXES

__all__ = ["Local", "SharedFlags", "SharedGradients"]

Each = TypeVar("Each")
Local = Mapping[str, tuple[nn.Parameter, Tensor | None]]
"""Parameter -> itself and the part of its gradient that this rank holds."""


class SharedGradients:
    """Sums parts of gradients along an axis, in one piece for each dtype; along one of degree 1 there is nothing to do.

    Args:
        names: of the parameters; those that a rank does not hold are left out.
        groups: process groups of the mesh.
        axis: of the mesh, or a fold of experts.
    """

    def __init__(self, names: Collection[str], groups: Groups, axis: str) -> None:
        self._names = set(names) if len(ranks_along(groups.mesh, groups.rank, axis)) > 1 else set()
        self._groups = groups
        self._axis = axis
        self._unused: set[str] = set()

    def fill(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Gives each parameter a gradient, so that all ranks sum the same ones."""
        for name, each in self._held(trained).items():
            if each.grad is None:
                each.grad = torch.zeros_like(each)
                self._unused.add(name)

    def sum(self, local: Local) -> None:
        """Sums them; none is left where no rank had one."""
        held = self._held(local)
        parts = {name: gradient for name, (_, gradient) in held.items() if gradient is not None}
        for dtype in dict.fromkeys(each.dtype for each in parts.values()):
            same = {name: each for name, each in parts.items() if each.dtype is dtype}
            used = [float(name not in self._unused) for name in same]
            flags = torch.tensor(used, dtype=dtype, device=self._groups.device_type)
            flat = torch.cat([*(each.reshape(-1) for each in same.values()), flags])
            self._groups.all_reduce(flat, self._axis).wait()
            *sums, flags = flat.split([*(each.numel() for each in same.values()), len(used)])
            for (name, each), total, flag in zip(same.items(), sums, self._groups.flags(flags), strict=True):
                each.copy_(total.view_as(each))
                if not flag:
                    held[name][0].grad = None
        self._unused.clear()

    def _held(self, of: Mapping[str, Each]) -> dict[str, Each]:
        return {name: each for name, each in of.items() if name in self._names}


class SharedFlags:
    """Which parameters some rank computed a gradient for, where the reductions of gradients do not tell.

    Args:
        names: of the parameters, the same on all ranks along `axes`.
        used: those that this rank has one for.
        groups: process groups of the mesh.
        axes: to be asked; the data axes where none are named.
    """

    def __init__(self, names: Iterable[str], used: Collection[str], groups: Groups, *axes: str) -> None:
        self._names = list(names)
        self._groups = groups
        flags = [name in used for name in self._names]
        self._flags = torch.tensor(flags, dtype=torch.float64, device=groups.device_type)
        self._pending = groups.all_reduce(self._flags, *(axes or DATA_AXES)) if flags else Pending(None)

    def unused(self) -> list[str]:
        """Waits for the other ranks; the parameters that no rank has a gradient for."""
        self._pending.wait()
        return [name for name, flag in zip(self._names, self._groups.flags(self._flags), strict=True) if not flag]
