"""Machines reached by ssh as a cluster: one connection per host, whose two ends die together.

The agent's line goes through the connection, so no port is opened for it; plan, key and secrets come on its standard
input and never stand in any argv.
"""

import os
import secrets as tokens
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from meshwright.clusters.base import NodePlan, StartPlan, StartRequest, identity, log_name
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.lost import explain_end
from meshwright.clusters.pipes import Far, PipeHandle, agents_of
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached, Visit, answering, reached_by
from meshwright.clusters.sending import Keeper
from meshwright.clusters.spawn import AGENT_WORDS, words_for

__all__ = ["SshCluster", "SshHost", "SshOptions", "deal_ranks", "plan_ssh", "python_words", "ssh_words"]

_ALIVE_COUNT = 3
_ANSWER_S = 5.0


@dataclass(frozen=True)
class SshHost:
    """One machine.

    Args:
        name: what ssh calls it.
        addr: how the other hosts reach it.
        slots: ranks it takes; None where all take the same number.
        gpus: GPUs of its ranks; None is all.
        python: interpreter there.
        env: variables of agent and ranks.
    """

    name: str
    addr: str
    slots: int | None = None
    gpus: int | None = None
    python: str = sys.executable
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SshOptions:
    """How connections are made; None leaves a thing to ssh's own files.

    Args:
        host_keys: "strict", or "accept-new" to remember unknown keys.
        connect_timeout_s: of one connection.
        lost_after_s: silence after which both ends count the other as lost.
    """

    user: str | None = None
    port: int | None = None
    identity_file: str | None = None
    known_hosts: str | None = None
    host_keys: str = "strict"
    jump: str | None = None
    config: str | None = None
    connect_timeout_s: float = 10.0
    lost_after_s: float = 15.0


def ssh_words(options: SshOptions, host: str, command: Sequence[str]) -> tuple[str, ...]:
    """The exact words that run a command on a host; one quoting layer, for the login shell there.

    >>> ssh_words(SshOptions(), "gpu01", ["echo", "a b", "$HOME"])[-3:]
    ('--', 'gpu01', "exec echo 'a b' '$HOME'")
    """
    settings = {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes" if options.host_keys == "strict" else options.host_keys,
        "ConnectTimeout": str(max(1, round(options.connect_timeout_s))),
        "ServerAliveInterval": str(max(1, round(options.lost_after_s / _ALIVE_COUNT))),
        "ServerAliveCountMax": str(_ALIVE_COUNT),
        "ControlPath": "none",  # a shared connection would outlive this one
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "LogLevel": "ERROR",
    }
    if options.known_hosts is not None:
        settings["UserKnownHostsFile"] = os.path.expanduser(options.known_hosts)
    if options.identity_file is not None:
        settings["IdentitiesOnly"] = "yes"
    words = ["ssh", "-T", "-x"]
    for flag, value in (
        ("-F", options.config and os.path.expanduser(options.config)),
        ("-l", options.user),
        ("-p", options.port),
        ("-i", options.identity_file and os.path.expanduser(options.identity_file)),
        ("-J", options.jump),
    ):
        words += [] if value is None else [flag, str(value)]
    words += [each for name, value in settings.items() for each in ("-o", f"{name}={value}")]
    return (*words, "--", host, f"exec {shlex.join(command)}")


