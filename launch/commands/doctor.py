"""`meshwright doctor`: are these nodes fit to run a job."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.doctor import DoctorOptions, examine_for
from meshwright.launch.exits import Exit

__all__ = ["doctor"]


def doctor(
    job: Annotated[
        Path | None, typer.Argument(help="The job file; without one, what any job needs is checked.")
    ] = None,
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    hosts: Annotated[
        list[str] | None, typer.Option("--host", help="Examine this host by ssh instead; repeat it.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave this node out; repeat it.")] = None,
    checks: Annotated[list[str] | None, typer.Option("--check", help="Make this check only; repeat it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Check whether the nodes are fit: clocks, versions, network, disks, GPUs, and how fast they reduce.

    Exit code 0 when nothing is bad, 78 when something is; sick nodes are named.
    """
    options = DoctorOptions(
        path=job,
        overrides=tuple(overrides or ()),
        hosts=tuple(hosts or ()),
        exclude=tuple(exclude or ()),
        checks=tuple(checks or ()),
    )
    diagnosis = examine_for(options, Path.cwd())
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    sys.stdout.write(f"{json.dumps(diagnosis.as_dict()) if as_json else diagnosis.table(colour=colour)}\n")
    raise typer.Exit(0 if diagnosis.fit else int(Exit.PREFLIGHT))
