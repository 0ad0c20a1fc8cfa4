"""Which node was lost, and why, from what ssh, MPI, Ray and Kubernetes say of it. Pure."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from meshwright.clusters.contract import Lost
from meshwright.clusters.failure import kind_of
from meshwright.clusters.telling import refusal, telling

__all__ = ["LOST_CODE", "explain_end", "host_in_mpi", "lost_in_mpi", "lost_in_ray", "pods_ended", "unheard_code"]

LOST_CODE = 69
"""Exit code of a run that ends with it."""

_REFUSED_CODE = 77
"""Exit code of a run that this user may not have."""

_BROKEN_CODE = 70
"""Exit code of a run whose nodes lack what starts ranks, which another start would lack, too."""

_MPI = (
    (r"Remote daemon: \S+ on node (\S+)", "host {host} was lost"),  # Open MPI, of ORTE and PRRTE
    (r"(?:ssh: )?connect to host (\S+) port", "host {host} cannot be reached"),
    (r"Connection to (\S+) closed by remote host", "the connection to host {host} was closed"),  # of ssh
    (r"Timeout, server (\S+) not responding", "host {host} does not answer"),
    (r"PID \d+ RUNNING AT (\S+)", "a process on host {host} was killed"),  # MPICH
)
_RAY_IP = re.compile(r"\bIp(?: address)?: ?([0-9a-fA-F:.]+)|node IP ([0-9.]+)", re.IGNORECASE)
_NODE_REASONS = {
    "DeletionByTaintManager": "its node does not answer, or was taken out of use",
    "DeletionByPodGC": "its node is gone",
    "EvictionByEvictionAPI": "it was evicted",
    "PreemptionByScheduler": "it made room for another",
    "TerminationByKubelet": "its node shut down, or had too little left",
}
"""Reasons of a pod's condition DisruptionTarget (kubernetes.io, Disruptions, Pod disruption conditions)."""


_SSH = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key verification failed|host key is known for",
        _REFUSED_CODE,
        "its host key is not the one that is known, or none is known: compare `ssh-keyscan {name} | ssh-keygen -lf -` "
        "with the fingerprint that the machine's owner tells you, then put the key into known_hosts, or write "
        "cluster.host_keys: accept-new for machines that were never seen",
    ),
    (
        r"Permission denied|Too many authentication failures",
        _REFUSED_CODE,
        "it refuses this user and key; try `ssh -o BatchMode=yes {name} true`, and see cluster.user and identity_file",
    ),
    (
        r"Could not resolve|Connection refused|timed out|No route to host|Network is unreachable|Connection closed",
        69,
        "it cannot be reached; is it up, and are its name, cluster.port and cluster.jump right?",
    ),
    (
        r"No module named '?meshwright|ModuleNotFoundError",
        69,
        "its Python has no meshwright; install it there, or name another interpreter with cluster.python",
    ),
)


def host_in_mpi(log: str) -> str | None:
    """The host that an mpiexec ended for; None where it names none.

    Args:
        log: what it complained of.

    >>> host_in_mpi("ssh: connect to host h2 port 22: No route to host")
    'h2'
    """
    found = next(filter(None, (re.search(pattern, log) for pattern, _ in _MPI)), None)
    return None if found is None else found[1]


def lost_in_mpi(code: int, log: str) -> str:
    """Why an mpiexec ended before its ranks had told their end.

    Args:
        code: of mpiexec.
        log: what it complained of.

    >>> lost_in_mpi(1, "PRTE has lost communication\\n  Remote daemon: [prterun-h1-34@0,1] on node h2")
    'host h2 was lost (mpiexec ended with code 1)'
    """
    refused = refusal(log)
    if refused:
        return f"{refused} (mpiexec ended with code {code})"
    for pattern, words in _MPI:
        found = re.search(pattern, log)
        if found:
            return f"{words.format(host=found[1])} (mpiexec ended with code {code})"
    said = f": {words}" if (words := telling(log)) else ""
    return f"mpiexec ended with code {code} and names no host that it lost{said}; see logs/mpiexec.log"


