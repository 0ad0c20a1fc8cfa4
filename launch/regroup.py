"""Which nodes a run goes on with: who takes whose place, whether it shrinks or grows, and who is back."""

import subprocess
from collections.abc import Sequence
from contextlib import suppress

from meshwright.clusters.ssh import ssh_words
from meshwright.launch.engines import ssh_options
from meshwright.launch.load import LoadedJob
from meshwright.launch.sizes import sized
from meshwright.launch.spares import names_of, range_of

__all__ = ["can_return", "change_words", "nodes_back", "used_names"]

_ANSWER_S = 5.0


def used_names(loaded: LoadedJob) -> tuple[str, ...]:
    """Names of the nodes that a job runs on."""
    job = sized(loaded).job
    return names_of(job)[: job.num_nodes]


def change_words(before: Sequence[str], now: Sequence[str], excludes: Sequence[str]) -> str:
    """What becomes of the nodes of a run, for people.

    >>> change_words(("a", "b"), ("a", "c"), ("b",))
    'c in place of b'
    >>> change_words(("a", "b", "c"), ("a", "c"), ("b",))
    'it shrinks from 3 nodes to 2, without b'
    >>> change_words(("a", "c"), ("a", "b", "c"), ())
    'it grows from 2 nodes to 3, with b'
    >>> change_words((), (), ("10.0.0.2-6f1c",))
    'on other nodes than 10.0.0.2-6f1c'
    """
    new = ", ".join(name for name in now if name not in before)
    lost = ", ".join(excludes)
    if not now and lost:  # the cluster chooses them
        return f"on other nodes than {lost}"
    if len(now) == len(before):
        return f"{new} in place of {lost}" if new else "on the same nodes"
    verb = "shrinks" if len(now) < len(before) else "grows"
    sides = [f"without {lost}" if lost else "", f"with {new}" if new else ""]
    return ", ".join([f"it {verb} from {len(before)} nodes to {len(now)}", *filter(None, sides)])


def can_return(loaded: LoadedJob) -> bool:
    """Whether an elastic job has fewer nodes than it takes, and machines that may come back."""
    return loaded.job.cluster.type == "ssh" and len(used_names(loaded)) < loaded.job.num_nodes


def nodes_back(loaded: LoadedJob, names: Sequence[str]) -> tuple[str, ...]:
    """Those of some hosts of an elastic job on which ssh can run a command; pretended nodes never come back.

    Args:
        loaded: as asked for.
        names: of hosts that were lost.
    """
    job = loaded.job
    if job.cluster.type != "ssh" or range_of(job) is None:
        return ()
    options, null = ssh_options(job.cluster), subprocess.DEVNULL
    asked = [
        subprocess.Popen(ssh_words(options, name, ("true",)), stdin=null, stdout=null, stderr=null) for name in names
    ]
    return tuple(
        name for name, each in zip(names, asked, strict=True) if _answered(each, options.connect_timeout_s + _ANSWER_S)
    )


def _answered(asked: "subprocess.Popen[bytes]", timeout_s: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        return asked.wait(timeout_s) == 0
    asked.kill()
    asked.wait()
    return False
