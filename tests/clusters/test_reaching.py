"""Lines to probes: what they complain of, and that nothing of them stays."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.evidence import Reach
from meshwright.clusters.reaching import Line, carried
from tests.launch.waiting import eventually


def _reach(code: str) -> Reach:
    return Reach("a", (sys.executable, "-u", "-c", code))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "it ended with exit code 3"),
        ("one\\n\\n  two  \\n------\\n", "one / two"),
        (
            "ssh: connect to host h9 port 22: Connection refused\\nORTE was unable to start\\n",
            "ssh: connect to host h9 port 22: Connection refused",
        ),
        (
            "py: No module named meshwright\\nsrun: error: h2: task 0: Exited with exit code 1\\n",
            "py: No module named meshwright",
        ),
    ],
)
def test_of_many_lines_those_that_tell_why_are_told(said: str, why: str) -> None:
    line = carried(_reach(f"import sys; sys.stderr.write('{said}'); sys.exit(3)"))
    while line.read() is not None:
        pass
    assert line.why_gone() == why
    line.end()


def _all(line: Line, until: int = 1) -> list[dict[str, Any]]:
    """What a probe says, at least so much, or to its end."""
    told: list[dict[str, Any]] = []
    while len(told) < until and (found := line.read()) is not None:
        told += found
    return told


def test_what_is_no_answer_is_no_answer() -> None:
    line = carried(_reach("print('welcome'); print(7); print('{\"event\": \"clock\"}')"))
    assert _all(line, 9) == [{"event": "clock"}]
    line.end()


def test_a_carrier_that_stays_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    mark = tmp_path / "asked"
    gentle = f"import signal, sys, time\nsignal.signal(15, lambda *_: (open({str(mark)!r}, 'w'), sys.exit()))\n"
    line = carried(_reach(f"{gentle}print('{{}}'); time.sleep(600)"))
    assert _all(line) == [{}]
    start_s = time.monotonic()
    line.end()
    assert mark.exists()
    assert time.monotonic() - start_s < 60.0


def test_a_carrier_that_never_ends_is_killed_with_what_it_started() -> None:
    deaf = "import os, signal, subprocess, sys, time\nsignal.signal(15, signal.SIG_IGN)\n"
    child = "each = subprocess.Popen(['sleep', '600']); print('{\"pid\": %d}' % each.pid, flush=True); time.sleep(600)"
    line = carried(_reach(deaf + child))
    found = _all(line)
    line.end()
    assert eventually(lambda: not _lives(found[0]["pid"]))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_environment_is_the_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MW_SECRET", "hunter22")
    env = {name: value for name, value in os.environ.items() if name != "MW_SECRET"}
    line = carried(_reach("import json, os; print(json.dumps({'has': 'MW_SECRET' in os.environ}))"), env)
    assert _all(line) == [{"has": False}]
    line.end()
