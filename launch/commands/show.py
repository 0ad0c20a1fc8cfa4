"""`meshwright show`: the mesh, what wrapping does to the model, and what a step costs; nothing is started."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.launch.load import LoadedJob, load_job
from meshwright.launch.rehearse import report_on_meta, settled_on_meta
from meshwright.parallel.pipeline.draw import drawn
from meshwright.parallel.pipeline.timeline import timeline

if TYPE_CHECKING:
    from torch import nn

__all__ = ["show"]


def show(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Print the mesh, the wrap report, the order of a step and its predicted collectives."""
    loaded = load_job(job, overrides or ())
    model, report = report_on_meta(loaded) if loaded.job.model is not None else (None, None)
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
    if model is not None:
        sys.stdout.write(f"{report}\norder of one step on every rank (blocks of one size, backward twice a forward):\n")
        sys.stdout.write(f"{_order(loaded, model)}\n")


def _order(loaded: LoadedJob, model: "nn.Module") -> str:
    """The schedule of a step, drawn; a model without blocks is one stage."""
    from meshwright.parallel.blocks import find_blocks

    options = settled_on_meta(loaded, model)
    _, schedule = options.chosen(loaded.job.mesh, max(1, len(find_blocks(model, options.blocks))))
    return drawn(timeline(schedule), width=72)
