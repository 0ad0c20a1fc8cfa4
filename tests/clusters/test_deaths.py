"""Deaths are seen at once, with their own status, and told from those we ordered."""

import os
import signal
import subprocess
import sys
import time

import pytest

from meshwright.clusters.deaths import Death, Deaths


def test_a_stopped_process_obeys_too() -> None:
    process = subprocess.Popen(["/bin/sh", "-c", "kill -STOP $$"], start_new_session=True)
    deaths = Deaths({0: process.pid}, lambda death: None)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    deaths.send(signal.SIGTERM)
    assert deaths.wait(5)
    assert process.wait() == -signal.SIGTERM


def test_a_warning_reaches_each_rank_once_and_those_that_listen_later_too() -> None:
    """A repeated one must not reach a rank that has it, whose program may be saving."""
    late = "import signal, time\ntime.sleep(1)\n"
    script = (
        "n = [0]\ndef take(*_):\n    n[0] += 1; print(n[0], flush=True)\n"
        "signal.signal(signal.SIGUSR2, take); print('listens', flush=True)\n"
        "time.sleep(2); raise SystemExit(n[0])"
    )
    words = {0: late.replace("time.sleep(1)\n", "") + script, 1: late + script, 2: "import time; time.sleep(3)"}
    processes = {
        rank: subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, start_new_session=True)
        for rank, text in words.items()
    }
    deaths = Deaths({rank: process.pid for rank, process in processes.items()}, lambda death: None)
    told: list[int] = []
    while not deaths.wait(0.05):
        told += deaths.warn(signal.SIGUSR2)
    assert sorted(told) == [0, 1]
    assert {death.rank: death.code for death in deaths.known} == {0: 1, 1: 1, 2: 0}
    for process in processes.values():
        process.communicate()


def test_a_process_that_lets_no_signal_in_is_not_warned_yet() -> None:
    """A fork has the handlers of its agent, which must not run in it, until it has dropped them."""
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
        "print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    deaths = Deaths({0: process.pid}, lambda death: None)
    assert deaths.warn(signal.SIGTERM) == []
    deaths.kill_groups()
    assert deaths.wait(5)
    process.communicate()


def test_a_code_counts_only_where_it_was_not_ordered() -> None:
    scripts = {0: "exit 125", 1: "trap 'exit 124' TERM; while :; do sleep 0.01; done"}
    processes = {
        rank: subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True) for rank, script in scripts.items()
    }
    deaths = Deaths({rank: process.pid for rank, process in processes.items()}, lambda death: None)
    time.sleep(0.3)
    deaths.send(signal.SIGTERM)
    assert deaths.wait(10)
    assert [process.wait() for process in processes.values()] == [125, 124]
    assert {death.code for death in deaths.known if not death.ended_by_us} == {125}


def test_every_death_has_its_code_its_time_and_its_cause() -> None:
    started_unix_s = time.time()
    processes = {
        rank: subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True)
        for rank, script in {0: "exit 7", 1: "kill -9 $$", 2: "sleep 60 & wait", 3: "exit 0"}.items()
    }
    seen: list[Death] = []
    deaths = Deaths({rank: process.pid for rank, process in processes.items()}, seen.append)
    end_s = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not deaths.wait(0.0)
    assert deaths.failed
    deaths.send(signal.SIGTERM)
    assert deaths.wait(10)
    deaths.kill_groups()
    assert {death.rank: (death.code, death.ended_by_us) for death in seen} == {
        0: (7, False),
        1: (-9, False),
        2: (-15, True),
        3: (0, False),
    }
    assert all(started_unix_s <= death.time_unix_s <= time.time() for death in seen)
    assert [process.wait() for process in processes.values()] == [7, -9, -15, 0], "nothing was reaped before"


def test_process_ids_that_others_may_have_by_now_are_not_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [subprocess.Popen(["/bin/sh", "-c", script], start_new_session=True) for script in ("exit 0", "exit 1")]
    living = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pids = [process.pid for process in (*processes, living)]
    deaths = Deaths(dict(enumerate(pids)), lambda death: None)
    while len(deaths.known) < 2:
        time.sleep(0.01)
    hit: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: hit.append(pid))
    monkeypatch.setattr(os, "kill", lambda pid, number: hit.append(pid))
    deaths.kill_groups()
    assert hit == pids, "their groups may have others left, while they are not reaped"
    deaths.forget()
    hit.clear()
    deaths.kill_groups()
    deaths.send(signal.SIGTERM)
    assert deaths.warn(signal.SIGUSR2) == hit == []
    monkeypatch.undo()
    living.kill()
    assert [process.wait() for process in (*processes, living)] == [0, 1, -9]
