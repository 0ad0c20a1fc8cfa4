"""The ranks along one mesh axis as real processes (`exchange.Axis`): sums, gathers and scatters that wait."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from meshwright.parallel.context.dealing import Dealing, DealingKind
from meshwright.parallel.errors import WrapError
from meshwright.parallel.progress import Call, Waiting

__all__ = ["ProcessAxis"]

_UNNAMED = Call("a collective", ())


@dataclass(frozen=True, eq=False)
class ProcessAxis:
    """The ranks along one mesh axis as real processes (`exchange.Axis`)."""

    group: Any
    rank: int
    size: int
    call: Call = _UNNAMED
    order: DealingKind = "contiguous"

    def __reduce__(self) -> Any:
        """Refuses copies, and files by pickle, of what holds the axis, such as the modules of a wrapped model.

        Raises:
            WrapError: always.
        """
        raise WrapError(
            "a module that is dealt over ranks cannot be copied or pickled, since it holds connections to other ranks: "
            "copy its parameters (averages of weights are averages of their parts), or save the model by "
            "save_weights() and wrap what reads them"
        )

    @cached_property
    def dealing(self) -> Dealing:
        """Which part of a dealt dim each rank holds."""
        return Dealing(self.order, self.size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the axis in place."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        """Element-wise maximum over the axis in place."""
        self._all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, tensor: torch.Tensor, sizes: list[int], dim: int) -> torch.Tensor:
        """Joins the shares of all ranks along `dim`; shares are padded to the largest while they travel."""
        mine = _padded(tensor, max(sizes), dim).movedim(dim, 0).contiguous()
        parts = mine.new_empty((self.size * mine.shape[0], *mine.shape[1:]))
        self._all_gather(parts, mine)
        shares = [part[:size] for part, size in zip(parts.split(max(sizes)), sizes, strict=True)]
        joined = parts if len(set(sizes)) == 1 else torch.cat(shares)
        return joined.movedim(0, dim).contiguous()

    def scatter_sum(self, tensor: torch.Tensor, sizes: list[int], dim: int) -> torch.Tensor:
        """Sums over the axis and keeps this rank's share along `dim`."""
        shares = [_padded(share, max(sizes), dim).movedim(dim, 0) for share in tensor.split(sizes, dim)]
        whole = torch.cat(shares).contiguous()
        mine = whole.new_empty((max(sizes), *whole.shape[1:]))
        self._reduce_scatter(mine, whole)
        return mine[: sizes[self.rank]].movedim(0, dim).contiguous()

    def _all_reduce(self, tensor: torch.Tensor, kind: Any) -> None:
        with Waiting(self.call, self.call.begun()):
            dist.all_reduce(tensor, op=kind, group=self.group)

    def _all_gather(self, parts: torch.Tensor, mine: torch.Tensor) -> None:
        with Waiting(self.call, self.call.begun()):
            dist.all_gather_into_tensor(parts, mine, group=self.group)

    def _reduce_scatter(self, mine: torch.Tensor, whole: torch.Tensor) -> None:
        with Waiting(self.call, self.call.begun()):
            dist.reduce_scatter_tensor(mine, whole, group=self.group)


def _padded(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = [*tensor.shape]
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
