"""What one scheduled step sums up over micro-batches and ranks: losses and their numbers of items.

Gradients that leave their rank in backward are divided before by the number of all items. There all ranks sum as soon
as the last forward is through. Where no gradient does, that sum would only stand between a forward and a backward that
others wait for: then the rank that has the losses tells them to the rest of its pipeline behind its last backward. On a
GPU a sum holds nobody up, and messages to everybody would take connections to everybody.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.collectives import Groups, Pending
from meshwright.parallel.forwards import Result
from meshwright.parallel.mesh import DATA_AXES
from meshwright.parallel.pipeline.wire import Wire

__all__ = ["StepStats", "Totals", "stats_of", "weighted"]

_TAG = 0
"""No value that crosses a border has it (see `Timetable`)."""


@dataclass(frozen=True)
class StepStats:
    """What one step found out: `loss` and `items` (0-dim, global), `microbatch_losses` of this rank ([micro-batch])."""

    loss: Tensor
    items: Tensor
    microbatch_losses: Tensor


def stats_of(sums: Tensor, losses: Tensor) -> StepStats:
    """What sums of losses times items and of items ([2]) tell.

    >>> stats_of(torch.tensor([6.0, 4.0]), torch.tensor([1.0, 2.0])).loss
    tensor(1.5000)
    """
    loss, items = sums.unbind()
    return StepStats(loss / items, items, losses)


def weighted(losses: Tensor, items: Tensor) -> Tensor:
    """Means times their counts (float64); a mean over nothing is NaN and counts as zero."""
    return torch.where(items > 0, losses.detach().double() * items, 0.0)


class Totals:
    """Of one step.

    Args:
        num_microbatches: of this rank.
        groups: process groups of the mesh.
        wire: to the other ranks of the pipeline; None where there are none.
        source: rank of the pipeline that has the losses.
        device: of the values.
    """

    def __init__(
        self, num_microbatches: int, groups: Groups, wire: Wire | None, *, source: int, device: torch.device
    ) -> None:
        found = torch.zeros(2 + num_microbatches, dtype=torch.float64, device=device)
        self._found = found
        self._sums, self._losses = found.tensor_split((2,))
        self._groups = groups
        self._wire = wire
        self._source = source
        self._has_losses = wire is None or wire.rank == source
        late = wire is not None and not wire.early
        self._in_backward = groups.mesh.data_degree > 1 or groups.mesh.ep > 1 or late
        self._asked = False
        self._running: list[Pending] = []
        self._told: Callable[[], list[Tensor]] | None = None

    def forwarded(self, results: Callable[[], Sequence[Result]]) -> None:
        """After the last forward of this rank and, as the schedule has it, of all others.

        Args:
            results: loss and items of each micro-batch, asked for on the rank that has them.
        """
        if self._in_backward:
            self._asked = True
            if self._has_losses:
                self._put(results)
            self._running.append(self._groups.all_reduce(self._sums, *DATA_AXES, "pp"))
            self._running.append(self._groups.all_reduce(self._losses, "pp"))
        elif self._wire is not None and not self._has_losses:  # while this rank waits anyway
            self._told = self._wire.receive_into([self._found], self._source, _TAG)

    def ended(self, results: Callable[[], Sequence[Result]]) -> None:
        """After all actions of this rank; see `forwarded`."""
        if self._in_backward:
            return
        self._asked = True
        if not self._has_losses:
            return
        self._put(results)
        if self._wire is not None:
            for rank in set(range(self._groups.mesh.pp)) - {self._source}:
                self._wire.send([self._found], rank, _TAG)

    def scale(self) -> Tensor:
        """What multiplies gradients (0-dim); waits for the sums."""
        self._wait()
        return self._sums[1].reciprocal()

    def stats(self) -> StepStats:
        """Waits for all."""
        self._wait()
        return stats_of(self._sums, self._losses)

    def _wait(self) -> None:
        assert self._asked, "nobody has summed yet, and a number of nothing would become a factor of gradients"
        for each in self._running:
            each.wait()
        self._running.clear()
        if self._told is not None:
            self._told()
            self._told = None

    @torch.no_grad()
    def _put(self, results: Callable[[], Sequence[Result]]) -> None:
        """Puts losses and sums where they belong.

        What a step does once takes ten times as long as what it repeats, so each operation counts.
        """
        found = results()
        losses = torch.stack([loss.double() for loss, _ in found])  # narrow ones are mixed by no operation of autocast
        items = torch.stack([each for _, each in found])
        self._losses.copy_(losses)
        torch.sum(torch.stack([weighted(losses, items), items]), 1, out=self._sums)
