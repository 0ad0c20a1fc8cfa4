"""Whether nodes are fit for a job: which nodes, what the job wants of them, and the diagnosis."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from meshwright.clusters.evidence import CHECKS, Reach, Wishes
from meshwright.clusters.kubernetes_nodes import machine_of
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.reaching import Reached, Visit, reached_by
from meshwright.clusters.ssh import SshOptions, ssh_words
from meshwright.clusters.verdicts import Diagnosis
from meshwright.launch.exits import Exit
from meshwright.launch.given import counted
from meshwright.launch.load import LoadedJob
from meshwright.launch.registry import cluster_of
from meshwright.launch.request import request_of
from meshwright.launch.variants import load_one
from meshwright.launch.wishes import directories_of, wishes_for
from meshwright.parallel.errors import MeshwrightError, nearest

__all__ = [
    "DoctorError",
    "DoctorOptions",
    "calibrate_to",
    "examine_for",
    "examine_job",
    "left_in",
    "reach_by_ssh",
    "reached_for",
    "wishes_of",
    "without_nodes",
]

_BUSY = 0.1  # of the processors, from which a calibration is said to be disturbed


class DoctorError(MeshwrightError):
    """A doctor that was asked for nodes or checks that are not there."""

    exit_code = int(Exit.USAGE)


@dataclass(frozen=True)
class DoctorOptions:
    """What the command line asks for.

    Args:
        path: of the job; None examines nodes for no job in particular.
        overrides: dotted.key=value.
        hosts: examined by ssh instead of this machine.
        exclude: nodes that are left out.
        checks: which to make; none means what the job says, or all.
        wait_s: how long nodes that others have are waited for.
    """

    path: Path | None = None
    overrides: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    wait_s: float = 600.0


def reach_by_ssh(host: str, environment: Mapping[str, str] = os.environ) -> Reach:
    """How a host is examined by ssh: without questions, and never with an unknown host key.

    Args:
        host: as ssh knows it; ports, users and keys stand in ssh's own configuration.
        environment: where MESHWRIGHT_SSH_CONFIG may name another configuration of ssh, and MESHWRIGHT_PYTHON the words
            that start Python on the host, which otherwise has the path it has here.

    Raises:
        DoctorError: for a host that ssh would take for an option.

    >>> reach_by_ssh("gpu01", {"MESHWRIGHT_PYTHON": "/opt/py"}).argv[-2:]
    ('gpu01', 'exec /opt/py -u -m meshwright.clusters.probe')
    """
    if host.startswith("-") or not host:
        raise DoctorError(f"--host {host!r} is no name of a host")
    python = shlex.split(environment.get("MESHWRIGHT_PYTHON", shlex.quote(sys.executable)))
    options = SshOptions(config=environment.get("MESHWRIGHT_SSH_CONFIG"))
    return Reach(host, ssh_words(options, host, [*python, *PROBE_ARGV[1:]]), by="ssh")


@contextmanager
def reached_for(options: DoctorOptions, loaded: LoadedJob | None, base: Path) -> Iterator[Reached]:
    """The nodes to examine: hosts that are named, or those that the job would get; this machine without a job.

    Args:
        options: of the command line.
        loaded: the job.
        base: directory that relative ones start from.

    Raises:
        UnavailableError: when the job's cluster does not give them.
    """
    visit = Visit(_open_variables(loaded), options.wait_s, _tell)
    if options.hosts or loaded is None:
        named = {host: reach_by_ssh(host).argv for host in options.hosts}
        with reached_by(named or {"node0": PROBE_ARGV}, "ssh" if named else "here", visit) as found:
            yield found
        return
    cluster, request = cluster_of(loaded), request_of(loaded, "doctor", base=base, reveal=False)
    request = request_of(counted(cluster, loaded, request), "doctor", base=base, reveal=False)
    with cluster.reached(request, visit) as found:
        yield found


def _open_variables(loaded: LoadedJob | None) -> dict[str, str]:
    """Our own variables without those that hold a secret of the job, whatever they are called."""
    sources = [] if loaded is None else [each.from_env for each in loaded.job.secrets.values()]
    hidden = {os.environ[name] for name in sources if name is not None and name in os.environ}
    return {name: value for name, value in os.environ.items() if value not in hidden}


def _tell(line: str) -> None:
    sys.stderr.write(f"meshwright: {line}\n")
    sys.stderr.flush()


def without_nodes(loaded: LoadedJob | None, names: tuple[str, ...]) -> LoadedJob | None:
    """A job whose queue is told to leave nodes out; of other jobs they are left out of what is reached."""
    if loaded is None or not names or loaded.job.cluster.type not in ("slurm", "kubernetes"):
        return loaded
    cluster: Any = loaded.job.cluster
    names = tuple(map(machine_of, names)) if cluster.type == "kubernetes" else names
    told = cluster.model_copy(update={"exclude": (*cluster.exclude, *names)})
    return replace(loaded, job=loaded.job.model_copy(update={"cluster": told}))


def left_in(reached: Reached, names: tuple[str, ...]) -> Reached:
    """Nodes without those that are to be left out.

    Raises:
        DoctorError: when one of them is not there, or none is left.
    """
    known = [reach.name for reach in reached.reaches]
    for name in names:
        if name not in known:
            raise DoctorError(f"--exclude {name}: there is no such node; {nearest(name, known)}")
    kept = tuple(reach for reach in reached.reaches if reach.name not in names)
    if not kept:
        raise DoctorError("every node is excluded; leave one in")
    return replace(reached, reaches=kept)


def wishes_of(options: DoctorOptions, loaded: LoadedJob | None, base: Path) -> Wishes:
    """What a job wants of its nodes; without a job, what any run needs.

    Raises:
        DoctorError: for a check that there is not.
    """
    for check in options.checks:
        if check not in CHECKS:
            raise DoctorError(f"--check {check}: there is no such check; {nearest(check, CHECKS)}")
    if loaded is None:
        return Wishes(options.checks or CHECKS, (str(base),))
    here = not options.hosts and loaded.job.cluster.type == "local"
    return wishes_for(loaded.job, directories_of(loaded, base), options.checks, here=here)


def examine_for(options: DoctorOptions, base: Path) -> Diagnosis:
    """Examines the nodes that a command line asks for.

    Raises:
        MeshwrightError: for a job or an option that makes no sense; nothing was started.
    """
    return examine_job(options, None if options.path is None else load_one(options.path, options.overrides), base)


def examine_job(options: DoctorOptions, loaded: LoadedJob | None, base: Path) -> Diagnosis:
    """Examines the nodes of a job that is read; see `examine_for`."""
    from meshwright.clusters.examine import examine
    from meshwright.clusters.health import diagnose

    wishes, told = wishes_of(options, loaded, base), loaded
    if not options.hosts:  # which are reached whatever a queue gives
        told = without_nodes(loaded, options.exclude)
    with reached_for(options, told, base) as reached:
        found = reached if told is not loaded else left_in(reached, options.exclude)
        return diagnose(examine(found, wishes), wishes, options.exclude)


def calibrate_to(path: Path, tell: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Calibrates this machine, writes its entry, and says how well it fits.

    Args:
        path: of the entry; an older one is replaced.
        tell: called with lines of progress.

    Raises:
        DoctorError: the file is something else, or ranks could not measure.
    """
    from meshwright.clusters.calibrate import calibrated, written
    from meshwright.clusters.calibration import CalibrationError, is_calibration

    if path.exists() and not is_calibration(path):
        raise DoctorError(f"{path} is no calibration and would be overwritten; name another file after --calibrate")
    if not path.absolute().parent.is_dir():
        raise DoctorError(f"{path} cannot be written: there is no directory {path.absolute().parent}")
    try:
        found = calibrated(tell)
    except CalibrationError as error:
        raise DoctorError(str(error)) from error
    path.write_text(written(found), encoding="utf-8")
    return found, "\n".join([f"{path}: {_machine(found)}", *_fits(found)]) + "\n"


def _machine(found: dict[str, Any]) -> str:
    told = found["calibrated"]
    return f"{found['gpu']['name']} with {told['cores']} cores, torch {told['torch']}, {told['seconds']:.0f} s"


def _fits(found: dict[str, Any]) -> Iterator[str]:
    """Rates, how well they fit, and what disturbed them."""
    for name, rate in found["gpu"]["flops_per_s"].items():
        yield f"  {name:<5} products {rate / 1e9:.4g} GFLOP/s"
    for ranks, errors in found["mean_error_percent"].items():
        said = ", ".join(f"{name} {value:g}%" for name, value in errors.items())
        yield f"  {ranks} rank{'s' if ranks > 1 else ''}, mean error: {said}"
    if (busy := found["calibrated"]["busy"]) > _BUSY:
        yield (
            f"  OTHER PROGRAMS took {busy:.0%} of the processors: steps will be predicted too long, and waiting above "
            "all; calibrate again when it is quiet"
        )
