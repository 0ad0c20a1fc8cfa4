"""`meshwright show`: the mesh, what wrapping does to the model, and what a step costs; nothing is started."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.rehearse import report_on_meta

if TYPE_CHECKING:
    from meshwright.parallel.report import WrapReport

__all__ = ["draw_accumulation", "show"]


def show(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print the mesh, the wrap report, the order of a step and its predicted collectives."""
    loaded = load_job(job, overrides or ())
    report = _report(loaded) if loaded.job.model is not None else None
    if as_json:
        shown: dict[str, Any] = {
            "name": loaded.job.name,
            "mesh": loaded.job.mesh.degrees(),
            "ranks": loaded.job.mesh.world_size,
            "report": None if report is None else report.as_dict(),
        }
        sys.stdout.write(json.dumps(shown) + "\n")
        return
    sys.stdout.write(f"{loaded.job.name}: {loaded.job.mesh}, {loaded.job.mesh.world_size} ranks\n")
    if report is not None:
        sys.stdout.write(f"{report}\norder of one step on every rank:\n")
        sys.stdout.write(f"  {draw_accumulation(loaded.job.parallel.num_microbatches)}\n")


def draw_accumulation(num_microbatches: int) -> str:
    """One rank's actions in one step: F forward, B backward, with the micro-batch; R the end of the reduction.

    >>> draw_accumulation(2)
    'F0 B0 F1 B1 R'
    """
    return " ".join([*(f"F{index} B{index}" for index in range(num_microbatches)), "R"])


def _report(loaded: LoadedJob) -> "WrapReport":
    return report_on_meta(loaded)[1]
