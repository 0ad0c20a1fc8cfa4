"""The only caller of torch.distributed: starting ranks, groups of a mesh, and the collectives we launch.

Groups are made once per mesh and only for axes of degree above one; an axis of degree one has no group and
its collectives are no-ops, so callers need no special case.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshwright.parallel.errors import MeshError
from meshwright.parallel.mesh import AXES, Mesh

__all__ = [
    "Groups",
    "PaperAxis",
    "Pending",
    "ProcessAxis",
    "World",
    "gather_integers",
    "start_ranks",
    "stop_ranks",
    "world",
]


@dataclass(frozen=True)
class World:
    """Where this process stands among all ranks."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def world(environment: Mapping[str, str] | None = None) -> World:
    """Reads the position of this process from the variables that torchrun sets; one rank where there are none.

    >>> world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    World(rank=3, world_size=4, local_rank=1, local_world_size=2)
    >>> world({})
    World(rank=0, world_size=1, local_rank=0, local_world_size=1)
    """
    found = os.environ if environment is None else environment
    rank = int(found.get("RANK", "0"))
    world_size = int(found.get("WORLD_SIZE", "1"))
    local_rank = int(found.get("LOCAL_RANK", str(rank)))
    return World(rank, world_size, local_rank, int(found.get("LOCAL_WORLD_SIZE", str(world_size))))


def start_ranks(
    init_method: str | None = None,
    *,
    device: str = "cpu",
    position: World | None = None,
    timeout_s: float = 1800.0,
) -> World:
    """Joins this process to the others: gloo on CPU, NCCL (with gloo for CPU tensors) on GPU.

    Args:
        init_method: `file:///path` or `tcp://host:port`; None reads MASTER_ADDR and MASTER_PORT.
        device: "cpu" or "cuda".
        position: this process among the ranks; None reads torchrun's environment.
        timeout_s: how long a collective may wait for the others.
    """
    here = position or world()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(here.local_rank)
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=here.rank,
        world_size=here.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return here


def stop_ranks() -> None:
    """Leaves the process group; does nothing where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather_integers(value: int) -> list[int]:
    """One 62-bit integer of every running rank, in rank order; also a barrier.

    >>> gather_integers(3)
    [3]
    """
    if not dist.is_initialized():
        return [value]
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([value]))
    return [int(part) for part in parts]


class Pending:
    """A collective in flight; `wait` returns when its result may be used, and then calls `told`, if there is one."""

    def __init__(self, work: Any | None) -> None:
        self.told: Callable[[], None] | None = None
        self.work = work

    def wait(self) -> None:
        """Blocks until the collective is done; a collective over one rank is done at once."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.told is not None:
                self.told()


@dataclass(frozen=True, eq=False)
class ProcessAxis:
    """The ranks along one mesh axis as real processes (`exchange.Axis`)."""

    group: Any
    rank: int
    size: int

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
        dist.all_reduce(tensor, op=kind, group=self.group)

    def _all_gather(self, parts: torch.Tensor, mine: torch.Tensor) -> None:
        dist.all_gather_into_tensor(parts, mine, group=self.group)

    def _reduce_scatter(self, mine: torch.Tensor, whole: torch.Tensor) -> None:
        dist.reduce_scatter_tensor(mine, whole, group=self.group)


class PaperAxis(ProcessAxis):
    """An axis whose other ranks are not there: everything but the sending is done, for runs without values."""

    def _all_reduce(self, tensor: torch.Tensor, kind: Any) -> None:
        """Sends nothing."""

    def _all_gather(self, parts: torch.Tensor, mine: torch.Tensor) -> None:
        """Sends nothing."""

    def _reduce_scatter(self, mine: torch.Tensor, whole: torch.Tensor) -> None:
        """Sends nothing."""


