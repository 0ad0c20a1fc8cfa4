"""Connections that are made before anything waits for a message.

NCCL connects the ranks of a group at its first collective, and two ranks of a group at their first message: whoever
calls first waits until all have called, and for what its GPU has begun. In the middle of a schedule that never ends: a
receive that was posted early waits for what a rank would compute next. Gloo connects ranks when it makes a group.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from meshwright.parallel.collectives import Groups, groups_made
from meshwright.parallel.errors import MeshError
from meshwright.parallel.mesh import Mesh

__all__ = ["check_transport", "connect_groups", "connect_links", "connects_late"]

Link = tuple[int, int]
"""Two positions along an axis that send each other messages."""

_AT_ONCE = ("gloo", "fake")


def connects_late(device_type: str) -> bool:
    """Whether ranks are connected at first use, by a transport that knows no tags either."""
    return _transport(device_type) not in _AT_ONCE


def check_transport(mesh: Mesh, device_type: str) -> None:
    """Refuses axes whose tensors the running transport cannot carry.

    Raises:
        MeshError: for messages and shards on GPUs over gloo, which ends in a crash there.
    """
    refused = [axis for axis in ("pp", "fsdp") if mesh.degree(axis) > 1]
    if refused and device_type == "cuda" and _transport(device_type) == "gloo":
        raise MeshError(
            f"gloo carries no messages and shards of tensors on a GPU, which {' and '.join(refused)} need; "
            f"start ranks with NCCL (start_ranks(device='cuda'), one GPU for each rank), or keep to dp, tp, cp and ep"
        )


def _transport(device_type: str) -> str:
    pairs = (each.split(":") for each in str(dist.get_backend_config()).split(","))
    return dict(pairs).get(device_type, _AT_ONCE[0])


def connect_groups(groups: Groups) -> None:
    """Has the ranks of every group connected; every rank must ask."""
    if groups.active and connects_late(groups.device_type):
        for group in groups_made(groups):
            dist.all_reduce(torch.zeros(1, device=groups.device_type), group=group)
            _finish(groups)


def connect_links(groups: Groups, links: Iterable[Link], *, here: int, up: Any, down: Any) -> None:
    """Has both ranks of every link connected, in both directions; every rank of the axis must ask.

    Args:
        groups: of the mesh.
        links: of an axis, the same on every rank.
        here: this rank's position along it.
        up: the group for messages to higher positions.
        down: the group for messages to lower positions.
    """
    for low, high in sorted({(min(link), max(link)) for link in links}):  # in one order, so that nobody waits in a ring
        for group, sender, receiver in ((up, low, high), (down, high, low)):
            value = torch.zeros(1, device=groups.device_type)
            if here == sender:
                group.send([value], receiver, 0).wait()
            elif here == receiver:
                group.recv([value], sender, 0).wait()
            _finish(groups)


def _finish(groups: Groups) -> None:
    if groups.device_type == "cuda":
        torch.cuda.synchronize()
