"""Where launches are compared: two pretended nodes of this machine's loopback, or two hosts that are logged in to.

Hosts are network namespaces with an sshd and processes of their own, as in `make lab`; that needs root. Every launcher
reaches them by the same ssh: ours by itself, the others as a person would, who types each host's command there.
"""

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.hosts import Hosts, missing_for_hosts, pretended

__all__ = ["NODES", "Nodes", "here_environment", "hosts", "loopback"]

NODES = 2
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Nodes:
    """Two nodes on which launchers are compared.

    Args:
        name: of the kind.
        address: of the first.
        interface: that ranks talk over.
        settings: dotted key of a job -> value, by which our launcher finds them.
        typed: before the words of each node's command; empty where they are typed here.
    """

    name: str
    address: str
    interface: str
    settings: Mapping[str, Any]
    typed: tuple[tuple[str, ...], ...] = field(default=((), ()))

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every rank of every launcher."""
        found = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface, "DS_BUILD_OPS": "0"}
        return found | {"PYTHONPATH": f"{_ROOT / 'src'}:{_ROOT}"} if self.typed[0] else found

    def words(self, node: int, words: Sequence[str]) -> list[str]:
        """The words that are typed here to have others run on a node."""
        if not self.typed[node]:
            return list(words)
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        line = f"cd {shlex.quote(str(_ROOT))} && exec {shlex.join(['env', *variables, *words])}"
        return [*self.typed[node], line]


@contextmanager
def loopback() -> Iterator[Nodes]:
    """Two nodes of this machine; no name is looked up and no host is logged in to."""
    yield Nodes("two pretended nodes", "127.0.0.1", "lo", {"cluster.simulate_nodes": NODES})


@contextmanager
def hosts() -> Iterator[Nodes]:
    """Two hosts with sshd; they are gone afterwards.

    Raises:
        SystemExit: where they cannot be pretended, with what is missing.
    """
    if lacking := missing_for_hosts():
        raise SystemExit(f"no hosts here: {lacking}")
    with tempfile.TemporaryDirectory(prefix="meshwright-hosts-") as folder, pretended(Path(folder), NODES) as found:
        yield _reached(found)


def _reached(found: Hosts) -> Nodes:
    key, known = str(found.key), f"UserKnownHostsFile={found.known_hosts}"
    ssh = ("ssh", "-F", str(found.folder / "ssh_config"), "-i", key, "-o", known, "-o", "BatchMode=yes", "-l", "root")
    named = [f"{{name: {host.name}, addr: {host.address}}}" for host in found.hosts]
    settings = {
        "cluster.type": "ssh",
        "cluster.hosts": f"[{', '.join(named)}]",
        "cluster.user": "root",
        "cluster.identity_file": found.key,
        "cluster.known_hosts": found.known_hosts,
        "cluster.config": found.folder / "ssh_config",
        "cluster.env.PYTHONPATH": _ROOT / "src",
        "cluster.env.OMP_NUM_THREADS": "'1'",
        "nodes": NODES,
    }
    typed = tuple((*ssh, host.name) for host in found.hosts)
    return Nodes("two hosts with sshd", found.hosts[0].address, "eth0", settings, typed)


def here_environment(nodes: Nodes) -> dict[str, str]:
    """Variables of a launcher that is typed here."""
    return {**os.environ, **nodes.environment}
