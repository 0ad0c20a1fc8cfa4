"""The only caller of torch.distributed, with `axis`: starting ranks, groups of a mesh, and the collectives we launch.

Groups are made once per mesh and only for axes of degree above one; an axis of degree one has no group and
its collectives are no-ops, so callers need no special case.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meshwright.parallel.axis import ProcessAxis
from meshwright.parallel.errors import MeshError
from meshwright.parallel.folding import FOLDS, fold_groups, ranks_along
from meshwright.parallel.forgetting import forget_meshes
from meshwright.parallel.mesh import AXES, Mesh
from meshwright.parallel.pending import Pending
from meshwright.parallel.progress import HERE, Call, Waiting
from meshwright.parallel.watchdog import guard, unguard

__all__ = [
    "Groups",
    "Pending",
    "ProcessAxis",
    "World",
    "gather_integers",
    "groups_made",
    "start_ranks",
    "stop_ranks",
    "sum_integers",
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
    hang_s: float | None = None,
) -> World:
    """Joins this process to the others: gloo on CPU, NCCL (with gloo for CPU tensors) on GPU.

    Args:
        init_method: `file:///path` or `tcp://host:port`; None reads MASTER_ADDR and MASTER_PORT.
        device: "cpu" or "cuda".
        position: this process among the ranks; None reads torchrun's environment.
        timeout_s: how long a collective may wait for the others.
        hang_s: how long all ranks may stand still before this one ends with the name of the one that is behind; 0 is
            for ever, None reads MESHWRIGHT_HANG_S, which a job with `failure.hang` sets.
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
    HERE.restart()
    guard(here.rank, here.world_size, hang_s=hang_s, meeting=init_method, store=_own_store)
    return here


def _own_store() -> Any:
    """A connection of its own to the ranks' store: the main thread may be waiting on the other one."""
    store: Any = dist.distributed_c10d._get_default_store()
    return store.clone()


def stop_ranks() -> None:
    """Leaves the process group; does nothing where there is none."""
    unguard()
    if dist.is_initialized():
        dist.destroy_process_group()
        forget_meshes()


@cache
def _everybody(rank: int, world_size: int) -> Call:
    return Call("integers of all ranks", tuple(each for each in range(world_size) if each != rank))


def gather_integers(value: int) -> list[int]:
    """One 62-bit integer of every running rank, in rank order; also a barrier.

    >>> gather_integers(3)
    [3]
    """
    if not dist.is_initialized():
        return [value]
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    call = _everybody(dist.get_rank(), dist.get_world_size())
    with Waiting(call, call.begun()):
        dist.all_gather(parts, torch.tensor([value]))
    return [int(part) for part in parts]


