"""A private Slurm cluster of pretended hosts: munged and slurmctld on this machine, one slurmd per host. Needs root."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from tests.lab.hosts import WITH_US, Hosts, run

__all__ = ["Slurm", "holds", "missing_for_slurm"]

_CONF = """\
ClusterName=lab
SlurmctldHost={machine}({ctl})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
KillWait=10
MinJobAge=600
SchedulerParameters=sched_interval=1,sched_min_interval=100000
UnkillableStepTimeout=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing_for_slurm() -> str:
    """What this machine lacks, in words; empty where it has all."""
    wanted = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = {package for tool, package in wanted.items() if shutil.which(tool, path=path) is None}
    return f"apt-get install {' '.join(sorted(lacking))}" if lacking else ""


class Slurm:
    """The cluster.

    Args:
        hosts: that are up.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self.folder = hosts.folder / "slurm"
        self._port = 16000 + hosts.token % 997
        self._daemons: list[subprocess.Popen[bytes]] = []

    @property
    def env(self) -> dict[str, str]:
        """Variables by which Slurm's commands find the cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def type(self, *words: str) -> str:
        """Standard output of one of Slurm's commands."""
        done = subprocess.run(
            words, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout

    def up(self) -> None:
        """Starts everything, and waits until every node is idle."""
        for name in ("munge", "state"):
            (self.folder / name).mkdir(parents=True)
        has = f"Port={self._port + 1000} CPUs=16 RealMemory=4000 State=UNKNOWN"
        nodes = [f"NodeName={host.name} NodeAddr={host.address} {has}" for host in self._hosts.hosts]
        places = {"machine": socket.gethostname(), "ctl": f"{self._hosts.net}.254", "port": self._port}
        text = _CONF.format(folder=self.folder, nodes="\n".join(nodes), **places)
        (self.folder / "slurm.conf").write_text(text)
        self._munge()
        self._start("slurmctld", "-D", "-c", "-f", str(self.folder / "slurm.conf"))
        for host in self._hosts.hosts:
            host.start(["slurmd", "-D", "-f", str(self.folder / "slurm.conf"), "-N", host.name])
        self.idle()

    def idle(self, timeout_s: float = 60.0) -> None:
        """Waits until every node can take a job.

        Raises:
            RuntimeError: when one cannot in that time.
        """
        end_s = time.monotonic() + timeout_s
        while self.type("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split() != ["idle"] * len(self._hosts.hosts):
            if time.monotonic() > end_s:
                raise RuntimeError(f"a node is not idle: {self.type('sinfo', '-N', '-l')}; see {self.folder}/*.log")
            time.sleep(0.2)

    def mend(self) -> None:
        """Starts nodes anew that Slurm has given up, and would take back much later by itself, and waits for all.

        It drains one whose slurmstepd could not tell it the end of a step (see `UnkillableStepTimeout`).
        """
        states = dict(line.split() for line in self.type("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        for host in self._hosts.hosts:
            if states.get(host.name, "").startswith("down"):
                host.end()
                host.boot()
            elif states.get(host.name, "").startswith("drain"):
                self.type("scontrol", "update", f"NodeName={host.name}", "State=RESUME")
        self.idle()

    def _munge(self) -> None:
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(128))
        run("chown", "-R", "munge:", str(folder))
        (folder / "key").chmod(0o400)
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
        self._start("runuser", "-u", "munge", "--", "munged", "-F", "--force", f"--socket={folder}/socket", *files)
        end_s = time.monotonic() + 10
        while not (folder / "socket").exists():
            assert time.monotonic() < end_s, (folder / "log").read_text()
            time.sleep(0.05)

    def _start(self, *words: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            child = subprocess.Popen(
                [*WITH_US, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self.env}
            )
        self._daemons.append(child)

    def quiet(self, timeout_s: float = 30.0) -> None:
        """Waits until no job is left."""
        end_s = time.monotonic() + timeout_s
        while self.type("squeue", "-h").strip() and time.monotonic() < end_s:
            time.sleep(0.2)

    def down(self) -> None:
        """Ends every job and daemon; the hosts end their own."""
        with suppress(subprocess.TimeoutExpired):
            jobs = self.type("squeue", "-h", "-o", "%A").split()
            if jobs:
                self.type("scancel", *jobs)
                self.quiet()
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def holds(folder: Path, text: str) -> list[Path]:
    """Files below a folder that contain a text."""
    found = []
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
    return found
