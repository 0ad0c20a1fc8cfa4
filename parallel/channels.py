"""Messages between neighbours along one mesh axis."""

import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.collectives import Groups
from meshwright.parallel.pending import Pending

__all__ = ["Channels"]


class Channels:
    """Sends and receives along an axis of degree above one; all ranks must make it at once.

    NCCL knows no tags, and its messages between two ranks form one line, in which what they send each other could get
    stuck. On GPUs the messages to lower positions therefore have a group of their own.
    """

    def __init__(self, groups: Groups, axis: str) -> None:
        self._groups = groups
        self._axis = axis
        self._rank = groups.mesh.coordinates(groups.rank)[axis]
        self._up = self._down = groups.wide(axis)
        if groups.device_type == "cuda":
            ranks = [list(group) for group in groups.mesh.groups((axis,))]
            self._down = dist.new_subgroups_by_enumeration(ranks)[0]

    def send(self, tensor: Tensor, to: int, *, tag: int) -> Pending:
        """Starts sending to the rank at position `to`."""
        group = self._down if to < self._rank else self._up
        rank = dist.get_global_rank(group, to)
        return Pending(dist.isend(tensor, rank, group=group, tag=tag), self._groups.call("send", self._axis, peer=rank))

    def receive(self, tensor: Tensor, source: int, *, tag: int) -> Pending:
        """Starts receiving from the rank at position `source`."""
        group = self._down if self._rank < source else self._up
        rank = dist.get_global_rank(group, source)
        call = self._groups.call("receive", self._axis, peer=rank)
        return Pending(dist.irecv(tensor, rank, group=group, tag=tag), call)