def deal_ranks(request: StartRequest, hosts: Sequence[SshHost]) -> list[tuple[SshHost, tuple[int, ...]]]:
    """Which ranks each host gets: a number each, or as many as it has slots until all are dealt.

    Raises:
        UnavailableError: when the hosts do not take that many.
    """
    used = hosts[: request.num_nodes]
    if isinstance(request.ranks_per_node, int):
        wanted = [request.ranks_per_node] * len(used)
    else:
        left = request.num_ranks or len(used)
        even = -(-left // len(used))
        wanted = []
        for host in used:
            wanted.append(min(left, even if host.slots is None else host.slots))
            left -= wanted[-1]
        if left:
            raise UnavailableError(f"{left} ranks are left over when {', '.join(h.name for h in used)} are full")
    dealt, first = [], 0
    for host, number in zip(used, wanted, strict=True):
        if number:
            dealt.append((host, tuple(range(first, first + number))))
        first += number
    return dealt


def plan_ssh(request: StartRequest, hosts: Sequence[SshHost], options: SshOptions) -> StartPlan:
    """The exact start plan over ssh; pure.

    Raises:
        UnavailableError: when the hosts do not take all ranks, or their words could not be told apart.
    """
    dealt = deal_ranks(request, hosts)
    nodes = [
        NodePlan(
            name=host.name,
            index=index,
            ranks=ranks,
            cwd=str(request.program.workdir),
            env=_environment(request, host) + identity(request, host.name, index),
            agent=ssh_words(options, host.name, python_words(host, AGENT_WORDS)),
            argv=words_for(host.python, request.program.argv),
            logs=tuple(log_name(rank) for rank in ranks),
        )
        for index, (host, ranks) in enumerate(dealt)
    ]
    return StartPlan.of(request, "ssh", nodes=nodes, meeting=replace(request.meeting, host=dealt[0][0].addr))


def python_words(host: SshHost, words: Sequence[str]) -> tuple[str, ...]:
    """What a host types to run its Python with some words, in the environment that the cluster gives it.

    >>> python_words(SshHost("a", "10.0.0.1", 1, python="py", env={"A": "1"}), ("-m", "x"))
    ('env', 'A=1', 'py', '-m', 'x')
    """
    given = tuple(f"{name}={value}" for name, value in sorted(host.env.items()))
    if given and "=" in host.python:
        raise UnavailableError(
            f"host {host.name}: python {host.python!r} has a '=', so `env` would take it for a variable; "
            "name it by a link without one, or give the host no env"
        )
    return (*(("env", *given) if given else ()), host.python, *words)


def _environment(request: StartRequest, host: SshHost) -> tuple[tuple[str, str], ...]:
    gpus = request.gpus_per_node if host.gpus is None else host.gpus
    shown = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    return tuple(sorted((shown | dict(host.env) | dict(request.program.env)).items()))


class SshCluster:
    """Machines reached by ssh.

    Args:
        hosts: in the order ranks are given out.
        options: of connections.
        passed: variables of the launcher that ranks get.
    """

    def __init__(self, hosts: Sequence[SshHost], options: SshOptions, passed: Mapping[str, str]) -> None:
        self._hosts, self._options, self._passed = tuple(hosts), options, dict(passed)

    def plan(self, request: StartRequest) -> StartPlan:
        """The exact start plan of a request; connects to nobody."""
        return plan_ssh(request, self._hosts, self._options)

    def reached(self, request: StartRequest, visit: Visit) -> AbstractContextManager[Reached]:
        """The hosts that a request uses, as its agents would reach them."""
        hosts = {host.name: python_words(host, PROBE_ARGV[1:]) for host in self._hosts[: request.num_nodes]}
        return reached_by({name: ssh_words(self._options, name, each) for name, each in hosts.items()}, "ssh", visit)

    def check(self, plan: StartPlan) -> None:
        """Makes sure that there is an ssh, and the key that it is to use.

        Raises:
            UnavailableError: when not.
        """
        if shutil.which("ssh") is None:
            raise UnavailableError("cluster: there is no `ssh` on PATH; install openssh-client")
        key = self._options.identity_file
        if key is not None and not Path(os.path.expanduser(key)).is_file():
            raise UnavailableError(f"cluster.identity_file: {os.path.expanduser(key)} does not exist")

    def back(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of some hosts on which ssh can run a command."""
        words = {name: ssh_words(self._options, name, ("true",)) for name in names}
        return answering(words, self._options.connect_timeout_s + _ANSWER_S)

    def start(self, plan: StartPlan, secrets: Mapping[str, str]) -> PipeHandle:
        """Executes a plan: one connection per host, each told its part."""
        run_dir = Path(plan.run_dir)
        probe = f"private/probe-{tokens.token_hex(8)}"
        (run_dir / probe).touch(mode=0o600)
        message: dict[str, Any] = {"probe": probe, "passed": self._passed, "files": _files(run_dir)}
        agents = agents_of(plan.nodes, lambda node: _connect(node, run_dir))

        def explain(name: str, code: int) -> Mapping[str, Any]:
            return explain_end(name, code, _connection_log(run_dir, name))

        far = Far(message, self._options.lost_after_s, explain, Keeper(run_dir))
        return PipeHandle(plan, agents, secrets, far=far)


def _files(run_dir: Path) -> dict[str, str]:
    """What ranks read in a run directory."""
    job = run_dir / "job.json"
    return {job.name: job.read_text()} if job.exists() else {}


def _connect(node: NodePlan, run_dir: Path) -> "subprocess.Popen[bytes]":
    log = os.open(run_dir / f"logs/ssh-{node.name}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        return subprocess.Popen(
            node.agent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            bufsize=0,
        )
    finally:
        os.close(log)


def _connection_log(run_dir: Path, name: str) -> str:
    try:
        return (run_dir / "logs" / f"ssh-{name}.log").read_text(errors="replace")
    except OSError:
        return ""
