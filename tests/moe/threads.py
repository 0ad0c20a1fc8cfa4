"""Ranks as threads of one process: transports without process groups, for tests that are quick."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from meshwright.moe.axes import ExpertAxes, RowAxis
from meshwright.parallel.folding import Fold, fold_groups
from meshwright.parallel.mesh import Mesh

__all__ = ["on_threads"]

PATIENCE_S = 20.0


class _Board:
    """Where the ranks of one group hand things to each other."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self.given: list[Any] = [None] * size

    def all(self, rank: int, own: Any) -> list[Any]:
        self.given[rank] = own
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found


class ThreadAxis(RowAxis):
    """Threads that exchange rows; notes what it was asked for."""

    def exchange(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        cut = self._all([each.detach().clone() for each in rows.split(list(sent))])
        parts = [each[self.rank] for each in cut]
        assert [len(each) for each in parts] == list(received)
        return torch.cat(parts)

    def gather(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        parts = self._all(tensor.detach().clone())
        assert [each.shape[dim] for each in parts] == sizes
        return torch.cat(parts, dim)

    def scatter_sum(self, tensor: Tensor, sizes: list[int], dim: int) -> Tensor:
        whole = torch.stack(self._all(tensor.detach().clone())).sum(0)
        return whole.split(sizes, dim)[self.rank]

    def _all(self, own: Any) -> list[Any]:
        return self.group.all(self.rank, own) if self.size > 1 else [own]


def on_threads(mesh: Mesh, work: Callable[[int, ExpertAxes], Any]) -> list[Any]:
    """What each rank of a mesh makes of `work(rank, axes)`."""
    boards: list[_Board] = []
    folds: tuple[Fold, ...] = ("ep", "ep_node", "ep_local")
    axes: list[dict[str, ThreadAxis]] = [{} for _ in range(mesh.world_size)]
    for fold in folds:
        for ranks in fold_groups(mesh, fold):
            boards.append(board := _Board(len(ranks)))
            for place, rank in enumerate(ranks):
                axes[rank][fold] = ThreadAxis(board, place, len(ranks))

    def of(rank: int) -> Any:
        try:
            return work(rank, ExpertAxes(*(axes[rank][fold] for fold in folds)))
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            for each in boards:
                each.barrier.abort()
            raise

    with ThreadPoolExecutor(mesh.world_size) as pool:
        waiting = [pool.submit(of, rank) for rank in range(mesh.world_size)]
        errors = [error for each in waiting if (error := each.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [each.result() for each in waiting]
