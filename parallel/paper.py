"""Any rank of a mesh whose other ranks are not there, for runs on tensors without values.

Torch's own backend "fake" stands for the process group: whoever calls a collective, c10d hands it on as in a run, where
the ledger sees it, and nothing is sent. What code asks of other ranks' values is answered here, the same for all:

  which parameters some rank used     all of them
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from meshwright.parallel.collectives import Groups
from meshwright.parallel.forgetting import forget_meshes
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.progress import HERE

__all__ = ["PaperGroups", "on_paper"]


class PaperGroups(Groups):
    """The process groups of a rank whose other ranks are not there."""

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The torch DeviceMesh over the named axes; its table of ranks has values."""
        with unset_fake_temporarily():
            return super().device_mesh(*axes)

    def flags(self, summed: Tensor) -> list[bool]:
        """Some rank raised each of them."""
        return [True] * summed.numel()


@contextmanager
def on_paper(mesh: Mesh, rank: int, device_type: str = "cpu") -> Iterator[PaperGroups]:
    """What one rank of a mesh sees of torch.distributed; a process group that runs already is put back afterwards.

    Args:
        mesh: of any size.
        rank: of it.
        device_type: of the tensors.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    c10d: Any = dist.distributed_c10d
    world, running, at, place = c10d._world, c10d._world.default_pg, HERE.at, HERE.place
    before, number, hook = set(world.pg_map), world.group_count, sys.excepthook
    c10d._update_default_pg(None)
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.world_size)
        with warnings.catch_warnings():  # of names that newer versions have, which ranks hear too
            warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
            yield PaperGroups(mesh, device_type)
    finally:
        c10d._update_default_pg(running)
        for group in [each for each in world.pg_map if each not in before]:
            dist.destroy_process_group(group)
        world.group_count, sys.excepthook = number, hook  # torch's names the rank before every error
        HERE.at, HERE.place = at, place
        forget_meshes()
