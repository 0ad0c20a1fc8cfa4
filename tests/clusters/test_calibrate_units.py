"""What units of `fully_shard` take of a thread: by how much sharded layers keep it longer than whole ones."""

import time

import torch.distributed as dist

from meshwright.clusters import calibrate_units
from meshwright.clusters.calibrate_units import handled_s
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks


def test_a_unit_takes_each_rank_less_than_a_moment_and_more_than_nothing() -> None:
    found = run_ranks(lambda: handled_s(dist.group.WORLD), Mesh(dp=2))
    assert all(0 < each < 0.1 for each in found), found


def test_waiting_for_others_does_not_count() -> None:
    assert calibrate_units._own_s(lambda: time.sleep(0.01)) < 0.005
