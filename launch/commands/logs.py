"""`meshwright logs`: what the ranks of a run said."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from meshwright.clusters.records import clean_line
from meshwright.clusters.saved import plan_from
from meshwright.launch.logs import LogTail
from meshwright.launch.looks import Looks
from meshwright.launch.runs import RunError, fetch, find_run
from meshwright.launch.values import fill

__all__ = ["logs"]

_LOOK_S = 0.5


def logs(
    run: Annotated[str, typer.Argument(help="Id of a run, or its directory.")],
    *,
    rank: Annotated[int | None, typer.Option(help="Only this rank.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the run is over.")] = False,
) -> None:
    """Print the merged output of a run's ranks, secrets masked; of a sweep that of all runs, with their ids."""
    known = find_run(run)
    folders = [Path(each) for each in known.runs] or [Path(known.run_dir)]
    tails = [_tail(folder, f"{folder.name} " if known.runs else "", rank) for folder in folders]
    fetch(known)
    _print(tails, looks=Looks(known) if follow else None)


def _tail(run_dir: Path, prefix: str, rank: int | None) -> LogTail:
    start = "" if rank is None else _start_of(run_dir, rank)

    def show(raw: bytes) -> None:
        line = clean_line(raw)
        if line.startswith(start):
            sys.stdout.write(f"{prefix}{line}\n")

    return LogTail(run_dir / "merged.log", show)


def _print(tails: Sequence[LogTail], looks: Looks | None) -> None:
    while looks is not None:
        looks.news()
        for tail in tails:
            while tail.read():
                sys.stdout.flush()
        if looks.over:
            break
        time.sleep(_LOOK_S)
    for tail in tails:
        tail.close()


def _start_of(run_dir: Path, rank: int) -> str:
    """How lines of a rank begin.

    Raises:
        RunError: when there is no such rank, or its lines cannot be told apart.
    """
    plan = plan_from(json.loads((run_dir / "plan.json").read_text()))
    prefix = json.loads((run_dir / "job.json").read_text())["logs"]["prefix"]
    if not 0 <= rank < plan.world_size:
        raise RunError(f"--rank {rank}: the run has ranks 0 to {plan.world_size - 1}")
    if "{rank}" not in prefix:
        raise RunError(f"logs.prefix is {prefix!r} in this job, so its lines do not say their rank")
    return f"{fill(prefix, host=plan.host_of(rank), rank=str(rank))} | "
