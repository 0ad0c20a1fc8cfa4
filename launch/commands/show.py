"""`meshwright show`: the mesh, what wrapping does to the model, and what a step costs; nothing is started."""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.launch.load import LoadedJob
from meshwright.launch.rehearse import report_on_meta, settled_on_meta
from meshwright.launch.variants import load_one
from meshwright.parallel.errors import PlotError, ScheduleError, nearest
from meshwright.parallel.pipeline.actions import Kind, Schedule
from meshwright.parallel.pipeline.draw import drawn
from meshwright.parallel.pipeline.picture import draw_picture
from meshwright.parallel.pipeline.timeline import Costs, Timeline, timeline
from meshwright.parallel.pipeline.trace import trace

if TYPE_CHECKING:
    from torch import nn

    from meshwright.parallel.report import WrapReport

__all__ = ["show"]

_Order = tuple[Schedule, Timeline]

_COSTS = tuple(field.name for field in fields(Costs) if field.name not in ("stages", "unit_s"))


def show(
    job: Annotated[Path, typer.Argument(help="The job file.")],
    *,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, over the file's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write the order of a step as a PNG.")] = None,
    events: Annotated[Path | None, typer.Option("--trace", help="Write it as a trace for Perfetto.")] = None,
    costs: Annotated[
        list[str] | None,
        typer.Option("--cost", help=f"What the order is timed with, such as latency=0.2; of {', '.join(_COSTS)}."),
    ] = None,
) -> None:
    """Print the mesh, the wrap report, the order of a step and its predicted collectives."""
    given = _costs(costs or ())
    loaded = load_one(job, overrides or ())
    model, report = report_on_meta(loaded) if loaded.job.model is not None else (None, None)
    planned = None if model is None else _planned(loaded, model, given)
    if picture is not None or events is not None:
        _write(loaded, planned, picture=picture, events=events)
    if as_json:
        sys.stdout.write(json.dumps(_as_dict(loaded, report, planned)) + "\n")
        return
    sys.stdout.write(f"{loaded.job.name}: {loaded.job.mesh}, {loaded.job.mesh.world_size} ranks\n")
    if planned is not None:
        unit = f"the forward of a block takes {given.forward:g}, its backward {given.backward:g}"
        sys.stdout.write(f"{report}\norder of one step on every rank of the pipeline ({unit}):\n{_text(planned[1])}\n")


def _costs(words: Iterable[str]) -> Costs:
    """Reads name=value.

    Raises:
        ScheduleError: for other names, and what is no number.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _COSTS:
            raise ScheduleError(f"--cost {word}: there is no cost {name!r}; {nearest(name, _COSTS)}")
        if not re.fullmatch(r"\d+(\.\d+)?", value) or (name == "forward" and not float(value)):
            raise ScheduleError(f"--cost {word}: {value!r} is no time; write {name}=0.5")
        found[name] = float(value)
    return Costs(**found)


def _planned(loaded: LoadedJob, model: "nn.Module", costs: Costs) -> _Order:
    """The schedule of a step and its times, where all blocks are alike; a model without blocks is one block."""
    from dataclasses import replace

    from meshwright.parallel.blocks import find_blocks

    options = settled_on_meta(loaded, model)
    placement, schedule = options.chosen(loaded.job.mesh, max(1, len(find_blocks(model, options.blocks))))
    sizes = {stage: float(len(placement.blocks(stage))) for stage in range(schedule.num_stages)}
    return schedule, timeline(schedule, replace(costs, stages=sizes))


def _write(loaded: LoadedJob, planned: _Order | None, *, picture: Path | None, events: Path | None) -> None:
    """Writes the files that were asked for.

    Raises:
        PlotError: when they cannot be written, or there is nothing to draw.
    """
    if planned is None:
        raise PlotError("the job runs a command, so its steps have no order to draw; give it model: and data:")
    _, order = planned
    try:
        if events is not None:
            events.write_text(trace(order))
        if picture is not None:
            draw_picture({f"{loaded.job.name}: {loaded.job.mesh}, {loaded.job.parallel.schedule}": order}, picture)
    except OSError as error:
        raise PlotError(f"{error.filename} cannot be written: {error.strerror}; choose another path") from error


def _as_dict(loaded: LoadedJob, report: "WrapReport | None", planned: _Order | None) -> dict[str, Any]:
    return {
        "name": loaded.job.name,
        "mesh": loaded.job.mesh.degrees(),
        "ranks": loaded.job.mesh.world_size,
        "report": None if report is None else report.as_dict(),
        "schedule": None if planned is None else _order_as_dict(*planned),
    }


def _order_as_dict(schedule: Schedule, order: Timeline) -> dict[str, Any]:
    return {
        "name": schedule.name,
        "text": schedule.write(),
        "homes": schedule.homes,
        "makespan": order.makespan,
        "bubble": order.bubble,
        "gathers": schedule.count(Kind.GATHER),
        "reductions": schedule.count(Kind.REDUCE),
    }


def _text(order: Timeline) -> str:
    label = len(f"rank {order.num_ranks - 1}  ")
    width = max(20, shutil.get_terminal_size((80, 24)).columns - label)
    return drawn(order, width=width, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
