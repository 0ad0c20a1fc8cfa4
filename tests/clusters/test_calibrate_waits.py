"""How long ranks wait for one another: all are told the same, and what other programs take does not count."""

import torch.distributed as dist

from meshwright.clusters.calibrate_waits import steadied, unsteadiness
from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks


def _waited() -> float:
    return unsteadiness(dist.group.WORLD, turns=1.0)


def test_ranks_agree_on_what_they_wait() -> None:
    first, second = run_ranks(_waited, Mesh(dp=2))
    assert first == second >= 0


def test_ranks_are_not_said_to_take_longer_than_their_turns() -> None:
    assert run_ranks(lambda: unsteadiness(dist.group.WORLD, turns=1e6), Mesh(dp=2)) == [0.0, 0.0]


def test_the_longest_rounds_are_other_programs() -> None:
    assert steadied([0.5] * 18 + [9.0, 9.0]) == 0.5
    assert steadied([5.0]) == 5.0
