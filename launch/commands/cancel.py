"""`meshwright cancel`: ends a run."""

import sys
from typing import Annotated

import typer

from meshwright.launch.runs import cancel as end
from meshwright.launch.runs import find_run

__all__ = ["cancel"]


def cancel(run: Annotated[str, typer.Argument(help="Id of a run, or its directory.")]) -> None:
    """End a run: its ranks get SIGTERM, and SIGKILL after the grace of the job."""
    known = find_run(run)
    sys.stdout.write(f"run {known.run_id}: {end(known)}\n")
