"""A run under mpiexec: that it is told once, by whom it ended, and that nothing of it is left."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.base import Limits
from meshwright.clusters.mpi import MpiOptions, plan_mpi
from meshwright.clusters.mpi_handle import MpiHandle
from tests.clusters.test_mpi import REQUEST
from tests.launch.waiting import eventually


def told(handle: MpiHandle, found: list[dict[str, Any]]) -> bool:
    """Takes what an mpiexec has to say; whether that is all."""
    found += handle.poll(0.1)
    return handle.done


def test_an_mpiexec_that_ends_is_told_once_and_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path), MpiOptions("mpich"))
    plan = replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", "echo no event; exit 7")),))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        handle = MpiHandle(plan, {})
        handle.kill()
        (gone,) = handle.poll(0.0)
        assert (gone["event"], gone["code"]) == ("gone", 7)
        assert handle.done
        assert handle.poll(0.0) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_mpiexec_under_which_no_rank_says_a_word_is_ended_after_the_time_to_join(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    request = replace(REQUEST, run_dir=tmp_path, limits=Limits(join_timeout_s=0.3))
    plan = plan_mpi(request, MpiOptions("mpich"))
    words = "echo 'ssh: connect to host b port 22: refused' >&2; exec sleep 600"
    handle = MpiHandle(replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", words)),)), {})
    found: list[dict[str, Any]] = []
    assert eventually(lambda: told(handle, found), 60)
    assert found[0]["message"] == "host b cannot be reached (mpiexec ended with code -15)"
    handle.kill()


def test_an_mpiexec_whose_ranks_have_spoken_may_take_its_time(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path, limits=Limits(join_timeout_s=0.3)), MpiOptions("mpich"))
    words = """echo '{"event": "started"}'; sleep 2; exit 7"""
    handle = MpiHandle(replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", words)),)), {})
    found = handle.poll(10.0)
    assert eventually(lambda: told(handle, found), 60)
    assert [(each["event"], each.get("code")) for each in found] == [("started", None), ("gone", 7)]
    handle.kill()


def test_a_host_that_is_named_after_mpiexec_has_ended_is_the_lost_one(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path), MpiOptions("mpich"))
    name = plan.nodes[0].name
    words = f"(exec >/dev/null; sleep 0.3; echo 'ssh: connect to host {name} port 22: refused' >&2) & exit 255"
    handle = MpiHandle(replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", words)),)), {})
    found: list[dict[str, Any]] = []
    assert eventually(lambda: told(handle, found), 60)
    assert [(each["node"], each.get("lost")) for each in found] == [(name, None)]
    handle.kill()


def test_nothing_is_waited_for_where_a_rank_has_said_why_mpiexec_ends(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path), MpiOptions("mpich"))
    words = """echo '{"event": "exit", "rank": 0, "code": 7, "ended_by_us": false}'; sleep 0.2; exit 7"""
    looks: list[float] = []
    handle = MpiHandle(replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", words)),)), {})
    look = handle._complained
    handle._complained = lambda most_s: looks.append(most_s) or look(most_s)  # type: ignore[method-assign]
    found: list[dict[str, Any]] = []
    assert eventually(lambda: told(handle, found), 60)
    assert ([each["event"] for each in found], looks) == (["exit", "gone"], [0.0])
    handle.kill()


LACKS, ROOT = "ImportError: libmpi.so.12: no such file", "mpiexec has detected an attempt to run as root."


@pytest.mark.parametrize(("said", "code"), [(LACKS, 70), (ROOT, 77)])
@pytest.mark.parametrize("spoken", ["", """echo '{"event": "started"}';"""])
def test_nodes_that_cannot_start_ranks_are_not_lost_unless_ranks_have_spoken(
    tmp_path: Path, spoken: str, said: str, code: int
) -> None:
    (tmp_path / "logs").mkdir()
    plan = plan_mpi(replace(REQUEST, run_dir=tmp_path), MpiOptions("mpich"))
    words = f"{spoken} echo '{said}' >&2; exit 1"
    handle = MpiHandle(replace(plan, nodes=(replace(plan.nodes[0], agent=("/bin/sh", "-c", words)),)), {})
    found: list[dict[str, Any]] = []
    assert eventually(lambda: told(handle, found), 60)
    assert [each["exit_code"] for each in found if each["event"] == "gone"] == [69 if spoken else code]
    handle.kill()
