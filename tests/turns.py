"""Which file of tests a worker of `make test` takes next: long ones first, and never all of a kind at once.

Tests that launch wait for their processes half of the time, others keep a core busy. By the number of its tests, as
xdist would go, a file of three that take two minutes comes near the end.
"""

from collections.abc import Iterable
from typing import Any

__all__ = ["COMPUTING", "WAITING", "in_turn", "pick"]

WAITING = (
    "tests/launch/test_batch.py",
    "tests/launch/test_elastic_jobsets.py",
    "tests/launch/test_jobsets.py",
    "tests/launch/test_sweeping.py",
    "tests/launch/test_launch.py",
    "tests/clusters/test_pod.py",
    "tests/clusters/test_elastic.py",
    "tests/parallel/test_forks.py",
    "tests/house/test_docs.py",
    "tests/launch/test_fetch.py",
    "tests/clusters/test_calibrate.py",
    "tests/launch/test_relaunch.py",
    "tests/launch/worker/test_faults.py",
    "tests/launch/worker/test_train.py",
    "tests/launch/worker/test_experts.py",
    "tests/launch/worker/test_hang.py",
    "tests/clusters/test_rounds.py",
    "tests/launch/test_secrets.py",
    "tests/launch/test_health_lines.py",
    "tests/launch/page/test_browser.py",
)
"""Files whose tests mostly wait, the longest first."""
COMPUTING = (
    "tests/parallel/test_fake_rank.py",
    "tests/launch/paper/test_hosted.py",
    "tests/parallel/test_experts.py",
    "tests/parallel/test_matrix.py",
    "tests/parallel/test_staged.py",
    "tests/clusters/simulated/test_family.py",
)
"""Of the others those that take long, the longest first."""


def pick(files: Iterable[str], *, waits: bool) -> str | None:
    """The file for a worker, None for any.

    Args:
        files: that nobody has taken.
        waits: whether it takes those that wait first.

    >>> files = ["tests/x.py", "tests/parallel/test_matrix.py", "tests/launch/test_fetch.py"]
    >>> pick(files, waits=True), pick(files, waits=False), pick(files[:1], waits=True)
    ('tests/launch/test_fetch.py', 'tests/parallel/test_matrix.py', None)
    """
    left = set(files)
    order = (*WAITING, *COMPUTING) if waits else (*COMPUTING, *WAITING)
    return next((each for each in order if each in left), None)


def in_turn(config: Any, log: Any) -> Any:
    """xdist's scheduler for whole files, with another order: every second worker begins with files that wait."""
    from xdist.scheduler import LoadFileScheduling

    class InTurn(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            picked = pick(self.workqueue, waits=self.nodes.index(node) % 2 == 0)
            if picked is not None:
                self.workqueue.move_to_end(picked, last=False)
            super()._assign_work_unit(node)

    return InTurn(config, log)
