"""The faults of the reliability table: how each is made, who is to be named, and what is to follow.

strike -> the launcher says who and why -> the training goes on from its newest whole checkpoint, or is told not to
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.bench import EVERY, SMALL, Bench, Kind

__all__ = ["ABSENT", "AGAIN", "BOTH", "FAULTS", "GOES_ON", "LOOK", "REFUSED", "UNHARMED", "Fault"]

BOTH: tuple[Kind, ...] = ("ssh", "slurm")
GOES_ON, LOOK, AGAIN, REFUSED, UNHARMED = "goes on", "looked at again", "launched again", "refused", "unharmed"
_PORT = 29810


def _nothing(bench: Bench) -> None:
    del bench


@dataclass(frozen=True)
class Fault:
    """One way in which things go wrong.

    Args:
        name: in the table.
        culprit: what must be said of it: a regular expression.
        strike: makes it happen to a training that runs; for a refusal, before it is launched.
        mend: sets things right once the launcher has said what it has to, or has ended.
        limit_s: in which it must be said.
        saved: checkpoints before it happens.
        follows: it goes on by itself; it does, and a person looks at it again; a person launches it again, after which
            it goes on; it is refused before anything starts; or there is nothing to say.
        kinds: clusters that it is tried on.
        keys: of the job.
        cluster: keys of the cluster.
        variables: of every process.
    """

    name: str
    culprit: str
    strike: Callable[[Bench], None] = _nothing
    mend: Callable[[Bench], None] = _nothing
    limit_s: float = 2.0
    saved: int = 1
    follows: str = GOES_ON
    kinds: tuple[Kind, ...] = BOTH
    keys: dict[str, Any] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _crash(bench: Bench) -> None:
    _signal(bench.ranks(1), signal.SIGRTMIN + 5)


def _kill_rank(bench: Bench) -> None:
    _signal(bench.ranks(1), signal.SIGKILL)


def _kill_agent(bench: Bench) -> None:
    _signal(bench.agents(1), signal.SIGKILL)


def _kill_launcher(bench: Bench) -> None:
    os.kill(bench.launcher, signal.SIGKILL)


def _hang(bench: Bench) -> None:
    _signal(bench.ranks(1), signal.SIGSTOP)


def _cut(bench: Bench) -> None:
    bench.host(1).link("down")


def _plug(bench: Bench) -> None:
    for host in bench.hosts.hosts:
        host.link("up")


def _power_off(bench: Bench) -> None:
    bench.host(1).end()


def _power_on(bench: Bench) -> None:
    for host in bench.hosts.hosts:
        if not host.children:
            host.boot()
    bench.hosts.wait()


def _cut_first(bench: Bench) -> None:
    bench.host(0).link("down")


def _power_off_first(bench: Bench) -> None:
    bench.host(0).end()


def _kill_batch(bench: Bench) -> None:
    _signal(bench.batch(), signal.SIGKILL)


def _small(bench: Bench) -> Path:
    return bench.folder.parent / SMALL


def _fill(bench: Bench) -> None:
    with suppress(OSError), (_small(bench) / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


def _empty(bench: Bench) -> None:
    (_small(bench) / "filler").unlink(missing_ok=True)


def _spoil(bench: Bench) -> None:
    """Changes one byte of the newest checkpoint and ends a rank."""
    bench.spoiled = bench.saved()[-1]
    newest = bench.folder / f"checkpoints/step-{bench.spoiled:08d}"
    largest = max((path for path in newest.iterdir()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    _kill_rank(bench)


def _preempt(bench: Bench) -> None:
    assert bench.slurm is not None
    bench.slurm.type("scancel", "--batch", "--signal=USR2", _job(bench))
    end_s = time.monotonic() + 60
    while bench.slurm.type("squeue", "-h", "-j", _job(bench), "-o", "%T").strip() != "PENDING":
        if time.monotonic() > end_s:
            return
        time.sleep(0.2)
    time.sleep(2.5)  # a node refuses a start of the second in which it was told to end the job
    bench.slurm.type("scontrol", "update", f"JobId={_job(bench)}", "StartTime=now")


def _shut_down(bench: Bench) -> None:
    """What a machine that is taken away tells everything that runs on it, and then it is gone."""
    _signal([*bench.agents(1), *bench.ranks(1)], signal.SIGTERM)
    time.sleep(0.5)
    _power_off(bench)


def _job(bench: Bench) -> str:
    return str(json.loads((bench.run_dir / "launch.json").read_text())["job"])


def _take_ports(bench: Bench) -> None:
    bench.occupy([_PORT, _PORT + 1])


def _free_ports(bench: Bench) -> None:
    bench.vacate()


def _swap_keys(bench: Bench) -> None:
    lines = bench.hosts.known_hosts.read_text().splitlines()
    swapped = [lines[0], " ".join([lines[1].split()[0], *lines[0].split()[1:]]), *lines[2:]]
    (bench.folder.parent / "wrong_hosts").write_text("\n".join(swapped) + "\n")


FAULTS = (
    Fault("rank crashes", r"rank 1 .*a crash that the lab asked for", _crash, variables={"LAB_CRASH": "1"}),
    Fault("rank is killed", r"rank 1 .*(SIGKILL|signal 9|killed)", _kill_rank),
    Fault("agent is killed", r"agent of h2 died|host h2: |without h2", _kill_agent, limit_s=15.0),
    Fault("launcher is killed", "", _kill_launcher, limit_s=15.0, follows=AGAIN, kinds=("ssh",)),
    Fault("launcher is killed", "", _kill_launcher, limit_s=15.0, follows=LOOK, kinds=("slurm",)),
    Fault("link is cut", r"node h2: it was not heard|host h2|without h2", _cut, _plug, limit_s=15.0),
    Fault("node reboots", r"(host|node) h2|agent of h2 died|without h2", _power_off, _power_on, limit_s=15.0),
    Fault("link of first node is cut", r"node h1: (it was|neither h2)|host h1: |without h1", _cut_first, limit_s=15.0),
    Fault("first node is lost", r"(host|node) h1: |without h1", _power_off_first, limit_s=15.0),
    Fault(
        "launcher on the first node is killed",
        r"run .* lost: job \d+: FAILED",
        _kill_batch,
        limit_s=15.0,
        follows=AGAIN,
        kinds=("slurm",),
    ),
    Fault("rank hangs", r"rank 1 .*(has not answered|has been at)", _hang, limit_s=8.0 + 4.0),
    Fault(
        "disk is full",
        r"checkpoint .* could not be written in .*small/checkpoints \(0 bytes are free\)",
        _fill,
        _empty,
        limit_s=30.0,
        follows=AGAIN,
        keys={"checkpoint": {"every_steps": EVERY, "keep": 10, "dir": f"../{SMALL}/checkpoints"}},
    ),
    Fault("disk is slow", "", follows=UNHARMED, variables={"LAB_FLUSH_S": "0.3"}),
    Fault(
        "preemption signal",
        r"preempted after saving; job \d+ is queued again",
        _preempt,
        limit_s=15.0,
        kinds=("slurm",),
    ),
    Fault("preemption signal", r"(host|node) h2|without h2", _shut_down, _power_on, limit_s=15.0, kinds=("ssh",)),
    Fault("newest checkpoint is corrupt", r"damaged|passed over|not whole|skipped", _spoil, limit_s=30.0, saved=2),
    Fault(
        "ports are taken",
        rf"no port of {_PORT}-{_PORT + 1} of .* on (h1|ctl) can be taken|h1: .*no port of",
        _take_ports,
        _free_ports,
        limit_s=10.0,
        follows=REFUSED,
        keys={"rendezvous": {"port_range": [_PORT, _PORT + 1]}},
    ),
    Fault(
        "host key is another",
        r"host h2: its host key is not the one that is known",
        _swap_keys,
        limit_s=10.0,
        follows=REFUSED,
        kinds=("ssh",),
        cluster={"known_hosts": "../wrong_hosts"},
    ),
    Fault(
        "clock is wrong",
        r"h2.*120 s ahead|h2.*2\.0 min ahead|h2.*ahead of this machine",
        limit_s=15.0,
        follows=REFUSED,
        kinds=("ssh",),
        keys={"health": {"preflight": ["clock"]}},
        variables={"LAB_SKEWED": "h2"},
    ),
    Fault(
        "clock is wrong",
        r"health of h2: its clock is 1[12][0-9] s ahead of this machine's",
        limit_s=60.0,
        follows=UNHARMED,
        kinds=("slurm",),
        variables={"LAB_SKEWED": "h2"},
    ),
)

ABSENT: dict[tuple[str, Kind], str] = {
    ("launcher on the first node is killed", "ssh"): (
        "there is none: the launcher stays where it was typed, and is killed there in a row of its own"
    ),
    ("host key is another", "slurm"): (
        "there is none: Slurm starts what runs on nodes, by munge's credentials and without host keys. A node with "
        "another key of munge never registers, so no job comes to it"
    ),
}
"""Faults that a kind of cluster cannot have, and why."""
