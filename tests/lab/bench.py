"""One training on the lab's hosts that a fault can befall, and what it says and leaves meanwhile."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from meshwright.clusters.sweep import carriers
from tests.lab.hosts import Host, Hosts
from tests.lab.launches import ROOT, Launch, write_training
from tests.lab.slurm import Slurm
from tests.lab.test_ssh import cluster as cluster_keys
from tests.launch.waiting import eventually, kill_all

__all__ = ["EVERY", "SMALL", "STEPS", "Bench", "Kind", "write_faulted"]

Kind = Literal["ssh", "slurm"]
STEPS = 24
EVERY = 6
"""Steps from one checkpoint to the next."""

SMALL = "small"
"""Name of the small disk of a lab, beside the folders of its trainings."""

_PAUSE_S = 0.15
_DAEMONS = (b"/usr/sbin/sshd\0", b"sshd: ", b"slurmd\0", b"slurmstepd: ", b"unshare\0", b"bash\0-c\0\nset -e")
"""How the command lines begin of what a host has of its own; a process without one has ended.

A session of sshd, whose link was cut, ends when TCP finds out, and a slurmstepd when it gets through to Slurm's
controller, which it tries once a minute; what they had started is seen by itself.
"""

_FAILURE = {
    "max_restarts": 3,
    "backoff": {"initial": "500ms", "factor": 2, "max": "2s"},
    "shutdown_grace": "2s",
    "retry_on": ["node", "signal", "hang", "preempt", "exit"],
    "hang": {"no_progress_for": "8s", "action": "dump_and_restart"},
}


def write_faulted(folder: Path, **keys: Any) -> Path:
    """A tiny training on two nodes with many checkpoints, and a policy that starts again."""
    path = write_training(folder, steps=STEPS, every=EVERY, pause_s=_PAUSE_S)
    job: dict[str, Any] = yaml.safe_load(path.read_text())
    job["checkpoint"] |= {"keep": 10}
    path.write_text(yaml.safe_dump({**job, "failure": dict(_FAILURE), "nodes": 2, **keys}))
    return path


class Bench:
    """A training in a folder of its own.

    Args:
        kind: of cluster.
        folder: that all hosts see.
        hosts: up; the first two train.
        slurm: of those hosts, where `kind` is slurm.
        variables: of every Python process.
        cluster: further keys of the cluster.
    """

    def __init__(
        self,
        kind: Kind,
        folder: Path,
        hosts: Hosts,
        slurm: Slurm | None,
        *,
        variables: Mapping[str, str],
        cluster: Mapping[str, Any],
    ) -> None:
        self.kind, self.folder, self.hosts, self.slurm = kind, folder, hosts, slurm
        own = {
            "PYTHONPATH": f"{ROOT / 'tests/lab/armed'}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            **variables,
        }
        keys = cluster_keys(hosts, own) if slurm is None else {"type": "slurm"}
        self._launch = Launch(folder, {"far": keys | dict(cluster)}, "r", own | (slurm.env if slurm else {}))
        self._output = (folder / "output.txt").open("wb")
        self._before = hosts.pids()
        self.spoiled: int | None = None
        self._launcher: Any = None
        self._tries = 0
        self._occupant: subprocess.Popen[bytes] | None = None

    def start(self, job: Path) -> None:
        """Launches the job; again where it was launched before."""
        self._tries += 1
        self._launch.run_id = f"{self.folder.name}-{self._tries}"
        self._launcher = self._launch.start(job, "--set", "cluster=far", output=self._output, apart=True)

    @property
    def run_id(self) -> str:
        """Of the last launch."""
        return self._launch.run_id

    @property
    def run_dir(self) -> Path:
        """Of the last launch."""
        return self.folder / "runs" / self.run_id

    @property
    def launcher(self) -> int:
        """Process id of the launcher itself, which sees no process of any host."""
        found = [pid for pid in _mentioning(f"--run-id\0{self.run_id}\0") if b"unshare" not in _words(pid)]
        return next(pid for pid in found if not _words(pid).startswith(b"bash\0"))

    def said(self, pattern: str = "") -> str:
        """What launchers have said; the part that a pattern matches."""
        found = re.search(pattern, self._said())
        return found[0] if found else ""

    def all_said(self, pattern: str) -> list[str]:
        """Everything that they have said and that a pattern matches, or its group."""
        return re.findall(pattern, self._said())

    def _said(self) -> str:
        return (self.folder / "output.txt").read_text(errors="replace")

    def attach(self, timeout_s: float = 180.0) -> int:
        """Looks at the last launch again from another terminal until it ends."""
        done = self._launch.type("attach", self.run_id, timeout_s=timeout_s)
        with (self.folder / "output.txt").open("a") as file:
            file.write(done.stdout + done.stderr)
        return done.returncode

    def saved(self, checkpoints: Path | None = None) -> list[int]:
        """Steps of whole checkpoints, ascending."""
        where = checkpoints or self.folder / "checkpoints"
        found = {int(path.name.removeprefix("step-")) for path in where.glob("step-*")}
        return sorted(found - {self.spoiled})

    def ranks(self, node: int) -> list[int]:
        """Process ids of training processes of a node."""
        return [pid for pid in carriers(self.run_id, node) if _is_rank(pid)]

    def agents(self, node: int) -> list[int]:
        """Process ids of what runs a node's ranks, up to the first that is not the run's."""
        return [pid for pid in carriers(self.run_id, node) if not _is_rank(pid)] or [
            _parent(pid) for pid in self.ranks(node)[:1]
        ]

    def host(self, node: int) -> Host:
        """That carries a node of the run."""
        named = json.loads((self.run_dir / "plan.json").read_text())["nodes"][node]["name"]
        return next(each for each in self.hosts.hosts if each.name == named)

    def trains(self, checkpoints: Path, generator: random.Random, *, saved: int = 1, timeout_s: float = 180.0) -> bool:
        """Waits for so many checkpoints, and a random while more."""
        done = eventually(lambda: len(self.saved(checkpoints)) >= saved or self.over(), timeout_s)
        found = done and not self.over()
        time.sleep(generator.uniform(0.0, 1.0))
        return found

    def over(self) -> bool:
        """Whether the launcher has ended."""
        return self._launcher.poll() is not None

    def end(self, timeout_s: float = 180.0) -> int | None:
        """The launcher's exit code; None where it has not ended in time."""
        return self._launcher.returncode if eventually(self.over, timeout_s) else None

    def left(self, timeout_s: float = 10.0) -> list[str]:
        """Command lines of processes of any launch, wherever, that still run a while after its end."""
        eventually(lambda: not self._living(), timeout_s)
        return [_words(pid).replace(b"\0", b" ").decode(errors="replace") for pid in self._living()]

    def _living(self) -> set[int]:
        """Ranks and what they started, launchers and agents, and whatever is on hosts that was not before."""
        ids = [f"{self.folder.name}-{index}" for index in range(1, self._tries + 1)]
        found = {pid for each in ids for pid in (*carriers(each), *_mentioning(each))}
        new = {pid: words for pid in self.hosts.pids() - self._before if (words := _words(pid))}
        return found | {pid for pid, words in new.items() if not words.startswith(_DAEMONS)}

    def restore(self) -> None:
        """Every host is up again, and so is its link."""
        for host in self.hosts.hosts:
            host.link("up")
            if not host.children:
                host.boot()
        self.hosts.wait()

    def batch(self) -> list[int]:
        """Process ids of what launches the run on the first node of a Slurm job."""
        return [pid for pid in _mentioning(str(self.run_dir)) if b"meshwright.launch.batch\0" in _words(pid)]

    def losses(self) -> dict[int, float]:
        """Step -> loss as it was written last."""
        found: dict[int, float] = {}
        for index in range(1, self._tries + 1):
            path = self.folder / f"runs/{self.folder.name}-{index}/metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            found |= {each["step"]: each["loss"] for each in map(json.loads, lines) if "loss" in each}
        return found

    def occupy(self, ports: Sequence[int]) -> None:
        """Listens on ports of the first host."""
        first = self.hosts.hosts[0]
        held = f"held = [socket.create_server(('0.0.0.0', port)) for port in {list(ports)}]"
        words = ["nsenter", f"--net=/run/netns/{first.namespace}", sys.executable, "-S", "-c"]
        self._occupant = subprocess.Popen([*words, f"import socket, time; {held}; time.sleep(3600)"])
        if not eventually(lambda: f"0.0.0.0:{ports[-1]}" in first.listening(), 20):
            raise RuntimeError(f"ports {ports} of {first.name} are not there to be taken")

    def vacate(self) -> None:
        """Lets go of the ports."""
        if self._occupant is not None:
            self._occupant.kill()
            self._occupant.wait()
            self._occupant = None

    def close(self) -> None:
        """Ends what is left."""
        self.vacate()
        if self._launcher is not None and not self.over():
            with suppress(StopIteration, ProcessLookupError):
                os.kill(self.launcher, signal.SIGTERM)
            if not eventually(self.over, 20):
                self._launcher.kill()
            self._launcher.wait()
        for index in range(1, self._tries + 1):
            kill_all(carriers(f"{self.folder.name}-{index}"))
        shutil.rmtree(self.folder.parent / SMALL / "checkpoints", ignore_errors=True)  # not for the next to resume from
        self._output.close()


def _words(pid: int) -> bytes:
    """A process's command line, words ended by zeros; empty where it is gone or has none any more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _mentioning(text: str) -> list[int]:
    """Process ids of this machine and its hosts whose command line has a text."""
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*") if path.name != str(os.getpid()))
    return [pid for pid in pids if text.encode() in _words(pid)]


def _is_rank(pid: int) -> bool:
    try:
        return b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
