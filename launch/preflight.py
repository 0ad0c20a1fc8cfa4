"""Nodes are examined before ranks start on them, as the `health:` block of a job says.

fit      the run starts
sick     abort: nothing starts, exit code 78 · warn: it starts all the same · exclude_node: hosts that the job names
         besides those it needs take the places of sick ones, and are examined too; Slurm and Ray give others

On Slurm and Ray, which choose nodes themselves, that is when a run has them (`admission`); elsewhere before it is one.
On Kubernetes pods like those of the run show which nodes it would get: it is kept from sick ones and drawn to those
that are fit, also when its pods are started again.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.clusters.kubernetes_nodes import machine_of
from meshwright.clusters.verdicts import Diagnosis
from meshwright.launch.doctor import DoctorOptions, examine_job
from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.launch.spares import SpareError, without
from meshwright.parallel.errors import MeshwrightError

if TYPE_CHECKING:
    from meshwright.launch.spec.health import Health

__all__ = ["PreflightError", "judged", "on_fit_nodes"]

_LATER = ("slurm", "ray")
"""Clusters that give a run its nodes when it starts, where they are examined then."""


class PreflightError(MeshwrightError):
    """Nodes that are not fit for a job; nothing was started."""

    exit_code = int(Exit.PREFLIGHT)


def _by_doctor(loaded: LoadedJob, base: Path) -> Diagnosis:
    return examine_job(DoctorOptions(), loaded, base)


def on_fit_nodes(
    loaded: LoadedJob, base: Path, *, examine: Callable[[LoadedJob, Path], Diagnosis] = _by_doctor
) -> LoadedJob:
    """The job, on nodes that its checks found fit; as it is where it asks for none.

    Args:
        loaded: with `health.preflight`.
        base: directory that relative ones start from.
        examine: the nodes that the job would run on.

    Raises:
        PreflightError: for sick nodes that are not to be, or cannot be, done without.
    """
    health = loaded.job.health
    if not health.preflight or loaded.job.cluster.type in _LATER:
        return loaded
    left_out: tuple[str, ...] = ()
    while True:
        found = replace(examine(loaded, base), excluded=left_out)
        sick = _machines(loaded, judged(health, found))
        if not sick:
            unfit = _machines(loaded, found.sick)
            return _drawn(loaded, tuple(each for each in _machines(loaded, found.nodes) if each not in unfit))
        again = ", ".join(name for name in sick if name in left_out)
        if again:  # it would be for ever
            raise PreflightError(f"{again} not fit, and still among the nodes though left out; nothing was started")
        loaded, left_out = _without(loaded, sick), (*left_out, *sick)


def _machines(loaded: LoadedJob, names: tuple[str, ...]) -> tuple[str, ...]:
    """Nodes by the names that their cluster has for them: several pods of Kubernetes may be on one."""
    if loaded.job.cluster.type != "kubernetes":
        return names
    return tuple(dict.fromkeys(map(machine_of, names)))


def _drawn(loaded: LoadedJob, fit: tuple[str, ...]) -> LoadedJob:
    """A job whose nodes are only chosen when it starts, on those that were found fit as far as they are still free."""
    cluster = loaded.job.cluster
    if cluster.type != "kubernetes":
        return loaded
    told = cluster.model_copy(update={"prefer": tuple(dict.fromkeys((*cluster.prefer, *fit)))})
    return replace(loaded, job=loaded.job.model_copy(update={"cluster": told}))


def judged(health: "Health", found: Diagnosis) -> tuple[str, ...]:
    """Says what was found, and what follows: nodes that are to be left out, or none where ranks may start.

    Args:
        health: of the job.
        found: on its nodes.

    Raises:
        PreflightError: where they are not fit, and the job wants that to be its end.
    """
    if found.fit:
        conclusion = found.table().splitlines()[-1]
        sys.stderr.write(f"meshwright: {', '.join(health.preflight)} checked; {conclusion}\n")
        return ()
    sys.stderr.write(f"{found.table()}\n")
    if health.on_fail == "warn":
        sys.stderr.write("meshwright: the run starts all the same (health.on_fail: warn)\n")
        return ()
    if health.on_fail == "abort" or not found.sick:
        who = ", ".join(found.sick) or "all nodes together"
        raise PreflightError(f"{who} not fit; the table above says what to do. Nothing was started")
    return found.sick


def _without(loaded: LoadedJob, sick: tuple[str, ...]) -> LoadedJob:
    try:
        return without(loaded, sick)
    except SpareError as error:
        raise PreflightError(str(error)) from error
