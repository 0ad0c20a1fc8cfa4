"""Whether nodes are fit for a job: which nodes, what the job wants of them, and the diagnosis."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.clusters.evidence import CHECKS, Reach, Wishes
from meshwright.clusters.probe import PROBE_ARGV
from meshwright.clusters.ssh import SshOptions, python_words, ssh_words
from meshwright.clusters.verdicts import Diagnosis
from meshwright.launch.engines import ssh_hosts, ssh_options
from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.launch.request import run_dir_of
from meshwright.launch.values import fill
from meshwright.launch.variants import load_one
from meshwright.parallel.errors import MeshwrightError, nearest

if TYPE_CHECKING:
    from meshwright.launch.spec import Job

__all__ = [
    "DoctorError",
    "DoctorOptions",
    "calibrate_to",
    "examine_for",
    "examine_job",
    "reach_by_ssh",
    "reaches_of",
    "wishes_of",
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
    """

    path: Path | None = None
    overrides: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


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


def _reaches_of_job(job: "Job | None") -> list[Reach]:
    """The hosts of a job that names them; for any other, pretended nodes of this machine."""
    if job is not None and job.cluster.type == "ssh":
        options, hosts = ssh_options(job.cluster), ssh_hosts(job.cluster)[: job.num_nodes]
        words = {host.name: python_words(host, PROBE_ARGV[1:]) for host in hosts}
        return [Reach(name, ssh_words(options, name, each), by="ssh") for name, each in words.items()]
    names = job.cluster.names if job is not None and job.cluster.type == "local" else ()
    usual = (f"node{index}" for index in range(1 if job is None else job.num_nodes))
    return [Reach(name, PROBE_ARGV) for name in (names[: job.num_nodes] if job is not None and names else usual)]


def reaches_of(options: DoctorOptions, job: "Job | None") -> tuple[Reach, ...]:
    """The nodes to examine.

    Raises:
        DoctorError: when an excluded node is none of them, or none is left.
    """
    found = [reach_by_ssh(host) for host in options.hosts] or _reaches_of_job(job)
    names = [reach.name for reach in found]
    for name in options.exclude:
        if name not in names:
            raise DoctorError(f"--exclude {name}: there is no such node; {nearest(name, names)}")
    kept = tuple(reach for reach in found if reach.name not in options.exclude)
    if not kept:
        raise DoctorError("every node is excluded; leave one in")
    return kept


def wishes_of(options: DoctorOptions, loaded: LoadedJob | None, base: Path) -> Wishes:
    """What a job wants of its nodes; without a job, what any run needs.

    Raises:
        DoctorError: for a check that there is not.
    """
    _known(options.checks)
    if loaded is None:
        return Wishes(options.checks or CHECKS, (str(base),))
    job = loaded.job
    port, reduce = job.rendezvous.port, job.health.allreduce
    wanted = options.checks or job.health.preflight or CHECKS
    return Wishes(
        checks=tuple(each for each in CHECKS if each in wanted),
        directories=_directories(loaded, base),
        interface=job.rendezvous.interface,
        ports=(port, port) if isinstance(port, int) else job.rendezvous.port_range,
        gpus_per_node=_gpus(job, here=not options.hosts and job.cluster.type == "local"),
        gpu_type=job.resources.gpu_type,
        allreduce_bytes=reduce.size if "health.allreduce.size" in loaded.keys else None,
        min_bus_bytes_per_s=None if reduce.min_busbw_gbps is None else reduce.min_busbw_gbps * 1e9,
    )


def _known(checks: Sequence[str]) -> None:
    for check in checks:
        if check not in CHECKS:
            raise DoctorError(f"--check {check}: there is no such check; {nearest(check, CHECKS)}")


def _directories(loaded: LoadedJob, base: Path) -> tuple[str, ...]:
    """Where runs and checkpoints lie; a run's own directory is not there yet."""
    runs = run_dir_of(loaded, "doctor", base).parent
    checkpoints = base / fill(loaded.job.checkpoint.dir, name=loaded.job.name, run_id="doctor")
    every = loaded.job.checkpoint.every_steps
    return tuple(dict.fromkeys([str(runs), *([str(checkpoints.absolute())] if every else [])]))


def _gpus(job: "Job", *, here: bool) -> int | None:
    """GPUs that each node must have; pretended nodes share those of this machine."""
    asked = job.resources.gpus_per_node or getattr(job.cluster, "gpus_per_node", None)
    if asked is None and job.nproc_per_node == "gpu":
        asked = 1
    return asked * job.num_nodes if asked and here else asked


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

    reaches: Sequence[Reach] = reaches_of(options, None if loaded is None else loaded.job)
    wishes = wishes_of(options, loaded, base)
    return diagnose(examine(reaches, wishes), wishes, options.exclude)


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
