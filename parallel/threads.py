"""Ranks of one axis as threads of this process, for proofs that need no process group."""

from collections.abc import Callable
from contextvars import copy_context
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any, TypeVar

import torch
from torch import Tensor

from meshwright.parallel.context.dealing import Dealing

__all__ = ["ThreadAxis", "run_threads"]

Result = TypeVar("Result")


class ThreadAxis:
    """One of several threads that stand for ranks (`exchange.Axis`); sums are taken in rank order.

    Attributes:
        calls: (kind, elements of the whole tensor) of every collective this rank took part in.
    """

    def __init__(self, rank: int, size: int, barrier: Barrier, slots: list[Any]) -> None:
        self.rank = rank
        self.size = size
        self.dealing = Dealing("contiguous", size)
        self.calls: list[tuple[str, int]] = []
        self._barrier = barrier
        self._slots = slots

    def unnoted(self) -> "ThreadAxis":
        """The same rank, whose calls are not among these."""
        return ThreadAxis(self.rank, self.size, self._barrier, self._slots)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums over the axis in place."""
        self.calls.append(("all_reduce", tensor.numel()))
        tensor.copy_(self._met(tensor, lambda parts: torch.stack(parts).sum(0)))
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Element-wise maximum over the axis in place."""
        self.calls.append(("all_reduce", tensor.numel()))
        tensor.copy_(self._met(tensor, lambda parts: torch.stack(parts).amax(0)))
        return tensor

    def gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Joins the shares of all ranks along `dim`."""
        self.calls.append(("all_gather", tensor.numel() // max(tensor.shape[dim], 1) * max(sizes) * self.size))
        return self._met(tensor, lambda parts: torch.cat(parts, dim))

    def scatter_sum(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Sums over the axis and keeps this rank's share along `dim`."""
        self.calls.append(("reduce_scatter", tensor.numel() // max(tensor.shape[dim], 1) * max(sizes) * self.size))
        whole = self._met(tensor, lambda parts: torch.stack(parts).sum(0))
        return whole.narrow(dim, sum(sizes[: self.rank]), sizes[self.rank]).clone()

    def _met(self, tensor: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self._slots[self.rank] = tensor.detach()
        self._barrier.wait()
        combined = combine(list(self._slots))
        self._barrier.wait()
        return combined


def run_threads(work: Callable[[ThreadAxis], Result], size: int) -> list[Result]:
    """Runs `work` on `size` threads; an error of the first thread that failed is raised here.

    >>> run_threads(lambda axis: axis.sum(torch.tensor([axis.rank + 1])).item(), 3)
    [6, 6, 6]
    """
    barrier = Barrier(size)
    slots: list[Any] = [None] * size
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadAxis(rank, size, barrier, slots))
        except BrokenBarrierError:
            return
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [Thread(target=copy_context().run, args=(run, rank), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
