"""From the cluster a job names to the one that runs it."""

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from meshwright.clusters.contract import Cluster
from meshwright.clusters.environment import inherited
from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.local import LocalCluster
from meshwright.clusters.ssh import SshCluster, SshHost, SshOptions
from meshwright.launch.load import LoadedJob

if TYPE_CHECKING:
    from meshwright.launch.spec.clusters import SshCluster as SshBlock

__all__ = ["cluster_of"]


def cluster_of(loaded: LoadedJob, warm: "subprocess.Popen[bytes] | None" = None) -> Cluster:
    """The cluster of a job.

    Args:
        loaded: the job.
        warm: an agent of this machine that was started already; only the local cluster takes it.
    """
    found = loaded.job.cluster
    if found.type == "local":
        return LocalCluster(warm)
    if found.type == "ssh":
        return _ssh(found, passed=inherited(loaded.job.env_pass, os.environ))
    raise UnavailableError(f"cluster type {found.type!r} can be planned with, but not be started yet")


def _ssh(found: "SshBlock", passed: Mapping[str, str]) -> SshCluster:
    python = found.python or sys.executable
    hosts = [
        SshHost(host.name, host.addr or host.name, host.slots, host.gpus, host.python or python, found.env | host.env)
        for host in found.hosts
    ]
    options = SshOptions(
        user=found.user,
        port=found.port,
        identity_file=found.identity_file,
        known_hosts=found.known_hosts,
        host_keys=found.host_keys,
        jump=found.jump,
        config=found.config,
        connect_timeout_s=found.connect_timeout,
        lost_after_s=found.lost_after,
    )
    return SshCluster(hosts, options, passed)
