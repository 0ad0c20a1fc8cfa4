"""`meshwright attach`: looks at a run until it is over."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.runs import find_run
from meshwright.launch.summary import follow_array
from meshwright.launch.watch import watch

__all__ = ["attach"]


def attach(run: Annotated[str, typer.Argument(help="Id of a run, or its directory.")]) -> None:
    """Print what a run says, from its start, until it is over; Ctrl-C leaves it running.

    The exit code is the run's.
    """
    known = find_run(run)
    if known.runs and known.job is not None:  # a sweep in a queue has no launcher of its own to listen to
        raise typer.Exit(follow_array(known))
    now = watch(known)
    if now.exit_code or not Path(known.run_dir, "launcher.log").exists():
        sys.stderr.write(f"meshwright: run {known.run_id} {now.state}{f': {now.detail}' if now.detail else ''}\n")
    raise typer.Exit(int(now.exit_code or 0))