def sum_integers(integers: torch.Tensor) -> torch.Tensor:
    """The sum over all running ranks of an int64 tensor of one shape, on the CPU; also a barrier.

    >>> sum_integers(torch.tensor([3, 4])).tolist()
    [3, 4]
    """
    found = integers.to("cpu", copy=True)
    if dist.is_initialized():
        call = _everybody(dist.get_rank(), dist.get_world_size())
        with Waiting(call, call.begun()):
            dist.all_reduce(found)
    return found


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
    _calls: dict[tuple[str | int | None, ...], Call] = field(init=False, default_factory=dict)
    _device_mesh: DeviceMesh | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        running = dist.get_world_size() if dist.is_initialized() else 1
        if running != self.mesh.world_size:
            raise MeshError(
                f"the mesh {self.mesh} has {self.mesh.world_size} ranks, but {running} are running; "
                f"start {self.mesh.world_size} ranks or change the mesh"
            )
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        here = self.mesh.coordinates(self.rank)
        HERE.place = ", ".join(f"{axis}={here[axis]}" for axis in self.active)
        if self.active:
            sizes = tuple(self.mesh.degree(axis) for axis in self.active)
            self._device_mesh = init_device_mesh(self.device_type, sizes, mesh_dim_names=self.active)

    @property
    def active(self) -> tuple[str, ...]:
        """Axes of degree above one, outermost first."""
        return tuple(axis for axis in AXES if self.mesh.degree(axis) > 1)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The torch DeviceMesh over the named axes, all of degree above one, or over one fold of experts."""
        if axes[0] in FOLDS:
            return DeviceMesh.from_group(self.wide(axes[0]), self.device_type, mesh_dim_names=axes)
        assert self._device_mesh is not None, axes
        return self._device_mesh[axes if len(axes) > 1 else axes[0]]

    def size(self, *axes: str) -> int:
        """Number of ranks in this rank's group along `axes`."""
        return len(self.ranks(*axes))

    def ranks(self, *axes: str) -> tuple[int, ...]:
        """This rank's group along `axes`, or along one fold of experts ("ep", "edp", see `folding`)."""
        return ranks_along(self.mesh, self.rank, *axes)

    def group(self, *axes: str) -> Any | None:
        """This rank's process group along `axes`, or one fold of experts; None where it would hold one rank only."""
        if len(self.ranks(*axes)) == 1:
            return None
        wanted = tuple(axis for axis in (*self.active, *FOLDS) if axis in axes)
        if wanted[0] not in FOLDS and len(wanted) == 1:
            return self.device_mesh(wanted[0]).get_group()
        if wanted not in self._made:
            folded = next((fold for fold in FOLDS if fold in wanted), None)
            groups = self.mesh.groups(wanted) if folded is None else fold_groups(self.mesh, folded)
            self._made[wanted] = dist.new_subgroups_by_enumeration([list(each) for each in groups], group_desc=folded)[
                0
            ]
        return self._made[wanted]

    def call(self, kind: str, *axes: str, peer: int | None = None) -> Call:
        """What waiting for such a collective, or for one rank, is called."""
        key = (kind, *axes, peer)
        found = self._calls.get(key)
        if found is None:
            words = f"{kind} over {' x '.join(axis for axis in (*self.active, *FOLDS) if axis in axes)}"
            ranks = self.ranks(*axes) if peer is None else (peer,)
            others = tuple(rank for rank in ranks if rank != self.rank)
            found = self._calls[key] = Call(words, others, together=peer is None)
        return found

    def all_reduce(self, tensor: torch.Tensor, *axes: str) -> Pending:
        """Starts summing `tensor` in place over the ranks along `axes`."""
        group = self.group(*axes)
        if group is None:
            return Pending(None)
        work = dist.all_reduce(tensor, group=group, async_op=True)
        return _started(self, work, self.call("all_reduce", *axes))

    def gather_into(self, whole: torch.Tensor, mine: torch.Tensor, axis: str) -> Pending:
        """Starts filling `whole` with every rank's `mine` along an axis of degree above one (1-dim, in order)."""
        work = dist.all_gather_into_tensor(whole, mine, group=self.group(axis), async_op=True)
        return _started(self, work, self.call("all_gather", axis))

    def reduce_scatter(self, mine: torch.Tensor, whole: torch.Tensor, axis: str) -> Pending:
        """Starts summing `whole` over an axis of degree above one, of which `mine` gets this rank's part (1-dim)."""
        work = dist.reduce_scatter_tensor(mine, whole, group=self.group(axis), async_op=True)
        return _started(self, work, self.call("reduce_scatter", axis))

    def flags(self, summed: torch.Tensor) -> list[bool]:
        """Which flags some rank raised, of sums over ranks (1-dim)."""
        return [total > 0 for total in summed.tolist()]

    def wide(self, axis: str) -> Any:
        """This rank's process group along an axis of degree above one."""
        group = self.group(axis)
        assert group is not None, f"axis {axis} has one rank"
        return group

    def tell(self, value: Any, axis: str, source: int) -> Any:
        """The object that the rank at position `source` along an axis gives; every rank must ask."""
        group = self.wide(axis)
        told = [value]
        call, sender = self.call("broadcast", axis), dist.get_global_rank(group, source)
        with Waiting(call, call.begun()):
            dist.broadcast_object_list(told, sender, group=group, device=torch.device("cpu"))
        return told[0]

    def axis(self, name: str) -> "ProcessAxis":
        """The ranks along one axis of degree above one."""
        here = self.mesh.coordinates(self.rank)[name]
        return ProcessAxis(self.wide(name), here, self.mesh.degree(name), self.call("collective", name))

    def all_gather(self, tensor: torch.Tensor, *axes: str) -> list[torch.Tensor]:
        """Every rank's `tensor` along `axes`, in group order; all of one shape."""
        group = self.group(*axes)
        if group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        call = self.call("all_gather", *axes)
        with Waiting(call, call.begun()):
            dist.all_gather(parts, tensor, group=group)
        return parts


def groups_made(groups: Groups) -> list[Any]:
    """A rank's process groups so far, in the order in which all ranks made them."""
    return [*(groups.wide(axis) for axis in groups.active), *groups._made.values()]


def _started(groups: Groups, work: Any, call: Call) -> Pending:
    pending = Pending(work, call)
    if groups.notice is not None:
        groups.notice(pending)
    return pending
