"""`meshwright launch`: runs a job, or prints what it would start."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["launch"]


def launch(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Come back as soon as the run is on its way.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started, and start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Name of this run's directory.")] = None,
) -> None:
    """Run a job to its end.

    The exit code is the first failing rank's own, 128 + N for signal N; 65 for a job that makes no sense.
    """
    from meshwright.launch.launch import LaunchOptions
    from meshwright.launch.launch import launch as run

    options = LaunchOptions(job, tuple(overrides or ()), run_id, dry_run, as_json, detach)
    raise typer.Exit(run(options))
