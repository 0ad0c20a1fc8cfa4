"""Nodes are examined before ranks start on them, as the `health:` block of a job says.

fit      the run starts
sick     abort: nothing starts, exit code 78 · warn: it starts all the same · exclude_node: hosts that the job names
         besides those it needs take the places of sick ones, and are examined too
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from meshwright.clusters.verdicts import Diagnosis
from meshwright.launch.doctor import DoctorOptions, examine_job
from meshwright.launch.exits import Exit
from meshwright.launch.load import LoadedJob
from meshwright.launch.spares import SpareError, without
from meshwright.parallel.errors import MeshwrightError

__all__ = ["PreflightError", "on_fit_nodes"]


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
    if not health.preflight:
        return loaded
    left_out: tuple[str, ...] = ()
    while True:
        found = replace(examine(loaded, base), excluded=left_out)
        if found.fit:
            conclusion = found.table().splitlines()[-1]
            sys.stderr.write(f"meshwright: {', '.join(health.preflight)} checked; {conclusion}\n")
            return loaded
        sys.stderr.write(f"{found.table()}\n")
        if health.on_fail == "warn":
            sys.stderr.write("meshwright: the run starts all the same (health.on_fail: warn)\n")
            return loaded
        if health.on_fail == "abort" or not found.sick:
            who = ", ".join(found.sick) or "all nodes together"
            raise PreflightError(f"{who} not fit; the table above says what to do. Nothing was started")
        loaded, left_out = _without(loaded, found.sick), (*left_out, *found.sick)


def _without(loaded: LoadedJob, sick: tuple[str, ...]) -> LoadedJob:
    try:
        return without(loaded, sick)
    except SpareError as error:
        raise PreflightError(str(error)) from error
