"""A transport that is as strict as NCCL, over gloo: it connects ranks at their first call, and knows no tags.

What would hang on GPUs fails here, by name: a first call that not all of its ranks make, and one that is made while a
receive that was posted before has not arrived. With `one_queue`, each call also keeps all that a rank starts later from
running until it is done, and a send until it is received, as if all streams of a GPU shared one queue.
"""

import time
from collections import Counter
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist

__all__ = ["StrictGroup", "start_strict"]

_PATIENCE_S = 20.0
_POLL_S = 0.002
_NAME = "strict"


class StrictGroup(dist.ProcessGroup):
    """A process group whose ranks meet late.

    Args:
        store: of its own.
        rank: in the group.
        size: of the group.
        timeout: of its calls.
    """

    under_way: ClassVar[list[Any]] = []  # receives of this process, of all groups
    one_queue: ClassVar[bool] = False

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._store = store
        self._called = ""
        self._met: set[str] = set()
        self._lines: Counter[tuple[int, int]] = Counter()

    @property
    def group_name(self) -> str:
        """As torch names it."""
        return self._called

    def _set_group_name(self, name: str) -> None:
        self._called = name

    def getBackendName(self) -> str:
        """As it is registered."""
        return _NAME

    def send(self, tensors: Any, peer: int, tag: int) -> Any:
        """The next message of a line, whatever its tag."""
        del tag
        self._meet_one(peer)
        number = self._next(self.rank(), peer)
        if self.one_queue:
            self._wait_for(f"receive {number} of {peer} from {self.rank()}", 1)
        return self._gloo.send(tensors, peer, number)

    def recv(self, tensors: Any, peer: int, tag: int) -> Any:
        """Likewise."""
        del tag
        self._meet_one(peer)
        number = self._next(peer, self.rank())
        work = _Arrival(self._gloo.recv(tensors, peer, number), self.under_way)
        self.under_way.append(work)
        if self.one_queue:
            self._store.add(f"receive {number} of {self.rank()} from {peer}", 1)
            work.wait(timedelta(seconds=_PATIENCE_S))
        return work

    def _next(self, sender: int, receiver: int) -> int:
        self._lines[sender, receiver] += 1
        return self._lines[sender, receiver]

    def _meet_one(self, peer: int) -> None:
        low, high = sorted((self.rank(), peer))
        self._meet(f"ranks {low} and {high}", 2)

    def _meet(self, who: str, number: int) -> None:
        if who in self._met:
            return
        if self.under_way:
            raise RuntimeError(f"{who} connect while {len(self.under_way)} receives are under way")
        self._met.add(who)
        self._store.add(who, 1)
        self._wait_for(who, number)

    def _wait_for(self, who: str, number: int) -> None:
        end_s = time.monotonic() + _PATIENCE_S
        while self._store.add(who, 0) < number:
            if time.monotonic() > end_s:
                raise RuntimeError(f"rank {self.rank()} waits for {who}")
            time.sleep(_POLL_S)


class _Arrival:
    """A receive on its way."""

    def __init__(self, work: Any, under_way: list[Any]) -> None:
        self._work, self._under_way = work, under_way

    def wait(self, *args: Any) -> Any:
        """Until it is here."""
        if self in self._under_way:  # gloo waits anew whenever it is asked
            self._work.wait(*args)
            self._under_way.remove(self)
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _collective(name: str, *, late: bool) -> Any:
    def call(self: StrictGroup, *args: Any, **options: Any) -> Any:
        if late:
            self._meet("all ranks", self.size())
        work = getattr(self._gloo, name)(*args, **options)
        if late and self.one_queue:
            work.wait(timedelta(seconds=_PATIENCE_S))
        return work

    return call


_OF_HOSTS = "broadcast", "allgather", "barrier"  # what ranks tell each other goes over gloo beside NCCL, too
_BASES = {"all_gather": "_allgather_base", "reduce_scatter": "_reduce_scatter_base"}
_OF_DEVICES = {"allreduce": "allreduce", **{each: each for each in _BASES.values()}}
_OF_DEVICES |= {f"{name}_single": each for name, each in _BASES.items()}  # since torch 2.13
for _name in _OF_HOSTS:
    setattr(StrictGroup, _name, _collective(_name, late=False))
for _name, _of_gloo in _OF_DEVICES.items():
    setattr(StrictGroup, _name, _collective(_of_gloo, late=True))


def start_strict(store: str, rank: int, num_ranks: int, *, one_queue: bool = False) -> None:
    """Joins this process to the others over this transport."""
    StrictGroup.one_queue = one_queue
    if _NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(_NAME, _make, devices=["cpu"])
    dist.init_process_group(_NAME, init_method=store, rank=rank, world_size=num_ranks)


def _make(store: Any, rank: int, size: int, timeout: timedelta) -> StrictGroup:
    return StrictGroup(store, rank, size, timeout)
