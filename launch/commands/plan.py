"""`meshwright plan`: the fastest layout of a job on a cluster that need not exist, and why it is."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from meshwright.clusters.simulated.search import search
from meshwright.launch.plan_picture import draw_plan
from meshwright.launch.plan_report import as_dict, as_text, plan_of
from meshwright.launch.planning import WISHES, Wishes, question_of
from meshwright.launch.variants import load_one

__all__ = ["plan"]

_SHOWN = 5
_WISHES = "; ".join(f"{name}: {meaning}" for name, meaning in WISHES.items())


def plan(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Kind of GPU, such as H100; else resources.gpu_type.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many; else as many as the job's mesh has ranks.")] = None,
    more: Annotated[
        list[str] | None, typer.Option("--with", help=f"name=number. {_WISHES}; numbers of the model.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write where the time goes as a PNG.")] = None,
) -> None:
    """Print the fastest layouts of the job on a cluster, why the next are slower, and the first as keys of the job."""
    loaded, wishes = load_one(job, overrides or ()), Wishes.of(gpu, gpus, more or ())
    asked, notes = question_of(loaded, wishes)
    start_s = time.perf_counter()
    found = search(asked, int(wishes.more.get("show", _SHOWN)))
    told = plan_of(
        found,
        networks="networks" in wishes.more,
        name=loaded.job.name,
        notes=notes,
        search_s=time.perf_counter() - start_s,
        tokens=wishes.more.get("tokens"),
        per_node=None if loaded.job.cluster.type == "local" else asked.cluster.gpus_per_node,
    )
    if picture is not None:
        draw_plan(told, picture)
    sys.stdout.write(json.dumps(as_dict(told)) + "\n" if as_json else as_text(told))
