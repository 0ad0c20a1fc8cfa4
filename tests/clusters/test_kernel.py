"""What the kernel says of a death: from its log, and from what it counts per control group."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshwright.clusters.deaths import Deaths
from meshwright.clusters.kernel import Kernel, oom_kills
from tests.launch.own import own

XID = "NVRM: Xid (PCI:0000:3b:00): {}, {}\n"
EATS = "import os\nkept = [os.urandom(1) * (1 << 20) for _ in range(4096)]"
LIMIT_BYTES = 768 << 20


@pytest.fixture
def log(tmp_path: Path) -> Path:
    found = tmp_path / "kmsg"
    found.write_text("Out of memory: Killed process 7 (before)\n" + XID.format(79, "pid=7, fell off the bus"))
    return found


def say(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


def test_only_what_the_kernel_says_from_now_on_counts(log: Path) -> None:
    kernel = Kernel(log)
    assert kernel.why(7) == ""
    say(log, "Memory cgroup out of memory: Killed process 7 (python) total-vm:9kB\n")
    assert kernel.why(7) == "the kernel killed it for want of memory"
    assert kernel.why(77) == kernel.why(8) == "", "another process"


def test_an_xid_of_the_hardware_is_told_and_one_of_a_program_only_of_that_one(log: Path) -> None:
    kernel = Kernel(log)
    say(log, XID.format(31, "pid=8, MMU Fault") + XID.format(79, "pid=9, GPU has fallen off the bus"))
    assert kernel.why(7) == "GPU at 0000:3b:00: Xid 79: the GPU fell off the bus"
    assert "Xid 31: pid=8, MMU Fault" in kernel.why(8)


def test_a_log_that_is_not_for_this_user_says_nothing(tmp_path: Path) -> None:
    assert Kernel(tmp_path / "none").why(7) == ""


@pytest.mark.parametrize(
    ("groups", "mount", "name"),
    [
        ("0::/a/b\n", "/ {} rw - cgroup2 none rw", "a/b/memory.events"),
        ("0::/a/b\n", "/a {} rw - cgroup2 none rw", "b/memory.events"),
        ("0::/\n4:cpu,memory:/a/b\n", "/ {} rw - cgroup none rw,memory", "a/b/memory.oom_control"),
        ("0::/\n4:memory:/a/b\n", "/elsewhere {} rw - cgroup none rw,memory", "memory.oom_control"),
    ],
    ids=["second version", "second, in a container", "first version", "first, in a container"],
)
def test_kills_are_counted_where_the_group_of_either_version_is_mounted(
    tmp_path: Path, groups: str, mount: str, name: str
) -> None:
    told = tmp_path / "mounted" / name
    told.parent.mkdir(parents=True)
    told.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text(groups)
    (tmp_path / "self/mountinfo").write_text(
        f"1 2 0:9 / /mnt rw - tmpfs  rw\n1 2 0:3 {mount.format(tmp_path / 'mounted')}\n"  # the first has no source
    )
    assert oom_kills(tmp_path) == 3
    told.unlink()
    assert oom_kills(tmp_path) == 0


@pytest.fixture
def small() -> Iterator[Path]:
    """A control group with little memory, of whichever version this machine has."""
    for root, name in (("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max")):
        group = Path("/sys/fs/cgroup", root, own("meshwright-small"))
        try:
            group.mkdir()
            (group / name).write_text(str(LIMIT_BYTES))
        except OSError:
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("NO REAL OUT-OF-MEMORY TEST: this user cannot make a control group with a limit of memory")


def died(group: Path, program: str) -> list[Any]:
    """The deaths of a process of a group, as one of that group sees them."""
    code = (
        "import json, subprocess, sys\nfrom pathlib import Path\n"
        f"Path({str(group / 'cgroup.procs')!r}).write_text('0')\n"
        "from meshwright.clusters.deaths import Deaths\n"
        f"child = subprocess.Popen([sys.executable, '-c', {program!r}], start_new_session=True)\n"
        "deaths = Deaths({0: child.pid}, lambda death: None)\n"
        "assert deaths.wait(60)\n"
        "print(json.dumps([[each.code, each.kernel] for each in deaths.known]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_rank_that_the_kernel_really_killed_for_want_of_memory_is_told_as_one(small: Path) -> None:
    ((code, said),) = died(small, EATS)
    assert (code, said.split(" for ")[1:]) == (-9, ["want of memory"])
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {EATS!r}])\nsys.exit(3)"
    ((code, said),) = died(small, child)
    assert (code, said) == (3, "the kernel killed a process for want of memory"), "a child of the rank"
    ((code, said),) = died(small, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (code, said) == (-9, ""), "somebody else killed it"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_job_without_restarts_says_that_its_rank_was_killed_for_want_of_memory(small: Path, tmp_path: Path) -> None:
    command = json.dumps([sys.executable, "-c", EATS])
    (tmp_path / "job.yaml").write_text(f"name: j\ncommand: {command}\ncluster: {{type: local}}\n")
    argv = [sys.executable, "-m", "meshwright.launch.cli", "launch", "job.yaml", "--run-id", own("oom")]
    code = f"import os\nopen({str(small / 'cgroup.procs')!r}, 'w').write('0')\nos.execv({argv[0]!r}, {argv!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 137, done.stderr
    assert "was killed by SIGKILL; no rank died before it by itself; the kernel killed" in done.stderr
    assert "for want of memory" in done.stderr


def test_the_kernel_is_not_asked_of_deaths_that_were_ordered_or_are_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kernel, "why", lambda self, pid: "asked")
    words = {0: ["/bin/true"], 1: ["sleep", "60"], 2: ["/bin/false"]}
    processes = {rank: subprocess.Popen(argv, start_new_session=True) for rank, argv in words.items()}
    deaths = Deaths({rank: each.pid for rank, each in processes.items()}, lambda death: None)
    end_s = time.monotonic() + 10
    while len(deaths.known) < 2 and time.monotonic() < end_s:
        time.sleep(0.01)
    deaths.send(signal.SIGTERM)
    assert deaths.wait(10)
    assert {each.rank: each.kernel for each in deaths.known} == {0: "", 1: "", 2: "asked"}
    for each in processes.values():
        each.wait()
