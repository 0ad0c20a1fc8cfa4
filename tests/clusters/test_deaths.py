"""Deaths are seen at once, with their own status, and told from those we ordered."""

import signal
import subprocess
import time

from meshwright.clusters.deaths import Death, Deaths


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
