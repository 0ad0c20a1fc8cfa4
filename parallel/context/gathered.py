"""Keys of all ranks that are gathered at once, in backward once more (arXiv 2407.21783, section 3.3.2).

Nothing hides that, but all keys are one part, whatever the mask. Shares are padded to the largest while they travel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.context.axis import ContextAxis
from meshwright.parallel.context.join import Joined
from meshwright.parallel.context.packed import Packed, Sizes
from meshwright.parallel.context.supply import Held
from meshwright.parallel.context.swap import parts_at

__all__ = ["GatheredSupply"]


@dataclass(frozen=True, eq=False)
class GatheredSupply:
    """Keys of all ranks together.

    Args:
        axis: the ranks.
        joined: their positions.
    """

    axis: ContextAxis
    joined: Joined

    def keys(self, own: Packed) -> Iterator[Held]:
        """All of them in one part."""
        sizes = Sizes.of(own.key, own.value)
        shares = self.axis.gather(own.memory, self._elements(sizes), 0)
        whole = Packed.empty(own.memory, sizes, sum(self.joined.sizes))
        for share, places in self._shares(shares, sizes):
            for there, here in ((share.key, whole.key), (share.value, whole.value)):
                for at, part in parts_at(there, places):
                    here[:, :, at].copy_(part)
        yield Held(whole, self.joined.pieces, wanted=True)

    def way_back(self, like: Tensor, sizes: Sizes) -> "_WayBack":
        """One sum over ranks."""
        return _WayBack(self, like, sizes)

    def sum(self, whole: Packed) -> Packed:
        """This rank's share of gradients of all keys."""
        sizes = Sizes.of(whole.key, whole.value)
        memory = torch.empty_like(whole.memory)
        for share, places in self._shares(memory, sizes):
            for there, here in ((share.key, whole.key), (share.value, whole.value)):
                for at, part in parts_at(there, places):
                    part.copy_(here[:, :, at])
        own = self.axis.scatter_sum(memory, self._elements(sizes), 0)
        return Packed.within(own, sizes, self.joined.sizes[self.axis.rank])

    def _elements(self, sizes: Sizes) -> list[int]:
        return [sizes.elements(each) for each in self.joined.sizes]

    def _shares(self, memory: Tensor, sizes: Sizes) -> Iterator[tuple[Packed, tuple[slice, ...]]]:
        parts = zip(memory.split(self._elements(sizes)), self.joined.sizes, self.joined.places, strict=True)
        for part, size, places in parts:
            yield Packed.within(part, sizes, size), places


class _WayBack:
    def __init__(self, supply: GatheredSupply, like: Tensor, sizes: Sizes) -> None:
        self._supply, self._like, self._sizes = supply, like, sizes
        self._found: Packed | None = None

    def add(self, mine: Packed | None) -> None:
        """The one part."""
        self._found = mine

    def home(self) -> Packed:
        """Sums over ranks."""
        found = self._found or Packed.zeros(self._like, self._sizes, sum(self._supply.joined.sizes))
        return self._supply.sum(found)
