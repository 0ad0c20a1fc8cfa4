"""What carries a run id in its environment is found and killed; nothing else is."""

import os
import subprocess
import sys

import pytest

from meshwright.clusters import sweep as module
from meshwright.clusters.sweep import carriers, sweep


def test_only_the_carriers_of_a_run_are_killed() -> None:
    def child(**env: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(["sleep", "60"], env=os.environ | env, start_new_session=True)

    run_id = f"sweep-{os.getpid()}"
    ours = [child(MESHWRIGHT_RUN_ID=run_id, MESHWRIGHT_NODE=node) for node in "01"]
    others = [child(MESHWRIGHT_RUN_ID=f"{run_id}x"), child(NOTE=f"MESHWRIGHT_RUN_ID={run_id}")]
    try:
        assert set(carriers(run_id)) == {each.pid for each in ours}
        assert sweep(run_id, node=1) == 1
        assert ours[1].wait(5) == -9
        assert sweep(run_id) == 1
        assert ours[0].wait(5) == -9
        assert [each.poll() for each in others] == [None, None]
    finally:
        for each in [*ours, *others]:
            each.kill()
            each.wait()


def test_a_process_that_is_only_not_reaped_counts_as_gone() -> None:
    run_id = f"zombie-{os.getpid()}"
    child = subprocess.Popen(["true"], env=os.environ | {"MESHWRIGHT_RUN_ID": run_id})
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert list(carriers(run_id)) == []
    assert child.wait() == 0


def test_who_sweeps_after_an_attempt_leaves_the_next_one_alone() -> None:
    run_id = f"next-{os.getpid()}"
    told = {"MESHWRIGHT_RUN_ID": run_id, "MESHWRIGHT_NODE": "0"}
    attempts = [
        subprocess.Popen(["sleep", "60"], env=os.environ | told | {"TORCHELASTIC_RESTART_COUNT": number})
        for number in "01"
    ]
    try:
        words = [sys.executable, "-I", "-S", str(module.__file__), run_id, "0", "0"]
        subprocess.run(words, input=b"", check=True, timeout=60)
        assert attempts[0].wait(5) == -9
        assert attempts[1].poll() is None
    finally:
        for each in attempts:
            each.kill()
            each.wait()


def test_a_process_that_one_look_misses_since_it_just_executes_a_program_is_found_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_id, look, missed = f"missed-{os.getpid()}", module.carriers, [True]
    child = subprocess.Popen(["sleep", "60"], env=os.environ | {"MESHWRIGHT_RUN_ID": run_id}, start_new_session=True)
    monkeypatch.setattr(module, "carriers", lambda *asked: () if missed and missed.pop() else look(*asked))
    try:
        assert sweep(run_id) == 1
        assert child.wait(5) == -9
    finally:
        child.kill()
        child.wait()
