"""Messages between neighbours along one mesh axis."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.collectives import Groups
from meshwright.parallel.connecting import Link, connect_links, connects_late
from meshwright.parallel.pending import Pending
from meshwright.parallel.progress import Call

__all__ = ["Channels"]

_Start = Callable[..., Any]


class Channels:
    """Sends and receives along an axis of degree above one; all ranks must make it at once.

    Messages to lower positions have a group of their own. NCCL knows no tags, and what two ranks send each other could
    get stuck in the one line that their messages form. Gloo's thread, woken by a message, waits for the lock of that
    connection, which the main thread holds as long as it sends there (docs/decisions/0013).

    Args:
        groups: of the mesh.
        axis: of it.
        links: pairs of positions between which there will be messages.
    """

    def __init__(self, groups: Groups, axis: str, links: Iterable[Link]) -> None:
        self._groups = groups
        self._axis = axis
        self._rank = groups.mesh.coordinates(groups.rank)[axis]
        self._up = groups.wide(axis)
        self._down = dist.new_subgroups_by_enumeration([list(group) for group in groups.mesh.groups((axis,))])[0]
        if connects_late(groups.device_type):
            connect_links(groups, links, here=self._rank, up=self._up, down=self._down)
        self._sending, self._receiving = cache(self._sends_to), cache(self._receives_from)

    def send(self, tensor: Tensor, to: int, *, tag: int) -> Pending:
        """Starts sending to the rank at position `to`."""
        start, call = self._sending(to)
        return Pending(start([_real(tensor)], to, tag), call)

    def receive(self, tensor: Tensor, source: int, *, tag: int) -> Pending:
        """Starts receiving from the rank at position `source`."""
        start, call = self._receiving(source)
        return Pending(start([_real(tensor)], source, tag), call)

    # what dist.isend and dist.irecv call, once they have looked the same things up for every message

    def _sends_to(self, to: int) -> tuple[_Start, Call]:
        group = self._down if to < self._rank else self._up
        return group.send, self._call("send", group, to)

    def _receives_from(self, source: int) -> tuple[_Start, Call]:
        group = self._down if self._rank < source else self._up
        return group.recv, self._call("receive", group, source)

    def _call(self, kind: str, group: Any, position: int) -> Call:
        return self._groups.call(kind, self._axis, peer=dist.get_global_rank(group, position))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
