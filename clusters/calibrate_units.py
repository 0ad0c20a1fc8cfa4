"""What the units of `fully_shard` take of a rank's thread besides their collectives: hooks, views and copies in Python.

A unit gathers its parameters and frees them again, and sums their gradients, each with dozens of short operations. On
GPUs they are started ahead; a CPU that computes has to do them in between.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["handled_s"]

_UNITS, _WIDTH, _ROUNDS = 8, 8, 9


def handled_s(group: Any) -> float:
    """Seconds of a gather or a reduction of one unit; every rank of the group must ask.

    Units are layers with the parameters of a decoder's block, as small as may be: neither their bytes nor their
    operations count, and waiting for others does not.

    Args:
        group: of the ranks that share parameters.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = _layers(), _layers()
    mesh = DeviceMesh.from_group(group, "cpu")
    for each in (*sharded, sharded):
        fully_shard(each, mesh=mesh)
    calls = 3 * _UNITS  # gathered for each direction, and reduced
    return max(0.0, _own_s(_step(sharded)) - _own_s(_step(plain))) / calls


def _layers() -> "nn.Sequential":
    from torch import nn

    return nn.Sequential(*(nn.TransformerEncoderLayer(_WIDTH, 1, _WIDTH, 0.0) for _ in range(_UNITS)))


def _step(layers: "nn.Sequential") -> Callable[[], None]:
    """Forward and backward of one token."""
    import torch

    values = torch.zeros(1, 1, _WIDTH)

    def step() -> None:
        layers(values).sum().backward()

    return step


def _own_s(step: Callable[[], None]) -> float:
    """The shortest of several rounds, by the thread's own clock."""
    found = []
    for _ in range(_ROUNDS):
        start_s = time.thread_time()
        step()
        found.append(time.thread_time() - start_s)
    return min(found)
