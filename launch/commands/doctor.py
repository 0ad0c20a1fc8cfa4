"""`meshwright doctor`: are these nodes fit to run a job."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.doctor import DoctorError, DoctorOptions, calibrate_to, examine_for
from meshwright.launch.exits import Exit
from meshwright.launch.values import parse_duration

__all__ = ["doctor"]


def doctor(
    job: Annotated[
        Path | None,
        typer.Argument(
            help="The job file; without one, what any job needs is checked. With --calibrate, the entry to write."
        ),
    ] = None,
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="Examine this host by ssh instead; repeat it.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave this node out; repeat it.")] = None,
    checks: Annotated[list[str] | None, typer.Option("--check", help="Make this check only; repeat it.")] = None,
    wait: Annotated[str, typer.Option(help="How long nodes that others have are waited for, such as 30m.")] = "10m",
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine and write what predictions need to know of it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Check whether the nodes are fit: clocks, versions, network, disks, GPUs, and how fast they reduce.

    The nodes are those that the job would get, on every cluster; a queue is asked for them for a few minutes. Exit code
    0 when nothing is bad, 78 when something is; sick nodes are named. With --calibrate nothing is checked: products,
    memory, attention and collectives of this machine are timed, and an entry of the catalog is fitted.
    """
    sets, named, without, only = (tuple(each or ()) for each in (overrides, hosts, exclude, checks))
    options = DoctorOptions(job, sets, named, without, only, _seconds(wait))
    raise typer.Exit((_calibrate if calibrate else _examine)(options, as_json=as_json))


def _seconds(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise DoctorError(f"--wait {text}: {error}") from None


def _examine(options: DoctorOptions, *, as_json: bool) -> int:
    diagnosis = examine_for(options, Path.cwd())
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    sys.stdout.write(f"{json.dumps(diagnosis.as_dict()) if as_json else diagnosis.table(colour=colour)}\n")
    return 0 if diagnosis.fit else int(Exit.PREFLIGHT)


def _calibrate(options: DoctorOptions, *, as_json: bool) -> int:
    """Writes the entry, progress to standard error."""
    others = (*options.overrides, *options.hosts, *options.exclude, *options.checks)
    if others:
        raise DoctorError(f"--calibrate measures this machine and takes no {others[0]!r}; give it a file or nothing")

    def tell(line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    found, text = calibrate_to(options.path or Path("calibration.yaml"), tell)
    sys.stdout.write(f"{json.dumps(found)}\n" if as_json else text)
    return 0
