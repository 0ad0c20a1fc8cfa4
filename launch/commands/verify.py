"""`meshwright verify`: is this job's mesh equal to the plain run, here and now."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from meshwright.launch.rehearse import rehearse
from meshwright.launch.variants import load_one

__all__ = ["verify"]


def verify(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    sweep_index: Annotated[int | None, typer.Option(help="Run of a job with a sweep.")] = None,
) -> None:
    """Run one step on real ranks of this machine and compare it with the unwrapped model.

    Exit code 0 when loss, gradients and next weights are equal, 1 when they are not.
    """
    report = rehearse(load_one(job, overrides or (), sweep_index)).run()
    sys.stdout.write(json.dumps(report.as_dict()) + "\n" if as_json else f"{report}\n")
    raise typer.Exit(0 if report.ok else 1)
