"""`meshwright verify`: is this job's mesh equal to the plain run, here and now."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.load import load_job
from meshwright.launch.rehearse import rehearse

__all__ = ["verify"]


def verify(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Run one step on real ranks of this machine and compare it with the unwrapped model.

    Exit code 0 when loss, gradients and next weights are equal, 1 when they are not.
    """
    report = rehearse(load_job(job, overrides or ())).run()
    sys.stdout.write(json.dumps(report.as_dict()) + "\n" if as_json else f"{report}\n")
    raise typer.Exit(0 if report.ok else 1)
