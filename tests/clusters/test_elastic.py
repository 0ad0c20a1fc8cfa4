"""A node whose ranks hang starts them again or not, as the plan says, with nobody telling it to."""

import sys
from pathlib import Path

import pytest

from meshwright.clusters.base import Limits, Program, StartRequest
from meshwright.clusters.local import LocalCluster, Machine, plan_local
from tests.launch.own import own

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("action", "starts"), [("dump_and_restart", 2), ("dump_and_stop", 1)])
def test_ranks_that_hang_are_started_again_only_if_asked(tmp_path: Path, action: str, starts: int) -> None:
    for name in ("logs", "private", "ranks"):
        (tmp_path / name).mkdir()
    request = StartRequest(
        name="j",
        run_id=own(f"hang-{action}"),
        run_dir=tmp_path,
        program=Program((sys.executable, "-c", "raise SystemExit(125)"), tmp_path),
        limits=Limits(max_restarts=1, hang_s=9.0, hang_action=action),
    )
    handle = LocalCluster().start(plan_local(request, Machine("box", 1)), {})
    events = []
    try:
        while not handle.done:
            events += handle.poll(1.0)
    finally:
        handle.kill()
    assert [event["event"] for event in events].count("started") == starts