def _padded(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = [*tensor.shape]
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


@dataclass
class Groups:
    """The process groups of one mesh, as seen by this rank.

    Raises:
        MeshError: when the number of running ranks is not the mesh's.
    """

    mesh: Mesh
    device_type: str = "cpu"
    rank: int = field(init=False)
    notice: Callable[[Pending], None] | None = field(init=False, default=None)
    _made: dict[tuple[str, ...], Any] = field(init=False, default_factory=dict)
    _device_mesh: DeviceMesh | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        running = dist.get_world_size() if dist.is_initialized() else 1
        if running != self.mesh.world_size:
            raise MeshError(
                f"the mesh {self.mesh} has {self.mesh.world_size} ranks, but {running} are running; "
                f"start {self.mesh.world_size} ranks or change the mesh"
            )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if self.active:
            sizes = tuple(self.mesh.degree(axis) for axis in self.active)
            self._device_mesh = init_device_mesh(self.device_type, sizes, mesh_dim_names=self.active)

    @property
    def active(self) -> tuple[str, ...]:
        """Axes of degree above one, outermost first."""
        return tuple(axis for axis in AXES if self.mesh.degree(axis) > 1)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The torch DeviceMesh over the named axes, all of degree above one."""
        assert self._device_mesh is not None, axes
        return self._device_mesh[axes if len(axes) > 1 else axes[0]]

    def size(self, *axes: str) -> int:
        """Number of ranks in this rank's group along `axes`."""
        return len(self.mesh.group(self.rank, axes))

    def group(self, *axes: str) -> Any | None:
        """This rank's process group along `axes`; None where it would hold one rank only."""
        wanted = tuple(axis for axis in self.active if axis in axes)
        if not wanted:
            return None
        if len(wanted) == 1:
            return self.device_mesh(wanted[0]).get_group()
        if wanted not in self._made:
            ranks = [list(group) for group in self.mesh.groups(wanted)]
            self._made[wanted] = dist.new_subgroups_by_enumeration(ranks)[0]
        return self._made[wanted]

    def all_reduce(self, tensor: torch.Tensor, *axes: str) -> Pending:
        """Starts summing `tensor` in place over the ranks along `axes`."""
        group = self.group(*axes)
        return self._started(None if group is None else dist.all_reduce(tensor, group=group, async_op=True))

    def gather_into(self, whole: torch.Tensor, mine: torch.Tensor, axis: str) -> Pending:
        """Starts filling `whole` with every rank's `mine` along an axis of degree above one (1-dim, in order)."""
        return self._started(dist.all_gather_into_tensor(whole, mine, group=self.group(axis), async_op=True))

    def reduce_scatter(self, mine: torch.Tensor, whole: torch.Tensor, axis: str) -> Pending:
        """Starts summing `whole` over an axis of degree above one, of which `mine` gets this rank's part (1-dim)."""
        return self._started(dist.reduce_scatter_tensor(mine, whole, group=self.group(axis), async_op=True))

    def _started(self, work: Any | None) -> Pending:
        pending = Pending(work)
        if self.notice is not None and work is not None:
            self.notice(pending)
        return pending

    def _wide(self, axis: str) -> Any:
        group = self.group(axis)
        assert group is not None, f"axis {axis} has one rank"
        return group

    def send(self, tensor: torch.Tensor, axis: str, to: int, tag: int) -> Pending:
        """Starts sending to the rank at position `to` along an axis of degree above one."""
        group = self._wide(axis)
        return Pending(dist.isend(tensor, dist.get_global_rank(group, to), group=group, tag=tag))

    def receive(self, tensor: torch.Tensor, axis: str, source: int, tag: int) -> Pending:
        """Starts receiving from the rank at position `source` along an axis of degree above one."""
        group = self._wide(axis)
        return Pending(dist.irecv(tensor, dist.get_global_rank(group, source), group=group, tag=tag))

    def tell(self, value: Any, axis: str, source: int) -> Any:
        """The object that the rank at position `source` along an axis gives; every rank must ask."""
        group = self._wide(axis)
        told = [value]
        dist.broadcast_object_list(told, dist.get_global_rank(group, source), group=group, device=torch.device("cpu"))
        return told[0]

    def axis(self, name: str) -> "ProcessAxis":
        """The ranks along one axis of degree above one."""
        group = self.group(name)
        assert group is not None, name
        return ProcessAxis(group, self.mesh.coordinates(self.rank)[name], self.mesh.degree(name))

    def all_gather(self, tensor: torch.Tensor, *axes: str) -> list[torch.Tensor]:
        """Every rank's `tensor` along `axes`, in group order; all of one shape."""
        group = self.group(*axes)
        if group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor, group=group)
        return parts
