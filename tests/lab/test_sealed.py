"""However a program that is sealed ends, or whoever sealed it, nothing of it stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab.hosts import missing_for_hosts
from tests.launch.own import own
from tests.launch.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing_for_hosts()), reason=missing_for_hosts())]

PROGRAM = """
import os, subprocess, sys, time
from tests.lab.hosts import run
from tests.lab.sealed import make_folder
folder = make_folder()
run("mount", "-t", "tmpfs", "tmpfs", str(folder))
run("ip", "netns", "add", sys.argv[1])
run("ip", "link", "add", "br0", "type", "bridge")
subprocess.Popen(["sleep", "600"], start_new_session=True)
os.mkdir(folder / "ready")
print(folder, flush=True)
time.sleep(float(sys.argv[2]))
"""
SEALING = "import sys; from tests.lab.sealed import sealed; sys.exit(sealed([sys.executable, '-c', *sys.argv[1:]]))"


def start(name: str, lasts_s: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", SEALING, PROGRAM, name, str(lasts_s)]
    env = {**os.environ, "MESHWRIGHT_RUN_ID": name}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True)


def left(name: str, folder: str) -> list[str]:
    """What is left of a program: processes, networks, mounts."""
    found = [f"process {pid}" for pid in _carriers(name)]
    found += [f"network {each}" for each in Path("/run/netns").glob(name)]
    return found + [line for line in Path("/proc/self/mounts").read_text().splitlines() if folder in line]


def _carriers(name: str) -> list[str]:
    mark, found = f"MESHWRIGHT_RUN_ID={name}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_to_who_sealed_it_ends_all_of_it(number: signal.Signals, group: bool) -> None:
    name = own(f"seal-{number.name}-{group}")
    with start(name, 600.0) as sealing:
        assert sealing.stdout is not None
        folder = sealing.stdout.readline().strip()
        assert folder
        (os.killpg if group else os.kill)(sealing.pid, number)
        code = sealing.wait(30)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert eventually(lambda: not left(name, folder), 20), left(name, folder)
    assert number == signal.SIGKILL or not Path(folder).exists()
    if Path(folder).exists():
        Path(folder).rmdir()


def test_a_program_that_ends_by_itself_leaves_nothing_either() -> None:
    name = own("seal")
    sealing = start(name, 0.0)
    folder = sealing.communicate(timeout=60)[0].strip()
    assert folder
    assert sealing.returncode == 0
    assert eventually(lambda: not left(name, folder), 20), left(name, folder)
    assert not Path(folder).exists()
