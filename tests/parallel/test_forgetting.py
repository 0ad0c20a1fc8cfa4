import os
from pathlib import Path

import pytest

from meshwright.parallel.mesh import Mesh
from meshwright.testing import run_ranks
from tests.parallel.matrix import Cell

pytestmark = pytest.mark.slow


def _gloo_threads() -> int:
    tasks = Path("/proc/self/task").glob("*/comm")
    return sum(each.read_text().startswith("gloo") for each in tasks)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads as Linux tells them")
def test_ranks_keep_no_thread_of_groups_that_are_gone() -> None:
    Cell("gpt2", {"dp": 2}, {}).run()
    before = run_ranks(_gloo_threads, Mesh(dp=2))
    for family, degrees, options in (
        ("gpt2", {"fsdp": 2}, {"zero_stage": 3}),
        ("llama", {"fsdp": 2, "tp": 2}, {"zero_stage": 2}),
        ("llama", {"dp": 2, "fsdp": 2}, {"zero_stage": 3}),
    ):
        Cell(family, degrees, options).run()
    assert run_ranks(_gloo_threads, Mesh(dp=2)) == before
