"""An exchange of rows that is on its way while this rank computes something else, and so is that of its gradients.

  forward     leave (starts)  ->  what lies between  ->  arrive (waits)
  backward    arrive starts   ->  what lies between  ->  leave waits

Between the two, autograd goes back through what forward computed between them: it takes the latest node that is ready.
What is sent, what arrives and how it is added are those of `travel.exchange`, hence the same bits. A backward that is
itself differentiated exchanges at once. All ranks must do both, in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function

from meshwright.moe.axes import RowAxis
from meshwright.moe.travel import Splits, exchange, packed, unpacked
from meshwright.parallel.progress import Waiting

__all__ = ["Flight", "begun"]


class Flight:
    """One exchange; see `travel.exchange` for what it sends.

    Args:
        axis: the ranks.
        splits: rows for each of them and from each.

    >>> flight = Flight(RowAxis(None, 0, 1), Splits((2,), (2,)))
    >>> flight.leave(torch.tensor([5.0, 6.0]))
    >>> flight.arrive()
    (tensor([5., 6.]),)
    """

    def __init__(self, axis: RowAxis, splits: Splits) -> None:
        self.axis = axis
        self.splits = splits
        self.wanted: tuple[int, ...] = ()
        self.finish: Callable[[], Tensor] | None = None
        self._promised: tuple[Tensor, ...] = ()

    def leave(self, *tensors: Tensor) -> None:
        """Starts; nothing of what is sent may be changed before it has arrived."""
        self._promised = _Leave.apply(self, *tensors)  # type: ignore[no-untyped-call]

    def arrive(self) -> tuple[Tensor, ...]:
        """Waits for what is received, a tensor for each that was sent."""
        promised, self._promised = self._promised, ()
        return _Arrive.apply(self, *promised)  # type: ignore[no-any-return, no-untyped-call]

    def start(self, tensors: Sequence[Tensor], splits: Splits) -> None:
        """Sends several tensors in one message to each rank."""
        self.finish = begun(self.axis, packed(tensors), splits)

    def finished(self, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What was received, of the dtypes and widths of other tensors."""
        assert self.finish is not None, f"nothing is on its way over {self.axis}"
        arrived, self.finish = self.finish(), None
        return unpacked(arrived, like)


def begun(axis: RowAxis, rows: Tensor, splits: Splits) -> Callable[[], Tensor]:
    """Starts an exchange; gives what waits for it. Ranks that are not processes exchange at once.

    Args:
        axis: the ranks.
        rows: [sum of sent, ...]
        splits: rows for each rank and from each.
    """
    if axis.size == 1 or not isinstance(axis.group, dist.ProcessGroup):
        made = axis.exchange(rows, splits.sent, splits.received)
        return lambda: made
    leaving = rows.contiguous()
    arrived = rows.new_empty(sum(splits.received), *rows.shape[1:])
    number = axis.call.begun()
    sizes = (list(splits.received), list(splits.sent))
    work = dist.all_to_all_single(arrived, leaving, *sizes, group=axis.group, async_op=True)

    def wait() -> Tensor:
        with Waiting(axis.call, number):
            work.wait()
        return arrived

    return wait


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight.wanted = tuple(number for number in range(len(tensors)) if ctx.needs_input_grad[number + 1])
        flight.start(tensors, flight.splits)
        number = sum(flight.splits.received)
        promised = tuple(each.new_zeros(()).expand(number, *each.shape[1:]) for each in tensors)
        ctx.mark_non_differentiable(*(each for each in promised if not each.is_floating_point()))
        return promised

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        flight = ctx.flight
        wanted = [gradients[number] for number in flight.wanted]
        at_once = flight.finish is None
        parts = exchange(flight.axis, flight.splits.back, *wanted) if at_once else flight.finished(wanted)
        found = dict(zip(flight.wanted, parts, strict=True))
        return None, *map(found.get, range(len(gradients)))


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *promised: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        arrived = flight.finished(promised)
        ctx.mark_non_differentiable(*(each for each in arrived if not each.is_floating_point()))
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        flight = ctx.flight
        if not torch.is_grad_enabled() and flight.wanted:
            flight.start([gradients[number] for number in flight.wanted], flight.splits.back)
        return None, *gradients
