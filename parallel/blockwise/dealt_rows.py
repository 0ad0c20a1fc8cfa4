"""Rows that all ranks of an axis have, of which each rank computes its share of a loss.

What stands before and behind a loss runs alike on these ranks, so a share needs no relation to what a rank holds
elsewhere: rows are dealt evenly and in order. What comes back is whole on every rank again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis
from meshwright.parallel.layout import deal

__all__ = ["DealtRows"]

_TOLERANCE = 1e-7  # relative: the same numbers in the same order


@dataclass(frozen=True)
class DealtRows:
    """How many rows there are, and the ranks that share them; None for this rank alone.

    >>> DealtRows(None, 3).sizes
    [3]
    """

    axis: Axis | None
    number: int

    @property
    def sizes(self) -> list[int]:
        """Rows of each rank."""
        return [stop - start for start, stop in deal(self.number, 1 if self.axis is None else self.axis.size)]

    @property
    def own(self) -> slice:
        """Which are this rank's."""
        sizes, rank = self.sizes, 0 if self.axis is None else self.axis.rank
        start = sum(sizes[:rank])
        return slice(start, start + sizes[rank])

    def check(self, *rows: Tensor) -> None:
        """Refuses to share rows ([number, ...]) that are not the same on all ranks; asks tensors for their values.

        Raises:
            WrapError: where something of a block reached a head beside the stream, of one rank's positions only.
        """
        if self.axis is None or not self.number:
            return
        found = torch.stack([_mark(each) for each in rows])
        bounds = self.axis.largest(torch.stack([found, -found]))
        spread = (bounds[0] + bounds[1]) > _TOLERANCE * bounds.abs().amax(0)
        if bool(spread.any()):
            raise WrapError(
                "ranks of cp give a head different rows, or different targets for its scores: something that blocks "
                "make besides the stream reaches it, and each rank has that of its own positions, or the ranks read "
                "different samples; leave loss_block out of blockwise= to see the losses, or deal the batch over dp"
            )

    def taken(self, rows: Tensor) -> Tensor:
        """This rank's of all rows, in memory of their own, so that nothing holds the others."""
        return rows if self.axis is None else rows[self.own].clone()

    def joined(self, rows: Tensor) -> Tensor:
        """All rows, from those of this rank."""
        return rows if self.axis is None or not self.number else self.axis.gather(rows, self.sizes, 0)

    def summed(self, part: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        return part if self.axis is None else self.axis.sum(part)


def _mark(rows: Tensor) -> Tensor:
    """A number (0-dim, float64) that depends on every value and its row."""
    values = rows.detach().reshape(len(rows), -1).double().nan_to_num()
    weights = torch.linspace(1.0, 2.0, len(rows), dtype=torch.float64, device=rows.device)
    return (values.mean(1) * weights).mean()