def unheard_code(code: int, log: str) -> int:
    """Exit code of a run whose mpiexec ended before any rank said a word.

    Args:
        code: of mpiexec.
        log: what it complained of.

    >>> unheard_code(1, "mpiexec has detected an attempt to run as root."), unheard_code(255, "")
    (77, 69)
    """
    if refusal(log):
        return _REFUSED_CODE
    return _BROKEN_CODE if kind_of(code, log) == "import_error" else LOST_CODE


def lost_in_ray(name: str, address: str, error: str) -> str:
    """What the loss of an actor means.

    Args:
        name: of its node, in this run.
        address: of its node; empty where it was not known yet.
        error: what Ray says.

    >>> lost_in_ray("node1", "10.0.0.2", "The actor died unexpectedly before finishing this task.")
    'node1 at 10.0.0.2 was lost: The actor died unexpectedly before finishing this task'
    """
    found = _RAY_IP.search(error)
    where = address or (next(filter(None, found.groups())) if found else "")
    first = next((line.strip() for line in error.splitlines() if line.strip()), "").rstrip(".")
    return f"{name}{f' at {where}' if where else ''} was lost{f': {first[:300]}' if first else ''}"


def explain_end(name: str, code: int, log: str) -> Mapping[str, Any]:
    """What the end of a connection means whose agent said nothing: fields of its last event.

    Args:
        name: of the host.
        code: exit status of ssh: 255 is ssh's own, or a signal that killed the agent; others are the agent's.
        log: what ssh and the agent's start wrote to standard error.

    >>> explain_end("gpu02", 255, "ssh: connect to host gpu02 port 22: Connection refused")["exit_code"]
    69
    """
    said = f" (ssh says: {words})" if (words := telling(log)) else ""
    for pattern, exit_code, advice in _SSH:
        if re.search(pattern, log):
            return {"exit_code": exit_code, "message": f"host {name}: {advice.format(name=name)}{said}"}
    if code in (126, 127):
        return {"exit_code": 69, "message": f"host {name}: the agent could not be started{said}; see cluster.python"}
    what = "the connection was lost, or the agent was killed" if code == 255 else f"the agent ended with code {code}"
    return {"exit_code": 69, "message": f"host {name}: {what}{said}; its ranks were ended"}


def pods_ended(pods: Iterable[Mapping[str, Any]]) -> list[tuple[str, Lost]]:
    """Names of pods that ended badly, each with why; first those that went for what happened to their nodes.

    Args:
        pods: objects as kubectl prints them.
    """
    found = [(pod["metadata"]["name"], lost) for pod in pods if (lost := _of_pod(pod)) is not None]
    return sorted(found, key=lambda each: not each[1].disrupted)


def _of_pod(pod: Mapping[str, Any]) -> Lost | None:
    name, node = pod["metadata"]["name"], pod.get("spec", {}).get("nodeName", "no node")
    status, where = pod.get("status", {}), f"pod {name} on node {node}"
    for each in status.get("conditions", []):
        if each["type"] == "DisruptionTarget" and each["status"] == "True":
            why = _NODE_REASONS.get(each.get("reason", ""), each.get("message") or each.get("reason", "no reason"))
            return Lost(LOST_CODE, f"{where}: {why}", disrupted=True)
    if status.get("reason") in ("NodeLost", "NodeShutdown", "Shutdown", "Evicted", "NodeAffinity"):
        return Lost(LOST_CODE, f"{where}: {status['reason']}", disrupted=True)
    for each in status.get("containerStatuses", []):
        ended = each.get("state", {}).get("terminated") or {}
        if ended.get("exitCode"):
            return Lost(ended["exitCode"], f"{where} ended with code {ended['exitCode']} ({ended.get('reason', '')})")
    return None
